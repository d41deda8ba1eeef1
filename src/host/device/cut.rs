//! The power fails: what was not written is lost, who held files is gone, and the filesystem is mounted again as after a
//! start.
//!
//! On a helper thread, under the lock of the record. Each step is in the record or the kernel when it is done, so that a cut
//! that failed in the middle, or whose daemon was killed, is finished by another `cut`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::change::{exchange, go_on, mapping_of};
use super::filesystem;
use super::holders::{self, Stopped, Users};
use super::mapping::{Mapping, Quiet};
use super::record::{Record, Stage};
use super::table::{Mode, Word};
use super::{Job, Kind, Refused};
use crate::host::Machine;

/// What may be done to those who use the device.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskedCut {
    /// Processes are killed.
    #[serde(default)]
    kill: bool,
    /// Mounts of ours on top are unmounted, which ends their daemons.
    #[serde(default)]
    umount: bool,
    /// What is still in use is detached.
    #[serde(default)]
    lazy: bool,
}

/// # Errors
/// When somebody uses it who may not be stopped: then nothing was done. When a step fails: then the device drops writes,
/// and `steps` says what was done.
pub fn cut(machine: &Machine, name: &str, asked: AskedCut) -> Result<Value, Refused> {
    let mut job = Job::begin(machine, name)?;
    let mut record = job.ready(name)?;
    let mapping = mapping_of(&record)?;
    let mounts = filesystem::mounts_of(&record, &mapping);
    let mut users = look(&record, &mapping, asked);
    let stays =
        (!users.processes.is_empty() && !asked.kill && !asked.lazy) || (!users.instances.is_empty() && !asked.umount);
    if stays || users.has_ourselves() {
        return Err(users.refuse(name, &format!("nemesisfs device cut {name}")));
    }
    if let Some(other) = holders::stacked(&mapping) {
        return Err(Refused::new(Kind::Busy, format!("device {name} is in use: {other}")));
    }
    let again = filesystem::to_mount_again(&record, &mounts)?;
    // A cut that goes on has unmounted some already.
    record.mounts.retain(|was| again.iter().all(|now| now.mountpoint != was.mountpoint));
    record.mounts.splice(0..0, again);
    let mut steps = Vec::new();
    match lose(&mut job, &mut record, asked, &mut users, &mut steps) {
        Ok(()) => {
            job.tell(&record, "cut");
            let mut answer = job.done(&record, None);
            answer["steps"] = steps.into();
            Ok(answer)
        }
        Err(refused) => {
            let detail =
                format!("the cut of {name} stopped after {}: {refused}", steps.last().map_or("nothing", |step| step));
            let hint = format!("the device drops writes; nemesisfs device cut {name} goes on");
            let (commands, steps) = (job.tools.lines.clone(), steps.clone());
            Err(Refused { detail, ..refused }.hint(hint).with("steps", steps.into()).with("commands", commands.into()))
        }
    }
}

/// Those who may have to go.
fn look(record: &Record, mapping: &Mapping, asked: AskedCut) -> Users {
    let mut users = Users::of(record, mapping, &filesystem::mounts_of(record, mapping));
    if asked.umount {
        users.add_clients();
    }
    users
}

fn lose(
    job: &mut Job,
    record: &mut Record,
    asked: AskedCut,
    users: &mut Users,
    steps: &mut Vec<String>,
) -> Result<(), Refused> {
    let mut did = |job: &Job, record: &Record, step: &str| {
        job.tell_more(record, "cutting", json!({"step": step}));
        steps.push(step.to_string());
    };
    record.stage = Stage::Cutting;
    record.mode = Mode::from(Word::DropWrites);
    record.until = None;
    drop_writes(job, record, asked, users)?;
    did(job, record, "drop_writes");
    if asked.kill && !users.processes.is_empty() {
        let killed = kill(job, record, asked, users);
        // Who used it no more when the others were killed.
        go_on_with_stopped(job, record)?;
        killed?;
        did(job, record, "kill");
    }
    if asked.umount && !users.instances.is_empty() {
        users.end_instances()?;
        did(job, record, "umount of mounts on top");
    }
    let mounts = filesystem::mounts_of(record, &mapping_of(record)?);
    if !mounts.is_empty() {
        filesystem::unmount_all(&mut job.tools, &mounts, asked.lazy)?;
        did(job, record, "umount");
    }
    // One that lives on would be mounted again with all that was lost.
    holders::released(record, &mapping_of(record)?)?;
    // What the kernel remembers of the device itself is older or newer than the disk.
    job.tools.run(&["blockdev".as_ref(), "--flushbufs".as_ref(), record.device().as_os_str()])?;
    record.mode = Mode::from(Word::AllowWrites);
    exchange(job, record, Quiet::AsItIs)?;
    did(job, record, "allow_writes");
    let device = record.device();
    for was in record.mounts.clone() {
        filesystem::mount_again(&mut job.tools, &device, &was)?;
        record.mounts.retain(|other| *other != was);
        job.save(record)?;
        did(job, record, "mount");
    }
    record.stage = Stage::Ready;
    job.save(record)
}

/// From now on nothing is written. Who is to be killed is stopped before: otherwise it would be told that what is lost was
/// written, and could tell others.
fn drop_writes(job: &mut Job, record: &mut Record, asked: AskedCut, users: &mut Users) -> Result<(), Refused> {
    let mapping = mapping_of(record)?;
    let stops = asked.kill && !users.processes.is_empty();
    let stopped = if stops { stop(job, record, asked, &mapping, users) } else { Ok(()) };
    // What stood still with the old table goes on with this one.
    let dropped = stopped.and_then(|()| exchange(job, record, Quiet::AsItIs)).and_then(|()| go_on(job, record));
    if dropped.is_err() {
        let _ = go_on_with_stopped(job, record);
    }
    dropped
}

/// Each is in the record before it is stopped: whoever finds it there without this cut lets it go on.
fn stop(
    job: &mut Job,
    record: &mut Record,
    asked: AskedCut,
    mapping: &Mapping,
    users: &mut Users,
) -> Result<(), Refused> {
    let base = record.clone();
    let keep = |stopped: Vec<Stopped>| {
        record.stopped.extend(stopped);
        job.save(record)
    };
    users.stop_processes(|| look(&base, mapping, asked), keep)?;
    job.tools.lines.push(users.command("STOP"));
    Ok(())
}

/// Those who live go on. Gives their numbers.
pub(super) fn go_on_with_stopped(job: &mut Job, record: &mut Record) -> Result<Vec<u32>, Refused> {
    let stopped = std::mem::take(&mut record.stopped);
    stopped.iter().for_each(Stopped::go_on);
    job.save(record)?;
    Ok(stopped.iter().map(|process| process.pid).collect())
}

/// Until nobody is left. Who comes after the power was gone is told lies.
fn kill(job: &mut Job, record: &Record, asked: AskedCut, users: &Users) -> Result<(), Refused> {
    job.tools.lines.push(users.command("KILL"));
    users.kill_processes();
    let mapping = mapping_of(record)?;
    for _ in 0..3 {
        let late = look(record, &mapping, asked);
        if late.processes.is_empty() {
            return Ok(());
        }
        let said = late.command("KILL");
        job.warnings.push(format!("processes came after the power was gone, and were told lies: {said}"));
        late.kill_processes();
    }
    Err(Refused::new(Kind::Busy, "processes that use the device do not end"))
}
