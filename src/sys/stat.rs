//! Attributes of a name with its time of birth, in one call, and where a file lies without asking for it: `statx(2)`.

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::stat::FileStat;

use super::check;

/// The attributes of a name in a directory, itself and not what it points to; and when the file was made, since the epoch,
/// where the filesystem knows that.
///
/// # Errors
/// What the kernel says.
pub fn with_birth(dir: impl AsFd, name: &OsStr) -> io::Result<(FileStat, Option<Duration>)> {
    let name = CString::new(name.as_bytes())?;
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    let (flags, wanted) = (libc::AT_SYMLINK_NOFOLLOW, libc::STATX_BASIC_STATS | libc::STATX_BTIME);
    // SAFETY: the name is a C string, the kernel writes one `struct statx` behind the pointer, and both live for the call.
    check(unsafe { libc::statx(dir.as_fd().as_raw_fd(), name.as_ptr(), flags, wanted, statx.as_mut_ptr()) })?;
    // SAFETY: all of it was zeroed, and zero is a value of each of its fields.
    let statx = unsafe { statx.assume_init() };
    let birth = (statx.stx_mask & libc::STATX_BTIME != 0).then_some(&statx.stx_btime);
    let birth = birth.and_then(|at| Some(Duration::new(u64::try_from(at.tv_sec).ok()?, at.tv_nsec)));
    Ok((as_stat(&statx), birth))
}

/// The device of what a path leads to, major and minor, as the kernel knows it: no filesystem is asked for anything, so
/// this does not wait for one that hangs, if the way there does not.
///
/// # Errors
/// What the kernel says.
pub fn device(path: &Path) -> io::Result<(u32, u32)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: as above.
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, 0, statx.as_mut_ptr()) })?;
    // SAFETY: as above.
    let statx = unsafe { statx.assume_init() };
    Ok((statx.stx_dev_major, statx.stx_dev_minor))
}

fn as_stat(from: &libc::statx) -> FileStat {
    // SAFETY: zero is a value of each field of `struct stat`.
    let mut stat: FileStat = unsafe { MaybeUninit::zeroed().assume_init() };
    stat.st_dev = libc::makedev(from.stx_dev_major, from.stx_dev_minor);
    stat.st_ino = from.stx_ino;
    stat.st_mode = u32::from(from.stx_mode);
    stat.st_nlink = from.stx_nlink.into();
    (stat.st_uid, stat.st_gid) = (from.stx_uid, from.stx_gid);
    stat.st_rdev = libc::makedev(from.stx_rdev_major, from.stx_rdev_minor);
    stat.st_size = from.stx_size as i64;
    stat.st_blksize = from.stx_blksize.into();
    stat.st_blocks = from.stx_blocks as i64;
    (stat.st_atime, stat.st_atime_nsec) = (from.stx_atime.tv_sec, from.stx_atime.tv_nsec.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (from.stx_mtime.tv_sec, from.stx_mtime.tv_nsec.into());
    (stat.st_ctime, stat.st_ctime_nsec) = (from.stx_ctime.tv_sec, from.stx_ctime.tv_nsec.into());
    stat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_attributes_are_those_of_stat() {
        let root = std::fs::File::open("/").unwrap();
        for name in ["etc", "dev/null", "etc/passwd", "proc/self/exe"] {
            let (stat, _) = with_birth(&root, OsStr::new(name)).unwrap();
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            assert_eq!(stat, nix::sys::stat::fstatat(&root, name, flags).unwrap(), "{name}");
        }
    }
}
