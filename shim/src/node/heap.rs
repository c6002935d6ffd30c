//! This process's heap, of which the node has one for each pod: what a start leaves free in it goes back to the node.

/// Has all threads share one heap. What each would keep for itself is more than they gain: there is one that works, and some that wait for files.
/// To be called while there is one thread.
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator; no other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives whole pages that are free back to the node. Takes some tens of microseconds.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator's own lock is taken; nothing that is in use changes.
    unsafe {
        libc::malloc_trim(0);
    }
}
