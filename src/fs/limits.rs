//! The limits of our own process, which must not become those of the programs that we serve.
//!
//! Called once, on the main thread, before anything is mounted.

use std::fs;
use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

/// Every file that a program has open is open here too; and a write of ours must not end us at the size that a shell has
/// set for its children. Gives how many descriptors we may have.
///
/// # Errors
/// When the limits cannot be read.
pub fn raise() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|most| most.trim().parse().ok());
    let most = most.unwrap_or(hard).max(hard);
    let raised = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    let descriptors = if raised.is_ok() { most } else { hard };
    let _ = raised.or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));

    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
    let raised = setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY);
    if raised.is_err() {
        let _ = setrlimit(Resource::RLIMIT_FSIZE, hard, hard);
        if hard != RLIM_INFINITY {
            tracing::warn!(
                bytes = hard,
                "no larger files can be written here: we were started with that limit (ulimit -f)"
            );
        }
    }
    crate::sys::ignore(Signal::SIGXFSZ);
    Ok(descriptors)
}
