//! What a firing wants done otherwise than it was asked for: lost, short, torn, damaged, astray, or failing after all.
//!
//! On the thread that serves the request, once for a firing; a normal request never comes here. Locks as in [`super`].

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::FileAttr;

use super::data::{Manner, misfit, read_at};
use super::errno;
use crate::durability::{Mark, undo};
use crate::fault::corrupt::Corrupt;
use crate::fault::kind::{Amount, Attributes, Elsewhere, Kept, Portion};
use crate::fault::{Fault, Firing, Op, Rule, Then};
use crate::fs::buffer;
use crate::fs::call::{Answer, Call, Caller, Reply};
use crate::fs::hold::OfCut;
use crate::fs::inode::Inode;
use crate::fs::passthrough::is_about;
use crate::fs::process;
use crate::fs::serve::{Core, Told};
use crate::fs::tree::stat;

/// The answer, and what is to be told of it; nothing when the request could only be done as it was asked for.
type Altered = (Answer, Option<Told>);

/// What devices read and write as a whole, past the page cache.
const SECTOR: u64 = 512;

impl Core {
    /// Does a request as a firing wants it. An error that is to be told after all is in [`Told`].
    ///
    /// # Errors
    /// What went wrong by itself.
    pub fn perform_altered(
        &self,
        caller: &Caller,
        call: &Call<'_>,
        firing: &Firing,
        reply: &mut Reply,
    ) -> Result<Altered, i32> {
        match self.alter(caller, call, firing, reply) {
            // We have failed it, and for what the rule wants: the rule's doing.
            Err(error) if undo::is_full(&error) => {
                Ok((Answer::Empty, Some(Told { errno: Some(libc::ENOMEM), ..Told::default() })))
            }
            done => done.map_err(|error| errno(&error)),
        }
    }

    fn alter(&self, caller: &Caller, call: &Call<'_>, firing: &Firing, reply: &mut Reply) -> io::Result<Altered> {
        match (firing.fault(), call) {
            (Fault::Drop, _) if self.is_beyond_undo(call) => Ok((self.dispatch(caller, call, false, reply)?, None)),
            (Fault::Drop, _) => Ok((self.dispatch(caller, call, true, reply)?, Some(Told::default()))),
            (Fault::Error { errors, .. }, _) => {
                let errno = Some(errors.pick(call.op(), firing.draw(0)));
                Ok((self.dispatch(caller, call, false, reply)?, Some(Told { errno, ..Told::default() })))
            }
            (Fault::Attr(wrong), _) => {
                let answer = self.dispatch(caller, call, false, reply)?;
                Ok((misreport(answer, wrong), Some(Told::default())))
            }
            (Fault::Short(portion), Call::Read { .. }) => self.read_short(caller, call, *portion, firing),
            (Fault::Short(portion), Call::Write { .. }) => self.write_short(caller, call, *portion),
            (Fault::Torn { keep, then }, Call::Write { .. }) => self.write_torn(caller, call, keep, *then),
            (Fault::Corrupt(corrupt), Call::Read { .. }) => self.read_damaged(call, corrupt, firing),
            (Fault::Corrupt(corrupt), Call::Write { .. }) => self.write_damaged(caller, call, corrupt, firing),
            (Fault::Misdirect(elsewhere), Call::Read { .. }) => self.read_astray(call, *elsewhere),
            (Fault::Misdirect(elsewhere), Call::Write { .. }) => self.write_astray(caller, call, *elsewhere, firing),
            _ => Ok((self.dispatch(caller, call, false, reply)?, None)),
        }
    }

    /// Is it a change of a file whose writes the kernel does by itself? What they store could not be told from what is to be
    /// taken back.
    fn is_beyond_undo(&self, call: &Call<'_>) -> bool {
        let inode = match call {
            Call::CopyFileRange { to_ino, .. } => *to_ino,
            Call::Setattr { ino, .. } | Call::Fallocate { ino, .. } => *ino,
            _ => return false,
        };
        self.tree.get(inode).is_ok_and(|inode| inode.handles.are_by_kernel())
    }

