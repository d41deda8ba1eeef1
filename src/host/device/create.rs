//! Makes a device: image, loop device, mappings, filesystem, mount, each step in the record before it is done.
//!
//! On a helper thread, under the lock of the record, and of the part until its names and disks are taken. Whatever fails is taken back; what a killed daemon has left, the next
//! `create` or `remove` of the name takes back, or the guard of another daemon.

use std::fs;
use std::io;

use serde_json::Value;

use super::asked::{Asked, Definition, Ground};
use super::disk::{self, Disk};
use super::record::{Record, Stage};
use super::table::{Mode, Word};
use super::{Job, Refused, at, filesystem, mapping, remove};
use crate::host::Machine;
use crate::host::state::Part;

/// The mark in the log after which the filesystem is there.
const MADE: &str = "mkfs";

/// Gives the answer, and whether it was made now.
///
/// # Errors
/// With what is in the way, or missing on this host; then nothing is left of it.
pub fn create(machine: &Machine, name: &str, asked: &Asked) -> Result<(Value, bool), Refused> {
    let definition = Definition::of(name, asked)?;
    let mut job = Job::begin(machine, name)?;
    if let Some(record) = job.find(name)? {
        if record.stage != Stage::Creating {
            return there_already(job, &record, definition);
        }
        remove::take_back(&mut job, record, false)?;
    }
    let taking = job.take()?;
    let definition = examine(name, definition)?;
    job.warnings.extend(disk::room(&definition.ground));
    let mut record = draft(name, definition)?;
    match make(&mut job, &mut record, taking) {
        Ok(()) => {
            job.tell(&record, "created");
            let undo = format!("device remove {name}");
            Ok((job.done(&record, Some(undo)), true))
        }
        Err(refused) => Err(undo(job, record, refused)),
    }
}

/// The same definition again is no change; another one would lose what is on the device.
fn there_already(job: Job, record: &Record, definition: Definition) -> Result<(Value, bool), Refused> {
    let name = &record.name;
    let wanted = Definition { force: record.definition.force, ..resolved(definition) };
    if record.state() == "ready" && wanted == record.definition {
        return Ok((job.done(record, None), false));
    }
    let detail = format!("device {name} is there already, and is {}", record.state());
    Err(Refused::conflict(detail).hint(format!("nemesisfs device remove {name}, then create it anew")))
}

/// Paths as `examine` has left them in the record.
fn resolved(definition: Definition) -> Definition {
    let resolve = |path: std::path::PathBuf| path.canonicalize().unwrap_or(path);
    let ground = |ground| match ground {
        Ground::NewImage(path, size) => Ground::NewImage(resolve(path), size),
        Ground::OldImage(path) => Ground::OldImage(resolve(path)),
        Ground::Device(path) => Ground::Device(resolve(path)),
    };
    Definition {
        ground: ground(definition.ground),
        log: definition.log.map(ground),
        mountpoint: definition.mountpoint.map(resolve),
        ..definition
    }
}

/// Everything that can be known before anything is touched.
fn examine(name: &str, definition: Definition) -> Result<Definition, Refused> {
    mapping::supports("flakey")?;
    if definition.log.is_some() {
        mapping::supports("log-writes")?;
    }
    filesystem::supports(definition.filesystem)?;
    for taken in [name.to_string(), format!("{name}-log")] {
        if mapping::find(&taken).is_some() {
            let detail = format!("there is a mapping {taken} already, which is not ours");
            return Err(Refused::conflict(detail).hint("choose another name: dmsetup ls"));
        }
    }
    let ground = disk::examine(&definition.ground, definition.filesystem, definition.force)?;
    // Whatever the log's disk holds, it is overwritten: as by mkfs, only what is worthless.
    let made = super::asked::Filesystem::Ext4;
    let log = definition.log.as_ref().map(|log| disk::examine(log, made, definition.force)).transpose()?;
    let mountpoint = definition.mountpoint.as_deref().map(filesystem::examine_mountpoint).transpose()?;
    Ok(Definition { ground, log, mountpoint, ..definition })
}

