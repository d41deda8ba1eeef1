//! Claims on the daemon without a mount.
//!
//! Real daemons, each in a run directory of its own. No mounts, but for one test.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Mounted, Said, eventually, executable, is_alive};

/// A run directory, and the daemon that may live in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::Builder::new().prefix("nemesisfs-test-").tempdir().expect("a directory"))
    }

    fn run(&self, words: &[&str]) -> Said {
        run_in(self.0.path(), words)
    }

    /// Starts it and gives its pid.
    fn start(&self, options: &[&str]) -> u32 {
        let said = self.run(&[&["host"], options].concat());
        assert_eq!(said.code, 0, "{said:?}");
        let pid = said.out.split_whitespace().find_map(|word| word.strip_prefix("pid="));
        pid.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no pid in {said:?}"))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.0.path().join("host.log")).unwrap_or_default()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.run(&["umount", "--instance", "host"]);
        assert!(std::thread::panicking() || !self.log().contains("panic"), "{}", self.log());
    }
}

fn run_in(run_dir: &Path, words: &[&str]) -> Said {
    let mut command = Command::new(executable());
    command.args(words).env("NEMESISFS_RUNDIR", run_dir).env_remove("NEMESISFS_HOST");
    command.output().expect("the program runs").into()
}

#[test]
fn a_daemon_without_a_mount_answers_is_listed_and_ends_twice() {
    let place = Place::new();
    let pid = place.start(&[]);
    let listed: Value = serde_json::from_str(&place.run(&["list", "--json"]).out).expect("JSON");
    let row = &listed["instances"][0];
    assert_eq!((&row["instance"], &row["state"], &row["mountpoint"]), (&"host".into(), &"alive".into(), &Value::Null));
    assert_eq!(row["pid"], pid);
    let again = place.run(&["host"]);
    assert_eq!(again.code, 1);
    assert!(again.err.contains("is running already"), "{again:?}");
    for (how, says) in [("first", "host has ended"), ("second", "not mounted")] {
        let said = place.run(&["umount", "--instance", "host"]);
        assert_eq!(said.code, 0, "{how}: {said:?}");
        assert!(said.out.contains(says), "{how}: {said:?}");
    }
    assert!(!is_alive(pid));
}

#[test]
fn what_needs_a_mount_is_refused_by_one_that_has_none_and_says_so() {
    let place = Place::new();
    place.start(&[]);
    let said = place.run(&["rule", "list"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("\"host\" has no mount") && said.err.contains("hint: nemesisfs mount"), "{said:?}");
    assert_eq!(place.run(&["reset"]).code, 0);
    assert_eq!(place.run(&["events"]).code, 0);
}

#[test]
fn it_ends_by_a_signal_and_after_a_kill_the_next_one_starts() {
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGINT] {
        let pid = place.start(&[]);
        kill(Pid::from_raw(pid as i32), signal).expect("a signal");
        eventually("its end", || !is_alive(pid));
    }
}

#[test]
fn one_that_is_not_needed_any_more_ends_by_itself() {
    let place = Place::new();
    let began = Instant::now();
    let pid = place.start(&["--while-needed"]);
    assert!(is_alive(pid));
    eventually("its end", || !is_alive(pid));
    assert!(began.elapsed() > Duration::from_secs(2), "who started it had no time to say why");
}

