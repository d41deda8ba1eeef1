//! What a program sees of a mount with nothing armed: what it would see without us.
//!
//! Where the bare directory can be asked, it is: the same program runs in both, and must say the same. Clients are Python
//! programs, because they want processes, signals and system calls of their own.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::MsFlags;
use nix::sys::stat::Mode;

use crate::support::{Mounted, Trace, eventually, memory, python, within};

/// Says what has not come to pass within two seconds, and one for a busy machine.
const SOON: &str = r#"
import os, sys, time
def soon(what, holds):
    until = time.monotonic() + 3
    while not holds():
        if time.monotonic() > until: sys.exit('not seen: ' + what)
        time.sleep(0.02)
"#;

#[test]
fn what_others_change_is_seen_within_two_seconds() {
    let mounted = Mounted::new();
    let script = r#"
import mmap
backing = sys.argv[1]
def below(name, data, at=0):
    fd = os.open(backing + '/' + name, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, data, at)
    os.close(fd)
for name in 'read', 'mapped', 'size', 'mode', 'removed': below(name, b'a' * 8192)
fd = os.open('read', os.O_RDONLY)
file = os.open('mapped', os.O_RDWR)
m = mmap.mmap(file, 8192)
assert os.pread(fd, 8192, 0) == m[:] == b'a' * 8192
for name in 'size', 'mode', 'removed': os.stat(name)
grown = os.open('size', os.O_RDONLY)
assert 'new' not in os.listdir() and not os.path.exists('new')
time.sleep(1.2)
assert os.pread(fd, 8192, 0) == m[:] == b'a' * 8192
for name in 'read', 'mapped': below(name, b'b' * 8192)
below('size', b'b', 20000)
os.chmod(backing + '/mode', 0o640)
os.unlink(backing + '/removed')
below('new', b'x')
soon('contents', lambda: os.pread(fd, 8192, 0) == b'b' * 8192)
soon('contents of a mapping', lambda: m[:] == b'b' * 8192)
soon('size', lambda: os.stat('size').st_size == 20001)
soon('size of an open file', lambda: os.fstat(grown).st_size == 20001 and os.pread(grown, 9, 20000) == b'b')
soon('mode', lambda: os.stat('mode').st_mode & 0o777 == 0o640)
soon('a name gone', lambda: not os.path.exists('removed') and 'removed' not in os.listdir())
soon('a new name', lambda: os.path.exists('new') and 'new' in os.listdir())
"#;
    mounted.python(&format!("{SOON}{script}"), &[]);
    mounted.end();
}

#[test]
fn what_others_change_is_seen_although_we_write_in_the_same_second() {
    let mounted = Mounted::new();
    let script = r#"
fd = os.open('f', os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b'a' * 8192, 0)
assert os.pread(fd, 8192, 0) == b'a' * 8192
for n in range(4):
    # So that the second begins at other moments of the daemon's.
    time.sleep(1.3)
    new = bytes([65 + n]) * 100
    below = os.open(sys.argv[1] + '/f', os.O_WRONLY)
    os.pwrite(below, new, 0)
    os.close(below)
    os.pwrite(fd, b'ours', 4096)
    soon('their change', lambda: os.pread(fd, 100, 0) == new)
    assert os.pread(fd, 4, 4096) == b'ours'
"#;
    mounted.python(&format!("{SOON}{script}"), &[]);
    mounted.end();
}

#[test]
fn what_others_change_is_seen_through_a_mapping_of_a_direct_handle() {
    let mounted = Mounted::new();
    let script = r#"
import mmap
with open(sys.argv[1] + '/f', 'wb') as below: below.write(b'a' * 4096)
fd = os.open('f', os.O_RDWR | os.O_DIRECT)
m = mmap.mmap(fd, 4096)
assert m[:] == b'a' * 4096
time.sleep(1.2)
with open(sys.argv[1] + '/f', 'r+b') as below: below.write(b'b' * 4096)
soon('their change', lambda: m[:] == b'b' * 4096)
"#;
    mounted.python(&format!("{SOON}{script}"), &[]);
    mounted.end();
}

/// Somebody swaps a directory below us for a symlink and back, while a client looks up names in it by descriptor.
#[test]
fn a_directory_swapped_for_a_symlink_never_leads_out() {
    let mounted = Mounted::new();
    let outside = mounted.aside("outside");
    std::fs::write(outside.join("secret"), "of somebody else").unwrap();
    std::fs::create_dir(mounted.backing.join("d")).unwrap();
    std::fs::write(mounted.backing.join("d/own"), "ours").unwrap();
    let dir = File::open(mounted.path("d")).unwrap();
    let (d, moved) = (mounted.backing.join("d"), mounted.backing.join("moved"));
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for target in [Path::new("/"), &outside].into_iter().cycle() {
                std::fs::rename(&d, &moved).unwrap();
                std::os::unix::fs::symlink(target, &d).unwrap();
                std::thread::sleep(Duration::from_micros(300));
                std::fs::remove_file(&d).unwrap();
                std::fs::rename(&moved, &d).unwrap();
                if Instant::now() > until {
                    return;
                }
            }
        });
        let root = File::open(&mounted.mountpoint).unwrap();
        let how = OpenHow::new().flags(OFlag::O_RDONLY).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let mut made = 0;
        while Instant::now() < until {
            for name in ["secret", "etc"] {
                assert!(openat(&dir, name, OFlag::O_RDONLY, Mode::empty()).is_err(), "{name} is not in d");
                let path = format!("d/{name}");
                assert!(openat2(&root, path.as_str(), how).is_err(), "no way through a symlink to {name}");
            }
            openat(&dir, "own", OFlag::O_RDONLY, Mode::empty()).expect("d is still there under its descriptor");
            made += 1;
            let (name, flags) = (format!("made{made}"), OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY);
            openat(&dir, name.as_str(), flags, Mode::from_bits_truncate(0o600)).unwrap();
        }
        assert!(made > 100, "{made}");
    });
    let left: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["secret"]);
    drop(dir);
    mounted.end();
}

