//! `umount`: end a mount, whatever state its daemon is in: living, hanging or dead.
//!
//! Thread: the main one. Locks: those of the state files, for an instant. Must never: look at the mountpoint, except
//! where no state file says whether somebody serves it (`mounts::is_disconnected`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use serde_json::json;

use crate::client::instances::{self, Instance, State, without_touching};
use crate::client::{Client, ClientError, Host, Reply, exit};
use crate::daemon::holders_of;
use crate::sys::mounts::{self, FILESYSTEM_TYPE, Mount};

use super::console::Outcome;
use super::session::{Session, World, on_each};

/// How long a daemon may take to end after it has unmounted.
const END_LIMIT: Duration = Duration::from_secs(20);
/// And one that was detached, which nobody is known to hold.
const LAZY_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Where it is mounted
    #[arg(conflicts_with = "instance")]
    mountpoint: Option<PathBuf>,
    /// The name of the instance
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Detach at once; what is still open goes on until it is closed
    #[arg(long, conflicts_with = "force")]
    lazy: bool,
    /// Abort the connection, also of a daemon that hangs; what is open fails
    #[arg(long)]
    force: bool,
}

impl UmountArgs {
    fn how(&self) -> &'static str {
        match (self.lazy, self.force) {
            (true, _) => "lazy",
            (_, true) => "force",
            _ => "normal",
        }
    }
}

pub fn run(world: &World, args: &UmountArgs) -> u8 {
    if args.mountpoint.is_none() && args.instance.is_none() {
        if world.globals.host.is_empty() {
            let error = ClientError::usage("umount: which one?").hint("give MOUNTPOINT or --instance NAME");
            return world.console.error(&error);
        }
        return on_each(world, &|session| remote(session, args));
    }
    match local(world, args) {
        Ok(said) => {
            let document = json!({"unmounted": true, "detail": said});
            let _ = if world.console.json { world.console.document(&document) } else { world.console.line(&said) };
            exit::DONE
        }
        Err(error) => world.console.error(&error),
    }
}

/// A host that was chosen by its socket or address is told to unmount; whether its process has ended cannot be seen.
fn remote(session: &Session, args: &UmountArgs) -> Result<Outcome, ClientError> {
    let reply = session.patient(Some(END_LIMIT))?.post("/v1/unmount", &json!({"how": args.how()}))?;
    let said = detached(&reply).unwrap_or_else(|| format!("{} unmounted", session.target.name));
    Ok(super::session::shown(reply, vec![said]))
}

/// What the daemon says of a mount that has no place any more, and is still held.
fn detached(reply: &Reply) -> Option<String> {
    Some(reply.body.get("detail")?.as_str()?.to_owned())
}

fn local(world: &World, args: &UmountArgs) -> Result<String, ClientError> {
    let found = instances::list(world.run_dir)
        .map_err(|error| ClientError::failed(format!("{}: {error}", world.run_dir.display())))?;
    let wanted: Vec<&Instance> = found.iter().filter(|instance| is_meant(instance, args)).collect();
    let mountpoint = match (&args.mountpoint, wanted.first()) {
        (Some(path), _) => without_touching(path),
        (None, Some(instance)) => match &instance.state.mountpoint {
            Some(mountpoint) => mountpoint.clone(),
            None => return end_without_mount(world, instance),
        },
        (None, None) => {
            let name = args.instance.as_deref().unwrap_or_default();
            return Ok(format!("{name}: not mounted{}", of_others(name)?));
        }
    };
    let top = ours_at(&mountpoint)?.filter(|_| args.mountpoint.is_some());
    // Others are detached from there, and live on.
    let is_there = |instance: &Instance| top.as_ref().is_none_or(|mount| instance.serves(mount));
    if let Some(instance) = wanted.iter().find(|instance| instance.alive && is_there(instance)) {
        return end_living(world, instance, args, &mountpoint);
    }
    let said = end_dead(&mountpoint, args)?;
    wanted.iter().for_each(|instance| instance.forget());
    Ok(said)
}

/// A daemon that serves the machine alone.
fn end_without_mount(world: &World, instance: &Instance) -> Result<String, ClientError> {
    let State { instance: name, socket, pid, .. } = &instance.state;
    if !instance.alive {
        instance.forget();
        return Ok(format!("{name}: not running"));
    }
    let client = Client::new(Host::Unix(socket.clone()), world.globals.connect_timeout.length)?;
    match client.post("/v1/unmount", &json!({})) {
        Err(error) if error.exit != exit::NO_INSTANCE => Err(error),
        _ if has_ended_within(instance, END_LIMIT) => Ok(format!("{name} has ended")),
        _ => Err(ClientError::timed_out(format!("{name} was told to end, and pid {pid} has not"))),
    }
}

