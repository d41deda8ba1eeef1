//! Changes what is wrong with a device: its mode, and whether it stands still; and ends both when their time has come.
//!
//! On a helper thread, and what `expire` ends on one for each device; under the lock of the record. The record is written
//! before the table is exchanged: a time that was set is kept by every daemon, whatever becomes of this one. Must never:
//! wait under the lock for a filesystem, which may wait for what has to be ended.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::mapping::{self, Mapping, Quiet};
use super::record::{Record, Stage, Stall};
use super::table::{Mode, Wanted, Word};
use super::{Job, PART, Refused, cut, duration, filesystem, invalid, remove};
use crate::host::Machine;
use crate::host::state::Deadline;
use crate::host::tool::Tools;

/// # Errors
/// With the place of what makes no sense, what the kernel lacks, or what dmsetup said; then it is as it was.
pub fn set_mode(machine: &Machine, name: &str, wanted: &Wanted) -> Result<Value, Refused> {
    let mode = Mode::of(wanted)?;
    let life = wanted.r#for.as_deref().map(|text| duration("for", text)).transpose()?;
    if life.is_some() && mode.is_idle() {
        return Err(invalid("for", "for: allow_writes has no end, it is what modes go back to"));
    }
    let quiet = match (wanted.sync_fs, wanted.no_lockfs) {
        (false, _) => Quiet::AsItIs,
        (true, true) => Quiet::Synced,
        (true, false) => Quiet::Frozen,
    };
    let mut synced = Tools::default();
    if quiet == Quiet::Synced {
        sync(machine, name, &mut synced)?;
    }
    let mut job = Job::begin(machine, name)?;
    let mut record = job.ready(name)?;
    mapping::supports(mode.target())?;
    if quiet != Quiet::AsItIs {
        goes_on(&record)?;
    }
    job.tools.lines.extend(synced.lines);
    job.warnings.extend(mode.warnings());
    let old = std::mem::replace(&mut record.mode, mode);
    let was_until = std::mem::replace(&mut record.until, life.map(Deadline::after));
    if let Err(refused) = exchange(&mut job, &record, quiet) {
        // As it was; a time that had been set still comes.
        let _ = job.save(&Record { mode: old, until: was_until, ..record });
        return Err(refused);
    }
    let cycle = json!({"for": wanted.r#for, "up": wanted.up, "down": wanted.down});
    job.tell_more(&record, "mode", cycle);
    let undo = if old == record.mode { "allow_writes".into() } else { old.command() };
    let undo = (record.mode.command() != undo).then(|| format!("device mode {name} {undo}"));
    Ok(job.done(&record, undo))
}

/// Before the lock is taken, for it may wait as long as the device does.
fn sync(machine: &Machine, name: &str, tools: &mut Tools) -> Result<(), Refused> {
    let _at_work = machine.begin();
    let record = Job::begin(machine, name)?.ready(name)?;
    let mapping = goes_on(&record)?;
    filesystem::sync(tools, &filesystem::mounts_of(&record, &mapping))
}

/// # Errors
/// When it stands still: then nothing can be written, and so nothing saved.
fn goes_on(record: &Record) -> Result<Mapping, Refused> {
    let mapping = mapping_of(record)?;
    match mapping.is_suspended {
        false => Ok(mapping),
        true => {
            let detail = format!("device {} is suspended: its filesystem cannot be synchronised", record.name);
            Err(Refused::conflict(detail)
                .hint(format!("nemesisfs device resume {}, or leave out --sync-fs", record.name)))
        }
    }
}

/// Puts the record's mode in force.
pub(super) fn exchange(job: &mut Job, record: &Record, quiet: Quiet) -> Result<(), Refused> {
    let mapping = mapping_of(record)?;
    job.save(record)?;
    mapping::switch(&mut job.tools, &mapping, &record.mode, &record.table(), quiet)
}

pub(super) fn mapping_of(record: &Record) -> Result<Mapping, Refused> {
    record.mapping().ok_or_else(|| Refused::conflict(format!("the mapping of device {} is gone", record.name)))
}

/// For how long a device stands still.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskedStall {
    #[serde(default)]
    r#for: Option<String>,
}

/// The whole device stands still: requests wait, and nothing fails.
///
/// # Errors
/// When there is none, or dmsetup says no.
pub fn suspend(machine: &Machine, name: &str, asked: &AskedStall) -> Result<Value, Refused> {
    let life = asked.r#for.as_deref().map(|text| duration("for", text)).transpose()?;
    let mut job = Job::begin(machine, name)?;
    let mut record = job.ready(name)?;
    let mapping = mapping_of(&record)?;
    record.stall = Some(Stall { until: life.map(Deadline::after) });
    job.save(&record)?;
    if !mapping.is_suspended
        && let Err(error) = job.tools.run(&["dmsetup", "suspend", "--nolockfs", "--noflush", name])
    {
        let _ = job.tools.run(&["dmsetup", "resume", name]);
        record.stall = None;
        let _ = job.save(&record);
        return Err(error.into());
    }
    job.tell_more(&record, "suspended", json!({"for": asked.r#for}));
    Ok(job.done(&record, Some(format!("device resume {name}"))))
}

/// It goes on; one that did is no error.
///
/// # Errors
/// When there is none, or dmsetup says no.
pub fn resume(machine: &Machine, name: &str) -> Result<Value, Refused> {
    let mut job = Job::begin(machine, name)?;
    let mut record = job.ready(name)?;
    let stood = record.stall.is_some() || mapping_of(&record)?.is_suspended;
    go_on(&mut job, &mut record)?;
    if stood {
        job.tell(&record, "resumed");
    }
    Ok(job.done(&record, stood.then(|| format!("device suspend {name}"))))
}

pub(super) fn go_on(job: &mut Job, record: &mut Record) -> Result<(), Refused> {
    if mapping_of(record)?.is_suspended {
        job.tools.run(&["dmsetup", "resume", &record.name])?;
    }
    record.stall = None;
    job.save(record)
}

/// How long until something of a device is to end. Zero is now.
pub fn due(machine: &Machine) -> Option<Duration> {
    machine.state.peek::<Record>(PART).iter().filter_map(left).min()
}

/// Ends what has a time when that has come, and takes back devices whose making was broken off, whoever began it. Each on
/// a thread of its own, for which nobody waits: one that hangs holds up no other.
pub fn expire(machine: &Arc<Machine>) {
    let records = machine.state.peek::<Record>(PART);
    for record in records.into_iter().filter(has_come) {
        // Somebody is at it, perhaps making what seems half made.
        let Ok(Some(part)) = machine.state.try_document(PART, &record.name) else { continue };
        let (own, name) = (machine.clone(), record.name);
        let ending = move || end_one(&mut Job::on(&own, part), &name);
        if let Err(error) = std::thread::Builder::new().name("helper".into()).spawn(ending) {
            tracing::error!(%error, "what has come to its end cannot be ended");
        }
    }
}

fn has_come(record: &Record) -> bool {
    left(record).is_some_and(|left| left.is_zero())
}

/// It may have been ended since it was looked at. What cannot be ended is told once, and tried again.
fn end_one(job: &mut Job, name: &str) {
    let record = match job.find(name) {
        Ok(found) => found.filter(has_come),
        Err(error) => return tracing::error!(device = name, %error, "what has come to its end cannot be ended"),
    };
    let Some(record) = record else { return };
    let Err(refused) = end(job, record) else { return };
    let Ok(Some(record)) = job.find(name) else { return };
    let trouble = Some(refused.to_string());
    if record.trouble != trouble && job.save(&Record { trouble, ..record.clone() }).is_ok() {
        tracing::error!(device = name, error = %refused, "what has come to its end cannot be ended");
        job.tell_more(&record, "not_ended", json!({"error": refused.to_string()}));
    }
}

/// How long until there is something to end. A device that is half made has nobody who makes it, if its lock can be had;
/// one that stands still without having been told so has nobody who goes on with its table; and who was stopped has nobody
/// who kills him.
fn left(record: &Record) -> Option<Duration> {
    if record.stage == Stage::Creating || !record.stopped.is_empty() || is_stuck(record) {
        return Some(Duration::ZERO);
    }
    if record.stage != Stage::Ready || record.mapping().is_none() {
        return None;
    }
    let stall = record.stall.as_ref().and_then(|stall| stall.until.as_ref());
    [record.until.as_ref(), stall].into_iter().flatten().map(Deadline::left).min()
}

fn is_stuck(record: &Record) -> bool {
    record.stall.is_none() && record.mapping().is_some_and(|mapping| mapping.is_suspended)
}

fn end(job: &mut Job, mut record: Record) -> Result<(), Refused> {
    if record.stage == Stage::Creating {
        remove::take_back(job, record.clone(), false)?;
        job.tell(&record, "taken_back");
        return Ok(());
    }
    record.trouble = None;
    if !record.stopped.is_empty() {
        let pids = cut::go_on_with_stopped(job, &mut record)?;
        job.tell_more(&record, "continued", json!({"pids": pids, "reason": "left stopped"}));
    }
    if is_stuck(&record) {
        go_on(job, &mut record)?;
        job.tell_more(&record, "resumed", json!({"reason": "left suspended"}));
    }
    if record.stall.as_ref().and_then(|stall| stall.until.as_ref()).is_some_and(Deadline::has_passed) {
        go_on(job, &mut record)?;
        job.tell_more(&record, "resumed", json!({"reason": "expired"}));
    }
    if record.until.as_ref().is_some_and(Deadline::has_passed) {
        let old = std::mem::replace(&mut record.mode, Mode::from(Word::AllowWrites));
        // The time stays in the file until it is done.
        let mapping = mapping_of(&record)?;
        mapping::switch(&mut job.tools, &mapping, &record.mode, &record.table(), Quiet::AsItIs)?;
        record.until = None;
        job.save(&record)?;
        job.tell_more(&record, "expired", json!({"was": old.text()}));
    }
    Ok(())
}
