//! Contents: open, read, write, copy, allocate, sync.
//!
//! The write is the hot path: from the handle straight to `pwrite`, unless something about the file or the mount asks
//! for more (a capacity, an undo log), which a few loads tell of what nobody changes then.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use fuser::FopenFlags;
use nix::fcntl::{FallocateFlags, OFlag};
use nix::unistd::Whence;
use parking_lot::MutexGuard;

use super::attributes::attr_of;
use super::names::Creation;
use crate::durability::{Mark, Ranges, Undo, undo};
use crate::fault::{Op, stored};
use crate::fs::account::Counting;
use crate::fs::buffer::{self, Buffer};
use crate::fs::call::{Answer, Call, Caller, Entry, Reply, Served};
use crate::fs::evict::Backing;
use crate::fs::facts::Request;
use crate::fs::files::{OpenFile, Sync, backing_flags};
use crate::fs::inode::Inode;
use crate::fs::privileges::{judged, without_fsetid};
use crate::fs::serve::Core;
use crate::fs::tree::stat;
use crate::space::{self, Limit, Reservation};
use crate::sys::xattr;

/// How the kernel is to treat an open file: `O_DIRECT` goes past its cache, so that one request is one result; so does what
/// a rule wants to see call by call.
pub(in crate::fs) fn open_mode(flags: i32, uncached: bool) -> FopenFlags {
    match uncached || flags & libc::O_DIRECT != 0 {
        true => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        false => FopenFlags::empty(),
    }
}

/// How a write is done.
#[derive(Clone, Debug, Default)]
pub(super) enum Manner {
    /// As it was asked for.
    #[default]
    Kept,
    /// All of it can be taken back.
    Lost,
    /// These parts of it, by their places in the file, can be taken back.
    Torn(Vec<Range<u64>>),
    /// Only these parts of it are written at all.
    Parts(Vec<Range<u64>>),
    /// What is written is damaged: of these parts the original is kept, if there is room for it.
    Damaged { written: Vec<u8>, parts: Vec<Range<u64>>, mark: Mark },
    /// It goes to another place, as far as the file has it; what belongs to either is kept.
    Astray { place: u64, mark: Mark },
}

impl Core {
    pub(super) fn open(&self, ino: u64, flags: i32, reply: &Reply) -> io::Result<Answer> {
        let inode = self.tree.get(ino)?;
        let file = open_backing(&inode, flags)?;
        let mut served = self.serve_handle(&inode, &file, flags, reply);
        let file = OpenFile::new(inode, file, flags, &served);
        // What the kernel has of the file is kept if nobody but us has changed it. To make the kernel drop it would
        // also make this open wait for every parked read.
        if let (true, Served::ByUs(mode)) = (file.cached, &mut served) {
            let ours = stat(&file.file).is_ok_and(|stat| file.inode.stamp(&stat));
            if ours && !file.inode.foreign.swap(false, AcqRel) {
                *mode |= FopenFlags::FOPEN_KEEP_CACHE;
            } else {
                // With its pages go those that a failed read left behind.
                self.holds_forget(ino);
            }
        }
        Ok(Answer::Opened(self.files.open(file), served))
    }

    fn holds_forget(&self, ino: u64) {
        if self.holds.any() {
            self.holds.forget(Some(ino));
        }
    }

