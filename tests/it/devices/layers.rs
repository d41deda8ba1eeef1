//! Claims on what lies above and below a device: a mount of ours on top, with rules and device modes on one stream; delays;
//! and the log of writes, replayed.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::bench::{Bench, DEVICE, read_block, write_block, write_synced};
use crate::support::sh;

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_mount_on_top_and_the_device_are_under_one_control() {
    let bench = Bench::new();
    bench.create_mounted();
    let fuse = bench.path("fuse");
    fs::create_dir(&fuse).expect("a directory");
    bench.cli(&["mount", &bench.word("mnt"), &bench.word("fuse"), "--instance", "n1"]);
    // By the daemon of the mount, which is the only one that a command finds.
    bench.cli(&["rule", "add", "eio", "--kind", "error", "--op", "fsync", "--errno", "ENOSPC", "--times", "1"]);
    let errno = |text| write_synced(&fuse.join("file"), text).expect_err("it fails").raw_os_error();
    assert_eq!(errno("a"), Some(libc::ENOSPC));
    bench.mode(&["error_writes"]);
    assert_eq!(errno("b"), Some(libc::EIO));
    bench.cli(&["rule", "rm", "eio"]);
    let text = bench.cli(&["events", "--format", "json"]);
    let events: Vec<serde_json::Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let told: Vec<&str> = events
        .iter()
        .filter_map(|event| match event["event"].as_str()? {
            "injection" => event["errno"].as_str(),
            "device" => event["mode"].as_str(),
            "rule" => event["action"].as_str(),
            _ => None,
        })
        .collect();
    assert_eq!(told, ["added", "ENOSPC", "error_writes", "removed"], "{text}");

    // The mount is in the way of a cut, which says how to end it, and does so if told: by another daemon.
    for words in [["device", "cut", "d0"], ["device", "remove", "d0"]] {
        let said = bench.refused(1, &[&["-H", "host"], &words[..]].concat());
        assert!(said.contains("instance n1") && said.contains("nemesisfs umount --instance n1"), "{said}");
    }
    let said = bench.refused(1, &["-H", "n1", "device", "cut", "d0", "--umount"]);
    assert!(said.contains("instance n1"), "{said}");
    assert_eq!(bench.status()["holders"][0]["instance"], "n1");
    let said = bench.cli(&["-H", "host", "device", "cut", "d0", "--umount", "--kill"]);
    assert!(said.contains("umount of mounts on top"), "{said}");
    fs::remove_dir(&fuse).expect("it is unmounted");
    assert!(bench.path("mnt/lost+found").is_dir(), "it is mounted again");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn delays_are_added_to_what_they_are_for() {
    let bench = Bench::new();
    bench.create_raw();
    let device = Path::new(DEVICE);
    let took = |act: &dyn Fn()| {
        let began = Instant::now();
        act();
        began.elapsed()
    };
    // The machine may stand still in one of them.
    let fastest = |act: &dyn Fn()| (0..3).map(|_| took(act)).min().expect("three");
    let write = || assert!(write_block(device, 0, b'a'));
    let read = || assert!(read_block(device, 0).is_some());
    bench.mode(&["delay", "--write", "1s"]);
    let (slow, fast) = (took(&write), fastest(&read));
    println!("write {slow:?}, read {fast:?}");
    assert!(slow >= Duration::from_secs(1) && fast < Duration::from_millis(900), "write {slow:?}, read {fast:?}");
    bench.mode(&["delay", "--read", "1s", "--for", "10s"]);
    let (fast, slow) = (fastest(&write), took(&read));
    assert!(slow >= Duration::from_secs(1) && fast < Duration::from_millis(900), "write {fast:?}, read {slow:?}");
    crate::support::eventually("the time has passed", || bench.status()["mode"] == "allow_writes");
    assert!(fastest(&read) < Duration::from_millis(900));
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn the_log_of_writes_gives_the_disk_at_each_mark() {
    let bench = Bench::new();
    bench.create(&["--size", "64MiB", "--mountpoint", "mnt", "--log-image", "d0.log", "--log-size", "256MiB"]);
    for name in ["one", "two"] {
        write_synced(&bench.path("mnt").join(name), name).expect("it is written");
        bench.cli(&["device", "mark", "d0", name]);
    }
    fs::write(bench.path("mnt/unsynced"), "not in the log").expect("it is written");
    bench.cli(&["device", "mark", "d0", "three"]);
    let at = bench.path("at");
    fs::create_dir(&at).expect("a directory");
    for (mark, there) in
        [("mkfs", &[] as &[&str]), ("one", &["one"]), ("two", &["one", "two"]), ("three", &["one", "two"])]
    {
        let image = bench.word("replayed");
        let said = bench.cli(&["device", "replay", "d0", "--to", mark, "--into", &image]);
        assert!(said.contains(&format!("undo: rm {image}")), "{said}");
        let found = sh(&format!(
            "mount -o loop {image} {0}; ls {0} | grep -v lost+found || true; umount {0}; e2fsck -fn {image} >&2",
            at.display()
        ));
        assert_eq!(found.code, 0, "{mark}: {found:?}");
        assert_eq!(found.out.lines().collect::<Vec<_>>(), there, "{mark}: {found:?}");
        let again = bench.refused(1, &["device", "replay", "d0", "--to", mark, "--into", &image]);
        assert!(again.contains("is there already"), "{again}");
        fs::remove_file(image).expect("the image");
    }
    let said = bench.refused(1, &["device", "replay", "d0", "--to", "four", "--into", "replayed"]);
    assert!(said.contains("mkfs one two three"), "{said}");
    fs::remove_dir(&at).expect("an empty directory");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_device_without_a_log_has_no_marks() {
    let bench = Bench::new();
    bench.create_raw();
    let said = bench.refused(1, &["device", "mark", "d0", "one"]);
    assert!(said.contains("logs no writes") && said.contains("--log-image"), "{said}");
    bench.refused(1, &["device", "replay", "d0", "--to", "one", "--into", "replayed"]);
    bench.end();
}
