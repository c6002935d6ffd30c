//! A container that dials over vsock, which is not namespaced: every dial must fail.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt::SocketError,
};
use serde_json::{Map, Value, json};

/// How long one dial may take: the guest kernel gives up after two seconds by itself.
const DIAL_MILLIS: u16 = 5000;

/// The outcome for each "CID:PORT": "connected", or the name of the error.
pub fn dial_all(targets: &[&str]) -> Value {
    let outcomes: Map<String, Value> = targets
        .iter()
        .map(|target| ((*target).to_owned(), json!(dial(target))))
        .collect();
    Value::Object(outcomes)
}

fn dial(target: &str) -> String {
    let Some((cid, port)) = target
        .split_once(':')
        .and_then(|(cid, port)| Some((cid.parse().ok()?, port.parse().ok()?)))
    else {
        return "not CID:PORT".to_owned();
    };
    match attempt(cid, port) {
        Ok(()) => "connected".to_owned(),
        Err(errno) => format!("{errno:?}"),
    }
}

fn attempt(cid: u32, port: u32) -> nix::Result<()> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) => return Ok(()),
        Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno),
    }
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::from(DIAL_MILLIS))? == 0 {
        return Err(Errno::ETIMEDOUT);
    }
    match getsockopt(&socket, SocketError)? {
        0 => Ok(()),
        code => Err(Errno::from_raw(code)),
    }
}
