//! One file of the backing tree that the kernel knows: how to reach it, and under which names.
//!
//! Shared by all threads of `fs/`. The lock of the names is held for a few instructions, never across a system call,
//! and never two at a time: a path is gathered by locking one inode after the other.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::stat::FileStat;
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::passthrough::Handles;
use super::privileges;
use crate::durability::Undo;
use crate::fault::Plan;
use crate::space::{Members, Quotas, Usage, WritebackError};
use crate::sys::handle::{self, FileHandle};

/// What tells one file from every other, past and present. Without a handle the inode number is enough, because then
/// a descriptor keeps the number from being used again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub dev: u64,
    pub ino: u64,
    pub handle: Option<FileHandle>,
}

/// Paths deeper than this are taken for a loop in names that others moved below us.
const DEEPEST: usize = 2048;

/// A known file.
#[derive(Debug)]
pub struct Inode {
    /// The kernel's name for it.
    pub id: u64,
    pub identity: Identity,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// When the file was made, once that tells it from every other that has had its number.
    birth: OnceLock<Duration>,
    /// An ordinary descriptor on the filesystem of the backing directory, for opening by handle.
    mount: Arc<File>,
    /// `O_PATH` descriptor: of directories while there is room, of what has no handle, of what was unlinked.
    held: OnceLock<OwnedFd>,
    /// Is it one of the directories for which there was room?
    pub budgeted: bool,
    names: Mutex<Names>,
    /// Of a directory: was a name looked up in it since it was last listed from its beginning?
    pub looked_into: AtomicBool,
    /// References that the kernel holds; changed under the lock of the table.
    pub lookups: AtomicU64,
    /// Open handles of ours.
    pub opens: AtomicU32,
    /// Writes that can be taken back.
    pub undo: Mutex<Undo>,
    /// Is its last name gone? Then nothing needs to be taken back once nobody has it open.
    pub unlinked: AtomicBool,
    /// Is there anything in `undo`? Read on the hot path instead of its lock.
    pub undoable: AtomicBool,
    /// Blocks as `space` last counted them.
    pub usage: Usage,
    /// Of writes that were accepted without space.
    pub writeback_error: WritebackError,
    /// Was it changed through us since its stamp was taken?
    pub changed: AtomicBool,
    /// Has it suid or sgid, as far as was seen? Read on the hot path instead of its attributes.
    pub privileged: privileges::Seen,
    stamp: Mutex<Option<Stamp>>,
    /// Has somebody else changed it since its pages were last let go?
    pub foreign: AtomicBool,
    /// Who serves its open handles, where files are passed through.
    pub handles: Handles,
}

/// By what a change of a file shows: size, and when contents and attributes changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    size: i64,
    changed: [i64; 4],
}

impl Stamp {
    pub fn of(stat: &FileStat) -> Stamp {
        Stamp { size: stat.st_size, changed: [stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec] }
    }
}

#[derive(Debug, Default)]
struct Names {
    /// The latest used comes first.
    links: SmallVec<[(Arc<Inode>, OsString); 1]>,
    /// Goes up when they change. What was found out without the lock is kept only if it has not.
    changes: u64,
    /// The path of the first link, as of a version of the tree.
    path: Option<(u64, Arc<[u8]>)>,
    /// Which rules of a plan match the paths, as of a version of the tree.
    bits: Option<(u64, u64, Arc<[u64]>)>,
    /// Which quotas count the path, as of a set of them and a version of the tree.
    quota_bits: Option<Box<(u64, u64, Members)>>,
}

/// A descriptor for one use: held by the inode, or opened by handle.
pub enum PathFd<'a> {
    Held(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for PathFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            PathFd::Held(fd) => *fd,
            PathFd::Opened(fd) => fd.as_fd(),
        }
    }
}

