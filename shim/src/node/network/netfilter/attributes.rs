//! Netlink attributes as bytes: read with their position, written back.
//!
//! Trusted: nothing. A program in the pod's network namespace may have had a hand in what is read here.

use std::io;

use netlink_packet_core::NlasIterator;

/// An attribute and where its value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its type without flags.
    pub kind: u16,
    /// Its bytes, without padding.
    pub value: &'a [u8],
    /// Where they begin in the bytes that were parsed.
    pub at: usize,
}

/// `NLA_F_NESTED`.
pub const NESTED: u16 = 0x8000;

/// The attributes in `bytes`.
///
/// # Errors
/// When one is cut short.
pub fn parse(bytes: &[u8]) -> io::Result<Vec<Attribute<'_>>> {
    let mut at = 0;
    let mut found = Vec::new();
    for attribute in NlasIterator::new(bytes) {
        let attribute = attribute.map_err(|error| io::Error::other(error.to_string()))?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        let value = attribute.into_inner().get(4..length).unwrap_or_default();
        found.push(Attribute {
            kind,
            value,
            at: at + 4,
        });
        at += length.next_multiple_of(4);
    }
    Ok(found)
}

/// The first one of this type.
pub fn find<'a>(attributes: &[Attribute<'a>], kind: u16) -> Option<Attribute<'a>> {
    attributes.iter().find(|a| a.kind == kind).copied()
}

/// Its value.
pub fn value<'a>(attributes: &[Attribute<'a>], kind: u16) -> Option<&'a [u8]> {
    find(attributes, kind).map(|attribute| attribute.value)
}

/// Its value as a number in network byte order.
pub fn number(attributes: &[Attribute<'_>], kind: u16) -> Option<u32> {
    let bytes = value(attributes, kind)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Its value as text, which ends at its first zero byte. What is no text is shown as such.
pub fn text(attributes: &[Attribute<'_>], kind: u16) -> String {
    let bytes = value(attributes, kind).unwrap_or_default();
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Appends an attribute; returns where its value begins.
///
/// # Errors
/// When it is longer than an attribute can be.
pub fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) -> io::Result<usize> {
    let length = u16::try_from(value.len() + 4)
        .map_err(|_| io::Error::other("an attribute longer than 64 KiB"))?;
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    let at = bytes.len();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(at)
}

/// As [`push`], of text with the zero byte that ends it.
///
/// # Errors
/// As of [`push`].
#[cfg(test)]
pub fn push_text(bytes: &mut Vec<u8>, kind: u16, text: &[u8]) -> io::Result<()> {
    let mut value = text.to_vec();
    value.push(0);
    push(bytes, kind, &value).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_with_its_position() {
        let mut bytes = Vec::new();
        push_text(&mut bytes, 1, b"filter").unwrap();
        let at = push(&mut bytes, NESTED | 2, &7_u32.to_be_bytes()).unwrap();
        let found = parse(&bytes).unwrap();
        assert_eq!(text(&found, 1), "filter");
        assert_eq!(number(&found, 2), Some(7));
        assert_eq!(find(&found, 2).unwrap().at, at);
        assert_eq!(number(&found, 1), None);
        assert!(push(&mut bytes, 3, &vec![0; 65_532]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            if let Ok(found) = parse(&bytes) {
                for attribute in found {
                    let end = attribute.at + attribute.value.len();
                    prop_assert_eq!(&bytes[attribute.at..end], attribute.value);
                }
            }
        }
    }
}
