//! `coredump`: cores go elsewhere while a disk is full, and back. For as long as a command runs, or a lease lasts.
//!
//! Thread: the main one or one for each host, and one that renews the lease of a command. Locks: none. Must never: leave
//! a lease behind when its command has ended, or outlive a lost daemon by more than the lease.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::{ClientError, Reply, segment, with_query};
use crate::exit;

use super::args::Span;
use super::children::Children;
use super::console::Outcome;
use super::coredump_agent::{self, AgentArgs};
use super::session::{Session, World, changed, on_machine, on_only_machine, shown};

/// The lease of commands that name none.
const LEASE: &str = "cli";
/// A lease is renewed so often in its time to live.
const RENEWALS: u32 = 3;
/// How long another daemon is looked for when the one of a command has gone, and how often. One that was killed is started
/// again within this.
const ANOTHER: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(200);
/// What a daemon says when there was nothing to give back.
const NO_CONTENT: u16 = 204;

#[derive(Debug, Subcommand)]
pub enum CoredumpCommand {
    /// Cores go to the root filesystem, for as long as a command runs or a lease lasts
    Redirect(Box<RedirectArgs>),
    /// A lease lasts longer
    Renew {
        #[command(flatten)]
        lease: LeaseArg,
        /// So long from now on; the time that it had if not given
        #[arg(long = "for", value_name = "DURATION")]
        life: Option<Span>,
    },
    /// Gives a lease back; the last one restores. That there is none is no error
    Restore {
        #[command(flatten)]
        lease: LeaseArg,
        /// All leases, whoever has taken them
        #[arg(long, conflicts_with = "lease")]
        all: bool,
    },
    /// Where cores go, why, and who wants that
    Status,
    /// Cores, wherever they lie, with what coredumpctl knows of them
    List,
    /// On the node: does what an instance may not do itself, such as one in a container
    Agent(AgentArgs),
}

#[derive(Debug, Args)]
pub struct LeaseArg {
    /// The name of the lease
    #[arg(long, value_name = "NAME", default_value = LEASE)]
    lease: String,
}

