//! What the account last saw of one file. Kept in its inode.
//!
//! Read and changed by readers while a capacity is set. Blocks and the quotas that count them are one atomic word, so that
//! two who look at a file at once never disagree on what was counted. The ranges have a lock, held for a few
//! instructions and never across a system call.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

use parking_lot::Mutex;

use super::capacity::SECTOR;
use super::quota::Members;
use crate::durability::Ranges;

/// Blocks of a file as they are counted, and the quotas that count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted(u64);

/// Bits of a word that are for the members.
const MEMBERS: u32 = Members::BITS;

impl Counted {
    /// A file that was not looked at since a capacity was set.
    const UNKNOWN: Counted = Counted(u64::MAX);

    pub fn new(blocks: u64, members: Members) -> Counted {
        Counted(blocks << MEMBERS | u64::from(members))
    }

    pub fn bytes(self) -> u64 {
        (self.0 >> MEMBERS) * SECTOR
    }

    pub fn members(self) -> Members {
        self.0 as Members
    }
}

#[derive(Debug)]
pub struct Usage {
    counted: AtomicU64,
    /// Blocks that the backing file has and the account does not count: of writes that are lost.
    lost_blocks: AtomicU64,
    /// Was the file removed, and its inode given back?
    gone: AtomicBool,
    /// Most files have none.
    ranges: Mutex<Option<Box<Special>>>,
}

/// Ranges that are not what the backing file makes them look like.
#[derive(Debug, Default)]
struct Special {
    /// Given to fallocate, on filesystems that do not tell them from holes.
    preallocated: Ranges,
    /// Whole blocks that were written when nothing was free.
    lost: Ranges,
}

impl Default for Usage {
    fn default() -> Self {
        Usage {
            counted: AtomicU64::new(Counted::UNKNOWN.0),
            lost_blocks: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            ranges: Mutex::default(),
        }
    }
}

impl Usage {
    /// Before an operation: from here on changes count.
    pub fn begin(&self, blocks: u64, members: Members) {
        let now = self.effective(blocks, members);
        let _ = self.counted.compare_exchange(Counted::UNKNOWN.0, now.0, AcqRel, Relaxed);
    }

    /// Was it looked at since a capacity was set?
    pub fn is_known(&self) -> bool {
        self.counted.load(Acquire) != Counted::UNKNOWN.0
    }

    /// After one: how it was when it was last looked at, and how it is.
    pub(super) fn advance(&self, blocks: u64, members: Members) -> Option<(Counted, Counted)> {
        let now = self.effective(blocks, members);
        let before = Counted(self.counted.swap(now.0, AcqRel));
        (before != Counted::UNKNOWN).then_some((before, now))
    }

    /// At its end: what is counted of it. From here on nothing is, but what is added yet by who has it open.
    pub(super) fn take(&self, blocks: u64, members: Members) -> Counted {
        match Counted(self.counted.swap(Counted::new(0, 0).0, AcqRel)) {
            Counted::UNKNOWN => self.effective(blocks, members),
            counted => counted,
        }
    }

    fn effective(&self, blocks: u64, members: Members) -> Counted {
        Counted::new(blocks.saturating_sub(self.lost_blocks.load(Acquire)), members)
    }

    /// The file is gone: `true` for the first who says so, of its last close and the removal of its last name.
    pub fn end(&self) -> bool {
        !self.gone.swap(true, AcqRel)
    }

    /// What is counted begins anew. A count of the tree has found the file, unless its last name is gone.
    pub fn forget(&self, found: bool) {
        let counted = if found { Counted::UNKNOWN } else { Counted::new(0, 0) };
        self.counted.store(counted.0, Release);
    }

    /// After an fallocate: the range has blocks now, or (`false`) no longer.
    pub fn note_preallocated(&self, there: bool, range: Range<u64>) {
        let mut special = self.ranges.lock();
        let ranges = &mut special.get_or_insert_default().preallocated;
        match there {
            true => ranges.add(range),
            false => ranges.remove(range),
        }
    }

    pub fn preallocated(&self) -> Ranges {
        self.ranges.lock().as_ref().map(|special| special.preallocated.clone()).unwrap_or_default()
    }

    /// Whole blocks were written for which there was no space.
    pub fn note_lost(&self, blocks: impl IntoIterator<Item = Range<u64>>) {
        self.change_lost(|lost| blocks.into_iter().for_each(|range| lost.add(range)));
    }

    /// These blocks are no longer lost: there was space for them, or they are gone.
    pub fn note_found(&self, range: Range<u64>, block: u64) {
        if self.lost_blocks.load(Acquire) > 0 {
            let whole = range.start / block * block..range.end.checked_next_multiple_of(block).unwrap_or(u64::MAX);
            self.change_lost(|lost| lost.remove(whole));
        }
    }

    fn change_lost(&self, change: impl FnOnce(&mut Ranges)) {
        let mut special = self.ranges.lock();
        let lost = &mut special.get_or_insert_default().lost;
        change(lost);
        let bytes: u64 = lost.iter().map(|range| range.end - range.start).sum();
        self.lost_blocks.store(bytes / SECTOR, Release);
    }

    pub fn lost(&self) -> Ranges {
        match self.lost_blocks.load(Acquire) {
            0 => Ranges::default(),
            _ => self.ranges.lock().as_ref().map(|special| special.lost.clone()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_lost_writes_are_not_counted_until_there_is_space_for_them() {
        let usage = Usage::default();
        usage.begin(8, 0);
        usage.note_lost(std::iter::once(4096..12_288));
        let (before, now) = usage.advance(24, 1).unwrap();
        assert_eq!((before.bytes(), now.bytes()), (4096, 4096));
        assert_eq!((before.members(), now.members()), (0, 1));
        usage.note_found(5000..5001, 4096);
        assert_eq!(usage.advance(24, 1).unwrap().1.bytes(), 8192);
        assert_eq!(usage.take(0, 0).bytes(), 8192);
        let (before, now) = usage.advance(24, 1).unwrap();
        assert_eq!((before.bytes(), now.bytes()), (0, 8192), "what is added yet by who has it open");
        usage.forget(true);
        assert!(usage.advance(24, 1).is_none(), "it was not looked at since");
    }
}
