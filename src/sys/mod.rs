//! Linux interfaces that no library wraps as we need them, one a file. The only place with `unsafe`.
//!
//! Most functions are one or two system calls with an owned or borrowed descriptor; none takes a lock, and all can be
//! called from any thread (those of [`ids`] act on the calling thread alone).

#![allow(unsafe_code)]

pub mod dents;
pub mod fiemap;
pub mod handle;
pub mod ids;
pub mod ioctl;
pub mod memory;
pub mod mounts;
pub mod notify;
pub mod stat;
pub mod xattr;

use std::io;

/// The result of a call that answers -1 with errno set.
fn check(result: impl TryInto<i64>) -> io::Result<i64> {
    match result.try_into() {
        Ok(-1) | Err(_) => Err(io::Error::last_os_error()),
        Ok(value) => Ok(value),
    }
}

/// Ignores a signal from now on, in all threads.
pub fn ignore(signal: nix::sys::signal::Signal) {
    // SAFETY: no handler of ours is installed that could run in the middle of anything.
    let _ = unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn) };
}
