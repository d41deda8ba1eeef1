//! The table of known files: node id to inode, file to node id.
//!
//! Shared by all threads of `fs/`. Its lock is held for the table's own work only, never across a system call. No
//! path is ever resolved here: a name is opened in its directory, without following symlinks.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::*};
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode};
use parking_lot::RwLock;

use super::inode::{Identity, Inode, reopen};
use crate::sys::handle;
use crate::sys::stat::with_birth;

/// The kernel's name for the root.
pub const ROOT: u64 = 1;

/// Node ids of files whose own number is taken: by a forgotten file that the kernel has not let go of yet, by the
/// root, or by a file of another filesystem mounted below.
const SUBSTITUTES: u64 = 1 << 63;

/// However many descriptors we may have, no more than this for directories: each costs the kernel memory.
const MOST_HELD: u64 = 16 << 10;

pub struct Tree {
    pub root: Arc<Inode>,
    /// The backing directory, opened before anything was mounted over it.
    mount: Arc<File>,
    /// Can files be opened by handle? Not without privilege, nor on every filesystem.
    handles: bool,
    table: RwLock<Table>,
    next_substitute: AtomicU64,
    /// How many more directories may keep a descriptor.
    budget: AtomicI64,
    /// Goes up when a directory moves, and paths below it change.
    version: AtomicU64,
}

#[derive(Default)]
struct Table {
    /// By node id, which is the file's own number for all but a few.
    by_id: HashMap<u64, Arc<Inode>>,
    /// The node ids of those that have a substitute.
    substitutes: HashMap<Identity, u64>,
}

impl Table {
    fn find(&self, identity: &Identity) -> Option<&Arc<Inode>> {
        let own = self.by_id.get(&identity.ino).filter(|inode| inode.identity == *identity);
        own.or_else(|| self.by_id.get(self.substitutes.get(identity)?))
    }
}

