//! Memory given back to the system: `malloc_trim(3)`.

/// Gives back what was freed and lies idle, of all threads. Takes the allocator's locks, one after the other, and its
/// time: never on a reader.
pub fn give_back() {
    // SAFETY: takes a plain number; it is safe to call at any time, from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