/// The record of a device of which nothing is there.
fn draft(name: &str, definition: Definition) -> Result<Record, Refused> {
    let source = "/proc/sys/kernel/random/uuid";
    let id = fs::read_to_string(source).map_err(at(source))?.trim().to_string();
    Ok(Record {
        name: name.into(),
        stage: Stage::Creating,
        sectors: 0,
        data: Disk::of(&definition.ground, &id),
        log: definition.log.as_ref().map(|log| Disk::of(log, &format!("{id}-log"))),
        id,
        mountpoint_made: false,
        mode: Mode::from(Word::AllowWrites),
        until: None,
        stall: None,
        mounts: Vec::new(),
        stopped: Vec::new(),
        trouble: None,
        definition,
    })
}

/// Others may take theirs as soon as the kernel knows what is taken here.
fn make(job: &mut Job, record: &mut Record, taking: Part) -> Result<(), Refused> {
    job.save(record)?;
    make_disks(job, record)?;
    record.sectors = record.data.sectors()?;
    job.save(record)?;
    if record.log.is_some() {
        make_log(job, record)?;
    }
    mapping::create(&mut job.tools, &record.name, &record.uuid(), &record.table())?;
    drop(taking);
    filesystem::make(&mut job.tools, &record.definition, &record.device())?;
    if record.log.is_some() {
        job.tools.run(&["dmsetup", "message", &record.log_name(), "0", "mark", MADE])?;
    }
    make_mount(job, record)?;
    record.stage = Stage::Ready;
    job.save(record)
}

fn make_disks(job: &mut Job, record: &mut Record) -> Result<(), Refused> {
    let mut data = record.data.clone();
    let (part, tools) = (&job.part, &mut job.tools);
    let base = record.clone();
    let save =
        |record: &Record| part.put(&record.name, record).map_err(at(format!("the state of device {}", record.name)));
    let keep = |data: &Disk| save(&Record { data: data.clone(), ..base.clone() });
    let made = data.make(tools, keep).and_then(|()| data.attach(tools, keep));
    record.data = data;
    made?;
    let Some(mut log) = record.log.clone() else { return Ok(()) };
    let base = record.clone();
    let keep = |log: &Disk| save(&Record { log: Some(log.clone()), ..base.clone() });
    let made = log.make(tools, keep).and_then(|()| log.attach(tools, keep));
    record.log = Some(log);
    made
}

fn make_log(job: &mut Job, record: &Record) -> Result<(), Refused> {
    let Some(log) = &record.log else { return Ok(()) };
    let (data, log) = (record.data.device(), log.device());
    let table = format!("0 {} log-writes {} {}", record.sectors, data.display(), log.display());
    mapping::create(&mut job.tools, &record.log_name(), &record.log_uuid(), &table)?;
    Ok(())
}

fn make_mount(job: &mut Job, record: &mut Record) -> Result<(), Refused> {
    let Some(mountpoint) = record.definition.mountpoint.clone() else { return Ok(()) };
    if !mountpoint.is_dir() {
        record.mountpoint_made = true;
        job.save(record)?;
        match fs::create_dir(&mountpoint) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => record.mountpoint_made = false,
            other => other.map_err(at(mountpoint.display()))?,
        }
        job.tools.lines.push(crate::host::tool::line(&["mkdir".as_ref(), mountpoint.as_os_str()]));
        job.save(record)?;
    }
    filesystem::mount(&mut job.tools, record)
}

/// Takes back what was made so far; if that fails too, says what to do.
fn undo(mut job: Job, record: Record, refused: Refused) -> Refused {
    let (name, commands) = (record.name.clone(), job.tools.lines.clone());
    let refused = refused.with("commands", commands.into());
    match remove::take_back(&mut job, record, false) {
        Ok(()) => refused,
        Err(also) => {
            let detail = format!("{refused}; and what was made so far could not be taken back: {also}");
            Refused { detail, ..refused }.hint(format!("nemesisfs device remove {name}"))
        }
    }
}
