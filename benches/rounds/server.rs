//! Servers to compare with: the least that a FUSE filesystem in Rust can do.
//!
//! `loopback` hands everything on by plain descriptors; `floor` is the same, but answers writes without doing anything,
//! so that what is left is the way through the kernel and back; `passthrough` lets the kernel read and write the backing
//! files itself. Open files, capabilities and cache times are as in `nemesisfs`, and nothing else is: no rules, no
//! events, no identity of the caller.
//!
//! Runs in a process of its own, which the rounds start, on fuser's threads. Locks: those of the two tables, for the
//! tables' own work. Ends when it is unmounted, and unmounts itself when its standard input is closed, so that it never
//! outlives the rounds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};
use nemesisfs::sys::dents;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl, open, openat, renameat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, UtimensatFlags, fchmodat, fstat, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchownat, ftruncate, lseek, setsid, unlinkat};
use parking_lot::{Mutex, RwLock};
use slab::Slab;

/// What a server does with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Floor,
    Loopback,
    Passthrough,
}

#[derive(Debug, Args)]
pub struct Options {
    pub kind: Kind,
    pub backing: PathBuf,
    pub mountpoint: PathBuf,
    /// How many threads read requests
    #[arg(long)]
    pub readers: usize,
}

/// What it is told on its standard input: ask for the next request again and again, or sleep until there is one.
pub const SPIN: &[u8] = b"+";
pub const SLEEP: &[u8] = b"-";

const TTL: Duration = Duration::from_secs(1);
const ROOT: u64 = 1;
const MAX_WRITE: u32 = 1 << 20;

const WANTED: &[InitFlags] = &[
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
];

/// A file that the kernel knows.
struct Node {
    fd: OwnedFd,
    lookups: u64,
}

/// An open file or directory.
struct Opened {
    file: File,
    /// Keeps the kernel's reference on the backing file for as long as this open lives.
    _backing: Option<Arc<BackingId>>,
}

struct Loopback {
    kind: Kind,
    nodes: RwLock<HashMap<u64, Node>>,
    opened: RwLock<Slab<Arc<Opened>>>,
    /// One for each inode: the kernel refuses a second.
    backings: Mutex<HashMap<u64, Weak<BackingId>>>,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_WRITE as usize]);
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

fn unknown() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

