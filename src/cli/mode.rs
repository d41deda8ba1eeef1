//! `mode`: one word for the whole mount.
//!
//! Thread: one for each host. Locks: none. Must never: keep the list of words, which the server knows.

use clap::Args;
use serde_json::{Map, Value, json};

use crate::client::{Client, ClientError};

use super::args::{Span, quoted};
use super::console::Outcome;
use super::rule::path_of;
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
    let old = if session.explains() { before(&session.client)? } else { None };
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
    let asked = |span: &Option<Span>| span.as_ref().map(|span| json!(span.text));
    let cycle = json!({"up": asked(&args.up), "down": asked(&args.down)});
    let lasts = args.lifetime.as_ref().map(|span| span.text.as_str());
    let made = words(mode, lasts, &cycle, args.redirect_coredumps);
    let undo = old.unwrap_or_else(|| format!("mode {NONE}"));
    Ok(changed(
        reply,
        what,
        Some(undo).filter(|undo| *undo != made).map(|undo| session.undo(&undo)).into_iter().collect(),
    ))
}

/// The mode in which the mount does nothing.
const NONE: &str = "allow_writes";

/// The words that bring back the mode that is in force, for what is left of its time. None when it does nothing.
pub fn before(client: &Client) -> Result<Option<String>, ClientError> {
    let mode = client.get("/v1/mode")?.body;
    let left = text(&mode, "remaining");
    let Some(word) = text(&mode, "mode").filter(|mode| *mode != NONE && left != Some("0s")) else { return Ok(None) };
    // It may have ended since.
    let rule = client.get(&path_of("mode")).map(|reply| reply.body).unwrap_or_default();
    Ok(Some(words(word, left, &mode, rule["redirect_coredumps"] == json!(true))))
}

/// The words that made the mode of which this is the rule. None when it has ended.
pub fn made_by(client: &Client, rule: &Value) -> Result<Option<String>, ClientError> {
    let mode = client.get("/v1/mode")?.body;
    let word = text(&mode, "mode").filter(|mode| *mode != NONE);
    let (trigger, redirects) = (&rule["trigger"], rule["redirect_coredumps"] == json!(true));
    Ok(word.map(|word| words(word, text(trigger, "for"), trigger, redirects)))
}

fn words(mode: &str, lasts: Option<&str>, cycle: &Value, redirects: bool) -> String {
    let spans = [("for", lasts), ("up", text(cycle, "up")), ("down", text(cycle, "down"))];
    let spans = spans.iter().filter_map(|(name, span)| Some(format!(" --{name} {}", quoted((*span)?))));
    let redirects = if redirects { " --redirect-coredumps" } else { "" };
    format!("mode {}{}{redirects}", quoted(mode), spans.collect::<String>())
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
