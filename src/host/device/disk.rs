//! What a device stands on: an image with its loop device, or a disk of the host.
//!
//! An image is made under a name of ours that is in the record before it is, and gets its own name when the record knows
//! its inode: so that one that is there is never overwritten, and only what we made is removed. No locks of its own.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::asked::{Filesystem, Ground};
use super::{Refused, at};
use crate::host::tool::{self, Tools, ask};
use crate::sys::mounts;

/// How often another loop device is tried when somebody was faster.
const TRIES: u32 = 10;
const SECTOR: u64 = 512;

/// What tells a file from a later one with its name, and, by its birth, from one with its inode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    ino: u64,
    born_ns: u64,
}

impl Made {
    fn of(path: &Path) -> Option<Made> {
        let found = fs::symlink_metadata(path).ok()?;
        let born = found.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        Some(Made { ino: found.ino(), born_ns: u64::try_from(born.as_nanos()).unwrap_or_default() })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub ground: Ground,
    /// Under which name the image is made.
    draft: PathBuf,
    /// The image, once it was made by us.
    made: Option<Made>,
    /// The loop device that is, or is about to be, over the image.
    pub loop_device: Option<PathBuf>,
}

impl Disk {
    /// Nothing is made yet.
    pub fn of(ground: &Ground, id: &str) -> Disk {
        let draft = ground.path().with_file_name(format!(".nemesisfs-{id}"));
        Disk { ground: ground.clone(), draft, made: None, loop_device: None }
    }

    /// The block device.
    pub fn device(&self) -> PathBuf {
        match (&self.ground, &self.loop_device) {
            (Ground::Device(path), _) => path.clone(),
            (_, Some(device)) => device.clone(),
            (Ground::NewImage(path, _) | Ground::OldImage(path), None) => path.clone(),
        }
    }

    /// Puts the image at its place. `save` writes the record.
    pub fn make(&mut self, tools: &mut Tools, save: impl Fn(&Disk) -> Result<(), Refused>) -> Result<(), Refused> {
        let Ground::NewImage(path, size) = self.ground.clone() else { return Ok(()) };
        let draft = self.draft.display().to_string();
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.draft).map_err(at(&draft))?;
        file.set_len(size).map_err(at(&draft))?;
        self.made = Made::of(&self.draft);
        save(self)?;
        tools.lines.push(tool::line(&[
            "truncate".as_ref(),
            "--size".as_ref(),
            size.to_string().as_ref(),
            path.as_os_str(),
        ]));
        match renameat2(AT_FDCWD, &self.draft, AT_FDCWD, &path, RenameFlags::RENAME_NOREPLACE) {
            Err(nix::errno::Errno::EEXIST) => Err(there_already(&path)),
            other => other.map_err(|errno| at(path.display())(errno.into())),
        }
    }