impl Tree {
    /// Takes the backing directory, which must be an ordinary descriptor.
    ///
    /// # Errors
    /// When it cannot be examined.
    pub fn new(backing: File, descriptors: u64) -> io::Result<Tree> {
        let held = nix::fcntl::openat(&backing, ".", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = nix::sys::stat::fstat(&held)?;
        let mount = Arc::new(backing);
        let handles = handle::of(&held).and_then(|handle| handle::open(mount.as_fd(), &handle, libc::O_PATH)).is_ok();
        let identity = identify(&held, &stat, handles.then_some(stat.st_dev));
        let root = Arc::new(Inode::new(ROOT, identity.clone(), libc::S_IFDIR, mount.clone(), Some(held)));
        root.lookups.store(1, Relaxed);
        let tree = Tree {
            root: root.clone(),
            mount,
            handles,
            table: RwLock::default(),
            next_substitute: AtomicU64::new(SUBSTITUTES),
            budget: AtomicI64::new((descriptors / 4).min(MOST_HELD) as i64),
            version: AtomicU64::new(0),
        };
        let mut table = tree.table.write();
        table.substitutes.insert(identity, ROOT);
        table.by_id.insert(ROOT, root);
        drop(table);
        Ok(tree)
    }

    /// The backing directory itself.
    pub fn backing(&self) -> &File {
        &self.mount
    }

    /// The version that cached paths are of.
    pub fn version(&self) -> u64 {
        self.version.load(Acquire)
    }

    /// Makes all cached paths stale.
    pub fn directory_moved(&self) {
        self.version.fetch_add(1, AcqRel);
    }

    /// # Errors
    /// `ESTALE` for a node that we do not know.
    pub fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        if id == ROOT {
            return Ok(self.root.clone());
        }
        let table = self.table.read();
        table.by_id.get(&id).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// The attributes of a name, and its file if that is known; takes no reference.
    pub fn peek(&self, parent: &Inode, name: &OsStr) -> io::Result<(Option<Arc<Inode>>, FileStat)> {
        let stat = stat_at(parent.path_fd()?, name)?;
        {
            let table = self.table.read();
            // The root is always one.
            if table.substitutes.len() == 1 {
                let found = table.by_id.get(&stat.st_ino).filter(|inode| inode.has_number(&stat));
                return Ok((found.cloned(), stat));
            }
        }
        // It could be one of those whose number another has taken.
        let (_, identity, stat) = self.examine(parent, name)?;
        let table = self.table.read();
        Ok((table.find(&identity).cloned(), stat))
    }

    /// The file of these attributes, if it is known by its own number.
    pub fn known(&self, stat: &FileStat) -> Option<Arc<Inode>> {
        let table = self.table.read();
        table.by_id.get(&stat.st_ino).filter(|inode| inode.has_number(stat)).cloned()
    }

    /// Enters a file that was just made under a name and is open; counts one reference of the kernel's.
    pub fn adopt(&self, parent: &Arc<Inode>, name: &OsStr, file: &OwnedFd) -> io::Result<(Arc<Inode>, FileStat)> {
        let stat = stat(file)?;
        let identity = self.identify(file, &stat);
        // Without a handle it is held, and not by this descriptor: a file open for writing cannot be executed.
        let held = match identity.handle {
            Some(_) => None,
            None => Some(reopen(file.as_fd(), libc::O_PATH)?),
        };
        let inode = self.enter(identity, &stat, held);
        inode.met(parent, name);
        Ok((inode, stat))
    }

    /// Finds the file under a name and counts one reference of the kernel's.
    pub fn lookup(&self, parent: &Arc<Inode>, name: &OsStr) -> io::Result<(Arc<Inode>, FileStat)> {
        let begun = UNIX_EPOCH.elapsed().unwrap_or_default();
        let dir = parent.path_fd()?;
        let (stat, birth) = with_birth(&dir, name)?;
        let (inode, stat) = match self.recognise(&dir, name, (&stat, birth), begun) {
            Some(inode) => (inode, stat),
            None => {
                let (fd, identity, stat) = self.examine(parent, name)?;
                (self.enter(identity, &stat, Some(fd)), stat)
            }
        };
        inode.met(parent, name);
        Ok((inode, stat))
    }

    /// The file that is known by the number of these attributes, if it is the one under the name; counts one reference. By
    /// its birth, or else by its handle: a file that was known before had its number all the time, so that what the name
    /// meant when its attributes were read was no other.
    fn recognise(
        &self,
        dir: impl AsFd,
        name: &OsStr,
        (stat, birth): (&FileStat, Option<Duration>),
        begun: Duration,
    ) -> Option<Arc<Inode>> {
        let candidate = {
            let table = self.table.read();
            let candidate = table.by_id.get(&stat.st_ino).filter(|inode| inode.has_number(stat))?;
            if candidate.is_certainly(stat, birth) {
                candidate.lookups.fetch_add(1, Relaxed);
                return Some(candidate.clone());
            }
            candidate.clone()
        };
        if handle::at(dir, name).ok() != candidate.identity.handle {
            return None;
        }
        candidate.note_birth(birth, begun);
        // Meanwhile the kernel may have forgotten it.
        let table = self.table.read();
        let inode = table.by_id.get(&candidate.id).filter(|inode| Arc::ptr_eq(inode, &candidate))?;
        inode.lookups.fetch_add(1, Relaxed);
        Some(inode.clone())
    }

    fn examine(&self, parent: &Inode, name: &OsStr) -> io::Result<(OwnedFd, Identity, FileStat)> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::openat(parent.path_fd()?, name, flags, Mode::empty())?;
        let stat = nix::sys::stat::fstat(&fd)?;
        let identity = self.identify(&fd, &stat);
        Ok((fd, identity, stat))
    }

    fn identify(&self, fd: impl AsFd, stat: &FileStat) -> Identity {
        identify(fd, stat, self.handles.then_some(self.root.identity.dev))
    }

