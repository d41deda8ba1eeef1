//! What a caller may do that FUSE does not tell us: its groups and capabilities.
//!
//! The kernel decides about access itself (`default_permissions`). Left to us is what a local filesystem decides inside
//! an operation: whether suid and sgid survive a change, and who sees `trusted.*` attributes. The first we leave to the
//! backing filesystem, by doing the operation with the caller's groups and without the capability that the caller lacks.
//! Read from procfs on the reader, and only for a file that has such bits or names; procfs never waits for the mount. No
//! locks.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::*};

use super::call::Caller;
use super::inode::Inode;
use crate::sys::ids;

/// capability(7)
const CAP_FSETID: u32 = 4;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// What procfs tells of a thread.
#[derive(Debug, Default, PartialEq, Eq)]
struct Privileges {
    effective: u64,
    groups: Vec<u32>,
}

impl Privileges {
    /// A caller that cannot be looked at (it is outside our pid namespace, or the kernel itself) is judged by its user. The
    /// capabilities of another user namespace than ours are worth nothing here.
    fn of(caller: &Caller) -> Privileges {
        let all = if caller.uid == 0 { u64::MAX } else { 0 };
        let unseen = Privileges { effective: all, groups: Vec::new() };
        let status = fs::read_to_string(format!("/proc/{}/status", caller.tid));
        let mut privileges = status.map_or(unseen, |status| Privileges::parse(&status));
        let namespace = |whose: &str| fs::read_link(format!("/proc/{whose}/ns/user")).ok();
        if namespace(&caller.tid.to_string()).is_some_and(|theirs| namespace("self") != Some(theirs)) {
            privileges.effective = 0;
        }
        privileges
    }

    fn parse(status: &str) -> Privileges {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        Privileges {
            effective: u64::from_str_radix(field("CapEff:"), 16).unwrap_or(0),
            groups: field("Groups:").split_ascii_whitespace().filter_map(|group| group.parse().ok()).collect(),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }
}

/// May the caller take what a filesystem reserves, and go beyond the quotas of users?
pub fn has_resource(caller: &Caller) -> bool {
    Privileges::of(caller).has(CAP_SYS_RESOURCE)
}

/// Does a mode have anything that only the privileged may keep?
pub fn is_privileged(mode: u32) -> bool {
    mode & (libc::S_ISUID | libc::S_ISGID) != 0
}

/// Has a file anything of that, as far as was seen? Who looks at the file may be slower than who changes it: a look that saw
/// something counts always, one that saw nothing only if nobody has seen something since it began.
#[derive(Debug, Default)]
pub struct Seen(AtomicU64);

/// When a look began.
#[derive(Clone, Copy, Debug)]
pub struct Since(u64);

impl Seen {
    /// Read on the hot path.
    pub fn is_privileged(&self) -> bool {
        self.0.load(Acquire) & 1 != 0
    }

    /// To be called before the file is looked at.
    pub fn since(&self) -> Since {
        Since(self.0.load(Acquire))
    }

    pub fn note(&self, mode: u32) {
        if is_privileged(mode) {
            let _ = self.0.fetch_update(AcqRel, Relaxed, |seen| Some((seen | 1).wrapping_add(2)));
        }
    }

    /// The mode is of a look that began then.
    pub fn note_since(&self, since: Since, mode: u32) {
        if is_privileged(mode) {
            self.note(mode);
        } else if since.0 & 1 != 0 {
            let _ = self.0.compare_exchange(since.0, since.0 & !1, AcqRel, Relaxed);
        }
    }
}

/// Changes a file so that the backing filesystem judges as it would judge the caller whether suid and sgid stay. With
/// `FUSE_HANDLE_KILLPRIV_V2`, without which the kernel would ask for an attribute before each write, that is our task.
pub fn judged<T>(caller: &Caller, inode: &Inode, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !inode.privileged.is_privileged() {
        return change();
    }
    let privileges = Privileges::of(caller);
    let without = if privileges.has(CAP_FSETID) { None } else { Some(CAP_FSETID) };
    ids::in_groups(caller.gid, &privileges.groups, without, change)
}

/// The same for a caller of whom the kernel has said that it lacks `CAP_FSETID`.
pub fn without_fsetid<T>(caller: &Caller, inode: &Inode, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !inode.privileged.is_privileged() {
        return change();
    }
    ids::in_groups(caller.gid, &Privileges::of(caller).groups, Some(CAP_FSETID), change)
}

/// Are the names of `trusted.*` attributes listed for this caller?
pub fn sees_trusted(caller: &Caller) -> bool {
    Privileges::of(caller).has(CAP_SYS_ADMIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_capabilities_are_read_from_a_status() {
        let status = "Name:\tx\nGroups:\t12 100 \nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000000010\n";
        let privileges = Privileges::parse(status);
        assert_eq!(privileges, Privileges { effective: 0x10, groups: vec![12, 100] });
        assert!(privileges.has(CAP_FSETID) && !privileges.has(CAP_SYS_ADMIN));
    }
}
