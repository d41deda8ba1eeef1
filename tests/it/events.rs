//! The stream of events: complete, filtered, resumed, and never in anybody's way.

use std::fs::File;
use std::io::{BufRead, Read};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Mounted, eventually, next_event, within};

/// Makes so many injections: each is one failed write.
fn inject(mounted: &Mounted, count: usize) {
    let file = File::options().write(true).create(true).truncate(false).open(mounted.path("f")).unwrap();
    for _ in 0..count {
        file.write_at(b"x", 0).unwrap_err();
    }
}

fn armed() -> Mounted {
    let mounted = Mounted::new();
    mounted.error_rule("eio", "write", "/f", "EIO", None);
    mounted
}

#[test]
fn an_injection_is_on_the_stream_as_the_contract_says() {
    let mounted = armed();
    let mut stream = mounted.stream("", "");
    let (_, hello) = next_event(&mut stream, "hello");
    assert!(hello["boot_id"].is_string() && hello["newest"].is_string(), "{hello}");
    inject(&mounted, 1);
    let (id, event) = next_event(&mut stream, "injection");
    assert_eq!(id.as_deref(), event["id"].as_str());
    let expected = json!({
        "event": "injection", "instance": "t", "rule": "eio", "kind": "error", "op": "write", "path": "/f", "offset": 0,
        "length": 1, "pid": std::process::id(), "errno": "EIO", "delay_ns": 0, "nth": 1, "repeat": false, "labels": {},
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&event[field], value, "{field} of {event}");
    }
    for field in ["time", "monotonic_ns", "ino", "fh", "tid", "uid", "comm", "worker"] {
        assert!(!event[field].is_null(), "{field} of {event}");
    }
    assert_ne!(event["tid"], 0);
    mounted.end();
}

