//! The decision: what the rules in force make of one request.
//!
//! Pure: the only writes are to the counters of the rules. Called by a reader before it does anything. Takes a lock for a look
//! at a table where a rule counts by file or process, or has bad sectors that heal, and none else. Where no rule could concern
//! an operation nothing is allocated; else the facts may be, the names of an operation on names, say.

use std::hash::Hasher;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use globset::GlobMatcher;
use siphasher::sip::SipHasher13;

use super::index::Wanted;
use super::kind::{BadSectors, Fault, SECTOR, Then, Throttle, Timing};
use super::op::{DIRECT, FileType, Op, OpSet, RANGED};
use super::plan::{Per, Place, Plan, Rule, Scope, Term};

/// What a decision may ask about a request. Costly facts are asked for only by rules that need them.
pub trait Facts {
    fn op(&self) -> Op;
    fn uid(&self) -> u32;
    fn gid(&self) -> u32;
    /// The caller's process, not its thread.
    fn pid(&self) -> u32;
    /// Does the caller's process descend from this one, or is it itself?
    fn in_tree(&self, root: u32) -> bool;
    /// Is the name of the caller's program or of its thread such a one?
    fn comm_matches(&self, name: &GlobMatcher) -> bool;
    /// Bytes touched: offset and length, where the operation has them.
    fn range(&self) -> Option<(u64, u64)>;
    /// Bytes moved: of a read, no more than there are.
    fn bytes(&self) -> u64;
    /// Past the page cache? Nothing for operations that are neither.
    fn direct(&self) -> Option<bool>;
    fn file_type(&self) -> Option<FileType>;
    /// Is it a setattr that changes the size?
    fn truncates(&self) -> bool;
    /// Does it need space that the file does not have yet?
    fn grows(&self) -> bool;
    /// Bits of the rules whose path condition holds, when they are known for all rules at once.
    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>>;
    /// Otherwise, rule by rule.
    fn path_matches(&self, rule: &Rule) -> bool;
    /// A number that stands for the path: the same in each run.
    fn path_key(&self) -> u64;
    /// Monotonic nanoseconds.
    fn now_ns(&self) -> u64;
}

/// The number that stands for a path.
pub fn key_of(path: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(path);
    hasher.finish()
}

/// One firing of a rule.
#[derive(Clone, Debug)]
pub struct Firing {
    pub rule: Arc<Rule>,
    /// The rule's how-manieth injection it is, from 1.
    pub nth: u64,
    /// How long, for a kind that delays.
    pub delay_ns: u64,
    /// Of bad sectors, the first byte that cannot be read.
    pub place: Option<u64>,
    /// Of a slow disk.
    turn: Turn,
    term: usize,
    /// The match that fired, and of what.
    n: u64,
    key: u64,
    scope: Option<Arc<Scope>>,
}

/// A turn on a slow disk, by bytes and by operations: how long it keeps the disk busy, and until when it has to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Turn([(u64, u64); 2]);

impl Turn {
    fn wait_ns(&self, now_ns: u64) -> u64 {
        self.0.iter().map(|(_, until)| until.saturating_sub(now_ns)).max().unwrap_or(0)
    }
}

impl Firing {
    pub fn fault(&self) -> &Fault {
        self.rule.terms[self.term].fault.as_ref().unwrap_or(&Fault::Full)
    }

    /// The k-th number of this firing, uniform in [0, 1): the same for the same seed, rule and match.
    pub fn draw(&self, k: u64) -> f64 {
        self.rule.draw(self.key, self.n, DRAWS_OF_FIRING + k)
    }

    /// To be called when it is told: true for the rule's first.
    pub fn note_told(&self) -> bool {
        self.rule.note_told()
    }

