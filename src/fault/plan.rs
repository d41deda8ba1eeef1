//! The compiled set of rules: immutable but for its counters, swapped whole when rules change.
//!
//! Read by every reader thread on the hot path. Counters are atomics shared between the old plan and the new one, so
//! that a change of one rule loses no count of another. Locks: of what is counted by file or process, for a look at a table.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use globset::{GlobMatcher, GlobSet, GlobSetBuilder};
use parking_lot::Mutex;
use regex::bytes::Regex;

use super::index::Index;
use super::kind::Fault;
use super::op::{FileType, Op, OpSet};
use super::spec::RuleSpec;
use crate::ranges::Ranges;

/// One rule, checked and compiled.
#[derive(Debug)]
pub struct Rule {
    pub name: Arc<str>,
    /// As it was sent, for showing it again.
    pub spec: RuleSpec,
    pub place: Place,
    pub trigger: Trigger,
    /// What it does: one term for a kind; of several, the first that can act does.
    pub terms: Box<[Term]>,
    pub labels: Option<Arc<BTreeMap<String, String>>>,
    /// Monotonic nanoseconds at which the rule was armed.
    pub armed_ns: u64,
    /// Monotonic nanoseconds at which the rule's life ends.
    pub deadline_ns: Option<u64>,
    pub counters: Arc<Counters>,
    pub created: SystemTime,
}

/// Where a rule holds, compiled: all that is given.
#[derive(Debug, Default)]
pub struct Place {
    /// What some term acts on.
    pub ops: OpSet,
    pub path: Option<GlobMatcher>,
    pub regex: Option<Regex>,
    pub pid: Option<u32>,
    pub tree: Option<u32>,
    pub comm: Option<GlobMatcher>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub offset: Option<Range<u64>>,
    pub length: Option<Range<u64>>,
    pub direct: Option<bool>,
    pub file_type: Option<FileType>,
}

/// When a match fires, compiled.
#[derive(Debug)]
pub struct Trigger {
    pub probability: f64,
    pub skip: u64,
    pub every: u64,
    pub times: Option<u64>,
    pub per: Per,
    /// Nanoseconds after arming.
    pub after_ns: u64,
    pub after_bytes: u64,
    pub after_rule: Option<AfterRule>,
    pub cycle: Option<Cycle>,
    pub seed: u64,
}

impl Trigger {
    /// Fires on each match.
    pub fn always() -> Trigger {
        Trigger {
            probability: 1.0,
            skip: 0,
            every: 1,
            times: None,
            per: Per::Mount,
            after_ns: 0,
            after_bytes: 0,
            after_rule: None,
            cycle: None,
            seed: 0,
        }
    }
}

/// What is counted by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    Mount,
    /// A file is its path: the same in the next run.
    File,
    Process,
}

impl Per {
    pub const WORDS: &'static [(&'static str, Per)] =
        &[("mount", Per::Mount), ("file", Per::File), ("process", Per::Process)];

    pub fn parse(word: &str) -> Option<Per> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, per)| *per)
    }
}

/// A disk that comes and goes: first it is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycle {
    pub up_ns: u64,
    pub down_ns: u64,
}

impl Cycle {
    /// Is it down, so long after arming?
    pub fn is_down(self, since_ns: u64) -> bool {
        since_ns % self.length_ns() >= self.up_ns
    }

    /// When that changes next, so long after arming.
    fn next_ns(self, since_ns: u64) -> u64 {
        let begun = since_ns / self.length_ns() * self.length_ns();
        let turn = begun.saturating_add(if self.is_down(since_ns) { self.length_ns() } else { self.up_ns });
        turn.max(since_ns.saturating_add(1))
    }

    fn length_ns(self) -> u64 {
        self.up_ns.saturating_add(self.down_ns)
    }
}

/// A rule that must have fired first.
#[derive(Debug)]
pub struct AfterRule {
    pub name: Arc<str>,
    /// That rule's counters. Kept when it is removed: what has happened has happened.
    counters: ArcSwapOption<Counters>,
    /// Was it noted that it has?
    noted: AtomicBool,
}

impl AfterRule {
    pub fn new(name: &str) -> AfterRule {
        AfterRule { name: name.into(), counters: ArcSwapOption::empty(), noted: AtomicBool::new(false) }
    }

    /// To be called when the rules have changed.
    pub fn link(&self, counters: Arc<Counters>) {
        let same = self.counters.load().as_ref().is_some_and(|known| Arc::ptr_eq(known, &counters));
        if !same {
            self.counters.store(Some(counters));
            // It is another rule by now, which has to fire first.
            self.noted.store(self.has_fired(), Release);
        }
    }