#[test]
fn the_page_cache_is_kept_over_an_open_when_only_we_changed_the_file_and_not_when_somebody_else_did() {
    let mounted = Mounted::new();
    let script = r#"
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
size = 64 * 4096
def cached(fd):
    m = mmap.mmap(fd, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(m))
    pages = (ctypes.c_ubyte * 64)()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages)
def opened():
    fd = os.open('f', os.O_RDWR)
    pages = cached(fd)
    return fd, pages
def written(path, byte):
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, byte * size, 0)
    os.close(fd)
with open('f', 'wb') as f: f.write(b'a' * size)
for byte in b'b', b'c':
    fd, pages = opened()
    os.pread(fd, size, 0)
    os.close(fd)
    written('f', byte)
    fd, pages = opened()
    assert pages == 64, ('after a change of our own', pages)
    assert os.pread(fd, size, 0) == byte * size
    os.close(fd)
    written(sys.argv[1] + '/f', b'z')
    fd, pages = opened()
    assert pages == 0, ('after a change of somebody else', pages)
    assert os.pread(fd, size, 0) == b'z' * size
    os.close(fd)
"#;
    mounted.python(script, &[]);
    mounted.end();
}

/// Makes the kernel forget all files of the mount that nobody uses: a remount drops its names.
fn forget_all(mounted: &Mounted) {
    let none: Option<&str> = None;
    nix::mount::mount(none, &mounted.mountpoint, none, MsFlags::MS_REMOUNT, none).unwrap();
}

#[test]
fn two_hundred_thousand_files_are_known_without_descriptors_and_their_memory_is_given_back() {
    const FILES: usize = 200_000;
    let mounted = Mounted::in_memory();
    for dir in 0..8 {
        let path = mounted.backing.join(dir.to_string());
        std::fs::create_dir(&path).unwrap();
        (0..FILES / 8).for_each(|file| drop(File::create(path.join(file.to_string())).unwrap()));
    }
    let before = memory(mounted.pid, "VmRSS");
    let began = Instant::now();
    let mut found = 0;
    for dir in 0..8 {
        for entry in std::fs::read_dir(mounted.path(&dir.to_string())).unwrap() {
            assert!(entry.unwrap().metadata().unwrap().is_file());
            found += 1;
        }
    }
    assert_eq!(found, FILES);
    let known = memory(mounted.pid, "VmRSS");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", mounted.pid)).unwrap().count();
    let each = (known - before) / FILES as u64;
    eprintln!("{FILES} files in {:?}: {each} bytes each, {descriptors} descriptors", began.elapsed());
    assert!(descriptors < 20_000, "{descriptors}");
    assert!((64..2048).contains(&each), "{each} bytes for each file");
    // One more than the kernel keeps anyhow, so that all were known at once.
    forget_all(&mounted);
    eventually("most of the memory is given back", || {
        memory(mounted.pid, "VmRSS") < before + (known - before) / 10 + (4 << 20)
    });
    eprintln!("before {before}, known {known}, after {}", memory(mounted.pid, "VmRSS"));
    mounted.end();
}

#[test]
fn an_idle_daemon_has_less_than_16_mib() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("f"), vec![1; 4 << 20]).unwrap();
    assert_eq!(std::fs::read(mounted.path("f")).unwrap().len(), 4 << 20);
    mounted.reset();
    std::thread::sleep(Duration::from_millis(1500));
    let (all, own) = (memory(mounted.pid, "VmRSS"), memory(mounted.pid, "RssAnon"));
    eprintln!("idle: {all} bytes, of which {own} are no pages of the program's file");
    // Not optimised, the program's code alone is as large.
    let counted = if cfg!(debug_assertions) { own } else { all };
    assert!(counted < 16 << 20, "{counted}");
    mounted.end();
}

