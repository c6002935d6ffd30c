//! What a start has used of the process's own memory goes back to the host: the machine is built by deep calls and large blocks, and what follows
//! needs neither. Measured: 150 KiB of each VMM.

use crate::arch::x86_64::layout::PAGE;

/// Of the stack below the caller, in bytes: what is left alone, and how far a start may have come.
const KEPT: usize = 8 << 10;
const DEPTH: usize = 256 << 10;

/// To be called by the main thread, once it has its filter and before it waits.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator's own lock is taken; nothing that is in use changes.
    unsafe {
        libc::malloc_trim(0);
    }
    give_back_stack();
}

/// The main thread's stack grows by itself, and nothing else is mapped within a MiB below it.
#[inline(never)]
fn give_back_stack() {
    let here = 0_u8;
    let page = usize::try_from(PAGE).unwrap_or(4096);
    let Some(end) = (&raw const here).addr().checked_sub(KEPT) else {
        return;
    };
    let end = end - end % page;
    let start: *const u8 = std::ptr::without_provenance(end.saturating_sub(DEPTH));
    // SAFETY: below this frame, and what it may still call, no frame is live; what lies there is stack, or nothing, which the kernel passes over.
    let _ = unsafe { libc::madvise(start.cast_mut().cast(), DEPTH, libc::MADV_DONTNEED) };
}
