//! `sweep`: the fault at the first, second, third … matching request of a program.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Mounted, Said, eventually, executable, is_alive};

/// Three writes and two fsyncs, which end at the first that fails.
const FIVE_REQUESTS: &str = "
import os, sys
f = os.open(sys.argv[1] + '/f', os.O_CREAT | os.O_WRONLY)
os.write(f, b'a' * 10); os.write(f, b'b' * 10); os.fsync(f); os.write(f, b'c' * 10); os.fsync(f)
";

const EIO: [&str; 6] = ["--kind", "error", "--errno", "EIO", "--op", "write,fsync"];

/// Sweeps over a Python program, which gets the mountpoint as its argument.
fn sweep(mounted: &Mounted, options: &[&str], program: &str) -> Said {
    mounted.try_cli(&[&["sweep"], options, &["--", "python3", "-c", program, "{mnt}"]].concat())
}

/// The same, with the report.
fn report(mounted: &Mounted, options: &[&str], program: &str) -> (i32, Value) {
    let said = sweep(mounted, &[options, &["--json"]].concat(), program);
    let report = serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    (said.code, report)
}

fn each(report: &Value, get: impl Fn(&Value) -> Value) -> Value {
    report["runs"].as_array().expect("runs").iter().map(get).collect()
}

fn assert_no_rule(mounted: &Mounted) {
    assert_eq!(mounted.http("GET", "/v1/rules", None).body["rules"], json!([]));
}

#[test]
fn each_request_of_a_program_is_hit_once_and_the_sweep_ends_by_itself() {
    let mounted = Mounted::new();
    let (code, report) = report(&mounted, &EIO, FIVE_REQUESTS);
    assert_eq!(code, 0, "{report}");
    let hits = each(&report, |run| json!([run["n"], run["hit"]["op"], run["hit"]["offset"], run["command"]["exit"]]));
    let expected = json!([
        [1, "write", 0, 1],
        [2, "write", 10, 1],
        [3, "fsync", null, 1],
        [4, "write", 20, 1],
        [5, "fsync", null, 1],
        [6, null, null, 0],
    ]);
    assert_eq!(hits, expected, "{report}");
    let summary = &report["summary"];
    assert_eq!((&summary["runs"], &summary["fired"], &summary["complete"]), (&json!(6), &json!(5), &json!(true)));
    assert_eq!(report["passed"], true);
    assert_eq!(mounted.injections("sweep").len(), 5, "one injection a run");
    assert_no_rule(&mounted);
    mounted.end();
}

#[test]
fn an_error_can_stay_until_the_check() {
    let mounted = Mounted::new();
    let tries_all = "
import os, sys
f = os.open(sys.argv[1] + '/f', os.O_CREAT | os.O_WRONLY)
for i in range(5):
    try: os.pwrite(f, b'x', i)
    except OSError: pass
";
    let before = || mounted.injections("sweep").len();
    for (how, expected) in [(&[] as &[&str], 1), (&["--times", "2"], 2), (&["--persistent"], 4)] {
        let already = before();
        let options = [how, &EIO, &["--from", "2", "--to", "2", "--verify", "echo x >{mnt}/other"]].concat();
        let (code, report) = report(&mounted, &options, tries_all);
        assert_eq!((code, before() - already), (0, expected), "{how:?}: {report}");
    }
    mounted.end();
}

