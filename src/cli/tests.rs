//! What a command prints and how it ends, against daemons that answer as a test told them to.
//!
//! Thread: the test's. Locks: one around what was printed. Must never: use a real mount.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use super::console::Console;
use super::{Cli, run};
use crate::client::fake::Fake;
use crate::exit;
use crate::instances::State;

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn lines(&self) -> Vec<String> {
        self.text().lines().map(ToOwned::to_owned).collect()
    }

    fn document(&self) -> Value {
        serde_json::from_str(&self.text()).unwrap()
    }
}

struct Ran {
    exit: u8,
    out: Paper,
    err: Paper,
}

/// Runs a command with the run directory of `fake`, in which nothing lives unless `alive` made it so.
fn ran(fake: &Fake, words: &str) -> Ran {
    let words = format!("nemesisfs {words}");
    let cli = Cli::try_parse_from(shlex::split(&words).unwrap()).unwrap();
    let (out, err) = (Paper::default(), Paper::default());
    let console = Console::new(Box::new(out.clone()), Box::new(err.clone()), cli.globals.json, cli.globals.quiet);
    Ran { exit: run(&cli, fake.dir(), &console), out, err }
}

/// Runs a command on `fake`, chosen by its socket.
fn ran_on(fake: &Fake, words: &str) -> Ran {
    ran(fake, &format!("{words} -H {}", fake.host()))
}

/// Makes `fake` the living instance of its run directory, for as long as the lock is kept.
fn alive(fake: &Fake, name: &str) -> Flock<File> {
    alive_at(fake, name, Some(format!("/nonexistent/{name}").into()))
}

fn alive_at(fake: &Fake, name: &str, mountpoint: Option<PathBuf>) -> Flock<File> {
    let state = State {
        instance: name.into(),
        pid: 4711,
        mountpoint,
        backing: Some("/backing".into()),
        socket: fake.socket.clone(),
        log: None,
        connection: None,
    };
    let file = fake.dir().join(format!("{name}.json"));
    fs::write(&file, serde_json::to_vec(&state).unwrap()).unwrap();
    Flock::lock(File::open(&file).unwrap(), FlockArg::LockExclusiveNonblock).unwrap()
}

fn wal_eio() -> Value {
    json!({"name": "wal-eio", "enabled": true, "required": false,
        "match": {"ops": ["write", "fsync"], "path": "/pg_wal/**"},
        "trigger": {"probability": 1.0, "skip": 0, "every": 1, "times": null},
        "fault": {"kind": "error", "errno": "EIO"}, "labels": {},
        "matches": 0, "injections": 0, "created": "2026-11-20T12:00:00Z", "state": "armed", "cursor": "b-1"})
}

fn not_found() -> Value {
    json!({"code": "not_found", "status": 404, "detail": "no rule \"wal-eio\"", "hint": "`rule list` shows them"})
}

#[test]
fn the_definition_of_the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn rule_add_sends_the_rule_and_tells_what_it_did_and_how_to_undo_it() {
    let fake = Fake::start();
    let _lock = alive(&fake, "n1");
    fake.answer("GET /v1/rules/wal-eio", 404, not_found());
    fake.answer("PUT /v1/rules/wal-eio", 201, wal_eio());
    let ran = ran(
        &fake,
        "rule add wal-eio --kind error --errno EIO --op write,fsync --op read --path '/pg_wal/**' --pid 7 --uid 0 \
         --offset 0..1MiB --probability 0.5 --skip 1 --every 2 --times 3 --for 5m --seed 9 --label a=b --comm x",
    );
    assert_eq!(
        ran.out.lines(),
        ["rule wal-eio armed: error EIO on write,fsync of /pg_wal/**", "undo: nemesisfs rule rm wal-eio"]
    );
    assert_eq!((ran.exit, ran.err.text().as_str()), (exit::DONE, ""));
    let sent = fake.seen().pop().unwrap().1;
    assert_eq!(
        sent,
        json!({"name": "wal-eio", "enabled": true,
            "match": {"ops": ["write", "fsync", "read"], "path": "/pg_wal/**", "pid": 7, "comm": "x", "uid": 0,
                "offset": "0..1MiB"},
            "trigger": {"probability": 0.5, "skip": 1, "every": 2, "times": 3, "for": "5m", "seed": 9},
            "fault": {"kind": "error", "errno": "EIO"}, "labels": {"a": "b"}})
    );
}

