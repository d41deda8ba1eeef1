//! `space`: how full the disk seems, or is. And `evict`, which makes readers see what the disk has really kept.
//!
//! Thread: one for each host, and a second one that tells how far the filling of a disk is. Locks: none. Must never: compute
//! capacity; the server does.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::{Client, ClientError};

use super::args::{Span, quoted};
use super::console::Outcome;
use super::session::{Session, World, changed, on_each, shown};

#[derive(Debug, Subcommand)]
pub enum SpaceCommand {
    /// A capacity that is smaller than the disk's: what needs more gets ENOSPC
    Virtual(VirtualArgs),
    /// A limit for the files of an owner, below a path, or all: what needs more gets EDQUOT
    Quota(QuotaArgs),
    /// Really fills the disk, with files that are removed by `space clear`, `reset` and umount
    Ballast(BallastArgs),
    /// Back to the capacity of the disk
    Clear {
        /// Only this
        #[arg(value_parser = ["virtual", "quota", "ballast"])]
        part: Option<String>,
    },
    /// What is limited, and what statfs says
    Status,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("limit").required(true).multiple(true).args(["free", "used", "size", "inodes"])))]
pub struct VirtualArgs {
    #[command(flatten)]
    amount: Amount,
    /// So many more files, directories and symlinks can be made
    #[arg(long, value_name = "N")]
    inodes: Option<u64>,
    /// So much of what is free, or such a share of all (5%), is for root alone
    #[arg(long, value_name = "SIZE|PERCENT", requires = "Amount")]
    reserve: Option<String>,
    /// Writes that do not fit are accepted, and fsync tells, as with delayed allocation
    #[arg(long, requires = "Amount")]
    late: bool,
    /// Coredumps go to the root filesystem before there is no room, and home when there is again
    #[arg(long)]
    redirect_coredumps: bool,
    /// Ends after this time
    #[arg(long = "for", value_name = "DURATION")]
    life: Option<Span>,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
struct Amount {
    /// So much is free from now on
    #[arg(long, value_name = "SIZE")]
    free: Option<String>,
    /// So much is in use, as a share: 98%
    #[arg(long, value_name = "PERCENT")]
    used: Option<String>,
    /// So large is the disk
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
}

#[derive(Debug, Args)]
pub struct QuotaArgs {
    /// So much may be used
    #[arg(long, value_name = "SIZE")]
    limit: String,
    /// Of the files of this owner
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Of files with such a path
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
}

#[derive(Debug, Args)]
pub struct BallastArgs {
    #[command(flatten)]
    target: Target,
    /// Also where / or what the daemon needs lies on the same filesystem
    #[arg(long)]
    force: bool,
    /// Coredumps go to the root filesystem before the disk is full, and home when it is no longer
    #[arg(long)]
    redirect_coredumps: bool,
    /// How long filling may take: then it has failed, and is undone [default: 60s]
    #[arg(long, value_name = "DURATION")]
    deadline: Option<Span>,
    /// Removed after this time
    #[arg(long = "for", value_name = "DURATION")]
    life: Option<Span>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// So much is left, as df shows it; at 0 nothing is left for root either
    #[arg(long, value_name = "SIZE")]
    until_free: Option<String>,
    /// So much is used, as df shows it: 90%
    #[arg(long, value_name = "PERCENT")]
    used: Option<String>,
}

pub fn run(world: &World, command: &SpaceCommand) -> u8 {
    match command {
        SpaceCommand::Virtual(args) => on_each(world, &|session| limit(session, args)),
        SpaceCommand::Quota(args) => on_each(world, &|session| quota(session, args)),
        SpaceCommand::Ballast(args) => on_each(world, &|session| ballast(session, args)),
        SpaceCommand::Clear { part } => on_each(world, &|session| clear(session, part.as_deref())),
        SpaceCommand::Status => on_each(world, &|session| {
            let reply = session.client.get("/v1/space")?;
            let mut lines = vec![limits(&reply.body)];
            lines.extend(quotas(&reply.body));
            lines.extend(filled(&reply.body));
            lines.push(statfs(&reply.body));
            Ok(shown(reply, lines))
        }),
    }
}

impl VirtualArgs {
    fn document(&self) -> Value {
        let Amount { free, used, size } = &self.amount;
        let life = self.life.as_ref().map(|life| life.text.clone());
        let texts = [("free", free), ("used", used), ("size", size), ("reserve", &self.reserve), ("for", &life)];
        let mut amount = given(texts);
        if let Some(inodes) = self.inodes {
            amount.insert("inodes".into(), json!(inodes));
        }
        for (name, given) in [("late", self.late), ("redirect_coredumps", self.redirect_coredumps)] {
            if given {
                amount.insert(name.into(), json!(true));
            }
        }
        json!({"virtual": amount})
    }
}

/// Those that have a value.
fn given<const N: usize>(texts: [(&str, &Option<String>); N]) -> Map<String, Value> {
    let each = texts.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value.as_ref()?))));
    each.collect()
}

