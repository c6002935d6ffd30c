//! What the node's kernel says of a lent device by itself: that it is wanted back, that it has failed. Events for the
//! control loop to wait on; no guest can cause one without the device's doing.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

use super::device::{Device, Word};

/// An event for each word.
#[derive(Debug)]
pub struct Words {
    wanted: EventFd,
    failed: EventFd,
}

impl Words {
    /// Silent ones.
    ///
    /// # Errors
    /// If the host gives no events.
    pub fn new() -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            wanted: event()?,
            failed: event()?,
        })
    }

    fn event(&self, word: Word) -> &EventFd {
        match word {
            Word::Wanted => &self.wanted,
            Word::Failed => &self.failed,
        }
    }

    /// Has the device say them. Not every device can fail, and an old kernel may not ask: then it is not heard.
    pub fn connect(&self, device: &dyn Device) {
        for word in [Word::Wanted, Word::Failed] {
            let _ = device.hear(word, self.event(word).as_raw_fd());
        }
    }

    /// The events to wait on.
    #[must_use]
    pub fn descriptors(&self) -> [(Word, RawFd); 2] {
        [Word::Wanted, Word::Failed].map(|word| (word, self.event(word).as_raw_fd()))
    }

    /// Takes a word that was said, so that it can be said again.
    #[must_use]
    pub fn take(&self, word: Word) -> bool {
        self.event(word).read().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{Mock, Record};
    use super::*;

    #[test]
    fn a_word_is_heard_once_each_time_it_is_said() {
        let words = Words::new().unwrap();
        let record = Arc::new(Record::default());
        words.connect(&Mock::nvme(Arc::clone(&record)));
        assert_eq!(record.all()[..2], ["hear Wanted", "hear Failed"]);
        assert!(!words.take(Word::Wanted) && !words.take(Word::Failed));
        words.wanted.write(1).unwrap();
        words.wanted.write(1).unwrap();
        assert!(words.take(Word::Wanted));
        assert!(!words.take(Word::Wanted) && !words.take(Word::Failed));
    }
}
