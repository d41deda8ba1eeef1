//! Attributes: stat, chmod, chown, truncate, times, extended attributes, statfs.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, UtimensatFlags, fchmodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};

use crate::fs::buffer;
use crate::fs::call::{Answer, Caller, Changes, Statfs, Time};
use crate::fs::inode::Inode;
use crate::fs::privileges::{self, judged};
use crate::fs::serve::Core;
use crate::fs::tree::stat;
use crate::sys::xattr;

/// `stat` as the kernel wants it from us.
pub fn attr_of(inode: &Inode, stat: &FileStat) -> FileAttr {
    inode.privileged.note(stat.st_mode);
    FileAttr {
        ino: INodeNo(inode.id),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let part = Duration::from_nanos(nanoseconds as u64);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    match seconds >= 0 {
        true => UNIX_EPOCH + whole + part,
        false => UNIX_EPOCH - whole + part,
    }
}

fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn timespec(time: Option<Time>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(Time::Now) => TimeSpec::UTIME_NOW,
        Some(Time::At(seconds, nanoseconds)) => TimeSpec::new(seconds, i64::from(nanoseconds)),
    }
}

/// The name of a descriptor that calls without an `AT_EMPTY_PATH` of their own can take.
fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

impl Core {
    pub(super) fn getattr(&self, ino: u64, fh: Option<u64>) -> io::Result<Answer> {
        let (inode, since, stat) = match fh.and_then(|fh| self.files.get(fh).ok()) {
            Some(file) => (file.inode.clone(), file.inode.privileged.since(), stat(&file.file)?),
            None => {
                let inode = self.tree.get(ino)?;
                let (since, stat) = (inode.privileged.since(), stat(inode.path_fd()?)?);
                (inode, since, stat)
            }
        };
        inode.privileged.note_since(since, stat.st_mode);
        Ok(self.attr_answer(&inode, &stat))
    }

    fn attr_answer(&self, inode: &Inode, stat: &FileStat) -> Answer {
        // What is shown here is the number in the backing directory, also for a file that the kernel knows by another.
        let attr = FileAttr { ino: INodeNo(inode.identity.ino), ..attr_of(inode, stat) };
        Answer::Attr(attr, self.keep(inode).name)
    }

