//! Leases on a small machine of their own: a directory for its root, a file for its `core_pattern`, and real mounts below
//! a directory that goes away. As root.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::book::{self, Book, Means, Stage};
use super::found::Ground;
use super::leases::Leases;
use super::*;
use crate::event::{Cursor, Read};
use crate::host::Machine;
use crate::host::state::StateDir;
use crate::host::tool::Tools;
use crate::sys::mounts;

const SYSTEMD: &str = "|/usr/lib/systemd/systemd-coredump %P %u %g %s %t 9223372036854775808 %h";

/// A machine whose core directory is, or is not, bind-mounted from a data filesystem.
struct Rig {
    dir: tempfile::TempDir,
    machine: Machine,
    ground: Ground,
}

impl Rig {
    fn new(pattern: &str) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let ground = Ground { root: root.join("root"), pattern: root.join("core_pattern"), hindrance: Some(None) };
        let machine = Machine::alone("test", StateDir::new(root.join("state")));
        let rig = Rig { dir, machine, ground };
        fs::create_dir_all(rig.core_dir()).unwrap();
        fs::write(&rig.ground.pattern, pattern).unwrap();
        rig
    }

    /// The core directory is bind-mounted from a filesystem of its own.
    fn with_mount() -> Rig {
        let rig = Rig::new(SYSTEMD);
        rig.tmpfs("data");
        fs::create_dir(rig.path("data/cores")).unwrap();
        rig.run(&["mount", "--bind", &rig.text("data/cores"), &rig.text("root/var/lib/systemd/coredump")]);
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn core_dir(&self) -> PathBuf {
        self.path("root/var/lib/systemd/coredump")
    }

    fn tmpfs(&self, name: &str) {
        fs::create_dir(self.path(name)).unwrap();
        self.run(&["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", &self.text(name)]);
    }

    fn run(&self, words: &[&str]) {
        Tools::default().run(words).unwrap();
    }

    fn leases(&self) -> Leases<'_> {
        Leases::on(&self.machine, self.ground.clone())
    }

    fn redirect(&self, name: &str) -> Taken {
        self.leases().redirect(name, &wanted()).unwrap()
    }

    fn release(&self, name: &str) -> Released {
        self.leases().release(Some(name), Duration::ZERO).unwrap()
    }

    /// The mounts on the core directory, the uppermost last, each by what it shows.
    fn mounted(&self) -> Vec<PathBuf> {
        let table = mounts::all().unwrap();
        table.into_iter().filter(|mount| mount.mountpoint == self.core_dir()).map(|mount| mount.root).collect()
    }

    fn book(&self) -> Book {
        book::peek(&self.machine.state)
    }

    fn change_book(&self, change: impl FnOnce(&mut Book)) {
        let part = book::lock(&self.machine).unwrap();
        let mut book = Book::read(&part).unwrap();
        change(&mut book);
        book.write(&part).unwrap();
    }

    /// The events with such an action.
    fn told(&self, action: &str) -> Vec<Value> {
        let ring = &self.machine.ring;
        let all = (ring.oldest().0..ring.cursor().0).map(|at| ring.read(Cursor(at)));
        let events = all.filter_map(|read| match read {
            Read::Event(record) => Some(record.json("b", "i")),
            _ => None,
        });
        events.filter(|event| event["action"] == action).collect()
    }

    /// Nothing is switched, nothing is written down, and the core directory is what it was.
    fn is_as_before(&self) -> bool {
        let book = self.book();
        book.leases.is_empty() && book.switch.is_none() && self.mounted() == [PathBuf::from("/cores")]
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let all = mounts::all().unwrap_or_default();
        let root = self.dir.path().canonicalize().unwrap_or_default();
        for mount in all.iter().rev().filter(|mount| mount.mountpoint.starts_with(&root)) {
            let _ = mounts::unmount(&mount.mountpoint, true);
        }
    }
}

fn wanted() -> Wanted {
    Wanted { need: 0, patience: Duration::from_secs(20), ..Wanted::default() }
}

fn write(path: PathBuf) {
    fs::write(path, "core").unwrap();
}

