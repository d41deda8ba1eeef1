//! Who uses a device: processes, and instances of ours whose backing directory lies on it.
//!
//! Through procfs, with a limit of time. No locks. Must never: signal ourselves, init, or a daemon of ours by SIGKILL, which
//! would leave a dead mount.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};

use super::mapping::Mapping;
use super::record::Record;
use super::{Kind, Refused};
use crate::fs::mount::{Holder, holders};
use crate::sys::mounts::Mount;

/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(10);
/// A daemon that is told to end unmounts by force after ten seconds.
const ENDING: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A daemon of ours, as the state file tells that it holds open.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    instance: String,
    pid: u32,
    mountpoint: Option<PathBuf>,
}

/// All users of a device.
#[derive(Debug, Default)]
pub struct Users {
    pub processes: Vec<Holder>,
    pub instances: Vec<Instance>,
}

impl Users {
    /// Those of the device and of its mounts.
    pub fn of(record: &Record, mapping: &Mapping, mounts: &[Mount]) -> Users {
        let mut users = Users::default();
        let places = mounts.iter().map(|mount| mount.mountpoint.clone());
        for place in places.chain([record.device(), mapping.node.clone()]) {
            for holder in holders(&place, true) {
                users.add(holder.pid, holder);
            }
            if holds(&place) {
                users.instances.extend(instance(std::process::id()));
            }
        }
        users.instances.sort_by_key(|instance| instance.pid);
        users.instances.dedup_by_key(|instance| instance.pid);
        users
    }

    fn add(&mut self, pid: u32, holder: Holder) {
        match instance(pid) {
            Some(instance) => self.instances.push(instance),
            None if self.processes.iter().any(|known| known.pid == pid) => {}
            None => self.processes.push(holder),
        }
    }

    pub fn describe(&self) -> Value {
        let process =
            |holder: &Holder| json!({"pid": holder.pid, "comm": holder.comm, "what": holder.what.to_string_lossy()});
        let instance = |one: &Instance| {
            json!({"pid": one.pid, "comm": "nemesisfs", "what": format!("instance {}", one.instance), "instance": one.instance,
                "mountpoint": one.mountpoint})
        };
        self.processes.iter().map(process).chain(self.instances.iter().map(instance)).collect()
    }

    /// Says who is in the way. A mount of ours on top is told first: its own end is a command.
    pub fn refuse(&self, name: &str, verb: &str) -> Refused {
        let (detail, hint) = match (self.instances.first(), self.processes.first()) {
            (Some(Instance { instance, mountpoint, .. }), _) => {
                let at = mountpoint.as_ref().map(|at| format!(" ({})", at.display())).unwrap_or_default();
                let detail = format!("device {name} is in use: the mount of instance {instance}{at} is on top of it");
                (detail, format!("nemesisfs umount --instance {instance}, or {verb} with --umount, which does that"))
            }
            (None, first) => {
                let who = first.map(|holder| format!("{} ({})", holder.pid, holder.comm)).unwrap_or_default();
                let more = self.processes.len().saturating_sub(1);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                (format!("device {name} is in use by process {who}{more}"), format!("stop them, or {verb} with --kill"))
            }
        };
        Refused::new(Kind::Busy, detail).hint(hint).with("holders", self.describe())
    }

    /// Whether this very daemon is one of them: it cannot end itself and go on.
    pub fn has_ourselves(&self) -> bool {
        self.instances.iter().any(|instance| instance.pid == std::process::id())
    }

    /// Ends the daemons on top, which unmounts; with `killing` also those who use their mounts.
    pub fn end_instances(&self, killing: bool) -> Result<(), Refused> {
        for Instance { instance, pid, mountpoint } in &self.instances {
            if let (true, Some(mountpoint)) = (killing, mountpoint) {
                let users = Users { processes: holders(mountpoint, true), instances: Vec::new() };
                users.kill_processes();
            }
            signal(*pid, Signal::SIGTERM);
            if !gone(&[*pid], ENDING) {
                return Err(Refused::new(Kind::Busy, format!("instance {instance} has not ended")));
            }
        }
        Ok(())
    }

    /// Kills the processes and waits until they are gone. One that hangs in the kernel may not be.
    pub fn kill_processes(&self) -> bool {
        let pids: Vec<u32> = self.processes.iter().map(|holder| holder.pid).collect();
        pids.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
        gone(&pids, DYING)
    }
}

fn signal(pid: u32, signal: Signal) {
    if pid > 1 && pid != std::process::id() {
        // One that has ended meanwhile is what was wanted.
        let _ = kill(Pid::from_raw(pid as i32), signal);
    }
}

fn gone(pids: &[u32], limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while pids.iter().any(|pid| lives(*pid)) {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    true
}

/// A zombie has closed its files.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Whether we have something open there ourselves.
fn holds(place: &Path) -> bool {
    open_files(std::process::id()).any(|file| file.starts_with(place))
}

fn open_files(pid: u32) -> impl Iterator<Item = PathBuf> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_link(file.path()).ok())
}

/// The instance that a process is: one that serves FUSE and holds its state file open.
fn instance(pid: u32) -> Option<Instance> {
    let files: Vec<PathBuf> = open_files(pid).collect();
    if !files.iter().any(|file| file == Path::new("/dev/fuse")) {
        return None;
    }
    let states = files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "json"));
    let read = |file: PathBuf| serde_json::from_slice::<Instance>(&fs::read(file).ok()?).ok();
    states.filter_map(read).find(|found| found.pid == pid)
}
