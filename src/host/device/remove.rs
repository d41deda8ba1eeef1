//! Takes a device away, from every state in which one can be: half made, standing still, failing, half removed, gone with
//! the last boot.
//!
//! On a helper thread or the `machine` thread, under the lock of the record. Each step is done only if there is something to
//! do, so that the whole can be repeated. Must never: remove what is not ours by its identity.

use std::fs;
use std::io;

use serde_json::{Value, json};

use super::filesystem;
use super::holders::{self, Stopped, Users};
use super::mapping::Mapping;
use super::record::{Record, Stage};
use super::table::Wanted;
use super::{Job, Refused, change, mapping};
use crate::host::Machine;
use crate::host::state::is_name;
use crate::host::tool::{ask, line};

/// What is not there is removed, which is no answer. With `kill` those who use it are killed; `umount` ends mounts of ours on top.
///
/// # Errors
/// When somebody uses it; then it is as it was.
pub fn remove(machine: &Machine, name: &str, kill: bool, umount: bool) -> Result<Option<Value>, Refused> {
    if !is_name(name) {
        return Ok(None);
    }
    let mut job = Job::begin(machine, name)?;
    let Some(record) = job.find(name)? else { return Ok(None) };
    if let Some(mapping) = record.mapping() {
        free(&mut job, &record, &mapping, kill, umount)?;
        leave(&mut job, &record, &mapping)?;
    }
    take_back(&mut job, record.clone(), true)?;
    job.tell(&record, "removed");
    Ok(Some(json!({"name": name, "removed": true, "commands": job.tools.lines, "warnings": job.warnings})))
}

/// All devices. One that somebody uses stays, with nothing wrong with it. What came of each, by name.
pub fn remove_all(machine: &Machine) -> Vec<(String, Result<(), String>)> {
    let records: Vec<Record> = machine.state.peek(super::PART);
    let each = records.into_iter().map(|record| {
        let result = remove(machine, &record.name, false, false).map(drop);
        if result.is_err() {
            // As far as it goes: what stands in the way was told.
            let _ = change::resume(machine, &record.name);
            let _ =
                change::set_mode(machine, &record.name, &Wanted { mode: "allow_writes".into(), ..Wanted::default() });
        }
        (record.name, result.map_err(|refused| refused.to_string()))
    });
    each.collect()
}

/// Nobody uses it after this. Mounts that we did not make are in the way as processes are.
fn free(job: &mut Job, record: &Record, mapping: &Mapping, kill: bool, umount: bool) -> Result<(), Refused> {
    let mounts = filesystem::mounts_of(record, mapping);
    let ours = |mount: &crate::sys::mounts::Mount| record.definition.mountpoint.as_ref() == Some(&mount.mountpoint);
    if let (false, Some(other)) = (kill, mounts.iter().find(|mount| !ours(mount))) {
        let place = other.mountpoint.display();
        let detail = format!("device {} is mounted at {place}, not by us", record.name);
        return Err(Refused::new(super::Kind::Busy, detail).hint(format!("umount {place}, or remove with --kill")));
    }
    if let Some(other) = holders::stacked(mapping) {
        return Err(Refused::new(super::Kind::Busy, format!("device {} is in use: {other}", record.name)));
    }
    let mut users = Users::of(record, mapping, &mounts);
    if umount {
        users.add_clients();
    }
    let in_the_way = (!users.processes.is_empty() && !kill) || (!users.instances.is_empty() && !umount);
    if in_the_way || users.has_ourselves() {
        return Err(users.refuse(&record.name, &format!("nemesisfs device remove {}", record.name)));
    }
    resume(job, mapping)?;
    if !users.processes.is_empty() {
        job.tools.lines.push(users.command("KILL"));
        users.kill_processes();
    }
    users.end_instances()
}

/// Unmounts; if somebody still has the device, whom no look at processes shows, it is mounted again.
fn leave(job: &mut Job, record: &Record, mapping: &Mapping) -> Result<(), Refused> {
    let mounts = filesystem::mounts_of(record, mapping);
    filesystem::unmount_all(&mut job.tools, &mounts, false)?;
    let Err(refused) = holders::released(record, mapping) else { return Ok(()) };
    for was in filesystem::to_mount_again(record, &mounts).unwrap_or_default() {
        if let Err(also) = filesystem::mount_again(&mut job.tools, &record.device(), &was) {
            let detail =
                format!("{refused}; and it could not be mounted again at {}: {also}", was.mountpoint.display());
            return Err(Refused { detail, ..refused });
        }
    }
    Err(refused)
}

/// What stands still cannot be unmounted.
fn resume(job: &mut Job, mapping: &Mapping) -> Result<(), Refused> {
    if mapping.is_suspended {
        job.tools.run(&["dmsetup", "resume", &mapping.name])?;
    }
    Ok(())
}

/// Takes back everything of ours that is there, and the record last. With `unmounting` a mount that is busy is an error.
pub fn take_back(job: &mut Job, mut record: Record, announced: bool) -> Result<(), Refused> {
    if announced {
        record.stage = Stage::Removing;
        job.save(&record)?;
    }
    if let Some(mapping) = record.mapping() {
        resume(job, &mapping)?;
        filesystem::unmount_all(&mut job.tools, &filesystem::mounts_of(&record, &mapping), false)?;
        remove_mapping(job, &mapping)?;
    }
    if let Some(mapping) = record.log_mapping() {
        remove_mapping(job, &mapping)?;
    }
    record.data.unmake(&mut job.tools)?;
    if let Some(log) = &mut record.log {
        log.unmake(&mut job.tools)?;
    }
    remove_mountpoint(job, &record);
    record.stopped.iter().for_each(Stopped::go_on);
    job.part.remove(&record.name).map_err(super::at(format!("the state of device {}", record.name)))
}

/// One that was killed between the mapping and its table is there without either, and has to be told so.
fn remove_mapping(job: &mut Job, mapping: &Mapping) -> Result<(), Refused> {
    mapping::remove(&mut job.tools, &mapping.name)?;
    // Without udev the node stays for what does not exist.
    if mapping::node(&mapping.name).exists() {
        let _ = ask(&["dmsetup", "mknodes", &mapping.name]);
    }
    Ok(())
}

/// Only if it was not there before, and is empty.
fn remove_mountpoint(job: &mut Job, record: &Record) {
    let Some(mountpoint) = record.definition.mountpoint.as_ref().filter(|_| record.mountpoint_made) else { return };
    match fs::remove_dir(mountpoint) {
        Ok(()) => job.tools.lines.push(line(&["rmdir".as_ref(), mountpoint.as_os_str()])),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => job.warnings.push(format!("{} stays: {error}", mountpoint.display())),
    }
}
