//! What is written down: leases, what was switched for them, and where cores are that have not been brought home. One
//! file, for they change together.
//!
//! Read and written under the lock of the part; [`look`] and [`peek`] read without it. Must never: be behind what was
//! done.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::host::state::{Deadline, Part, StateDir, boot};
use crate::host::{Machine, Refused, shown};
use crate::sys::mounts::Mount;

/// The part of the state, and the one file in it.
pub const PART: &str = "coredump";
const FILE: &str = "book";

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Book {
    pub leases: Vec<Lease>,
    pub switch: Option<Switch>,
    pub away: Vec<Away>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lease {
    pub name: String,
    pub owner: String,
    pub since: String,
    pub life_ms: u64,
    pub until: Deadline,
    /// An agent has carried it out, elsewhere.
    pub by_agent: bool,
    /// How much room it wants where cores go.
    #[serde(default = "need")]
    pub need: u64,
}

/// How far it has come. Only a process that was killed leaves one of the first or last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Taking,
    Taken,
    GivingBack,
}

/// What was done, or is about to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Switch {
    pub boot: String,
    /// The lease that it was done for first.
    pub lease: String,
    pub stage: Stage,
    pub means: Means,
    /// Where cores go meanwhile.
    pub fallback: PathBuf,
    /// That directory was not there before.
    #[serde(default)]
    pub made: bool,
    /// Where they went before, as told to people.
    pub found: Value,
    pub how: String,
    pub since: String,
    /// Why it could not be undone as yet, or is not in force, and when that is tried again.
    pub trouble: Option<String>,
    pub again: Option<Deadline>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Means {
    /// A mount over a directory, known by the filesystem and the directory that are seen there.
    Bind {
        over: PathBuf,
        device: String,
        root: PathBuf,
        /// Was the directory a mountpoint before, or will a unit make it one? Then cores go home only to a mount.
        mounted: bool,
    },
    Pattern {
        old: String,
        new: String,
    },
}

/// Cores that were written meanwhile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Away {
    pub dir: PathBuf,
    /// Where they belong; none if nobody knows.
    pub home: Option<PathBuf>,
    pub mounted: bool,
    /// We have made the directory that they are in.
    #[serde(default)]
    pub made: bool,
    pub again: Option<Deadline>,
    /// Why they have not come home.
    #[serde(default)]
    pub why: Option<String>,
}

fn need() -> u64 {
    super::NEED
}

impl Means {
    /// Is this mount ours?
    pub fn is(&self, mount: &Mount) -> bool {
        match self {
            Means::Bind { over, device, root, .. } => {
                mount.mountpoint == *over && mount.device == *device && mount.root == *root
            }
            Means::Pattern { .. } => false,
        }
    }

    pub fn word(&self) -> &'static str {
        match self {
            Means::Bind { .. } => "bind",
            Means::Pattern { .. } => "core_pattern",
        }
    }

    pub fn home(&self) -> Option<PathBuf> {
        match self {
            Means::Bind { over, .. } => Some(over.clone()),
            Means::Pattern { .. } => None,
        }
    }

    fn json(&self) -> Value {
        match self {
            Means::Bind { over, .. } => json!({"means": "bind", "over": shown(over)}),
            Means::Pattern { old, new } => json!({"means": "core_pattern", "old": old, "new": new}),
        }
    }
}

impl Lease {
    pub fn json(&self) -> Value {
        json!({
            "name": self.name, "owner": self.owner, "since": self.since, "by": if self.by_agent { "agent" } else { "self" },
            "remaining_ms": milliseconds(self.until.left()), "for_ms": self.life_ms, "need": self.need,
        })
    }
}

impl Away {
    pub fn json(&self) -> Value {
        json!({"dir": shown(&self.dir), "home": self.home.as_deref().map(shown), "why": self.why})
    }
}

impl Switch {
    pub fn json(&self) -> Value {
        let mut value = self.means.json();
        value["stage"] = json!(self.stage);
        value["to"] = shown(&self.fallback).into();
        value["how"] = json!(self.how);
        value["since"] = json!(self.since);
        value["trouble"] = json!(self.trouble);
        value
    }
}

