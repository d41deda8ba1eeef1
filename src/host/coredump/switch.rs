//! Does what was chosen, and undoes it. Each step is tried again when it fails, is in the log and on the stream, and is
//! found done or not done by whoever comes after a kill.
//!
//! Called with the lock of the part held, the book written. Must never: unmount what is not ours, or lie over ours.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::about;
use super::book::{Means, Switch};
use super::found::Ground;
use super::{EVENT, flight};
use crate::fs::mount::holders;
use crate::host::tool::{ToolError, Tools};
use crate::host::{Machine, Refused, shown};
use crate::sys::mounts::{self, Mount};

/// How often a step is tried, and how long after the last time.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(300);
/// So many mounts of ours may lie on each other after whatever happened.
const MOST: usize = 8;

/// What a switch needs.
pub struct Steps<'a> {
    pub machine: &'a Machine,
    pub ground: &'a Ground,
    pub tools: Tools,
    pub patience: Duration,
}

/// How our mount stands in the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Absent,
    Uppermost,
    /// Somebody has mounted over it.
    Covered(Mount),
}

/// Looks for our mount.
///
/// # Errors
/// When the mount table cannot be read.
pub fn place(means: &Means) -> Result<Place, Refused> {
    let Means::Bind { over, .. } = means else { return Ok(Place::Absent) };
    let table = mounts::all().map_err(|error| about(Path::new("/proc/self/mountinfo"), &error))?;
    let there: Vec<Mount> = table.into_iter().filter(|mount| mount.mountpoint == *over).collect();
    Ok(match there.last() {
        Some(last) if means.is(last) => Place::Uppermost,
        Some(last) if there.iter().any(|mount| means.is(mount)) => Place::Covered(last.clone()),
        _ => Place::Absent,
    })
}

/// What lies over ours, for people.
pub fn by_others(means: &Means, by: &Mount) -> String {
    let place = means.home().unwrap_or_default();
    let (place, what, root) = (place.display(), &by.source, by.root.display());
    format!("somebody has mounted {what} ({root}) over ours on {place}: umount {place} first")
}

/// Is it in force?
pub fn is_done(ground: &Ground, means: &Means) -> bool {
    match means {
        Means::Bind { .. } => place(means).is_ok_and(|place| place == Place::Uppermost),
        Means::Pattern { new, .. } => pattern(ground).is_ok_and(|now| now == *new),
    }
}

pub fn pattern(ground: &Ground) -> Result<String, Refused> {
    let text = fs::read_to_string(&ground.pattern).map_err(|error| about(&ground.pattern, &error))?;
    Ok(text.trim_end_matches('\n').to_string())
}