#[test]
fn what_is_pending_is_said_and_replacing_is_undone_by_the_old_rule() {
    let fake = Fake::start();
    fake.answer("GET /v1/rules/wal-eio", 200, wal_eio());
    let mut new = wal_eio();
    new["pending"] = json!(["/pg_wal/1"]);
    fake.answer("PUT /v1/rules/wal-eio", 200, new);
    let ran = ran_on(&fake, "rule add wal-eio --kind error --errno EIO");
    let lines = ran.out.lines();
    assert!(lines[1].starts_with("pending: ") && lines[1].ends_with(" /pg_wal/1"), "{lines:?}");
    let undo = format!(
        "undo: nemesisfs -H {} rule add wal-eio --kind error --errno EIO --op write,fsync --path '/pg_wal/**'",
        super::args::quoted(&fake.host().to_string())
    );
    assert_eq!(lines[2], undo);
}

#[test]
fn quiet_prints_nothing_and_json_the_document_of_the_server() {
    let fake = Fake::start();
    fake.answer("PUT /v1/rules/wal-eio", 201, wal_eio());
    let add = "rule add wal-eio --kind error";
    let quiet = ran_on(&fake, &format!("{add} --quiet"));
    assert_eq!((quiet.exit, quiet.out.text().as_str()), (exit::DONE, ""));
    assert_eq!(ran_on(&fake, &format!("--json {add}")).out.document(), wal_eio());
    fake.answer("DELETE /v1/rules/wal-eio", 204, Value::Null);
    assert_eq!(ran_on(&fake, "rule rm wal-eio --json").out.document(), json!({}));
    assert_eq!(fake.seen().len(), 3, "nobody reads how to undo it, so nothing more is asked");
}

#[test]
fn a_refusal_is_error_and_hint_on_standard_error_also_as_json() {
    let fake = Fake::start();
    let problem = json!({"type": "about:blank", "title": "Invalid rule", "status": 422, "code": "rule_invalid",
        "detail": "match.ops[0]: unknown operation \"wrtie\"", "hint": "did you mean \"write\"?"});
    fake.answer("PUT /v1/rules/a", 422, problem.clone());
    fake.answer("GET /v1/rules/a", 404, not_found());
    let ran = ran_on(&fake, "rule add a --kind error --op wrtie");
    assert_eq!(ran.exit, exit::FAILED);
    assert_eq!(ran.out.text(), "");
    assert_eq!(ran.err.lines(), ["error: match.ops[0]: unknown operation \"wrtie\"", "hint: did you mean \"write\"?"]);
    let as_json = ran_on(&fake, "rule add a --kind error --op wrtie --json");
    assert_eq!((as_json.out.text().as_str(), as_json.err.document()), ("", problem));
}

#[test]
fn what_is_not_there_is_exit_4_except_for_rm() {
    let fake = Fake::start();
    for request in ["GET /v1/rules/a", "PATCH /v1/rules/a", "POST /v1/rules/a/release", "GET /v1/rules/a/wait"] {
        fake.answer(request, 404, not_found());
    }
    fake.answer("DELETE /v1/rules/a", 204, Value::Null);
    for command in ["show a", "enable a", "disable a", "release a", "wait a"] {
        assert_eq!(ran_on(&fake, &format!("rule {command}")).exit, exit::NO_SUCH_THING, "{command}");
    }
    let ran = ran_on(&fake, "rule rm a");
    assert_eq!((ran.exit, ran.out.lines()), (exit::DONE, vec!["rule a: not there, nothing to remove".to_owned()]));
}

#[test]
fn not_supported_is_exit_5_and_no_instance_exit_3() {
    let fake = Fake::start();
    fake.answer("POST /v1/evict", 501, json!({"code": "not_supported", "detail": "no"}));
    assert_eq!(ran_on(&fake, "evict").exit, exit::NOT_SUPPORTED);
    let ran = ran(&fake, "rule list -H unix:///nonexistent/n.sock");
    assert_eq!(ran.exit, exit::NO_INSTANCE);
    assert!(ran.err.lines()[0].starts_with("error: ") && ran.err.lines()[1].starts_with("hint: "));
}