    /// What a caller is not told after all: references and handles that the kernel will not give back.
    pub fn take_back(&self, call: &Call<'_>, answer: Answer) {
        match answer {
            // Files and directories are numbered apart.
            Answer::Opened(fh, _) if matches!(call, Call::Opendir { .. }) => self.files.close_directory(fh),
            Answer::Entry(entry) => self.forget(entry.attr.ino.0, 1),
            Answer::Created(entry, fh, _) => {
                let _ = self.release(fh);
                self.forget(entry.attr.ino.0, 1);
            }
            Answer::Opened(fh, _) => drop(self.release(fh)),
            _ => {}
        }
    }

    /// Through the page cache a short answer would make the kernel take the file for shorter: see [`crate::fs::hold`]. So
    /// would one for a mapping, which goes through it whatever the handle.
    fn read_short(&self, caller: &Caller, call: &Call<'_>, portion: Portion, firing: &Firing) -> io::Result<Altered> {
        let Call::Read { fh, offset, size, flags, .. } = call else { return Err(misfit()) };
        let file = self.files.get(*fh)?;
        let cut = match self.piece(caller, call).filter(|piece| piece.cached) {
            Some(piece) => self.holds.shorten(&piece, portion, stat(&file.file)?.st_size as u64, firing),
            None => None,
        };
        if let Some(OfCut::Fail { done, .. }) = cut {
            return Ok((Answer::AskAgain, Some(Told { done: Some(done), ..Told::default() })));
        }
        let Answer::Data(mut data) = self.read(*fh, *offset, *size, *flags)? else { return Err(misfit()) };
        let told = match cut {
            // It has not happened yet: it counts when it does.
            Some(_) => None,
            None if file.cached || !process::is_in_read(caller.tid) => None,
            None => portion.of(data.len() as u64).map(|part| {
                let done = whole_sectors(part, *flags);
                data.truncate(done as usize);
                Told { done: Some(done), ..Told::default() }
            }),
        };
        Ok((Answer::Data(data), told))
    }

    fn write_short(&self, caller: &Caller, call: &Call<'_>, portion: Portion) -> io::Result<Altered> {
        let Call::Write { ino, fh, offset, data, flags, origin } = call else { return Err(misfit()) };
        let cached = self.files.get(*fh)?.cached;
        // Nobody waits for what a mapping writes back. Of a direct write the kernel makes an error where the handle has a cache,
        // and where the program does not wait for it (io_uring, libaio).
        let can_be =
            !origin.writeback && (flags & libc::O_DIRECT == 0 || (!cached && process::is_in_write(caller.tid)));
        let length = data.len() as u64;
        // The disk below takes no less than a sector past the cache.
        let least = if flags & libc::O_DIRECT == 0 { 1 } else { SECTOR };
        let part = portion.of(length).map(|part| whole_sectors(part, *flags).max(least));
        let part = part.filter(|part| can_be && *part < length);
        let Some(part) = part else { return Ok((self.write(caller, call, &Manner::Kept)?, None)) };
        let (data, flags, origin) = (data[..part as usize].into(), *flags, *origin);
        let shorter = Call::Write { ino: *ino, fh: *fh, offset: *offset, data, flags, origin };
        let answer = self.write(caller, &shorter, &Manner::Kept)?;
        let done = written(&answer);
        Ok((answer, Some(Told { done, ..Told::default() })))
    }

