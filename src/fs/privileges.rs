//! What a caller may do that FUSE does not tell us: its groups and capabilities.
//!
//! The kernel decides about access itself (`default_permissions`). Left to us is what a local filesystem decides inside
//! an operation: whether suid and sgid survive a change, and who sees `trusted.*` attributes. Read from procfs on the
//! reader, and only for a file that has such bits or names; procfs never waits for the mount. No locks.

use std::fs;

use nix::sys::stat::FileStat;

use super::call::Caller;

/// capability(7)
const CAP_FSETID: u32 = 4;
const CAP_SYS_ADMIN: u32 = 21;

/// What procfs tells of a thread.
#[derive(Debug, Default, PartialEq, Eq)]
struct Privileges {
    effective: u64,
    groups: Vec<u32>,
}

impl Privileges {
    /// A caller that cannot be looked at (it is outside our pid namespace, or the kernel itself) is judged by its user.
    fn of(caller: &Caller) -> Privileges {
        let status = fs::read_to_string(format!("/proc/{}/status", caller.tid));
        let all = if caller.uid == 0 { u64::MAX } else { 0 };
        let mut privileges =
            status.map_or(Privileges { effective: all, groups: Vec::new() }, |status| Privileges::parse(&status));
        privileges.groups.push(caller.gid);
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

    fn is_in(&self, group: u32) -> bool {
        self.groups.contains(&group)
    }
}

/// Does a mode have anything that only the privileged may keep?
pub fn is_privileged(mode: u32) -> bool {
    mode & (libc::S_ISUID | libc::S_ISGID) != 0
}

/// The mode that a regular file has after a change of its contents by this caller; the rule is the kernel's,
/// `setattr_should_drop_suidgid` in fs/attr.c: sgid without group execution once meant mandatory locking, and stays for
/// members of the group.
pub fn mode_after_change(caller: &Caller, stat: &FileStat) -> u32 {
    let mode = stat.st_mode;
    if !is_privileged(mode) || mode & libc::S_IFMT != libc::S_IFREG {
        return mode;
    }
    let privileges = Privileges::of(caller);
    if privileges.has(CAP_FSETID) {
        return mode;
    }
    let keeps_sgid = mode & libc::S_IXGRP == 0 && privileges.is_in(stat.st_gid);
    mode & !libc::S_ISUID & if keeps_sgid { !0 } else { !libc::S_ISGID }
}

/// The mode that a file has after this caller has given it an access ACL: `posix_acl_update_mode` in fs/posix_acl.c.
pub fn mode_after_acl(caller: &Caller, stat: &FileStat) -> u32 {
    if stat.st_mode & libc::S_ISGID == 0 {
        return stat.st_mode;
    }
    let privileges = Privileges::of(caller);
    match privileges.has(CAP_FSETID) || privileges.is_in(stat.st_gid) {
        true => stat.st_mode,
        false => stat.st_mode & !libc::S_ISGID,
    }
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
        assert!(privileges.has(CAP_FSETID) && !privileges.has(CAP_SYS_ADMIN) && privileges.is_in(100));
    }
}
