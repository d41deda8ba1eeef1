//! Rules through the socket and the command line: their life, their order, their counting.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::Mounted;

/// Which of so many writes of one byte fail, by number from 1.
fn failures(mounted: &Mounted, count: u64) -> Vec<u64> {
    let file = File::options().write(true).create(true).truncate(false).open(mounted.path("f")).unwrap();
    (1..=count).filter(|_| file.write_at(b"x", 0).is_err()).collect()
}

fn error_on_write(trigger: Value) -> Value {
    json!({"match": {"ops": ["write"]}, "trigger": trigger, "fault": {"kind": "error", "errno": "EIO"}})
}

#[test]
fn triggers_count_exactly() {
    let mounted = Mounted::new();
    let cases = [
        (json!({}), vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (json!({"times": 3}), vec![1, 2, 3]),
        (json!({"skip": 7}), vec![8, 9, 10]),
        (json!({"every": 4}), vec![1, 5, 9]),
        (json!({"skip": 2, "every": 3, "times": 2}), vec![3, 6]),
        (json!({"every": 3}), vec![1, 4, 7, 10]),
    ];
    for (i, (trigger, expected)) in cases.into_iter().enumerate() {
        let name = format!("r{i}");
        mounted.rule(&name, error_on_write(trigger.clone()));
        assert_eq!(failures(&mounted, 10), expected, "{trigger}");
        let rule = mounted.http("GET", &format!("/v1/rules/{name}"), None).body;
        assert_eq!((rule["matches"].as_u64(), rule["injections"].as_u64()), (Some(10), Some(expected.len() as u64)));
        mounted.cli(&["rule", "rm", &name]);
    }
    mounted.end();
}

#[test]
fn the_same_seed_gives_the_same_injections() {
    let run = |seed: u64| {
        let mounted = Mounted::with(&["--seed", "7"]);
        mounted.rule("half", error_on_write(json!({"probability": 0.5, "seed": seed})));
        let failed = failures(&mounted, 200);
        mounted.rule("other", error_on_write(json!({"probability": 0.5})));
        mounted.cli(&["rule", "rm", "half"]);
        let by_mount = failures(&mounted, 200);
        mounted.end();
        (failed, by_mount)
    };
    let (first, by_mount) = run(1);
    assert!((60..140).contains(&first.len()), "{}", first.len());
    let (again, by_mount_again) = run(1);
    assert_eq!((&first, &by_mount), (&again, &by_mount_again));
    assert_ne!(run(2).0, first);
}

#[test]
fn the_first_rule_that_decides_ends_it_and_later_ones_do_not_count() {
    let mounted = Mounted::new();
    mounted.rule("first", error_on_write(json!({"times": 2})));
    mounted.rule("second", json!({"match": {"ops": ["write"]}, "fault": {"kind": "error", "errno": "ENOSPC"}}));
    let file = File::create(mounted.path("f")).unwrap();
    let errnos: Vec<_> = (0..4).map(|_| file.write_at(b"x", 0).unwrap_err().raw_os_error().unwrap()).collect();
    assert_eq!(errnos, [libc::EIO, libc::EIO, libc::ENOSPC, libc::ENOSPC]);
    let second = mounted.http("GET", "/v1/rules/second", None).body;
    assert_eq!(second["matches"], 2, "while the first decided, the second did not match");
    drop(file);
    mounted.end();
}

#[test]
fn the_same_definition_keeps_its_counters_and_a_changed_one_starts_anew() {
    let mounted = Mounted::new();
    let put = |trigger: Value| mounted.rule("r", error_on_write(trigger))["matches"].as_u64().unwrap();
    put(json!({"times": 2}));
    failures(&mounted, 5);
    assert_eq!(put(json!({"times": 2})), 5);
    assert_eq!(mounted.http("PATCH", "/v1/rules/r", Some(&json!({"enabled": false}))).body["state"], "disabled");
    assert!(failures(&mounted, 3).is_empty());
    mounted.cli(&["rule", "enable", "r"]);
    assert_eq!(mounted.http("GET", "/v1/rules/r", None).body["matches"], 5);
    assert_eq!(put(json!({"times": 3})), 0);
    assert_eq!(failures(&mounted, 5), [1, 2, 3]);
    mounted.end();
}

#[test]
fn a_set_is_replaced_at_once_and_keeps_its_order() {
    let mounted = Mounted::new();
    mounted.rule("z", error_on_write(json!({})));
    let rule = |name: &str| {
        let mut rule = error_on_write(json!({}));
        rule["name"] = name.into();
        rule
    };
    let answer = mounted.http("PUT", "/v1/rules", Some(&json!({"rules": [rule("b"), rule("a")]})));
    assert_eq!(answer.status, 200);
    let names = || {
        let rules = mounted.http("GET", "/v1/rules", None).body["rules"].clone();
        rules.as_array().unwrap().iter().map(|rule| rule["name"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(), ["b", "a"]);
    mounted.rule("c", error_on_write(json!({})));
    mounted.rule("b", error_on_write(json!({"skip": 1})));
    assert_eq!(names(), ["b", "a", "c"], "a new name at the end, a known one in its place");
    let removed = mounted.http("DELETE", "/v1/rules/a", None);
    assert_eq!((removed.status, &removed.body["removed"]), (200, &json!(["a"])));
    assert!(removed.body["cursor"].is_string(), "a reply to a change: {removed:?}");
    assert_eq!(mounted.http("DELETE", "/v1/rules/a", None).status, 204);
    let file = mounted.run_dir().join("rules.toml");
    std::fs::write(&file, "[[rules]]\nname = \"t\"\nmatch.ops = [\"read\"]\nfault = { kind = \"drop\" }\n").unwrap();
    assert_eq!(mounted.try_cli(&["rule", "apply", file.to_str().unwrap()]).code, 1, "reads cannot be dropped");
    std::fs::write(&file, "[[rules]]\nname = \"t\"\nmatch.ops = [\"write\"]\nfault = { kind = \"drop\" }\n").unwrap();
    mounted.cli(&["rule", "apply", file.to_str().unwrap()]);
    assert_eq!(names(), ["t"]);
    mounted.cli(&["rule", "clear"]);
    assert!(names().is_empty());
    mounted.end();
}

#[test]
fn a_rule_matches_by_path_and_follows_the_file() {
    let mounted = Mounted::new();
    let path = |name: &str| mounted.path(name);
    std::fs::create_dir_all(path("wal/deep")).unwrap();
    for name in ["wal/a", "wal/deep/b", "data"] {
        std::fs::write(path(name), "x").unwrap();
    }
    mounted.error_rule("wal", "write", "/wal/*", "EIO", None);
    let fails = |name: &str| File::options().write(true).open(path(name)).unwrap().write_at(b"x", 0).is_err();
    assert!(fails("wal/a") && !fails("wal/deep/b") && !fails("data"));
    std::fs::rename(path("data"), path("wal/data")).unwrap();
    assert!(fails("wal/data"), "under its new name");
    std::fs::rename(path("wal"), path("log")).unwrap();
    assert!(!fails("log/a") && !fails("log/data"), "the directory has moved");
    std::fs::create_dir(path("wal")).unwrap();
    std::fs::hard_link(path("log/a"), path("wal/link")).unwrap();
    assert!(fails("log/a"), "any of its names counts");
    let events = mounted.injections("wal");
    assert_eq!(events[0]["path"], "/wal/a");
    assert_eq!(events[1]["path"], "/wal/data");
    mounted.end();
}

#[test]
fn either_path_of_a_rename_or_link_matches() {
    let mounted = Mounted::new();
    for name in ["a", "b"] {
        std::fs::write(mounted.path(name), "x").unwrap();
    }
    for path in ["/a", "/c"] {
        mounted.error_rule("r", "rename", path, "EIO", None);
        assert!(std::fs::rename(mounted.path("a"), mounted.path("c")).is_err(), "{path}");
        std::fs::rename(mounted.path("b"), mounted.path("d")).unwrap();
        std::fs::rename(mounted.path("d"), mounted.path("b")).unwrap();
    }
    for path in ["/a", "/l"] {
        mounted.error_rule("r", "link", path, "EIO", None);
        assert!(std::fs::hard_link(mounted.path("a"), mounted.path("l")).is_err(), "{path}");
    }
    mounted.end();
}

#[test]
fn a_rule_matches_by_process_user_and_range() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("f"), [1; 20_000]).unwrap();
    let file = File::options().write(true).open(mounted.path("f")).unwrap();
    let rule = |conditions: Value| {
        mounted.rule("r", json!({"match": conditions, "fault": {"kind": "error", "errno": "EIO"}}));
    };
    let fails_at = |offset: u64| file.write_all_at(&[2; 100], offset).is_err();
    rule(json!({"ops": ["write"], "pid": std::process::id()}));
    assert!(fails_at(0), "whichever of its threads writes");
    rule(json!({"ops": ["write"], "pid": 1}));
    assert!(!fails_at(0));
    rule(json!({"ops": ["write"], "uid": 0}));
    assert!(fails_at(0));
    rule(json!({"ops": ["write"], "uid": 4711}));
    assert!(!fails_at(0));
    rule(json!({"ops": ["write"], "offset": "4KiB..8KiB"}));
    assert!(!fails_at(0) && !fails_at(3996) && fails_at(3997) && fails_at(8191) && !fails_at(8192));
    drop(file);
    mounted.end();
}

#[test]
fn rules_from_a_file_are_in_force_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.json");
    let set =
        json!({"rules": [{"name": "w", "match": {"ops": ["write"]}, "fault": {"kind": "error", "errno": "EROFS"}}]});
    std::fs::write(&file, set.to_string()).unwrap();
    let mounted = Mounted::with(&["--rules", file.to_str().unwrap()]);
    assert_eq!(failures(&mounted, 2).len(), 2);
    mounted.end();
}

