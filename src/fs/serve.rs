//! The life of one request.
//!
//! [`Core::serve`] runs on the reader that read it, and on the normal way goes straight through to [`Core::perform`]
//! and the reply. A request that a rule delays or stalls is parked; one that is read when all other readers are in the
//! middle of something is done by a worker. No lock is held across a system call here, and a normal write allocates
//! nothing unless a rule fires.

use std::cell::Cell;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use globset::GlobSet;
use smallvec::SmallVec;

use super::arming::Arming;
use super::call::{Answer, Call, Caller, Keep, Reply};
use super::facts::Request;
use super::files::Files;
use super::hold::{Holds, OfCut, Piece};
use super::inode::Inode;
use super::kernel_cache::Cleaners;
use super::limits;
use super::park::{Parked, Parking, Pending};
use super::process;
use super::readers::Readers;
use super::tree::Tree;
use super::workers::Workers;
use crate::event::{Injection, Ring};
use crate::fault::kind::{Target, Timing};
use crate::fault::{Decision, Fault, Firing, Op, Outcome, Rule, Then, decide, decide_again};
use crate::space::{Ballast, Capacity};

/// How long the kernel may believe what we said of names and attributes: changes made below us are seen after that.
pub const TIMEOUT: Duration = Duration::from_secs(1);

/// The filesystem proper: everything the readers share.
pub struct Core {
    pub tree: Tree,
    pub files: Files,
    pub arming: Arming,
    pub ring: Arc<Ring>,
    pub parking: Parking,
    pub holds: Holds,
    pub capacity: Capacity,
    /// What really fills the backing filesystem.
    pub ballast: Ballast,
    pub workers: Workers,
    /// What makes the kernel forget.
    pub cleaners: Cleaners,
    pub readers: Readers,
    /// Says to the kernel what it must no longer believe. Set once the session runs; never used by a reader.
    pub notifier: OnceLock<fuser::Notifier>,
    /// The connection, for the notice that the notifier has not. Set with it.
    pub device: OnceLock<OwnedFd>,
    /// Where it is mounted. Set with the notifier.
    pub mountpoint: OnceLock<PathBuf>,
    /// Files that the kernel may serve by itself; none where that was not asked for.
    pub passthrough: Option<GlobSet>,
    /// The unit of allocation of the backing filesystem, in bytes.
    pub block: u64,
    /// Can the backing filesystem tell its preallocated blocks?
    pub remembers_preallocation: bool,
}

/// What the readers make of an operation: an answer, or an errno.
pub type Performed = Result<Answer, i32>;

impl Core {
    /// Takes the backing directory: an ordinary descriptor, opened before anything was mounted over it.
    ///
    /// # Errors
    /// When it cannot be examined.
    pub fn new(backing: File, ring: Arc<Ring>, seed: u64) -> io::Result<Core> {
        let descriptors = limits::raise()?;
        let statvfs = nix::sys::statvfs::fstatvfs(&backing)?;
        let fiemap = crate::sys::fiemap::allocated(&backing, 0..1, |_| ());
        Ok(Core {
            tree: Tree::new(backing, descriptors)?,
            files: Files::default(),
            arming: Arming::new(seed),
            ring,
            parking: Parking::default(),
            holds: Holds::default(),
            capacity: Capacity::default(),
            ballast: Ballast::default(),
            workers: Workers::default(),
            cleaners: Cleaners::default(),
            readers: Readers::default(),
            notifier: OnceLock::new(),
            device: OnceLock::new(),
            mountpoint: OnceLock::new(),
            passthrough: None,
            block: (statvfs.fragment_size()).clamp(512, 1 << 20),
            remembers_preallocation: fiemap.is_err(),
        })
    }

    /// One request from the kernel, on the reader that read it.
    pub fn serve(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply) {
        let op = call.op();
        if self.holds.any()
            && let Some(piece) = self.piece(&caller, &call)
        {
            match self.holds.of_cut(&piece) {
                Some(OfCut::Serve) => {
                    self.holds.passed(&piece);
                    return self.proceed(caller, call, reply, None);
                }
                Some(OfCut::Fail { done, firing }) => {
                    if let Some(firing) = firing {
                        self.inject(&caller, &call, &firing, Told { done: Some(done), ..Told::default() });
                    }
                    reply.error(libc::EIO);
                    return self.ring.wake();
                }
                None => {}
            }
            if let Some((errno, firing)) = self.holds.owed(&piece) {
                self.inject(&caller, &call, &firing, Told { errno: Some(errno), repeat: true, ..Told::default() });
                reply.error(errno);
                self.ring.wake();
                return;
            }
        }
        if !self.arming.concerns(op) {
            if self.holds.any() {
                self.note_passed(&caller, &call);
            }
            return self.proceed(caller, call, reply, None);
        }
        let decision = self.decide(&caller, &call);
        match decision.is_nothing() {
            true => self.pass(caller, call, reply),
            false => self.enact(caller, call, reply, decision),
        }
    }

