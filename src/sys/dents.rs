//! Directory entries with their offsets: `getdents64(2)`.
//!
//! The offsets are the backing filesystem's own cookies, so that `seekdir` over FUSE means what it means there.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

use super::check;

/// One entry, borrowed from the buffer.
#[derive(Debug)]
pub struct Entry<'a> {
    pub ino: u64,
    /// Where reading goes on after this entry.
    pub next: i64,
    /// `DT_*`.
    pub kind: u8,
    pub name: &'a OsStr,
}

/// Bytes before the name in `struct linux_dirent64`.
const HEADER: usize = 19;

/// Reads entries at the directory's position into `buffer`; gives how many bytes, 0 at the end.
pub fn read(dir: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to the buffer, which lives for the call.
    let read = check(unsafe {
        libc::syscall(libc::SYS_getdents64, dir.as_fd().as_raw_fd(), buffer.as_mut_ptr(), buffer.len())
    })?;
    Ok(read as usize)
}

/// The entries in what [`read`] gave.
pub fn entries(mut buffer: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    std::iter::from_fn(move || {
        let header = buffer.get(..HEADER)?;
        let field = |range: std::ops::Range<usize>| header[range].try_into().ok();
        let ino = u64::from_ne_bytes(field(0..8)?);
        let next = i64::from_ne_bytes(field(8..16)?);
        let length = usize::from(u16::from_ne_bytes([header[16], header[17]]));
        let kind = header[18];
        let name = buffer.get(HEADER..length)?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        let name = OsStr::from_bytes(&name[..end]);
        buffer = &buffer[length..];
        Some(Entry { ino, next, kind, name })
    })
}
