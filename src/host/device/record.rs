//! The state file of one device: what was asked for, what of it we have made, and what is wrong with it now.
//!
//! Written before each step that makes something. No locks of its own.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::asked::Definition;
use super::disk::Disk;
use super::holders::Stopped;
use super::mapping::{self, Mapping};
use super::table::Mode;
use crate::host::state::Deadline;

/// How far an operation had come that was begun last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Creating,
    Ready,
    Cutting,
    Removing,
}

/// A mount as it was before a cut, and is to be after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountAgain {
    pub mountpoint: PathBuf,
    pub filesystem: String,
    pub options: String,
}

/// All of the device stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    pub until: Option<Deadline>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    /// Distinguishes our mappings and drafts from others of the same name.
    pub id: String,
    pub definition: Definition,
    pub stage: Stage,
    pub sectors: u64,
    pub data: Disk,
    pub log: Option<Disk>,
    /// The mountpoint was not there.
    pub mountpoint_made: bool,
    pub mode: Mode,
    /// When writes are allowed again.
    pub until: Option<Deadline>,
    pub stall: Option<Stall>,
    /// What a cut has yet to mount again.
    pub mounts: Vec<MountAgain>,
    /// Whom a cut has stopped, from before it does until they are killed.
    pub stopped: Vec<Stopped>,
    /// Why what has come to its end could not be ended, as it was told.
    pub trouble: Option<String>,
}

impl Record {
    /// Where users find the device.
    pub fn device(&self) -> PathBuf {
        mapping::node(&self.name)
    }

    pub fn uuid(&self) -> String {
        format!("nemesisfs-{}", self.id)
    }

    /// The mapping below it that logs what is written.
    pub fn log_name(&self) -> String {
        format!("{}-log", self.name)
    }

    pub fn log_uuid(&self) -> String {
        format!("nemesisfs-{}-log", self.id)
    }

    /// Its mapping, if it is there and ours.
    pub fn mapping(&self) -> Option<Mapping> {
        mapping::find(&self.name).filter(|mapping| mapping.uuid == self.uuid())
    }

    pub fn log_mapping(&self) -> Option<Mapping> {
        mapping::find(&self.log_name()).filter(|mapping| mapping.uuid == self.log_uuid())
    }

    /// What the uppermost mapping stands on.
    pub fn below(&self) -> PathBuf {
        if self.log.is_some() { mapping::node(&self.log_name()) } else { self.data.device() }
    }

    pub fn table(&self) -> String {
        self.mode.table(&self.below().to_string_lossy(), self.sectors)
    }

    /// The word for how it is.
    pub fn state(&self) -> &'static str {
        match (self.stage, self.mapping()) {
            (Stage::Creating, _) => "half made",
            (Stage::Removing, _) => "half removed",
            (_, None) => "gone",
            (Stage::Ready, _) => "ready",
            (Stage::Cutting, _) => "cutting",
        }
    }
}
