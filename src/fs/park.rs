//! Requests that wait: delayed or stalled by a rule, with their replies and their data.
//!
//! A parked request holds no thread and no lock; it is an entry in a table, and goes on when its time has come, when it
//! is released, or when its caller dies. Readers park, the clock wakes, the control thread lists and releases. The lock
//! is held for the table's own work.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::call::{Call, Caller, Reply};
use crate::fault::{Decision, Firing, Rule};

/// The kernel stops sending reads at 65,535 that are open (`max_background`): well before that, none is parked.
pub const MOST: usize = 60_000;

/// A request with all it needs to go on.
#[derive(Debug)]
pub struct Pending {
    pub caller: Caller,
    pub call: Call<'static>,
    pub reply: Reply,
    /// What is still to happen to it.
    pub decision: Decision,
}

/// A request that waits.
#[derive(Debug)]
pub struct Parked {
    pub pending: Pending,
    /// Does it hang? Otherwise it is only delayed.
    pub stalled: bool,
    /// The rules that hold it.
    pub rules: smallvec::SmallVec<[Arc<Rule>; 1]>,
    /// What delays it: it can have a place in a queue.
    pub delays: Vec<Firing>,
    pub since_ns: u64,
    /// When it goes on by itself.
    pub until_ns: Option<u64>,
    /// When its caller was started.
    pub caller_started: Option<u64>,
}

impl Parked {
    /// Does a rule of this name hold it?
    pub fn is_held_by(&self, name: &str) -> bool {
        self.rules.iter().any(|held| &*held.name == name)
    }

    /// Does this very rule hold it? One that has taken its place under the name is another; one that says the same, and
    /// counts on, is not.
    pub fn is_of(&self, rule: &Rule) -> bool {
        self.rules.iter().any(|held| Arc::ptr_eq(&held.counters, &rule.counters))
    }
}

/// The table.
#[derive(Debug, Default)]
pub struct Parking {
    state: Mutex<State>,
    changed: Condvar,
    count: AtomicUsize,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// By number, and so by age.
    requests: BTreeMap<u64, Parked>,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    next: u64,
    /// Somebody wants the clock to look again.
    nudged: bool,
}

impl Parking {
    /// Parks a request; gives it back when none can be parked any more, or when what would hold it is out of force. `now_ns`
    /// is asked under the lock: either the clock sees the request when it lets go what a rule held, or the request comes
    /// after that and sees that the rule's time is over.
    pub fn park(&self, parked: Parked, now_ns: impl FnOnce() -> u64) -> Result<(), Box<Parked>> {
        let mut state = self.state.lock();
        let now = now_ns();
        let over = parked.rules.iter().any(|rule| rule.counters.is_retired() || !rule.is_in_time(now));
        if over || self.closed.load(Acquire) || state.requests.len() >= MOST {
            return Err(Box::new(parked));
        }
        state.next += 1;
        let id = state.next;
        if let Some(until) = parked.until_ns {
            state.due.push(Reverse((until, id)));
        }
        let first = state.requests.is_empty();
        let earliest = state.due.peek().is_some_and(|Reverse((_, due))| *due == id);
        state.requests.insert(id, parked);
        self.count.store(state.requests.len(), Release);
        if earliest || first {
            self.nudge(state);
        }
        Ok(())
    }

    /// From now on nothing is parked: requests go on as if no rule had held them.
    pub fn close(&self) {
        self.closed.store(true, Release);
        self.nudge(self.state.lock());
    }

    /// Back from [`Parking::close`]: the mount goes on after all.
    pub fn open(&self) {
        self.closed.store(false, Release);
    }

    pub fn is_full(&self) -> bool {
        self.len() >= MOST
    }