fn attr(ino: u64, stat: &FileStat) -> FileAttr {
    let time = |seconds: i64, nanoseconds: i64| UNIX_EPOCH + Duration::new(seconds as u64, nanoseconds as u32);
    FileAttr {
        ino: INodeNo(ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: if stat.st_mode & libc::S_IFMT == libc::S_IFDIR { FileType::Directory } else { FileType::RegularFile },
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: 0,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

fn timespec(time: Option<TimeOrNow>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(at)) => at.duration_since(UNIX_EPOCH).unwrap_or_default().into(),
    }
}

impl Loopback {
    fn new(kind: Kind, backing: &std::path::Path) -> io::Result<Loopback> {
        let fd = open(backing, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let nodes = RwLock::new(HashMap::from([(ROOT, Node { fd, lookups: 1 })]));
        Ok(Loopback { kind, nodes, opened: RwLock::default(), backings: Mutex::default() })
    }

    /// Does something with the descriptor of a node.
    fn with<T>(&self, ino: u64, act: impl FnOnce(&OwnedFd) -> nix::Result<T>) -> io::Result<T> {
        let nodes = self.nodes.read();
        Ok(act(&nodes.get(&ino).ok_or_else(unknown)?.fd)?)
    }

    fn file(&self, fh: FileHandle) -> io::Result<Arc<Opened>> {
        self.opened.read().get(fh.0 as usize).cloned().ok_or_else(unknown)
    }

    fn entry(&self, parent: u64, name: &OsStr) -> io::Result<FileAttr> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = self.with(parent, |dir| openat(dir, name, flags, Mode::empty()))?;
        let stat = fstat(&fd)?;
        self.nodes.write().entry(stat.st_ino).or_insert(Node { fd, lookups: 0 }).lookups += 1;
        Ok(attr(stat.st_ino, &stat))
    }

    fn forget_some(&self, ino: u64, references: u64) {
        let mut nodes = self.nodes.write();
        let Some(node) = nodes.get_mut(&ino) else { return };
        node.lookups = node.lookups.saturating_sub(references);
        if node.lookups == 0 && ino != ROOT {
            nodes.remove(&ino);
        }
    }

    fn reopen(&self, ino: u64, flags: OFlag) -> io::Result<File> {
        let flags = flags.difference(OFlag::O_NOFOLLOW | OFlag::O_APPEND | OFlag::O_DIRECT) | OFlag::O_CLOEXEC;
        self.with(ino, |fd| open(proc_path(fd).as_str(), flags, Mode::empty())).map(File::from)
    }

    fn keep(&self, file: File, backing: Option<Arc<BackingId>>) -> FileHandle {
        FileHandle(self.opened.write().insert(Arc::new(Opened { file, _backing: backing })) as u64)
    }

    /// The backing id of an inode, made if no open of it lives; none where the kernel is not to pass through.
    fn backing(&self, ino: u64, make: impl FnOnce() -> io::Result<BackingId>) -> io::Result<Option<Arc<BackingId>>> {
        if self.kind != Kind::Passthrough {
            return Ok(None);
        }
        let mut backings = self.backings.lock();
        if let Some(id) = backings.get(&ino).and_then(Weak::upgrade) {
            return Ok(Some(id));
        }
        let id = Arc::new(make()?);
        backings.insert(ino, Arc::downgrade(&id));
        Ok(Some(id))
    }

    fn attributes(&self, ino: u64, fh: Option<FileHandle>) -> io::Result<FileAttr> {
        let stat = match fh {
            Some(fh) => fstat(&self.file(fh)?.file)?,
            None => self.with(ino, |fd| fstat(fd))?,
        };
        Ok(attr(ino, &stat))
    }

    fn each_entry(
        &self,
        fh: FileHandle,
        offset: u64,
        mut add: impl FnMut(&dents::Entry<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let directory = self.file(fh)?;
        lseek(&directory.file, offset as i64, Whence::SeekSet)?;
        let mut buffer = [0; 16 << 10];
        loop {
            let read = dents::read(&directory.file, &mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            for entry in dents::entries(&buffer[..read]) {
                if add(&entry)? {
                    return Ok(());
                }
            }
        }
    }
}

/// `O_DIRECT` goes past the kernel's cache, as with us.
fn open_mode(flags: i32) -> FopenFlags {
    match flags & libc::O_DIRECT != 0 {
        true => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        false => FopenFlags::FOPEN_KEEP_CACHE,
    }
}

impl Filesystem for Loopback {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in WANTED {
            let _ = config.add_capabilities(*wanted);
        }
        if self.kind == Kind::Passthrough {
            let cannot = |_| io::Error::from(io::ErrorKind::Unsupported);
            config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).map_err(cannot)?;
            config.set_max_stack_depth(1).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.entry(parent.0, name) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.forget_some(ino.0, nlookup);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino.0, fh) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        fh: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            if let Some(size) = size {
                match fh {
                    Some(fh) => ftruncate(&self.file(fh)?.file, size as i64)?,
                    None => ftruncate(self.reopen(ino.0, OFlag::O_WRONLY)?, size as i64)?,
                }
            }
            self.with(ino.0, |fd| {
                if uid.is_some() || gid.is_some() {
                    fchownat(fd, "", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::AT_EMPTY_PATH)?;
                }
                if let Some(mode) = mode {
                    let mode = Mode::from_bits_truncate(mode & 0o7777);
                    fchmodat(AT_FDCWD, proc_path(fd).as_str(), mode, FchmodatFlags::FollowSymlink)?;
                }
                if atime.is_some() || mtime.is_some() {
                    let (atime, mtime) = (timespec(atime), timespec(mtime));
                    utimensat(AT_FDCWD, proc_path(fd).as_str(), &atime, &mtime, UtimensatFlags::FollowSymlink)?;
                }
                Ok(())
            })?;
            self.attributes(ino.0, fh)
        };
        match set() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let made = self.with(parent.0, |dir| mkdirat(dir, name, Mode::from_bits_truncate(mode)));
        match made.and_then(|()| self.entry(parent.0, name)) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.with(parent.0, |dir| unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.with(parent.0, |dir| unlinkat(dir, name, UnlinkatFlags::RemoveDir)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = nix::fcntl::RenameFlags::from_bits_retain(flags.bits());
        let nodes = self.nodes.read();
        let renamed = match (nodes.get(&parent.0), nodes.get(&to_parent.0)) {
            (Some(from), Some(to)) => renameat2(&from.fd, name, &to.fd, to_name, flags).map_err(io::Error::from),
            _ => Err(unknown()),
        };
        match renamed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.reopen(ino.0, OFlag::from_bits_retain(flags.0)).and_then(|file| {
            let backing = self.backing(ino.0, || reply.open_backing(&file))?;
            Ok((file, backing))
        });
        match opened {
            Ok((file, Some(id))) => {
                let fh = self.keep(file, Some(id.clone()));
                reply.opened_passthrough(fh, FopenFlags::empty(), &id);
            }
            Ok((file, None)) => reply.opened(self.keep(file, None), open_mode(flags.0)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let how = OFlag::from_bits_retain(flags).difference(OFlag::O_APPEND | OFlag::O_DIRECT);
        let how = how | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        let created = self.with(parent.0, |dir| openat(dir, name, how, mode)).map(File::from).and_then(|file| {
            let attr = self.entry(parent.0, name)?;
            let backing = self.backing(attr.ino.0, || reply.open_backing(&file))?;
            Ok((file, attr, backing))
        });
        match created {
            Ok((file, attr, Some(id))) => {
                let fh = self.keep(file, Some(id.clone()));
                reply.created_passthrough(&TTL, &attr, Generation(0), fh, FopenFlags::empty(), &id);
            }
            Ok((file, attr, None)) => {
                reply.created(&TTL, &attr, Generation(0), self.keep(file, None), open_mode(flags));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let size = buffer.len().min(size as usize);
            match self.file(fh).and_then(|opened| opened.file.read_at(&mut buffer[..size], offset)) {
                Ok(read) => reply.data(&buffer[..read]),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.kind == Kind::Floor {
            return reply.written(data.len() as u32);
        }
        match self.file(fh).and_then(|opened| opened.file.write_at(data, offset)) {
            Ok(written) => reply.written(written as u32),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let opened = self.opened.write().try_remove(fh.0 as usize);
        drop(opened);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let sync = |opened: Arc<Opened>| if data_only { opened.file.sync_data() } else { opened.file.sync_all() };
        match self.file(fh).and_then(sync) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.reopen(ino.0, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            Ok(file) => reply.opened(self.keep(file, None), FopenFlags::empty()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.each_entry(fh, offset, |entry| {
            let kind = if entry.kind == libc::DT_DIR { FileType::Directory } else { FileType::RegularFile };
            Ok(reply.add(INodeNo(entry.ino), entry.next as u64, kind, entry.name))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let listed = self.each_entry(fh, offset, |entry| {
            if entry.name == "." || entry.name == ".." {
                let attr = self.attributes(ino.0, Some(fh))?;
                return Ok(reply.add(attr.ino, entry.next as u64, entry.name, &TTL, &attr, Generation(0)));
            }
            let attr = self.entry(ino.0, entry.name)?;
            let full = reply.add(attr.ino, entry.next as u64, entry.name, &TTL, &attr, Generation(0));
            if full {
                self.forget_some(attr.ino.0, 1);
            }
            Ok(full)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        let opened = self.opened.write().try_remove(fh.0 as usize);
        drop(opened);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.file(fh).and_then(|opened| opened.file.sync_all()) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }
}

/// Does what it is told on standard input, and unmounts when the rounds are gone.
fn listen(connection: OwnedFd, mountpoint: PathBuf) {
    std::thread::spawn(move || {
        let mut word = [0];
        while io::stdin().read_exact(&mut word).is_ok() {
            let flags = if word == SPIN { OFlag::O_NONBLOCK } else { OFlag::empty() };
            let _ = fcntl(&connection, FcntlArg::F_SETFL(flags));
        }
        let _ = umount2(&mountpoint, MntFlags::MNT_DETACH);
    });
}

/// Serves until it is unmounted.
pub fn run(options: &Options) -> io::Result<()> {
    // As a daemon does: the scheduler gives sessions their shares.
    setsid()?;
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.readers);
    config.acl = SessionACL::All;
    config.mount_options = vec![MountOption::FSName("nemesisfs-bench".into()), MountOption::DefaultPermissions];
    let session = Session::new(Loopback::new(options.kind, &options.backing)?, &options.mountpoint, &config)?;
    listen(session.as_fd().try_clone_to_owned()?, options.mountpoint.clone());
    match session.run() {
        // The other way in which the kernel says that the mount is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
        ended => ended,
    }
}
