//! The undo log of one file: what its dropped writes covered.
//!
//! Owned by the inode, under the inode's lock, which is held while old bytes are saved and overwritten: the one place
//! where a lock spans a system call, because nobody may write those bytes in between. Old bytes are kept only below
//! the size to which the file will return; beyond it there is nothing to keep. A lost write loses its data and not the
//! file's new size, as on a disk whose metadata was written and whose data was not: what it had appended is zeros.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::originals::{Original, Originals};
use crate::ranges::Ranges;

/// Old bytes held by all files together. A write whose undo does not fit is refused, never let go untracked.
pub const LIMIT_BYTES: u64 = 256 << 20;

static HELD_BYTES: AtomicU64 = AtomicU64::new(0);

/// How to take the dropped writes of one file back.
#[derive(Debug, Default)]
pub struct Undo {
    /// Old contents by offset; disjoint.
    old: std::collections::BTreeMap<u64, Vec<u8>>,
    /// Everything that was dropped over: `old` and what returns to zeros.
    dropped: Ranges,
    /// The size to return to, once something was dropped.
    size: Option<u64>,
    /// Was a change of the size dropped? Otherwise the file keeps the one it has.
    resized: bool,
    /// Dropped requests, for the report.
    pub writes: u64,
    /// What the file should have where it was damaged.
    pub originals: Originals,
}

/// The file as the undo log reaches it.
pub trait File {
    fn size(&mut self) -> io::Result<u64>;
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    fn zero(&mut self, range: Range<u64>) -> io::Result<()>;
    fn truncate(&mut self, size: u64) -> io::Result<()>;
}

/// What an eviction took back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    pub writes: u64,
    pub bytes: u64,
}

impl Undo {
    /// Is there nothing dropped, and nothing damaged?
    pub fn is_empty(&self) -> bool {
        self.size.is_none() && self.originals.is_empty()
    }

    /// To be called before a range is overwritten by a write that is to be lost.
    ///
    /// # Errors
    /// When the old bytes cannot be read, or there is no room to keep them ([`is_full`]): then the write must not happen.
    pub fn before_drop(&mut self, range: Range<u64>, file: &mut impl File) -> io::Result<()> {
        let returns_to = match self.size {
            Some(size) => size,
            None => file.size()?,
        };
        let mut saved = Vec::new();
        for gap in self.dropped.gaps(range.start..range.end.min(returns_to)) {
            match save(gap.clone(), file) {
                Ok(bytes) => saved.push((gap.start, bytes)),
                Err(error) => {
                    saved.iter().for_each(|(_, bytes): &(u64, Vec<u8>)| release(bytes.len()));
                    return Err(error);
                }
            }
        }
        self.old.extend(saved);
        self.size = Some(returns_to);
        self.dropped.add(range);
        Ok(())
    }

    /// To be called before a truncation that is to be lost, as [`Undo::before_drop`] with what is cut off, or grows.
    ///
    /// # Errors
    /// As there.
    pub fn before_resize(&mut self, range: Range<u64>, file: &mut impl File) -> io::Result<()> {
        self.before_drop(range, file)?;
        self.resized = true;
        Ok(())
    }

    /// To be called after a write that was lost: how far it had made the file grow, stays.
    pub fn after_drop(&mut self, end: u64) {
        self.size = self.size.map(|size| size.max(end));
    }

    /// To be called after a write that is to stay: it is no longer covered by anything dropped before, and the file
    /// will not return below its end.
    pub fn after_kept(&mut self, range: Range<u64>) {
        let end = range.end;
        self.after_hole(range);
        self.after_drop(end);
    }

    /// To be called after zeros that are to stay and that let no file grow, as a hole does not.
    pub fn after_hole(&mut self, range: Range<u64>) {
        self.originals.cut(&range);
        if self.size.is_some() {
            self.dropped.remove(range.clone());
            self.cut(range);
        }
    }

    /// To be called after a truncation that is to stay: nothing returns beyond the new size.
    pub fn after_truncate(&mut self, size: u64) {
        self.originals.cut(&(size..u64::MAX));
        if self.size.is_some() {
            self.size = Some(size);
            self.dropped.remove(size..u64::MAX);
            self.cut(size..u64::MAX);
        }
    }

