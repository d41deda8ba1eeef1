//! The operations: each draws what it does and to what, and makes its calls on both sides.
//!
//! Runs on the thread of its test. What a program can tell the mount by, because FUSE has no way to pass it on, is drawn
//! nowhere here. All of it:
//!
//! - fallocate with `COLLAPSE_RANGE` or `INSERT_RANGE`, renameat2 with `WHITEOUT`, `O_TMPFILE`, `FICLONE`, `FIEMAP`,
//!   `RWF_NOWAIT`: the kernel or fuser 0.18 refuses them;
//! - the time of birth and the attributes of statx, the type of statfs: those of FUSE;
//! - the alignment of memory in direct I/O: the daemon has the bytes elsewhere;
//! - what a refused operation leaves: a direct write that is not aligned clears suid on ext4, bytes from a bad address
//!   make the file longer, and the kernel on FUSE takes a capability off before it asks;
//! - fallocate beyond the limit on sizes: who refuses first decides whether suid is left;
//! - access times after a read, times of a fifo: no request tells of them; `AT_STATX_DONT_SYNC`, which may be stale;
//! - what was stored past the end of a file on tmpfs, which shows it when the file grows;
//! - a hole that was loaded from or stored to through a mapping, before msync; preallocated blocks that were read ahead:
//!   to tmpfs and ext4 they are data;
//! - `SEEK_DATA` and `SEEK_HOLE` on a directory, chown to nobody and no group, flags of what is no file or directory,
//!   a capability on a file that becomes append-only: the kernel on FUSE decides by itself.

mod attributes;
mod data;
mod memory;
mod names;
mod privileges;

use super::Backing;
use super::random::Random;
use super::sides::{BARE, Identity, MOUNT, Same, Sides};
use super::tree::{self, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, LOCKED, Listed, Status, number, text};
use super::wire::Arg;

/// Who does things.
pub const IDENTITIES: &[Identity] = &[
    Identity { name: "root", uid: 0, gid: 0, groups: &[], umask: 0o022, keeps: &[], loses: &[], largest_file: None },
    Identity {
        name: "root without CAP_FSETID",
        uid: 0,
        gid: 0,
        groups: &[100],
        umask: 0,
        keeps: &[],
        loses: &[CAP_FSETID],
        largest_file: None,
    },
    Identity {
        name: "nobody",
        uid: 65534,
        gid: 65534,
        groups: &[12],
        umask: 0o022,
        keeps: &[],
        loses: &[],
        largest_file: None,
    },
    Identity {
        name: "member",
        uid: 1001,
        gid: 1001,
        groups: &[12, 100],
        umask: 0o002,
        keeps: &[],
        loses: &[],
        largest_file: None,
    },
    Identity {
        name: "limited",
        uid: 1002,
        gid: 1001,
        groups: &[],
        umask: 0o077,
        keeps: &[],
        loses: &[],
        largest_file: Some(24 * PAGE as u64),
    },
    Identity {
        name: "capable",
        uid: 1003,
        gid: 100,
        groups: &[12],
        umask: 0o027,
        keeps: &[CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID],
        loses: &[],
        largest_file: None,
    },
];

const CAP_CHOWN: u32 = 0;
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_FOWNER: u32 = 3;
const CAP_FSETID: u32 = 4;

const ROOT: usize = 0;
/// Files that an identity keeps open.
const OPEN: usize = 6;
/// Paths that are remembered.
const MADE: usize = 20;
/// Mappings that live at a time.
const MAPPED: usize = 4;
const PAGE: i64 = 4096;

const IDS: &[i64] = &[-1, -1, 0, 12, 100, 1001, 1002, 1003, 65534];
const MODES: &[u32] = &[
    0o777, 0o755, 0o700, 0o644, 0o600, 0o666, 0o070, 0o007, 0o000, 0o4755, 0o2755, 0o6777, 0o2644, 0o4644, 0o1777,
    0o2777, 0o3777, 0o2660, 0o6711, 0o2770, 0o2010,
];
const DIRECTORIES: &[&[u8]] = &[b"p", b"q", b"r"];
const FILES: &[&[u8]] = &[b"a", b"b", b"c", b"d", b"e", b"p", b"q", b"r"];