#[test]
fn the_only_living_instance_needs_no_choice_and_among_several_one_must_be_chosen() {
    let fake = Fake::start();
    fake.answer("GET /v1/mode", 200, json!({"mode": "enospc", "remaining": "12s"}));
    assert_eq!(ran(&fake, "mode").exit, exit::NO_INSTANCE);
    let _one = alive(&fake, "n1");
    assert_eq!(ran(&fake, "mode").out.lines(), ["mode enospc for 12s more"]);
    let _two = alive(&fake, "n2");
    let undecided = ran(&fake, "mode");
    assert_eq!(undecided.exit, exit::USAGE);
    assert!(undecided.err.text().contains("n1, n2"));
    assert_eq!(ran(&fake, "mode -H n2").exit, exit::DONE);
    assert_eq!(ran(&fake, "mode -H n3").exit, exit::NO_INSTANCE);
}

#[test]
fn reset_all_beside_a_dead_mount_does_the_part_of_the_machine_and_tells_of_the_dead() {
    let fake = Fake::start();
    drop(alive(&fake, "n1"));
    fake.answer("POST /v1/reset", 200, json!({"devices": ["d1"], "leases": []}));
    assert_eq!(ran(&fake, "reset --all").exit, exit::NO_INSTANCE);
    let _host = alive_at(&fake, "host", None);
    let said = ran(&fake, "reset --all");
    assert_eq!((said.exit, said.out.lines()), (exit::NO_INSTANCE, vec!["devices removed: d1".to_owned()]));
    assert!(said.err.text().contains("n1 has died"), "{}", said.err.text());
    assert_eq!(fake.seen().pop().unwrap().0, "POST /v1/reset?all=true");
    let asked = fake.seen().len();
    for words in ["reset", "-H n1 reset --all"] {
        assert_eq!(ran(&fake, words).exit, exit::NO_INSTANCE, "{words}");
    }
    assert_eq!(fake.seen().len(), asked);
}

#[test]
fn several_hosts_each_answer_under_their_name_and_the_worst_code_wins() {
    let (one, two) = (Fake::named("one"), Fake::named("two"));
    one.answer("GET /v1/mode", 200, json!({"mode": "enospc"}));
    two.answer("GET /v1/mode", 404, not_found());
    let both = format!("-H {} -H {} mode", one.host(), two.host());
    let text = ran(&one, &both);
    assert_eq!(text.exit, exit::NO_SUCH_THING);
    assert_eq!(text.out.lines(), ["one: mode enospc"]);
    assert_eq!(text.err.lines()[0], "two: error: no rule \"wal-eio\"");
    two.answer("GET /v1/mode", 200, json!({"mode": "allow_writes"}));
    let as_json = ran(&one, &format!("--json {both}"));
    let documents: Vec<Value> = as_json.out.lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(as_json.exit, exit::DONE);
    assert_eq!(
        documents[0],
        json!({"host": one.host().to_string(), "instance": "one", "status": 200, "body": {"mode": "enospc"}})
    );
    assert_eq!(documents[1]["instance"], "two");
}

#[test]
fn rule_wait_ends_with_the_event_or_with_124_and_what_is_known() {
    let fake = Fake::start();
    let wait = "GET /v1/rules/wal-eio/wait";
    let event = json!({"event": "injection", "rule": "wal-eio", "op": "fsync"});
    fake.answer(wait, 200, json!({"fired": true, "event": event}));
    let fired = ran_on(&fake, "rule wait wal-eio --injections 2 --since b-7 --for 1s");
    assert_eq!(fired.exit, exit::DONE);
    assert!(fired.out.text().contains("fsync"));
    assert_eq!(fake.seen()[0].0, "GET /v1/rules/wal-eio/wait?injections=2&since=b-7&for=1s");
    fake.answer(wait, 200, json!({"fired": false, "matches": 3, "state": "armed"}));
    let late = ran_on(&fake, "rule wait wal-eio --for 1s");
    assert_eq!(late.exit, exit::TIMED_OUT);
    assert_eq!(late.err.lines(), ["error: rule wal-eio has not fired once within 1s: 3 matches, state armed"]);
    assert_eq!(ran_on(&fake, "rule wait wal-eio --json").out.document()["matches"], 3);
}

