//! Port I/O: the debug console, and ports that nothing should answer.

use std::arch::asm;

use anyhow::{Result, bail};

/// The VMM's debug console.
const CONSOLE: u16 = 0x3f8;

/// Gets access to all ports.
pub fn open() -> Result<()> {
    // SAFETY: changes the privilege of port instructions of this thread, nothing else.
    if unsafe { libc::iopl(3) } != 0 {
        bail!("iopl: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// Writes one byte.
pub fn write8(port: u16, value: u8) {
    // SAFETY: an out instruction touches no memory; iopl was granted.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes four bytes.
pub fn write32(port: u16, value: u32) {
    // SAFETY: an out instruction touches no memory; iopl was granted.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Reads four bytes.
pub fn read32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: an in instruction touches no memory; iopl was granted.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes a buffer with one string instruction.
pub fn write_string(port: u16, data: &[u8]) {
    // SAFETY: reads `data.len()` bytes from `data`, which lives for the call; iopl was granted.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") data.as_ptr() => _,
            inout("rcx") data.len() => _,
            options(nostack, readonly)
        );
    }
}

/// Says a line to the driver.
pub fn say(line: &str) {
    for byte in line.bytes().chain(*b"\n") {
        write8(CONSOLE, byte);
    }
}
