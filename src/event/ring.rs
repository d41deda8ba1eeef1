//! The ring: bounded, many publishers, any number of readers that nobody waits for.
//!
//! A publisher takes a number, then writes that number's slot under the slot's own lock. A reader locks one slot for
//! the time of one copy. So a publisher can meet a reader only on the very slot that the reader is a whole ring
//! behind with, and then waits for one copy, never for a client. Slots are allocated once.
//!
//! The waker runs after the event is in its place, and at most once until a reader has looked again.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::filter::NAMES;
use super::record::{Body, Change, Injection, Record};

/// Events that are kept. A record is about 250 bytes, so this is 4 MiB at most, and only as it fills.
pub const CAPACITY: usize = 1 << 14;

/// The place of a reader: the number of the next event it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(pub u64);

/// What a reader finds at its place.
#[derive(Debug)]
pub enum Read {
    Event(Box<Record>),
    /// So many events were overwritten before they were read; go on from here.
    Gap {
        missed: u64,
        next: Cursor,
    },
    /// Nothing yet.
    Empty,
}

/// The ring of one mount.
pub struct Ring {
    slots: Box<[Mutex<Option<Record>>]>,
    /// Number of the next event, from 1.
    next: AtomicU64,
    started: Instant,
    waker: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Was something published since the listener was last told?
    unseen: AtomicBool,
    /// Was the listener told, and has not looked since?
    woken: AtomicBool,
}

impl Default for Ring {
    fn default() -> Self {
        Ring::new(CAPACITY)
    }
}

impl Ring {
    pub fn new(capacity: usize) -> Ring {
        Ring {
            slots: (0..capacity.max(1)).map(|_| Mutex::new(None)).collect(),
            next: AtomicU64::new(1),
            started: Instant::now(),
            waker: OnceLock::new(),
            unseen: AtomicBool::new(false),
            // Nobody listens yet.
            woken: AtomicBool::new(true),
        }
    }

    /// Nanoseconds since the ring began: the monotonic clock of events, rules and parked requests.
    pub fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// Sets who is to be called when there is something to read. Once only.
    pub fn set_waker(&self, waker: impl Fn() + Send + Sync + 'static) {
        let _ = self.waker.set(Box::new(waker));
    }

    /// A firing of a rule. On the hot path: no allocation, no wait for readers.
    pub fn inject(&self, injection: Injection) -> u64 {
        self.publish(Body::Injection(injection))
    }

    /// A change of state.
    pub fn change(&self, event: &'static str, detail: Value) -> u64 {
        debug_assert!(NAMES.contains(&event), "clients cannot ask for {event:?}");
        let detail = match detail {
            Value::Object(detail) => detail,
            other => Map::from_iter([("detail".to_string(), other)]),
        };
        let seq = self.publish(Body::Change(Arc::new(Change { event, detail })));
        self.wake();
        seq
    }

    fn publish(&self, body: Body) -> u64 {
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let monotonic_ns = self.now_ns();
        let seq = self.next.fetch_add(1, AcqRel);
        let mut slot = self.slots[self.index(seq)].lock();
        // A publisher that slept for a whole turn of the ring must not overwrite what came later.
        if slot.as_ref().is_none_or(|old| old.seq < seq) {
            *slot = Some(Record { seq, time_ns, monotonic_ns, body });
        }
        drop(slot);
        self.unseen.store(true, Release);
        seq
    }

    /// Tells the listener that something was published, unless it was told and has not looked since. Readers of the
    /// mount call it after every reply, so that waking the listener is not part of what the program waits for; with
    /// nothing published it is one relaxed load.
    pub fn wake(&self) {
        if self.unseen.load(Relaxed)
            && self.unseen.swap(false, AcqRel)
            && !self.woken.swap(true, AcqRel)
            && let Some(waker) = self.waker.get()
        {
            waker();
        }
    }

    /// To be called by the listener before it reads: from here on the waker runs again.
    pub fn listen(&self) {
        self.woken.store(false, Release);
    }

    /// Where events after this moment begin.
    pub fn cursor(&self) -> Cursor {
        Cursor(self.next.load(Acquire))
    }

    /// The oldest event that is still here.
    pub fn oldest(&self) -> Cursor {
        let next = self.next.load(Acquire);
        Cursor(next.saturating_sub(self.slots.len() as u64).max(1))
    }

    /// The event at a place. An event that is being written counts as not there yet: its readers are woken again.
    pub fn read(&self, at: Cursor) -> Read {
        let slot = self.slots[self.index(at.0)].lock();
        match slot.as_ref() {
            Some(record) if record.seq == at.0 => Read::Event(Box::new(record.clone())),
            Some(record) if record.seq > at.0 => {
                drop(slot);
                let next = self.oldest().max(Cursor(at.0 + 1));
                Read::Gap { missed: next.0 - at.0, next }
            }
            _ => Read::Empty,
        }
    }

    fn index(&self, seq: u64) -> usize {
        (seq % self.slots.len() as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(n: u64) -> Injection {
        Injection { nth: n, ..Injection::default() }
    }

    #[test]
    fn a_reader_sees_every_event_once_and_in_order() {
        let ring = Ring::new(8);
        let start = ring.cursor();
        for n in 1..=5 {
            ring.inject(numbered(n));
        }
        for n in 0..5 {
            match ring.read(Cursor(start.0 + n)) {
                Read::Event(record) => assert_eq!(record.seq, start.0 + n),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(ring.read(Cursor(start.0 + 5)), Read::Empty));
    }

    #[test]
    fn a_reader_that_falls_behind_is_told_how_much_it_missed() {
        let ring = Ring::new(8);
        let start = ring.cursor();
        for n in 1..=20 {
            ring.inject(numbered(n));
        }
        match ring.read(start) {
            Read::Gap { missed, next } => {
                assert_eq!(missed, 12);
                assert_eq!(next, ring.oldest());
                assert!(matches!(ring.read(next), Read::Event(_)));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn many_publishers_lose_nothing() {
        let ring = Ring::new(1 << 12);
        let start = ring.cursor();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..1000 {
                        ring.inject(numbered(n));
                    }
                });
            }
        });
        let read = (0..4000).filter(|n| matches!(ring.read(Cursor(start.0 + n)), Read::Event(_))).count();
        assert_eq!(read, 4000);
    }

    #[test]
    fn the_waker_runs_once_until_the_listener_looks() {
        let ring = Ring::new(8);
        let calls = Arc::new(AtomicU64::new(0));
        let seen = calls.clone();
        ring.set_waker(move || {
            seen.fetch_add(1, Relaxed);
        });
        let publish = |n| {
            ring.inject(numbered(n));
            ring.wake();
        };
        publish(1);
        assert_eq!(calls.load(Relaxed), 0, "nobody listens yet");
        ring.listen();
        publish(2);
        publish(3);
        assert_eq!(calls.load(Relaxed), 1);
        ring.listen();
        ring.wake();
        assert_eq!(calls.load(Relaxed), 1, "nothing new");
        publish(4);
        assert_eq!(calls.load(Relaxed), 2);
    }
}
