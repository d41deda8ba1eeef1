//! One firing is one error in the program: what is owed, and what was paid.
//!
//! The kernel makes several requests of one call. A failed readahead is asked again, one page of it, by a synchronous
//! read, and only that one's error reaches the program (of a load from a mapping, only the second one's: the first ends
//! an attempt that the kernel repeats); and an error after the first piece of a call is told as a short result, so that
//! the program meets the error only when it goes on. So a firing of `error` that the program has not seen yet is
//! *owed*: the next request for the same range gets the same error, uncounted and marked `repeat`. A write's debt is
//! paid to its own thread; a read's to whoever reads the page next, because threads that wait for a page are served in
//! any order. What a failed read leaves behind is pages in the kernel's cache without contents: their next read comes
//! once and not twice.
//!
//! Used by readers while a rule is armed that can fail a write, while one fires, and while something is owed. The lock is held for a look
//! at short lists; procfs is read outside it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::process::{self, CallRange, Waiting};
use crate::durability::Ranges;
use crate::fault::kind::Portion;
use crate::fault::{Firing, Op};

/// A repetition after this is the program's own.
const LIFE: Duration = Duration::from_secs(1);
/// More than this many at a time would be a list too long to look through; the oldest go first.
const MOST: usize = 256;
/// How many repetitions of a failed request the kernel makes for one load from a mapping.
const FAULT_REPEATS: u32 = 2;
/// No call is told its error later than this, whatever it looks like.
const MOST_REPEATS: u32 = 3;
const PAGE: u64 = 4096;

/// A read that is to be short, through the page cache. There a short answer would make the kernel take the file for shorter;
/// what makes a read short without harm is an error behind its first page, after which the kernel gives what it has. So the
/// pages before the cut are given, the first behind it fails, and the program, which goes on from there, is a new call.
#[derive(Debug)]
struct Cut {
    ino: u64,
    tid: u32,
    call: CallRange,
    /// The page that fails.
    at: u64,
    since: Instant,
    firing: Firing,
    /// Is it to be counted when a page fails? If none ever does, the kernel has them all, and it was none.
    uncounted: bool,
}

/// What becomes of a request of a call that is to be short.
#[derive(Debug)]
pub enum OfCut {
    Serve,
    /// The program gets so many bytes. With the firing, counted, if it is to be told now.
    Fail {
        done: u64,
        firing: Option<Firing>,
    },
}

/// Firings that programs have not seen yet, and their traces in the kernel's cache.
#[derive(Debug, Default)]
pub struct Holds {
    /// Entries of `owed`, `cuts` and `lacking`.
    count: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    owed: Vec<Hold>,
    cuts: Vec<Cut>,
    /// By file: pages that the kernel has without contents.
    lacking: HashMap<u64, Ranges>,
    /// Writes that may be under way, in pieces.
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Hold {
    op: Op,
    ino: u64,
    tid: u32,
    range: Range<u64>,
    errno: i32,
    firing: Firing,
    since: Instant,
    /// How often it was told since.
    repeats: u32,
}

/// Pieces of one thread's writes to one file, one right behind the other. A write that is behind none of them is the first
/// of its call. Of appends this is all there is: the kernel tells where a piece goes, and nobody where its call began.
#[derive(Clone, Copy, Debug)]
struct Run {
    tid: u32,
    ino: u64,
    start: u64,
    end: u64,
}

/// A request as far as holds look at it.
#[derive(Clone, Debug)]
pub struct Piece {
    pub op: Op,
    pub ino: u64,
    pub tid: u32,
    pub range: Range<u64>,
    /// Does it go through the page cache?
    pub cached: bool,
    /// Is it the kernel writing back a shared mapping? Then no call waits for it.
    pub writeback: bool,
    /// Does it go where the file ends?
    pub append: bool,
}

impl Holds {
    /// Is there anything to look at? One relaxed load, for the hot path.
    pub fn any(&self) -> bool {
        self.count.load(Relaxed) != 0
    }

    /// The error that is owed to this request, if one is.
    pub fn owed(&self, piece: &Piece) -> Option<(i32, Firing)> {
        if !self.is_owed(piece) {
            return None;
        }
        let waiting = process::waits_in(piece.tid);
        let mut state = self.state.lock();
        let run = state.run_start(piece);
        let at = state.owed.iter().position(|hold| hold.is_for(piece))?;
        let hold = &mut state.owed[at];
        hold.repeats += 1;
        let (errno, firing, repeats) = (hold.errno, hold.firing.clone(), hold.repeats);
        if repeats >= MOST_REPEATS || program_sees(piece, waiting, repeats, run) {
            state.owed.remove(at);
        }
        self.recount(&state);
        Some((errno, firing))
    }

    fn is_owed(&self, piece: &Piece) -> bool {
        let mut state = self.state.lock();
        // A rule that is gone owes nothing.
        state.owed.retain(|hold| hold.since.elapsed() < LIFE && !hold.firing.rule.counters.is_retired());
        self.recount(&state);
        state.owed.iter().any(|hold| hold.is_for(piece))
    }

