//! The kernel's log as `dmesg` shows it, from /dev/kmsg (Linux: Documentation/ABI/testing/dev-kmsg).
use std::{collections::VecDeque, io};

use brig_agent_protocol::MAX_LOOK;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::error::{Error, Result};

const PATH: &str = "/dev/kmsg";
/// The longest record that the kernel gives out (`PRINTK_MESSAGE_MAX`).
const MAX_RECORD: usize = 2048;

/// The end of the log, a line a record.
///
/// # Errors
/// What the kernel says.
pub(super) fn read() -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let kmsg = rustix::fs::open(PATH, flags, Mode::empty()).map_err(failed)?;
    let mut lines: VecDeque<Vec<u8>> = VecDeque::new();
    let mut length = 0;
    let mut record = [0; 4 * MAX_RECORD];
    loop {
        let read = match rustix::io::read(&kmsg, &mut record) {
            Ok(read) => read,
            Err(Errno::AGAIN) => break,
            // What we were at has been overwritten; the next read goes on with the oldest there is.
            Err(Errno::PIPE | Errno::INTR) => continue,
            Err(error) => return Err(failed(error)),
        };
        let line = line(&record[..read]);
        length += line.len();
        lines.push_back(line);
        while length > MAX_LOOK {
            length -= lines.pop_front().map_or(length, |line| line.len());
        }
    }
    Ok(lines.into_iter().flatten().collect())
}

fn failed(error: Errno) -> Error {
    Error::io(PATH, io::Error::from(error))
}

/// `6,339,5140900,-;text` with lines of ` KEY=value` behind it, as `[    5.140900] text`.
fn line(record: &[u8]) -> Vec<u8> {
    let record = record.split(|byte| *byte == b'\n').next().unwrap_or(record);
    let at = record.iter().position(|byte| *byte == b';');
    let (head, text) = at.map_or((&[][..], record), |at| (&record[..at], &record[at + 1..]));
    let head = String::from_utf8_lossy(head);
    let micros: u64 = head
        .split(',')
        .nth(2)
        .map_or(0, |text| text.parse().unwrap_or(0));
    let mut line = format!("[{:>5}.{:06}] ", micros / 1_000_000, micros % 1_000_000).into_bytes();
    line.extend_from_slice(text);
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_becomes_a_line_as_dmesg_has_it() {
        let with_keys = b"6,339,5140900,-;NET: Registered family 10\n SUBSYSTEM=net\n DEVICE=n1\n";
        assert_eq!(
            line(with_keys),
            b"[    5.140900] NET: Registered family 10\n"
        );
        assert_eq!(line(b"12,1,0,c;a;b"), b"[    0.000000] a;b\n");
        assert_eq!(line(b"no record"), b"[    0.000000] no record\n");
    }

    proptest! {
        #[test]
        fn any_record_is_one_line(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(line(&bytes).iter().filter(|byte| **byte == b'\n').count(), 1);
        }
    }
}
