//! The listeners that the program hands connections to. Run inside the pod's namespace.
//!
//! Each is bound to a loopback address, so that nothing but loopback reaches it even without the program;
//! its port means nothing, because a connection to that very port is forwarded like any other.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Address family of a listener, which is its place in the program's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A listener for each family that the namespace has.
///
/// # Errors
/// When there is none for IPv4.
pub fn listeners() -> io::Result<Vec<(Family, TcpListener)>> {
    let mut listeners = vec![(Family::V4, listener(Family::V4)?)];
    // Nodes without IPv6 are common, and then nobody dials ::1.
    if let Ok(v6) = listener(Family::V6) {
        listeners.push((Family::V6, v6));
    }
    Ok(listeners)
}

fn listener(family: Family) -> io::Result<TcpListener> {
    let (domain, address) = match family {
        Family::V4 => (
            AddressFamily::INET,
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        ),
        Family::V6 => (
            AddressFamily::INET6,
            SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        ),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(domain, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // `lo` has no address before it is up, which may be later.
    match family {
        Family::V4 => sockopt::set_ip_freebind(&socket, true)?,
        Family::V6 => {
            sockopt::set_ipv6_v6only(&socket, true)?;
            sockopt::set_ipv6_freebind(&socket, true)?;
        }
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}
