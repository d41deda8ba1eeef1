//! Where faults meet each other and what the kernel keeps: rules that change under load, errors of what was done, places
//! that are hit twice, files of several names, mounts below ours.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use serde_json::{Value, json};

use crate::calls::{
    Handle, Opened, PAGE, Way, armed, counted, errno, evict, number, once, patched, pattern, prepared, same, seen,
    stored,
};
use crate::support::{Mounted, eventually, is_mounted, sh};

const SIZE: usize = 4 * PAGE;

/// Stops the other threads of a test on every way out: one that fails must end, too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Release);
    }
}

/// Lets go whom a test that fails has left parked.
struct LetGo<'a>(&'a Mounted);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        let _ = self.0.try_cli(&["reset"]);
    }
}

fn after(ops: &[&str]) -> Value {
    json!({"match": {"ops": ops}, "fault": {"kind": "error", "errno": "EIO", "timing": "after"}})
}

#[test]
fn what_was_done_although_it_failed_is_what_the_program_sees_at_once() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let path = |name: &str| mounted.path(name);
    for name in ["gone", "old", "new"] {
        fs::write(path(name), name).unwrap();
    }
    fs::create_dir(path("dir")).unwrap();
    let names = ["gone", "old", "new", "dir"];
    names.iter().for_each(|name| assert!(path(name).exists()));
    let handle = Handle::open(Way::Cached, &mounted, "f");
    assert_eq!(handle.read(SIZE, 0).unwrap(), before);
    mounted.rule("r", after(&["unlink", "rmdir", "rename", "fallocate", "setattr", "copy_file_range"]));
    assert_eq!(errno(fs::remove_file(path("gone"))), libc::EIO);
    assert_eq!(errno(File::open(path("gone"))), libc::ENOENT);
    assert_eq!(errno(fs::remove_dir(path("dir"))), libc::EIO);
    assert_eq!(errno(fs::metadata(path("dir"))), libc::ENOENT);
    assert_eq!(errno(fs::rename(path("new"), path("old"))), libc::EIO);
    assert_eq!((fs::read_to_string(path("old")).unwrap(), path("new").exists()), ("new".into(), false));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&handle.file, punch, PAGE as i64, PAGE as i64), Err(nix::errno::Errno::EIO));
    let holed = patched(&before, PAGE, &[0; PAGE]);
    same(&handle.read(SIZE, 0).unwrap(), &holed, "after a hole");
    let other = File::create(path("copy")).unwrap();
    other.write_all_at(&[1; SIZE], 0).unwrap();
    let copied = nix::fcntl::copy_file_range(&handle.file, Some(&mut 0), &other, Some(&mut 0), SIZE);
    assert_eq!(copied, Err(nix::errno::Errno::EIO));
    same(&seen(&mounted, "copy"), &stored(&mounted, "copy"), "after a copy");
    same(&stored(&mounted, "copy"), &holed, "the copy");
    assert_eq!(errno(handle.file.set_len(100)), libc::EIO);
    assert_eq!(handle.file.metadata().unwrap().len(), 100);
    eventually("the pages are gone too", || handle.read(SIZE, 0).unwrap() == holed[..100]);
    assert_eq!(counted(&mounted, "r").len(), 6);
    drop((handle, other));
    mounted.end();
}

/// Each of eight writers meets one of two rules, or modes, whichever is in force.
#[test]
fn between_two_rules_nothing_slips_through() {
    let mounted = Mounted::new();
    let rule = |name: &str, errno: &str| json!({"name": name, "match": {"ops": ["write"]}, "fault": {"kind": "error", "errno": errno}});
    let put = |path: &str, body: Value| {
        let answer = mounted.http("PUT", path, Some(&body));
        assert!(answer.status < 300, "{answer:?}");
    };
    let files: Vec<File> = (0..8).map(|i| File::create(mounted.path(&format!("f{i}"))).unwrap()).collect();
    let change = |way: usize, round: usize| match way {
        0 => put("/v1/rules", json!({"rules": [rule(["a", "b"][round % 2], "EIO")]})),
        1 => put("/v1/rules/one", rule("one", ["EIO", "ENOSPC"][round % 2])),
        _ => put("/v1/mode", json!({"mode": (["error_writes", "error_all"][round % 2])})),
    };
    for way in 0..3 {
        change(way, 1);
        let (stop, failed, through) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for file in &files {
                scope.spawn(|| {
                    while !stop.load(Acquire) {
                        let count = if file.write_at(b"x", 0).is_ok() { &through } else { &failed };
                        count.fetch_add(1, Relaxed);
                    }
                });
            }
            let _stop = Stop(&stop);
            (0..100).for_each(|round| change(way, round));
        });
        assert!(through.into_inner() == 0 && failed.into_inner() > 0, "{way}");
        mounted.reset();
    }
    drop(files);
    mounted.end();
}

