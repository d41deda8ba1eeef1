//! `inspect`: the live state of a mount.
//!
//! Thread: one for each host. Locks: none. Must never: change anything.

use clap::Subcommand;
use serde_json::Value;

use crate::client::ClientError;

use super::console::Outcome;
use super::session::{Session, World, on_each, shown};
use super::{events, table};

#[derive(Debug, Subcommand)]
pub enum InspectCommand {
    /// The requests that are held: stalled or delayed
    Requests,
}

pub fn run(world: &World, command: &InspectCommand) -> u8 {
    match command {
        InspectCommand::Requests => on_each(world, &requests),
    }
}

fn requests(session: &Session) -> Result<Outcome, ClientError> {
    let reply = session.client.get("/v1/requests")?;
    let held = reply.body.get("requests").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let rows: Vec<Vec<String>> = held.iter().map(row).collect();
    let lines = match rows.as_slice() {
        [] => vec!["no request is held".to_owned()],
        rows => table::lines(&["ID", "STATE", "WAITING", "RULE", "OP", "RANGE", "PID/COMM", "PATH"], rows),
    };
    Ok(shown(reply, lines))
}

fn row(request: &Value) -> Vec<String> {
    let text = |key: &str| match request.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        Some(other) => other.to_string(),
    };
    vec![
        text("id"),
        text("state"),
        format!("{}ms", text("waiting_ms")),
        text("rule"),
        text("op"),
        events::range(request),
        format!("{}/{}", text("pid"), text("comm")),
        text("path"),
    ]
}
