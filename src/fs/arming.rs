//! The rules in force, and their change.
//!
//! Readers load the plan, one atomic load when no rule could concern them. Changes come from the control thread and
//! from the clock (a rule whose life has ended); the lock serialises those and is never taken by a reader. Nothing
//! here waits: whoever changes the rules then lets go what they held and cleans the kernel's caches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::fault::compile::Defaults;
use crate::fault::plan::AfterRule;
use crate::fault::{Fault, Life, Mode, Op, Plan, Problem, Rule, RuleSpec, State, compile, reserved};

/// The rules of one mount.
pub struct Arming {
    /// Bits of the operations that some rule could concern.
    concerned: AtomicU64,
    /// Could a rule act on what the kernel answers from what it keeps of names or attributes?
    cached: AtomicBool,
    /// Could a rule tell an error to a write?
    owes: AtomicBool,
    plan: ArcSwap<Plan>,
    set: Mutex<Set>,
    seed: u64,
    /// The reserved rule `space`, which counts the refusals by the capacity.
    space: ArcSwap<Rule>,
}

#[derive(Default)]
struct Set {
    rules: Vec<Arc<Rule>>,
    mode: Mode,
    mode_rule: Option<Arc<Rule>>,
    /// The rule of a mode whose life has ended, until another is set: it can still be asked whether it has fired.
    ended_mode: Option<Arc<Rule>>,
    plans: u64,
}

/// What a change left to be done.
#[derive(Debug, Default)]
pub struct Changed {
    /// Rules that are new, or armed again: what the kernel has cached may hide them.
    pub armed: Vec<Arc<Rule>>,
    /// Rules that are out of force: what they hold is to be let go.
    pub released: Vec<Arc<Rule>>,
}

/// Rules about which something changed by itself.
#[derive(Debug, Default)]
pub struct Turns {
    /// Their lives have ended.
    pub ended: Vec<Arc<Rule>>,
    /// They fire from now on.
    pub woken: Vec<Arc<Rule>>,
    /// They fire no longer, for a while.
    pub asleep: Vec<Arc<Rule>>,
}