#[test]
fn a_fault_that_has_nothing_to_do_leaves_the_request_to_the_next_rule() {
    for fault in [
        json!({"kind": "short", "max_bytes": 10}),
        json!({"kind": "torn", "keep": 10}),
        json!({"kind": "corrupt", "mode": "byte", "nth": 11, "value": 1}),
        json!({"kind": "misdirect", "offset_delta": -4096}),
    ] {
        let mounted = Mounted::new();
        let file = File::create(mounted.path("f")).unwrap();
        mounted.rule("first", json!({"match": {"ops": ["write"]}, "fault": fault}));
        mounted.error_rule("second", "write", "/f", "EIO", None);
        assert_eq!(errno(file.write_at(b"five!", 0)), libc::EIO, "{fault}");
        assert_eq!(["matches", "injections"].map(|key| number(&mounted, "first", key)), [0, 0], "{fault}");
        drop(file);
        mounted.end();
    }
}

#[test]
fn a_write_that_goes_astray_onto_a_wrong_place_loses_nothing_of_what_that_should_have() {
    let to_first = json!({"kind": "misdirect", "to": 0});
    let [a, x, y] = [1, 2, 3].map(|salt| pattern(PAGE, salt));
    // Two writes go to the first page.
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let rule = json!({"match": {"ops": ["write"]}, "fault": to_first});
    let handle = armed(&mounted, "f", (Way::Cached, Opened::AfterArming), rule);
    assert!(handle.write(&x, PAGE as u64).is_ok() && handle.write(&y, 2 * PAGE as u64).is_ok());
    mounted.reset();
    mounted.cli(&["repair"]);
    same(&seen(&mounted, "f"), &patched(&patched(&before, PAGE, &x), 2 * PAGE, &y), "two went astray");
    drop(handle);
    mounted.end();
    // The first page was damaged before, or its write was lost.
    for (first, should) in [(json!({"kind": "corrupt", "mode": "zero"}), &a), (json!({"kind": "drop"}), &before)] {
        let mounted = Mounted::new();
        prepared(&mounted, "f", SIZE);
        let handle = armed(&mounted, "f", (Way::Cached, Opened::AfterArming), once("write", first.clone()));
        assert!(handle.write(&a, 0).is_ok());
        mounted.rule("r", once("write", to_first.clone()));
        assert!(handle.write(&x, PAGE as u64).is_ok());
        mounted.cli(&["repair"]);
        evict(&mounted);
        let wanted = patched(&patched(&before, 0, &should[..PAGE]), PAGE, &x);
        same(&seen(&mounted, "f"), &wanted, &first.to_string());
        drop(handle);
        mounted.end();
    }
}

#[test]
fn a_file_of_several_names_is_evicted_and_mended_by_any_of_them() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "a", PAGE);
    fs::hard_link(mounted.path("a"), mounted.path("b")).unwrap();
    for (kind, verb) in [(json!({"kind": "drop"}), "evict"), (json!({"kind": "corrupt"}), "repair")] {
        for name in ["/a", "/b"] {
            let file = OpenOptions::new().write(true).open(mounted.path("a")).unwrap();
            mounted.rule("r", once("write", kind.clone()));
            file.write_all_at(&before, 0).unwrap();
            drop(file);
            fs::metadata(mounted.path(if name == "/a" { "b" } else { "a" })).unwrap();
            if verb == "repair" {
                let said = mounted.cli(&["repair", "--list", name]);
                assert!(said.contains(&format!("{name} ")) || said.contains(&format!("{name}:")), "{said}");
            }
            let said = mounted.cli(&[verb, name]);
            assert!(said.contains("1 file"), "{verb} {name}: {said}");
            assert!(stored(&mounted, "a") == before);
            mounted.reset();
        }
    }
    mounted.end();
}

