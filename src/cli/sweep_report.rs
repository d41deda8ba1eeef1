//! What a sweep found: each run, the sum, and how to repeat one, as lines and as a document.
//!
//! Thread: the caller's. Locks: none. Must never: print, or call a sweep good that has tested nothing.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use super::args::quoted;
use super::children::{Done, Ended};
use super::events::range;
use super::rule::field;
use super::rule_text::{flags, sentence};
use super::sweep::SweepArgs;
use super::table;

/// Places that the table names, before it says how many more there are.
const PLACES: usize = 20;

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Exit(code) => write!(f, "exit {code}"),
            Ended::Signal(signal) => write!(f, "{signal}"),
            Ended::TimedOut => f.write_str("killed at the timeout"),
        }
    }
}

fn end_document(done: &Done) -> Value {
    let mut end = match done.ended {
        Ended::Exit(code) => json!({"exit": code}),
        Ended::Signal(signal) => json!({"signal": signal.as_str()}),
        Ended::TimedOut => json!({"timed_out": true}),
    };
    end["output"] = json!(done.output);
    end
}

/// One run of the command.
#[derive(Debug)]
pub struct Run {
    pub n: u64,
    /// Whether the fault was met; the run that ends a sweep meets none.
    pub fired: bool,
    /// The first injection, unless the ring of events has lost it.
    pub event: Option<Value>,
    pub command: Done,
    pub verify: Option<Done>,
}

impl Run {
    pub fn verify_failed(&self) -> bool {
        self.verify.as_ref().is_some_and(|verify| !verify.ended.well())
    }

    fn timed_out(&self) -> bool {
        self.command.ended == Ended::TimedOut
    }

    /// The fault was met and the command succeeded all the same.
    fn survived(&self) -> bool {
        self.fired && self.command.ended.well()
    }

    /// A command that fails is no failure, unless nothing has made it fail.
    pub fn is_wrong(&self) -> bool {
        self.verify_failed() || self.timed_out() || (!self.fired && !self.command.ended.well())
    }

    /// Also one that crashed, or that succeeded although the program was told of an error.
    pub fn is_worth_a_line(&self) -> bool {
        let told = self.event.as_ref().is_some_and(|event| !field(event, "errno").is_empty());
        self.is_wrong() || matches!(self.command.ended, Ended::Signal(_)) || (told && self.survived())
    }

    /// What was hit: operation and path.
    fn place(&self) -> (String, String) {
        match &self.event {
            Some(event) => (field(event, "op"), field(event, "path")),
            None => ("?".to_owned(), "?".to_owned()),
        }
    }

    /// One line, and what was said below it if something is wrong.
    pub fn lines(&self) -> Vec<String> {
        let mut line = format!("n={:<4} ", self.n);
        match &self.event {
            Some(event) => {
                let (op, path) = self.place();
                let (range, pid, comm) = (range(event), field(event, "pid"), field(event, "comm"));
                line += format!("{op} {path} {range} {} {pid}/{comm}", field(event, "errno")).replace("  ", " ").trim();
            }
            None if self.fired => line += "fired, but the event is lost",
            None => line += "no such request, so no fault",
        }
        line += &format!(": command {}", self.command.ended);
        if self.survived() {
            line += ", survived";
        }
        if let Some(verify) = &self.verify {
            line += &format!(", verify {}", verify.ended);
        }
        if !self.is_wrong() {
            return vec![line];
        }
        let said = self.verify.iter().chain([&self.command]).flat_map(|done| done.output.lines());
        [line + ": WRONG"].into_iter().chain(said.map(|line| format!("       | {line}"))).collect()
    }

    fn document(&self) -> Value {
        let hit = self.event.as_ref().map(|event| {
            let kept = ["id", "op", "path", "offset", "length", "errno", "pid", "tid", "comm"];
            kept.iter().map(|key| (key.to_string(), event.get(*key).cloned().unwrap_or_default())).collect::<Value>()
        });
        json!({
            "n": self.n, "fired": self.fired, "hit": hit, "command": end_document(&self.command),
            "verify": self.verify.as_ref().map(end_document), "survived": self.survived(), "wrong": self.is_wrong(),
        })
    }
}

/// A whole sweep.
#[derive(Debug)]
pub struct Report {
    instance: String,
    mountpoint: String,
    rule: Value,
    runs: Vec<Run>,
    pub seconds: f64,
}

