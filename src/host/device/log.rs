//! The log of writes as dm-log-writes leaves it, read and replayed.
//!
//! The format is described in Documentation/admin-guide/device-mapper/log-writes.rst of the kernel and at the top of
//! drivers/md/dm-log-writes.c: a superblock of one sector, then entries, each one sector and the data that it is about.
//!
//! Pure but for what is read and written through it: on a helper thread, no locks. Must never: trust a number of the log.

use std::io::{self, Read, Seek, SeekFrom, Write};

/// At the beginning of the superblock, and the version that follows it.
const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;
/// Flags of an entry.
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// The fields at the beginning of an entry; a mark's text follows them.
const ENTRY: usize = 32;
/// Sectors of disks are of these sizes.
const SECTORS: [u32; 2] = [512, 4096];
/// How much is copied at a time.
const PIECE: u64 = 1 << 20;

/// Why a log cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("there is no log of dm-log-writes")]
    NoLog,
    #[error("entry {0} of the log makes no sense")]
    Broken(u64),
    #[error("the log has no mark {wanted:?}")]
    NoMark { wanted: String, marks: Vec<String> },
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What was replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    pub entries: u64,
    pub writes: u64,
    pub discards: u64,
    pub bytes: u64,
}

/// One entry, without its data.
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    mark: Option<String>,
}

/// An open log.
pub struct Log<R> {
    source: R,
    entries: u64,
    sector_size: u64,
}

impl<R: Read + Seek> Log<R> {
    pub fn open(mut source: R) -> Result<Log<R>, LogError> {
        let mut head = [0; 28];
        source.seek(SeekFrom::Start(0))?;
        source.read_exact(&mut head).map_err(|_| LogError::NoLog)?;
        let size = u32::from_le_bytes([head[24], head[25], head[26], head[27]]);
        if number(&head, 0) != MAGIC || number(&head, 8) != VERSION || !SECTORS.contains(&size) {
            return Err(LogError::NoLog);
        }
        Ok(Log { source, entries: number(&head, 16), sector_size: size.into() })
    }

    /// All marks, in their order.
    pub fn marks(&mut self) -> Result<Vec<String>, LogError> {
        let mut marks = Vec::new();
        self.walk(|entry, _| {
            marks.extend(entry.mark.clone());
            Ok(true)
        })?;
        Ok(marks)
    }

    /// Writes what was written up to a mark (its first, if it is there twice). `size` is that of the target.
    ///
    /// # Errors
    /// When there is no such mark: then nothing was written. Or the log is broken.
    pub fn replay(&mut self, mark: &str, size: u64, target: &mut (impl Write + Seek)) -> Result<Replayed, LogError> {
        let marks = self.marks()?;
        if !marks.iter().any(|known| known == mark) {
            return Err(LogError::NoMark { wanted: mark.into(), marks });
        }
        let sector_size = self.sector_size;
        let mut done = Replayed::default();
        self.walk(|entry, source| {
            if entry.mark.as_deref() == Some(mark) {
                return Ok(false);
            }
            done.entries += 1;
            if entry.mark.is_some() || entry.sectors == 0 {
                return Ok(true);
            }
            let (offset, length) = (entry.sector.checked_mul(sector_size), entry.sectors.checked_mul(sector_size));
            let (Some(offset), Some(length)) = (offset, length) else { return Err(LogError::Broken(done.entries)) };
            if offset.checked_add(length).is_none_or(|end| end > size) {
                return Err(LogError::Broken(done.entries));
            }
            target.seek(SeekFrom::Start(offset))?;
            if entry.flags & DISCARD != 0 {
                done.discards += 1;
                copy(&mut io::repeat(0), target, length)?;
            } else {
                done.writes += 1;
                done.bytes += length;
                copy(source, target, length)?;
            }
            Ok(true)
        })?;
        Ok(done)
    }

    /// Shows each entry, with the source at its data, until `see` says no.
    fn walk(&mut self, mut see: impl FnMut(&Entry, &mut R) -> Result<bool, LogError>) -> Result<(), LogError> {
        let mut at = self.sector_size;
        let mut sector = vec![0; self.sector_size as usize];
        for nth in 1..=self.entries {
            self.source.seek(SeekFrom::Start(at))?;
            self.source.read_exact(&mut sector).map_err(|_| LogError::Broken(nth))?;
            let entry = Entry::read(&sector).ok_or(LogError::Broken(nth))?;
            if !see(&entry, &mut self.source)? {
                break;
            }
            let data = if entry.flags & DISCARD != 0 { Some(0) } else { entry.sectors.checked_mul(self.sector_size) };
            let next = data.and_then(|data| at.checked_add(self.sector_size)?.checked_add(data));
            at = next.ok_or(LogError::Broken(nth))?;
        }
        Ok(())
    }
}