#[test]
fn on_the_wire_the_place_of_an_event_comes_before_its_name_and_its_data() {
    let mounted = armed();
    let mut stream = mounted.stream("", "");
    next_event(&mut stream, "hello");
    inject(&mounted, 1);
    let lines = std::io::BufRead::lines(stream).map(Result::unwrap);
    let frame: Vec<String> = lines.skip_while(|line| !line.contains(':')).take(3).collect();
    let starts = ["id: ", "event: injection", "data: {"];
    assert!(frame.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{frame:?}");
    mounted.end();
}

#[test]
fn the_event_is_there_before_the_program_notices() {
    let mounted = armed();
    for n in 1..=20 {
        inject(&mounted, 1);
        assert_eq!(mounted.injections("eio").len(), n, "right after the call has failed");
    }
    mounted.end();
}

#[test]
fn filters_pass_only_what_was_asked_for() {
    let mounted = armed();
    mounted.error_rule("enospc", "write", "/g", "ENOSPC", None);
    inject(&mounted, 2);
    File::create(mounted.path("g")).unwrap().write_at(b"x", 0).unwrap_err();
    let count = |query: &str| {
        let request = format!(
            "GET /v1/events?follow=false&{query} HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\
             Connection: close\r\n\r\n"
        );
        mounted.raw(&request).lines().filter(|line| line.contains("\"event\":\"injection\"")).count()
    };
    assert_eq!(count(""), 3);
    assert_eq!(count("rule=eio"), 2);
    assert_eq!(count("rule=e*"), 3);
    assert_eq!(count("path=/g"), 1);
    assert_eq!(count("op=read"), 0);
    assert_eq!(count("kind=error"), 3);
    assert_eq!(count(&format!("pid={}", std::process::id())), 3);
    assert_eq!(count("pid=1"), 0);
    assert_eq!(count("limit=1&kind=error"), 1);
    mounted.end();
}

#[test]
fn a_client_that_resumes_misses_nothing() {
    let mounted = armed();
    let mut stream = mounted.stream("?rule=eio", "");
    next_event(&mut stream, "hello");
    inject(&mounted, 3);
    let first = next_event(&mut stream, "injection").0.unwrap();
    drop(stream);
    inject(&mounted, 2);
    for headers in [format!("Last-Event-ID: {first}\r\n"), String::new()] {
        let query = if headers.is_empty() { format!("?rule=eio&since={first}") } else { "?rule=eio".into() };
        let mut stream = mounted.stream(&query, &headers);
        let numbers: Vec<u64> =
            (0..4).map(|_| next_event(&mut stream, "injection").1["nth"].as_u64().unwrap()).collect();
        assert_eq!(numbers, [2, 3, 4, 5]);
    }
    mounted.end();
}

#[test]
fn a_client_that_fell_behind_is_told_how_much_it_missed() {
    let mounted = armed();
    inject(&mounted, 1);
    let first = mounted.injections("eio")[0]["id"].as_str().unwrap().to_string();
    // More than the ring holds.
    inject(&mounted, 20_000);
    let mut stream = mounted.stream(&format!("?since={first}"), "");
    let (_, gap) = next_event(&mut stream, "gap");
    let missed = gap["missed"].as_u64().unwrap();
    assert!(missed >= 20_000 - 16_384, "{gap}");
    let (_, event) = next_event(&mut stream, "injection");
    assert_eq!(event["nth"].as_u64().unwrap(), 1 + missed + 1, "and goes on right behind the gap");
    mounted.end();
}

#[test]
fn an_id_of_an_earlier_daemon_is_answered_with_a_gap() {
    let mounted = armed();
    inject(&mounted, 1);
    let mut stream = mounted.stream("?since=ffffff-7", "");
    let (_, gap) = next_event(&mut stream, "gap");
    assert!(gap["missed"].is_null(), "nobody knows: {gap}");
    next_event(&mut stream, "injection");
    mounted.end();
}

#[test]
fn a_client_that_stops_reading_or_dies_slows_nothing() {
    let mounted = armed();
    let file = File::options().write(true).create(true).truncate(false).open(mounted.path("f")).unwrap();
    let burst = || {
        let start = Instant::now();
        (0..2000).for_each(|_| drop(file.write_at(b"x", 0).unwrap_err()));
        start.elapsed()
    };
    let alone = burst();
    let mut stopped: Vec<_> = (0..16).map(|_| mounted.stream("", "")).collect();
    stopped.iter_mut().for_each(|stream| drop(next_event(stream, "hello")));
    let dead = stopped.split_off(8);
    drop(dead);
    // The machine may stand still in one of them.
    let together = (0..3).map(|_| burst()).min().unwrap();
    // Far from measuring: it tells a wait for a client, however short, from none.
    assert!(together < alone * 20 + Duration::from_secs(2), "{alone:?} alone, {together:?} with clients that hang");
    let mut one = stopped.pop().unwrap();
    let number = within(Duration::from_secs(10), move || next_event(&mut one, "injection").1["nth"].as_u64().unwrap());
    assert_eq!(number, Some(2001), "and what it had not read is still there");
    drop(file);
    mounted.end();
}

#[test]
fn the_stream_ends_with_bye() {
    let mounted = Mounted::new();
    let mut stream = mounted.stream("", "");
    next_event(&mut stream, "hello");
    mounted.end();
    next_event(&mut stream, "bye");
    let mut rest = String::new();
    let _ = stream.read_to_string(&mut rest);
    assert!(!rest.contains("event:"), "{rest}");
}

#[test]
fn waiting_for_a_rule_gives_the_event_or_what_was_met() {
    let mounted = armed();
    let wait = |query: &str| mounted.http("GET", &format!("/v1/rules/eio/wait?{query}"), None);
    let nothing = wait("for=200ms");
    assert_eq!(nothing.body, json!({"fired": false, "matches": 0, "state": "armed"}));
    let cursor = mounted.http("GET", "/v1/rules/eio", None).body["cursor"].as_str().unwrap().to_string();
    inject(&mounted, 2);
    let fired = wait(&format!("injections=2&since={cursor}&for=10s"));
    assert_eq!((fired.body["fired"].as_bool(), fired.body["event"]["nth"].as_u64()), (Some(true), Some(2)));
    assert_eq!(wait("injections=3&for=100ms").body["fired"], false);
    assert_eq!(mounted.http("GET", "/v1/rules/none/wait", None).status, 404);

    let said = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| mounted.try_cli(&["rule", "wait", "eio", "--injections", "9", "--for", "20s"]));
        std::thread::sleep(Duration::from_millis(200));
        mounted.cli(&["rule", "rm", "eio"]);
        waiting.join().unwrap()
    });
    assert_eq!(said.code, 4, "a rule that is removed meanwhile: {said:?}");
    mounted.end();
}