#[test]
fn coredump_to_root_context() {
    let rig = Rig::with_mount();
    let taken = rig.redirect("a");
    assert!(taken.redirected && !taken.renewed, "{taken:?}");
    assert_eq!(taken.found["mounted_by"], "bind");
    assert!(taken.commands[0].starts_with("mount --bind "), "{taken:?}");
    write(rig.core_dir().join("core.1"));
    assert!(!rig.path("data/cores/core.1").exists(), "it went to the root filesystem");
    let released = rig.release("a");
    assert!(released.released && released.restored, "{released:?}");
    assert_eq!(released.brought_home, [rig.core_dir().join("core.1")]);
    assert!(rig.path("data/cores/core.1").exists());
    write(rig.core_dir().join("core.2"));
    assert!(rig.path("data/cores/core.2").exists(), "the next core goes home");
    assert!(rig.is_as_before() && rig.book().away.is_empty());
    assert!(!rig.path("state/cores").exists(), "nothing of ours is left");
    let steps = rig.told("step");
    assert!(steps.len() == 2 && steps.iter().all(|step| step["ok"] == true && step["attempt"] == 1), "{steps:?}");
}

#[test]
fn coredump_to_root_exception_handling() {
    let rig = Rig::with_mount();
    // A mount that cannot be bound elsewhere: each attempt fails.
    rig.tmpfs("unbindable");
    rig.run(&["mount", "--make-unbindable", &rig.text("unbindable")]);
    let to = Some(rig.path("unbindable"));
    let failure = rig.leases().redirect("a", &Wanted { to, ..wanted() }).unwrap_err();
    assert_eq!(failure.kind, Kind::Failed);
    assert!(rig.is_as_before(), "nothing was changed");
    let attempts: Vec<Value> = rig.told("step").into_iter().map(|step| step["attempt"].clone()).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5]);
    assert_eq!(rig.told("failed").len(), 1);
    // Who takes a lease may fail before it is given back, or be killed: its time ends it.
    let short = Wanted { life: Some(Duration::from_millis(300)), ..wanted() };
    assert!(rig.leases().redirect("b", &short).unwrap().redirected);
    assert!(rig.leases().expire().is_some_and(|wait| !wait.is_zero()) && rig.mounted().len() == 2);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(rig.leases().expire(), None);
    assert!(rig.is_as_before());
    assert_eq!(rig.told("expired").len(), 1);
}

#[test]
fn coredump_to_root_idempotency() {
    let rig = Rig::with_mount();
    assert!(!rig.redirect("a").renewed);
    assert!(rig.redirect("a").renewed);
    assert!(!rig.redirect("b").renewed);
    assert_eq!(rig.mounted().len(), 2, "one mount of ours for all");
    let released = rig.release("a");
    assert!(released.released && !released.restored && released.leases == ["b"], "{released:?}");
    assert_eq!(rig.mounted().len(), 2);
    assert!(rig.release("b").restored && rig.is_as_before());
    let again = rig.release("b");
    assert!(!again.released && again.restored && again.commands.is_empty(), "{again:?}");
    rig.redirect("a");
    rig.redirect("b");
    assert!(rig.leases().release(None, Duration::ZERO).unwrap().restored && rig.is_as_before());
}

#[test]
fn coredump_to_root_no_mount() {
    let rig = Rig::new(SYSTEMD);
    let taken = rig.redirect("a");
    assert!(!taken.redirected && taken.commands.is_empty(), "{taken:?}");
    assert!(taken.how.contains("nothing to redirect"), "{taken:?}");
    assert!(rig.mounted().is_empty());
    assert!(rig.release("a").restored);
    assert!(rig.mounted().is_empty(), "a mount that was not there is not made");
    assert!(rig.told("step").is_empty());
}

