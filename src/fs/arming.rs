//! The rules in force, and their change.
//!
//! Readers load the plan, one atomic load when no rule could concern them. Changes come from the control thread and
//! from the clock (a rule whose life has ended); the lock serialises those and is never taken by a reader. Nothing
//! here waits: whoever changes the rules then lets go what they held and cleans the kernel's caches.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::fault::compile::Defaults;
use crate::fault::plan::Trigger;
use crate::fault::spec::{FaultSpec, MatchSpec, TriggerSpec};
use crate::fault::{Fault, Op, OpSet, Plan, Problem, Rule, RuleSpec, State, compile};

/// The rules of one mount.
pub struct Arming {
    /// Bits of the operations that some rule could concern.
    concerned: AtomicU64,
    plan: ArcSwap<Plan>,
    set: Mutex<Set>,
    seed: u64,
    /// The reserved rule `space`, which counts the refusals by the capacity.
    pub space: Arc<Rule>,
}

#[derive(Default)]
struct Set {
    rules: Vec<Arc<Rule>>,
    mode: Mode,
    mode_rule: Option<Arc<Rule>>,
    plans: u64,
}

/// One word for the whole mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    AllowWrites,
    DropWrites,
    ErrorWrites,
    ErrorReads,
    ErrorAll,
    Enospc,
}

impl Mode {
    pub const ALL: &'static [(&'static str, Mode)] = &[
        ("allow_writes", Mode::AllowWrites),
        ("drop_writes", Mode::DropWrites),
        ("error_writes", Mode::ErrorWrites),
        ("error_reads", Mode::ErrorReads),
        ("error_all", Mode::ErrorAll),
        ("enospc", Mode::Enospc),
    ];

    pub fn parse(word: &str) -> Option<Mode> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode)
    }

    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }

    /// What a device in that state makes of a filesystem's requests. Names and attributes live in the page cache of
    /// the device, so only `error_all` touches names.
    fn rule(self) -> Option<(&'static [&'static str], Fault)> {
        let eio = Fault::Error { errno: libc::EIO };
        Some(match self {
            Mode::AllowWrites => return None,
            Mode::DropWrites => {
                (&["write", "copy_file_range", "fallocate", "truncate", "fsync", "fsyncdir"], Fault::Drop)
            }
            Mode::ErrorWrites => (&["write", "copy_file_range", "fallocate", "truncate", "fsync", "fsyncdir"], eio),
            Mode::ErrorReads => (&["read", "copy_file_range", "readdir", "readlink"], eio),
            Mode::ErrorAll => {
                (&["data", "fallocate", "truncate", "fsync", "fsyncdir", "names", "readdir", "readlink"], eio)
            }
            Mode::Enospc => (&["grow", "mkdir"], Fault::Full),
        })
    }
}

/// What a change left to be done.
#[derive(Debug, Default)]
pub struct Changed {
    /// Rules that are new, or armed again: what the kernel has cached may hide them.
    pub armed: Vec<Arc<Rule>>,
    /// Rules that are out of force: what they hold is to be let go.
    pub released: Vec<Arc<Rule>>,
}