#[test]
fn changes_of_state_are_events_too() {
    let mounted = Mounted::new();
    mounted.cli(&["rule", "add", "a", "--kind", "error", "--errno", "EIO", "--op", "write", "--label", "ticket=7"]);
    mounted.cli(&["mode", "enospc"]);
    mounted.cli(&["space", "virtual", "--free", "1GiB"]);
    mounted.cli(&["reset"]);
    let events = mounted.events();
    for (name, action) in [("rule", "added"), ("mode", "set"), ("space", "set"), ("rule", "reset")] {
        assert!(
            events.iter().any(|event| event["event"] == name && event["action"] == action),
            "{name} {action} in {events:?}"
        );
    }
    mounted.end();
}

#[test]
fn the_command_line_follows_the_stream() {
    let mounted = armed();
    let mut follower = std::process::Command::new(crate::support::executable())
        .args(["events", "--follow", "--rule", "eio", "--format", "json"])
        .env("NEMESISFS_RUNDIR", mounted.run_dir())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(follower.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    inject(&mounted, 1);
    line.clear();
    lines.read_line(&mut line).unwrap();
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["rule"], "eio");
    mounted.end();
    assert_eq!(follower.wait().unwrap().code(), Some(0), "it ends with the daemon");
}

#[test]
fn waiting_tells_of_this_rule_and_not_of_another_that_had_its_name() {
    let mounted = armed();
    inject(&mounted, 1);
    mounted.cli(&["rule", "rm", "eio"]);
    mounted.error_rule("eio", "write", "/f", "EIO", None);
    assert_eq!(mounted.http("GET", "/v1/rules/eio/wait?for=100ms", None).body["fired"], false);
    mounted.error_rule("once", "write", "/once", "EIO", Some(1));
    File::create(mounted.path("once")).unwrap().write_at(b"x", 0).unwrap_err();
    inject(&mounted, 17_000);
    let answer = mounted.http("GET", "/v1/rules/once/wait?for=5s", None).body;
    assert_eq!((answer["fired"].as_bool(), answer["event"].is_null()), (Some(true), true), "the ring has lost it");
    let far = format!("{}-{}", mounted.http("GET", "/v1/version", None).body["boot_id"].as_str().unwrap(), u64::MAX);
    assert_eq!(mounted.http("GET", &format!("/v1/events?follow=false&since={far}"), None).status, 200);
    mounted.end();
}

#[test]
fn a_mode_that_has_fired_can_be_waited_for_when_its_time_is_over() {
    let mounted = Mounted::new();
    let wait = || mounted.http("GET", "/v1/rules/mode/wait?for=100ms", None);
    let set = |mode: Value| assert_eq!(mounted.http("PUT", "/v1/mode", Some(&mode)).status, 200, "{mode}");
    let ended = || eventually("its end", || mounted.http("GET", "/v1/mode", None).body["mode"] == "allow_writes");
    assert_eq!(wait().status, 404, "no mode was set");
    let file = File::create(mounted.path("f")).unwrap();
    set(json!({"mode": "error_writes", "for": "5s"}));
    file.write_at(b"x", 0).unwrap_err();
    drop(file);
    ended();
    let answer = wait();
    assert_eq!((&answer.body["fired"], &answer.body["event"]["rule"]), (&json!(true), &json!("mode")), "{answer:?}");
    assert_eq!(mounted.http("GET", "/v1/rules/mode", None).status, 404, "but it is no rule any more");
    set(json!({"mode": "error_reads", "for": "50ms"}));
    ended();
    assert_eq!(wait().body, json!({"fired": false, "matches": 0, "state": "expired"}), "each mode by itself");
    set(json!({"mode": "allow_writes"}));
    assert_eq!(wait().status, 404, "it was taken away");
    set(json!({"mode": "error_reads", "for": "50ms"}));
    ended();
    mounted.reset();
    assert_eq!(wait().status, 404, "it was reset");
    mounted.end();
}