impl Arming {
    pub fn new(seed: u64) -> Arming {
        Arming {
            concerned: AtomicU64::new(0),
            cached: AtomicBool::new(false),
            owes: AtomicBool::new(false),
            plan: ArcSwap::from_pointee(Plan::new(0, Vec::new())),
            set: Mutex::default(),
            seed,
            space: ArcSwap::from_pointee(reserved::space(0)),
        }
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Could any rule concern the operation? The whole cost of an idle mount.
    pub fn concerns(&self, op: Op) -> bool {
        self.concerned.load(Acquire) & (1 << op as u8) != 0
    }

    /// Could a rule act on something that the kernel answers from what it keeps of names or attributes, or tell it wrong ones?
    pub fn concerns_cached(&self) -> bool {
        self.cached.load(Acquire)
    }

    /// Could a rule tell an error to a write? Only then it has to be known which pieces of a call came before.
    pub fn owes(&self) -> bool {
        self.owes.load(Acquire)
    }

    pub fn plan(&self) -> arc_swap::Guard<Arc<Plan>> {
        self.plan.load()
    }

    pub fn rules(&self) -> Vec<Arc<Rule>> {
        self.set.lock().rules.clone()
    }

    pub fn rule(&self, name: &str) -> Option<Arc<Rule>> {
        let set = self.set.lock();
        set.rules.iter().chain(&set.mode_rule).chain([&self.space()]).find(|rule| &*rule.name == name).cloned()
    }

    /// The rule of what the capacity refuses.
    pub fn space(&self) -> Arc<Rule> {
        self.space.load_full()
    }

    /// The capacity is another one: its refusals are counted from 0.
    pub fn renew_space(&self, now_ns: u64) {
        let set = self.set.lock();
        self.space.store(Arc::new(reserved::space(now_ns)));
        self.link(&set);
    }

    /// A rule of this name, or the mode that has ended.
    pub fn rule_or_ended(&self, name: &str) -> Option<Arc<Rule>> {
        self.rule(name).or_else(|| self.set.lock().ended_mode.clone().filter(|rule| &*rule.name == name))
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
    /// Everything that is wrong, each with its place in the set.
    fn compile_all(&self, specs: Vec<RuleSpec>, now_ns: u64) -> Result<Vec<Rule>, Vec<Problem>> {
        let mut rules = Vec::new();
        let mut problems = Vec::new();
        let mut names: Vec<String> = Vec::new();
        for (i, spec) in specs.into_iter().enumerate() {
            let twice = names.contains(&spec.name);
            names.push(spec.name.clone());
            if twice {
                let detail = format!("rules[{i}].name: {:?} is there twice", spec.name);
                problems.push(Problem::new(format!("#/rules/{i}/name"), detail));
            }
            match compile(spec, self.defaults(now_ns)) {
                Ok(rule) => rules.push(rule),
                Err(found) => problems.extend(found.into_iter().map(|problem| below(problem, i))),
            }
        }
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        problems.extend(rules.iter().filter_map(|rule| {
            let i = names.iter().position(|name| **name == *rule.name)?;
            unknown_rule(rule, &known).map(|problem| below(problem, i))
        }));
        if problems.is_empty() { Ok(rules) } else { Err(problems) }
    }

    /// Puts one rule: a new name goes to the end, a known one keeps its place. Tells whether it is new.
    ///
    /// # Errors
    /// What is wrong with it; then nothing has changed.
    pub fn put(&self, spec: RuleSpec, now_ns: u64) -> Result<(Arc<Rule>, bool, Changed), Vec<Problem>> {
        let rule = compile(spec, self.defaults(now_ns))?;
        let mut set = self.set.lock();
        let known: Vec<&str> = set.rules.iter().map(|rule| &*rule.name).collect();
        if let Some(problem) = unknown_rule(&rule, &known) {
            return Err(vec![problem]);
        }
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
    pub fn set_mode(&self, mode: Mode, life: &Life, now_ns: u64) -> Changed {
        self.change_mode(&mut self.set.lock(), mode, life, now_ns)
    }

    /// Ends a mode whose life has ended, unless another was set meanwhile.
    pub fn end_mode(&self, ended: &Arc<Rule>, now_ns: u64) -> bool {
        let mut set = self.set.lock();
        let current = set.mode_rule.as_ref().is_some_and(|rule| Arc::ptr_eq(rule, ended));
        if current {
            self.change_mode(&mut set, Mode::AllowWrites, &Life::default(), now_ns);
            set.ended_mode = Some(ended.clone());
        }
        current
    }

    fn change_mode(&self, set: &mut Set, mode: Mode, life: &Life, now_ns: u64) -> Changed {
        let rule = mode.rule(life, now_ns).map(Arc::new);
        let old = std::mem::replace(&mut set.mode_rule, rule.clone());
        let changed = Changed { armed: rule.into_iter().collect(), released: old.into_iter().collect() };
        (set.mode, set.ended_mode) = (mode, None);
        self.swap(set, &changed);
        changed
    }

    /// The next moment at which the clock changes something about some rule.
    pub fn next_turn(&self, now_ns: u64) -> Option<u64> {
        let set = self.set.lock();
        set.rules.iter().chain(&set.mode_rule).filter_map(|rule| rule.next_turn_ns(now_ns)).min()
    }

    /// What came to pass between two looks of the clock.
    pub fn turns(&self, from_ns: u64, to_ns: u64) -> Turns {
        let set = self.set.lock();
        let mut turns = Turns::default();
        for rule in set.rules.iter().chain(&set.mode_rule).filter(|rule| rule.spec.enabled) {
            let ended = |at: u64| rule.deadline_ns.is_some_and(|deadline| deadline <= at);
            let fires = |at: u64| rule.is_in_time(at);
            match (ended(from_ns), ended(to_ns)) {
                (false, true) => turns.ended.push(rule.clone()),
                (false, false) if fires(to_ns) && !fires(from_ns) => turns.woken.push(rule.clone()),
                (false, false) if fires(from_ns) && !fires(to_ns) => turns.asleep.push(rule.clone()),
                _ => {}
            }
            let awaited = |after: &AfterRule| after.has_just_fired();
            if rule.trigger.after_rule.as_ref().is_some_and(awaited) {
                turns.woken.push(rule.clone());
            }
        }
        turns
    }

    /// Does something with the rule of the mode, which nobody changes meanwhile.
    pub fn with_mode(&self, act: impl FnOnce(Option<&Rule>)) {
        act(self.set.lock().mode_rule.as_deref());
    }

    /// Does some rule wait for another?
    pub fn has_waiting(&self) -> bool {
        self.plan().rules.iter().any(|rule| rule.trigger.after_rule.is_some())
    }

    /// Tells rules that wait for others where these count.
    fn link(&self, set: &Set) {
        let space = self.space();
        for after in set.rules.iter().filter_map(|rule| rule.trigger.after_rule.as_ref()) {
            let mut all = set.rules.iter().chain(&set.mode_rule).chain([&space]);
            if let Some(awaited) = all.find(|rule| rule.name == after.name) {
                after.link(awaited.counters.clone());
            }
        }
    }

    fn swap(&self, set: &mut Set, changed: &Changed) {
        let is_in_force = |rule: &&Arc<Rule>| rule.spec.enabled;
        changed.armed.iter().filter(is_in_force).for_each(|rule| rule.counters.retire(false));
        self.link(set);
        set.plans += 1;
        let rules = set.rules.iter().chain(&set.mode_rule).cloned().collect();
        let plan = Plan::new(set.plans, rules);
        let concerned = plan.concerned();
        let wrong = |rule: &Arc<Rule>| rule.spec.enabled && rule.faults().any(Fault::makes_cached_wrong);
        let cached =
            [Op::Lookup, Op::Getattr].into_iter().any(|op| plan.may_act_on(op)) || plan.rules.iter().any(wrong);
        self.cached.store(cached, Release);
        let owes = |rule: &Arc<Rule>| rule.may_concern(Op::Write) && rule.faults().any(may_fail);
        self.owes.store(plan.rules.iter().any(owes), Release);
        self.plan.store(Arc::new(plan));
        self.concerned.store(concerned, Release);
        // Who sees that a rule of the old plan is out of force finds the new one.
        let out = changed.armed.iter().filter(|rule| !is_in_force(rule)).chain(&changed.released);
        out.for_each(|rule| rule.counters.retire(true));
    }
}

/// Can a request be told an error because of it? A write whose old bytes find no room is, too.
fn may_fail(fault: &Fault) -> bool {
    use Fault::{Attr, Full, Kill, Latency, Throttle};
    !matches!(fault, Latency(_) | Throttle(_) | Kill { .. } | Attr(_) | Full)
}

/// A problem of the i-th rule of a set.
fn below(problem: Problem, i: usize) -> Problem {
    Problem {
        pointer: problem.pointer.replacen('#', &format!("#/rules/{i}"), 1),
        detail: format!("rules[{i}].{}", problem.detail),
        ..problem
    }
}

fn unknown_rule(rule: &Rule, known: &[&str]) -> Option<Problem> {
    let wanted = &*rule.trigger.after_rule.as_ref()?.name;
    let reserved = crate::fault::compile::RESERVED;
    if known.contains(&wanted) || reserved.contains(&wanted) {
        return None;
    }
    let problem = Problem::new("#/trigger/after_rule", format!("trigger.after_rule: there is no rule {wanted:?}"));
    Some(problem.nearest(wanted, known.iter().chain(reserved).copied()))
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
            rule.armed_ns = old.armed_ns;
        }
    }
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rule_that_can_fail_a_write_owes_it_an_error() {
        for (rest, owes) in [
            (r#""match":{"ops":["write"]},"fault":{"kind":"latency","delay":"1ms"}"#, false),
            (r#""match":{"ops":["write"]},"fault":{"kind":"drop"}"#, true),
            (r#""match":{"ops":["write"]},"fault":{"kind":"throttle","ops_per_second":10}"#, false),
            (r#""match":{"ops":["fsync"]},"fault":{"kind":"error","errno":"EIO"}"#, false),
            (r#""match":{"ops":["write"]},"fault":{"kind":"error","errno":"EIO"}"#, true),
            (r#""match":{"ops":["write"]},"fault":{"kind":"error","errno":"EIO"},"enabled":false"#, false),
            (r#""match":{"ops":["data"]},"fault":{"kind":"error","errno":"EIO","timing":"after"}"#, true),
            (r#""fault":{"kind":"stall","then":"error"},"match":{"ops":["write"]}"#, true),
            (r#""fault":{"kind":"torn","keep":10,"then":"error"}"#, true),
        ] {
            let arming = Arming::new(1);
            let spec = serde_json::from_str(&format!(r#"{{"name":"r",{rest}}}"#)).unwrap();
            arming.put(spec, 0).unwrap_or_else(|problems| panic!("{rest}: {problems:?}"));
            assert_eq!(arming.owes(), owes, "{rest}");
            arming.remove(|_| true);
            assert!(!arming.owes());
        }
        let arming = Arming::new(1);
        for (mode, owes) in [(Mode::ErrorWrites, true), (Mode::ErrorReads, false), (Mode::Enospc, false)] {
            arming.set_mode(mode, &Life::default(), 0);
            assert_eq!(arming.owes(), owes, "{mode:?}");
        }
    }
}
