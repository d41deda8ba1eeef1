//! `mode`: one word for the whole mount.
//!
//! Thread: one for each host. Locks: none. Must never: keep the list of words, which the server knows.

use clap::Args;
use serde_json::{Map, Value, json};

use crate::client::ClientError;

use super::args::{Span, quoted};
use super::console::Outcome;
use super::session::{Session, World, changed, on_each, shown};

#[derive(Debug, Args)]
pub struct ModeArgs {
    /// allow_writes, drop_writes, error_writes, error_reads, error_all or enospc; without it, say which it is
    mode: Option<String>,
    /// Lifetime; then the mount allows everything again
    #[arg(long = "for", alias = "interval", value_name = "DURATION", requires = "mode")]
    lifetime: Option<Span>,
    /// Of a disk that comes and goes: how long it is well, first
    #[arg(long, value_name = "DURATION", requires = "mode")]
    up: Option<Span>,
    /// Of a disk that comes and goes: how long the mode then acts
    #[arg(long, value_name = "DURATION", requires = "mode")]
    down: Option<Span>,
    /// Coredumps go to the root filesystem for as long as the mode lasts
    #[arg(long, requires = "mode")]
    redirect_coredumps: bool,
}

pub fn run(world: &World, args: &ModeArgs) -> u8 {
    on_each(world, &|session| match &args.mode {
        None => show(session),
        Some(mode) => set(session, mode, args),
    })
}

fn show(session: &Session) -> Result<Outcome, ClientError> {
    let reply = session.client.get("/v1/mode")?;
    let line = sentence(&reply.body);
    Ok(shown(reply, vec![line]))
}

fn set(session: &Session, mode: &str, args: &ModeArgs) -> Result<Outcome, ClientError> {
    let old = if session.explains() { word(&session.client.get("/v1/mode")?.body) } else { None };
    let mut body = Map::new();
    body.insert("mode".into(), json!(mode));
    for (name, span) in [("for", &args.lifetime), ("up", &args.up), ("down", &args.down)] {
        if let Some(span) = span {
            body.insert(name.into(), json!(span.text));
        }
    }
    if args.redirect_coredumps {
        body.insert("redirect_coredumps".into(), json!(true));
    }
    let reply = session.after_coredumps(args.redirect_coredumps)?.put("/v1/mode", &Value::Object(body))?;
    let what = sentence(&reply.body);
    let undo = old.filter(|old| old != mode).unwrap_or_else(|| "allow_writes".to_owned());
    let undo = if mode == undo { Vec::new() } else { vec![session.undo(&format!("mode {}", quoted(&undo)))] };
    Ok(changed(reply, what, undo))
}

fn word(body: &Value) -> Option<String> {
    body.get("mode").and_then(Value::as_str).map(ToOwned::to_owned)
}

fn text<'a>(body: &'a Value, name: &str) -> Option<&'a str> {
    body.get(name).and_then(Value::as_str)
}

fn sentence(body: &Value) -> String {
    let mut mode = word(body).unwrap_or_else(|| "?".to_owned());
    if let (Some(up), Some(down)) = (text(body, "up"), text(body, "down")) {
        mode = format!("{mode} (well for {up}, then so for {down}, and again)");
    }
    match body.get("remaining").and_then(Value::as_str) {
        Some(remaining) => format!("mode {mode} for {remaining} more"),
        None => format!("mode {mode}"),
    }
}
