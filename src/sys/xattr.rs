//! Extended attributes of a file held by any descriptor, `O_PATH` included.
//!
//! `fsetxattr` and its like refuse `O_PATH`; the path through `/proc/self/fd` does not, and follows no symlink beyond
//! the descriptor itself. For a symlink's own attributes that path would follow it, so those are refused as Linux
//! refuses `user.*` on symlinks.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

fn path(fd: impl AsFd) -> CString {
    let text = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    CString::new(text).expect("a number has no NUL")
}

pub fn set(fd: impl AsFd, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let path = path(&fd);
    // SAFETY: both strings end in NUL, the value is read for its length, all live for the call.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) }).map(drop)
}

/// Reads a value; an empty buffer asks for its size.
pub fn get(fd: impl AsFd, name: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    let path = path(&fd);
    // SAFETY: both strings end in NUL, at most `buffer.len()` bytes are written, all live for the call.
    check(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
        .map(|size| size as usize)
}

/// Reads the names; an empty buffer asks for their size.
pub fn list(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let path = path(&fd);
    // SAFETY: the string ends in NUL, at most `buffer.len()` bytes are written, both live for the call.
    check(unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
        .map(|size| size as usize)
}

pub fn remove(fd: impl AsFd, name: &CStr) -> io::Result<()> {
    let path = path(&fd);
    // SAFETY: both strings end in NUL and live for the call.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}
