//! What requests do to the account of space: who is counted where, and what is refused.
//!
//! On the thread that serves the request, and only while a capacity is set. Looks at files by their descriptors, and walks
//! through a directory that moves over the border of a quota; takes the lock of an inode's names for a few instructions. No
//! lock is held across a system call.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use nix::sys::stat::FileStat;

use super::call::{Answer, Call, Caller};
use super::inode::Inode;
use super::privileges;
use super::serve::Core;
use super::tree::stat;
use super::usage;
use crate::space::{Claimant, Limit, Members, Quota, Quotas, Reservation};

/// A file whose changes are being counted.
pub struct Counting {
    quotas: Arc<Quotas>,
    members: Members,
    owner: u32,
}

impl Core {
    /// The quotas that count a file.
    fn members(&self, quotas: &Quotas, inode: &Inode, owner: u32) -> Members {
        if quotas.is_empty() {
            return 0;
        }
        let by_path = match quotas.have_paths() {
            true => inode.quota_bits(quotas, self.tree.version()),
            false => Members::MAX,
        };
        by_path & quotas.which(|quota| is_owner(quota, owner))
    }

    /// To be called before a file's blocks, owner or path change.
    pub(super) fn count_from(&self, inode: &Inode, fd: impl AsFd) -> io::Result<Counting> {
        let (stat, quotas) = (stat(fd)?, self.capacity.quotas());
        let members = self.members(&quotas, inode, stat.st_uid);
        inode.usage.begin(stat.st_blocks as u64, members);
        Ok(Counting { quotas, members, owner: stat.st_uid })
    }

    /// To be called after it.
    pub(super) fn count_to(
        &self,
        counting: Counting,
        reservation: Reservation,
        inode: &Inode,
        fd: impl AsFd,
    ) -> io::Result<()> {
        let look = || {
            let stat = stat(&fd)?;
            Ok::<_, io::Error>((stat.st_blocks as u64, self.members(&counting.quotas, inode, stat.st_uid)))
        };
        let (mut seen, mut reservation) = (look()?, reservation);
        loop {
            let (blocks, members) = seen;
            self.capacity.settle(&counting.quotas, std::mem::take(&mut reservation), &inode.usage, blocks, members);
            // Somebody may have looked later and settled sooner.
            match look()? {
                now if now == seen => break,
                now => seen = now,
            }
        }
        // Of a file that is gone, and that nobody has open, no later close gives this back.
        if inode.unlinked.load(Acquire) && inode.opens.load(Acquire) == 0 {
            self.capacity.freed(&counting.quotas, Some(&inode.usage), 0, 0);
        }
        Ok(())
    }

    /// Does something that changes a file's blocks, owner or path.
    pub(super) fn counted<T>(
        &self,
        inode: &Inode,
        fd: impl AsFd,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.capacity.is_set() {
            return act();
        }
        let counting = self.count_from(inode, &fd)?;
        let result = act();
        self.count_to(counting, Reservation::default(), inode, fd)?;
        result
    }

    /// Renames, with these files that move by it. What leaves or enters a quota takes its account along; of a directory that
    /// could do so, all that lies below it.
    pub(super) fn count_moves(
        &self,
        moving: [Option<&Arc<Inode>>; 2],
        rename: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let quotas = self.capacity.quotas();
        if !quotas.have_paths() {
            return rename();
        }
        let (directories, files): (Vec<_>, Vec<_>) = moving.into_iter().flatten().partition(|inode| inode.is_dir());
        let before: Vec<_> = directories.iter().map(|directory| directory.path(self.tree.version())).collect();
        let mut counting = Vec::new();
        for file in files {
            let fd = file.path_fd()?;
            counting.push((file, self.count_from(file, &fd)?, fd));
        }
        rename()?;
        for (file, counting, fd) in counting {
            self.count_to(counting, Reservation::default(), file, fd)?;
        }
        for (directory, from) in directories.into_iter().zip(before) {
            let to = directory.path(self.tree.version());
            if quotas.iter().any(|quota| reaches(quota, &from) || reaches(quota, &to)) {
                // The rename is done, whatever comes of counting.
                let counted = self.count_moved(&quotas, directory, &from, &to);
                if let Err(error) = counted {
                    tracing::error!(%error, "quotas are wrong after a rename: set them anew");
                }
            }
        }
        Ok(())
    }

    /// Moves the account of a directory and of all below it.
    fn count_moved(&self, quotas: &Quotas, directory: &Inode, from: &[u8], to: &[u8]) -> io::Result<()> {
        usage::each_file(directory.path_fd()?, |below, stat| {
            let known = self.tree.known(stat).filter(|inode| inode.usage.is_known());
            let recounted = known.and_then(|inode| self.counted(&inode, inode.path_fd().ok()?, || Ok(())).ok());
            if recounted.is_none() {
                let below = if below == b"/" { &[] } else { below };
                let members = |top: &[u8]| {
                    let path = [top, below].concat();
                    quotas.which(|quota| is_owner(quota, stat.st_uid) && quota.matches_path(&path))
                };
                quotas.move_account(stat.st_blocks as u64, members(from), members(to));
            }
        })
    }

