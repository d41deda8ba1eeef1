//! The filesystem on a device: made, mounted, unmounted.
//!
//! By the system's tools; where something is mounted is read from the mount table. No locks of its own. Must never: look at
//! a mountpoint, which may stand still.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::asked::{Definition, Filesystem};
use super::mapping::Mapping;
use super::record::{MountAgain, Record};
use super::{Kind, Refused, at};
use crate::host::tool::{self, ToolError, Tools, ask};
use crate::sys::mounts::{self, Mount};

/// How long a filesystem may take to be made.
const MKFS: Duration = Duration::from_secs(300);
/// How long one may take to be mounted or unmounted: a journal is replayed, memory is written.
const MOUNT: Duration = Duration::from_secs(120);

/// Whether this host can make it.
///
/// # Errors
/// With what is missing.
pub fn supports(filesystem: Filesystem) -> Result<(), Refused> {
    if filesystem == Filesystem::None {
        return Ok(());
    }
    let mkfs = format!("mkfs.{}", filesystem.word());
    if !tool::is_there(&mkfs) {
        let package = match filesystem {
            Filesystem::Xfs => "xfsprogs",
            Filesystem::Btrfs => "btrfs-progs",
            Filesystem::Ext4 | Filesystem::None => "e2fsprogs",
        };
        return Err(Refused::not_supported(format!("{mkfs} is not installed here"))
            .hint(format!("on Debian: apt-get install {package}")));
    }
    let known = || {
        fs::read_to_string("/proc/filesystems")
            .unwrap_or_default()
            .split_whitespace()
            .any(|word| word == filesystem.word())
    };
    if !known() {
        let _ = ask(&["modprobe", filesystem.word()]);
    }
    match known() {
        true => Ok(()),
        false => Err(Refused::not_supported(format!("the kernel of this host has no {}", filesystem.word()))),
    }
}

/// Makes the filesystem that was asked for.
pub fn make(tools: &mut Tools, definition: &Definition, device: &Path) -> Result<(), ToolError> {
    let force: &[&str] = match (definition.filesystem, definition.force) {
        (Filesystem::None, _) => return Ok(()),
        (_, false) => &[],
        (Filesystem::Ext4, true) => &["-F"],
        (_, true) => &["-f"],
    };
    let mut words = vec![format!("mkfs.{}", definition.filesystem.word()), "-q".into()];
    words.extend(force.iter().map(ToString::to_string));
    words.extend(definition.mkfs_options.iter().cloned());
    words.push(device.to_string_lossy().into_owned());
    tools.run_within(MKFS, &words).map(drop)
}

/// Where its filesystem is mounted, the first mount first. A mount of btrfs has numbers of its own.
pub fn mounts_of(record: &Record, mapping: &Mapping) -> Vec<Mount> {
    let names = [record.device(), mapping.node.clone()];
    let numbers = format!("{}:{}", mapping.major, mapping.minor);
    let is_its = |mount: &Mount| mount.device == numbers || names.iter().any(|name| name == Path::new(&mount.source));
    mounts::all().unwrap_or_default().into_iter().filter(is_its).collect()
}

/// The mounts as they are, to be made again; a part of the filesystem that is bound elsewhere is in the way.
///
/// # Errors
/// When there is such a part.
pub fn to_mount_again(record: &Record, mounts: &[Mount]) -> Result<Vec<MountAgain>, Refused> {
    if let Some(part) = mounts.iter().find(|mount| mount.root != Path::new("/")) {
        let detail = format!("{} is a bind mount of the device's filesystem", part.mountpoint.display());
        return Err(Refused::new(Kind::Busy, detail).hint(format!("umount {}", part.mountpoint.display())));
    }
    let again = mounts.iter().map(|mount| MountAgain {
        mountpoint: mount.mountpoint.clone(),
        filesystem: mount.filesystem.clone(),
        options: match (&record.definition.mount_options, &record.definition.mountpoint) {
            (Some(options), Some(ours)) if *ours == mount.mountpoint => options.clone(),
            _ => options_of(mount),
        },
    });
    Ok(again.collect())
}

/// All options of a mount, each once. Of what it and its filesystem disagree about, whether they may be written, its own come last.
fn options_of(mount: &Mount) -> String {
    let mut words: Vec<&str> = Vec::new();
    for word in mount.filesystem_options.split(',').filter(|word| !matches!(*word, "" | "rw" | "ro")) {
        words.push(word);
    }
    for word in mount.options.split(',').filter(|word| !word.is_empty()) {
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words.join(",")
}

/// Mounts the device at the place that was asked for.
pub fn mount(tools: &mut Tools, record: &Record) -> Result<(), Refused> {
    let Some(mountpoint) = &record.definition.mountpoint else { return Ok(()) };
    let kind = Some(record.definition.filesystem).filter(|kind| *kind != Filesystem::None).map(Filesystem::word);
    mount_at(tools, &record.device(), mountpoint, kind, record.definition.mount_options.as_deref())
}

/// Mounts a device as it was.
pub fn mount_again(tools: &mut Tools, device: &Path, was: &MountAgain) -> Result<(), Refused> {
    mount_at(tools, device, &was.mountpoint, Some(&was.filesystem), Some(&was.options))
}

fn mount_at(
    tools: &mut Tools,
    device: &Path,
    mountpoint: &Path,
    kind: Option<&str>,
    options: Option<&str>,
) -> Result<(), Refused> {
    let (device, mountpoint) = (device.to_string_lossy(), mountpoint.to_string_lossy());
    let mut words = vec!["mount"];
    words.extend(kind.into_iter().flat_map(|kind| ["-t", kind]));
    words.extend(options.into_iter().flat_map(|options| ["-o", options]));
    words.extend([&*device, &*mountpoint]);
    tools.run_within(MOUNT, &words)?;
    Ok(())
}

/// Unmounts all mounts of the device, the last one first.
pub fn unmount_all(tools: &mut Tools, mounts: &[Mount], lazy: bool) -> Result<(), Refused> {
    for mount in mounts.iter().rev() {
        let mut words = vec!["umount".as_ref()];
        if lazy {
            words.push("--lazy".as_ref());
        }
        words.push(mount.mountpoint.as_os_str());
        tools.run_within(MOUNT, &words)?;
    }
    Ok(())
}

/// The mountpoint has to be a directory on which nothing is mounted, or not to be there in one that is.
///
/// # Errors
/// With what is in the way. Gives the resolved path.
pub fn examine_mountpoint(path: &Path) -> Result<std::path::PathBuf, Refused> {
    let resolved = match path.canonicalize() {
        Ok(resolved) if resolved.is_dir() => resolved,
        Ok(resolved) => return Err(Refused::conflict(format!("{} is no directory", resolved.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(at(path.display())(error));
            };
            parent.canonicalize().map_err(at(parent.display()))?.join(name)
        }
        Err(error) => return Err(at(path.display())(error)),
    };
    match mounts::at(&resolved).ok().flatten() {
        None => Ok(resolved),
        Some(there) => {
            let detail =
                format!("{} is a mountpoint already: {} ({})", resolved.display(), there.source, there.filesystem);
            Err(Refused::conflict(detail).hint("choose another directory"))
        }
    }
}

/// Synchronises the filesystem, as syncfs does.
pub fn sync(tools: &mut Tools, mounts: &[Mount]) -> Result<(), Refused> {
    if let Some(mount) = mounts.first() {
        tools.run_within(MOUNT, &["sync".as_ref(), "--file-system".as_ref(), mount.mountpoint.as_os_str()])?;
    }
    Ok(())
}
