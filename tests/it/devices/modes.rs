//! Claims on the modes of a device: what each does to reads and writes, which go together, and how long they last.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::bench::{Bench, DEVICE, read_block, write_block, write_synced};
use crate::support::eventually;

fn device() -> &'static Path {
    Path::new(DEVICE)
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn each_mode_fails_what_its_name_says_and_nothing_else() {
    let bench = Bench::new();
    bench.create_raw();
    // Can be read, can be written, and then it is there.
    for (mode, reads, writes, stays) in [
        ("allow_writes", true, true, true),
        ("drop_writes", true, true, false),
        ("error_writes", true, false, false),
        ("error_reads", false, true, true),
        ("error_all", false, false, false),
    ] {
        bench.set("allow_writes");
        assert!(write_block(device(), 0, b'a'), "{mode}");
        bench.set(mode);
        assert_eq!(write_block(device(), 0, b'b'), writes, "{mode}");
        assert_eq!(read_block(device(), 0).is_some(), reads, "{mode}");
        bench.set("allow_writes");
        let expected = if stays { b'b' } else { b'a' };
        assert_eq!(read_block(device(), 0), Some(vec![expected; 4096]), "{mode}");
    }
    bench.mode(&["drop_writes", "--and", "error_reads"]);
    assert!(write_block(device(), 0, b'c') && read_block(device(), 0).is_none());
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn error_writes_is_eio_for_fsync_and_the_way_back_is_told() {
    let bench = Bench::new();
    bench.create_mounted();
    let file = bench.path("mnt/file");
    write_synced(&file, "well").expect("it is written");
    let said = bench.mode(&["error_writes"]);
    assert!(said.contains("dmsetup load d0") && said.contains("error_writes"), "{said}");
    assert!(said.contains("undo: nemesisfs device mode d0 allow_writes"), "{said}");
    let error = write_synced(&file, "not").expect_err("the disk fails");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(bench.status()["mode"], "error_writes");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn one_byte_is_changed_in_reads_or_in_writes() {
    let bench = Bench::new();
    bench.create_raw();
    assert!(write_block(device(), 0, 0));
    let byte = ["corrupt_bio_byte", "--nth", "32", "--value", "171", "--direction"];
    bench.mode(&[&byte as &[&str], &["read"]].concat());
    let read = read_block(device(), 0).expect("it can be read");
    let changed: Vec<usize> = (0..read.len()).filter(|i| read[*i] != 0).collect();
    assert_eq!((changed.as_slice(), read[31]), (&[31usize] as &[usize], 171));
    bench.set("allow_writes");
    assert_eq!(read_block(device(), 0), Some(vec![0; 4096]), "the disk has what was written");
    bench.mode(&[&byte as &[&str], &["write"]].concat());
    assert!(write_block(device(), 0, b'x'));
    bench.set("allow_writes");
    let read = read_block(device(), 0).expect("it can be read");
    let changed: Vec<usize> = (0..read.len()).filter(|i| read[*i] != b'x').collect();
    assert_eq!((changed.as_slice(), read[31]), (&[31usize] as &[usize], 171));
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn requests_are_corrupted_as_often_as_was_asked() {
    let bench = Bench::new();
    bench.create_raw();
    let blocks = 0..40;
    for nth in blocks.clone() {
        assert!(write_block(device(), nth, 0));
    }
    let damaged = || blocks.clone().filter(|nth| read_block(device(), *nth) != Some(vec![0; 4096])).count();
    assert_eq!(damaged(), 0);
    bench.mode(&["random_read_corrupt", "--probability", "0.5"]);
    let half = damaged();
    assert!((8..=32).contains(&half), "{half} of 40");
    bench.mode(&["random_write_corrupt", "--probability", "1"]);
    for nth in blocks.clone() {
        assert!(write_block(device(), nth, 0));
    }
    bench.set("allow_writes");
    // The random byte may be the right one: one of 256.
    assert!(damaged() >= 36, "{}", damaged());
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_time_ends_also_when_the_daemon_that_was_told_is_killed() {
    let bench = Bench::new();
    bench.create_mounted();
    let file = bench.path("mnt/file");
    bench.mode(&["error_writes", "--for", "6s"]);
    assert!(write_synced(&file, "not").is_err());
    eventually("the time has passed", || bench.status()["mode"] == "allow_writes");
    bench.cli(&["device", "cut", "d0"]);
    write_synced(&file, "well").expect("it is written");
    assert_eq!(bench.status()["remaining"], json!(null));

    // A mount is told, and another daemon lives.
    for name in ["backing", "fuse"] {
        fs::create_dir(bench.path(name)).expect("a directory");
    }
    bench.cli(&["mount", &bench.word("backing"), &bench.word("fuse"), "--instance", "n1"]);
    bench.cli(&["-H", "n1", "device", "mode", "d0", "error_writes", "--for", "10s"]);
    bench.kill("n1");
    assert!(write_synced(&file, "not").is_err());
    bench.cli(&["umount", &bench.word("fuse")]);
    for name in ["backing", "fuse"] {
        fs::remove_dir(bench.path(name)).expect("an empty directory");
    }
    eventually("another daemon has ended it", || bench.status()["mode"] == "allow_writes");
    bench.cli(&["device", "cut", "d0"]);
    write_synced(&file, "well").expect("it is written");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_time_ends_while_a_filesystem_is_made_or_synchronised() {
    let bench = Bench::new();
    bench.create_mounted();
    let is_held = |what| eventually(what, || bench.is_obeyed());
    std::thread::scope(|scope| {
        bench.hold("mkfs.ext4 *");
        let other = scope.spawn(|| bench.cli(&["device", "create", "d1", "--image", "d1.img", "--size", "16MiB"]));
        is_held("mkfs of another device");
        bench.mode(&["error_writes", "--for", "1s"]);
        eventually("the time has passed", || bench.status()["mode"] == "allow_writes");
        assert!(!other.is_finished(), "nothing was held");
        bench.let_go();
        other.join().expect("it is made");
        bench.cli(&["device", "remove", "d1"]);

        bench.hold("sync *");
        let syncing = scope.spawn(|| bench.mode(&["error_reads", "--sync-fs", "--no-lockfs"]));
        is_held("the synchronisation");
        bench.cli(&["device", "suspend", "d0", "--for", "1s"]);
        eventually("the time has passed", || bench.status()["suspended"] == false);
        assert!(!syncing.is_finished(), "nothing was held");
        bench.let_go();
        syncing.join().expect("the mode is set");
    });
    assert_eq!(bench.status()["mode"], "error_reads");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn what_cannot_be_ended_is_told_once_and_tried_again() {
    let bench = Bench::new();
    bench.create_raw();
    bench.order("never", "dmsetup load d0 * 3600 0 0");
    bench.mode(&["error_writes", "--for", "500ms"]);
    eventually("it is told", || bench.status()["trouble"].is_string());
    let told = || bench.log().matches("cannot be ended").count();
    let tried = Instant::now();
    eventually("it was tried again", || tried.elapsed() > Duration::from_millis(2500));
    assert_eq!(told(), 1, "{}", bench.log());
    assert!(bench.log().contains("not_ended"), "{}", bench.log());
    bench.countermand();
    eventually("it is ended", || bench.status()["mode"] == "allow_writes");
    assert_eq!(bench.status()["trouble"], json!(null));
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn the_kernel_cycles_between_up_and_down() {
    let bench = Bench::new();
    bench.create_raw();
    bench.mode(&["error_all", "--up", "1s", "--down", "1s"]);
    let until = Instant::now() + Duration::from_millis(5500);
    let mut seen = Vec::new();
    while Instant::now() < until {
        let is_up = read_block(device(), 0).is_some();
        if seen.last() != Some(&is_up) {
            seen.push(is_up);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(seen.len() >= 4, "{seen:?}");
    let status = bench.status();
    assert_eq!(status["command"], "error_all --up 1s --down 1s");
    assert!(status["table"].as_str().expect("a table").contains(" 1 1 "), "{status}");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_device_that_is_suspended_stalls_everything_and_fails_nothing() {
    let bench = Bench::new();
    bench.create_raw();
    assert!(write_block(device(), 0, b'a'));
    bench.cli(&["device", "suspend", "d0"]);
    let reader = std::thread::spawn(|| read_block(device(), 0));
    std::thread::sleep(Duration::from_millis(700));
    assert!(!reader.is_finished(), "it went through");
    assert_eq!(bench.status()["suspended"], true);
    // A mode that is set meanwhile is in force when it goes on.
    bench.set("error_reads");
    assert!(!reader.is_finished(), "it went on");
    assert_eq!((&bench.status()["mode"], &bench.status()["in_force"]), (&json!("error_reads"), &json!(false)));
    assert!(bench.cli(&["device", "status"]).contains("not in force: the kernel has 0 16384 flakey"));
    // Nothing could be saved, and the table would be there all the same.
    for how in [&["--sync-fs"] as &[&str], &["--sync-fs", "--no-lockfs"]] {
        let said = bench.refused(1, &[&["device", "mode", "d0", "drop_writes"], how].concat());
        assert!(said.contains("is suspended") && said.contains("nemesisfs device resume d0"), "{said}");
    }
    bench.cli(&["device", "resume", "d0"]);
    assert_eq!(bench.status()["in_force"], true);
    assert_eq!(reader.join().expect("it ends"), None, "the mode is in force");
    bench.cli(&["device", "resume", "d0"]);
    bench.set("allow_writes");
    let began = Instant::now();
    bench.cli(&["device", "suspend", "d0", "--for", "1s"]);
    assert_eq!(read_block(device(), 0), Some(vec![b'a'; 4096]));
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    assert_eq!(bench.status()["suspended"], false);
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_daemon_killed_while_the_device_stands_still_does_not_leave_it_so() {
    let bench = Bench::new();
    bench.create_raw();
    bench.order("after", "dmsetup suspend *");
    assert_eq!(bench.try_cli(&["device", "mode", "d0", "error_reads"]).code, 3);
    assert_eq!(bench.status()["mode"], "error_reads");
    eventually("another daemon goes on with it", || bench.status()["suspended"] == false);
    assert!(read_block(device(), 0).is_none(), "the mode is in force");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn what_the_kernel_forbids_or_lacks_is_refused_and_changes_nothing() {
    let bench = Bench::new();
    bench.create_raw();
    bench.mode(&["error_reads"]);
    let table = bench.status()["table"].clone();
    let refused = |code, words: &[&str]| bench.refused(code, &[&["device", "mode", "d0"], words].concat());
    let said = refused(1, &["drop_writes", "--and", "error_writes"]);
    assert!(said.contains("cannot be both dropped and failed"), "{said}");
    refused(1, &["drop_write"]);
    refused(1, &["error_all", "--up", "1s"]);
    refused(1, &["random_read_corrupt"]);
    // A kernel that does not know the feature: which one is found out by loading each.
    bench.order("never", "dmsetup load d0 *random_read_corrupt*");
    let said = refused(5, &["random_read_corrupt", "--and", "drop_writes", "--probability", "0.5"]);
    assert!(said.contains("has no random_read_corrupt\n"), "{said}");
    bench.countermand();
    let status = bench.status();
    assert_eq!((&status["table"], &status["mode"]), (&table, &json!("error_reads")));
    assert!(read_block(device(), 0).is_none(), "the mode is in force");
    bench.end();
}