#[derive(Debug, Args)]
pub struct RedirectArgs {
    /// How long; of a command: at most. 10m without a command if not given
    #[arg(long = "for", value_name = "DURATION")]
    life: Option<Span>,
    /// The name of the lease; of a command one of its own
    #[arg(long, value_name = "NAME")]
    lease: Option<String>,
    /// The directory that cores go to, in place of one below the state directory
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// What will be full: cores that do not go to its filesystem are left alone. Repeatable
    #[arg(long, value_name = "PATH")]
    fills: Vec<PathBuf>,
    /// How much room there should be where cores go to
    #[arg(long, value_name = "SIZE", default_value = "50GB")]
    need: String,
    /// What to do if there is less
    #[arg(long, value_name = "warn|refuse", default_value = "warn")]
    on_low: String,
    /// Who acts: whoever can, or an agent on the node
    #[arg(long, value_name = "auto|agent", default_value = "auto")]
    by: String,
    /// How long an agent may take
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    timeout: Span,
    /// How long cores that are being written are waited for
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    patience: Span,
    /// How soon the lease of a command ends when this program is killed
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    ttl: Span,
    /// What is run meanwhile; its exit code is ours
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

pub fn run(world: &World, command: &CoredumpCommand) -> u8 {
    match command {
        CoredumpCommand::Redirect(args) if args.command.is_empty() => {
            on_machine(world, &|session| redirect(session, args))
        }
        CoredumpCommand::Redirect(args) => {
            on_only_machine(world, "coredump redirect with a command", &|s| follow(world, s, args))
        }
        CoredumpCommand::Renew { lease, life } => {
            on_machine(world, &|session| renew(session, &lease.lease, life.as_ref()))
        }
        CoredumpCommand::Restore { lease, all } => {
            on_machine(world, &|session| restore(session, (!all).then_some(&*lease.lease)))
        }
        CoredumpCommand::Status => on_machine(world, &|session| {
            let reply = session.client.get("/v1/coredump")?;
            let lines = status(&reply.body);
            Ok(shown(reply, lines))
        }),
        CoredumpCommand::List => on_machine(world, &|session| {
            let reply = session.client.get("/v1/coredump/cores")?;
            let lines = cores(&reply.body);
            Ok(shown(reply, lines))
        }),
        CoredumpCommand::Agent(args) => on_machine(world, &|session| coredump_agent::run(session, args)),
    }
}

fn path_of(lease: &str) -> String {
    format!("/v1/coredump/leases/{}", segment(lease))
}

impl RedirectArgs {
    fn document(&self, life: Option<&str>) -> Value {
        let owner = format!("nemesisfs coredump redirect, pid {}", std::process::id());
        let mut wanted = json!({
            "owner": owner, "need": self.need, "on_low": self.on_low, "by": self.by, "timeout": self.timeout.text,
            "patience": self.patience.text, "fills": self.fills.iter().map(|path| absolute(path)).collect::<Vec<_>>(),
        });
        if let Some(to) = &self.to {
            wanted["to"] = json!(absolute(to));
        }
        if let Some(life) = life {
            wanted["for"] = json!(life);
        }
        wanted
    }
}

/// The daemon may have another working directory.
fn absolute(path: &std::path::Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

fn redirect(session: &Session, args: &RedirectArgs) -> Result<Outcome, ClientError> {
    let lease = args.lease.as_deref().unwrap_or(LEASE);
    let life = args.life.as_ref().map(|life| life.text.as_str());
    let reply = session.patient(None)?.put(&path_of(lease), &args.document(life))?;
    Ok(taken(session, reply, lease))
}

fn taken(session: &Session, reply: Reply, lease: &str) -> Outcome {
    let body = &reply.body;
    let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let redirected = body.get("redirected") == Some(&json!(true));
    let what = if redirected { "coredumps go elsewhere" } else { "coredumps stay where they go" };
    let mut lines = vec![format!("{what}: {}", text("how"))];
    lines.extend(commands(body));
    if body.pointer("/room/enough") == Some(&json!(true)) {
        let place = body.pointer("/room/path").and_then(Value::as_str).unwrap_or_default();
        lines.push(format!("room: {} available in {place}", size(body.pointer("/room/available"))));
    }
    let ends = span(body.get("remaining_ms"));
    lines.push(format!("lease {lease}: ends in {ends}, unless it is renewed"));
    let undo = session.undo(&named("restore", lease));
    changed(reply, lines.join("\n"), vec![undo])
}

fn named(verb: &str, lease: &str) -> String {
    if lease == LEASE { format!("coredump {verb}") } else { format!("coredump {verb} --lease {lease}") }
}

fn commands(body: &Value) -> impl Iterator<Item = String> {
    let list = body.get("commands").and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(|line| format!("  {line}"))
}

fn span(ms: Option<&Value>) -> String {
    let ms = ms.and_then(Value::as_u64).unwrap_or_default();
    humantime::format_duration(Duration::from_secs(ms.div_ceil(1000))).to_string()
}

fn renew(session: &Session, lease: &str, life: Option<&Span>) -> Result<Outcome, ClientError> {
    let mut wanted = Map::new();
    if let Some(life) = life {
        wanted.insert("for".into(), json!(life.text));
    }
    let path = with_query(&path_of(lease), [("renew", Some("true".into()))]);
    let reply = session.patient(None)?.put(&path, &Value::Object(wanted))?;
    Ok(taken(session, reply, lease))
}

fn restore(session: &Session, lease: Option<&str>) -> Result<Outcome, ClientError> {
    let path = lease.map_or_else(|| "/v1/coredump/leases".into(), path_of);
    let reply = session.patient(None)?.delete(&path)?;
    let body = &reply.body;
    let is = |name: &str| body.get(name) == Some(&json!(true));
    let names = |name: &str| {
        let list = body.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        list.map(ToOwned::to_owned).collect::<Vec<String>>()
    };
    let what = match (is("released"), is("restored")) {
        _ if reply.status == NO_CONTENT => "there was no such lease, and nothing to do".to_owned(),
        (_, true) => "coredumps go where they went before".to_owned(),
        (true, false) => format!("given back; coredumps still go elsewhere, for {}", names("leases").join(", ")),
        (false, false) => {
            format!("there was no such lease; coredumps go elsewhere, for {}", names("leases").join(", "))
        }
    };
    let mut lines = vec![what];
    lines.extend(commands(body));
    lines.extend(names("brought_home").iter().map(|core| format!("brought home: {core}")));
    lines.extend(names("away").iter().map(|core| format!("stays: {core}")));
    Ok(changed(reply, lines.join("\n"), vec![]))
}

fn status(body: &Value) -> Vec<String> {
    let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).map(ToOwned::to_owned);
    let mut lines = Vec::new();
    match body.get("switch").filter(|switch| switch.is_object()) {
        Some(_) if body.get("redirected") == Some(&json!(true)) => {
            lines.push(format!(
                "redirected to {}: {}",
                text("/switch/to").unwrap_or_default(),
                text("/switch/how").unwrap_or_default()
            ));
        }
        Some(_) => lines.push("redirected, but that is not in force".into()),
        None => {
            lines.push(format!("not redirected: {}", text("/text").unwrap_or_default()));
            lines.extend(text("/would/why").map(|why| format!("would be: {why}")));
            lines.extend(text("/would/refused").map(|why| format!("cannot be: {why}")));
        }
    }
    let trouble = if text("/switch/stage").as_deref() == Some("taken") { "not in force" } else { "not restored yet" };
    lines.extend(text("/switch/trouble").map(|why| format!("{trouble}: {why}")));
    lines.extend(text("/hindrance").map(|why| format!("this daemon cannot act: {why}")));
    let list = |name: &str| body.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    for lease in list("leases") {
        let word = |name: &str| lease.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        lines.push(format!("lease {}: {} left, {}", word("name"), span(lease.get("remaining_ms")), word("owner")));
    }
    let room = |name: &str| size(body.pointer(&format!("/room/{name}")));
    lines.push(format!("room: {} available in {}", room("available"), text("/room/path").unwrap_or_default()));
    for away in list("away") {
        lines.push(lies(&away));
    }
    for dump in list("in_flight") {
        lines.push(format!(
            "being written: the core of {}",
            dump.get("comm").and_then(Value::as_str).unwrap_or_default()
        ));
    }
    lines
}

/// Where cores lie that have not come home, and why.
fn lies(away: &Value) -> String {
    let text = |name: &str| away.get(name).and_then(Value::as_str);
    let why = text("why").map(|why| format!(": {why}")).unwrap_or_default();
    format!("cores lie in {}{why}", text("dir").unwrap_or_default())
}

fn size(value: Option<&Value>) -> String {
    let bytes = value.and_then(Value::as_u64);
    bytes.map_or_else(|| "-".to_owned(), |bytes| ByteSize::b(bytes).display().iec().to_string())
}

fn cores(body: &Value) -> Vec<String> {
    let list = body.get("cores").and_then(Value::as_array).into_iter().flatten();
    let row = |core: &Value| {
        let text = |pointer: &str| core.pointer(pointer).and_then(Value::as_str).unwrap_or("-").to_owned();
        let pid = core.get("pid").and_then(Value::as_u64).map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let time = text("/time").chars().take(19).collect();
        vec![time, pid, text("/place"), size(core.get("bytes")), text("/coredumpctl/corefile"), text("/path")]
    };
    let rows: Vec<Vec<String>> = list.map(row).collect();
    if rows.is_empty() {
        return vec!["no cores".into()];
    }
    let mut lines = super::table::lines(&["TIME", "PID", "PLACE", "SIZE", "COREDUMPCTL", "FILE"], &rows);
    lines.extend(body.get("away").and_then(Value::as_array).into_iter().flatten().map(lies));
    lines
}

/// Takes a lease, runs the command, and gives the lease back, whichever way it ends.
fn follow(world: &World, session: &Session, args: &RedirectArgs) -> Result<Outcome, ClientError> {
    let failed = |error: std::io::Error| ClientError::failed(error.to_string());
    // From here on a signal ends nothing by itself.
    let mut children = Children::new().map_err(failed)?;
    let lease = args.lease.clone().unwrap_or_else(|| format!("run-{}", std::process::id()));
    let until = args.life.as_ref().map(|life| Instant::now() + life.length);
    let first = args.life.as_ref().filter(|life| life.length < args.ttl.length).unwrap_or(&args.ttl);
    let wanted = args.document(Some(&first.text));
    let reply = with_any(world, session, &|session| session.patient(None)?.put(&path_of(&lease), &wanted))?;
    for line in taken(session, reply, &lease).lines {
        session.console.complain(&line);
    }
    let ended = std::thread::scope(|scope| {
        let (done, ended) = channel::<()>();
        scope.spawn(|| keep(world, session, args, &lease, until, ended));
        let mut command = Command::new(&args.command[0]);
        let ended = children.follow(command.args(&args.command[1..]).arg0(&args.command[0]));
        drop(done);
        ended
    });
    let given_back = with_any(world, session, &|session| restore(session, Some(&lease)));
    let exit = match ended {
        Ok(ended) => u8::try_from(ended.code()).unwrap_or(u8::MAX),
        Err(error) => {
            session.console.complain(&format!("error: {}: {error}", args.command[0]));
            if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }
        }
    };
    let lines = match given_back {
        Ok(outcome) => outcome.lines,
        // What the command did is done; the lease ends by itself.
        Err(error) => error.lines(),
    };
    lines.iter().flat_map(|line| line.lines()).for_each(|line| session.console.complain(line));
    Ok(Outcome { exit, ..Outcome::default() })
}