    pub fn len(&self) -> usize {
        self.count.load(Acquire)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out those whose time has come.
    pub fn due(&self, now_ns: u64) -> Vec<Parked> {
        let mut state = self.state.lock();
        let mut ready = Vec::new();
        while let Some(Reverse((when, id))) = state.due.peek().copied() {
            if when > now_ns {
                break;
            }
            state.due.pop();
            ready.extend(state.requests.remove(&id));
        }
        self.count.store(state.requests.len(), Release);
        ready
    }

    /// Takes out at most `limit` that a condition holds for, the oldest first.
    pub fn take(&self, limit: usize, mut which: impl FnMut(&Parked) -> bool) -> Vec<Parked> {
        let mut state = self.state.lock();
        let chosen = state.requests.iter().filter(|(_, parked)| which(parked)).map(|(id, _)| *id);
        let ids: Vec<u64> = chosen.take(limit).collect();
        let taken = ids.iter().filter_map(|id| state.requests.remove(id)).collect();
        self.count.store(state.requests.len(), Release);
        taken
    }

    /// Looks at every parked request.
    pub fn each(&self, mut visit: impl FnMut(u64, &Parked)) {
        self.state.lock().requests.iter().for_each(|(id, parked)| visit(*id, parked));
    }

    /// Looks at one parked request.
    pub fn look<T>(&self, id: u64, look: impl FnOnce(&Parked) -> T) -> Option<T> {
        self.state.lock().requests.get(&id).map(look)
    }

    /// Callers to look at: number of the request, thread, and when that was started.
    pub fn callers(&self) -> Vec<(u64, u32, Option<u64>)> {
        let state = self.state.lock();
        let caller = |(id, parked): (&u64, &Parked)| (*id, parked.pending.caller.tid, parked.caller_started);
        state.requests.iter().map(caller).filter(|(_, tid, _)| *tid != 0).collect()
    }

    pub fn take_by_id(&self, ids: &[u64]) -> Vec<Parked> {
        let mut state = self.state.lock();
        let taken = ids.iter().filter_map(|id| state.requests.remove(id)).collect();
        self.count.store(state.requests.len(), Release);
        taken
    }

    /// Makes the clock look again: something is due earlier than it thinks.
    pub fn wake_clock(&self) {
        self.nudge(self.state.lock());
    }

    fn nudge(&self, mut state: MutexGuard<'_, State>) {
        state.nudged = true;
        self.changed.notify_all();
    }

    /// For the clock: sleeps until the next is due, until `latest`, or until nudged.
    pub fn sleep(&self, now_ns: u64, latest_ns: u64) {
        let mut state = self.state.lock();
        let next = state.due.peek().map_or(latest_ns, |Reverse((when, _))| latest_ns.min(*when));
        if !state.nudged && next > now_ns {
            self.changed.wait_for(&mut state, std::time::Duration::from_nanos(next - now_ns));
        }
        state.nudged = false;
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::fault::compile::{Defaults, compile};

    fn held_by(rest: &str) -> Parked {
        let text = format!(r#"{{"name":"r","fault":{{"kind":"stall"}},"trigger":{{{rest}}}}}"#);
        let defaults = Defaults { seed: 7, now_ns: 0, created: SystemTime::UNIX_EPOCH };
        let rule = compile(serde_json::from_str(&text).unwrap(), defaults).unwrap();
        let caller = Caller { unique: 1, uid: 0, gid: 0, tid: 1 };
        let decision = Decision::default();
        let pending = Pending { caller, call: Call::Statfs { ino: 1 }, reply: Reply::None, decision };
        let rules = [Arc::new(rule)].into_iter().collect();
        Parked { pending, stalled: true, rules, delays: Vec::new(), since_ns: 0, until_ns: None, caller_started: None }
    }

    /// It was decided in time; when it is parked, the clock has let go already what the rule held.
    #[test]
    fn nothing_is_parked_by_a_rule_whose_time_is_over() {
        for (rest, now_ns, parks) in [
            (r#""for":"1s""#, 999_999_999, true),
            (r#""for":"1s""#, 1_000_000_000, false),
            (r#""up":"1s","down":"1s""#, 1_500_000_000, true),
            (r#""up":"1s","down":"1s""#, 2_000_000_000, false),
        ] {
            let parked = Parking::default().park(held_by(rest), || now_ns);
            assert_eq!(parked.is_ok(), parks, "{rest} {now_ns}");
        }
    }
}