/// A handle that has no cache for the sake of a rule is a buffered reader all the same.
#[test]
fn buffered_readers_see_a_lost_write_also_while_reads_may_be_short() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", SIZE);
    mounted.rule("s", json!({"match": {"ops": ["read"]}, "fault": {"kind": "short", "max_bytes": "1MiB"}}));
    let handle = armed(&mounted, "f", (Way::Cached, Opened::AfterArming), once("write", json!({"kind": "drop"})));
    let data = pattern(PAGE, 1);
    assert!(handle.write(&data, 0).is_ok());
    same(&handle.read(PAGE, 0).unwrap(), &data, "by the same handle");
    same(&seen(&mounted, "f")[..PAGE], &data, "by another");
    drop(handle);
    mounted.end();
}

#[test]
fn a_cached_read_is_told_short_when_it_is_and_not_when_the_kernel_had_the_page() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 8 * PAGE);
    let handle = Handle::open(Way::Cached, &mounted, "f");
    posix_fadvise(&handle.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    mounted.rule("r", json!({"match": {"ops": ["read"]}, "fault": {"kind": "short", "max_bytes": PAGE}}));
    for page in [1, 2] {
        assert_eq!(handle.read(PAGE, page * PAGE as u64).unwrap().len(), PAGE);
    }
    let got = handle.read(3 * PAGE, 0).unwrap().len();
    let told = counted(&mounted, "r").len();
    assert_eq!((got < 3 * PAGE, told), (told == 1, usize::from(got < 3 * PAGE)), "{got} bytes, {told} events");
    let (again, before) = (handle.read(5 * PAGE, 0).unwrap().len(), told);
    let told = counted(&mounted, "r").len();
    assert!(again == 3 * PAGE && told == before + 1, "{again} bytes, {told} events");
    assert_eq!(number(&mounted, "r", "injections"), told as u64);
    drop(handle);
    mounted.end();
}