    /// Removes a range from the old contents.
    fn cut(&mut self, range: Range<u64>) {
        let touched: Vec<u64> = (self.old.range(..range.end))
            .filter(|(start, bytes)| **start + bytes.len() as u64 > range.start)
            .map(|(start, _)| *start)
            .collect();
        for start in touched {
            let Some(bytes) = self.old.remove(&start) else { continue };
            let end = start + bytes.len() as u64;
            release(bytes.len());
            let mut keep = |part: Range<u64>| {
                if !part.is_empty() {
                    let (from, to) = ((part.start - start) as usize, (part.end - start) as usize);
                    HELD_BYTES.fetch_add((to - from) as u64, Relaxed);
                    self.old.insert(part.start, bytes[from..to].to_vec());
                }
            };
            keep(start..range.start.min(end));
            keep(range.end.max(start)..end);
        }
    }

    /// Shows the old contents over what was read at an offset: what a reader sees who goes past the page cache.
    pub fn overlay(&self, offset: u64, buffer: &mut [u8]) {
        let wanted = offset..offset + buffer.len() as u64;
        for range in self.dropped.iter() {
            paint(&wanted, range.start, range.end, |_| 0, buffer);
        }
        for (start, bytes) in &self.old {
            let old = |at: u64| bytes[(at - start) as usize];
            paint(&wanted, *start, start + bytes.len() as u64, old, buffer);
        }
    }

    /// Takes everything back.
    ///
    /// # Errors
    /// What could not be taken back stays in the log, so that it can be tried again.
    pub fn evict(&mut self, file: &mut impl File) -> io::Result<Evicted> {
        let Some(size) = self.size else { return Ok(Evicted::default()) };
        // First what has blocks already: a hole that is made and then filled could lose them to somebody else.
        for (offset, bytes) in &self.old {
            file.write(*offset, bytes)?;
        }
        let mut zeros = self.dropped.clone();
        self.old.iter().for_each(|(start, bytes)| zeros.remove(*start..*start + bytes.len() as u64));
        for range in zeros.iter() {
            file.zero(range.start..range.end.min(size).max(range.start))?;
        }
        if self.resized {
            file.truncate(size)?;
        }
        let bytes = self.dropped.iter().map(|range| range.end - range.start).fold(0, u64::saturating_add);
        let evicted = Evicted { writes: self.writes, bytes };
        self.old.values().for_each(|bytes| release(bytes.len()));
        self.old.clear();
        (self.dropped, self.size, self.resized, self.writes) = (Ranges::default(), None, false, 0);
        Ok(evicted)
    }

    /// Gives the file back what it should have where it was damaged. What a dropped write covers comes right when that is
    /// taken back.
    ///
    /// # Errors
    /// What could not be mended stays as it is, so that it can be tried again.
    pub fn repair(&mut self, file: &mut impl File) -> io::Result<Vec<Original>> {
        for original in self.originals.iter() {
            for gap in self.dropped.gaps(original.range()) {
                let from = (gap.start - original.offset) as usize;
                file.write(gap.start, &original.bytes[from..from + (gap.end - gap.start) as usize])?;
            }
        }
        let repaired = self.originals.take();
        for original in &repaired {
            for (start, old) in &mut self.old {
                let end = *start + old.len() as u64;
                for at in original.range().start.max(*start)..original.range().end.min(end) {
                    old[(at - start) as usize] = original.bytes[(at - original.offset) as usize];
                }
            }
        }
        Ok(repaired)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        self.old.values().for_each(|bytes| release(bytes.len()));
    }
}

fn save(range: Range<u64>, file: &mut impl File) -> io::Result<Vec<u8>> {
    let length = (range.end - range.start) as usize;
    if HELD_BYTES.fetch_add(length as u64, Relaxed) + length as u64 > LIMIT_BYTES {
        release(length);
        return Err(full());
    }
    let mut bytes = vec![0; length];
    let mut at = 0;
    while at < length {
        match file.read(range.start + at as u64, &mut bytes[at..]) {
            Ok(0) => break,
            Ok(read) => at += read,
            Err(error) => {
                release(length);
                return Err(error);
            }
        }
    }
    Ok(bytes)
}

fn release(length: usize) {
    HELD_BYTES.fetch_sub(length as u64, Relaxed);
}

/// More, or fewer, bytes are held.
pub(super) fn hold(more: i64) {
    HELD_BYTES.fetch_add(more as u64, Relaxed);
}

/// There is no room to keep more. Told apart from an `ENOMEM` of the system, which is nobody's fault.
pub fn full() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}

