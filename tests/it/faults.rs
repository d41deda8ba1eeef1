//! What a program sees of a fault.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Mounted, eventually};

const TRIES: usize = 6;

/// Tries something again and again, as programs do; gives the errnos of those that failed.
fn errors(mut act: impl FnMut() -> std::io::Result<()>) -> Vec<i32> {
    (0..TRIES).filter_map(|_| act().err()).map(|error| error.raw_os_error().unwrap_or(0)).collect()
}

/// A file of random-looking bytes, not in any cache of the mount's kernel side.
fn prepared(mounted: &Mounted, name: &str, size: usize) -> Vec<u8> {
    let contents: Vec<u8> = (0..size).map(|i| (i * 7 + i / 4096) as u8).collect();
    std::fs::write(mounted.backing.join(name), &contents).unwrap();
    contents
}

fn exactly_one(mounted: &Mounted, op: &str, errors: &[i32]) {
    assert_eq!(errors, [libc::EIO], "the program sees exactly one error");
    let events = mounted.injections("once");
    let counted: Vec<_> = events.iter().filter(|event| event["repeat"] == false).collect();
    assert_eq!(counted.len(), 1, "one injection is counted: {events:?}");
    assert!(events.iter().all(|event| event["op"] == op && event["errno"] == "EIO"), "{events:?}");
    let rule = mounted.http("GET", "/v1/rules/once", None).body;
    assert_eq!((rule["injections"].as_u64(), rule["state"].as_str()), (Some(1), Some("exhausted")));
}

#[test]
fn one_error_is_one_for_a_buffered_read() {
    let mounted = Mounted::new();
    let contents = prepared(&mounted, "f", 1 << 20);
    mounted.error_rule("once", "read", "/f", "EIO", Some(1));
    let path = mounted.path("f");
    let failed = errors(|| {
        let mut data = Vec::new();
        File::open(&path)?.read_to_end(&mut data)?;
        assert_eq!(data, contents);
        Ok(())
    });
    exactly_one(&mounted, "read", &failed);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_buffered_read_through_one_handle() {
    let mounted = Mounted::new();
    let contents = prepared(&mounted, "f", 1 << 20);
    mounted.error_rule("once", "read", "/f", "EIO", Some(1));
    let file = File::open(mounted.path("f")).unwrap();
    let mut data = vec![0; 40_000];
    let failed = errors(|| file.read_exact_at(&mut data, 0));
    exactly_one(&mounted, "read", &failed);
    assert_eq!(data, contents[..40_000]);
    drop(file);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_random_read() {
    let mounted = Mounted::new();
    let contents = prepared(&mounted, "f", 1 << 20);
    mounted.error_rule("once", "read", "/f", "EIO", Some(1));
    let file = File::open(mounted.path("f")).unwrap();
    let mut data = [0; 512];
    let failed = errors(|| file.read_exact_at(&mut data, 531_000));
    exactly_one(&mounted, "read", &failed);
    assert_eq!(data, contents[531_000..531_512]);
    drop(file);
    mounted.end();
}

/// The error falls on the second part of one call: the call is short, and the program meets the error when it goes on.
#[test]
fn one_error_is_one_when_it_falls_into_the_middle_of_a_read() {
    let mounted = Mounted::new();
    let contents = prepared(&mounted, "f", 1 << 20);
    mounted.rule(
        "once",
        json!({
            "match": {"ops": ["read"], "path": "/f", "offset": "512KiB..516KiB"}, "trigger": {"times": 1},
            "fault": {"kind": "error", "errno": "EIO"},
        }),
    );
    let file = File::open(mounted.path("f")).unwrap();
    let (mut data, mut failed) = (vec![0; 1 << 20], Vec::new());
    let mut at = 0;
    while at < data.len() && failed.len() < TRIES {
        match file.read_at(&mut data[at..], at as u64) {
            Ok(read) => at += read,
            Err(error) => failed.push(error.raw_os_error().unwrap_or(0)),
        }
    }
    exactly_one(&mounted, "read", &failed);
    assert_eq!(data, contents);
    drop(file);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_cached_write() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    mounted.error_rule("once", "write", "/f", "EIO", Some(1));
    let failed = errors(|| file.write_all_at(&[7; 4096], 0));
    exactly_one(&mounted, "write", &failed);
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap(), [7; 4096]);
    drop(file);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_write_that_is_not_aligned() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 20_000);
    let file = OpenOptions::new().write(true).open(mounted.path("f")).unwrap();
    mounted.error_rule("once", "write", "/f", "EIO", Some(1));
    let failed = errors(|| file.write_all_at(&[7; 10_000], 100));
    exactly_one(&mounted, "write", &failed);
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap()[100..10_100], [7; 10_000]);
    drop(file);
    mounted.end();
}

