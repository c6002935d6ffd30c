//! The packet filter that the host found in the pod's network namespace, loaded into the guest's.
//!
//! One transaction of nf_tables: all of it, or nothing. What it consists of is the host's, which is trusted with
//! the guest; but the rules in it may be anybody's who may write to that namespace, so they are only passed to the
//! kernel, after the guest's numbers of its interfaces were put in their places. Later it may be replaced by another, as
//! long as nobody in the guest has changed it.
use std::{io, os::fd::AsFd as _};

use brig_agent_protocol::agent::{Netfilter, NetfilterObject, NetfilterRefusal};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt::SndBufForce};

use crate::{
    error::{Error, Result},
    netlink::{APPEND, Answer, CREATE, answers, attribute, attributes, message},
};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `_END`.
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
/// The ruleset is of another generation: libc has no name for it.
const ERESTART: i32 = 85;
/// `NFNL_BATCH_GENID`: the transaction holds for this generation of the ruleset alone.
const BATCH_GENERATION: u16 = 1;
/// `NFT_MSG_DELTABLE`: without a name, all tables.
const DELETE_TABLE: u16 = 2;
/// `NFT_MSG_GETGEN`, and `NFTA_GEN_ID` of its answer.
const GET_GENERATION: u16 = 16;
const GENERATION: u16 = 1;
/// `NFT_MSG_NEW*`: TABLE, CHAIN, RULE, SET, SETELEM, OBJ, FLOWTABLE.
const KINDS: [u16; 7] = [0, 3, 6, 9, 12, 18, 22];
const NEW_RULE: u16 = 6;
/// The most bytes of all attributes together.
const MAX_BYTES: usize = 4 << 20;

/// What came of a packet filter.
#[derive(Debug, Default)]
pub struct Loaded {
    /// What the kernel refused.
    pub refused: Vec<NetfilterRefusal>,
    /// The generation of the ruleset now.
    pub generation: u32,
}

/// Loads it. With the best effort what the kernel refuses is left out; without it nothing is loaded if anything was
/// refused. Blocking.
///
/// # Errors
/// `InvalidArgument` for what is no ruleset, `FailedPrecondition` if it is to take the place of one that is no more,
/// `Internal` when the kernel cannot be asked.
pub fn load(filter: &Netfilter) -> Result<Loaded> {
    let refused = load_parts(filter)?;
    let generation = generation().map_err(|e| Error::io("the packet filter", e))?;
    // A container may have changed it in between: the next one must not take the place of that.
    let generation = match filter.replaces {
        0 => generation,
        before if generation == before => before,
        before => before.wrapping_add(1).max(1),
    };
    Ok(Loaded {
        refused,
        generation,
    })
}

fn load_parts(filter: &Netfilter) -> Result<Vec<NetfilterRefusal>> {
    let mut remaining = prepare(filter)?;
    let mut refused = Vec::new();
    loop {
        if remaining.is_empty() && filter.replaces == 0 {
            return Ok(refused);
        }
        let failed = transact(&remaining, filter.replaces).map_err(|e| match e.raw_os_error() {
            Some(ERESTART) => Error::FailedPrecondition(
                "the packet filter of the guest has been changed in the guest".to_owned(),
            ),
            _ => Error::io("the packet filter", e),
        })?;
        if failed.is_empty() {
            return Ok(refused);
        }
        // Each time at least one goes.
        remaining.retain(|part| {
            failed
                .iter()
                .all(|(position, _)| *position != part.position)
        });
        refused.extend(failed.into_iter().map(|(object, errno)| NetfilterRefusal {
            object,
            errno,
            ..NetfilterRefusal::default()
        }));
        if !filter.best_effort {
            return Ok(refused);
        }
    }
}

/// A message of the transaction.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// In the request.
    position: u32,
    kind: u16,
    family: u8,
    attributes: Vec<u8>,
}

fn prepare(filter: &Netfilter) -> Result<Vec<Part>> {
    let bytes: usize = filter.objects.iter().map(|o| o.attributes.len()).sum();
    if bytes > MAX_BYTES {
        return Err(Error::InvalidArgument(format!(
            "a packet filter of {bytes} bytes; {MAX_BYTES} are the most"
        )));
    }
    let numbered = (0..).zip(&filter.objects);
    numbered
        .map(|(position, object)| part(position, object))
        .collect()
}

fn part(position: u32, object: &NetfilterObject) -> Result<Part> {
    let bad =
        |what: &str| Error::InvalidArgument(format!("packet filter, object {position}: {what}"));
    let kind = u16::try_from(object.kind).ok();
    let kind = kind.filter(|kind| KINDS.contains(kind));
    let mut attributes = object.attributes.clone();
    for index in &object.indexes {
        let number = nix::net::if_::if_nametoindex(index.interface.as_str())
            .map_err(|_| bad(&format!("the guest has no interface {:?}", index.interface)))?;
        let start = usize::try_from(index.offset).unwrap_or(usize::MAX);
        let place = start
            .checked_add(4)
            .and_then(|end| attributes.get_mut(start..end));
        place
            .ok_or_else(|| bad("an interface's number outside of it"))?
            .copy_from_slice(&number.to_ne_bytes());
    }
    Ok(Part {
        position,
        kind: kind.ok_or_else(|| bad("not something that is made"))?,
        family: u8::try_from(object.family).map_err(|_| bad("no address family"))?,
        attributes,
    })
}

