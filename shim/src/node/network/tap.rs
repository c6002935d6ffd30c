//! Taps: made in the namespace of the calling thread, one descriptor for each queue pair.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use brig_hypervisor::launch::open_sealed;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use nix::fcntl::OFlag;

use super::error::{NetworkError, failed};
use super::netlink::Netlink;

mod requests {
    // `linux/if_tun.h`.
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

const TUN: &str = "/dev/net/tun";
/// What the names begin with. Kubelet's cAdvisor adds up the interfaces that the sandbox's process sees in `/proc/PID/net/dev`, all
/// but those whose names begin with "lo", "veth" or "docker": under another name each of a pod's packets counted twice.
const NAME: &str = "vethbrig";
/// The kernel puts the first free number at the end.
const NAME_PATTERN: &[u8] = b"vethbrig%d\0";

/// Whether a tap of this name may be one of ours.
pub fn is_our_name(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// A tap and its queues.
#[derive(Debug)]
pub struct Tap {
    /// Its name in the namespace.
    pub name: String,
    /// One descriptor for each queue pair.
    pub queues: Vec<OwnedFd>,
}

/// Makes a tap with this many queue pairs in the calling thread's network namespace.
pub fn create(queues: usize) -> Result<Tap, NetworkError> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME_PATTERN) {
        *to = from.cast_signed();
    }
    let mut tap = Tap {
        name: String::new(),
        queues: Vec::new(),
    };
    for _ in 0..queues {
        // The namespace of a tap is that of the thread that opens the device. Sealed, because it goes to the VMM.
        let queue = open_sealed(Path::new(TUN), OFlag::O_RDWR).map_err(NetworkError::NoTun)?;
        // IFF_MULTI_QUEUE and its like fit in 16 bits.
        request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
        // SAFETY: the request reads and writes one ifreq, which lives during the call. After the first call it
        // holds the name that the kernel chose, so that the others join it.
        unsafe { requests::set_interface(queue.as_raw_fd(), &raw const request) }
            .map_err(|error| failed("make a tap", error.into()))?;
        tap.queues.push(queue);
    }
    tap.name = name_of(&request).map_err(|error| failed("read a tap's name", error))?;
    Ok(tap)
}

fn name_of(request: &libc::ifreq) -> io::Result<String> {
    let bytes = request.ifr_name.map(i8::cast_unsigned);
    let name = CStr::from_bytes_until_nul(&bytes).map_err(io::Error::other)?;
    Ok(name.to_string_lossy().into_owned())
}

/// Sets a tap's MTU and brings it up, silent: without an IPv6 address of its own, so that the namespace sends
/// nothing to the guest by itself.
pub fn configure(netlink: &mut Netlink, index: u32, mtu: u16) -> Result<(), NetworkError> {
    let set = |change: &dyn Fn(&mut LinkMessage)| {
        let mut message = LinkMessage::default();
        message.header.index = index;
        change(&mut message);
        RouteNetlinkMessage::SetLink(message)
    };
    let silent = set(&|message| {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let inet6 = AfSpecUnspec::Inet6(vec![none]);
        message
            .attributes
            .push(LinkAttribute::AfSpecUnspec(vec![inet6]));
    });
    match netlink.change(silent, 0) {
        // A node without IPv6 is silent enough.
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
            ) =>
        {
            return Err(failed("silence a tap", error));
        }
        _ => {}
    }
    let up = set(&|message| {
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    });
    netlink
        .change(up, 0)
        .map_err(|error| failed(format!("set a tap up with an MTU of {mtu}"), error))
}