    /// Puts a loop device over the image. `save` writes the record, with the device that is going to be it.
    pub fn attach(&mut self, tools: &mut Tools, save: impl Fn(&Disk) -> Result<(), Refused>) -> Result<(), Refused> {
        let (Ground::NewImage(path, _) | Ground::OldImage(path)) = self.ground.clone() else { return Ok(()) };
        for _ in 0..TRIES {
            let free = ask(&["losetup", "--find"])?.trim().to_string();
            self.loop_device = Some(free.clone().into());
            save(self)?;
            let attached = tools.run(&["losetup".as_ref(), free.as_ref(), path.as_os_str()]);
            match attached {
                Ok(_) => return Ok(()),
                Err(_) if backing_file(Path::new(&free)).is_some_and(|other| other != path) => {
                    tools.lines.pop();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refused::conflict("others take every loop device that is free").hint("losetup --list"))
    }

    /// The number of sectors.
    pub fn sectors(&self) -> Result<u64, Refused> {
        let device = self.device();
        let name = fs::canonicalize(&device).map_err(at(device.display()))?;
        let size = Path::new("/sys/class/block").join(name.file_name().unwrap_or_default()).join("size");
        let text = fs::read_to_string(&size).map_err(at(size.display()))?;
        text.trim().parse().map_err(|_| Refused::conflict(format!("{}: {text:?}", size.display())))
    }

    /// Takes away what we made of it, as far as it is there.
    pub fn unmake(&mut self, tools: &mut Tools) -> Result<(), Refused> {
        let path = self.ground.path().clone();
        if let Some(device) = self.loop_device.as_ref().filter(|device| is_over(device, &path)) {
            tools.run(&["losetup".as_ref(), "--detach".as_ref(), device.as_os_str()])?;
        }
        if matches!(self.ground, Ground::NewImage(..)) {
            remove_file(&self.draft)?;
            if self.made.is_some() && Made::of(&path) == self.made {
                tools.lines.push(tool::line(&["rm".as_ref(), path.as_os_str()]));
                remove_file(&path)?;
            }
        }
        Ok(())
    }
}

fn remove_file(path: &Path) -> Result<(), Refused> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path.display())(error)),
        _ => Ok(()),
    }
}

fn there_already(path: &Path) -> Refused {
    Refused::conflict(format!("{} is there already", path.display()))
        .hint("choose another name; to stand on it as it is: existing (--existing), without a size")
}

/// The file under a loop device.
fn backing_file(device: &Path) -> Option<PathBuf> {
    let file = Path::new("/sys/block").join(device.file_name()?).join("loop/backing_file");
    Some(fs::read_to_string(file).ok()?.trim_end_matches('\n').into())
}

/// Is this loop device over this image, or over what was it before somebody removed its name?
fn is_over(device: &Path, image: &Path) -> bool {
    let deleted = format!("{} (deleted)", image.display());
    backing_file(device).is_some_and(|file| file == image || file == Path::new(&deleted))
}

/// Looks whether a device may stand on it, and resolves its path.
///
/// # Errors
/// When it is in use, holds a filesystem that is not to be lost, or has no place.
pub fn examine(ground: &Ground, filesystem: Filesystem, force: bool) -> Result<Ground, Refused> {
    if !matches!(ground, Ground::Device(_)) {
        has_loop_devices()?;
    }
    match ground {
        Ground::NewImage(path, size) => new_image(path).map(|path| Ground::NewImage(path, *size)),
        Ground::OldImage(path) => old_image(path, filesystem, force).map(Ground::OldImage),
        Ground::Device(path) => block_device(path, filesystem, force).map(Ground::Device),
    }
}

fn has_loop_devices() -> Result<(), Refused> {
    let there = || Path::new("/dev/loop-control").exists();
    if !tool::is_there("losetup") {
        return Err(Refused::not_supported("losetup is not installed here").hint("on Debian: apt-get install mount"));
    }
    if !there() && (ask(&["modprobe", "loop"]).is_err() || !there()) {
        return Err(Refused::not_supported("this host has no loop devices").hint("choose a disk: device"));
    }
    Ok(())
}

fn new_image(path: &Path) -> Result<PathBuf, Refused> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Refused::conflict(format!("{} is no name of a file", path.display())));
    };
    let resolved = parent.canonicalize().map_err(at(parent.display()))?.join(name);
    if fs::symlink_metadata(&resolved).is_ok() {
        return Err(there_already(&resolved));
    }
    not_on_our_mount(resolved)
}

fn old_image(path: &Path, filesystem: Filesystem, force: bool) -> Result<PathBuf, Refused> {
    let resolved = path.canonicalize().map_err(at(path.display()))?;
    if !resolved.is_file() {
        return Err(Refused::conflict(format!("{} is no file", resolved.display())).hint("a disk is a device"));
    }
    let over = ask(&["losetup".as_ref(), "--associated".as_ref(), resolved.as_os_str()])?;
    if let Some((device, _)) = over.split_once(':') {
        let detail = format!("{} is in use: {device} is over it", resolved.display());
        return Err(Refused::new(super::Kind::Busy, detail).hint(format!("losetup --detach {device}")));
    }
    holds_nothing(&resolved, filesystem, force)?;
    not_on_our_mount(resolved)
}

