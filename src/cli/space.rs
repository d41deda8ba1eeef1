//! `space`: how full the disk seems. And `evict`, which makes readers see what the disk has really kept.
//!
//! Thread: one for each host. Locks: none. Must never: compute capacity; the server does.

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::ClientError;

use super::args::quoted;
use super::console::Outcome;
use super::session::{Session, World, changed, on_each, shown};

#[derive(Debug, Subcommand)]
pub enum SpaceCommand {
    /// A capacity that is smaller than the disk's: what needs more gets ENOSPC
    Virtual(VirtualArgs),
    /// Back to the capacity of the disk
    Clear,
    /// What is limited, and what statfs says
    Status,
}

#[derive(Debug, Args)]
pub struct VirtualArgs {
    #[command(flatten)]
    amount: Amount,
    /// How many inodes there are
    #[arg(long, value_name = "N")]
    inodes: Option<u64>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
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

pub fn run(world: &World, command: &SpaceCommand) -> u8 {
    match command {
        SpaceCommand::Virtual(args) => on_each(world, &|session| limit(session, args)),
        SpaceCommand::Clear => on_each(world, &clear),
        SpaceCommand::Status => on_each(world, &|session| {
            let reply = session.client.get("/v1/space")?;
            let lines = vec![limits(&reply.body), statfs(&reply.body)];
            Ok(shown(reply, lines))
        }),
    }
}

impl VirtualArgs {
    fn document(&self) -> Value {
        let Amount { free, used, size } = &self.amount;
        let mut amount = Map::new();
        for (name, value) in [("free", free), ("used", used), ("size", size)] {
            if let Some(value) = value {
                amount.insert(name.into(), json!(value));
            }
        }
        if let Some(inodes) = self.inodes {
            amount.insert("inodes".into(), json!(inodes));
        }
        json!({"virtual": amount})
    }
}

fn limit(session: &Session, args: &VirtualArgs) -> Result<Outcome, ClientError> {
    let old = before(session)?;
    let reply = session.client.put("/v1/space", &args.document())?;
    let what = limits(&reply.body);
    let undo = old.unwrap_or_else(|| "space clear".to_owned());
    Ok(changed(reply, what, vec![session.undo(&undo)]))
}

fn clear(session: &Session) -> Result<Outcome, ClientError> {
    let old = before(session)?;
    let reply = session.client.delete("/v1/space")?;
    let what = limits(&reply.body);
    Ok(changed(reply, what, old.map(|words| session.undo(&words)).into_iter().collect()))
}

/// The command that asked for the limit that is in force, if somebody will read it.
fn before(session: &Session) -> Result<Option<String>, ClientError> {
    if !session.explains() {
        return Ok(None);
    }
    let body = session.client.get("/v1/space")?.body;
    let requested = body.pointer("/virtual/requested").and_then(Value::as_object);
    Ok(requested.map(|requested| {
        let flags = requested.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
            format!(" --{name} {}", quoted(&text))
        });
        format!("space virtual{}", flags.collect::<String>())
    }))
}

fn limits(body: &Value) -> String {
    match body.get("virtual").filter(|limit| limit.is_object()) {
        None => "space: the disk's own, no limit of ours".to_owned(),
        Some(limit) => format!(
            "space: {} free of {}, {} used",
            bytes(limit.get("free")),
            bytes(limit.get("size")),
            bytes(limit.get("used"))
        ),
    }
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