fn limit(session: &Session, args: &VirtualArgs) -> Result<Outcome, ClientError> {
    let old = before_of(session)?;
    let reply = session.after_coredumps(args.redirect_coredumps)?.put("/v1/space", &args.document())?;
    let what = limits(&reply.body);
    let undo = old.limit.unwrap_or_else(|| "space clear virtual".to_owned());
    Ok(changed(reply, what, vec![session.undo(&undo)]))
}

/// Adds a quota to those that there are, or replaces the one for the same files.
fn quota(session: &Session, args: &QuotaArgs) -> Result<Outcome, ClientError> {
    let mut wanted = json!({"limit": args.limit});
    if let Some(uid) = args.uid {
        wanted["uid"] = json!(uid);
    }
    if let Some(path) = &args.path {
        wanted["path"] = json!(path);
    }
    let body = session.client.get("/v1/space")?.body;
    let there = body.get("quota").and_then(Value::as_array).into_iter().flatten();
    let same = |quota: &Value| ["uid", "path"].iter().all(|key| quota.get(key) == wanted.get(key));
    let mut list: Vec<Value> = there.filter_map(|quota| quota.get("requested").cloned()).collect();
    let undo = match list.iter().find(|quota| same(quota)) {
        Some(replaced) => vec![quota_words(replaced)],
        None => std::iter::once("space clear quota".to_owned()).chain(list.iter().map(quota_words)).collect(),
    };
    list.retain(|quota| !same(quota));
    list.push(wanted);
    let reply = session.client.put("/v1/space", &json!({"quota": list}))?;
    let what = quotas(&reply.body).join("\n");
    Ok(changed(reply, what, undo.iter().map(|words| session.undo(words)).collect()))
}

/// Fills the disk, which can take long; a person is told how far it is.
fn ballast(session: &Session, args: &BallastArgs) -> Result<Outcome, ClientError> {
    let life = args.life.as_ref().map(|life| life.text.clone());
    let deadline = args.deadline.as_ref().map(|deadline| deadline.text.clone());
    let Target { until_free, used } = &args.target;
    let texts = [("until_free", until_free), ("used", used), ("deadline", &deadline), ("for", &life)];
    let mut wanted = given(texts);
    for (name, given) in [("force", args.force), ("redirect_coredumps", args.redirect_coredumps)] {
        if given {
            wanted.insert(name.into(), json!(true));
        }
    }
    let old = before_of(session)?;
    // The daemon ends by itself.
    let client = session.patient(None)?;
    let tells = session.explains() && !session.several && std::io::stderr().is_terminal();
    let watcher = if tells { Some(session.patient(Some(Duration::from_secs(1)))?) } else { None };
    let reply = std::thread::scope(|scope| {
        let (done, ended) = channel::<()>();
        if let Some(watcher) = &watcher {
            scope.spawn(move || tell_progress(watcher, &ended));
        }
        let reply = client.put("/v1/space", &json!({"ballast": wanted}));
        drop(done);
        reply
    })?;
    let what = filled(&reply.body).unwrap_or_else(|| "ballast: none".to_owned());
    let undo = old.ballast.unwrap_or_else(|| "space clear ballast".to_owned());
    Ok(changed(reply, what, vec![session.undo(&undo)]))
}

/// One line that is written over itself.
fn tell_progress(client: &Client, ended: &Receiver<()>) {
    let mut err = std::io::stderr();
    while ended.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout) {
        if let Some(line) = client.get("/v1/space").ok().and_then(|reply| filled(&reply.body)) {
            let _ = write!(err, "\r\x1b[K{line}");
            let _ = err.flush();
        }
    }
    let _ = write!(err, "\r\x1b[K");
}

fn clear(session: &Session, part: Option<&str>) -> Result<Outcome, ClientError> {
    let old = before_of(session)?;
    let reply = match part {
        None => session.client.delete("/v1/space")?,
        Some(part) => session.client.put("/v1/space", &json!({part: null}))?,
    };
    let what = match part {
        None | Some("virtual") => limits(&reply.body),
        Some(part) => format!("{part}: none"),
    };
    let undo = match part {
        None => old.all(),
        Some("virtual") => old.limit.into_iter().collect(),
        Some("quota") => old.quotas,
        Some(_) => old.ballast.into_iter().collect(),
    };
    Ok(changed(reply, what, undo.iter().map(|words| session.undo(words)).collect()))
}

/// The commands that asked for what is in force.
#[derive(Default)]
pub struct Before {
    limit: Option<String>,
    quotas: Vec<String>,
    ballast: Option<String>,
}

impl Before {
    pub fn all(self) -> Vec<String> {
        self.limit.into_iter().chain(self.quotas).chain(self.ballast).collect()
    }
}

/// What is in force now, if somebody will read how to get it back.
fn before_of(session: &Session) -> Result<Before, ClientError> {
    if session.explains() { before(&session.client) } else { Ok(Before::default()) }
}

