//! What others change in the backing directory, of files that are open here.
//!
//! Names and attributes the kernel asks for again after a second, and at an open it is told whether to keep a file's
//! pages; but of a file that stays open it would go on reading what it has. So one thread of its own looks at the open
//! files once a second, as the kernel's timeout for attributes would, and makes the kernel forget the pages of those that
//! somebody else has changed. It may wait for the disk, and for the kernel when a request for such a page is open; nobody
//! waits for it. Takes the lock of the table of open files for a copy of it. Beside that it gives memory back after the
//! kernel has forgotten many files.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use fuser::INodeNo;

use super::files::OpenFile;
use super::serve::{Core, TIMEOUT};
use super::tree::stat;
use crate::sys::memory;

/// The kernel goes on forgetting for a while: memory is given back so often after the table has shrunk.
const TRIMS: u32 = 10;

/// Runs until the other end of `stop` is dropped.
pub fn run(core: &Arc<Core>, stop: &Receiver<()>) {
    let mut trims = 0;
    while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(TIMEOUT) {
        // One handle a file is enough, looked up when its turn comes: meanwhile it may be closed.
        let files = core.files.all().into_iter().filter(|(_, file)| !file.by_kernel && file.inode.is_regular());
        let handles: HashMap<u64, u64> = files.map(|(fh, file)| (file.inode.id, fh)).collect();
        // The kernel would keep us waiting for as long as the request waits.
        let held = core.parked_files();
        let free = handles.into_iter().filter(|(ino, _)| !held.contains(ino));
        free.filter_map(|(_, fh)| core.files.get(fh).ok()).for_each(|file| look_at(core, &file));
        if core.tree.shrink() {
            trims = TRIMS;
        }
        if trims > 0 {
            trims -= 1;
            memory::give_back();
        }
    }
}

fn look_at(core: &Core, file: &OpenFile) {
    let ours = file.inode.changed.load(Acquire);
    let Ok(stat) = stat(&file.file) else { return };
    let same = file.inode.stamp(&stat);
    if file.inode.foreign.swap(false, AcqRel) || (!same && !ours) {
        core.holds.forget(Some(file.inode.id));
        if let Some(notifier) = core.notifier.get() {
            // Fails when the kernel does not know the file any more, or the mount is gone.
            let _ = notifier.inval_inode(INodeNo(file.inode.id), 0, 0);
        }
    }
}
