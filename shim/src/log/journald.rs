//! The log as entries of systemd's journal, by its native protocol: each field of a line is one of the entry, so
//! `journalctl -t brig BRIG_SANDBOX=ID` finds a pod's. Never blocks: an entry for which the journal has no room is dropped.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use super::entry::{Entry, floor};

/// Where the journal takes entries.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// What `journalctl -t` knows Brig by.
const IDENTIFIER: &str = "brig";
/// The most bytes of one field, of which all may be a guest's, and of the entry, which is a datagram.
const MAX_FIELD: usize = 4096;
const MAX_ENTRY: usize = 32 << 10;
/// The longest name of a field that the journal takes.
const MAX_NAME: usize = 64;

/// The way to the journal.
#[derive(Debug)]
pub struct Journald(UnixDatagram);

impl Journald {
    /// Of the journal that listens at `socket`.
    ///
    /// # Errors
    /// If none does.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let journal = UnixDatagram::unbound()?;
        journal.set_nonblocking(true)?;
        journal.connect(socket)?;
        Ok(Self(journal))
    }

    pub(super) fn send(&self, entry: &Entry) {
        // Full, or the journal is being restarted: the log must never hold up a pod.
        let _ = self.0.send(&datagram(entry));
    }
}

/// An entry in the native protocol.
fn datagram(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::new();
    push(&mut bytes, "MESSAGE", &entry.message);
    push(&mut bytes, "PRIORITY", priority(entry.level));
    push(&mut bytes, "SYSLOG_IDENTIFIER", IDENTIFIER);
    for (key, value) in &entry.fields {
        if bytes.len() < MAX_ENTRY - MAX_FIELD - MAX_NAME {
            push(&mut bytes, &name(key), value);
        }
    }
    bytes
}

/// syslog(3)'s number of a level of ours.
fn priority(level: &str) -> &'static str {
    match level {
        "fatal" => "2",
        "error" => "3",
        "warning" => "4",
        "info" => "6",
        _ => "7",
    }
}

/// A field's name as the journal takes it: upper case, digits and underscores.
fn name(key: &str) -> String {
    let letters = key.chars().map(|letter| match letter {
        'a'..='z' | 'A'..='Z' | '0'..='9' => letter.to_ascii_uppercase(),
        _ => '_',
    });
    let mut name = format!("BRIG_{}", letters.collect::<String>());
    name.truncate(MAX_NAME);
    name
}

fn push(bytes: &mut Vec<u8>, name: &str, value: &str) {
    let value = &value[..floor(value, MAX_FIELD)];
    bytes.extend(name.as_bytes());
    if value.contains('\n') {
        // With its length, or what comes after a line's end would be another field.
        bytes.push(b'\n');
        bytes.extend((value.len() as u64).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend(value.as_bytes());
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(message: &str, fields: &[(&str, &str)]) -> Entry {
        let fields = fields.iter();
        Entry {
            time: String::new(),
            level: "warning",
            message: message.to_owned(),
            fields: fields
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    /// What the journal makes of an entry.
    fn read(mut bytes: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let end = bytes.iter().position(|byte| b"=\n".contains(byte)).unwrap();
            let name = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let (value, rest) = if bytes[end] == b'=' {
                let rest = &bytes[end + 1..];
                let length = rest.iter().position(|byte| *byte == b'\n').unwrap();
                rest.split_at(length)
            } else {
                let (length, rest) = bytes[end + 1..].split_first_chunk::<8>().unwrap();
                rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap())
            };
            assert_eq!(rest[0], b'\n');
            bytes = &rest[1..];
            fields.push((name, String::from_utf8(value.to_vec()).unwrap()));
        }
        fields
    }

    #[test]
    fn an_entry_reaches_the_journal_field_by_field() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        assert!(Journald::connect(&socket).is_err());
        let journal = UnixDatagram::bind(&socket).unwrap();
        let own = Journald::connect(&socket).unwrap();
        own.send(&entry(
            "a\nb",
            &[("sandbox", "web"), ("for_ms", "5"), ("\u{e4}-b", "=")],
        ));
        let mut bytes = [0; 1024];
        let length = journal.recv(&mut bytes).unwrap();
        let expected = [
            ("MESSAGE", "a\nb"),
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "brig"),
            ("BRIG_SANDBOX", "web"),
            ("BRIG_FOR_MS", "5"),
            ("BRIG___B", "="),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(read(&bytes[..length]), expected);
    }

    #[test]
    fn a_journal_that_does_not_read_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _journal = UnixDatagram::bind(&socket).unwrap();
        let own = Journald::connect(&socket).unwrap();
        for _ in 0..10_000 {
            own.send(&entry("x", &[]));
        }
    }

    proptest! {
        #[test]
        fn nobody_forges_a_field(message in any::<String>(), key in any::<String>(), value in any::<String>(), many in 0..40usize) {
            let mut fields = vec![(key.as_str(), value.as_str())];
            let long = "\n".repeat(5000);
            fields.extend(vec![("long", long.as_str()); many]);
            let bytes = datagram(&entry(&message, &fields));
            prop_assert!(bytes.len() < MAX_ENTRY);
            let read = read(&bytes);
            prop_assert_eq!(&read[0].1, &message);
            prop_assert_eq!(&read[3].1, &value);
            prop_assert!(read[3..].iter().all(|(name, _)| name.starts_with("BRIG_")));
            prop_assert_eq!(read.len(), 4 + many.min(read.len() - 4));
        }
    }
}
