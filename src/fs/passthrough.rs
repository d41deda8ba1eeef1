//! Files that the kernel serves by itself, at the speed of the backing filesystem: `mount --passthrough GLOB`.
//!
//! Decided by the readers at each open, under a lock of the file's own for a few instructions. The kernel (Linux 6.9 and
//! later, Documentation/filesystems/fuse/fuse-passthrough.rst) binds us: all open handles of a file are passed through or
//! none is, with one backing id for all of them that lives until the last is closed; and what is passed through cannot be
//! taken back. We see nothing of its reads, writes and mappings; fsync, truncate, fallocate, names and attributes come to
//! us as ever. So a file that a fault is wanted for is not passed through: a rule on its data, a capacity, dropped
//! writes; nor is one with suid or sgid.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use fuser::BackingId;
use globset::GlobSet;
use parking_lot::Mutex;

use super::call::{Reply, Served};
use super::files::OpenFile;
use super::inode::Inode;
use super::ops::data::open_mode;
use super::serve::Core;
use crate::fault::{Fault, Op, Rule};

/// The open handles of one file, and who serves them.
#[derive(Debug, Default)]
pub struct Handles(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    by_us: u32,
    by_kernel: u32,
    backing: Option<Arc<BackingId>>,
}

impl Handles {
    /// Takes one more handle: served by the kernel if all others are, or if there is none and `wanted` gives a backing id.
    fn open(&self, wanted: impl FnOnce() -> Option<BackingId>) -> Option<Arc<BackingId>> {
        if let Some(joined) = self.0.lock().join() {
            return joined;
        }
        let new = wanted();
        let mut state = self.0.lock();
        if let Some(joined) = state.join() {
            drop(state);
            // Somebody was faster; to close this one is a call to the kernel.
            drop(new);
            return joined;
        }
        state.backing = new.map(Arc::new);
        let count = if state.backing.is_some() { &mut state.by_kernel } else { &mut state.by_us };
        *count += 1;
        state.backing.clone()
    }

    pub fn are_by_kernel(&self) -> bool {
        self.0.lock().by_kernel > 0
    }

    /// Gives one back; the backing id goes with the last one.
    fn close(&self, by_kernel: bool) {
        let mut state = self.0.lock();
        let count = if by_kernel { &mut state.by_kernel } else { &mut state.by_us };
        *count = count.saturating_sub(1);
        let id = if state.by_kernel == 0 { state.backing.take() } else { None };
        drop(state);
        // To close it is a call to the kernel.
        drop(id);
    }
}

impl State {
    /// One more handle, as the others are; none if there are no others.
    fn join(&mut self) -> Option<Option<Arc<BackingId>>> {
        if self.by_kernel > 0 {
            self.by_kernel += 1;
            return Some(self.backing.clone());
        }
        (self.by_us > 0).then(|| {
            self.by_us += 1;
            None
        })
    }
}

/// Does the rule concern what the kernel does by itself for such a file, or does it need to know of it?
fn is_blind_to(rule: &Rule) -> bool {
    let loses = |op: Op| rule.place.ops.may_concern(op) && rule.faults().any(|fault| *fault == Fault::Drop);
    let concerns = |op: Op| rule.place.ops.may_concern(op);
    rule.spec.enabled
        && ([Op::Read, Op::Write].into_iter().any(concerns)
            || [Op::Setattr, Op::Fallocate, Op::CopyFileRange].into_iter().any(loses))
}

impl Core {
    /// Decides who serves a handle that is about to be opened.
    pub(super) fn serve_handle(&self, inode: &Arc<Inode>, file: &File, flags: i32, reply: &Reply) -> Served {
        let by_us = || Served::ByUs(open_mode(flags, self.shortens_reads(inode)));
        let Some(globs) = &self.passthrough else { return by_us() };
        let wanted = || {
            let wanted = self.wants_passthrough(globs, inode);
            wanted.then(|| reply.open_backing(file).inspect_err(tell_refused).ok()).flatten()
        };
        match inode.handles.open(wanted) {
            Some(id) => Served::ByKernel(id),
            None => by_us(),
        }
    }

    pub(super) fn close_handle(&self, file: &OpenFile) {
        if self.passthrough.is_some() {
            file.inode.handles.close(file.by_kernel);
        }
    }

    fn wants_passthrough(&self, globs: &GlobSet, inode: &Arc<Inode>) -> bool {
        inode.is_regular()
            // Whether suid and sgid survive a write, the kernel would judge by us.
            && !inode.privileged.is_privileged()
            && !self.capacity.limits()
            && !inode.undoable.load(Acquire)
            && inode.paths().any(|one| globs.is_match(OsString::from_vec(one)))
            && !self.arming.plan().rules.iter().any(|rule| is_blind_to(rule) && is_about(rule, inode))
    }

    /// The open handles that a rule cannot reach, because the kernel serves them: number and path.
    pub fn out_of_reach(&self, rule: &Rule) -> Vec<(u64, String)> {
        if self.passthrough.is_none() || !is_blind_to(rule) {
            return Vec::new();
        }
        let version = self.tree.version();
        let meant = |file: &OpenFile| file.by_kernel && is_about(rule, &file.inode);
        let path = |file: &OpenFile| String::from_utf8_lossy(&file.inode.path(version)).into_owned();
        let files = self.files.all().into_iter().filter(|(_, file)| meant(file));
        files.map(|(fh, file)| (fh, path(&file))).collect()
    }
}

/// Is the rule about a file, under any of its names?
pub fn is_about(rule: &Rule, inode: &Arc<Inode>) -> bool {
    let paths: Vec<Vec<u8>> = inode.paths().collect();
    rule.path_matches(paths.iter().map(Vec::as_slice))
}

fn tell_refused(error: &io::Error) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| tracing::warn!(%error, "the kernel refuses to pass a file through: such files are served by us"));
}
