//! A tap interface for a VMM that is driven without containerd.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result};

use super::{clock, process};

nix::ioctl_write_int!(
    /// Turns the descriptor into an interface's; takes a pointer to an ifreq.
    tun_set_interface,
    b'T',
    202
);
nix::ioctl_write_ptr!(
    /// Sets the length of the header before each packet.
    tun_set_header,
    b'T',
    216,
    libc::c_int
);

/// Length of virtio_net_hdr with num_buffers, which modern devices use.
static HEADER: libc::c_int = 12;

/// Makes a non-persistent tap with an address, up.
///
/// # Errors
/// If the kernel refuses, or `ip` fails.
pub fn open(name: &str, address: &str) -> Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: a zeroed ifreq is valid: plain integers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::try_from(byte).context("an interface name is ASCII")?;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, whose address is passed and which lives for the
    // call; TUNSETVNETHDRSZ reads one int.
    unsafe {
        tun_set_interface(tap.as_raw_fd(), (&raw mut request).addr() as u64)
            .context("TUNSETIFF")?;
        tun_set_header(tap.as_raw_fd(), &raw const HEADER).context("TUNSETVNETHDRSZ")?;
    }
    for args in [
        vec!["address", "add", address, "dev", name],
        vec!["link", "set", name, "up"],
    ] {
        let mut command = Command::new("ip");
        command.args(&args);
        process::run(command, clock::seconds(3))?
            .success()
            .with_context(|| format!("ip {}", args.join(" ")))?;
    }
    Ok(tap.into())
}