impl Report {
    pub fn new(instance: String, mountpoint: String, rule: Value) -> Self {
        Report { instance, mountpoint, rule, runs: Vec::new(), seconds: 0.0 }
    }

    pub fn add(&mut self, run: Run) {
        self.runs.push(run);
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    fn count(&self, is: impl Fn(&Run) -> bool) -> usize {
        self.runs.iter().filter(|run| is(run)).count()
    }

    fn first_wrong(&self) -> Option<u64> {
        self.runs.iter().find(|run| run.is_wrong()).map(|run| run.n)
    }

    /// The run without a fault with which a sweep is complete.
    fn fault_free(&self) -> Option<&Run> {
        self.runs.last().filter(|run| !run.fired)
    }

    /// A sweep that met nothing has tested nothing.
    pub fn passed(&self) -> bool {
        self.count(|run| run.fired) > 0 && self.first_wrong().is_none()
    }

    pub fn so_far(&self) -> String {
        let (survived, wrong) = (self.count(Run::survived), self.count(Run::is_wrong));
        format!("{} runs, {survived} survived, {wrong} wrong", self.runs.len())
    }

    /// The sum, as a table of places and a sentence.
    pub fn lines(&self) -> Vec<String> {
        let mut places: BTreeMap<(String, String), Vec<&Run>> = BTreeMap::new();
        for run in self.runs.iter().filter(|run| run.fired) {
            places.entry(run.place()).or_default().push(run);
        }
        let count = |runs: &[&Run], is: &dyn Fn(&Run) -> bool| runs.iter().filter(|run| is(run)).count().to_string();
        let row = |((op, path), runs): (&(String, String), &Vec<&Run>)| {
            let failed = count(runs, &|run| !run.survived());
            let (survived, wrong) = (count(runs, &Run::survived), count(runs, &Run::is_wrong));
            vec![op.clone(), runs.len().to_string(), failed, survived, wrong, path.clone()]
        };
        let rows: Vec<Vec<String>> = places.iter().take(PLACES).map(row).collect();
        let mut lines = Vec::new();
        if !rows.is_empty() {
            lines = table::lines(&["OP", "HIT", "FAILED", "SURVIVED", "WRONG", "PATH"], &rows);
        }
        if places.len() > PLACES {
            lines.push(format!("… and {} more", places.len() - PLACES));
        }
        lines.push(self.sentence());
        lines
    }

    fn sentence(&self) -> String {
        let end = match (self.fault_free(), self.runs.last()) {
            (Some(run), _) => format!("; run {} met no request, so that is all", run.n),
            (None, Some(run)) => format!("; ended after n={}, there may be more", run.n),
            (None, None) => String::new(),
        };
        let hits = self.count(|run| run.fired);
        format!("{}: {}, {hits} met the fault{end}", sentence(&self.described()), self.so_far())
    }

    /// The rule as the sentence about it wants it: a term stands for its kind, and each run has another trigger.
    fn described(&self) -> Value {
        let fault = &self.rule["fault"];
        let fault = if fault.is_string() { json!({"kind": fault}) } else { fault.clone() };
        json!({"match": self.rule["match"], "fault": fault})
    }

    /// What is wrong, and how to see it again.
    pub fn complaints(&self, repeat: &dyn Fn(u64) -> String) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut wrong = |what: &str, runs: Vec<u64>| {
            if let Some(first) = runs.first() {
                complaints.push(format!(
                    "error: {what} in {} of {} runs, first at n={first}",
                    runs.len(),
                    self.runs.len()
                ));
            }
        };
        let those = |is: &dyn Fn(&Run) -> bool| self.runs.iter().filter(|run| is(run)).map(|run| run.n).collect();
        wrong("--verify failed", those(&Run::verify_failed));
        wrong("the command was killed at the timeout", those(&Run::timed_out));
        if let Some(run) = self.fault_free().filter(|run| !run.command.ended.well()) {
            complaints.push(format!("error: the command fails without a fault: {} at n={}", run.command.ended, run.n));
        }
        if let Some(run) = self.fault_free().filter(|_| self.runs.len() == 1) {
            complaints.push(format!("error: nothing was tested: no request {} matched the rule", run.n));
            complaints.push("hint: look at --op and --path; paths begin below the mountpoint, with a slash".to_owned());
        } else if let Some(n) = self.first_wrong() {
            complaints.push(format!("hint: to repeat it: {}", repeat(n)));
        }
        complaints
    }

