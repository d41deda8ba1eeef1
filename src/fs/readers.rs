//! Which readers are in the middle of a request.
//!
//! For two who need to know. A reader that is the last free one does nothing itself, but hands over what it has read
//! ([`Readers::is_last_free`]): whatever the disk does to the others, somebody goes on reading. And a change of the
//! rules waits for the requests that began before it ([`Readers::wait`]): one that was decided under the old rules may
//! still be about to tell the kernel something that it then keeps, a page or a name, and only when all those are through
//! does it help to make the kernel forget.
//!
//! A reader marks its beginning and its end with a store each. The lock is for those who wait: helpers, never a reader.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*, fence};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// As many readers as `--readers` can ask for.
pub const MOST: usize = 256;

/// The readers of one mount.
pub struct Readers {
    slots: Box<[Slot]>,
    taken: AtomicUsize,
    /// How many there are; 0 before they are started.
    count: AtomicUsize,
    handed_over: HandedOver,
}

/// What one reader is doing: its requests are counted, and the two lowest bits say of what sort the one is that it is in.
/// On a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Slot(AtomicU64);

/// In a request that is not done yet.
const BUSY: u64 = 1;
/// In one whose answer tells the kernel something that it keeps.
const TELLING: u64 = 2;
const NEXT: u64 = 4;

/// Requests that have left their reader, in two generations: who waits begins a new one, and lets the old one run out.
#[derive(Default)]
struct HandedOver {
    generation: AtomicUsize,
    under_way: [Arc<AtomicUsize>; 2],
    waiting: Mutex<()>,
}

/// A request that has left its reader, and is under way until this is dropped.
pub struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

thread_local! {
    /// The slot of this thread, which reads for one mount all its life; none on other threads.
    static OWN: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Default for Readers {
    fn default() -> Self {
        Readers {
            slots: (0..MOST).map(|_| Slot::default()).collect(),
            taken: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            handed_over: HandedOver::default(),
        }
    }
}

impl Readers {
    /// So many are about to be started.
    pub fn expect(&self, count: usize) {
        self.count.store(count, Release);
    }

    /// Runs one request of the calling reader. `telling`: does the kernel keep something of its answer?
    pub fn busy<T>(&self, telling: bool, act: impl FnOnce() -> T) -> T {
        let own = OWN.get().unwrap_or_else(|| {
            let own = self.taken.fetch_add(1, AcqRel) % MOST;
            OWN.set(Some(own));
            own
        });
        let slot = &self.slots[own].0;
        let idle = slot.load(Relaxed);
        slot.store(idle | BUSY | if telling { TELLING } else { 0 }, Relaxed);
        // Who looks at this slot after the fence sees it busy, or is seen by us: of two readers that both think themselves
        // the last one, at least one is right.
        fence(SeqCst);
        let _end = End(slot, idle + NEXT);
        act()
    }

    /// To be called before the answer is sent: from here on the calling thread, if it is a reader, waits for nothing but a
    /// processor. Who wakes up by the answer often takes ours, and then sends the next request, which another reader reads:
    /// that this one has not come back yet is not to make that one the last.
    pub fn about_to_answer(&self) {
        if let Some(own) = OWN.get() {
            let slot = &self.slots[own].0;
            slot.store(slot.load(Relaxed) & !BUSY, Release);
        }
    }

    /// Are all other readers in the middle of a request? Never on a thread that is no reader.
    pub fn is_last_free(&self) -> bool {
        let count = self.count.load(Relaxed);
        let Some(own) = OWN.get().filter(|_| count > 1 && self.taken.load(Relaxed) >= count) else {
            // Of one reader nothing else was wanted, and who has not taken a slot has never had a request.
            return false;
        };
        // The caller's own slot is among the busy ones. Each begins at its own: they do not all look at the first
        // one's.
        let (before, after) = self.slots[..count].split_at(own.min(count));
        after.iter().chain(before).all(|slot| slot.0.load(Acquire) & BUSY != 0)
    }

    /// To be held by a telling request that leaves its reader, from before it does until it is answered.
    pub fn hand_over(&self) -> UnderWay {
        let generation = self.handed_over.generation.load(Acquire) % 2;
        let under_way = self.handed_over.under_way[generation].clone();
        under_way.fetch_add(1, AcqRel);
        UnderWay(under_way)
    }

    /// Waits until every telling request that began before this call has been answered; `false` if that takes too long.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        fence(SeqCst);
        let begun = self.slots.iter().map(|slot| (slot, slot.0.load(Acquire)));
        let begun: Vec<_> = begun.filter(|(_, value)| value & TELLING != 0).collect();
        // Only about to answer is not answered.
        let is_through = |slot: &Slot, value: u64| (slot.0.load(Acquire) ^ value) & !BUSY != 0;
        let through = begun.iter().all(|(slot, value)| eventually(until, || is_through(slot, *value)));
        // Only now: what these have handed over meanwhile is counted.
        through && self.handed_over.wait(until)
    }
}

