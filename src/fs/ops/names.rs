//! Names: lookup, making, removing, renaming, reading directories.
//!
//! What is made is made as the caller: with the caller's filesystem identity and umask, on this thread, so that the
//! backing filesystem decides about owner, group, sgid directories and default ACLs as it would without us.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use fuser::FopenFlags;
use nix::fcntl::{AtFlags, RenameFlags};
use nix::sys::stat::{FileStat, Mode, SFlag};
use nix::unistd::UnlinkatFlags;

use super::attributes::attr_of;
use crate::fs::call::{Answer, Caller, DirectorySink, Entry, Reply, Served};
use crate::fs::files::OpenFile;
use crate::fs::inode::Inode;
use crate::fs::serve::Core;
use crate::fs::tree::stat;
use crate::sys::{dents, ids};

/// What a new file is made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Creation {
    pub mode: u32,
    pub umask: u32,
}

/// Bytes of directory entries that are read at a time: about as many entries as fit into an answer.
const DENTS: usize = 32 << 10;
/// With attributes an answer has room for so many fewer.
const DENTS_PLUS: usize = 8 << 10;
/// The kernel asks for attributes at the beginning of every directory. Unless they were wanted of this one before, these
/// many entries have them, and the kernel goes on without.
const PLUS_AT_FIRST: usize = 16;

impl Core {
    pub(super) fn lookup(&self, parent: u64, name: &OsStr) -> io::Result<Answer> {
        let parent = self.tree.get(parent)?;
        if !parent.looked_into.load(Relaxed) {
            parent.looked_into.store(true, Relaxed);
        }
        self.entry(&parent, name).map(Answer::Entry)
    }

    fn entry(&self, parent: &Arc<Inode>, name: &OsStr) -> io::Result<Entry> {
        let (inode, stat) = self.tree.lookup(parent, name)?;
        Ok(Entry { attr: attr_of(&inode, &stat), keep: self.keep(&inode) })
    }