/// The kernel cuts a large write into pieces of a megabyte.
#[test]
fn one_error_is_one_when_it_falls_into_the_middle_of_a_write() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    mounted.rule(
        "once",
        json!({
            "match": {"ops": ["write"], "path": "/f"}, "trigger": {"skip": 2, "times": 1},
            "fault": {"kind": "error", "errno": "EIO"},
        }),
    );
    let (data, mut failed, mut at) = (vec![7; 4 << 20], Vec::new(), 0);
    while at < data.len() && failed.len() < TRIES {
        match file.write_at(&data[at..], at as u64) {
            Ok(written) => at += written,
            Err(error) => failed.push(error.raw_os_error().unwrap_or(0)),
        }
    }
    exactly_one(&mounted, "write", &failed);
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap(), data);
    drop(file);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_direct_write() {
    let mounted = Mounted::new();
    let direct = OpenOptions::new().create(true).write(true).custom_flags(libc::O_DIRECT).open(mounted.path("f"));
    let file = direct.unwrap();
    mounted.error_rule("once", "write", "/f", "EIO", Some(1));
    let buffer = vec![7u8; 3 * 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let failed = errors(|| file.write_all_at(&buffer[start..start + 4096], 0));
    exactly_one(&mounted, "write", &failed);
    drop(file);
    mounted.end();
}

#[test]
fn one_error_is_one_for_a_load_from_a_mapping() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 1 << 20);
    mounted.error_rule("once", "read", "/f", "EIO", Some(1));
    // Each load is made by a child of its own, because the error is a signal.
    let script = "import mmap,os,sys\n\
        f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n\
        for i in range(6):\n\
        \x20p=os.fork()\n\
        \x20if p==0:\n\
        \x20 os._exit(m[300000]!=(300000*7+300000//4096)%256)\n\
        \x20print(os.waitstatus_to_exitcode(os.waitpid(p,0)[1]))";
    let said = Command::new("python3").args(["-c", script]).arg(mounted.path("f")).output().unwrap();
    let codes: Vec<i32> =
        String::from_utf8_lossy(&said.stdout).lines().filter_map(|line| line.trim().parse().ok()).collect();
    assert_eq!(codes.len(), TRIES, "{said:?}");
    let killed: Vec<i32> = codes.iter().copied().filter(|code| *code != 0).collect();
    assert_eq!(killed, [-libc::SIGBUS], "{codes:?}");
    exactly_one(&mounted, "read", &[libc::EIO]);
    mounted.end();
}

#[test]
fn one_error_is_one_for_an_fsync() {
    let mounted = Mounted::new();
    let mut file = File::create(mounted.path("f")).unwrap();
    file.write_all(b"data").unwrap();
    mounted.error_rule("once", "fsync", "/f", "EIO", Some(1));
    let failed = errors(|| file.sync_all());
    exactly_one(&mounted, "fsync", &failed);
    drop(file);
    mounted.end();
}

/// Three firings are three errors, and not one more: what one firing leaves in the kernel's cache is not counted twice.
#[test]
fn so_many_firings_are_so_many_errors() {
    for (op, flags) in [("read", 0), ("write", 0), ("read", libc::O_DIRECT), ("write", libc::O_DIRECT)] {
        let mounted = Mounted::new();
        prepared(&mounted, "f", 1 << 16);
        mounted.error_rule("thrice", op, "/f", "EIO", Some(3));
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(mounted.path("f")).unwrap();
        let mut buffer = vec![7u8; 3 * 4096];
        let start = buffer.as_ptr().align_offset(4096);
        let page = &mut buffer[start..start + 4096];
        let failed = (0..10).filter(|_| match op {
            "read" => file.read_at(page, 8192).is_err(),
            _ => file.write_at(page, 8192).is_err(),
        });
        assert_eq!(failed.count(), 3, "{op} {flags:o}");
        drop(file);
        mounted.end();
    }
}

