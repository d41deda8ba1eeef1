//! Claims on power failures: what a database has acknowledged is there after a cut, who uses the device is told or killed,
//! and a cut that stops in the middle is finished by another one.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::bench::{Bench, write_synced};
use crate::support::{eventually, sh};

/// A shell script that runs until it is killed, with all that it has started.
struct Script(Child);

impl Script {
    fn start(script: &str) -> Script {
        let mut command = Command::new("sh");
        command.args(["-euc", script]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        Script(command.spawn().expect("sh runs"))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ =
            nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.0.id() as i32), nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn rows_that_sqlite_has_committed_are_there_after_a_cut() {
    let bench = Bench::new();
    bench.create_mounted();
    let (database, acknowledged) = (bench.word("mnt/db"), bench.word("acknowledged"));
    let query = |sql: &str| sh(&format!("sqlite3 {database} '{sql}'"));
    assert_eq!(query("create table t (n integer primary key, filling blob)").code, 0);
    // The working directory holds the mount when sqlite3 does not.
    let writer = Script::start(&format!(
        "cd {}; n=0; while :; do n=$((n + 1)); sqlite3 {database} \"insert into t values ($n, randomblob(9000))\"; echo $n >>{acknowledged}; done",
        bench.word("mnt")
    ));
    let committed = || fs::read_to_string(&acknowledged).unwrap_or_default().lines().count();
    eventually("the writer writes", || committed() >= 10);
    let began = Instant::now();
    let said = bench.cli(&["device", "cut", "d0", "--kill"]);
    println!("cut in {:?}", began.elapsed());
    assert!(said.contains("drop_writes, kill, umount, allow_writes, mount"), "{said}");
    drop(writer);
    let committed = committed();
    let there = query("pragma integrity_check; select count(*) from t");
    let rows: usize = there.out.lines().last().and_then(|line| line.parse().ok()).expect("a number");
    println!("{committed} rows were acknowledged, {rows} are there");
    assert!(there.out.starts_with("ok\n"), "{there:?}");
    assert!(rows >= committed && rows <= committed + 1, "{rows} rows of {committed}");
    fs::remove_file(&acknowledged).expect("the file");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn keys_that_etcd_has_acknowledged_are_there_after_a_cut() {
    let bench = Bench::new();
    bench.create(&["--size", "256MiB", "--mountpoint", "mnt"]);
    let data = bench.word("mnt/etcd");
    let etcd = || {
        Script::start(&format!(
            "exec etcd --data-dir {data} --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
             --listen-peer-urls http://127.0.0.1:2380 --logger zap --log-level error 2>{}",
            bench.word("etcd.log")
        ))
    };
    let etcdctl = |words: &str| sh(&format!("ETCDCTL_API=3 etcdctl --command-timeout=20s {words}"));
    let server = etcd();
    eventually("etcd answers", || etcdctl("endpoint health").code == 0);
    let mut acknowledged = 0;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until || acknowledged < 5 {
        let said = etcdctl(&format!("put key{acknowledged} value{acknowledged}"));
        assert_eq!(said.code, 0, "{said:?}");
        acknowledged += 1;
    }
    bench.cli(&["device", "cut", "d0", "--kill"]);
    drop(server);
    let server = etcd();
    eventually("etcd answers again", || etcdctl("endpoint health").code == 0);
    println!("{acknowledged} keys were acknowledged");
    for n in 0..acknowledged {
        let said = etcdctl(&format!("get --print-value-only key{n}"));
        assert_eq!(said.out.trim(), format!("value{n}"), "{said:?}");
    }
    drop(server);
    fs::remove_file(bench.path("etcd.log")).expect("the file");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn who_uses_the_device_is_told_and_nothing_is_done_to_it() {
    let bench = Bench::new();
    bench.create_mounted();
    let user = Script::start(&format!("cd {}; exec sleep 100", bench.word("mnt")));
    let pid = user.0.id().to_string();
    eventually("it is there", || bench.status()["holders"][0]["pid"] == json!(user.0.id()));
    for words in [["device", "cut", "d0"], ["device", "remove", "d0"]] {
        let said = bench.refused(1, &words);
        assert!(said.contains(&pid) && said.contains("(sleep)") && said.contains("--kill"), "{said}");
    }
    let status = bench.status();
    assert_eq!((&status["mode"], &status["state"]), (&json!("allow_writes"), &json!("ready")));
    assert_eq!(nix::sys::signal::kill(nix::unistd::Pid::from_raw(user.0.id() as i32), None), Ok(()));
    drop(user);
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_filesystem_that_lives_on_elsewhere_is_not_taken_for_a_new_one() {
    let bench = Bench::new();
    bench.create_mounted();
    write_synced(&bench.path("mnt/synced"), "stays").expect("it is written");
    // Its name may have got there with the journal.
    let only_synced = || {
        assert!(bench.path("mnt/synced").exists());
        assert_ne!(fs::read_to_string(bench.path("mnt/unsynced")).unwrap_or_default(), "is lost");
    };
    let user = Script::start(&format!("cd {}; exec sleep 100", bench.word("mnt")));
    eventually("it is there", || bench.status()["holders"][0]["pid"] == json!(user.0.id()));
    fs::write(bench.path("mnt/unsynced"), "is lost").expect("it is written");
    let said = bench.refused(1, &["device", "cut", "d0", "--lazy"]);
    assert!(said.contains("still in use") && said.contains("drops writes"), "{said}");
    drop(user);
    bench.cli(&["device", "cut", "d0"]);
    only_synced();
    // A mount namespace that has a copy of the mount, and which no umount here reaches.
    let other = Script::start("exec unshare --mount --propagation private sleep 100");
    let comm = || fs::read_to_string(format!("/proc/{}/comm", other.0.id())).unwrap_or_default();
    eventually("it is there", || comm() == "sleep\n");
    let said = bench.refused(1, &["device", "remove", "d0"]);
    assert!(said.contains("mount namespace of process") && said.contains("(sleep)"), "{said}");
    assert_eq!(bench.status()["state"], "ready");
    fs::write(bench.path("mnt/unsynced"), "is lost").expect("it is mounted as before");
    let said = bench.refused(1, &["device", "cut", "d0"]);
    assert!(said.contains("mount namespace of process") && said.contains("drops writes"), "{said}");
    drop(other);
    bench.cli(&["device", "cut", "d0"]);
    only_synced();
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_cut_that_stops_in_the_middle_says_where_and_another_one_finishes_it() {
    let bench = Bench::new();
    bench.create_mounted();
    write_synced(&bench.path("mnt/synced"), "stays").expect("it is written");
    for what in ["umount *", "dmsetup load * 3600 0 0", "mount *"] {
        fs::write(bench.path("mnt/unsynced"), "is lost").expect("it is written");
        bench.order("fail", what);
        let said = bench.refused(1, &["device", "cut", "d0"]);
        assert!(bench.is_obeyed() && said.contains("told to fail") && said.contains("drops writes"), "{what}: {said}");
        assert_eq!(bench.status()["state"], "cutting", "{what}");
        bench.cli(&["device", "cut", "d0"]);
        let status = bench.status();
        assert_eq!((&status["state"], &status["mode"]), (&json!("ready"), &json!("allow_writes")), "{what}");
        assert_eq!(fs::read_to_string(bench.path("mnt/synced")).expect("the file"), "stays", "{what}");
        assert_ne!(fs::read_to_string(bench.path("mnt/unsynced")).unwrap_or_default(), "is lost", "{what}");
    }
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn who_was_stopped_for_a_cut_whose_daemon_is_killed_goes_on() {
    let bench = Bench::new();
    bench.create_mounted();
    let user = Script::start(&format!("cd {}; exec sleep 1000", bench.word("mnt")));
    let stat = || fs::read_to_string(format!("/proc/{}/stat", user.0.id())).unwrap_or_default();
    eventually("it is there", || bench.status()["holders"][0]["comm"] == "sleep");
    bench.order("before", "dmsetup load * drop_writes");
    assert_eq!(bench.try_cli(&["device", "cut", "d0", "--kill"]).code, 3);
    assert!(bench.is_obeyed() && stat().contains(" (sleep) T "), "{}", stat());
    let status = bench.status();
    assert_eq!((&status["state"], &status["in_force"]), (&json!("cutting"), &json!(false)));
    eventually("it goes on", || stat().contains(" (sleep) S "));
    let said = bench.cli(&["device", "cut", "d0", "--kill"]);
    assert!(said.contains("drop_writes, kill, umount, allow_writes, mount"), "{said}");
    drop(user);
    assert_eq!(bench.status()["state"], "ready");
    bench.end();
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn a_cut_whose_daemon_is_killed_is_finished_by_another_one() {
    let bench = Bench::new();
    bench.create_mounted();
    for (when, what) in [
        ("after", "dmsetup suspend *"),
        ("after", "umount *"),
        ("after", "dmsetup load * 3600 0 0"),
        ("after", "mount *"),
    ] {
        fs::write(bench.path("mnt/unsynced"), "is lost").expect("it is written");
        bench.order(when, what);
        assert_eq!(bench.try_cli(&["device", "cut", "d0"]).code, 3, "{when} {what}");
        assert!(bench.is_obeyed(), "{when} {what}");
        bench.cli(&["device", "cut", "d0"]);
        let status = bench.status();
        assert_eq!((&status["state"], &status["mode"]), (&json!("ready"), &json!("allow_writes")), "{when} {what}");
        assert_eq!(status["mounts"], json!([bench.path("mnt")]), "{when} {what}");
        assert_ne!(fs::read_to_string(bench.path("mnt/unsynced")).unwrap_or_default(), "is lost", "{when} {what}");
    }
    bench.end();
}
