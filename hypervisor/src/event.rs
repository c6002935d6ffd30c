//! An eventfd as a descriptor that can be waited for: vmm-sys-util's has no `AsFd`.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an event, to wait on it.
#[must_use]
pub fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
