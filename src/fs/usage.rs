//! How much the tree uses: for setting the capacity.
//!
//! Run by a helper of the control thread. Walks the backing directory by descriptors, without following symlinks or
//! leaving its filesystem; the mount itself is never touched.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::serve::Core;
use super::tree::stat_at;
use crate::sys::dents;

/// What a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// So many bytes free from now on. Nothing is counted.
    Free(u64),
    /// So many bytes in all, of which what is there is used.
    Total(u64),
    /// What is there is this part of all.
    UsedPercent(f64),
}

/// Sets the capacity of the mount.
///
/// # Errors
/// When the backing directory cannot be asked or counted.
pub fn set_capacity(core: &Core, size: Size) -> io::Result<()> {
    let (total, free) = match size {
        Size::Free(free) => {
            let real = nix::sys::statvfs::fstatvfs(core.tree.backing())?;
            let used = (real.blocks() - real.blocks_free()) * real.fragment_size();
            (used.saturating_add(free), free)
        }
        Size::Total(total) => (total, total.saturating_sub(used_bytes(core.tree.backing())?)),
        Size::UsedPercent(percent) => {
            let used = used_bytes(core.tree.backing())?;
            let total = (used as f64 * 100.0 / percent) as u64;
            (total, total - used.min(total))
        }
    };
    for inode in core.tree.all() {
        inode.usage.forget();
    }
    core.capacity.set(total, free);
    Ok(())
}

/// Bytes of all blocks of all files below a directory; hard links once.
///
/// # Errors
/// When a directory cannot be read.
pub fn used_bytes(root: &File) -> io::Result<u64> {
    let mut linked = HashSet::new();
    let home = nix::sys::stat::fstat(root)?;
    // Opened one at a time, when their turn comes: a directory may have more children than we may have descriptors.
    let mut waiting = vec![(Rc::new(open_directory(root, OsStr::new("."))?), OsString::from("."))];
    let mut used = home.st_blocks as u64 * 512;
    let mut buffer = vec![0; 32 << 10];
    while let Some((parent, name)) = waiting.pop() {
        let directory = match open_directory(&*parent, &name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => Rc::new(other?),
        };
        loop {
            let read = dents::read(&*directory, &mut buffer)?;
            if read == 0 {
                break;
            }
            for entry in dents::entries(&buffer[..read]).filter(|entry| entry.name != "." && entry.name != "..") {
                // What is gone by now uses nothing.
                let Ok(stat) = stat_at(&*directory, entry.name) else { continue };
                if stat.st_dev != home.st_dev || (stat.st_nlink > 1 && !linked.insert(stat.st_ino)) {
                    continue;
                }
                used += stat.st_blocks as u64 * 512;
                if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
                    waiting.push((directory.clone(), entry.name.to_os_string()));
                }
            }
        }
    }
    Ok(used)
}

fn open_directory(parent: impl std::os::fd::AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(parent, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_once_with_its_hard_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/a"), vec![1; 100_000]).unwrap();
        let before = used_bytes(&File::open(dir.path()).unwrap()).unwrap();
        std::fs::hard_link(dir.path().join("sub/a"), dir.path().join("b")).unwrap();
        assert_eq!(used_bytes(&File::open(dir.path()).unwrap()).unwrap(), before);
        assert!((100_000..300_000).contains(&before), "{before}");
    }
}