/// Four records; the second write is not checked, and all is said to be well.
const FORGETS_ONE: &str = "
import os, sys
f = os.open(sys.argv[1] + '/log', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
for i in range(4):
    try:
        os.pwrite(f, b'record%d;' % i, i * 8)
    except OSError:
        if i != 1: raise
os.fsync(f)
";
const ALL_OR_TOLD: &str =
    "[ $NEMESISFS_SWEEP_EXIT != 0 ] || [ $(tr -d '\\0' <{mnt}/log | wc -c) = 32 ] || { echo short; exit 1; }";

#[test]
fn a_planted_bug_is_found_at_its_request_and_the_command_told_repeats_it() {
    let mounted = Mounted::new();
    let options = [EIO.as_slice(), &["--verify", ALL_OR_TOLD]].concat();
    let (code, report) = report(&mounted, &options, FORGETS_ONE);
    assert_eq!(code, 1, "{report}");
    let summary = &report["summary"];
    assert_eq!((&summary["verify_failed"], &summary["first_verify_failed"]), (&json!(1), &json!(2)), "{report}");
    assert_eq!((&summary["survived"], &summary["runs"]), (&json!(1), &json!(6)), "{report}");
    assert_eq!(report["runs"][1]["verify"]["output"], "short");

    let said = sweep(&mounted, &options, FORGETS_ONE);
    assert_eq!(said.code, 1);
    let wrong: Vec<&str> = said.out.lines().filter(|line| line.starts_with("n=")).collect();
    assert_eq!(wrong.len(), 1, "only what is worth a line: {said:?}");
    assert!(wrong[0].contains("n=2") && wrong[0].contains("survived") && wrong[0].contains("WRONG"), "{said:?}");
    assert!(said.err.contains("--verify failed in 1 of 6 runs, first at n=2"), "{said:?}");

    let repeat = summary["repeat"].as_str().expect("a command").replacen("nemesisfs", executable(), 1);
    let again = Command::new("sh").args(["-c", &repeat]).env("NEMESISFS_RUNDIR", mounted.run_dir()).output();
    let again = Said::from(again.expect("a shell"));
    assert!(again.code == 1 && again.err.contains("in 1 of 1 runs, first at n=2"), "{repeat}\n{again:?}");
    assert_no_rule(&mounted);
    mounted.end();
}

/// <https://sqlite.org/testing.html>, "I/O Error Testing": an error once and an error that stays, at every request;
/// afterwards the database is sound, and a transaction is there or not.
#[test]
fn sqlite_is_sound_after_an_error_at_any_write_or_fsync_of_a_transaction() {
    let mounted = Mounted::new();
    for (journal, at_least) in [("delete", 10), ("wal", 8)] {
        for how in [&[] as &[&str], &["--persistent"]] {
            let prepare = format!(
                "rm -f {{mnt}}/db*; sqlite3 -bail {{mnt}}/db 'pragma journal_mode={journal}; create table t(v);
                 with recursive n(i) as (values(1) union all select i+1 from n where i<50)
                 insert into t select hex(randomblob(200)) from n'"
            );
            let verify = "said=$(sqlite3 {mnt}/db 'pragma integrity_check; select count(*) from t') || exit 1
                case $NEMESISFS_SWEEP_EXIT,$said in
                    *,'ok\n100') ;;
                    [!0]*,'ok\n50') ;;
                    *) echo \"$said\"; exit 1 ;;
                esac"
                .replace("\\n", "\n");
            let transaction =
                "pragma synchronous=full; begin; insert into t select hex(randomblob(200)) from t; commit";
            let options = [how, &EIO, &["--path", "/db*", "--prepare", &prepare, "--verify", &verify]].concat();
            let command = ["--json", "--", "sqlite3", "-bail", "{mnt}/db", transaction];
            let said = mounted.try_cli(&[&["sweep"], options.as_slice(), &command].concat());
            assert_eq!(said.code, 0, "{journal} {how:?}: {said:?}");
            let report: Value = serde_json::from_str(&said.out).expect("a report");
            let summary = &report["summary"];
            assert!(summary["fired"].as_u64() >= Some(at_least) && summary["complete"] == true, "{journal}: {summary}");
            assert!(summary["failed"].as_u64() > Some(0), "{journal}: {summary}");
            println!("{journal} {how:?}: {summary}");
        }
    }
    mounted.end();
}

#[test]
fn an_interrupted_sweep_leaves_neither_rule_nor_child() {
    let mounted = Mounted::new();
    let sleeper = mounted.aside("pids").join("sleeper");
    let script = format!("sleep 1000 & echo $! >{}; echo x >{{mnt}}/f", sleeper.display());
    let mut command = Command::new(executable());
    command.args(["sweep", "--kind", "stall", "--op", "write", "--", "sh", "-c", &script]);
    command.env("NEMESISFS_RUNDIR", mounted.run_dir()).stdout(Stdio::null());
    let mut running = command.stderr(Stdio::piped()).spawn().expect("the program runs");
    eventually("the write is stalled", || mounted.health("parked") == 1);
    let writer = mounted.injections("sweep")[0]["pid"].as_u64().expect("a pid") as u32;
    let sleeper = fs::read_to_string(sleeper).expect("a pid").trim().parse().expect("a pid");
    assert!(is_alive(writer) && is_alive(sleeper));

    kill(Pid::from_raw(running.id() as i32), Signal::SIGINT).expect("a signal");
    eventually("it ends", || running.try_wait().expect("a status").is_some());
    let said = Said::from(running.wait_with_output().expect("its end"));
    assert_eq!(said.code, 130, "{said:?}");
    assert!(said.err.contains("SIGINT"), "{said:?}");
    assert_no_rule(&mounted);
    eventually("its children have ended", || !is_alive(writer) && !is_alive(sleeper));
    mounted.end();
}