    /// After [`Firing::revoke`], when something could be done after all: counts it again, if there is one left.
    pub fn renew(&mut self) -> bool {
        let counts = self.scope.as_deref().unwrap_or(&self.rule.counters.whole);
        let fired = &self.rule.counters.terms[self.term].fired;
        if !take(fired, self.rule.terms[self.term].limit) {
            return false;
        }
        let nth = self.rule.claim(counts);
        match nth {
            Some(nth) => self.nth = nth,
            None => drop(fired.fetch_sub(1, Relaxed)),
        }
        nth.is_some()
    }

    /// Its request goes on before its time, or not at all: what it had still to wait for is given back to who comes next. Those
    /// that wait already go on when they were to.
    pub fn leave_queue(&self, now_ns: u64) {
        let busy = &self.rule.counters.terms[self.term].busy_ns;
        for ((cost, until), busy) in self.turn.0.iter().zip(busy) {
            let left = until.saturating_sub(now_ns).min(*cost);
            if left > 0 {
                let _ = busy.fetch_update(Relaxed, Relaxed, |busy| Some(busy.saturating_sub(left)));
            }
        }
    }

    /// It turned out that nothing could be done to the request: as if the rule had not fired.
    pub fn revoke(&self) {
        let counters = &self.rule.counters;
        counters.injections.fetch_sub(1, Relaxed);
        self.scope.as_deref().unwrap_or(&counters.whole).injections.fetch_sub(1, Relaxed);
        counters.terms[self.term].fired.fetch_sub(1, Relaxed);
    }
}

/// How the request ends, after delays and stalls.
#[derive(Debug, Default)]
pub enum Outcome {
    #[default]
    Proceed,
    /// It fails; nothing is done.
    Error(i32, Firing),
    /// It is done otherwise than it was asked for: the firing's fault says how.
    Alter(Firing),
}

/// What the rules make of one request. The default is: nothing.
#[derive(Debug, Default)]
pub struct Decision {
    /// Firings that delay, in order; their delays add up.
    pub delays: Vec<Firing>,
    /// Firings that send signals.
    pub kills: Vec<Firing>,
    pub stall: Option<Firing>,
    pub outcome: Outcome,
}

impl Outcome {
    fn firing(&self) -> Option<&Firing> {
        match self {
            Outcome::Proceed => None,
            Outcome::Error(_, firing) | Outcome::Alter(firing) => Some(firing),
        }
    }
}

impl Decision {
    /// Nothing fired.
    pub fn is_nothing(&self) -> bool {
        let proceeds = matches!(self.outcome, Outcome::Proceed);
        proceeds && self.delays.is_empty() && self.kills.is_empty() && self.stall.is_none()
    }

    /// Has a rule that fired been taken out of force since?
    pub fn is_outdated(&self) -> bool {
        self.firings().any(|firing| firing.rule.counters.is_retired())
    }

    /// What was decided by rules that are out of force since does not happen any more.
    pub fn forget_outdated(&mut self) {
        let stays = |firing: &Firing| {
            let stays = !firing.rule.counters.is_retired();
            (!stays).then(|| firing.revoke());
            stays
        };
        self.delays.retain(stays);
        self.kills.retain(stays);
        self.stall.take_if(|firing| !stays(firing));
        if self.outcome.firing().is_some_and(|firing| !stays(firing)) {
            self.outcome = Outcome::Proceed;
        }
    }

    fn firings(&self) -> impl Iterator<Item = &Firing> {
        self.delays.iter().chain(&self.kills).chain(&self.stall).chain(self.outcome.firing())
    }

    /// The firing that ended it.
    fn decider(&self) -> Option<&Firing> {
        let deciding = |firing: &&Firing| matches!(firing.fault(), Fault::Stall { then: Then::Error(_), .. });
        self.outcome.firing().or(self.stall.as_ref().filter(deciding))
    }