#[test]
fn changing_the_rules_disturbs_nobody_who_is_not_meant() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| (0..20_000u64).for_each(|i| file.write_all_at(&i.to_le_bytes(), i * 8).unwrap()));
        let mut changes = 0;
        while !writer.is_finished() {
            mounted.error_rule("none", "write", "/other", "EIO", None);
            mounted.http("DELETE", "/v1/rules/none", None);
            changes += 1;
        }
        writer.join().unwrap();
        assert!(changes > 10, "{changes}");
    });
    drop(file);
    mounted.end();
}

#[test]
fn modes_do_what_they_say() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("f"), "old").unwrap();
    let write = || std::fs::write(mounted.path("f"), "new");
    let read = || File::open(mounted.path("f")).and_then(|file| file.read_at(&mut [0; 3], 0));
    let sync = || File::options().write(true).open(mounted.path("f")).unwrap().sync_all();
    let create = || File::create(mounted.path("new")).map(drop);
    // What works under each mode: write, read, sync, create.
    for (mode, works) in [
        ("error_writes", [false, true, false, true]),
        ("error_reads", [true, false, true, true]),
        ("error_all", [false, false, false, false]),
        ("drop_writes", [true, true, true, true]),
        ("allow_writes", [true, true, true, true]),
    ] {
        let _ = std::fs::remove_file(mounted.path("new"));
        mounted.cli(&["mode", mode]);
        assert_eq!([write().is_ok(), read().is_ok(), sync().is_ok(), create().is_ok()], works, "{mode}");
        assert!(mounted.cli(&["mode"]).contains(mode));
        mounted.cli(&["mode", "allow_writes"]);
    }
    mounted.end();
}

