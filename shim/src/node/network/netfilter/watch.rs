//! Hears of changes of a namespace's rules: one socket, which the kernel writes to when a transaction has changed them.
//!
//! What it says is not read: that it says something is enough, and the rules are listed as at the start.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};

use super::read::has_nf_tables;

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// What may wait to be heard, in bytes: what does not fit is heard of as well.
const ROOM: usize = 4096;

/// A non-blocking socket that becomes readable when the rules of the calling thread's network namespace change. None on a
/// node whose kernel has no nf_tables at hand, because to ask would load it.
///
/// # Errors
/// What the kernel says.
pub fn watch() -> io::Result<Option<OwnedFd>> {
    if !has_nf_tables() {
        return Ok(None);
    }
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    setsockopt(&socket.as_fd(), RcvBuf, &ROOM)?;
    socket.bind_auto()?;
    socket.add_membership(GROUP)?;
    socket.set_non_blocking(true)?;
    Ok(Some(socket.as_fd().try_clone_to_owned()?))
}

/// Takes what was said; true if there was anything.
///
/// # Errors
/// What the kernel says, but that something was lost.
pub fn heard(socket: &OwnedFd) -> io::Result<bool> {
    let mut any = false;
    let mut place = [0_u8; 512];
    loop {
        // The rest of a message that is longer goes with it.
        match nix::sys::socket::recv(
            socket.as_raw_fd(),
            &mut place,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(_) | Err(nix::Error::ENOBUFS) => any = true,
            Err(nix::Error::EAGAIN) => return Ok(any),
            Err(error) => return Err(error.into()),
        }
    }
}