/// A file that an identity has open.
#[derive(Clone, Copy, Debug)]
struct Open {
    fd: i64,
    flags: i32,
    kind: u32,
    /// Which file of the bare directory it is.
    ino: u64,
    /// Was it ever opened or set to pass the page cache?
    direct: bool,
}

/// A shared mapping, by its address on each side.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    who: usize,
    /// The file, open for as long as it is mapped.
    fd: i64,
    offset: i64,
    at: [u64; 2],
    length: i64,
    writable: bool,
}

pub struct Model {
    pub sides: Sides,
    random: Random,
    open: Vec<Vec<Open>>,
    mapped: Vec<Mapping>,
    /// Paths under which something was made.
    made: Vec<Vec<u8>>,
    backing: Backing,
}

type Operation = (usize, &'static str, fn(&mut Model));

/// Each with how often it is drawn.
const OPERATIONS: &[Operation] = &[
    (60, "open", Model::open),
    (12, "close", Model::close),
    (30, "write", Model::write),
    (16, "vectored write", Model::vectored_write),
    (30, "read", Model::read),
    (12, "vectored read", Model::vectored_read),
    (20, "truncate", Model::truncate),
    (16, "fallocate", Model::fallocate),
    (14, "seek", Model::seek),
    (14, "copy", Model::copy),
    (6, "sendfile", Model::sendfile),
    (14, "map", Model::map),
    (14, "use mapping", Model::use_mapping),
    (4, "sync", Model::sync),
    (12, "lock", Model::lock),
    (30, "rename", Model::rename),
    (20, "link", Model::link),
    (14, "symlink", Model::symlink),
    (8, "readlink", Model::readlink),
    (20, "unlink", Model::unlink),
    (8, "rmdir", Model::rmdir),
    (20, "mkdir", Model::mkdir),
    (10, "mknod", Model::mknod),
    (40, "chmod", Model::chmod),
    (24, "chown", Model::chown),
    (20, "times", Model::times),
    (24, "setxattr", Model::setxattr),
    (10, "capability", Model::capability),
    (16, "acl", Model::acl),
    (14, "getxattr", Model::getxattr),
    (8, "listxattr", Model::listxattr),
    (8, "removexattr", Model::removexattr),
    (16, "access", Model::access),
    (4, "statfs", Model::statfs),
    (16, "list", Model::list),
    (30, "stat", Model::stat),
    (14, "chdir", Model::chdir),
    (2, "deep", Model::deep),
    (4, "getcwd", Model::getcwd),
    (6, "umask", Model::umask),
    (8, "file flags", Model::file_flags),
    (6, "open flags", Model::open_flags),
    (4, "advise", Model::advise),
    (40, "suid", Model::lose_suid),
    (6, "refused direct I/O", Model::refused),
];

impl Model {
    pub fn new(sides: Sides, seed: u64, backing: Backing) -> Model {
        let open = IDENTITIES.iter().map(|_| Vec::new()).collect();
        Model { sides, random: Random::new(seed), open, mapped: Vec::new(), made: Vec::new(), backing }
    }

    /// Directories that make a difference to what is made in them.
    pub fn prepare(&mut self) {
        for (name, mode, uid, gid) in [(b"p", 0o1777, 0, 0), (b"q", 0o2777, 1001, 12), (b"r", 0o777, 65534, 100)] {
            self.call(ROOT, "mkdirat", libc::SYS_mkdirat, &[cwd(), text(name), number(0o777)], Same::All);
            let owner = [cwd(), text(name), number(uid), number(gid), number(0)];
            self.call(ROOT, "fchownat", libc::SYS_fchownat, &owner, Same::All);
            self.call(ROOT, "fchmodat", libc::SYS_fchmodat, &[cwd(), text(name), number(mode)], Same::All);
        }
    }

    /// One operation, drawn.
    pub fn step(&mut self) {
        let all: usize = OPERATIONS.iter().map(|(weight, ..)| weight).sum();
        let mut drawn = self.random.below(all);
        for (weight, name, operation) in OPERATIONS {
            if drawn < *weight {
                self.sides.remark(name);
                return operation(self);
            }
            drawn -= weight;
        }
    }

    /// Everything is to be the same at the end of so many operations.
    pub fn compare(&mut self) {
        // What is written to a mapping is in the backing directory when it was synced.
        for mapping in self.mapped.clone() {
            self.msync(&mapping);
        }
        self.sides.compare_trees();
    }

    fn call(&mut self, who: usize, name: &str, call: i64, args: &[Arg], same: Same) -> i64 {
        self.sides.call(who, name, call, args, same).result
    }

    fn who(&mut self) -> usize {
        self.random.below(IDENTITIES.len())
    }

    fn mode(&mut self) -> i64 {
        let mode = if self.random.once_in(4) { self.random.next() as u32 & 0o7777 } else { self.random.of(MODES) };
        mode.into()
    }

    fn id(&mut self) -> i64 {
        self.random.of(IDS)
    }

    /// User and group, one of them given: with neither the kernel on FUSE asks nobody.
    fn owner(&mut self) -> (i64, i64) {
        match (self.id(), self.id()) {
            (-1, -1) => (0, -1),
            owner => owner,
        }
    }

    /// A name of a file, now and then a strange one.
    fn name(&mut self) -> Vec<u8> {
        match self.random.below(60) {
            0 => vec![b'n'; 255],
            1 => vec![b'n'; 256],
            2 => b"\xff\xfe\n\"".to_vec(),
            3 => b".".to_vec(),
            4 => b"..".to_vec(),
            5 => b"".to_vec(),
            6 => b"a/".to_vec(),
            7 => b"p/.".to_vec(),
            8 => b"q/..".to_vec(),
            9 => b"p/".to_vec(),
            10 => b"/q".to_vec(),
            11 => b"r/p/../a".to_vec(),
            12 => "\u{e4}\u{20ac}".as_bytes().to_vec(),
            _ => self.random.of(FILES).to_vec(),
        }
    }

    /// Remembers a path under which something was made.
    fn note_made(&mut self, path: &[u8], result: i64) {
        if result < 0 {
            return;
        }
        if self.made.len() == MADE {
            let at = self.random.below(MADE);
            self.made.swap_remove(at);
        }
        self.made.push(path.to_vec());
    }

    /// A path from the working directory: half of the time one that once led somewhere.
    fn path(&mut self) -> Vec<u8> {
        if !self.made.is_empty() && self.random.once_in(2) {
            let at = self.random.below(self.made.len());
            return self.made[at].clone();
        }
        let mut path = Vec::new();
        for _ in 0..self.random.of(&[0, 0, 0, 1, 1, 2]) {
            path.extend_from_slice(self.random.of(DIRECTORIES));
            path.push(b'/');
        }
        path.extend_from_slice(&self.name());
        path
    }

    /// Where a path begins: mostly the working directory.
    fn directory(&mut self, who: usize) -> Arg {
        match self.random.once_in(8) {
            true => number(self.fd(who).fd),
            false => cwd(),
        }
    }

    /// Something that is open, or a number that means nothing.
    fn fd(&mut self, who: usize) -> Open {
        let count = self.open[who].len();
        match count == 0 || self.random.once_in(200) {
            true => Open { fd: 99, flags: libc::O_RDWR, kind: 0, ino: 0, direct: false },
            false => self.open[who][self.random.below(count)],
        }
    }

    /// Something that is open in a way that fits, mostly.
    fn fd_for(&mut self, who: usize, writes: bool) -> Open {
        for _ in 0..4 {
            let open = self.fd(who);
            let access = open.flags & libc::O_ACCMODE;
            let fits = if writes { access != libc::O_RDONLY } else { access != libc::O_WRONLY };
            if fits && open.flags & (libc::O_PATH | libc::O_DIRECTORY) == 0 {
                return open;
            }
        }
        self.fd(who)
    }

    /// Who has something open, mostly.
    fn who_has(&mut self) -> usize {
        for _ in 0..4 {
            let who = self.who();
            if !self.open[who].is_empty() {
                return who;
            }
        }
        self.who()
    }

    fn size(&mut self) -> i64 {
        let small = self.random.below(20_000) as i64;
        let pages = self.random.below(40) as i64 * PAGE;
        match self.random.below(24) {
            0 => 0,
            1 => 1 << 30,
            2 => (1 << 40) + small,
            // ext4 refuses it, but on FUSE a capability is gone by then.
            3 if self.backing == Backing::Memory => i64::MAX,
            4 => -1,
            5..12 => pages,
            12..14 => pages + self.random.of(&[-1, 1, 511, 512]),
            _ => small,
        }
    }

    fn offset(&mut self) -> i64 {
        match self.random.below(40) {
            0 => -1,
            1 => (1 << 40) + 17,
            2 => 1 << 30,
            _ => self.near(),
        }
    }

    /// An offset where files are.
    fn near(&mut self) -> i64 {
        match self.random.below(3) {
            0 => self.random.below(24) as i64 * PAGE,
            1 => self.random.below(200) as i64 * 512,
            _ => self.random.below(80_000) as i64,
        }
    }

    fn length(&mut self) -> i64 {
        match self.random.below(30) {
            0 => 0,
            1 => 300_000,
            2 => 2_500_000,
            3..10 => (1 + self.random.below(8) as i64) * PAGE,
            10..15 => (1 + self.random.below(20) as i64) * 512,
            _ => 1 + self.random.below(9_000) as i64,
        }
    }

    /// Bytes to write.
    fn data(&mut self, length: i64) -> Vec<u8> {
        let start = self.random.next() as u8;
        (0..length).map(|i| start.wrapping_add(i as u8).wrapping_add((i >> 8) as u8)).collect()
    }

    /// How far from the start of a page memory is.
    fn skew(&mut self, open: Open) -> usize {
        match self.is_strict(open) {
            true => 0,
            false => self.random.of(&[0, 0, 1, 80, 512]),
        }
    }

    /// Can the filesystem refuse direct I/O on it, by its extents and after it has cleared suid? Then only aligned I/O
    /// is drawn, and [`Model::refused`] tries the rest where nothing but the error can differ.
    fn is_strict(&self, open: Open) -> bool {
        open.direct && self.backing != Backing::Memory
    }

    /// Offset and length as direct I/O wants them.
    fn align(&self, open: Open, offset: i64, length: i64) -> (i64, i64) {
        match self.is_strict(open) {
            true => (offset & !(PAGE - 1), length & !(PAGE - 1)),
            false => (offset, length),
        }
    }

    fn open(&mut self) {
        let who = self.who();
        if self.open[who].len() >= OPEN {
            self.close_one(who);
        }
        let (directory, path) = (self.directory(who), self.path());
        let access = self.random.of(&[libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR]);
        let mut flags = access | self.random.some(&[libc::O_CREAT], 2);
        flags |= self
            .random
            .some(&[libc::O_TRUNC, libc::O_APPEND, libc::O_EXCL, libc::O_NOFOLLOW, libc::O_DIRECT, libc::O_NOCTTY], 7);
        flags |= self.random.some(&[libc::O_SYNC, libc::O_DSYNC, libc::O_NOATIME, libc::O_LARGEFILE], 25);
        flags |= self.random.some(&[libc::O_DIRECTORY, libc::O_PATH], 12);
        if flags & libc::O_EXCL != 0 && flags & libc::O_CREAT == 0 {
            flags &= !libc::O_EXCL;
        }
        // To open a fifo would wait for its other end.
        let waits = flags & (libc::O_CREAT | libc::O_EXCL) != libc::O_CREAT | libc::O_EXCL
            && flags & (libc::O_DIRECTORY | libc::O_PATH) == 0;
        if waits {
            flags |= libc::O_NONBLOCK;
        }
        let mode = self.mode();
        let fd = match self.random.once_in(10) {
            false => {
                let args = [directory, text(&path), number(flags.into()), number(mode)];
                self.call(who, "openat", libc::SYS_openat, &args, Same::All)
            }
            true => self.openat2(who, directory, &path, flags, mode),
        };
        if fd >= 0 {
            self.note_made(&path, fd);
            self.keep(who, fd, flags);
        }
    }

    /// Keeps a file open for other operations.
    fn keep(&mut self, who: usize, fd: i64, flags: i32) {
        let status = self.statx(who, number(fd), b"", libc::AT_EMPTY_PATH);
        let (kind, ino) = status.map_or((0, 0), |status| (status.kind(), status.ino));
        self.open[who].push(Open { fd, flags, kind, ino, direct: flags & libc::O_DIRECT != 0 });
    }

    fn openat2(&mut self, who: usize, directory: Arg, path: &[u8], flags: i32, mode: i64) -> i64 {
        // NO_XDEV, NO_SYMLINKS, BENEATH, IN_ROOT
        let resolve = self.random.of(&[0u64, 0x01, 0x04, 0x08, 0x10]);
        let mode = if flags & libc::O_CREAT != 0 { mode as u64 } else { 0 };
        let how: Vec<u8> = [flags as u64, mode, resolve].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let args = [directory, text(path), Arg::In(how, 0), number(24)];
        self.call(who, "openat2", libc::SYS_openat2, &args, Same::All)
    }

    fn close(&mut self) {
        let who = self.who_has();
        self.close_one(who);
    }

    fn close_one(&mut self, who: usize) {
        if self.open[who].is_empty() {
            return;
        }
        let at = self.random.below(self.open[who].len());
        let open = self.open[who].remove(at);
        self.call(who, "close", libc::SYS_close, &[number(open.fd)], Same::All);
    }

    /// Status of an open file.
    fn fstat(&mut self, who: usize, fd: i64) {
        self.statx(who, number(fd), b"", libc::AT_EMPTY_PATH);
    }

    fn lstat(&mut self, who: usize, directory: Arg, path: &[u8]) {
        self.statx(who, directory, path, libc::AT_SYMLINK_NOFOLLOW);
    }

    fn statx(&mut self, who: usize, directory: Arg, path: &[u8], flags: i32) -> Option<Status> {
        let args = [
            directory,
            text(path),
            number(flags.into()),
            number(libc::STATX_BASIC_STATS.into()),
            Arg::Out(Status::SIZE, 0),
        ];
        let answer = self.sides.call(who, "statx", libc::SYS_statx, &args, Same::Status);
        (answer.result == 0).then(|| Status::read(&answer.written[0]))
    }

    fn probe(&mut self, who: usize, fd: i64) {
        if self.random.once_in(2) {
            self.fstat(who, fd);
        }
    }
}

fn cwd() -> Arg {
    number(libc::AT_FDCWD.into())
}

const RWF_NOAPPEND: i32 = 0x20;
const UNSHARE: i32 = 0x40;
/// Both flags at once are refused.
const RENAME_BOTH: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE;
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

const SET: [(&str, i64); 3] =
    [("setxattr", libc::SYS_setxattr), ("lsetxattr", libc::SYS_lsetxattr), ("fsetxattr", libc::SYS_fsetxattr)];
const GET: [(&str, i64); 3] =
    [("getxattr", libc::SYS_getxattr), ("lgetxattr", libc::SYS_lgetxattr), ("fgetxattr", libc::SYS_fgetxattr)];
const LIST: [(&str, i64); 3] =
    [("listxattr", libc::SYS_listxattr), ("llistxattr", libc::SYS_llistxattr), ("flistxattr", libc::SYS_flistxattr)];
const REMOVE: [(&str, i64); 3] = [
    ("removexattr", libc::SYS_removexattr),
    ("lremovexattr", libc::SYS_lremovexattr),
    ("fremovexattr", libc::SYS_fremovexattr),
];
