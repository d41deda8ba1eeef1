//! Runs one command on every host that it is for, each on a thread of its own, and prints the results in order.
//!
//! Thread: one for each host while the command runs. Locks: those of the console. Must never: let one host that hangs
//! keep the others from being served.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::client::{ANSWER_TIMEOUT, Client, ClientError, Reply, Target, host};
use crate::exit;

use super::args::Globals;
use super::console::{Console, Outcome};

/// How long a daemon may take to move coredumps: it waits for cores that are being written, and for an agent.
const REDIRECTION: Duration = Duration::from_secs(180);

/// What every command needs to know of the world around it.
pub struct World<'a> {
    pub globals: &'a Globals,
    pub run_dir: &'a Path,
    pub console: &'a Console,
}

/// One command on one host.
pub struct Session<'a> {
    pub client: Client,
    pub target: Target,
    pub console: &'a Console,
    pub several: bool,
    connect_timeout: Duration,
}

type Verb<'v> = &'v (dyn Fn(&Session) -> Result<Outcome, ClientError> + Sync);

/// Runs `verb` on every host. Gives the worst exit code.
pub fn on_each(world: &World, verb: Verb) -> u8 {
    on_targets(world, host::resolve(&world.globals.host, world.run_dir), verb)
}

/// Runs a `verb` about the machine, for which any daemon of a host will do, and one is started if there is none.
pub fn on_machine(world: &World, verb: Verb) -> u8 {
    let once_more = |session: &Session| match verb(session) {
        // It was not needed any more, and ended at this very moment.
        Err(error) if error.exit == exit::NO_INSTANCE && super::host::has_ended(world, &session.target) => {
            match super::host::resolve(world)?.as_slice() {
                [target] => verb(&Session::open(world, target, false)?),
                _ => Err(error),
            }
        }
        other => other,
    };
    on_targets(world, super::host::resolve(world), &once_more)
}

/// The same for what may end a mount, which its own daemon cannot do and tell.
pub fn on_host(world: &World, verb: Verb) -> u8 {
    on_targets(world, super::host::without_mount(world), verb)
}

/// Runs `verb` on hosts that were chosen, or says why there are none.
pub fn on_targets(world: &World, targets: Result<Vec<Target>, ClientError>, verb: Verb) -> u8 {
    let targets = match targets {
        Ok(targets) => targets,
        Err(error) => return world.console.error(&error),
    };
    let several = targets.len() > 1;
    std::thread::scope(|scope| {
        let running: Vec<_> =
            targets.iter().map(|target| (target, scope.spawn(move || on_one(world, target, several, verb)))).collect();
        let codes = running.into_iter().map(|(target, thread)| match thread.join() {
            Ok((target, result)) => world.console.result(&target, several, result),
            Err(_) => {
                let error = ClientError::failed("the command failed by a fault of its own");
                world.console.result(target, several, Err(error))
            }
        });
        codes.max().unwrap_or(exit::DONE)
    })
}

/// Runs `verb` on the one host that there must be, on this thread.
pub fn on_only(world: &World, what: &str, verb: Verb) -> u8 {
    on_one_of(world, host::resolve(&world.globals.host, world.run_dir), what, verb)
}

/// The same for a `verb` about the machine.
pub fn on_only_machine(world: &World, what: &str, verb: Verb) -> u8 {
    on_one_of(world, super::host::resolve(world), what, verb)
}

fn on_one_of(world: &World, targets: Result<Vec<Target>, ClientError>, what: &str, verb: Verb) -> u8 {
    match targets.as_deref() {
        Err(error) => world.console.error(error),
        Ok([target]) => {
            let (target, result) = on_one(world, target, false, verb);
            world.console.result(&target, false, result)
        }
        Ok(targets) => {
            let error = ClientError::usage(format!("{what} is for one instance, and -H names {}", targets.len()));
            world.console.error(&error.hint("run it once for each"))
        }
    }
}

fn on_one(world: &World, target: &Target, several: bool, verb: Verb) -> (Target, Result<Outcome, ClientError>) {
    let session = match Session::open(world, target, several) {
        Ok(session) => session,
        Err(error) => return (target.clone(), Err(error)),
    };
    let result = verb(&session);
    (session.target, result)
}

impl<'a> Session<'a> {
    /// With several hosts each is asked for its name, by which its results are told apart.
    pub fn open(world: &World<'a>, target: &Target, several: bool) -> Result<Self, ClientError> {
        let connect_timeout = world.globals.connect_timeout.length;
        let client = Client::new(target.host.clone(), connect_timeout)?;
        let mut target = target.clone();
        if several {
            let version = client.get("/v1/version")?.body;
            if let Some(name) = version.get("instance").and_then(Value::as_str) {
                target.name = name.to_owned();
            }
        }
        Ok(Session { client, target, console: world.console, several, connect_timeout })
    }

    /// A client of the same host that waits for each answer as long as `limit` says.
    pub fn patient(&self, limit: Option<Duration>) -> Result<Client, ClientError> {
        Ok(Client::new(self.target.host.clone(), self.connect_timeout)?.answer_within(limit))
    }

    /// A client for a change that first moves coredumps, if it does: a core may be being written, or an agent be asked.
    pub fn after_coredumps(&self, redirects: bool) -> Result<Client, ClientError> {
        self.patient(Some(if redirects { REDIRECTION } else { ANSWER_TIMEOUT }))
    }

    /// Whether lines will be read by a person, for whom it is worth asking how to undo.
    pub fn explains(&self) -> bool {
        !self.console.json && !self.console.quiet
    }

    /// A command line for this very host.
    pub fn command(&self, words: &str) -> String {
        if self.target.chosen {
            format!("nemesisfs -H {} {words}", super::args::quoted(&self.target.host.to_string()))
        } else {
            format!("nemesisfs {words}")
        }
    }

    /// The line that tells how to take back what was done.
    pub fn undo(&self, words: &str) -> String {
        format!("undo: {}", self.command(words))
    }
}

/// The outcome of a change: what was done, what the kernel still has to let go, and how to undo it.
pub fn changed(reply: Reply, what: String, undo: Vec<String>) -> Outcome {
    let mut lines = vec![what];
    lines.extend(pending(&reply.body));
    lines.extend(warnings(&reply.body));
    lines.extend(undo);
    shown(reply, lines)
}

/// The outcome of a question.
pub fn shown(reply: Reply, lines: Vec<String>) -> Outcome {
    Outcome { lines, status: reply.status, body: Some(reply.body), ..Outcome::default() }
}

pub fn warnings(body: &Value) -> impl Iterator<Item = String> {
    let told = body.get("warnings").and_then(Value::as_array).into_iter().flatten();
    told.filter_map(Value::as_str).map(|warning| format!("warning: {warning}"))
}

fn pending(body: &Value) -> Option<String> {
    let paths: Vec<&str> = body.get("pending")?.as_array()?.iter().filter_map(Value::as_str).collect();
    match paths.as_slice() {
        [] => None,
        paths => Some(format!("pending: still cached, an event will tell when not: {}", paths.join(" "))),
    }
}
