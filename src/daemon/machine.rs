//! A daemon without a mount: it serves the machine alone (devices, coredumps), and sees that what was done for a time is
//! undone when the daemon that did it has been killed.
//!
//! Runs on the main thread, which waits as that of a mount does. Ends by a signal, by a client's word, or by itself when
//! nothing of the machine is changed any more. What it leaves lies in the state files, and is the next daemon's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{select, tick, unbounded};
use serde_json::json;

use super::{Claim, Failure, block_signals, boot_id, failure, listen, start_log, wait_for_signals};
use crate::control::{self, Identity};
use crate::event::Ring;
use crate::host::state::StateDir;
use crate::host::{Guard, Machine, tool};
use crate::instances;

/// The name of the instance that is started when one is needed.
pub const NAME: &str = "host";

/// How long it stays when it is not needed, so that who has started it can say why.
const IDLE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(500);

/// What to serve, decided in every respect.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub run_dir: PathBuf,
    pub state: StateDir,
    pub socket: PathBuf,
    pub log: Option<PathBuf>,
    /// To end by itself when nothing of the machine is changed any more.
    pub while_needed: bool,
}

/// Serves, and returns when it was told to end or is not needed any more.
///
/// # Errors
/// When it cannot start; then nothing is left behind.
pub fn run(options: Options, ready: impl FnOnce(&str)) -> Result<(), Failure> {
    start_log();
    let cannot = |error: std::io::Error| failure(format!("no thread: {error}"));
    let signals = block_signals().map_err(|error| failure(format!("signals: {error}")))?;
    let claim = Claim::of(&options.run_dir, NAME)?;
    let (listener, socket) = listen(&options.socket)?;
    let (log, boot_id) = (options.log.clone(), boot_id());
    let identity = Identity { instance: NAME.into(), boot_id, socket: options.socket.clone(), log, mount: None };
    claim.write(&identity).map_err(|error| failure(format!("{}: {error}", claim.path.display())))?;
    let machine = Machine::new(Arc::new(Ring::default()), &identity.boot_id, options.state.clone());
    let guard = Guard::start(machine, || true).map_err(cannot)?;
    let machine = guard.machine.clone();
    let (unmount, wanted) = unbounded();
    let control = control::start(listener, None, machine.clone(), identity.clone(), unmount).map_err(cannot)?;
    let line = ready_line(&identity);
    ready(&line);
    tracing::info!("{line}");
    let signalled = wait_for_signals(signals);
    let looks = tick(LOOK);
    let mut needed = Instant::now();
    loop {
        select! {
            recv(signalled) -> _ => break,
            recv(wanted) -> wanted => {
                if let Ok(wanted) = wanted {
                    let _ = wanted.done.send(Ok(Vec::new()));
                }
                break;
            }
            recv(looks) -> _ => {
                if machine.is_needed() {
                    needed = Instant::now();
                } else if options.while_needed && needed.elapsed() > IDLE {
                    break;
                }
            }
        }
    }
    drop(guard);
    if machine.is_changed() {
        tracing::warn!("devices or leases are left as they are: any daemon, and the next one, can undo them");
    }
    machine.ring.change("bye", json!({}));
    control.stop();
    tracing::info!("ended");
    drop((socket, claim));
    Ok(())
}

/// For a daemon that has changed something of the machine: one that undoes it if this one is killed. That there is none
/// costs only that, so it is logged and tried again later.
pub fn start_if_missing(run_dir: &Path) -> bool {
    let is_there = || instances::is_held(&run_dir.join(format!("{NAME}.json")));
    if is_there() {
        return true;
    }
    // The link still works when the file was replaced.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    match tool::ask(&[program.as_os_str(), "host".as_ref(), "--while-needed".as_ref()]) {
        Ok(_) => true,
        Err(_) if is_there() => true,
        Err(error) => {
            tracing::warn!(%error, "no second daemon watches over the machine");
            false
        }
    }
}

fn ready_line(identity: &Identity) -> String {
    let log = identity.log.as_ref().map_or_else(|| "-".into(), |log| log.display().to_string());
    format!(
        "ready instance={} mount=- socket={} pid={} log={log}",
        identity.instance,
        identity.socket.display(),
        std::process::id()
    )
}
