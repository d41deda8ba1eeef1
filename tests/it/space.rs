//! Capacity: what succeeds on a full disk, what does not, and what the numbers say.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::Mounted;

fn full(mounted: &Mounted) {
    mounted.cli(&["space", "virtual", "--free", "0"]);
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

fn refusals(mounted: &Mounted) -> Vec<Value> {
    mounted.injections("space")
}

/// As on a full ext4: names can be made, blocks that are there can be written, nothing that needs a block works.
#[test]
fn at_zero_free_only_what_needs_no_block_succeeds() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let path = |name: &str| mounted.path(name);
        std::fs::write(path("old"), [1; 8192]).unwrap();
        let holed = File::create(path("holed")).unwrap();
        holed.set_len(1 << 20).unwrap();
        let log = File::create(path("log")).unwrap();
        nix::fcntl::fallocate(&log, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        full(&mounted);

        let old = OpenOptions::new().write(true).open(path("old")).unwrap();
        old.write_all_at(&[2; 8192], 0).unwrap();
        log.write_all_at(&[2; 4096], 500_000).unwrap();
        File::create(path("new")).unwrap();
        std::fs::hard_link(path("old"), path("link")).unwrap();
        std::os::unix::fs::symlink("old", path("symlink")).unwrap();
        std::fs::rename(path("link"), path("renamed")).unwrap();
        old.set_len(1 << 20).unwrap();

        assert_eq!(errno(holed.write_at(&[1; 4096], 4096)), Some(libc::ENOSPC), "into a hole");
        assert_eq!(errno(File::create(path("new")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC), "past the end");
        assert_eq!(errno(std::fs::create_dir(path("dir"))), Some(libc::ENOSPC));
        let more = nix::fcntl::fallocate(&log, nix::fcntl::FallocateFlags::empty(), 0, 2 << 20);
        assert_eq!(more, Err(nix::errno::Errno::ENOSPC));
        let events = refusals(&mounted);
        assert!(events.len() >= 4 && events.iter().all(|event| event["errno"] == "ENOSPC"), "{events:?}");

        mounted.cli(&["space", "clear"]);
        holed.write_all_at(&[1; 4096], 4096).unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        drop((old, holed, log));
        mounted.end();
    }
}

#[test]
fn a_write_that_half_fits_is_short_and_the_next_is_refused() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let file = File::create(mounted.path("f")).unwrap();
        mounted.cli(&["space", "virtual", "--free", "8KiB"]);
        assert_eq!(file.write_at(&[1; 20_000], 0).unwrap(), 8192);
        assert_eq!(errno(file.write_at(&[1; 20_000], 8192)), Some(libc::ENOSPC));
        assert_eq!(std::fs::read(mounted.path("f")).unwrap(), [1; 8192]);
        let events = refusals(&mounted);
        assert_eq!(events[0]["done"], 8192, "{events:?}");
        assert_eq!(events.last().unwrap()["errno"], "ENOSPC");
        drop(file);
        mounted.end();
    }
}

#[test]
fn freeing_counts_at_once_and_of_an_open_file_at_its_last_close() {
    let mounted = Mounted::in_memory();
    let path = |name: &str| mounted.path(name);
    std::fs::write(path("a"), [1; 65_536]).unwrap();
    std::fs::write(path("b"), [1; 65_536]).unwrap();
    std::fs::write(path("c"), [1; 65_536]).unwrap();
    full(&mounted);
    let free = || mounted.http("GET", "/v1/space", None).body["virtual"]["free"].as_u64().unwrap();
    assert_eq!(free(), 0);
    std::fs::remove_file(path("a")).unwrap();
    assert_eq!(free(), 65_536);
    let open = File::open(path("b")).unwrap();
    std::fs::remove_file(path("b")).unwrap();
    assert_eq!(free(), 65_536, "it is still open");
    drop(open);
    crate::support::eventually("the last close counts", || free() == 131_072);
    OpenOptions::new().write(true).open(path("c")).unwrap().set_len(4096).unwrap();
    assert_eq!(free(), 131_072 + 61_440);
    std::fs::write(path("d"), [1; 131_072 + 61_440]).unwrap();
    assert_eq!(free(), 0);
    mounted.end();
}

#[test]
fn statfs_agrees() {
    let mounted = Mounted::new();
    let available = || {
        let said = Command::new("df").args(["--output=avail", "-B1"]).arg(&mounted.mountpoint).output().unwrap();
        String::from_utf8_lossy(&said.stdout).lines().nth(1).unwrap().trim().parse::<u64>().unwrap()
    };
    assert!(available() > 0);
    mounted.cli(&["space", "virtual", "--free", "10MiB"]);
    assert_eq!(available(), 10 << 20);
    full(&mounted);
    assert_eq!(available(), 0);
    mounted.reset();
    assert!(available() > 0);
    mounted.end();
}

