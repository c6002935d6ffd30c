//! One message a datagram, with its descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{FromVmm, MAX_FDS, MAX_MESSAGE};

/// Sends one message with its descriptors. `EAGAIN` is returned as such on a non-blocking socket.
///
/// # Errors
/// `InvalidInput` for a message over [`MAX_MESSAGE`] or with more than [`MAX_FDS`] descriptors,
/// else what `sendmsg` says.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message of {} bytes and {} descriptors is over the limit of {MAX_MESSAGE} and {MAX_FDS}",
                bytes.len(),
                fds.len()
            ),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message with its descriptors (close-on-exec); `None` when the peer has closed. Descriptors that
/// the receiver had no room for are missing at the end.
///
/// # Errors
/// `InvalidData` for a message that is truncated or not of this protocol, else what `recvmsg` says.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    receive_with(socket, Some(cmsg_space!([RawFd; MAX_FDS])))
}

/// Receives one message of the VMM, which is not trusted: no descriptor of it ever becomes one of this process.
///
/// # Errors
/// As [`receive`]; a message with a descriptor is a truncated one.
pub fn receive_from_vmm(socket: BorrowedFd<'_>) -> io::Result<Option<FromVmm>> {
    Ok(receive_with(socket, None)?.map(|(message, _)| message))
}

fn receive_with<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    mut control: Option<Vec<u8>>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    // Who takes no descriptors has no room for any.
    let refused = if control.is_some() {
        MsgFlags::MSG_TRUNC
    } else {
        MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC
    };
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        control.as_deref_mut(),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    if received.flags.intersects(refused) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "control message was truncated",
        ));
    }
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor for us alone.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    let length = received.bytes;
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..length])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fds)))
}

#[cfg(test)]
mod tests {
    use super::super::{Reply, ReplyBody, Request, RequestBody};
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_descriptor_of_the_vmm_never_becomes_one_of_the_shims() {
        let (ours, theirs) = pair();
        let event = || {
            FromVmm::Reply(Reply {
                id: 7,
                result: Ok(ReplyBody::Done),
            })
        };
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(theirs.as_fd(), &event(), &[writer.as_fd()]).unwrap();
        drop(writer);
        let error = receive_from_vmm(ours.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // With nobody left to write, the end is there.
        assert_eq!(nix::unistd::read(&reader, &mut [0]).unwrap(), 0);
        send(theirs.as_fd(), &event(), &[]).unwrap();
        let received = receive_from_vmm(ours.as_fd()).unwrap();
        assert!(matches!(
            received,
            Some(FromVmm::Reply(Reply { id: 7, .. }))
        ));
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_in_order() {
        let (a, b) = pair();
        let (r, w) = nix::unistd::pipe().unwrap();
        let request = Request {
            id: 7,
            body: RequestBody::CloseStream { stream: 9 },
        };
        send(a.as_fd(), &request, &[r.as_fd(), w.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(b.as_fd()).unwrap().unwrap();
        assert_eq!(got.id, 7);
        assert_eq!(fds.len(), 2);
        nix::unistd::write(&fds[1], b"x").unwrap();
        let mut buffer = [0u8; 1];
        assert_eq!(nix::unistd::read(&r, &mut buffer).unwrap(), 1);
    }

    #[test]
    fn a_closed_peer_is_told_from_an_empty_message() {
        let (a, b) = pair();
        drop(a);
        assert!(receive::<Request>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_is_sent() {
        let (a, _b) = pair();
        let request = Request {
            id: 1,
            body: RequestBody::ForgetShare {
                path: "x".repeat(MAX_MESSAGE),
            },
        };
        let error = send(a.as_fd(), &request, &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
