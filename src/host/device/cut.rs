//! The power fails: what was not written is lost, who held files is gone, and the filesystem is mounted again as after a
//! start.
//!
//! On a helper thread, under the lock of the part. Each step is in the record or the kernel when it is done, so that a cut
//! that failed in the middle, or whose daemon was killed, is finished by another `cut`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::change::{exchange, go_on, mapping_of};
use super::filesystem;
use super::holders::Users;
use super::mapping::Quiet;
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
    let mut job = Job::begin(machine)?;
    let mut record = job.ready(name)?;
    let mapping = mapping_of(&record)?;
    let mounts = filesystem::mounts_of(&record, &mapping);
    let users = Users::of(&record, &mapping, &mounts);
    let stays =
        (!users.processes.is_empty() && !asked.kill && !asked.lazy) || (!users.instances.is_empty() && !asked.umount);
    if stays || users.has_ourselves() {
        return Err(users.refuse(name, &format!("nemesisfs device cut {name}")));
    }
    let again = filesystem::to_mount_again(&record, &mounts)?;
    // A cut that goes on has unmounted some already.
    record.mounts.retain(|was| again.iter().all(|now| now.mountpoint != was.mountpoint));
    record.mounts.splice(0..0, again);
    let mut steps = Vec::new();
    match lose(&mut job, &mut record, asked, &users, &mut steps) {
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

fn lose(
    job: &mut Job,
    record: &mut Record,
    asked: AskedCut,
    users: &Users,
    steps: &mut Vec<String>,
) -> Result<(), Refused> {
    let mut did = |job: &Job, record: &Record, step: &str| {
        job.tell_more(record, "cutting", json!({"step": step}));
        steps.push(step.to_string());
    };
    record.stage = Stage::Cutting;
    record.mode = Mode::from(Word::DropWrites);
    record.until = None;
    exchange(job, record, Quiet::AsItIs)?;
    did(job, record, "drop_writes");
    // It stood still with the old table, and goes on with this one.
    go_on(job, record)?;
    if asked.umount && !users.instances.is_empty() {
        users.end_instances(asked.kill)?;
        did(job, record, "umount of mounts on top");
    }
    if asked.kill && !users.processes.is_empty() {
        kill(job, record, users)?;
        did(job, record, "kill");
    }
    let mounts = filesystem::mounts_of(record, &mapping_of(record)?);
    if !mounts.is_empty() {
        filesystem::unmount_all(&mut job.tools, &mounts, asked.lazy)?;
        did(job, record, "umount");
    }
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

/// Until nobody is left: who was killed may have started others.
fn kill(job: &mut Job, record: &Record, users: &Users) -> Result<(), Refused> {
    let pids: Vec<String> = users.processes.iter().map(|holder| holder.pid.to_string()).collect();
    job.tools.lines.push(format!("kill -KILL {}", pids.join(" ")));
    users.kill_processes();
    let mapping = mapping_of(record)?;
    for _ in 0..3 {
        let left = Users::of(record, &mapping, &filesystem::mounts_of(record, &mapping));
        if left.processes.is_empty() {
            return Ok(());
        }
        left.kill_processes();
    }
    Err(Refused::new(Kind::Busy, "processes that use the device do not end"))
}
