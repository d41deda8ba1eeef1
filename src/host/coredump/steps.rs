//! Steps that we may not take ourselves: published as events, each with an id and the command that does it, carried out
//! by an agent on the node, and acknowledged. What is not acknowledged in time has not been done.
//!
//! On helper threads; who asks waits. Takes the lock of its own part for an instant. Must never: say more to an agent than
//! which step it is, for what lease and for how long: how it is done, the agent decides.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::book::milliseconds;
use super::{EVENT, leases};
use crate::host::state::Deadline;
use crate::host::{Kind, Machine, Refused};

const PART: &str = "coredump-steps";
const LOOK: Duration = Duration::from_millis(50);
/// No agent keeps a lease for longer than this, whatever it is asked.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Redirect,
    Restore,
}

/// One step, as it lies in the state until it is done or too late.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    pub id: String,
    pub step: What,
    pub lease: String,
    pub for_ms: u64,
    /// What a person would type on the node.
    pub command: String,
    until: Deadline,
    #[serde(default)]
    answer: Option<Answer>,
}

/// What an agent says of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub ok: bool,
    #[serde(default)]
    pub redirected: bool,
    #[serde(default)]
    pub said: String,
    #[serde(default)]
    pub commands: Vec<String>,
}

/// Publishes a step and waits until it is acknowledged.
pub(super) fn ask(
    machine: &Machine,
    what: What,
    lease: &str,
    life: Duration,
    timeout: Duration,
) -> Result<Answer, Refused> {
    let step = Step {
        id: new_id(),
        step: what,
        lease: lease.into(),
        for_ms: milliseconds(life),
        command: command(what, lease, life),
        until: Deadline::after(timeout),
        answer: None,
    };
    write(machine, &step)?;
    machine.tell(EVENT, told("wanted", &step));
    wait(machine, &step.id, timeout);
    match take(machine, &step.id)? {
        Some(answer) if answer.ok => Ok(answer),
        Some(answer) => Err(Refused::failed(format!("the agent on the node has failed: {}", answer.said))),
        None => {
            machine.tell(EVENT, told("unanswered", &step));
            let waited = humantime::format_duration(timeout);
            let detail = format!("no agent has acknowledged within {waited}; wanted on the node: {}", step.command);
            Err(Refused::conflict(detail).hint("run `nemesisfs coredump agent -H …` as root on the node"))
        }
    }
}

/// The steps that wait for an agent.
#[must_use]
pub fn waiting(machine: &Machine) -> Vec<Value> {
    let steps: Vec<Step> = machine.state.peek(PART);
    let open = steps.iter().filter(|step| step.answer.is_none() && !step.until.has_passed());
    open.map(|step| told("wanted", step)).collect()
}

/// An agent's word on a step.
///
/// # Errors
/// When nobody waits for it any more: then what was done is to be undone.
pub fn acknowledge(machine: &Machine, id: &str, answer: Answer) -> Result<(), Refused> {
    let too_late =
        || Refused::new(Kind::NotFound, format!("nobody waits for the step {id:?}")).hint("undo what was done");
    if !crate::host::state::is_name(id) {
        return Err(too_late());
    }
    let part = machine.state.part(PART).map_err(cannot)?;
    let step: Option<Step> = part.get(id).map_err(cannot)?;
    let Some(mut step) = step.filter(|step| !step.until.has_passed()) else { return Err(too_late()) };
    machine.tell(EVENT, json!({"action": "acknowledged", "step_id": id, "ok": answer.ok, "said": answer.said}));
    step.answer = Some(answer);
    part.put(id, &step).map_err(cannot)
}

/// What carrying a step out has come to.
#[derive(Debug)]
pub struct Done {
    pub answer: Answer,
    /// A lease was taken that was not there before: it goes again if nobody hears of it.
    pub is_new: bool,
}

/// Carries a step out, on the node.
pub fn carry_out(machine: &Machine, wanted: &super::Wanted, step: What, lease: &str, life: Duration) -> Done {
    let life = life.min(LONGEST);
    let lease = &lease_of_agent(lease);
    let done = |redirected, said, commands| Answer { ok: true, redirected, said, commands };
    let result = match step {
        What::Redirect => {
            let wanted = super::Wanted { life: Some(life), by: super::By::Auto, ..wanted.clone() };
            let taken = leases::redirect(machine, lease, &wanted);
            taken.map(|taken| (!taken.renewed, done(taken.redirected, taken.how, taken.commands)))
        }
        What::Restore => leases::release(machine, lease, Duration::ZERO).map(|released| {
            let said = released.warnings.join("; ");
            (false, done(false, if said.is_empty() { "given back".into() } else { said }, released.commands))
        }),
    };
    match result {
        Ok((is_new, answer)) => Done { answer, is_new },
        Err(failure) => Done { answer: Answer { said: failure.to_string(), ..Answer::default() }, is_new: false },
    }
}

/// Another lease than that of who asks, who may keep theirs in the same state.
fn lease_of_agent(lease: &str) -> String {
    format!("agent.{lease}")
}

fn wait(machine: &Machine, id: &str, timeout: Duration) {
    let until = Instant::now() + timeout;
    let is_answered = || {
        let steps: Vec<Step> = machine.state.peek(PART);
        steps.iter().any(|step| step.id == id && step.answer.is_some())
    };
    while Instant::now() < until && !is_answered() {
        std::thread::sleep(LOOK);
    }
}

fn write(machine: &Machine, step: &Step) -> Result<(), Refused> {
    machine.state.part(PART).and_then(|part| part.put(&step.id, step)).map_err(cannot)
}

/// The answer, and an end to the step, at once: an agent that was told that it was in time is heard.
fn take(machine: &Machine, id: &str) -> Result<Option<Answer>, Refused> {
    let part = machine.state.part(PART).map_err(cannot)?;
    let step: Option<Step> = part.get(id).map_err(cannot)?;
    part.remove(id).map_err(cannot)?;
    Ok(step.and_then(|step| step.answer))
}

fn cannot(error: std::io::Error) -> Refused {
    Refused::failed(format!("the state of coredumps: {error}"))
}

fn told(action: &str, step: &Step) -> Value {
    json!({
        "action": action, "step_id": step.id, "step": step.step, "lease": step.lease, "for_ms": step.for_ms,
        "commands": [step.command], "timeout_ms": milliseconds(step.until.left()),
    })
}

fn command(what: What, lease: &str, life: Duration) -> String {
    let lease = lease_of_agent(lease);
    match what {
        What::Redirect => {
            let life = humantime::format_duration(Duration::from_millis(milliseconds(life)));
            format!("nemesisfs coredump redirect --lease {lease} --for '{life}'")
        }
        What::Restore => format!("nemesisfs coredump restore --lease {lease}"),
    }
}

/// No other step has it, whichever daemon made that.
fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let boot = crate::host::state::boot();
    let boot = boot.split('-').next().unwrap_or_default();
    format!("{boot}-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed))
}
