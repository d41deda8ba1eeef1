//! How often the rules had fired when a client was told a place on the stream. The ring forgets; by these marks, who waits
//! from such a place later learns of all firings since, also of those that the ring has lost.
//!
//! On the control thread alone. Locks: one of its own, for an instant. Must never: touch the ring, or anything that readers
//! wait for.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::fault::{Counters, Rule};

/// So many are kept; of more, every second one of the older half goes.
const MOST: usize = 1024;

#[derive(Default)]
pub struct Marks(Mutex<VecDeque<Mark>>);

struct Mark {
    /// The number of the event that was the newest.
    seq: u64,
    /// Of the rules that had fired. Kept weakly, for a rule may be gone since; its place in memory is not used again.
    fired: Vec<(Weak<Counters>, u64)>,
}

impl Marks {
    /// Marks the place that `newest` gives, which is asked after the rules were counted: what fires in between counts as
    /// after the mark, so that nobody misses it.
    pub fn add(&self, rules: impl FnOnce() -> Vec<Arc<Rule>>, newest: impl Fn() -> u64) -> u64 {
        let now = newest();
        if self.0.lock().back().is_some_and(|last| last.seq == now) {
            return now;
        }
        let count = |rule: Arc<Rule>| {
            let published = rule.counters.published.load(Acquire);
            (published > 0).then(|| (Arc::downgrade(&rule.counters), published))
        };
        let fired = rules().into_iter().filter_map(count).collect();
        let seq = newest();
        let mut marks = self.0.lock();
        if marks.len() >= MOST {
            let mut place = 0;
            marks.retain(|_| {
                place += 1;
                place > MOST / 2 || place % 2 == 0
            });
        }
        marks.push_back(Mark { seq, fired });
        seq
    }

    /// How often a rule had fired at most when an event was the newest: exactly so often, if that place was marked.
    pub fn fired_by(&self, rule: &Rule, seq: u64) -> Option<u64> {
        let marks = self.0.lock();
        let next = marks.iter().find(|mark| mark.seq >= seq)?;
        let known = next.fired.iter().find(|(counters, _)| Weak::as_ptr(counters) == Arc::as_ptr(&rule.counters));
        Some(known.map_or(0, |(_, fired)| *fired))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::arming::Arming;

    #[test]
    fn a_place_is_known_exactly_where_it_was_marked_and_by_a_bound_elsewhere() {
        let arming = Arming::new(1);
        let rule = arming.rule("space").unwrap();
        let marks = Marks::default();
        assert_eq!(marks.fired_by(&rule, 1), None);
        for seq in 1..=3 * MOST as u64 {
            marks.add(|| vec![rule.clone()], || 2 * seq);
            rule.note_told();
            rule.note_published(2 * seq + 1);
        }
        let newest = 6 * MOST as u64;
        assert_eq!(marks.fired_by(&rule, newest), Some(newest / 2 - 1));
        assert_eq!(marks.fired_by(&rule, newest - 1), Some(newest / 2 - 1));
        assert_eq!(marks.fired_by(&rule, newest + 1), None);
        assert!(marks.fired_by(&rule, 2).is_some_and(|most| most < 1000), "old places are thinned out, not dropped");
        assert!(marks.0.lock().len() <= MOST);
        let other = Arming::new(1).rule("space").unwrap();
        assert_eq!(marks.fired_by(&other, newest), Some(0), "one that had not fired by then");
    }
}
