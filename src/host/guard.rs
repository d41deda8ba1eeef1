//! Watches over what was done to the machine: ends what has a time when that has come, whoever began it, and puts what
//! other daemons tell on the stream of this one.
//!
//! The `machine` thread of each daemon, and a helper while something is ended, which takes the lock of its part of the
//! state. Must never: hold up the end of the daemon.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use serde_json::{Map, Value, json};

use super::state::StateDir;
use super::{Machine, coredump, device};

/// What daemons tell each other: lines of JSON.
const LINES: &str = "events.jsonl";
/// Beyond this the file begins anew.
const LARGEST: u64 = 1 << 20;
/// How often it looks when something of the machine is changed, and when nothing is.
const LOOK: Duration = Duration::from_millis(200);
const REST: Duration = Duration::from_secs(1);

/// How often it is seen to that a second daemon lives; and how soon again when none could be started.
const KEEP: Duration = Duration::from_millis(500);
const KEEP_AGAIN: Duration = Duration::from_secs(30);
/// How soon it is tried again what could not be ended.
const AGAIN: Duration = Duration::from_secs(1);

/// Events that are told on the streams of all daemons.
const EVENTS: [&str; 2] = ["device", "coredump"];

/// For the other daemons. Nothing depends on it, so that a disk without room costs only the line.
pub(super) fn write_line(state: &StateDir, author: &str, event: &str, detail: &Value) {
    let file = lines_file(state);
    let is_large = || fs::metadata(&file).is_ok_and(|file| file.len() > LARGEST);
    // One of those who see that at the same time, or the second would move away what the first has begun.
    if is_large()
        && let Ok(Some(_alone)) = state.try_part("events")
        && is_large()
    {
        let _ = fs::rename(&file, file.with_extension("old"));
    }
    let line = json!({"author": author, "event": event, "detail": detail});
    let open = OpenOptions::new().create(true).append(true).open(&file);
    if let Err(error) = open.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())) {
        tracing::warn!(%error, file = %file.display(), "other daemons are not told");
    }
}

fn lines_file(state: &StateDir) -> PathBuf {
    state.path().join(LINES)
}

/// The thread, until it is dropped. Nobody waits for its end: it may wait for a tool.
pub struct Guard {
    pub machine: Arc<Machine>,
    _stop: Sender<()>,
}

impl Guard {
    /// `keep` starts a second daemon if there is none, and says whether there is one now: it is called while this one may
    /// not die alone.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(machine: Machine, keep: impl Fn() -> bool + Send + 'static) -> io::Result<Guard> {
        let (machine, (stop, stopped)) = (Arc::new(machine), bounded(0));
        let guarded = machine.clone();
        std::thread::Builder::new().name("machine".into()).spawn(move || run(&guarded, &stopped, &keep))?;
        Ok(Guard { machine, _stop: stop })
    }
}

/// What has its times: how long until the next one, and what to do then. Which of two daemons does it is theirs to settle.
struct Part {
    due: fn(&Machine) -> Option<Duration>,
    expire: fn(&Arc<Machine>),
    /// Is a thread of this daemon at it?
    busy: Arc<AtomicBool>,
    begun: Cell<Option<Instant>>,
}

impl Part {
    fn new(due: fn(&Machine) -> Option<Duration>, expire: fn(&Arc<Machine>)) -> Part {
        Part { due, expire, busy: Arc::default(), begun: Cell::default() }
    }

    /// Ends what has to end, on a thread of its own: a tool that hangs holds up only that part.
    fn look(&self, machine: &Arc<Machine>) -> Option<Duration> {
        let due = (self.due)(machine)?;
        let rests = self.begun.get().is_some_and(|begun| begun.elapsed() < AGAIN);
        if due.is_zero() && !rests && !self.busy.swap(true, AcqRel) {
            self.begun.set(Some(Instant::now()));
            let (at_it, expire) = (AtIt { machine: machine.clone(), busy: self.busy.clone() }, self.expire);
            let ending = move || expire(&at_it.machine);
            if let Err(error) = std::thread::Builder::new().name("helper".into()).spawn(ending) {
                tracing::error!(%error, "what has come to its end cannot be ended");
            }
        }
        Some(if due.is_zero() { LOOK } else { due })
    }
}