#[test]
fn what_a_killed_daemon_has_done_half_is_undone() {
    let rig = Rig::with_mount();
    for stage in [Stage::Taking, Stage::GivingBack] {
        rig.redirect("a");
        rig.change_book(|book| {
            book.switch.as_mut().unwrap().stage = stage;
            // Who was giving back had struck the lease out.
            book.leases.retain(|_| stage == Stage::Taking);
        });
        assert_eq!(rig.leases().expire(), None, "{stage:?}");
        assert!(rig.is_as_before(), "{stage:?}");
    }
    // Killed before the mount was made.
    rig.redirect("a");
    rig.change_book(|book| book.switch.as_mut().unwrap().stage = Stage::Taking);
    mounts::unmount(&rig.core_dir(), false).unwrap();
    rig.leases().expire();
    assert!(rig.is_as_before());
}

#[test]
fn after_a_reboot_cores_come_home_and_nothing_is_unmounted() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    write(rig.core_dir().join("core.1"));
    mounts::unmount(&rig.core_dir(), false).unwrap();
    rig.change_book(|book| book.switch.as_mut().unwrap().boot = "another".into());
    rig.leases().expire();
    assert!(rig.path("data/cores/core.1").exists());
    assert_eq!(rig.mounted(), [PathBuf::from("/cores")]);
    assert!(rig.book().switch.is_none());
}

#[test]
fn a_mount_of_others_over_ours_is_left_alone_and_told_and_ours_goes_when_it_has_gone() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    rig.tmpfs("other");
    fs::create_dir(rig.path("other/theirs")).unwrap();
    rig.run(&["mount", "--bind", &rig.text("other/theirs"), &rig.core_dir().display().to_string()]);
    let released = rig.release("a");
    assert!(released.released && !released.restored, "{released:?}");
    assert!(released.warnings[0].contains("somebody has mounted"), "{released:?}");
    assert_eq!(rig.mounted().last(), Some(&PathBuf::from("/theirs")));
    assert_eq!(rig.told("not_restored").len(), 1);
    assert_eq!(rig.leases().redirect("b", &wanted()).unwrap_err().kind, Kind::Conflict);
    mounts::unmount(&rig.core_dir(), false).unwrap();
    rig.change_book(|book| book.switch.as_mut().unwrap().again = None);
    rig.leases().expire();
    assert!(rig.is_as_before());
}

#[test]
fn a_busy_mount_is_tried_again_and_detached_in_the_end() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    let mut holder = std::process::Command::new("sleep").arg("60").current_dir(rig.core_dir()).spawn().unwrap();
    let released = rig.release("a");
    let _ = (holder.kill(), holder.wait());
    assert!(released.restored && rig.is_as_before(), "{released:?}");
    assert!(released.commands.last().unwrap().starts_with("umount --lazy "), "{released:?}");
    let busy = rig.told("busy");
    assert_eq!(busy[0]["holders"][0]["comm"], "sleep", "{busy:?}");
}

#[test]
fn a_core_that_does_not_fit_stays_in_the_list_and_comes_home_later() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    fs::write(rig.core_dir().join("core.1"), vec![7; 12 << 20]).unwrap();
    fs::write(rig.path("data/fill"), vec![7; 8 << 20]).unwrap();
    let released = rig.release("a");
    assert!(released.restored && released.brought_home.is_empty() && released.away.len() == 1, "{released:?}");
    assert!(released.warnings[0].contains("No space left"), "{released:?}");
    assert!(rig.book().due().is_some_and(|wait| !wait.is_zero()), "it is tried again");
    fs::remove_file(rig.path("data/fill")).unwrap();
    rig.change_book(|book| book.away[0].again = None);
    rig.leases().expire();
    assert_eq!(fs::read(rig.path("data/cores/core.1")).unwrap().len(), 12 << 20);
    assert!(rig.book().away.is_empty() && !rig.path("state/cores").exists());
}

#[test]
fn a_relative_pattern_is_set_for_the_time_and_one_that_others_have_set_since_is_left_alone() {
    let rig = Rig::new("core");
    let pattern = || fs::read_to_string(&rig.ground.pattern).unwrap();
    let taken = rig.redirect("a");
    assert!(taken.redirected && pattern().ends_with("/state/cores/working-directories/core.%P.%t"), "{}", pattern());
    assert!(rig.release("a").restored && pattern() == "core");
    rig.redirect("a");
    fs::write(&rig.ground.pattern, "/theirs/core").unwrap();
    let released = rig.release("a");
    assert!(released.restored && released.warnings[0].contains("left alone"), "{released:?}");
    assert_eq!(pattern(), "/theirs/core");
}

