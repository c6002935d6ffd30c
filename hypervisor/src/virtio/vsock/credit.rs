//! Credit of one connection in both directions (virtio 1.3 §5.10.6.3): who may send how much.
//!
//! All counters run modulo 2^32. The guest's figures are hostile: nonsense means no credit.

/// Bytes that we buffer for one connection, guest to host, and announce as `buf_alloc`.
pub const BUFFER: u32 = 256 * 1024;

/// The counters of one connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// Payload sent to the guest.
    sent: u32,
    /// The guest's buffer and what has left it.
    peer_alloc: u32,
    peer_forwarded: u32,
    /// Payload received from the guest, and the part of it that has left our buffer.
    received: u32,
    forwarded: u32,
    /// The `forwarded` that the guest has been told last.
    told: u32,
}

impl Credit {
    /// Takes the guest's figures from any packet of the connection.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        self.peer_forwarded = fwd_cnt;
    }

    /// Bytes that we may send.
    pub fn available(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(in_flight)
    }

    /// Counts payload sent.
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Bytes received that have not left our buffer.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts payload received. False: the guest has ignored its credit, nothing was counted.
    #[must_use]
    pub fn receive(&mut self, bytes: u32) -> bool {
        if bytes > BUFFER - self.held() {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Counts payload that left our buffer, at most what is held.
    pub fn forward(&mut self, bytes: u32) {
        let bytes = bytes.min(self.held());
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The `fwd_cnt` to put into a packet; the guest then knows it.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Whether the guest believes our buffer to be half full or more while it is emptier.
    pub fn needs_update(&self) -> bool {
        self.told != self.forwarded && self.received.wrapping_sub(self.told) >= BUFFER / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nonsense_from_the_guest_means_no_credit() {
        let mut credit = Credit::default();
        credit.update(1000, 1);
        assert_eq!(credit.available(), 0, "forwarded what was never sent");
        credit.update(1000, 0);
        assert_eq!(credit.available(), 1000);
        credit.send(600);
        credit.update(100, 0);
        assert_eq!(
            credit.available(),
            0,
            "the buffer shrank below what is in flight"
        );
    }

    #[test]
    fn an_update_is_due_once_half_the_buffer_is_unaccounted_for() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUFFER / 2 - 1));
        credit.forward(BUFFER / 2 - 1);
        assert!(!credit.needs_update());
        assert!(credit.receive(1));
        assert!(credit.needs_update());
        assert_eq!(credit.tell(), BUFFER / 2 - 1);
        assert!(!credit.needs_update());
    }

    proptest! {
        #[test]
        fn no_more_than_the_buffer_is_ever_held(steps in prop::collection::vec(any::<(bool, u32)>(), 1..200)) {
            let mut credit = Credit::default();
            let mut held = 0u64;
            for (receive, bytes) in steps {
                let bytes = bytes % (BUFFER + 2);
                if receive {
                    if credit.receive(bytes) { held += u64::from(bytes); }
                } else {
                    held -= u64::from(bytes).min(held);
                    credit.forward(bytes);
                }
                prop_assert_eq!(u64::from(credit.held()), held);
                prop_assert!(held <= u64::from(BUFFER));
            }
        }
    }
}
