//! What the two ends of the control socket say to each other: the VMM faces a hostile guest, so the
//! shim reads what a broken VMM may write.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::input::Input;
use crate::control::{self, FromVmm, Request};
use crate::share;

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
    .unwrap()
}

/// A datagram of any bytes, with descriptors: refused, or a message that says the same when it is sent on.
fn arrives<T: Serialize + DeserializeOwned>(bytes: &[u8], fds: usize) {
    let (near, far) = pair();
    let raw = vec![std::os::fd::AsRawFd::as_raw_fd(&near); fds];
    let rights = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
    let control: &[_] = if fds == 0 { &[] } else { &rights };
    let slices = [std::io::IoSlice::new(bytes)];
    let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
    nix::sys::socket::sendmsg::<()>(
        std::os::fd::AsRawFd::as_raw_fd(&near),
        &slices,
        control,
        flags,
        None,
    )
    .unwrap();
    let Ok(Some((message, got))) = control::receive::<T>(far.as_fd()) else {
        return;
    };
    assert_eq!(got.len(), fds);
    let again = serde_json::to_value(&message).unwrap();
    control::send(near.as_fd(), &message, &[]).unwrap();
    let (message, got) = control::receive::<T>(far.as_fd()).unwrap().unwrap();
    assert!(got.is_empty());
    assert_eq!(serde_json::to_value(&message).unwrap(), again);
}

pub fn control_message(data: &[u8]) {
    let mut input = Input::new(data);
    let from_vmm = input.flag();
    // More than these the kernel does not send.
    let fds = input.below(control::MAX_FDS + 1);
    let bytes = input.take(control::MAX_MESSAGE);
    if from_vmm {
        arrives::<FromVmm>(bytes, fds);
    } else {
        arrives::<Request>(bytes, fds);
    }
}

/// A path of the share: what is accepted stays below the share's root.
pub fn share_path(data: &[u8]) {
    let Ok(path) = std::str::from_utf8(data) else {
        return;
    };
    if let Some(inside) = share::path_inside(path) {
        let rest = inside.strip_prefix("/shared/").expect("left the share");
        assert!(rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
        assert!(!rest.contains('\0') && rest.len() <= 1024);
    }
}
