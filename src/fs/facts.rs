//! The facts of one request, found out when a rule asks.
//!
//! Made by a reader on its stack. Takes the locks of names and of open files for moments; procfs is read for rules on
//! processes, and the backing file is examined for those that ask for its type, its size or its blocks.

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

use globset::GlobMatcher;
use smallvec::SmallVec;

use super::call::{Call, Caller};
use super::inode::Inode;
use super::process;
use super::serve::Core;
use super::tree::stat;
use crate::fault::decide::key_of;
use crate::fault::{Facts, FileType, Op, Plan, Rule};

/// One request, as rules and events look at it.
pub(super) struct Request<'a> {
    core: &'a Core,
    caller: &'a Caller,
    call: &'a Call<'a>,
    inode: OnceCell<Option<Arc<Inode>>>,
    names: OnceCell<SmallVec<[Vec<u8>; 2]>>,
}

impl<'a> Request<'a> {
    pub fn new(core: &'a Core, caller: &'a Caller, call: &'a Call<'a>) -> Request<'a> {
        Request { core, caller, call, inode: OnceCell::new(), names: OnceCell::new() }
    }

    fn inode(&self) -> Option<&Arc<Inode>> {
        let find = || {
            let by_handle = self.call.fh().and_then(|fh| self.core.files.inode(fh, self.call.op()));
            by_handle.or_else(|| self.core.tree.get(self.call.ino()).ok())
        };
        self.inode.get_or_init(find).as_ref()
    }

    fn on_names(&self) -> bool {
        self.call.names().next().is_some()
    }

    /// Paths by name, where the operation works on names; link's own file comes with its paths too.
    fn name_paths(&self) -> &[Vec<u8>] {
        self.names.get_or_init(|| self.find_name_paths().collect())
    }

    fn find_name_paths(&self) -> impl Iterator<Item = Vec<u8>> {
        let named =
            self.call.names().filter_map(|(parent, name)| Some(self.core.tree.get(parent).ok()?.child_path(name)));
        let linked = matches!(self.call, Call::Link { .. }).then(|| self.inode()).flatten();
        named.chain(linked.into_iter().flat_map(|inode| inode.paths()))
    }

    /// The path for the event; of an operation with two, the other one too: where it leads. Of a file with several names it
    /// is the one that the rule is about.
    pub fn paths(&self, rule: Option<&Rule>) -> [Option<Arc<[u8]>>; 2] {
        let shared = |path: &Vec<u8>| Some(Arc::from(path.as_slice()));
        match (self.call, self.name_paths()) {
            (Call::Link { .. }, [to, ..]) => {
                [self.inode().map(|inode| self.path_of(inode, rule, Some(to))), shared(to)]
            }
            (_, [path, to, ..]) => [shared(path), shared(to)],
            (_, [path]) => [shared(path), None],
            (_, []) => [self.inode().map(|inode| self.path_of(inode, rule, None)), None],
        }
    }

    /// The name of a file that a rule is about, or else the one used last. What is linked has the new name (`to`) too by now,
    /// if that is done.
    fn path_of(&self, inode: &Inode, rule: Option<&Rule>, to: Option<&[u8]>) -> Arc<[u8]> {
        let latest = inode.path(self.core.tree.version());
        let is_old = |path: &[u8]| to != Some(path);
        let is_meant = |path: &[u8]| is_old(path) && rule.is_none_or(|rule| rule.path_matches(std::iter::once(path)));
        if !inode.has_several_names() || is_meant(&latest) {
            return latest;
        }
        let paths: SmallVec<[Vec<u8>; 2]> = inode.paths().collect();
        let found = paths.iter().find(|path| is_meant(path)).or_else(|| paths.iter().find(|path| is_old(path)));
        found.map_or(latest, |path| path.as_slice().into())
    }
}

impl Facts for Request<'_> {
    fn op(&self) -> Op {
        self.call.op()
    }

    fn uid(&self) -> u32 {
        self.caller.uid
    }

    fn gid(&self) -> u32 {
        self.caller.gid
    }

    fn pid(&self) -> u32 {
        process::of_thread(self.caller.tid).pid
    }

    fn in_tree(&self, root: u32) -> bool {
        process::descends_from(self.pid(), root)
    }

    fn comm_matches(&self, name: &GlobMatcher) -> bool {
        let process = process::of_thread(self.caller.tid);
        let is_such = |comm: &str| name.is_match(Path::new(comm));
        is_such(&process.comm.text()) || process::name(process.pid).is_some_and(|comm| is_such(&comm))
    }

    fn range(&self) -> Option<(u64, u64)> {
        match self.call {
            Call::Setattr { changes, .. } => changes.size.map(|size| (size, 1)),
            call => call.range(),
        }
    }

    fn bytes(&self) -> u64 {
        let Some((offset, length)) = self.call.range() else { return 0 };
        match self.call {
            Call::Read { fh, .. } => {
                let size = self.core.files.get(*fh).ok().and_then(|file| stat(&file.file).ok());
                size.map_or(length, |stat| length.min((stat.st_size as u64).saturating_sub(offset)))
            }
            Call::Fallocate { .. } => 0,
            _ => length,
        }
    }

    fn direct(&self) -> Option<bool> {
        let flags = match self.call {
            Call::Write { origin, .. } if origin.writeback => return Some(false),
            Call::Read { flags, .. } | Call::Write { flags, .. } => flags,
            Call::Open { flags, .. } | Call::Create { flags, .. } => flags,
            _ => return None,
        };
        Some(flags & libc::O_DIRECT != 0)
    }

    fn file_type(&self) -> Option<FileType> {
        match self.call {
            Call::Create { .. } => return Some(FileType::File),
            Call::Mkdir { .. } | Call::Rmdir { .. } => return Some(FileType::Directory),
            Call::Symlink { .. } => return Some(FileType::Symlink),
            Call::Mknod { mode, .. } => return Some(FileType::of_mode(*mode)),
            _ => {}
        }
        if let (Some((parent, name)), false) = (self.call.names().next(), matches!(self.call, Call::Link { .. })) {
            let parent = self.core.tree.get(parent).ok()?;
            return self.core.tree.peek(&parent, name).ok().map(|(_, stat)| FileType::of_mode(stat.st_mode));
        }
        self.inode().map(|inode| FileType::of_mode(inode.kind))
    }

    fn truncates(&self) -> bool {
        matches!(self.call, Call::Setattr { changes, .. } if changes.size.is_some())
    }

    fn grows(&self) -> bool {
        self.core.grows(self.call)
    }

    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
        if self.on_names() {
            let paths = || self.name_paths().iter().map(Vec::as_slice);
            return plan.is_large().then(|| plan.path_bits(paths()).into());
        }
        self.inode().map(|inode| inode.path_bits(plan, self.core.tree.version()))
    }

    fn path_matches(&self, rule: &Rule) -> bool {
        !rule.has_path() || rule.path_matches(self.name_paths().iter().map(Vec::as_slice))
    }

    fn path_key(&self) -> u64 {
        match self.name_paths().first() {
            Some(path) => key_of(path),
            None => self.inode().map_or(0, |inode| key_of(&inode.path(self.core.tree.version()))),
        }
    }

    fn now_ns(&self) -> u64 {
        self.core.ring.now_ns()
    }
}
