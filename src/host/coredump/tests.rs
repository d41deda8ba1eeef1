//! Leases on a small machine of their own: a directory for its root, a file for its `core_pattern`, and real mounts below
//! a directory that goes away. As root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::book::{self, Book, Means, Stage};
use super::found::{self, Ground};
use super::leases::Leases;
use super::*;
use crate::event::{Cursor, Read};
use crate::host::state::StateDir;
use crate::host::tool::Tools;
use crate::host::{Kind, Machine, shown};
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

    /// What the `machine` thread does when its times come. Gives when the next one comes.
    fn pass(&self) -> Option<Duration> {
        self.leases().expire();
        carry(&self.machine);
        self.leases().due().into_iter().chain(carry_due(&self.machine)).min()
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
    Wanted { need: Some(0), patience: Duration::from_secs(20), ..Wanted::default() }
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
    assert_eq!(released.brought_home, [shown(rig.core_dir().join("core.1"))]);
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
    // One that cannot be taken leaves the lease of another as it is.
    rig.redirect("b");
    let failure = rig.leases().redirect("c", &Wanted { fills: vec![rig.path("state")], ..wanted() }).unwrap_err();
    assert_eq!((failure.kind, rig.mounted().len(), rig.book().leases.len()), (Kind::Conflict, 2, 1));
    // Umount fails: it is told, and nothing is forgotten.
    let blocked = rig.core_dir();
    rig.tmpfs("other");
    rig.run(&["mount", "--bind", &rig.text("other"), &blocked.display().to_string()]);
    assert!(!rig.release("b").restored && rig.book().switch.is_some());
    mounts::unmount(&blocked, false).unwrap();
    rig.change_book(|book| book.switch.as_mut().unwrap().again = None);
    assert_eq!(rig.pass(), None);
    assert!(rig.is_as_before());
}

#[test]
fn a_lease_whose_time_has_come_is_ended_and_told() {
    let rig = Rig::with_mount();
    let short = Wanted { life: Some(Duration::from_secs(2)), ..wanted() };
    assert!(rig.leases().redirect("b", &short).unwrap().redirected);
    assert!(rig.pass().is_some_and(|wait| !wait.is_zero()) && rig.mounted().len() == 2);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(rig.pass(), None);
    assert!(rig.is_as_before());
    assert_eq!(rig.told("expired").len(), 1);
}

#[test]
fn cores_are_not_carried_below_a_mountpoint_that_a_unit_will_cover() {
    let rig = Rig::new(SYSTEMD);
    rig.tmpfs("data");
    let units = rig.path("root/etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    fs::write(units.join(found::unit_name(&rig.core_dir())), "").unwrap();
    rig.redirect("a");
    write(rig.core_dir().join("core.1"));
    let released = rig.release("a");
    assert!(released.restored && released.brought_home.is_empty() && released.away.len() == 1, "{released:?}");
    assert!(fs::read_dir(rig.core_dir()).unwrap().next().is_none());
    let why = rig.book().away[0].why.clone();
    assert!(why.as_ref().is_some_and(|why| why.ends_with("is not mounted")), "{why:?}");
    // The next crash starts the unit.
    rig.run(&["mount", "--bind", &rig.text("data"), &rig.core_dir().display().to_string()]);
    rig.change_book(|book| book.away[0].again = None);
    rig.pass();
    assert!(rig.path("data/core.1").exists() && rig.book().away.is_empty());
}

#[test]
fn what_others_undo_while_it_is_wanted_is_told_and_done_again() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    assert!(rig.leases().due().is_some_and(|wait| !wait.is_zero()), "in force, nothing is due");
    mounts::unmount(&rig.core_dir(), false).unwrap();
    assert_eq!(rig.leases().due(), Some(Duration::ZERO));
    rig.pass();
    assert_eq!((rig.told("lost").len(), rig.mounted().len()), (1, 1), "they may be about to mount");
    assert!(rig.leases().due().is_some_and(|wait| !wait.is_zero()));
    rig.change_book(|book| book.switch.as_mut().unwrap().again = None);
    rig.pass();
    assert_eq!((rig.told("lost").len(), rig.mounted().len()), (1, 2));
    assert!(rig.told("redirected").last().unwrap()["again"] == true && rig.book().switch.unwrap().trouble.is_none());
    write(rig.core_dir().join("core.1"));
    assert!(!rig.path("data/cores/core.1").exists());
    assert!(rig.release("a").restored && rig.is_as_before() && rig.path("data/cores/core.1").exists());
}

