//! `list`: the instances of this host and their state, and mounts that no living instance serves.
//!
//! Thread: one for each instance while it is asked. Locks: those of the state files, for an instant. Must never: look
//! at a mountpoint but by `mounts::is_disconnected`, for a hanging one would keep the list from being told.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Client, ClientError, Host, host};
use crate::exit;
use crate::instances::{self, Instance};
use crate::sys::mounts::{self, Mount};

use super::session::World;
use super::table;

const HEAD: [&str; 9] = ["INSTANCE", "STATE", "MODE", "RULES", "MOUNTPOINT", "BACKING", "PID", "SOCKET", "SEED"];

pub fn run(world: &World) -> u8 {
    match rows(world) {
        Ok(rows) => {
            print(world, &rows);
            exit::DONE
        }
        Err(error) => world.console.error(&error),
    }
}

fn rows(world: &World) -> Result<Vec<Value>, ClientError> {
    let limit = world.globals.connect_timeout.length;
    if !world.globals.host.is_empty() {
        let targets = host::resolve(&world.globals.host, world.run_dir)?;
        return Ok(in_parallel(&targets, |target| ask(&target.host, limit, json!({"instance": target.name}))));
    }
    let told = |what: &str, error: std::io::Error| ClientError::failed(format!("{what}: {error}"));
    let found = instances::list(world.run_dir).map_err(|error| told(&world.run_dir.display().to_string(), error))?;
    let mounts = mounts::all().map_err(|error| told("/proc/self/mountinfo", error))?;
    let others: Vec<&Mount> = mounts.iter().filter(|mount| is_not_owned(mount, &found)).collect();
    let of_others: Vec<(&Mount, Value)> =
        others.iter().copied().zip(in_parallel(&others, |mount| of_mount(mount))).collect();
    let is_stale = |mount: &Mount| of_others.iter().any(|(other, row)| *other == mount && row["state"] == "stale");
    // Of a dead one whose place another has taken, nothing is left that somebody could want to know or clean.
    let is_replaced = |dead: &Instance| {
        let mut there =
            mounts.iter().filter(|mount| mount.instance().is_some() && dead.is_mounted_at(&mount.mountpoint));
        there.any(|mount| !is_stale(mount))
    };
    let shown: Vec<&Instance> = found.iter().filter(|instance| instance.alive || !is_replaced(instance)).collect();
    let mut rows = in_parallel(&shown, |instance| of_instance(instance, limit));
    let is_told = |mount: &Mount| is_stale(mount) && shown.iter().any(|dead| !dead.alive && dead.has_left(mount));
    rows.extend(of_others.iter().filter(|(mount, _)| !is_told(mount)).map(|(_, row)| row.clone()));
    Ok(rows)
}

/// The instances are asked at once, so that several that hang take no longer than one.
fn in_parallel<T: Sync>(items: &[T], ask: impl Fn(&T) -> Value + Sync) -> Vec<Value> {
    std::thread::scope(|scope| {
        let ask = &ask;
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(move || ask(item))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

fn of_instance(instance: &Instance, limit: Duration) -> Value {
    let state = &instance.state;
    let mut row = json!({
        "instance": state.instance, "state": "dead", "mode": null, "rules": null, "mountpoint": state.mountpoint,
        "backing": state.backing, "pid": state.pid, "socket": state.socket, "log": state.log, "seed": null,
    });
    if instance.alive {
        row = ask(&Host::Unix(state.socket.clone()), limit, row);
    }
    row
}

/// Adds what the daemon itself says.
fn ask(host: &Host, limit: Duration, mut row: Value) -> Value {
    let health = Client::new(host.clone(), limit)
        .map(|client| client.answer_within(Some(limit)))
        .and_then(|client| client.get("/v1/health"));
    let Ok(health) = health else {
        row["state"] = json!("unresponsive");
        return row;
    };
    let detached = health.body.get("mounted") == Some(&json!(false));
    row["state"] = json!(if detached { "detached" } else { "alive" });
    for key in ["instance", "mode", "rules", "mountpoint", "backing", "pid", "socket", "log", "seed"] {
        if let Some(value) = health.body.get(key) {
            row[key] = value.clone();
        }
    }
    row
}

/// A mount of ours that no living instance owns, as far as the state files of this run directory tell.
fn is_not_owned(mount: &Mount, instances: &[Instance]) -> bool {
    let Some(name) = mount.instance() else {
        return false;
    };
    let owns = |instance: &Instance| {
        instance.alive
            && instance.state.instance == name
            && instance.serves(mount)
            && instance.is_mounted_at(&mount.mountpoint)
    };
    !instances.iter().any(owns)
}

/// Of one that answers the daemon lives, and keeps its state in another run directory.
fn of_mount(mount: &Mount) -> Value {
    let state = if mounts::is_disconnected(&mount.mountpoint) { "stale" } else { "elsewhere" };
    json!({
        "instance": mount.instance(), "state": state, "mode": null, "rules": null, "mountpoint": mount.mountpoint.to_string_lossy(),
        "backing": null, "pid": null, "socket": null, "log": null, "seed": null,
    })
}

fn print(world: &World, rows: &[Value]) {
    if world.console.json {
        let _ = world.console.document(&json!({"instances": rows}));
        return;
    }
    let lines = match rows {
        [] => vec![nothing(world.run_dir)],
        rows => table::lines(&HEAD, &rows.iter().map(cells).collect::<Vec<_>>()),
    };
    for line in lines {
        if world.console.line(&line).is_err() {
            break;
        }
    }
}

fn nothing(run_dir: &Path) -> String {
    format!("no instances (looked in {})", run_dir.display())
}

fn cells(row: &Value) -> Vec<String> {
    let cell = |name: &&str| match row.get(name.to_lowercase()) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        // Whether rules are told by number or by name, a table has room for the number.
        Some(Value::Array(items)) => items.len().to_string(),
        Some(other) => other.to_string(),
    };
    HEAD.iter().map(cell).collect()
}
