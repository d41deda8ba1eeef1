//! The mount: made by root or by the setuid helper, with its options, and a session that nobody runs yet.
//!
//! On the main thread of the daemon, before anything is served. Locks: none. Must never: leave a mount that nobody serves.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{MountOption, Session, SessionACL};
use nix::mount::MsFlags;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::{Failure, Options, WITHOUT_PASSTHROUGH, boot_id, failure, with_hint};
use crate::control::{self, Identity};
use crate::exit;
use crate::fs::Core;
use crate::fs::adapter::Adapter;
use crate::fs::mount::Places;
use crate::sys::mounts::{self, SOURCE};

/// A mount, and the session that serves it, not running yet.
pub(super) struct Mounted {
    pub(super) session: Session<Adapter>,
    pub(super) place: Detach,
    /// The number of the connection.
    pub(super) minor: u32,
    readers: usize,
}

impl Mounted {
    pub(super) fn new(core: &Arc<Core>, options: &Options, places: &Places) -> Result<Mounted, Failure> {
        let readers = options.readers.map_or_else(default_readers, usize::from);
        core.readers.expect(readers);
        let session = match nix::unistd::geteuid().is_root() {
            true => Mounted::as_root(core, options, places, readers)?,
            false => Mounted::as_user(core, options, places, readers)?,
        };
        let mount = mounts::at(&places.mountpoint).ok().flatten();
        let place = Detach(Some(places.mountpoint.clone()));
        let minor = mount.ok_or_else(|| failure("the mount is not in the mount table"))?.minor;
        let device = session.as_fd().try_clone_to_owned();
        let _ = core.device.set(device.map_err(|error| failure(format!("the connection: {error}")))?);
        let _ = core.notifier.set(session.notifier());
        let _ = core.mountpoint.set(places.mountpoint.clone());
        Ok(Mounted { session, place, minor, readers })
    }

    fn as_root(
        core: &Arc<Core>,
        options: &Options,
        places: &Places,
        readers: usize,
    ) -> Result<Session<Adapter>, Failure> {
        let flags = mount_flags(core, options)?;
        let connection = mounts::mount(&places.mountpoint, &options.instance, flags).map_err(|error| {
            cannot_mount(places, &error, "root alone is not enough where CAP_SYS_ADMIN is taken away")
        })?;
        let config = config(readers);
        Session::from_fd(Adapter(core.clone()), connection, SessionACL::All, config).map_err(|error| {
            let _ = mounts::unmount(&places.mountpoint, true);
            if error.kind() == io::ErrorKind::Unsupported && !options.passthrough.is_empty() {
                let error = "--passthrough needs Linux 6.9 or later, built with CONFIG_FUSE_PASSTHROUGH";
                return Failure { exit: exit::NOT_SUPPORTED, ..with_hint(error, WITHOUT_PASSTHROUGH) };
            }
            failure(format!("FUSE handshake: {error}"))
        })
    }

    /// By the setuid helper, which lets only this user in.
    fn as_user(
        core: &Arc<Core>,
        options: &Options,
        places: &Places,
        readers: usize,
    ) -> Result<Session<Adapter>, Failure> {
        let user = nix::unistd::geteuid();
        tracing::warn!("without root only user {user} sees the mount, and all files made in it are theirs");
        let flags = mount_flags(core, options)?;
        let mut config = config(readers);
        config.mount_options = vec![
            MountOption::FSName(format!("{SOURCE}{}", options.instance)),
            MountOption::Subtype("nemesisfs".into()),
            MountOption::DefaultPermissions,
        ];
        let read_only = flags.contains(MsFlags::MS_RDONLY);
        config.mount_options.extend(read_only.then_some(MountOption::RO));
        Session::new(Adapter(core.clone()), &places.mountpoint, &config)
            .map_err(|error| cannot_mount(places, &error, "without root, fusermount3 (package fuse3) makes the mount"))
    }

    pub(super) fn identity(&self, options: &Options, places: &Places) -> Identity {
        Identity {
            instance: options.instance.clone(),
            boot_id: boot_id(),
            socket: options.socket.clone(),
            log: options.log.clone(),
            mount: Some(control::Mount {
                backing: places.backing.clone(),
                mountpoint: places.mountpoint.clone(),
                connection: self.minor,
                readers: self.readers,
            }),
        }
    }
}

/// Names the device where that is what cannot be opened.
fn cannot_mount(places: &Places, error: &io::Error, hint: &str) -> Failure {
    let device = Path::new("/dev/fuse");
    match File::options().read(true).write(true).open(device) {
        Err(error) => no_device(device, &error),
        Ok(_) => with_hint(format!("mount {}: {error}", places.mountpoint.display()), hint),
    }
}

fn no_device(device: &Path, error: &io::Error) -> Failure {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES) => "`chmod 666 /dev/fuse` as root lets all users mount, as most systems have it",
        // Of a container that has the file, but may not use it.
        Some(libc::EPERM) => "in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN",
        _ => "`modprobe fuse` as root; in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN",
    };
    with_hint(format!("{}, by which we mount, cannot be opened: {error}", device.display()), hint)
}

/// One more than there are processors: measured best, see `docs/performance.md`.
fn default_readers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).saturating_add(1).clamp(2, 16)
}

