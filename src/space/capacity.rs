//! The account of free bytes.
//!
//! Atomics only; a reader reserves before a write and settles after it by the difference of the file's `st_blocks`,
//! which telescopes: whoever looks at the file next corrects what the last one could not see. When the mode `enospc`
//! is on, nothing is free, whatever the account says; the account goes on underneath.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::*};

use parking_lot::Mutex;

use crate::durability::Ranges;

/// `st_blocks` counts in these.
const SECTOR: u64 = 512;

/// What `space` last saw of one file's blocks. Kept in its inode.
#[derive(Debug)]
pub struct Usage {
    blocks: AtomicU64,
    /// Ranges given to fallocate, on filesystems that do not tell them from holes.
    preallocated: Mutex<Ranges>,
}

/// A file that was not looked at since the capacity was set.
const UNKNOWN: u64 = u64::MAX;

impl Default for Usage {
    fn default() -> Self {
        Usage { blocks: AtomicU64::new(UNKNOWN), preallocated: Mutex::default() }
    }
}

impl Usage {
    /// Before an operation: from here on changes count.
    pub fn begin(&self, blocks: u64) {
        let _ = self.blocks.compare_exchange(UNKNOWN, blocks, AcqRel, Relaxed);
    }

    /// After one: bytes by which the file grew since it was last looked at.
    fn advance(&self, blocks: u64) -> i64 {
        let before = self.blocks.swap(blocks, AcqRel);
        match before {
            UNKNOWN => 0,
            before => (blocks as i64 - before as i64) * SECTOR as i64,
        }
    }

    /// After an fallocate: the range has blocks now, or (`false`) no longer.
    pub fn note_preallocated(&self, there: bool, range: Range<u64>) {
        let mut ranges = self.preallocated.lock();
        match there {
            true => ranges.add(range),
            false => ranges.remove(range),
        }
    }

    pub fn preallocated(&self) -> Ranges {
        self.preallocated.lock().clone()
    }

    pub fn forget(&self) {
        self.blocks.store(UNKNOWN, Release);
    }
}

/// The capacity of one mount.
#[derive(Debug, Default)]
pub struct Capacity {
    /// Is an account kept?
    set: AtomicBool,
    /// Is the mode `enospc` on?
    full: AtomicBool,
    /// Bytes left; below 0 when more was taken than there was (metadata of the backing filesystem).
    free: AtomicI64,
    /// Bytes in all, for `statfs`.
    size: AtomicU64,
}

/// Bytes taken out of the account for an operation under way.
#[derive(Debug)]
#[must_use = "a reservation is settled or given back"]
pub struct Reservation(u64);

impl Capacity {
    /// Is there anything to ask? Two relaxed loads, for the hot path.
    pub fn limits(&self) -> bool {
        self.set.load(Relaxed) || self.full.load(Relaxed)
    }

    pub fn is_set(&self) -> bool {
        self.set.load(Acquire)
    }

    /// Is it the mode, and not the account, that refuses?
    pub fn is_full_by_mode(&self) -> bool {
        self.full.load(Acquire)
    }

    /// Sets the account: so much in all, so much of it free.
    pub fn set(&self, size: u64, free: u64) {
        self.size.store(size, Release);
        self.free.store(free.min(i64::MAX as u64) as i64, Release);
        self.set.store(true, Release);
    }

    pub fn clear(&self) {
        self.set.store(false, Release);
    }

    pub fn set_full(&self, full: bool) {
        self.full.store(full, Release);
    }

    /// Bytes that can be taken now.
    pub fn free(&self) -> u64 {
        match () {
            () if self.full.load(Acquire) => 0,
            () if self.set.load(Acquire) => self.free.load(Acquire).max(0) as u64,
            () => u64::MAX,
        }
    }

    /// Bytes in all, when an account is kept.
    pub fn size(&self) -> Option<u64> {
        self.is_set().then(|| self.size.load(Acquire))
    }

    /// Takes at most `need` bytes, in whole blocks: how many blocks' worth there was.
    pub fn reserve(&self, need: u64, block: u64) -> (u64, Reservation) {
        if self.full.load(Acquire) {
            return (0, Reservation(0));
        }
        if !self.set.load(Acquire) {
            return (need, Reservation(0));
        }
        let mut taken = 0;
        let _ = self.free.fetch_update(AcqRel, Acquire, |free| {
            let there = (free.max(0) as u64) / block * block;
            taken = need.min(there);
            (taken > 0).then_some(free - taken as i64)
        });
        (taken, Reservation(taken))
    }

    /// After the operation: what the file really took replaces what was reserved.
    pub fn settle(&self, reservation: Reservation, usage: &Usage, blocks: u64) {
        let grown = usage.advance(blocks);
        let back = reservation.0 as i64 - grown;
        if back != 0 {
            self.free.fetch_add(back, AcqRel);
        }
    }

    /// Nothing was done after all.
    pub fn give_back(&self, reservation: Reservation) {
        self.free.fetch_add(reservation.0 as i64, AcqRel);
    }

    /// A file is gone: its blocks are free again.
    pub fn freed(&self, blocks: u64) {
        self.free.fetch_add((blocks * SECTOR) as i64, AcqRel);
    }

    /// Something was made that has blocks of its own.
    pub fn taken(&self, blocks: u64) {
        self.free.fetch_sub((blocks * SECTOR) as i64, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_and_settled_adds_up() {
        let capacity = Capacity::default();
        capacity.set(1 << 20, 10_000);
        let usage = Usage::default();
        usage.begin(0);
        let (got, reservation) = capacity.reserve(12_288, 4096);
        assert_eq!(got, 8192, "whole blocks only");
        assert_eq!(capacity.free(), 1808);
        capacity.settle(reservation, &usage, 8);
        assert_eq!(capacity.free(), 10_000 - 4096, "only what the file took");
        let (none, reservation) = capacity.reserve(0, 4096);
        assert_eq!(none, 0);
        capacity.settle(reservation, &usage, 0);
        assert_eq!(capacity.free(), 10_000, "freed at once");
    }

    #[test]
    fn the_mode_leaves_the_account_alone() {
        let capacity = Capacity::default();
        capacity.set(1 << 20, 8192);
        capacity.set_full(true);
        assert_eq!(capacity.free(), 0);
        let (got, reservation) = capacity.reserve(4096, 4096);
        assert_eq!(got, 0);
        capacity.give_back(reservation);
        capacity.set_full(false);
        assert_eq!(capacity.free(), 8192);
    }
}