fn is_meant(instance: &Instance, args: &UmountArgs) -> bool {
    match (&args.instance, &args.mountpoint) {
        (Some(name), _) => instance.state.instance == *name,
        (None, Some(path)) => instance.is_mounted_at(path),
        (None, None) => false,
    }
}

/// A name is one of a run directory: a mount of that name may be served from another one, and is not ours to end by it.
fn of_others(name: &str) -> Result<String, ClientError> {
    let mounts = mounts::all().map_err(no_table)?;
    let others = mounts.iter().filter(|mount| mount.instance() == Some(name));
    let hints: Vec<String> = others.map(|mount| format!("`nemesisfs umount {}`", mount.mountpoint.display())).collect();
    Ok(match hints.is_empty() {
        true => String::new(),
        false => format!("; {name} of another run directory, or whose state is lost, is ended by {}", hints.join(", ")),
    })
}

fn no_table(error: std::io::Error) -> ClientError {
    ClientError::failed(format!("/proc/self/mountinfo: {error}"))
}

fn end_living(world: &World, instance: &Instance, args: &UmountArgs, mountpoint: &Path) -> Result<String, ClientError> {
    let connect = world.globals.connect_timeout.length;
    let answer = if args.force { connect } else { END_LIMIT };
    let client = Client::new(Host::Unix(instance.state.socket.clone()), connect)?.answer_within(Some(answer));
    let asked = client.post("/v1/unmount", &json!({"how": args.how()}));
    let limit = if args.lazy { LAZY_LIMIT } else { END_LIMIT };
    let ended = match asked {
        Ok(reply) => match detached(&reply) {
            Some(said) => return Ok(said),
            None => has_ended_within(instance, limit),
        },
        // It may have ended before its answer was on its way, or have been dying when it was found: then it has left its mount.
        Err(error) if error.exit == exit::NO_INSTANCE && has_ended_within(instance, Duration::from_secs(1)) => {
            detach_if_there(instance, mountpoint)?;
            true
        }
        Err(error) if error.exit == exit::NO_INSTANCE && args.force => false,
        Err(error) if error.exit == exit::NO_INSTANCE && !instance.state.socket.exists() => {
            unmount_untold(instance, mountpoint, args.lazy)?;
            has_ended_within(instance, limit)
        }
        Err(error) => return Err(error),
    };
    match (ended, args.force) {
        (true, _) => {
            if args.force {
                detach_if_there(instance, mountpoint)?;
            }
            Ok(format!("{} unmounted", mountpoint.display()))
        }
        (false, true) => abort(instance, mountpoint),
        // A lazy daemon lives on until the last file is closed; what was asked for is done.
        (false, false) if args.lazy => Ok(format!(
            "{} detached; pid {} ends when its last file is closed",
            mountpoint.display(),
            instance.state.pid
        )),
        (false, false) => {
            let limit = humantime::format_duration(END_LIMIT);
            let detail = format!("unmounted, but pid {} has not ended within {limit}", instance.state.pid);
            Err(ClientError::timed_out(detail).hint("`nemesisfs umount --force` aborts its connection"))
        }
    }
}

/// For a daemon whose socket somebody has removed: it ends with its mount, whoever unmounts that.
fn unmount_untold(instance: &Instance, mountpoint: &Path, lazily: bool) -> Result<(), ClientError> {
    let Some(mount) = ours_at(mountpoint)?.filter(|mount| instance.serves(mount)) else { return Ok(()) };
    match mounts::unmount(&mount.mountpoint, lazily) {
        Err(Errno::EBUSY) => {
            let (holders, pid) = (holders_of(mount.minor), instance.state.pid);
            let list = holders.iter().map(|h| json!({"pid": h.pid, "comm": h.comm, "what": h.what.to_string_lossy()}));
            let mut error = ClientError::failed(format!("{} is busy", mountpoint.display()));
            error.problem["holders"] = list.collect();
            Err(error.hint(format!("its socket is gone: --lazy, --force, or `kill {pid}`, which is orderly too")))
        }
        other => other.map_err(|error| cannot_unmount(mountpoint, error)),
    }
}

