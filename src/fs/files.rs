//! Open files and directories by handle.
//!
//! Shared by all threads of `fs/`. The lock is held to find or to change an entry, for nanoseconds, never across a
//! system call: what is found is shared ownership.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use slab::Slab;

use super::call::Served;
use super::inode::Inode;
use crate::fault::Op;
use crate::space::Told;

/// An open file.
#[derive(Debug)]
pub struct OpenFile {
    pub inode: Arc<Inode>,
    /// On the backing directory; not `O_APPEND`, because the kernel says where to write.
    pub file: File,
    /// The flags of the caller's that it was opened with.
    flags: i32,
    /// The same file, opened once more: past the page cache of the backing filesystem if `file` is not, and the other way
    /// round. For requests that want that: the caller can change its `O_DIRECT`, and a mapping is written back without it.
    twin: OnceLock<File>,
    /// Does the kernel keep its pages?
    pub cached: bool,
    /// Does the kernel serve it by itself?
    pub by_kernel: bool,
    /// What must be on disk before any change is answered.
    pub sync: Sync,
    /// The error of an accepted write that it was told of.
    pub told: Told,
}

impl OpenFile {
    /// A file that was opened with these flags of the caller's.
    pub fn new(inode: Arc<Inode>, file: File, flags: i32, served: &Served) -> OpenFile {
        let by_kernel = served.by_kernel();
        let cached = served.is_cached() && !inode.is_dir();
        let told = inode.writeback_error.sample();
        OpenFile { inode, file, flags, twin: OnceLock::new(), cached, by_kernel, sync: Sync::of(flags), told }
    }

    /// The file for I/O with these flags of the caller's, and whether that goes past the page cache of the backing
    /// filesystem. What that filesystem takes then, of which place and length, and what it makes of an error of the disk, is
    /// for itself to say.
    ///
    /// # Errors
    /// When the caller wants direct I/O later than at the open, and the backing filesystem has no such thing.
    pub fn for_io(&self, flags: i32) -> io::Result<(&File, bool)> {
        let direct = flags & libc::O_DIRECT != 0;
        if direct == (self.flags & libc::O_DIRECT != 0) {
            return Ok((&self.file, direct));
        }
        if self.twin.get().is_none() {
            let other = backing_flags(self.flags) & !libc::O_DIRECT | if direct { libc::O_DIRECT } else { 0 };
            // Somebody else's is as good.
            let _ = self.twin.set(self.inode.open(other)?.into());
        }
        self.twin.get().map(|twin| (twin, direct)).ok_or_else(unknown)
    }
}

/// The flags for opening the backing file. All others are the kernel's affair on our side, would change what `pwrite`
/// means (`O_APPEND`), or are made good on after the change (`O_SYNC`).
pub fn backing_flags(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | libc::O_NOATIME | libc::O_DIRECT) | libc::O_CLOEXEC
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
