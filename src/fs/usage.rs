//! How much the tree uses: for setting the capacity and quotas.
//!
//! Run by a helper of the control thread, and by a reader for a directory that moves over the border of a quota. Walks
//! the backing directory by descriptors, without following symlinks or leaving its filesystem; the mount itself is
//! never touched. Measuring sets nothing: what was measured may not be wanted any more.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;
use std::sync::atomic::Ordering::Acquire;

use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, Mode};

use super::serve::Core;
use super::tree::stat_at;
use crate::space::{Limits, Quotas};
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

/// What the free bytes keep for root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reserve {
    Bytes(u64),
    /// Of all.
    Percent(f64),
}

/// What a client may ask for, together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wanted {
    pub size: Option<Size>,
    pub reserve: Option<Reserve>,
    /// So many more may be made.
    pub inodes: Option<u64>,
    pub late: bool,
}

/// What the limits of the mount would be.
///
/// # Errors
/// When the backing directory cannot be asked or counted.
pub fn measure(core: &Core, wanted: Wanted) -> io::Result<Limits> {
    let bytes = wanted.size.map(|size| total_and_free(core, size)).transpose()?;
    let total = bytes.map_or(0, |(total, _)| total);
    let reserve = match wanted.reserve {
        None => 0,
        Some(Reserve::Bytes(bytes)) => bytes,
        Some(Reserve::Percent(percent)) => (total as f64 * percent / 100.0) as u64,
    };
    let real = nix::sys::statvfs::fstatvfs(core.tree.backing())?;
    let inodes = wanted.inodes.map(|free| (real.files().saturating_sub(real.files_free()).saturating_add(free), free));
    Ok(Limits { bytes, reserve, inodes, late: wanted.late })
}

/// Counts for each quota anew what is used.
///
/// # Errors
/// When the backing directory cannot be counted; then what was counted before stays.
pub fn count(core: &Core, quotas: &Quotas) -> io::Result<()> {
    if quotas.is_empty() {
        return Ok(());
    }
    let mut used = vec![0; quotas.iter().count()];
    each_file(core.tree.backing(), |path, stat| {
        for (quota, used) in quotas.iter().zip(&mut used) {
            if quota.uid.is_none_or(|uid| uid == stat.st_uid) && quota.matches_path(path) {
                *used += stat.st_blocks as u64 * 512;
            }
        }
    })?;
    quotas.iter().zip(used).for_each(|(quota, used)| quota.set_used(used));
    Ok(())
}

impl Core {
    /// Sets what was measured.
    pub fn set_capacity(&self, limits: Limits) {
        self.forget_usage();
        self.capacity.set(limits);
    }

    /// Sets quotas that were counted: from the moment that they are in force they refuse.
    pub fn set_quotas(&self, quotas: Quotas) {
        self.forget_usage();
        self.capacity.set_quotas(quotas);
    }

    /// From here on changes count as of what the files are now.
    fn forget_usage(&self) {
        for inode in self.tree.all() {
            inode.usage.forget(!inode.unlinked.load(Acquire));
        }
    }
}

fn total_and_free(core: &Core, size: Size) -> io::Result<(u64, u64)> {
    Ok(match size {
        Size::Free(free) => {
            let real = nix::sys::statvfs::fstatvfs(core.tree.backing())?;
            // Some tell more free than there is.
            let used = real.blocks().saturating_sub(real.blocks_free()) * real.fragment_size();
            (used.saturating_add(free), free)
        }
        Size::Total(total) => (total, total.saturating_sub(used_bytes(core.tree.backing())?)),
        Size::UsedPercent(percent) => {
            let used = used_bytes(core.tree.backing())?;
            let total = (used as f64 * 100.0 / percent) as u64;
            (total, total - used.min(total))
        }
    })
}

/// Bytes of all blocks of all files below a directory; hard links once.
///
/// # Errors
/// When a directory cannot be read.
pub fn used_bytes(root: &File) -> io::Result<u64> {
    let mut used = 0;
    each_file(root, |_, stat| used += stat.st_blocks as u64 * 512)?;
    Ok(used)
}

/// Visits a directory and all below it, with paths from there; hard links once, by the first name that is met.
pub(super) fn each_file(root: impl AsFd, mut visit: impl FnMut(&[u8], &FileStat)) -> io::Result<()> {
    let mut linked = HashSet::new();
    let home = nix::sys::stat::fstat(&root)?;
    visit(b"/", &home);
    // Opened one at a time, when their turn comes: a directory may have more children than we may have descriptors.
    let mut waiting = vec![(Rc::new(open_directory(&root, OsStr::new("."))?), OsString::from("."), Vec::new())];
    let mut buffer = vec![0; 32 << 10];
    while let Some((parent, name, path)) = waiting.pop() {
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
                let path = [&path, &b"/"[..], entry.name.as_bytes()].concat();
                visit(&path, &stat);
                if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
                    waiting.push((directory.clone(), entry.name.to_os_string(), path));
                }
            }
        }
    }
    Ok(())
}

fn open_directory(parent: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
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