    pub(super) fn create(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        (mode, umask): (u32, u32),
        flags: i32,
        reply: &Reply,
    ) -> io::Result<Answer> {
        let backing = OFlag::from_bits_retain(backing_flags(flags) | libc::O_CREAT | libc::O_EXCL);
        let parent = self.tree.get(parent)?;
        let creation = Creation { mode, umask };
        let made = self.make(caller, &parent, creation, |dir, mode| nix::fcntl::openat(dir, name, backing, mode));
        let file = match made {
            // Somebody has made it below us since the kernel looked. Of `ESTALE` it makes another look, and an open.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && flags & libc::O_EXCL == 0 => {
                return Err(io::Error::from_raw_os_error(libc::ESTALE));
            }
            other => other?,
        };
        let (inode, stat) = self.tree.adopt(&parent, name, &file)?;
        let file = File::from(file);
        let entry = Entry { attr: attr_of(&inode, &stat), keep: self.keep(&inode) };
        inode.stamp(&stat);
        let served = self.serve_handle(&inode, &file, flags, reply);
        let file = OpenFile::new(inode, file, flags, &served);
        Ok(Answer::Created(entry, self.files.open(file), served))
    }

    /// At each close: from here on, changes that are not ours are told by the stamp.
    pub(super) fn flush(&self, fh: u64) -> io::Result<Answer> {
        let file = self.files.get(fh)?;
        if file.inode.changed.load(Acquire) {
            file.inode.stamp(&stat(&file.file)?);
        }
        Ok(Answer::Empty)
    }

    pub(super) fn release(&self, fh: u64) -> io::Result<Answer> {
        let Some((file, last)) = self.files.close(fh) else { return Ok(Answer::Empty) };
        self.close_handle(&file);
        if last
            && self.capacity.is_set()
            && let Ok(stat) = stat(&file.file)
            && stat.st_nlink == 0
        {
            self.count_gone(Some(&file.inode), Vec::new, &stat);
        }
        Ok(Answer::Empty)
    }

    pub(super) fn read(&self, fh: u64, offset: u64, size: u32, flags: i32) -> io::Result<Answer> {
        let file = self.files.get(fh)?;
        let mut data = buffer::lend(size as usize);
        let length = match file.for_io(flags)? {
            (file, true) => once(|| file.read_at(&mut data, offset))?,
            (file, false) => read_at(file, &mut data, offset)?,
        };
        data.truncate(length);
        // By the flags of now, not by the handle: one without a cache for the sake of a rule reads as the others do.
        if flags & libc::O_DIRECT != 0 && file.inode.undoable.load(Acquire) {
            file.inode.undo.lock().overlay(offset, &mut data);
        }
        Ok(Answer::Data(data))
    }

    pub(super) fn write(&self, caller: &Caller, call: &Call<'_>, manner: &Manner) -> io::Result<Answer> {
        let Call::Write { fh, offset, data, flags, origin, .. } = call else { return Err(misfit()) };
        let file = self.files.get(*fh)?;
        // For a mapping there is no caller whose flags count, and what goes in parts or astray need not be of whole sectors.
        let astray = matches!(manner, Manner::Parts(_) | Manner::Astray { .. });
        let (to, direct) = file.for_io(if origin.writeback || astray { *flags & !libc::O_DIRECT } else { *flags })?;
        let put = |data: &[u8], offset: u64| match origin.kill_suidgid {
            true => without_fsetid(caller, &file.inode, || write_at(to, data, offset, direct)),
            false => write_at(to, data, offset, direct),
        };
        file.inode.about_to_change(to);
        // Kept, as a store into a mapping keeps it; a write by us would take it away.
        let capability = origin.writeback.then(|| capability(&file.file)).flatten();
        let plain = matches!(manner, Manner::Kept);
        let written = match !plain || self.capacity.limits() || file.inode.undoable.load(Acquire) {
            false => {
                let written = put(data, *offset)?;
                if file.inode.undoable.load(SeqCst) {
                    self.note_kept(&file.inode, *offset..*offset + written as u64);
                }
                written
            }
            true => {
                // The kernel can tell a caller that only part was written, unless nobody waits for it or it goes past
                // the cache on a handle that has one.
                let can_be_short = !origin.writeback && (flags & libc::O_DIRECT == 0 || !file.cached);
                let range = *offset..offset.saturating_add(data.len() as u64);
                self.change(&file.inode, file.file.as_fd(), |change| {
                    let length = change.reserve(self, caller, call, range.clone(), can_be_short)?;
                    change.put(manner, &data[..length as usize], *offset, put)
                })?
            }
        };
        if !file.inode.changed.load(Relaxed) {
            file.inode.changed.store(true, Release);
        }
        if written < data.len() && origin.writeback {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if let Some(value) = capability {
            xattr::set(&file.file, CAPABILITY, &value, 0)?;
        }
        // Through the page cache, the kernel sends an fsync of its own.
        if !matches!(manner, Manner::Lost) && !file.cached {
            Sync::of(*flags).keep(&file.file)?;
        }
        if self.arming.concerns(Op::Write) && matches!(manner, Manner::Kept | Manner::Damaged { .. }) {
            self.heal(caller, call, written as u64);
        }
        Ok(Answer::Written(written as u32))
    }

    /// Only what is stored makes a bad sector good.
    fn heal(&self, caller: &Caller, call: &Call<'_>, written: u64) {
        let plan = self.arming.plan();
        if !plan.healing.is_empty() {
            stored(&plan, &Request::new(self, caller, call), written);
        }
    }

    /// A write that saw no undo log has come between the log's beginning and what is to be lost: a page of a mapping, say.
    #[cold]
    fn note_kept(&self, inode: &Inode, range: Range<u64>) {
        inode.undo.lock().after_kept(range);
    }

    pub(super) fn copy_file_range(&self, caller: &Caller, call: &Call<'_>, drop: bool) -> io::Result<Answer> {
        let Call::CopyFileRange { fh, offset, to_fh, to_offset, length, .. } = call else { return Err(misfit()) };
        let (from, to) = (self.files.get(*fh)?, self.files.get(*to_fh)?);
        // What the source's reader would get ends with the source.
        let there = (stat(&from.file)?.st_size as u64).saturating_sub(*offset);
        let length = (*length).min(there).min(1 << 30);
        if length == 0 {
            return Ok(Answer::Written(0));
        }
        let range = *to_offset..to_offset.saturating_add(length);
        let copied = self.change(&to.inode, to.file.as_fd(), |change| {
            let length = change.reserve(self, caller, call, range.clone(), true)?;
            let range = range.start..range.start + length;
            if drop {
                change.lose(range.clone())?;
            }
            let (mut at, mut to_at) = (*offset as i64, range.start as i64);
            let copied = judged(caller, &to.inode, || {
                let (from, to, length) = (&from.file, &to.file, length as usize);
                Ok(nix::fcntl::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), length)?)
            })?;
            change.wrote(drop, range.start..range.start + copied as u64);
            Ok(copied)
        })?;
        if !drop {
            to.sync.keep(&to.file)?;
        }
        Ok(Answer::Written(copied as u32))
    }

    pub(super) fn fallocate(&self, caller: &Caller, call: &Call<'_>, drop: bool) -> io::Result<Answer> {
        let Call::Fallocate { fh, offset, length, mode, .. } = call else { return Err(misfit()) };
        let file = self.files.get(*fh)?;
        let flags = FallocateFlags::from_bits_retain(*mode);
        let allocates = !flags.contains(FallocateFlags::FALLOC_FL_PUNCH_HOLE);
        let overwrites = flags.intersects(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE);
        let range = *offset..offset.saturating_add(*length);
        self.change(&file.inode, file.file.as_fd(), |change| {
            if allocates {
                change.reserve(self, caller, call, range.clone(), false)?;
            }
            let size = stat(&file.file)?.st_size as u64;
            let keeps_size = flags.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
            let grows = !keeps_size && range.end > size;
            let touched = match (overwrites, grows) {
                (true, false) => range.start..range.end.min(size).max(range.start),
                (true, true) => range.clone(),
                (false, true) => size.max(range.start)..range.end,
                (false, false) => 0..0,
            };
            if drop {
                change.lose(touched.clone())?;
            }
            judged(caller, &file.inode, || {
                Ok(nix::fcntl::fallocate(&file.file, flags, *offset as i64, *length as i64)?)
            })?;
            match keeps_size {
                true if drop => {}
                true => change.emptied(touched),
                // Nothing is overwritten, and the file has to reach so far.
                false if touched.is_empty() => change.wrote(true, range.end..range.end),
                false => change.wrote(drop, touched),
            }
            file.inode.usage.note_found(range.clone(), self.block);
            if self.remembers_preallocation {
                file.inode.usage.note_preallocated(allocates, range.clone());
            }
            Ok(())
        })?;
        if !drop {
            file.sync.keep(&file.file)?;
        }
        Ok(Answer::Empty)
    }

    pub(super) fn fsync(&self, caller: &Caller, call: &Call<'_>, drop: bool) -> io::Result<Answer> {
        let Call::Fsync { fh, datasync, .. } = call else { return Err(misfit()) };
        if !drop {
            let file = self.files.get(*fh)?;
            wanted(*datasync).keep(&file.file)?;
            // What was accepted without space.
            if file.inode.writeback_error.tell(&file.told) {
                return self.refuse(caller, call, libc::ENOSPC);
            }
        }
        Ok(Answer::Empty)
    }

    pub(super) fn fsyncdir(&self, fh: u64, datasync: bool, drop: bool) -> io::Result<Answer> {
        if !drop {
            wanted(datasync).keep(&self.files.directory(fh)?.file)?;
        }
        Ok(Answer::Empty)
    }

    pub(super) fn lseek(&self, fh: u64, offset: i64, whence: i32) -> io::Result<Answer> {
        let file = self.files.get(fh)?;
        let whence = match whence {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            libc::SEEK_END => Whence::SeekEnd,
            libc::SEEK_CUR => Whence::SeekCur,
            libc::SEEK_SET => Whence::SeekSet,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        // The position of the backing descriptor means nothing to anybody: all I/O says where.
        Ok(Answer::Offset(nix::unistd::lseek(&file.file, offset, whence)?))
    }

    /// Would the request need blocks that the file does not have? What cannot be found out counts as no.
    pub(in crate::fs) fn grows(&self, call: &Call<'_>) -> bool {
        if matches!(call, Call::Fallocate { mode, .. } if mode & libc::FALLOC_FL_PUNCH_HOLE != 0) {
            return false;
        }
        let (Some((offset, length)), Some(fh)) = (call.range(), call.fh()) else { return false };
        let Ok(file) = self.files.get(fh) else { return false };
        self.fit(&file.inode, file.file.as_fd(), offset..offset.saturating_add(length), 0).is_ok_and(|fit| fit.need > 0)
    }

    fn fit(&self, inode: &Inode, fd: BorrowedFd<'_>, range: Range<u64>, free: u64) -> io::Result<space::Fit> {
        space::fit(fd, &stat(fd)?, range, self.block, free, &inode.usage)
    }

    /// Changes a file's contents with all that hangs on it: the undo log, locked while old bytes are saved and
    /// overwritten, and the account of space.
    pub(in crate::fs) fn change<T>(
        &self,
        inode: &Arc<Inode>,
        fd: BorrowedFd<'_>,
        act: impl FnOnce(&mut Change<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let counting = self.capacity.limits().then(|| self.count_from(inode, fd)).transpose()?;
        let undo = inode.undoable.load(Acquire).then(|| inode.undo.lock());
        let mut change = Change {
            fd,
            inode,
            block: self.block,
            undo,
            counting,
            reservation: Reservation::default(),
            without_space: Vec::new(),
        };
        let result = act(&mut change);
        inode.changed.store(true, Release);
        let Change { counting, reservation, undo, .. } = change;
        drop(undo);
        if let Some(counting) = counting {
            self.count_to(counting, reservation, inode, fd)?;
        }
        result
    }
}

/// One change of a file's contents under way.
pub(in crate::fs) struct Change<'a> {
    pub fd: BorrowedFd<'a>,
    inode: &'a Arc<Inode>,
    block: u64,
    undo: Option<MutexGuard<'a, Undo>>,
    counting: Option<Counting>,
    reservation: Reservation,
    /// Whole blocks for which there is no space, of a write that is accepted all the same.
    without_space: Vec<Range<u64>>,
}

