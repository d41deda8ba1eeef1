//! `host`: a daemon without a mount, for devices and coredumps; and the choice of a daemon for what is done to the machine.
//!
//! Thread: the main one. Locks: those of the state files, for an instant.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use crate::client::ClientError;
use crate::client::host::{self, Target};
use crate::daemon::machine::{self, NAME, Options};
use crate::exit;
use crate::host::Machine;
use crate::host::state::StateDir;
use crate::instances::{self, lexical};

use super::launch::{self, Launch, Report};
use super::session::World;

/// How long a daemon that does not answer any more may take to end.
const ENDING: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Before it is started again: whoever has killed it may be starting another one.
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Default, Args)]
pub struct HostArgs {
    /// Where it listens [default: host.sock in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Stay here, as systemd and containers want it
    #[arg(long)]
    foreground: bool,
    /// Where it logs [default: host.log in the run directory; with --foreground, standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// End when no device and no lease is left
    #[arg(long)]
    while_needed: bool,
    /// Where a child tells its parent that it is ready
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
    /// It is a child that is started again when it is killed
    #[arg(long, hide = true)]
    watched: bool,
}

pub fn run(world: &World, args: &HostArgs) -> u8 {
    let serve = |options, report: &Report| machine::run(options, |line| report.ready(line));
    let options = prepare(world.run_dir, args);
    let done = match args.ready_fd {
        Some(fd) if !args.watched => watch(&options, fd),
        Some(fd) => launch::as_child(fd, |report| Ok(serve(options, report))),
        None if args.foreground || args.watched => {
            let log = args.log.as_deref().map(lexical);
            launch::in_foreground(world, log.as_deref(), |report| {
                serve(Options { log: log.clone(), ..options }, report)
            })
        }
        None => launch::launch(&launch_of(&options)).map(|ready| launch::tell(world, &ready)),
    };
    done.unwrap_or_else(|error| world.console.error(&error))
}

/// Decides all that was left open.
fn prepare(run_dir: &Path, args: &HostArgs) -> Options {
    let own = |given: &Option<PathBuf>, suffix: &str| match given {
        Some(path) => lexical(path),
        None => lexical(&run_dir.join(format!("{NAME}{suffix}"))),
    };
    Options {
        run_dir: lexical(run_dir),
        state: StateDir::of_machine(),
        socket: own(&args.socket, ".sock"),
        log: Some(own(&args.log, ".log")),
        while_needed: args.while_needed,
    }
}

fn launch_of(options: &Options) -> Launch<'_> {
    let mut words: Vec<OsString> = vec!["host".into(), "--socket".into(), options.socket.clone().into()];
    if options.while_needed {
        words.push("--while-needed".into());
    }
    let log = options.log.as_deref().unwrap_or(Path::new("/dev/null"));
    words.extend(["--log".into(), log.into()]);
    Launch { run_dir: &options.run_dir, state: &options.state, log, words, operands: Vec::new() }
}

/// Starts the daemon, and again whenever it is killed while something of the machine is changed: there may be no other that
/// would undo it at its time. Gives its exit code.
fn watch(options: &Options, ready_fd: i32) -> Result<u8, ClientError> {
    let cannot = |error: std::io::Error| ClientError::failed(format!("host: {error}"));
    launch::close_what_was_inherited(ready_fd);
    let _ = nix::unistd::setsid();
    let machine = Machine::alone("watch", options.state.clone());
    let words = launch_of(options).words;
    let start = |more: &[String]| launch::program().args(&words).arg("--watched").args(more).spawn();
    let mut daemon = start(&["--ready-fd".into(), ready_fd.to_string()]).map_err(cannot)?;
    let _ = nix::unistd::close(ready_fd);
    loop {
        if let Some(code) = daemon.wait().map_err(cannot)?.code() {
            return Ok(u8::try_from(code).unwrap_or(exit::FAILED));
        }
        if !machine.is_changed() {
            return Ok(exit::FAILED);
        }
        eprintln!("the daemon was killed, and there is something to undo: starting another one");
        std::thread::sleep(PAUSE);
        daemon = start(&[]).map_err(cannot)?;
    }
}

/// The hosts of a command about the machine: those of `-H`; else the only instance here; else, because any daemon will do,
/// the one without a mount, which is started if need be.
pub fn resolve(world: &World) -> Result<Vec<Target>, ClientError> {
    let chosen = host::resolve(&world.globals.host, world.run_dir);
    if world.globals.host.is_empty() && chosen.is_err() { without_mount(world) } else { chosen }
}

/// Those of `-H`; else the one without a mount, which is started if need be.
pub fn without_mount(world: &World) -> Result<Vec<Target>, ClientError> {
    if !world.globals.host.is_empty() {
        return host::resolve(&world.globals.host, world.run_dir);
    }
    if !instances::is_held(&world.run_dir.join(format!("{NAME}.json"))) {
        let args = HostArgs { while_needed: true, ..HostArgs::default() };
        let started = launch::launch(&launch_of(&prepare(world.run_dir, &args)));
        // Another command may have started it meanwhile.
        if let Err(error) = started
            && !instances::is_held(&world.run_dir.join(format!("{NAME}.json")))
        {
            return Err(error);
        }
    }
    let found = host::resolve(&[NAME.to_owned()], world.run_dir)?;
    // Nobody chose it: another command finds it, or starts another one.
    Ok(found.into_iter().map(|target| Target { chosen: false, ..target }).collect())
}

/// The daemon without a mount, if it lives and nobody chose another host.
pub fn living_without_mount(world: &World) -> Option<Target> {
    let lives = world.globals.host.is_empty() && instances::is_held(&world.run_dir.join(format!("{NAME}.json")));
    lives.then(|| without_mount(world).ok()?.pop()).flatten()
}

/// Whether the daemon without a mount, which nobody chose, has ended well: one that was killed leaves its state file.
/// Waits for one that is about to end.
pub fn has_ended(world: &World, target: &Target) -> bool {
    let state = world.run_dir.join(format!("{NAME}.json"));
    if !world.globals.host.is_empty() || target.name != NAME {
        return false;
    }
    let until = Instant::now() + ENDING;
    while instances::is_held(&state) && Instant::now() < until {
        std::thread::sleep(LOOK_AGAIN);
    }
    !state.exists()
}
