//! The daemon: from the options to a mount that serves, and to its end.
//!
//! Runs on the main thread, which then waits: for a signal, for a client that wants the mount to end, or for the end of
//! the session. Threads: the readers (fuser's), workers and helpers as they are needed, the clock, the watch, the control
//! thread.
//! Whatever is started here is stopped here, in the opposite order, from every state.

pub mod machine;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use fuser::{MountOption, Session, SessionACL};
use globset::{GlobSet, GlobSetBuilder};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::MsFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use serde_json::{Value, json};

use crate::client::exit;
use crate::client::instances::{self, State};
use crate::control::{self, Identity, Unmount, Unmounted};
use crate::event::Ring;
use crate::fault::compile::path_glob;
use crate::fault::document;
use crate::fs::adapter::Adapter;
use crate::fs::mount::{How, Living, Places, holders, prepare, unmount, unmount_patiently};
use crate::fs::{Core, Ended, clock, watch};
use crate::host::state::StateDir;
use crate::host::{Guard, Machine, coredump};
use crate::sys::memory;
use crate::sys::mounts::{self, SOURCE};

/// How long programs may take to close their files after their requests were answered.
const PATIENCE: Duration = Duration::from_secs(1);
/// After a signal: how long a lazily detached mount may live on before its connection is cut.
const LINGER: Duration = Duration::from_secs(10);
/// At the end: how long what was let go may take to be through.
const AT_IT: Duration = Duration::from_secs(2);
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
    keep_out_of_mount(&options, &places)?;
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
    let serving = Serving::start(core, guard, mounted, listener, identity)?;
    if let Err(reason) = serving.control.wait_until_ready() {
        serving.end_by_signal();
        serving.finish();
        return Err(with_hint(reason, "no rule of --rules with redirect_coredumps, or see nemesisfs coredump status"));
    }
    ready(&serving.ready_line());
    tracing::info!(seed = serving.core.arming.seed(), "{}", serving.ready_line());
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
        let error = format!("an instance {instance:?} is running already");
        Err(with_hint(error, format!("nemesisfs umount --instance {instance}, or --instance another")))
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

fn others(options: &Options) -> Result<Vec<Living>, Failure> {
    let living = instances::living(&options.run_dir)
        .map_err(|error| failure(format!("{}: {error}", options.run_dir.display())))?;
    let others = living.into_iter().filter(|other| other.state.instance != options.instance);
    let living = |other: instances::Instance| {
        let State { instance, backing, mountpoint, .. } = other.state;
        Some(Living { instance, backing: backing?, mountpoint: mountpoint? })
    };
    Ok(others.filter_map(living).collect())
}