/// For a daemon that does not answer: its connection is cut from outside.
fn abort(instance: &Instance, mountpoint: &Path) -> Result<String, ClientError> {
    let mount = ours_at(mountpoint)?.filter(|mount| instance.serves(mount));
    // It may have no place any more, or be covered. By now its number may be another's, which is seen if that has a place.
    let is_others = |connection: &u32| {
        let all = mounts::all().unwrap_or_default();
        all.iter().any(|other| other.is_of(*connection) && other.instance() != Some(&instance.state.instance))
    };
    let number = mount.as_ref().map(|mount| mount.minor);
    if let Some(connection) = number.or(instance.state.connection.filter(|connection| !is_others(connection))) {
        cut(connection)?;
    }
    if let Some(mount) = mount {
        detach(&mount.mountpoint, true)?;
    }
    if has_ended_within(instance, Duration::from_secs(2)) {
        return Ok(format!("{} unmounted by force", mountpoint.display()));
    }
    Ok(format!("{} unmounted by force; pid {} hangs and still exists", mountpoint.display(), instance.state.pid))
}

fn cut(connection: u32) -> Result<(), ClientError> {
    mounts::abort(connection).map_err(|error| {
        ClientError::failed(format!("connection {connection} cannot be aborted: {error}"))
            .hint("this needs root and fusectl at /sys/fs/fuse/connections")
    })
}

fn detach_if_there(instance: &Instance, mountpoint: &Path) -> Result<(), ClientError> {
    match ours_at(mountpoint)?.filter(|mount| instance.serves(mount)) {
        Some(_) => detach(mountpoint, true),
        None => Ok(()),
    }
}

fn ours_at(mountpoint: &Path) -> Result<Option<Mount>, ClientError> {
    Ok(mounts::at(&without_touching(mountpoint)).map_err(no_table)?.filter(|mount| mount.filesystem == FILESYSTEM_TYPE))
}

fn detach(mountpoint: &Path, lazily: bool) -> Result<(), ClientError> {
    mounts::unmount(mountpoint, lazily).map_err(|error| cannot_unmount(mountpoint, error))
}

fn cannot_unmount(mountpoint: &Path, error: Errno) -> ClientError {
    ClientError::failed(format!("{}: {}", mountpoint.display(), error.desc()))
}

/// A mount whose daemon is dead, or that no state file of this run directory knows. The daemon of the latter may live
/// with another run directory: then it is busy or not like any mount, and is not torn away from under its users.
fn end_dead(mountpoint: &Path, args: &UmountArgs) -> Result<String, ClientError> {
    let Some(mount) = mounts::at(&without_touching(mountpoint)).map_err(no_table)? else {
        return Ok(format!("{}: not mounted", mountpoint.display()));
    };
    let mountpoint = mount.mountpoint.as_path();
    let is_dead = mounts::is_disconnected(mountpoint);
    match mount.filesystem.as_str() {
        // The instance of that name has ended, and since then somebody else has mounted there.
        FILESYSTEM_TYPE if args.mountpoint.is_none() && !is_dead => {
            let place = mountpoint.display();
            return Ok(format!("not mounted; what is mounted at {place} belongs to another run directory"));
        }
        FILESYSTEM_TYPE if args.force => cut(mount.minor).and_then(|()| detach(mountpoint, true))?,
        FILESYSTEM_TYPE if args.lazy => detach(mountpoint, true)?,
        FILESYSTEM_TYPE => end_unknown(mountpoint)?,
        "fuse" if is_dead => detach(mountpoint, true)?,
        other => {
            let detail = format!("{} is a mount of type {other}, and not ours", mountpoint.display());
            return Err(ClientError::failed(detail).hint("umount(8) unmounts it"));
        }
    }
    let who = match mount.instance().filter(|_| !is_dead) {
        Some(name) => format!("instance {name} of another run directory, or whose state is lost, served it"),
        None => "no living instance served it".into(),
    };
    Ok(format!("{} unmounted; {who}", mountpoint.display()))
}

fn end_unknown(mountpoint: &Path) -> Result<(), ClientError> {
    match mounts::unmount(mountpoint, false) {
        Err(Errno::EBUSY) if mounts::is_disconnected(mountpoint) => detach(mountpoint, true),
        Err(error) => Err(cannot_unmount(mountpoint, error)
            .hint("no instance of this run directory serves it; NEMESISFS_RUNDIR chooses another, --lazy detaches it")),
        Ok(()) => Ok(()),
    }
}

fn has_ended_within(instance: &Instance, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if instance.has_ended() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
