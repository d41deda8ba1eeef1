//! Claims on the end of a device: from every state, after every kill, twice, nothing of it is left, and nothing else is
//! touched.

use std::fs;

use serde_json::json;

use super::bench::Bench;
use crate::support::{eventually, sh};

/// All that the steps of a device with everything do.
const WITH_EVERYTHING: &[&str] =
    &["--size", "64MiB", "--mountpoint", "mnt", "--log-image", "d0.log", "--log-size", "64MiB"];

/// The commands of `create`, in their order.
const STEPS: &[&str] = &[
    "losetup * */d0.img",
    "losetup * */d0.log",
    "dmsetup create d0-log *",
    "dmsetup create d0 *",
    "mkfs.ext4 *",
    "dmsetup message d0-log 0 mark mkfs",
    "mount -t ext4 *",
];

fn create(bench: &Bench) -> i32 {
    let words = ["device", "create", "d0", "--image", "d0.img"];
    bench.try_cli(&[&words, WITH_EVERYTHING].concat()).code
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_daemon_killed_in_the_middle_of_create_leaves_nothing_that_remove_does_not_find() {
    let bench = Bench::new();
    // Before some of them something is made without a tool: images, and the mountpoint.
    let before = [STEPS[0], STEPS[1], STEPS[6]].map(|step| ("before", step));
    for (when, step) in before.into_iter().chain(STEPS.iter().map(|step| ("after", *step))) {
        bench.order(when, step);
        assert_eq!(create(&bench), 3, "{when} {step}");
        assert!(bench.is_obeyed(), "{when} {step}");
        for _ in 0..2 {
            bench.cli(&["device", "remove", "d0"]);
        }
        bench.check_clean();
    }
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn what_a_killed_daemon_left_half_made_another_one_takes_back() {
    let bench = Bench::new();
    bench.order("after", "mkfs.ext4 *");
    assert_eq!(create(&bench), 3);
    // Any command starts the next daemon.
    bench.cli(&["device", "status"]);
    eventually("it is taken back", || bench.left().is_empty());
    // And it can be made anew.
    assert_eq!(create(&bench), 0);
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_step_that_fails_takes_back_the_others() {
    let bench = Bench::new();
    for step in [STEPS[1], STEPS[3], STEPS[4], STEPS[6]] {
        bench.order("fail", step);
        let words = ["device", "create", "d0", "--image", "d0.img"];
        let said = bench.try_cli(&[&words, WITH_EVERYTHING].concat());
        assert!(said.code == 1 && said.err.contains("told to fail"), "{step}: {said:?}");
        assert!(bench.is_obeyed(), "{step}");
        bench.check_clean();
    }
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_device_goes_from_every_state_and_twice() {
    let bench = Bench::new();
    let states: &[&[&str]] = &[
        &["mode", "d0", "drop_writes"],
        &["mode", "d0", "error_all", "--up", "1s", "--down", "1s"],
        &["mode", "d0", "delay", "--write", "200ms"],
        &["suspend", "d0"],
    ];
    for state in states {
        bench.create_mounted();
        fs::write(bench.path("mnt/file"), "something").expect("it is written");
        bench.cli(&[&["device"], *state].concat());
        for _ in 0..2 {
            bench.cli(&["device", "remove", "d0"]);
        }
        bench.check_clean();
    }
    // In the middle of a removal.
    for step in ["umount *", "dmsetup remove * d0", "losetup --detach *"] {
        bench.create_mounted();
        bench.order("after", step);
        assert_eq!(bench.try_cli(&["device", "remove", "d0"]).code, 3, "{step}");
        assert!(bench.is_obeyed(), "{step}");
        bench.cli(&["device", "remove", "d0"]);
        bench.check_clean();
    }
    // After the machine's next start, the kernel has nothing of it.
    bench.create_mounted();
    let said = sh(&format!("umount {}; dmsetup remove d0; losetup --detach-all", bench.word("mnt")));
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(bench.status()["state"], "gone");
    bench.refused(1, &["device", "mode", "d0", "drop_writes"]);
    bench.end();
}

/// The words of `create` with these options.
fn create_words<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&["device", "create", "d0"], options].concat()
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn nothing_that_was_there_before_is_touched() {
    let bench = Bench::new();
    let run = |script: &str| {
        let said = sh(&format!("cd {}; {script}", bench.word("")));
        assert_eq!(said.code, 0, "{script}: {said:?}");
        said.out.trim().to_string()
    };
    // An image that is there: not without being told, and then it stays, with what is in it.
    run("truncate -s 16M image; mkfs.ext4 -q image; mkdir mnt; echo content >other");
    let new = ["--image", "image", "--size", "16MiB"];
    assert!(bench.refused(1, &create_words(&new)).contains("is there already"));
    let sum = run("md5sum image");
    bench.cli(&create_words(&["--image", "image", "--existing"]));
    bench.cli(&["device", "remove", "d0"]);
    assert_eq!(run("md5sum image"), sum);
    bench.cli(&create_words(&["--image", "image", "--existing", "--mountpoint", "mnt"]));
    run("echo new >mnt/new");
    bench.cli(&["device", "remove", "d0"]);
    run("mount -o loop image mnt; cat mnt/new; umount mnt");
    let with_filesystem = create_words(&["--image", "image", "--existing", "--filesystem", "ext4"]);
    assert!(bench.refused(1, &with_filesystem).contains("holds something: ext4"));

    // A disk: not while it is mounted, not with a filesystem on it, and afterwards it is there.
    let disk = run("losetup --find --show image");
    let on_disk = create_words(&["--device", &disk]);
    run(&format!("mount {disk} mnt"));
    let said = bench.refused(1, &on_disk);
    assert!(said.contains("is in use, mounted at") && said.contains("/mnt"), "{said}");
    assert!(bench.refused(1, &create_words(&["--image", "image", "--existing"])).contains("is in use"));
    assert!(
        bench
            .refused(1, &create_words(&["--image", "new", "--size", "8MiB", "--mountpoint", "mnt"]))
            .contains("mountpoint already")
    );
    run("umount mnt");
    let overwrite = create_words(&["--device", &disk, "--filesystem", "ext4"]);
    assert!(bench.refused(1, &overwrite).contains("holds something: ext4"));
    bench.cli(&[&overwrite[..], &["--force"]].concat());
    bench.cli(&["device", "remove", "d0"]);
    run(&format!("mount {disk} mnt; test ! -e mnt/new; umount mnt"));
    bench.refused(1, &create_words(&["--device", "other"]));

    // A mapping of another's: neither taken nor removed.
    run(&format!("dmsetup create d0 --table '0 2048 flakey {disk} 0 3600 0 0'"));
    assert!(bench.refused(1, &create_words(&["--image", "new", "--size", "8MiB"])).contains("not ours"));
    bench.cli(&["device", "remove", "d0"]);
    run("dmsetup info d0 >/dev/null; dmsetup remove d0");

    // A file that took the name of our image.
    bench.create_raw();
    run("rm d0.img; echo of another >d0.img");
    bench.cli(&["device", "remove", "d0"]);
    assert_eq!(run("cat d0.img other"), "of another\ncontent");
    // A mount that we did not make.
    run("rm d0.img");
    bench.create(&["--size", "16MiB"]);
    run("mount /dev/mapper/d0 mnt");
    assert!(bench.refused(1, &["device", "remove", "d0"]).contains("not by us"));
    assert_eq!(bench.status()["state"], json!("ready"));
    run("umount mnt");
    bench.cli(&["device", "remove", "d0"]);
    run(&format!("losetup --detach {disk}; rmdir mnt; rm image other"));
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn the_same_again_is_no_change_and_another_one_is_refused() {
    let bench = Bench::new();
    bench.create_mounted();
    fs::write(bench.path("mnt/file"), "stays").expect("it is written");
    bench.create_mounted();
    assert_eq!(fs::read_to_string(bench.path("mnt/file")).expect("the file"), "stays");
    let words = ["device", "create", "d0", "--image", "d0.img", "--size", "32MiB"];
    assert!(bench.refused(1, &words).contains("is there already"));
    bench.end();
}