    /// A request that no rule decides, although there are rules.
    fn pass(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply) {
        if let Call::CopyFileRange { .. } = call
            && self.arming.plan().plain_io
        {
            // The kernel makes reads and writes of it, and rules see those.
            return reply.error(libc::EOPNOTSUPP);
        }
        if self.arming.owes() || self.holds.any() {
            self.note_passed(&caller, &call);
        }
        self.proceed(caller, call, reply, None);
    }

    /// Asks the rules that are in force. When they change meanwhile those that are new are asked too.
    fn decide(&self, caller: &Caller, call: &Call<'_>) -> Decision {
        let (mut plan, request) = (self.arming.plan(), Request::new(self, caller, call));
        let mut decision = decide(&plan, &request);
        while decision.is_outdated() {
            let past = std::mem::replace(&mut plan, self.arming.plan());
            decision = decide_again(&plan, &request, &past, decision);
        }
        decision
    }

    /// Does what was decided: signals and waits first, then the outcome.
    fn enact(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, mut decision: Decision) {
        for firing in decision.kills.drain(..) {
            self.kill(&caller, &call, &firing);
        }
        for firing in &decision.delays {
            self.inject(&caller, &call, firing, Told { delay_ns: firing.delay_ns, ..Told::default() });
        }
        let delay_ns = decision.delay_ns();
        if delay_ns > 0 {
            let delays = std::mem::take(&mut decision.delays);
            let rules = delays.iter().map(|firing| firing.rule.clone()).collect();
            let until = self.ring.now_ns().saturating_add(delay_ns);
            return self.park(
                caller,
                call,
                reply,
                decision,
                Wait { stalled: false, rules, delays, until: Some(until) },
            );
        }
        decision.delays.clear();
        if let Some(firing) = &decision.stall
            && let Fault::Stall { limit_ns, .. } = firing.fault()
        {
            self.inject(&caller, &call, firing, Told::default());
            let until = limit_ns.map(|limit| self.ring.now_ns().saturating_add(limit));
            let rules = [firing.rule.clone()].into_iter().collect();
            return self.park(caller, call, reply, decision, Wait { stalled: true, rules, delays: Vec::new(), until });
        }
        match decision.outcome {
            Outcome::Proceed => self.pass(caller, call, reply),
            Outcome::Alter(firing) => self.proceed(caller, call, reply, Some(firing)),
            Outcome::Error(errno, firing) => {
                self.fail(&caller, call, reply, &firing, Told { errno: Some(errno), ..Told::default() });
            }
        }
    }

    /// Sends the signal of a firing. Nobody is there to get it when the kernel writes back, and we do not kill ourselves.
    fn kill(self: &Arc<Self>, caller: &Caller, call: &Call<'_>, firing: &Firing) {
        let Fault::Kill { signal, target } = *firing.fault() else { return };
        let pid = process::of_thread(caller.tid).pid;
        match target {
            Target::Caller if pid == 0 || pid == std::process::id() => firing.revoke(),
            Target::Caller => {
                self.inject(caller, call, firing, Told::default());
                send_signal(pid, signal);
            }
            Target::Mount => {
                self.inject(caller, call, firing, Told::default());
                let core = self.clone();
                // A look at all processes takes its time.
                self.workers.run(move || core.users().into_iter().for_each(|pid| send_signal(pid, signal)));
            }
        }
        self.ring.wake();
    }

    /// The processes that have something open on the mount.
    fn users(&self) -> Vec<u32> {
        let Some(place) = self.mountpoint.get() else { return Vec::new() };
        super::mount::holders(place, false).into_iter().map(|holder| holder.pid).collect()
    }

