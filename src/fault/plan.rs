//! The compiled set of rules: immutable but for its counters, swapped whole when rules change.
//!
//! Read by every reader thread on the hot path. Counters are atomics shared between the old plan and the new one, so
//! that a change of one rule loses no count of another. No locks.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use globset::{GlobMatcher, GlobSet, GlobSetBuilder};

use super::index::Index;
use super::kind::Fault;
use super::op::{Op, OpSet};
use super::spec::RuleSpec;

/// One rule, checked and compiled.
#[derive(Debug)]
pub struct Rule {
    pub name: Arc<str>,
    /// As it was sent, for showing it again.
    pub spec: RuleSpec,
    pub ops: OpSet,
    pub path: Option<GlobMatcher>,
    pub pid: Option<u32>,
    pub uid: Option<u32>,
    pub offset: Option<Range<u64>>,
    pub trigger: Trigger,
    pub fault: Fault,
    pub labels: Option<Arc<BTreeMap<String, String>>>,
    /// Monotonic nanoseconds at which the rule's life ends.
    pub deadline_ns: Option<u64>,
    pub counters: Arc<Counters>,
    pub created: SystemTime,
}

/// When a match fires, compiled.
#[derive(Clone, Debug)]
pub struct Trigger {
    pub probability: f64,
    pub skip: u64,
    pub every: u64,
    pub times: Option<u64>,
    pub seed: u64,
}

/// What a rule has met and done.
#[derive(Debug, Default)]
pub struct Counters {
    pub matches: AtomicU64,
    pub injections: AtomicU64,
    /// Is the rule out of force: removed, disabled, or changed into another?
    retired: AtomicBool,
}

impl Counters {
    pub fn is_retired(&self) -> bool {
        self.retired.load(Acquire)
    }

    /// To be called before what the rule holds is let go, so that nothing is held by it after that.
    pub fn retire(&self, retired: bool) {
        self.retired.store(retired, Release);
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
        } else if self.trigger.times.is_some_and(|times| self.counters.injections.load(Relaxed) >= times) {
            State::Exhausted
        } else {
            State::Armed
        }
    }

    /// Do both say the same? Then the counters go over from one to the other.
    pub fn same_definition(&self, other: &Rule) -> bool {
        self.spec.r#match == other.spec.r#match
            && self.spec.trigger == other.spec.trigger
            && self.spec.fault == other.spec.fault
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
}

/// With more rules than this, their paths are matched together.
const MANY: usize = 16;

impl Plan {
    /// A plan of the rules that can still act: disabled ones are kept out, expired and exhausted ones decide for
    /// themselves.
    pub fn new(id: u64, rules: Vec<Arc<Rule>>) -> Plan {
        let by_op = Op::ALL.iter().map(|op| bits(&rules, |rule| acts_on(rule, *op))).collect();
        let index = (rules.len() > MANY).then(|| Index::new(&rules));
        Plan { id, rules, by_op, globs: OnceLock::new(), index }
    }

    /// The bits of the rules that could concern an operation.
    pub fn candidates(&self, op: Op) -> &[u64] {
        &self.by_op[op as usize]
    }

    /// A mask with the bit of each operation that some rule could concern.
    pub fn concerned(&self) -> u64 {
        Op::ALL.iter().filter(|op| self.concerns(**op)).fold(0, |mask, op| mask | 1 << *op as u8)
    }

    pub fn concerns(&self, op: Op) -> bool {
        self.candidates(op).iter().any(|word| *word != 0)
    }

    /// The bits of the rules whose path condition holds for any of these paths; a rule without one always holds.
    pub fn path_bits<'a>(&self, paths: impl Iterator<Item = &'a [u8]> + Clone) -> Box<[u64]> {
        let together = self.is_large().then(|| self.globs.get_or_init(|| self.all_globs()).as_ref()).flatten();
        let Some((set, rules)) = together else {
            return bits(&self.rules, |rule| rule.path_matches(paths.clone()));
        };
        let mut bits = bits(&self.rules, |rule| rule.path.is_none());
        let mut found = Vec::new();
        for path in paths {
            set.matches_into(OsStr::from_bytes(path), &mut found);
            found.iter().map(|glob| rules[*glob]).for_each(|rule| bits[rule / 64] |= 1 << (rule % 64));
        }
        bits
    }

    /// Are the rules so many that asking them one after the other would be slow?
    pub fn is_large(&self) -> bool {
        self.rules.len() > MANY
    }

    /// None when the automaton would be too large: then they are asked one after the other after all.
    fn all_globs(&self) -> Option<(GlobSet, Vec<usize>)> {
        let with_path = self.rules.iter().enumerate().filter_map(|(i, rule)| Some((i, rule.path.as_ref()?)));
        let mut builder = GlobSetBuilder::new();
        let mut rules = Vec::new();
        for (i, path) in with_path {
            builder.add(path.glob().clone());
            rules.push(i);
        }
        Some((builder.build().ok()?, rules))
    }
}

impl Rule {
    /// Does the path condition hold for any of these?
    pub fn path_matches<'a>(&self, mut paths: impl Iterator<Item = &'a [u8]>) -> bool {
        match &self.path {
            None => true,
            Some(glob) => paths.any(|path| glob.is_match(OsStr::from_bytes(path))),
        }
    }
}

/// The capacity does its own refusing: a `Full` rule is listed and counted, and never asked.
fn acts_on(rule: &Rule, op: Op) -> bool {
    rule.spec.enabled && rule.fault != Fault::Full && rule.ops.may_concern(op)
}

/// A bit for each rule that something holds for.
pub(super) fn bits(rules: &[Arc<Rule>], holds: impl Fn(&Rule) -> bool) -> Box<[u64]> {
    let mut bits = vec![0u64; rules.len().div_ceil(64)].into_boxed_slice();
    for (i, _) in rules.iter().enumerate().filter(|(_, rule)| holds(rule)) {
        bits[i / 64] |= 1 << (i % 64);
    }
    bits
}