/// A mount that nobody serves yet: if it comes to nothing, nothing is left behind.
pub(super) struct Detach(Option<PathBuf>);

impl Detach {
    /// Somebody serves it from now on, who will unmount it.
    pub(super) fn keep(mut self) -> PathBuf {
        self.0.take().unwrap_or_default()
    }
}

impl Drop for Detach {
    fn drop(&mut self) {
        if let Some(mountpoint) = self.0.take() {
            let _ = mounts::unmount(&mountpoint, true);
        }
    }
}

fn config(readers: usize) -> fuser::Config {
    let mut config = fuser::Config::default();
    config.n_threads = Some(readers);
    config
}

/// A mount option: its word, its opposite, what the opposite is to `mount(2)` and how `statvfs` shows it.
const OPTIONS: &[(&str, &str, MsFlags, FsFlags)] = &[
    ("rw", "ro", MsFlags::MS_RDONLY, FsFlags::ST_RDONLY),
    ("suid", "nosuid", MsFlags::MS_NOSUID, FsFlags::ST_NOSUID),
    ("dev", "nodev", MsFlags::MS_NODEV, FsFlags::ST_NODEV),
    ("exec", "noexec", MsFlags::MS_NOEXEC, FsFlags::ST_NOEXEC),
    ("atime", "noatime", MsFlags::MS_NOATIME, FsFlags::ST_NOATIME),
];

/// What holds without being said, and what mount(8) tells others, or itself: there is nothing to do.
const HOLDS: &[&str] = &[
    "allow_other",
    "default_permissions",
    "nonempty",
    "defaults",
    "relatime",
    "async",
    "auto",
    "noauto",
    "nofail",
    "nouser",
    "_netdev",
];

/// Options of other FUSE filesystems, and why there is no such thing here.
const NOT_HERE: &[(&str, &str)] = &[
    ("allow_other", "without root only the user who mounts sees the mount; as root all users do"),
    ("allow_root", "as root all users see the mount, as with allow_other; without root only the user who mounts does"),
    ("user", "who may mount is not asked here; what it implies elsewhere is nosuid,nodev,noexec"),
    ("users", "who may mount is not asked here; what it implies elsewhere is nosuid,nodev,noexec"),
    ("auto_unmount", "a dead mount shows that its daemon died; `nemesisfs umount`, or the next mount, cleans it up"),
    ("fsname", "the source is nemesisfs:NAME, by which mounts are found again; --instance NAME chooses it"),
    ("subtype", "the type is fuse.nemesisfs, by which mounts are found again"),
    ("modules", "there are none; the directory with the files is the first of the two that mount takes"),
    ("subdir", "the directory with the files is the first of the two that mount takes"),
    ("kernel_cache", "what the kernel keeps is decided by the rules, so that each request meets them"),
    ("auto_cache", "what the kernel keeps is decided by the rules, so that each request meets them"),
    ("direct_io", "a program gets direct I/O by asking for it, as it does without us"),
];

/// Refuses what is no option, with the reason where others have one of that name.
fn check_options(given: &[String]) -> Result<(), Failure> {
    let words = || OPTIONS.iter().flat_map(|(on, off, ..)| [*on, *off]);
    let is_root = nix::unistd::geteuid().is_root();
    let holds = HOLDS.iter().copied().filter(|word| is_root || *word != "allow_other");
    let known = |given: &&String| {
        // Of fstab, for systemd and other readers.
        given.starts_with("x-") || words().chain(holds.clone()).any(|word| word == given.as_str())
    };
    let Some(option) = given.iter().find(|given| !known(given)) else { return Ok(()) };
    let name = option.split('=').next().unwrap_or_default();
    let (what, hint) = match NOT_HERE.iter().find(|(word, _)| *word == name) {
        Some((_, why)) => ("there is no mount option", (*why).to_owned()),
        None => ("unknown mount option", format!("one of: {}", words().collect::<Vec<_>>().join(" "))),
    };
    Err(Failure { exit: exit::USAGE, ..with_hint(format!("{what} {option:?}"), hint) })
}

/// What the backing filesystem is mounted with, so is the mount over it; `-o` has the last word.
fn mount_flags(core: &Core, options: &Options) -> Result<MsFlags, Failure> {
    check_options(&options.mount_options)?;
    let below = fstatvfs(core.tree.backing()).map_or(FsFlags::empty(), |statvfs| statvfs.flags());
    let given = |word: &str| options.mount_options.iter().any(|given| given == word);
    let is_off =
        |(on, off, _, shown): &&(&str, &str, MsFlags, FsFlags)| given(off) || (below.contains(*shown) && !given(on));
    Ok(OPTIONS.iter().filter(is_off).fold(MsFlags::empty(), |flags, (_, _, flag, _)| flags | *flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_named_where_that_is_what_is_missing() {
        let device = Path::new("/dev/fuse");
        for (errno, says) in [(libc::EACCES, "chmod"), (libc::EPERM, "container"), (libc::ENOENT, "modprobe")] {
            let told = no_device(device, &io::Error::from_raw_os_error(errno));
            let hint = told.hint.unwrap();
            assert!(told.error.starts_with("/dev/fuse, ") && hint.contains(says), "{}: {hint}", told.error);
        }
    }
}
