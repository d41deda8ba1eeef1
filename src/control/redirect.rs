//! Coredumps and out-of-space as one: what is armed with `redirect_coredumps` holds a lease on where they go, taken before
//! it is in force and given back when it is no longer.
//!
//! On the control thread; a helper does it. One lease for the whole mount, whatever wants it: it lives a short time, and is
//! renewed for as long as something does, so that it ends soon when this daemon is killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::time::Duration;

use serde_json::json;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::problem::Problem;
use super::{Control, helper};
use crate::fault::plan::State;
use crate::host::Machine;
use crate::host::coredump::{self, Taken, Wanted};

/// How long the lease outlives the daemon: the mount is dead then, and with it what was refused there.
const LIFE: Duration = Duration::from_secs(30);
/// The same where the disk was filled, and stays so until a next mount, or somebody, removes the ballast.
const LIFE_OF_DISK: Duration = Duration::from_secs(600);
/// How often is asked whether anything still wants it. Renewed each time, so it is a part of the life.
const LOOK: Duration = Duration::from_millis(500);
const RENEW: Duration = Duration::from_secs(10);
/// How long a reply waits for coredumps to be on their way home: one may be being written.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// What a change fills, if it wants coredumps elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fills {
    Nothing,
    /// What is written through the mount is refused; the disk below has room.
    Mount,
    /// The disk has no room for anybody.
    Disk,
}

impl Fills {
    pub fn mount_if(wanted: bool) -> Fills {
        if wanted { Fills::Mount } else { Fills::Nothing }
    }
}

/// What the mount holds.
#[derive(Debug, Default)]
pub struct Redirection {
    /// Changes that want it and are not in force yet.
    coming: AtomicUsize,
    held: AtomicBool,
    /// Wakes who keeps it.
    taken: Notify,
    /// One at a time takes, renews or gives back.
    switch: tokio::sync::Mutex<()>,
}

/// A change on its way, whatever becomes of it.
struct Coming(Arc<Control>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.redirection.coming.fetch_sub(1, AcqRel);
    }
}

/// The name of a mount's lease.
pub fn lease_of(instance: &str) -> String {
    format!("mount-{instance}")
}

impl Control {
    /// Makes a change; before one that wants coredumps elsewhere they are, or it is not made. Gives what is to be said of
    /// them beside the result.
    pub(super) async fn redirected<T>(
        self: &Arc<Self>,
        fills: Fills,
        change: impl Future<Output = Result<T, Problem>>,
    ) -> Result<(T, Vec<String>), Problem> {
        if fills == Fills::Nothing {
            return change.await.map(|done| (done, Vec::new()));
        }
        self.redirection.coming.fetch_add(1, AcqRel);
        let coming = Coming(self.clone());
        let warnings = self.take_coredumps(fills).await?;
        let done = change.await;
        drop(coming);
        if done.is_err() {
            self.give_coredumps_back().await;
        }
        done.map(|done| (done, warnings))
    }

    /// For rules that are armed from the first request on. The lease of a killed daemon of this name is ours now, to be kept
    /// or given back.
    pub(super) async fn redirected_at_start(self: &Arc<Self>) -> Result<(), String> {
        if self.wants_coredumps() {
            self.take_coredumps(Fills::Mount).await.map_err(|problem| problem.to_string())?;
        } else if self.has_lease().await {
            self.redirection.held.store(true, Release);
            self.redirection.taken.notify_one();
        }
        Ok(())
    }

    /// Is there one in the book? If nobody can say, none is missing.
    async fn has_lease(&self) -> bool {
        let (machine, name) = (self.machine.clone(), lease_of(&self.identity.instance));
        helper(move || coredump::lease(&machine, &name).is_some()).await.unwrap_or(true)
    }

    async fn take_coredumps(&self, fills: Fills) -> Result<Vec<String>, Problem> {
        let _switch = self.redirection.switch.lock().await;
        let taken = self.renew(fills).await?;
        self.redirection.held.store(true, Release);
        self.redirection.taken.notify_one();
        Ok(taken.warnings)
    }

