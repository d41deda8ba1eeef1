//! The mountpoint: what may be mounted where, and how a mount ends.
//!
//! Called by the main thread and by helpers of the control thread, never by a reader. Looks at mounts through
//! `/proc/self/mountinfo` and at processes through procfs; never opens or examines anything below a mountpoint of
//! ours, which could wait for ourselves.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The type under which the kernel lists our mounts.
pub const TYPE: &str = "fuse.nemesisfs";
/// What stands before the instance's name in the source of a mount.
pub const SOURCE: &str = "nemesisfs:";

const FUSECTL: &str = "/sys/fs/fuse/connections";

/// One line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    /// Minor number of the device: for FUSE, the number of the connection.
    pub minor: u32,
    pub mountpoint: PathBuf,
    pub kind: String,
    pub source: String,
}

impl Mount {
    pub fn is_ours(&self) -> bool {
        self.kind == TYPE
    }

    /// The instance whose mount it is.
    pub fn instance(&self) -> Option<&str> {
        self.source.strip_prefix(SOURCE).filter(|_| self.is_ours())
    }
}

/// The mount table of this process, in order: of two mounts at one place the later is on top.
///
/// # Errors
/// When procfs cannot be read.
pub fn mounts() -> io::Result<Vec<Mount>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let line: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = line.iter().position(|word| *word == b"-")?;
    let text = |word: &[u8]| String::from_utf8_lossy(&unescape(word)).into_owned();
    Some(Mount {
        id: text(line.first()?).parse().ok()?,
        minor: text(line.get(2)?).split_once(':')?.1.parse().ok()?,
        mountpoint: PathBuf::from(std::ffi::OsString::from_vec(unescape(line.get(4)?))),
        kind: text(line.get(dash + 1)?),
        source: text(line.get(dash + 2)?),
    })
}

/// Blanks and backslashes stand as `\040` and the like.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
        });
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

/// A process that has something open below a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    pub comm: String,
    pub what: PathBuf,
}

/// The processes that hold something at or below a place: files always, and with `directories` also those whose
/// working directory, root, program or mapping lies there.
pub fn holders(place: &Path, directories: bool) -> Vec<Holder> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own).filter_map(|pid| holder(pid, place, directories)).collect()
}

fn holder(pid: u32, place: &Path, directories: bool) -> Option<Holder> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    let maps = fs::read_dir(process.join("map_files")).into_iter().flatten().flatten().map(|entry| entry.path());
    let places = ["cwd", "root", "exe"].into_iter().map(|name| process.join(name)).chain(maps);
    let what = files
        .chain(places.filter(|_| directories))
        .filter_map(|link| fs::read_link(link).ok())
        .find(|target| target.starts_with(place))?;
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
}

/// Finds out where the mount is to be, cleans a stale mountpoint, and refuses what cannot go well.
///
/// # Errors
/// With the reason and what can be done; then nothing has been changed but for a stale mount that was removed.
pub fn prepare(backing: &Path, mountpoint: &Path, living: &[Living]) -> Result<Places, Refused> {
    let mountpoint = &resolve_parent(mountpoint)?;
    let backing_given = &resolve_parent(backing)?;
    for other in living {
        let name = &other.instance;
        if mountpoint.starts_with(&other.mountpoint) {
            let at = other.mountpoint.display();
            return Err(refuse(
                format!("{} is mounted by us: instance {name} serves {at}", mountpoint.display()),
                format!("nemesisfs umount {at}"),
            ));
        }
        if *backing_given == other.backing {
            return Err(refuse(
                format!("{} is served by instance {name}, at {}", backing.display(), other.mountpoint.display()),
                "two instances over one directory would not see each other's changes".to_string(),
            ));
        }
    }
    clean_stale(mountpoint)?;
    let places = Places { backing: directory(backing, "backing directory")?, mountpoint: directory(mountpoint, "mountpoint")? };
    if places.mountpoint != places.backing {
        if places.mountpoint.starts_with(&places.backing) {
            return Err(refuse(
                format!("the mountpoint {} is inside the backing directory", mountpoint.display()),
                "mount in place (BACKING = MOUNTPOINT), or choose a mountpoint outside",
            ));
        }
        if let Some(there) = mounts().unwrap_or_default().iter().rfind(|m| m.mountpoint == places.mountpoint) {
            return Err(refuse(
                format!("{} is busy: {} ({}) is mounted there", mountpoint.display(), there.source, there.kind),
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

/// The path with everything but its last part resolved: the last may be a dead mount, which cannot be looked at.
fn resolve_parent(path: &Path) -> Result<PathBuf, Refused> {
    let failed = |error: io::Error| refuse(format!("{}: {error}", path.display()), "both directories must exist");
    let absolute = std::path::absolute(path).map_err(failed)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(failed)?.join(name)),
        _ => Ok(absolute),
    }
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
        let table = mounts().unwrap_or_default();
        let top = table.iter().rfind(|mount| mount.mountpoint == mountpoint);
        let Some(top) = top.filter(|mount| mount.kind.starts_with("fuse")) else { return Ok(()) };
        let dead = matches!(nix::sys::stat::stat(mountpoint), Err(nix::errno::Errno::ENOTCONN));
        if !dead {
            return Ok(());
        }
        tracing::info!(mountpoint = %mountpoint.display(), source = top.source, "removing a mount whose daemon is gone");
        detach(mountpoint).map_err(|error| {
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
    match how {
        How::Normal => by_kernel_or_helper(mountpoint, MntFlags::empty(), &["-u"]),
        How::Lazy => detach(mountpoint),
        How::Force => {
            abort(minor)?;
            detach(mountpoint)
        }
    }
}

fn detach(mountpoint: &Path) -> io::Result<()> {
    by_kernel_or_helper(mountpoint, MntFlags::MNT_DETACH, &["-u", "-z"])
}

/// Without privilege only the setuid helper may unmount.
fn by_kernel_or_helper(mountpoint: &Path, flags: MntFlags, helper: &[&str]) -> io::Result<()> {
    match umount2(mountpoint, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Err(nix::errno::Errno::EPERM) => {
            let done = Command::new("fusermount3").args(helper).arg("--").arg(mountpoint).output()?;
            match done.status.success() {
                true => Ok(()),
                false if done.stderr.windows(4).any(|word| word == b"busy") => {
                    Err(io::Error::from_raw_os_error(libc::EBUSY))
                }
                false => Err(io::Error::other(String::from_utf8_lossy(&done.stderr).trim().to_string())),
            }
        }
        // Not mounted any more: that is what was wanted.
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        other => Ok(other?),
    }
}

/// Cuts the connection of a FUSE mount: every call that waits fails with `ECONNABORTED`.
///
/// # Errors
/// When the control filesystem can be neither found nor mounted, or there is no such connection.
pub fn abort(minor: u32) -> io::Result<()> {
    let file = Path::new(FUSECTL).join(minor.to_string()).join("abort");
    if !Path::new(FUSECTL).join(minor.to_string()).exists() {
        mount(Some("none"), FUSECTL, Some("fusectl"), MsFlags::empty(), None::<&str>)?;
    }
    fs::write(file, "1")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_is_read_with_its_escapes() {
        let line = b"36 35 0:51 / /mnt/with\\040blank rw,nosuid shared:1 - fuse.nemesisfs nemesisfs:n1 rw,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.minor), (36, 51));
        assert_eq!(mount.mountpoint, Path::new("/mnt/with blank"));
        assert_eq!(mount.instance(), Some("n1"));
    }
}
