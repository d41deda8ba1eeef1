//! The mountpoint: what may be mounted where, and how a mount ends.
//!
//! Called by the main thread and by helpers of the control thread, never by a reader. Looks at mounts through
//! `/proc/self/mountinfo` and at processes through procfs; never opens or examines anything below a mountpoint of
//! ours, which could wait for ourselves.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::sys::mounts::{self, Mount};
use crate::sys::stat;

/// A process that has something open below a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    pub comm: String,
    pub what: PathBuf,
}

/// How long a look at all processes may take. One that hangs in exec, because what it closes there is stalled, keeps
/// everybody waiting who looks at it.
const LOOK: Duration = Duration::from_secs(2);
/// So many look at a time, so that one process that hangs does not hide those after it.
const LOOKERS: usize = 8;

/// The processes that hold something at or below a place: files always, and with `directories` also those whose
/// working directory, root, program or mapping lies there. As many as are found in time.
pub fn holders(place: &Path, directories: bool) -> Vec<Holder> {
    let place = place.to_path_buf();
    look(directories, move |_, target| target.starts_with(&place))
}

/// The processes that hold something of a connection, also of one that has no place in the tree of names any more.
pub fn holders_of(connection: u32) -> Vec<Holder> {
    look(true, move |link, _| stat::device(link).is_ok_and(|device| device == (0, connection)))
}

/// Why a mount that was detached is still there.
pub fn lives_on(holders: &[Holder]) -> String {
    let pids: Vec<String> = holders.iter().map(|holder| format!("pid {} ({})", holder.pid, holder.comm)).collect();
    match pids.as_slice() {
        [] => "it lives on until what is open there is closed".into(),
        [pid] => format!("it lives on until {pid} closes what it has open there"),
        pids => format!("it lives on until {} close what they have open there", pids.join(", ")),
    }
}

/// Looks at what all processes have open: at the links of procfs, and what they lead to.
fn look(directories: bool, holds: impl Fn(&Path, &Path) -> bool + Clone + Send + 'static) -> Vec<Holder> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let (ask, asked) = crossbeam_channel::unbounded();
    for pid in pids.filter(|pid| *pid != own) {
        // The channel has no end.
        let _ = ask.send(pid);
    }
    drop(ask);
    let (tell, told) = mpsc::channel();
    for _ in 0..LOOKERS {
        let (holds, asked, tell) = (holds.clone(), asked.clone(), tell.clone());
        std::thread::spawn(move || {
            let mut found = asked.iter().filter_map(|pid| holder(pid, directories, &holds));
            // An error says that nobody waits any more.
            let _ = found.try_for_each(|holder| tell.send(holder));
        });
    }
    drop(tell);
    let until = Instant::now() + LOOK;
    std::iter::from_fn(|| told.recv_timeout(until.saturating_duration_since(Instant::now())).ok()).collect()
}

fn holder(pid: u32, directories: bool, holds: &impl Fn(&Path, &Path) -> bool) -> Option<Holder> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    let maps = fs::read_dir(process.join("map_files")).into_iter().flatten().flatten().map(|entry| entry.path());
    let places = ["cwd", "root", "exe"].into_iter().map(|name| process.join(name)).chain(maps);
    let what = files
        // Not even looked at otherwise: the mappings of a process that is stuck in a page fault cannot be read.
        .chain(directories.then_some(places).into_iter().flatten())
        .find_map(|link| fs::read_link(&link).ok().filter(|target| holds(&link, target)))?;
    let comm = fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_string();
    Some(Holder { pid, comm, what })
}

/// Why a mount is refused.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    pub reason: String,
    pub hint: String,
}

fn refuse(reason: impl Into<String>, hint: impl Into<String>) -> Refused {
    Refused { reason: reason.into(), hint: hint.into() }
}

/// Where a mount is to be.
#[derive(Clone, Debug)]
pub struct Places {
    pub backing: PathBuf,
    pub mountpoint: PathBuf,
}

/// An instance that lives: what a second one must not touch.
#[derive(Clone, Debug)]
pub struct Living {
    pub instance: String,
    pub backing: PathBuf,
    pub mountpoint: PathBuf,
    /// The connection of one that has no place any more, and lives on.
    pub detached: Option<u32>,
}

/// Finds out where the mount is to be, cleans a stale mountpoint, and refuses what cannot go well.
///
/// # Errors
/// With the reason and what can be done; then nothing has been changed but for a stale mount that was removed.
pub fn prepare(backing: &Path, mountpoint: &Path, living: &[Living]) -> Result<Places, Refused> {
    for path in [backing, mountpoint] {
        if path.to_str().is_none() {
            let reason = format!("{path:?} is not UTF-8, and cannot be told to clients");
            return Err(refuse(reason, "files below may have any names; these two directories may not"));
        }
    }
    let mountpoint = &resolve(mountpoint)?;
    let backing_given = &resolve(backing)?;
    refuse_second(backing_given, mountpoint, living)?;
    clean_stale(mountpoint)?;
    let places =
        Places { backing: directory(backing, "backing directory")?, mountpoint: directory(mountpoint, "mountpoint")? };
    // Once more, with what symlinks lead to: before, a dead mount could not be looked at.
    refuse_second(&places.backing, &places.mountpoint, living)?;
    let there = mounts::at(&places.mountpoint).ok().flatten();
    if let Some(instance) = there.as_ref().and_then(Mount::instance) {
        let reason = format!("{} is mounted by us: instance {instance}", mountpoint.display());
        return Err(refuse(
            reason,
            format!("umount {}, or NEMESISFS_RUNDIR as that instance has it", mountpoint.display()),
        ));
    }
    if places.mountpoint != places.backing {
        if places.mountpoint.starts_with(&places.backing) {
            return Err(refuse(
                format!("the mountpoint {} is inside the backing directory", mountpoint.display()),
                "mount in place (BACKING = MOUNTPOINT), or choose a mountpoint outside",
            ));
        }
        if let Some(there) = there {
            return Err(refuse(
                format!("{} is busy: {} ({}) is mounted there", mountpoint.display(), there.source, there.filesystem),
                "choose an empty directory, or mount in place (BACKING = MOUNTPOINT)",
            ));
        }
    }
    let busy = holders(&places.mountpoint, false);
    if let Some(first) = busy.first() {
        let pids: Vec<String> = busy.iter().map(|holder| holder.pid.to_string()).collect();
        return Err(refuse(
            format!(
                "{} is busy: process {} ({}) has {} open",
                mountpoint.display(),
                pids.join(", "),
                first.comm,
                first.what.display()
            ),
            "it would go on past the mount, untouched by any fault: stop it first",
        ));
    }
    Ok(places)
}