/// ext4 gives the number of a removed file to the next one that is made.
#[test]
fn a_reused_inode_number_never_gives_the_wrong_file() {
    let mounted = Mounted::new();
    let script = r#"
import os, sys
backing = sys.argv[1]
def made(name, data):
    fd = os.open(backing + '/' + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, data)
    os.close(fd)
    return os.stat(backing + '/' + name).st_ino
def contents(name):
    fd = os.open(name, os.O_RDONLY)
    data = os.pread(fd, 100, 0), os.fstat(fd).st_ino, os.fstat(fd).st_size
    os.close(fd)
    return data
reused = 0
for n in range(100):
    name, other = f'old{n}', f'new{n}'
    old = made(name, b'old %d' % n)
    assert contents(name)[0] == b'old %d' % n
    # A handle that keeps no file alive below: the kernel knows the file, and the daemon has it not open.
    known = os.open(name, os.O_PATH)
    os.unlink(backing + '/' + name)
    new = made(other, b'another one %d' % n)
    reused += new == old
    assert contents(other) == (b'another one %d' % n, new, len(b'another one %d' % n))
    try: size = os.stat(f'/proc/self/fd/{known}').st_size
    except OSError: pass
    else: assert size == len(b'old %d' % n), 'the old handle gives the new file'
    try: data = contents(f'/proc/self/fd/{known}')[0]
    except OSError: pass
    else: assert data == b'old %d' % n, data
    os.close(known)
    # A directory that somebody stands in is kept, and its number with it.
    os.mkdir(f'{backing}/d{n}')
    made(f'd{n}/in', b'')
    d = os.open(f'd{n}', os.O_PATH)
    old = os.stat(f'd{n}').st_ino
    os.unlink(f'{backing}/d{n}/in')
    os.rmdir(f'{backing}/d{n}')
    os.mkdir(f'{backing}/e{n}')
    made(f'e{n}/other', b'')
    assert os.stat(f'e{n}').st_ino != old
    try: os.stat('other', dir_fd=d)
    except OSError: pass
    else: sys.exit('a name of the new directory is found in the old one')
    assert os.listdir(f'e{n}') == ['other']
    os.close(d)
# One that is open keeps its number, and its contents.
ino = made('open', b'still there')
fd = os.open('open', os.O_RDWR)
os.unlink(backing + '/open')
assert made('open', b'its successor') != ino
assert os.pread(fd, 100, 0) == b'still there'
soon('its successor', lambda: contents('open')[0] == b'its successor')
assert os.pread(fd, 100, 0) == b'still there'
print(reused)
"#;
    let said = mounted.python(&format!("{SOON}{script}"), &[]);
    let below = nix::sys::statfs::statfs(&mounted.backing).unwrap().filesystem_type();
    assert!(said != "0\n" || below != nix::sys::statfs::EXT4_SUPER_MAGIC, "no number was reused");
    mounted.end();
}

#[test]
fn hard_links_are_one_file_with_one_cache_one_lock_and_one_end() {
    let mounted = Mounted::new();
    let script = r#"
import fcntl, os
open('a', 'w').close()
os.mkdir('d')
os.link('a', 'd/b')
names = 'a', 'd/b'
assert os.stat('a').st_ino == os.stat('d/b').st_ino and os.stat('a').st_nlink == 2
a, b = (os.open(name, os.O_RDWR) for name in names)
os.pwrite(a, b'through one', 0)
assert os.pread(b, 100, 0) == b'through one'
fcntl.flock(a, fcntl.LOCK_EX)
try: fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB); print('two locks')
except BlockingIOError: pass
os.truncate('d/b', 0)
assert os.fstat(a).st_size == 0
def append(n):
    fd = os.open(names[n % 2], os.O_WRONLY | os.O_APPEND)
    for i in range(400):
        record = b'%d %d ' % (n, i)
        record += b'x' * ((n * 7 + i * 13) % 5000) + b'\n'
        assert os.write(fd, record) == len(record)
    os._exit(0)
children = []
for n in range(4):
    pid = os.fork()
    if pid == 0: append(n)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
with open('a', 'rb') as f: records = f.read().split(b'\n')
assert records.pop() == b''
seen = set()
for record in records:
    n, i, rest = record.split(b' ')
    assert rest == b'x' * ((int(n) * 7 + int(i) * 13) % 5000), (n, i)
    seen.add((n, i))
print(len(records), len(seen))
"#;
    assert_eq!(mounted.as_bare(script), "1600 1600\n");
    mounted.end();
}

#[test]
fn unlinked_and_replaced_files_live_on_and_hide_nowhere() {
    let mounted = Mounted::new();
    let script = r#"
import os
def new(name, data):
    fd = os.open(name, os.O_RDWR | os.O_CREAT)
    os.write(fd, data)
    return fd
gone, replaced, over = new('gone', b'gone'), new('replaced', b'replaced'), new('over', b'over')
linked = new('linked', b'linked')
os.link('linked', 'link')
os.mkdir('d')
d = os.open('d', os.O_RDONLY)
os.unlink('gone'), os.rename('over', 'replaced'), os.unlink('linked'), os.rmdir('d')
print(sorted(os.listdir()))
for fd in gone, replaced, over, linked:
    os.pwrite(fd, b'more', 2)
    os.ftruncate(fd, 5)
    os.fchmod(fd, 0o640)
    os.fsync(fd)
    other = os.open(f'/proc/self/fd/{fd}', os.O_RDONLY)
    print(os.pread(other, 100, 0), os.fstat(fd).st_nlink, os.fstat(fd).st_size, oct(os.fstat(fd).st_mode))
    os.close(other)
print(os.fstat(d).st_nlink, os.listdir(d))
try: os.mkdir('x', dir_fd=d)
except OSError as error: print(error.errno)
try: os.link(f'/proc/self/fd/{gone}', 'back', follow_symlinks=True)
except OSError as error: print(error.errno)
print(open('replaced').read(), open('link').read(), sorted(os.listdir()))
"#;
    let said = mounted.as_bare(script);
    assert!(said.starts_with("['link', 'replaced']\n"), "{said}");
    let below: Vec<_> = std::fs::read_dir(&mounted.backing).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(below.len(), 2, "nothing is hidden in the backing directory: {below:?}");
    mounted.end();
}

