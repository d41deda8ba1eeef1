//! File handles: `name_to_handle_at(2)` and `open_by_handle_at(2)`.
//!
//! A handle names an inode and its generation for as long as the file exists, without holding a descriptor. Where the
//! filesystem has none (overlayfs by default), callers hold an `O_PATH` descriptor instead. Opening by handle needs
//! `CAP_DAC_READ_SEARCH`.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use smallvec::SmallVec;

use super::check;

/// The kernel's limit, `MAX_HANDLE_SZ`.
const LARGEST: usize = 128;

/// An opaque file handle.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    /// Those of ext4, xfs, btrfs and tmpfs are no longer than this: they need no memory of their own.
    bytes: SmallVec<[u8; 20]>,
}

/// `struct file_handle`, with room for the largest.
#[repr(C)]
struct Raw {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; LARGEST],
}

/// The handle of an open file, which may be `O_PATH`.
///
/// # Errors
/// `EOPNOTSUPP` where the filesystem has no handles that can be opened again.
pub fn of(fd: impl AsFd) -> io::Result<FileHandle> {
    named(fd.as_fd(), c"", libc::AT_EMPTY_PATH)
}

/// The handle of a name in a directory, itself and not what it points to.
///
/// # Errors
/// As of an open file, and that there is no such name.
pub fn at(dir: impl AsFd, name: &OsStr) -> io::Result<FileHandle> {
    named(dir.as_fd(), &CString::new(name.as_bytes())?, 0)
}

fn named(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<FileHandle> {
    let mut raw = Raw { handle_bytes: LARGEST as u32, handle_type: 0, f_handle: [0; LARGEST] };
    let mut mount_id = 0;
    // SAFETY: `raw` has the layout of `struct file_handle` with `handle_bytes` bytes of room behind the two fields,
    // the name is a C string, and all pointers live for the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            flags,
        )
    })?;
    let length = (raw.handle_bytes as usize).min(LARGEST);
    Ok(FileHandle { kind: raw.handle_type, bytes: SmallVec::from_slice(&raw.f_handle[..length]) })
}

/// Opens the file a handle names. `mount` is any ordinary (not `O_PATH`) descriptor on the same filesystem.
///
/// # Errors
/// `ESTALE` when the file is gone, `EPERM` without `CAP_DAC_READ_SEARCH`.
pub fn open(mount: BorrowedFd<'_>, handle: &FileHandle, flags: i32) -> io::Result<OwnedFd> {
    let mut raw = Raw { handle_bytes: handle.bytes.len() as u32, handle_type: handle.kind, f_handle: [0; LARGEST] };
    raw.f_handle[..handle.bytes.len()].copy_from_slice(&handle.bytes);
    // SAFETY: `raw` has the layout of `struct file_handle` and lives for the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut raw, flags | libc::O_CLOEXEC)
    })?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
