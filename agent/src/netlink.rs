//! Messages of netlink(7): written for the routing socket and for the packet filter, and what the kernel answers.
//!
//! By hand, as the two need a dozen kinds of message: a library that knows all of rtnetlink is a tenth of the agent, which is
//! in every guest's memory (docs/decisions.md). Answers are the guest's own kernel's, but read as if they were anybody's.
use std::io;

/// Bytes of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// `NLM_F_*`. A request that has no [`ACK`] is answered only if it fails.
pub(crate) const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`, which with a code of 0 is the acknowledgement, and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Appends a message of `general`, the header of its family, and attributes. `sequence` comes back with the answer.
///
/// # Errors
/// If it is 4 GiB or more.
pub(crate) fn message(
    to: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    general: &[u8],
    attributes: &[u8],
) -> io::Result<()> {
    let length = HEADER + general.len() + attributes.len();
    let length = u32::try_from(length).map_err(io::Error::other)?;
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(&(REQUEST | flags).to_ne_bytes());
    to.extend_from_slice(&sequence.to_ne_bytes());
    to.extend_from_slice(&[0; 4]);
    to.extend_from_slice(general);
    to.extend_from_slice(attributes);
    to.resize(to.len().next_multiple_of(4), 0);
    Ok(())
}

/// Appends an attribute.
///
/// # Errors
/// If it is 64 KiB or more.
pub(crate) fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) -> io::Result<()> {
    let length = u16::try_from(value.len() + 4).map_err(io::Error::other)?;
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
    Ok(())
}

/// The numbers and values of attributes, as far as these are whole.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// One message of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer<'a> {
    /// The request is acknowledged, or a list has ended.
    Done,
    /// The kernel's error number.
    Refused(i32),
    /// One of a list: the header of its family, and attributes.
    Listed(&'a [u8]),
}

/// The messages of an answer, each with the sequence of its request; an error for what is cut short.
pub(crate) fn answers(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<(u32, Answer<'_>)>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Some((length, one)) = answer(bytes) else {
            bytes = &[];
            return Some(Err(io::Error::other("an answer that is cut short")));
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(one))
    })
}

fn answer(bytes: &[u8]) -> Option<(usize, (u32, Answer<'_>))> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let length = usize::try_from(word(0)?).ok()?;
    let body = bytes.get(HEADER..length)?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let code = |body: &[u8]| Some(i32::from_ne_bytes(body.get(..4)?.try_into().ok()?));
    let answer = match kind {
        // A list that ends with an error says so in its last message.
        ERROR | DONE => match code(body) {
            Some(0) => Answer::Done,
            Some(code) => Answer::Refused(code.checked_neg()?),
            None if kind == DONE => Answer::Done,
            None => return None,
        },
        _ => Answer::Listed(body),
    };
    Some((length, (word(8)?, answer)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_written_is_read() {
        let mut written = Vec::new();
        attribute(&mut written, 3, b"eth0\0").unwrap();
        attribute(&mut written, 1, &[2; 6]).unwrap();
        let mut bytes = Vec::new();
        message(&mut bytes, 16, DUMP, 7, &[9; 16], &written).unwrap();
        message(&mut bytes, ERROR, 0, 8, &(-17_i32).to_ne_bytes(), &[0; 16]).unwrap();
        message(&mut bytes, DONE, 0, 9, &[0; 4], &[]).unwrap();
        let all: Vec<_> = answers(&bytes).collect::<io::Result<_>>().unwrap();
        let Answer::Listed(body) = all[0].1 else {
            panic!("{all:?}")
        };
        assert_eq!(all[0].0, 7);
        assert_eq!(body[..16], [9; 16]);
        let read: Vec<_> = attributes(&body[16..]).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (1, &[2; 6][..])]);
        assert_eq!(all[1..], [(8, Answer::Refused(17)), (9, Answer::Done)]);
    }

    #[test]
    fn what_does_not_fit_its_length_is_refused() {
        assert!(attribute(&mut Vec::new(), 1, &[0; 65_532]).is_err());
        let mut bytes = Vec::new();
        message(&mut bytes, 16, 0, 1, &[0; 16], &[]).unwrap();
        bytes.pop();
        let all: Vec<_> = answers(&bytes).collect();
        assert!(matches!(all[..], [Err(_)]), "{all:?}");
    }

    proptest! {
        #[test]
        fn anything_is_read_to_its_end(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            prop_assert!(answers(&bytes).count() <= 96 / HEADER + 1);
            prop_assert!(attributes(&bytes).count() <= 96 / 4);
        }
    }
}
