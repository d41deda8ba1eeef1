//! The few ioctls of ordinary files that FUSE passes with fixed sizes: attributes (`chattr`) and project ids.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u32 = 0x801C_581F;
const FS_IOC_FSSETXATTR: u32 = 0x401C_5820;

/// Forwards one of the commands above to a backing file: what goes in, what comes out.
///
/// # Errors
/// `ENOTTY` for any other command; a wrong size of the input is `EINVAL`.
pub fn forward(fd: impl AsFd, command: u32, input: &[u8], output_size: usize) -> io::Result<Vec<u8>> {
    // FSXATTR is 28 bytes, flags are an int in a command that says long.
    let mut buffer = [0u8; 32];
    let (reads, size) = match command {
        FS_IOC_GETFLAGS => (false, 4),
        FS_IOC_SETFLAGS => (true, 4),
        FS_IOC_FSGETXATTR => (false, 28),
        FS_IOC_FSSETXATTR => (true, 28),
        _ => return Err(io::Error::from_raw_os_error(libc::ENOTTY)),
    };
    if reads {
        let input = input.get(..size).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        buffer[..size].copy_from_slice(input);
    }
    // SAFETY: each of the four commands reads or writes at most 28 bytes behind the pointer; the buffer has 32 and
    // lives for the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::c_ulong::from(command), buffer.as_mut_ptr()) })?;
    let out = if reads { 0 } else { output_size.min(buffer.len()) };
    Ok(buffer[..out].to_vec())
}