    /// Makes something in a directory, as the caller.
    pub(super) fn make<T>(
        &self,
        caller: &Caller,
        parent: &Inode,
        creation: Creation,
        act: impl FnOnce(BorrowedFd<'_>, Mode) -> nix::Result<T>,
    ) -> io::Result<T> {
        let dir = parent.path_fd()?;
        let mode = Mode::from_bits_truncate(creation.mode & 0o7777);
        // The directory may grow by the name.
        let made = self.counted(parent, &dir, || {
            ids::with_umask(creation.umask, || ids::as_caller(caller.uid, caller.gid, || Ok(act(dir.as_fd(), mode)?)))
        });
        made.inspect_err(|error| tell_powerless(error, caller))
    }

    /// The same, and finds what was made under its name.
    fn make_name(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        creation: Creation,
        act: impl FnOnce(BorrowedFd<'_>, Mode) -> nix::Result<()>,
    ) -> io::Result<Answer> {
        let parent = self.tree.get(parent)?;
        self.make(caller, &parent, creation, act)?;
        let entry = self.entry(&parent, name)?;
        if self.capacity.is_set() {
            // Directories and long symlinks have blocks of their own.
            self.count_new(&*self.tree.get(entry.attr.ino.0)?, entry.attr.uid, entry.attr.blocks);
        }
        Ok(Answer::Entry(entry))
    }

    pub(super) fn mknod(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
    ) -> io::Result<Answer> {
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        self.make_name(caller, parent, name, Creation { mode, umask }, |dir, mode| {
            nix::sys::stat::mknodat(dir, name, kind, mode, u64::from(rdev))
        })
    }

    pub(super) fn mkdir(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        (mode, umask): (u32, u32),
    ) -> io::Result<Answer> {
        self.make_name(caller, parent, name, Creation { mode, umask }, |dir, mode| {
            nix::sys::stat::mkdirat(dir, name, mode)
        })
    }

    pub(super) fn symlink(&self, caller: &Caller, parent: u64, name: &OsStr, target: &OsStr) -> io::Result<Answer> {
        self.make_name(caller, parent, name, Creation { mode: 0, umask: 0 }, |dir, _| {
            nix::unistd::symlinkat(target, dir, name)
        })
    }

    pub(super) fn link(&self, ino: u64, parent: u64, name: &OsStr) -> io::Result<Answer> {
        let (inode, parent) = (self.tree.get(ino)?, self.tree.get(parent)?);
        nix::unistd::linkat(inode.path_fd()?, "", parent.path_fd()?, name, AtFlags::AT_EMPTY_PATH)?;
        inode.changed.store(true, Release);
        self.entry(&parent, name).map(Answer::Entry)
    }

    pub(super) fn unlink(&self, parent: u64, name: &OsStr) -> io::Result<Answer> {
        self.remove(parent, name, UnlinkatFlags::NoRemoveDir)
    }

    pub(super) fn rmdir(&self, parent: u64, name: &OsStr) -> io::Result<Answer> {
        self.remove(parent, name, UnlinkatFlags::RemoveDir)
    }

    fn remove(&self, parent: u64, name: &OsStr, how: UnlinkatFlags) -> io::Result<Answer> {
        let parent = self.tree.get(parent)?;
        let dir = parent.path_fd()?;
        let going = self.before_losing(&parent, name);
        nix::unistd::unlinkat(&dir, name, how)?;
        self.after_losing(going, &parent, name);
        Ok(Answer::Empty)
    }

    /// What a name is about to stop naming: kept reachable if the kernel still knows it, and its blocks for the
    /// account.
    fn before_losing(&self, parent: &Inode, name: &OsStr) -> Going {
        let Ok((inode, stat)) = self.tree.peek(parent, name) else { return Going::default() };
        let last = stat.st_nlink == 1 || stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let fd = inode.as_ref().filter(|_| last).and_then(|inode| inode.reach());
        Going { inode, fd, last: last.then_some(stat) }
    }

    fn after_losing(&self, going: Going, parent: &Arc<Inode>, name: &OsStr) {
        if let Some(inode) = &going.inode {
            if let Some(fd) = going.fd {
                inode.hold(fd);
            }
            inode.lost(parent.id, name);
            inode.unlinked.fetch_or(going.last.is_some(), AcqRel);
        }
        // The blocks of an open file are free at its last close.
        let open = going.inode.as_ref().is_some_and(|inode| inode.opens.load(Acquire) > 0);
        if let Some(stat) = &going.last
            && self.capacity.is_set()
            && !open
        {
            self.count_gone(going.inode.as_deref(), || parent.child_path(name), stat);
        }
    }

    pub(super) fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        to_parent: u64,
        to_name: &OsStr,
        flags: u32,
    ) -> io::Result<Answer> {
        let (from, to) = (self.tree.get(parent)?, self.tree.get(to_parent)?);
        let (from_fd, to_fd) = (from.path_fd()?, to.path_fd()?);
        let flags = RenameFlags::from_bits_retain(flags);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let known = |dir, name| self.tree.peek(dir, name).ok()?.0;
        let moving = known(&from, name);
        let other = if exchange { known(&to, to_name) } else { None };
        let same = |going: &Going| going.inode.as_ref().zip(moving.as_ref()).is_some_and(|(a, b)| a.id == b.id);
        let replaced = match exchange {
            true => None,
            // Renaming one link of a file over another does nothing.
            false => Some(self.before_losing(&to, to_name)).filter(|going| !same(going)),
        };
        self.count_moves([moving.as_ref(), other.as_ref()], || {
            nix::fcntl::renameat2(&from_fd, name, &to_fd, to_name, flags)?;
            if let Some(going) = replaced {
                self.after_losing(going, &to, to_name);
            }
            self.note_moved(moving.clone(), (&from, name), (&to, to_name));
            self.note_moved(other.clone(), (&to, to_name), (&from, name));
            Ok(())
        })?;
        Ok(Answer::Empty)
    }

    fn note_moved(&self, inode: Option<Arc<Inode>>, from: (&Inode, &OsStr), to: (&Arc<Inode>, &OsStr)) {
        let Some(inode) = inode else { return };
        inode.moved(from.0.id, from.1, to.0, to.1);
        if inode.is_dir() {
            self.tree.directory_moved();
        }
    }

    pub(super) fn opendir(&self, ino: u64, flags: i32) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let only = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC | (flags & libc::O_NOATIME);
        let file = std::fs::File::from(inode.open(only)?);
        let fh = self.files.open_directory(OpenFile::new(inode, file, 0, &Served::ByUs(FopenFlags::empty())));
        Ok(Answer::Opened(fh, Served::ByUs(FopenFlags::empty())))
    }

