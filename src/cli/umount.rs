//! `umount`: end a mount, whatever state its daemon is in: living, hanging or dead.
//!
//! Thread: the main one. Locks: those of the state files, for an instant. Must never: look at the mountpoint, except
//! where no state file says whether somebody serves it (`mounts::is_disconnected`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use serde_json::json;

use crate::client::{Client, ClientError, Host, Reply};
use crate::daemon::{self, How};
use crate::exit;
use crate::instances::{self, Instance, State, same_place, without_touching};
use crate::sys::mounts::{self, FILESYSTEM_TYPE, Mount};

use super::console::Outcome;
use super::session::{Session, World, on_each};

/// How long a daemon may take to end after it has unmounted.
const END_LIMIT: Duration = Duration::from_secs(20);
/// And one that was detached, which nobody is known to hold.
const LAZY_LIMIT: Duration = Duration::from_secs(5);
/// What can be done when somebody is in the way.
const OTHERWISE: &str = "stop them, or use --lazy or --force";

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
    fn how(&self) -> How {
        match (self.lazy, self.force) {
            (true, _) => How::Lazy,
            (_, true) => How::Force,
            _ => How::Normal,
        }
    }

    /// In the words of the API.
    fn word(&self) -> &'static str {
        match self.how() {
            How::Lazy => "lazy",
            How::Force => "force",
            How::Normal => "normal",
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
    let reply = session.patient(Some(END_LIMIT))?.post("/v1/unmount", &json!({"how": args.word()}))?;
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
    let is_there = |instance: &Instance| match &top {
        Some(mount) => instance.serves(mount),
        None => is_meant(instance, args),
    };
    if let Some(instance) = found.iter().find(|instance| instance.alive && is_there(instance)) {
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
    let places = places_of(instance)?;
    // It is unmounted already. Where it is bound it was bound by somebody, who has not asked for an end of that.
    if !args.force && !places.is_empty() && !places.iter().any(|mount| same_place(&mount.mountpoint, mountpoint)) {
        return Err(lives_on(instance, &places, &format!("{} is not mounted", mountpoint.display())));
    }
    let is_copy = places.len() > 1 && !instance.is_mounted_at(mountpoint);
    if let Some(copy) = places.iter().find(|mount| is_copy && !args.force && mount.mountpoint == mountpoint) {
        return end_copy(instance, copy, args.how());
    }
    let connect = world.globals.connect_timeout.length;
    let answer = if args.force { connect } else { END_LIMIT };
    let client = Client::new(Host::Unix(instance.state.socket.clone()), connect)?.answer_within(Some(answer));
    let asked = client.post("/v1/unmount", &json!({"how": args.word()}));
    let limit = if args.lazy { LAZY_LIMIT } else { END_LIMIT };
    let ended = match asked {
        Ok(reply) => {
            if args.force {
                clear(instance, &places)?;
            }
            must_be_gone(instance, &places, mountpoint)?;
            match detached(&reply) {
                Some(said) => return Ok(said),
                None => has_ended_within(instance, limit),
            }
        }
        // It may have ended before its answer was on its way, or have been dying when it was found: then it has left its mount.
        Err(error) if error.exit == exit::NO_INSTANCE && has_ended_within(instance, Duration::from_secs(1)) => {
            clear(instance, &places)?;
            true
        }
        Err(error) if error.exit == exit::NO_INSTANCE && args.force => false,
        // It ends with its mount, whoever unmounts that.
        Err(error) if error.exit == exit::NO_INSTANCE && !instance.state.socket.exists() => {
            let pid = instance.state.pid;
            let or_else = format!("its socket is gone: --lazy, --force, or `kill {pid}`, which is orderly too");
            places.first().map_or(Ok(()), |mount| take_away(mount.minor, mountpoint, args.how(), &or_else))?;
            must_be_gone(instance, &places, mountpoint)?;
            has_ended_within(instance, limit)
        }
        Err(error) => return Err(error),
    };
    match (ended, args.force) {
        (true, true) if places.len() > 1 => {
            Ok(format!("instance {} ended: {} unmounted", instance.state.instance, listed(&places)))
        }
        (true, _) => Ok(format!("{} unmounted", mountpoint.display())),
        (false, true) => abort(instance, &places, mountpoint),
        // A lazy daemon lives on until the last file is closed; what was asked for is done.
        (false, false) if args.lazy => {
            let (place, pid) = (mountpoint.display(), instance.state.pid);
            Ok(format!("{place} detached; pid {pid} ends when its last file is closed"))
        }
        (false, false) => {
            let limit = humantime::format_duration(END_LIMIT);
            let detail = format!("unmounted, but pid {} has not ended within {limit}", instance.state.pid);
            Err(ClientError::timed_out(detail).hint("`nemesisfs umount --force` aborts its connection"))
        }
    }
}

/// All places where it is mounted: more than one if somebody has bound it, or a directory of it, elsewhere.
fn places_of(instance: &Instance) -> Result<Vec<Mount>, ClientError> {
    let mut mounts = mounts::all().map_err(no_table)?;
    mounts.retain(|mount| mount.filesystem == FILESYSTEM_TYPE && instance.serves(mount));
    Ok(mounts)
}

/// A bind mount is no more than a mount: the daemon goes on with the others.
fn end_copy(instance: &Instance, copy: &Mount, how: How) -> Result<String, ClientError> {
    take_away(copy.minor, &copy.mountpoint, how, OTHERWISE)?;
    let (place, name) = (copy.mountpoint.display(), &instance.state.instance);
    Ok(format!("{place} unmounted; it was one of the places of instance {name}"))
}

/// What was bound elsewhere keeps a daemon alive that has left its mountpoint, and would be waited for in vain.
fn must_be_gone(instance: &Instance, before: &[Mount], mountpoint: &Path) -> Result<(), ClientError> {
    let now = places_of(instance)?;
    // Of one that has ended, another mount may have the number by now.
    let left: Vec<Mount> = before.iter().filter(|mount| now.contains(mount)).cloned().collect();
    match left.is_empty() || instance.has_ended() {
        true => Ok(()),
        false => Err(lives_on(instance, &left, &format!("{} unmounted", mountpoint.display()))),
    }
}

fn lives_on(instance: &Instance, places: &[Mount], done: &str) -> ClientError {
    let (name, all) = (&instance.state.instance, listed(places));
    let first = places.first().map(|mount| mount.mountpoint.display().to_string()).unwrap_or_default();
    let hint = format!("`nemesisfs umount {first}`, or `nemesisfs umount --instance {name} --force` for all");
    ClientError::failed(format!("{done}, but instance {name} is still mounted at {all}")).hint(hint)
}

fn listed(places: &[Mount]) -> String {
    places.iter().map(|mount| mount.mountpoint.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// For a daemon that does not answer: its connection is cut from outside.
fn abort(instance: &Instance, places: &[Mount], mountpoint: &Path) -> Result<String, ClientError> {
    // It may have no place any more. By now its number may be another's, which is seen if that has a place.
    let all = mounts::all().unwrap_or_default();
    let is_others =
        |number: u32| all.iter().any(|other| other.is_of(number) && other.instance() != Some(&instance.state.instance));
    let number = places.first().map(|mount| mount.minor).or(instance.state.connection);
    if let Some(connection) = number.filter(|number| !is_others(*number)) {
        cut(connection)?;
    }
    clear(instance, places)?;
    if has_ended_within(instance, Duration::from_secs(2)) {
        return Ok(format!("{} unmounted by force", mountpoint.display()));
    }
    Ok(format!("{} unmounted by force; pid {} hangs and still exists", mountpoint.display(), instance.state.pid))
}

/// Detaches what it has left where it was mounted, and nowhere else: its number may be another's by now.
fn clear(instance: &Instance, places: &[Mount]) -> Result<(), ClientError> {
    for place in places.iter().map(|mount| &*mount.mountpoint) {
        if let Some(mount) = ours_at(place)?.filter(|mount| instance.serves(mount)) {
            take_away(mount.minor, place, How::Lazy, OTHERWISE)?;
        }
    }
    Ok(())
}

fn ours_at(mountpoint: &Path) -> Result<Option<Mount>, ClientError> {
    Ok(mounts::at(&without_touching(mountpoint)).map_err(no_table)?.filter(|mount| mount.filesystem == FILESYSTEM_TYPE))
}

fn cut(connection: u32) -> Result<(), ClientError> {
    mounts::abort(connection).map_err(|error| {
        ClientError::failed(format!("connection {connection} cannot be aborted: {error}"))
            .hint("this needs root and fusectl at /sys/fs/fuse/connections")
    })
}

/// Takes a mount away without its daemon, and never what lies over it. Says who is in the way, and what can be done then.
fn take_away(connection: u32, mountpoint: &Path, how: How, otherwise: &str) -> Result<(), ClientError> {
    let how = match how {
        How::Force => cut(connection).map(|()| How::Lazy)?,
        how => how,
    };
    daemon::unmount(mountpoint, connection, how).map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => {
            let holders = daemon::holders_of(connection);
            let list = holders.iter().map(|h| json!({"pid": h.pid, "comm": h.comm, "what": h.what.to_string_lossy()}));
            let mut error = ClientError::failed(format!("{} is busy", mountpoint.display()));
            error.problem["holders"] = list.collect();
            error.hint(otherwise)
        }
        Some(errno) => ClientError::failed(format!("{}: {}", mountpoint.display(), errno.desc())).hint(otherwise),
        None => ClientError::failed(error.to_string()).hint("unmount that first"),
    })
}

/// A mount whose daemon is dead, or that no state file of this run directory knows. The daemon of the latter may live
/// with another run directory: then it is busy or not like any mount, and is not torn away from under its users.
fn end_dead(mountpoint: &Path, args: &UmountArgs) -> Result<String, ClientError> {
    let Some(mount) = mounts::at(&without_touching(mountpoint)).map_err(no_table)? else {
        return Ok(format!("{}: not mounted", mountpoint.display()));
    };
    let mountpoint = mount.mountpoint.as_path();
    let is_dead = mounts::is_disconnected(mountpoint);
    let is_ours = mount.filesystem == FILESYSTEM_TYPE;
    // The instance of that name has ended, and since then somebody else has mounted there.
    if is_ours && args.mountpoint.is_none() && !is_dead {
        let place = mountpoint.display();
        return Ok(format!("not mounted; what is mounted at {place} belongs to another run directory"));
    }
    let is_dead_fuse = is_dead && mount.filesystem == "fuse";
    if !is_ours && !is_dead_fuse {
        let detail = format!("{} is a mount of type {}, and not ours", mountpoint.display(), mount.filesystem);
        return Err(ClientError::failed(detail).hint("umount(8) unmounts it"));
    }
    let how = if is_dead { How::Lazy } else { args.how() };
    let or_else = "no instance of this run directory serves it; NEMESISFS_RUNDIR chooses another, --lazy detaches it";
    take_away(mount.minor, mountpoint, how, or_else)?;
    let who = match mount.instance().filter(|_| !is_dead) {
        Some(name) => format!("instance {name} of another run directory, or whose state is lost, served it"),
        None => "no living instance served it".into(),
    };
    Ok(format!("{} unmounted; {who}", mountpoint.display()))
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
