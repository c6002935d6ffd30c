//! The numbers with which the kernel begins TCP connections: a secret of its own, hashed with addresses and ports, and the time.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use serde_json::{Value, json};

/// linux/tcp.h.
const TCP_REPAIR: libc::c_int = 19;
const TCP_REPAIR_QUEUE: libc::c_int = 20;
const TCP_QUEUE_SEQ: libc::c_int = 21;
const SEND_QUEUE: libc::c_int = 2;
/// Bytes of a number.
const LENGTH: libc::socklen_t = 4;

/// Of connections over the loopback interface, always of the same addresses and ports.
pub fn numbers() -> Result<Value> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 40_000))?;
    let mut found = Vec::new();
    for port in 40_001..40_004 {
        let from = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        setsockopt(&from, sockopt::ReuseAddr, &true)?;
        bind(from.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port))?;
        connect(from.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 40_000))?;
        let _accepted = listener.accept()?;
        found.push(first(from.as_fd()).context("TCP_REPAIR")?);
    }
    Ok(json!(found))
}

/// What it was when nothing has been sent.
fn first(connection: BorrowedFd<'_>) -> io::Result<u32> {
    set(connection, TCP_REPAIR, 1)?;
    set(connection, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let mut number = 0_u32;
    let mut length = LENGTH;
    // SAFETY: the kernel writes at most `length` bytes, which the number has.
    let done = unsafe {
        libc::getsockopt(
            connection.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_QUEUE_SEQ,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    if done == 0 {
        Ok(number)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set(connection: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads the value, whose length is given.
    let done = unsafe {
        libc::setsockopt(
            connection.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            LENGTH,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
