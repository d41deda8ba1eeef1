//! Which parts of a file have blocks: the `FS_IOC_FIEMAP` ioctl.
//!
//! Unwritten (preallocated) and delayed extents count as there: a write into them needs no new space.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// `_IOWR('f', 11, struct fiemap)`
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;
const FIEMAP_EXTENT_LAST: u32 = 1;
const EXTENTS: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// Calls `visit` with each allocated part of the range, in order, not clipped to it.
///
/// # Errors
/// `EOPNOTSUPP` where the filesystem has no FIEMAP (tmpfs).
pub fn allocated(fd: impl AsFd, range: Range<u64>, mut visit: impl FnMut(Range<u64>)) -> io::Result<()> {
    let mut start = range.start;
    while start < range.end {
        let mut request = Request {
            start,
            length: range.end - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: `request` has the layout of `struct fiemap` with room for `extent_count` extents behind it, and
        // lives for the call.
        check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), FS_IOC_FIEMAP, &raw mut request) })?;
        let mapped = &request.extents[..(request.mapped_extents as usize).min(EXTENTS)];
        let Some(last) = mapped.last() else { return Ok(()) };
        mapped.iter().for_each(|extent| visit(extent.logical..extent.logical + extent.length));
        if last.flags & FIEMAP_EXTENT_LAST != 0 {
            return Ok(());
        }
        start = last.logical + last.length;
    }
    Ok(())
}
