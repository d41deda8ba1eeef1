//! Rules about the code itself: who may use whom, what each file opens with, where `unsafe` may stand.

use std::path::{Path, PathBuf};

fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// The parts of the house, each with those it may use. `main` and `lib` tie them together.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("fault", &[]),
    ("durability", &["sys"]),
    ("event", &["fault"]),
    ("space", &["sys", "durability"]),
    ("fs", &["sys", "fault", "durability", "event", "space"]),
    ("host", &["sys", "fault", "durability", "event", "space", "fs"]),
    ("control", &["sys", "fault", "durability", "event", "space", "fs", "host"]),
    ("exit", &[]),
    ("instances", &["sys"]),
    ("daemon", &["sys", "fault", "event", "fs", "host", "control", "exit", "instances"]),
    ("client", &["sys", "exit", "instances"]),
    ("cli", &["sys", "fault", "client", "daemon", "host", "exit", "instances"]),
];

#[test]
fn each_part_uses_only_those_below_it() {
    let (mut wrong, root) = (Vec::new(), Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    for (part, allowed) in MAY_USE {
        let is_its = |path: &Path| path.starts_with(root.join(part)) || path == root.join(format!("{part}.rs"));
        for (path, text) in sources("src").into_iter().filter(|(path, _)| is_its(path)) {
            // What is grouped would not be seen here.
            if text.contains("crate::{") {
                wrong.push(format!("{} has `use crate::{{…}}`: a line for each", path.display()));
            }
            for (other, _) in MAY_USE {
                if other != part && !allowed.contains(other) && text.contains(&format!("crate::{other}")) {
                    wrong.push(format!("{} uses {other}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_file_opens_with_what_it_is_for() {
    let all = ["src", "tests", "benches", "examples", "fuzz/src", "fuzz/fuzz_targets"].map(sources);
    for (path, text) in all.iter().flatten() {
        assert!(text.starts_with("//!"), "{} opens without //!", path.display());
    }
}

#[test]
fn unsafe_stands_in_sys_alone_and_always_with_its_reason() {
    for (path, text) in sources("src") {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("unsafe {")) {
            assert!(path.to_string_lossy().contains("/src/sys/"), "{}:{}: {line}", path.display(), i + 1);
            let before = &lines[i.saturating_sub(4)..i];
            assert!(before.iter().any(|line| line.contains("// SAFETY:")), "{}:{}: {line}", path.display(), i + 1);
        }
    }
}

#[test]
fn the_hot_path_knows_nothing_of_http_or_json_bodies() {
    for (path, text) in sources("src/fs") {
        for word in ["axum", "hyper", "tokio", "RuleSpec as", "serde::Deserialize"] {
            assert!(!text.contains(word), "{} mentions {word}", path.display());
        }
    }
}