    pub(super) fn readdir(&self, fh: u64, offset: u64, reply: &mut Reply) -> io::Result<Answer> {
        let directory = self.files.directory(fh)?;
        self.each_entry::<DENTS>(&directory, offset, |entry| {
            reply.add(entry.ino, entry.next as u64, kind(entry.kind), entry.name)
        })
    }

    pub(super) fn readdirplus(&self, fh: u64, offset: u64, reply: &mut Reply) -> io::Result<Answer> {
        let directory = self.files.directory(fh)?;
        let own = stat(&directory.file)?;
        let wanted = offset != 0 || directory.inode.looked_into.swap(false, Relaxed);
        let mut room = if wanted { usize::MAX } else { PLUS_AT_FIRST };
        let (mut failed, mut listed_any) = (None, false);
        let answer = self.each_entry::<DENTS_PLUS>(&directory, offset, |listed| {
            let Some(left) = room.checked_sub(1) else { return true };
            room = left;
            if listed.name == "." || listed.name == ".." {
                return reply.add_plus(&self.dot(&directory.inode, &own, listed), listed.next as u64, listed.name);
            }
            let entry = match self.entry(&directory.inode, listed.name) {
                Ok(entry) => entry,
                // A name that is gone by now is not in the directory; what cannot be looked at ends the answer here.
                Err(error) => {
                    let gone = error.kind() == io::ErrorKind::NotFound;
                    failed = if gone { None } else { Some(error) };
                    return !gone;
                }
            };
            listed_any = true;
            let full = reply.add_plus(&entry, listed.next as u64, listed.name);
            if full {
                self.tree.forget(entry.attr.ino.0, 1);
            }
            full
        });
        match (failed, answer) {
            (Some(error), _) if !listed_any => Err(error),
            // What was added has references that the kernel takes over; it meets the error when it goes on.
            (_, Err(_)) if listed_any => Ok(Answer::Directory),
            (_, answer) => answer,
        }
    }

    /// `.` and `..` take no reference; the kernel uses their number and type only.
    fn dot(&self, directory: &Inode, own: &FileStat, listed: &dents::Entry<'_>) -> Entry {
        let attr = fuser::FileAttr { ino: fuser::INodeNo(listed.ino), ..attr_of(directory, own) };
        Entry { attr, keep: self.keep(directory) }
    }

    /// Goes through a directory from an offset until the reply is full. Nothing is kept between two calls: the offset
    /// is the backing filesystem's own.
    fn each_entry<const BYTES: usize>(
        &self,
        directory: &OpenFile,
        offset: u64,
        mut add: impl FnMut(&dents::Entry<'_>) -> bool,
    ) -> io::Result<Answer> {
        nix::unistd::lseek(&directory.file, offset as i64, nix::unistd::Whence::SeekSet)?;
        let mut buffer = [0u8; BYTES];
        loop {
            let read = dents::read(&directory.file, &mut buffer)?;
            if read == 0 || dents::entries(&buffer[..read]).any(|entry| add(&entry)) {
                return Ok(Answer::Directory);
            }
        }
    }
}

/// Says once why nothing can be made for others.
fn tell_powerless(error: &io::Error, caller: &Caller) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    if error.raw_os_error() == Some(libc::EPERM) && !ids::can_impersonate() {
        let (uid, gid) = (caller.uid, caller.gid);
        ONCE.call_once(|| {
            tracing::warn!(uid, gid, "refused (EPERM): without root's powers we can make files for our own user only");
        });
    }
}

/// A file whose name is about to go.
#[derive(Default)]
struct Going {
    inode: Option<Arc<Inode>>,
    /// By which it stays reachable.
    fd: Option<OwnedFd>,
    /// The file as it was, if it is its last name.
    last: Option<FileStat>,
}

fn kind(d_type: u8) -> fuser::FileType {
    match d_type {
        libc::DT_DIR => fuser::FileType::Directory,
        libc::DT_LNK => fuser::FileType::Symlink,
        libc::DT_FIFO => fuser::FileType::NamedPipe,
        libc::DT_CHR => fuser::FileType::CharDevice,
        libc::DT_BLK => fuser::FileType::BlockDevice,
        libc::DT_SOCK => fuser::FileType::Socket,
        _ => fuser::FileType::RegularFile,
    }
}