/// Is it the error of [`full`]?
pub fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::OutOfMemory && error.raw_os_error().is_none()
}

/// Is there room to keep so many bytes more?
pub fn has_room(length: usize) -> bool {
    HELD_BYTES.load(Relaxed) + length as u64 <= LIMIT_BYTES
}

fn paint(wanted: &Range<u64>, start: u64, end: u64, byte: impl Fn(u64) -> u8, buffer: &mut [u8]) {
    for at in start.max(wanted.start)..end.min(wanted.end) {
        buffer[(at - wanted.start) as usize] = byte(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in memory.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Memory(Vec<u8>);

    impl File for Memory {
        fn size(&mut self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }
        fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            let from = (offset as usize).min(self.0.len());
            let count = buffer.len().min(self.0.len() - from);
            buffer[..count].copy_from_slice(&self.0[from..from + count]);
            Ok(count)
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
            let end = offset as usize + data.len();
            self.0.resize(self.0.len().max(end), 0);
            self.0[offset as usize..end].copy_from_slice(data);
            Ok(())
        }
        fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
            let size = self.0.len() as u64;
            (range.start..range.end.min(size)).for_each(|at| self.0[at as usize] = 0);
            Ok(())
        }
        fn truncate(&mut self, size: u64) -> io::Result<()> {
            self.0.resize(size as usize, 0);
            Ok(())
        }
    }

    /// Large, of which so many parts can be read.
    struct Failing(u32);

    impl File for Failing {
        fn size(&mut self) -> io::Result<u64> {
            Ok(1 << 30)
        }
        fn read(&mut self, _: u64, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or_else(|| io::Error::other("it cannot be read"))?;
            Ok(buffer.len())
        }
        fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn zero(&mut self, _: Range<u64>) -> io::Result<()> {
            Ok(())
        }
        fn truncate(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_kept_whole_takes_no_room() {
        const PART: u64 = LIMIT_BYTES / 5;
        let mut undo = Undo::default();
        undo.before_drop(PART..PART + 1, &mut Failing(1)).unwrap();
        for _ in 0..10 {
            let error = undo.before_drop(0..PART + 100, &mut Failing(1)).unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::Other,
                "the second part cannot be read, and there is room: {error}"
            );
        }
        assert!(has_room(PART as usize));
    }

    #[test]
    fn eviction_leaves_what_the_kept_writes_alone_would_have_left() {
        let mut state = 11u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..300 {
            let mut seen = Memory((0..random(40)).map(|i| i as u8).collect());
            let mut kept = seen.clone();
            let mut undo = Undo::default();
            for step in 0..random(12) {
                let (offset, data) = (random(60), vec![100 + step as u8; 1 + random(20) as usize]);
                let range = offset..offset + data.len() as u64;
                // A hole ends where the file does.
                let hole = |file: &Memory| offset..range.end.min(file.0.len() as u64).max(offset);
                match random(6) {
                    0 => {
                        let end = range.end;
                        undo.before_drop(range, &mut seen).unwrap();
                        seen.write(offset, &data).unwrap();
                        undo.after_drop(end);
                        kept.0.resize(kept.0.len().max(end as usize), 0);
                    }
                    1 => {
                        let (old, size) = (seen.0.len() as u64, random(60));
                        undo.before_resize(size.min(old)..size.max(old), &mut seen).unwrap();
                        seen.truncate(size).unwrap();
                    }
                    2 => {
                        seen.write(offset, &data).unwrap();
                        kept.write(offset, &data).unwrap();
                        undo.after_kept(range);
                    }
                    3 => {
                        let hole = hole(&seen);
                        undo.before_drop(hole.clone(), &mut seen).unwrap();
                        seen.zero(hole).unwrap();
                    }
                    4 => {
                        let hole = hole(&seen);
                        seen.zero(hole.clone()).unwrap();
                        kept.zero(hole.clone()).unwrap();
                        undo.after_hole(hole);
                    }
                    _ => {
                        let size = random(60);
                        seen.truncate(size).unwrap();
                        kept.truncate(size).unwrap();
                        undo.after_truncate(size);
                    }
                }
                let mut direct = seen.0.clone();
                undo.overlay(0, &mut direct);
                let common = direct.len().min(kept.0.len());
                assert_eq!(direct[..common], kept.0[..common], "a direct reader");
            }
            undo.evict(&mut seen).unwrap();
            assert_eq!(seen, kept);
            assert!(undo.is_empty());
        }
    }
}
