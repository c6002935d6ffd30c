//! Where a guest is captured, and where each of its clones goes on.
//!
//! The guest stands still before anything of it runs that a pod could notice: no runtime, no socket, no thread. A clone first becomes another
//! guest than its siblings: the host gives it random bytes for the kernel's generator, and the time. Then the agent executes itself again, so
//! that of the process that was captured nothing is left: addresses, stack canaries and keys of hash tables are drawn anew.
use std::{
    convert::Infallible,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{FileExt as _, OpenOptionsExt as _},
            process::CommandExt as _,
        },
    },
    process::Command,
};

use brig_agent_protocol::{BootMark, CAPTURE, Resumption};

use crate::{boot_mark::boot_mark, clock};

/// In the environment of an agent that a clone has executed.
pub const CLONE: &str = "brig_clone";

/// The kernel's `RNDADDENTROPY` and `RNDRESEEDCRNG` (random(4)).
const ADD_ENTROPY: libc::Ioctl = 0x4008_5203;
const RESEED: libc::Ioctl = 0x5207;
/// What the driver of the random device had asked for before the capture, and all clones would get.
const STALE: usize = 64;

/// Stands still to be captured. In a clone it goes on, and in the end is replaced by a fresh agent.
///
/// # Errors
/// If nobody answers, or the kernel refuses: a clone that cannot be made another guest must not go on.
pub fn stand_still() -> io::Result<Infallible> {
    clear_free_memory();
    boot_mark(BootMark::Still);
    let told = told()?;
    reseed(&told.seed)?;
    clock::set(told.unix_time_ns).map_err(|error| io::Error::other(error.to_string()))?;
    discard_stale();
    if told.new_devices {
        // The drivers have bound when this returns.
        fs::write("/sys/bus/pci/rescan", "1")?;
    }
    Err(Command::new("/init")
        .env_remove(CAPTURE)
        .env(CLONE, "1")
        .exec())
}

/// What is left to the kernel when free memory is cleared, and the most that is, in bytes: more would be more than the template's maker should take
/// of the node for a moment.
const LEFT: u64 = 12 << 20;
const MOST_CLEARED: u64 = 512 << 20;

/// Lets free memory be zero, which a template need not keep: the boot has left the initramfs and the kernel's own first code and data in it.
fn clear_free_memory() {
    let Ok(info) = nix::sys::sysinfo::sysinfo() else {
        return;
    };
    let free = info.ram_unused().saturating_sub(LEFT).min(MOST_CLEARED);
    let Ok(length) = usize::try_from(free) else {
        return;
    };
    // The kernel clears what it gives, and gives all that it can: what cannot be had stays as it is.
    // SAFETY: a mapping of our own, which nothing else uses and which is gone after this.
    unsafe {
        let mapped = libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if mapped != libc::MAP_FAILED {
            libc::madvise(mapped, length, libc::MADV_POPULATE_WRITE);
            libc::munmap(mapped, length);
        }
    }
}

/// The configuration space of the host bridge.
const BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0/config";

/// What a clone is told, which nobody can read after this.
fn told() -> io::Result<Resumption> {
    let bridge = File::options().read(true).write(true).open(BRIDGE)?;
    let mut bytes = [0; Resumption::BYTES];
    bridge.read_exact_at(&mut bytes, Resumption::REGISTER.into())?;
    bridge.write_all_at(&[0], Resumption::REGISTER.into())?;
    Resumption::from_bytes(&bytes)
        .ok_or_else(|| io::Error::other("the host does not say that this is a clone"))
}

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    bytes: libc::c_int,
    seed: [u8; Resumption::SEED],
}

/// Gives the kernel's generator the bytes and makes it draw new keys, for every CPU: nothing that it has given before tells of what it gives
/// from now on.
fn reseed(seed: &[u8; Resumption::SEED]) -> io::Result<()> {
    let random = File::options().write(true).open("/dev/random")?;
    let bytes = libc::c_int::try_from(seed.len()).map_err(io::Error::other)?;
    let entropy = Entropy {
        bits: bytes * 8,
        bytes,
        seed: *seed,
    };
    // SAFETY: the kernel reads the structure, whose length of bytes is that of its array.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, &raw const entropy) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it takes nothing.
    match unsafe { libc::ioctl(random.as_raw_fd(), RESEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes what `/dev/hwrng` holds, so that nobody else gets it. A guest without the device has no such bytes.
fn discard_stale() {
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/hwrng");
    if let Ok(mut device) = device {
        let _ = device.read(&mut [0; STALE]);
    }
}