#[test]
fn the_client_waits_longer_than_the_wait_it_asked_for() {
    let fake = Fake::start();
    fake.answer_late("GET /v1/rules/a/wait", Duration::from_millis(400), json!({"fired": false, "state": "armed"}));
    assert_eq!(ran_on(&fake, "rule wait a --for 10ms --connect-timeout 100ms").exit, exit::TIMED_OUT);
}

#[test]
fn history_ends_well_and_a_followed_stream_only_with_bye() {
    let fake = Fake::start();
    let hello = "{\"event\":\"hello\",\"newest\":\"b-1\"}\n";
    let rule = "{\"id\":\"b-1\",\"event\":\"rule\",\"time\":\"2026-11-20T12:00:01.123456789Z\",\"rule\":\"a\"}\n";
    let bye = "{\"event\":\"bye\"}\n";
    fake.answer_text("GET /v1/events", &format!("{hello}{rule}"));
    let history = ran_on(&fake, "events --rule 'a*' --limit 5");
    assert_eq!((history.exit, history.out.lines()), (exit::DONE, vec!["12:00:01.123456 rule      rule=a".to_owned()]));
    assert_eq!(fake.seen()[0].0, "GET /v1/events?follow=false&rule=a*&limit=5");
    assert_eq!(ran_on(&fake, "events --json").out.lines().len(), 1);
    assert_eq!(ran_on(&fake, "events --follow").exit, exit::NO_INSTANCE);
    assert_eq!(ran_on(&fake, "events --follow --limit 1").exit, exit::DONE);
    fake.answer_text("GET /v1/events", &format!("{hello}{rule}{bye}"));
    let followed = ran_on(&fake, "events --follow --format json");
    assert_eq!((followed.exit, followed.out.lines().len()), (exit::DONE, 3));
}

#[test]
fn a_reader_that_goes_away_ends_a_stream_quietly() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fake = Fake::start();
    fake.answer_text("GET /v1/events", "{\"event\":\"rule\"}\n{\"event\":\"rule\"}\n");
    let host = fake.host().to_string();
    let cli = Cli::try_parse_from(["nemesisfs", "events", "--follow", "-H", &host]).unwrap();
    let err = Paper::default();
    let console = Console::new(Box::new(Closed), Box::new(err.clone()), false, false);
    assert_eq!((run(&cli, fake.dir(), &console), err.text().as_str()), (exit::DONE, ""));
}

#[test]
fn apply_replaces_the_set_and_tells_how_to_get_the_old_one_back() {
    let fake = Fake::start();
    fake.answer("GET /v1/rules", 200, json!({"rules": [wal_eio()], "cursor": "b-1"}));
    fake.answer("PUT /v1/rules", 200, json!({"rules": [wal_eio()], "pending": [], "cursor": "b-2"}));
    let file = fake.dir().join("rules.toml");
    fs::write(&file, "[[rules]]\nname = \"wal-eio\"\n[rules.fault]\nkind = \"error\"\nerrno = \"EIO\"\n").unwrap();
    let ran = ran_on(&fake, &format!("rule apply {}", file.display()));
    assert_eq!(ran.exit, exit::DONE);
    let lines = ran.out.lines();
    assert_eq!(lines[0], "1 rules in force, in this order");
    assert!(lines[2].ends_with("rule clear") && lines[3].contains("rule add wal-eio"), "{lines:?}");
    let sent = json!({"rules": [{"name": "wal-eio", "fault": {"kind": "error", "errno": "EIO"}}]});
    assert_eq!(fake.seen().pop().unwrap().1, sent);
    assert_eq!(ran_on(&fake, "rule apply /nonexistent.toml").exit, exit::FAILED);
}