#[test]
fn somebody_elses_mount_over_ours_is_told_once_while_the_lease_lives_and_its_end_too() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    rig.tmpfs("other");
    rig.run(&["mount", "--bind", &rig.text("other"), &rig.core_dir().display().to_string()]);
    for _ in 0..3 {
        assert_eq!(rig.leases().due(), Some(Duration::ZERO));
        rig.pass();
        rig.change_book(|book| book.switch.as_mut().unwrap().again = None);
    }
    assert_eq!((rig.told("covered").len(), rig.mounted().len()), (1, 3));
    mounts::unmount(&rig.core_dir(), false).unwrap();
    rig.pass();
    assert!(rig.book().switch.unwrap().trouble.is_none() && rig.told("redirected").len() == 2);
    assert!(rig.leases().due().is_some_and(|wait| !wait.is_zero()));
    assert!(rig.release("a").restored && rig.is_as_before());
}

#[test]
fn a_pattern_that_others_have_set_back_is_set_again_and_one_of_theirs_is_left_alone() {
    let rig = Rig::new("core");
    rig.redirect("a");
    let ours = fs::read_to_string(&rig.ground.pattern).unwrap();
    fs::write(&rig.ground.pattern, "core").unwrap();
    for _ in 0..2 {
        rig.change_book(|book| book.switch.as_mut().unwrap().again = None);
        rig.pass();
    }
    assert_eq!(fs::read_to_string(&rig.ground.pattern).unwrap(), ours);
    fs::write(&rig.ground.pattern, "/theirs/core").unwrap();
    rig.pass();
    assert_eq!(fs::read_to_string(&rig.ground.pattern).unwrap(), "/theirs/core");
    assert_eq!((rig.told("lost").len(), rig.told("covered").len()), (1, 1));
}

#[test]
fn a_book_that_cannot_be_read_is_told_by_name_and_no_daemon_ends_for_want_of_work() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    let file = rig.path("state/coredump/book.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..40]).unwrap();
    assert!(is_pending(&rig.machine));
    let status = status(&rig.machine).unwrap_err();
    let released = rig.leases().release(None, Duration::ZERO).unwrap_err();
    for failure in [status, released] {
        let hint = failure.hint.unwrap();
        assert!(failure.detail.contains("book.json") && hint.contains("book.json"), "{} {hint}", failure.detail);
    }
    fs::write(&file, text).unwrap();
    assert!(rig.release("a").restored && rig.is_as_before());
}

#[test]
fn a_lease_that_is_renewed_keeps_what_is_not_said() {
    let rig = Rig::with_mount();
    let first = Wanted { owner: "me".into(), need: Some(7), life: Some(Duration::from_secs(60)), ..wanted() };
    rig.leases().redirect("a", &first).unwrap();
    let again = Wanted { need: None, ..wanted() };
    assert!(rig.leases().redirect("a", &again).unwrap().renewed);
    let lease = rig.book().leases[0].clone();
    assert_eq!((lease.owner.as_str(), lease.need, lease.life_ms), ("me", 7, 60_000));
    assert_eq!(leases(&rig.machine).unwrap().len(), 1);
    rig.release("a");
    assert!(rig.release("a").is_nothing());
}