    pub fn has_fired(&self) -> bool {
        self.counters.load().as_ref().is_some_and(|counters| counters.told.load(Relaxed) > 0)
    }

    /// True once, when it has.
    pub fn has_just_fired(&self) -> bool {
        self.has_fired() && !self.noted.swap(true, AcqRel)
    }
}

/// One thing that a rule does.
#[derive(Debug)]
pub struct Term {
    /// Chance that it acts, 0 to 1.
    pub chance: f64,
    /// At most so many times.
    pub limit: Option<u64>,
    pub ops: OpSet,
    /// Nothing, for a term that lets requests pass.
    pub fault: Option<Fault>,
}

/// What a rule has met and done.
#[derive(Debug)]
pub struct Counters {
    /// Requests that matched.
    pub matches: AtomicU64,
    /// Firings, from the moment in which they are decided.
    pub injections: AtomicU64,
    /// Firings that were told: what is waited for. One whose caller dies in a delay before it is never told.
    pub told: AtomicU64,
    /// The number of the newest of their events: for who waits from a place that the ring has lost.
    pub newest: AtomicU64,
    /// What is counted over the whole mount.
    pub(super) whole: Scope,
    /// What is counted by file or by process. The lock is held to find or add an entry.
    pub(super) scopes: Mutex<HashMap<u64, Arc<Scope>>>,
    pub(super) terms: Box<[TermState]>,
    /// Of a required rule: how far requests got.
    pub funnel: Funnel,
    /// Is the rule out of force: removed, disabled, or changed into another?
    retired: AtomicBool,
}

/// The count of one mount, file or process.
#[derive(Debug, Default)]
pub struct Scope {
    /// Matches since the rule woke.
    pub n: AtomicU64,
    pub injections: AtomicU64,
    pub bytes: AtomicU64,
}

impl Scope {
    /// Counts bytes of a request, and tells how many there were before it.
    pub fn moved(&self, bytes: u64) -> u64 {
        let more = |before: u64| Some(before.saturating_add(bytes));
        self.bytes.fetch_update(Relaxed, Relaxed, more).unwrap_or_else(|before| before)
    }
}

/// What a term has done.
#[derive(Debug, Default)]
pub(super) struct TermState {
    pub fired: AtomicU64,
    /// Of a slow disk: until when it is busy, by bytes and by operations.
    pub busy_ns: [AtomicU64; 2],
    /// Of bad sectors, by file: what was written since. The lock is held to look or add.
    pub healed: Mutex<HashMap<u64, Ranges>>,
}

/// Of all requests, how many met the conditions of a rule: each counts those that met all before it too.
#[derive(Debug, Default)]
pub struct Funnel {
    pub looked: AtomicU64,
    pub ops: AtomicU64,
    pub path: AtomicU64,
    pub process: AtomicU64,
    pub range: AtomicU64,
}

impl Counters {
    /// For a rule of so many terms.
    pub fn new(terms: usize) -> Counters {
        Counters {
            matches: AtomicU64::new(0),
            injections: AtomicU64::new(0),
            told: AtomicU64::new(0),
            newest: AtomicU64::new(0),
            whole: Scope::default(),
            scopes: Mutex::default(),
            terms: (0..terms).map(|_| TermState::default()).collect(),
            funnel: Funnel::default(),
            retired: AtomicBool::new(false),
        }
    }

    pub fn is_retired(&self) -> bool {
        self.retired.load(Acquire)
    }

    /// To be called before what the rule holds is let go, so that nothing is held by it after that.
    pub fn retire(&self, retired: bool) {
        self.retired.store(retired, Release);
    }

    /// Matches that the conditions on time and on others let through.
    pub fn awake_matches(&self) -> u64 {
        let scopes = self.scopes.lock();
        self.whole.n.load(Relaxed) + scopes.values().map(|scope| scope.n.load(Relaxed)).sum::<u64>()
    }
}

/// Where a rule is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Armed,
    Exhausted,
    Expired,
    Disabled,
}

impl State {
    pub const ALL: [State; 4] = [State::Armed, State::Exhausted, State::Expired, State::Disabled];

    pub fn word(self) -> &'static str {
        match self {
            State::Armed => "armed",
            State::Exhausted => "exhausted",
            State::Expired => "expired",
            State::Disabled => "disabled",
        }
    }
}