#[test]
fn modes_and_space_tell_how_it_was_before() {
    let fake = Fake::start();
    let _lock = alive(&fake, "n1");
    fake.answer("GET /v1/mode", 200, json!({"mode": "allow_writes", "remaining": null}));
    fake.answer("PUT /v1/mode", 200, json!({"mode": "enospc", "remaining": "30s", "pending": []}));
    let mode = ran(&fake, "mode enospc --interval 30s");
    assert_eq!(mode.out.lines(), ["mode enospc for 30s more", "undo: nemesisfs mode allow_writes"]);
    assert_eq!(fake.seen().pop().unwrap().1, json!({"mode": "enospc", "for": "30s"}));
    let limit = json!({"virtual": {"free": 0, "size": 1073741824, "used": 1073741824, "requested": {"used": "98%"}}});
    fake.answer("GET /v1/space", 200, limit.clone());
    fake.answer("PUT /v1/space", 200, limit);
    let space = ran(&fake, "space virtual --free 0");
    assert_eq!(
        space.out.lines(),
        ["space: 0 B free of 1.0 GiB, 1.0 GiB used", "undo: nemesisfs space virtual --used 98%"]
    );
    assert_eq!(fake.seen().pop().unwrap().1, json!({"virtual": {"free": "0"}}));
}

#[test]
fn ballast_is_brought_back_as_it_was_asked_for() {
    let fake = Fake::start();
    let _lock = alive(&fake, "n1");
    let asked = json!({"until_free": "30MiB", "redirect_coredumps": true, "for": "20s"});
    let filled = json!({"state": "full", "file": "f", "requested": asked, "remaining": "17s"});
    fake.answer("GET /v1/space", 200, json!({"virtual": null, "quota": [], "ballast": filled}));
    fake.answer("PUT /v1/space", 200, json!({"ballast": null}));
    let undo = ran(&fake, "space ballast --until-free 40MiB").out.lines().pop().unwrap();
    for word in ["undo: nemesisfs space ballast --", " --until-free 30MiB", " --for 17s", " --redirect-coredumps"] {
        assert!(undo.contains(word) && !undo.contains("--force"), "{undo}");
    }
    assert_eq!(fake.seen().pop().unwrap().1, json!({"ballast": {"until_free": "40MiB"}}));
}

#[test]
fn usage_errors_are_exit_2() {
    for words in ["space virtual", "space virtual --free 0 --used 1%", "rule add a", "mode enospc --for 3", "nonsense"]
    {
        let error = Cli::try_parse_from(shlex::split(&format!("nemesisfs {words}")).unwrap()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{words}");
    }
    let fake = Fake::start();
    assert_eq!(ran(&fake, "umount").exit, exit::USAGE);
}

#[test]
fn list_tells_the_living_from_the_dead_and_the_silent() {
    let fake = Fake::start();
    fake.answer("GET /v1/health", 200, json!({"status": "ok", "instance": "n1", "mode": "enospc", "rules": 2}));
    let _one = alive(&fake, "n1");
    drop(alive(&fake, "n2"));
    let silent = Fake::start();
    let _three = alive(&silent, "n3");
    fs::copy(silent.dir().join("n3.json"), fake.dir().join("n3.json")).unwrap();
    let _three = Flock::lock(File::open(fake.dir().join("n3.json")).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
    let ran = ran(&fake, "list --json");
    assert_eq!(ran.exit, exit::DONE);
    let instances = ran.out.document()["instances"].as_array().unwrap().clone();
    let here = instances.iter().filter(|row| row["state"] != "stale" && row["state"] != "elsewhere");
    let states: Vec<_> =
        here.map(|row| (row["instance"].clone(), row["state"].clone(), row["rules"].clone())).collect();
    assert_eq!(
        states,
        [
            (json!("n1"), json!("alive"), json!(2)),
            (json!("n2"), json!("dead"), Value::Null),
            (json!("n3"), json!("unresponsive"), Value::Null)
        ]
    );
}

#[test]
fn umount_of_what_is_not_mounted_is_success_twice_and_forgets_the_dead() {
    let fake = Fake::start();
    drop(alive(&fake, "n1"));
    for _ in 0..2 {
        let ran = ran(&fake, "umount /nonexistent/n1");
        assert_eq!((ran.exit, ran.out.lines()), (exit::DONE, vec!["/nonexistent/n1: not mounted".to_owned()]));
    }
    assert!(!fake.dir().join("n1.json").exists());
    assert_eq!(ran(&fake, "umount --instance n9 --force").exit, exit::DONE);
}

#[test]
fn umount_waits_until_the_daemon_has_ended_and_tells_who_holds_a_busy_one() {
    let fake = Fake::start();
    let lock = alive(&fake, "n1");
    fake.answer(
        "POST /v1/unmount",
        409,
        json!({"code": "busy", "detail": "the mount is busy",
        "holders": [{"pid": 9, "comm": "sh", "what": "/x"}]}),
    );
    let busy = ran(&fake, "umount --instance n1");
    assert_eq!(busy.exit, exit::FAILED);
    assert_eq!(busy.err.lines(), ["error: the mount is busy", "  held by pid 9 (sh): /x"]);
    fake.answer("POST /v1/unmount", 200, json!({"unmounted": true}));
    let started = Instant::now();
    let daemon = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(lock);
    });
    let ended = ran(&fake, "umount /nonexistent/n1 --lazy");
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!((ended.exit, ended.out.lines()), (exit::DONE, vec!["/nonexistent/n1 unmounted".to_owned()]));
    assert_eq!(fake.seen().pop().unwrap().1, json!({"how": "lazy"}));
    daemon.join().unwrap();
}

