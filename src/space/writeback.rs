//! The error of a write that was accepted and could not be kept, and to whom it is told.
//!
//! As the kernel's `errseq_t`: each open file description is told once, by its next sync; one that was opened later is
//! told too if nobody was before. Atomics only.

use std::sync::atomic::{AtomicU32, Ordering::*};

/// Set once somebody was told.
const SEEN: u32 = 1;

/// Of a file: the number of its errors, and whether the last one was told.
#[derive(Debug, Default)]
pub struct WritebackError(AtomicU32);

/// Of an open file: which error it knows of.
#[derive(Debug, Default)]
pub struct Told(AtomicU32);

impl WritebackError {
    /// One more. As long as nobody was told, all are one.
    pub fn record(&self) {
        let next = |value: u32| (value == 0 || value & SEEN != 0).then(|| (value & !SEEN).wrapping_add(2).max(2));
        let _ = self.0.fetch_update(AcqRel, Acquire, next);
    }

    /// What a file that is opened now knows of.
    pub fn sample(&self) -> Told {
        let value = self.0.load(Acquire);
        Told(AtomicU32::new(if value & SEEN != 0 { value } else { 0 }))
    }

    /// Is there an error to be told to this open file? Then it is told by that.
    pub fn tell(&self, told: &Told) -> bool {
        let value = self.0.load(Acquire);
        if value == 0 || value == told.0.load(Acquire) {
            return false;
        }
        let _ = self.0.compare_exchange(value, value | SEEN, AcqRel, Relaxed);
        // Of two who sync one open file at once, one is told.
        told.0.swap(value | SEEN, AcqRel) != value | SEEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_open_file_is_told_once_and_a_later_one_only_of_what_nobody_was_told() {
        let error = WritebackError::default();
        let (a, b) = (error.sample(), error.sample());
        assert!(!error.tell(&a));
        error.record();
        error.record();
        let later = error.sample();
        assert!(error.tell(&a) && !error.tell(&a));
        assert!(error.tell(&later) && !error.tell(&later));
        let latest = error.sample();
        assert!(!error.tell(&latest), "it was told before that was opened");
        error.record();
        assert!(error.tell(&a) && error.tell(&b) && error.tell(&latest));
        assert!(!error.tell(&b) && error.tell(&later));
    }
}