#[test]
fn paths_longer_than_path_max_and_names_of_any_byte_work() {
    let mounted = Mounted::new();
    let script = r#"
import os
fd = os.open('.', os.O_RDONLY)
for n in range(20):
    name = ('%02d' % n).ljust(255, 'n')
    os.mkdir(name, dir_fd=fd)
    next = os.open(name, os.O_RDONLY, dir_fd=fd)
    os.close(fd)
    fd = next
deep = os.open('f', os.O_RDWR | os.O_CREAT, dir_fd=fd)
os.write(deep, b'deep')
os.rename('f', 'g', src_dir_fd=fd, dst_dir_fd=fd)
os.symlink('g' * 3000, 'l', dir_fd=fd)
os.setxattr(deep, b'user.x', b'y')
print(os.stat('g', dir_fd=fd).st_size, os.listdir(fd), len(os.readlink('l', dir_fd=fd)), os.pread(deep, 9, 0))
try: os.mkdir('n' * 256, dir_fd=fd)
except OSError as error: print(error.errno)
os.unlink('l', dir_fd=fd)
os.unlink('g', dir_fd=fd)
os.mkdir('names')
for byte in range(1, 256):
    if byte == ord('/'): continue
    name = b'names/' + bytes([byte]) * 3
    with open(name, 'wb') as f: f.write(name)
    os.rename(name, name + b'!')
    assert open(name + b'!', 'rb').read() == name
print(sorted(os.listdir(b'names')))
"#;
    let said = mounted.as_bare(script);
    assert!(said.starts_with("4 ["), "{said}");
    // A rule on everything has to find these paths too.
    mounted.error_rule("r", "mkdir", "/**", "EIO", None);
    let deep = "import os\nfor n in range(20): os.chdir(('%02d' % n).ljust(255, 'n'))\n\
        try: os.mkdir('d')\nexcept OSError as e: print(e.errno)";
    assert_eq!(mounted.python(deep, &[]), "5\n");
    let path = mounted.injections("r")[0]["path"].as_str().unwrap().to_string();
    assert_eq!(path.len(), 20 * 256 + "/d".len(), "{path}");
    mounted.end();
}

#[test]
fn mappings_of_two_processes_agree_with_reads_and_writes_of_every_sort() {
    let mounted = Mounted::new();
    let script = r#"
import mmap, os
size = 16 * 4096
with open('f', 'wb') as f: f.write(b'0' * size)
there, back = os.pipe(), os.pipe()
def turn(write, read):
    os.write(write, b'.')
    assert os.read(read, 1) == b'.'
def opened():
    fd, direct = os.open('f', os.O_RDWR), os.open('f', os.O_RDWR | os.O_DIRECT)
    return fd, direct, mmap.mmap(fd, size), mmap.mmap(-1, 4096)
def seen(fd, direct, m, page, at, byte):
    os.preadv(direct, [page], at)
    return m[at:at + 4096] == os.pread(fd, 4096, at) == page[:] == byte * 4096
def put(how, fd, direct, m, page, at, byte):
    if how == 0: m[at:at + 4096] = byte * 4096
    if how == 1: os.pwrite(fd, byte * 4096, at)
    if how == 2: page[:] = byte * 4096; os.pwritev(direct, [page], at)
pid = os.fork()
write, read = (back[1], there[0]) if pid == 0 else (there[1], back[0])
for fd in (back[0], there[1]) if pid == 0 else (back[1], there[0]): os.close(fd)
mine = opened()
turn(write, read)
for round in range(60):
    byte, at, how = b'%c' % (65 + round % 26), round * 7 % 16 * 4096, round % 3
    # They take turns: one puts, and both look.
    if (pid == 0) == (round % 2 == 0): put(how, *mine, at, byte)
    turn(write, read)
    assert seen(*mine, at, byte), (round, how)
    turn(write, read)
if pid == 0: os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(sum(open('f', 'rb').read()))
"#;
    mounted.as_bare(script);
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap(), std::fs::read(mounted.path("f")).unwrap());
    mounted.end();
}

#[test]
fn a_listing_of_30000_names_is_right_while_others_come_and_go() {
    let mounted = Mounted::new();
    for n in 0..30_000 {
        File::create(mounted.backing.join(format!("name{n}"))).unwrap();
    }
    let script = r#"
import ctypes, os, random, sys
there = {f'name{n}' for n in range(30000)}
pid = os.fork()
if pid == 0:
    names = [f'{dir}/other{n}' for n in range(300) for dir in ('.', sys.argv[1])]
    while True:
        name = random.choice(names)
        try: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            try: os.unlink(name)
            except FileNotFoundError: pass
try:
    for _ in range(3):
        listed = [name for name in os.listdir() if name.startswith('name')]
        assert len(listed) == 30000 and set(listed) == there, (len(listed), len(set(listed)))
        with os.scandir() as entries: listed = [e.name for e in entries if e.name.startswith('name') and e.is_file()]
        assert len(listed) == 30000 and set(listed) == there, (len(listed), len(set(listed)))
    # Positions stay what they are: the next stable name is found again from each, in any order.
    libc = ctypes.CDLL(None)
    class Dirent(ctypes.Structure):
        _fields_ = [('ino', ctypes.c_ulong), ('off', ctypes.c_long), ('len', ctypes.c_ushort), ('type', ctypes.c_ubyte),
            ('name', ctypes.c_char * 256)]
    libc.opendir.restype, libc.telldir.restype = ctypes.c_void_p, ctypes.c_long
    libc.readdir.restype = ctypes.POINTER(Dirent)
    directory = ctypes.c_void_p(libc.opendir(b'.'))
    def next_name():
        while entry := libc.readdir(directory):
            if entry.contents.name.startswith(b'name'): return entry.contents.name
    marks = []
    for n in range(30000):
        at = libc.telldir(directory)
        name = next_name()
        if n % 500 == 0: marks.append((at, name))
    assert next_name() is None
    random.shuffle(marks)
    for at, name in marks:
        libc.seekdir(directory, ctypes.c_long(at))
        assert next_name() == name, (at, name)
    libc.rewinddir(directory)
    assert next_name() in {name for at, name in marks}
    libc.closedir(directory)
finally:
    os.kill(pid, 9), os.wait()
"#;
    mounted.python(script, &[]);
    mounted.end();
}