#[test]
fn the_answer_to_a_removal_has_the_place_on_the_stream_before_it() {
    let mounted = Mounted::new();
    mounted.rule("a", error_on_write(json!({})));
    failures(&mounted, 1);
    let answer = mounted.http("DELETE", "/v1/rules/a", None);
    assert_eq!((answer.status, &answer.body["removed"]), (200, &json!(["a"])), "{answer:?}");
    assert_eq!((&answer.body["pending"], &answer.body["warnings"]), (&json!([]), &json!([])), "{answer:?}");
    let cursor = answer.body["cursor"].as_str().unwrap();
    let printed = mounted.cli(&["events", "--since", cursor, "--json"]);
    let events: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said: Vec<&Value> =
        events.iter().filter(|event| event["event"] != "hello").map(|event| &event["action"]).collect();
    assert_eq!(said, [&json!("removed")], "{events:?}");
    mounted.rule("b", error_on_write(json!({})));
    let said: Value = serde_json::from_str(&mounted.cli(&["rule", "rm", "b", "--json"])).unwrap();
    assert!(said["cursor"].is_string(), "{said}");
    mounted.end();
}

#[test]
fn enabling_a_rule_whose_life_is_over_says_so() {
    let mounted = Mounted::new();
    mounted.rule("once", error_on_write(json!({"times": 1})));
    failures(&mounted, 1);
    assert!(mounted.cli(&["rule", "enable", "once"]).contains("enabled, but exhausted: "));
    mounted.rule("short", error_on_write(json!({"for": "10ms"})));
    mounted.cli(&["rule", "disable", "short"]);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(mounted.cli(&["rule", "enable", "short"]).contains("enabled, but expired: "));
    mounted.rule("long", error_on_write(json!({})));
    assert!(mounted.cli(&["rule", "disable", "long"]).contains("long disabled: "));
    assert!(mounted.cli(&["rule", "enable", "long"]).contains("long enabled: "));
    mounted.end();
}

