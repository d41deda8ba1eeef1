//! The decision: what the rules in force make of one request.
//!
//! Pure and lock-free: the only writes are to the counters of the rules. Called by a reader before it does anything;
//! must never allocate when nothing fires.

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use siphasher::sip::SipHasher13;

use super::index::Wanted;
use super::kind::{Fault, Then};
use super::op::{Op, OpSet};
use super::plan::{Plan, Rule};

/// What a decision may ask about a request. Costly facts are asked for only by rules that need them.
pub trait Facts {
    fn op(&self) -> Op;
    fn uid(&self) -> u32;
    /// The caller's process, not its thread.
    fn pid(&self) -> u32;
    /// Bytes touched: offset and length, where the operation has them.
    fn range(&self) -> Option<(u64, u64)>;
    /// Is it a setattr that changes the size?
    fn truncates(&self) -> bool;
    /// Does it need space that the file does not have yet?
    fn grows(&self) -> bool;
    /// Bits of the rules whose path condition holds, when they are known for all rules at once.
    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>>;
    /// Otherwise, rule by rule.
    fn path_matches(&self, rule: &Rule) -> bool;
    /// Monotonic nanoseconds.
    fn now_ns(&self) -> u64;
}

/// One firing of a rule.
#[derive(Clone, Debug)]
pub struct Firing {
    pub rule: Arc<Rule>,
    /// The rule's how-manieth injection it is, from 1.
    pub nth: u64,
    /// For a latency: how long.
    pub delay_ns: u64,
}

/// How the request ends, after delays and stalls.
#[derive(Debug, Default)]
pub enum Outcome {
    #[default]
    Proceed,
    Error(i32, Firing),
    Drop(Firing),
}

/// What the rules make of one request. The default is: nothing.
#[derive(Debug, Default)]
pub struct Decision {
    /// Firings that delay, in order; their delays add up.
    pub delays: smallvec::SmallVec<[Firing; 1]>,
    pub stall: Option<(Then, Firing)>,
    pub outcome: Outcome,
}

impl Decision {
    /// Nothing fired.
    pub fn is_nothing(&self) -> bool {
        self.delays.is_empty() && self.stall.is_none() && matches!(self.outcome, Outcome::Proceed)
    }

    pub fn delay_ns(&self) -> u64 {
        self.delays.iter().map(|firing| firing.delay_ns).fold(0, u64::saturating_add)
    }
}

/// Asks the rules in their order. Delays add up; the first rule that decides the outcome ends it, and the rules
/// after it neither match nor count.
pub fn decide(plan: &Plan, facts: &impl Facts) -> Decision {
    let mut decision = Decision::default();
    let candidates = plan.candidates(facts.op());
    if candidates.iter().all(|word| *word == 0) {
        return decision;
    }
    let paths = facts.path_bits(plan);
    let wanted = Wanted { pid: || facts.pid(), uid: facts.uid(), range: facts.range() };
    let mut narrowed = plan.index.as_ref().map(|index| index.narrow(wanted));
    for (w, word) in candidates.iter().enumerate() {
        let mut left = word & paths.as_ref().map_or(u64::MAX, |bits| bits[w]);
        left &= narrowed.as_mut().map_or(u64::MAX, |narrowed| narrowed.word(w));
        while left != 0 {
            let rule = &plan.rules[w * 64 + left.trailing_zeros() as usize];
            left &= left - 1;
            let path_known = paths.is_some();
            if let Some(firing) = ask(rule, facts, path_known)
                && apply(firing, &mut decision)
            {
                return decision;
            }
        }
    }
    decision
}

/// Takes a firing into the decision; true when the outcome is decided.
fn apply(firing: Firing, decision: &mut Decision) -> bool {
    match &firing.rule.fault {
        Fault::Latency(_) => decision.delays.push(firing),
        Fault::Stall { then } => {
            let decided = matches!(then, Then::Error(_));
            // A second stall adds nothing to the first that does not end by itself either.
            if decision.stall.is_none() || decided {
                decision.stall = Some((*then, firing));
            }
            return decided;
        }
        Fault::Error { errno } => {
            decision.outcome = Outcome::Error(*errno, firing);
            return true;
        }
        Fault::Drop => {
            decision.outcome = Outcome::Drop(firing);
            return true;
        }
        Fault::Full => {}
    }
    false
}

