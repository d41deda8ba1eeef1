//! The life of one request.
//!
//! [`Core::serve`] runs on the reader that read it, and on the normal way goes straight through to [`Core::perform`]
//! and the reply. A request that a rule delays or stalls is parked; one that is read when all other readers are in the
//! middle of something is done by a worker. No lock is held across a system call here, and a normal write allocates
//! nothing unless a rule fires.

use std::cell::{Cell, OnceCell};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use globset::GlobSet;
use smallvec::SmallVec;

use super::arming::Arming;
use super::call::{Answer, Call, Caller, Keep, Reply};
use super::files::Files;
use super::hold::{Holds, Piece};
use super::inode::Inode;
use super::limits;
use super::park::{Parked, Parking, Pending};
use super::process;
use super::readers::Readers;
use super::tree::Tree;
use super::workers::Workers;
use crate::event::{Injection, Ring};
use crate::fault::{Decision, Facts, Fault, Firing, Op, Outcome, Plan, Rule, Then, decide};
use crate::space::Capacity;

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
    pub workers: Workers,
    pub readers: Readers,
    /// Says to the kernel what it must no longer believe. Set once the session runs; never used by a reader.
    pub notifier: OnceLock<fuser::Notifier>,
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
            workers: Workers::default(),
            readers: Readers::default(),
            notifier: OnceLock::new(),
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
            && let Some((errno, firing)) = self.holds.owed(&piece)
        {
            self.inject(&caller, &call, &firing, Told { errno: Some(errno), repeat: true, ..Told::default() });
            reply.error(errno);
            self.ring.wake();
            return;
        }
        if !self.arming.concerns(op) {
            if self.holds.any() {
                self.note_passed(&caller, &call);
            }
            return self.proceed(caller, call, reply, None);
        }
        let decision = decide(&self.arming.plan(), &Request::new(self, &caller, &call));
        if decision.is_nothing() {
            self.note_passed(&caller, &call);
            return self.proceed(caller, call, reply, None);
        }
        self.enact(caller, call, reply, decision);
    }

    /// Does what was decided: waits first, then the outcome.
    fn enact(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, mut decision: Decision) {
        for firing in &decision.delays {
            self.inject(&caller, &call, firing, Told { delay_ns: firing.delay_ns, ..Told::default() });
        }
        let delay_ns = decision.delay_ns();
        if delay_ns > 0 {
            let rules = decision.delays.drain(..).map(|firing| firing.rule).collect();
            let until = self.ring.now_ns().saturating_add(delay_ns);
            return self.park(caller, call, reply, decision, Wait { stalled: false, rules, until: Some(until) });
        }
        decision.delays.clear();
        if let Some((_, firing)) = &decision.stall {
            self.inject(&caller, &call, firing, Told::default());
            let until = firing.rule.deadline_ns;
            let rules = [firing.rule.clone()].into_iter().collect();
            return self.park(caller, call, reply, decision, Wait { stalled: true, rules, until });
        }
        match decision.outcome {
            Outcome::Proceed => self.proceed(caller, call, reply, None),
            Outcome::Drop(firing) => self.proceed(caller, call, reply, Some(firing)),
            Outcome::Error(errno, firing) => self.fail(&caller, call, reply, errno, &firing, false),
        }
    }

    /// Tells an error that a rule decided, and sees to it that the program meets it exactly once.
    fn fail(&self, caller: &Caller, call: Call<'_>, reply: Reply, errno: i32, firing: &Firing, repeat: bool) {
        if let Some(piece) = self.piece(caller, &call) {
            self.holds.told(&piece, errno, firing);
        }
        self.inject(caller, &call, firing, Told { errno: Some(errno), repeat, ..Told::default() });
        if let Call::Release { .. } | Call::Releasedir { .. } = call {
            // The kernel ignores the error, and the handle is gone either way.
            let _ = self.perform(caller, &call, None, &mut Reply::None);
        }
        reply.error(errno);
        self.ring.wake();
    }

    fn park(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, decision: Decision, wait: Wait) {
        let parked = Parked {
            caller_started: process::start_time(caller.tid),
            pending: Pending { caller, call: call.into_owned(), reply, decision },
            stalled: wait.stalled,
            rules: wait.rules,
            since_ns: self.ring.now_ns(),
            until_ns: wait.until,
        };
        self.ring.wake();
        if let Err(parked) = self.parking.park(parked) {
            if self.parking.is_full() {
                tracing::warn!(limit = super::park::MOST, "no more requests can be parked: one goes on at once");
            }
            self.go_on(*parked, Ended::Removed);
        }
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
        if how == Ended::CallerDied {
            reply.error(libc::EINTR);
            return;
        }
        if parked.stalled
            && let Some((then, firing)) = decision.stall.take()
            && how == Ended::Released
            && let Then::Error(errno) = then
        {
            // The injection was told when the stall began; this is its end.
            return self.fail(&caller, call, reply, errno, &firing, true);
        }
        self.enact(caller, call, reply, decision);
    }

    /// The kernel gives back references. With the descriptor of a file that has no name any more goes the file itself, which
    /// can take the disk long: that is not for the last free reader.
    pub fn forget(&self, ino: u64, references: u64) {
        let unused = self.tree.forget(ino, references);
        if unused.as_ref().is_some_and(|inode| inode.holds_fd()) && self.readers.is_last_free() {
            self.workers.run(move || drop(unused));
        }
    }

    /// Past all rules: does it here, unless this is the last free reader.
    fn proceed(self: &Arc<Self>, caller: Caller, call: Call<'_>, reply: Reply, dropped: Option<Firing>) {
        if self.readers.is_last_free() {
            return self.hand_over(caller, call.into_owned(), reply, dropped);
        }
        self.finish(&caller, &call, reply, dropped.as_ref());
    }

    /// The other readers may be waiting for a disk, for as long as it likes: this one goes on reading.
    #[cold]
    fn hand_over(self: &Arc<Self>, caller: Caller, call: Call<'static>, reply: Reply, dropped: Option<Firing>) {
        let (core, under_way) = (self.clone(), call.tells().then(|| self.readers.hand_over()));
        self.workers.run(move || {
            core.finish(&caller, &call, reply, dropped.as_ref());
            drop(under_way);
        });
    }

    fn finish(&self, caller: &Caller, call: &Call<'_>, mut reply: Reply, dropped: Option<&Firing>) {
        let performed = self.perform(caller, call, dropped, &mut reply);
        if let (Ok(_), Some(firing)) = (&performed, dropped) {
            self.inject(caller, call, firing, Told::default());
        }
        self.readers.about_to_answer();
        match performed {
            Ok(answer) => reply.answer(answer),
            Err(errno) => reply.error(errno),
        }
        self.ring.wake();
    }

    fn note_passed(&self, caller: &Caller, call: &Call<'_>) {
        if let Some(piece) = self.piece(caller, call) {
            self.holds.passed(&piece);
        }
    }

    /// A read or a write as holds look at it.
    fn piece(&self, caller: &Caller, call: &Call<'_>) -> Option<Piece> {
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
        self.ring.inject(Injection {
            rule: rule.name.clone(),
            kind: rule.fault.word(),
            errno: told.errno,
            delay_ns: told.delay_ns,
            nth: firing.nth,
            repeat: told.repeat,
            labels: rule.labels.clone(),
            ..self.describe(caller, call)
        });
    }

    /// A refusal by the capacity: an injection of the reserved rule `space`, or of the mode that made it.
    pub fn inject_space(&self, caller: &Caller, call: &Call<'_>, done: Option<u64>, errno: Option<i32>) {
        let (mode, space) = (self.arming.mode().1, &self.arming.space);
        let by_mode = mode.as_ref().filter(|rule| rule.fault == Fault::Full && self.capacity.is_full_by_mode());
        let counters = &by_mode.unwrap_or(space).counters;
        counters.matches.fetch_add(1, Relaxed);
        let nth = counters.injections.fetch_add(1, Relaxed) + 1;
        let rule = by_mode.unwrap_or(space).name.clone();
        self.ring.inject(Injection { rule, kind: "space", errno, done, nth, ..self.describe(caller, call) });
    }

    /// The part of an injection that tells the request.
    fn describe(&self, caller: &Caller, call: &Call<'_>) -> Injection {
        let process = process::of_thread(caller.tid);
        let range = call.range();
        Injection {
            op: call.op().word(),
            path: Request::new(self, caller, call).path(),
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

    /// Does a request for this file wait?
    pub fn is_parked(&self, ino: u64) -> bool {
        let mut parked = false;
        self.parking.each(|_, one| parked |= one.pending.call.ino() == ino);
        parked
    }

    /// How long the kernel may keep an answer. While a rule could concern what it keeps, not at all.
    pub fn keep(&self, inode: &Inode) -> Keep {
        let name = if self.arming.concerns_cached() { Duration::ZERO } else { TIMEOUT };
        // A substitute id must not be shown as the inode number: the next stat asks us and gets the right one.
        let substitute = inode.id != inode.identity.ino;
        Keep { name, attributes: if substitute { Duration::ZERO } else { name } }
    }
}

/// What the program was told of an injection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    pub errno: Option<i32>,
    pub delay_ns: u64,
    pub repeat: bool,
}