impl Change<'_> {
    /// Takes the space that a range needs; how much of the range there is space for.
    fn reserve(
        &mut self,
        core: &Core,
        caller: &Caller,
        call: &Call<'_>,
        range: Range<u64>,
        can_be_short: bool,
    ) -> io::Result<u64> {
        let whole = range.end - range.start;
        let Some(counting) = &self.counting else { return Ok(whole) };
        let need = core.fit(self.inode, self.fd, range.clone(), u64::MAX)?.need;
        let (got, limit, reservation) = core.reserve(caller, call, counting, need);
        self.reservation = reservation;
        let Some(limit) = limit else { return Ok(whole) };
        let late = limit == Limit::Capacity && core.capacity.is_late() && is_buffered_write(call);
        let fits = match can_be_short || late {
            true => core.fit(self.inode, self.fd, range.clone(), got)?.length,
            false => 0,
        };
        if late {
            match self.accept(range.start + fits..range.end) {
                Err(error) if undo::is_full(&error) => return core.refuse(caller, call, libc::ENOMEM),
                accepted => accepted?,
            }
            core.inject_space(caller, call, Some(fits), None);
            return Ok(whole);
        }
        if fits > 0 {
            core.inject_space(caller, call, Some(fits), None);
            return Ok(fits);
        }
        core.refuse(caller, call, limit.errno())
    }

    /// Accepts a range for which there is no space, as delayed allocation does: what has no blocks yet is lost.
    fn accept(&mut self, range: Range<u64>) -> io::Result<()> {
        let missing = space::blocks::missing(self.fd, &stat(self.fd)?, range.clone(), self.block, &self.inode.usage)?;
        for blocks in &missing {
            self.lose(blocks.start.max(range.start)..blocks.end.min(range.end))?;
        }
        self.without_space = missing;
        Ok(())
    }

    /// Writes in a manner.
    fn put(
        &mut self,
        manner: &Manner,
        data: &[u8],
        offset: u64,
        put: impl Fn(&[u8], u64) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let range = offset..offset + data.len() as u64;
        let part = |part: &Range<u64>| part.start.max(range.start)..part.end.min(range.end);
        match manner {
            Manner::Kept => {
                let written = put(data, offset)?;
                self.wrote(false, offset..offset + written as u64);
                Ok(written)
            }
            Manner::Lost => {
                self.lose(range.clone())?;
                let written = put(data, offset)?;
                self.wrote(true, offset..offset + written as u64);
                Ok(written)
            }
            Manner::Torn(lost) => {
                for lost in lost.iter().map(part).filter(|part| !part.is_empty()) {
                    self.lose(lost)?;
                }
                let written = put(data, offset)?;
                let end = offset + written as u64;
                let mut kept = Ranges::default();
                kept.add(offset..end);
                lost.iter().for_each(|lost| kept.remove(lost.clone()));
                kept.iter().for_each(|kept| self.wrote(false, kept));
                self.wrote(true, end..end);
                Ok(written)
            }
            Manner::Parts(parts) => {
                for part in parts.iter().map(part).filter(|part| !part.is_empty()) {
                    let bytes = &data[(part.start - offset) as usize..(part.end - offset) as usize];
                    let written = put(bytes, part.start)?;
                    self.wrote(false, part.start..part.start + written as u64);
                }
                Ok(data.len())
            }
            Manner::Damaged { written, parts, mark } => {
                room_to_keep(data.len())?;
                self.lock_undo();
                let written = put(&written[..data.len()], offset)?;
                let end = offset + written as u64;
                self.wrote(false, offset..end);
                let written_part = |part: Range<u64>| part.start..part.end.min(end).max(part.start);
                for part in parts.iter().map(part).map(written_part).filter(|part| !part.is_empty()) {
                    let original = &data[(part.start - offset) as usize..(part.end - offset) as usize];
                    self.keep_original(part.start, original, mark);
                }
                Ok(written)
            }
            Manner::Astray { place, mark } => self.put_astray(*place, mark, data, offset),
        }
    }

    /// The data lands elsewhere: there it covers what the file has, and where it should be all stays as it was. The file
    /// becomes as long as it would have, because its size is not on the place of its data.
    fn put_astray(&mut self, place: u64, mark: &Mark, data: &[u8], offset: u64) -> io::Result<usize> {
        room_to_keep(2 * data.len())?;
        self.lock_undo();
        let end = offset + data.len() as u64;
        let size = end.max(stat(self.fd)?.st_size as u64);
        if size == end {
            nix::unistd::ftruncate(self.fd, end as i64)?;
        }
        let there = data.len().min(size.saturating_sub(place) as usize);
        let mut covered = vec![0; there];
        // Not past the page cache: the place need not be aligned as the right one was.
        let file = File::from(self.inode.open(libc::O_RDWR)?);
        let had = read_at(&file, &mut covered, place)?;
        covered.truncate(had);
        file.write_all_at(&data[..had], place)?;
        if let Some(undo) = &self.undo {
            // It may be lost or damaged already.
            undo.overlay(place, &mut covered);
            undo.originals.overlay(place, &mut covered);
        }
        self.wrote(false, place..place + had as u64);
        // What was lost before may not take the size back.
        self.wrote(true, end..end);
        // Where the two places overlap, what was to be written there is right.
        self.keep_original(place, &covered, mark);
        self.keep_original(offset, data, mark);
        Ok(data.len())
    }

    /// From here on nobody else writes what is to be kept.
    fn lock_undo(&mut self) {
        let inode = self.inode;
        self.undo.get_or_insert_with(|| inode.undo.lock());
    }

    /// Keeps what a place should have, for a repair.
    fn keep_original(&mut self, offset: u64, bytes: &[u8], mark: &Mark) {
        if let Some(undo) = self.undo.as_mut() {
            undo.originals.put(offset, bytes, mark);
            self.inode.undoable.store(true, Release);
        }
    }

    /// Saves what a dropped write is about to cover.
    pub fn lose(&mut self, range: Range<u64>) -> io::Result<()> {
        self.begin_to_lose(|undo, file| undo.before_drop(range, file))
    }

    /// Saves what a dropped change of the size is about to cut off.
    pub fn lose_size(&mut self, range: Range<u64>) -> io::Result<()> {
        self.begin_to_lose(|undo, file| undo.before_resize(range, file))
    }

    fn begin_to_lose(&mut self, begin: impl FnOnce(&mut Undo, &mut Backing<'_>) -> io::Result<()>) -> io::Result<()> {
        // For reading only: a file that can only be appended to (`chattr +a`) is opened for no other writing.
        let readable = File::from(self.inode.open(libc::O_RDONLY)?);
        let inode = self.inode;
        let undo = self.undo.get_or_insert_with(|| inode.undo.lock());
        // Before the size and the old bytes are looked at: a write that does not see it has been done by then.
        inode.undoable.store(true, SeqCst);
        let begun = begin(undo, &mut Backing { write: self.fd, read: &readable });
        match &begun {
            Ok(()) => undo.writes += 1,
            Err(_) => inode.undoable.store(!undo.is_empty(), Release),
        }
        begun
    }

    /// Notes what was written: to stay, or to be lost.
    fn wrote(&mut self, drop: bool, range: Range<u64>) {
        let mut kept = Ranges::default();
        if !drop {
            kept.add(range.clone());
            self.without_space.iter().for_each(|blocks| kept.remove(blocks.clone()));
        }
        if self.undo.is_none() && self.inode.undoable.load(SeqCst) {
            // Something began to be lost meanwhile: see `note_kept`.
            self.lock_undo();
        }
        if let Some(undo) = self.undo.as_mut() {
            kept.iter().for_each(|range| undo.after_kept(range));
            undo.after_drop(range.end);
        }
        kept.iter().for_each(|range| self.inode.usage.note_found(range, self.block));
        if !self.without_space.is_empty() {
            let end = range.end.next_multiple_of(self.block);
            let written = self.without_space.iter().map(|blocks| blocks.start..blocks.end.min(end));
            self.inode.usage.note_lost(written.filter(|blocks| !blocks.is_empty()));
            // A lost write tells nobody.
            if !drop {
                self.inode.writeback_error.record();
            }
        }
    }

    /// Notes zeros that are to stay, and that have not let the file grow.
    fn emptied(&mut self, range: Range<u64>) {
        if let Some(undo) = self.undo.as_mut() {
            undo.after_hole(range);
        }
    }

    /// Notes a truncation that is to stay.
    pub fn truncated(&mut self, size: u64) {
        if let Some(undo) = self.undo.as_mut() {
            undo.after_truncate(size);
        }
        self.inode.usage.note_found(size.next_multiple_of(self.block)..u64::MAX, self.block);
    }
}