#[test]
fn locks_of_all_three_kinds_exclude_and_go_with_a_killed_process() {
    let mounted = Mounted::new();
    let script = r#"
import fcntl, os, struct, time
def ofd(fd, kind, wait):
    # F_OFD_SETLK is 37, F_OFD_SETLKW 38: struct flock with a pid of 0.
    fcntl.fcntl(fd, 38 if wait else 37, struct.pack('hhqqi4x', kind, os.SEEK_SET, 10, 20, 0))
kinds = {
    'flock': lambda fd, kind, wait: fcntl.flock(fd, kind | (0 if wait else fcntl.LOCK_NB)),
    'fcntl': lambda fd, kind, wait: fcntl.lockf(fd, kind | (0 if wait else fcntl.LOCK_NB), 20, 10),
    'ofd': lambda fd, kind, wait: ofd(fd, fcntl.F_WRLCK if kind == fcntl.LOCK_EX else fcntl.F_RDLCK, wait),
}
open('f', 'w').close()
def tried(lock, kind):
    fd = os.open('f', os.O_RDWR)
    try: lock(fd, kind, False); return 'taken'
    except OSError as error: return 'refused %s' % (error.errno in (11, 13))
    finally: os.close(fd)
for name, lock in kinds.items():
    for kind in fcntl.LOCK_EX, fcntl.LOCK_SH:
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            fd = os.open('f', os.O_RDWR)
            lock(fd, kind, True)
            os.write(told, b'.')
            time.sleep(60)
        os.read(ready, 1)
        print(name, kind, 'held:', tried(lock, fcntl.LOCK_EX), tried(lock, fcntl.LOCK_SH))
        waiter = os.fork()
        if waiter == 0:
            lock(os.open('f', os.O_RDWR), fcntl.LOCK_EX, True)
            os._exit(0)
        time.sleep(0.05)
        print('waits:', os.waitpid(waiter, os.WNOHANG)[0] == 0)
        os.kill(pid, 9), os.waitpid(pid, 0)
        print('got it:', os.waitpid(waiter, 0)[1] == 0, tried(lock, fcntl.LOCK_EX))
# A range beside it is free; a query names the holder.
fd = os.open('f', os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
pid = os.fork()
if pid == 0:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
    asked = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    os._exit(struct.unpack('hhqqi4x', asked)[4] == os.getppid())
print('named:', os.waitpid(pid, 0)[1] >> 8)
"#;
    let said = mounted.as_bare(script);
    assert_eq!(said.matches("held: refused True refused True").count(), 3, "{said}");
    assert_eq!(said.matches("waits: True\ngot it: True taken").count(), 6, "{said}");
    mounted.end();
}

#[test]
fn fifos_sockets_and_devices_work_and_are_never_opened_by_the_daemon() {
    let mounted = Mounted::new();
    let script = r#"
import ctypes, os, socket, stat, sys, threading
backing, daemon = sys.argv[1:3]
os.mkfifo('fifo')
os.mknod('null', 0o666 | stat.S_IFCHR, os.makedev(1, 3))
os.mknod('block', 0o600 | stat.S_IFBLK, os.makedev(7, 200))
listening = socket.socket(socket.AF_UNIX)
listening.bind('socket')
listening.listen()
names = 'fifo', 'null', 'block', 'socket'
# inotify tells of every open of theirs below.
libc = ctypes.CDLL(None, use_errno=True)
watch, IN_OPEN = libc.inotify_init1(os.O_NONBLOCK), 0x20
for name in names: assert libc.inotify_add_watch(watch, f'{backing}/{name}'.encode(), IN_OPEN) >= 0
def links():
    for fd in os.listdir(f'/proc/{daemon}/fd'):
        try: yield os.readlink(f'/proc/{daemon}/fd/{fd}')
        except FileNotFoundError: pass  # closed meanwhile
written = threading.Thread(target=lambda: open('fifo', 'w').write('through'))
written.start()
with open('fifo') as fifo:
    held = list(links())
    assert fifo.read() == 'through'
written.join()
# With both ends open the daemon has none of them.
both = os.open('fifo', os.O_RDWR | os.O_NONBLOCK)
null = os.open('null', os.O_RDWR)
assert os.write(null, b'gone') == 4 and os.read(null, 1) == b''
client = socket.socket(socket.AF_UNIX)
client.connect('socket')
for name in names:
    os.chmod(name, 0o640), os.chown(name, 1, 1), os.utime(name, (1, 2)), os.link(name, name + '2')
    os.rename(name + '2', name + '3')
    assert os.stat(name).st_mtime == 2 and os.stat(name).st_nlink == 2
    os.setxattr(name, b'trusted.x', b'y')
    assert b'trusted.x'.decode() in os.listxattr(name)
    try: os.truncate(name, 0); assert name == 'null'
    except OSError: pass
held += links()
assert not [link for link in held if link.startswith(backing + '/') and os.path.basename(link) in names], held
for name in names: os.unlink(name)
try: told = os.read(watch, 4096)
except BlockingIOError: told = b''
# Those of names that are links of a watched file come, too; there are none at all.
opened = [told[at + 4] for at in range(0, len(told), 16) if told[at + 4] & IN_OPEN]
assert not opened, 'opened below'
"#;
    mounted.python(script, &[]);
    mounted.end();
}

#[test]
fn the_size_limit_is_the_clients_own() {
    let mounted = Mounted::new();
    let script = r#"
import os, resource, signal
told = []
signal.signal(signal.SIGXFSZ, lambda *_: told.append('SIGXFSZ'))
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
fd = os.open('f', os.O_RDWR | os.O_CREAT)
def tried(act):
    try: print(act(), told)
    except OSError as error: print(error.errno, told)
    told.clear()
tried(lambda: os.write(fd, b'x' * 9000))
tried(lambda: os.write(fd, b'x' * 9000))
tried(lambda: os.write(fd, b'x'))
tried(lambda: os.pwrite(fd, b'x', 20000))
tried(lambda: os.ftruncate(fd, 20000))
tried(lambda: os.posix_fallocate(fd, 0, 20000))
tried(lambda: os.truncate('f', 5000))
tried(lambda: os.fstat(fd).st_size)
"#;
    let said = mounted.as_bare(script);
    assert!(said.contains("27 ['SIGXFSZ']"), "{said}");
    mounted.end();
}

/// As a shell sets it for its children; a hard limit takes more than root to lift in some containers.
#[test]
fn a_size_limit_of_the_daemon_limits_nobody() {
    let mounted = Mounted::started_by(&["sh", "-c", "ulimit -S -f 8; exec \"$@\"", "sh"]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", mounted.pid)).unwrap();
    let data = vec![7; 3 << 20];
    std::fs::write(mounted.path("f"), &data).unwrap_or_else(|error| panic!("{error}\n{limits}"));
    File::options().write(true).open(mounted.path("f")).unwrap().set_len(9 << 20).unwrap();
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap()[..data.len()], data);
    mounted.end();
}

#[test]
fn file_flags_hold_are_seen_below_and_unknown_commands_are_refused() {
    let mounted = Mounted::new();
    let script = r#"
import fcntl, os, subprocess
def tried(what, act):
    try: print(what, act())
    except OSError as error: print(what, error.errno)
def flags(name): return subprocess.run(['lsattr', name], capture_output=True, text=True).stdout
def change(how, name): print(how, subprocess.run(['chattr', how, name]).returncode)
def all(name):
    tried('append', lambda: os.write(os.open(name, os.O_WRONLY | os.O_APPEND), b'more'))
    tried('create-append', lambda: os.write(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), b'more'))
    tried('write', lambda: os.open(name, os.O_WRONLY))
    tried('overwrite', lambda: os.open(name, os.O_WRONLY | os.O_APPEND | os.O_TRUNC))
    tried('truncate', lambda: os.truncate(name, 0))
    tried('unlink', lambda: os.unlink(name))
    tried('rename', lambda: os.rename(name, 'other'))
    tried('link', lambda: os.link(name, 'other'))
    tried('chmod', lambda: os.chmod(name, 0o640))
    tried('utime', lambda: os.utime(name, (1, 1)))
    tried('read', lambda: open(name).read())
for name in 'a', 'i':
    with open(name, 'w') as f: f.write('text')
try:
    for how, name in ('+a', 'a'), ('+i', 'i'):
        change(how, name)
        print(flags(name))
        all(name)
    os.mkdir('d')
    change('+i', 'd')
    tried('make', lambda: os.mkdir('d/e'))
    print(subprocess.run(['lsattr', '-d', 'd'], capture_output=True, text=True).stdout)
finally:
    for name in 'a', 'i', 'd': subprocess.run(['chattr', '-ia', name])
change('+A', 'a')
print(flags('a'))
fd = os.open('a', os.O_RDWR)
for command in 0x1234, 0xC0DE, 0x5401: tried('ioctl', lambda: fcntl.ioctl(fd, command, b'\0' * 8))
"#;
    let said = mounted.as_bare(script);
    assert!(said.contains("append 4\n") && said.contains("write 1\n"), "{said}");
    let below = Command::new("lsattr").arg(mounted.backing.join("a")).output().unwrap().stdout;
    assert!(String::from_utf8(below).unwrap().split(' ').next().unwrap().contains('A'), "seen below");
    mounted.end();
}

