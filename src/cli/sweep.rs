//! `sweep`: runs a command again and again, with the fault at the first, second, third … matching request, until a run
//! meets none; after each run another command looks whether what is left is right. SQLite tests itself so
//! (<https://sqlite.org/testing.html>, "I/O Error Testing").
//!
//! Thread: the main one. Locks: the console's, for the length of a line. Must never: leave the rule armed or a child
//! running, whichever way it ends; or take a run for fault-free of which it does not know that.

use std::ops::ControlFlow;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client::{ClientError, with_query};
use crate::exit;

use super::args::Span;
use super::children::{Broken, Children, Done};
use super::console::Outcome;
use super::rule::{self, field, path_of};
use super::rule_args::{FaultArgs, MatchArgs, TriggerArgs};
use super::session::{Session, World, on_only, warnings};
use super::sweep_report::{Report, Run};
use super::sweep_words;

/// The name of the rule while a sweep runs.
const RULE: &str = "sweep";

#[derive(Debug, Args)]
#[command(mut_arg("kind", |kind| kind.required(false).required_unless_present("fault_words")))]
pub struct SweepArgs {
    /// What is run each time, and may fail; {mnt} in it is the mountpoint, NEMESISFS_SWEEP_N in its environment the number
    /// of the run
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
    /// Shell command that makes each run's beginning, after the mount was reset; the sweep ends if it fails
    #[arg(long, value_name = "CMD")]
    pub prepare: Option<String>,
    /// Shell command that fails if what a run left is wrong; NEMESISFS_SWEEP_EXIT tells it how the command ended
    #[arg(long, value_name = "CMD")]
    pub verify: Option<String>,
    /// Begin with the N-th request
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
    /// End with the N-th request, whether there are more or not
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    to: Option<u64>,
    /// How long the command, and each of the shell commands, may take before it is killed
    #[arg(long, value_name = "DURATION", default_value = "1m")]
    pub timeout: Span,
    /// Fail the N-th request and all that follow, not it alone
    #[arg(long, conflicts_with = "times")]
    pub persistent: bool,
    /// End with the first run that is wrong
    #[arg(long, conflicts_with = "keep_going")]
    stop_at_first: bool,
    /// Go on after runs that are wrong, as it does anyway
    #[arg(long)]
    keep_going: bool,
    /// Write the report to a file too, as JSON
    #[arg(long, value_name = "FILE")]
    output: Option<String>,
    /// A line for each run, not only for those that are worth it
    #[arg(long, short)]
    pub verbose: bool,
    /// Where, in short: op=write,fsync,path=/db/* or a JSON object
    #[arg(long = "match", value_name = "WHERE", value_parser = sweep_words::place, conflicts_with = "MatchArgs")]
    place_words: Option<Value>,
    /// What happens, in short: a kind, kind=error,errno=EIO, a JSON object, or a term such as return(EIO)
    #[arg(long = "fault", value_name = "WHAT", value_parser = sweep_words::fault, conflicts_with = "FaultArgs")]
    fault_words: Option<Value>,
    #[command(flatten)]
    fault: Option<FaultArgs>,
    #[command(flatten)]
    place: MatchArgs,
    #[command(flatten)]
    trigger: TriggerArgs,
}

impl SweepArgs {
    /// The rule without the number of the request, which is that of the run.
    pub fn rule(&self) -> Result<Value, ClientError> {
        let mut trigger = self.trigger.document();
        for chosen in ["skip", "every", "probability"] {
            if trigger.get(chosen).is_some() {
                let error = ClientError::usage(format!("--{chosen}: a sweep chooses by itself when the rule fires"));
                return Err(error.hint("--from and --to bound it"));
            }
        }
        if !self.persistent && trigger.get("times").is_none() {
            trigger["times"] = json!(1);
        }
        if self.to.is_some_and(|to| to < self.from) {
            return Err(ClientError::usage("--to comes before --from"));
        }
        let place = self.place_words.clone().unwrap_or_else(|| self.place.document());
        let fault = self.fault_words.clone().or_else(|| Some(self.fault.as_ref()?.document()));
        Ok(json!({"name": RULE, "match": place, "trigger": trigger, "fault": fault}))
    }
}

pub fn run(world: &World, args: &SweepArgs) -> u8 {
    on_only(world, "sweep", &|session| sweep(session, args))
}

/// Why a sweep ended before its end.
#[derive(Debug)]
enum Halt {
    Error(ClientError),
    Interrupted(Signal),
}

