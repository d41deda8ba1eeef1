//! One firing is one error in the program: what is owed, and what was paid.
//!
//! The kernel makes several requests of one call. A failed readahead is asked again, one page of it, by a synchronous
//! read, and only that one's error reaches the program (of a load from a mapping, only the second one's: the first
//! ends an attempt that the kernel repeats); and an error after the first piece of a call is told as a short result,
//! so that the program meets the error only when it goes on. So a firing of `error` that the program has
//! not seen yet is *owed*: the next request of the same thread for the same range gets the same error, uncounted and
//! marked `repeat`. Once the program has seen it, what is left is the knowledge that those pages are in the kernel's cache without
//! contents, so that their next read comes once and not twice.
//!
//! Used by readers while a rule of kind `error` is armed on reads or writes, and for a second after a firing. The lock
//! is held for a look at a short list.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::process::{self, CallRange, Waiting};
use crate::fault::{Firing, Op};

/// A repetition after this is the program's own.
const LIFE: Duration = Duration::from_secs(1);
/// More than this many at a time would be a list too long to look through; the oldest go first.
const MOST: usize = 256;

/// Firings that programs have not seen yet, or whose traces the kernel's cache still has.
#[derive(Debug, Default)]
pub struct Holds {
    count: AtomicUsize,
    list: Mutex<Vec<Hold>>,
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
    owed: bool,
    /// How often it was told since.
    repeats: u32,
}

/// How many repetitions of a failed request the kernel makes for one load from a mapping.
const FAULT_REPEATS: u32 = 2;

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
}

impl Holds {
    /// Is there anything to look at? One relaxed load, for the hot path.
    pub fn any(&self) -> bool {
        self.count.load(Relaxed) != 0
    }

    /// The error that is owed to this request, if one is.
    pub fn owed(&self, piece: &Piece) -> Option<(i32, Firing)> {
        let mut list = self.list.lock();
        self.expire(&mut list);
        let hold = list.iter_mut().find(|hold| hold.owed && hold.is_for(piece))?;
        hold.repeats += 1;
        hold.owed = !program_sees(piece, hold.repeats);
        Some((hold.errno, hold.firing.clone()))
    }

    /// Notes an error that is about to be told, and whether the program will see it. `true` when it will.
    pub fn told(&self, piece: &Piece, errno: i32, firing: &Firing) -> bool {
        let mut list = self.list.lock();
        self.expire(&mut list);
        let readahead =
            piece.op == Op::Read && piece.cached && !list.iter().any(|hold| !hold.owed && hold.lacks_contents(piece));
        let seen = !readahead && (piece.writeback || program_sees(piece, 0));
        if piece.op == Op::Read && piece.cached || !seen {
            if list.len() >= MOST {
                list.remove(0);
            }
            list.push(Hold {
                op: piece.op,
                ino: piece.ino,
                tid: piece.tid,
                range: piece.range.clone(),
                errno,
                firing: firing.clone(),
                since: Instant::now(),
                owed: !seen,
                repeats: 0,
            });
            self.count.store(list.len(), Release);
        }
        seen
    }

    /// Pages that were read after all, or thrown out of the cache, are ordinary again.
    pub fn forget(&self, ino: Option<u64>) {
        let mut list = self.list.lock();
        list.retain(|hold| ino.is_some_and(|ino| hold.ino != ino));
        self.count.store(list.len(), Release);
    }

    fn expire(&self, list: &mut Vec<Hold>) {
        list.retain(|hold| hold.since.elapsed() < LIFE);
        self.count.store(list.len(), Release);
    }
}

impl Hold {
    fn is_for(&self, piece: &Piece) -> bool {
        self.op == piece.op && self.ino == piece.ino && self.tid == piece.tid && self.range.contains(&piece.range.start)
    }

    fn lacks_contents(&self, piece: &Piece) -> bool {
        self.op == Op::Read && self.ino == piece.ino && self.range.contains(&piece.range.start)
    }
}

/// Will an error of this request reach the program? Not when its call has got something already: then the result is
/// short. When the call cannot be seen (asynchronous I/O, say), it will.
fn program_sees(piece: &Piece, repeats: u32) -> bool {
    match process::waits_in(piece.tid) {
        Waiting::Call(call) => is_first(piece, call),
        Waiting::Fault => repeats >= FAULT_REPEATS,
        Waiting::Unknown => true,
    }
}

fn is_first(piece: &Piece, call: CallRange) -> bool {
    let (start, end) = (piece.range.start, piece.range.end);
    let earlier_part = start > call.start && start < call.start.saturating_add(call.length);
    let whole = end - start >= call.length;
    // A page that holds the first byte of the call is its first part, though it begins before.
    whole || !earlier_part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_part_that_holds_the_start_of_a_call_decides_its_result() {
        let piece = |range: Range<u64>| Piece { op: Op::Read, ino: 1, tid: 1, range, cached: true, writeback: false };
        let call = CallRange { start: 5000, length: 10_000 };
        assert!(is_first(&piece(4096..8192), call));
        assert!(!is_first(&piece(8192..12288), call));
        assert!(is_first(&piece(0..1 << 20), call), "a window around all of it");
        assert!(is_first(&piece(20_000..24_096), call), "another call's");
    }
}
