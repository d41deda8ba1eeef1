//! What FUSE cannot pass: each statement of `docs/semantics.md` about it. When a kernel or fuser learns one of these, its
//! test fails, and the statement goes.

use std::process::Command;

use crate::support::{Mounted, Said};

/// Runs Python in the mount, with a descriptor `f` of a file of four pages; gives what it prints.
fn python(mounted: &Mounted, script: &str) -> String {
    let prelude = "
import ctypes, errno, fcntl, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def failed(result):
    return errno.errorcode[ctypes.get_errno()] if result == -1 else 'done'
def call(act):
    try:
        act()
        return 'done'
    except OSError as error:
        return errno.errorcode[error.errno]
f = os.open('f', os.O_RDWR | os.O_CREAT)
os.write(f, b'x' * 16384)
";
    let said: Said = Command::new("python3")
        .args(["-c", &format!("{prelude}{script}")])
        .current_dir(&mounted.mountpoint)
        .output()
        .expect("python3")
        .into();
    assert_eq!(said.code, 0, "{said:?}");
    said.out.trim().to_owned()
}

/// What the script prints on a new mount.
fn says(script: &str) -> String {
    let mounted = Mounted::new();
    let said = python(&mounted, script);
    mounted.end();
    said
}

#[test]
fn collapsing_and_inserting_ranges_is_refused() {
    let script = "
for mode in (0x08, 0x20):
    print(failed(libc.fallocate(f, mode, ctypes.c_long(4096), ctypes.c_long(4096))))";
    assert_eq!(says(script), "ENOTSUP\nENOTSUP");
}

#[test]
fn reflinks_are_refused() {
    assert_eq!(
        says("g = os.open('g', os.O_RDWR | os.O_CREAT)\nprint(call(lambda: fcntl.ioctl(g, 0x40049409, f)))"),
        "ENOTSUP"
    );
}

/// These do pass: a rename that leaves one behind, as a layer of overlayfs wants it.
#[test]
fn whiteouts_are_left_behind_by_a_rename() {
    let script = "
print(failed(libc.renameat2(-100, b'f', -100, b'g', 4)), os.stat('f').st_rdev, os.stat('f').st_mode & 0o170000 == 0o20000)";
    assert_eq!(says(script), "done 0 True");
}

#[test]
fn maps_of_extents_are_refused() {
    assert_eq!(says("print(call(lambda: fcntl.ioctl(f, 0xC020660B, bytes(32))))"), "ENOTSUP");
}

#[test]
fn files_without_a_name_are_refused() {
    assert_eq!(says("print(call(lambda: os.open('.', os.O_TMPFILE | os.O_RDWR)))"), "ENOTSUP");
}

#[test]
fn there_are_no_times_of_birth() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("f"), "x").unwrap();
    assert!(std::fs::metadata(mounted.backing.join("f")).unwrap().created().is_ok());
    assert!(std::fs::metadata(mounted.path("f")).unwrap().created().is_err());
    mounted.end();
}

/// A rule sees all that comes to us: nothing does.
#[test]
fn syncfs_and_sync_file_range_do_not_reach_us() {
    let mounted = Mounted::new();
    let script = "print(failed(libc.syncfs(f)), failed(libc.sync_file_range(f, ctypes.c_long(0), ctypes.c_long(0), 7)))
os.sync()";
    mounted.rule(
        "sync",
        serde_json::json!({"match": {"ops": ["fsync", "fsyncdir"]}, "fault": {"kind": "error", "errno": "EIO"}}),
    );
    assert_eq!(python(&mounted, script), "done done");
    assert_eq!(mounted.injections("sync").len(), 0);
    mounted.reset();
    mounted.end();
}

/// Reads that the kernel answers from its cache do not come to us, so the time of the last access stays.
#[test]
fn reads_from_the_cache_leave_the_time_of_access() {
    let mounted = Mounted::new();
    let script = "
os.pread(f, 100, 0)
os.utime('f', (1, 2))
os.pread(f, 100, 0)
print(os.stat('f').st_atime)";
    assert_eq!(python(&mounted, script), "1.0");
    mounted.end();
}

/// The kernel drops what such a call would do beside the change, and then has nothing to ask.
#[test]
fn a_chown_that_changes_nothing_leaves_suid() {
    let mounted = Mounted::new();
    let script = "
os.chmod('f', 0o4755)
os.chown('f', -1, -1)
print(oct(os.stat('f').st_mode & 0o7777))";
    assert_eq!(python(&mounted, script), "0o4755");
    mounted.end();
}

/// Where a program's buffer lies does not come with a request.
#[test]
fn direct_io_takes_a_buffer_of_any_alignment() {
    let script = "
import mmap
d = os.open('f', os.O_RDWR | os.O_DIRECT)
buffer = mmap.mmap(-1, 8192)
print(os.pwritev(d, [memoryview(buffer)[100:4196]], 0))";
    assert_eq!(says(script), "4096");
}
