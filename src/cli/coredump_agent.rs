//! `coredump agent`: follows an instance that may not change where cores go, does it on this node, and acknowledges.
//!
//! What comes over the wire is which step, for what lease and how long; how it is done is decided here, by the code that
//! an instance with the right to do it uses. Nothing that is sent is ever run.
//!
//! Thread: one for each host, and one that follows its stream. Locks: those of the state. Must never: end because an
//! instance has gone, or keep what it did for an instance that waits no more.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::client::{Client, ClientError, segment};
use crate::host::Machine;
use crate::host::coredump::{self, Wanted, steps};
use crate::host::state::StateDir;

use super::console::Outcome;
use super::session::Session;

/// How soon an instance is tried again, and how often what has ended is looked for.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The directory that cores go to, in place of one below the state directory
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// End after so many steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
}

/// Runs until it is killed, or has done as many steps as it should.
pub fn run(session: &Session, args: &AgentArgs) -> Result<Outcome, ClientError> {
    if let Err(failure) = coredump::may_act() {
        let error = ClientError::unsupported(failure.detail);
        return Err(failure.hint.into_iter().fold(error, ClientError::hint));
    }
    let machine = Machine::alone(&format!("agent-{}", std::process::id()), StateDir::of_machine());
    let wanted =
        Wanted { to: args.to.clone(), owner: format!("agent for {}", session.target.host), ..Wanted::default() };
    // The first time it must be there.
    session.client.get("/v1/version")?;
    let _ = session.console.line(&format!("ready: acts for {}", session.target.host));
    let follower = session.patient(None)?;
    let (found, steps) = channel();
    std::thread::spawn(move || follow(&follower, &found));
    let mut agent = Agent { session, machine, wanted, seen: HashSet::new() };
    let mut done = 0;
    loop {
        match steps.recv_timeout(AGAIN) {
            Ok(step) => done += u64::from(agent.take(&step)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(ClientError::failed("the follower has ended")),
        }
        coredump::expire(&agent.machine);
        if coredump::carry_due(&agent.machine).is_some_and(|wait| wait.is_zero()) {
            coredump::carry(&agent.machine);
        }
        if args.steps.is_some_and(|most| done >= most) {
            return Ok(Outcome::default());
        }
    }
}

/// Hands on what waits already, and then what comes; again and again.
fn follow(client: &Client, found: &Sender<Value>) {
    loop {
        let ended = attend(client, found);
        if ended.is_break() {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

fn attend(client: &Client, found: &Sender<Value>) -> ControlFlow<()> {
    let Ok(reply) = client.get("/v1/coredump/steps") else { return ControlFlow::Continue(()) };
    for step in reply.body.get("steps").and_then(Value::as_array).into_iter().flatten() {
        if found.send(step.clone()).is_err() {
            return ControlFlow::Break(());
        }
    }
    let since = reply.body.get("cursor").and_then(Value::as_str).unwrap_or_default();
    let mut nobody = false;
    // A stream that breaks is taken up again from its beginning.
    let _ = client.stream_events(&format!("/v1/events?kind=coredump&since={since}"), |event| {
        let wanted = event.get("action").and_then(Value::as_str) == Some("wanted");
        nobody = wanted && found.send(event).is_err();
        if nobody { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if nobody { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

struct Agent<'a> {
    session: &'a Session<'a>,
    machine: Machine,
    wanted: Wanted,
    seen: HashSet<String>,
}

impl Agent<'_> {
    /// Carries a step out, once. What makes no sense is passed over: it may be of a newer version.
    fn take(&mut self, event: &Value) -> bool {
        let text = |name: &str| event.get(name).and_then(Value::as_str).unwrap_or_default();
        let (id, lease) = (text("step_id"), text("lease"));
        let step = event.get("step").and_then(|step| serde_json::from_value::<steps::What>(step.clone()).ok());
        let (Some(step), false) = (step, id.is_empty()) else { return false };
        if !self.seen.insert(id.to_owned()) {
            return false;
        }
        let life = Duration::from_millis(event.get("for_ms").and_then(Value::as_u64).unwrap_or_default());
        let steps::Done { answer, is_new } = steps::carry_out(&self.machine, &self.wanted, step, lease, life);
        let how = if answer.ok { "done" } else { "failed" };
        let _ = self.session.console.line(&format!("{how}: {} {lease}: {}", text("step"), answer.said));
        let told = self.session.client.post(&format!("/v1/coredump/steps/{}", segment(id)), &json!(answer));
        if let Err(error) = told {
            self.session.console.complain(&format!("warning: the step was not acknowledged: {error}"));
            // Whoever has it already still wants it, though a renewal went wrong.
            if is_new {
                steps::carry_out(&self.machine, &self.wanted, steps::What::Restore, lease, Duration::ZERO);
            }
        }
        true
    }
}