/// Two instances at one place, or over one directory, would undo each other's work.
fn refuse_second(backing: &Path, mountpoint: &Path, living: &[Living]) -> Result<(), Refused> {
    for Living { instance, backing: theirs, mountpoint: at, detached } in living {
        let (at_text, here) = (at.display(), mountpoint.display());
        if let Some(connection) = detached.filter(|_| backing == theirs) {
            let why = lives_on(&holders_of(connection));
            let reason =
                format!("{} is served by instance {instance}, detached from {at_text}: {why}", backing.display());
            return Err(refuse(reason, format!("nemesisfs umount --instance {instance} --force cuts it off")));
        }
        if detached.is_none() && mountpoint.starts_with(at) {
            let reason = format!("{here} is mounted by us: instance {instance} serves {at_text}");
            return Err(refuse(reason, format!("nemesisfs umount {at_text}")));
        }
        if backing == theirs {
            let reason = format!("{} is served by instance {instance}, at {at_text}", backing.display());
            return Err(refuse(reason, "two instances over one directory would not see each other's changes"));
        }
    }
    Ok(())
}

/// The place that a path names. What is mounted there may be dead, and cannot be looked at.
fn resolve(path: &Path) -> Result<PathBuf, Refused> {
    mounts::place(path).map_err(|error| refuse(format!("{}: {error}", path.display()), "both directories must exist"))
}

fn directory(path: &Path, what: &str) -> Result<PathBuf, Refused> {
    let failed = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => format!("mkdir -p {}", path.display()),
            _ => format!("the {what} must be a directory that we may open"),
        };
        refuse(format!("{what} {}: {error}", path.display()), hint)
    };
    let resolved = path.canonicalize().map_err(failed)?;
    match resolved.is_dir() {
        true => Ok(resolved),
        false => Err(failed(io::Error::from_raw_os_error(libc::ENOTDIR))),
    }
}

/// Removes mounts at this place whose daemon is gone. A FUSE mount that does not answer `ENOTCONN` is left alone.
fn clean_stale(mountpoint: &Path) -> Result<(), Refused> {
    loop {
        let top = mounts::at(mountpoint).ok().flatten();
        let Some(top) = top.filter(|mount| mount.filesystem.starts_with("fuse")) else { return Ok(()) };
        if !mounts::is_disconnected(mountpoint) {
            return Ok(());
        }
        tracing::info!(mountpoint = %mountpoint.display(), source = top.source, "removing a mount whose daemon is gone");
        mounts::unmount(mountpoint, true).map_err(|error| {
            refuse(
                format!("{} is a dead mount and cannot be removed: {error}", mountpoint.display()),
                format!("umount -l {}", mountpoint.display()),
            )
        })?;
    }
}

/// How a mount is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Only if nobody uses it.
    Normal,
    /// From the tree of names at once; it ends with the last close.
    Lazy,
    /// With the connection to the kernel: every open call fails.
    Force,
}

/// Unmounts.
///
/// # Errors
/// `EBUSY` when somebody uses it, and whatever else umount says.
pub fn unmount(mountpoint: &Path, minor: u32, how: How) -> io::Result<()> {
    let place = place_of(mountpoint, minor)?;
    if how == How::Force {
        mounts::abort(minor)?;
    }
    match place {
        Some(place) => Ok(mounts::unmount(&place, how != How::Normal)?),
        // What is mounted there by now is somebody else's.
        None => Ok(()),
    }
}

/// Where a connection is mounted: on its mountpoint, or where that has been moved to; nowhere, when it was detached.
///
/// # Errors
/// When another mount lies over it, which would be unmounted in its stead.
pub fn place_of(mountpoint: &Path, minor: u32) -> io::Result<Option<PathBuf>> {
    let mounts = mounts::all()?;
    let ours: Vec<&Path> = mounts.iter().filter(|mount| mount.is_of(minor)).map(|mount| &*mount.mountpoint).collect();
    let place = ours.iter().find(|place| **place == mountpoint).or(ours.first());
    let Some(place) = place else { return Ok(None) };
    match mounts.iter().rev().find(|mount| mount.mountpoint == *place) {
        Some(top) if !top.is_of(minor) => {
            let (what, sort) = (&top.source, &top.filesystem);
            Err(io::Error::other(format!("{what} ({sort}) is mounted over {}, and is not ours", place.display())))
        }
        _ => Ok(Some(place.to_path_buf())),
    }
}

/// Tries for a while: after its requests have been answered, a program takes a moment to close its files.
pub fn unmount_patiently(mountpoint: &Path, minor: u32, patience: Duration) -> io::Result<()> {
    let until = Instant::now() + patience;
    loop {
        match unmount(mountpoint, minor, How::Normal) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}
