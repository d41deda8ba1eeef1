//! The account: bytes and inodes that are free, and what each quota has used.
//!
//! Atomics only; a reader reserves before a write and settles after it by the difference of the file's `st_blocks`,
//! which telescopes: whoever looks at the file next corrects what the last one could not see. When the mode `enospc`
//! is on, nothing is free, whatever the account says; the account goes on underneath.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::*};

use arc_swap::ArcSwap;

use super::quota::{Members, Quotas};
use super::usage::Usage;

/// `st_blocks` counts in these.
pub const SECTOR: u64 = 512;

/// How a mount is to seem smaller than its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in all, and how many of them are free.
    pub bytes: Option<(u64, u64)>,
    /// Of the free bytes, so many are for root alone.
    pub reserve: u64,
    /// Inodes in all, and how many of them are free.
    pub inodes: Option<(u64, u64)>,
    /// Are writes that do not fit accepted, and refused when they are synced?
    pub late: bool,
}

/// The capacity of one mount.
#[derive(Debug, Default)]
pub struct Capacity {
    /// Is any account kept?
    set: AtomicBool,
    /// Is the mode `enospc` on?
    full: AtomicBool,
    bytes: Pool,
    reserve: AtomicU64,
    inodes: Pool,
    late: AtomicBool,
    quotas: ArcSwap<Quotas>,
}

/// A number of things of which some are taken.
#[derive(Debug, Default)]
struct Pool {
    set: AtomicBool,
    /// What is left; below 0 when more was taken than there was (metadata of the backing filesystem).
    free: AtomicI64,
    /// In all, for `statfs`.
    size: AtomicU64,
}

impl Pool {
    fn set(&self, size_and_free: Option<(u64, u64)>) {
        let (size, free) = size_and_free.unwrap_or_default();
        self.size.store(size, Release);
        self.free.store(free.min(i64::MAX as u64) as i64, Release);
        self.set.store(size_and_free.is_some(), Release);
    }

    fn is_set(&self) -> bool {
        self.set.load(Acquire)
    }

    fn free(&self) -> u64 {
        self.free.load(Acquire).max(0) as u64
    }

    fn size(&self) -> Option<u64> {
        self.is_set().then(|| self.size.load(Acquire))
    }

    /// Takes at most `need`, in whole units, and leaves `floor` alone.
    fn take(&self, need: u64, unit: u64, floor: u64) -> u64 {
        let mut taken = 0;
        let _ = self.free.fetch_update(AcqRel, Acquire, |free| {
            let there = (free.max(0) as u64).saturating_sub(floor) / unit * unit;
            taken = need.min(there);
            (taken > 0).then_some(free - taken as i64)
        });
        taken
    }
}

/// Who wants space, and for which file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claimant {
    /// May it take what is reserved for root?
    pub privileged: bool,
    /// The quotas that may refuse it.
    pub bound: Members,
}

/// Who has refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The mode `enospc`.
    Mode,
    Capacity,
    Quota,
}

impl Limit {
    pub fn errno(self) -> i32 {
        match self {
            Limit::Mode | Limit::Capacity => libc::ENOSPC,
            Limit::Quota => libc::EDQUOT,
        }
    }
}

/// Bytes taken out of the accounts for an operation under way.
#[derive(Debug, Default)]
#[must_use = "a reservation is settled or given back"]
pub struct Reservation {
    bytes: u64,
    /// The same of each of these.
    bound: Members,
    /// From the capacity as well?
    counted: bool,
}

impl Capacity {
    /// Is there anything to ask? Two relaxed loads, for the hot path.
    pub fn limits(&self) -> bool {
        self.set.load(Relaxed) || self.full.load(Relaxed)
    }

    /// Is any account kept?
    pub fn is_set(&self) -> bool {
        self.set.load(Acquire)
    }

    /// Is it the mode, and not the account, that refuses?
    pub fn is_full_by_mode(&self) -> bool {
        self.full.load(Acquire)
    }

    pub fn set_full(&self, full: bool) {
        self.full.store(full, Release);
    }