#[test]
fn extended_attributes_have_the_limits_and_errors_of_the_bare_directory() {
    let script = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(what, act):
    try: print(what, act())
    except OSError as error: print(what, error.errno)
def size(call, *arguments):
    ctypes.set_errno(0)
    return call(*arguments), ctypes.get_errno()
open('f', 'w').close()
os.mkdir('d'), os.symlink('f', 'l'), os.mkfifo('p')
for name in 'f', 'd':
    tried('none', lambda: os.getxattr(name, 'user.none'))
    tried('remove none', lambda: os.removexattr(name, 'user.none'))
    for value in b'', b'\0', b'x' * 255, b'y' * 2000:
        tried('set', lambda: os.setxattr(name, 'user.x', value))
        tried('get', lambda: os.getxattr(name, 'user.x'))
    tried('create', lambda: os.setxattr(name, 'user.x', b'z', os.XATTR_CREATE))
    tried('replace', lambda: os.setxattr(name, 'user.y', b'z', os.XATTR_REPLACE))
    tried('both', lambda: os.setxattr(name, 'user.x', b'z', os.XATTR_CREATE | os.XATTR_REPLACE))
    for length in 0, 1, 249, 250, 251, 300: tried(f'name {length}', lambda: os.setxattr(name, 'user.' + 'n' * length, b'v'))
    for length in 65535, 65536, 65537, 1 << 20: tried(f'value {length}', lambda: os.setxattr(name, 'user.big', b'v' * length))
    for other in '', 'x', 'user', 'user.', 'nothing.x', 'security.x', 'trusted.x', 'system.x':
        tried(f'name {other!r}', lambda: os.setxattr(name, other, b'v'))
    buffer = ctypes.create_string_buffer(1 << 17)
    for room in 0, 1, 1999, 2000, 65536, 65537, 1 << 17:
        print('room', room, size(libc.getxattr, name.encode(), b'user.x', buffer, ctypes.c_size_t(room)))
    for room in 0, 1, 10, 65536: print('list room', room, size(libc.listxattr, name.encode(), buffer, ctypes.c_size_t(room)))
    print(sorted(os.listxattr(name)))
for name in 'l', 'p':
    tried(name, lambda: os.setxattr(name, 'user.x', b'v', follow_symlinks=False))
    tried(name, lambda: os.getxattr(name, 'user.x', follow_symlinks=False))
    tried(name, lambda: os.listxattr(name, follow_symlinks=False))
os.chmod('.', 0o777), os.chmod('f', 0o666)
pid = os.fork()
if pid == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
    tried('nobody', lambda: sorted(os.listxattr('f')))
    tried('nobody', lambda: os.getxattr('f', 'trusted.x'))
    tried('nobody', lambda: os.setxattr('f', 'trusted.x', b''))
    tried('nobody', lambda: os.setxattr('f', 'user.nobody', b''))
    print(size(libc.listxattr, b'f', buffer, ctypes.c_size_t(0)), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"#;
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let said = mounted.as_bare(script);
        assert!(said.contains("trusted.x"), "{said}");
        mounted.end();
    }
}