impl Entry {
    fn read(sector: &[u8]) -> Option<Entry> {
        let [at, sectors, flags, length] = [0, 8, 16, 24].map(|offset| number(sector, offset));
        let mark = match flags & MARK {
            0 => None,
            _ => {
                let end = ENTRY.checked_add(usize::try_from(length).ok()?)?;
                Some(String::from_utf8_lossy(sector.get(ENTRY..end)?).into_owned())
            }
        };
        Some(Entry { sector: at, sectors, flags, mark })
    }
}

fn number(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn copy(source: &mut impl Read, target: &mut impl Write, length: u64) -> Result<(), LogError> {
    let mut piece = vec![0; PIECE.min(length) as usize];
    let mut left = length;
    while left > 0 {
        let part = &mut piece[..PIECE.min(left) as usize];
        source.read_exact(part)?;
        target.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A log of entries (sector, sectors, flags, data or text), with sectors of 512 bytes.
    fn log(entries: &[(u64, u64, u64, &[u8])]) -> Vec<u8> {
        let mut log = vec![0; 512];
        log[..8].copy_from_slice(&MAGIC.to_le_bytes());
        log[8..16].copy_from_slice(&VERSION.to_le_bytes());
        log[16..24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        log[24..28].copy_from_slice(&512u32.to_le_bytes());
        for (sector, sectors, flags, data) in entries {
            let mut head = [0; 512];
            let length = if flags & MARK != 0 { data.len() as u64 } else { 0 };
            for (i, number) in [*sector, *sectors, *flags, length].into_iter().enumerate() {
                head[i * 8..i * 8 + 8].copy_from_slice(&number.to_le_bytes());
            }
            if flags & MARK != 0 {
                head[ENTRY..ENTRY + data.len()].copy_from_slice(data);
            }
            log.extend(head);
            if flags & (MARK | DISCARD) == 0 {
                log.extend(data.iter().copied().chain(std::iter::repeat(0)).take(*sectors as usize * 512));
            }
        }
        log
    }

    fn replayed(log: &[u8], mark: &str) -> Result<(Replayed, Vec<u8>), LogError> {
        let mut disk = vec![0xee; 4096];
        let done = Log::open(Cursor::new(log))?.replay(mark, 4096, &mut Cursor::new(&mut disk))?;
        Ok((done, disk))
    }

    #[test]
    fn what_was_written_before_a_mark_is_there_and_what_came_after_is_not() {
        let log = log(&[
            (0, 1, 0, b"first"),
            (0, 0, MARK, b"one"),
            (2, 2, 1, b"second"),
            (0, 1, DISCARD, b""),
            (0, 0, MARK, b"two"),
            (2, 1, 0, b"third"),
        ]);
        let (done, disk) = replayed(&log, "one").unwrap();
        assert_eq!(done, Replayed { entries: 1, writes: 1, discards: 0, bytes: 512 });
        assert!(disk.starts_with(b"first\0") && disk[512..].iter().all(|byte| *byte == 0xee));
        let (done, disk) = replayed(&log, "two").unwrap();
        assert_eq!(done, Replayed { entries: 4, writes: 2, discards: 1, bytes: 1536 });
        assert!(disk[..512].iter().all(|byte| *byte == 0) && disk[1024..].starts_with(b"second\0"));
        assert_eq!(Log::open(Cursor::new(&log)).unwrap().marks().unwrap(), ["one", "two"]);
    }

    #[test]
    fn a_mark_that_is_not_there_changes_nothing_and_those_that_are_come_back() {
        let log = log(&[(0, 0, MARK, b"mkfs"), (0, 1, 0, b"x")]);
        let error = replayed(&log, "nkfs").unwrap_err();
        assert!(matches!(error, LogError::NoMark { marks, .. } if marks == ["mkfs"]));
    }

    #[test]
    fn no_number_of_the_log_is_trusted() {
        assert!(matches!(Log::open(Cursor::new(vec![0; 4096])), Err(LogError::NoLog)));
        assert!(matches!(Log::open(Cursor::new(Vec::new())), Err(LogError::NoLog)));
        let beyond = log(&[(u64::MAX / 512, 1, 0, b"x"), (0, 0, MARK, b"m")]);
        assert!(matches!(replayed(&beyond, "m"), Err(LogError::Broken(1))));
        let mut huge = log(&[(0, 0, 1, b""), (0, 0, MARK, b"m")]);
        assert!(replayed(&huge, "m").is_ok());
        huge[520..528].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(replayed(&huge, "m"), Err(LogError::Broken(1))));
        let mut cut_short = log(&[(0, 1, 0, b"x"), (0, 0, MARK, b"m")]);
        cut_short.truncate(700);
        assert!(matches!(replayed(&cut_short, "m"), Err(LogError::Broken(1))));
    }
}
