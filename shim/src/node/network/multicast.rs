//! Multicast groups that the guest joins, on devices that filter by them: a macvlan, an ipvlan and a network card receive the groups
//! alone that their own kernel has joined, and the guest joins them in another. Such a device is asked to receive all of them.
//!
//! By memberships of a packet socket that receives nothing itself, packet(7): they end with its last descriptor. A veth passes
//! everything on, so the usual pod has no such socket.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::interface::Link;

/// Has those of the interfaces that filter receive every group, as long as the returned descriptor lives; none if there are none.
pub fn receive_all(links: &[Link]) -> io::Result<Option<OwnedFd>> {
    let mut filtering = links
        .iter()
        .filter(|link| link.filters_multicast)
        .peekable();
    if filtering.peek().is_none() {
        return Ok(None);
    }
    // Without a protocol it receives no packet.
    let socket = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for link in filtering {
        join(&socket, link.index)?;
    }
    Ok(Some(socket))
}

fn join(socket: &OwnedFd, index: u32) -> io::Result<()> {
    let membership = libc::packet_mreq {
        mr_ifindex: c_int::try_from(index).map_err(io::Error::other)?,
        mr_type: u16::try_from(libc::PACKET_MR_ALLMULTI).map_err(io::Error::other)?,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&membership)).map_err(io::Error::other)?;
    // SAFETY: the option is a packet_mreq of this length, which lives during the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const membership).cast(),
            length,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
