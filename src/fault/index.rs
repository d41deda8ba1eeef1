//! Which of very many rules could concern a request, by its process, its user and its range.
//!
//! Part of a plan, and immutable like it; read by every reader. A narrowing only: what it lets through is asked in full,
//! so it may let too much through, and never too little.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::op::{Op, RANGED};
use super::plan::{Rule, bits};

/// Bits of rules, 64 a word.
type Bits = Box<[u64]>;

/// Finds the rules of a large plan without asking each.
#[derive(Debug)]
pub struct Index {
    pid: Option<Keyed>,
    uid: Option<Keyed>,
    offset: Option<Offsets>,
}

/// What of a request the index looks at. A closure is called when some rule wants to know.
pub struct Wanted<P: FnOnce() -> u32> {
    pub pid: P,
    pub uid: u32,
    pub range: Option<(u64, u64)>,
}

/// The rules that are left for one request, word by word.
pub struct Narrowed<'a> {
    pid: Option<Left<'a>>,
    uid: Option<Left<'a>>,
    offset: Option<[&'a [u64]; 2]>,
}

impl Index {
    pub fn new(rules: &[Arc<Rule>]) -> Index {
        Index {
            pid: Keyed::new(rules, |rule| rule.place.pid),
            uid: Keyed::new(rules, |rule| rule.place.uid),
            offset: Offsets::new(rules),
        }
    }

    pub fn narrow(&self, wanted: Wanted<impl FnOnce() -> u32>) -> Narrowed<'_> {
        Narrowed {
            pid: self.pid.as_ref().map(|keyed| keyed.left((wanted.pid)())),
            uid: self.uid.as_ref().map(|keyed| keyed.left(wanted.uid)),
            offset: self.offset.as_ref().map(|offsets| offsets.left(wanted.range)),
        }
    }
}

impl Narrowed<'_> {
    /// Bits of the rules that are left, of this word; to be asked for in their order.
    pub fn word(&mut self, w: usize) -> u64 {
        let mut word = u64::MAX;
        for left in [&mut self.pid, &mut self.uid].into_iter().flatten() {
            word &= left.word(w);
        }
        for bits in self.offset.iter().flatten() {
            word &= bits[w];
        }
        word
    }
}

/// Rules that want one value of something, by that value.
#[derive(Debug)]
struct Keyed {
    /// Those that take any.
    any: Bits,
    of: HashMap<u32, Vec<usize>>,
}

/// Those that take any value, and those that want this one.
struct Left<'a> {
    any: &'a [u64],
    listed: &'a [usize],
}

impl Keyed {
    fn new(rules: &[Arc<Rule>], key: impl Fn(&Rule) -> Option<u32>) -> Option<Keyed> {
        let mut of: HashMap<u32, Vec<usize>> = HashMap::new();
        for (i, rule) in rules.iter().enumerate() {
            if let Some(key) = key(rule) {
                of.entry(key).or_default().push(i);
            }
        }
        let any = bits(rules, |rule| key(rule).is_none());
        (!of.is_empty()).then_some(Keyed { any, of })
    }

    fn left(&self, key: u32) -> Left<'_> {
        Left { any: &self.any, listed: self.of.get(&key).map_or(&[], Vec::as_slice) }
    }
}

impl Left<'_> {
    fn word(&mut self, w: usize) -> u64 {
        let mut word = self.any[w];
        while let Some((i, rest)) = self.listed.split_first().filter(|(i, _)| **i / 64 <= w) {
            word |= 1 << (i % 64);
            self.listed = rest;
        }
        word
    }
}

/// Rules that want a range: sets of those that begin before one of some offsets, and of those that end after one.
#[derive(Debug)]
struct Offsets {
    begin: Vec<(u64, Bits)>,
    end: Vec<(u64, Bits)>,
    /// Those that want no range, or are also about operations that have none.
    any: Bits,
    all: Bits,
}

/// More sets would cost memory, fewer would let more rules through.
const SETS: usize = 128;