/// Runs a Python program on a path; gives what it printed.
fn python(script: &str, path: &std::path::Path) -> String {
    let said = Command::new("python3").args(["-c", script]).arg(path).output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).trim().to_string()
}

/// Appends tell no offset, and vectors no length: the program still meets one error, at the start of some call.
#[test]
fn one_error_is_one_for_appends_and_vectors() {
    let append = "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND)\nn=0\n\
        for i in range(5):\n\
        \x20try: os.write(fd,b'x'*10000)\n\
        \x20except OSError as e: n+=1\n\
        print(n)";
    let vector = "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY)\nn=0\nat=0\n\
        while at<3<<20 and n<6:\n\
        \x20try: at+=os.pwritev(fd,[b'x'*((3<<20)-at)],at)\n\
        \x20except OSError as e: n+=1\n\
        print(n)";
    for (script, skip) in [(append, 0), (append, 2), (vector, 0), (vector, 1)] {
        let mounted = Mounted::new();
        prepared(&mounted, "f", 100);
        mounted.rule(
            "once",
            json!({
                "match": {"ops": ["write"], "path": "/f"}, "trigger": {"skip": skip, "times": 1},
                "fault": {"kind": "error", "errno": "EIO"},
            }),
        );
        assert_eq!(python(script, &mounted.path("f")), "1", "skip {skip}");
        mounted.end();
    }
}

/// Threads that wait for one page are served in any order: one of them gets the error.
#[test]
fn one_error_is_one_among_threads_that_read_the_same_page() {
    let script = "import os,sys,threading\nfd=os.open(sys.argv[1],os.O_RDONLY)\ne=[]\nb=threading.Barrier(4)\n\
        def r():\n\
        \x20b.wait()\n\
        \x20try: os.pread(fd,4096,8192)\n\
        \x20except OSError as x: e.append(x)\n\
        t=[threading.Thread(target=r) for i in range(4)]\n\
        [x.start() for x in t]\n[x.join() for x in t]\nprint(len(e))";
    for _ in 0..5 {
        let mounted = Mounted::new();
        prepared(&mounted, "f", 1 << 16);
        mounted.error_rule("once", "read", "/f", "EIO", Some(1));
        assert_eq!(python(script, &mounted.path("f")), "1");
        mounted.end();
    }
}

#[test]
fn pages_that_a_failed_read_left_behind_are_remembered_until_they_are_read() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 1 << 16);
    mounted.error_rule("twice", "read", "/f", "EIO", Some(2));
    let file = File::open(mounted.path("f")).unwrap();
    let mut page = [0; 4096];
    let mut failed = Vec::new();
    for pause in [0, 1300, 0, 0] {
        std::thread::sleep(Duration::from_millis(pause));
        failed.push(file.read_at(&mut page, 8192).is_err());
    }
    assert_eq!(failed, [true, true, false, false]);
    drop(file);
    mounted.end();
}

#[test]
fn a_rule_that_is_removed_owes_nothing() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    mounted.rule(
        "once",
        json!({
            "match": {"ops": ["write"]}, "trigger": {"skip": 1, "times": 1},
            "fault": {"kind": "error", "errno": "EIO"},
        }),
    );
    let data = vec![1; 3 << 20];
    let written = file.write_at(&data, 0).unwrap();
    assert_eq!(written, 1 << 20, "short: the second piece failed");
    mounted.cli(&["rule", "rm", "once"]);
    file.write_all_at(&data[written..], written as u64).unwrap();
    drop(file);
    mounted.end();
}

#[test]
fn a_drop_fires_only_on_what_can_be_lost() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 100);
    mounted.rule("lose", json!({"match": {"ops": ["data", "setattr"]}, "fault": {"kind": "drop"}}));
    std::fs::read(mounted.path("f")).unwrap();
    Command::new("chmod").arg("600").arg(mounted.path("f")).status().unwrap();
    assert!(mounted.injections("lose").is_empty());
    OpenOptions::new().write(true).open(mounted.path("f")).unwrap().set_len(10).unwrap();
    assert_eq!(mounted.injections("lose").len(), 1);
    mounted.end();
}

