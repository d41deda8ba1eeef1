//! What is told of devices: each as its record and the kernel have it.
//!
//! On a helper thread; takes no lock, so that it answers while an operation hangs. Must never: look at a mountpoint.

use std::time::Duration;

use serde_json::{Value, json};

use super::asked::Ground;
use super::holders::Users;
use super::record::Record;
use super::{PART, Refused, disk, filesystem, mapping};
use crate::host::state::Deadline;
use crate::host::{Machine, shown};

/// All devices, and what this host can do.
pub fn all(machine: &Machine) -> Value {
    let records: Vec<Record> = machine.state.peek(PART);
    let devices: Vec<Value> = records.iter().map(describe).collect();
    let missing = mapping::supports("flakey").err();
    let host = json!({
        "supported": missing.is_none(), "missing": missing.as_ref().map(|refused| &refused.detail),
        "hint": missing.as_ref().and_then(|refused| refused.hint.as_ref()),
        "targets": if missing.is_none() { mapping::targets() } else { Vec::new() },
    });
    json!({"devices": devices, "host": host})
}

/// One device, with those who use it.
///
/// # Errors
/// When there is none.
pub fn one(machine: &Machine, name: &str) -> Result<Value, Refused> {
    let records: Vec<Record> = machine.state.peek(PART);
    let record = records.iter().find(|record| record.name == name).ok_or_else(|| super::not_found(name))?;
    let mut document = describe(record);
    if let Some(mapping) = record.mapping() {
        let users = Users::of(record, &mapping, &filesystem::mounts_of(record, &mapping));
        document["holders"] = users.describe();
    }
    Ok(document)
}

/// The document of a device after a change.
pub fn done(record: &Record, commands: Vec<String>, undo: Option<String>, warnings: Vec<String>) -> Value {
    let mut answer = describe(record);
    answer["commands"] = commands.into();
    answer["undo"] = undo.into();
    answer["warnings"] = warnings.into();
    answer
}

/// The document of a device.
pub fn describe(record: &Record) -> Value {
    let mapping = record.mapping();
    let mounts = mapping.as_ref().map(|mapping| filesystem::mounts_of(record, mapping)).unwrap_or_default();
    let (table, status) = mapping.as_ref().map(|mapping| mapping::table_and_status(&mapping.name)).unwrap_or_default();
    let mut document = json!({
        "name": record.name, "device": shown(record.device()), "state": record.state(),
        "mode": record.mode.text(), "in_force": table.as_ref().map(|table| record.mode.is_in(table)), "command": record.mode.command(), "remaining": remaining(record.until.as_ref()),
        "suspended": mapping.as_ref().is_some_and(|mapping| mapping.is_suspended),
        "resumes_in": remaining(record.stall.as_ref().and_then(|stall| stall.until.as_ref())),
        "size": disk::bytes(record.sectors), "on": shown(record.data.ground.path()),
        "loop_device": record.data.loop_device.as_deref().map(shown),
        "made": matches!(record.data.ground, Ground::NewImage(..)), "filesystem": record.definition.filesystem.word(),
        "mountpoint": record.definition.mountpoint.as_deref().map(shown),
        "mounts": mounts.iter().map(|mount| shown(&mount.mountpoint)).collect::<Vec<_>>(),
        "table": table, "status": status, "trouble": record.trouble,
    });
    if let Some(log) = &record.log {
        let status = record.log_mapping().and_then(|mapping| mapping::table_and_status(&mapping.name).1);
        document["log"] = json!({"on": shown(log.ground.path()), "loop_device": log.loop_device.as_deref().map(shown), "status": status});
    }
    document
}

fn remaining(until: Option<&Deadline>) -> Option<String> {
    let left = until?.left();
    let whole = Duration::from_millis(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    Some(humantime::format_duration(whole).to_string())
}