    async fn renew(&self, fills: Fills) -> Result<Taken, Problem> {
        let (machine, name) = (self.machine.clone(), lease_of(&self.identity.instance));
        let is_disk = fills == Fills::Disk || self.ballast_redirects();
        let mount = self.identity.mount.as_ref();
        let disk = mount.filter(|_| is_disk).map(|mount| mount.backing.clone());
        let fills = mount.map(|mount| mount.mountpoint.clone()).into_iter().chain(disk).collect();
        let owner = self.identity.instance.clone();
        let life = if is_disk { LIFE_OF_DISK } else { LIFE };
        let wanted = Wanted { life: Some(life), owner, fills, ..Wanted::default() };
        Ok(helper(move || coredump::redirect(&machine, &name, &wanted)).await??)
    }

    fn wants_coredumps(&self) -> bool {
        let now = self.ring().now_ns();
        let (rules, mode) = (self.core.arming.rules(), self.core.arming.mode().1);
        let armed =
            rules.iter().chain(&mode).any(|rule| rule.spec.redirect_coredumps && rule.state(now) == State::Armed);
        armed || self.redirection.coming.load(Acquire) > 0 || self.space_redirects()
    }

    /// Gives the lease back if nothing wants it any more. Says so if that takes longer than a reply may.
    pub(super) async fn give_coredumps_back(self: &Arc<Self>) -> Vec<String> {
        if !self.redirection.held.load(Acquire) || self.wants_coredumps() {
            return Vec::new();
        }
        let control = self.clone();
        let giving = tokio::spawn(async move { control.give_back().await });
        match tokio::time::timeout(GIVE_BACK, giving).await {
            Ok(Ok(warnings)) => warnings,
            _ => vec!["coredumps are not home yet: an event tells when they are".to_string()],
        }
    }

    async fn give_back(&self) -> Vec<String> {
        let _switch = self.redirection.switch.lock().await;
        if !self.redirection.held.load(Acquire) || self.wants_coredumps() {
            return Vec::new();
        }
        let (machine, name) = (self.machine.clone(), lease_of(&self.identity.instance));
        self.redirection.held.store(false, Release);
        let given = helper(move || release(&machine, &name)).await;
        given.unwrap_or_else(|_| vec!["coredumps may not be home: see nemesisfs coredump status".to_string()])
    }
}

/// Gives a lease back. What cannot be done now is done by whoever watches over the machine.
fn release(machine: &Machine, name: &str) -> Vec<String> {
    match coredump::release(machine, name, coredump::TIMEOUT) {
        Ok(released) => released.warnings,
        Err(error) => vec![format!("coredumps are not home: {error}; it will be tried again")],
    }
}

/// Renews the lease for as long as it is held, and gives it back when what wanted it has ended by itself. Ends with the
/// control thread.
pub(super) async fn keep(control: Arc<Control>) {
    let redirection = &control.redirection;
    let mut renewed = Instant::now();
    let mut told = false;
    loop {
        if !redirection.held.load(Acquire) {
            redirection.taken.notified().await;
            (renewed, told) = (Instant::now(), false);
        }
        tokio::time::sleep(LOOK).await;
        if !control.wants_coredumps() {
            control.give_back().await;
            continue;
        }
        let _switch = redirection.switch.lock().await;
        // Somebody may have ended all leases.
        let has_lease = control.has_lease().await;
        if !redirection.held.load(Acquire) || (has_lease && renewed.elapsed() < RENEW) {
            continue;
        }
        match control.renew(Fills::Mount).await {
            Ok(_) => (renewed, told) = (Instant::now(), false),
            Err(problem) if !told => {
                told = true;
                let detail = json!({"action": "not_renewed", "lease": lease_of(&control.identity.instance),
                    "error": problem.to_string()});
                let machine = control.machine.clone();
                let _ = helper(move || machine.tell("coredump", detail)).await;
            }
            Err(_) => {}
        }
    }
}