    /// Adds what is left of an earlier decision. What this one decides goes before what the earlier one did.
    fn add(&mut self, earlier: Decision, op: Op) {
        let (decided, decider) = (self.decider().is_some(), earlier.decider().map(|firing| firing.rule.clone()));
        let Decision { delays, kills, stall, outcome } = earlier;
        let outcome = match outcome {
            Outcome::Proceed => None,
            Outcome::Error(_, firing) | Outcome::Alter(firing) => Some(firing),
        };
        for firing in delays.into_iter().chain(kills).chain(stall).chain(outcome) {
            let is_decider = decider.as_ref().is_some_and(|decider| Arc::ptr_eq(decider, &firing.rule));
            match firing.rule.counters.is_retired() || (decided && is_decider) {
                true => firing.revoke(),
                false => drop(apply(firing, op, self)),
            }
        }
    }

    pub fn delay_ns(&self) -> u64 {
        self.delays.iter().map(|firing| firing.delay_ns).fold(0, u64::saturating_add)
    }
}

/// Asks the rules in their order. Delays and signals add up; the first rule that decides the outcome ends it, and the rules
/// after it neither match nor count.
pub fn decide(plan: &Plan, facts: &impl Facts) -> Decision {
    go(plan, facts, |_| Met::No)
}

/// Has a request met a rule already?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Met {
    No,
    Yes,
    /// And it decided, so that the rules behind it are not asked.
    Last,
}

/// What a plan makes of a request when the one by which it was decided has been replaced meanwhile, together with what is
/// left of that decision. So no request slips through between two sets of rules. Rules of both sets that the request has met
/// already are not asked, and do not count it, a second time.
#[cold]
pub fn decide_again(plan: &Plan, facts: &impl Facts, past: &Plan, decision: Decision) -> Decision {
    let decider = decision.decider();
    let is_decider = |rule: &Rule| decider.is_some_and(|decider| Arc::ptr_eq(&decider.rule.counters, &rule.counters));
    let last = past.rules.iter().position(|rule| is_decider(rule));
    let met = last.map_or(&past.rules[..], |last| &past.rules[..=last]);
    let mut again = go(plan, facts, |rule| match met.iter().any(|met| Arc::ptr_eq(&met.counters, &rule.counters)) {
        true if is_decider(rule) => Met::Last,
        true => Met::Yes,
        false => Met::No,
    });
    again.add(decision, facts.op());
    again
}

fn go(plan: &Plan, facts: &impl Facts, met: impl Fn(&Rule) -> Met) -> Decision {
    let mut decision = Decision::default();
    let candidates = plan.candidates(facts.op());
    if plan.awaited.is_empty() && candidates.iter().all(|word| *word == 0) {
        return decision;
    }
    let paths = facts.path_bits(plan);
    for i in plan.awaited.iter().filter(|i| met(&plan.rules[**i]) == Met::No) {
        look(&plan.rules[*i], facts, paths.as_ref().map(|bits| is_set(bits, *i)));
    }
    let range = facts.range().filter(|_| RANGED.has(facts.op()));
    let wanted = Wanted { pid: || facts.pid(), uid: facts.uid(), range };
    let mut narrowed = plan.index.as_ref().map(|index| index.narrow(wanted));
    for (w, word) in candidates.iter().enumerate() {
        let mut left = word & paths.as_ref().map_or(u64::MAX, |bits| bits[w]);
        left &= narrowed.as_mut().map_or(u64::MAX, |narrowed| narrowed.word(w));
        while left != 0 {
            let rule = &plan.rules[w * 64 + left.trailing_zeros() as usize];
            left &= left - 1;
            let path_known = paths.is_some();
            let decided = match met(rule) {
                Met::No => ask(rule, facts, path_known).is_some_and(|firing| apply(firing, facts.op(), &mut decision)),
                Met::Yes => false,
                Met::Last => true,
            };
            if decided {
                return decision;
            }
        }
    }
    decision
}