/// A thread that ends what has to end; dropped, also by a panic, it lets the next one begin.
struct AtIt {
    machine: Arc<Machine>,
    busy: Arc<AtomicBool>,
}

impl Drop for AtIt {
    fn drop(&mut self) {
        self.busy.store(false, Release);
        let _ = self.machine.poke.try_send(());
    }
}

/// When it was last seen to that there is a second daemon, and whether there is one.
struct Kept {
    at: Instant,
    well: bool,
}

/// Warns if there is little room where cores would go. On a thread of its own: the core directory may be on a disk that
/// hangs, and what ends that is to go on.
fn look_at_room(machine: &Arc<Machine>) {
    let machine = machine.clone();
    let looking = std::thread::Builder::new().name("helper".into()).spawn(move || coredump::check_root(&machine));
    if let Err(error) = looking {
        tracing::warn!(%error, "nobody has looked whether there is room for coredumps");
    }
}

/// Runs until the other end of `stop` is dropped.
fn run(machine: &Arc<Machine>, stop: &Receiver<()>, keep: &dyn Fn() -> bool) {
    let mut others = Others::from_now(machine);
    let parts = [
        Part::new(device::due, device::expire),
        Part::new(coredump::due, |machine| coredump::expire(machine)),
        Part::new(coredump::carry_due, |machine| coredump::carry(machine)),
    ];
    look_at_room(machine);
    let mut kept: Option<Kept> = None;
    loop {
        others.tell(machine);
        let mut pause = REST;
        if machine.is_changed() {
            let rest = |kept: &Kept| if kept.well { KEEP } else { KEEP_AGAIN };
            if kept.as_ref().is_none_or(|kept| kept.at.elapsed() > rest(kept)) {
                kept = Some(Kept { at: Instant::now(), well: keep() });
            }
            let next = parts.iter().filter_map(|part| part.look(machine)).min();
            pause = next.map_or(LOOK, |next| next.min(LOOK));
        }
        select! {
            recv(stop) -> _ => return,
            recv(machine.poked) -> _ => {}
            default(pause) => {}
        }
    }
}

/// What the others tell, from the moment that this daemon began.
struct Others {
    file: Option<File>,
    rest: Vec<u8>,
}

impl Others {
    fn from_now(machine: &Machine) -> Others {
        let mut file = File::open(lines_file(&machine.state)).ok();
        if let Some(file) = &mut file {
            let _ = file.seek(SeekFrom::End(0));
        }
        Others { file, rest: Vec::new() }
    }

    fn tell(&mut self, machine: &Machine) {
        if self.file.is_none() {
            self.file = File::open(lines_file(&machine.state)).ok();
        }
        let Some(file) = &mut self.file else { return };
        // Before the last look at its end: then nobody has written there since.
        let was_renamed = was_renamed(file, &lines_file(&machine.state));
        let _ = file.read_to_end(&mut self.rest);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            if let Some((event, detail)) = of_another(&line, &machine.author) {
                machine.ring.change(event, detail);
            }
        }
        if was_renamed {
            self.file = None;
            self.rest.clear();
        }
    }
}

fn was_renamed(file: &File, path: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) != (there.dev(), there.ino()),
        _ => true,
    }
}

fn of_another(line: &[u8], author: &str) -> Option<(&'static str, Value)> {
    let mut line: Map<String, Value> = serde_json::from_slice(line).ok()?;
    if line.get("author")?.as_str()? == author {
        return None;
    }
    let event = EVENTS.into_iter().find(|event| line.get("event").and_then(Value::as_str) == Some(event))?;
    let mut detail = line.remove("detail")?;
    detail["told_by"] = line.remove("author")?;
    Some((event, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_ended_for_a_panic_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Arc::new(Machine::alone("test", StateDir::new(dir.path())));
        let part = Part::new(|_| Some(Duration::ZERO), |_| panic!("in the middle of it"));
        part.look(&machine);
        let until = Instant::now() + Duration::from_secs(30);
        while part.busy.load(Acquire) {
            assert!(Instant::now() < until, "nobody can ever begin again");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
