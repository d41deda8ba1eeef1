//! One buffer a thread, aligned as direct I/O wants it, so that no read and no direct write allocates.
//!
//! Called by readers and workers. No locks.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// No device wants more.
const ALIGNMENT: usize = 4096;
/// Larger ones are not kept: an idle thread must not sit on memory. The kernel asks for no more than this at a time.
const LARGEST_KEPT: usize = (1 << 20) + ALIGNMENT;

thread_local! {
    static OURS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Bytes at a multiple of 4096; dropped, their memory serves the next [`lend`] of that thread.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

/// A buffer of `size` bytes with any contents.
pub fn lend(size: usize) -> Buffer {
    let mut memory = OURS.take();
    if memory.len() < size + ALIGNMENT {
        // The new part is zeroed once; what it was is of no interest.
        memory.clear();
        memory.resize(size + ALIGNMENT, 0);
    }
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    Buffer { memory, start, length: size }
}

impl Buffer {
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Buffer {
        let mut buffer = lend(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if memory.len() <= LARGEST_KEPT {
            // A thread that is ending has no use for it.
            let _ = OURS.try_with(|ours| {
                let kept = ours.take();
                ours.set(if kept.len() < memory.len() { memory } else { kept });
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_its_memory_is_used_again() {
        for size in [100_000, 1, 5000] {
            let buffer = lend(size);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(ALIGNMENT)), (size, 0));
        }
        let before = lend(1).as_ptr();
        assert_eq!(lend(100_000).as_ptr(), before);
        assert_eq!(&*Buffer::from(&b"abc"[..]), b"abc");
    }
}