#[test]
fn where_the_kernel_writes_a_fallback_that_is_closed_to_others_is_told() {
    let rig = Rig::new("core");
    fs::create_dir(rig.path("open")).unwrap();
    let set = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    set(&rig.path(""), 0o755);
    let warned = |mode| {
        set(&rig.path("open"), mode);
        let taken = rig.leases().redirect("a", &Wanted { to: Some(rig.path("open")), ..wanted() }).unwrap();
        rig.release("a");
        taken.warnings.iter().any(|warning| warning.contains("closed to others"))
    };
    assert_eq!([0o1777, 0o755, 0o700].map(warned), [false, true, true]);
    assert!(rig.path("open").exists(), "it was there before");
    set(&rig.path(""), 0o700);
    assert!(warned(0o1777), "nobody gets there");
    rig.leases().redirect("a", &Wanted { to: Some(rig.path("new")), ..wanted() }).unwrap();
    rig.release("a");
    assert!(!rig.path("new").exists(), "we have made it");
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
    // Killed before or after the mount was made, or before or after it was undone.
    for (stage, is_mounted) in
        [(Stage::Taking, false), (Stage::Taking, true), (Stage::GivingBack, true), (Stage::GivingBack, false)]
    {
        rig.redirect("a");
        write(rig.core_dir().join("core.1"));
        rig.change_book(|book| {
            book.switch.as_mut().unwrap().stage = stage;
            // Who was giving back had struck the lease out.
            book.leases.retain(|_| stage == Stage::Taking);
        });
        if !is_mounted {
            mounts::unmount(&rig.core_dir(), false).unwrap();
        }
        assert_eq!(rig.pass(), None, "{stage:?} {is_mounted}");
        assert!(rig.is_as_before(), "{stage:?} {is_mounted}");
        fs::remove_file(rig.path("data/cores/core.1")).expect("it is at home");
    }
}

#[test]
fn after_a_reboot_cores_come_home_and_nothing_is_unmounted() {
    let rig = Rig::with_mount();
    rig.redirect("a");
    write(rig.core_dir().join("core.1"));
    mounts::unmount(&rig.core_dir(), false).unwrap();
    rig.change_book(|book| book.switch.as_mut().unwrap().boot = "another".into());
    rig.pass();
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
    rig.pass();
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
    assert!(released.warnings[0].contains("are to stay free"), "{released:?}");
    assert!(rig.book().carry_due().is_some_and(|wait| !wait.is_zero()), "it is tried again");
    fs::remove_file(rig.path("data/fill")).unwrap();
    rig.change_book(|book| book.away[0].again = None);
    rig.pass();
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
    rig.pass();
    assert_eq!(fs::read_to_string(&rig.ground.pattern).unwrap(), "core.%p");
}

#[test]
fn too_little_room_is_told_or_refused_before_anything_is_done() {
    let rig = Rig::with_mount();
    let low = Wanted { need: Some(u64::MAX), ..wanted() };
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
fn an_agent_is_told_that_it_was_in_time_when_who_asked_hears_it() {
    let rig = Rig::with_mount();
    for early in 0..12 {
        let timeout = Duration::from_millis(110);
        let wanted = Wanted { by: By::Agent, timeout, ..wanted() };
        let (asked, told) = std::thread::scope(|scope| {
            let asking = scope.spawn(|| rig.leases().redirect("a", &wanted));
            std::thread::sleep(timeout - Duration::from_millis(early));
            let id = steps::waiting(&rig.machine).pop().map(|step| step["step_id"].as_str().unwrap().to_string());
            let answer = steps::Answer { ok: true, ..steps::Answer::default() };
            let told = id.is_some_and(|id| steps::acknowledge(&rig.machine, &id, answer).is_ok());
            (asking.join().unwrap().is_ok(), told)
        });
        assert_eq!(asked, told, "{early} ms before the end");
    }
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
    // What the agent has not given back stays in the book; the lease of another goes.
    rig.redirect("b");
    let failure = rig.leases().release(None, Duration::from_millis(100)).unwrap_err();
    assert!(failure.kind == Kind::Conflict && failure.to_string().contains("no agent"), "{failure:?}");
    let left: Vec<String> = rig.book().leases.into_iter().map(|lease| lease.name).collect();
    assert_eq!((left, rig.mounted().len()), (vec!["a".to_string()], 1));
    let late = steps::acknowledge(&rig.machine, "b-1-0", steps::Answer::default()).unwrap_err();
    assert_eq!(late.kind, Kind::NotFound);
}
