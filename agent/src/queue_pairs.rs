//! Queue pairs of the guest's interfaces: a driver takes one for each CPU that is online when it finds its device, and leaves it at
//! that. The CPUs of a guest that goes on from a template, or that is given more, come later.
//!
//! Trusts the host, and the guest's kernel.
use std::{fs, io, os::fd::AsRawFd as _, path::Path};

use rustix::net::{AddressFamily, SocketType, socket};

/// Where the kernel has the interfaces of the pod.
const INTERFACES: &str = "/sys/class/net";
/// `SIOCETHTOOL` (linux/sockios.h).
const ETHTOOL: libc::Ioctl = 0x8946;
/// `ETHTOOL_GCHANNELS` and `ETHTOOL_SCHANNELS` (linux/ethtool.h).
const GET: u32 = 0x3c;
const SET: u32 = 0x3d;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// `struct ifreq` with a pointer.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: *mut Channels,
    /// The rest of its union.
    _rest: [u8; 16],
}

/// Has each interface use a pair for each of `cpus` CPUs, as far as it has so many. Blocking. What an interface does not take is told to the log.
pub fn follow(cpus: u32, logger: &slog::Logger) {
    for entry in fs::read_dir(INTERFACES).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|_| is_virtio(&entry.path())) else {
            continue;
        };
        if let Err(error) = set(name, cpus) {
            slog::warn!(logger, "an interface goes on with the queue pairs that it had"; "interface" => name, "error" => %error);
        }
    }
}

/// Whether it is a device of the VMM's; another's driver has its own mind.
fn is_virtio(interface: &Path) -> bool {
    let driver = fs::read_link(interface.join("device/driver"));
    driver.is_ok_and(|driver| driver.file_name().is_some_and(|name| name == "virtio_net"))
}

fn set(name: &str, cpus: u32) -> io::Result<()> {
    let mut channels = Channels {
        command: GET,
        ..Channels::default()
    };
    ask(name, &mut channels)?;
    let Some(mut wanted) = changed(channels, cpus) else {
        return Ok(());
    };
    ask(name, &mut wanted)
}

/// What is to be asked of an interface that has these; nothing, if they are right.
fn changed(has: Channels, cpus: u32) -> Option<Channels> {
    let combined = cpus.min(has.max_combined).max(1);
    (combined != has.combined).then_some(Channels {
        command: SET,
        combined,
        ..has
    })
}

fn ask(name: &str, channels: &mut Channels) -> io::Result<()> {
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        data: channels,
        _rest: [0; 16],
    };
    let bytes = name.as_bytes();
    // With its terminating zero.
    let place = request
        .name
        .get_mut(..bytes.len())
        .filter(|_| bytes.len() < libc::IFNAMSIZ);
    place
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(bytes);
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: the kernel reads and writes the request and the channels that it points to, which both live until it returns.
    match unsafe { libc::ioctl(socket.as_raw_fd(), ETHTOOL, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_a_pair_for_each_cpu_as_far_as_it_has_so_many() {
        let has = |combined| Channels {
            max_combined: 4,
            combined,
            ..Channels::default()
        };
        for (now, cpus, wanted) in [
            (1, 2, Some(2)),
            (2, 2, None),
            (2, 8, Some(4)),
            (4, 1, Some(1)),
        ] {
            let asked = changed(has(now), cpus).map(|channels| channels.combined);
            assert_eq!(asked, wanted, "{now} with {cpus} CPUs");
        }
        // One that has none to choose from.
        assert_eq!(
            changed(
                Channels {
                    combined: 1,
                    ..Channels::default()
                },
                4
            ),
            None
        );
    }

    #[test]
    fn what_is_no_interface_or_has_no_channels_is_an_error() {
        assert!(set("no-such-interface-here", 1).is_err());
        assert!(set("lo", 1).is_err());
    }
}