    /// Notes an error that is about to be told.
    pub fn told(&self, piece: &Piece, errno: i32, firing: &Firing) {
        let cached_read = piece.op == Op::Read && piece.cached;
        let first = piece.op == Op::Write && (piece.writeback || !self.state.lock().goes_on(piece));
        // Procfs is looked at only where it decides.
        let seen = first || {
            let readahead = cached_read && !self.state.lock().lacks(piece);
            !readahead && {
                let waiting = process::waits_in(piece.tid);
                program_sees(piece, waiting, 0, self.state.lock().run_start(piece))
            }
        };
        let mut state = self.state.lock();
        if cached_read {
            state.lacking.entry(piece.ino).or_default().add(piece.range.clone());
        }
        if !seen {
            if state.owed.len() >= MOST {
                state.owed.remove(0);
            }
            state.owed.push(Hold {
                op: piece.op,
                ino: piece.ino,
                tid: piece.tid,
                // Of a medium that is bad in one place, only the page of that place is owed: the others can be read.
                range: firing
                    .place
                    .map_or(piece.range.clone(), |place| place / PAGE * PAGE..place / PAGE * PAGE + PAGE),
                errno,
                firing: firing.clone(),
                since: Instant::now(),
                repeats: 0,
            });
        }
        self.recount(&state);
    }

    /// Notes a request that is done as asked: its pages have contents, what comes behind it may be of the same call.
    pub fn passed(&self, piece: &Piece) {
        if piece.op == Op::Read && self.any() {
            let mut state = self.state.lock();
            if let Some(lacking) = state.lacking.get_mut(&piece.ino) {
                lacking.remove(piece.range.clone());
                state.lacking.retain(|_, ranges| !ranges.is_empty());
                self.recount(&state);
            }
        } else if piece.op == Op::Write {
            self.state.lock().note_write(piece);
        }
    }

    /// Pages that were thrown out of the cache are ordinary again: of one file, or of all.
    pub fn forget(&self, ino: Option<u64>) {
        let mut state = self.state.lock();
        state.lacking.retain(|of, _| ino.is_some_and(|ino| *of != ino));
        state.owed.retain(|hold| ino.is_some_and(|ino| hold.ino != ino));
        state.cuts.retain(|cut| ino.is_some_and(|ino| cut.ino != ino));
        self.recount(&state);
    }

    /// Makes the call short that a cached read is part of: what becomes of this part of it. Nothing when the call cannot be
    /// short: one page is the least, and it must be seen where the call began.
    ///
    /// `size` is the file's.
    pub fn shorten(&self, piece: &Piece, portion: Portion, size: u64, firing: &Firing) -> Option<OfCut> {
        let Waiting::Call(call) = process::waits_in(piece.tid) else { return None };
        let end = call.start.saturating_add(call.length).min(size);
        let part = portion.of(end.saturating_sub(call.start))?;
        let least = call.start / PAGE * PAGE + PAGE;
        // What lies before this request, the program has already.
        let at = ((call.start + part) / PAGE * PAGE).max(piece.range.start).max(least);
        if call.writes || at >= end {
            return None;
        }
        let mut state = self.state.lock();
        if state.cuts.len() >= MOST {
            state.cuts.remove(0);
        }
        let (since, firing) = (Instant::now(), firing.clone());
        state.cuts.push(Cut { ino: piece.ino, tid: piece.tid, call, at, since, firing, uncounted: false });
        let last = state.cuts.len() - 1;
        let now = state.cut(piece, last);
        if let (OfCut::Serve, Some(cut)) = (&now, state.cuts.get_mut(last)) {
            cut.uncounted = true;
        }
        self.recount(&state);
        Some(now)
    }

    /// What becomes of a request, if its call is to be short.
    pub fn of_cut(&self, piece: &Piece) -> Option<OfCut> {
        {
            let mut state = self.state.lock();
            // A rule that is gone makes nothing short.
            state.cuts.retain(|cut| cut.since.elapsed() < LIFE && !cut.firing.rule.counters.is_retired());
            self.recount(&state);
            if !state.cuts.iter().any(|cut| cut.is_for(piece)) {
                return None;
            }
        }
        let waiting = process::waits_in(piece.tid);
        let mut state = self.state.lock();
        let i = state.cuts.iter().position(|cut| cut.is_for(piece))?;
        let now = match waiting {
            Waiting::Call(call) if call == state.cuts[i].call => Some(state.cut(piece, i)),
            // That call is over.
            _ => {
                state.cuts.remove(i);
                None
            }
        };
        self.recount(&state);
        now
    }

    fn recount(&self, state: &State) {
        self.count.store(state.owed.len() + state.cuts.len() + state.lacking.len(), Release);
    }
}

impl State {
    /// Does this part of a call that is to be short reach the cut? A window that was read ahead fails first, and is asked
    /// again page by page.
    fn cut(&mut self, piece: &Piece, i: usize) -> OfCut {
        let cut = &mut self.cuts[i];
        let (at, done) = (cut.at, cut.at - cut.call.start);
        if piece.range.end <= at {
            return OfCut::Serve;
        }
        let counts = std::mem::take(&mut cut.uncounted);
        if counts && !cut.firing.renew() {
            // Others have had the last one meanwhile.
            self.cuts.remove(i);
            return OfCut::Serve;
        }
        let firing = counts.then(|| cut.firing.clone());
        if piece.range.start >= at && self.lacks(piece) {
            self.cuts.remove(i);
        }
        self.lacking.entry(piece.ino).or_default().add(piece.range.clone());
        OfCut::Fail { done, firing }
    }

