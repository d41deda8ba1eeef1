//! What commands print to undo what they have done is run here, word by word, and brings back what was there.
//!
//! Real mounts, and the command line as a person types it.

use serde_json::{Value, json};

use crate::support::{Mounted, Said, eventually, executable};

/// Runs the lines `undo: nemesisfs …` of what a command has said; each must succeed.
fn undo(mounted: &Mounted, said: &str) -> usize {
    let commands = said.lines().filter_map(|line| line.strip_prefix("undo: nemesisfs "));
    commands.map(|words| assert_eq!(typed(mounted, words).code, 0, "{words} of:\n{said}")).count()
}

fn typed(mounted: &Mounted, words: &str) -> Said {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &format!("{} {words}", executable())]).env_remove("NEMESISFS_HOST");
    shell.env("NEMESISFS_RUNDIR", mounted.run_dir()).output().expect("sh runs").into()
}

/// Mode, rules and what is asked of the disk's room, without what counts or goes on by itself.
fn state(mounted: &Mounted) -> Value {
    let get = |path: &str| mounted.http("GET", path, None).body;
    let (mode, rules, space) = (get("/v1/mode"), get("/v1/rules"), get("/v1/space"));
    let rules: Vec<Value> =
        rules["rules"].as_array().expect("a list").iter().map(|rule| json!([rule["name"], rule["fault"]])).collect();
    let quotas = space["quota"].as_array().expect("a list").iter().map(|quota| quota["requested"].clone());
    // The same for what is left of the time is not the same words.
    let asked = |part: &str| {
        let mut asked = space[part]["requested"].clone();
        if asked["for"].is_string() {
            asked["for"] = json!("a time");
        }
        asked
    };
    json!({"mode": [mode["mode"], mode["up"], mode["down"], mode["remaining"].is_null()], "rules": rules,
        "virtual": asked("virtual"), "quota": quotas.collect::<Vec<_>>(), "ballast": asked("ballast"),
        "free": space["ballast"]["target_free"]})
}

#[test]
fn all_that_a_reset_takes_away_is_brought_back_by_what_it_says() {
    // Nobody else writes there.
    let mounted = Mounted::on_own_disk(64 << 20, &["mkfs.ext4", "-q"]);
    mounted.cli(&["rule", "add", "one", "--kind", "error", "--errno", "EIO", "--path", "/never"]);
    mounted.cli(&["mode", "error_reads", "--up", "1s", "--down", "2s", "--for", "1h"]);
    mounted.cli(&["space", "virtual", "--size", "32MiB"]);
    mounted.cli(&["space", "quota", "--limit", "1MiB", "--uid", "1000"]);
    mounted.cli(&["space", "quota", "--limit", "2MiB", "--path", "/a b/**"]);
    mounted.cli(&["space", "ballast", "--until-free", "30MiB", "--for", "1h"]);
    let before = state(&mounted);
    assert_eq!(before["mode"], json!(["error_reads", "1s", "2s", false]));
    assert_eq!(before["ballast"], json!({"until_free": "30MiB", "for": "a time"}));
    for words in [&["reset"][..], &["space", "clear"]] {
        let said = mounted.cli(words);
        assert!(!said.contains("rule add mode") && !said.contains("rule add space"), "{said}");
        assert!(undo(&mounted, &said) >= 4, "{said}");
        assert_eq!(state(&mounted), before, "{said}");
    }
    mounted.reset();
    mounted.end();
}

#[test]
fn the_mode_and_the_capacity_are_no_rules_to_remove_to_count_or_to_add() {
    let mounted = Mounted::new();
    mounted.cli(&["mode", "drop_writes", "--for", "1h"]);
    mounted.cli(&["space", "virtual", "--free", "1GiB"]);
    let said = mounted.cli(&["rule", "clear"]);
    assert_eq!(said.trim(), "no rules, nothing to remove");
    let file = mounted.aside("rules").join("rules.toml");
    std::fs::write(&file, "[[rules]]\nname = \"one\"\nfault = \"return(EIO)\"\nmatch.path = \"/never\"\n").unwrap();
    let said = mounted.cli(&["rule", "apply", file.to_str().unwrap()]);
    assert!(said.starts_with("1 rules in force") && !said.contains("rule mode"), "{said}");
    assert_eq!(undo(&mounted, &said), 1, "{said}");
    for (name, made_by) in [
        ("mode", "made by: nemesisfs mode drop_writes --for 1h"),
        ("space", "made by: nemesisfs space virtual --free 1GiB"),
    ] {
        let said = mounted.cli(&["rule", "show", name]);
        assert!(said.lines().any(|line| line == made_by), "{said}");
    }
    mounted.end();
}