impl Rule {
    /// The state at a moment of the monotonic clock.
    pub fn state(&self, now_ns: u64) -> State {
        if !self.spec.enabled {
            State::Disabled
        } else if self.deadline_ns.is_some_and(|deadline| deadline <= now_ns) {
            State::Expired
        } else if self.is_exhausted() {
            State::Exhausted
        } else {
            State::Armed
        }
    }

    /// Of a rule that counts by file or process there may always be another one.
    fn is_exhausted(&self) -> bool {
        let counters = &self.counters;
        let all = self.trigger.times.is_some_and(|times| counters.whole.injections.load(Relaxed) >= times);
        let used_up =
            |(term, state): (&Term, &TermState)| term.limit.is_some_and(|limit| state.fired.load(Relaxed) >= limit);
        let acting = |(term, _): &(&Term, &TermState)| term.fault.is_some();
        all || self.terms.iter().zip(&counters.terms).filter(acting).all(used_up)
    }

    /// Do both say the same? Then the counters go over from one to the other.
    pub fn same_definition(&self, other: &Rule) -> bool {
        self.spec.r#match == other.spec.r#match
            && self.spec.trigger == other.spec.trigger
            && self.spec.fault == other.spec.fault
    }

    pub fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.terms.iter().filter_map(|term| term.fault.as_ref())
    }

    /// Could a request of this operation be meant?
    pub fn may_concern(&self, op: Op) -> bool {
        // The capacity does its own refusing: a `Full` rule is listed and counted, and never asked.
        let acts = |fault: &Fault| *fault != Fault::Full;
        self.spec.enabled && self.faults().any(acts) && (self.place.ops.may_concern(op) || self.heals_by(op))
    }

    /// Does a request of this operation make a bad sector good?
    pub fn heals_by(&self, op: Op) -> bool {
        let heals = |fault: &Fault| matches!(fault, Fault::BadSectors(bad) if bad.heal_on_write);
        op == Op::Write && self.faults().any(heals)
    }

    /// The next moment at which the rule wakes or goes to sleep by itself, or its life ends.
    pub fn next_turn_ns(&self, now_ns: u64) -> Option<u64> {
        let since = now_ns.saturating_sub(self.armed_ns);
        let cycle = self.trigger.cycle.map(|cycle| self.armed_ns.saturating_add(cycle.next_ns(since)));
        let wakes = self.armed_ns.saturating_add(self.trigger.after_ns);
        let alive = self.deadline_ns.is_none_or(|deadline| deadline > now_ns);
        let turns = [self.deadline_ns, cycle.filter(|_| alive), Some(wakes)].into_iter().flatten();
        turns.filter(|turn| *turn > now_ns).min()
    }

    /// By the clock alone, would it fire now?
    pub fn is_in_time(&self, now_ns: u64) -> bool {
        let since = now_ns.saturating_sub(self.armed_ns);
        self.deadline_ns.is_none_or(|deadline| now_ns < deadline)
            && since >= self.trigger.after_ns
            && self.trigger.cycle.is_none_or(|cycle| cycle.is_down(since))
    }

    /// Must it still fire, for the run to count?
    pub fn is_awaited(&self) -> bool {
        self.spec.required && self.counters.told.load(Relaxed) == 0
    }

    /// Does the path condition hold for any of these?
    pub fn path_matches<'a>(&self, mut paths: impl Iterator<Item = &'a [u8]>) -> bool {
        if !self.has_path() {
            return true;
        }
        let (glob, regex) = (&self.place.path, &self.place.regex);
        paths.any(|path| {
            glob.as_ref().is_none_or(|glob| glob.is_match(OsStr::from_bytes(path)))
                && regex.as_ref().is_none_or(|regex| regex.is_match(path))
        })
    }

    /// Has it a condition on the path?
    pub fn has_path(&self) -> bool {
        self.place.path.is_some() || self.place.regex.is_some()
    }
}

/// The set in force.
#[derive(Debug)]
pub struct Plan {
    /// Distinguishes this plan from every other of the mount; caches of path matches are keyed by it.
    pub id: u64,
    /// In the order in which they are asked. The mode, when one is set, comes last.
    pub rules: Vec<Arc<Rule>>,
    /// For each operation, a bit for each rule that could concern it.
    by_op: Vec<Box<[u64]>>,
    /// The path conditions of many rules as one automaton, with the rule of each; built when a path is first asked for.
    globs: OnceLock<Option<(GlobSet, Vec<usize>)>>,
    /// Of many rules.
    pub index: Option<Index>,
    /// Rules that must fire and have not, as far as is known: they look at each request.
    pub awaited: Vec<usize>,
    /// Is some rule about bytes on their way, so that no copy may be made inside the filesystem?
    pub plain_io: bool,
    /// Those whose bad sectors are good again once they are written.
    pub healing: Vec<usize>,
}

