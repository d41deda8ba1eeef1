//! A whole tree as text, one line a file: all that a program can find out about it, but what is the disk's affair.
//!
//! Runs in a worker, with privilege, and goes by directory descriptors: paths may be longer than a path may be. Reads
//! without changing access times.

use std::collections::HashMap;
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::wire::{Answer, Arg};
use super::worker::call;

pub const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
pub const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
/// `FS_IMMUTABLE_FL | FS_APPEND_FL`
pub const LOCKED: u64 = 0x30;

/// Text with a NUL, as system calls want it.
pub fn text(bytes: &[u8]) -> Arg {
    Arg::In([bytes, b"\0"].concat(), 0)
}

pub fn number(number: i64) -> Arg {
    Arg::Number(number as u64)
}

/// The fields of `struct statx` that a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub ino: u64,
    pub mode: u16,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub blocks: u64,
    pub block_size: u32,
    pub device: (u32, u32),
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
}

impl Status {
    pub const SIZE: usize = 256;

    pub fn read(bytes: &[u8]) -> Status {
        let u16_at = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Status {
            block_size: u32_at(4),
            nlink: u32_at(16),
            uid: u32_at(20),
            gid: u32_at(24),
            mode: u16_at(28),
            ino: u64_at(32),
            size: u64_at(40),
            blocks: u64_at(48),
            atime: (u64_at(64) as i64, u32_at(72)),
            mtime: (u64_at(112) as i64, u32_at(120)),
            device: (u32_at(128), u32_at(132)),
        }
    }

    /// No request tells of what is written to a fifo.
    pub fn mtime(&self) -> String {
        if self.kind() == libc::S_IFIFO { String::new() } else { time(self.mtime) }
    }

    pub fn kind(&self) -> u32 {
        u32::from(self.mode) & libc::S_IFMT
    }
}

/// One entry of `getdents64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub ino: u64,
    pub next: u64,
    pub kind: u8,
    pub name: Vec<u8>,
}

pub fn entries(mut bytes: &[u8]) -> Vec<Listed> {
    let mut found = Vec::new();
    while bytes.len() >= 19 {
        let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let length = usize::from(u16::from_ne_bytes([bytes[16], bytes[17]]));
        let name = bytes[19..length].split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        found.push(Listed { ino: u64_at(0), next: u64_at(8), kind: bytes[18], name });
        bytes = &bytes[length..];
    }
    found
}

/// Times of while the model runs are all the same.
pub fn time((seconds, nanoseconds): (i64, u32)) -> String {
    // Times that are set by the model are years away.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs() as i64;
    match seconds.abs_diff(now) < 1_000_000 {
        true => "now".to_string(),
        false => format!("{seconds}.{nanoseconds:09}"),
    }
}

/// The tree below the working directory, which is the root: lines, each ended by a newline and begun by the path. The
/// inode numbers are the second text.
pub fn walk() -> Answer {
    let mut walk = Walk::default();
    walk.file(b"/", b".");
    walk.directory(b"");
    Answer { result: 0, written: vec![walk.lines.into_bytes(), walk.numbers.into_bytes()] }
}

#[derive(Default)]
struct Walk {
    lines: String,
    numbers: String,
    /// The first path of each inode.
    first: HashMap<u64, String>,
}

impl Walk {
    /// The working directory, and all below it.
    fn directory(&mut self, path: &[u8]) {
        let Some(fd) = open(b".") else {
            self.lines.push_str(&format!("{} cannot be read\n", path.escape_ascii()));
            return;
        };
        for entry in list(fd) {
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let below = [path, b"/", &entry.name].concat();
            let status = self.file(&below, &entry.name);
            if let Some(status) = status {
                let told = u32::from(entry.kind) << 12 == status.kind() && entry.ino == status.ino;
                let wrong = if told { "" } else { " THE LISTING TELLS ANOTHER NUMBER OR KIND" };
                self.numbers.push_str(&format!("{} {}{wrong}\n", below.escape_ascii(), status.ino));
            }
            let is_dir = status.is_some_and(|status| status.kind() == libc::S_IFDIR);
            if is_dir && call(libc::SYS_chdir, &[text(&entry.name)]).result == 0 {
                self.directory(&below);
                call(libc::SYS_fchdir, &[number(fd)]);
            }
        }
        call(libc::SYS_close, &[number(fd)]);
    }

    fn file(&mut self, path: &[u8], name: &[u8]) -> Option<Status> {
        let status = match status(name) {
            Ok(status) => status,
            Err(errno) => {
                self.lines.push_str(&format!("{} errno {errno}\n", path.escape_ascii()));
                return None;
            }
        };
        let path = path.escape_ascii().to_string();
        let first = self.first.entry(status.ino).or_insert_with(|| path.clone());
        let same = if *first == path { String::new() } else { format!(" is {first}") };
        let (contents, map) = match status.kind() {
            libc::S_IFREG => contents(name),
            libc::S_IFLNK => (readlink(name), String::new()),
            _ => Default::default(),
        };
        let Status { mode, nlink, uid, gid, size, blocks, block_size, device, .. } = status;
        let (mtime, attributes) = (status.mtime(), attributes(name));
        self.lines.push_str(&format!(
            "{path}{same} mode={mode:o} nlink={nlink} uid={uid} gid={gid} size={size} unit={block_size} \
             device={device:?} mtime={mtime}{attributes}{contents} map={map} blocks={blocks}\n"
        ));
        Some(status)
    }
}