/// Takes a firing into the decision; true when the outcome is decided.
fn apply(firing: Firing, op: Op, decision: &mut Decision) -> bool {
    match firing.fault() {
        Fault::Latency(_) | Fault::Throttle(_) => decision.delays.push(firing),
        Fault::Kill { .. } => decision.kills.push(firing),
        Fault::Stall { then, .. } => {
            let decided = matches!(then, Then::Error(_));
            // A second stall adds nothing to the first, unless it decides: then the first adds nothing to it.
            let idle = match decision.stall.take() {
                Some(first) if !decided => {
                    decision.stall = Some(first);
                    Some(firing)
                }
                first => {
                    decision.stall = Some(firing);
                    first
                }
            };
            idle.inspect(Firing::revoke);
            return decided;
        }
        // A read that is done and then fails is one that failed.
        // So is a listing, whose entries would be counted by us and not by the kernel.
        Fault::Error { errors, timing } if *timing == Timing::Before || matches!(op, Op::Read | Op::Readdir) => {
            decision.outcome = Outcome::Error(errors.pick(op, firing.draw(0)), firing);
            return true;
        }
        Fault::BadSectors(bad) => {
            decision.outcome = Outcome::Error(bad.errno, firing);
            return true;
        }
        Fault::Full => {}
        _ => {
            decision.outcome = Outcome::Alter(firing);
            return true;
        }
    }
    false
}

/// One rule, one request: does it match, and if so, does it fire?
fn ask(rule: &Arc<Rule>, facts: &impl Facts, path_known: bool) -> Option<Firing> {
    if !matches(rule, facts, path_known) {
        return None;
    }
    rule.counters.matches.fetch_add(1, Relaxed);
    let (key, scope) = rule.scope(facts);
    let counts = scope.as_deref().unwrap_or(&rule.counters.whole);
    if !rule.is_awake(facts, counts) {
        return None;
    }
    let n = counts.n.fetch_add(1, Relaxed) + 1;
    // What is used up takes nothing from its terms.
    if !rule.fires(key, n) || rule.trigger.times.is_some_and(|times| counts.injections.load(Relaxed) >= times) {
        return None;
    }
    let (term, delay_ns, turn) = rule.choose(key, n, facts)?;
    let place = match &rule.terms[term].fault {
        Some(Fault::BadSectors(bad)) => rule.bad_sector(term, bad, facts),
        _ => None,
    };
    let Some(nth) = rule.claim(counts) else {
        // Another thread had the last one.
        rule.counters.terms[term].fired.fetch_sub(1, Relaxed);
        return None;
    };
    Some(Firing { rule: rule.clone(), nth, delay_ns, place, turn, term, n, key, scope })
}

/// A write has stored so many bytes: bad sectors that it covers are good again, where a rule has them so.
#[cold]
pub fn stored(plan: &Plan, facts: &impl Facts, length: u64) {
    let paths = facts.path_bits(plan);
    let is_on_path = |i: usize| paths.as_ref().is_none_or(|bits| is_set(bits, i));
    for i in plan.healing.iter().filter(|i| is_on_path(**i)) {
        let rule = &plan.rules[*i];
        if is_meant(rule, facts, paths.is_some()) {
            rule.heal(facts, length);
        }
    }
}

fn is_set(bits: &[u64], i: usize) -> bool {
    bits[i / 64] & 1 << (i % 64) != 0
}

fn matches(rule: &Rule, facts: &impl Facts, path_known: bool) -> bool {
    is_meant(rule, facts, path_known) && rule.acts_on(facts)
}

/// Cheap conditions first: the order is not part of the meaning.
fn is_meant(rule: &Rule, facts: &impl Facts, path_known: bool) -> bool {
    let place = &rule.place;
    cheap(place, facts)
        && rule.deadline_ns.is_none_or(|deadline| facts.now_ns() < deadline)
        && (path_known || facts.path_matches(rule))
        && in_process(place, facts)
        && is_type(place, facts)
}

fn cheap(place: &Place, facts: &impl Facts) -> bool {
    place.uid.is_none_or(|uid| uid == facts.uid())
        && place.gid.is_none_or(|gid| gid == facts.gid())
        && in_range(place, facts)
}

