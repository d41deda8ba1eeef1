//! Open files and directories by handle.
//!
//! Shared by all threads of `fs/`. The lock is held to find or to change an entry, for nanoseconds, never across a
//! system call: what is found is shared ownership.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use parking_lot::RwLock;
use slab::Slab;

use super::inode::Inode;
use crate::fault::Op;

/// An open file.
#[derive(Debug)]
pub struct OpenFile {
    pub inode: Arc<Inode>,
    /// On the backing directory; not `O_APPEND`, because the kernel says where to write.
    pub file: File,
    /// Is it `O_DIRECT`? As the caller's own descriptor is, which can change that.
    direct: AtomicBool,
    /// Does the kernel keep its pages?
    pub cached: bool,
    /// Does the kernel serve it by itself?
    pub by_kernel: bool,
    /// What must be on disk before any change is answered.
    pub sync: Sync,
}

impl OpenFile {
    /// A file that was opened with these flags of the caller's.
    pub fn new(inode: Arc<Inode>, file: File, flags: i32, by_kernel: bool) -> OpenFile {
        let direct = flags & libc::O_DIRECT != 0;
        let cached = !direct && !by_kernel && !inode.is_dir();
        OpenFile { inode, file, direct: direct.into(), cached, by_kernel, sync: Sync::of(flags) }
    }

    /// Does I/O with these flags of the caller's go past the page cache of the backing filesystem? What that filesystem
    /// takes then, of which place and length, and what it makes of an error of the disk, is for itself to say.
    ///
    /// # Errors
    /// When the caller has set `O_DIRECT` later, and the backing filesystem has no such thing.
    pub fn is_direct(&self, flags: i32) -> io::Result<bool> {
        let wanted = flags & libc::O_DIRECT != 0;
        if wanted != self.direct.load(Relaxed) {
            let now = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
            let other = if wanted { now | OFlag::O_DIRECT } else { now - OFlag::O_DIRECT };
            fcntl(&self.file, FcntlArg::F_SETFL(other))?;
            self.direct.store(wanted, Relaxed);
        }
        Ok(wanted)
    }
}

/// What an open file promises of each change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sync {
    #[default]
    No,
    Data,
    All,
}

impl Sync {
    /// Of the flags of an open file, or of a write.
    pub fn of(flags: i32) -> Sync {
        match flags & libc::O_SYNC {
            libc::O_SYNC => Sync::All,
            0 => Sync::No,
            _ => Sync::Data,
        }
    }

    /// Makes good on it.
    pub fn keep(self, file: &File) -> io::Result<()> {
        match self {
            Sync::No => Ok(()),
            Sync::Data => file.sync_data(),
            Sync::All => file.sync_all(),
        }
    }
}

/// The tables of one mount.
#[derive(Debug, Default)]
pub struct Files {
    files: RwLock<Slab<Arc<OpenFile>>>,
    directories: RwLock<Slab<Arc<OpenFile>>>,
}

fn unknown() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

impl Files {
    pub fn get(&self, fh: u64) -> io::Result<Arc<OpenFile>> {
        self.files.read().get(fh as usize).cloned().ok_or_else(unknown)
    }

    pub fn directory(&self, fh: u64) -> io::Result<Arc<OpenFile>> {
        self.directories.read().get(fh as usize).cloned().ok_or_else(unknown)
    }

    /// The inode behind a handle of the kind that the operation uses.
    pub fn inode(&self, fh: u64, op: Op) -> Option<Arc<Inode>> {
        let file = match op {
            Op::Readdir | Op::Releasedir | Op::Fsyncdir => self.directory(fh),
            _ => self.get(fh),
        };
        file.ok().map(|file| file.inode.clone())
    }

    pub fn open(&self, file: OpenFile) -> u64 {
        file.inode.opens.fetch_add(1, AcqRel);
        self.files.write().insert(Arc::new(file)) as u64
    }

    pub fn open_directory(&self, directory: OpenFile) -> u64 {
        self.directories.write().insert(Arc::new(directory)) as u64
    }

    /// Closes a file; gives it and whether it was the last handle of its inode.
    pub fn close(&self, fh: u64) -> Option<(Arc<OpenFile>, bool)> {
        let file = self.files.write().try_remove(fh as usize)?;
        let last = file.inode.opens.fetch_sub(1, AcqRel) == 1;
        Some((file, last))
    }

    pub fn close_directory(&self, fh: u64) {
        let directory = self.directories.write().try_remove(fh as usize);
        drop(directory);
    }

    /// All open files, with their handles.
    pub fn all(&self) -> Vec<(u64, Arc<OpenFile>)> {
        self.files.read().iter().map(|(fh, file)| (fh as u64, file.clone())).collect()
    }

    pub fn open_count(&self) -> usize {
        self.files.read().len()
    }
}
