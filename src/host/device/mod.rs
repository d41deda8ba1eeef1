//! Block devices that fail below a filesystem: dm-flakey and dm-delay over an image or a disk, with a log of the writes by
//! dm-log-writes if wanted.
//!
//! What was made, and what is about to be, is in a state file before it is done, so that every daemon can take it back
//! from every state. Whether a thing is ours is asked of the kernel: a mapping by its UUID, a loop device by the file under
//! it, an image by its inode and its birth.
//!
//! On helper threads and the `machine` thread: tools are run and waited for. Each change holds the record of its device;
//! making one also the part `devices` of the state, while it takes names and disks. What may wait for the device itself,
//! as a sync does, is run without either: what has a time is ended under the same lock. Must never: touch a device, file or mount that no record names as ours, or signal a process without being told.

mod asked;
mod change;
mod create;
mod cut;
mod disk;
mod filesystem;
mod holders;
mod log;
mod mapping;
mod record;
mod remove;
mod replay;
mod show;
pub mod table;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::state::{Part, is_name};
use super::tool::Tools;
use super::{AtWork, Kind, Machine, Refused};

pub use asked::Asked;
pub use change::{AskedStall, due, expire, resume, set_mode, suspend};
pub use create::create;
pub use cut::{AskedCut, cut};
pub use remove::{remove, remove_all};
pub use replay::{AskedMark, AskedReplay, mark, replay};
pub use show::{all, one};

use record::Record;

/// The part of the state that holds the records.
pub(super) const PART: &str = "devices";

fn not_found(name: &str) -> Refused {
    Refused::new(Kind::NotFound, format!("there is no device {name:?}")).hint("nemesisfs device status")
}

/// A field of the request that makes no sense.
fn invalid(field: &str, detail: impl Into<String>) -> Refused {
    Refused { pointer: Some(format!("#/{field}")), ..Refused::invalid(detail) }
}

/// An error of a file or the state directory, with its place.
fn at(place: impl fmt::Display) -> impl Fn(io::Error) -> Refused {
    move |error| Refused::conflict(format!("{place}: {error}"))
}

/// One operation: the record of a device locked, and what was run for it.
struct Job<'a> {
    machine: &'a Machine,
    _at_work: AtWork<'a>,
    part: Part,
    tools: Tools,
    warnings: Vec<String>,
}

impl<'a> Job<'a> {
    /// Waits for other operations on the device to end.
    fn begin(machine: &'a Machine, name: &str) -> Result<Job<'a>, Refused> {
        if !is_name(name) {
            return Err(not_found(name));
        }
        Ok(Job::on(machine, held(machine, machine.state.document(PART, name), &format!("device {name}"))?))
    }

    fn on(machine: &'a Machine, part: Part) -> Job<'a> {
        Job { machine, _at_work: machine.begin(), part, tools: Tools::default(), warnings: Vec::new() }
    }

    /// Names and disks are ours to take, for as long as it lives.
    fn take(&self) -> Result<Part, Refused> {
        held(self.machine, self.machine.state.part(PART), "devices")
    }

    fn find(&self, name: &str) -> Result<Option<Record>, Refused> {
        self.part.get(name).map_err(at(format!("the state of device {name}")))
    }

    /// A device that is whole and has its mapping.
    fn ready(&self, name: &str) -> Result<Record, Refused> {
        let record = self.find(name)?.ok_or_else(|| not_found(name))?;
        match record.state() {
            // What could not be ended is told anew after a change.
            "ready" | "cutting" => Ok(Record { trouble: None, ..record }),
            state => {
                let detail = format!("device {name} is {state}");
                Err(Refused::conflict(detail).hint(format!("nemesisfs device remove {name}")))
            }
        }
    }

    fn save(&self, record: &Record) -> Result<(), Refused> {
        self.part.put(&record.name, record).map_err(at(format!("the state of device {}", record.name)))
    }

    fn tell(&self, record: &Record, action: &str) {
        self.tell_more(record, action, json!({}));
    }

    fn tell_more(&self, record: &Record, action: &str, more: Value) {
        tell(self.machine, record, action, more);
    }

    /// What is answered after a change.
    fn done(self, record: &Record, undo: Option<String>) -> Value {
        show::done(record, self.tools.lines, undo, self.warnings)
    }
}

fn tell(machine: &Machine, record: &Record, action: &str, more: Value) {
    let mut event = json!({"device": record.name, "action": action, "mode": record.mode.text()});
    if let (Some(event), Value::Object(more)) = (event.as_object_mut(), more) {
        event.extend(more);
    }
    machine.tell("device", event);
}

/// A lock, or why it could not be had.
fn held(machine: &Machine, lock: io::Result<Part>, what: &str) -> Result<Part, Refused> {
    lock.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            Refused::new(Kind::Busy, format!("another operation on {what} has not ended for a minute"))
        }
        _ => at(machine.state.path().join(PART).display())(error),
    })
}

/// A duration as clients write it.
fn duration(field: &str, text: &str) -> Result<Duration, Refused> {
    let bad =
        || invalid(field, format!("{field}: {text:?} is not a duration")).hint("write \"10ms\", \"3s\" or \"5m\"");
    match crate::fault::compile::nanoseconds(text).ok_or_else(bad)? {
        0 => Err(invalid(field, format!("{field}: {text:?} is over before it has begun"))),
        ns => Ok(Duration::from_nanos(ns)),
    }
}

/// A path as clients send it: our working directory is not theirs.
fn absolute(field: &str, path: &str) -> Result<PathBuf, Refused> {
    match path.starts_with('/') && !path.contains('\0') {
        true => Ok(PathBuf::from(path)),
        false => Err(invalid(field, format!("{field}: {path:?} is not an absolute path")).hint("begin it with /")),
    }
}