    fn write_torn(&self, caller: &Caller, call: &Call<'_>, keep: &Kept, then: Then) -> io::Result<Altered> {
        let (offset, length) = call.range().ok_or_else(misfit)?;
        let kept = keep.ranges(offset, length);
        let mut lost = crate::ranges::Ranges::default();
        lost.add(offset..offset + length);
        kept.iter().for_each(|kept| lost.remove(kept.clone()));
        if lost.is_empty() {
            return Ok((self.write(caller, call, &Manner::Kept)?, None));
        }
        let lost: Vec<Range<u64>> = lost.iter().collect();
        let done = Some(kept.iter().map(|range| range.end - range.start).sum());
        let told = Told { done, changed: Some(Arc::new(lost.clone())), ..Told::default() };
        match then {
            Then::Ok => Ok((self.write(caller, call, &Manner::Torn(lost))?, Some(told))),
            Then::Error(errno) => {
                self.write(caller, call, &Manner::Parts(kept))?;
                Ok((Answer::Empty, Some(Told { errno: Some(errno), ..told })))
            }
        }
    }

    fn read_damaged(&self, call: &Call<'_>, corrupt: &Corrupt, firing: &Firing) -> io::Result<Altered> {
        let Call::Read { fh, offset, size, flags, .. } = call else { return Err(misfit()) };
        let Answer::Data(mut data) = self.read(*fh, *offset, *size, *flags)? else { return Err(misfit()) };
        let damaged = corrupt.damage(&mut data, |k| firing.draw(k));
        let told = (!damaged.is_empty())
            .then(|| Told { changed: Some(Arc::new(in_file(&damaged, *offset))), ..Told::default() });
        Ok((Answer::Data(data), told))
    }

    fn write_damaged(
        &self,
        caller: &Caller,
        call: &Call<'_>,
        corrupt: &Corrupt,
        firing: &Firing,
    ) -> io::Result<Altered> {
        let Call::Write { offset, data, .. } = call else { return Err(misfit()) };
        let mut bytes = data.to_vec();
        let damaged = corrupt.damage(&mut bytes, |k| firing.draw(k));
        if damaged.is_empty() {
            return Ok((self.write(caller, call, &Manner::Kept)?, None));
        }
        let parts = in_file(&damaged, *offset);
        let manner = Manner::Damaged { written: bytes, parts: near_ones_as_one(&parts), mark: mark(firing) };
        Ok((self.write(caller, call, &manner)?, Some(Told { changed: Some(Arc::new(parts)), ..Told::default() })))
    }

    /// As much as there is at the right place, from the wrong one; what the file does not have there is zeros.
    fn read_astray(&self, call: &Call<'_>, elsewhere: Elsewhere) -> io::Result<Altered> {
        let Call::Read { fh, offset, size, flags, .. } = call else { return Err(misfit()) };
        let file = self.files.get(*fh)?;
        let there = (stat(&file.file)?.st_size as u64).saturating_sub(*offset).min(u64::from(*size));
        let Some(place) = elsewhere.of(*offset).filter(|_| there > 0) else {
            return Ok((self.read(*fh, *offset, *size, *flags)?, None));
        };
        let mut data = buffer::lend(there as usize);
        let readable = std::fs::File::from(file.inode.open(libc::O_RDONLY)?);
        let had = read_at(&readable, &mut data, place)?;
        data[had..].fill(0);
        let changed = Some(Arc::new(std::iter::once(place..place + there).collect()));
        Ok((Answer::Data(data), Some(Told { changed, ..Told::default() })))
    }

    fn write_astray(
        &self,
        caller: &Caller,
        call: &Call<'_>,
        elsewhere: Elsewhere,
        firing: &Firing,
    ) -> io::Result<Altered> {
        let (offset, length) = call.range().ok_or_else(misfit)?;
        let Some(place) = elsewhere.of(offset) else {
            return Ok((self.write(caller, call, &Manner::Kept)?, None));
        };
        let Call::Write { fh, .. } = call else { return Err(misfit()) };
        let size = (stat(&self.files.get(*fh)?.file)?.st_size as u64).max(offset + length);
        let answer = self.write(caller, call, &Manner::Astray { place, mark: mark(firing) })?;
        let landed = place..(place + length).min(size).max(place);
        let changed = [offset..offset + length, landed].into_iter().filter(|range| !range.is_empty()).collect();
        Ok((answer, Some(Told { changed: Some(Arc::new(changed)), ..Told::default() })))
    }

