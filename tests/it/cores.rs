//! Core dumps as systemd-coredump stores them. Hosts need not have systemd: these tests are for the systemd guest of the
//! lab (`tools/lab test --systemd`), one after the other.

use std::fs;

use crate::support::{eventually, sh};

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn the_guest_stores_cores() {
    let dir = tempfile::tempdir().expect("a directory");
    let core = dir.path().join("core");
    let crash = sh("sleep 60 & kill -SEGV $!; wait $! || echo $!");
    let dump = format!("coredumpctl --quiet --output={} dump {}", core.display(), crash.out);
    eventually("systemd-coredump has stored the core", || sh(&dump).code == 0);
    assert!(fs::read(&core).expect("the core").starts_with(b"\x7fELF"));
}
