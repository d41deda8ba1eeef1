//! `events`: the history of a mount, or its events as they happen, one line each.
//!
//! Thread: one for each host. Locks: the console's, for the length of a line. Must never: buffer events, or slow the
//! daemon; a reader that is gone ends the command quietly.

use std::ops::ControlFlow;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::client::{ClientError, with_query};

use super::console::Outcome;
use super::session::{Session, World, on_each};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with what happens next; without it, print what has happened and end
    #[arg(long, short)]
    follow: bool,
    /// Begin after this cursor
    #[arg(long, value_name = "CURSOR")]
    since: Option<String>,
    /// Of these rules only
    #[arg(long, value_name = "GLOB")]
    rule: Option<String>,
    /// Of this kind of fault only
    #[arg(long)]
    kind: Option<String>,
    /// Of this operation only
    #[arg(long)]
    op: Option<String>,
    /// Of these paths only; of rename and link either
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
    /// Of this process only
    #[arg(long)]
    pid: Option<u32>,
    /// End after N events
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// How to print them
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub fn run(world: &World, args: &EventsArgs) -> u8 {
    on_each(world, &|session| stream(session, args))
}

impl EventsArgs {
    fn path(&self) -> String {
        with_query(
            "/v1/events",
            [
                ("follow", Some(self.follow.to_string())),
                ("since", self.since.clone()),
                ("rule", self.rule.clone()),
                ("kind", self.kind.clone()),
                ("op", self.op.clone()),
                ("path", self.path.clone()),
                ("pid", self.pid.map(|pid| pid.to_string())),
                ("limit", self.limit.map(|limit| limit.to_string())),
            ],
        )
    }
}

/// How a stream came to its end, if not by losing the daemon.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    count: u64,
    said_bye: bool,
    enough: bool,
}

fn stream(session: &Session, args: &EventsArgs) -> Result<Outcome, ClientError> {
    let as_json = session.console.json || args.format == Format::Json;
    let mut seen = Seen::default();
    let ended = session.client.stream_events(&args.path(), |event| {
        let shown = print(session, args, as_json, event, &mut seen);
        seen.enough |= shown.is_break() || args.limit.is_some_and(|limit| seen.count >= limit);
        if seen.enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if seen.said_bye || seen.enough {
        return Ok(Outcome::default());
    }
    ended?;
    match args.follow {
        false => Ok(Outcome::default()),
        true => Err(ClientError::no_instance(format!("{} ended the stream without a word", session.target.host))
            .hint("the daemon may have been killed: `nemesisfs list` shows its state")),
    }
}

/// A break means that nobody reads any more.
fn print(session: &Session, args: &EventsArgs, as_json: bool, event: Value, seen: &mut Seen) -> ControlFlow<()> {
    let name = event.get("event").and_then(Value::as_str).unwrap_or_default();
    // The greeting belongs to a stream, not to the history, and says nothing to a person.
    let hidden = name == "hello" && !(as_json && args.follow);
    seen.said_bye |= name == "bye";
    if !matches!(name, "hello" | "gap" | "bye") {
        seen.count += 1;
    }
    let printed = match (hidden, as_json) {
        (true, _) => Ok(()),
        (false, true) => session.console.document(&with_instance(session, event)),
        (false, false) if session.several => {
            session.console.line(&format!("{}: {}", session.target.name, line(&event)))
        }
        (false, false) => session.console.line(&line(&event)),
    };
    if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

/// From several hosts, each object says whose it is.
fn with_instance(session: &Session, mut event: Value) -> Value {
    if let (true, Value::Object(fields)) = (session.several, &mut event) {
        fields.entry("instance").or_insert_with(|| json!(session.target.name));
    }
    event
}

/// One event in one line. An injection has its columns; of other events all that they say is shown.
pub fn line(event: &Value) -> String {
    let text = |key| word(event.get(key));
    let name = text("event").unwrap_or_else(|| "?".to_owned());
    let time = text("time").map_or_else(|| "-".to_owned(), |time| time_of_day(&time));
    let head = format!("{time:<15} {name:<9}");
    let rest = if name == "injection" { injection(event) } else { others(event) };
    format!("{head} {rest}").trim_end().to_owned()
}

fn injection(event: &Value) -> String {
    let text = |key| word(event.get(key)).unwrap_or_else(|| "-".to_owned());
    let outcome = word(event.get("errno")).or_else(|| delay(event)).unwrap_or_else(|| "-".to_owned());
    let repeat = if event.get("repeat") == Some(&Value::Bool(true)) { " repeat" } else { "" };
    let (rule, kind, op, range) = (text("rule"), text("kind"), text("op"), range(event));
    let to = word(event.get("to")).map_or_else(String::new, |to| format!(" -> {to}"));
    let path = text("path") + &to;
    let who = format!("{}/{}", text("pid"), text("comm"));
    format!("{rule:<16} {kind:<8} {op:<10} {path:<32} {range:<14} {outcome:<8} {who}{repeat}")
}

/// Where in the file: `offset+length`.
pub fn range(event: &Value) -> String {
    match (word(event.get("offset")), word(event.get("length"))) {
        (Some(offset), Some(length)) => format!("{offset}+{length}"),
        (Some(offset), None) => offset,
        _ => "-".to_owned(),
    }
}

fn delay(event: &Value) -> Option<String> {
    let ns = event.get("delay_ns").and_then(Value::as_u64).filter(|ns| *ns > 0)?;
    Some(format!("{:.1}ms", ns as f64 / 1e6))
}

/// What is in every event, or in the head of the line already.
const COMMON: [&str; 5] = ["id", "event", "time", "monotonic_ns", "instance"];

fn others(event: &Value) -> String {
    let fields = event.as_object().into_iter().flatten();
    let said = fields.filter(|(key, value)| {
        let empty = value.is_null() || **value == json!({}) || **value == json!([]);
        !COMMON.contains(&key.as_str()) && !empty
    });
    let words = said.map(|(key, value)| format!("{key}={}", word(Some(value)).unwrap_or_default()));
    words.collect::<Vec<_>>().join(" ")
}

fn word(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// `12:00:01.123456` of an RFC 3339 time; what is no such time is shown as it is.
fn time_of_day(time: &str) -> String {
    match time.split_once('T') {
        Some((_, clock)) => clock.trim_end_matches('Z').chars().take(15).collect(),
        None => time.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_injection_is_one_aligned_line() {
        let mut event = json!({"id": "7f-2", "event": "injection", "time": "2026-11-20T12:00:01.123456789Z",
            "instance": "n1", "rule": "wal-eio", "kind": "error", "op": "write", "path": "/pg_wal/1", "offset": 8192,
            "length": 4096, "errno": "EIO", "pid": 4711, "comm": "postgres", "repeat": true});
        let with_range = line(&event);
        let words: Vec<&str> = with_range.split_whitespace().collect();
        let expected = "12:00:01.123456 injection wal-eio error write /pg_wal/1 8192+4096 EIO 4711/postgres repeat";
        assert_eq!(words, expected.split(' ').collect::<Vec<_>>());
        event["offset"] = Value::Null;
        assert_eq!(line(&event).find("EIO"), with_range.find("EIO"));
    }

    #[test]
    fn a_gap_says_what_was_missed() {
        assert_eq!(line(&json!({"event": "gap", "missed": 12, "labels": {}})), "-               gap       missed=12");
    }
}
