//! Who uses a device: processes, and instances of ours whose backing directory lies on it.
//!
//! Through procfs, with a limit of time. No locks. Must never: signal ourselves, init, or a daemon of ours by SIGKILL, which
//! would leave a dead mount.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mapping::Mapping;
use super::record::Record;
use super::{Kind, Refused};
use crate::fs::mount::{Holder, holders};
use crate::fs::process::start_time;
use crate::host::shown;
use crate::sys::mounts::Mount;

/// How long processes may take to be stopped, and how often those are looked for that they have started meanwhile.
const STOPPING: Duration = Duration::from_secs(1);
const LOOKS: u32 = 5;
/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(10);
/// A daemon that is told to end unmounts by force after ten seconds.
const ENDING: Duration = Duration::from_secs(20);
/// How long a filesystem may take to end after its last umount.
const LEAVING: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A daemon of ours, as the state file tells that it holds open.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    instance: String,
    pid: u32,
    mountpoint: Option<PathBuf>,
}

/// A process that we stop: one that has its number later is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub pid: u32,
    /// In ticks after the boot.
    started: u64,
}

impl Stopped {
    /// None when it is gone, or was stopped by somebody else.
    fn of(pid: u32) -> Option<Stopped> {
        let runs = state(&PathBuf::from(format!("/proc/{pid}"))).is_some_and(|state| !matches!(state, 'T' | 't'));
        Some(Stopped { pid, started: start_time(pid)? }).filter(|_| runs)
    }

    /// It runs again, if it still is there.
    pub fn go_on(&self) {
        if start_time(self.pid) == Some(self.started) {
            signal(self.pid, Signal::SIGCONT);
        }
    }
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
        let process = |holder: &Holder| json!({"pid": holder.pid, "comm": holder.comm, "what": shown(&holder.what)});
        let instance = |one: &Instance| {
            json!({"pid": one.pid, "comm": "nemesisfs", "what": format!("instance {}", one.instance), "instance": one.instance,
                "mountpoint": one.mountpoint.as_deref().map(shown)})
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

    /// Adds those who use the mounts of ours on top.
    pub fn add_clients(&mut self) {
        for place in self.instances.iter().filter_map(|instance| instance.mountpoint.clone()).collect::<Vec<_>>() {
            for holder in holders(&place, true) {
                self.add(holder.pid, holder);
            }
        }
    }

    /// Stops the processes, and those that they have started meanwhile: who does not run tells nobody that anything was
    /// written. One that is in the kernel stops when it comes back. `keep` is told of each before it is stopped.
    ///
    /// # Errors
    /// That of `keep`.
    pub fn stop_processes(
        &mut self,
        look: impl Fn() -> Users,
        mut keep: impl FnMut(Vec<Stopped>) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let mut new: Vec<u32> = self.pids();
        for _ in 0..LOOKS {
            keep(new.iter().filter_map(|pid| Stopped::of(*pid)).collect())?;
            new.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
            wait(STOPPING, || new.iter().all(|pid| is_halted(*pid)));
            let known = self.pids();
            look().processes.into_iter().for_each(|holder| self.add(holder.pid, holder));
            new = self.pids().into_iter().filter(|pid| !known.contains(pid)).collect();
            if new.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn pids(&self) -> Vec<u32> {
        self.processes.iter().map(|holder| holder.pid).collect()
    }

    /// Ends the daemons on top, which unmounts.
    pub fn end_instances(&self) -> Result<(), Refused> {
        for Instance { instance, pid, .. } in &self.instances {
            signal(*pid, Signal::SIGTERM);
            if !wait(ENDING, || !lives(*pid)) {
                return Err(Refused::new(Kind::Busy, format!("instance {instance} has not ended")));
            }
        }
        Ok(())
    }

    /// Kills the processes and waits until they are gone. One that hangs in the kernel may not be.
    pub fn kill_processes(&self) -> bool {
        let pids = self.pids();
        pids.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
        wait(DYING, || !pids.iter().any(|pid| lives(*pid)))
    }

    /// The line of a person who sends them a signal.
    pub fn command(&self, signal: &str) -> String {
        let pids: Vec<String> = self.pids().iter().map(u32::to_string).collect();
        format!("kill -{signal} {}", pids.join(" "))
    }
}

fn signal(pid: u32, signal: Signal) {
    if pid > 1 && pid != std::process::id() {
        // One that has ended meanwhile is what was wanted.
        let _ = kill(Pid::from_raw(pid as i32), signal);
    }
}

fn wait(limit: Duration, done: impl Fn() -> bool) -> bool {
    let until = Instant::now() + limit;
    while !done() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    true
}

/// Waits until nobody has the device, by asking for it alone, as mkfs does: a filesystem has it for as long as it lives
/// anywhere, also detached, and in mount namespaces that we do not see into.
///
/// # Errors
/// With who may have it.
pub fn released(record: &Record, mapping: &Mapping) -> Result<(), Refused> {
    let until = Instant::now() + LEAVING;
    while is_held(&record.device()) {
        if Instant::now() > until {
            let elsewhere = namespaces(mapping);
            let who = match elsewhere.first() {
                Some((pid, comm)) => format!("it is mounted in the mount namespace of process {pid} ({comm})"),
                None => "its filesystem is detached and somebody has it open, or another device, array or swap has it"
                    .into(),
            };
            let holders: Vec<Value> = elsewhere
                .iter()
                .map(|(pid, comm)| json!({"pid": pid, "comm": comm, "what": "its mount namespace"}))
                .collect();
            let detail = format!("device {} is still in use: {who}", record.name);
            let refused = Refused::new(Kind::Busy, detail).hint("it goes on when they have gone, or have unmounted it");
            return Err(refused.with("holders", holders.into()));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

fn is_held(device: &Path) -> bool {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Other mappings, arrays and swap on top, which no process holds.
pub fn stacked(mapping: &Mapping) -> Option<String> {
    let node = mapping.node.file_name()?;
    let holders = fs::read_dir(Path::new("/sys/block").join(node).join("holders"));
    let holder = holders.into_iter().flatten().flatten().next();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    match holder {
        Some(holder) => Some(format!("/dev/{} is on top of it", holder.file_name().to_string_lossy())),
        None if swaps.lines().any(|line| line.split(' ').next().map(Path::new) == Some(&mapping.node)) => {
            Some("it is swap".into())
        }
        None => None,
    }
}

/// A process of each other mount namespace in which the device is mounted.
fn namespaces(mapping: &Mapping) -> Vec<(u32, String)> {
    let numbers = format!("{}:{}", mapping.major, mapping.minor);
    let mut seen = vec![fs::read_link("/proc/self/ns/mnt").unwrap_or_default()];
    let mut found = Vec::new();
    for pid in
        fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
    {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        if table.lines().any(|line| line.split(' ').nth(2) == Some(&numbers)) {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push((pid, comm.trim().to_string()));
        }
    }
    found
}

/// A zombie has closed its files.
fn lives(pid: u32) -> bool {
    state(&PathBuf::from(format!("/proc/{pid}"))).is_some_and(|state| state != 'Z')
}

/// No thread of it runs, nor will before it is told to.
fn is_halted(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| state(&thread.path())).all(|state| matches!(state, 'T' | 't' | 'D' | 'Z' | 'X'))
}

fn state(process: &Path) -> Option<char> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
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