/// How a request is made to wait.
struct Wait {
    stalled: bool,
    rules: SmallVec<[Arc<Rule>; 1]>,
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

/// The facts of one request, found out when a rule asks.
struct Request<'a> {
    core: &'a Core,
    caller: &'a Caller,
    call: &'a Call<'a>,
    inode: OnceCell<Option<Arc<Inode>>>,
    names: OnceCell<SmallVec<[Vec<u8>; 2]>>,
}

impl<'a> Request<'a> {
    fn new(core: &'a Core, caller: &'a Caller, call: &'a Call<'a>) -> Request<'a> {
        Request { core, caller, call, inode: OnceCell::new(), names: OnceCell::new() }
    }

    fn inode(&self) -> Option<&Arc<Inode>> {
        let find = || {
            let by_handle = self.call.fh().and_then(|fh| self.core.files.inode(fh, self.call.op()));
            by_handle.or_else(|| self.core.tree.get(self.call.ino()).ok())
        };
        self.inode.get_or_init(find).as_ref()
    }

    fn on_names(&self) -> bool {
        self.call.names().next().is_some()
    }

    /// Paths by name, where the operation works on names; link's own file comes with its paths too.
    fn name_paths(&self) -> &[Vec<u8>] {
        self.names.get_or_init(|| self.find_name_paths().collect())
    }

    fn find_name_paths(&self) -> impl Iterator<Item = Vec<u8>> {
        let named =
            self.call.names().filter_map(|(parent, name)| Some(self.core.tree.get(parent).ok()?.child_path(name)));
        let linked = matches!(self.call, Call::Link { .. }).then(|| self.inode()).flatten();
        named.chain(linked.map(|inode| inode.path(self.core.tree.version()).to_vec()))
    }

    /// The path for the event.
    fn path(&self) -> Option<Arc<[u8]>> {
        match self.name_paths().first() {
            Some(path) => Some(path.as_slice().into()),
            None => self.inode().map(|inode| inode.path(self.core.tree.version())),
        }
    }
}

impl Facts for Request<'_> {
    fn op(&self) -> Op {
        self.call.op()
    }

    fn uid(&self) -> u32 {
        self.caller.uid
    }

    fn pid(&self) -> u32 {
        process::of_thread(self.caller.tid).pid
    }

    fn range(&self) -> Option<(u64, u64)> {
        match self.call {
            Call::Setattr { changes, .. } => changes.size.map(|size| (size, 1)),
            call => call.range(),
        }
    }

    fn truncates(&self) -> bool {
        matches!(self.call, Call::Setattr { changes, .. } if changes.size.is_some())
    }

    fn grows(&self) -> bool {
        self.core.grows(self.call)
    }

    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
        if self.on_names() {
            let paths = || self.name_paths().iter().map(Vec::as_slice);
            return plan.is_large().then(|| plan.path_bits(paths()).into());
        }
        self.inode().map(|inode| inode.path_bits(plan, self.core.tree.version()))
    }

    fn path_matches(&self, rule: &Rule) -> bool {
        rule.path.is_none() || rule.path_matches(self.name_paths().iter().map(Vec::as_slice))
    }

    fn now_ns(&self) -> u64 {
        self.core.ring.now_ns()
    }
}
