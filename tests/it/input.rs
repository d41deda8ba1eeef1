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
fn parameters_that_a_route_does_not_take_are_refused_and_nothing_is_done() {
    let mounted = Mounted::new();
    mounted.rule("st", json!({"match": {"ops": ["fsync"]}, "fault": {"kind": "stall"}}));
    for (method, path, body) in [
        ("POST", "/v1/rules/st/release?count=1", Some(json!({}))),
        ("POST", "/v1/evict?path=/k1", Some(json!({}))),
        ("PUT", "/v1/mode?for=200ms", Some(json!({"mode": "enospc"}))),
        ("DELETE", "/v1/rules?name=st", None),
        ("GET", "/v1/rules?x=1", None),
        ("GET", "/v1/requests?limit=1", None),
        ("GET", "/v1/version?x", None),
        ("GET", "/v1/devices?x", None),
    ] {
        let answer = mounted.http(method, path, body.as_ref());
        assert_eq!((answer.status, answer.body["code"].as_str()), (400, Some("bad_request")), "{path}: {answer:?}");
        assert!(answer.body["hint"].is_string(), "{answer:?}");
    }
    assert_eq!(mounted.http("GET", "/v1/mode", None).body["mode"], "allow_writes");
    assert_eq!(mounted.http("GET", "/v1/rules/st", None).status, 200);
    mounted.end();
}

#[test]
fn a_method_that_a_route_does_not_have_is_a_problem_document_everywhere() {
    let mounted = Mounted::new();
    for (method, path) in [
        ("GET", "/v1/reset"),
        ("POST", "/v1/rules"),
        ("DELETE", "/v1/mode"),
        ("PUT", "/v1/evict"),
        ("POST", "/v1/health"),
        ("GET", "/v1/unmount"),
        ("POST", "/v1/devices/x/mode"),
    ] {
        let answer = mounted.http(method, path, None);
        let code = answer.body["code"].as_str();
        assert_eq!((answer.status, code), (405, Some("method_not_allowed")), "{method} {path}: {answer:?}");
    }
    mounted.end();
}

#[test]
fn a_list_is_not_taken_for_an_object() {
    let mounted = Mounted::new();
    for (method, path, body) in [
        ("POST", "/v1/unmount", json!([])),
        ("POST", "/v1/evict", json!(["/x"])),
        ("PUT", "/v1/mode", json!(["enospc", null, null, null, false])),
        ("POST", "/v1/reset", json!([])),
    ] {
        let answer = mounted.http(method, path, Some(&body));
        assert_eq!(answer.status, 422, "{path}: {answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains("object"), "{path}: {answer:?}");
    }
    let mut rule = good();
    rule["name"] = "a".into();
    assert_eq!(mounted.http("PUT", "/v1/rules", Some(&json!([rule]))).status, 200, "a list of rules is one");
    mounted.end();
}

#[test]
fn a_filter_that_no_event_can_pass_is_refused_with_the_nearest_word() {
    let mounted = Mounted::new();
    for (query, hint) in [("kind=eror", "error"), ("kind=injecton", "injection"), ("op=wrtie", "write")] {
        let answer = mounted.http("GET", &format!("/v1/events?follow=false&{query}"), None);
        assert_eq!((answer.status, answer.body["code"].as_str()), (400, Some("bad_request")), "{answer:?}");
        assert_eq!(answer.body["hint"], format!("did you mean {hint:?}?"), "{answer:?}");
    }
    assert_eq!(mounted.try_cli(&["events", "--kind", "nosuch"]).code, 1);
    mounted.end();
}

#[test]
fn no_firing_at_all_cannot_be_waited_for() {
    let mounted = Mounted::new();
    mounted.rule("a", good());
    let answer = mounted.http("GET", "/v1/rules/a/wait?injections=0&for=20s", None);
    assert_eq!((answer.status, answer.body["code"].as_str()), (400, Some("bad_request")), "{answer:?}");
    assert_eq!(mounted.try_cli(&["rule", "wait", "a", "--injections", "0"]).code, 2);
    mounted.end();
}