#[test]
fn no_firing_at_all_cannot_be_waited_for() {
    let mounted = armed();
    assert_eq!(mounted.http("GET", "/v1/rules/eio/wait?injections=0", None).status, 400);
    assert_eq!(mounted.try_cli(&["rule", "wait", "eio", "--injections", "0"]).code, 2);
    mounted.end();
}

#[test]
fn of_a_place_that_the_ring_has_lost_it_is_certain_whether_a_rule_has_fired_since() {
    const KEPT: u64 = 1 << 14;
    let mounted = armed();
    inject(&mounted, 5);
    mounted.error_rule("once", "write", "/once", "EIO", Some(1));
    let now = || mounted.http("GET", "/v1/rules/eio", None).body["cursor"].as_str().unwrap().to_string();
    let wait = |rule: &str, query: &str| {
        let answer = mounted.http("GET", &format!("/v1/rules/{rule}/wait?for=200ms&{query}"), None);
        (answer.body["fired"].as_bool(), answer.body["event"]["nth"].as_u64())
    };
    let since = format!("since={}", now());
    inject(&mounted, 1);
    File::create(mounted.path("once")).unwrap().write_at(b"x", 0).unwrap_err();
    let id = mounted.injections("once")[0]["id"].as_str().unwrap().to_string();
    inject(&mounted, 16_999);
    assert_eq!(wait("once", &since), (Some(true), None), "the ring has lost it");
    assert_eq!(wait("once", &format!("{since}&injections=2")), (Some(false), None));
    assert_eq!(wait("eio", &since), (Some(true), Some(17_006 - KEPT)), "the first that it still has");
    // Of several firings, only those that it still has are certain.
    assert_eq!(wait("eio", &format!("{since}&injections={KEPT}")), (Some(true), Some(17_005)));
    assert_eq!(wait("eio", &format!("{since}&injections={}", KEPT + 1)), (Some(false), None));
    // The same from a place that was not told in a reply.
    assert_eq!(wait("once", &format!("since={id}")), (Some(false), None), "that is the firing itself");
    let number: u64 = id.rsplit_once('-').unwrap().1.parse().unwrap();
    let before = id.replace(&format!("-{number}"), &format!("-{}", number - 1));
    assert_eq!(wait("once", &format!("since={before}")), (Some(true), None));
    assert_eq!(wait("once", &format!("since={}", now())), (Some(false), None));
    mounted.end();
}

/// No bounds of time: what is compared is how much the readers get while one question is answered.
#[test]
fn many_readers_of_the_whole_ring_do_not_starve_who_asks_the_socket() {
    const READERS: usize = 50;
    const EVENTS: usize = 16_000;
    let mounted = armed();
    inject(&mounted, EVENTS);
    let read = || {
        let head = "Accept: application/x-ndjson\r\nConnection: close\r\n";
        let mut stream = mounted.stream("?follow=false&kind=error", head);
        let (mut piece, mut braces) = (vec![0; 1 << 20], 0);
        loop {
            match stream.get_mut().read(&mut piece).unwrap() {
                0 => break,
                read => braces += piece[..read].iter().filter(|byte| **byte == b'{').count(),
            }
        }
        // Of each event, of its labels, and of the greeting.
        assert_eq!(braces, 2 * EVENTS + 1);
    };
    let answers = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
        let mut answers = 0;
        while readers.iter().any(|reader| !reader.is_finished()) {
            assert_eq!(mounted.http("GET", "/v1/health", None).status, 200);
            answers += 1;
        }
        answers
    });
    let each = READERS * EVENTS / answers;
    assert!(each < EVENTS, "{answers} answers: while one was waited for, the readers were given {each} events");
    mounted.end();
}