/// An operation without bytes that is named beside those that have some is met wherever these are.
fn in_range(place: &Place, facts: &impl Facts) -> bool {
    let length_is = |wanted: &Range<u64>| facts.range().is_some_and(|(_, length)| wanted.contains(&length));
    (!RANGED.has(facts.op())
        || place.offset.as_ref().is_none_or(|wanted| touches(facts.range(), wanted))
            && place.length.as_ref().is_none_or(length_is))
        && (!DIRECT.has(facts.op()) || place.direct.is_none_or(|wanted| facts.direct() == Some(wanted)))
}

fn in_process(place: &Place, facts: &impl Facts) -> bool {
    place.pid.is_none_or(|pid| pid == facts.pid())
        && place.comm.as_ref().is_none_or(|name| facts.comm_matches(name))
        && place.tree.is_none_or(|root| facts.in_tree(root))
}

fn is_type(place: &Place, facts: &impl Facts) -> bool {
    place.file_type.is_none_or(|wanted| facts.file_type() == Some(wanted))
}

fn alters(fault: &Fault, facts: &impl Facts) -> bool {
    let (offset, _) = facts.range().unwrap_or_default();
    fault.alters(facts.op(), (offset, facts.bytes()), facts.direct() == Some(true))
}

fn touches(range: Option<(u64, u64)>, wanted: &Range<u64>) -> bool {
    range.is_some_and(|(offset, length)| offset < wanted.end && offset.saturating_add(length) > wanted.start)
}

fn meets_condition(ops: OpSet, facts: &impl Facts) -> bool {
    let holds = || if facts.op() == Op::Setattr { facts.truncates() } else { facts.grows() };
    ops.has(facts.op()) || (ops.has_on_condition(facts.op()) && holds())
}

/// For a rule that must fire: how far does this request get?
#[cold]
fn look(rule: &Rule, facts: &impl Facts, path: Option<bool>) {
    if !rule.is_awaited() {
        return;
    }
    let (funnel, place) = (&rule.counters.funnel, &rule.place);
    let count = |counter: &AtomicU64| {
        counter.fetch_add(1, Relaxed);
    };
    count(&funnel.looked);
    if !meets_condition(place.ops, facts) || !rule.terms.iter().any(|term| meets_condition(term.ops, facts)) {
        return;
    }
    count(&funnel.ops);
    if !path.unwrap_or_else(|| facts.path_matches(rule)) || !is_type(place, facts) {
        return;
    }
    count(&funnel.path);
    let user = place.uid.is_none_or(|uid| uid == facts.uid()) && place.gid.is_none_or(|gid| gid == facts.gid());
    if !user || !in_process(place, facts) {
        return;
    }
    count(&funnel.process);
    if in_range(place, facts) && rule.acts_on(facts) {
        count(&funnel.range);
    }
}

/// Numbers of the draws of one match; they must never change.
const DRAW_PROBABILITY: u64 = 0;
const DRAW_DELAY: [u64; 2] = [1, 2];
const DRAWS_OF_TERMS: u64 = 1 << 8;
const DRAWS_OF_FIRING: u64 = 1 << 16;

impl Rule {
    /// One more firing was told: true for the first.
    pub fn note_told(&self) -> bool {
        self.counters.told.fetch_add(1, Relaxed) == 0
    }

    /// A firing that was told is on the stream, as its event of that number.
    pub fn note_published(&self, seq: u64) {
        self.counters.newest.fetch_max(seq, Relaxed);
    }

    /// Could some term act on the request?
    fn acts_on(&self, facts: &impl Facts) -> bool {
        (0..self.terms.len()).any(|i| self.terms[i].fault.is_some() && self.term_acts_on(i, facts))
    }

    fn term_acts_on(&self, i: usize, facts: &impl Facts) -> bool {
        let term = &self.terms[i];
        meets_condition(term.ops, facts)
            && match &term.fault {
                Some(Fault::BadSectors(bad)) => self.bad_sector(i, bad, facts).is_some(),
                Some(fault) if fault.wants_plain_io() => alters(fault, facts),
                _ => true,
            }
    }

