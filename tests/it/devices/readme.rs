//! Claims of go-dmflakey's README, followed with our verbs: a power failure loses what was written and not synced, and
//! nothing else.

use std::fs;

use super::bench::{Bench, write_synced};
use crate::support::sh;

/// Its example: init, mount, write, drop writes, umount, allow writes, mount, check.
fn example(filesystem: &str, size: &str) {
    let bench = Bench::new();
    bench.create(&["--size", size, "--filesystem", filesystem]);
    let target = bench.path("target");
    fs::create_dir(&target).expect("a directory");
    let run = |script: &str| {
        let said = sh(script);
        assert_eq!(said.code, 0, "{script}: {said:?}");
    };
    let mount = format!("mount -t {filesystem} /dev/mapper/d0 {}", target.display());
    let umount = format!("umount {}", target.display());
    run(&mount);
    write_synced(&target.join("synced"), "stays").expect("it is written");
    fs::write(target.join("unsynced"), "is lost").expect("it is written");
    bench.mode(&["drop_writes"]);
    // fsync lies now.
    write_synced(&target.join("late"), "is lost too").expect("a lie");
    run(&umount);
    bench.mode(&["allow_writes"]);
    run(&mount);
    assert_eq!(fs::read_to_string(target.join("synced")).expect("the file"), "stays");
    assert_ne!(fs::read_to_string(target.join("unsynced")).unwrap_or_default(), "is lost");
    assert!(!target.join("late").exists());
    run(&umount);
    fs::remove_dir(&target).expect("an empty directory");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn on_ext4_what_was_not_synced_is_lost_and_what_was_stays() {
    example("ext4", "64MiB");
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn on_xfs_what_was_not_synced_is_lost_and_what_was_stays() {
    example("xfs", "300MiB");
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn on_btrfs_what_was_not_synced_is_lost_and_what_was_stays() {
    example("btrfs", "128MiB");
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn sync_fs_saves_what_was_written_before_also_without_freezing() {
    let bench = Bench::new();
    bench.create_mounted();
    for options in [&["--sync-fs"] as &[&str], &["--sync-fs", "--no-lockfs"]] {
        let name = options.join(" ");
        let file = bench.path("mnt").join(&name);
        fs::write(&file, "stays").expect("it is written");
        bench.mode(&[&["drop_writes"], options].concat());
        bench.cli(&["device", "cut", "d0"]);
        assert_eq!(fs::read_to_string(&file).expect("the file"), "stays", "{name}");
    }
    bench.end();
}
