//! Bad input: a clear error with its place and the nearest right thing, and nothing changed.

use serde_json::{Value, json};

use crate::support::Mounted;

fn good() -> Value {
    json!({"match": {"ops": ["write"], "path": "/a"}, "fault": {"kind": "error", "errno": "EIO"}})
}

/// A rule with one thing changed, by JSON pointer.
fn with(pointer: &str, value: Value) -> Value {
    let mut rule = good();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = if parent.is_empty() { &mut rule } else { rule.pointer_mut(parent).unwrap() };
    parent[key] = value;
    rule
}

#[test]
fn what_is_wrong_is_told_without_its_place_where_that_stands_beside_it() {
    let mounted = Mounted::new();
    let answer = mounted.http("PUT", "/v1/rules/a", Some(&with("/match/ops", json!(["wrtie"]))));
    assert_eq!(answer.body["detail"], "match.ops[0]: unknown operation \"wrtie\"");
    assert_eq!(answer.body["errors"], json!([{"pointer": "#/match/ops/0", "detail": "unknown operation \"wrtie\""}]));
    let set = json!({"rules": [{"name": "a", "fault": {"kind": "eror"}}, {"name": "b", "trigger": {"after_rule": "a"}, "fault": {"kind": "drop"}}]});
    let answer = mounted.http("PUT", "/v1/rules", Some(&set));
    assert_eq!(answer.body["errors"], json!([{"pointer": "#/rules/0/fault/kind", "detail": "unknown kind \"eror\""}]));
    mounted.end();
}

#[test]
fn what_is_wrong_is_named_with_its_place_and_the_nearest_word() {
    let mounted = Mounted::new();
    let cases = [
        (with("/match/ops", json!(["wrtie"])), "#/match/ops/0", "write"),
        (with("/match/pth", json!("/a")), "#/match/pth", "path"),
        (with("/match/path", json!("a")), "#/match/path", "/a"),
        (with("/match/offset", json!("4k")), "#/match/offset", ".."),
        (with("/fault/kind", json!("eror")), "#/fault/kind", "error"),
        (with("/fault/errno", json!("ENOSPACE")), "#/fault/errno", "ENOSPC"),
        (with("/fault/errno", json!("ENOSYS")), "#/fault/errno", ""),
        (with("/fault/errno", json!("600")), "#/fault/errno", ""),
        (with("/fault/erno", json!("EIO")), "#/fault/erno", "errno"),
        (with("/fault/delay", json!("1s")), "#/fault/delay", ""),
        (with("/trigger", json!({"probabilty": 0.5})), "#/trigger/probabilty", "probability"),
        (with("/trigger", json!({"probability": 1.5})), "#/trigger/probability", ""),
        (with("/trigger", json!({"every": 0})), "#/trigger/every", ""),
        (with("/trigger", json!({"for": "0s"})), "#/trigger/for", "null"),
        (
            json!({"match": {"ops": ["fsync"], "offset": "0..1MiB"}, "fault": {"kind": "drop"}}),
            "#/match/offset",
            "read",
        ),
        (json!({"match": {"length": "..512"}, "fault": {"kind": "attr", "size": 1}}), "#/match/length", "write"),
        (json!({"match": {"ops": ["sync"], "direct": true}, "fault": {"kind": "stall"}}), "#/match/direct", "open"),
        (
            json!({"fault": {"kind": "latency", "delay": "1s", "jitter": "1ms", "distribution": "fixed"}}),
            "#/fault/jitter",
            "normal",
        ),
        (
            json!({"fault": {"kind": "latency", "delay": "1s", "jitter": "1ms", "distribution": "exponential"}}),
            "#/fault/jitter",
            "",
        ),
        (json!({"match": {"ops": ["write", "flock"]}, "fault": {"kind": "stall"}}), "#/match/ops/1", ""),
        (with("/trigger", json!({"times": "two"})), "#/trigger/times", ""),
        (with("/trigger", json!({"for": "soon"})), "#/trigger/for", ""),
        (with("/lables", json!({})), "#/lables", "labels"),
        (json!({"match": {}}), "#", ""),
        (json!({"fault": {"kind": "latency"}}), "#/fault/delay", ""),
        (json!({"match": {"ops": ["lookup"]}, "fault": {"kind": "drop"}}), "#/match/ops/0", ""),
    ];
    for (rule, pointer, near) in cases {
        let answer = mounted.http("PUT", "/v1/rules/r", Some(&rule));
        assert_eq!(answer.status, 422, "{rule}: {answer:?}");
        assert_eq!(answer.body["code"], "rule_invalid", "{rule}: {answer:?}");
        assert_eq!(answer.body["errors"][0]["pointer"], pointer, "{rule}: {answer:?}");
        let hint = answer.body["hint"].as_str().unwrap_or_default();
        assert!(hint.contains(near), "{rule}: {answer:?}");
        assert_eq!(mounted.http("GET", "/v1/rules/r", None).status, 404, "nothing has changed");
    }
    mounted.end();
}