fn open(name: &[u8]) -> Option<i64> {
    let flags = libc::O_RDONLY | libc::O_NOATIME | libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let opened = call(libc::SYS_openat, &[number(libc::AT_FDCWD.into()), text(name), number(flags.into())]);
    (opened.result >= 0).then_some(opened.result)
}

/// All entries, by name.
fn list(fd: i64) -> Vec<Listed> {
    let mut found = Vec::new();
    loop {
        let read = call(libc::SYS_getdents64, &[number(fd), Arg::Out(32 << 10, 0), number(32 << 10)]);
        if read.result <= 0 {
            found.sort_by(|a: &Listed, b| a.name.cmp(&b.name));
            return found;
        }
        found.extend(entries(&read.written[0][..read.result as usize]));
    }
}

fn status(name: &[u8]) -> Result<Status, i64> {
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    let args = [
        number(libc::AT_FDCWD.into()),
        text(name),
        number(flags.into()),
        number(libc::STATX_BASIC_STATS.into()),
        Arg::Out(Status::SIZE, 0),
    ];
    let answer = call(libc::SYS_statx, &args);
    match answer.result {
        0 => Ok(Status::read(&answer.written[0])),
        error => Err(-error),
    }
}

fn readlink(name: &[u8]) -> String {
    let read =
        call(libc::SYS_readlinkat, &[number(libc::AT_FDCWD.into()), text(name), Arg::Out(4096, 0), number(4096)]);
    let target = read.written[0].get(..read.result.max(0) as usize).unwrap_or_default();
    format!(" -> {} {}", read.result, target.escape_ascii())
}

fn attributes(name: &[u8]) -> String {
    let listed = call(libc::SYS_llistxattr, &[text(name), Arg::Out(64 << 10, 0), number(64 << 10)]);
    if listed.result < 0 {
        return format!(" xattrs: errno {}", -listed.result);
    }
    let mut keys: Vec<&[u8]> = listed.written[0][..listed.result as usize].split(|byte| *byte == 0).collect();
    keys.sort();
    let mut told = String::new();
    for key in keys.into_iter().filter(|key| !key.is_empty()) {
        let got = call(libc::SYS_lgetxattr, &[text(name), text(key), Arg::Out(64 << 10, 0), number(64 << 10)]);
        let value = got.written[0].get(..got.result.max(0) as usize).unwrap_or_default();
        told.push_str(&format!(" {}={}:{:x}", key.escape_ascii(), got.result, hash(value)));
    }
    told
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(bytes);
    hasher.finish()
}

/// What there is, and where: holes are not read. Zeros count as nothing, except for where they are.
fn contents(name: &[u8]) -> (String, String) {
    let Some(fd) = open(name) else { return (" cannot be read".to_string(), String::new()) };
    let seek =
        |offset: i64, whence: i32| call(libc::SYS_lseek, &[number(fd), number(offset), number(whence.into())]).result;
    let (mut hasher, mut map, mut at) = (SipHasher13::new(), String::new(), 0);
    loop {
        let data = seek(at, libc::SEEK_DATA);
        if data < at {
            break;
        }
        let hole = seek(data, libc::SEEK_HOLE);
        map.push_str(&format!(" {data}..{hole}"));
        hash_range(&mut hasher, fd, data, hole);
        if hole <= data {
            break;
        }
        at = hole;
    }
    call(libc::SYS_close, &[number(fd)]);
    (format!(" contents={:x}", hasher.finish()), map)
}

fn hash_range(hasher: &mut SipHasher13, fd: i64, start: i64, end: i64) {
    const UNIT: usize = 512;
    let mut at = start;
    while at < end {
        let length = (end - at).min(256 << 10);
        let read = call(libc::SYS_pread64, &[number(fd), Arg::Out(length as usize, 0), number(length), number(at)]);
        if read.result <= 0 {
            hasher.write_i64(read.result);
            break;
        }
        for (i, unit) in read.written[0][..read.result as usize].chunks(UNIT).enumerate() {
            if unit.iter().any(|byte| *byte != 0) {
                hasher.write_i64(at + (i * UNIT) as i64);
                hasher.write(unit);
            }
        }
        at += read.result;
    }
}

/// Takes away what keeps files from being removed.
pub fn clear_flags() {
    call(libc::SYS_chdir, &[text(b"/")]);
    clear_flags_here();
}

fn clear_flags_here() {
    let Some(fd) = open(b".") else { return };
    clear_flags_of(fd);
    for entry in list(fd).iter().filter(|entry| entry.name != b"." && entry.name != b"..") {
        if entry.kind == libc::DT_DIR && call(libc::SYS_chdir, &[text(&entry.name)]).result == 0 {
            clear_flags_here();
            call(libc::SYS_fchdir, &[number(fd)]);
        } else if entry.kind == libc::DT_REG
            && let Some(file) = open(&entry.name)
        {
            clear_flags_of(file);
            call(libc::SYS_close, &[number(file)]);
        }
    }
    call(libc::SYS_close, &[number(fd)]);
}

fn clear_flags_of(fd: i64) {
    let got = call(libc::SYS_ioctl, &[number(fd), Arg::Number(FS_IOC_GETFLAGS), Arg::Out(8, 0)]);
    let flags = got.written[0].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes).into());
    if got.result == 0 && flags & LOCKED != 0 {
        let cleared = Arg::In((flags & !LOCKED).to_ne_bytes().to_vec(), 0);
        call(libc::SYS_ioctl, &[number(fd), Arg::Number(FS_IOC_SETFLAGS), cleared]);
    }
}
