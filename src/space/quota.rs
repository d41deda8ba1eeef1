//! Quotas: how much the files of an owner, or those below a path, may use.
//!
//! The set is immutable and swapped whole; what is used is an atomic in each. Asked by readers while a quota is set.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::*};

use globset::GlobMatcher;

use super::usage::Counted;

/// Which quotas count a file: a bit for each, in the order of the set.
pub type Members = u16;

/// As many as a mount can have.
pub const MOST: usize = Members::BITS as usize;

/// One limit.
#[derive(Debug)]
pub struct Quota {
    pub limit: u64,
    /// For files of this owner only.
    pub uid: Option<u32>,
    /// For files with such a path only.
    pub path: Option<GlobMatcher>,
    used: AtomicI64,
}

impl Quota {
    pub fn new(limit: u64, uid: Option<u32>, path: Option<GlobMatcher>) -> Quota {
        Quota { limit, uid, path, used: AtomicI64::new(0) }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Acquire).max(0) as u64
    }

    pub fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used())
    }

    /// Is it for everything, so that `statfs` shows it?
    pub fn is_for_all(&self) -> bool {
        self.uid.is_none() && self.path.is_none()
    }

    pub fn matches_path(&self, path: &[u8]) -> bool {
        use std::os::unix::ffi::OsStrExt;
        self.path.as_ref().is_none_or(|glob| glob.is_match(std::ffi::OsStr::from_bytes(path)))
    }

    /// Sets what was counted.
    pub fn set_used(&self, bytes: u64) {
        self.used.store(bytes as i64, Release);
    }

    fn take(&self, need: u64, block: u64) -> u64 {
        let mut taken = 0;
        let _ = self.used.fetch_update(AcqRel, Acquire, |used| {
            let limit = i64::try_from(self.limit).unwrap_or(i64::MAX);
            let there = limit.saturating_sub(used).max(0) as u64 / block * block;
            taken = need.min(there);
            (taken > 0).then_some(used + taken as i64)
        });
        taken
    }
}

/// All quotas of a mount.
#[derive(Debug, Default)]
pub struct Quotas {
    /// Distinguishes the set from those before it; 0 for the empty one of the start.
    pub id: u64,
    list: Vec<Quota>,
}

impl Quotas {
    /// At most [`MOST`].
    pub fn new(list: Vec<Quota>) -> Quotas {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Quotas { id: NEXT.fetch_add(1, Relaxed), list }
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Quota> {
        self.list.iter()
    }

    /// Does it depend on a path what is counted?
    pub fn have_paths(&self) -> bool {
        self.list.iter().any(|quota| quota.path.is_some())
    }

    /// The bits of those that a condition holds for.
    pub fn which(&self, holds: impl Fn(&Quota) -> bool) -> Members {
        let bits = self.list.iter().enumerate().filter(|(_, quota)| holds(quota)).map(|(i, _)| 1 << i);
        bits.fold(0, |all, bit: Members| all | bit)
    }

    fn each(&self, members: Members) -> impl Iterator<Item = &Quota> {
        self.list.iter().enumerate().filter(move |(i, _)| members & 1 << i != 0).map(|(_, quota)| quota)
    }

    /// Takes at most `need` bytes of each of these, of all the same.
    pub(super) fn take(&self, members: Members, need: u64, block: u64) -> u64 {
        let mut taken = need;
        for (i, quota) in self.list.iter().enumerate().filter(|(i, _)| members & 1 << i != 0) {
            let got = quota.take(taken, block);
            // Those before it had more.
            let before = members & ((1 << i) - 1);
            self.give_back(before, taken - got);
            taken = got;
        }
        taken
    }

    pub(super) fn give_back(&self, members: Members, bytes: u64) {
        if bytes > 0 {
            for quota in self.each(members) {
                quota.used.fetch_sub(bytes as i64, AcqRel);
            }
        }
    }

    /// A file that nobody looks at has moved from the ones to the others.
    pub fn move_account(&self, blocks: u64, from: Members, to: Members) {
        self.count(Counted::new(blocks, from), -1);
        self.count(Counted::new(blocks, to), 1);
    }

    /// Counts a file in (1) or out (-1).
    pub(super) fn count(&self, counted: Counted, sign: i64) {
        for quota in self.each(counted.members()) {
            quota.used.fetch_add(sign * counted.bytes() as i64, AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_the_tightest_decides_and_the_others_get_back_what_they_gave() {
        let quotas = Quotas::new([100, 20, 50].into_iter().map(|limit| Quota::new(limit, None, None)).collect());
        assert_eq!(quotas.take(0b111, 40, 10), 20);
        assert_eq!(quotas.iter().map(Quota::used).collect::<Vec<_>>(), [20, 20, 20]);
        assert_eq!(quotas.take(0b101, 40, 10), 30);
        assert_eq!(quotas.iter().map(Quota::free).collect::<Vec<_>>(), [50, 0, 0]);
        assert_eq!(quotas.take(0, 40, 10), 40, "no quota, no limit");
    }

    #[test]
    fn a_quota_beyond_any_disk_refuses_nothing() {
        for limit in [8 << 60, u64::MAX] {
            let quotas = Quotas::new(vec![Quota::new(limit, None, None)]);
            assert_eq!(quotas.take(1, 40_960, 4096), 40_960, "{limit}");
        }
    }

    #[test]
    fn a_quota_is_for_its_owner_and_its_paths() {
        let glob = globset::GlobBuilder::new("/a/**").literal_separator(true).build().unwrap().compile_matcher();
        let list = vec![Quota::new(1, None, Some(glob)), Quota::new(1, Some(7), None), Quota::new(1, None, None)];
        let quotas = Quotas::new(list);
        let members = |uid: u32, path: &str| {
            quotas.which(|q| q.uid.is_none_or(|of| of == uid) && q.matches_path(path.as_bytes()))
        };
        assert_eq!(members(7, "/a/b"), 0b111);
        assert_eq!(members(8, "/b"), 0b100);
        assert_eq!(members(8, "/a"), 0b100, "the directory itself is not below itself");
    }
}
