//! A blocking netfilter netlink socket that lists objects of nf_tables, in the namespace of the thread that
//! opened it.
//!
//! Trusted: the kernel, but not for the amount: lists are bounded.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::attributes;
use super::listed::{ListError, Listed, MAX_BYTES};
use super::uapi;

/// `NLM_F_DUMP_INTR`: what was listed changed meanwhile.
const INTERRUPTED: u16 = 0x10;
const HEADER: usize = 16;
/// `struct nfgenmsg`: family, version, resource id.
const GENERAL: usize = 4;
/// Types of messages that are no answers.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A connection to nf_tables.
pub struct Nftables {
    socket: Socket,
    sequence: u32,
    taken: usize,
}

impl Nftables {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT` when the kernel has no nfnetlink.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
            taken: 0,
        })
    }

    /// The number of the namespace's ruleset: 1 as long as nobody has made one.
    ///
    /// # Errors
    /// [`ListError`]; `EINVAL` and the like when the kernel has no nf_tables.
    pub fn generation(&mut self) -> Result<u32, ListError> {
        let found = self.ask(uapi::GET_GEN, 0, &[], NLM_F_REQUEST)?;
        let attributes = found.first().map_or(&[][..], |found| &found.attributes);
        let parsed = attributes::parse(attributes)?;
        attributes::number(&parsed, uapi::GEN_ID)
            .ok_or_else(|| io::Error::other("the kernel names no generation").into())
    }

    /// Lists what `kind` (a `NFT_MSG_GET*`) and `attributes` ask for.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn list(
        &mut self,
        kind: u16,
        family: u8,
        attributes: &[u8],
    ) -> Result<Vec<Listed>, ListError> {
        self.ask(kind, family, attributes, NLM_F_REQUEST | NLM_F_DUMP)
    }

    fn ask(
        &mut self,
        kind: u16,
        family: u8,
        attributes: &[u8],
        flags: u16,
    ) -> Result<Vec<Listed>, ListError> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + GENERAL + attributes.len()).unwrap_or(u32::MAX);
        let mut message = Vec::new();
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&(uapi::SUBSYSTEM << 8 | kind).to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&[family, 0, 0, 0]);
        message.extend_from_slice(attributes);
        self.socket.send(&message, 0)?;
        let mut found = Vec::new();
        let mut changed = false;
        let mut too_large = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest)
                    .map_err(|error| io::Error::other(error.to_string()))?;
                let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
                let payload = rest.get(HEADER..length).unwrap_or_default();
                let end = length.max(HEADER).checked_next_multiple_of(4);
                let (kind, of, flags) = (
                    message.message_type(),
                    message.sequence_number(),
                    message.flags(),
                );
                rest = end.and_then(|end| rest.get(end..)).unwrap_or_default();
                if of != self.sequence {
                    continue;
                }
                changed |= flags & INTERRUPTED != 0;
                match kind {
                    ERROR => {
                        let code = payload.get(..4).and_then(|code| code.try_into().ok());
                        let code = i32::from_ne_bytes(code.unwrap_or_default());
                        return Err(io::Error::from_raw_os_error(-code).into());
                    }
                    DONE => {
                        return match (too_large, changed) {
                            (true, _) => Err(ListError::TooLarge),
                            (false, true) => Err(ListError::Changed),
                            (false, false) => Ok(found),
                        };
                    }
                    _ => {
                        self.taken += payload.len();
                        too_large |= self.taken > MAX_BYTES;
                        if too_large {
                            // Read to its end, but not kept.
                            found.clear();
                            continue;
                        }
                        found.push(Listed {
                            family: payload.first().copied().unwrap_or_default(),
                            attributes: payload.get(GENERAL..).unwrap_or_default().to_vec(),
                        });
                    }
                }
            }
            if flags & NLM_F_DUMP == 0 && !found.is_empty() {
                return Ok(found);
            }
        }
    }
}