    /// Is it the repetition of a page that was left without contents? One page is asked for then: more is a readahead, of pages
    /// that the kernel has thrown out since.
    fn lacks(&self, piece: &Piece) -> bool {
        let at = piece.range.start;
        piece.range.end - at <= PAGE
            && self.lacking.get(&piece.ino).is_some_and(|ranges| ranges.gaps(at..at + 1).is_empty())
    }

    fn run(&self, piece: &Piece) -> Option<&Run> {
        let goes_on = |run: &&Run| run.tid == piece.tid && run.ino == piece.ino && run.end == piece.range.start;
        self.runs.iter().find(goes_on)
    }

    /// Is a write right behind one that may be of the same call?
    fn goes_on(&self, piece: &Piece) -> bool {
        self.run(piece).is_some()
    }

    /// Where the run began that a piece goes on, or begins.
    fn run_start(&self, piece: &Piece) -> u64 {
        self.run(piece).map_or(piece.range.start, |run| run.start)
    }

    fn note_write(&mut self, piece: &Piece) {
        let start = self.run_start(piece);
        self.runs.retain(|run| (run.tid, run.ino) != (piece.tid, piece.ino));
        // Of appends a piece that ends between pages counts as the last of its call, because nothing tells where that began. The
        // kernel may cut a call anywhere: what of the program's memory is not there yet is sent by itself.
        if piece.range.end.is_multiple_of(PAGE) || !piece.append {
            if self.runs.len() >= MOST {
                self.runs.remove(0);
            }
            self.runs.push(Run { tid: piece.tid, ino: piece.ino, start, end: piece.range.end });
        }
    }
}

impl Cut {
    fn is_for(&self, piece: &Piece) -> bool {
        piece.op == Op::Read && piece.cached && self.ino == piece.ino && self.tid == piece.tid
    }
}

impl Hold {
    fn is_for(&self, piece: &Piece) -> bool {
        let same_caller = self.op == Op::Read || self.tid == piece.tid;
        self.op == piece.op && self.ino == piece.ino && same_caller && self.range.contains(&piece.range.start)
    }
}

/// Will an error of this request reach the program? Not when its call has got something already: then the result is
/// short. When the call cannot be seen (asynchronous I/O, say), it will.
fn program_sees(piece: &Piece, waiting: Waiting, repeats: u32, run_start: u64) -> bool {
    match waiting {
        // A write whose source is a mapping: the read is for the load.
        Waiting::Call(call) if piece.op == Op::Read && call.writes => repeats >= FAULT_REPEATS,
        Waiting::Call(call) if piece.append => is_first_of_appends(piece, call, run_start),
        Waiting::Call(call) => is_first(piece, call),
        Waiting::Fault => repeats >= FAULT_REPEATS,
        Waiting::Unknown => true,
    }
}

/// A page that holds the first byte of the call is its first part, though it begins before. What the call is not about
/// at all was read ahead for nobody.
fn is_first(piece: &Piece, call: CallRange) -> bool {
    let start = piece.range.start;
    !(start > call.start && start < call.start.saturating_add(call.length))
}

/// Of calls of one length after each other, those pieces are the first that lie at a multiple of it.
fn is_first_of_appends(piece: &Piece, call: CallRange, run_start: u64) -> bool {
    let before = piece.range.start - run_start.min(piece.range.start);
    call.length == 0 || before.is_multiple_of(call.length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(op: Op, range: Range<u64>) -> Piece {
        Piece { op, ino: 1, tid: 1, range, cached: true, writeback: false, append: false }
    }

    #[test]
    fn only_the_part_that_holds_the_start_of_a_call_decides_its_result() {
        let read = |range| piece(Op::Read, range);
        let call = CallRange { start: 5000, length: 10_000, writes: false };
        assert!(is_first(&read(4096..8192), call));
        assert!(!is_first(&read(8192..12288), call));
        assert!(is_first(&read(0..1 << 20), call), "a window around all of it");
        assert!(is_first(&read(20_000..24_096), call), "another call's");
    }

    #[test]
    fn of_appends_the_pieces_at_multiples_of_the_length_are_the_first() {
        let mut state = State::default();
        let call = CallRange { start: 0, length: 10_000, writes: true };
        let ranges = [100..4096, 4096..8192, 8192..10_100, 10_100..12_288, 12_288..20_100];
        let first = ranges.map(|range| {
            let piece = Piece { append: true, ..piece(Op::Write, range) };
            let first = is_first_of_appends(&piece, call, state.run_start(&piece));
            state.note_write(&piece);
            first
        });
        assert_eq!(first, [true, false, false, true, false]);
    }
}