#[test]
fn what_is_null_is_not_given() {
    let mounted = Mounted::new();
    let place = json!({"ops": ["write"], "path": null, "path_regex": null, "pid": null, "offset": null, "type": null});
    let trigger = json!({"probability": null, "skip": null, "every": null, "times": 1, "per": null, "seed": null});
    let rule = json!({"name": null, "enabled": null, "required": null, "match": place, "trigger": trigger,
        "fault": {"kind": "error", "errno": "EIO", "timing": null}, "labels": null});
    let set = json!({"rules": [{"name": "b", "match": null, "trigger": null, "fault": {"kind": "drop"}}]});
    assert_eq!(mounted.http("PUT", "/v1/rules", Some(&set)).status, 200);
    let told = mounted.rule("a", rule);
    let plain = mounted.rule(
        "plain",
        json!({"match": {"ops": ["write"]}, "trigger": {"times": 1}, "fault": {"kind": "error", "errno": "EIO"}}),
    );
    for part in ["enabled", "required", "match", "trigger", "fault", "labels"] {
        assert_eq!(told[part], plain[part], "{part}");
    }
    let ops = mounted.http("PUT", "/v1/rules/c", Some(&json!({"match": {"ops": null}, "fault": {"kind": "drop"}})));
    assert_eq!((ops.status, &ops.body["acts_on"]), (201, &json!(["write"])), "{ops:?}");
    mounted.end();
}

#[test]
fn a_parameter_without_a_value_is_not_given() {
    let mounted = Mounted::new();
    mounted.rule("a", error_on_write(json!({})));
    failures(&mounted, 1);
    let answer = mounted.http("GET", "/v1/rules/a/wait?injections=1&since=&for=30s", None);
    assert_eq!((answer.status, &answer.body["fired"]), (200, &json!(true)), "{answer:?}");
    let answer = mounted.http("GET", "/v1/events?follow=false&since=&rule=&pid=&limit=", None);
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = mounted.http("GET", &format!("/v1/events?follow=false&pid={}", (1u64 << 32) + 1), None);
    assert_eq!(answer.status, 400, "no process has such a number: {answer:?}");
    mounted.end();
}

/// The contract's own example: of a rule on writes and fsyncs in a range, fsyncs fire too.
#[test]
fn a_range_narrows_what_has_bytes_and_not_what_is_named_beside_it() {
    let mounted = Mounted::new();
    let file = std::fs::File::create(mounted.path("f")).unwrap();
    let rule =
        |ops: Value| json!({"match": {"ops": ops, "offset": "0..4KiB"}, "fault": {"kind": "error", "errno": "EIO"}});
    let told = mounted.rule("r", rule(json!(["write", "fsync"])));
    assert_eq!(told["acts_on"], json!(["write", "fsync"]));
    let is_eio = |done: std::io::Result<()>| done.is_err_and(|error| error.raw_os_error() == Some(libc::EIO));
    assert!(is_eio(file.sync_all()));
    assert!(is_eio(file.write_all_at(b"x", 0)));
    assert!(file.write_all_at(b"x", 4096).is_ok());
    for ops in [json!(["*"]), json!([])] {
        let told = mounted.rule("r", rule(ops));
        assert_eq!(told["acts_on"], json!(["setattr", "read", "write", "copy_file_range", "fallocate"]));
        assert!(
            file.sync_all().is_ok()
                && is_eio(file.write_all_at(b"x", 0))
                && std::fs::metadata(mounted.path("f")).is_ok()
        );
    }
    drop(file);
    mounted.end();
}

#[test]
fn a_kind_that_is_narrowed_by_its_attributes_acts_on_what_these_leave() {
    let mounted = Mounted::new();
    std::fs::write(mounted.backing.join("f"), [0; 100]).unwrap();
    let told =
        mounted.rule("r", json!({"fault": {"kind": "corrupt", "mode": "byte", "value": 7, "nth": 1, "when": "read"}}));
    assert_eq!(told["acts_on"], json!(["read"]));
    assert_eq!(std::fs::read(mounted.path("f")).unwrap()[..2], [7, 0]);
    mounted.end();
}

