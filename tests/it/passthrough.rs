//! `mount --passthrough`: files that the kernel serves by itself. What is in them is right however they are opened, and
//! a fault that cannot reach them is told.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::{Mounted, Said, Trace, eventually, executable, executable_in, is_mounted};

fn mounted() -> Mounted {
    let mounted = Mounted::with(&["--passthrough", "/fast/**"]);
    std::fs::create_dir(mounted.path("fast")).unwrap();
    mounted
}

/// What the daemon reads and writes of files while something is done.
fn seen(mounted: &Mounted, act: impl FnOnce()) -> usize {
    let trace = Trace::of(mounted, &[mounted.pid], &["-f", "-y", "-e", "trace=pread64,pwrite64"]);
    act();
    trace.end().iter().filter(|line| line.contains(mounted.backing.to_str().unwrap())).count()
}

/// The kernel tells of a last close after it, and not before.
fn all_closed(mounted: &Mounted) {
    eventually("all is closed", || mounted.health("open_files") == 0);
}

#[test]
fn contents_are_right_through_every_mix_of_opens() {
    let mounted = mounted();
    let script = r#"
import mmap, os
try: os.mkdir('fast')
except FileExistsError: pass
page = mmap.mmap(-1, 4096)
name = 'fast/f'
def opened(*flags): return [os.open(name, one) for one in flags]
created, = opened(os.O_RDWR | os.O_CREAT)
os.write(created, b'a' * 10000)
r, w, d, a = opened(os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_DIRECT, os.O_WRONLY | os.O_APPEND)
m = mmap.mmap(created, 8192)
def show():
    whole = os.pread(r, 1 << 20, 0)
    assert whole[:8192] == m[:] and os.pread(created, 1 << 20, 0) == whole
    os.preadv(d, [page], 0)
    assert page[:] == whole[:4096]
    sizes = {os.fstat(fd).st_size for fd in (created, r, w, d, a)} | {os.stat(name).st_size, os.lseek(r, 0, os.SEEK_END)}
    assert sizes == {len(whole)}, (sizes, len(whole))
    print(len(whole), whole[:5], whole[-5:])
show()
os.pwrite(w, b'w' * 10, 2); show()
page[:] = b'd' * 4096
os.pwritev(d, [page], 4096); show()
os.write(a, b'append'); show()
m[0:3] = b'map'; show()
pid = os.fork()
if pid == 0:
    other = os.open(name, os.O_RDWR | os.O_APPEND)
    n = mmap.mmap(other, 4096)
    assert n[0:3] == b'map'
    os.write(other, b'other'), n.__setitem__(slice(3, 6), b'two')
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
show()
os.ftruncate(w, 9000); show()
os.truncate(name, 12000); show()
os.posix_fallocate(w, 0, 16384); show()
os.copy_file_range(r, w, 100, 0, 15000); show()
for fd in created, w, d, a: os.close(fd)
w, = opened(os.O_RDWR | os.O_DSYNC)
os.pwrite(w, b'again', 0)
created = d = a = w
print(os.pread(r, 9, 0), m[:9])
os.close(r), os.close(w), m.close()
r, = opened(os.O_RDWR | os.O_TRUNC)
os.write(r, b'new')
os.link(name, 'fast/link'), os.unlink(name)
print(open('fast/link').read(), os.pread(r, 9, 0))
os.rename('fast/link', 'out')
print(open('out').read(), os.pread(r, 9, 0))
os.close(r)
print(open('out').read())
with open(name, 'wb') as f: f.write(bytes(range(256)) * 5000)
"#;
    mounted.as_bare(script);
    assert_eq!(std::fs::read(mounted.backing.join("fast/f")).unwrap(), std::fs::read(mounted.path("fast/f")).unwrap());
    assert_eq!(std::fs::read(mounted.backing.join("fast/f")).unwrap().len(), 256 * 5000);
    mounted.end();
}

#[test]
fn the_daemon_sees_nothing_of_their_reads_and_writes_and_all_of_others() {
    let mounted = mounted();
    let work = |name: &str| {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(mounted.path(name)).unwrap();
        for round in 0..20 {
            file.write_all_at(&[round; 4096], u64::from(round) * 4096).unwrap();
        }
        file.read_exact_at(&mut [0; 4096], 0).unwrap();
    };
    assert_eq!(seen(&mounted, || work("fast/f")), 0);
    assert!(seen(&mounted, || work("slow")) >= 20);
    // Reopened by others, while it is open and after that.
    let open = File::open(mounted.path("fast/f")).unwrap();
    let others = || (0..3).for_each(|_| work("fast/f"));
    assert_eq!(seen(&mounted, others), 0);
    drop(open);
    assert_eq!(seen(&mounted, others), 0);
    mounted.end();
}