    /// Enters a file, or finds it entered; counts one reference. What has no handle needs a descriptor.
    fn enter(&self, identity: Identity, stat: &FileStat, mut fd: Option<OwnedFd>) -> Arc<Inode> {
        let known = |table: &Table| {
            let inode = table.find(&identity)?;
            inode.lookups.fetch_add(1, Relaxed);
            Some(inode.clone())
        };
        // To forget one takes the lock for writing.
        if let Some(inode) = known(&self.table.read()) {
            return inode;
        }
        let mut table = self.table.write();
        if let Some(inode) = known(&table) {
            return inode;
        }
        let own = identity.dev == self.root.identity.dev && identity.ino != ROOT && identity.ino < SUBSTITUTES;
        let id = match own && !table.by_id.contains_key(&identity.ino) {
            true => identity.ino,
            false => self.next_substitute.fetch_add(1, Relaxed),
        };
        let kind = stat.st_mode & libc::S_IFMT;
        let budgeted = identity.handle.is_some() && kind == libc::S_IFDIR && fd.is_some() && self.spend();
        // One that is not kept is closed after the lock: it may be the file's last.
        let held = if budgeted || identity.handle.is_none() { fd.take() } else { None };
        let mut inode = Inode::new(id, identity.clone(), kind, self.mount.clone(), held);
        inode.budgeted = budgeted;
        let inode = Arc::new(inode);
        inode.lookups.store(1, Relaxed);
        // The kernel has nothing of a file that it is only now told of: all it will have is from here on.
        inode.stamp(stat);
        if id != identity.ino {
            table.substitutes.insert(identity, id);
        }
        table.by_id.insert(id, inode.clone());
        inode
    }

    /// Directories keep a descriptor while there is room, for speed.
    fn spend(&self) -> bool {
        let spend = |budget: i64| (budget > 0).then_some(budget - 1);
        self.budget.fetch_update(Relaxed, Relaxed, spend).is_ok()
    }

    /// The kernel gives back references: the file, if it was the last one. What can still be taken back stays.
    pub fn forget(&self, id: u64, references: u64) -> Option<Arc<Inode>> {
        let mut table = self.table.write();
        let inode = table.by_id.get(&id)?;
        let left = inode.lookups.load(Relaxed).saturating_sub(references);
        inode.lookups.store(left, Relaxed);
        if left == 0 { self.take_if_unused(&mut table, id) } else { None }
    }

    /// Drops an inode that only its undo log kept.
    pub fn settle(&self, id: u64) {
        let unused = self.take_if_unused(&mut self.table.write(), id);
        drop(unused);
    }

    fn take_if_unused(&self, table: &mut Table, id: u64) -> Option<Arc<Inode>> {
        let wanted = |inode: &Inode| inode.undoable.load(Acquire) && !inode.unlinked.load(Acquire);
        let unused = |inode: &Arc<Inode>| inode.lookups.load(Relaxed) == 0 && !wanted(inode);
        if id == ROOT || !table.by_id.get(&id).is_some_and(unused) {
            return None;
        }
        let inode = table.by_id.remove(&id)?;
        if inode.budgeted {
            self.budget.fetch_add(1, Relaxed);
        }
        if id != inode.identity.ino {
            table.substitutes.remove(&inode.identity);
        }
        Some(inode)
    }

    /// Makes the table fit again after the kernel has forgotten most of many files; `true` if there was something to
    /// give back.
    pub fn shrink(&self) -> bool {
        const SMALL: usize = 4096;
        let roomy = |table: &Table| table.by_id.capacity() > SMALL && table.by_id.len() < table.by_id.capacity() / 4;
        if !roomy(&self.table.read()) {
            return false;
        }
        let mut table = self.table.write();
        let room = 2 * table.by_id.len();
        table.by_id.shrink_to(room);
        true
    }

    /// All that is known now.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.table.read().by_id.values().cloned().collect()
    }
}

/// Handles are used on the backing directory's own filesystem (`home`) only: opening one needs a descriptor on that.
fn identify(fd: impl AsFd, stat: &FileStat, home: Option<u64>) -> Identity {
    let handle = if home == Some(stat.st_dev) { handle::of(fd).ok() } else { None };
    Identity { dev: stat.st_dev, ino: stat.st_ino, handle }
}

/// The attributes of an open or `O_PATH` descriptor.
pub fn stat(fd: impl AsFd) -> io::Result<FileStat> {
    Ok(nix::sys::stat::fstat(fd)?)
}

/// The attributes of a name in a directory, itself and not what it points to.
pub fn stat_at(dir: impl AsFd, name: &OsStr) -> io::Result<FileStat> {
    Ok(nix::sys::stat::fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)
}
