//! Taking back what was dropped, and mending what was damaged.
//!
//! Run by helpers of the control thread and at the end of the mount, never by a reader: the kernel may write back
//! mapped pages first, which is a request that a reader has to serve. The lock of a file's undo log is held while its
//! old bytes are written.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use globset::GlobMatcher;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use super::inode::Inode;
use super::serve::Core;
use super::tree::stat;
use crate::durability::{Evicted, Original, Undo, undo};

impl Core {
    /// Makes readers see what the disk has: takes dropped writes back, and has the kernel forget its pages. Of all files, or
    /// of those that a glob matches; gives path and result of each that had something to take back.
    pub fn evict_all(&self, glob: Option<&GlobMatcher>) -> Vec<(String, io::Result<Evicted>)> {
        let mut evicted = Vec::new();
        for (path, inode) in self.meant(glob) {
            match inode.undoable.load(Acquire) {
                true => match self.evict(&inode) {
                    // It was only damaged.
                    Ok(nothing) if nothing == Evicted::default() => {}
                    result => evicted.push((path, result)),
                },
                false => self.forget_pages(inode.id, &(0..0)),
            }
        }
        evicted
    }

    /// Gives files back what they should have where they were damaged: path and result of each.
    pub fn repair_all(&self, glob: Option<&GlobMatcher>) -> Vec<(String, io::Result<Vec<Original>>)> {
        let damaged = self.meant(glob).into_iter().filter(|(_, inode)| inode.undoable.load(Acquire));
        let repaired = damaged.map(|(path, inode)| (path, self.repair(&inode)));
        repaired.filter(|(_, result)| result.as_ref().map_or(true, |places| !places.is_empty())).collect()
    }

    /// The damaged places of files, as far as nobody has written them anew.
    pub fn damaged(&self, glob: Option<&GlobMatcher>) -> Vec<(String, Vec<Original>)> {
        let files = self.meant(glob).into_iter().filter(|(_, inode)| inode.undoable.load(Acquire));
        let places = |inode: &Inode| inode.undo.lock().originals.iter().cloned().collect::<Vec<_>>();
        files.map(|(path, inode)| (path, places(&inode))).filter(|(_, places)| !places.is_empty()).collect()
    }

    /// Known regular files under a path that is meant. Those that a parked request holds come last, so that they keep no
    /// other waiting.
    fn meant(&self, glob: Option<&GlobMatcher>) -> Vec<(String, Arc<Inode>)> {
        let version = self.tree.version();
        let mut files = self.tree.all();
        files.retain(|inode| inode.is_regular());
        let held = self.parked_files();
        files.sort_by_key(|inode| held.contains(&inode.id));
        // A file is meant by any of its names, and told by that one.
        let name = |inode: &Arc<Inode>| match glob {
            None => Some(inode.path(version).to_vec()),
            Some(glob) => inode.paths().find(|path| glob.is_match(OsStr::from_bytes(path))),
        };
        let meant = files.into_iter().filter_map(|inode| Some((name(&inode)?, inode)));
        meant.map(|(path, inode)| (String::from_utf8_lossy(&path).into_owned(), inode)).collect()
    }

    fn repair(&self, inode: &Arc<Inode>) -> io::Result<Vec<Original>> {
        // What the kernel still has to write back would come after us.
        self.forget_pages(inode.id, &(0..0));
        let file = match inode.open(libc::O_RDWR) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {
                self.abandon(inode);
                return Ok(Vec::new());
            }
            other => File::from(other?),
        };
        let mut log = inode.undo.lock();
        let repaired = log.repair(&mut Backing { write: file.as_fd(), read: &file })?;
        inode.undoable.store(!log.is_empty(), Release);
        drop(log);
        inode.changed.store(true, Release);
        self.forget_pages(inode.id, &(0..0));
        self.tree.settle(inode.id);
        Ok(repaired)
    }

    /// Takes back what was dropped on one file: writes the old bytes, and makes the kernel forget the new ones.
    ///
    /// # Errors
    /// When the backing file cannot be written; then what is left stays in the log.
    pub fn evict(&self, inode: &Arc<Inode>) -> io::Result<Evicted> {
        self.forget_pages(inode.id, &(0..0));
        let file = match inode.open(libc::O_RDWR) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => return Ok(self.abandon(inode)),
            other => File::from(other?),
        };
        let mut log = inode.undo.lock();
        let evicted = log.evict(&mut Backing { write: file.as_fd(), read: &file })?;
        inode.undoable.store(!log.is_empty(), Release);
        drop(log);
        inode.usage.note_found(0..u64::MAX, self.block);
        if self.capacity.is_set() {
            // What came back is free.
            self.counted(inode, &file, || Ok(()))?;
        }
        self.forget_pages(inode.id, &(0..0));
        self.tree.settle(inode.id);
        Ok(evicted)
    }

    /// Has the kernel forget a range of a file, or, of an empty one, all of it.
    pub(super) fn forget_pages(&self, id: u64, range: &Range<u64>) {
        if let Some(notifier) = self.notifier.get() {
            let length = range.end.saturating_sub(range.start).min(i64::MAX as u64 - range.start);
            // Fails once the mount is gone, and then there is no page left.
            let _ = notifier.inval_inode(fuser::INodeNo(id), range.start as i64, length as i64);
        }
    }

    /// The file is gone, and with it what there was to take back.
    fn abandon(&self, inode: &Inode) -> Evicted {
        *inode.undo.lock() = Undo::default();
        inode.undoable.store(false, Release);
        self.tree.settle(inode.id);
        Evicted::default()
    }
}

/// The backing file for the undo log.
pub(super) struct Backing<'a> {
    pub write: BorrowedFd<'a>,
    pub read: &'a File,
}

impl Backing<'_> {
    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let zeros = [0; 64 << 10];
        let end = range.end.min(stat(self.write)?.st_size as u64);
        (range.start..end).step_by(zeros.len()).try_for_each(|at| {
            let length = (end - at).min(zeros.len() as u64) as usize;
            self.read.write_all_at(&zeros[..length], at)
        })
    }
}

impl undo::File for Backing<'_> {
    fn size(&mut self) -> io::Result<u64> {
        Ok(stat(self.write)?.st_size as u64)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.read.read_at(buffer, offset)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.read.write_all_at(data, offset)
    }

    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match nix::fcntl::fallocate(self.read, punch, range.start as i64, (range.end - range.start) as i64) {
            // A filesystem without holes.
            Err(Errno::EOPNOTSUPP) => self.write_zeros(range),
            other => Ok(other?),
        }
    }

    fn truncate(&mut self, size: u64) -> io::Result<()> {
        self.read.set_len(size)
    }
}
