//! A run directory and a state directory for one test of devices, with the daemons that live in them.
//!
//! [`Bench::end`] removes the devices and checks that no mapping, loop device, mount or file is left; the drop of a test
//! that has failed removes them as well as it can.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Said, eventually, executable, is_alive, request, sh};

/// Tools that a test can make fail, or die of.
const TOOLS: &[&str] = &["losetup", "dmsetup", "mkfs.ext4", "mount", "umount", "blockdev", "sync"];

pub struct Bench {
    dir: tempfile::TempDir,
    ended: bool,
}

impl Bench {
    pub fn new() -> Bench {
        let dir = tempfile::Builder::new().prefix("nemesisfs-test-").tempdir().expect("a directory");
        let bench = Bench { dir, ended: false };
        fs::create_dir(bench.path("tools")).expect("a directory");
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path as a word of a command.
    pub fn word(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path").into()
    }

    /// What a daemon finds before the tool itself: it does as `order` says, once, and the tool otherwise.
    fn make_tool(&self, tool: &str) {
        let (order, held, place) = (self.word("order"), self.word("held"), self.path("tools").join(tool));
        let script = format!(
            r#"#!/bin/sh
read -r when what <{order} 2>/dev/null
real=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v {tool})
case "{tool} $*" in
    $what)
        case $when in never) echo "told to fail" >&2; exit 1 ;; esac
        rm -f {order}
        case $when in
            before) kill -9 $PPID; exit 1 ;;
            after) "$real" "$@"; kill -9 $PPID; exit 1 ;;
            fail) echo "told to fail" >&2; exit 1 ;;
            hold) while [ -e {held} ]; do sleep 0.1; done ;;
        esac ;;
