//! Which requests a rule meets, and on which of them it fires: matches, triggers, seeds, terms, and why a rule did not.
//!
//! Counts are exact here: what the program saw, what the stream told and what the rule counted must be one number.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::calls::{Handle, PAGE, Way, counted, errno, number, prepared, stored};
use crate::support::{Mounted, eventually};

fn eio(matches: Value, trigger: Value) -> Value {
    json!({"match": matches, "trigger": trigger, "fault": {"kind": "error", "errno": "EIO"}})
}

/// Does a write of one byte to a file fail?
fn fails(mounted: &Mounted, name: &str) -> bool {
    let file = File::options().write(true).create(true).truncate(false).open(mounted.path(name)).unwrap();
    file.write_at(b"x", 0).is_err()
}

/// Does a program that writes to a file fail?
fn program_fails(command: &mut Command) -> bool {
    let output = command.output().unwrap();
    assert!(matches!(output.status.code(), Some(0..=2)), "{output:?}");
    !output.status.success()
}

#[test]
fn a_rule_matches_by_regular_expression_also_among_very_many() {
    let mounted = Mounted::new();
    for name in ["wal.0001", "wal.x", "data"] {
        prepared(&mounted, name, PAGE);
    }
    for others in [0, 150] {
        let rule = |i: usize| {
            let mut rule = eio(json!({"ops": ["write"], "path_regex": format!("^/other{i}-[0-9]+$")}), json!({}));
            rule["name"] = format!("other{i}").into();
            rule
        };
        let mut rules: Vec<Value> = (0..others).map(rule).collect();
        let mut wanted = eio(json!({"ops": ["write"], "path_regex": r"wal\.[0-9]{4}$"}), json!({}));
        wanted["name"] = "r".into();
        rules.insert(others / 2, wanted);
        assert_eq!(mounted.http("PUT", "/v1/rules", Some(&json!({"rules": rules}))).status, 200);
        assert!(
            fails(&mounted, "wal.0001") && !fails(&mounted, "wal.x") && !fails(&mounted, "data"),
            "{others} others"
        );
        assert_eq!(fails(&mounted, "other7-12"), others > 0);
        mounted.reset();
    }
    mounted.end();
}

#[test]
fn a_rule_matches_a_tree_of_processes_and_nobody_beside_it() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    mounted.rule("r", eio(json!({"ops": ["write"], "tree": std::process::id()}), json!({})));
    assert!(fails(&mounted, "f"), "the root itself");
    // A shell below a shell.
    let grandchild = "sh -c 'sh -c \"printf x > f\" || exit 1' || exit 1";
    assert!(program_fails(Command::new("sh").args(["-c", grandchild]).current_dir(&mounted.mountpoint)));
    let mut other = Command::new("sleep").arg("20").spawn().unwrap();
    mounted.rule("r", eio(json!({"ops": ["write"], "tree": other.id()}), json!({})));
    assert!(!fails(&mounted, "f"));
    other.kill().unwrap();
    other.wait().unwrap();
    mounted.end();
}

#[test]
fn a_rule_matches_the_name_of_the_program_and_of_the_thread() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    mounted.rule("r", eio(json!({"ops": ["write"], "comm": "d?"}), json!({})));
    assert!(program_fails(
        Command::new("dd").args(["if=/dev/zero", "of=f", "bs=1", "count=1"]).current_dir(&mounted.mountpoint)
    ));
    assert!(!fails(&mounted, "f"));
    mounted.rule("r", eio(json!({"ops": ["write"], "comm": "checkpointer"}), json!({})));
    assert!(!fails(&mounted, "f"));
    std::thread::scope(|scope| {
        let named = std::thread::Builder::new().name("checkpointer".into());
        let failed = named.spawn_scoped(scope, || fails(&mounted, "f")).unwrap();
        assert!(failed.join().unwrap());
    });
    mounted.end();
}

#[test]
fn a_rule_matches_user_group_and_process() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    std::fs::set_permissions(mounted.backing.join("f"), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let by = |uid: u32, gid: u32| {
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", "of=f", "bs=1", "count=1", "conv=notrunc"]).current_dir(&mounted.mountpoint);
        program_fails(command.gid(gid).uid(uid))
    };
    for (conditions, nobody, root) in [
        (json!({"uid": 4711}), true, false),
        (json!({"gid": 4712}), true, false),
        (json!({"uid": 4711, "gid": 0}), false, false),
        (json!({"uid": 0}), false, true),
        (json!({"pid": std::process::id()}), false, false),
    ] {
        let mut matches = conditions.clone();
        matches["ops"] = json!(["write"]);
        mounted.rule("r", eio(matches, json!({})));
        assert_eq!((by(4711, 4712), by(0, 0)), (nobody, root), "{conditions}");
    }
    assert!(fails(&mounted, "f"), "this process");
    mounted.end();
}

