//! The daemon: from the options to a mount that serves, and to its end.
//!
//! Runs on the main thread, which then waits (`serving`). Threads: the readers (fuser's), workers and helpers as they
//! are needed, the clock, the watch, the control thread. Whatever is started here is stopped here, in the opposite
//! order, from every state.

pub mod machine;
mod mounted;
mod serving;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, never, unbounded};
use globset::{GlobSet, GlobSetBuilder};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use serde_json::{Value, json};

use crate::control::Identity;
use crate::event::Ring;
use crate::exit;
use crate::fault::compile::path_glob;
use crate::fault::document;
use crate::fs::Core;
pub use crate::fs::mount::{How, holders_of, unmount};
use crate::fs::mount::{Living, Places, lives_on, prepare};
use crate::host::state::StateDir;
use crate::host::{Guard, Machine};
use crate::instances::{self, State};
use crate::sys::memory;

use mounted::Mounted;
use serving::Serving;

const LOCK_TRIES: u32 = 60;

/// What to mount, decided in every respect: paths are absolute, names chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub backing: PathBuf,
    pub mountpoint: PathBuf,
    pub instance: String,
    pub run_dir: PathBuf,
    /// Where what was done to the machine is written.
    pub state: StateDir,
    pub socket: PathBuf,
    /// The log file, which standard error is by now; none in the foreground without one.
    pub log: Option<PathBuf>,
    pub rules_file: Option<PathBuf>,
    /// The rules of that file, in force from the first request on: in the form of the API, not yet checked.
    pub rules: Vec<Value>,
    pub readers: Option<u16>,
    pub seed: Option<u64>,
    /// Files that the kernel may serve by itself.
    pub passthrough: Vec<String>,
    /// Mount options, as after `-o`.
    pub mount_options: Vec<String>,
}

/// Why there is no mount, or why it ended badly.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    pub exit: u8,
    pub error: String,
    pub hint: Option<String>,
}

fn failure(error: impl Into<String>) -> Failure {
    Failure { exit: exit::FAILED, error: error.into(), hint: None }
}

fn with_hint(error: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure { hint: Some(hint.into()), ..failure(error) }
}

/// Mounts, says so, serves, and returns when the mount has ended.
///
/// # Errors
/// When the mount is refused or cannot be made; then nothing is left behind.
pub fn run(options: Options, ready: impl FnOnce(&str)) -> Result<(), Failure> {
    memory::hold_little();
    start_log();
    let signals = block_signals().map_err(|error| failure(format!("signals: {error}")))?;
    let claim = Claim::of(&options.run_dir, &options.instance)?;
    let living = others(&options)?;
    let places = prepare(&options.backing, &options.mountpoint, &living)
        .map_err(|refused| with_hint(refused.reason, refused.hint))?;
    forget_the_dead(&options.run_dir, &places.mountpoint);
    let (core, _alone) = open_backing(&places, &options)?;
    arm(&core, &options)?;
    let (listener, socket) = listen(&options.socket)?;
    let mounted = Mounted::new(&core, &options, &places)?;
    let identity = mounted.identity(&options, &places);
    claim.write(&identity).map_err(|error| failure(format!("{}: {error}", claim.path.display())))?;
    let machine = Machine::new(core.ring.clone(), &identity.boot_id, options.state.clone());
    let run_dir = options.run_dir.clone();
    let guard = Guard::start(machine, move || machine::start_if_missing(&run_dir))
        .map_err(|error| failure(format!("no thread: {error}")))?;
    let seed = core.arming.seed();
    let serving = Serving::start(core, guard, mounted, listener, identity)?;
    if let Err(reason) = serving.control.wait_until_ready() {
        serving.end_by_signal();
        serving.finish();
        return Err(with_hint(reason, "no rule of --rules with redirect_coredumps, or see nemesisfs coredump status"));
    }
    ready(&serving.ready_line());
    tracing::info!(seed, "{}", serving.ready_line());
    serving.wait(&signals);
    drop((socket, claim));
    Ok(())
}

/// The log goes to standard error, which is the log file by now. `NEMESISFS_LOG` sets what is told. That a reply comes
/// too late for its caller is normal here.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NEMESISFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,fuser=warn,fuser::reply=off"));
    // A second daemon in one process (a test, an example) keeps the first one's log.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        tracing::error!(thread = thread.name().unwrap_or_default(), "panic: {panic}");
    }));
}

/// Blocks the signals that end us in this thread and in all that come after; they are waited for instead.
fn block_signals() -> nix::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    Ok(signals)
}

/// The state file, locked: the name is ours for as long as we live.
struct Claim {
    path: PathBuf,
    lock: Flock<File>,
}