#[test]
fn arming_a_rule_on_names_leaves_mounts_below_and_those_who_work_there_alone() {
    let mounted = Mounted::new();
    let nest = mounted.path("dir/nest");
    fs::create_dir_all(&nest).unwrap();
    fs::write(mounted.path("dir/f"), "x").unwrap();
    let made = sh(&format!("mount -t tmpfs tmpfs {}", nest.display()));
    assert_eq!(made.code, 0, "{made:?}");
    let script = format!(
        "cd {0}/dir; exec 3<f; echo ready; read go; /bin/pwd; readlink /proc/self/fd/3; readlink /proc/self/cwd",
        mounted.mountpoint.display()
    );
    let mut shell = std::process::Command::new("sh");
    let pipes = shell.args(["-c", &script]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    for ops in [["lookup"], ["metadata"]] {
        mounted.rule("r", json!({"match": {"ops": ops}, "fault": {"kind": "latency", "delay": "1ns"}}));
        mounted.rule("a", json!({"fault": {"kind": "attr", "mtime": "-1day"}}));
    }
    mounted.rule("u", after(&["unlink"]));
    let still = is_mounted(&nest);
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    let _ = child.wait();
    sh(&format!("umount {}", nest.display()));
    let dir = mounted.path("dir").display().to_string();
    assert_eq!(rest, format!("{dir}\n{dir}/f\n{dir}\n"));
    assert!(still, "the mount below is there");
    mounted.reset();
    mounted.end();
}

#[test]
fn each_error_reaches_the_program_also_beside_a_delay_and_from_memory_that_is_not_there_yet() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    // A second piece of a write.
    let script = "import os, sys
fd = os.open('f', os.O_RDWR)
data, at, errors = bytes(2 << 20) if sys.argv[1] == 'fresh' else bytearray(b'x' * (2 << 20)), 0, 0
while at < len(data):
    try: at += os.pwrite(fd, data[at:] if at else data, at)
    except OSError: errors += 1; break
print(errors)";
    for (delay, memory) in [(false, "fresh"), (true, "there"), (false, "there"), (true, "fresh")] {
        if delay {
            mounted
                .rule("d", json!({"match": {"ops": ["write", "read"]}, "fault": {"kind": "latency", "delay": "1ms"}}));
        }
        let fault = json!({"kind": "error", "errno": "EIO"});
        mounted.rule("r", json!({"match": {"ops": ["write"]}, "trigger": {"skip": 1, "times": 1}, "fault": fault}));
        let errors: u64 = mounted.python(script, &[std::path::Path::new(memory)]).trim().parse().unwrap();
        assert_eq!(errors, number(&mounted, "r", "injections"), "{delay} {memory}");
        mounted.reset();
    }
    // A page that failed, was read well, and is forgotten by the kernel.
    let handle = Handle::open(Way::Cached, &mounted, "f");
    mounted.rule("d", json!({"match": {"ops": ["read"]}, "fault": {"kind": "latency", "delay": "1ms"}}));
    for well_between in [true, false] {
        let fault = json!({"kind": "error", "errno": "EIO"});
        let rule = |enabled: bool| json!({"match": {"ops": ["read"]}, "enabled": enabled, "fault": fault});
        mounted.rule("r", rule(true));
        let mut errors = u64::from(handle.read(5 * PAGE, 0).is_err());
        if well_between {
            mounted.rule("r", rule(false));
            assert!(handle.read(PAGE, 0).is_ok());
            mounted.rule("r", rule(true));
        }
        posix_fadvise(&handle.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        errors += u64::from(handle.read(5 * PAGE, 0).is_err());
        assert_eq!((errors, number(&mounted, "r", "injections")), (2, 2), "{well_between}");
        mounted.cli(&["rule", "rm", "r"]);
    }
    drop(handle);
    mounted.end();
}

#[test]
fn a_copy_is_reads_and_writes_also_where_another_rule_delays_it() {
    let mounted = Mounted::new();
    prepared(&mounted, "from", SIZE);
    let (from, to) = (File::open(mounted.path("from")).unwrap(), File::create(mounted.path("to")).unwrap());
    mounted.rule("d", json!({"match": {"ops": ["copy_file_range"]}, "fault": {"kind": "latency", "delay": "1ms"}}));
    mounted
        .rule("r", json!({"match": {"ops": ["write"], "path": "/to"}, "fault": {"kind": "corrupt", "mode": "zero"}}));
    assert_eq!(nix::fcntl::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), SIZE), Ok(SIZE));
    assert!(number(&mounted, "r", "injections") > 0);
    assert_eq!(stored(&mounted, "to"), vec![0; SIZE]);
    drop((from, to));
    mounted.end();
}

/// What a mapping writes back is not held apart from writes: it is lost while somebody appends.
#[test]
fn appends_beside_a_lost_page_of_a_mapping_are_there_after_an_eviction() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    mounted.rule("r", json!({"match": {"ops": ["write"], "offset": "0..4KiB"}, "fault": {"kind": "drop"}}));
    let script = "import os, mmap, threading, time
fd = os.open('f', os.O_RDWR)
m = mmap.mmap(fd, 4096)
end = time.time() + 3
def store():
    k = 0
    while time.time() < end:
        m[k % 4096] = 1; m.flush(); k += 1
t = threading.Thread(target=store); t.start()
a = os.open('f', os.O_WRONLY | os.O_APPEND)
count = 0
while time.time() < end: os.write(a, b'%06d' % count * 500); count += 1
t.join(); print(count)";
    let stop = AtomicBool::new(false);
    let count: usize = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Acquire) {
                mounted.http("POST", "/v1/evict", Some(&json!({})));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let _stop = Stop(&stop);
        mounted.python(script, &[]).trim().parse().unwrap()
    });
    evict(&mounted);
    let records: String = (0..count).map(|i| format!("{i:06}").repeat(500)).collect();
    same(&stored(&mounted, "f")[PAGE..], records.as_bytes(), &format!("{count} appends"));
    assert!(number(&mounted, "r", "injections") > 0);
    mounted.end();
}

