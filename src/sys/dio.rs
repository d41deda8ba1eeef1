//! What a filesystem wants of direct I/O: `statx(2)` with `STATX_DIOALIGN`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// To a multiple of how many bytes offset and length must be; none where anything goes, or where the kernel (before
/// 6.1) or the filesystem does not tell.
///
/// # Errors
/// When the file cannot be examined.
pub fn alignment(fd: impl AsFd) -> io::Result<Option<u32>> {
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the name is a C string, the kernel writes one `struct statx` behind the pointer, and both live for the
    // call.
    check(unsafe {
        libc::statx(fd.as_fd().as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, statx.as_mut_ptr())
    })?;
    // SAFETY: all of it was zeroed, and zero is a value of each of its fields.
    let statx = unsafe { statx.assume_init() };
    let told = statx.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(Some(statx.stx_dio_offset_align).filter(|align| told && *align > 1))
}