#[test]
fn a_mode_is_undone_by_the_one_before_with_its_cycle_and_what_is_left_of_its_time() {
    let mounted = Mounted::new();
    for old in [&["mode", "drop_writes", "--for", "1h"][..], &["mode", "error_writes", "--up", "5s", "--down", "1s"]] {
        mounted.cli(&["mode", "allow_writes"]);
        mounted.cli(old);
        let before = state(&mounted);
        for new in [&["mode", "error_all"][..], &["mode", old[1]], &["mode", "enospc", "--for", "10m"]] {
            let said = mounted.cli(new);
            assert_eq!(undo(&mounted, &said), 1, "{new:?}: {said}");
            assert_eq!(state(&mounted), before, "{new:?}: {said}");
        }
    }
    let (first, again) = (mounted.cli(&["mode", "error_reads"]), mounted.cli(&["mode", "error_reads"]));
    assert!(first.contains("undo: ") && !again.contains("undo: "), "{again}");
    mounted.end();
}

#[test]
fn ballast_is_undone_by_the_ballast_before_and_forced_only_where_that_was() {
    // Nobody else writes there.
    let mounted = Mounted::on_own_disk(64 << 20, &["mkfs.ext4", "-q"]);
    let before = state(&mounted);
    let said = mounted.cli(&["space", "ballast", "--until-free", "30MiB"]);
    assert_eq!((undo(&mounted, &said), state(&mounted)), (1, before), "{said}");
    for old in [
        &["--until-free", "30MiB"][..],
        &["--used", "60%", "--for", "1h"],
        &["--until-free", "20MiB", "--force", "--deadline", "50s"],
    ] {
        let fill = |words: &[&str]| mounted.cli(&[&["space", "ballast"], words].concat());
        fill(old);
        let before = state(&mounted);
        for new in [&["space", "ballast", "--until-free", "40MiB"][..], &["space", "clear", "ballast"], &["reset"]] {
            let said = mounted.cli(new);
            assert_eq!(said.contains(" --force"), old.contains(&"--force"), "{said}");
            assert_eq!((undo(&mounted, &said), state(&mounted)), (1, before.clone()), "{said}");
        }
    }
    mounted.reset();
    mounted.end();
}

#[test]
fn a_capacity_is_brought_back_for_what_is_left_of_its_time() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1GiB", "--for", "1h"]);
    let before = state(&mounted);
    let left = || mounted.http("GET", "/v1/space", None).body["virtual"]["remaining"].clone();
    eventually("some of it is over", || left() != "1h");
    for words in [&["reset"][..], &["space", "clear"], &["space", "virtual", "--size", "2GiB"]] {
        let said = mounted.cli(words);
        assert!(said.contains(" --for '59m "), "{said}");
        assert_eq!((undo(&mounted, &said), state(&mounted)), (1, before.clone()), "{said}");
    }
    let made = mounted.cli(&["rule", "show", "space"]);
    assert!(made.contains("made by: "), "{made}");
    mounted.cli(&["space", "virtual", "--free", "1GiB"]);
    assert!(left().is_null());
    mounted.end();
}

#[test]
fn a_quota_is_undone_by_the_quotas_before() {
    let mounted = Mounted::new();
    for words in [["1MiB", "1000"], ["2MiB", "1001"], ["3MiB", "1000"]] {
        let before = state(&mounted);
        let add = ["space", "quota", "--limit", words[0], "--uid", words[1]];
        let said = mounted.cli(&add);
        assert!(undo(&mounted, &said) > 0);
        let sorted = |state: Value| {
            let mut quotas: Vec<String> =
                state["quota"].as_array().expect("a list").iter().map(ToString::to_string).collect();
            quotas.sort();
            quotas
        };
        assert_eq!(sorted(state(&mounted)), sorted(before), "{said}");
        mounted.cli(&add);
    }
    let (before, said) = (state(&mounted), mounted.cli(&["space", "clear", "quota"]));
    assert_eq!(undo(&mounted, &said), 2, "{said}");
    assert_eq!(state(&mounted), before, "{said}");
    mounted.end();
}