    /// Tells an error that a rule decided, and sees to it that the program meets it exactly once.
    fn fail(&self, caller: &Caller, call: Call<'_>, reply: Reply, firing: &Firing, told: Told) {
        let errno = told.errno.unwrap_or(libc::EIO);
        if let Some(piece) = self.piece(caller, &call) {
            self.holds.told(&piece, errno, firing);
        }
        self.inject(caller, &call, firing, told);
        if let (Call::Release { .. } | Call::Releasedir { .. }, false) = (&call, is_done(firing)) {
            // The kernel ignores the error, and the handle is gone either way: once, because its number may be another's by now.
            let _ = self.perform(caller, &call, &mut Reply::None);
        }
        reply.error(errno);
        self.ring.wake();
    }

    fn park(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, decision: Decision, wait: Wait) {
        let parked = Parked {
            // Of one in exec it cannot be asked: see there.
            caller_started: (call.op() != Op::Flush).then(|| process::start_time(caller.tid)).flatten(),
            pending: Pending { caller, call: call.into_owned(), reply, decision },
            stalled: wait.stalled,
            rules: wait.rules,
            delays: wait.delays,
            since_ns: self.ring.now_ns(),
            until_ns: wait.until,
        };
        self.ring.wake();
        if let Err(parked) = self.parking.park(parked, || self.ring.now_ns()) {
            if self.parking.is_full() {
                tracing::warn!(limit = super::park::MOST, "no more requests can be parked: one goes on at once");
            }
            self.go_on(*parked, Ended::Removed);
        }
    }