#[test]
fn a_relative_pattern_is_set_back_after_a_kill() {
    let rig = Rig::new("core.%p");
    rig.redirect("a");
    rig.change_book(|book| {
        assert!(matches!(book.switch.as_ref().unwrap().means, Means::Pattern { .. }));
        book.leases.clear();
    });
    rig.leases().expire();
    assert_eq!(fs::read_to_string(&rig.ground.pattern).unwrap(), "core.%p");
}

#[test]
fn too_little_room_is_told_or_refused_before_anything_is_done() {
    let rig = Rig::with_mount();
    let low = Wanted { need: u64::MAX, ..wanted() };
    let failure = rig.leases().redirect("a", &Wanted { on_low: OnLow::Refuse, ..low.clone() }).unwrap_err();
    assert_eq!(failure.kind, Kind::Conflict);
    assert!(rig.is_as_before() && rig.told("step").is_empty());
    let taken = rig.leases().redirect("a", &low).unwrap();
    assert!(taken.redirected && !taken.room.unwrap().enough && taken.warnings.len() == 1);
    assert_eq!(rig.told("low").len(), 2);
    rig.release("a");
}

#[test]
fn wrong_input_is_refused_and_changes_nothing() {
    let rig = Rig::with_mount();
    let wrong = |name: &str, wanted: Wanted| rig.leases().redirect(name, &wanted).unwrap_err().kind;
    let to = |path: &Path| Wanted { to: Some(path.into()), ..wanted() };
    assert_eq!(wrong("a b", wanted()), Kind::Invalid);
    assert_eq!(wrong("a", to(Path::new("relative"))), Kind::Invalid);
    assert_eq!(wrong("a", to(&rig.ground.pattern)), Kind::Invalid);
    assert_eq!(wrong("a", Wanted { life: Some(Duration::ZERO), ..wanted() }), Kind::Invalid);
    assert_eq!(wrong("a", to(&rig.core_dir().join("below"))), Kind::Conflict);
    assert_eq!(wrong("a", Wanted { fills: vec!["relative".into()], ..wanted() }), Kind::Invalid);
    assert!(rig.is_as_before() && rig.told("step").is_empty());
    assert_eq!(renew(&rig.machine, "a", &wanted()).unwrap_err().kind, Kind::NotFound);
}

#[test]
fn an_agent_that_does_not_answer_is_an_error_and_one_that_does_is_heard() {
    let rig = Rig::with_mount();
    let wanted = |ms| Wanted { by: By::Agent, timeout: Duration::from_millis(ms), ..wanted() };
    let failure = rig.leases().redirect("a", &wanted(100)).unwrap_err();
    assert!(failure.kind == Kind::Conflict && failure.to_string().contains("no agent"), "{failure:?}");
    assert!(rig.is_as_before() && rig.told("unanswered").len() == 1);
    let taken = std::thread::scope(|scope| {
        let asking = scope.spawn(|| rig.leases().redirect("a", &wanted(20_000)));
        let step = loop {
            if let Some(step) = steps::waiting(&rig.machine).pop() {
                break step;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(step["commands"][0], "nemesisfs coredump redirect --lease agent.a --for '10m'");
        let answer = steps::Answer { ok: true, redirected: true, ..steps::Answer::default() };
        steps::acknowledge(&rig.machine, step["step_id"].as_str().unwrap(), answer).unwrap();
        asking.join().unwrap().unwrap()
    });
    assert!(taken.redirected && rig.book().leases[0].by_agent);
    assert_eq!(rig.mounted().len(), 1, "we have done nothing ourselves");
    let late = steps::acknowledge(&rig.machine, "b-1-0", steps::Answer::default()).unwrap_err();
    assert_eq!(late.kind, Kind::NotFound);
}