#[test]
fn size_and_used_count_the_tree() {
    let mounted = Mounted::in_memory();
    std::fs::write(mounted.path("a"), vec![1; 4 << 20]).unwrap();
    mounted.cli(&["space", "virtual", "--size", "10MiB"]);
    let account = || mounted.http("GET", "/v1/space", None).body["virtual"].clone();
    assert_eq!((account()["used"].as_u64(), account()["free"].as_u64()), (Some(4 << 20), Some(6 << 20)));
    mounted.cli(&["space", "virtual", "--used", "50%"]);
    assert_eq!((account()["size"].as_u64(), account()["free"].as_u64()), (Some(8 << 20), Some(4 << 20)));
    mounted.end();
}

/// FUSE asks nobody when a page is dirtied: the refusal comes when it is written back.
#[test]
fn a_store_into_a_hole_of_a_mapping_is_refused_at_msync() {
    let mounted = Mounted::new();
    let holed = File::create(mounted.path("f")).unwrap();
    holed.set_len(1 << 20).unwrap();
    full(&mounted);
    let script = "import mmap,sys\nf=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); m[5000]=1\n\
        try: m.flush(); print('ok')\nexcept OSError as e: print(e.errno)";
    let said = Command::new("python3").args(["-c", script]).arg(mounted.path("f")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), libc::ENOSPC.to_string());
    assert!(refusals(&mounted).iter().any(|event| event["pid"] == 0), "it is the kernel that writes back");
    drop(holed);
    mounted.end();
}

#[test]
fn the_mode_enospc_is_full_and_leaves_the_account_alone() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1MiB"]);
    mounted.cli(&["mode", "enospc"]);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    let events = mounted.injections("mode");
    assert_eq!((events.len(), events[0]["kind"].as_str()), (1, Some("space")), "{events:?}");
    let rule = mounted.http("GET", "/v1/rules/mode", None).body;
    assert_eq!(rule["injections"], 1);
    mounted.cli(&["mode", "allow_writes"]);
    std::fs::write(mounted.path("b"), [1; 8192]).unwrap();
    mounted.end();
}

#[test]
fn a_mode_ends_after_its_time() {
    let mounted = Mounted::new();
    mounted.cli(&["mode", "enospc", "--for", "500ms"]);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    crate::support::eventually("the mode ends", || {
        mounted.http("GET", "/v1/mode", None).body["mode"] == json!("allow_writes")
    });
    std::fs::write(mounted.path("a"), b"x").unwrap();
    mounted.end();
}

#[test]
fn a_rule_on_grow_fires_only_for_writes_that_need_space() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    file.write_all_at(&[1; 8192], 0).unwrap();
    mounted.error_rule("grow", "grow", "/**", "ENOSPC", None);
    file.write_all_at(&[2; 8192], 0).unwrap();
    assert_eq!(errno(file.write_at(&[2; 10], 8192)), Some(libc::ENOSPC));
    assert_eq!(mounted.http("GET", "/v1/rules/grow", None).body["matches"], 1);
    drop(file);
    mounted.end();
}

#[test]
fn what_has_blocks_of_its_own_is_taken_before_it_is_freed() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1MiB"]);
    let free = || mounted.http("GET", "/v1/space", None).body["virtual"]["free"].as_u64().unwrap();
    for _ in 0..20 {
        std::os::unix::fs::symlink("x".repeat(500), mounted.path("l")).unwrap();
        std::fs::remove_file(mounted.path("l")).unwrap();
    }
    assert_eq!(free(), 1 << 20);
    let script = "import os,sys; p=sys.argv[1]; open(p,'w').close(); os.setxattr(p,'user.a',b'x'*3000); os.unlink(p)";
    assert!(Command::new("python3").args(["-c", script]).arg(mounted.path("f")).status().unwrap().success());
    crate::support::eventually("the last close", || free() == 1 << 20);
    mounted.end();
}

#[test]
fn the_rule_space_can_be_seen_and_waited_for() {
    let mounted = Mounted::new();
    full(&mounted);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    let said = mounted.cli(&["rule", "wait", "space", "--for", "5s"]);
    assert!(said.contains("ENOSPC"), "{said}");
    assert!(mounted.cli(&["rule", "list"]).contains("space"));
    mounted.end();
}