/// Renews the lease until the command has ended, or may not last longer.
fn keep(
    world: &World,
    session: &Session,
    args: &RedirectArgs,
    lease: &str,
    until: Option<Instant>,
    ended: Receiver<()>,
) {
    let path = with_query(&path_of(lease), [("renew", Some("true".into()))]);
    while ended.recv_timeout(args.ttl.length / RENEWALS) == Err(RecvTimeoutError::Timeout) {
        let left = until.map_or(args.ttl.length, |until| until.saturating_duration_since(Instant::now()));
        let life = left.min(args.ttl.length);
        if life.is_zero() {
            return;
        }
        let life = humantime::format_duration(Duration::from_millis(life.as_millis().max(1) as u64)).to_string();
        let wanted = args.document(Some(&life));
        let renew = |session: &Session| session.patient(Some(args.ttl.length))?.put(&path, &wanted);
        if let Err(error) = with_any(world, session, &renew) {
            session.console.complain(&format!("warning: lease {lease} was not renewed: {error}"));
        }
    }
}

/// Asks the daemon that was chosen; when that has gone, any other, for all can do what one could, or one that is started.
fn with_any<T>(
    world: &World,
    session: &Session,
    ask: &dyn Fn(&Session) -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let until = Instant::now() + ANOTHER;
    let mut result = ask(session);
    while result.as_ref().is_err_and(|error| error.exit == exit::NO_INSTANCE) && Instant::now() < until {
        std::thread::sleep(LOOK);
        result = match super::host::resolve(world).as_deref() {
            Ok([target]) => ask(&Session::open(world, target, false)?),
            _ => result,
        };
    }
    result
}