/// With more rules than this, their paths are matched together.
const MANY: usize = 16;

impl Plan {
    /// A plan of the rules that can still act: disabled ones are kept out, expired and exhausted ones decide for
    /// themselves.
    pub fn new(id: u64, rules: Vec<Arc<Rule>>) -> Plan {
        let by_op = Op::ALL.iter().map(|op| bits(&rules, |rule| rule.may_concern(*op))).collect();
        let index = (rules.len() > MANY).then(|| Index::new(&rules));
        let awaits = |(i, rule): (usize, &Arc<Rule>)| (rule.spec.enabled && rule.is_awaited()).then_some(i);
        let awaited = rules.iter().enumerate().filter_map(awaits).collect();
        let plain_io = rules.iter().any(|rule| rule.spec.enabled && rule.faults().any(Fault::wants_plain_io));
        let heals = |(i, rule): (usize, &Arc<Rule>)| (rule.spec.enabled && rule.heals_by(Op::Write)).then_some(i);
        let healing = rules.iter().enumerate().filter_map(heals).collect();
        Plan { id, rules, by_op, globs: OnceLock::new(), index, awaited, plain_io, healing }
    }

    /// The bits of the rules that could concern an operation.
    pub fn candidates(&self, op: Op) -> &[u64] {
        &self.by_op[op as usize]
    }

    /// A mask with the bit of each operation that some rule could concern.
    pub fn concerned(&self) -> u64 {
        Op::ALL.iter().filter(|op| self.concerns(**op)).fold(0, |mask, op| mask | 1 << *op as u8)
    }

    fn concerns(&self, op: Op) -> bool {
        let copies = op == Op::CopyFileRange && self.plain_io;
        copies || !self.awaited.is_empty() || self.may_act_on(op)
    }

    /// Could some rule act on an operation, and not only look at it?
    pub fn may_act_on(&self, op: Op) -> bool {
        self.candidates(op).iter().any(|word| *word != 0)
    }

    /// The bits of the rules whose path condition holds for any of these paths; a rule without one always holds.
    pub fn path_bits<'a>(&self, paths: impl Iterator<Item = &'a [u8]> + Clone) -> Box<[u64]> {
        let together = self.is_large().then(|| self.globs.get_or_init(|| self.all_globs()).as_ref()).flatten();
        let Some((set, rules)) = together else {
            return bits(&self.rules, |rule| rule.path_matches(paths.clone()));
        };
        // What no glob decides is asked by itself.
        let mut bits = bits(&self.rules, |rule| rule.place.path.is_none() && rule.path_matches(paths.clone()));
        let mut found = Vec::new();
        for path in paths.clone() {
            set.matches_into(OsStr::from_bytes(path), &mut found);
            let fits =
                |rule: &usize| self.rules[*rule].place.regex.is_none() || self.rules[*rule].path_matches(paths.clone());
            let found = found.iter().map(|glob| rules[*glob]).filter(fits);
            found.for_each(|rule| bits[rule / 64] |= 1 << (rule % 64));
        }
        bits
    }

    /// Are the rules so many that asking them one after the other would be slow?
    pub fn is_large(&self) -> bool {
        self.rules.len() > MANY
    }

    /// None when the automaton would be too large: then they are asked one after the other after all.
    fn all_globs(&self) -> Option<(GlobSet, Vec<usize>)> {
        let with_path = self.rules.iter().enumerate().filter_map(|(i, rule)| Some((i, rule.place.path.as_ref()?)));
        let mut builder = GlobSetBuilder::new();
        let mut rules = Vec::new();
        for (i, path) in with_path {
            builder.add(path.glob().clone());
            rules.push(i);
        }
        Some((builder.build().ok()?, rules))
    }
}

/// A bit for each rule that something holds for.
pub(super) fn bits(rules: &[Arc<Rule>], holds: impl Fn(&Rule) -> bool) -> Box<[u64]> {
    let mut bits = vec![0u64; rules.len().div_ceil(64)].into_boxed_slice();
    for (i, _) in rules.iter().enumerate().filter(|(_, rule)| holds(rule)) {
        bits[i / 64] |= 1 << (i % 64);
    }
    bits
}