    pub fn document(&self, args: &SweepArgs, repeat: &dyn Fn(u64) -> String) -> Value {
        let first = |is: &dyn Fn(&Run) -> bool| self.runs.iter().find(|run| is(run)).map(|run| run.n);
        json!({
            "instance": self.instance, "mountpoint": self.mountpoint, "rule": self.rule, "command": args.command,
            "prepare": args.prepare, "verify": args.verify,
            "summary": {
                "runs": self.runs.len(), "fired": self.count(|run| run.fired), "survived": self.count(Run::survived),
                "failed": self.count(|run| run.fired && !run.survived()), "timed_out": self.count(Run::timed_out),
                "verify_failed": self.count(Run::verify_failed), "wrong": self.count(Run::is_wrong),
                "first_verify_failed": first(&Run::verify_failed), "first_wrong": self.first_wrong(),
                "repeat": self.first_wrong().map(repeat), "complete": self.fault_free().is_some(),
                "seconds": self.seconds,
            },
            "runs": self.runs.iter().map(Run::document).collect::<Vec<_>>(),
        })
    }

    /// The words of the command that runs the n-th alone.
    pub fn repeat(&self, args: &SweepArgs, n: u64) -> String {
        let mut words = vec![format!("sweep --from {n} --to {n}")];
        for (section, flag) in [("match", "--match"), ("fault", "--fault")] {
            let short = || vec![format!("{flag} {}", quoted(&field(&self.rule, section)))];
            words.extend(flags(&self.rule, section).unwrap_or_else(short));
        }
        words.extend(flags(&self.rule, "trigger").into_iter().flatten().filter(|words| words != "--times 1"));
        if args.persistent {
            words.push("--persistent".to_owned());
        }
        for (flag, script) in [("--prepare", &args.prepare), ("--verify", &args.verify)] {
            words.extend(script.as_ref().map(|script| format!("{flag} {}", quoted(script))));
        }
        words.push(format!("--timeout {} --", quoted(&args.timeout.text)));
        words.extend(args.command.iter().map(|word| quoted(word)));
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};

    fn args(words: &str) -> SweepArgs {
        match Cli::try_parse_from(shlex::split(words).unwrap()).unwrap().verb {
            Verb::Sweep(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_that_repeats_a_run_makes_the_same_rule_again() {
        for options in [
            "--kind error --errno EIO --op write,fsync --path '/db*' --verify 'test -e \"{mnt}/x\"'",
            "--fault 'return(EIO)' --match op=write --persistent --per file",
            r#"--fault '{"kind":"torn","keep":{"parts":3,"persist":[1]}}' --times 3 --timeout 5s"#,
        ] {
            let first = args(&format!("nemesisfs sweep {options} -- prog 'a b'"));
            let report = Report::new("n".into(), "/m".into(), first.rule().unwrap());
            let again = args(&format!("nemesisfs {}", report.repeat(&first, 7)));
            assert_eq!(again.rule().unwrap(), first.rule().unwrap(), "{options}");
            assert_eq!((&again.command, &again.verify), (&first.command, &first.verify));
            assert_eq!((again.persistent, again.timeout.text), (first.persistent, first.timeout.text));
        }
    }

    #[test]
    fn a_run_that_survived_is_worth_a_line_only_if_the_program_was_told_of_an_error() {
        let done = |code| Done { ended: Ended::Exit(code), output: "said".into() };
        let run = |event: Value, command| Run { n: 1, fired: true, event: Some(event), command, verify: None };
        let told =
            json!({"op": "write", "path": "/f", "offset": 0, "length": 4, "errno": "EIO", "pid": 7, "comm": "sh"});
        let survived = run(told.clone(), done(0));
        assert!(survived.is_worth_a_line() && !survived.is_wrong());
        assert_eq!(survived.lines(), ["n=1    write /f 0+4 EIO 7/sh: command exit 0, survived"]);
        assert!(!run(json!({"op": "write", "errno": null}), done(0)).is_worth_a_line());
        assert!(!run(told, done(1)).is_worth_a_line());
        let fails = Run { n: 2, fired: false, event: None, command: done(1), verify: None };
        let lines = ["n=2    no such request, so no fault: command exit 1: WRONG", "       | said"];
        assert_eq!(fails.lines(), lines);
    }
}