impl Claim {
    fn of(run_dir: &Path, instance: &str) -> Result<Claim, Failure> {
        let path = run_dir.join(format!("{instance}.json"));
        let cannot = |error: io::Error| {
            with_hint(format!("{}: {error}", path.display()), "NEMESISFS_RUNDIR names another directory")
        };
        std::fs::create_dir_all(run_dir).map_err(cannot)?;
        let open = || OpenOptions::new().create(true).truncate(false).write(true).read(true).mode(0o644).open(&path);
        let file = open().map_err(cannot)?;
        if let Ok(lock) = lock(file) {
            return Ok(Claim { path, lock });
        }
        Err(running_already(run_dir, instance))
    }

    fn write(&self, identity: &Identity) -> io::Result<()> {
        let mount = identity.mount.as_ref();
        let state = State {
            instance: identity.instance.clone(),
            pid: std::process::id() as i32,
            mountpoint: mount.map(|mount| mount.mountpoint.clone()),
            backing: mount.map(|mount| mount.backing.clone()),
            socket: identity.socket.clone(),
            log: identity.log.clone(),
            connection: mount.map(|mount| mount.connection),
        };
        let file: &File = &self.lock;
        file.set_len(0)?;
        let mut file = file;
        file.write_all(&serde_json::to_vec(&state)?)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Of those that died at this place nothing is left: their mounts were removed.
fn forget_the_dead(run_dir: &Path, mountpoint: &Path) {
    let found = instances::list(run_dir).unwrap_or_default();
    found.iter().filter(|dead| !dead.alive && dead.is_mounted_at(mountpoint)).for_each(instances::Instance::forget);
}

fn running_already(run_dir: &Path, instance: &str) -> Failure {
    let error = format!("an instance {instance:?} is running already");
    let living = instances::living(run_dir).unwrap_or_default();
    match living.iter().find(|other| other.state.instance == instance).and_then(|other| other.detached()) {
        None => with_hint(error, format!("nemesisfs umount --instance {instance}, or --instance another")),
        Some(connection) => with_hint(
            format!("{error}, and detached: {}", lives_on(&holders_of(connection))),
            format!("--instance another, or nemesisfs umount --instance {instance} --force, which cuts it off"),
        ),
    }
}

fn others(options: &Options) -> Result<Vec<Living>, Failure> {
    let living = instances::living(&options.run_dir)
        .map_err(|error| failure(format!("{}: {error}", options.run_dir.display())))?;
    let others = living.into_iter().filter(|other| other.state.instance != options.instance);
    let living = |other: instances::Instance| {
        let detached = other.detached();
        let State { instance, backing, mountpoint, .. } = other.state;
        Some(Living { instance, backing: backing?, mountpoint: mountpoint?, detached })
    };
    Ok(others.filter_map(living).collect())
}

/// Opens the backing directory, and locks it against a second daemon: one of another run directory cannot be seen
/// there, nor one that reaches the directory by another path. Without locks, on some network filesystems, it goes on.
fn open_backing(places: &Places, options: &Options) -> Result<(Arc<Core>, Option<Flock<File>>), Failure> {
    let directory = |error| failure(format!("backing directory {}: {error}", places.backing.display()));
    let backing = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&places.backing);
    let backing = backing.map_err(directory)?;
    let alone = match lock(backing.try_clone().map_err(directory)?) {
        Err(Errno::EWOULDBLOCK) => {
            let error = format!("backing directory {} is served by another instance", places.backing.display());
            return Err(with_hint(error, "two instances over one directory would not see each other's changes"));
        }
        other => other.ok(),
    };
    let seed = options.seed.unwrap_or_else(random);
    let mut core = Core::new(backing, Arc::new(Ring::default()), seed).map_err(directory)?;
    core.passthrough = passthrough(options)?;
    remove_ballast_of_the_dead(&core, options);
    Ok((Arc::new(core), alone))
}

/// Gives back the space that a killed daemon has taken from this backing filesystem.
fn remove_ballast_of_the_dead(core: &Core, options: &Options) {
    core.ballast.keep_state_in(&options.run_dir, &options.instance);
    match core.ballast.remove_left(core.tree.backing(), &options.run_dir) {
        Ok(left) if left.is_empty() => {}
        Ok(left) => {
            tracing::info!(?left, "ballast of a killed daemon removed");
            core.ring.change("space", json!({"action": "removed", "ballast": left, "left_by": "a killed daemon"}));
        }
        Err(error) => tracing::error!(%error, "ballast of a killed daemon may be left"),
    }
}

/// The files that are not to come to us. A glob without a leading slash matches at any depth.
fn passthrough(options: &Options) -> Result<Option<GlobSet>, Failure> {
    if options.passthrough.is_empty() {
        return Ok(None);
    }
    if !nix::unistd::geteuid().is_root() {
        let error = "--passthrough needs root: the kernel lets nobody else name files that it serves by itself";
        return Err(Failure { exit: exit::NOT_SUPPORTED, ..with_hint(error, WITHOUT_PASSTHROUGH) });
    }
    let mut globs = GlobSetBuilder::new();
    for text in &options.passthrough {
        if text.is_empty() {
            let error = with_hint("--passthrough: an empty glob matches nothing", "'**' matches all files");
            return Err(Failure { exit: exit::USAGE, ..error });
        }
        let anchored = if text.starts_with('/') { text.clone() } else { format!("/**/{text}") };
        let usage = |error| Failure { exit: exit::USAGE, ..failure(format!("--passthrough {text:?}: {error}")) };
        globs.add(path_glob(&anchored).map_err(usage)?);
    }
    let too_large = |error| failure(format!("--passthrough: {error}"));
    Ok(Some(globs.build().map_err(too_large)?))
}

const WITHOUT_PASSTHROUGH: &str = "leave --passthrough out: then we serve all files, a few microseconds slower";

/// Locks a file exclusively. Somebody may hold it for an instant: who only looks, or a daemon that was just killed.
fn lock(mut file: File) -> Result<Flock<File>, Errno> {
    for _ in 1..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((unlocked, _)) => file = unlocked,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)
}