/// Nothing that we need may lie below the mountpoint: we would wait for ourselves.
fn keep_out_of_mount(options: &Options, places: &Places) -> Result<(), Failure> {
    let ours =
        [Some(options.socket.as_path()), options.log.as_deref(), Some(&options.run_dir), Some(options.state.path())];
    for file in ours.into_iter().flatten() {
        let parent = file.parent().unwrap_or(Path::new("/"));
        let real = parent.canonicalize().unwrap_or_else(|_| parent.to_path_buf());
        if real.starts_with(&places.mountpoint) {
            let error = format!("{} lies under the mountpoint", file.display());
            return Err(with_hint(error, "use --socket, --log, NEMESISFS_RUNDIR, NEMESISFS_STATEDIR"));
        }
    }
    Ok(())
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

/// A mount, and the session that serves it, not running yet.
struct Mounted {
    session: Session<Adapter>,
    place: Detach,
    /// The number of the connection.
    minor: u32,
    readers: usize,
}

impl Mounted {
    fn new(core: &Arc<Core>, options: &Options, places: &Places) -> Result<Mounted, Failure> {
        let readers = options.readers.map_or_else(default_readers, usize::from);
        core.readers.expect(readers);
        let session = match nix::unistd::geteuid().is_root() {
            true => Mounted::as_root(core, options, places, readers)?,
            false => Mounted::as_user(core, options, places, readers)?,
        };
        let mount = mounts::at(&places.mountpoint).ok().flatten();
        let place = Detach(Some(places.mountpoint.clone()));
        let minor = mount.ok_or_else(|| failure("the mount is not in the mount table"))?.minor;
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
            let _ = unmount(&places.mountpoint, 0, How::Lazy);
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

    fn identity(&self, options: &Options, places: &Places) -> Identity {
        Identity {
            instance: options.instance.clone(),
            boot_id: boot_id(),
            socket: options.socket.clone(),
            log: options.log.clone(),
            mount: Some(control::Mount {
                backing: places.backing.clone(),
                mountpoint: places.mountpoint.clone(),
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
struct Detach(Option<PathBuf>);

impl Drop for Detach {
    fn drop(&mut self) {
        if let Some(mountpoint) = self.0.take() {
            let _ = unmount(&mountpoint, 0, How::Lazy);
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

/// Everything that runs.
struct Serving {
    core: Arc<Core>,
    identity: Identity,
    mountpoint: PathBuf,
    minor: u32,
    /// Closed when the kernel has ended the connection.
    ended: Receiver<()>,
    session: JoinHandle<io::Result<()>>,
    clock: JoinHandle<()>,
    stop_clock: Arc<AtomicBool>,
    /// Dropped, it ends the watch, which nobody waits for: it may hang with the disk.
    stop_watch: Sender<()>,
    guard: Guard,
    control: control::Running,
    wanted: Receiver<Unmount>,
}

impl Serving {
    fn start(
        core: Arc<Core>,
        guard: Guard,
        mounted: Mounted,
        listener: UnixListener,
        identity: Identity,
    ) -> Result<Serving, Failure> {
        let cannot = |error: io::Error| failure(format!("no thread: {error}"));
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let Mounted { session, mut place, minor, .. } = mounted;
        let (sender, ended) = bounded::<()>(0);
        let session = thread("session").spawn(move || {
            let result = session.run();
            drop(sender);
            result
        });
        let stop_clock = Arc::new(AtomicBool::new(false));
        let (clocked, stop) = (core.clone(), stop_clock.clone());
        let clock = thread("clock").spawn(move || clock::run(&clocked, &stop));
        let (stop_watch, stop) = bounded(0);
        let watched = core.clone();
        thread("watch").spawn(move || watch::run(&watched, &stop)).map_err(cannot)?;
        let (unmount, wanted) = unbounded();
        let some = Some(core.clone());
        let control =
            control::start(listener, some, guard.machine.clone(), identity.clone(), unmount).map_err(cannot)?;
        // From here on it ends in order.
        let mountpoint = place.0.take().unwrap_or_default();
        Ok(Serving {
            core,
            identity,
            mountpoint,
            minor,
            ended,
            session: session.map_err(cannot)?,
            clock: clock.map_err(cannot)?,
            stop_clock,
            stop_watch,
            guard,
            control,
            wanted,
        })
    }

    /// The stable line of the contract.
    fn ready_line(&self) -> String {
        let identity = &self.identity;
        let log = identity.log.as_ref().map_or_else(|| "-".into(), |log| log.display().to_string());
        format!(
            "ready instance={} mount={} socket={} pid={} log={log}",
            identity.instance,
            self.mountpoint.display(),
            identity.socket.display(),
            std::process::id(),
        )
    }

    /// Waits until the mount has ended, and then ends everything else.
    fn wait(self, signals: &SigSet) {
        let signalled = wait_for_signals(*signals);
        let mut cut_at: Option<Instant> = None;
        loop {
            let cut = cut_at.map_or_else(never, crossbeam_channel::at);
            select! {
                recv(self.ended) -> _ => break,
                recv(signalled) -> _ => {
                    self.end_by_signal();
                    cut_at.get_or_insert_with(|| Instant::now() + LINGER);
                }
                recv(self.wanted) -> wanted => {
                    if let Ok(wanted) = wanted {
                        let result = self.unmount(wanted.how);
                        // The client may be gone; the mount ends all the same.
                        let _ = wanted.done.send(result);
                    }
                }
                recv(cut) -> _ => {
                    tracing::warn!("the mount is still in use: cutting its connection");
                    if let Err(error) = mounts::abort(self.minor) {
                        tracing::error!(%error, "the connection cannot be cut");
                        break;
                    }
                    cut_at = None;
                }
            }
        }
        self.finish();
    }

    /// Lets parked requests go on, and from now on parks none.
    fn let_go(&self) {
        self.core.parking.close();
        let held = self.core.parking.take(usize::MAX, |_| true);
        self.core.resume(held, Ended::Removed);
    }

    fn unmount(&self, how: How) -> Result<(), Unmounted> {
        self.let_go();
        let mountpoint = &self.mountpoint;
        let result = match how {
            How::Normal => unmount_patiently(mountpoint, self.minor, PATIENCE),
            How::Lazy | How::Force => unmount(mountpoint, self.minor, how),
        };
        match result {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.core.parking.open();
                Err(Unmounted::Busy(holders(mountpoint, true)))
            }
            Err(error) => {
                self.core.parking.open();
                Err(Unmounted::Failed(error.to_string()))
            }
        }
    }

    fn end_by_signal(&self) {
        tracing::info!("told to end");
        self.let_go();
        let mountpoint = &self.mountpoint;
        let orderly = unmount_patiently(mountpoint, self.minor, Duration::from_millis(200));
        if orderly.is_err()
            && let Err(error) = unmount(mountpoint, self.minor, How::Lazy)
        {
            tracing::error!(%error, "the mount cannot be detached");
        }
    }

    fn finish(self) {
        self.core.parking.close();
        // What was let go may be about to write what is to be lost.
        if !self.core.workers.wait(AT_IT) {
            tracing::warn!("requests that went on at the end are still at it: the disk hangs");
        }
        for (path, result) in self.core.evict_all(None) {
            match result {
                Ok(evicted) => tracing::info!(path, ?evicted, "dropped writes taken back"),
                Err(error) => tracing::error!(path, %error, "dropped writes could not be taken back"),
            }
        }
        if let Err(error) = self.core.ballast.remove(self.core.tree.backing()) {
            tracing::error!(%error, "ballast could not be removed");
        }
        self.give_coredumps_back();
        drop((self.stop_watch, self.guard));
        self.stop_clock.store(true, Release);
        self.core.parking.wake_clock();
        let _ = self.clock.join();
        self.core.ring.change("bye", json!({}));
        self.control.stop();
        match self.session.join() {
            Ok(Ok(())) => tracing::info!("the mount has ended"),
            Ok(Err(error)) => tracing::error!(%error, "the session has failed"),
            Err(_) => tracing::error!("the session has panicked"),
        }
    }
}

impl Serving {
    /// What of this mount wanted coredumps elsewhere has ended with it. A core that is being written is not waited for here:
    /// then the lease is given back, and whoever watches over the machine does the rest.
    fn give_coredumps_back(&self) {
        let machine = self.guard.machine.clone();
        let lease = control::lease_of(&self.identity.instance);
        if coredump::lease(&machine, &lease).is_none() {
            return;
        }
        let (done, given) = bounded(1);
        let give = move || {
            let _ = done.send(coredump::release(&machine, &lease, coredump::TIMEOUT).map(drop));
        };
        let giving = std::thread::Builder::new().name("helper".into()).spawn(give);
        match giving.map(|_| given.recv_timeout(AT_IT)) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::error!(%error, "coredumps are not home yet"),
            Ok(Err(_)) => tracing::info!("coredumps are not home yet: one is being written, or an agent is asked"),
            Err(error) => tracing::error!(%error, "coredumps are not home yet"),
        }
    }
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
    if let Err(error) = started {
        tracing::error!(%error, "no thread for signals: only umount ends this mount");
    }
    receiver
}