impl Book {
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(part: &Part) -> Result<Book, Refused> {
        Ok(part.get(FILE).map_err(|error| unreadable(part.path(), &error))?.unwrap_or_default())
    }

    /// # Errors
    /// When it cannot be written; then the old one is there.
    pub fn write(&self, part: &Part) -> Result<(), Refused> {
        let is_empty = self.leases.is_empty() && self.switch.is_none() && self.away.is_empty();
        let written = if is_empty { part.remove(FILE) } else { part.put(FILE, self) };
        written.map_err(|error| Refused::failed(format!("the state of coredumps cannot be written: {error}")))
    }

    pub fn lease(&self, name: &str) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.name == name)
    }

    /// Those that have ended, which are in the book no more.
    pub fn take_expired(&mut self) -> Vec<Lease> {
        let (gone, left) = self.leases.drain(..).partition(|lease| lease.until.has_passed());
        self.leases = left;
        gone
    }

    /// Does anybody want what was switched?
    pub fn is_wanted(&self) -> bool {
        self.leases.iter().any(|lease| !lease.by_agent && !lease.until.has_passed())
    }

    /// When a lease ends, or something is to be undone that nobody wants. Zero is now.
    pub fn due(&self) -> Option<Duration> {
        let ends = self.leases.iter().map(|lease| lease.until.left());
        let switch = self.switch.iter().filter_map(|switch| {
            let again = || switch.again.as_ref().map_or(Duration::ZERO, Deadline::left);
            match switch.stage {
                _ if switch.boot != boot() => Some(again()),
                Stage::Taking => Some(again()),
                _ if self.is_wanted() => None,
                Stage::Taken | Stage::GivingBack => Some(again()),
            }
        });
        ends.chain(switch).min()
    }

    /// When cores can be brought home. Zero is now.
    pub fn carry_due(&self) -> Option<Duration> {
        let away = self.away.iter().filter(|away| self.can_be_emptied(away));
        away.map(|away| away.again.as_ref().map_or(Duration::ZERO, Deadline::left)).min()
    }

    /// Not while its home is covered, nor if nobody knows its home.
    pub fn can_be_emptied(&self, away: &Away) -> bool {
        let covered = self.switch.as_ref().and_then(|switch| switch.means.home());
        away.home.is_some() && away.home != covered
    }
}

/// The book as it is now, without its lock.
///
/// # Errors
/// When it is there and cannot be read: then nobody knows what is redirected.
pub fn look(state: &StateDir) -> Result<Book, Refused> {
    let part = state.path().join(PART);
    match fs::read(part.join(format!("{FILE}.json"))) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| unreadable(&part, &error.into())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Book::default())
        }
        Err(error) => Err(unreadable(&part, &error)),
    }
}

/// The same; one that cannot be read says nothing.
pub fn peek(state: &StateDir) -> Book {
    look(state).unwrap_or_default()
}

fn unreadable(part: &Path, error: &io::Error) -> Refused {
    let file = part.join(format!("{FILE}.json"));
    let file = file.display();
    let failure = Refused::failed(format!("{file} cannot be read, so nobody knows what is redirected: {error}"));
    failure.hint(format!("umount what `findmnt` shows of ours on the core directory, then remove {file}"))
}

/// # Errors
/// When another operation holds it for long.
pub fn lock(machine: &Machine) -> Result<Part, Refused> {
    let cannot = |error: std::io::Error| {
        let place = machine.state.path().join(PART);
        match error.raw_os_error() {
            Some(libc::EWOULDBLOCK) => Refused::conflict("another operation on coredumps takes more than a minute"),
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
                Refused::not_supported(format!("{}: {error}", place.display()))
                    .hint("redirecting coredumps needs root, and a state directory: NEMESISFS_STATEDIR")
            }
            _ => Refused::failed(format!("{}: {error}", place.display())),
        }
    };
    machine.state.part(PART).map_err(cannot)
}

pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
