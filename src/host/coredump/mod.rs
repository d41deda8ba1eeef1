//! Where coredumps go: away from a filesystem that is about to be full, and back.
//!
//! Who wants that takes a *lease* with a name and an end. The first lease redirects, the last one that ends restores;
//! whoever is there does what a killed one has left to do, for all is written down (`book`) before it is done. What is
//! there at present is found out (`found`), how to redirect is chosen from that (`choice`), and done and undone
//! (`switch`) while no core is being written (`flight`). Cores that were written meanwhile are brought home (`home`).
//! Where this process may not act, an agent on the node is asked to (`steps`).
//!
//! On helper threads and the `machine` thread. Takes the locks of its parts of the state. Must never: undo a mount that
//! is not ours, or leave one of ours without a line in the book.

mod book;
mod choice;
mod cores;
mod flight;
mod found;
mod home;
mod leases;
mod room;
pub mod steps;
mod switch;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

pub use cores::list;
pub use leases::{
    carry, carry_due, check_root, due, expire, is_pending, lease, leases, may_act, redirect, release, release_all,
    renew, status,
};
pub use room::Room;

use super::Refused;

/// The event that tells of all this.
const EVENT: &str = "coredump";
/// How long a lease lasts if nobody says.
pub const LIFE: Duration = Duration::from_secs(600);
/// How much room the filesystem should have that cores are redirected to.
pub const NEED: u64 = 50_000_000_000;
/// How long cores that are being written are waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an agent may take.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// What to do when there is less room than there should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLow {
    #[default]
    Warn,
    Refuse,
}

/// Who is to act.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum By {
    /// We, where we may; in a container an agent.
    #[default]
    Auto,
    Agent,
}

/// How a lease is wanted. The default is what most want.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// How long it lasts; none is what it had before, or [`LIFE`].
    pub life: Option<Duration>,
    /// Who takes it, for people; empty is who had it before.
    pub owner: String,
    /// The directory that cores go to; none is one of ours.
    pub to: Option<PathBuf>,
    /// Places on the filesystems that are to be filled. None given: any core directory that has a mount is in danger.
    pub fills: Vec<PathBuf>,
    /// How much room there should be where cores go; none is what the lease had before, or [`NEED`].
    pub need: Option<u64>,
    pub on_low: OnLow,
    pub by: By,
    /// How long an agent may take.
    pub timeout: Duration,
    /// How long cores that are being written are waited for.
    pub patience: Duration,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted {
            life: None,
            owner: String::new(),
            to: None,
            fills: Vec::new(),
            need: None,
            on_low: OnLow::Warn,
            by: By::Auto,
            timeout: TIMEOUT,
            patience: PATIENCE,
        }
    }
}

/// A lease that was taken, and what it took.
#[derive(Clone, Debug, Serialize)]
pub struct Taken {
    pub lease: String,
    /// It was there before, and lasts longer now.
    pub renewed: bool,
    pub remaining_ms: u64,
    /// Do cores go elsewhere now? If not, there was no need to: `how` tells why.
    pub redirected: bool,
    pub how: String,
    /// Where cores went.
    pub found: Value,
    /// Of the filesystem that they go to.
    pub room: Option<Room>,
    /// What was run, as a person would have typed it.
    pub commands: Vec<String>,
    pub warnings: Vec<String>,
}

/// A lease that was given back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Released {
    /// Was there one?
    pub released: bool,
    /// Do cores go where they went before? Not while another lease lives, or if something is in the way.
    pub restored: bool,
    /// Other leases that live.
    pub leases: Vec<String>,
    /// Cores that were brought home.
    pub brought_home: Vec<String>,
    /// Cores that stay where they are, as yet.
    pub away: Vec<String>,
    pub commands: Vec<String>,
    pub warnings: Vec<String>,
}

impl Released {
    /// There was no such lease, and nothing else to do.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        !self.released && self.commands.is_empty() && self.brought_home.is_empty() && self.warnings.is_empty()
    }
}

/// An error of the system about a path.
fn about(path: &Path, error: &std::io::Error) -> Refused {
    Refused::failed(format!("{}: {error}", path.display()))
}