/// A device over a file of ours would wait for the daemon that may be waiting for it.
fn not_on_our_mount(path: PathBuf) -> Result<PathBuf, Refused> {
    let mounts = mounts::all().map_err(at("/proc/self/mountinfo"))?;
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.mountpoint));
    let below = over.max_by_key(|mount| mount.mountpoint.as_os_str().len());
    match below.and_then(mounts::Mount::instance) {
        None => Ok(path),
        Some(instance) => {
            let detail = format!("{} lies on the mount of instance {instance}", path.display());
            Err(Refused::conflict(detail).hint("choose a place outside: the mount goes on top of the device"))
        }
    }
}

fn block_device(path: &Path, filesystem: Filesystem, force: bool) -> Result<PathBuf, Refused> {
    let resolved = path.canonicalize().map_err(at(path.display()))?;
    let found = fs::metadata(&resolved).map_err(at(resolved.display()))?;
    if !found.file_type().is_block_device() {
        return Err(Refused::conflict(format!("{} is no block device", resolved.display())).hint("a file is an image"));
    }
    in_nobodys_use(&resolved, found.rdev())?;
    holds_nothing(&resolved, filesystem, force)?;
    Ok(resolved)
}

/// As mkfs does it: the kernel gives a device exclusively only if no mount, mapping, array or swap has it or a part of it.
fn in_nobodys_use(device: &Path, rdev: u64) -> Result<(), Refused> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(device);
    match opened {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let numbers = format!("{}:{}", nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
            let mounts = mounts::all().unwrap_or_default();
            let at = mounts.iter().find(|mount| mount.device == numbers);
            let by = at.map_or("by a mount, a mapping, an array or swap".to_string(), |mount| {
                format!("mounted at {}", mount.mountpoint.display())
            });
            let detail = format!("{} is in use, {by}", device.display());
            Err(Refused::new(super::Kind::Busy, detail).hint("nothing is done to a disk that others use: lsblk"))
        }
        Err(error) => Err(at(device.display())(error)),
    }
}

/// What mkfs would overwrite must be told to be worthless.
fn holds_nothing(place: &Path, filesystem: Filesystem, force: bool) -> Result<(), Refused> {
    if filesystem == Filesystem::None || force {
        return Ok(());
    }
    let probe = ["blkid".as_ref(), "--probe".as_ref(), "--output".as_ref(), "export".as_ref(), place.as_os_str()];
    let found = match ask(&probe) {
        Ok(found) => found,
        Err(tool::ToolError::Failed { code: Some(2), .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let kind = found.lines().find_map(|line| line.strip_prefix("TYPE=").or(line.strip_prefix("PTTYPE=")));
    let detail = format!("{} holds something: {}", place.display(), kind.unwrap_or("a signature"));
    Err(Refused::conflict(detail).hint("to lose it: force (--force); to stand on it as it is: filesystem none"))
}

/// Warns when the disk under a new image has less room than the image may take.
pub fn room(ground: &Ground) -> Option<String> {
    let Ground::NewImage(path, size) = ground else { return None };
    let parent = File::open(path.parent()?).ok()?;
    let there = nix::sys::statvfs::fstatvfs(&parent).ok()?;
    let free = there.blocks_available() as u64 * there.fragment_size() as u64;
    (free < *size).then(|| {
        let (name, free) = (path.display(), bytesize::ByteSize(free));
        format!(
            "{name} may grow to {} and {free} are free: when that is used up, the device fails writes",
            bytesize::ByteSize(*size)
        )
    })
}

/// Bytes of so many sectors.
pub fn bytes(sectors: u64) -> u64 {
    sectors * SECTOR
}