impl From<ClientError> for Halt {
    fn from(error: ClientError) -> Self {
        Halt::Error(error)
    }
}

/// What the rule did in a run.
struct Met {
    fired: bool,
    event: Option<Value>,
}

struct Sweep<'a> {
    session: &'a Session<'a>,
    args: &'a SweepArgs,
    rule: Value,
    mountpoint: String,
    children: Children,
    bar: ProgressBar,
}

fn sweep(session: &Session, args: &SweepArgs) -> Result<Outcome, ClientError> {
    let rule = args.rule()?;
    let health = session.client.get("/v1/health")?.body;
    let mountpoint = field(&health, "mountpoint");
    let children = Children::new().map_err(|error| ClientError::failed(format!("signals: {error}")))?;
    let mut report = Report::new(field(&health, "instance"), mountpoint.clone(), rule.clone());
    let mut sweep = Sweep { session, args, rule, mountpoint, children, bar: bar(session, args) };
    let began = Instant::now();
    let halt = sweep.all(&mut report).err();
    sweep.bar.finish_and_clear();
    report.seconds = began.elapsed().as_secs_f64();
    let halt = match halt {
        // There is nothing to report but this.
        Some(Halt::Error(error)) if report.is_empty() => return Err(error),
        halt => halt,
    };
    let mut outcome = outcome(session, args, &report, halt);
    if let Some(file) = &args.output {
        save(file, outcome.body.as_ref(), &mut outcome.complaints).unwrap_or_else(|code| outcome.exit = code);
    }
    Ok(outcome)
}

fn outcome(session: &Session, args: &SweepArgs, report: &Report, halt: Option<Halt>) -> Outcome {
    let repeat = |n| session.command(&report.repeat(args, n));
    let mut complaints = report.complaints(&repeat);
    let mut body = report.document(args, &repeat);
    let mut code = if report.passed() { exit::DONE } else { exit::FAILED };
    match halt {
        None => {}
        Some(Halt::Error(error)) => {
            complaints.splice(0..0, error.lines());
            body["error"] = error.problem;
            code = error.exit;
        }
        Some(Halt::Interrupted(signal)) => {
            complaints.insert(0, format!("interrupted by {signal}; the rule is removed"));
            body["error"] = json!({"code": "interrupted", "detail": signal.as_str()});
            code = 128 + signal as u8;
        }
    }
    body["passed"] = json!(code == exit::DONE);
    Outcome { lines: report.lines(), complaints, body: Some(body), status: 200, exit: code }
}

fn save(file: &str, report: Option<&Value>, complaints: &mut Vec<String>) -> Result<(), u8> {
    let text = report.map(|report| format!("{report:#}\n")).unwrap_or_default();
    std::fs::write(file, text).map_err(|error| {
        complaints.push(format!("error: {file}: {error}"));
        exit::FAILED
    })
}

/// Progress, for a person who looks on.
fn bar(session: &Session, args: &SweepArgs) -> ProgressBar {
    let target = if session.console.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let runs = args.to.map(|to| to.saturating_sub(args.from) + 1);
    let template = if runs.is_some() { "{bar:30} {pos}/{len} {msg} {elapsed}" } else { "{spinner} {msg} {elapsed}" };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::with_draw_target(runs, target).with_style(style);
    if !bar.is_hidden() {
        bar.enable_steady_tick(Duration::from_millis(100));
    }
    bar
}

