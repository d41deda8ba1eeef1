//! Making the kernel forget what would hide a fault: pages, attributes and names that it keeps.
//!
//! On threads of its own, because the kernel blocks such a notice while a request for the same pages or names is open
//! (parked, for instance); never by a reader, the control thread or the clock. At one file, or at the names of one
//! directory, is one thread at a time: who comes meanwhile leaves it to that one, which then does it once more. So no
//! more threads hang than files and directories are held, however often the rules change. Locks are held for a look at
//! a table. Costs about two microseconds a file.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use fuser::INodeNo;
use parking_lot::Mutex;

use super::inode::Inode;
use super::serve::Core;
use super::workers::Workers;
use crate::fault::{Fault, Op, Rule, Timing};
use crate::sys::notify;

/// How long requests that began before a change may take to be through.
const UNDER_WAY: Duration = Duration::from_secs(1);
/// More hang only where more files and directories are held; then changes wait for one of them.
const MOST: usize = 256;
/// How long the next turns of the clock wait for what the last ones left to be cleaned.
const TURN: Duration = Duration::from_millis(100);

/// What cleans for one mount.
pub struct Cleaners {
    pool: Workers,
    /// By file: pages and attributes.
    files: Busy,
    /// By directory: names.
    names: Busy,
    /// Rules that the clock has turned since somebody looked; none while nobody is going to.
    turned: Mutex<Option<Vec<Arc<Rule>>>>,
}

impl Default for Cleaners {
    fn default() -> Self {
        let (files, names, turned) = Default::default();
        Cleaners { pool: Workers::new("kernel-cache", MOST), files, names, turned }
    }
}

/// Where somebody is, and what has come meanwhile.
#[derive(Default)]
struct Busy(Mutex<HashMap<u64, Option<Again>>>);

/// To be done once more.
#[derive(Default)]
struct Again {
    /// The contents too, and not only attributes.
    pages: bool,
    awaited: Vec<Arc<Left>>,
}

impl Busy {
    /// Does it, or leaves it to who is there already. `act` is told whether it repeats, and whether pages are meant.
    fn once_at_a_time(&self, id: u64, pages: bool, awaited: Option<&Arc<Left>>, act: impl Fn(bool, bool)) {
        let mut there = self.0.lock();
        if let Some(again) = there.get_mut(&id) {
            let again = again.get_or_insert_default();
            again.pages |= pages;
            return again.awaited.extend(awaited.cloned());
        }
        there.insert(id, None);
        drop(there);
        act(false, pages);
        while let Some(again) = self.leave(id) {
            act(true, again.pages);
        }
    }

    /// Nobody is there any more, unless it is to be done once more.
    fn leave(&self, id: u64) -> Option<Again> {
        let mut there = self.0.lock();
        let again = there.get_mut(&id).and_then(Option::take);
        if again.is_none() {
            there.remove(&id);
        }
        again
    }
}

/// Cleaning under way.
#[derive(Debug)]
pub struct Cleaning {
    left: Arc<Mutex<HashSet<u64>>>,
    done: Receiver<()>,
}

impl Cleaning {
    /// Files not yet done; none when finished.
    pub fn left(&self) -> Vec<u64> {
        self.left.lock().iter().copied().collect()
    }

    /// Closed when finished.
    pub fn done(&self) -> &Receiver<()> {
        &self.done
    }
}

/// Of one cleaning that somebody waits for: dropped with the last file that is left.
struct Progress {
    left: Arc<Mutex<HashSet<u64>>>,
    finished: Option<Box<dyn FnOnce() + Send + Sync>>,
    /// Closed after that.
    _done: Sender<()>,
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(finished) = self.finished.take() {
            finished();
        }
    }
}

/// One file of it, which may be left to several.
struct Left(Arc<Progress>, u64);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.left.lock().remove(&self.1);
    }
}

