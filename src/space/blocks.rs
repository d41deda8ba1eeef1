//! What a write would need: which blocks of a range the file does not have yet.
//!
//! Called by readers, only while a capacity is set or a rule asks for `grow`. One fstat for most writes; a FIEMAP (or,
//! where the filesystem has none, a walk by SEEK_DATA) for those into sparse files and past the end.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::sys::stat::FileStat;
use nix::unistd::{Whence, lseek};

use super::usage::Usage;
use crate::durability::Ranges;
use crate::sys::fiemap;

/// What part of a request fits into the free space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes of new blocks that the whole request needs.
    pub need: u64,
    /// Length of the part, from its start, that `free` bytes of new blocks are enough for.
    pub length: u64,
}

/// How much of `range` fits when `free` bytes of new blocks can be had.
///
/// # Errors
/// When the file cannot be examined.
pub fn fit(fd: impl AsFd, stat: &FileStat, range: Range<u64>, block: u64, free: u64, usage: &Usage) -> io::Result<Fit> {
    let missing = missing(fd, stat, range.clone(), block, usage)?;
    Ok(cut(range, block, free, &missing))
}

/// The whole blocks of `range` that the file does not have.
///
/// # Errors
/// When the file cannot be examined.
pub fn missing(
    fd: impl AsFd,
    stat: &FileStat,
    range: Range<u64>,
    block: u64,
    usage: &Usage,
) -> io::Result<Vec<Range<u64>>> {
    let wanted = range.start / block * block..range.end.next_multiple_of(block);
    let end = (stat.st_size as u64).next_multiple_of(block);
    let blocks = stat.st_blocks as u64 * 512;
    let lost = usage.lost();
    // As many blocks as the size needs: a file without holes, and nothing beyond. More may lie beyond the end, with
    // holes below it.
    if blocks == end && wanted.end <= end && lost.is_empty() {
        return Ok(Vec::new());
    }
    // Our own record of fallocates, for filesystems that cannot tell.
    let mut there = usage.preallocated();
    if blocks == end {
        there.add(0..end);
    } else {
        allocated(fd, wanted.clone(), end, &mut there)?;
    }
    lost.iter().for_each(|range| there.remove(range));
    Ok(there.gaps(wanted))
}

fn allocated(fd: impl AsFd, wanted: Range<u64>, end: u64, there: &mut Ranges) -> io::Result<()> {
    let found = fiemap::allocated(&fd, wanted.clone(), |extent| there.add(extent));
    match found {
        Err(error) if unsupported(&error) => data(fd, wanted.start..wanted.end.min(end), there),
        other => other,
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL))
}

/// The parts with data, on filesystems without FIEMAP: their holes and what was preallocated look alike.
fn data(fd: impl AsFd, wanted: Range<u64>, there: &mut Ranges) -> io::Result<()> {
    let mut at = wanted.start;
    while at < wanted.end {
        let start = match lseek(&fd, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(nix::errno::Errno::ENXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(&fd, start as i64, Whence::SeekHole)? as u64;
        there.add(start..end);
        at = end.max(at + 1);
    }
    Ok(())
}

/// Goes through the missing parts until the free space is used up.
fn cut(range: Range<u64>, block: u64, free: u64, missing: &[Range<u64>]) -> Fit {
    let need = missing.iter().map(|gap| gap.end - gap.start).sum();
    let mut left = free / block * block;
    for gap in missing {
        let size = gap.end - gap.start;
        if size > left {
            let stop = (gap.start + left).clamp(range.start, range.end);
            return Fit { need, length: stop - range.start };
        }
        left -= size;
    }
    Fit { need, length: range.end - range.start }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn fit_of(file: &std::fs::File, range: Range<u64>, free: u64) -> Fit {
        let stat = nix::sys::stat::fstat(file).unwrap();
        fit(file, &stat, range, 4096, free, &Usage::default()).unwrap()
    }

    #[test]
    fn only_blocks_that_are_missing_are_needed() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 5000], 0).unwrap();
        assert_eq!(fit_of(&file, 0..5000, 0), Fit { need: 0, length: 5000 });
        assert_eq!(fit_of(&file, 5000..8192, 0), Fit { need: 0, length: 3192 }, "the tail of the last block");
        assert_eq!(fit_of(&file, 5000..9000, 0), Fit { need: 4096, length: 3192 }, "half fits");
        assert_eq!(fit_of(&file, 8192..9000, 0), Fit { need: 4096, length: 0 });
        assert_eq!(fit_of(&file, 8192..20000, 8192), Fit { need: 12288, length: 8192 });
    }

    #[test]
    fn holes_need_blocks_and_preallocated_parts_do_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(fit_of(&file, 0..4096, 0), Fit { need: 4096, length: 0 });
        file.write_all_at(&[1; 4096], 8192).unwrap();
        assert_eq!(fit_of(&file, 8192..12288, 0).need, 0);
        assert_eq!(fit_of(&file, 0..12288, 4096), Fit { need: 8192, length: 4096 });
        let beyond = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&file, beyond, 1 << 20, 1 << 20).unwrap();
        assert_eq!(fit_of(&file, 0..4096, 0).need, 4096, "what lies beyond the end is not in the hole");
        let whole = nix::fcntl::FallocateFlags::empty();
        nix::fcntl::fallocate(&file, whole, 0, 1 << 20).unwrap();
        assert_eq!(fit_of(&file, 0..1 << 20, 0).need, 0);
    }
}