#[test]
fn a_rule_matches_length_directness_and_type() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 4 * PAGE);
    let (cached, direct) = (Handle::open(Way::Cached, &mounted, "f"), Handle::open(Way::Direct, &mounted, "f"));
    let page = [1; PAGE];
    for (conditions, by_cached, by_direct) in [
        (json!({"direct": true}), false, true),
        (json!({"direct": false}), true, false),
        (json!({"length": "4096..4097"}), true, true),
        (json!({"length": "..4KiB"}), false, false),
        (json!({"offset": "4KiB..8KiB", "type": "file"}), true, true),
        (json!({"offset": "8KiB..", "type": "file"}), false, false),
        (json!({"type": "directory"}), false, false),
    ] {
        let mut matches = conditions.clone();
        matches["ops"] = json!(["write"]);
        mounted.rule("r", eio(matches, json!({})));
        let failed = [&cached, &direct].map(|handle| handle.write(&page, PAGE as u64).is_err());
        assert_eq!(failed, [by_cached, by_direct], "{conditions}");
    }
    drop((cached, direct));
    mounted.end();
}

#[test]
fn files_and_processes_are_counted_by_themselves() {
    let mounted = Mounted::new();
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"skip": 1, "times": 1, "per": "file"})));
    for name in ["a", "b", "c"] {
        assert_eq!([(); 4].map(|()| fails(&mounted, name)), [false, true, false, false], "{name}");
    }
    assert_eq!(number(&mounted, "r", "injections"), 3);
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"times": 1, "per": "process"})));
    let script = "import os\nf=os.open('a',os.O_WRONLY)\nfor i in range(3):\n\x20try: print(os.write(f,b'x'))\n\x20except OSError: print('EIO')";
    for _ in 0..3 {
        assert_eq!(mounted.python(script, &[]).split_whitespace().collect::<Vec<_>>(), ["EIO", "1", "1"]);
    }
    assert_eq!([fails(&mounted, "a"), fails(&mounted, "b")], [true, false], "its threads and files count together");
    assert_eq!(number(&mounted, "r", "injections"), 4);
    mounted.end();
}

#[test]
fn a_rule_sleeps_until_its_time_its_bytes_or_another_rule() {
    let mounted = Mounted::new();
    // The rule's time begins before the answer comes.
    let armed = std::time::Instant::now();
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"after": "300ms", "times": 1})));
    let early = fails(&mounted, "f");
    assert!(!early || armed.elapsed() >= Duration::from_millis(300));
    eventually("its time", || fails(&mounted, "f"));
    assert!(armed.elapsed() >= Duration::from_millis(300), "{:?}", armed.elapsed());
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"after_bytes": "8KiB"})));
    let file = File::create(mounted.path("f")).unwrap();
    let failed: Vec<bool> = (0..4).map(|_| file.write_at(&[1; PAGE], 0).is_err()).collect();
    assert_eq!(failed, [false, false, true, true]);
    mounted.reset();
    mounted.rule("first", eio(json!({"ops": ["fsync"]}), json!({"times": 1})));
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"after_rule": "first"})));
    assert!(!fails(&mounted, "f"));
    assert_eq!(errno(file.sync_all()), libc::EIO);
    assert!(fails(&mounted, "f"));
    drop(file);
    mounted.end();
}

/// What the kernel has cached must not hide a rule on reads that wakes by itself.
#[test]
fn a_rule_on_reads_that_wakes_later_is_not_hidden_by_the_cache() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 4 * PAGE);
    let handle = Handle::open(Way::Cached, &mounted, "f");
    let fails = || handle.read(PAGE, 0).is_err();
    mounted.rule("first", eio(json!({"ops": ["fsync"]}), json!({"times": 1})));
    for trigger in [json!({"after": "300ms"}), json!({"up": "200ms", "down": "10m"}), json!({"after_rule": "first"})] {
        mounted.cli(&["rule", "disable", "first"]);
        handle.read(4 * PAGE, 0).unwrap();
        mounted.rule("r", eio(json!({"ops": ["read"]}), trigger.clone()));
        if trigger.get("after_rule").is_some() {
            mounted.cli(&["rule", "enable", "first"]);
            assert!(!fails());
            assert_eq!(errno(handle.file.sync_all()), libc::EIO);
        }
        eventually(&format!("{trigger}"), fails);
        mounted.cli(&["rule", "rm", "r"]);
        assert!(!fails());
    }
    drop(handle);
    mounted.end();
}