impl Arming {
    pub fn new(seed: u64) -> Arming {
        Arming {
            concerned: AtomicU64::new(0),
            plan: ArcSwap::from_pointee(Plan::new(0, Vec::new())),
            set: Mutex::default(),
            seed,
            space: Arc::new(reserved_rule("space", &["grow", "mkdir"], Fault::Full, None, 0)),
        }
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Could any rule concern the operation? The whole cost of an idle mount.
    pub fn concerns(&self, op: Op) -> bool {
        self.concerned.load(Acquire) & (1 << op as u8) != 0
    }

    /// Could a rule concern something that the kernel answers from what it keeps of names or attributes?
    pub fn concerns_cached(&self) -> bool {
        const CACHED: u64 = 1 << Op::Lookup as u8 | 1 << Op::Getattr as u8;
        self.concerned.load(Acquire) & CACHED != 0
    }

    pub fn plan(&self) -> arc_swap::Guard<Arc<Plan>> {
        self.plan.load()
    }

    pub fn rules(&self) -> Vec<Arc<Rule>> {
        self.set.lock().rules.clone()
    }

    pub fn rule(&self, name: &str) -> Option<Arc<Rule>> {
        let set = self.set.lock();
        set.rules.iter().chain(&set.mode_rule).chain([&self.space]).find(|rule| &*rule.name == name).cloned()
    }

    pub fn mode(&self) -> (Mode, Option<Arc<Rule>>) {
        let set = self.set.lock();
        (set.mode, set.mode_rule.clone())
    }

    fn defaults(&self, now_ns: u64) -> Defaults {
        Defaults { seed: self.seed, now_ns, created: SystemTime::now() }
    }

    /// Checks rules without arming them.
    ///
    /// # Errors
    /// Everything that is wrong, with pointers below `prefix(i)`.
    fn compile_all(&self, specs: Vec<RuleSpec>, now_ns: u64) -> Result<Vec<Rule>, Vec<Problem>> {
        let mut rules = Vec::new();
        let mut problems = Vec::new();
        let mut names = HashSet::new();
        for (i, spec) in specs.into_iter().enumerate() {
            if !names.insert(spec.name.clone()) {
                let detail = format!("rules[{i}].name: {:?} is there twice", spec.name);
                problems.push(Problem::new(format!("#/rules/{i}/name"), detail));
            }
            match compile(spec, self.defaults(now_ns)) {
                Ok(rule) => rules.push(rule),
                Err(found) => problems.extend(found.into_iter().map(|problem| Problem {
                    pointer: problem.pointer.replacen("#", &format!("#/rules/{i}"), 1),
                    detail: format!("rules[{i}].{}", problem.detail),
                    ..problem
                })),
            }
        }
        if problems.is_empty() { Ok(rules) } else { Err(problems) }
    }

    /// Puts one rule: a new name goes to the end, a known one keeps its place. Tells whether it is new.
    ///
    /// # Errors
    /// What is wrong with it; then nothing has changed.
    pub fn put(&self, spec: RuleSpec, now_ns: u64) -> Result<(Arc<Rule>, bool, Changed), Vec<Problem>> {
        let rule = compile(spec, self.defaults(now_ns))?;
        let mut set = self.set.lock();
        let place = set.rules.iter().position(|old| old.name == rule.name);
        let rule = Arc::new(succeed(rule, place.map(|i| &*set.rules[i]), now_ns));
        let mut changed = Changed { armed: vec![rule.clone()], ..Changed::default() };
        match place {
            Some(i) => {
                let old = std::mem::replace(&mut set.rules[i], rule.clone());
                if !rule.same_definition(&old) || !rule.spec.enabled {
                    changed.released.push(old);
                }
            }
            None => set.rules.push(rule.clone()),
        }
        self.swap(&mut set, &changed);
        Ok((rule, place.is_none(), changed))
    }

    /// Replaces the whole set at once.
    ///
    /// # Errors
    /// What is wrong with any of them; then nothing has changed.
    pub fn replace(&self, specs: Vec<RuleSpec>, now_ns: u64) -> Result<Changed, Vec<Problem>> {
        let rules = self.compile_all(specs, now_ns)?;
        let mut set = self.set.lock();
        let old = std::mem::take(&mut set.rules);
        let mut changed = Changed::default();
        for rule in rules {
            let before = old.iter().find(|old| old.name == rule.name);
            let rule = Arc::new(succeed(rule, before.map(|old| &**old), now_ns));
            changed.armed.push(rule.clone());
            set.rules.push(rule);
        }
        let same = |new: &Rule, old: &Rule| new.spec.enabled && new.name == old.name && new.same_definition(old);
        let stays = |old: &Rule| set.rules.iter().any(|new| same(new, old));
        changed.released = old.into_iter().filter(|old| !stays(old)).collect();
        self.swap(&mut set, &changed);
        Ok(changed)
    }

    /// Removes the rules that a condition holds for.
    pub fn remove(&self, which: impl Fn(&Rule) -> bool) -> Changed {
        let mut set = self.set.lock();
        let mut changed = Changed::default();
        set.rules.retain(|rule| {
            let goes = which(rule);
            if goes {
                changed.released.push(rule.clone());
            }
            !goes
        });
        self.swap(&mut set, &changed);
        changed
    }

    /// Sets the mode, for ever or for a time.
    pub fn set_mode(&self, mode: Mode, life: Option<(String, u64)>, now_ns: u64) -> Changed {
        self.change_mode(&mut self.set.lock(), mode, life, now_ns)
    }

    /// Ends a mode whose life has ended, unless another was set meanwhile.
    pub fn end_mode(&self, ended: &Arc<Rule>, now_ns: u64) -> bool {
        let mut set = self.set.lock();
        let current = set.mode_rule.as_ref().is_some_and(|rule| Arc::ptr_eq(rule, ended));
        if current {
            self.change_mode(&mut set, Mode::AllowWrites, None, now_ns);
        }
        current
    }

    fn change_mode(&self, set: &mut Set, mode: Mode, life: Option<(String, u64)>, now_ns: u64) -> Changed {
        let rule = mode.rule().map(|(ops, fault)| Arc::new(reserved_rule("mode", ops, fault, life, now_ns)));
        let old = std::mem::replace(&mut set.mode_rule, rule.clone());
        let changed = Changed { armed: rule.into_iter().collect(), released: old.into_iter().collect() };
        set.mode = mode;
        self.swap(set, &changed);
        changed
    }

    /// The next moment at which some rule's life ends.
    pub fn next_deadline(&self, now_ns: u64) -> Option<u64> {
        let set = self.set.lock();
        let deadlines = set.rules.iter().chain(&set.mode_rule).filter_map(|rule| rule.deadline_ns);
        deadlines.filter(|deadline| *deadline > now_ns).min()
    }

    /// The rules whose life ended between two looks of the clock.
    pub fn expired(&self, from_ns: u64, to_ns: u64) -> Vec<Arc<Rule>> {
        let set = self.set.lock();
        let ended = |rule: &&Arc<Rule>| rule.deadline_ns.is_some_and(|at| from_ns < at && at <= to_ns);
        set.rules.iter().chain(&set.mode_rule).filter(ended).cloned().collect()
    }

    fn swap(&self, set: &mut Set, changed: &Changed) {
        changed.released.iter().for_each(|rule| rule.counters.retire(true));
        changed.armed.iter().for_each(|rule| rule.counters.retire(!rule.spec.enabled));
        set.plans += 1;
        let rules = set.rules.iter().chain(&set.mode_rule).cloned().collect();
        let plan = Plan::new(set.plans, rules);
        let concerned = plan.concerned();
        self.plan.store(Arc::new(plan));
        self.concerned.store(concerned, Release);
    }
}

/// A rule takes over the counters of the one of its name that says the same.
fn succeed(mut rule: Rule, old: Option<&Rule>, now_ns: u64) -> Rule {
    if let Some(old) = old.filter(|old| old.same_definition(&rule)) {
        rule.counters = old.counters.clone();
        rule.created = old.created;
        // Switching a rule off or on is not a new life for it; putting it again is.
        let switched = old.spec.enabled != rule.spec.enabled;
        if switched && old.state(now_ns) != State::Expired {
            rule.deadline_ns = old.deadline_ns;
        }
    }
    rule
}

fn reserved_rule(name: &str, ops: &[&str], fault: Fault, life: Option<(String, u64)>, now_ns: u64) -> Rule {
    let set = ops.iter().filter_map(|word| OpSet::parse(word)).fold(OpSet::default(), OpSet::with);
    let errno = match fault {
        Fault::Error { .. } => Some("EIO".to_string()),
        Fault::Full => Some("ENOSPC".to_string()),
        _ => None,
    };
    let spec = RuleSpec {
        name: name.into(),
        enabled: true,
        required: false,
        r#match: MatchSpec { ops: ops.iter().map(ToString::to_string).collect(), ..MatchSpec::default() },
        trigger: TriggerSpec { r#for: life.as_ref().map(|(text, _)| text.clone()), ..TriggerSpec::default() },
        fault: FaultSpec { kind: fault.word().into(), errno, ..FaultSpec::default() },
        labels: Default::default(),
    };
    Rule {
        name: name.into(),
        spec,
        ops: set,
        path: None,
        pid: None,
        uid: None,
        offset: None,
        trigger: Trigger { probability: 1.0, skip: 0, every: 1, times: None, seed: 0 },
        fault,
        labels: None,
        deadline_ns: life.map(|(_, ns)| now_ns.saturating_add(ns)),
        counters: Arc::default(),
        created: SystemTime::now(),
    }
}