/// The messages of a transaction, which takes the place of the ruleset of the generation `replaces` unless that is 0.
fn batch(parts: &[Part], replaces: u32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The subsystem, in network byte order.
    let general = &[0, 0, 0, 10];
    if replaces == 0 {
        message(&mut bytes, BEGIN, 0, 0, general, &[])?;
    } else {
        let mut only_of = Vec::new();
        attribute(&mut only_of, BATCH_GENERATION, &replaces.to_be_bytes())?;
        message(&mut bytes, BEGIN, 0, 0, general, &only_of)?;
        let all_tables = SUBSYSTEM << 8 | DELETE_TABLE;
        message(&mut bytes, all_tables, 0, 0, &[0; 4], &[])?;
    }
    for part in parts {
        let flags = if part.kind == NEW_RULE {
            CREATE | APPEND
        } else {
            CREATE
        };
        let kind = SUBSYSTEM << 8 | part.kind;
        let sequence = part.position.wrapping_add(1);
        let general = &[part.family, 0, 0, 0];
        message(&mut bytes, kind, flags, sequence, general, &part.attributes)?;
    }
    message(&mut bytes, END, 0, 0, general, &[])?;
    Ok(bytes)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// The generation of the guest's ruleset.
fn generation() -> io::Result<u32> {
    let mut question = Vec::new();
    let kind = SUBSYSTEM << 8 | GET_GENERATION;
    message(&mut question, kind, 0, 1, &[0; 4], &[])?;
    let socket = open()?;
    socket.send(&question, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    generation_in(&answer).ok_or_else(|| io::Error::other("the kernel names no generation"))
}

fn generation_in(answer: &[u8]) -> Option<u32> {
    let (_, Answer::Listed(body)) = answers(answer).next()?.ok()? else {
        return None;
    };
    let (_, value) = attributes(body.get(4..)?).find(|(kind, _)| *kind == GENERATION)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// Sends them as one transaction; returns which were refused, with the error numbers.
fn transact(parts: &[Part], replaces: u32) -> io::Result<Vec<(u32, u32)>> {
    let bytes = batch(parts, replaces)?;
    let socket = open()?;
    // An answer need not repeat what it is the answer to.
    socket.set_cap_ack(true)?;
    setsockopt(
        &socket.as_fd(),
        SndBufForce,
        &(2 * bytes.len() + (64 << 10)),
    )?;
    socket.send(&bytes, 0)?;
    // The kernel has done it when it takes it, and says only what it refused.
    let mut refused = Vec::new();
    loop {
        let mut answers = Vec::with_capacity(64 << 10);
        match socket.recv(&mut answers, libc::MSG_DONTWAIT) {
            Ok(_) => read_answers(&answers, &mut refused)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(refused),
            Err(error) => return Err(error),
        }
    }
}

fn read_answers(bytes: &[u8], refused: &mut Vec<(u32, u32)>) -> io::Result<()> {
    for answer in answers(bytes) {
        let (sequence, Answer::Refused(code)) = answer? else {
            continue;
        };
        match sequence.checked_sub(1) {
            Some(position) => refused.push((position, code.unsigned_abs())),
            // Of the transaction itself.
            None => return Err(io::Error::from_raw_os_error(code)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::agent::InterfaceIndex;
    use proptest::prelude::*;

    fn object(kind: u32, attributes: Vec<u8>, indexes: Vec<(u32, &str)>) -> NetfilterObject {
        let index = |(offset, interface): (u32, &str)| InterfaceIndex {
            offset,
            interface: interface.to_owned(),
            ..InterfaceIndex::default()
        };
        NetfilterObject {
            kind,
            family: 2,
            attributes,
            indexes: indexes.into_iter().map(index).collect(),
            ..NetfilterObject::default()
        }
    }

    #[test]
    fn the_guests_number_of_an_interface_is_put_in_its_place() {
        let rule = object(6, vec![9; 12], vec![(4, "lo")]);
        let made = part(0, &rule).unwrap();
        assert_eq!(made.attributes[..4], [9; 4]);
        assert_eq!(made.attributes[4..8], 1_u32.to_ne_bytes());
        assert_eq!(made.attributes[8..], [9; 4]);
    }

    #[test]
    fn what_is_no_ruleset_is_refused() {
        for (bad, expected) in [
            (object(1, vec![], vec![]), "not something"),
            (object(70_000, vec![], vec![]), "not something"),
            (object(6, vec![0; 4], vec![(1, "lo")]), "outside"),
            (object(6, vec![0; 4], vec![(u32::MAX, "lo")]), "outside"),
            (object(6, vec![0; 4], vec![(0, "eth9")]), "eth9"),
        ] {
            let error = part(3, &bad).unwrap_err().to_string();
            assert!(
                error.contains(expected) && error.contains("object 3"),
                "{error}"
            );
        }
        let large = Netfilter {
            objects: vec![object(0, vec![0; MAX_BYTES + 1], vec![])],
            ..Netfilter::default()
        };
        assert!(prepare(&large).is_err());
    }

    #[test]
    fn a_refusal_names_the_object_and_one_of_the_transaction_is_an_error() {
        let answer = |sequence: u32, code: i32| {
            let mut bytes = Vec::new();
            bytes.extend_from_slice(&36_u32.to_ne_bytes());
            bytes.extend_from_slice(&2_u16.to_ne_bytes());
            bytes.extend_from_slice(&[0; 2]);
            bytes.extend_from_slice(&sequence.to_ne_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&code.to_ne_bytes());
            bytes.extend_from_slice(&[0; 16]);
            bytes
        };
        let mut refused = Vec::new();
        let answers = [
            answer(3, -libc::ENOENT),
            answer(4, 0),
            answer(9, -libc::EINVAL),
        ]
        .concat();
        read_answers(&answers, &mut refused).unwrap();
        assert_eq!(refused, [(2, 2), (8, 22)]);
        let error = read_answers(&answer(0, -libc::EPERM), &mut refused).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            let _ = read_answers(&bytes, &mut Vec::new());
            let _ = generation_in(&bytes);
        }
    }
}
