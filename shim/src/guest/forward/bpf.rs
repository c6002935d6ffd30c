//! The little of bpf(2) that one program needs: a map of sockets, loading, and a link to a network
//! namespace. Constants and layouts are those of `linux/bpf.h`.
//!
//! Trusted: the kernel, whose verifier judges the program.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Commands.
mod command {
    pub const MAP_CREATE: i64 = 0;
    pub const MAP_UPDATE_ELEM: i64 = 2;
    pub const PROG_LOAD: i64 = 5;
    pub const LINK_CREATE: i64 = 28;
}

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
/// `BPF_PSEUDO_MAP_FD`: the immediate is a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

/// A register.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub enum Reg {
    /// Results.
    R0 = 0,
    /// The first argument; the context at the beginning.
    R1 = 1,
    /// The second argument.
    R2 = 2,
    /// The third argument.
    R3 = 3,
    /// Kept by calls.
    R6 = 6,
    /// Kept by calls.
    R7 = 7,
    /// The frame.
    R10 = 10,
}

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn new(code: u8, to: Reg, from: u8, offset: i16, immediate: i32) -> Self {
        // Two bit fields of a C struct: the order follows that of the bytes.
        let registers = if cfg!(target_endian = "little") {
            to as u8 | from << 4
        } else {
            (to as u8) << 4 | from
        };
        Self {
            code,
            registers,
            offset,
            immediate,
        }
    }

    /// `to = from`.
    pub const fn copy(to: Reg, from: Reg) -> Self {
        Self::new(0xbf, to, from as u8, 0, 0)
    }

    /// `to = value`.
    pub const fn set(to: Reg, value: i32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    /// `to += value`.
    pub const fn add(to: Reg, value: i32) -> Self {
        Self::new(0x07, to, 0, 0, value)
    }

    /// `to = *(from + offset)`, four bytes.
    pub const fn load(to: Reg, from: Reg, offset: i16) -> Self {
        Self::new(0x61, to, from as u8, offset, 0)
    }

    /// `*(to + offset) = value`, four bytes.
    pub const fn store(to: Reg, offset: i16, value: i32) -> Self {
        Self::new(0x62, to, 0, offset, value)
    }

    /// `to = map`, in two instructions.
    pub fn load_map(to: Reg, map: BorrowedFd<'_>) -> [Self; 2] {
        [
            Self::new(0x18, to, PSEUDO_MAP_FD, 0, map.as_raw_fd()),
            Self::new(0, Reg::R0, 0, 0, 0),
        ]
    }

    /// Calls a helper of the kernel.
    pub const fn call(helper: i32) -> Self {
        Self::new(0x85, Reg::R0, 0, 0, helper)
    }

    /// Jumps.
    pub const fn jump() -> Self {
        Self::new(0x05, Reg::R0, 0, 0, 0)
    }

    /// Jumps if `register != value`, as 32-bit numbers.
    pub const fn jump_unless(register: Reg, value: i32) -> Self {
        Self::new(0x56, register, 0, 0, value)
    }

    /// Jumps if `register == value`, as 64-bit numbers.
    pub const fn jump_if(register: Reg, value: i32) -> Self {
        Self::new(0x15, register, 0, 0, value)
    }

    /// Returns R0.
    pub const fn exit() -> Self {
        Self::new(0x95, Reg::R0, 0, 0, 0)
    }

    /// Sets how many instructions a jump leaves out.
    pub const fn jumps_over(&mut self, count: i16) {
        self.offset = count;
    }
}

/// Calls bpf(2) with an attribute block.
fn call<T>(command: i64, attributes: &T) -> io::Result<RawFd> {
    let size = std::mem::size_of::<T>();
    // SAFETY: every `T` here is a C struct that is a prefix of `union bpf_attr`, and what its pointers
    // lead to lives in the caller during the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *const T, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// As [`call`], for commands that make a descriptor.
fn make<T>(command: i64, attributes: &T) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the kernel has just made it for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor as the kernel's headers write it.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A pointer as the kernel's headers write it.
fn address<T: ?Sized>(value: &T) -> u64 {
    // Pointers have at most 64 bits.
    u64::try_from((&raw const *value).cast::<u8>().addr()).unwrap_or(0)
}

/// Makes a map from 32-bit keys to sockets.
///
/// # Errors
/// What the kernel says: `EPERM` without CAP_BPF and CAP_NET_ADMIN, `EINVAL` without such maps.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
    }
    let create = Create {
        kind: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: entries,
        flags: 0,
    };
    make(command::MAP_CREATE, &create)
}

/// Puts a socket into a map, which does not keep it open.
///
/// # Errors
/// What the kernel says.
pub fn put_socket(map: BorrowedFd<'_>, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = number(socket);
    let update = Update {
        map: number(map),
        padding: 0,
        key: address(&key),
        value: address(&value),
        flags: 0,
    };
    call(command::MAP_UPDATE_ELEM, &update).map(drop)
}

/// Loads a program of the type `sk_lookup`.
///
/// # Errors
/// What the kernel says: `EINVAL` where it has no such type, `EACCES` when its verifier refuses.
pub fn load(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let load = Load {
        kind: PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: address(instructions),
        // Its helpers want no GPL.
        license: address(c"Apache-2.0"),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"brig_localhost\0\0",
        interface: 0,
        expected_attach_type: ATTACH_SK_LOOKUP,
    };
    uninterrupted(|| make(command::PROG_LOAD, &load))
}

/// Times that a program is loaded at most.
const LOADS: usize = 10;

/// The verifier gives up with EAGAIN when a signal waits for its thread, such as a child's end. Once the call has
/// returned that has been handled.
fn uninterrupted<T>(mut load: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..LOADS {
        match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
    }
    load()
}

/// Attaches a program to a network namespace for as long as the returned link is open.
///
/// # Errors
/// What the kernel says.
pub fn attach(program: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let create = Create {
        program: number(program),
        target: number(namespace),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    make(command::LINK_CREATE, &create)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_a_signal_interrupts_is_repeated_but_not_for_ever() {
        for (interrupted, calls, loaded) in [(0, 1, true), (3, 4, true), (99, LOADS, false)] {
            let mut called = 0;
            let result = uninterrupted(|| {
                called += 1;
                if called <= interrupted {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            assert_eq!((called, result.is_ok()), (calls, loaded));
        }
    }
}
