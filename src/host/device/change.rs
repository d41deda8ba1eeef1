//! Changes what is wrong with a device: its mode, and whether it stands still; and ends both when their time has come.
//!
//! On a helper thread, and `expire` on the `machine` thread; under the lock of the part. The record is written before the
//! table is exchanged: a time that was set is kept by every daemon, whatever becomes of this one.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::mapping::{self, Mapping, Quiet};
use super::record::{Record, Stage, Stall};
use super::table::{Mode, Wanted, Word};
use super::{Job, PART, Refused, duration, filesystem, invalid, remove};
use crate::host::Machine;
use crate::host::state::Deadline;

/// # Errors
/// With the place of what makes no sense, what the kernel lacks, or what dmsetup said; then it is as it was.
pub fn set_mode(machine: &Machine, name: &str, wanted: &Wanted) -> Result<Value, Refused> {
    let mode = Mode::of(wanted)?;
    let life = wanted.r#for.as_deref().map(|text| duration("for", text)).transpose()?;
    if life.is_some() && mode.is_idle() {
        return Err(invalid("for", "for: allow_writes has no end, it is what modes go back to"));
    }
    let mut job = Job::begin(machine)?;
    let mut record = job.ready(name)?;
    mapping::supports(mode.target())?;
    job.warnings.extend(mode.warnings());
    let old = std::mem::replace(&mut record.mode, mode);
    let was_until = std::mem::replace(&mut record.until, life.map(Deadline::after));
    let quiet = match (wanted.sync_fs, wanted.no_lockfs) {
        (false, _) => Quiet::AsItIs,
        (true, true) => Quiet::Synced,
        (true, false) => Quiet::Frozen,
    };
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

/// Puts the record's mode in force.
pub(super) fn exchange(job: &mut Job, record: &Record, quiet: Quiet) -> Result<(), Refused> {
    let mapping = mapping_of(record)?;
    if quiet == Quiet::Synced {
        filesystem::sync(&mut job.tools, &filesystem::mounts_of(record, &mapping))?;
    }
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
    let mut job = Job::begin(machine)?;
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
    let mut job = Job::begin(machine)?;
    let mut record = job.ready(name)?;
    go_on(&mut job, &mut record)?;
    job.tell(&record, "resumed");
    Ok(job.done(&record, Some(format!("device suspend {name}"))))
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

/// Ends what has a time when that has come, and takes back devices whose making was broken off, whoever began it.
pub fn expire(machine: &Machine) {
    // Somebody is at it, perhaps making what seems half made.
    let Ok(Some(part)) = machine.state.try_part(PART) else { return };
    let mut job = Job::on(machine, part);
    let records: Vec<Record> = job.part.all();
    for record in records.into_iter().filter(|record| left(record).is_some_and(|left| left.is_zero())) {
        let name = record.name.clone();
        if let Err(error) = end(&mut job, record) {
            tracing::error!(device = name, %error, "what has come to its end cannot be ended");
        }
    }
}

/// How long until there is something to end. A device that is half made has nobody who makes it, if its lock can be had.
fn left(record: &Record) -> Option<Duration> {
    if record.stage == Stage::Creating {
        return Some(Duration::ZERO);
    }
    if record.stage != Stage::Ready || record.mapping().is_none() {
        return None;
    }
    let stall = record.stall.as_ref().and_then(|stall| stall.until.as_ref());
    [record.until.as_ref(), stall].into_iter().flatten().map(Deadline::left).min()
}

fn end(job: &mut Job, mut record: Record) -> Result<(), Refused> {
    if record.stage == Stage::Creating {
        remove::take_back(job, record.clone(), false)?;
        job.tell(&record, "taken_back");
        return Ok(());
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