/// What is to be forgotten.
#[derive(Clone, Copy)]
struct Wants {
    pages: bool,
    attributes: bool,
    names: bool,
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

/// Waits until requests that began before a change are through: what they bring the kernel may keep. For at most a
/// second.
pub fn wait_for_earlier(core: &Core) {
    if !core.readers.wait(UNDER_WAY) {
        tracing::warn!("a request of before the change is still under way: what it brings may be kept by the kernel");
    }
}

/// Goes through all known files that the rules are about, on another thread, and calls `finished` at the end. To be
/// called when earlier requests are through.
pub fn clean(core: &Arc<Core>, rules: &[Arc<Rule>], finished: impl FnOnce() + Send + Sync + 'static) -> Cleaning {
    let (_done, done) = bounded::<()>(0);
    let (files, wants) = meant(core, rules);
    let left = Arc::new(Mutex::new(files.iter().map(|inode| inode.id).collect::<HashSet<_>>()));
    let progress = Arc::new(Progress { left: left.clone(), finished: Some(Box::new(finished)), _done });
    let cleaner = core.clone();
    core.cleaners.pool.run(move || {
        for inode in files {
            forget(&cleaner, &inode, wants, Some(&Arc::new(Left(progress.clone(), inode.id))));
        }
    });
    Cleaning { left, done }
}

/// For the clock, which must not wait: cleans for rules that have turned. Turns that come while others are cleaned for
/// are cleaned for together.
pub fn turned(core: &Arc<Core>, rules: Vec<Arc<Rule>>) {
    let mut turned = core.cleaners.turned.lock();
    if let Some(others) = &mut *turned {
        let is_new = |rule: &Arc<Rule>| !others.iter().any(|other| Arc::ptr_eq(other, rule));
        let new: Vec<_> = rules.into_iter().filter(is_new).collect();
        return others.extend(new);
    }
    *turned = Some(rules);
    drop(turned);
    let cleaner = core.clone();
    core.cleaners.pool.run(move || {
        while let Some(rules) = cleaner.cleaners.next_turns() {
            wait_for_earlier(&cleaner);
            clean_for_turns(&cleaner, &rules);
        }
    });
}

impl Cleaners {
    fn next_turns(&self) -> Option<Vec<Arc<Rule>>> {
        let mut turned = self.turned.lock();
        let rules = turned.as_mut().map(std::mem::take).filter(|rules| !rules.is_empty());
        if rules.is_none() {
            *turned = None;
        }
        rules
    }
}

/// On a thread of its own, which may hang: the next turns are cleaned for all the same.
fn clean_for_turns(core: &Arc<Core>, rules: &[Arc<Rule>]) {
    while core.cleaners.pool.is_full() {
        std::thread::sleep(TURN);
    }
    let (files, wants) = meant(core, rules);
    let (done, ended) = bounded::<()>(0);
    let cleaner = core.clone();
    core.cleaners.pool.run(move || {
        files.iter().for_each(|inode| forget(&cleaner, inode, wants, None));
        drop(done);
    });
    let _ = ended.recv_timeout(TURN);
}

/// The known files that rules are about, and what the kernel is to forget of them. Files that a parked request holds
/// come last, so that they keep no other from being done.
fn meant(core: &Core, rules: &[Arc<Rule>]) -> (Vec<Arc<Inode>>, Wants) {
    let mut files: Vec<_> = core.tree.all().into_iter().filter(|inode| is_meant(inode, rules)).collect();
    let held = core.parked_files();
    files.sort_by_key(|inode| held.contains(&inode.id));
    let any = |wants: fn(&Rule) -> bool| rules.iter().any(|rule| wants(rule));
    (files, Wants { pages: any(wants_pages), attributes: any(wants_attributes), names: any(wants_names) })
}

/// Any path below a directory counts for its names: a lookup is made in the directory.
fn is_meant(inode: &Arc<Inode>, rules: &[Arc<Rule>]) -> bool {
    if rules.iter().any(|rule| !rule.has_path()) {
        return true;
    }
    let paths: Vec<Vec<u8>> = inode.paths().collect();
    rules.iter().any(|rule| rule.path_matches(paths.iter().map(Vec::as_slice)))
}

fn forget(core: &Core, inode: &Inode, wants: Wants, awaited: Option<&Arc<Left>>) {
    let pages = wants.pages && inode.is_regular();
    if pages || wants.attributes {
        let act = |_, pages| forget_file(core, inode.id, pages);
        core.cleaners.files.once_at_a_time(inode.id, pages, awaited, act);
    }
    for (parent, name) in inode.links().into_iter().filter(|_| wants.names) {
        let act = |again, _| match again {
            false => forget_name(core, parent, &name),
            // Others have left names of this directory to us.
            true => forget_names(core, parent),
        };
        core.cleaners.names.once_at_a_time(parent, false, awaited, act);
    }
}

/// A failure means that the kernel does not know the file any more, or that the mount is gone.
fn forget_file(core: &Core, id: u64, pages: bool) {
    let Some(notifier) = core.notifier.get() else { return };
    if pages {
        core.holds.forget(Some(id));
    }
    let _ = notifier.inval_inode(INodeNo(id), if pages { 0 } else { -1 }, 0);
}

fn forget_name(core: &Core, parent: u64, name: &OsStr) {
    if let Some(device) = core.device.get() {
        let _ = notify::expire_entry(device, parent, name.as_encoded_bytes());
    }
}

fn forget_names(core: &Core, directory: u64) {
    let links = core.tree.all().into_iter().flat_map(|inode| inode.links());
    links.filter(|(parent, _)| *parent == directory).for_each(|(_, name)| forget_name(core, directory, &name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_while_somebody_is_there_is_done_once_more_and_only_then_done() {
        let (busy, acts) = (Arc::new(Busy::default()), Arc::new(Mutex::new(Vec::new())));
        let (let_go, held) = bounded::<()>(0);
        let there = (busy.clone(), acts.clone());
        let first = std::thread::spawn(move || {
            there.0.once_at_a_time(1, false, None, |again, pages| {
                there.1.lock().push((again, pages));
                let _ = held.recv();
            });
        });
        while acts.lock().is_empty() {
            std::thread::yield_now();
        }
        let (_done, done) = bounded(0);
        let left = Arc::new(Mutex::new(HashSet::from([1, 2])));
        let progress = Arc::new(Progress { left: left.clone(), finished: None, _done });
        for (id, pages) in [(1, true), (2, false)] {
            let file = Arc::new(Left(progress.clone(), id));
            busy.once_at_a_time(1, pages, Some(&file), |_, _| panic!("somebody is there"));
        }
        drop(progress);
        busy.once_at_a_time(2, true, None, |again, pages| acts.lock().push((again, pages)));
        assert_eq!((left.lock().len(), acts.lock().clone()), (2, vec![(false, false), (false, true)]));
        let_go.send(()).unwrap();
        assert_eq!(done.recv_timeout(Duration::from_millis(20)), Err(crossbeam_channel::RecvTimeoutError::Timeout));
        drop(let_go);
        first.join().unwrap();
        assert_eq!((left.lock().len(), acts.lock().last().copied()), (0, Some((true, true))));
        assert!(done.recv_timeout(Duration::from_secs(10)).is_err());
        assert!(busy.0.lock().is_empty());
    }
}
