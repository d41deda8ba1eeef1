//! A set of byte ranges: what is preallocated, what was dropped, what has healed.
//!
//! Pure data, no locks.

use std::ops::Range;

/// Sorted, disjoint, not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut merged = range;
        self.0.retain(|old| {
            let apart = old.end < merged.start || old.start > merged.end;
            if !apart {
                merged = merged.start.min(old.start)..merged.end.max(old.end);
            }
            apart
        });
        let at = self.0.partition_point(|old| old.start < merged.start);
        self.0.insert(at, merged);
    }

    pub fn remove(&mut self, range: Range<u64>) {
        let parts = std::mem::take(&mut self.0);
        for old in parts {
            let before = old.start..old.end.min(range.start);
            let after = old.start.max(range.end)..old.end;
            self.0.extend([before, after].into_iter().filter(|part| !part.is_empty()));
        }
    }

    /// The parts of `range` that are not in the set.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for old in self.0.iter().filter(|old| old.end > range.start && old.start < range.end) {
            if old.start > at {
                gaps.push(at..old.start);
            }
            at = at.max(old.end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_ranges_agrees_with_a_set_of_numbers() {
        let mut ranges = Ranges::default();
        let mut model = [false; 64];
        let mut state = 7u64;
        for _ in 0..2000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (a, b) = ((state >> 33) % 64, (state >> 43) % 64);
            let range = a.min(b)..a.max(b);
            let adding = state >> 63 == 0;
            match adding {
                true => ranges.add(range.clone()),
                false => ranges.remove(range.clone()),
            }
            range.for_each(|i| model[i as usize] = adding);
            let flat: Vec<u64> = ranges.iter().flatten().collect();
            let want: Vec<u64> = (0..64).filter(|i| model[*i as usize]).collect();
            assert_eq!(flat, want);
            let gaps: Vec<u64> = ranges.gaps(10..50).into_iter().flatten().collect();
            assert_eq!(gaps, (10..50).filter(|i| !model[*i as usize]).collect::<Vec<u64>>());
        }
    }
}