/// Delayed allocation is an affair of the page cache: direct I/O and what is written back from mappings is refused at once.
fn is_buffered_write(call: &Call<'_>) -> bool {
    matches!(call, Call::Write { flags, origin, .. } if flags & libc::O_DIRECT == 0 && !origin.writeback)
}

/// What cannot be kept must not be damaged.
fn room_to_keep(length: usize) -> io::Result<()> {
    if undo::has_room(length) { Ok(()) } else { Err(undo::full()) }
}

/// Until the end, or until nothing more is to be had.
pub(super) fn read_at(file: &File, data: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while length < data.len() {
        match once(|| file.read_at(&mut data[length..], offset + length as u64)) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if length == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(length)
}

/// Writes all of it, or tells how much could be. Past the page cache it is one write, of data that is aligned as the
/// caller's was, which in a request it is not.
fn write_at(file: &File, data: &[u8], offset: u64, direct: bool) -> io::Result<usize> {
    if direct {
        let aligned = Buffer::from(data);
        return once(|| file.write_at(&aligned, offset));
    }
    let mut written = 0;
    while written < data.len() {
        match once(|| file.write_at(&data[written..], offset + written as u64)) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if written == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(written)
}

/// A call that a signal has not interrupted.
fn once(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn wanted(data_only: bool) -> Sync {
    if data_only { Sync::Data } else { Sync::All }
}

/// Opens the backing file for an open file of ours.
fn open_backing(inode: &Inode, flags: i32) -> io::Result<File> {
    let wanted = backing_flags(flags);
    match inode.open(wanted) {
        // An append-only file (`chattr +a`) can be opened for nothing else; where a write goes is the same then.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && flags & libc::O_APPEND != 0 => {
            Ok(inode.open(wanted | libc::O_APPEND)?.into())
        }
        other => Ok(other?.into()),
    }
}

const CAPABILITY: &CStr = c"security.capability";

/// The file's capabilities, if it has any.
fn capability(file: &File) -> Option<Vec<u8>> {
    // `struct vfs_ns_cap_data`, the largest there is, has 24 bytes.
    let mut value = [0; 64];
    xattr::get(file, CAPABILITY, &mut value).ok().map(|length| value[..length].to_vec())
}

pub(super) fn misfit() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}