#[test]
fn a_rule_is_in_force_for_what_the_kernel_has_cached() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 1 << 16);
    let file = File::open(mounted.path("f")).unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 0).unwrap();
    file.read_exact_at(&mut page, 0).unwrap();
    mounted.error_rule("r", "read", "/f", "EIO", None);
    assert_eq!(file.read_at(&mut page, 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.reset();
    mounted.error_rule("g", "getattr", "/f", "EACCES", None);
    let stat = || std::fs::symlink_metadata(mounted.path("f"));
    assert_eq!(stat().unwrap_err().raw_os_error(), Some(libc::EACCES));
    mounted.reset();
    stat().unwrap();
    mounted.error_rule("l", "lookup", "/f", "EIO", None);
    assert_eq!(stat().unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.reset();
    stat().unwrap();
    drop(file);
    mounted.end();
}

#[test]
fn a_dropped_write_is_seen_until_it_is_evicted() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", 10_000);
    mounted.rule("lose", json!({"match": {"ops": ["write"], "path": "/f"}, "fault": {"kind": "drop"}}));
    let file = OpenOptions::new().read(true).write(true).open(mounted.path("f")).unwrap();
    file.write_all_at(&[1; 3000], 500).unwrap();
    file.write_all_at(&[2; 4000], 9_000).unwrap();
    file.sync_all().unwrap();
    let seen = std::fs::read(mounted.path("f")).unwrap();
    assert_eq!(seen.len(), 13_000);
    assert_eq!((&seen[500..3500], &seen[9000..]), (&[1; 3000][..], &[2; 4000][..]));
    assert!(mounted.injections("lose").len() >= 2, "one for each request that the kernel made");

    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mounted.path("f")).unwrap();
    let mut buffer = vec![0u8; 3 * 4096];
    let start = buffer.as_ptr().align_offset(4096);
    direct.read_exact_at(&mut buffer[start..start + 4096], 0).unwrap();
    assert_eq!(buffer[start..start + 4096], before[..4096], "a direct read sees the old bytes at once");

    let said = mounted.cli(&["evict", "/f"]);
    assert!(said.contains("/f"), "{said}");
    let mut after = before.clone();
    after.resize(13_000, 0);
    assert_eq!(std::fs::read(mounted.path("f")).unwrap(), after, "zeros where it had grown");
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 0).unwrap();
    assert_eq!(page, before[..4096], "also through the handle that wrote");
    drop((file, direct));
    mounted.end();
}

#[test]
fn a_dropped_write_is_gone_after_unmounting_and_a_kept_one_is_not() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", 10_000);
    let backing = std::fs::File::open(mounted.backing.join("f")).unwrap();
    mounted.cli(&["mode", "drop_writes"]);
    std::fs::write(mounted.path("f"), [9; 20_000]).unwrap();
    std::fs::write(mounted.path("new"), [9; 20_000]).unwrap();
    mounted.cli(&["mode", "allow_writes"]);
    let file = OpenOptions::new().write(true).open(mounted.path("f")).unwrap();
    file.write_all_at(b"kept", 100).unwrap();
    assert_eq!(std::fs::metadata(mounted.path("new")).unwrap().len(), 20_000);
    drop(file);
    let new = std::fs::File::open(mounted.backing.join("new")).unwrap();
    mounted.end();
    let mut after = before;
    after.resize(20_000, 0);
    after[100..104].copy_from_slice(b"kept");
    let mut found = vec![0; 20_000];
    let length = backing.read_at(&mut found, 0).unwrap();
    assert_eq!(found[..length], after);
    let length = new.read_at(&mut found, 0).unwrap();
    assert_eq!(found[..length], [0; 20_000], "a new file keeps its name and size");
}

#[test]
fn dropped_writes_to_a_file_that_is_gone_are_forgotten_with_it() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 10_000);
    prepared(&mounted, "g", 10_000);
    mounted.cli(&["mode", "drop_writes"]);
    for name in ["f", "g"] {
        std::fs::write(mounted.path(name), [9; 20_000]).unwrap();
        std::fs::remove_file(mounted.path(name)).unwrap();
    }
    std::fs::write(mounted.path("g"), b"another file").unwrap();
    let evicted = mounted.http("POST", "/v1/evict", Some(&json!({})));
    assert_eq!(evicted.status, 200, "{evicted:?}");
    assert_eq!(std::fs::read(mounted.path("g")).unwrap(), [0; 12], "made, and its write lost");
    assert!(!mounted.path("f").exists());
    mounted.end();
}

