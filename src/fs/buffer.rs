//! One read buffer a thread, lent and given back, so that no read allocates.
//!
//! Called by readers and workers. No locks.

use std::cell::RefCell;

thread_local! {
    static OURS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Larger ones are not kept: an idle thread must not sit on memory. The kernel reads at most 1 MiB at a time.
const LARGEST_KEPT: usize = 1 << 20;

/// A buffer of `size` bytes with any contents.
pub fn lend(size: usize) -> Vec<u8> {
    let mut buffer = OURS.take();
    // Growing zeroes the new part once; shrinking costs nothing.
    buffer.resize(size.max(buffer.len()), 0);
    buffer.truncate(size);
    buffer
}

/// For the next [`lend`] of this thread.
pub fn give_back(buffer: Vec<u8>) {
    if buffer.capacity() <= LARGEST_KEPT {
        OURS.with(|ours| {
            let mut ours = ours.borrow_mut();
            if ours.capacity() < buffer.capacity() {
                *ours = buffer;
            }
        });
    }
}