impl Sweep<'_> {
    fn all(&mut self, report: &mut Report) -> Result<(), Halt> {
        for n in self.args.from..=self.args.to.unwrap_or(u64::MAX) {
            self.bar.set_message(format!("n={n}, {}", report.so_far()));
            let run = self.one(n);
            self.children.end();
            let run = run?;
            self.bar.inc(1);
            self.tell(&run);
            let (fault_free, wrong) = (!run.fired, run.is_wrong());
            report.add(run);
            if fault_free || (wrong && self.args.stop_at_first) {
                break;
            }
        }
        Ok(())
    }

    fn one(&mut self, n: u64) -> Result<Run, Halt> {
        self.reset(n)?;
        if let Some(prepare) = &self.args.prepare {
            let done = self.shell(prepare, n, &[])?;
            if !done.ended.well() {
                return Err(failed(format!("--prepare failed at n={n}: {}", done.ended), &done.output).into());
            }
        }
        let cursor = self.arm(n)?;
        let command: Vec<String> = self.args.command.iter().map(|word| self.filled(word)).collect();
        let done = self.child(Command::new(&command[0]).args(&command[1..]), n, &command[0]);
        // Also if the command could not be run, or we are to end.
        let met = self.disarm(n, &cursor);
        let (done, met) = (done?, met?);
        let verify = match &self.args.verify {
            None => None,
            Some(verify) => Some(self.shell(verify, n, &[("NEMESISFS_SWEEP_EXIT", done.ended.code())])?),
        };
        Ok(Run { n, fired: met.fired, event: met.event, command: done, verify })
    }

    fn reset(&self, n: u64) -> Result<(), ClientError> {
        if n > self.args.from {
            return self.session.client.post("/v1/reset", &json!({})).map(drop);
        }
        // Rules that were there before are gone now, so it is said how to get them back.
        let outcome = rule::reset(self.session, false)?;
        if outcome.lines.len() > 1 {
            outcome.lines.iter().for_each(|line| self.print(line));
        }
        Ok(())
    }

    /// Arms the rule for the n-th request. Gives the place on the stream from which its injections come.
    fn arm(&self, n: u64) -> Result<String, ClientError> {
        let mut rule = self.rule.clone();
        rule["trigger"]["skip"] = json!(n - 1);
        let rule = self.session.client.put(&path_of(RULE), &rule)?.body;
        if n == self.args.from {
            warnings(&rule).for_each(|line| self.print(&line));
        }
        Ok(field(&rule, "cursor"))
    }

    /// Removes the rule, after looking at what it did.
    fn disarm(&self, n: u64, cursor: &str) -> Result<Met, ClientError> {
        let rule = self.session.client.get(&path_of(RULE));
        self.session.client.delete(&path_of(RULE))?;
        let rule = rule?.body;
        let event = self.first_injection(cursor)?;
        let counted = rule.get("injections").and_then(Value::as_u64).unwrap_or_default();
        // Neither alone is enough: the ring may have lost the event, and it may have come after the look at the rule.
        let fired = counted > 0 || event.is_some();
        if !fired && field(&rule, "state") == "expired" {
            let error = ClientError::failed(format!("the rule expired before it met request {n}"));
            return Err(error.hint("give it a longer lifetime, or none: each run arms it anew"));
        }
        Ok(Met { fired, event })
    }

    /// `None` if the ring has lost it.
    fn first_injection(&self, cursor: &str) -> Result<Option<Value>, ClientError> {
        let query =
            [("follow", Some("false".to_owned())), ("since", Some(cursor.to_owned())), ("rule", Some(RULE.to_owned()))];
        let mut first = None;
        self.session.client.stream_events(&with_query("/v1/events", query), |event| {
            if event.get("event").and_then(Value::as_str) != Some("injection") {
                return ControlFlow::Continue(());
            }
            first = Some(event);
            ControlFlow::Break(())
        })?;
        Ok(first)
    }

    fn shell(&mut self, script: &str, n: u64, variables: &[(&str, i32)]) -> Result<Done, Halt> {
        let mut command = Command::new("sh");
        command.args(["-c", &self.filled(script)]);
        for (name, value) in variables {
            command.env(name, value.to_string());
        }
        self.child(&mut command, n, "sh")
    }

    fn child(&mut self, command: &mut Command, n: u64, name: &str) -> Result<Done, Halt> {
        let done = self.children.run(command.env("NEMESISFS_SWEEP_N", n.to_string()), self.args.timeout.length);
        done.map_err(|broken| match broken {
            Broken::Interrupted(signal) => Halt::Interrupted(signal),
            Broken::Failed(error) => ClientError::failed(format!("{name}: {error}")).into(),
        })
    }

    fn filled(&self, word: &str) -> String {
        word.replace("{mnt}", &self.mountpoint)
    }

    /// A line for a run that is worth it.
    fn tell(&self, run: &Run) {
        if self.args.verbose || run.is_worth_a_line() {
            run.lines().iter().for_each(|line| self.print(line));
        }
    }

    fn print(&self, line: &str) {
        if !self.session.console.json {
            self.bar.suspend(|| drop(self.session.console.line(line)));
        }
    }
}

/// A failure of a command of the user's, with the last thing that it said.
fn failed(what: String, output: &str) -> ClientError {
    let error = ClientError::failed(what);
    match output.lines().last() {
        Some(last) => error.hint(format!("it said: {last}")),
        None => error,
    }
}