#[test]
fn a_latency_is_added_to_what_it_matches_and_to_nothing_else() {
    let mounted = Mounted::new();
    prepared(&mounted, "slow", 10);
    prepared(&mounted, "fast", 10);
    mounted.rule(
        "wait",
        json!({"match": {"ops": ["write"], "path": "/slow"}, "fault": {"kind": "latency", "delay": "300ms"}}),
    );
    let timed = |name: &str| {
        let file = OpenOptions::new().write(true).open(mounted.path(name)).unwrap();
        let start = Instant::now();
        file.write_all_at(b"x", 0).unwrap();
        start.elapsed()
    };
    assert!(timed("slow") >= Duration::from_millis(300));
    let fastest = (0..5).map(|_| timed("fast")).min().unwrap();
    assert!(fastest < Duration::from_millis(300), "{fastest:?}");
    let events = mounted.injections("wait");
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["delay_ns"], 300_000_000);
    mounted.end();
}

#[test]
fn a_program_killed_by_a_fault_of_its_mapping_leaves_the_mount_alone() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 8192);
    mounted.error_rule("r", "read", "/f", "EIO", None);
    let script = "import mmap,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); m[5000]";
    let status = Command::new("python3").args(["-c", script]).arg(mounted.path("f")).status().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS));
    eventually("an event", || !mounted.injections("r").is_empty());
    mounted.end();
}

#[test]
fn a_write_is_dropped_also_of_a_file_that_can_only_be_appended_to() {
    let mounted = Mounted::new();
    let below = mounted.backing.join("log");
    std::fs::write(&below, "old").unwrap();
    let change = |how: &str| assert!(Command::new("chattr").arg(how).arg(&below).status().unwrap().success());
    change("+a");
    let file = OpenOptions::new().append(true).open(mounted.path("log"));
    mounted.rule("lost", json!({"match": {"ops": ["write"]}, "fault": {"kind": "drop"}}));
    let written = file.and_then(|mut file| file.write_all(b"new"));
    let evicted = mounted.try_cli(&["evict"]);
    change("-a");
    written.unwrap();
    assert_eq!(mounted.injections("lost").len(), 1);
    // As long as it can only be appended to, nobody can take anything back.
    assert!(evicted.code == 1 && evicted.err.contains("/log"), "{evicted:?}");
    mounted.cli(&["evict"]);
    assert_eq!(std::fs::read(below).unwrap(), b"old\0\0\0");
    mounted.end();
}

#[test]
fn a_hole_takes_no_size_back_that_a_lost_truncation_gave() {
    for op in ["fallocate", "none"] {
        let mounted = Mounted::new();
        std::fs::write(mounted.backing.join("f"), vec![1; 8192]).unwrap();
        let file = OpenOptions::new().write(true).open(mounted.path("f")).unwrap();
        let lost = |ops: &[&str]| json!({"match": {"ops": ops}, "fault": {"kind": "drop"}});
        mounted.rule("lost", lost(&["truncate"]));
        file.set_len(65_536).unwrap();
        match op {
            "fallocate" => drop(mounted.rule("lost", lost(&["fallocate"]))),
            _ => drop(mounted.cli(&["rule", "rm", "lost"])),
        }
        let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&file, punch, 4096, 50_000).unwrap();
        mounted.cli(&["evict"]);
        let found = std::fs::read(mounted.backing.join("f")).unwrap();
        assert_eq!(found.len(), 8192, "{op}");
        assert_eq!(found[4096..].iter().all(|byte| *byte == 1), op == "fallocate", "a lost hole is none");
        mounted.rule("lost", lost(&["truncate"]));
        file.set_len(65_536).unwrap();
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 4096, 50_000).unwrap();
        mounted.cli(&["evict"]);
        assert_eq!(std::fs::metadata(mounted.backing.join("f")).unwrap().len(), 54_096, "{op}: so far it is allocated");
        drop(file);
        mounted.end();
    }
}
