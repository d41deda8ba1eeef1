//! `rule`: arm, look at, change, remove and await rules. The words of a rule are the server's to check; here they only
//! get their place in the document.
//!
//! Thread: one for each host. Locks: none. Must never: keep a list of valid words, which would be a second truth.

use std::io::Read;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::host::resolve;
use crate::client::{ClientError, Reply, rule_file, segment, with_query};
use crate::exit;
use crate::fault::document::definition;

use super::args::{Span, pair, quoted};
use super::console::Outcome;
use super::rule_args::{FaultArgs, MatchArgs, TriggerArgs, given};
use super::rule_text::{command, sentence};
use super::session::{Session, World, changed, on_each, on_targets, shown};
use super::{events, host, mode, space, table};

#[derive(Debug, Subcommand)]
pub enum RuleCommand {
    /// Arm a rule, or replace the one of this name
    Add(Box<AddArgs>),
    /// All rules in their order, with their counters
    List,
    /// One rule
    Show { name: String },
    /// Remove a rule; one that is not there is no error
    Rm { name: String },
    /// Let a disabled rule act again
    Enable { name: String },
    /// Keep a rule from acting, without losing its place
    Disable { name: String },
    /// Replace all rules by those of a file (TOML or JSON; - is standard input)
    Apply { file: String },
    /// Remove all rules
    Clear,
    /// Exit status 1, and the reasons, if a required rule has not fired
    Check,
    /// Wait until a rule has fired: 0 it has, 124 not in time, 4 there is no such rule
    Wait(WaitArgs),
    /// Let requests that a rule has stalled go on
    Release {
        name: String,
        /// At most so many, the oldest first
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub struct AddArgs {
    name: String,
    #[command(flatten)]
    fault: FaultArgs,
    #[command(flatten)]
    place: MatchArgs,
    #[command(flatten)]
    trigger: TriggerArgs,
    /// Make it, but do not let it act yet
    #[arg(long)]
    disabled: bool,
    /// `rule check` fails while it has not fired
    #[arg(long)]
    required: bool,
    /// Coredumps go to the root filesystem for as long as it is armed
    #[arg(long)]
    redirect_coredumps: bool,
    /// A word of your own, copied into each event. Repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub struct WaitArgs {
    name: String,
    /// How many times it must have fired
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    injections: u64,
    /// Count from this cursor, which any reply to a change has told, and not from the arming of the rule
    #[arg(long, value_name = "CURSOR")]
    since: Option<String>,
    /// How long to wait
    #[arg(long = "for", value_name = "DURATION", default_value = "30s")]
    limit: Span,
}

pub fn run(world: &World, command: &RuleCommand) -> u8 {
    match command {
        RuleCommand::Add(args) => {
            let spec = args.spec();
            on_each(world, &|session| add(session, &args.name, &spec))
        }
        RuleCommand::List => on_each(world, &list),
        RuleCommand::Show { name } => on_each(world, &|session| show(session, name)),
        RuleCommand::Rm { name } => on_each(world, &|session| remove(session, name)),
        RuleCommand::Enable { name } => on_each(world, &|session| switch(session, name, true)),
        RuleCommand::Disable { name } => on_each(world, &|session| switch(session, name, false)),
        RuleCommand::Apply { file } => match load(file) {
            Ok(set) => on_each(world, &|session| apply(session, &set)),
            Err(error) => world.console.error(&error),
        },
        RuleCommand::Clear => on_each(world, &clear),
        RuleCommand::Check => on_each(world, &check),
        RuleCommand::Wait(args) => on_each(world, &|session| wait(session, args)),
        RuleCommand::Release { name, count } => on_each(world, &|session| release(session, name, *count)),
    }
}

impl AddArgs {
    fn spec(&self) -> Value {
        let mut spec = Map::new();
        spec.insert("name".into(), json!(self.name));
        spec.insert("enabled".into(), json!(!self.disabled));
        for (name, given) in [("required", self.required), ("redirect_coredumps", self.redirect_coredumps)] {
            if given {
                spec.insert(name.into(), json!(true));
            }
        }
        spec.insert("match".into(), self.place.document());
        spec.insert("trigger".into(), self.trigger.document());
        spec.insert("fault".into(), self.fault.document());
        if !self.labels.is_empty() {
            let labels: Map<String, Value> = self.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
            spec.insert("labels".into(), Value::Object(labels));
        }
        Value::Object(spec)
    }
}

fn redirects(rule: &Value) -> bool {
    rule.get("redirect_coredumps") == Some(&Value::Bool(true))
}

pub fn path_of(name: &str) -> String {
    format!("/v1/rules/{}", segment(name))
}

/// The rule of this name as it is now, if somebody will read how to get it back.
fn before(session: &Session, name: &str) -> Result<Option<Value>, ClientError> {
    if !session.explains() {
        return Ok(None);
    }
    match session.client.get(&path_of(name)) {
        Ok(reply) => Ok(Some(reply.body)),
        Err(error) if error.exit == exit::NO_SUCH_THING => Ok(None),
        Err(error) => Err(error),
    }
}

fn add(session: &Session, name: &str, spec: &Value) -> Result<Outcome, ClientError> {
    let old = before(session, name)?;
    let reply = session.after_coredumps(redirects(spec))?.put(&path_of(name), spec)?;
    let state = reply.body.get("state").and_then(Value::as_str).unwrap_or("armed");
    let what = format!("rule {name} {state}: {}", sentence(&reply.body));
    let undo = match old.as_ref().and_then(command) {
        Some(words) => session.undo(&words),
        None => session.undo(&format!("rule rm {}", quoted(name))),
    };
    Ok(changed(reply, what, vec![undo]))
}

fn rules(body: &Value) -> &[Value] {
    body.get("rules").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub fn field(rule: &Value, name: &str) -> String {
    match rule.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn list(session: &Session) -> Result<Outcome, ClientError> {
    let reply = session.client.get("/v1/rules")?;
    let rows: Vec<Vec<String>> = rules(&reply.body)
        .iter()
        .map(|rule| {
            let mut row: Vec<String> = ["name", "state", "matches", "injections"].map(|name| field(rule, name)).into();
            row.push(sentence(rule));
            row
        })
        .collect();
    let lines = match rows.as_slice() {
        [] => vec!["no rules".to_owned()],
        rows => table::lines(&["NAME", "STATE", "MATCHES", "INJECTIONS", "WHAT"], rows),
    };
    Ok(shown(reply, lines))
}

fn show(session: &Session, name: &str) -> Result<Outcome, ClientError> {
    let reply = session.client.get(&path_of(name))?;
    let rule = &reply.body;
    let mut lines = vec![format!("rule {name} {}: {}", field(rule, "state"), sentence(rule))];
    lines.push(format!("matches {}, injections {}", field(rule, "matches"), field(rule, "injections")));
    lines.push(format!("created {}", field(rule, "created")));
    let made_by = match name {
        "mode" => mode::made_by(&session.client, rule)?,
        "space" => space::made_by(&session.client)?,
        _ => command(rule),
    };
    lines.extend(made_by.map(|words| format!("made by: {}", session.command(&words))));
    Ok(shown(reply, lines))
}

fn remove(session: &Session, name: &str) -> Result<Outcome, ClientError> {
    let old = before(session, name)?;
    let reply = match session.client.delete(&path_of(name)) {
        // Removing what is not there is done already.
        Err(error) if error.code() == "not_found" => Reply { status: 204, body: Value::Null },
        other => other?,
    };
    let what = match &old {
        Some(_) => format!("rule {name} removed"),
        None => format!("rule {name}: not there, nothing to remove"),
    };
    let undo = old.as_ref().map(|rule| undo_of(session, rule));
    Ok(changed(reply, what, undo.into_iter().collect()))
}

/// How to get a rule back that is gone.
fn undo_of(session: &Session, rule: &Value) -> String {
    match (command(rule), rule.as_object()) {
        (Some(words), _) => session.undo(&words),
        (None, Some(fields)) => {
            format!("undo: PUT {} {}", path_of(&field(rule, "name")), Value::Object(definition(fields.clone())))
        }
        (None, None) => "undo: none".to_owned(),
    }
}

fn switch(session: &Session, name: &str, enabled: bool) -> Result<Outcome, ClientError> {
    let reply = session.client.patch(&path_of(name), &json!({"enabled": enabled}))?;
    let (done, back) = if enabled { ("enabled", "disable") } else { ("disabled", "enable") };
    let state = field(&reply.body, "state");
    // One whose life is over is not brought back by this.
    let done = if ["expired", "exhausted"].contains(&state.as_str()) {
        format!("{done}, but {state}")
    } else {
        done.to_owned()
    };
    let what = format!("rule {name} {done}: {}", sentence(&reply.body));
    Ok(changed(reply, what, vec![session.undo(&format!("rule {back} {}", quoted(name)))]))
}

/// Not what the mode and the capacity are told as, which have commands of their own.
fn is_rule(rule: &&Value) -> bool {
    !matches!(rule["name"].as_str(), Some("mode" | "space"))
}

/// All rules as they are now, if somebody will read how to get them back.
fn all_before(session: &Session) -> Result<Vec<Value>, ClientError> {
    if !session.explains() {
        return Ok(Vec::new());
    }
    Ok(rules(&session.client.get("/v1/rules")?.body).iter().filter(is_rule).cloned().collect())
}

fn apply(session: &Session, set: &Value) -> Result<Outcome, ClientError> {
    let old = all_before(session)?;
    let redirects = set.get("rules").and_then(Value::as_array).is_some_and(|rules| rules.iter().any(redirects));
    let reply = session.after_coredumps(redirects)?.put("/v1/rules", set)?;
    let now: Vec<&Value> = rules(&reply.body).iter().filter(is_rule).collect();
    let mut what: Vec<String> = vec![format!("{} rules in force, in this order", now.len())];
    let line = |rule: &&Value| format!("  rule {} {}: {}", field(rule, "name"), field(rule, "state"), sentence(rule));
    what.extend(now.iter().map(line));
    let mut undo = vec![session.undo("rule clear")];
    undo.extend(old.iter().map(|rule| undo_of(session, rule)));
    Ok(changed(reply, what.join("\n"), undo))
}

fn clear(session: &Session) -> Result<Outcome, ClientError> {
    let old = all_before(session)?;
    let reply = session.client.delete("/v1/rules")?;
    let what = match names(&reply.body, "removed") {
        names if names.is_empty() => "no rules, nothing to remove".to_owned(),
        names => format!("removed: {names}"),
    };
    Ok(changed(reply, what, old.iter().map(|rule| undo_of(session, rule)).collect()))
}

/// A run in which a required rule has not fired proves nothing.
fn check(session: &Session) -> Result<Outcome, ClientError> {
    let reply = session.client.get("/v1/rules")?;
    let required: Vec<&Value> =
        rules(&reply.body).iter().filter(|rule| rule.get("required") == Some(&Value::Bool(true))).collect();
    let unfired = |rule: &&&Value| rule.get("unfired").is_some_and(Value::is_string);
    let complaints: Vec<String> = required
        .iter()
        .filter(unfired)
        .map(|rule| format!("error: rule {} has not fired: {}", field(rule, "name"), field(rule, "unfired")))
        .collect();
    let fired = required.iter().filter(|rule| !unfired(rule));
    let lines = fired.map(|rule| format!("rule {} has fired {} times", field(rule, "name"), field(rule, "injections")));
    let mut lines: Vec<String> = lines.collect();
    if required.is_empty() {
        lines.push("no rule is required".to_owned());
    }
    let exit = if complaints.is_empty() { exit::DONE } else { exit::FAILED };
    let checked: Vec<Value> = required.into_iter().cloned().collect();
    let body = json!({"passed": complaints.is_empty(), "required": checked, "cursor": reply.body.get("cursor")});
    Ok(Outcome { complaints, exit, ..shown(Reply { body, ..reply }, lines) })
}

/// How long is looked for what can be brought back.
const GLANCE: Duration = Duration::from_secs(1);
/// How long devices and coredumps may take to be as they were.
const RESET_ALL: Duration = Duration::from_secs(180);

/// `reset` on every host, and of one whose mount is dead what is to be done of the machine.
pub fn reset_each(world: &World, all: bool) -> u8 {
    let verb = |session: &Session| reset(session, all);
    let targets = resolve(&world.globals.host, world.run_dir);
    let is_dead = targets.as_ref().is_err_and(|error| error.exit == exit::NO_INSTANCE);
    // What was done to the machine any daemon undoes; that the mount's own one has died is told all the same.
    let any = if all && is_dead { host::living_without_mount(world) } else { None };
    let done = any.map(|any| on_targets(world, Ok(vec![any]), &verb));
    done.unwrap_or_default().max(on_targets(world, targets, &verb))
}

/// It lives here because what it takes away and may have to bring back are rules.
pub fn reset(session: &Session, all: bool) -> Result<Outcome, ClientError> {
    let old = before_reset(session);
    let reply = match all {
        false => session.client.post("/v1/reset", &json!({}))?,
        true => session.patient(Some(RESET_ALL))?.post("/v1/reset?all=true", &json!({}))?,
    };
    let machine: Vec<String> = ["devices", "leases"]
        .iter()
        .filter_map(|part| Some((part, names(&reply.body, part))).filter(|(_, names)| !names.is_empty()))
        .map(|(part, names)| format!("{part} removed: {names}"))
        .collect();
    if reply.body.get("mode").is_none() {
        let what =
            if machine.is_empty() { "reset: nothing of the machine is changed".to_owned() } else { machine.join("; ") };
        return Ok(changed(reply, what, Vec::new()));
    }
    let removed = match names(&reply.body, "removed") {
        names if names.is_empty() => "no rules to remove".to_owned(),
        names => format!("rules removed: {names}"),
    };
    let mode = field(&reply.body, "mode");
    let released = reply.body.get("released").and_then(Value::as_u64).unwrap_or_default();
    let what = format!("reset: {removed}; mode {mode}; capacity off; {released} parked requests went on");
    let what = std::iter::once(what).chain(machine).collect::<Vec<_>>().join("; ");
    Ok(changed(reply, what, old))
}

/// How to get back what a reset takes away. A daemon without a mount has nothing of this, and one whose disk hangs cannot
/// tell all of it: the reset does not wait for that.
fn before_reset(session: &Session) -> Vec<String> {
    if !session.explains() {
        return Vec::new();
    }
    let Ok(client) = session.patient(Some(GLANCE)) else { return Vec::new() };
    let rules = client.get("/v1/rules").map(|reply| rules(&reply.body).to_vec()).unwrap_or_default();
    let mode = mode::before(&client).ok().flatten();
    let space = space::before(&client).map(|before| before.all()).unwrap_or_default();
    let commands = mode.into_iter().chain(space).map(|words| session.undo(&words));
    rules.iter().filter(is_rule).map(|rule| undo_of(session, rule)).chain(commands).collect()
}

fn names(body: &Value, key: &str) -> String {
    let names = body.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    names.collect::<Vec<_>>().join(", ")
}

fn wait(session: &Session, args: &WaitArgs) -> Result<Outcome, ClientError> {
    let path = with_query(
        &format!("{}/wait", path_of(&args.name)),
        [
            ("injections", Some(args.injections.to_string())),
            ("since", args.since.clone()),
            ("for", Some(args.limit.text.clone())),
        ],
    );
    // The daemon keeps the time; this side only gives up on a daemon that has stopped keeping it.
    let client = session.patient(Some(args.limit.length.saturating_add(Duration::from_secs(10))))?;
    let reply = client.get(&path)?;
    let body = &reply.body;
    if body.get("fired").and_then(Value::as_bool) == Some(true) {
        let lines = body.get("event").filter(|event| event.is_object()).map(events::line);
        return Ok(shown(reply.clone(), lines.into_iter().collect()));
    }
    let complaint = format!(
        "error: rule {} has not fired {} within {}: {} matches, state {}",
        args.name,
        if args.injections == 1 { "once".to_owned() } else { format!("{} times", args.injections) },
        args.limit.text,
        body.get("matches").and_then(Value::as_u64).unwrap_or_default(),
        field(body, "state"),
    );
    Ok(Outcome { complaints: vec![complaint], exit: exit::TIMED_OUT, ..shown(reply, Vec::new()) })
}

fn release(session: &Session, name: &str, count: Option<u64>) -> Result<Outcome, ClientError> {
    let reply = session.client.post(&format!("{}/release", path_of(name)), &given(vec![("count", json!(count))]))?;
    let released = reply.body.get("released").and_then(Value::as_u64).unwrap_or_default();
    let what = format!("{released} requests go on; rule {name} is as before");
    Ok(changed(
        reply,
        what,
        vec![format!("undo: none; to stall no more: {}", session.command(&format!("rule rm {}", quoted(name))))],
    ))
}

/// A rule set from a file: `[[rules]]` or a single rule in TOML, the same in JSON, or what `rule list --json` printed.
pub fn load(file: &str) -> Result<Value, ClientError> {
    let mut text = String::new();
    let read = match file {
        "-" => std::io::stdin().read_to_string(&mut text),
        file => std::fs::File::open(file).and_then(|mut open| open.read_to_string(&mut text)),
    };
    read.map_err(|error| ClientError::failed(format!("{file}: {error}")))?;
    rule_file::parse(&text).map_err(|error| ClientError::failed(format!("{file}: {error}")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::super::{Cli, Verb};
    use super::*;

    /// What a rule says, in words: without what is nothing, and without what is so when nobody says it.
    fn said(rule: &Value) -> BTreeMap<String, String> {
        let usual = ["probability=1", "skip=0", "every=1", "per=mount", "enabled=true", "required=false"];
        let mut said = BTreeMap::new();
        for (section, value) in rule.as_object().unwrap() {
            let fields = match value {
                Value::Object(fields) => fields.clone(),
                other => Map::from_iter([(String::new(), other.clone())]),
            };
            for (name, value) in fields {
                let name = if name.is_empty() { section.clone() } else { name };
                let text = word(&value);
                let switch = ["any", "force", "heal_on_write"].contains(&name.as_str()) && text == "false";
                if !text.is_empty() && !switch && !usual.contains(&format!("{name}={text}").as_str()) {
                    said.insert(format!("{section}/{name}"), text);
                }
            }
        }
        said
    }

    fn word(value: &Value) -> String {
        match value {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            Value::Array(items) => items.iter().map(word).collect::<Vec<_>>().join(","),
            Value::Object(fields) => fields.values().map(word).collect::<Vec<_>>().join("="),
            other => other.to_string().trim_end_matches(".0").to_owned(),
        }
    }

    fn fault() -> impl Strategy<Value = Value> {
        let switch = || any::<Option<bool>>();
        let numbers = || (1..u64::MAX, -1_000_000i64..1_000_000, 0.0..1.0);
        prop_oneof![
            switch().prop_map(|force| json!({"kind": "error", "errno": "EIO", "force": force, "any": false})),
            numbers()
                .prop_map(|(n, _, _)| json!({"kind": "error", "errors": [{"errno": "EIO", "weight": n}, "EPERM"]})),
            numbers().prop_map(|(_, _, part)| json!({"kind": "short", "fraction": part})),
            numbers().prop_map(|(n, _, _)| json!({"kind": "corrupt", "mode": "bitflip", "bits": n, "length": n})),
            numbers().prop_map(|(_, by, _)| json!({"kind": "misdirect", "offset_delta": by})),
            numbers().prop_map(|(n, by, _)| json!({"kind": "attr", "uid": n, "mtime": by, "perm": "0600"})),
            switch()
                .prop_map(|heals| json!({"kind": "bad_sectors", "ranges": ["0..1", "4KiB.."], "heal_on_write": heals})),
            select(vec!["20%3*return(EIO)->sleep(10ms)", "pause", "'\"$HOME\"'"]).prop_map(Value::from),
        ]
    }

    fn place() -> impl Strategy<Value = Value> {
        let text = || prop::option::of("[-a-z*'\" $=,\\\\é]{1,8}");
        (text(), text(), text(), any::<Option<u32>>(), any::<Option<bool>>()).prop_map(|(path, regex, comm, id, direct)| {
            let path = path.map(|path| format!("/{path}"));
            json!({"ops": ["write", "grow"], "path": path, "path_regex": regex, "comm": comm, "pid": id, "tree": id, "uid": id,
                "gid": id, "offset": "0..1MiB", "length": null, "direct": direct, "type": "file"})
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// What `rule show` and each undo tell makes the rule that it is told of.
        #[test]
        fn the_command_of_a_rule_makes_that_rule(fault in fault(), place in place(), n in any::<Option<u64>>(), chance in 0.0..=1.0,
            on in any::<[bool; 2]>(), labels in prop::collection::btree_map("[-a-z= ]{0,4}", "[-a-z= '\"\0]{0,4}", 0..3)) {
            let trigger = json!({"probability": chance, "skip": n.unwrap_or(0), "every": 1, "times": n, "per": "file", "after": "1s",
                "after_bytes": n, "after_rule": "other", "for": "5m", "up": "1s", "down": "2s 3ms", "seed": n});
            let rule = json!({"name": "r", "enabled": on[0], "required": on[1], "match": place, "trigger": trigger,
                "fault": fault, "labels": labels});
            let untold = labels.iter().any(|(key, value)| key.is_empty() || key.contains('=') || value.contains('\0'));
            let Some(words) = command(&rule) else {
                prop_assert!(untold, "{}", rule);
                return Ok(());
            };
            let words = shlex::split(&format!("nemesisfs {words}")).unwrap();
            let parsed = Cli::try_parse_from(&words).map_err(|error| TestCaseError::fail(format!("{words:?}: {error}")))?;
            let Verb::Rule(RuleCommand::Add(args)) = parsed.verb else { panic!("{words:?}") };
            prop_assert_eq!(said(&args.spec()), said(&rule));
        }
    }
}