    /// The first bad sector that the request would read.
    fn bad_sector(&self, i: usize, bad: &BadSectors, facts: &impl Facts) -> Option<u64> {
        let (offset, _) = facts.range()?;
        let range = offset..offset.saturating_add(facts.bytes());
        let healed = bad.heal_on_write.then(|| self.counters.terms[i].healed.lock());
        let healed = healed.as_ref().and_then(|healed| healed.get(&facts.path_key()));
        let touched = bad.ranges.iter().filter(|bad| bad.start < range.end && bad.end > range.start);
        let parts = touched.flat_map(|bad| {
            let part = bad.start.max(range.start)..bad.end.min(range.end);
            healed.map_or_else(|| vec![part.clone()], |healed| healed.gaps(part.clone()))
        });
        parts.filter(|part| !part.is_empty()).map(|part| part.start).min()
    }

    /// Sectors that are written whole are good again.
    fn heal(&self, facts: &impl Facts, length: u64) {
        let Some((offset, _)) = facts.range() else { return };
        let Some(start) = offset.checked_next_multiple_of(SECTOR) else { return };
        let whole = start..offset.saturating_add(length) / SECTOR * SECTOR;
        for (term, state) in self.terms.iter().zip(&self.counters.terms) {
            let Some(Fault::BadSectors(bad)) = &term.fault else { continue };
            let parts = bad.ranges.iter().map(|bad| bad.start.max(whole.start)..bad.end.min(whole.end));
            for part in parts.filter(|part| part.start < part.end) {
                state.healed.lock().entry(facts.path_key()).or_default().add(part);
            }
        }
    }

    /// Whose count it is.
    fn scope(&self, facts: &impl Facts) -> (u64, Option<Arc<Scope>>) {
        let (key, id) = match self.trigger.per {
            Per::Mount => return (0, None),
            Per::File => (facts.path_key(), facts.path_key()),
            // Numbers of processes are others in the next run: what they draw must not depend on them.
            Per::Process => (0, u64::from(facts.pid())),
        };
        (key, Some(self.counters.scopes.lock().entry(id).or_default().clone()))
    }

    /// Do the conditions on time and on others hold?
    fn is_awake(&self, facts: &impl Facts, counts: &Scope) -> bool {
        let trigger = &self.trigger;
        let enough = trigger.after_bytes == 0 || counts.moved(facts.bytes()) >= trigger.after_bytes;
        let since = || facts.now_ns().saturating_sub(self.armed_ns);
        enough
            && (trigger.after_ns == 0 || since() >= trigger.after_ns)
            && trigger.cycle.is_none_or(|cycle| cycle.is_down(since()))
            && trigger.after_rule.as_ref().is_none_or(super::plan::AfterRule::has_fired)
    }

    /// Decides for the n-th match (from 1). Depends on (seed, rule, n) alone, and on the path where files are counted.
    fn fires(&self, key: u64, n: u64) -> bool {
        let trigger = &self.trigger;
        n > trigger.skip
            && (n - trigger.skip - 1).is_multiple_of(trigger.every)
            && (trigger.probability >= 1.0 || self.draw(key, n, DRAW_PROBABILITY) < trigger.probability)
    }

    /// The first term that can act, with its delay.
    fn choose(&self, key: u64, n: u64, facts: &impl Facts) -> Option<(usize, u64, Turn)> {
        let only = self.terms.len() == 1;
        for (i, term) in self.terms.iter().enumerate() {
            let state = &self.counters.terms[i];
            let by_chance = term.chance >= 1.0 || self.draw(key, n, DRAWS_OF_TERMS + i as u64) < term.chance;
            if !by_chance || !(only || self.term_acts_on(i, facts)) {
                continue;
            }
            let (delay_ns, turn) = self.delay_ns(term, i, key, n, facts);
            if delay_ns == 0 && matches!(term.fault, Some(Fault::Throttle(_))) {
                // The disk is free: nothing to wait for.
                return None;
            }
            if !take(&state.fired, term.limit) {
                continue;
            }
            return term.fault.is_some().then_some((i, delay_ns, turn));
        }
        None
    }

