//! What a file should have where it was damaged, and by which injection.
//!
//! Part of the undo log of a file, under its lock. Held in memory, in the limit that undo logs have together.

use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use super::undo::hold;

/// Which injection did a damage.
#[derive(Clone, Debug)]
pub struct Mark {
    pub rule: Arc<str>,
    pub nth: u64,
    pub at: SystemTime,
}

/// One damaged place.
#[derive(Clone, Debug)]
pub struct Original {
    pub offset: u64,
    /// What should be there.
    pub bytes: Vec<u8>,
    pub mark: Mark,
}

impl Original {
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes.len() as u64
    }

    fn part(&self, part: Range<u64>) -> Option<Original> {
        let (from, to) = ((part.start - self.offset) as usize, (part.end - self.offset) as usize);
        let bytes = self.bytes[from..to].to_vec();
        (!part.is_empty()).then(|| Original { offset: part.start, bytes, mark: self.mark.clone() })
    }
}

/// The damaged places of one file; disjoint.
#[derive(Debug, Default)]
pub struct Originals {
    all: Vec<Original>,
    /// Bytes of them, as the limit counts them.
    held: usize,
}

impl Originals {
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Original> {
        self.all.iter()
    }

    /// Notes what a place should have. A place that was damaged before should have this now.
    pub fn put(&mut self, offset: u64, bytes: &[u8], mark: &Mark) {
        if bytes.is_empty() {
            return;
        }
        let original = Original { offset, bytes: bytes.to_vec(), mark: mark.clone() };
        self.cut(&original.range());
        let at = self.all.partition_point(|other| other.offset < offset);
        self.all.insert(at, original);
        self.recount();
    }

    /// What a place should have, over what was read there.
    pub fn overlay(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        for original in &self.all {
            for at in original.offset.max(offset)..original.range().end.min(end) {
                bytes[(at - offset) as usize] = original.bytes[(at - original.offset) as usize];
            }
        }
    }

    /// A place was written anew: what it has is right.
    pub fn cut(&mut self, range: &Range<u64>) {
        let touched = |original: &Original| original.offset < range.end && original.range().end > range.start;
        if !self.all.iter().any(touched) {
            return;
        }
        let all = std::mem::take(&mut self.all);
        for original in all {
            if !touched(&original) {
                self.all.push(original);
                continue;
            }
            let whole = original.range();
            let before = whole.start..range.start.clamp(whole.start, whole.end);
            let after = range.end.clamp(whole.start, whole.end)..whole.end;
            self.all.extend([before, after].into_iter().filter_map(|part| original.part(part)));
        }
        self.recount();
    }

    pub fn take(&mut self) -> Vec<Original> {
        let all = std::mem::take(&mut self.all);
        self.recount();
        all
    }

    fn recount(&mut self) {
        let now: usize = self.all.iter().map(|original| original.bytes.len()).sum();
        hold(now as i64 - self.held as i64);
        self.held = now;
    }
}

impl Drop for Originals {
    fn drop(&mut self) {
        hold(-(self.held as i64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_anew_is_no_longer_damaged() {
        let mark = Mark { rule: "r".into(), nth: 1, at: SystemTime::UNIX_EPOCH };
        let mut originals = Originals::default();
        originals.put(100, &[1; 100], &mark);
        originals.put(300, &[2; 10], &mark);
        originals.cut(&(150..160));
        originals.put(90, &[3; 20], &mark);
        let all: Vec<_> = originals.iter().map(|one| (one.range(), one.bytes[0])).collect();
        assert_eq!(all, [(90..110, 3), (110..150, 1), (160..200, 1), (300..310, 2)]);
        originals.cut(&(0..u64::MAX));
        assert!(originals.is_empty());
    }
}