/// What an eviction puts back has its blocks already: it gives none away to somebody who waits for them.
#[test]
fn an_eviction_on_a_full_disk_gives_back_what_was_there() {
    let mounted = Mounted::on_own_disk(16 << 20, &["mkfs.ext4", "-q"]);
    let before = prepared(&mounted, "f", 4 << 20);
    let file = OpenOptions::new().write(true).open(mounted.path("f")).unwrap();
    mounted.rule("r", json!({"match": {"path": "/f"}, "fault": {"kind": "drop"}}));
    (0..4).for_each(|i| file.write_all_at(&pattern(1 << 20, 1), i << 20).unwrap());
    file.sync_all().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let filler = File::create(mounted.backing.join("filler")).unwrap();
            let mut at = 0;
            while !stop.load(Acquire) {
                if filler.write_all_at(&[1; PAGE], at).is_ok() {
                    at += PAGE as u64;
                }
            }
        });
        let _stop = Stop(&stop);
        let free = || nix::sys::statvfs::statvfs(&mounted.backing).map_or(1, |statvfs| statvfs.blocks_available());
        // Asked once more it may be another number: ext4 takes back what it had set aside.
        eventually("it is full", || free() == 0);
        mounted.http("POST", "/v1/evict", Some(&json!({})));
    });
    same(&stored(&mounted, "f"), &before, "evicted");
    assert_eq!(fs::metadata(mounted.path("f")).unwrap().size(), 4 << 20);
    drop(file);
    mounted.end();
}

#[test]
fn a_reset_tells_how_many_requests_it_lets_go_which_are_listed_by_their_names_before() {
    let mounted = Mounted::new();
    let dirs: Vec<_> = (0..3).map(|i| mounted.path(&format!("d{i}"))).collect();
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    mounted.rule("r", json!({"match": {"ops": ["mkdir"]}, "fault": {"kind": "stall"}}));
    std::thread::scope(|scope| {
        dirs.iter().for_each(|dir| drop(scope.spawn(|| fs::create_dir(dir.join("new")).unwrap())));
        let _let_go = LetGo(&mounted);
        eventually("all are parked", || mounted.health("parked") == 3);
        let listed = mounted.http("GET", "/v1/requests", None).body;
        let mut paths: Vec<_> = listed["requests"].as_array().unwrap().iter().map(|one| one["path"].clone()).collect();
        paths.sort_by_key(Value::to_string);
        assert_eq!(paths, ["/d0/new", "/d1/new", "/d2/new"]);
        assert_eq!(mounted.http("POST", "/v1/reset", Some(&json!({}))).body["released"], 3);
    });
    assert_eq!(counted(&mounted, "r").len(), 3);
    mounted.end();
}

/// Whoever asked for it may be gone before it is done.
#[test]
fn a_reset_lets_requests_go_on_although_its_client_leaves() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", SIZE);
    let handle = Handle::open(Way::Cached, &mounted, "f");
    mounted.rule("r", json!({"match": {"ops": ["mkdir", "read"]}, "fault": {"kind": "stall"}}));
    // Of this one the kernel keeps something, which it is slow to forget while a read is open.
    mounted.rule("t", json!({"match": {"ops": ["read"]}, "fault": {"kind": "corrupt"}}));
    std::thread::scope(|scope| {
        let made = scope.spawn(|| errno(fs::create_dir(mounted.path("dir"))));
        let read = scope.spawn(|| errno(handle.read(PAGE, 0)));
        let _let_go = LetGo(&mounted);
        eventually("both are parked", || mounted.health("parked") == 2);
        let mut client = std::os::unix::net::UnixStream::connect(&mounted.socket).unwrap();
        let head = "POST /v1/reset HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";
        std::io::Write::write_all(&mut client, head.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        drop(client);
        std::thread::sleep(Duration::from_millis(50));
        // If it has come to nothing, this one does it.
        mounted.reset();
        assert_eq!((made.join().unwrap(), read.join().unwrap()), (0, 0));
    });
    assert!(mounted.path("dir").is_dir());
    assert_eq!(mounted.health("parked"), 0);
    drop(handle);
    mounted.reset();
    mounted.end();
}