impl Inode {
    pub fn new(id: u64, identity: Identity, kind: u32, mount: Arc<File>, held: Option<OwnedFd>) -> Inode {
        let cell = OnceLock::new();
        if let Some(fd) = held {
            let _ = cell.set(fd);
        }
        Inode {
            id,
            identity,
            kind,
            birth: OnceLock::new(),
            mount,
            held: cell,
            budgeted: false,
            names: Mutex::default(),
            looked_into: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            opens: AtomicU32::new(0),
            undo: Mutex::default(),
            unlinked: AtomicBool::new(false),
            undoable: AtomicBool::new(false),
            usage: Usage::default(),
            writeback_error: WritebackError::default(),
            changed: AtomicBool::new(false),
            privileged: privileges::Seen::default(),
            stamp: Mutex::default(),
            foreign: AtomicBool::new(false),
            handles: Handles::default(),
        }
    }

    /// Takes the stamp of the file as it is now; `true` if that is the one it had, so that nobody else changed it.
    pub fn stamp(&self, stat: &FileStat) -> bool {
        self.changed.store(false, Release);
        self.privileged.note(stat.st_mode);
        let now = Some(Stamp::of(stat));
        std::mem::replace(&mut *self.stamp.lock(), now) == now
    }

    /// To be called before the contents are changed through us: from here on the stamp tells nothing until it is taken anew,
    /// so what others have done before this has to be seen now. One load, but for the first change since the stamp.
    pub fn about_to_change(&self, file: &File) {
        if !self.changed.load(Relaxed) {
            let stat = nix::sys::stat::fstat(file);
            if stat.is_ok_and(|stat| self.stamp.lock().is_some_and(|stamp| stamp != Stamp::of(&stat))) {
                self.foreign.store(true, Release);
            }
            self.changed.store(true, Release);
        }
    }

    /// Has the file of these attributes the same number, and is of the same type?
    pub fn has_number(&self, stat: &FileStat) -> bool {
        (self.identity.dev, self.identity.ino, self.kind) == (stat.st_dev, stat.st_ino, stat.st_mode & libc::S_IFMT)
    }

    /// Is this the file of these attributes, made at that time? `false` when it may be, and its handle has to tell.
    pub fn is_certainly(&self, stat: &FileStat, birth: Option<Duration>) -> bool {
        let held = self.identity.handle.is_none();
        self.has_number(stat) && (held || birth.is_some() && self.birth.get().copied() == birth)
    }

    /// Notes when the file was made. Its handle was seen after `seen`, since the epoch: by then no other file of its number
    /// could be made at the same tick of the filesystem's clock any more.
    pub fn note_birth(&self, birth: Option<Duration>, seen: Duration) {
        const TICK: Duration = Duration::from_millis(100);
        if let Some(birth) = birth.filter(|birth| seen > *birth + TICK) {
            let _ = self.birth.set(birth);
        }
    }

    pub fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    pub fn holds_fd(&self) -> bool {
        self.held.get().is_some()
    }