#[test]
fn signals_with_handlers_interrupt_nothing() {
    let mounted = Mounted::new();
    let script = r#"
import ctypes, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
ticks = []
signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
page, wrong, done = ctypes.create_string_buffer(65536), [], 0
def call(name, wanted, *arguments):
    # Python itself would try again after EINTR.
    got = getattr(libc, name)(*arguments)
    if got != wanted: wrong.append((name, got, ctypes.get_errno()))
os.mkdir('d')
fd = os.open('f', os.O_RDWR | os.O_CREAT)
direct = os.open('f', os.O_RDWR | os.O_DIRECT)
until = time.monotonic() + 2
while time.monotonic() < until or ((done <= 20 or len(ticks) <= 100) and time.monotonic() < until + 60):
    at = ctypes.c_long(done % 16 * 65536)
    call('pwrite', 65536, fd, page, 65536, at)
    call('pread', 65536, fd, page, 65536, at)
    call('fdatasync', 0, fd)
    call('posix_fadvise', 0, fd, ctypes.c_long(0), ctypes.c_long(0), 4)
    call('pread', 65536, fd, page, 65536, at)
    call('rename', 0, b'd', b'e')
    call('rename', 0, b'e', b'd')
    call('mkdir', 0, b'd/x', 0o700)
    call('rmdir', 0, b'd/x')
    call('truncate', 0, b'f', ctypes.c_long(1 << 20))
    call('close', 0, libc.open(b'f', os.O_RDONLY))
    done += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(wrong[:5], len(ticks) > 100, done > 20)
"#;
    assert_eq!(mounted.as_bare(script), "[] True True\n");
    mounted.end();
}

#[test]
fn two_hundred_clients_killed_in_the_middle_of_things_leave_nothing() {
    let mounted = Mounted::new();
    let script = r#"
import fcntl, mmap, os, random, signal, time
random.seed(1)
for n in range(8):
    with open(f'f{n}', 'wb') as f: f.write(b'x' * 65536)
def work(n):
    fd = os.open(f'f{n % 8}', os.O_RDWR)
    m = mmap.mmap(fd, 65536)
    while True:
        os.pwrite(fd, b'y' * 30000, random.randrange(30000))
        m[random.randrange(65536)] = 1
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) if n >= 192 else None
        os.fsync(fd)
        name = f'n{n}'
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        os.rename(name, name + 'x'), os.listdir(), os.unlink(name + 'x')
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED), os.pread(fd, 65536, 0)
for n in range(0, 200, 4):
    pids = []
    for k in range(4):
        pid = os.fork()
        if pid == 0:
            signal.alarm(0)
            try: work(n + k)
            finally: os._exit(1)
        pids.append(pid)
    time.sleep(random.random() * 0.03)
    for pid in pids: os.kill(pid, 9)
    for pid in pids: assert os.waitpid(pid, 0)[1] == 9, 'killed, and by us'
"#;
    mounted.python(script, &[]);
    eventually("nothing is open", || mounted.health("open_files") == 0 && mounted.health("parked") == 0);
    std::fs::write(mounted.path("after"), "it goes on").unwrap();
    mounted.end();
}