    fn delay_ns(&self, term: &Term, i: usize, key: u64, n: u64, facts: &impl Facts) -> (u64, Turn) {
        match &term.fault {
            Some(Fault::Latency(latency)) => {
                let [u, v] = DRAW_DELAY.map(|which| self.draw(key, n, which));
                (latency.sample(u, v), Turn::default())
            }
            Some(Fault::Throttle(throttle)) => {
                let now = facts.now_ns();
                let turn = self.queue(throttle, i, facts.bytes(), now);
                (turn.wait_ns(now), turn)
            }
            _ => (0, Turn::default()),
        }
    }

    /// Takes a turn on a slow disk: until when the request has to wait. The disk is busy with one after the other (a
    /// virtual clock; Turner's leaky bucket), and what it may owe after a rest is the burst.
    fn queue(&self, throttle: &Throttle, i: usize, bytes: u64, now: u64) -> Turn {
        let (costs, bursts) = (throttle.costs_ns(bytes), throttle.bursts_ns());
        Turn(std::array::from_fn(|k| {
            let mut until = now;
            let _ = self.counters.terms[i].busy_ns[k].fetch_update(Relaxed, Relaxed, |busy| {
                until = busy.max(now).saturating_add(costs[k]);
                Some(until)
            });
            (costs[k], until.saturating_sub(bursts[k]))
        }))
    }

    /// Claims an injection, if there is one left, and gives its number.
    fn claim(&self, counts: &Scope) -> Option<u64> {
        take(&counts.injections, self.trigger.times).then(|| self.counters.injections.fetch_add(1, Relaxed) + 1)
    }

