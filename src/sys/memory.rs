//! Memory given back to the system: `mallopt(3)`, `malloc_trim(3)`.

/// Keeps the allocator from holding on to what is freed: glibc gives each thread an arena, and trims but the main one. To
/// be called once, before there are threads. Readers hardly allocate, so they do not miss arenas of their own.
pub fn hold_little() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 2), (libc::M_TRIM_THRESHOLD, 256 << 10)] {
        // SAFETY: takes plain numbers; no other thread is there yet.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back what was freed and lies idle, of all threads. Takes the allocator's locks, one after the other, and its
/// time: never on a reader.
pub fn give_back() {
    // SAFETY: takes a plain number; it is safe to call at any time, from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
