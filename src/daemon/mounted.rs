//! The mount: made by root or by the setuid helper, with its options, and a session that nobody runs yet.
//!
//! On the main thread of the daemon, before anything is served. Locks: none. Must never: leave a mount that nobody serves.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use fuser::{MountOption, Session, SessionACL};
use nix::mount::MsFlags;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::{Failure, Options, WITHOUT_PASSTHROUGH, boot_id, failure, with_hint};
use crate::client::exit;
use crate::control::{self, Identity};
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
            let hint = "is FUSE there? ls -l /dev/fuse";
            with_hint(format!("mount {}: {error}", places.mountpoint.display()), hint)
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
        Session::new(Adapter(core.clone()), &places.mountpoint, &config).map_err(|error| {
            let hint = "without root, fusermount3 (package fuse3) makes the mount";
            with_hint(format!("mount {}: {error}", places.mountpoint.display()), hint)
        })
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

/// What the backing filesystem is mounted with, so is the mount over it; `-o` has the last word.
fn mount_flags(core: &Core, options: &Options) -> Result<MsFlags, Failure> {
    let below = fstatvfs(core.tree.backing()).map_or(FsFlags::empty(), |statvfs| statvfs.flags());
    let words = || OPTIONS.iter().flat_map(|(on, off, ..)| [*on, *off]);
    if let Some(unknown) = options.mount_options.iter().find(|given| words().all(|word| word != given.as_str())) {
        let hint = format!("one of: {}", words().collect::<Vec<_>>().join(" "));
        return Err(Failure { exit: exit::USAGE, ..with_hint(format!("unknown mount option {unknown:?}"), hint) });
    }
    let given = |word: &str| options.mount_options.iter().any(|given| given == word);
    let is_off =
        |(on, off, _, shown): &&(&str, &str, MsFlags, FsFlags)| given(off) || (below.contains(*shown) && !given(on));
    Ok(OPTIONS.iter().filter(is_off).fold(MsFlags::empty(), |flags, (_, _, flag, _)| flags | *flag))
}
