//! What is done to the machine and not to the mount: devices that fail below a filesystem, and where coredumps go.
//!
//! All state of it lies in files ([`state`]), under a lock for each part or document, so that every daemon can do
//! and undo everything, and what a killed one has left is found by the next. What one does is on the streams of all.
//!
//! On helper threads of the control thread and on the `machine` thread ([`guard`]); never on a reader or on the control
//! thread itself, for tools are run and waited for. Takes the locks of [`state`]. Must never: touch what no state file
//! names as ours, nor change anything before the file that undoes it is written.

pub mod coredump;
pub mod device;
pub mod guard;
pub mod refused;
pub mod state;
pub mod tool;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde_json::Value;

use crate::event::Ring;
pub use guard::Guard;
pub use refused::{Kind, Refused};
use state::StateDir;

/// A path as documents and events tell it. Names of programs and of mounts of others may be no UTF-8, and `json!` panics on
/// such a path.
pub fn shown(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

/// The machine as one daemon sees it.
pub struct Machine {
    pub ring: Arc<Ring>,
    /// Distinguishes what this daemon has told from what others have.
    author: String,
    pub state: StateDir,
    /// Wakes the guard: something may have a time now.
    poke: Sender<()>,
    poked: Receiver<()>,
    /// How many operations of this daemon have not ended.
    at_work: AtomicUsize,
}

/// An operation that has not ended: for as long, the daemon is needed.
pub struct AtWork<'a>(&'a Machine);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, AcqRel);
    }
}

impl Machine {
    /// `author` is what no other daemon is called, such as its boot id.
    pub fn new(ring: Arc<Ring>, author: &str, state: StateDir) -> Machine {
        let (poke, poked) = bounded(1);
        Machine { ring, author: author.into(), state, poke, poked, at_work: AtomicUsize::new(0) }
    }

    /// An operation begins.
    pub fn begin(&self) -> AtWork<'_> {
        self.at_work.fetch_add(1, AcqRel);
        AtWork(self)
    }

    /// Has a daemon that serves the machine alone anything to do?
    pub fn is_needed(&self) -> bool {
        self.at_work.load(Acquire) > 0 || self.is_changed()
    }

    /// Is anything of this machine changed by us, and has to be undone one day?
    pub fn is_changed(&self) -> bool {
        self.state.has_any(device::PART) || coredump::is_pending(self)
    }

    /// That of a program that has no stream of its own: it tells the daemons that there are.
    pub fn alone(author: &str, state: StateDir) -> Machine {
        Machine::new(Arc::new(Ring::default()), author, state)
    }

    /// An event, on the stream of this daemon at once and on those of the others soon.
    pub fn tell(&self, event: &'static str, detail: Value) {
        guard::write_line(&self.state, &self.author, event, &detail);
        tracing::info!(event, %detail);
        self.ring.change(event, detail);
        let _ = self.poke.try_send(());
    }
}
