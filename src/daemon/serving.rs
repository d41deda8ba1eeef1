//! A mount that serves: its threads, what it waits for, and its end.
//!
//! On the main thread of the daemon, which waits for a signal, for a client that wants the mount to end, or for the end of
//! the session. Locks: none. Must never: end without taking back what was dropped, and the ballast.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use nix::sys::signal::SigSet;
use serde_json::json;

use super::mounted::Mounted;
use super::{Failure, failure, wait_for_signals};
use crate::control::{self, Identity, Unmount, Unmounted};
use crate::fs::mount::{Holder, How, holders, holders_of, place_of, unmount, unmount_patiently};
use crate::fs::{Core, Ended, clock, watch};
use crate::host::{Guard, coredump};
use crate::sys::mounts;

/// How long programs may take to close their files after their requests were answered.
const PATIENCE: Duration = Duration::from_secs(1);
/// After a signal: how long a lazily detached mount may live on before its connection is cut.
const LINGER: Duration = Duration::from_secs(10);
/// At the end: how long what was let go may take to be through.
const AT_IT: Duration = Duration::from_secs(2);

/// Everything that runs.
pub(super) struct Serving {
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
    pub(super) control: control::Running,
    wanted: Receiver<Unmount>,
}

impl Serving {
    pub(super) fn start(
        core: Arc<Core>,
        guard: Guard,
        mounted: Mounted,
        listener: UnixListener,
        identity: Identity,
    ) -> Result<Serving, Failure> {
        let cannot = |error: io::Error| failure(format!("no thread: {error}"));
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let Mounted { session, place, minor, .. } = mounted;
        let (sender, ended) = bounded::<()>(0);
        let session = thread("session").spawn(move || {
            let result = session.run();
            drop(sender);
            result
        });
        let session = session.map_err(cannot)?;
        let stop_clock = Arc::new(AtomicBool::new(false));
        let (clocked, stop) = (core.clone(), stop_clock.clone());
        let clock = thread("clock").spawn(move || clock::run(&clocked, &stop)).map_err(cannot)?;
        let (stop_watch, stop) = bounded(0);
        let watched = core.clone();
        thread("watch").spawn(move || watch::run(&watched, &stop)).map_err(cannot)?;
        let (unmount, wanted) = unbounded();
        let some = Some(core.clone());
        let control =
            control::start(listener, some, guard.machine.clone(), identity.clone(), unmount).map_err(cannot)?;
        // From here on it ends in order; before, whatever fails detaches the mount.
        let mountpoint = place.keep();
        Ok(Serving {
            core,
            identity,
            mountpoint,
            minor,
            ended,
            session,
            clock,
            stop_clock,
            stop_watch,
            guard,
            control,
            wanted,
        })
    }

    /// The stable line of the contract.
    pub(super) fn ready_line(&self) -> String {
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
    pub(super) fn wait(self, signals: &SigSet) {
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

    /// Gives who still holds what was detached, now or earlier.
    fn unmount(&self, how: How) -> Result<Vec<Holder>, Unmounted> {
        let mountpoint = &self.mountpoint;
        let place = place_of(mountpoint, self.minor).map_err(|error| self.covered(how, &error))?;
        self.let_go();
        let detaches = how == How::Lazy || place.is_none();
        let result = match how {
            How::Normal => unmount_patiently(mountpoint, self.minor, PATIENCE),
            How::Lazy | How::Force => unmount(mountpoint, self.minor, how),
        };
        match result {
            // From now on nothing is parked: who closes what is open there must not be held for ever.
            Ok(()) if detaches && how != How::Force => Ok(holders_of(self.minor)),
            Ok(()) => Ok(Vec::new()),
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

    /// What lies over us is not ours to take away. By force our connection is cut all the same.
    fn covered(&self, how: How, error: &io::Error) -> Unmounted {
        let cut = how == How::Force && mounts::abort(self.minor).is_ok();
        Unmounted::Covered(if cut { format!("{error}; our connection is cut, below it") } else { error.to_string() })
    }

    pub(super) fn end_by_signal(&self) {
        tracing::info!("told to end");
        self.let_go();
        let mountpoint = &self.mountpoint;
        let orderly = unmount_patiently(mountpoint, self.minor, Duration::from_millis(200));
        if orderly.is_err()
            && let Err(error) = unmount(mountpoint, self.minor, How::Lazy)
        {
            tracing::error!(%error, "the mount cannot be detached: cutting its connection");
            let _ = mounts::abort(self.minor);
        }
    }

    pub(super) fn finish(self) {
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