impl Offsets {
    fn new(rules: &[Arc<Rule>]) -> Option<Offsets> {
        let ranges: Vec<&Range<u64>> = rules.iter().filter_map(|rule| rule.place.offset.as_ref()).collect();
        if ranges.is_empty() {
            return None;
        }
        let with =
            |holds: &dyn Fn(&Range<u64>) -> bool| bits(rules, |rule| rule.place.offset.as_ref().is_none_or(holds));
        let sets = |mut offsets: Vec<u64>, set: &dyn Fn(u64) -> Bits| {
            offsets.sort_unstable();
            offsets.dedup();
            let step = offsets.len().div_ceil(SETS);
            offsets.into_iter().step_by(step).map(|offset| (offset, set(offset))).collect()
        };
        Some(Offsets {
            begin: sets(ranges.iter().map(|range| range.start).collect(), &|at| with(&|range| range.start < at)),
            end: sets(ranges.iter().map(|range| range.end).collect(), &|at| with(&|range| range.end >= at)),
            any: bits(rules, |rule| {
                rule.place.offset.is_none() || Op::ALL.iter().any(|op| rule.may_concern(*op) && !RANGED.has(*op))
            }),
            all: with(&|_| true),
        })
    }

    /// For a request of these bytes: the smallest set of those that begin early enough, and of those that end late
    /// enough.
    fn left(&self, range: Option<(u64, u64)>) -> [&[u64]; 2] {
        let Some((offset, length)) = range else { return [&self.any; 2] };
        let end = offset.saturating_add(length);
        // Of the sets "begins before X" with X at or after our end, the first; none: all of them may.
        let begin = self.begin.get(self.begin.partition_point(|(at, _)| *at < end));
        // Of the sets "ends at or after X" with X at or before what must be reached, the last.
        let reached = self.end.partition_point(|(at, _)| *at <= offset.saturating_add(1));
        let end = reached.checked_sub(1).map(|last| &self.end[last]);
        [begin, end].map(|set| set.map_or(&*self.all, |(_, bits)| bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::compile::Defaults;
    use crate::fault::{RuleSpec, compile};
    use std::time::SystemTime;

    fn rules(matches: impl Iterator<Item = String>) -> Vec<Arc<Rule>> {
        let rule = |(i, matches): (usize, String)| {
            let text = format!(r#"{{"name":"r{i}","match":{{{matches}}},"fault":{{"kind":"error","errno":"EIO"}}}}"#);
            let spec: RuleSpec = serde_json::from_str(&text).unwrap();
            let defaults = Defaults { seed: 7, now_ns: 0, created: SystemTime::UNIX_EPOCH };
            Arc::new(compile(spec, defaults).unwrap())
        };
        matches.enumerate().map(rule).collect()
    }

    fn left(rules: &[Arc<Rule>], pid: u32, uid: u32, range: Option<(u64, u64)>) -> Vec<usize> {
        let index = Index::new(rules);
        let mut narrowed = index.narrow(Wanted { pid: || pid, uid, range });
        let words: Vec<u64> = (0..rules.len().div_ceil(64)).map(|w| narrowed.word(w)).collect();
        (0..rules.len()).filter(|i| words[i / 64] & 1 << (i % 64) != 0).collect()
    }

    #[test]
    fn of_rules_on_processes_and_users_only_those_that_may_match_are_left() {
        let mut all = rules((0..200).map(|i| format!(r#""pid":{}"#, i + 1)));
        all.extend(rules((0..200).map(|i| format!(r#""uid":{i}"#))));
        all.extend(rules([String::new()].into_iter()));
        assert_eq!(left(&all, 131, 7, None), [130, 207, 400]);
        assert_eq!(left(&all, 9999, 9999, None), [400]);
    }

    /// Whatever the sets are, nothing that touches the range is left out, and of a thousand few too many are let through.
    #[test]
    fn of_rules_on_ranges_all_that_touch_it_are_left_and_few_others() {
        let all = rules((0..1000).map(|i| format!(r#""offset":"{}..{}""#, i * 100, i * 100 + 150)));
        for (offset, length) in [(0, 1), (149, 1), (150, 1), (50_000, 4096), (99_950, 1), (200_000, 10), (0, 200_000)] {
            let left = left(&all, 1, 0, Some((offset, length)));
            let touches = |i: &usize| offset < *i as u64 * 100 + 150 && offset + length > *i as u64 * 100;
            let wanted: Vec<usize> = (0..1000).filter(touches).collect();
            assert!(wanted.iter().all(|i| left.contains(i)), "{offset} {length}");
            assert!(left.len() <= wanted.len() + 20, "{offset} {length}: {}", left.len());
        }
        assert!(left(&all, 1, 0, None).is_empty());
    }
}
