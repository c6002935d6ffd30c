//! Credit of one connection in both directions (virtio 1.3 §5.10.6.3): who may send how much.
//!
//! All counters run modulo 2^32. The guest's figures are hostile: nonsense means no credit.

/// The most bytes that we buffer for one connection, guest to host, and announce as `buf_alloc`.
pub const BUFFER: u32 = 256 * 1024;
/// What every connection gets, however many there are.
pub const LEAST: u32 = 16 * 1024;
/// What all connections of a VM may have beyond [`LEAST`].
const POOL: u32 = 8 * 1024 * 1024;
/// A connection gets at most this part of what is left of the pool.
const PART: u32 = 8;

/// What is left of the buffers of a VM. A connection keeps its window for life: a window that shrinks
/// below what is in flight is an underflow in Linux guests.
#[derive(Debug)]
pub struct Pool(u32);

impl Pool {
    /// All of it.
    pub fn new() -> Self {
        Self(POOL)
    }

    /// A window for a new connection, of [`LEAST`] to [`BUFFER`] bytes.
    pub fn take(&mut self) -> Window {
        let extra = (self.0 / PART).min(BUFFER - LEAST);
        self.0 -= extra;
        Window(LEAST + extra)
    }

    /// Takes back the window of a connection that has ended.
    pub fn give_back(&mut self, window: Window) {
        self.0 += window.0 - LEAST;
    }
}

/// Bytes that may wait for the reader of one connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Window(u32);

impl Window {
    /// Bytes.
    pub fn bytes(&self) -> u32 {
        self.0
    }
}

/// The counters of one connection.
#[derive(Debug)]
pub struct Credit {
    window: Window,
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
    /// No credit yet from the guest, and this window for what it sends.
    pub fn new(window: Window) -> Self {
        Self {
            window,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// The size of our buffer.
    pub fn window(&self) -> u32 {
        self.window.bytes()
    }

    /// Gives the window up, at the end of the connection.
    pub fn into_window(self) -> Window {
        self.window
    }

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
        if bytes > self.window() - self.held() {
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
        self.told != self.forwarded && self.received.wrapping_sub(self.told) >= self.window() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::MAX_STREAMS;
    use proptest::prelude::*;

    #[test]
    fn a_few_connections_have_all_they_want_and_many_have_enough_and_no_more_in_all() {
        let mut pool = Pool::new();
        let mut windows: Vec<_> = (0..=MAX_STREAMS).map(|_| pool.take()).collect();
        assert!(windows[..24].iter().all(|window| window.bytes() == BUFFER));
        assert!(windows.iter().all(|window| window.bytes() >= LEAST));
        let total: u64 = windows.iter().map(|window| u64::from(window.bytes())).sum();
        assert!(total <= 25 << 20, "{total}");
        windows.drain(..).for_each(|window| pool.give_back(window));
        assert_eq!(pool.0, POOL);
        assert_eq!(pool.take().bytes(), BUFFER);
    }

    #[test]
    fn nonsense_from_the_guest_means_no_credit() {
        let mut credit = Credit::new(Pool::new().take());
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
        let mut credit = Credit::new(Pool::new().take());
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
            let mut credit = Credit::new(Pool::new().take());
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