/// Tells one run of a daemon from another.
fn boot_id() -> String {
    format!("{:06x}", random() & 0xff_ffff)
}

/// A seed that every language reads from JSON as it was written: 53 bits. The standard library's hash keys are random,
/// and that is all that is needed here.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 11
}

/// Rules that are in force from the first request on.
fn arm(core: &Core, options: &Options) -> Result<(), Failure> {
    let Some(file) = &options.rules_file else { return Ok(()) };
    let refuse = |problems: Vec<crate::fault::Problem>| {
        let first = problems.into_iter().next();
        let (detail, hint) = first.map_or_else(Default::default, |problem| (problem.detail, problem.hint));
        Failure { hint, ..failure(format!("{}: {detail}", file.display())) }
    };
    let specs = document::rules(json!({"rules": options.rules})).map_err(|problem| refuse(vec![problem]))?;
    core.arming.replace(specs, core.ring.now_ns()).map(drop).map_err(refuse)
}

/// The socket's file, which is ours from the moment that we are bound to it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn listen(socket: &Path) -> Result<(UnixListener, SocketFile), Failure> {
    let other = "--socket PATH names another";
    let cannot = |error: io::Error| with_hint(format!("socket {}: {error}", socket.display()), other);
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent).map_err(cannot)?;
    }
    if let Ok(there) = std::fs::symlink_metadata(socket) {
        let in_the_way = |what: &str| with_hint(format!("socket {}: {what}", socket.display()), other);
        if !there.file_type().is_socket() {
            return Err(in_the_way("there is a file of that name, which is no socket"));
        }
        match std::os::unix::net::UnixStream::connect(socket) {
            // What a killed daemon left.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(socket).map_err(cannot)?;
            }
            _ => return Err(in_the_way("it is in use")),
        }
    }
    let listener = UnixListener::bind(socket).map_err(cannot)?;
    let file = SocketFile(socket.to_path_buf());
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660)).map_err(cannot)?;
    Ok((listener, file))
}

/// A thread of its own turns signals into messages. It waits for ever, and ends with the process.
fn wait_for_signals(signals: SigSet) -> Receiver<()> {
    let (sender, receiver): (Sender<()>, _) = unbounded();
    let thread = std::thread::Builder::new().name("signals".into());
    let started = thread.spawn(move || {
        while signals.wait().is_ok() {
            if sender.send(()).is_err() {
                return;
            }
        }
    });
    signals_from(started.map(drop), receiver)
}

/// Without a thread nothing ever comes: a receiver that nobody sends to would be ready at once, and end what is served.
fn signals_from(started: io::Result<()>, receiver: Receiver<()>) -> Receiver<()> {
    match started {
        Ok(()) => receiver,
        Err(error) => {
            tracing::error!(%error, "no thread for signals: only a client ends this daemon, or umount its mount");
            never()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_thread_for_signals_none_is_taken_to_have_come() {
        let (sender, receiver) = unbounded();
        drop(sender);
        let signalled = signals_from(Err(io::Error::from_raw_os_error(libc::EAGAIN)), receiver);
        assert_eq!(signalled.try_recv(), Err(crossbeam_channel::TryRecvError::Empty));
        let (sender, receiver) = unbounded();
        sender.send(()).unwrap();
        assert_eq!(signals_from(Ok(()), receiver).try_recv(), Ok(()));
    }
}