    /// Is some rule armed that makes reads of this file short?
    pub fn shortens_reads(&self, inode: &Arc<Inode>) -> bool {
        if !self.arming.concerns(Op::Read) {
            return false;
        }
        let plan = self.arming.plan();
        let shortens = |rule: &Rule| rule.faults().any(|fault| matches!(fault, Fault::Short(_)));
        let mut rules = plan.rules.iter().filter(|rule| rule.may_concern(Op::Read) && shortens(rule));
        rules.any(|rule| is_about(rule, inode))
    }
}

/// A device gives and takes no part of a sector.
fn whole_sectors(part: u64, flags: i32) -> u64 {
    if flags & libc::O_DIRECT == 0 || part < SECTOR { part } else { part / SECTOR * SECTOR }
}

fn written(answer: &Answer) -> Option<u64> {
    match answer {
        Answer::Written(count) => Some(u64::from(*count)),
        _ => None,
    }
}

/// Places in a request as places in the file.
fn in_file(ranges: &[Range<usize>], offset: u64) -> Vec<Range<u64>> {
    ranges.iter().map(|range| offset + range.start as u64..offset + range.end as u64).collect()
}

/// Places with little between them, as one: what is between them is right in either.
fn near_ones_as_one(parts: &[Range<u64>]) -> Vec<Range<u64>> {
    /// Less than it costs to keep another place.
    const LITTLE: u64 = 128;
    let mut merged: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match merged.last_mut() {
            Some(last) if part.start <= last.end + LITTLE => last.end = part.end,
            _ => merged.push(part.clone()),
        }
    }
    merged
}

fn mark(firing: &Firing) -> Mark {
    Mark { rule: firing.rule.name.clone(), nth: firing.nth, at: SystemTime::now() }
}

/// The answer with wrong attributes.
fn misreport(answer: Answer, wrong: &Attributes) -> Answer {
    match answer {
        Answer::Entry(mut entry) => {
            misreport_attr(&mut entry.attr, wrong);
            Answer::Entry(entry)
        }
        Answer::Created(mut entry, fh, served) => {
            misreport_attr(&mut entry.attr, wrong);
            Answer::Created(entry, fh, served)
        }
        Answer::Attr(mut attr, keep) => {
            misreport_attr(&mut attr, wrong);
            Answer::Attr(attr, keep)
        }
        other => other,
    }
}

fn misreport_attr(attr: &mut FileAttr, wrong: &Attributes) {
    let number = |amount: Option<Amount>, right: u64| {
        amount.map_or(right, |amount| amount.of(i128::from(right)).clamp(0, i128::from(i64::MAX)) as u64)
    };
    attr.size = number(wrong.size, attr.size);
    attr.blocks = number(wrong.blocks, attr.blocks);
    attr.nlink = number(wrong.nlink, u64::from(attr.nlink)).min(u64::from(u32::MAX)) as u32;
    attr.perm = wrong.perm.unwrap_or(attr.perm);
    attr.uid = wrong.uid.unwrap_or(attr.uid);
    attr.gid = wrong.gid.unwrap_or(attr.gid);
    attr.atime = moment(wrong.atime, attr.atime);
    attr.mtime = moment(wrong.mtime, attr.mtime);
    attr.ctime = moment(wrong.ctime, attr.ctime);
}

/// Never before the epoch, where not every filesystem could have been.
fn moment(amount: Option<Amount>, right: SystemTime) -> SystemTime {
    let Some(amount) = amount else { return right };
    let since = right.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128);
    let ns = amount.of(since).clamp(0, i128::from(u64::MAX) / 4);
    UNIX_EPOCH + Duration::from_nanos(ns as u64)
}