    /// An `O_PATH` descriptor of the file.
    ///
    /// # Errors
    /// `ESTALE` when it is gone and nobody holds it.
    pub fn path_fd(&self) -> io::Result<PathFd<'_>> {
        if let Some(fd) = self.held.get() {
            return Ok(PathFd::Held(fd.as_fd()));
        }
        self.by_handle(libc::O_PATH).map(PathFd::Opened)
    }

    /// Opens the file itself with these flags, which must not create anything.
    pub fn open(&self, flags: i32) -> io::Result<OwnedFd> {
        match self.held.get() {
            None => self.by_handle(flags),
            Some(held) => reopen(held.as_fd(), flags),
        }
    }

    /// A descriptor that keeps a file reachable whose last name is about to go; none if it has one.
    pub fn reach(&self) -> Option<OwnedFd> {
        match self.held.get() {
            Some(_) => None,
            None => self.by_handle(libc::O_PATH).ok(),
        }
    }

    /// Keeps the file by this descriptor until the kernel forgets it.
    pub fn hold(&self, fd: OwnedFd) {
        let _ = self.held.set(fd);
    }

    fn by_handle(&self, flags: i32) -> io::Result<OwnedFd> {
        let stale = || io::Error::from_raw_os_error(libc::ESTALE);
        let handle = self.identity.handle.as_ref().ok_or_else(stale)?;
        handle::open(self.mount.as_fd(), handle, flags)
    }

    /// Notes that the file was met under this name; it becomes the name that events show.
    pub fn met(&self, parent: &Arc<Inode>, name: &OsStr) {
        let mut names = self.names.lock();
        let at = names.links.iter().position(|(p, n)| p.id == parent.id && n == name);
        if at == Some(0) {
            return;
        }
        let link = match at {
            Some(at) => names.links.remove(at),
            None => (parent.clone(), name.to_os_string()),
        };
        names.links.insert(0, link);
        names.forget_paths();
    }

    /// Notes that this name is gone.
    pub fn lost(&self, parent: u64, name: &OsStr) {
        self.changed.store(true, Release);
        let mut names = self.names.lock();
        // The last one stays: a file that is open and unlinked is still spoken of by the name it had.
        if names.links.len() > 1 {
            names.links.retain(|(p, n)| !(p.id == parent && n == name));
            names.forget_paths();
        }
    }

    /// Notes that the file moved.
    pub fn moved(&self, parent: u64, name: &OsStr, to: &Arc<Inode>, to_name: &OsStr) {
        self.changed.store(true, Release);
        let mut names = self.names.lock();
        names.links.retain(|(p, n)| !(p.id == parent && n == name));
        names.links.insert(0, (to.clone(), to_name.to_os_string()));
        names.forget_paths();
    }

    /// The path below the mountpoint, with a leading slash; of several, the one used last. `version` is the tree's.
    pub fn path(&self, version: u64) -> Arc<[u8]> {
        let (links, changes) = {
            let names = self.names.lock();
            if let Some((_, path)) = names.path.as_ref().filter(|(of, _)| *of == version) {
                return path.clone();
            }
            (names.links.clone(), names.changes)
        };
        let path: Arc<[u8]> = paths_of(links).next().unwrap_or_else(|| b"/".to_vec()).into();
        self.remember(changes, |names| names.path = Some((version, path.clone())));
        path
    }

    /// The names that are known: node id of the directory, and name.
    pub fn links(&self) -> Vec<(u64, OsString)> {
        self.names.lock().links.iter().map(|(parent, name)| (parent.id, name.clone())).collect()
    }

    pub fn has_several_names(&self) -> bool {
        self.names.lock().links.len() > 1
    }

    /// All paths that are known.
    pub fn paths(&self) -> impl Iterator<Item = Vec<u8>> {
        paths_of(self.names.lock().links.clone())
    }

    /// Keeps what was found out of the names as they were then, if they are still the same: who was overtaken by a rename
    /// must not leave what was true before it.
    fn remember(&self, changes: u64, keep: impl FnOnce(&mut Names)) {
        let mut names = self.names.lock();
        if names.changes == changes {
            keep(&mut names);
        }
    }

    /// The path of a name in this directory.
    pub fn child_path(self: &Arc<Self>, name: &OsStr) -> Vec<u8> {
        let mut parts: SmallVec<[OsString; 8]> = SmallVec::new();
        parts.push(name.to_os_string());
        let mut directory = self.clone();
        while parts.len() < DEEPEST {
            let link = directory.names.lock().links.first().cloned();
            let Some((parent, name)) = link else { break };
            parts.push(name);
            directory = parent;
        }
        let mut path = Vec::with_capacity(parts.iter().map(|part| part.len() + 1).sum());
        for part in parts.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(part.as_bytes());
        }
        path
    }

    /// Which rules of the plan match the paths: computed once for each plan and version of the tree.
    pub fn path_bits(&self, plan: &Plan, version: u64) -> Arc<[u64]> {
        let (links, changes) = {
            let names = self.names.lock();
            if let Some((.., bits)) = names.bits.as_ref().filter(|(id, of, _)| (*id, *of) == (plan.id, version)) {
                return bits.clone();
            }
            (names.links.clone(), names.changes)
        };
        let paths: SmallVec<[Vec<u8>; 1]> = paths_of(links).collect();
        let bits: Arc<[u64]> = plan.path_bits(paths.iter().map(Vec::as_slice)).into();
        self.remember(changes, |names| names.bits = Some((plan.id, version, bits.clone())));
        bits
    }

    /// Which quotas are for the path, whoever owns the file: computed once for each set and version of the tree.
    pub fn quota_bits(&self, quotas: &Quotas, version: u64) -> Members {
        let changes = {
            let names = self.names.lock();
            let known = names.quota_bits.as_deref().filter(|(id, of, _)| (*id, *of) == (quotas.id, version));
            if let Some((.., bits)) = known {
                return *bits;
            }
            names.changes
        };
        // Of the names as they were then, or later ones: then nothing is kept.
        let path = self.path(version);
        let bits = quotas.which(|quota| quota.matches_path(&path));
        self.remember(changes, |names| names.quota_bits = Some(Box::new((quotas.id, version, bits))));
        bits
    }
}

