//! etcd on storage that is full or fails.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;

use super::server::{Server, free_ports, logged};
use crate::support::Mounted;

/// A cluster of one member with its data on the mount.
pub struct Etcd<'a> {
    mounted: &'a Mounted,
    pub log: PathBuf,
    client: String,
    peer: String,
}

impl<'a> Etcd<'a> {
    pub fn on(mounted: &'a Mounted) -> Etcd<'a> {
        let [client, peer] = free_ports().map(|port| format!("http://127.0.0.1:{port}"));
        Etcd { mounted, log: mounted.aside("etcd").join("etcd.log"), client, peer }
    }

    pub fn start(&self) -> Server {
        self.start_with(&[])
    }

    /// With more options.
    pub fn start_with(&self, options: &[&str]) -> Server {
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(self.mounted.path("etcd"));
        command.args(["--name", "one", "--logger", "zap", "--initial-cluster", &format!("one={}", self.peer)]);
        command.args(["--listen-client-urls", &self.client, "--advertise-client-urls", &self.client]);
        command.args(["--listen-peer-urls", &self.peer, "--initial-advertise-peer-urls", &self.peer]).args(options);
        Server::start(command, &self.log).ready(|| self.ctl(&["endpoint", "health"], "").status.success())
    }

    fn ctl(&self, words: &[&str], input: &str) -> Output {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.client, "--command-timeout", "15s"]).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("etcdctl; is etcd-client installed?");
        // It does not read its input when it cannot connect.
        let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
        child.wait_with_output().expect("its output")
    }

    /// Puts keys until one is not acknowledged: how many were.
    pub fn put(&self, keys: std::ops::Range<u32>, value: &str) -> u32 {
        let first = keys.start;
        let refused = keys.clone().find(|key| !self.ctl(&["put", &format!("key{key}")], value).status.success());
        refused.unwrap_or(keys.end) - first
    }

    pub fn keys(&self) -> u32 {
        let output = self.ctl(&["get", "key", "--prefix", "--keys-only"], "");
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("key")).count() as u32
    }
}

/// server/etcdserver/raft.go of etcd (etcdserver/raft.go in 3.4): what cannot be saved ends the process;
/// <https://github.com/etcd-io/etcd/issues/3347> for the same way of dying.
#[test]
fn etcd_dies_of_one_failed_fsync_of_its_log_without_acknowledging_and_loses_nothing() {
    let mounted = Mounted::new();
    let etcd = Etcd::on(&mounted);
    let mut server = etcd.start();
    assert_eq!(etcd.put(0..20, "value"), 20);
    mounted.error_rule("log-eio", "fsync", "/etcd/member/wal/0*.wal", "EIO", Some(1));
    assert_eq!(etcd.put(20..40, "value"), 0, "nothing is acknowledged after the error");
    assert!(!server.ended().success());
    let line = logged(&etcd.log, &["failed to save Raft hard state and entries"]);
    assert!(line.contains("input/output error"), "{line}");
    let injections = mounted.injections("log-eio");
    assert_eq!(injections.len(), 1, "{injections:?}");

    mounted.reset();
    let server = etcd.start();
    assert!(etcd.keys() >= 20, "{} keys", etcd.keys());
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// <https://github.com/etcd-io/etcd/issues/3347>: it ends when the disk is full; mvcc/backend/batch_tx.go: so does a backend
/// that cannot commit.
#[test]
fn etcd_on_a_full_disk_ends_and_names_the_reason_and_has_every_acknowledged_key_after() {
    let mounted = Mounted::new();
    let etcd = Etcd::on(&mounted);
    let mut server = etcd.start();
    let before = etcd.put(0..20, "value");
    assert_eq!(before, 20);
    mounted.cli(&["space", "virtual", "--free", "0"]);
    // Its log is preallocated, so that it takes some until the file of its keys has to grow.
    let after = etcd.put(20..120, &"x".repeat(500_000));
    assert!(after < 100, "all were acknowledged");
    assert!(!server.ended().success());
    logged(&etcd.log, &["no space left on device"]);
    let refused = mounted.injections("space");
    assert!(refused.iter().any(|event| event["errno"] == "ENOSPC"), "{refused:?}");

    mounted.cli(&["space", "clear"]);
    let server = etcd.start();
    let keys = etcd.keys();
    assert!(keys >= before + after, "{keys} keys, {} were acknowledged", before + after);
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// The same of a disk that is really full, of which nothing is ours but the files that fill it.
#[test]
fn etcd_on_a_disk_full_of_ballast_ends_and_names_the_reason_and_has_every_acknowledged_key_after() {
    let mounted = Mounted::on_own_disk(512 << 20, &["mkfs.ext4", "-q"]);
    let etcd = Etcd::on(&mounted);
    let mut server = etcd.start();
    let before = etcd.put(0..20, "value");
    assert_eq!(before, 20);
    mounted.cli(&["space", "ballast", "--until-free", "0"]);
    // Its log is preallocated, so that it takes some until the file of its keys has to grow.
    let after = etcd.put(20..120, &"x".repeat(500_000));
    assert!(after < 100, "all were acknowledged");
    assert!(!server.ended().success());
    logged(&etcd.log, &["no space left on device"]);
    assert!(mounted.injections("space").is_empty(), "it is the disk that refuses");

    mounted.cli(&["space", "clear"]);
    let server = etcd.start();
    let keys = etcd.keys();
    assert!(keys >= before + after, "{keys} keys, {} were acknowledged", before + after);
    server.stop(Signal::SIGTERM);
    mounted.end();
}