/// One rule, one request: does it match, and if so, does it fire?
fn ask(rule: &Arc<Rule>, facts: &impl Facts, path_known: bool) -> Option<Firing> {
    if !matches(rule, facts, path_known) {
        return None;
    }
    let n = rule.counters.matches.fetch_add(1, Relaxed) + 1;
    let nth = rule.fire(n)?;
    let delay_ns = match &rule.fault {
        Fault::Latency(latency) => latency.sample(rule.draw(n, 1), rule.draw(n, 2)),
        _ => 0,
    };
    Some(Firing { rule: rule.clone(), nth, delay_ns })
}

/// Cheap conditions first: the order is not part of the meaning.
fn matches(rule: &Rule, facts: &impl Facts, path_known: bool) -> bool {
    rule.uid.is_none_or(|uid| uid == facts.uid())
        && rule.offset.as_ref().is_none_or(|wanted| touches(facts.range(), wanted))
        && rule.deadline_ns.is_none_or(|deadline| facts.now_ns() < deadline)
        && (path_known || facts.path_matches(rule))
        && rule.pid.is_none_or(|pid| pid == facts.pid())
        && meets_condition(rule.ops, facts)
}

fn touches(range: Option<(u64, u64)>, wanted: &std::ops::Range<u64>) -> bool {
    range.is_some_and(|(offset, length)| offset < wanted.end && offset.saturating_add(length) > wanted.start)
}

fn meets_condition(ops: OpSet, facts: &impl Facts) -> bool {
    ops.has(facts.op())
        || (ops.truncate() && facts.truncates())
        || (ops.grow() && facts.op().can_grow() && facts.grows())
}

impl Rule {
    /// Decides for the n-th match (from 1) and, if it fires, claims and gives the number of the injection. The
    /// decision depends on (seed, rule, n) alone, but for the limit of `times`.
    fn fire(&self, n: u64) -> Option<u64> {
        let trigger = &self.trigger;
        if n <= trigger.skip || !(n - trigger.skip - 1).is_multiple_of(trigger.every) {
            return None;
        }
        if trigger.probability < 1.0 && self.draw(n, 0) >= trigger.probability {
            return None;
        }
        let limit = trigger.times.unwrap_or(u64::MAX);
        self.counters
            .injections
            .fetch_update(Relaxed, Relaxed, |done| (done < limit).then_some(done + 1))
            .ok()
            .map(|before| before + 1)
    }

