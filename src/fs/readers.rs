//! Which readers are in the middle of a request, so that a change of the rules can wait for those that began before it.
//!
//! A request that was decided under the old rules may still be about to tell the kernel something that it then keeps:
//! a page, a name. Only when all those are through does it help to make the kernel forget. A reader marks its
//! beginning and its end with a plain store each; the helper that waits pays for the ordering.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*, compiler_fence};
use std::time::{Duration, Instant};

use crate::sys::membarrier;

/// As many readers as `--readers` can ask for.
const MOST: usize = 256;
/// Where the barrier is missing: longer than a store stays in a processor's own buffer.
const WITHOUT_BARRIER: Duration = Duration::from_millis(10);

/// One number for each reader, odd while it is in a request.
pub struct Readers {
    slots: Box<[Slot]>,
    taken: AtomicUsize,
}

/// On a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Slot(AtomicU64);

impl Default for Readers {
    fn default() -> Self {
        Readers { slots: (0..MOST).map(|_| Slot::default()).collect(), taken: AtomicUsize::new(0) }
    }
}

impl Readers {
    /// Runs one request of the calling reader.
    pub fn busy<T>(&self, act: impl FnOnce() -> T) -> T {
        let slot = &self.slots[self.own()].0;
        let even = slot.load(Relaxed);
        slot.store(even + 1, Relaxed);
        // The other half of this barrier is in `wait`.
        compiler_fence(SeqCst);
        let _end = End(slot, even + 2);
        act()
    }

    /// The slot of this thread, which reads for one mount all its life.
    fn own(&self) -> usize {
        thread_local! {
            static OWN: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        OWN.with(|own| {
            if own.get() == usize::MAX {
                own.set(self.taken.fetch_add(1, Relaxed) % MOST);
            }
            own.get()
        })
    }

    /// Waits until every request that began before this call has been answered; `false` if that takes too long.
    pub fn wait(&self, limit: Duration) -> bool {
        if membarrier::all_threads().is_err() {
            std::thread::sleep(WITHOUT_BARRIER);
        }
        let until = Instant::now() + limit;
        let begun = self.slots.iter().map(|slot| (slot, slot.0.load(Acquire)));
        let begun: Vec<_> = begun.filter(|(_, value)| value % 2 == 1).collect();
        for (slot, value) in begun {
            while slot.0.load(Acquire) == value {
                if Instant::now() > until {
                    return false;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        true
    }
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
    use std::sync::Arc;

    #[test]
    fn a_request_that_began_before_is_waited_for_and_a_later_one_is_not() {
        let readers = Arc::new(Readers::default());
        assert!(readers.wait(Duration::ZERO), "nobody is in a request");
        let (end, ended) = crossbeam_channel::bounded::<()>(0);
        let (begin, begun) = crossbeam_channel::bounded::<()>(0);
        let busy = readers.clone();
        let reader = std::thread::spawn(move || {
            busy.busy(|| {
                begin.send(()).unwrap();
                let _ = ended.recv();
            });
        });
        begun.recv().unwrap();
        assert!(!readers.wait(Duration::from_millis(20)));
        drop(end);
        assert!(readers.wait(Duration::from_secs(10)));
        reader.join().unwrap();
    }
}