#[test]
fn what_is_declared_and_not_built_is_told_from_what_is_wrong() {
    let mounted = Mounted::new();
    let cases =
        [json!({"fault": {"kind": "power_cut"}}), json!({"fault": {"kind": "torn", "keep": "1", "then": "power_cut"}})];
    for rule in cases {
        let answer = mounted.http("PUT", "/v1/rules/r", Some(&rule));
        assert_eq!((answer.status, answer.body["code"].as_str()), (422, Some("not_yet")), "{rule}: {answer:?}");
    }
    // The neutral values of the same fields are no request for them.
    let mut neutral = good();
    neutral["match"]["comm"] = Value::Null;
    neutral["trigger"] = json!({"per": "mount", "after": null});
    neutral["fault"]["timing"] = json!("before");
    mounted.rule("r", neutral);
    mounted.end();
}

#[test]
fn a_set_with_one_bad_rule_changes_nothing() {
    let mounted = Mounted::new();
    mounted.rule("old", good());
    let set = json!({"rules": [
        {"name": "a", "fault": {"kind": "drop"}},
        {"name": "b", "fault": {"kind": "error", "errno": "EWHAT"}},
        {"name": "a", "fault": {"kind": "drop"}},
    ]});
    let answer = mounted.http("PUT", "/v1/rules", Some(&set));
    assert_eq!(answer.status, 422);
    let pointers: Vec<&str> =
        answer.body["errors"].as_array().unwrap().iter().map(|error| error["pointer"].as_str().unwrap()).collect();
    assert_eq!(pointers, ["#/rules/1/fault/errno", "#/rules/2/name"], "{answer:?}");
    let rules = mounted.http("GET", "/v1/rules", None).body;
    assert_eq!(rules["rules"].as_array().unwrap().len(), 1, "{rules}");
    assert_eq!(rules["rules"][0]["name"], "old");
    mounted.end();
}

#[test]
fn rubbish_on_the_socket_leaves_the_mount_working() {
    let mounted = Mounted::new();
    for rubbish in
        ["\r\n\r\n", "GET", "GET / HTTP/9.9\r\n\r\n", "\u{0}\u{1}\u{2}\r\n\r\n", "PUT /v1/rules/a HTTP/1.1\r\n\r\n{"]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(&mounted.socket).unwrap();
        std::io::Write::write_all(&mut stream, rubbish.as_bytes()).unwrap();
        drop(stream);
    }
    for (method, path, body, status, code) in [
        ("GET", "/v1/ruels", None, 404, "unknown_route"),
        ("DELETE", "/v1/version", None, 405, "method_not_allowed"),
        ("PUT", "/v1/mode", Some(json!({"mode": "enopsc"})), 422, "rule_invalid"),
        ("PUT", "/v1/mode", Some(json!({"mode": "enospc", "for": "0s"})), 422, "rule_invalid"),
        ("PUT", "/v1/mode", Some(json!({"mode": "enospc", "up": "1s", "down": "0s"})), 422, "rule_invalid"),
        ("PUT", "/v1/space", Some(json!({"virtual": {"free": "much"}})), 422, "rule_invalid"),
        ("PUT", "/v1/space", Some(json!({"virtual": {"free": 0, "size": 0}})), 422, "rule_invalid"),
        ("GET", "/v1/events?folow=true", None, 400, "bad_request"),
        ("GET", "/v1/events?since=yesterday", None, 400, "bad_request"),
        ("GET", "/v1/rules/none", None, 404, "not_found"),
        ("POST", "/v1/rules/none/release", None, 404, "not_found"),
        ("PUT", "/v1/rules/mode", Some(good()), 422, "rule_invalid"),
        ("POST", "/v1/unmount", Some(json!({"how": "softly"})), 400, "bad_request"),
    ] {
        let answer = mounted.http(method, path, body.as_ref());
        assert_eq!((answer.status, answer.body["code"].as_str()), (status, Some(code)), "{method} {path}: {answer:?}");
        assert!(answer.body["detail"].is_string() && answer.body["title"].is_string(), "{answer:?}");
    }
    let large = format!(
        "PUT /v1/rules/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{}",
        2 << 20,
        " ".repeat(2 << 20)
    );
    let answer = mounted.raw(&large);
    assert!(
        answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"),
        "{}",
        &answer[..80.min(answer.len())]
    );
    std::fs::write(mounted.path("a"), "still works").unwrap();
    mounted.end();
}

