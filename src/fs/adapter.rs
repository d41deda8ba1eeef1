//! fuser's requests in our words.
//!
//! Runs on the readers. Each handler names the request and its way back, and hands both to [`Core::serve`]; a handler
//! that panics answers `EIO` (the reply does, when it is dropped) and its reader goes on. Never answers `ENOSYS`, which
//! the kernel remembers for the life of the mount; but for `poll`, where it shall.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, fstatfs};

use super::call::{Call, Caller, Changes, Origin, Reply, Time};
use super::serve::Core;

/// What fuser calls.
pub struct Adapter(pub Arc<Core>);

/// Capabilities that are wanted wherever the kernel has them. Never the write-back cache: writes would come late,
/// merged and out of order.
const WANTED: &[InitFlags] = &[
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
];

/// Requests in the background that the kernel allows: the largest there is, so that parked reads do not use them up.
const MAX_BACKGROUND: u16 = u16::MAX;
/// The kernel sends no more than this in one write.
const MAX_WRITE: u32 = 1 << 20;

impl Adapter {
    fn serve(&self, request: &Request, call: Call<'_>, reply: Reply) {
        let caller = Caller { unique: request.unique().0, uid: request.uid(), gid: request.gid(), tid: request.pid() };
        // The hook has logged it with its place. The dropped reply has answered EIO.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            panic_if_asked(&call);
            self.0.readers.busy(call.tells(), || self.0.serve(caller, call, reply));
        }));
    }
}

/// For the test that a panic costs one request and not the mount: in debug builds, looking up a name of this form fails
/// in the worst way there is.
fn panic_if_asked(call: &Call<'_>) {
    if cfg!(debug_assertions)
        && let Call::Lookup { name, .. } = call
    {
        assert!(&**name != ".nemesisfs-panic", "asked for");
    }
}

/// How many filesystems may lie between a file that is passed through and its disk: those that may themselves be stacked
/// count as one.
fn stack_depth(core: &Core) -> u32 {
    let stacked = [OVERLAYFS_SUPER_MAGIC, FUSE_SUPER_MAGIC];
    match fstatfs(core.tree.backing()) {
        Ok(fs) if stacked.contains(&fs.filesystem_type()) => 2,
        _ => 1,
    }
}

/// fuser 0.18 takes the nanoseconds of a time before the epoch as counting backwards; here that is undone.
fn time(time: TimeOrNow) -> Time {
    let TimeOrNow::SpecificTime(at) = time else { return Time::Now };
    match at.duration_since(UNIX_EPOCH) {
        Ok(after) => Time::At(i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            Time::At(0i64.checked_sub_unsigned(before.as_secs()).unwrap_or(i64::MIN), before.subsec_nanos())
        }
    }
}