    /// Lets go what rules hold that are out of force.
    pub fn let_go<'a>(self: &Arc<Self>, rules: impl Iterator<Item = &'a Arc<Rule>> + Clone) {
        let held = self.parking.take(usize::MAX, |parked| rules.clone().any(|rule| parked.is_of(rule)));
        self.resume(held, Ended::Removed);
    }

    /// Lets parked requests go on, each on a thread where waiting is harmless.
    pub fn resume(self: &Arc<Self>, parked: Vec<Parked>, how: Ended) {
        for parked in parked {
            let core = self.clone();
            self.workers.run(move || core.go_on(parked, how));
        }
    }

    fn go_on(self: &Arc<Self>, parked: Parked, how: Ended) {
        let Pending { caller, call, reply, mut decision } = parked.pending;
        if how != Ended::Released {
            let now = self.ring.now_ns();
            parked.delays.iter().for_each(|firing| firing.leave_queue(now));
        }
        if how == Ended::CallerDied {
            // What was to follow has not happened.
            if let (Some(stall), false) = (&decision.stall, parked.stalled) {
                stall.revoke();
            }
            if let Outcome::Error(_, firing) | Outcome::Alter(firing) = &decision.outcome {
                firing.revoke();
            }
            reply.error(libc::EINTR);
            return;
        }
        if parked.stalled
            && let Some(firing) = decision.stall.take()
            && how == Ended::Released
            && let Fault::Stall { then: Then::Error(errno), .. } = *firing.fault()
        {
            // The injection was told when the stall began; this is its end.
            let told = Told { errno: Some(errno), repeat: true, ..Told::default() };
            return self.fail(&caller, call, reply, &firing, told);
        }
        decision.forget_outdated();
        self.enact(caller, call, reply, decision);
    }

    /// The kernel gives back references. With the descriptor of a file that has no name any more goes the file itself, which
    /// can take the disk long: that is not for the last free reader.
    pub fn forget(&self, ino: u64, references: u64) {
        let unused = self.tree.forget(ino, references);
        if unused.is_some() && self.holds.any() {
            // Another file may get its number.
            self.holds.forget(Some(ino));
        }
        if unused.as_ref().is_some_and(|inode| inode.holds_fd()) && self.readers.is_last_free() {
            self.workers.run(move || drop(unused));
        }
    }

    /// Past all rules: does it here, unless this is the last free reader.
    fn proceed(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, altered: Option<Firing>) {
        if self.readers.is_last_free() {
            return self.hand_over(caller, call.into_owned(), reply, altered);
        }
        self.finish(&caller, call, reply, altered.as_ref());
    }

    /// The other readers may be waiting for a disk, for as long as it likes: this one goes on reading.
    #[cold]
    fn hand_over(self: &Arc<Self>, caller: Caller, call: Call<'static>, reply: Reply, altered: Option<Firing>) {
        let (core, under_way) = (self.clone(), call.tells().then(|| self.readers.hand_over()));
        self.workers.run(move || {
            core.finish(&caller, call, reply, altered.as_ref());
            drop(under_way);
        });
    }

    fn finish(self: &Arc<Self>, caller: &Caller, call: Call<'_>, mut reply: Reply, altered: Option<&Firing>) {
        if let Some(firing) = altered {
            return self.finish_altered(caller, call, reply, firing);
        }
        let performed = self.perform(caller, &call, &mut reply);
        self.readers.about_to_answer();
        match performed {
            Ok(answer) => reply.answer(answer),
            Err(errno) => reply.error(errno),
        }
        self.ring.wake();
    }

    /// Tells an error of what was done. Pages that it has changed the kernel forgets by itself only when it hears so. On
    /// another thread: to make it forget can take requests that this one has to serve.
    fn fail_after(self: &Arc<Self>, caller: &Caller, call: Call<'_>, reply: Reply, firing: Firing, told: Told) {
        let changed = match &call {
            Call::Fallocate { ino, offset, length, .. } => (*ino, *offset..offset.saturating_add(*length)),
            Call::CopyFileRange { to_ino, to_offset, length, .. } => {
                (*to_ino, *to_offset..to_offset.saturating_add(*length))
            }
            Call::Setattr { ino, changes, .. } if changes.size.is_some() => (*ino, 0..0),
            _ => return self.fail(caller, call, reply, &firing, told),
        };
        let (core, caller, call, (ino, pages)) = (self.clone(), *caller, call.into_owned(), changed);
        self.workers.run(move || match &call {
            // The kernel writes no page back while it truncates: it cannot forget any before the answer.
            Call::Setattr { .. } => {
                core.fail(&caller, call, reply, &firing, told);
                core.forget_pages(ino, &(0..0));
            }
            _ => {
                core.forget_pages(ino, &pages);
                core.fail(&caller, call, reply, &firing, told);
            }
        });
    }

    /// Does it as a firing wants it. What could not be done otherwise than asked for is no injection.
    #[cold]
    fn finish_altered(self: &Arc<Self>, caller: &Caller, call: Call<'_>, mut reply: Reply, firing: &Firing) {
        let performed = self.perform_altered(caller, &call, firing, &mut reply);
        self.readers.about_to_answer();
        match performed {
            Ok((answer, Some(told))) if told.errno.is_some() => {
                self.take_back(&call, answer);
                return self.fail_after(caller, call, reply, firing.clone(), told);
            }
            Ok((answer, told)) => {
                if !matches!(answer, Answer::AskAgain) {
                    self.note_passed(caller, &call);
                }
                match told {
                    Some(told) => self.inject(caller, &call, firing, told),
                    None => firing.revoke(),
                }
                reply.answer(answer);
            }
            Err(errno) => {
                firing.revoke();
                reply.error(errno);
            }
        }
        self.ring.wake();
    }

    fn note_passed(&self, caller: &Caller, call: &Call<'_>) {
        if let Some(piece) = self.piece(caller, call) {
            self.holds.passed(&piece);
        }
    }

    /// A read or a write as holds look at it.
    pub fn piece(&self, caller: &Caller, call: &Call<'_>) -> Option<Piece> {
        let (flags, writeback) = match call {
            Call::Read { flags, .. } => (*flags, false),
            Call::Write { flags, origin, .. } => (*flags, origin.writeback),
            _ => return None,
        };
        let (offset, length) = call.range()?;
        let file = self.files.get(call.fh()?).ok()?;
        Some(Piece {
            op: call.op(),
            ino: call.ino(),
            tid: caller.tid,
            range: offset..offset.saturating_add(length.max(1)),
            cached: file.cached && flags & libc::O_DIRECT == 0,
            writeback,
            append: call.op() == Op::Write && flags & libc::O_APPEND != 0,
        })
    }

    /// Puts an injection on the stream. The listener is woken after the reply.
    pub fn inject(&self, caller: &Caller, call: &Call<'_>, firing: &Firing, told: Told) {
        let rule = &firing.rule;
        if !told.repeat {
            self.wake_others(firing.note_told());
        }
        let seq = self.ring.inject(Injection {
            rule: rule.name.clone(),
            kind: firing.fault().word(),
            errno: told.errno,
            done: told.done,
            changed: told.changed,
            delay_ns: told.delay_ns,
            nth: firing.nth,
            repeat: told.repeat,
            labels: rule.labels.clone(),
            ..self.describe(caller, call, Some(rule))
        });
        if !told.repeat {
            rule.note_published(seq);
        }
    }

    /// The first firing of a rule can wake others.
    fn wake_others(&self, first: bool) {
        if first && self.arming.has_waiting() {
            self.parking.wake_clock();
        }
    }

    /// A refusal by the capacity: an injection of the reserved rule `space`, or of the mode that made it.
    pub fn inject_space(&self, caller: &Caller, call: &Call<'_>, done: Option<u64>, errno: Option<i32>) {
        let (plan, space) = (self.arming.plan(), self.arming.space());
        let is_full = |rule: &&Arc<Rule>| rule.faults().any(|fault| *fault == Fault::Full);
        let by_mode = plan.rules.iter().rev().find(is_full).filter(|_| self.capacity.is_full_by_mode());
        let refuses = by_mode.unwrap_or(&space);
        refuses.counters.matches.fetch_add(1, Relaxed);
        let nth = refuses.counters.injections.fetch_add(1, Relaxed) + 1;
        self.wake_others(refuses.note_told());
        let rule = refuses.name.clone();
        let injection = Injection { rule, kind: "space", errno, done, nth, ..self.describe(caller, call, None) };
        refuses.note_published(self.ring.inject(injection));
    }

    /// The part of an injection that tells the request.
    fn describe(&self, caller: &Caller, call: &Call<'_>, rule: Option<&Rule>) -> Injection {
        let process = process::of_thread(caller.tid);
        let range = call.range();
        let [path, to] = Request::new(self, caller, call).paths(rule);
        Injection {
            op: call.op().word(),
            path,
            to,
            ino: call.ino(),
            fh: call.fh(),
            offset: range.map(|(offset, _)| offset),
            length: range.map(|(_, length)| length),
            pid: process.pid,
            tid: caller.tid,
            uid: caller.uid,
            comm: process.comm,
            worker: worker_number(),
            ..Injection::default()
        }
    }

    /// The paths that a parked request is about, as an injection would tell them.
    pub fn paths_of(&self, parked: &Parked) -> [Option<Arc<[u8]>>; 2] {
        let Pending { caller, call, .. } = &parked.pending;
        Request::new(self, caller, call).paths(parked.rules.first().map(|rule| &**rule))
    }

    /// The files for which requests wait.
    pub fn parked_files(&self) -> HashSet<u64> {
        let mut files = HashSet::new();
        self.parking.each(|_, one| files.extend([one.pending.call.ino()]));
        files
    }

    /// Nothing is free while the mode says so, and the clock.
    pub fn follow_mode(&self) {
        self.arming.with_mode(|mode| {
            let now = self.ring.now_ns();
            let is_full = |rule: &Rule| rule.faults().any(|fault| *fault == Fault::Full) && rule.is_in_time(now);
            self.capacity.set_full(mode.is_some_and(is_full));
        });
    }

    /// How long the kernel may keep an answer. While a rule could concern what it keeps, not at all.
    pub fn keep(&self, inode: &Inode) -> Keep {
        let name = if self.arming.concerns_cached() { Duration::ZERO } else { TIMEOUT };
        // A substitute id must not be shown as the inode number: the next stat asks us and gets the right one.
        let substitute = inode.id != inode.identity.ino;
        Keep { name, attributes: if substitute { Duration::ZERO } else { name } }
    }
}