    /// Sets the account, without a word on the quotas.
    pub fn set(&self, limits: Limits) {
        self.bytes.set(limits.bytes);
        self.reserve.store(limits.reserve, Release);
        self.inodes.set(limits.inodes);
        self.late.store(limits.late, Release);
        self.refresh();
    }

    pub fn set_quotas(&self, quotas: Quotas) {
        self.quotas.store(Arc::new(quotas));
        self.refresh();
    }

    pub fn clear(&self) {
        self.set(Limits::default());
        self.set_quotas(Quotas::default());
    }

    fn refresh(&self) {
        let any = self.bytes.is_set() || self.inodes.is_set() || !self.quotas.load().is_empty();
        self.set.store(any, Release);
    }

    pub fn quotas(&self) -> Arc<Quotas> {
        self.quotas.load_full()
    }

    /// Is a write that does not fit to be accepted?
    pub fn is_late(&self) -> bool {
        self.late.load(Acquire)
    }

    /// Bytes that can be taken now, by root.
    pub fn free(&self) -> u64 {
        match () {
            () if self.full.load(Acquire) => 0,
            () if self.bytes.is_set() => self.bytes.free(),
            () => u64::MAX,
        }
    }

    pub fn reserved_for_root(&self) -> u64 {
        self.reserve.load(Acquire)
    }

    /// Bytes in all, when they are counted.
    pub fn size(&self) -> Option<u64> {
        self.bytes.size()
    }

    /// Inodes in all and free, when they are counted.
    pub fn inodes(&self) -> Option<(u64, u64)> {
        self.inodes.size().map(|size| (size, self.inodes.free()))
    }

    /// Takes at most `need` bytes, in whole blocks: how many blocks' worth there was, and who has refused the rest.
    pub fn reserve(&self, quotas: &Quotas, need: u64, block: u64, who: Claimant) -> (u64, Option<Limit>, Reservation) {
        if need > 0 && self.full.load(Acquire) {
            return (0, Some(Limit::Mode), Reservation::default());
        }
        let by_quota = quotas.take(who.bound, need, block);
        let counted = self.bytes.is_set();
        let floor = if who.privileged { 0 } else { self.reserve.load(Acquire) };
        let taken = if counted { self.bytes.take(by_quota, block, floor) } else { by_quota };
        quotas.give_back(who.bound, by_quota - taken);
        let limit = match () {
            () if taken >= need => None,
            () if taken < by_quota => Some(Limit::Capacity),
            () => Some(Limit::Quota),
        };
        (taken, limit, Reservation { bytes: taken, bound: who.bound, counted })
    }

    /// Nothing was done after all.
    pub fn give_back(&self, quotas: &Quotas, reservation: Reservation) {
        let Reservation { bytes, bound, counted } = reservation;
        quotas.give_back(bound, bytes);
        if counted {
            self.bytes.free.fetch_add(bytes as i64, AcqRel);
        }
    }

    /// After the operation: what the file really took replaces what was reserved.
    pub fn settle(&self, quotas: &Quotas, reservation: Reservation, usage: &Usage, blocks: u64, members: Members) {
        let Reservation { bytes, bound, counted } = reservation;
        quotas.give_back(bound, bytes);
        let reserved = if counted { bytes as i64 } else { 0 };
        let grown = usage.advance(blocks, members).map_or(0, |(before, now)| {
            quotas.count(before, -1);
            quotas.count(now, 1);
            now.bytes() as i64 - before.bytes() as i64
        });
        if reserved != grown {
            self.bytes.free.fetch_add(reserved - grown, AcqRel);
        }
    }

    /// A file is gone: its blocks are free again. `blocks` and `members` are for one that was never looked at.
    pub fn freed(&self, quotas: &Quotas, usage: Option<&Usage>, blocks: u64, members: Members) {
        let counted = match usage {
            Some(usage) => usage.take(blocks, members),
            None => super::usage::Counted::new(blocks, members),
        };
        quotas.count(counted, -1);
        self.bytes.free.fetch_add(counted.bytes() as i64, AcqRel);
    }

    /// Takes one inode; `false` if there is none.
    pub fn take_inode(&self) -> bool {
        !self.inodes.is_set() || self.inodes.take(1, 1, 0) == 1
    }