/// Somebody makes it fire all the time: what comes behind the place that the answer tells is all that the rule has done.
#[test]
fn no_injection_lies_before_the_place_that_a_change_tells() {
    let mounted = Mounted::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = || {
            let file = std::fs::File::create(mounted.path("f")).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = file.write_all_at(b"x", 0);
            }
        };
        // However the test ends.
        struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        scope.spawn(writer);
        for round in 0..40 {
            let rule = json!({"match": {"ops": ["write"]}, "trigger": {"times": 1},
                "fault": {"kind": "error", "errno": "EIO"}, "labels": {"round": round.to_string()}});
            let cursor = match round % 2 {
                0 => mounted.rule("r", rule)["cursor"].clone(),
                _ => {
                    let mut rule = rule;
                    rule["name"] = json!("r");
                    let answer = mounted.http("PUT", "/v1/rules", Some(&json!({"rules": [rule]})));
                    answer.body["rules"][0]["cursor"].clone()
                }
            };
            let since = cursor.as_str().unwrap();
            let waited = mounted.http("GET", &format!("/v1/rules/r/wait?since={since}&for=10s"), None);
            assert_eq!(waited.body["event"]["labels"]["round"], json!(round.to_string()), "{waited:?}");
            mounted.http("DELETE", "/v1/rules/r", None);
        }
    });
    mounted.end();
}

#[test]
fn who_waits_for_a_rule_is_told_that_the_instance_ends() {
    let mounted = Mounted::new();
    mounted.rule("a", error_on_write(json!({})));
    let mut waiting = UnixStream::connect(&mounted.socket).unwrap();
    waiting
        .write_all(b"GET /v1/rules/a/wait?for=30s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    // One thread answers all: when it has answered these, it has heard the first.
    (0..10).for_each(|_| drop(mounted.http("GET", "/v1/mode", None)));
    mounted.cli(&["umount", "--instance", "t"]);
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("not_found"), "{answer}");
}

#[test]
fn to_remove_a_mode_that_is_not_set_is_no_error() {
    let mounted = Mounted::new();
    assert_eq!(mounted.http("DELETE", "/v1/rules/mode", None).status, 204);
    mounted.cli(&["rule", "rm", "mode"]);
    mounted.cli(&["mode", "error_all"]);
    assert_eq!(mounted.http("DELETE", "/v1/rules/mode", None).status, 409);
    mounted.cli(&["mode", "allow_writes"]);
    mounted.end();
}

#[test]
fn a_mode_is_shown_with_how_long_it_was_to_last_and_how_long_it_still_does() {
    let mounted = Mounted::new();
    mounted.cli(&["mode", "drop_writes", "--for", "5m", "--up", "3s", "--down", "1s"]);
    let shown = mounted.http("GET", "/v1/mode", None).body;
    assert_eq!((&shown["for"], &shown["up"], &shown["down"]), (&json!("5m"), &json!("3s"), &json!("1s")), "{shown}");
    assert!(shown["remaining"].is_string(), "{shown}");
    mounted.cli(&["mode", "allow_writes"]);
    let shown = mounted.http("GET", "/v1/mode", None).body;
    assert_eq!((&shown["for"], &shown["remaining"]), (&Value::Null, &Value::Null), "{shown}");
    mounted.end();
}

#[test]
fn a_path_of_the_host_is_told_to_be_none_of_the_mount() {
    let mounted = Mounted::new();
    let host = mounted.path("wal/**");
    let told = mounted.error_rule("a", "write", host.to_str().unwrap(), "EIO", None);
    let warning = told["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.contains("\"/wal/**\""), "{told}");
    assert_eq!(mounted.error_rule("a", "write", "/wal/**", "EIO", None)["warnings"], json!([]));
    mounted.end();
}

#[test]
fn what_waits_for_a_rule_waits_again_when_that_becomes_another_one() {
    let mounted = Mounted::new();
    std::fs::write(mounted.backing.join("r"), [1; 100]).unwrap();
    let file = File::open(mounted.path("r")).unwrap();
    let read = || file.read_at(&mut [0; 100], 0);
    mounted.rule("first", error_on_write(json!({"times": 1})));
    let after = json!({"match": {"ops": ["read"]}, "trigger": {"after_rule": "first"}, "fault": {"kind": "error", "errno": "EIO"}});
    mounted.rule("then", after);
    assert_eq!(read().unwrap(), 100);
    assert_eq!(failures(&mounted, 1), [1]);
    crate::support::eventually("it fails after the first", || read().is_err());
    mounted.rule("first", error_on_write(json!({"times": 2})));
    crate::support::eventually("it waits again", || read().is_ok_and(|read| read == 100));
    assert_eq!(failures(&mounted, 1), [1]);
    crate::support::eventually("it fails again, whatever the kernel has kept", || read().is_err());
    mounted.reset();
    drop(file);
    mounted.end();
}