#[test]
fn completions_are_made_for_each_shell() {
    let fake = Fake::start();
    for shell in ["bash", "zsh", "fish"] {
        assert!(ran(&fake, &format!("completions {shell}")).out.text().contains("nemesisfs"), "{shell}");
    }
}

#[test]
fn a_device_is_told_with_its_commands_and_how_to_undo_it() {
    let fake = Fake::start();
    let _lock = alive(&fake, "n1");
    let made = json!({"name": "d0", "device": "/dev/mapper/d0", "state": "ready", "mode": "allow_writes",
        "mounts": ["/mnt/d0"], "commands": ["dmsetup create d0"], "undo": "device remove d0", "warnings": ["little room"]});
    fake.answer("PUT /v1/devices/d0", 201, made);
    let create =
        ran(&fake, "device create d0 --image /d0.img --size 1GiB --filesystem xfs --log-image /d0.log --log-size 2GiB");
    assert_eq!((create.exit, create.err.text().as_str()), (exit::DONE, ""));
    assert_eq!(
        create.out.lines(),
        [
            "device d0 (/dev/mapper/d0): ready, mode allow_writes, mounted at /mnt/d0",
            "  dmsetup create d0",
            "warning: little room",
            "undo: nemesisfs device remove d0"
        ]
    );
    let sent = fake.seen().pop().unwrap().1;
    let log = json!({"image": "/d0.log", "size": "2GiB"});
    assert_eq!(sent, json!({"image": "/d0.img", "size": "1GiB", "filesystem": "xfs", "log": log}));

    fake.answer("PUT /v1/devices/d0/mode", 200, json!({"name": "d0", "device": "/dev/mapper/d0", "state": "ready"}));
    let mode = ran(&fake, "device mode d0 drop_writes --and error_reads --interval 5s --up 1s --down 2s --sync-fs");
    assert_eq!(mode.exit, exit::DONE);
    let sent = fake.seen().pop().unwrap().1;
    let wanted =
        json!({"mode": "drop_writes", "and": ["error_reads"], "for": "5s", "up": "1s", "down": "2s", "sync_fs": true});
    assert_eq!(sent, wanted);
}

#[test]
fn a_host_that_cannot_have_devices_is_exit_5_and_a_device_that_is_not_there_is_removed() {
    let fake = Fake::start();
    let _lock = alive(&fake, "n1");
    let problem = json!({"code": "not_supported", "detail": "no device mapper", "hint": "elsewhere"});
    fake.answer("PUT /v1/devices/d0", 501, problem);
    let create = ran(&fake, "device create d0 --device /dev/sdb");
    assert_eq!((create.exit, create.err.lines()[1].as_str()), (exit::NOT_SUPPORTED, "hint: elsewhere"));
    fake.answer("DELETE /v1/devices/d0", 204, Value::Null);
    let remove = ran(&fake, "device remove d0");
    assert_eq!((remove.exit, remove.out.lines()), (exit::DONE, vec!["device d0: not there".to_owned()]));
    for words in ["device create d0", "device create d0 --image a --device b", "device mode d0"] {
        assert!(Cli::try_parse_from(shlex::split(&format!("nemesisfs {words}")).unwrap()).is_err(), "{words}");
    }
}