    /// Something was made that may have blocks of its own.
    pub(super) fn count_new(&self, inode: &Inode, owner: u32, blocks: u64) {
        let quotas = self.capacity.quotas();
        let members = self.members(&quotas, inode, owner);
        inode.usage.begin(0, members);
        self.capacity.settle(&quotas, Reservation::default(), &inode.usage, blocks, members);
    }

    /// A file is gone, with its blocks and its inode.
    pub(super) fn count_gone(&self, inode: Option<&Inode>, path: impl FnOnce() -> Vec<u8>, stat: &FileStat) {
        let quotas = self.capacity.quotas();
        if inode.is_none_or(|inode| inode.usage.end()) {
            self.capacity.give_inode();
        }
        let members = match inode {
            Some(inode) => self.members(&quotas, inode, stat.st_uid),
            None if quotas.is_empty() => 0,
            None => {
                let path = path();
                quotas.which(|quota| is_owner(quota, stat.st_uid) && quota.matches_path(&path))
            }
        };
        self.capacity.freed(&quotas, inode.map(|inode| &inode.usage), stat.st_blocks as u64, members);
    }

    /// Takes bytes for blocks that a file is to get: how many there are, and who has refused the rest.
    pub(super) fn reserve(
        &self,
        caller: &Caller,
        call: &Call<'_>,
        counting: &Counting,
        need: u64,
    ) -> (u64, Option<Limit>, Reservation) {
        let Counting { quotas, members, owner } = counting;
        let by_owner = quotas.which(|quota| quota.uid.is_some_and(|uid| uid != 0)) & members;
        let asked = self.capacity.reserved_for_root() > 0 || by_owner != 0;
        let privileged = asked && is_privileged(caller, call, *owner);
        // As on a local filesystem: the quota of another user does not bind root.
        let bound = if privileged { members & !by_owner } else { *members };
        self.capacity.reserve(quotas, need, self.block, Claimant { privileged, bound })
    }

    /// Makes a file or a directory, if there is an inode for it, and for a directory a block.
    pub(super) fn making(
        &self,
        caller: &Caller,
        call: &Call<'_>,
        act: impl FnOnce() -> io::Result<Answer>,
    ) -> io::Result<Answer> {
        if !self.capacity.limits() {
            return act();
        }
        if let Call::Mkdir { .. } = call {
            self.find_block(caller, call)?;
        }
        if !self.capacity.take_inode() {
            return self.refuse(caller, call, libc::ENOSPC);
        }
        act().inspect_err(|_| self.capacity.give_inode())
    }

    /// Is there a block for a directory?
    fn find_block(&self, caller: &Caller, call: &Call<'_>) -> io::Result<()> {
        let quotas = self.capacity.quotas();
        let members = match call.names().next() {
            Some((parent, name)) if !quotas.is_empty() => {
                let path = self.tree.get(parent)?.child_path(name);
                quotas.which(|quota| is_owner(quota, caller.uid) && quota.matches_path(&path))
            }
            _ => 0,
        };
        let counting = Counting { quotas, members, owner: caller.uid };
        let (_, limit, reservation) = self.reserve(caller, call, &counting, self.block);
        self.capacity.give_back(&counting.quotas, reservation);
        limit.map_or(Ok(()), |limit| self.refuse(caller, call, limit.errno()))
    }

    /// Refuses a request for lack of space.
    pub(super) fn refuse<T>(&self, caller: &Caller, call: &Call<'_>, errno: i32) -> io::Result<T> {
        self.inject_space(caller, call, None, Some(errno));
        Err(io::Error::from_raw_os_error(errno))
    }
}

fn is_owner(quota: &Quota, owner: u32) -> bool {
    quota.uid.is_none_or(|uid| uid == owner)
}

/// Could a quota count some of what lies below a directory?
fn reaches(quota: &Quota, directory: &[u8]) -> bool {
    let Some(glob) = &quota.path else { return false };
    let text = glob.glob().glob().as_bytes();
    let literal = &text[..text.iter().position(|byte| b"*?[{\\".contains(byte)).unwrap_or(text.len())];
    literal.starts_with(directory) || directory.starts_with(literal)
}

/// What the kernel writes back of a mapping counts as written by the file's owner.
fn is_privileged(caller: &Caller, call: &Call<'_>, owner: u32) -> bool {
    match call {
        Call::Write { origin, .. } if origin.writeback => owner == 0,
        _ => caller.uid == 0 || privileges::has_resource(caller),
    }
}