#[test]
fn every_sort_of_sync_reaches_the_backing_file_before_the_reply() {
    let mounted = Mounted::new();
    let trace = Trace::of(&mounted, &[mounted.pid], &["-f", "-y", "-e", "trace=fsync,fdatasync"]);
    let script = r#"
import mmap, os, sys
backing, pid, trace = sys.argv[1:4]
os.mkdir('d')
page = mmap.mmap(-1, 4096)
seen = 0
def counted(what, calls, name, act):
    global seen
    act()
    # strace writes a call down before the daemon goes on from it, and so before it replies.
    new = open(trace).read().splitlines()[seen:]
    seen += len(new)
    found = [line for line in new if f'<{backing}/{name}>' in line and any(call + '(' in line for call in calls)]
    assert found, f'{what}: {new}'
    print(what, len(found), flush=True)
def opened(flags):
    return os.open('f', os.O_RDWR | os.O_CREAT | flags)
data, whole = ('fsync', 'fdatasync'), ('fsync',)
plain = opened(0)
os.pwritev(plain, [page], 0)
counted('fsync', whole, 'f', lambda: os.fsync(plain))
counted('fdatasync', data, 'f', lambda: os.fdatasync(plain))
d = os.open('d', os.O_RDONLY)
counted('fsync of a directory', whole, 'd', lambda: os.fsync(d))
counted('fdatasync of a directory', data, 'd', lambda: os.fdatasync(d))
for direct, word in (0, 'buffered'), (os.O_DIRECT, 'direct'):
    for flag, sync, calls in (os.O_SYNC, 'O_SYNC', whole), (os.O_DSYNC, 'O_DSYNC', data):
        fd = opened(flag | direct)
        counted(f'{word} {sync}', calls, 'f', lambda: os.pwritev(fd, [page], 0))
        counted(f'{word} {sync}, growing', calls, 'f', lambda: os.pwritev(fd, [page], os.fstat(fd).st_size))
        counted(f'{word} {sync}, fallocate', calls, 'f', lambda: os.posix_fallocate(fd, os.fstat(fd).st_size, 4096))
    fd = opened(direct)
    for flag, sync, calls in (os.RWF_SYNC, 'RWF_SYNC', whole), (os.RWF_DSYNC, 'RWF_DSYNC', data):
        counted(f'{word} {sync}', calls, 'f', lambda: os.pwritev(fd, [page], 0, flag))
m = mmap.mmap(plain, 8192)
m[0] = 1
counted('msync', data, 'f', m.flush)
"#;
    let said = mounted.python(script, &[&trace.output]);
    trace.end();
    assert_eq!(said.lines().count(), 21, "{said}");
    mounted.end();
}

#[test]
fn a_write_is_in_the_backing_file_when_it_returns() {
    let mounted = Mounted::new();
    let cached = File::create(mounted.path("f")).unwrap();
    let direct = OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(mounted.path("f")).unwrap();
    let mut append = OpenOptions::new().append(true).open(mounted.path("f")).unwrap();
    let below = File::open(mounted.backing.join("f")).unwrap();
    let mut end = 0;
    for round in 0..100u8 {
        for (file, at) in [(&cached, u64::from(round) * 777), (&direct, u64::from(round) * 4096)] {
            let data = vec![round; 3000 + usize::from(round)];
            file.write_all_at(&data, at).unwrap();
            let mut found = vec![0; data.len()];
            below.read_exact_at(&mut found, at).unwrap();
            assert_eq!(found, data);
            end = end.max(at + data.len() as u64);
        }
        append.write_all(&[round; 100]).unwrap();
        end += 100;
        assert_eq!(below.metadata().unwrap().size(), end);
        let mut found = [0; 100];
        below.read_exact_at(&mut found, end - 100).unwrap();
        assert_eq!(found, [round; 100]);
    }
    drop((cached, direct, append));
    mounted.end();
}

/// fuser 0.18 cannot represent the earliest times there are, and must not lose a reader over them.
#[test]
fn the_earliest_times_take_no_reader_away() {
    let mounted = Mounted::new();
    let script = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
open('f', 'w').close()
class Timespec(ctypes.Structure): _fields_ = [('sec', ctypes.c_long), ('nsec', ctypes.c_long)]
for sec in -2**63, -2**63 + 1, 2**63 - 1, -1, 0:
    for nsec in 0, 1, 999999999:
        for _ in range(4):
            times = (Timespec * 2)((sec, nsec), (sec, nsec))
            ctypes.set_errno(0)
            libc.utimensat(-100, b'f', times, 0)
            os.stat('f')
"#;
    // Who is served by a reader that ends is not answered.
    let dir = mounted.mountpoint.clone();
    let said = within(Duration::from_secs(30), move || python(&dir, script, [])).expect("each call is answered");
    assert_eq!(said.code, 0, "{said:?}");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", mounted.pid)).unwrap();
    let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    let readers = names.filter(|name| name.starts_with("fuser-")).count();
    assert_eq!(mounted.health("readers"), readers, "all readers live:\n{}", mounted.log_text());
    mounted.end();
}

/// Names are opened in their directory, whatever they are made of.
#[test]
fn a_client_without_a_name_for_its_directory_still_works_in_it() {
    let mounted = Mounted::new();
    std::fs::create_dir_all(mounted.path("a/b")).unwrap();
    let dir = File::open(mounted.path("a/b")).unwrap();
    std::fs::rename(mounted.backing.join("a"), mounted.backing.join("c")).unwrap();
    let flags = OFlag::O_CREAT | OFlag::O_RDWR;
    let file = openat(dir.as_fd(), OsStr::new("f"), flags, Mode::from_bits_truncate(0o600)).unwrap();
    File::from(file).write_all(b"in c").unwrap();
    let mut found = String::new();
    File::open(mounted.backing.join("c/b/f")).unwrap().read_to_string(&mut found).unwrap();
    assert_eq!(found, "in c");
    drop(dir);
    mounted.end();
}
