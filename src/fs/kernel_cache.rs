//! Making the kernel forget what would hide a fault: pages, attributes and names that it keeps.
//!
//! Run by a helper thread of its own for each change of the rules, because the kernel blocks such a notice while a
//! request for the same pages or names is open (parked, for instance); never by a reader, nor by the control thread.
//! Costs about two microseconds a file.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use fuser::INodeNo;

use super::inode::Inode;
use super::serve::Core;
use crate::fault::{Fault, Op, Rule, Timing};
use crate::sys::notify;

/// How long requests that began before a change may take to be through.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// Cleaning under way.
#[derive(Debug)]
pub struct Cleaning {
    left: Arc<AtomicUsize>,
    done: Receiver<()>,
}

impl Cleaning {
    /// Files not yet done; 0 when finished.
    pub fn left(&self) -> usize {
        self.left.load(Acquire)
    }

    /// Closed when finished.
    pub fn done(&self) -> &Receiver<()> {
        &self.done
    }
}

/// Could what the kernel keeps hide any of these rules?
pub fn can_hide(rules: &[Arc<Rule>]) -> bool {
    rules.iter().any(|rule| wants_pages(rule) || wants_attributes(rule) || wants_names(rule))
}

/// Of rules that are out of force: does the kernel keep wrong things that it was told because of them?
pub fn leaves_traces(rule: &Rule) -> bool {
    use Fault::{Attr, BadSectors, Corrupt, Error, Misdirect, Short};
    // Of a failed read there are pages without contents, which we count.
    let wrong =
        |fault: &Fault| matches!(fault, Corrupt(_) | Misdirect(_) | Attr(_) | Error { .. } | BadSectors(_) | Short(_));
    rule.faults().any(wrong) && (wants_pages(rule) || wants_attributes(rule) || wants_names(rule))
}

fn wants_pages(rule: &Rule) -> bool {
    rule.place.ops.has(Op::Read)
}

fn wants_attributes(rule: &Rule) -> bool {
    rule.place.ops.has(Op::Getattr) || rule.faults().any(Fault::makes_cached_wrong)
}

fn wants_names(rule: &Rule) -> bool {
    let fails_after = |fault: &Fault| matches!(fault, Fault::Error { timing: Timing::After, .. });
    rule.place.ops.has(Op::Lookup) || rule.faults().any(fails_after)
}

/// Starts a helper that waits for the requests under way, goes through all known files that the rules are about, and
/// calls `finished` at the end.
pub fn clean(core: &Arc<Core>, rules: Vec<Arc<Rule>>, finished: impl FnOnce() + Send + 'static) -> Cleaning {
    let (sender, done) = bounded::<()>(0);
    let left = Arc::new(AtomicUsize::new(0));
    if !core.readers.wait(UNDER_WAY) {
        tracing::warn!("a request of before the change is still under way: what it brings may be kept by the kernel");
    }
    let mut files: Vec<_> = core.tree.all().into_iter().filter(|inode| is_meant(inode, &rules)).collect();
    // Files that a parked request holds come last, so that they keep no other from being done.
    let held = core.parked_files();
    files.sort_by_key(|inode| held.contains(&inode.id));
    left.store(files.len(), Release);
    let (core, count) = (core.clone(), left.clone());
    let helper = std::thread::Builder::new().name("kernel-cache".into()).spawn(move || {
        for inode in files {
            forget(&core, &inode, &rules);
            count.fetch_sub(1, AcqRel);
        }
        drop(sender);
        finished();
    });
    if let Err(error) = helper {
        tracing::error!(%error, "no thread to clean the kernel's caches");
    }
    Cleaning { left, done }
}

/// Any path below a directory counts for its names: a lookup is made in the directory.
fn is_meant(inode: &Arc<Inode>, rules: &[Arc<Rule>]) -> bool {
    rules.iter().any(|rule| {
        let paths: Vec<Vec<u8>> = inode.paths().collect();
        rule.path_matches(paths.iter().map(Vec::as_slice))
    })
}

fn forget(core: &Core, inode: &Inode, rules: &[Arc<Rule>]) {
    let Some(notifier) = core.notifier.get() else { return };
    // A failure means that the kernel does not know the file any more, or that the mount is gone.
    if rules.iter().any(|rule| wants_pages(rule)) && inode.is_regular() {
        core.holds.forget(Some(inode.id));
        let _ = notifier.inval_inode(INodeNo(inode.id), 0, 0);
    } else if rules.iter().any(|rule| wants_attributes(rule)) {
        let _ = notifier.inval_inode(INodeNo(inode.id), -1, 0);
    }
    if let (true, Some(device)) = (rules.iter().any(|rule| wants_names(rule)), core.device.get()) {
        for (parent, name) in inode.links() {
            let _ = notify::expire_entry(device, parent, name.as_encoded_bytes());
        }
    }
}