#[test]
fn a_disk_comes_and_goes_by_rules_and_by_modes() {
    let mounted = Mounted::new();
    let cycles = |fails: &dyn Fn() -> bool, what: &str| {
        for _ in 0..2 {
            eventually(&format!("{what}: down"), fails);
            eventually(&format!("{what}: up"), || !fails());
        }
    };
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"up": "150ms", "down": "150ms"})));
    cycles(&|| fails(&mounted, "f"), "rule");
    mounted.reset();
    mounted.cli(&["mode", "error_writes", "--up", "150ms", "--down", "150ms"]);
    cycles(&|| fails(&mounted, "f"), "error_writes");
    mounted.cli(&["mode", "enospc", "--up", "150ms", "--down", "150ms"]);
    let next = std::cell::Cell::new(0u64);
    let grows = || {
        let file = File::options().write(true).create(true).truncate(false).open(mounted.path("grown")).unwrap();
        next.set(next.get() + PAGE as u64);
        errno(file.write_at(&[1; PAGE], next.get())) == libc::ENOSPC
    };
    cycles(&grows, "enospc");
    mounted.reset();
    mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"for": "200ms"})));
    eventually("the end of its life", || !fails(&mounted, "f"));
    assert_eq!(mounted.http("GET", "/v1/rules/r", None).body["state"], "expired");
    mounted.end();
}

const FILES: u64 = 8;
const WRITES: u64 = 100;