esac
exec "$real" "$@"
"#
        );
        fs::write(&place, script).expect("a script");
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("permissions");
    }

    /// The daemon is killed `before` or `after` the first command that looks so, or it does `fail`; or all that look so
    /// `never` succeed.
    pub fn order(&self, when: &str, what: &str) {
        TOOLS.iter().for_each(|tool| self.make_tool(tool));
        fs::write(self.path("order"), format!("{when} {what}\n")).expect("a file");
    }

    /// The first command that looks so waits until [`Bench::let_go`].
    pub fn hold(&self, what: &str) {
        fs::write(self.path("held"), "").expect("a file");
        self.order("hold", what);
    }

    pub fn let_go(&self) {
        fs::remove_file(self.path("held")).expect("one that is held");
    }

    pub fn countermand(&self) {
        fs::remove_file(self.path("order")).expect("an order");
    }

    pub fn is_obeyed(&self) -> bool {
        !self.path("order").exists()
    }

    pub fn try_cli(&self, words: &[&str]) -> Said {
        let path = format!("{}:{}", self.word("tools"), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(executable());
        command.args(words).env("PATH", path).env_remove("NEMESISFS_HOST").current_dir(self.dir.path());
        command.env("NEMESISFS_RUNDIR", self.path("run")).env("NEMESISFS_STATEDIR", self.path("state"));
        command.output().expect("the program runs").into()
    }

    /// It must succeed.
    pub fn cli(&self, words: &[&str]) -> String {
        let said = self.try_cli(words);
        assert_eq!(said.code, 0, "nemesisfs {}: {said:?}\n{}", words.join(" "), self.log());
        said.out
    }

    /// It must be refused, with this exit code. Gives what it says.
    pub fn refused(&self, code: i32, words: &[&str]) -> String {
        let said = self.try_cli(words);
        assert_eq!(said.code, code, "nemesisfs {}: {said:?}", words.join(" "));
        assert!(said.err.starts_with("error: ") && said.err.contains("\nhint: "), "{said:?}");
        said.err
    }

    /// Makes a device `d0` over `d0.img`.
    pub fn create(&self, options: &[&str]) {
        let words = ["device", "create", "d0", "--image", "d0.img"];
        self.cli(&[&words, options].concat());
    }

    /// The same with ext4, mounted at `mnt`.
    pub fn create_mounted(&self) {
        self.create(&["--size", "64MiB", "--mountpoint", "mnt"]);
    }

    /// A raw device of 8 MiB.
    pub fn create_raw(&self) {
        self.create(&["--size", "8MiB", "--filesystem", "none"]);
    }

    pub fn mode(&self, words: &[&str]) -> String {
        self.cli(&[&["device", "mode", "d0"], words].concat())
    }

    /// A mode without options, set on the socket of the daemon that made the device: sooner than by the command line.
    pub fn set(&self, mode: &str) {
        let body = serde_json::json!({"mode": mode});
        let said = request(&self.path("run/host.sock"), "PUT", "/v1/devices/d0/mode", Some(&body));
        assert_eq!(said.status, 200, "{said:?}");
    }

    /// What a daemon says of the device, asked on its socket, which is sooner than by the command line.
    pub fn status(&self) -> Value {
        let socket = self.path("run/host.sock");
        // A daemon that was killed has left it.
        if UnixStream::connect(&socket).is_err() {
            self.cli(&["device", "status"]);
        }
        let said = request(&socket, "GET", "/v1/devices/d0", None);
        assert_eq!(said.status, 200, "{said:?}");
        said.body
    }

    /// Which daemon serves, of a name.
    pub fn pid(&self, instance: &str) -> u32 {
        let text = fs::read_to_string(self.path("run").join(format!("{instance}.json"))).expect("its state");
        let state: Value = serde_json::from_str(&text).expect("JSON");
        u32::try_from(state["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    pub fn kill(&self, instance: &str) {
        let pid = self.pid(instance);
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).expect("a signal");
        eventually("the daemon's end", || !is_alive(pid));
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("run/host.log")).unwrap_or_default()
    }

    /// What is there of ours: mappings, loop devices, mounts, state, and all files but those of the bench itself.
    pub fn left(&self) -> Vec<String> {
        let place = self.dir.path().display();
        let said = sh(&format!(
            "dmsetup ls | grep -v 'No devices found' || true; ls /dev/mapper | grep -vx control || true
             losetup --list --noheadings --output NAME,BACK-FILE | grep -F {place}/ || true
             grep -F ' {place}/' /proc/self/mountinfo || true
             cd {place}; ls -A | grep -vxE 'run|tools|state' || true; ls state/devices 2>/dev/null || true"
        ));
        assert_eq!(said.code, 0, "{said:?}");
        said.out.lines().map(str::to_string).collect()
    }

    /// Removes the device and checks that nothing is left. What the test itself has made must be gone.
    pub fn end(mut self) {
        self.cli(&["device", "remove", "d0"]);
        self.check_clean();
        self.stop();
        assert!(!self.log().contains("panic"), "{}", self.log());
        self.ended = true;
    }

    pub fn check_clean(&self) {
        assert_eq!(self.left(), [""; 0], "left behind; the log:\n{}", self.log());
    }

    fn stop(&self) {
        self.try_cli(&["umount", "--instance", "host"]);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !self.ended {
            let _ = fs::remove_file(self.path("order"));
            let _ = fs::remove_file(self.path("held"));
            self.try_cli(&["device", "remove", "d0", "--kill", "--umount"]);
            eprintln!("the log:\n{}", self.log());
            self.stop();
        }
    }
}

/// What direct I/O takes.
#[repr(align(4096))]
struct Block([u8; 4096]);

fn open(device: &Path) -> fs::File {
    let direct = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device);
    direct.expect("the device")
}

/// Writes a block of this byte to the device, past the cache. Gives whether it was written.
pub fn write_block(device: &Path, nth: u64, byte: u8) -> bool {
    let block = Block([byte; 4096]);
    open(device).write_all_at(&block.0, nth * 4096).is_ok()
}

/// Reads a block past the cache; none is an error of reading.
pub fn read_block(device: &Path, nth: u64) -> Option<Vec<u8>> {
    let mut block = Block([0; 4096]);
    open(device).read_exact_at(&mut block.0, nth * 4096).ok()?;
    Some(block.0.to_vec())
}

/// A file, written and synced as a database does it; or the error.
pub fn write_synced(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    fs::File::open(path.parent().expect("a directory"))?.sync_all()
}

/// The device itself.
pub const DEVICE: &str = "/dev/mapper/d0";