#[test]
fn the_command_line_says_error_hint_and_its_exit_code() {
    let mounted = Mounted::new();
    let said = mounted.try_cli(&["rule", "add", "r", "--kind", "error", "--errno", "EIO", "--op", "wrtie"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("error: ") && said.err.contains("hint: did you mean \"write\"?"), "{said:?}");
    assert_eq!(mounted.try_cli(&["rule", "ad"]).code, 2);
    assert_eq!(mounted.try_cli(&["rule", "show", "none"]).code, 4);
    assert_eq!(mounted.try_cli(&["rule", "rm", "none"]).code, 0);
    assert_eq!(mounted.try_cli(&["-H", "unix:///nowhere.sock", "rule", "list"]).code, 3);
    let said = mounted.try_cli(&["rule", "wait", "none", "--for", "1s"]);
    assert_eq!(said.code, 4, "{said:?}");
    mounted.cli(&["rule", "add", "r", "--kind", "error", "--errno", "EIO", "--op", "write"]);
    assert_eq!(mounted.try_cli(&["rule", "wait", "r", "--for", "200ms"]).code, 124);
    let json: Value = serde_json::from_str(&mounted.cli(&["rule", "show", "r", "--json"])).unwrap();
    assert_eq!(json["state"], "armed");
    mounted.end();
}

#[test]
fn a_body_that_is_no_object_is_refused_on_every_route_and_nothing_is_done() {
    let mounted = Mounted::new();
    mounted.rule("kept", good());
    for (method, path) in [
        ("PUT", "/v1/rules"),
        ("PUT", "/v1/rules/arr"),
        ("PATCH", "/v1/rules/kept"),
        ("POST", "/v1/rules/kept/release"),
        ("PUT", "/v1/mode"),
        ("PUT", "/v1/space"),
        ("POST", "/v1/evict"),
        ("POST", "/v1/repair"),
        ("POST", "/v1/reset"),
        ("POST", "/v1/unmount"),
        ("PUT", "/v1/coredump/leases/x"),
        ("PUT", "/v1/devices/x"),
    ] {
        for body in
            [json!([]), json!(["arr", true, false, false, {}, {}, {"kind": "error", "errno": "EIO"}, {}]), json!(7)]
        {
            let answer = mounted.http(method, path, Some(&body));
            assert_eq!(answer.status, 422, "{method} {path} {body}: {answer:?}");
            let detail = answer.body["detail"].as_str().unwrap();
            assert!(detail.contains("expected an object"), "{method} {path} {body}: {answer:?}");
        }
    }
    let rules = mounted.http("GET", "/v1/rules", None).body;
    assert_eq!(rules["rules"].as_array().unwrap().len(), 1, "{rules}");
    mounted.end();
}

#[test]
fn what_is_wrong_with_a_body_that_is_no_rule_is_not_called_an_invalid_rule() {
    let mounted = Mounted::new();
    for (method, path, body, status, detail) in [
        ("POST", "/v1/reset", "{", 400, "not JSON"),
        ("PUT", "/v1/rules/a", "{\"fault\":", 400, "not JSON"),
        ("POST", "/v1/unmount", "{\"hwo\":\"lazy\"}", 422, "unknown field"),
        ("PUT", "/v1/mode", "{\"mode\":\"enospc\",\"for\":3}", 422, "for: "),
        ("PUT", "/v1/mode", "{\"mode\":\"enospc\",\"fro\":\"3s\"}", 422, "unknown field"),
        ("PUT", "/v1/mode", "{}", 422, "missing"),
        (
            "POST",
            "/v1/rules/a/release",
            "{\"count\":-1}",
            422,
            "count: invalid value: integer \"-1\", expected a whole number",
        ),
        ("PUT", "/v1/space", "{\"virtual\":{\"free\":{}}}", 422, "virtual.free: not a size"),
        ("PUT", "/v1/coredump/leases/x", "{\"for\":\"soon\"}", 422, "for: "),
    ] {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = mounted.raw(&request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {answer}");
        let problem: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(
            (&problem["code"], &problem["title"]),
            (&json!("bad_request"), &json!("Invalid request")),
            "{problem}"
        );
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{method} {path}: {problem}");
        assert!(!problem.to_string().contains("struct"), "no names of the code: {problem}");
    }
    mounted.end();
}

#[test]
fn what_get_gives_of_a_rule_can_be_put_back() {
    let mounted = Mounted::new();
    mounted.rule("eio", json!({"required": true, "match": {"ops": ["write"], "path": "/a"}, "fault": {"kind": "error", "errno": "EIO"}}));
    std::fs::write(mounted.path("a"), "x").unwrap_err();
    let mut one = mounted.http("GET", "/v1/rules/eio", None).body;
    let all = mounted.http("GET", "/v1/rules", None).body;
    for (method, path, body) in
        [("PUT", "/v1/rules/eio", &one), ("PATCH", "/v1/rules/eio", &one), ("PUT", "/v1/rules", &all)]
    {
        let answer = mounted.http(method, path, Some(body));
        assert_eq!(answer.status, 200, "{method} {path}: {answer:?}");
        let counted = mounted.http("GET", "/v1/rules/eio", None).body["injections"].clone();
        assert_eq!(counted, 1, "the same definition keeps its counters");
    }
    one["fault"]["errno"] = "ENOSPC".into();
    let answer = mounted.http("PUT", "/v1/rules/eio", Some(&one));
    assert_eq!((answer.status, &answer.body["fault"]["errno"]), (200, &json!("ENOSPC")), "{answer:?}");
    assert_eq!(mounted.http("PUT", "/v1/rules/eio", Some(&answer.body)).status, 200, "the answer of a PUT, too");
    one["matchse"] = 7.into();
    assert_eq!(mounted.http("PUT", "/v1/rules/eio", Some(&one)).status, 422, "exactly these members");
    // And these only as they are shown: a slip must not make a rule about everything.
    for (name, slip, near) in
        [("matches", json!({"path": "/only/**"}), "match"), ("state", json!("disabled"), ""), ("met", json!(3), "")]
    {
        let answer = mounted.http("PUT", "/v1/rules/slip", Some(&json!({name: slip, "fault": {"kind": "drop"}})));
        assert_eq!(answer.status, 422, "{name}: {answer:?}");
        assert!(answer.body["hint"].as_str().unwrap_or_default().contains(near), "{answer:?}");
    }
    mounted.end();
}

#[test]
fn rules_are_not_removed_by_a_file_with_nothing_in_it() {
    let mounted = Mounted::new();
    mounted.rule("kept", good());
    let file = mounted.run_dir().join("rules");
    for nothing in ["", "\n \n", "# no rule\n", "{}"] {
        std::fs::write(&file, nothing).unwrap();
        let said = mounted.try_cli(&["rule", "apply", file.to_str().unwrap()]);
        assert_eq!(said.code, 1, "{nothing:?}: {said:?}");
        assert!(said.err.contains("rule clear"), "{said:?}");
    }
    assert_eq!(mounted.try_cli(&["rule", "apply", "-"]).code, 1, "nothing on standard input");
    assert_eq!(mounted.http("GET", "/v1/rules/kept", None).status, 200);
    std::fs::write(&file, "rules = []\n").unwrap();
    mounted.cli(&["rule", "apply", file.to_str().unwrap()]);
    assert_eq!(mounted.http("GET", "/v1/rules/kept", None).status, 404, "an empty list is meant");
    mounted.end();
}

#[test]
fn of_an_operation_that_never_arrives_it_is_said_why() {
    let mounted = Mounted::new();
    let rule = mounted.rule("a", json!({"match": {"ops": ["access"]}, "fault": {"kind": "error", "errno": "EACCES"}}));
    let reason = "\"access\" never arrives: the kernel checks permissions by itself";
    assert!(rule["warnings"][0].as_str().is_some_and(|warning| warning.contains(reason)), "{rule}");
    let rule = mounted.rule("g", json!({"match": {"ops": ["metadata"]}, "fault": {"kind": "latency", "delay": "1us"}}));
    assert_eq!(rule["warnings"], json!([]));
    let said = mounted.try_cli(&["rule", "add", "l", "--kind", "error", "--errno", "EACCES", "--op", "flock"]);
    assert!(said.code == 1 && said.err.contains("never arrives: the kernel keeps locks by itself"), "{said:?}");
    mounted.end();
}

#[test]
fn a_term_behind_one_that_does_not_act_on_all_of_its_requests_is_taken() {
    let mounted = Mounted::new();
    for terms in [
        "20%return(EIO)->sleep(10ms)",
        "3*off->pause",
        "short(max_bytes=1)->return(EIO)",
        "torn(keep=1)->return(EIO)",
        "drop->sleep(1ms)",
        "sleep(1ms)",
    ] {
        mounted.rule("t", json!({"fault": terms}));
    }
    mounted.end();
}

#[test]
fn a_path_that_no_file_can_have_is_refused_wherever_a_glob_is_taken() {
    let mounted = Mounted::new();
    for (method, path, body, status) in [
        ("POST", "/v1/evict", Some(json!({"path": "wal/*"})), 422),
        ("POST", "/v1/repair", Some(json!({"path": "wal/*"})), 422),
        ("GET", "/v1/repair?path=wal/*", None, 400),
        ("GET", "/v1/events?follow=false&path=wal/*", None, 400),
        ("PUT", "/v1/space", Some(json!({"quota": {"limit": "1GiB", "path": "wal/*"}})), 422),
    ] {
        let answer = mounted.http(method, path, body.as_ref());
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        assert_eq!(answer.body["hint"], "did you mean \"/wal/*\"?", "{method} {path}: {answer:?}");
        let pointer = answer.body["errors"][0]["pointer"].as_str();
        let names_it = pointer.is_some_and(|pointer| pointer.ends_with("/path"));
        assert_eq!(names_it, body.is_some(), "a body has places: {method} {path}: {answer:?}");
    }
    assert_eq!(mounted.try_cli(&["evict", "nope"]).code, 1);
    assert_eq!(mounted.try_cli(&["repair", "nope"]).code, 1);
    mounted.cli(&["evict", "/nope"]);
    mounted.end();
}

#[test]
fn a_filter_of_events_that_no_event_can_meet_is_refused() {
    let mounted = Mounted::new();
    for (filter, near) in [("kind=eror", "error"), ("kind=ruel", "rule"), ("op=wrtie", "write"), ("op=flock", "one of")]
    {
        let answer = mounted.http("GET", &format!("/v1/events?follow=false&{filter}"), None);
        assert_eq!((answer.status, &answer.body["code"]), (400, &json!("bad_request")), "{filter}: {answer:?}");
        assert!(answer.body["hint"].as_str().unwrap().contains(near), "{filter}: {answer:?}");
    }
    let said = mounted.try_cli(&["events", "--follow", "--op", "wrtie"]);
    assert_eq!(said.code, 1, "{said:?}");
    for kind in ["injection", "rule", "mode", "space", "device", "coredump", "request", "bye", "error", "latency"] {
        mounted.cli(&["events", "--kind", kind]);
    }
    mounted.end();
}

/// Every route, by a method that it takes.
const ROUTES: &[(&str, &str)] = &[
    ("GET", "/v1/version"),
    ("GET", "/v1/health"),
    ("GET", "/v1/events"),
    ("POST", "/v1/unmount"),
    ("POST", "/v1/reset"),
    ("POST", "/v1/evict"),
    ("GET", "/v1/repair"),
    ("POST", "/v1/repair"),
    ("GET", "/v1/rules"),
    ("PUT", "/v1/rules"),
    ("DELETE", "/v1/rules"),
    ("GET", "/v1/rules/r"),
    ("PUT", "/v1/rules/r"),
    ("PATCH", "/v1/rules/r"),
    ("DELETE", "/v1/rules/r"),
    ("GET", "/v1/rules/r/wait"),
    ("POST", "/v1/rules/r/release"),
    ("GET", "/v1/mode"),
    ("PUT", "/v1/mode"),
    ("GET", "/v1/space"),
    ("PUT", "/v1/space"),
    ("DELETE", "/v1/space"),
    ("GET", "/v1/requests"),
    ("GET", "/v1/devices"),
    ("GET", "/v1/devices/d"),
    ("PUT", "/v1/devices/d"),
    ("DELETE", "/v1/devices/d"),
    ("PUT", "/v1/devices/d/mode"),
    ("POST", "/v1/devices/d/suspend"),
    ("POST", "/v1/devices/d/resume"),
    ("POST", "/v1/devices/d/cut"),
    ("POST", "/v1/devices/d/mark"),
    ("POST", "/v1/devices/d/replay"),
    ("GET", "/v1/coredump"),
    ("GET", "/v1/coredump/cores"),
    ("GET", "/v1/coredump/leases"),
    ("DELETE", "/v1/coredump/leases"),
    ("GET", "/v1/coredump/leases/l"),
    ("PUT", "/v1/coredump/leases/l"),
    ("DELETE", "/v1/coredump/leases/l"),
    ("GET", "/v1/coredump/steps"),
    ("POST", "/v1/coredump/steps/1"),
];

#[test]
fn a_parameter_that_a_route_does_not_know_is_refused_and_nothing_is_done() {
    let mounted = Mounted::new();
    mounted.rule("r", good());
    mounted.cli(&["mode", "error_reads"]);
    for (method, path) in ROUTES {
        let answer = mounted.http(method, &format!("{path}?nosuch=1"), None);
        assert_eq!((answer.status, &answer.body["code"]), (400, &json!("bad_request")), "{method} {path}: {answer:?}");
        assert_eq!(answer.body["detail"], "unknown parameter \"nosuch\"", "{method} {path}: {answer:?}");
        assert!(answer.body["hint"].is_string(), "{method} {path}: {answer:?}");
    }
    let answer = mounted.http("PUT", "/v1/mode?for=200ms", Some(&json!({"mode": "enospc"})));
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.body["hint"].as_str().unwrap().contains("in its body"), "{answer:?}");
    assert_eq!(mounted.http("GET", "/v1/mode", None).body["mode"], "error_reads");
    assert_eq!(mounted.http("GET", "/v1/rules/r", None).status, 200);
    assert_eq!(mounted.http("GET", "/v1/mode?", None).status, 200, "no parameter at all");
    assert_eq!(mounted.http("GET", "/v1/modes?x=1", None).status, 404);
    mounted.end();
}

#[test]
fn a_refusal_of_any_route_is_a_problem_document() {
    let mounted = Mounted::new();
    for (_, path) in ROUTES {
        let answer = mounted.raw(&format!("MKCOL {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 405"), "{path}: {answer}");
        assert!(head.to_lowercase().contains("content-type: application/problem+json"), "{path}: {answer}");
        assert!(head.lines().filter(|line| line.starts_with("allow: ")).count() == 1, "{path}: {answer}");
        let problem: Value = serde_json::from_str(body).unwrap();
        assert_eq!(problem["code"], "method_not_allowed", "{path}: {problem}");
    }
    let answer = mounted.http("GET", "/v1/rules/%ff", None);
    assert_eq!((answer.status, &answer.body["code"]), (400, &json!("bad_request")), "{answer:?}");
    mounted.end();
}
