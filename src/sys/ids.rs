//! Acting as the caller: the filesystem identity, capabilities and umask of the calling thread.
//!
//! The raw system calls, because glibc's wrappers change all threads. A reader takes on the caller's identity for one
//! creating call, so that the backing filesystem decides about owner, group, sgid directories and default ACLs just as
//! it would have without us.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;

use super::check;

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn capabilities() -> io::Result<[CapData; 2]> {
    let mut header = CapHeader { version: VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 writes exactly two `CapData`; both pointers live for the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    Ok(data)
}

fn set_capabilities(data: &[CapData; 2]) -> io::Result<()> {
    let mut header = CapHeader { version: VERSION_3, pid: 0 };
    // SAFETY: version 3 reads exactly two `CapData`; both pointers live for the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) }).map(drop)
}

/// The capabilities of this process at its start; they do not change.
fn own_capabilities() -> Option<&'static [CapData; 2]> {
    static OWN: OnceLock<Option<[CapData; 2]>> = OnceLock::new();
    OWN.get_or_init(|| capabilities().ok()).as_ref()
}

fn set_fsuid(uid: u32) {
    // SAFETY: takes and gives plain numbers; acts on this thread only.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
}

fn set_fsgid(gid: u32) {
    // SAFETY: takes and gives plain numbers; acts on this thread only.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
}

fn set_groups(groups: &[u32]) {
    // SAFETY: the kernel reads `groups.len()` numbers, which live for the call; acts on this thread only.
    unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
}

/// May this process take on identities at all?
pub fn can_impersonate() -> bool {
    const SETGID: u32 = 1 << 6;
    const SETUID: u32 = 1 << 7;
    own_capabilities().is_some_and(|caps| caps[0].effective & (SETUID | SETGID) == SETUID | SETGID)
}

/// Runs `act` with the caller's filesystem identity on this thread, but with our capabilities: whether the caller may
/// do it was decided by the kernel (`default_permissions`), with the caller's groups.
///
/// # Errors
/// `EPERM` for an identity that we may not take on: what we would make would belong to somebody else.
pub fn as_caller<T>(uid: u32, gid: u32, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = own();
    if (uid, gid) == (own.uid, own.gid) {
        return act();
    }
    if !can_impersonate() {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let _back = Back { groups: false };
    set_fsgid(gid);
    set_fsuid(uid);
    // Changing fsuid away from 0 takes the filesystem capabilities out of the effective set.
    if let Some(caps) = own_capabilities() {
        let _ = set_capabilities(caps);
    }
    act()
}

/// Runs `act` on this thread as a member of these groups, and without one of our capabilities if that is wanted. Where we
/// may not do so, we have no privileges that could matter.
pub fn in_groups<T>(gid: u32, groups: &[u32], without: Option<u32>, act: impl FnOnce() -> T) -> T {
    let Some(caps) = own_capabilities().filter(|_| can_impersonate()) else { return act() };
    let _back = Back { groups: true };
    set_fsgid(gid);
    set_groups(groups);
    if let Some(capability) = without {
        let mut caps = *caps;
        caps[0].effective &= !(1 << capability);
        let _ = set_capabilities(&caps);
    }
    act()
}

/// Who this process is; that does not change.
struct Own {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

fn own() -> &'static Own {
    static OWN: OnceLock<Own> = OnceLock::new();
    OWN.get_or_init(|| Own {
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        groups: nix::unistd::getgroups().unwrap_or_default().into_iter().map(|group| group.as_raw()).collect(),
    })
}

/// Takes the thread back, also when what it did panics.
struct Back {
    groups: bool,
}

impl Drop for Back {
    fn drop(&mut self) {
        let own = own();
        set_fsuid(own.uid);
        set_fsgid(own.gid);
        if self.groups {
            set_groups(&own.groups);
        }
        if let Some(caps) = own_capabilities() {
            let _ = set_capabilities(caps);
        }
    }
}

/// Runs `act` with this umask, which is then this thread's until another is wanted.
///
/// The umask belongs to the `fs_struct` that threads share; a thread that comes here first gets one of its own.
pub fn with_umask<T>(umask: u32, act: impl FnOnce() -> T) -> T {
    thread_local! {
        static OWN_FS: bool = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok();
        static NOW: Cell<Option<u32>> = const { Cell::new(None) };
    }
    if OWN_FS.with(|own| *own) && NOW.replace(Some(umask)) != Some(umask) {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    }
    act()
}