#[test]
fn a_command_that_hangs_is_killed_at_the_timeout_and_that_is_a_failure() {
    let mounted = Mounted::new();
    let ended = |options: &[&str]| {
        let began = Instant::now();
        let command = ["--op", "write", "--json", "--", "dd", "if=/dev/zero", "of={mnt}/f", "bs=4k", "count=2"];
        let said = mounted.try_cli(&[&["sweep"], options, &command].concat());
        let report: Value = serde_json::from_str(&said.out).expect("a report");
        assert!(began.elapsed() < Duration::from_secs(30), "{report}");
        (said.code, report["summary"]["timed_out"].clone())
    };
    // The last run, which meets nothing, has to be through by then.
    assert_eq!(ended(&["--kind", "stall", "--timeout", "5s"]), (1, json!(2)));
    assert_eq!(mounted.health("parked"), 0);
    // To be told apart from a command that fails at once.
    assert_eq!(ended(&["--kind", "error", "--errno", "EIO"]), (0, json!(0)));
    mounted.end();
}

#[test]
fn a_sweep_ends_with_a_preparation_that_fails() {
    let mounted = Mounted::new();
    let prepare = "echo no room >&2; [ $NEMESISFS_SWEEP_N -lt 3 ]";
    let said = sweep(&mounted, &[EIO.as_slice(), &["--prepare", prepare]].concat(), FIVE_REQUESTS);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("--prepare failed at n=3: exit 1") && said.err.contains("no room"), "{said:?}");
    assert!(said.out.contains("2 runs") && said.out.contains("there may be more"), "{said:?}");
    assert_no_rule(&mounted);
    mounted.end();
}

#[test]
fn each_run_begins_at_an_idle_mount_prepared_anew() {
    let mounted = Mounted::new();
    mounted.error_rule("before", "write", "/never", "EIO", None);
    let prepared = mounted.aside("aside").join("prepared");
    let prepare = format!(
        "test -z \"$(ls {{mnt}})\"; echo $? >>{}; rm -f {{mnt}}/f; {} mode | grep allow_writes",
        prepared.display(),
        executable()
    );
    let verify = format!("{} mode error_all", executable());
    let options = [EIO.as_slice(), &["--prepare", &prepare, "--verify", &verify]].concat();
    let said = sweep(&mounted, &options, FIVE_REQUESTS);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("rules removed: before") && said.out.contains("undo: "), "{said:?}");
    assert_eq!(fs::read_to_string(prepared).expect("its words"), "0\n1\n1\n1\n1\n1\n");
    mounted.reset();
    assert_no_rule(&mounted);
    mounted.end();
}

#[test]
fn a_sweep_that_meets_nothing_or_fails_without_a_fault_is_a_failure() {
    let mounted = Mounted::new();
    let elsewhere = [EIO.as_slice(), &["--path", "/elsewhere"]].concat();
    let said = sweep(&mounted, &elsewhere, FIVE_REQUESTS);
    assert!(said.code == 1 && said.err.contains("nothing was tested"), "{said:?}");
    let fails = format!("{FIVE_REQUESTS}\nsys.exit(3)");
    let said = sweep(&mounted, &EIO, &fails);
    assert!(said.code == 1 && said.err.contains("fails without a fault: exit 3 at n=6"), "{said:?}");
    let late = format!("import time; time.sleep(0.3)\n{FIVE_REQUESTS}");
    let said = sweep(&mounted, &[EIO.as_slice(), &["--for", "100ms"]].concat(), &late);
    assert!(said.code == 1 && said.err.contains("the rule expired before it met request 1"), "{said:?}");
    let said = mounted.try_cli(&[&["sweep"], EIO.as_slice(), &["--", "/nonexistent/program"]].concat());
    assert!(said.code == 1 && said.err.contains("/nonexistent/program: No such file"), "{said:?}");
    assert_no_rule(&mounted);
    mounted.end();
}

