//! A memory barrier on all running threads of this process: `membarrier(2)`.
//!
//! Lets a rare writer pay for the ordering that frequent readers would otherwise pay for with a fence each.

use std::io;

use super::check;

const PRIVATE_EXPEDITED: i32 = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

fn call(command: i32) -> io::Result<()> {
    // SAFETY: takes plain numbers and touches no memory of ours.
    check(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }).map(drop)
}

/// After this, every other thread of the process has passed a full barrier since the call.
///
/// # Errors
/// `ENOSYS` on a kernel without it.
pub fn all_threads() -> io::Result<()> {
    call(REGISTER_PRIVATE_EXPEDITED)?;
    call(PRIVATE_EXPEDITED)
}