    pub fn give_inode(&self) {
        self.inodes.free.fetch_add(1, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::super::quota::Quota;
    use super::*;

    fn limited(free: u64) -> Capacity {
        let capacity = Capacity::default();
        capacity.set(Limits { bytes: Some((1 << 20, free)), ..Limits::default() });
        capacity
    }

    fn ask(capacity: &Capacity, need: u64, who: Claimant) -> (u64, Option<Limit>, Reservation) {
        capacity.reserve(&capacity.quotas(), need, 4096, who)
    }

    #[test]
    fn what_is_reserved_and_settled_adds_up() {
        let capacity = limited(10_000);
        let usage = Usage::default();
        usage.begin(0, 0);
        let (got, limit, reservation) = ask(&capacity, 12_288, Claimant::default());
        assert_eq!((got, limit), (8192, Some(Limit::Capacity)), "whole blocks only");
        assert_eq!(capacity.free(), 1808);
        capacity.settle(&capacity.quotas(), reservation, &usage, 8, 0);
        assert_eq!(capacity.free(), 10_000 - 4096, "only what the file took");
        let (none, limit, reservation) = ask(&capacity, 0, Claimant::default());
        assert_eq!((none, limit), (0, None));
        capacity.settle(&capacity.quotas(), reservation, &usage, 0, 0);
        assert_eq!(capacity.free(), 10_000, "freed at once");
    }

    #[test]
    fn the_mode_leaves_the_account_alone() {
        let capacity = limited(8192);
        capacity.set_full(true);
        assert_eq!(capacity.free(), 0);
        let (got, limit, _) = ask(&capacity, 4096, Claimant::default());
        assert_eq!((got, limit), (0, Some(Limit::Mode)));
        capacity.set_full(false);
        assert_eq!(capacity.free(), 8192);
    }

    #[test]
    fn the_last_bytes_are_for_the_privileged() {
        let capacity = limited(8192);
        capacity.set(Limits { bytes: Some((1 << 20, 8192)), reserve: 4096, ..Limits::default() });
        assert_eq!(ask(&capacity, 8192, Claimant::default()).0, 4096);
        assert_eq!(ask(&capacity, 4096, Claimant::default()).0, 0);
        assert_eq!(ask(&capacity, 4096, Claimant { privileged: true, bound: 0 }).0, 4096);
    }

    #[test]
    fn the_tightest_of_capacity_and_quotas_decides_and_says_so() {
        let capacity = limited(1 << 20);
        let quota = |limit| Quota::new(limit, None, None);
        capacity.set_quotas(Quotas::new(vec![quota(8192), quota(40_960)]));
        let both = Claimant { privileged: false, bound: 0b11 };
        let (got, limit, reservation) = ask(&capacity, 12_288, both);
        assert_eq!((got, limit), (8192, Some(Limit::Quota)));
        assert_eq!(capacity.free(), (1 << 20) - 8192);
        let usage = Usage::default();
        usage.begin(0, 0b11);
        let quotas = capacity.quotas();
        capacity.settle(&quotas, reservation, &usage, 16, 0b11);
        assert_eq!(quotas.iter().map(Quota::used).collect::<Vec<_>>(), [8192, 8192]);
        // It moves to where only the second counts it.
        let none = ask(&capacity, 0, both).2;
        capacity.settle(&quotas, none, &usage, 24, 0b10);
        assert_eq!(quotas.iter().map(Quota::used).collect::<Vec<_>>(), [0, 12_288]);
        capacity.freed(&quotas, Some(&usage), 0, 0);
        assert_eq!(quotas.iter().map(Quota::used).collect::<Vec<_>>(), [0, 0]);
        assert_eq!(capacity.free(), 1 << 20);
    }

    #[test]
    fn inodes_are_taken_and_given_back() {
        let capacity = Capacity::default();
        assert!(capacity.take_inode());
        capacity.set(Limits { inodes: Some((10, 1)), ..Limits::default() });
        assert!(capacity.limits());
        assert!(capacity.take_inode() && !capacity.take_inode());
        capacity.give_inode();
        assert_eq!(capacity.inodes(), Some((10, 1)));
        capacity.clear();
        assert!(!capacity.limits());
    }
}
