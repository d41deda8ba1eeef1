//! `repair`: gives files back what they should have where they were damaged, or tells where that is and by which injection.
//!
//! Thread: one for each host. Locks: none.

use clap::Args;
use serde_json::{Value, json};

use crate::client::{ClientError, with_query};

use super::console::Outcome;
use super::session::{Session, World, changed, on_each, shown};

#[derive(Debug, Args)]
pub struct RepairArgs {
    /// Only of files below the mountpoint that match
    path: Option<String>,
    /// Change nothing: tell which places were damaged, by which rule, and when
    #[arg(long)]
    list: bool,
    /// Of what is listed, only what touches this byte
    #[arg(long, value_name = "OFFSET", requires = "list")]
    offset: Option<u64>,
    /// So many bytes from there on
    #[arg(long, value_name = "N", requires = "offset")]
    length: Option<u64>,
}

pub fn run(world: &World, args: &RepairArgs) -> u8 {
    on_each(world, &|session| if args.list { list(session, args) } else { repair(session, args) })
}

fn repair(session: &Session, args: &RepairArgs) -> Result<Outcome, ClientError> {
    let body = args.path.as_ref().map_or_else(|| json!({}), |path| json!({"path": path}));
    let reply = session.client.post("/v1/repair", &body)?;
    let files = files(&reply.body, "repaired");
    let mut lines = vec![format!("{} files have again what they should have", files.len())];
    lines.extend(places(files));
    Ok(changed(reply, lines.join("\n"), vec!["undo: none; a rule can damage them anew".to_owned()]))
}

fn list(session: &Session, args: &RepairArgs) -> Result<Outcome, ClientError> {
    let number = |number: Option<u64>| number.map(|number| number.to_string());
    let query = [("path", args.path.clone()), ("offset", number(args.offset)), ("length", number(args.length))];
    let reply = session.client.get(&with_query("/v1/repair", query))?;
    let lines = places(files(&reply.body, "damaged"));
    let lines = if lines.is_empty() { vec!["nothing there was damaged by us".to_owned()] } else { lines };
    Ok(shown(reply, lines))
}

fn files<'a>(body: &'a Value, name: &str) -> &'a [Value] {
    body.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn places(files: &[Value]) -> Vec<String> {
    let mut lines = Vec::new();
    for file in files {
        let text = |value: &Value, name: &str| match value.get(name) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "?".to_owned(),
        };
        for place in file.get("places").and_then(Value::as_array).into_iter().flatten() {
            lines.push(format!(
                "  {} at {}, {} bytes: injection {} of rule {}, {}",
                text(file, "path"),
                text(place, "offset"),
                text(place, "length"),
                text(place, "nth"),
                text(place, "rule"),
                text(place, "time"),
            ));
        }
    }
    lines
}