#[test]
fn a_command_for_a_mount_finds_the_mount_although_a_daemon_without_one_lives_too() {
    let mounted = Mounted::new();
    let run_dir = mounted.socket.parent().expect("a directory").to_path_buf();
    let said = run_in(&run_dir, &["host"]);
    assert_eq!(said.code, 0, "{said:?}");
    let said = run_in(&run_dir, &["mode", "enospc"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(run_in(&run_dir, &["mode", "allow_writes"]).code, 0);
    assert_eq!(run_in(&run_dir, &["umount", "--instance", "host"]).code, 0);
    mounted.end();
}

#[test]
fn one_without_a_mount_does_not_answer_for_a_mount_whose_daemon_has_died() {
    let mut mounted = Mounted::new();
    let run_dir = mounted.run_dir();
    assert_eq!(run_in(&run_dir, &["host"]).code, 0);
    mounted.kill();
    for words in [&["reset"][..], &["events"], &["rule", "check"], &["mode"]] {
        let said = run_in(&run_dir, words);
        assert_eq!(said.code, 3, "{words:?}: {said:?}");
        assert!(said.err.contains("t has died") && said.err.contains("nemesisfs umount --instance t"), "{said:?}");
    }
    assert_eq!(run_in(&run_dir, &["coredump", "status"]).code, 0, "for the machine any daemon will do");
    // Which is the one part of this that can be done.
    let said = run_in(&run_dir, &["reset", "--all"]);
    assert!(said.code == 3 && said.out.contains("of the machine"), "{said:?}");
    assert!(said.err.contains("no instance with a mount runs here: t has died"), "{said:?}");
    let (other, place) = (mounted.aside("other"), mounted.aside("place"));
    let said = run_in(&run_dir, &["mount", "--instance", "t2", other.to_str().unwrap(), place.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
    let said = run_in(&run_dir, &["-H", "t*", "reset"]);
    assert_eq!(run_in(&run_dir, &["umount", "--instance", "t2"]).code, 0);
    assert!(said.code == 3 && said.out.contains("t2: reset: ") && said.err.contains("t: error: "), "{said:?}");
    mounted.mount_again();
    assert_eq!(run_in(&run_dir, &["reset"]).code, 0);
    assert_eq!(run_in(&run_dir, &["umount", "--instance", "host"]).code, 0);
    mounted.end();
}

/// A program may be called anything, and `%e` puts that into the name of its core.
#[test]
fn a_core_whose_name_is_no_utf8_comes_home_and_holds_up_no_other() {
    let place = Place::new();
    let dir = |name: &str| place.0.path().join(name);
    let away = ["odd", "plain"].map(|name| (dir(name), dir(&format!("home-of-{name}"))));
    for (away, home) in &away {
        std::fs::create_dir(away).expect("a directory");
        std::fs::create_dir(home).expect("a directory");
    }
    let odd = |end: u8| OsString::from_vec([&b"core.\xff\xfe."[..], &[end]].concat());
    for (dir, name) in [(&away[0].0, odd(b'1')), (&away[0].0, odd(b'2')), (&away[1].0, "core.plain".into())] {
        std::fs::write(dir.join(name), "core").expect("a core");
    }
    let is_odd_home = |end: u8| away[0].1.join(odd(end)).exists();
    let book = |(dir, home): &(PathBuf, PathBuf)| json!({"dir": dir, "home": home, "mounted": false, "again": null});
    let book = json!({"leases": [], "switch": null, "away": away.iter().map(book).collect::<Vec<_>>()});
    std::fs::create_dir_all(dir("state/coredump")).expect("a directory");
    std::fs::write(dir("state/coredump/book.json"), book.to_string()).expect("the book");
    place.start(&[]);
    eventually("all cores are home", || {
        is_odd_home(b'1') && is_odd_home(b'2') && away[1].1.join("core.plain").exists()
    });
    let told = place.run(&["events", "--json"]).out;
    assert_eq!(told.matches("\"brought_home\"").count(), 3, "{told}");
}

#[test]
fn a_core_whose_name_is_no_utf8_is_listed() {
    let place = Place::new();
    let dir = |name: &str| place.0.path().join(name);
    std::fs::create_dir_all(dir("away")).expect("a directory");
    for name in [&b"core.\xff"[..], b"core.\xfe"] {
        std::fs::write(dir("away").join(OsStr::from_bytes(name)), "core").expect("a core");
    }
    // Whose home nobody knows.
    let book = json!({"leases": [], "switch": null, "away": [{"dir": dir("away"), "home": null, "mounted": false}]});
    std::fs::create_dir_all(dir("state/coredump")).expect("a directory");
    std::fs::write(dir("state/coredump/book.json"), book.to_string()).expect("the book");
    place.start(&[]);
    let said = place.run(&["coredump", "list", "--json"]);
    let listed: Value = serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:?}"));
    let here =
        |core: &&Value| core["path"].as_str().is_some_and(|path| path.starts_with(dir("away").to_str().unwrap()));
    assert_eq!(listed["cores"].as_array().expect("a list").iter().filter(here).count(), 2, "{listed}");
}
