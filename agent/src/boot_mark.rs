//! Tells the host of the moments of a boot.

use brig_agent_protocol::{BOOT_MARK_PORT, BootMark};

/// Reports a moment of the boot to the host by a port write. Without the port the host knows less.
pub fn boot_mark(mark: BootMark) {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: ioperm changes only this thread's access to one port that the VMM owns.
        if unsafe { libc::ioperm(u64::from(BOOT_MARK_PORT), 1, 1) } != 0 {
            return;
        }
        let value = mark as u8;
        // SAFETY: the access was just granted; the VMM treats the write as a time stamp.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") BOOT_MARK_PORT, in("al") value, options(nomem, nostack, preserves_flags));
            libc::ioperm(u64::from(BOOT_MARK_PORT), 1, 0);
        }
    }
}