impl HandedOver {
    fn wait(&self, until: Instant) -> bool {
        let Some(_turn) = self.waiting.try_lock_until(until) else { return false };
        let is_through = |generation: usize| eventually(until, || self.under_way[generation].load(Acquire) == 0);
        // What was under way when somebody last gave up may still be.
        let old = self.generation.load(Acquire) % 2;
        if !is_through(1 - old) {
            return false;
        }
        self.generation.fetch_add(1, AcqRel);
        is_through(old)
    }
}

fn eventually(until: Instant, holds: impl Fn() -> bool) -> bool {
    while !holds() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    true
}

/// The end of a request, also of one that panics.
struct End<'a>(&'a AtomicU64, u64);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Sender, bounded};
    use std::thread::JoinHandle;

    /// A reader that is in a request until the sender is dropped.
    fn busy_reader(readers: &Arc<Readers>) -> (Sender<()>, JoinHandle<()>) {
        let (end, ended) = bounded::<()>(0);
        let (begin, begun) = bounded::<()>(0);
        let busy = readers.clone();
        let reader = std::thread::spawn(move || {
            busy.busy(true, || {
                begin.send(()).unwrap();
                let _ = ended.recv();
            });
        });
        begun.recv().unwrap();
        (end, reader)
    }

    #[test]
    fn a_request_that_began_before_is_waited_for_and_a_later_one_is_not() {
        let readers = Arc::new(Readers::default());
        assert!(readers.wait(Duration::ZERO), "nobody is in a request");
        let (end, reader) = busy_reader(&readers);
        assert!(!readers.wait(Duration::from_millis(20)));
        drop(end);
        assert!(readers.wait(Duration::from_secs(10)));
        reader.join().unwrap();
    }

    #[test]
    fn a_request_that_tells_the_kernel_nothing_is_not_waited_for() {
        let readers = Readers::default();
        readers.busy(false, || assert!(readers.wait(Duration::ZERO)));
    }

    #[test]
    fn a_request_that_was_handed_over_before_is_waited_for_and_a_later_one_is_not() {
        let readers = Readers::default();
        let before = readers.hand_over();
        assert!(!readers.wait(Duration::from_millis(20)));
        drop(before);
        std::thread::scope(|scope| {
            let before = readers.hand_over();
            let waiting = scope.spawn(|| readers.wait(Duration::from_secs(10)));
            while readers.handed_over.generation.load(Acquire) < 2 {
                std::thread::yield_now();
            }
            let _later = readers.hand_over();
            drop(before);
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn what_one_has_given_up_on_the_next_waits_for() {
        let readers = Readers::default();
        let before = readers.hand_over();
        for _ in 0..3 {
            assert!(!readers.wait(Duration::from_millis(20)));
        }
        drop(before);
        assert!(readers.wait(Duration::from_secs(10)));
    }

    #[test]
    fn the_last_free_reader_knows_it() {
        let readers = Arc::new(Readers::default());
        readers.expect(2);
        assert!(!readers.is_last_free(), "this thread is no reader yet");
        readers.busy(false, || assert!(!readers.is_last_free(), "the other one has had no request"));
        let (end, reader) = busy_reader(&readers);
        readers.busy(false, || {
            assert!(readers.is_last_free());
            readers.about_to_answer();
            assert!(!readers.is_last_free());
        });
        drop(end);
        reader.join().unwrap();
        readers.busy(false, || assert!(!readers.is_last_free()));
    }
}