    /// A number uniform in [0, 1), keyed by (seed, rule, n, which): the same everywhere and for ever.
    fn draw(&self, n: u64, which: u64) -> f64 {
        let mut hasher = SipHasher13::new_with_keys(self.trigger.seed, which);
        hasher.write(self.name.as_bytes());
        hasher.write_u64(n.to_le());
        // 53 bits are what a double holds exactly.
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::compile::Defaults;
    use crate::fault::{RuleSpec, compile};
    use std::time::SystemTime;

    /// A write of user 0 to a file of some path.
    struct Write(&'static str);

    impl Facts for Write {
        fn op(&self) -> Op {
            Op::Write
        }
        fn uid(&self) -> u32 {
            0
        }
        fn pid(&self) -> u32 {
            1
        }
        fn range(&self) -> Option<(u64, u64)> {
            Some((4096, 100))
        }
        fn truncates(&self) -> bool {
            false
        }
        fn grows(&self) -> bool {
            false
        }
        fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
            Some(plan.path_bits([self.0.as_bytes()].into_iter()).into())
        }
        fn path_matches(&self, rule: &Rule) -> bool {
            rule.path_matches([self.0.as_bytes()].into_iter())
        }
        fn now_ns(&self) -> u64 {
            1000
        }
    }

    fn rule(json: &str) -> Arc<Rule> {
        let spec: RuleSpec = serde_json::from_str(json).unwrap();
        let defaults = Defaults { seed: 7, now_ns: 0, created: SystemTime::UNIX_EPOCH };
        Arc::new(compile(spec, defaults).unwrap())
    }

    fn error(name: &str, rest: &str) -> Arc<Rule> {
        rule(&format!(r#"{{"name":"{name}","fault":{{"kind":"error","errno":"EIO"}}{rest}}}"#))
    }

    #[test]
    fn of_many_rules_the_one_that_matches_is_found() {
        let mut rules: Vec<_> = (0..1000).map(|i| error(&format!("r{i}"), r#","match":{"path":"/no/*"}"#)).collect();
        rules.insert(700, error("yes", r#","match":{"path":"/yes/*"}"#));
        let plan = Plan::new(1, rules);
        match decide(&plan, &Write("/yes/a")).outcome {
            Outcome::Error(libc::EIO, firing) => assert_eq!((&*firing.rule.name, firing.nth), ("yes", 1)),
            other => panic!("{other:?}"),
        }
        assert!(decide(&plan, &Write("/other")).is_nothing());
    }

    #[test]
    fn each_condition_is_asked() {
        for (rest, fires) in [
            ("", true),
            (r#","match":{"uid":0,"pid":1,"offset":"4KiB..8KiB","ops":["data"]}"#, true),
            (r#","match":{"uid":1}"#, false),
            (r#","match":{"pid":2}"#, false),
            (r#","match":{"offset":"..4KiB"}"#, false),
            (r#","match":{"ops":["grow"]}"#, false),
            (r#","match":{"ops":["read"]}"#, false),
            (r#","match":{"path":"/*"}"#, false),
            (r#","match":{"path":"/**"}"#, true),
            (r#","enabled":false"#, false),
            (r#","trigger":{"for":"1us"}"#, false),
            (r#","trigger":{"for":"2us"}"#, true),
        ] {
            let plan = Plan::new(1, vec![error("r", rest)]);
            assert_eq!(!decide(&plan, &Write("/a/b")).is_nothing(), fires, "{rest}");
        }
    }

    #[test]
    fn delays_add_up_and_stalls_and_errors_end_it() {
        let latency = |name| rule(&format!(r#"{{"name":"{name}","fault":{{"kind":"latency","delay":"5ms"}}}}"#));
        let stall = |then| rule(&format!(r#"{{"name":"s","fault":{{"kind":"stall","then":"{then}"}}}}"#));
        let last = error("last", "");
        let plan = Plan::new(1, vec![latency("a"), latency("b"), stall("ok"), last.clone()]);
        let decision = decide(&plan, &Write("/"));
        assert_eq!(decision.delay_ns(), 10_000_000);
        assert!(decision.stall.is_some() && matches!(decision.outcome, Outcome::Error(..)));
        let plan = Plan::new(2, vec![stall("error"), last.clone()]);
        let decision = decide(&plan, &Write("/"));
        assert!(matches!(decision.stall, Some((Then::Error(libc::EIO), _))));
        assert!(matches!(decision.outcome, Outcome::Proceed));
        assert_eq!(last.counters.matches.load(Relaxed), 1, "what comes after a decision does not count");
    }

    /// A run can be repeated years later: these numbers must never change.
    #[test]
    fn the_draws_of_a_seed_are_for_ever() {
        let half = error("half", r#","trigger":{"probability":0.5,"seed":42}"#);
        let fired: Vec<u64> = (1..=20).filter(|n| half.fire(*n).is_some()).collect();
        assert_eq!(fired, GOLDEN);
    }

    const GOLDEN: &[u64] = &[2, 4, 7, 10, 11, 13, 14, 15, 16, 17, 18, 19];

    #[test]
    fn many_threads_never_fire_more_often_than_allowed() {
        let plan = Plan::new(1, vec![error("r", r#","trigger":{"skip":100,"every":3,"times":50}"#)]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| drop(decide(&plan, &Write("/")))));
            }
        });
        let counters = &plan.rules[0].counters;
        assert_eq!((counters.matches.load(Relaxed), counters.injections.load(Relaxed)), (4000, 50));
    }
}