/// Eight threads, a file each: the places at which writes failed.
fn failed_places(mounted: &Mounted) -> BTreeSet<(String, u64)> {
    let write = |name: String| {
        let file = File::create(mounted.path(&name)).unwrap();
        let failed = (0..WRITES).filter(|i| file.write_at(&[1; 100], i * PAGE as u64).is_err());
        failed.map(|i| (name.clone(), i * PAGE as u64)).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..FILES).map(|i| scope.spawn(move || write(format!("f{i}")))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn the_same_seed_and_workload_fail_at_the_same_places() {
    let run = |seed: &str| {
        let mounted = Mounted::with(&["--seed", seed]);
        assert_eq!(mounted.health("seed"), seed.parse::<u64>().unwrap());
        mounted.rule("r", eio(json!({"ops": ["write"]}), json!({"probability": 0.3, "per": "file"})));
        let failed = failed_places(&mounted);
        let told: BTreeSet<(String, u64)> = counted(&mounted, "r")
            .iter()
            .map(|event| (event["path"].as_str().unwrap()[1..].to_string(), event["offset"].as_u64().unwrap()))
            .collect();
        assert_eq!(told, failed, "the stream and the program");
        assert_eq!(number(&mounted, "r", "injections"), failed.len() as u64);
        mounted.end();
        failed
    };
    let first = run("7");
    assert!((160..320).contains(&first.len()), "about 240 of 800: {}", first.len());
    let of_file = |name: &str| first.iter().filter(|(file, _)| file == name).map(|(_, at)| *at).collect::<Vec<_>>();
    assert_ne!(of_file("f0"), of_file("f1"), "each file has draws of its own");
    assert_eq!(run("7"), first);
    assert_ne!(run("8"), first);
}

#[test]
fn so_many_times_is_exactly_so_many_under_eight_threads() {
    for (trigger, wanted) in [
        (json!({"times": 37}), 37),
        (json!({"times": 5, "per": "file"}), 5 * FILES),
        (json!({"skip": 100, "every": 7}), (FILES * WRITES - 100).div_ceil(7)),
    ] {
        let mounted = Mounted::new();
        mounted.rule("r", eio(json!({"ops": ["write"]}), trigger.clone()));
        let seen = failed_places(&mounted).len() as u64;
        let told = counted(&mounted, "r").len() as u64;
        assert_eq!([seen, told, number(&mounted, "r", "injections")], [wanted; 3], "{trigger}");
        assert_eq!(number(&mounted, "r", "matches"), FILES * WRITES, "{trigger}");
        mounted.end();
    }
}

#[test]
fn a_required_rule_names_why_it_has_not_fired_and_passes_once_it_has() {
    let mounted = Mounted::new();
    let mut rule = eio(json!({"ops": ["write"]}), json!({}));
    rule["required"] = true.into();
    // Whoever lists the mounts of the machine meanwhile sends each of them a request.
    let mut idle = (0..5).map(|_| {
        mounted.rule("r", rule.clone());
        let said = mounted.try_cli(&["rule", "check"]);
        mounted.cli(&["rule", "rm", "r"]);
        said
    });
    let said = idle.find(|said| said.err.contains("no request has come")).expect("it names this reason");
    assert_eq!(said.code, 1, "{said:?}");
    prepared(&mounted, "f", 4 * PAGE);
    let cases = [
        (json!({"ops": ["fsync"]}), json!({}), "none met the operation: op fsync"),
        (json!({"ops": ["write"], "path": "/other"}), json!({}), "none met the path: path /other"),
        (json!({"ops": ["write"], "uid": 4711}), json!({}), "none met the process: uid 4711"),
        (json!({"ops": ["write"], "offset": "1GiB.."}), json!({}), "none met the range: offset 1GiB.."),
        (json!({"ops": ["write"]}), json!({"skip": 5}), "none met the trigger: skip 5"),
        (json!({"ops": ["write"]}), json!({"after": "1h"}), "all came before after 1h"),
    ];
    for (matches, trigger, reason) in cases {
        let mut rule = eio(matches, trigger);
        rule["required"] = true.into();
        mounted.rule("r", rule);
        fails(&mounted, "f");
        let said = mounted.try_cli(&["rule", "check"]);
        assert!(said.code == 1 && said.err.contains(reason), "{reason}: {said:?}");
        mounted.cli(&["rule", "rm", "r"]);
    }
    mounted.rule("earlier", eio(json!({"ops": ["write"]}), json!({})));
    mounted.rule("r", rule.clone());
    fails(&mounted, "f");
    let said = mounted.try_cli(&["rule", "check"]);
    assert!(said.code == 1 && said.err.contains("a rule before it in the set decided all of them"), "{said:?}");
    mounted.cli(&["rule", "rm", "earlier"]);
    assert!(fails(&mounted, "f"));
    let said = mounted.try_cli(&["rule", "check"]);
    assert!(said.code == 0 && said.out.contains("rule r has fired 1 times"), "{said:?}");
    rule["trigger"]["for"] = "50ms".into();
    mounted.rule("r", rule);
    eventually("the end of its life", || mounted.http("GET", "/v1/rules/r", None).body["state"] == "expired");
    fails(&mounted, "f");
    let said = mounted.try_cli(&["rule", "check"]);
    assert!(said.code == 1 && said.err.contains("its life has ended"), "{said:?}");
    mounted.end();
}

#[test]
fn terms_do_the_same_by_each_door() {
    let mounted = Mounted::new();
    let codes = || {
        let file = File::create(mounted.path("f")).unwrap();
        (0..5).map(|_| errno(file.write_at(b"x", 0))).collect::<Vec<_>>()
    };
    let wanted = [0, 0, 0, libc::ENOSPC, libc::ENOSPC];
    let terms = "3*off->return(ENOSPC)";
    mounted.rule("r", json!({"match": {"ops": ["write"]}, "fault": terms}));
    assert_eq!(codes(), wanted, "PUT");
    mounted.reset();
    mounted.cli(&["rule", "add", "r", "--op", "write", "--terms", terms]);
    assert_eq!(codes(), wanted, "the command line");
    mounted.reset();
    let file = mounted.run_dir().join("rules.toml");
    std::fs::write(&file, format!("[[rules]]\nname = \"r\"\nmatch.ops = [\"write\"]\nfault = \"{terms}\"\n")).unwrap();
    mounted.cli(&["rule", "apply", file.to_str().unwrap()]);
    assert_eq!(codes(), wanted, "TOML");
    mounted.reset();
    mounted.rule("mixed", json!({"match": {"ops": ["write"]}, "fault": "50%3*return(EIO)->sleep(1ms)"}));
    let file = File::create(mounted.path("f")).unwrap();
    let failed = (0..60).filter(|_| file.write_at(b"x", 0).is_err()).count();
    let kinds = |kind: &str| counted(&mounted, "mixed").iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((failed, kinds("error"), kinds("latency")), (3, 3, 57));
    drop(file);
    mounted.end();
}

#[test]
fn an_error_is_one_that_the_manual_page_allows_unless_it_is_forced() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 4 * PAGE);
    let handle = Handle::open(Way::Direct, &mounted, "f");
    mounted.rule("r", json!({"match": {"ops": ["write"]}, "fault": {"kind": "error", "any": true}}));
    let codes: BTreeSet<i32> = (0..60).map(|_| errno(handle.write(&[1; PAGE], 0))).collect();
    let page = [libc::EDQUOT, libc::EFBIG, libc::EINTR, libc::EIO, libc::ENOSPC, libc::EPERM];
    assert!(codes.len() > 2 && codes.iter().all(|code| page.contains(code)), "{codes:?}");
    let errors = json!([{"errno": "EIO", "weight": 3}, {"errno": "ENOSPC", "weight": 1}]);
    mounted.rule("r", json!({"match": {"ops": ["write"]}, "fault": {"kind": "error", "errors": errors}}));
    let codes: Vec<i32> = (0..100).map(|_| errno(handle.write(&[1; PAGE], 0))).collect();
    let often = codes.iter().filter(|code| **code == libc::EIO).count();
    assert!((55..95).contains(&often) && codes.iter().all(|code| [libc::EIO, libc::ENOSPC].contains(code)), "{often}");
    let read = |force: bool| {
        let fault = json!({"kind": "error", "errno": "ENOSPC", "force": force});
        mounted.http("PUT", "/v1/rules/r", Some(&json!({"match": {"ops": ["read"]}, "fault": fault})))
    };
    let refused = read(false);
    assert_eq!((refused.status, refused.body["code"].as_str()), (422, Some("rule_invalid")), "{refused:?}");
    assert!(refused.body["hint"].as_str().is_some_and(|hint| hint.contains("force")), "{refused:?}");
    assert_eq!(read(true).status, 200);
    assert_eq!(errno(handle.read(PAGE, 0)), libc::ENOSPC);
    mounted.rule("r", json!({"match": {"ops": ["data"]}, "fault": {"kind": "error", "errno": "ENOSPC"}}));
    assert_eq!(
        (errno(handle.read(PAGE, 0)), errno(handle.write(&[1; PAGE], 0))),
        (0, libc::ENOSPC),
        "of a group, what can"
    );
    drop(handle);
    mounted.end();
}