/// What is told of an injection: to the program, and on the stream.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub errno: Option<i32>,
    /// Bytes that were done, of a request cut short.
    pub done: Option<u64>,
    /// Bytes of the file that are other than was asked for.
    pub changed: Option<Arc<Vec<Range<u64>>>>,
    pub delay_ns: u64,
    pub repeat: bool,
}

/// How a request is made to wait.
struct Wait {
    stalled: bool,
    rules: SmallVec<[Arc<Rule>; 1]>,
    delays: Vec<Firing>,
    until: Option<u64>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its time has come, or a client released it: what follows a stall follows.
    Released,
    /// What held it is no more: it goes on as if it had never been held.
    Removed,
    CallerDied,
}

/// Was the request done before its error is told?
fn is_done(firing: &Firing) -> bool {
    matches!(firing.fault(), Fault::Error { timing: Timing::After, .. })
}

/// A process that is gone needs no signal.
fn send_signal(pid: u32, signal: i32) {
    if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal);
    }
}

/// A number for each thread that serves requests.
fn worker_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static OURS: Cell<u32> = const { Cell::new(u32::MAX) };
    }
    OURS.with(|ours| {
        if ours.get() == u32::MAX {
            ours.set(NEXT.fetch_add(1, Relaxed));
        }
        ours.get()
    })
}