/// Numbers of injections of which the path is such a one.
fn told_of(mounted: &Mounted, path: &str) -> usize {
    let request = format!(
        "GET /v1/events?follow=false&path={path} HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\
         Connection: close\r\n\r\n"
    );
    mounted.raw(&request).lines().filter(|line| line.contains("\"event\":\"injection\"")).count()
}

#[test]
fn a_rename_and_a_link_tell_both_paths_and_are_found_by_either() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("a"), "x").unwrap();
    mounted.error_rule("to", "rename", "/b", "EIO", None);
    mounted.error_rule("from", "link", "/a", "EIO", None);
    std::fs::rename(mounted.path("a"), mounted.path("b")).unwrap_err();
    std::fs::hard_link(mounted.path("a"), mounted.path("c")).unwrap_err();
    mounted.error_rule("one", "unlink", "/a", "EIO", None);
    std::fs::remove_file(mounted.path("a")).unwrap_err();
    for (rule, path, to) in [("to", "/a", json!("/b")), ("from", "/a", json!("/c")), ("one", "/a", json!(null))] {
        let event = &mounted.injections(rule)[0];
        assert_eq!((&event["path"], &event["to"]), (&json!(path), &to), "{event}");
    }
    assert_eq!(["/a", "/b", "/c", "/d"].map(|path| told_of(&mounted, path)), [3, 1, 1, 0]);
    let lines = mounted.cli(&["events", "--path", "/b"]);
    assert!(lines.contains("/a -> /b"), "{lines}");
    mounted.end();
}

#[test]
fn of_a_file_with_several_names_the_one_is_told_that_the_rule_matched() {
    let mounted = armed();
    let file = File::create(mounted.path("f")).unwrap();
    for name in ["g", "h"] {
        std::fs::hard_link(mounted.path("f"), mounted.path(name)).unwrap();
        std::fs::metadata(mounted.path(name)).unwrap();
    }
    mounted.error_rule("any", "fsync", "/**", "EIO", None);
    file.write_at(b"x", 0).unwrap_err();
    file.sync_all().unwrap_err();
    assert_eq!(mounted.injections("eio")[0]["path"], "/f", "the rule is about /f");
    assert_eq!(mounted.injections("any")[0]["path"], "/h", "the one used last");
    assert_eq!(told_of(&mounted, "/f"), 1);
    mounted.error_rule("linked", "link", "/g", "EIO", None);
    std::fs::hard_link(mounted.path("h"), mounted.path("i")).unwrap_err();
    let event = &mounted.injections("linked")[0];
    assert_eq!((&event["path"], &event["to"]), (&json!("/g"), &json!("/i")), "{event}");
    drop(file);
    mounted.end();
}

#[test]
fn a_write_that_fails_because_no_more_can_be_taken_back_is_told() {
    let mounted = Mounted::new();
    File::create(mounted.backing.join("f")).unwrap().set_len(300 << 20).unwrap();
    mounted.rule("lost", json!({"match": {"ops": ["truncate"], "path": "/f"}, "fault": {"kind": "drop"}}));
    let file = File::options().write(true).open(mounted.path("f")).unwrap();
    assert_eq!(file.set_len(0).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    let events = mounted.injections("lost");
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(
        (&events[0]["kind"], &events[0]["errno"], &events[0]["nth"]),
        (&json!("drop"), &json!("ENOMEM"), &json!(1))
    );
    assert_eq!(mounted.http("GET", "/v1/rules/lost", None).body["injections"], 1);
    assert_eq!(mounted.http("GET", "/v1/rules/lost/wait?for=5s", None).body["fired"], true, "it was told");
    drop(file);
    mounted.end();
}