fn name(name: &OsStr) -> Cow<'_, OsStr> {
    Cow::Borrowed(name)
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in WANTED {
            if let Err(missing) = config.add_capabilities(*wanted) {
                tracing::info!(?missing, "the kernel lacks a capability");
            }
        }
        if self.0.passthrough.is_some() {
            config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).map_err(|_| io::ErrorKind::Unsupported)?;
            let _ = config.set_max_stack_depth(stack_depth(&self.0));
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, child: &OsStr, reply: ReplyEntry) {
        self.serve(request, Call::Lookup { parent: parent.0, name: name(child) }, Reply::Entry(reply));
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        let _ = catch_unwind(AssertUnwindSafe(|| self.0.readers.busy(false, || self.0.forget(ino.0, nlookup))));
    }

    fn getattr(&self, request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve(request, Call::Getattr { ino: ino.0, fh: fh.map(|fh| fh.0) }, Reply::Attr(reply));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes { mode, uid, gid, size, atime: atime.map(time), mtime: mtime.map(time) };
        let call = Call::Setattr { ino: ino.0, fh: fh.map(|fh| fh.0), changes };
        self.serve(request, call, Reply::Attr(reply));
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve(request, Call::Readlink { ino: ino.0 }, Reply::Data(reply));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        child: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let call = Call::Mknod { parent: parent.0, name: name(child), mode, umask, rdev };
        self.serve(request, call, Reply::Entry(reply));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, child: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.serve(request, Call::Mkdir { parent: parent.0, name: name(child), mode, umask }, Reply::Entry(reply));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, child: &OsStr, reply: ReplyEmpty) {
        self.serve(request, Call::Unlink { parent: parent.0, name: name(child) }, Reply::Empty(reply));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, child: &OsStr, reply: ReplyEmpty) {
        self.serve(request, Call::Rmdir { parent: parent.0, name: name(child) }, Reply::Empty(reply));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, child: &OsStr, target: &Path, reply: ReplyEntry) {
        let call = Call::Symlink { parent: parent.0, name: name(child), target: name(target.as_os_str()) };
        self.serve(request, call, Reply::Entry(reply));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        child: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let call = Call::Rename {
            parent: parent.0,
            name: name(child),
            to_parent: newparent.0,
            to_name: name(newname),
            flags: flags.bits(),
        };
        self.serve(request, call, Reply::Empty(reply));
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let call = Call::Link { ino: ino.0, parent: newparent.0, name: name(newname) };
        self.serve(request, call, Reply::Entry(reply));
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve(request, Call::Open { ino: ino.0, flags: flags.0 }, Reply::Open(reply));
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let call = Call::Read { ino: ino.0, fh: fh.0, offset, size, flags: flags.0 };
        self.serve(request, call, Reply::Data(reply));
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let origin = Origin {
            writeback: write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
            kill_suidgid: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        let data = Cow::Borrowed(data);
        let call = Call::Write { ino: ino.0, fh: fh.0, offset, data, flags: flags.0, origin };
        self.serve(request, call, Reply::Write(reply));
    }

    fn flush(&self, request: &Request, ino: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.serve(request, Call::Flush { ino: ino.0, fh: fh.0 }, Reply::Empty(reply));
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(request, Call::Release { ino: ino.0, fh: fh.0 }, Reply::Empty(reply));
    }

    fn fsync(&self, request: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.serve(request, Call::Fsync { ino: ino.0, fh: fh.0, datasync }, Reply::Empty(reply));
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve(request, Call::Opendir { ino: ino.0, flags: flags.0 }, Reply::Open(reply));
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.serve(request, Call::Readdir { ino: ino.0, fh: fh.0, offset }, Reply::Directory(reply));
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        self.serve(request, Call::Readdirplus { ino: ino.0, fh: fh.0, offset }, Reply::DirectoryPlus(reply));
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.serve(request, Call::Releasedir { ino: ino.0, fh: fh.0 }, Reply::Empty(reply));
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.serve(request, Call::Fsyncdir { ino: ino.0, fh: fh.0, datasync }, Reply::Empty(reply));
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.serve(request, Call::Statfs { ino: ino.0 }, Reply::Statfs(reply));
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        key: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let call = Call::Setxattr { ino: ino.0, name: name(key), value: Cow::Borrowed(value), flags };
        self.serve(request, call, Reply::Empty(reply));
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, key: &OsStr, size: u32, reply: ReplyXattr) {
        self.serve(request, Call::Getxattr { ino: ino.0, name: name(key), size }, Reply::Xattr(reply));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.serve(request, Call::Listxattr { ino: ino.0, size }, Reply::Xattr(reply));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, key: &OsStr, reply: ReplyEmpty) {
        self.serve(request, Call::Removexattr { ino: ino.0, name: name(key) }, Reply::Empty(reply));
    }

    fn access(&self, request: &Request, ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        self.serve(request, Call::Access { ino: ino.0 }, Reply::Empty(reply));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        child: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let call = Call::Create { parent: parent.0, name: name(child), mode, umask, flags };
        self.serve(request, call, Reply::Create(reply));
    }

    /// Locks are the kernel's own: without `FUSE_POSIX_LOCKS` these never arrive.
    fn getlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        reply: ReplyLock,
    ) {
        reply.error(fuser::Errno::EOPNOTSUPP);
    }

    fn setlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::EOPNOTSUPP);
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(fuser::Errno::EINVAL);
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        input: &[u8],
        output_size: u32,
        reply: ReplyIoctl,
    ) {
        let call = Call::Ioctl { ino: ino.0, fh: fh.0, command, input: Cow::Borrowed(input), output_size };
        self.serve(request, call, Reply::Ioctl(reply));
    }

    /// Regular files are always ready. `ENOSYS` is right for once: the kernel then answers so by itself.
    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let call = Call::Fallocate { ino: ino.0, fh: fh.0, offset, length, mode };
        self.serve(request, call, Reply::Empty(reply));
    }

    fn lseek(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.serve(request, Call::Lseek { ino: ino.0, fh: fh.0, offset, whence }, Reply::Lseek(reply));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let call = Call::CopyFileRange {
            ino: ino_in.0,
            fh: fh_in.0,
            offset: offset_in,
            to_ino: ino_out.0,
            to_fh: fh_out.0,
            to_offset: offset_out,
            length: len,
        };
        self.serve(request, call, Reply::Write(reply));
    }
}