    /// A number uniform in [0, 1), keyed by (seed, rule, n, which), and by the path where files are counted: the same
    /// everywhere and for ever.
    fn draw(&self, key: u64, n: u64, which: u64) -> f64 {
        let mut hasher = SipHasher13::new_with_keys(self.trigger.seed, which);
        hasher.write(self.name.as_bytes());
        hasher.write_u64(n.to_le());
        if key != 0 {
            hasher.write_u64(key.to_le());
        }
        // 53 bits are what a double holds exactly.
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One more, unless there were so many already.
fn take(counter: &AtomicU64, limit: Option<u64>) -> bool {
    let limit = limit.unwrap_or(u64::MAX);
    counter.fetch_update(Relaxed, Relaxed, |done| (done < limit).then_some(done + 1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::compile::Defaults;
    use crate::fault::{RuleSpec, Then, compile};
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
        fn gid(&self) -> u32 {
            0
        }
        fn pid(&self) -> u32 {
            1
        }
        fn in_tree(&self, root: u32) -> bool {
            root == 1
        }
        fn comm_matches(&self, name: &GlobMatcher) -> bool {
            name.is_match("postgres")
        }
        fn bytes(&self) -> u64 {
            100
        }
        fn direct(&self) -> Option<bool> {
            Some(false)
        }
        fn file_type(&self) -> Option<FileType> {
            Some(FileType::File)
        }
        fn path_key(&self) -> u64 {
            key_of(self.0.as_bytes())
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
            (r#","match":{"gid":0,"comm":"post*","tree":1,"type":"file","direct":false,"length":"100..101"}"#, true),
            (r#","match":{"gid":1}"#, false),
            (r#","match":{"comm":"redis*"}"#, false),
            (r#","match":{"tree":2}"#, false),
            (r#","match":{"type":"directory"}"#, false),
            (r#","match":{"direct":true}"#, false),
            (r#","match":{"length":"..100"}"#, false),
            (r#","match":{"path_regex":"^/a/[bc]$"}"#, true),
            (r#","match":{"path_regex":"^/a$"}"#, false),
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
        assert!(matches!(decision.stall.unwrap().fault(), Fault::Stall { then: Then::Error(libc::EIO), .. }));
        assert!(matches!(decision.outcome, Outcome::Proceed));
        assert_eq!(last.counters.matches.load(Relaxed), 1, "what comes after a decision does not count");
    }

    #[test]
    fn a_request_between_two_sets_is_asked_by_both_and_counted_once_by_each_rule() {
        let latency = rule(r#"{"name":"slow","fault":{"kind":"latency","delay":"5ms"}}"#);
        let [old, new, kept] = ["old", "new", "kept"].map(|name| error(name, ""));
        let silent = error("silent", r#","trigger":{"skip":9}"#);
        let past = Plan::new(1, vec![silent.clone(), latency.clone(), old.clone(), kept.clone()]);
        let decision = decide(&past, &Write("/"));
        assert!(!decision.is_outdated());
        old.counters.retire(true);
        assert!(decision.is_outdated());
        let plan = Plan::new(2, vec![silent.clone(), new.clone(), latency.clone(), kept.clone()]);
        let again = decide_again(&plan, &Write("/"), &past, decision);
        assert!(matches!(&again.outcome, Outcome::Error(_, firing) if *firing.rule.name == *"new"), "{again:?}");
        assert_eq!((again.delay_ns(), again.is_outdated()), (5_000_000, false));
        // What had decided stands if nothing new comes before it; what it kept from being asked is not asked now.
        new.counters.retire(true);
        latency.counters.retire(true);
        let decision = decide(&Plan::new(3, vec![latency.clone(), kept.clone(), silent.clone()]), &Write("/"));
        let third = Plan::new(3, vec![latency, kept.clone(), silent.clone()]);
        let fourth = Plan::new(4, vec![kept.clone(), silent.clone()]);
        let again = decide_again(&fourth, &Write("/"), &third, decision);
        assert!(matches!(&again.outcome, Outcome::Error(_, firing) if *firing.rule.name == *"kept"), "{again:?}");
        assert!(again.delays.is_empty());
        let counts = [&silent, &old, &new, &kept]
            .map(|rule| (rule.counters.matches.load(Relaxed), rule.counters.injections.load(Relaxed)));
        assert_eq!(counts, [(1, 0), (1, 0), (1, 1), (1, 1)]);
    }

    /// A run can be repeated years later: these numbers must never change.
    #[test]
    fn the_draws_of_a_seed_are_for_ever() {
        let half = error("half", r#","trigger":{"probability":0.5,"seed":42}"#);
        let fired: Vec<u64> = (1..=20).filter(|n| half.fires(0, *n)).collect();
        assert_eq!(fired, GOLDEN);
    }

    const GOLDEN: &[u64] = &[2, 4, 7, 10, 11, 13, 14, 15, 16, 17, 18, 19];

    #[test]
    fn who_leaves_the_queue_of_a_slow_disk_gives_back_what_is_left_of_its_own_turn() {
        let throttle = rule(r#"{"name":"t","fault":{"kind":"throttle","bytes_per_second":"100"}}"#);
        let plan = Plan::new(1, vec![throttle]);
        let second = 1_000_000_000;
        // Each is of 100 bytes, and the clock stands at 1000 ns.
        let wait = || decide(&plan, &Write("/")).delays.remove(0);
        let all: Vec<Firing> = (0..3).map(|_| wait()).collect();
        assert_eq!(all.iter().map(|firing| firing.delay_ns / second).collect::<Vec<_>>(), [1, 2, 3]);
        all[2].leave_queue(1000 + 3 * second / 10);
        assert_eq!(wait().delay_ns, 3 * second, "all of its turn, which has not begun");
        all[0].leave_queue(1000 + 3 * second / 10);
        assert_eq!(wait().delay_ns, 4 * second - 7 * second / 10, "the rest of its turn");
        all[1].leave_queue(1000 + 2 * second);
        assert_eq!(wait().delay_ns, 5 * second - 7 * second / 10, "nothing, its time had come");
    }

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