    pub(super) fn setattr(
        &self,
        caller: &Caller,
        ino: u64,
        fh: Option<u64>,
        changes: &Changes,
        drop: bool,
    ) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let fd = inode.path_fd()?;
        if let Some(size) = changes.size {
            self.truncate(caller, &inode, fh, size, drop)?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            let (uid, gid) = (changes.uid.map(Uid::from_raw), changes.gid.map(Gid::from_raw));
            let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
            self.counted(&inode, &fd, || judged(caller, &inode, || Ok(fchownat(&fd, "", uid, gid, flags)?)))?;
        }
        if let Some(mode) = changes.mode {
            self.chmod(&fd, mode)?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            let path = proc_path(&fd);
            let (atime, mtime) = (timespec(changes.atime), timespec(changes.mtime));
            utimensat(AT_FDCWD, path.as_str(), &atime, &mtime, UtimensatFlags::FollowSymlink)?;
        }
        inode.changed.store(true, Release);
        let (since, stat) = (inode.privileged.since(), stat(&fd)?);
        inode.privileged.note_since(since, stat.st_mode);
        Ok(self.attr_answer(&inode, &stat))
    }

    fn chmod(&self, fd: impl AsFd, mode: u32) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        Ok(fchmodat(AT_FDCWD, proc_path(&fd).as_str(), mode, FchmodatFlags::FollowSymlink)?)
    }

    fn truncate(&self, caller: &Caller, inode: &Arc<Inode>, fh: Option<u64>, size: u64, drop: bool) -> io::Result<()> {
        let opened: OwnedFd;
        let handle = fh.and_then(|fh| self.files.get(fh).ok());
        let fd = match &handle {
            Some(handle) => handle.file.as_fd(),
            None => {
                opened = inode.open(libc::O_WRONLY)?;
                opened.as_fd()
            }
        };
        self.change(inode, fd, |file| {
            if drop {
                let old = stat(file.fd)?.st_size as u64;
                file.lose_size(size.min(old)..size.max(old))?;
            }
            judged(caller, inode, || Ok(nix::unistd::ftruncate(file.fd, size as i64)?))?;
            if !drop {
                file.truncated(size);
            }
            Ok(())
        })?;
        Ok(())
    }

    pub(super) fn readlink(&self, ino: u64) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let target = nix::fcntl::readlinkat(inode.path_fd()?, "")?;
        Ok(Answer::Data(target.as_bytes().into()))
    }

    pub(super) fn statfs(&self) -> io::Result<Answer> {
        Ok(Answer::Statfs(self.space_left()?))
    }

    /// What `statfs` tells: the backing filesystem's, or the capacity's.
    ///
    /// # Errors
    /// When the backing filesystem cannot be asked.
    pub fn space_left(&self) -> io::Result<Statfs> {
        let real = nix::sys::statvfs::fstatvfs(self.tree.backing())?;
        let mut answer = Statfs {
            blocks: real.blocks(),
            free: real.blocks_free(),
            available: real.blocks_available(),
            files: real.files(),
            files_free: real.files_free(),
            block_size: real.block_size() as u32,
            name_max: real.name_max() as u32,
            fragment_size: real.fragment_size() as u32,
        };
        let (capacity, block) = (&self.capacity, u64::from(answer.fragment_size.max(1)));
        let free = capacity.free() / block;
        match capacity.size() {
            Some(size) => {
                answer.blocks = size / block;
                answer.free = free;
                answer.available = free.saturating_sub(capacity.reserved_for_root().div_ceil(block));
            }
            None => answer.limit(answer.blocks, free),
        }
        if let Some((files, files_free)) = capacity.inodes() {
            (answer.files, answer.files_free) = (files, files_free);
        }
        for quota in capacity.quotas().iter().filter(|quota| quota.is_for_all()) {
            answer.limit(quota.limit / block, quota.free() / block);
        }
        Ok(answer)
    }

    pub(super) fn setxattr(
        &self,
        caller: &Caller,
        ino: u64,
        name: &OsStr,
        value: &[u8],
        flags: i32,
    ) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let fd = inode.path_fd()?;
        // Large attributes have blocks of their own.
        self.counted(&inode, &fd, || judged(caller, &inode, || xattr::set(&fd, &c_name(name)?, value, flags)))?;
        inode.changed.store(true, Release);
        Ok(Answer::Empty)
    }

    pub(super) fn getxattr(&self, ino: u64, name: &OsStr, size: u32) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let name = c_name(name)?;
        sized(size, |buffer| xattr::get(inode.path_fd()?, &name, buffer))
    }

    pub(super) fn listxattr(&self, caller: &Caller, ino: u64, size: u32) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let fd = inode.path_fd()?;
        let mut names = buffer::lend(LONGEST_LIST);
        let length = xattr::list(&fd, &mut names)?;
        names.truncate(length);
        if has_trusted(&names) && !privileges::sees_trusted(caller) {
            names = visible(&names).as_slice().into();
        }
        match size as usize {
            0 => Ok(Answer::Size(names.len() as u32)),
            room if room < names.len() => Err(io::Error::from_raw_os_error(libc::ERANGE)),
            _ => Ok(Answer::Data(names)),
        }
    }

    pub(super) fn removexattr(&self, caller: &Caller, ino: u64, name: &OsStr) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let fd = inode.path_fd()?;
        judged(caller, &inode, || xattr::remove(&fd, &c_name(name)?))?;
        inode.changed.store(true, Release);
        Ok(Answer::Empty)
    }

    pub(super) fn ioctl(&self, ino: u64, command: u32, input: &[u8], output_size: u32) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        if !inode.is_regular() && !inode.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        let file = inode.open(libc::O_RDONLY | libc::O_NONBLOCK)?;
        crate::sys::ioctl::forward(file, command, input, output_size as usize).map(Answer::Ioctl)
    }
}

/// `XATTR_LIST_MAX`: the kernel lists no more.
const LONGEST_LIST: usize = 64 << 10;
const TRUSTED: &[u8] = b"trusted.";

fn has_trusted(names: &[u8]) -> bool {
    names.split(|byte| *byte == 0).any(|name| name.starts_with(TRUSTED))
}

/// What the kernel lists of a local file for who is no administrator.
fn visible(names: &[u8]) -> Vec<u8> {
    let each = names.split_inclusive(|byte| *byte == 0);
    each.filter(|name| !name.starts_with(TRUSTED)).flatten().copied().collect()
}

fn c_name(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Size 0 asks how much there is.
fn sized(size: u32, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Answer> {
    if size == 0 {
        return Ok(Answer::Size(read(&mut [])? as u32));
    }
    let mut data = buffer::lend(size as usize);
    let length = read(&mut data)?;
    data.truncate(length);
    Ok(Answer::Data(data))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::fs::inode::Identity;

    #[test]
    fn who_looked_before_a_file_got_suid_does_not_hide_that_it_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let look = || stat(file.as_file()).unwrap();
        let (before, own) = (look(), Identity { dev: 0, ino: 2, handle: None });
        file.as_file().set_permissions(Permissions::from_mode(0o4777)).unwrap();
        let inode = Inode::new(2, own, libc::S_IFREG, Arc::new(File::open("/").unwrap()), None);
        let since = inode.privileged.since();
        attr_of(&inode, &look());
        attr_of(&inode, &before);
        assert!(inode.privileged.is_privileged(), "by a late answer");
        inode.stamp(&before);
        assert!(inode.privileged.is_privileged(), "by a late stamp");
        inode.privileged.note_since(since, before.st_mode);
        assert!(inode.privileged.is_privileged(), "by a look that is late");
        let since = inode.privileged.since();
        file.as_file().set_permissions(Permissions::from_mode(0o777)).unwrap();
        inode.privileged.note_since(since, look().st_mode);
        assert!(!inode.privileged.is_privileged(), "and it is seen that it lost it");
    }
}