/// The command is of two processes, and what is stalled is the second one's.
#[test]
fn what_a_killed_command_was_about_to_write_never_comes() {
    let mounted = Mounted::new();
    let script = "dd if=/dev/zero of={mnt}/f bs=4k count=1 status=none; true";
    let verify = "[ $NEMESISFS_SWEEP_EXIT = 0 ] || [ ! -s {mnt}/f ]";
    let options = ["--kind", "stall", "--op", "write", "--timeout", "5s", "--verify", verify, "--json"];
    let said = mounted.try_cli(&[&["sweep"], options.as_slice(), &["--", "sh", "-c", script]].concat());
    let report: Value = serde_json::from_str(&said.out).expect("a report");
    let summary = &report["summary"];
    assert_eq!((&summary["timed_out"], &summary["verify_failed"]), (&json!(1), &json!(0)), "{report}");
    mounted.end();
}

#[test]
fn a_sweep_can_begin_and_end_anywhere_and_end_with_the_first_that_is_wrong() {
    let mounted = Mounted::new();
    let numbers = |options: &[&str]| {
        let (code, report) = report(&mounted, &[EIO.as_slice(), options].concat(), FIVE_REQUESTS);
        (code, each(&report, |run| run["n"].clone()))
    };
    assert_eq!(numbers(&["--from", "2", "--to", "4"]), (0, json!([2, 3, 4])));
    assert_eq!(numbers(&["--from", "4"]), (0, json!([4, 5, 6])));
    let from_three_on = ["--verify", "[ $NEMESISFS_SWEEP_N -lt 3 ]"];
    assert_eq!(numbers(&from_three_on), (1, json!([1, 2, 3, 4, 5, 6])));
    assert_eq!(numbers(&[&from_three_on, ["--stop-at-first"].as_slice()].concat()), (1, json!([1, 2, 3])));
    mounted.end();
}

#[test]
fn the_report_is_also_a_file_and_the_short_forms_say_the_same_rule() {
    let mounted = Mounted::new();
    let file = mounted.aside("reports").join("report.json");
    let short =
        ["--match", "op=write,fsync", "--fault", "kind=error,errno=EIO", "--output", file.to_str().expect("a path")];
    let said = sweep(&mounted, &[short.as_slice(), &["--quiet"]].concat(), FIVE_REQUESTS);
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (0, "", ""), "{said:?}");
    let report: Value = serde_json::from_str(&fs::read_to_string(file).expect("a file")).expect("a report");
    assert_eq!((&report["summary"]["fired"], &report["passed"]), (&json!(5), &json!(true)), "{report}");
    assert_eq!(report["instance"], "t");
    assert_eq!(Path::new(report["mountpoint"].as_str().expect("a path")), mounted.mountpoint);
    mounted.end();
}

#[test]
fn what_a_sweep_chooses_by_itself_and_several_hosts_are_refused() {
    let mounted = Mounted::new();
    for refused in ["--skip=3", "--every=2", "--probability=0.5"] {
        let said = sweep(&mounted, &[EIO.as_slice(), &[refused]].concat(), FIVE_REQUESTS);
        assert!(said.code == 2 && said.err.contains("chooses by itself"), "{said:?}");
    }
    let hosts = ["-H", "t", "-H", "unix:///nonexistent/other.sock"];
    let said = sweep(&mounted, &[EIO.as_slice(), &hosts].concat(), FIVE_REQUESTS);
    assert!(said.code == 2 && said.err.contains("sweep is for one instance"), "{said:?}");
    let said = sweep(&mounted, &[EIO.as_slice(), &["--from", "3", "--to", "2"]].concat(), FIVE_REQUESTS);
    assert!(said.code == 2 && said.err.contains("--to comes before --from"), "{said:?}");
    let said = sweep(&mounted, &["--kind", "eror"], FIVE_REQUESTS);
    assert!(said.code == 1 && said.err.contains("hint: "), "the server's own words: {said:?}");
    assert!(mounted.injections("sweep").is_empty());
    mounted.end();
}
