//! The notice to the kernel that fuser does not have: a name is to be looked up again, without being taken away.
//!
//! Thread: a helper's, never a reader, because the kernel waits for requests on names of the same directory. Locks: none.
//! Must never: be sent for what the kernel does not ask us about.

use std::io;
use std::os::fd::AsFd;

/// `enum fuse_notify_code` and the flags of `struct fuse_notify_inval_entry_out`: include/uapi/linux/fuse.h.
const FUSE_NOTIFY_INVAL_ENTRY: i32 = 3;
const FUSE_EXPIRE_ONLY: u32 = 1;

/// Ends the time for which the kernel believes what it was told of a name. The other notice, that the name is invalid, would
/// also detach what is mounted there, and take the path from those who have it open or work in it. Kernels before 6.2 do
/// that here too.
///
/// # Errors
/// When the kernel does not know the name, or when there is no mount any more.
pub fn expire_entry(device: impl AsFd, parent: u64, name: &[u8]) -> io::Result<()> {
    let length = 16 + 16 + name.len() + 1;
    let mut notice = Vec::with_capacity(length);
    notice.extend((length as u32).to_ne_bytes());
    notice.extend(FUSE_NOTIFY_INVAL_ENTRY.to_ne_bytes());
    notice.extend(0u64.to_ne_bytes());
    notice.extend(parent.to_ne_bytes());
    notice.extend((name.len() as u32).to_ne_bytes());
    notice.extend(FUSE_EXPIRE_ONLY.to_ne_bytes());
    notice.extend(name);
    notice.push(0);
    nix::unistd::write(device, &notice)?;
    Ok(())
}