impl Steps<'_> {
    pub fn tell(&self, detail: Value) {
        self.machine.tell(EVENT, detail);
    }

    /// Waits for cores that are being written, which are told.
    pub fn wait(&self) -> Result<(), String> {
        let told = |dumps: &[flight::Dump]| self.tell(json!({"action": "waiting", "cores": dumps}));
        let late = |dumps: Vec<flight::Dump>| {
            let waited = humantime::format_duration(self.patience);
            format!("a core is being written, and was not done after {waited}: {}", flight::text(&dumps))
        };
        flight::wait(self.patience, told).map(drop).map_err(late)
    }

    /// Redirects.
    pub fn take(&mut self, switch: &Switch) -> Result<(), Refused> {
        match &switch.means {
            Means::Bind { over, .. } => {
                let retry = "what writes it may be stuck; --patience waits longer";
                self.wait().map_err(|reason| Refused::conflict(reason).hint(retry))?;
                let (from, over) = (switch.fallback.as_os_str(), over.as_os_str());
                self.run(&["mount".as_ref(), "--bind".as_ref(), from, over])?;
                match place(&switch.means)? {
                    Place::Uppermost => Ok(()),
                    _ => {
                        Err(Refused::failed(format!("{} is not covered after mount --bind", Path::new(over).display())))
                    }
                }
            }
            // Who writes a core already has its file open.
            Means::Pattern { new, .. } => self.set_pattern(new),
        }
    }

    /// Restores, however far it had come. The error says what is in the way.
    pub fn give_back(&mut self, switch: &Switch) -> Result<Vec<String>, String> {
        match &switch.means {
            Means::Bind { over, mounted, .. } => self.uncover(&switch.means, over, *mounted),
            Means::Pattern { old, new } => self.unset_pattern(old, new),
        }
    }

    fn uncover(&mut self, means: &Means, over: &Path, mounted: bool) -> Result<Vec<String>, String> {
        for _ in 0..MOST {
            match place(means).map_err(|failure| failure.to_string())? {
                Place::Absent => return Ok(self.home_is_missing(over, mounted).into_iter().collect()),
                Place::Covered(by) => return Err(by_others(means, &by)),
                Place::Uppermost => self.unmount(over)?,
            }
        }
        Err(format!("{} is covered again and again", over.display()))
    }

    /// Somebody has taken more away than we did, such as `systemctl stop` of a mount unit, or the unit was not mounted.
    fn home_is_missing(&self, over: &Path, mounted: bool) -> Option<String> {
        let is_mounted = || mounts::at(over).ok().flatten().is_some();
        let text =
            || format!("nothing is mounted on {}, which is left alone: cores come home when it is", over.display());
        (mounted && !is_mounted()).then(text)
    }

    /// A busy mount is detached in the end: what holds it keeps it, and no core is among that.
    fn unmount(&mut self, over: &Path) -> Result<(), String> {
        self.wait()?;
        let place = over.as_os_str();
        let Err(error) = self.run(&["umount".as_ref(), place]) else { return Ok(()) };
        let held = holders(over, true);
        let list: Vec<Value> =
            held.iter().map(|h| json!({"pid": h.pid, "comm": h.comm, "what": shown(&h.what)})).collect();
        self.tell(json!({"action": "busy", "over": shown(over), "error": error.to_string(), "holders": list}));
        self.wait()?;
        self.run(&["umount".as_ref(), "--lazy".as_ref(), place]).map_err(|error| error.to_string())
    }

    fn unset_pattern(&mut self, old: &str, new: &str) -> Result<Vec<String>, String> {
        let now = pattern(self.ground).map_err(|failure| failure.to_string())?;
        if now == old {
            return Ok(Vec::new());
        }
        if now != new {
            return Ok(vec![format!("kernel.core_pattern is {now:?} by now, not ours: left alone (it was {old:?})")]);
        }
        self.set_pattern(old).map(|()| Vec::new()).map_err(|failure| failure.to_string())
    }

    fn set_pattern(&mut self, value: &str) -> Result<(), Refused> {
        let file = self.ground.pattern.clone();
        let setting = format!("kernel.core_pattern={value}");
        let line = crate::host::tool::line(&["sysctl", "-w", setting.as_str()]);
        self.tools.lines.push(line.clone());
        self.again(&line, || match fs::write(&file, value) {
            Ok(()) => Ok(()),
            Err(error) => Err(about(&file, &error)),
        })
    }

    fn run(&mut self, words: &[&std::ffi::OsStr]) -> Result<(), Refused> {
        let mut tools = std::mem::take(&mut self.tools);
        let line = crate::host::tool::line(words);
        let mut run = || tools.run(words);
        let failed = |error: ToolError| match error {
            ToolError::Missing(_) => Refused::from(error),
            error => Refused::failed(error.to_string()),
        };
        let result = self.again(&line, || run().map(drop).map_err(failed));
        // A line that was tried again is one line.
        tools.lines.dedup();
        self.tools = tools;
        result
    }

    /// Tries a step until it is done, so many times.
    fn again(&self, line: &str, mut step: impl FnMut() -> Result<(), Refused>) -> Result<(), Refused> {
        let mut attempt = 1;
        loop {
            let began = Instant::now();
            let result = step();
            let ms = super::book::milliseconds(began.elapsed());
            let error = result.as_ref().err().map(ToString::to_string);
            self.tell(json!({
                "action": "step", "command": line, "attempt": attempt, "ok": result.is_ok(), "ms": ms, "error": error,
            }));
            if result.is_ok() || attempt == TRIES {
                return result;
            }
            attempt += 1;
            std::thread::sleep(PAUSE);
        }
    }
}