#[test]
fn a_rule_that_cannot_reach_an_open_file_says_so_and_one_that_can_fires() {
    let mounted = mounted();
    let mut file = File::create(mounted.path("fast/f")).unwrap();
    let answer = mounted.error_rule("w", "write", "/fast/*", "EIO", None);
    let warnings = answer["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{answer}");
    let text = warnings[0].as_str().unwrap();
    assert!(text.contains("\"w\"") && text.contains("/fast/f") && text.contains("1 open handle"), "{text}");
    file.write_all(b"not seen").unwrap();
    assert!(mounted.injections("w").is_empty());
    // Its sync is seen; and so is what concerns neither reads nor writes.
    let answer = mounted.error_rule("s", "fsync", "/fast/*", "EIO", Some(1));
    assert_eq!(answer["warnings"], json!([]), "{answer}");
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.error_rule("t", "setattr", "/fast/*", "EPERM", Some(1));
    assert_eq!(file.set_len(3).unwrap_err().raw_os_error(), Some(libc::EPERM));
    // Another rule, about another file: no warning.
    let answer = mounted.error_rule("o", "write", "/other", "EIO", None);
    assert_eq!(answer["warnings"], json!([]), "{answer}");
    drop(file);
    all_closed(&mounted);
    // Opened anew while the rule is there, the file is ours, and the rule fires.
    let file = OpenOptions::new().write(true).open(mounted.path("fast/f")).unwrap();
    assert_eq!(file.write_at(b"seen", 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(mounted.injections("w").len(), 1);
    drop(file);
    mounted.end();
}

/// What is written past us, an undo log would not know, and cut off.
#[test]
fn nothing_is_lost_of_a_file_that_the_kernel_serves() {
    let mounted = mounted();
    let file = File::create(mounted.path("fast/f")).unwrap();
    file.write_all_at(&[1; 100], 0).unwrap();
    for op in ["truncate", "fallocate"] {
        let fault = json!({"match": {"ops": [op], "path": "/fast/*"}, "fault": {"kind": "drop"}});
        let answer = mounted.rule("r", fault);
        assert!(answer["warnings"].to_string().contains("/fast/f"), "{answer}");
        file.set_len(50).unwrap();
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 100).unwrap();
        file.write_all_at(&[2; 100_000], 100).unwrap();
        file.sync_all().unwrap();
        mounted.cli(&["evict"]);
        let kept = std::fs::read(mounted.backing.join("fast/f")).unwrap();
        assert!(kept.len() == 100_100 && kept[100..] == [2; 100_000], "{op}: {}", kept.len());
        assert!(mounted.injections("r").is_empty(), "{op}");
        assert_eq!(mounted.http("GET", "/v1/rules/r", None).body["injections"], 0, "{op}");
    }
    drop(file);
    all_closed(&mounted);
    // Opened anew it is ours, and its truncation can be lost.
    let file = OpenOptions::new().write(true).open(mounted.path("fast/f")).unwrap();
    mounted.rule("r", json!({"match": {"ops": ["truncate"], "path": "/fast/*"}, "fault": {"kind": "drop"}}));
    drop(file);
    all_closed(&mounted);
    let file = OpenOptions::new().write(true).open(mounted.path("fast/f")).unwrap();
    file.set_len(10).unwrap();
    mounted.cli(&["evict"]);
    assert_eq!(mounted.injections("r").len(), 1);
    assert_eq!(std::fs::metadata(mounted.backing.join("fast/f")).unwrap().len(), 100_100);
    drop(file);
    mounted.end();
}

#[test]
fn a_file_opened_under_a_rule_stays_ours_until_its_last_close() {
    let mounted = mounted();
    let path = mounted.path("fast/f");
    std::fs::write(&path, [1; 8192]).unwrap();
    mounted.error_rule("r", "read", "/fast/f", "EIO", None);
    let ours = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert_eq!(ours.read_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.reset();
    let flags = [0, libc::O_DIRECT, libc::O_APPEND];
    let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).unwrap();
    let mixed: Vec<File> = flags.into_iter().map(open).collect();
    let work = || {
        for (file, byte) in [&ours, &mixed[0]].into_iter().zip(1u8..) {
            file.write_all_at(&[byte; 100], 0).unwrap();
            let mut found = [0; 100];
            mixed[0].read_exact_at(&mut found, 0).unwrap();
            assert_eq!(found, [byte; 100]);
        }
    };
    assert!(seen(&mounted, work) > 0, "no handle is passed through beside one of ours");
    mounted.error_rule("w", "write", "/fast/f", "EIO", None);
    assert_eq!(mixed[0].write_at(b"x", 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.reset();
    drop((ours, mixed));
    all_closed(&mounted);
    let later = open(0);
    assert_eq!(seen(&mounted, || later.write_all_at(b"at full speed", 0).unwrap()), 0);
    assert_eq!(&std::fs::read(mounted.backing.join("fast/f")).unwrap()[..13], b"at full speed");
    drop(later);
    mounted.end();
}

#[test]
fn modes_and_capacities_reach_what_is_opened_from_then_on() {
    let mounted = mounted();
    let before = File::create(mounted.path("fast/before")).unwrap();
    let answer = mounted.http("PUT", "/v1/mode", Some(&json!({"mode": "error_writes"})));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.body["warnings"].to_string().contains("/fast/before"), "{answer:?}");
    let after = OpenOptions::new().write(true).open(mounted.path("fast/after"));
    assert!(after.is_err());
    mounted.reset();
    drop(before);
    std::fs::write(mounted.path("fast/f"), "x").unwrap();
    all_closed(&mounted);
    mounted.cli(&["space", "virtual", "--free", "0"]);
    let full = OpenOptions::new().append(true).open(mounted.path("fast/f")).unwrap().write_all(&[1; 1 << 16]);
    assert_eq!(full.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    mounted.reset();
    mounted.end();
}

#[test]
fn a_glob_without_a_leading_slash_matches_at_any_depth() {
    let mounted = Mounted::with(&["--passthrough", "*.wal", "--passthrough", "deep/*.log"]);
    std::fs::create_dir_all(mounted.path("a/b/deep")).unwrap();
    for (name, passed) in [
        ("x.wal", true),
        ("a/b/x.wal", true),
        ("a/b/deep/x.log", true),
        ("a/b/x.log", false),
        ("x.log", false),
        ("a/x.wal.not", false),
    ] {
        let calls = seen(&mounted, || std::fs::write(mounted.path(name), [1; 100]).unwrap());
        assert_eq!(calls == 0, passed, "{name}: {calls}");
        assert_eq!(std::fs::read(mounted.backing.join(name)).unwrap(), [1; 100]);
    }
    mounted.end();
}

#[test]
fn what_cannot_be_passed_through_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["backing", "mnt", "run", "."] {
        std::fs::create_dir_all(path(name)).unwrap();
        std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
    }
    let own = executable_in(dir.path());
    let start = |launcher: &[&str], glob: &str| -> Said {
        let words = [own.as_str(), "mount", &path("backing"), &path("mnt"), "--passthrough", glob].map(str::to_string);
        let mut command = Command::new(launcher[0]);
        command.args(&launcher[1..]).args(words).env("NEMESISFS_RUNDIR", path("run")).output().unwrap().into()
    };
    let user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+sys_admin,+dac_override",
        "--ambient-caps=+sys_admin,+dac_override",
    ];
    for (launcher, glob, code, word) in
        [(&["env"][..], "/fast/[", 2, "/fast/["), (&["env"], "{a,b", 2, "{a,b"), (&user[..], "/fast/**", 5, "root")]
    {
        let said = start(launcher, glob);
        if said.code == 0 {
            let _ =
                Command::new(executable()).args(["umount", &path("mnt")]).env("NEMESISFS_RUNDIR", path("run")).output();
        }
        assert_eq!(said.code, code, "{glob:?}: {said:?}");
        assert!(said.err.contains("error: ") && said.err.contains(word), "{glob:?}: {said:?}");
        assert!(!is_mounted(Path::new(&path("mnt"))), "{said:?}");
    }
}

/// The kernel would write it with our privileges, and leave them.
#[test]
fn a_file_with_suid_loses_it_by_a_write_of_somebody_else() {
    let mounted = mounted();
    let script = "
import os
fd = os.open('fast/f', os.O_RDWR | os.O_CREAT, 0o666)
os.fchmod(fd, 0o4777)
os.close(fd)
while True:
    # A file that was closed a moment ago can still be passed through.
    os.close(os.open('fast/f', os.O_RDONLY))
    if os.fork() == 0:
        os.setgid(65534), os.setuid(65534)
        fd = os.open('fast/f', os.O_WRONLY)
        os.write(fd, b'x')
        os._exit(0)
    os.wait()
    if os.stat(os.sys.argv[1] + '/fast/f').st_mode & 0o7777 == 0o777: break
";
    mounted.python(script, &[]);
    mounted.end();
}