pub fn before(client: &Client) -> Result<Before, ClientError> {
    let body = client.get("/v1/space")?.body;
    let there = body.get("quota").and_then(Value::as_array).into_iter().flatten();
    Ok(Before {
        limit: again(&body, "virtual"),
        quotas: there.filter_map(|quota| quota.get("requested").map(quota_words)).collect(),
        ballast: again(&body, "ballast"),
    })
}

/// The words that bring back a part, for what is left of its time. None when that is over.
fn again(body: &Value, part: &str) -> Option<String> {
    let set = body.get(part)?;
    let mut requested = set.get("requested").filter(|requested| requested.is_object())?.clone();
    match set.get("remaining").and_then(Value::as_str) {
        Some("0s") => return None,
        Some(left) => requested["for"] = json!(left),
        None => {}
    }
    Some(words(part, &requested))
}

/// The words that made the capacity that is in force.
pub fn made_by(client: &Client) -> Result<Option<String>, ClientError> {
    let body = client.get("/v1/space")?.body;
    Ok(body.pointer("/virtual/requested").map(|requested| words("virtual", requested)))
}

fn quota_words(requested: &Value) -> String {
    words("quota", requested)
}

/// The words that ask for the same once more: each field has the flag of its name.
fn words(part: &str, requested: &Value) -> String {
    let fields = requested.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let flags = fields.map(|(name, value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let flag = name.replace('_', "-");
        if value.is_boolean() { format!(" --{flag}") } else { format!(" --{flag} {}", quoted(&text)) }
    });
    format!("space {part}{}", flags.collect::<String>())
}

fn limits(body: &Value) -> String {
    match body.get("virtual").filter(|limit| limit.is_object()) {
        None => "space: the disk's own, no limit of ours".to_owned(),
        Some(limit) => format!("space: {}", limit_words(limit).join(", ")),
    }
}

fn limit_words(limit: &Value) -> Vec<String> {
    let mut words = Vec::new();
    if limit.get("size").is_some() {
        let of = |name| bytes(limit.get(name));
        words.push(format!("{} free of {}, {} used", of("free"), of("size"), of("used")));
    }
    if limit.get("reserve").and_then(Value::as_u64).is_some_and(|reserve| reserve > 0) {
        words.push(format!("{} for root alone", bytes(limit.get("reserve"))));
    }
    if let Some(inodes) = limit.pointer("/inodes/free") {
        words.push(format!("{inodes} inodes free"));
    }
    if limit.get("late") == Some(&json!(true)) {
        words.push("refused late".to_owned());
    }
    words
}

fn quotas(body: &Value) -> Vec<String> {
    let each = body.get("quota").and_then(Value::as_array).into_iter().flatten();
    let line = |quota: &Value| {
        let owner = quota.get("uid").and_then(Value::as_u64).map(|uid| format!(" of uid {uid}"));
        let path = quota.get("path").and_then(Value::as_str).map(|path| format!(" under {path}"));
        let whose = format!("{}{}", owner.unwrap_or_default(), path.unwrap_or_default());
        format!("quota{whose}: {} used of {}", bytes(quota.get("used")), bytes(quota.get("limit")))
    };
    each.map(line).collect()
}

fn filled(body: &Value) -> Option<String> {
    let ballast = body.get("ballast").filter(|ballast| ballast.is_object())?;
    let word = |name| ballast.get(name).and_then(Value::as_str).unwrap_or("?");
    let amount = |name| bytes(ballast.get(name));
    let (allocated, free, target) = (amount("allocated"), amount("free"), amount("target_free"));
    Some(format!("ballast {}: {} has {allocated}, {free} free, {target} wanted", word("state"), word("file")))
}

fn statfs(body: &Value) -> String {
    let number = |name: &str| body.get("statfs")?.get(name)?.as_u64();
    let size = number("block_size").unwrap_or(1);
    let amount = |name| number(name).map_or_else(|| "?".to_owned(), |blocks| size_text(blocks.saturating_mul(size)));
    format!("statfs: {} in all, {} free, {} available", amount("blocks"), amount("free"), amount("available"))
}

fn bytes(value: Option<&Value>) -> String {
    value.and_then(Value::as_u64).map_or_else(|| "?".to_owned(), size_text)
}

fn size_text(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Drops lost writes from the page cache, for all paths or those that match.
pub fn evict(session: &Session, path: Option<&str>) -> Result<Outcome, ClientError> {
    let body = path.map_or_else(|| json!({}), |path| json!({"path": path}));
    let reply = session.client.post("/v1/evict", &body)?;
    let evicted = reply.body.get("evicted").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut lines = vec![format!("{} files show again what the disk has kept", evicted.len())];
    lines.extend(evicted.iter().map(|file| {
        let path = file.get("path").and_then(Value::as_str).unwrap_or("?");
        let writes = file.get("writes").and_then(Value::as_u64).unwrap_or_default();
        format!("  {path}: {writes} writes, {} lost", bytes(file.get("bytes")))
    }));
    Ok(changed(reply, lines.join("\n"), vec!["undo: none; what was dropped is lost".to_owned()]))
}
