//! One request in our own words: who calls, what is asked, and how it is answered.
//!
//! Between the adapter, which knows fuser, and the rest of `fs/`, which need not. A [`Call`] borrows from the reader's
//! buffer; [`Call::into_owned`] is for the requests that leave their reader (parked, or waiting for a disk). No locks,
//! no I/O but the one system call of the reply.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr,
};

use super::buffer::Buffer;
use crate::fault::Op;

/// Who calls. FUSE tells the thread, not the process; 0 for the kernel itself, or outside our pid namespace.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The kernel's number of the request.
    pub unique: u64,
    pub uid: u32,
    pub gid: u32,
    pub tid: u32,
}

/// A time to set: the clock's now, or this.
#[derive(Clone, Copy, Debug)]
pub enum Time {
    Now,
    /// Seconds and nanoseconds since the epoch; the nanoseconds always count upwards.
    At(i64, u32),
}

/// What a setattr changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

/// One request of the kernel. Inodes are the kernel's node ids, handles what we gave at open.
#[derive(Debug)]
pub enum Call<'a> {
    Lookup { parent: u64, name: Cow<'a, OsStr> },
    Getattr { ino: u64, fh: Option<u64> },
    Setattr { ino: u64, fh: Option<u64>, changes: Changes },
    Readlink { ino: u64 },
    Mknod { parent: u64, name: Cow<'a, OsStr>, mode: u32, umask: u32, rdev: u32 },
    Mkdir { parent: u64, name: Cow<'a, OsStr>, mode: u32, umask: u32 },
    Unlink { parent: u64, name: Cow<'a, OsStr> },
    Rmdir { parent: u64, name: Cow<'a, OsStr> },
    Symlink { parent: u64, name: Cow<'a, OsStr>, target: Cow<'a, OsStr> },
    Rename { parent: u64, name: Cow<'a, OsStr>, to_parent: u64, to_name: Cow<'a, OsStr>, flags: u32 },
    Link { ino: u64, parent: u64, name: Cow<'a, OsStr> },
    Open { ino: u64, flags: i32 },
    Create { parent: u64, name: Cow<'a, OsStr>, mode: u32, umask: u32, flags: i32 },
    Read { ino: u64, fh: u64, offset: u64, size: u32, flags: i32 },
    Write { ino: u64, fh: u64, offset: u64, data: Cow<'a, [u8]>, flags: i32, origin: Origin },
    CopyFileRange { ino: u64, fh: u64, offset: u64, to_ino: u64, to_fh: u64, to_offset: u64, length: u64 },
    Fallocate { ino: u64, fh: u64, offset: u64, length: u64, mode: i32 },
    Flush { ino: u64, fh: u64 },
    Release { ino: u64, fh: u64 },
    Fsync { ino: u64, fh: u64, datasync: bool },
    Opendir { ino: u64, flags: i32 },
    Readdir { ino: u64, fh: u64, offset: u64 },
    Readdirplus { ino: u64, fh: u64, offset: u64 },
    Releasedir { ino: u64, fh: u64 },
    Fsyncdir { ino: u64, fh: u64, datasync: bool },
    Statfs { ino: u64 },
    Setxattr { ino: u64, name: Cow<'a, OsStr>, value: Cow<'a, [u8]>, flags: i32 },
    Getxattr { ino: u64, name: Cow<'a, OsStr>, size: u32 },
    Listxattr { ino: u64, size: u32 },
    Removexattr { ino: u64, name: Cow<'a, OsStr> },
    Access { ino: u64 },
    Lseek { ino: u64, fh: u64, offset: i64, whence: i32 },
    Ioctl { ino: u64, fh: u64, command: u32, input: Cow<'a, [u8]>, output_size: u32 },
}

/// What the kernel says of where a write comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Written back from a shared mapping: caller and handle are the kernel's guess.
    pub writeback: bool,
    /// The caller may not keep suid and sgid on what it writes.
    pub kill_suidgid: bool,
}

impl Call<'_> {
    pub fn op(&self) -> Op {
        match self {
            Call::Lookup { .. } => Op::Lookup,
            Call::Getattr { .. } => Op::Getattr,
            Call::Setattr { .. } => Op::Setattr,
            Call::Readlink { .. } => Op::Readlink,
            Call::Mknod { .. } => Op::Mknod,
            Call::Mkdir { .. } => Op::Mkdir,
            Call::Unlink { .. } => Op::Unlink,
            Call::Rmdir { .. } => Op::Rmdir,
            Call::Symlink { .. } => Op::Symlink,
            Call::Rename { .. } => Op::Rename,
            Call::Link { .. } => Op::Link,
            Call::Open { .. } => Op::Open,
            Call::Create { .. } => Op::Create,
            Call::Read { .. } => Op::Read,
            Call::Write { .. } => Op::Write,
            Call::CopyFileRange { .. } => Op::CopyFileRange,
            Call::Fallocate { .. } => Op::Fallocate,
            Call::Flush { .. } => Op::Flush,
            Call::Release { .. } => Op::Release,
            Call::Fsync { .. } => Op::Fsync,
            Call::Opendir { .. } => Op::Opendir,
            Call::Readdir { .. } | Call::Readdirplus { .. } => Op::Readdir,
            Call::Releasedir { .. } => Op::Releasedir,
            Call::Fsyncdir { .. } => Op::Fsyncdir,
            Call::Statfs { .. } => Op::Statfs,
            Call::Setxattr { .. } => Op::Setxattr,
            Call::Getxattr { .. } => Op::Getxattr,
            Call::Listxattr { .. } => Op::Listxattr,
            Call::Removexattr { .. } => Op::Removexattr,
            Call::Access { .. } => Op::Access,
            Call::Lseek { .. } => Op::Lseek,
            Call::Ioctl { .. } => Op::Ioctl,
        }
    }

    /// The node it is about: the directory, for operations on a name; the file that changes, for a copy.
    pub fn ino(&self) -> u64 {
        match self {
            Call::Lookup { parent, .. }
            | Call::Mknod { parent, .. }
            | Call::Mkdir { parent, .. }
            | Call::Unlink { parent, .. }
            | Call::Rmdir { parent, .. }
            | Call::Symlink { parent, .. }
            | Call::Rename { parent, .. }
            | Call::Create { parent, .. } => *parent,
            Call::CopyFileRange { to_ino, .. } => *to_ino,
            Call::Getattr { ino, .. }
            | Call::Setattr { ino, .. }
            | Call::Readlink { ino }
            | Call::Link { ino, .. }
            | Call::Open { ino, .. }
            | Call::Read { ino, .. }
            | Call::Write { ino, .. }
            | Call::Fallocate { ino, .. }
            | Call::Flush { ino, .. }
            | Call::Release { ino, .. }
            | Call::Fsync { ino, .. }
            | Call::Opendir { ino, .. }
            | Call::Readdir { ino, .. }
            | Call::Readdirplus { ino, .. }
            | Call::Releasedir { ino, .. }
            | Call::Fsyncdir { ino, .. }
            | Call::Statfs { ino }
            | Call::Setxattr { ino, .. }
            | Call::Getxattr { ino, .. }
            | Call::Listxattr { ino, .. }
            | Call::Removexattr { ino, .. }
            | Call::Access { ino }
            | Call::Lseek { ino, .. }
            | Call::Ioctl { ino, .. } => *ino,
        }
    }

    /// The handle, where the request comes through one.
    pub fn fh(&self) -> Option<u64> {
        match self {
            Call::Getattr { fh, .. } | Call::Setattr { fh, .. } => *fh,
            Call::CopyFileRange { to_fh, .. } => Some(*to_fh),
            Call::Read { fh, .. }
            | Call::Write { fh, .. }
            | Call::Fallocate { fh, .. }
            | Call::Flush { fh, .. }
            | Call::Release { fh, .. }
            | Call::Fsync { fh, .. }
            | Call::Readdir { fh, .. }
            | Call::Readdirplus { fh, .. }
            | Call::Releasedir { fh, .. }
            | Call::Fsyncdir { fh, .. }
            | Call::Lseek { fh, .. }
            | Call::Ioctl { fh, .. } => Some(*fh),
            _ => None,
        }
    }

    /// The bytes it touches: offset and length.
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Call::Read { offset, size, .. } => Some((*offset, u64::from(*size))),
            Call::Write { offset, data, .. } => Some((*offset, data.len() as u64)),
            Call::CopyFileRange { to_offset, length, .. } => Some((*to_offset, *length)),
            Call::Fallocate { offset, length, .. } => Some((*offset, *length)),
            _ => None,
        }
    }

    /// The names it works on: directory and name.
    pub fn names(&self) -> impl Iterator<Item = (u64, &OsStr)> + Clone {
        let (first, second) = match self {
            Call::Lookup { parent, name }
            | Call::Mknod { parent, name, .. }
            | Call::Mkdir { parent, name, .. }
            | Call::Unlink { parent, name }
            | Call::Rmdir { parent, name }
            | Call::Symlink { parent, name, .. }
            | Call::Link { parent, name, .. }
            | Call::Create { parent, name, .. } => (Some((*parent, &**name)), None),
            Call::Rename { parent, name, to_parent, to_name, .. } => {
                (Some((*parent, &**name)), Some((*to_parent, &**to_name)))
            }
            _ => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// Does the kernel keep something of the answer: pages, attributes, names?
    pub fn tells(&self) -> bool {
        !matches!(
            self,
            Call::Write { .. }
                | Call::Fallocate { .. }
                | Call::Flush { .. }
                | Call::Release { .. }
                | Call::Fsync { .. }
                | Call::Releasedir { .. }
                | Call::Fsyncdir { .. }
                | Call::Statfs { .. }
                | Call::Lseek { .. }
        )
    }

    /// A copy that owns its names and data. The one allocation of a request that leaves its reader.
    pub fn into_owned(self) -> Call<'static> {
        fn own(name: Cow<'_, OsStr>) -> Cow<'static, OsStr> {
            Cow::Owned(OsString::from(name))
        }
        fn bytes(data: Cow<'_, [u8]>) -> Cow<'static, [u8]> {
            Cow::Owned(data.into_owned())
        }
        match self {
            Call::Lookup { parent, name } => Call::Lookup { parent, name: own(name) },
            Call::Getattr { ino, fh } => Call::Getattr { ino, fh },
            Call::Setattr { ino, fh, changes } => Call::Setattr { ino, fh, changes },
            Call::Readlink { ino } => Call::Readlink { ino },
            Call::Mknod { parent, name, mode, umask, rdev } => {
                Call::Mknod { parent, name: own(name), mode, umask, rdev }
            }
            Call::Mkdir { parent, name, mode, umask } => Call::Mkdir { parent, name: own(name), mode, umask },
            Call::Unlink { parent, name } => Call::Unlink { parent, name: own(name) },
            Call::Rmdir { parent, name } => Call::Rmdir { parent, name: own(name) },
            Call::Symlink { parent, name, target } => Call::Symlink { parent, name: own(name), target: own(target) },
            Call::Rename { parent, name, to_parent, to_name, flags } => {
                Call::Rename { parent, name: own(name), to_parent, to_name: own(to_name), flags }
            }
            Call::Link { ino, parent, name } => Call::Link { ino, parent, name: own(name) },
            Call::Open { ino, flags } => Call::Open { ino, flags },
            Call::Create { parent, name, mode, umask, flags } => {
                Call::Create { parent, name: own(name), mode, umask, flags }
            }
            Call::Read { ino, fh, offset, size, flags } => Call::Read { ino, fh, offset, size, flags },
            Call::Write { ino, fh, offset, data, flags, origin } => {
                Call::Write { ino, fh, offset, data: bytes(data), flags, origin }
            }
            Call::CopyFileRange { ino, fh, offset, to_ino, to_fh, to_offset, length } => {
                Call::CopyFileRange { ino, fh, offset, to_ino, to_fh, to_offset, length }
            }
            Call::Fallocate { ino, fh, offset, length, mode } => Call::Fallocate { ino, fh, offset, length, mode },
            Call::Flush { ino, fh } => Call::Flush { ino, fh },
            Call::Release { ino, fh } => Call::Release { ino, fh },
            Call::Fsync { ino, fh, datasync } => Call::Fsync { ino, fh, datasync },
            Call::Opendir { ino, flags } => Call::Opendir { ino, flags },
            Call::Readdir { ino, fh, offset } => Call::Readdir { ino, fh, offset },
            Call::Readdirplus { ino, fh, offset } => Call::Readdirplus { ino, fh, offset },
            Call::Releasedir { ino, fh } => Call::Releasedir { ino, fh },
            Call::Fsyncdir { ino, fh, datasync } => Call::Fsyncdir { ino, fh, datasync },
            Call::Statfs { ino } => Call::Statfs { ino },
            Call::Setxattr { ino, name, value, flags } => {
                Call::Setxattr { ino, name: own(name), value: bytes(value), flags }
            }
            Call::Getxattr { ino, name, size } => Call::Getxattr { ino, name: own(name), size },
            Call::Listxattr { ino, size } => Call::Listxattr { ino, size },
            Call::Removexattr { ino, name } => Call::Removexattr { ino, name: own(name) },
            Call::Access { ino } => Call::Access { ino },
            Call::Lseek { ino, fh, offset, whence } => Call::Lseek { ino, fh, offset, whence },
            Call::Ioctl { ino, fh, command, input, output_size } => {
                Call::Ioctl { ino, fh, command, input: bytes(input), output_size }
            }
        }
    }
}

/// How long the kernel may keep what an answer says.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    pub name: Duration,
    pub attributes: Duration,
}

/// A name's node and its attributes.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub attr: FileAttr,
    pub keep: Keep,
}

/// One answer, good for any way of sending it.
#[derive(Debug)]
pub enum Answer {
    Empty,
    Entry(Entry),
    Attr(FileAttr, Duration),
    Data(Buffer),
    /// Of a read: the kernel is to ask for each page by itself.
    AskAgain,
    Opened(u64, Served),
    Created(Entry, u64, Served),
    Written(u32),
    Statfs(Statfs),
    Size(u32),
    Offset(i64),
    /// The entries are in the reply already.
    Directory,
    Ioctl(Vec<u8>),
}

/// Who does the reads and writes of an open file.
#[derive(Clone, Debug)]
pub enum Served {
    ByUs(FopenFlags),
    /// Passed through to the backing file, see [`super::passthrough`].
    ByKernel(Arc<BackingId>),
}

impl Served {
    /// Does the kernel keep its pages?
    pub fn is_cached(&self) -> bool {
        matches!(self, Served::ByUs(mode) if !mode.contains(FopenFlags::FOPEN_DIRECT_IO))
    }

    pub fn by_kernel(&self) -> bool {
        matches!(self, Served::ByKernel(_))
    }
}

/// Space of the filesystem, in its blocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statfs {
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_size: u32,
    pub name_max: u32,
    pub fragment_size: u32,
}

impl Statfs {
    /// No more than this.
    pub fn limit(&mut self, blocks: u64, free: u64) {
        self.blocks = self.blocks.min(blocks);
        self.free = self.free.min(free);
        self.available = self.available.min(free);
    }
}

/// Takes directory entries until it is full (`true`).
pub trait DirectorySink {
    fn add(&mut self, ino: u64, next: u64, kind: fuser::FileType, name: &OsStr) -> bool;
    fn add_plus(&mut self, entry: &Entry, next: u64, name: &OsStr) -> bool;
}

/// The way back to the caller: exactly one answer or error, from any thread. Dropped unanswered, it answers `EIO`.
#[derive(Debug)]
pub enum Reply {
    Empty(ReplyEmpty),
    Entry(ReplyEntry),
    Attr(ReplyAttr),
    Data(ReplyData),
    Open(ReplyOpen),
    Create(ReplyCreate),
    Write(ReplyWrite),
    Statfs(ReplyStatfs),
    Xattr(ReplyXattr),
    Lseek(ReplyLseek),
    Directory(ReplyDirectory),
    DirectoryPlus(ReplyDirectoryPlus),
    Ioctl(ReplyIoctl),
    /// Nobody waits: tests of `fs/` without a kernel.
    None,
}

impl Reply {
    /// Answers with an error number from 1 to 511, which [`crate::fault::errno`] has made sure of for rules.
    pub fn error(self, errno: i32) {
        let errno = Errno::from_i32(errno);
        match self {
            Reply::Empty(reply) => reply.error(errno),
            Reply::Entry(reply) => reply.error(errno),
            Reply::Attr(reply) => reply.error(errno),
            Reply::Data(reply) => reply.error(errno),
            Reply::Open(reply) => reply.error(errno),
            Reply::Create(reply) => reply.error(errno),
            Reply::Write(reply) => reply.error(errno),
            Reply::Statfs(reply) => reply.error(errno),
            Reply::Xattr(reply) => reply.error(errno),
            Reply::Lseek(reply) => reply.error(errno),
            Reply::Directory(reply) => reply.error(errno),
            Reply::DirectoryPlus(reply) => reply.error(errno),
            Reply::Ioctl(reply) => reply.error(errno),
            Reply::None => {}
        }
    }

    /// Makes a file known to the kernel as one that it can serve by itself.
    ///
    /// # Errors
    /// What the kernel says; `EINVAL` for a request that opens nothing.
    pub fn open_backing(&self, file: &File) -> io::Result<BackingId> {
        match self {
            Reply::Open(reply) => reply.open_backing(file),
            Reply::Create(reply) => reply.open_backing(file),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    /// Answers. An answer that does not fit the request is a bug of ours and reaches the caller as `EIO`.
    pub fn answer(self, answer: Answer) {
        match (self, answer) {
            (Reply::Empty(reply), Answer::Empty) => reply.ok(),
            (Reply::Entry(reply), Answer::Entry(entry)) => {
                reply.entry_with_ttls(&entry.keep.attributes, &entry.keep.name, &entry.attr, Generation(0));
            }
            (Reply::Attr(reply), Answer::Attr(attr, keep)) => reply.attr(&keep, &attr),
            (Reply::Data(reply), Answer::Data(data)) => reply.data(&data),
            (Reply::Data(reply), Answer::AskAgain) => reply.error(Errno::from_i32(libc::EIO)),
            (Reply::Open(reply), Answer::Opened(fh, served)) => match served {
                Served::ByUs(flags) => reply.opened(FileHandle(fh), flags),
                Served::ByKernel(id) => reply.opened_passthrough(FileHandle(fh), FopenFlags::empty(), &id),
            },
            (Reply::Create(reply), Answer::Created(entry, fh, served)) => {
                let (keep, fh) = (entry.keep.name.min(entry.keep.attributes), FileHandle(fh));
                let (attr, generation, none) = (&entry.attr, Generation(0), FopenFlags::empty());
                match served {
                    Served::ByUs(flags) => reply.created(&keep, attr, generation, fh, flags),
                    Served::ByKernel(id) => reply.created_passthrough(&keep, attr, generation, fh, none, &id),
                }
            }
            (Reply::Write(reply), Answer::Written(count)) => reply.written(count),
            (Reply::Statfs(reply), Answer::Statfs(s)) => reply.statfs(
                s.blocks,
                s.free,
                s.available,
                s.files,
                s.files_free,
                s.block_size,
                s.name_max,
                s.fragment_size,
            ),
            (Reply::Xattr(reply), Answer::Size(size)) => reply.size(size),
            (Reply::Xattr(reply), Answer::Data(data)) => reply.data(&data),
            (Reply::Lseek(reply), Answer::Offset(offset)) => reply.offset(offset),
            (Reply::Directory(reply), Answer::Directory) => reply.ok(),
            (Reply::DirectoryPlus(reply), Answer::Directory) => reply.ok(),
            (Reply::Ioctl(reply), Answer::Ioctl(data)) => reply.ioctl(0, &data),
            (Reply::None, _) => {}
            (reply, answer) => {
                tracing::error!(?answer, "the answer does not fit the request");
                reply.error(libc::EIO);
            }
        }
    }
}

impl DirectorySink for Reply {
    fn add(&mut self, ino: u64, next: u64, kind: fuser::FileType, name: &OsStr) -> bool {
        match self {
            Reply::Directory(reply) => reply.add(INodeNo(ino), next, kind, name),
            _ => true,
        }
    }

    fn add_plus(&mut self, entry: &Entry, next: u64, name: &OsStr) -> bool {
        match self {
            Reply::DirectoryPlus(reply) => {
                reply.add(entry.attr.ino, next, name, &entry.keep.attributes, &entry.attr, Generation(0))
            }
            _ => true,
        }
    }
}