impl Names {
    fn forget_paths(&mut self) {
        self.changes += 1;
        self.path = None;
        self.bits = None;
        self.quota_bits = None;
    }
}

/// The paths of these names; the root has none of its own.
fn paths_of(links: SmallVec<[(Arc<Inode>, OsString); 1]>) -> impl Iterator<Item = Vec<u8>> {
    let root = links.is_empty().then(|| b"/".to_vec());
    links.into_iter().map(|(parent, name)| parent.child_path(&name)).chain(root)
}

/// Opens what an `O_PATH` descriptor stands for, by way of procfs.
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = nix::fcntl::OFlag::from_bits_retain(flags & !libc::O_NOFOLLOW | libc::O_CLOEXEC);
    Ok(nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::fault::compile::Defaults;
    use crate::fault::{RuleSpec, compile};

    fn inode(id: u64, kind: u32) -> Inode {
        let mount = Arc::new(File::open("/").unwrap());
        Inode::new(id, Identity { dev: 0, ino: id, handle: None }, kind, mount, None)
    }

    fn plan(path: &str) -> Plan {
        let spec =
            serde_json::json!({"name": "r", "match": {"path": path}, "fault": {"kind": "error", "errno": "EIO"}});
        let spec: RuleSpec = serde_json::from_value(spec).unwrap();
        let defaults = Defaults { seed: 0, now_ns: 0, created: std::time::SystemTime::UNIX_EPOCH };
        Plan::new(1, vec![Arc::new(compile(spec, defaults).unwrap())])
    }

    #[test]
    fn who_asks_for_a_path_while_it_changes_leaves_no_old_one_behind() {
        let (root, file) = (Arc::new(inode(1, libc::S_IFDIR)), inode(2, libc::S_IFREG));
        let (plan, names) = (plan("/bad"), ["good", "bad"].map(OsStr::new));
        file.met(&root, names[0]);
        let (stop, begun) = (AtomicBool::new(false), Instant::now());
        let mut wrong = Vec::new();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Relaxed) {
                        file.path_bits(&plan, 0);
                        file.path(0);
                    }
                });
            }
            for n in 1.. {
                if n > 20_000 || begun.elapsed() > Duration::from_secs(3) {
                    break;
                }
                file.moved(1, names[(n + 1) % 2], &root, names[n % 2]);
                std::thread::sleep(Duration::from_micros(20));
                let (bits, path) = (file.path_bits(&plan, 0), file.path(0));
                if (bits[0] == 1, &path[1..]) != (n % 2 == 1, names[n % 2].as_bytes()) {
                    wrong.push((n, bits[0], String::from_utf8_lossy(&path).into_owned()));
                }
            }
            stop.store(true, Relaxed);
        });
        assert!(wrong.is_empty(), "{} times: {:?}", wrong.len(), &wrong[..wrong.len().min(3)]);
    }
}