#[test]
fn what_is_done_and_told_to_have_failed_leaves_no_handle_behind() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    std::fs::create_dir(mounted.path("dir")).unwrap();
    prepared(&mounted, "old", 10);
    let held = Handle::open(Way::Cached, &mounted, "f");
    let after = |ops: &[&str]| {
        let fault = json!({"kind": "error", "errno": "EIO", "timing": "after"});
        mounted.rule("r", json!({"match": {"ops": ops}, "fault": fault}));
    };
    after(&["write"]);
    assert_eq!(errno(held.write(b"done", 0)), libc::EIO);
    assert_eq!(&stored(&mounted, "f")[..4], b"done");
    after(&["open", "opendir", "create", "mkdir", "rename"]);
    for _ in 0..20 {
        assert_eq!(errno(File::open(mounted.path("f"))), libc::EIO);
        assert_eq!(errno(std::fs::read_dir(mounted.path("dir"))), libc::EIO);
    }
    assert_eq!(errno(File::create(mounted.path("new"))), libc::EIO);
    assert_eq!(errno(std::fs::create_dir(mounted.path("made"))), libc::EIO);
    assert_eq!(errno(std::fs::rename(mounted.path("old"), mounted.path("moved"))), libc::EIO);
    let there = ["new", "made", "moved", "old"].map(|name| mounted.backing.join(name).exists());
    assert_eq!(there, [true, true, true, false]);
    mounted.reset();
    assert_eq!(held.write(b"more", 0).ok(), Some(4), "a handle that was open is open still");
    assert_eq!(mounted.health("open_files"), 1);
    after(&["release", "flush"]);
    drop(held);
    eventually("no handle", || mounted.health("open_files") == 0);
    mounted.reset();
    mounted.end();
}

#[test]
fn a_required_rule_that_waits_behind_another_says_so() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", PAGE);
    let stall = |name: &str, required: bool| {
        let fault = json!({"kind": "stall"});
        mounted.rule(name, json!({"required": required, "match": {"ops": ["fsync"]}, "fault": fault}));
    };
    stall("s1", false);
    stall("s2", true);
    let mut rule = eio(json!({"ops": ["fsync"]}), json!({}));
    rule["required"] = true.into();
    mounted.rule("r", rule);
    let path = mounted.path("f");
    let synced = std::thread::spawn(move || File::open(path).unwrap().sync_all());
    eventually("it is parked", || mounted.health("parked") == 1);
    let said = mounted.try_cli(&["rule", "check"]);
    let reason = |rule: &str, words: &str| {
        let of_rule = |line: &&str| line.contains(&format!("rule {rule} ")) && line.contains(words);
        assert!(said.code == 1 && said.err.lines().any(|line| of_rule(&line)), "{rule}: {said:?}");
    };
    reason("r", "1 of them wait behind a delay or a stall of another rule");
    reason("s2", "another stall held them already");
    mounted.cli(&["rule", "release", "s1"]);
    assert_eq!(synced.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    let said = mounted.try_cli(&["rule", "check"]);
    assert!(said.out.contains("rule r has fired 1 times"), "{said:?}");
    mounted.end();
}
