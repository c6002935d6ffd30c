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
#[cfg_attr(test, derive(Clone))]
pub struct Window(u32);

impl Window {
    /// Bytes.
    pub fn bytes(&self) -> u32 {
        self.0
    }
}

/// The counters of one connection.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
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

    /// Both directions with counters that never wrap, and what each side has been told.
    #[derive(Clone)]
    struct Model {
        credit: Credit,
        sent: u64,
        alloc: u64,
        forwarded_by_guest: u64,
        received: u64,
        forwarded: u64,
        told: u64,
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// As much as there is credit for, up to this.
        Send(u32),
        /// The guest's buffer, and how far behind what was sent it is. More than was sent is nonsense.
        Update(u32, i64),
        Receive(u32),
        Forward(u32),
        Tell,
    }

    impl Model {
        /// All counters begin at `start`, as after so many bytes.
        fn new(start: u32) -> Self {
            let mut credit = Credit::new(Window(LEAST));
            for counter in [
                &mut credit.sent,
                &mut credit.peer_forwarded,
                &mut credit.received,
                &mut credit.forwarded,
                &mut credit.told,
            ] {
                *counter = start;
            }
            let start = u64::from(start);
            Self {
                credit,
                sent: start,
                alloc: 0,
                forwarded_by_guest: start,
                received: start,
                forwarded: start,
                told: start,
            }
        }

        fn step(&mut self, step: Step) {
            let window = u64::from(LEAST);
            match step {
                Step::Send(most) => {
                    let bytes = self.credit.available().min(most);
                    self.credit.send(bytes);
                    self.sent += u64::from(bytes);
                    let in_flight = self.sent - self.forwarded_by_guest.min(self.sent);
                    assert!(
                        bytes == 0 || in_flight <= self.alloc,
                        "over the guest's buffer"
                    );
                }
                Step::Update(alloc, behind) => {
                    let forwarded = self.sent.checked_add_signed(-behind).unwrap();
                    let told = u32::try_from(forwarded & 0xffff_ffff).unwrap();
                    self.credit.update(alloc, told);
                    (self.alloc, self.forwarded_by_guest) = (u64::from(alloc), forwarded);
                }
                Step::Receive(bytes) => {
                    let fits = self.received - self.forwarded + u64::from(bytes) <= window;
                    assert_eq!(self.credit.receive(bytes), fits);
                    // A guest that keeps to what it was told is never refused.
                    let allowed = (self.told + window).saturating_sub(self.received);
                    assert!(fits || u64::from(bytes) > allowed);
                    self.received += if fits { u64::from(bytes) } else { 0 };
                }
                Step::Forward(bytes) => {
                    self.credit.forward(bytes);
                    self.forwarded = (self.forwarded + u64::from(bytes)).min(self.received);
                }
                Step::Tell => {
                    let told = u64::from(self.credit.tell());
                    assert_eq!(told, self.forwarded & 0xffff_ffff);
                    self.told = self.forwarded;
                }
            }
            let held = self.received - self.forwarded;
            assert!(held <= window, "more is held than was granted");
            assert_eq!(u64::from(self.credit.held()), held);
            let available = u64::from(self.credit.available());
            if self.forwarded_by_guest > self.sent {
                // It claims to have read what was never sent: 2^32 less something is in flight.
                assert!(available <= self.forwarded_by_guest - self.sent, "{step:?}");
            } else {
                let in_flight = self.sent - self.forwarded_by_guest;
                assert_eq!(available, self.alloc.saturating_sub(in_flight), "{step:?}");
            }
        }
    }

    /// All sequences of five steps, from counters at 0 and just before they wrap: no more is sent than
    /// the guest granted, no more is held than we did, and what we grant is what is free.
    #[test]
    fn no_short_sequence_sends_or_holds_more_than_was_granted() {
        let alphabet = [
            Step::Send(1),
            Step::Send(u32::MAX),
            Step::Update(0, 0),
            Step::Update(100, 0),
            Step::Update(100, 60),
            Step::Update(40, 60),
            Step::Update(u32::MAX, 0),
            Step::Update(u32::MAX, -1),
            Step::Receive(1),
            Step::Receive(LEAST / 2),
            Step::Receive(LEAST),
            Step::Receive(u32::MAX),
            Step::Forward(1),
            Step::Forward(u32::MAX),
            Step::Tell,
        ];
        for start in [1000, u32::MAX - LEAST, u32::MAX - 50, u32::MAX] {
            let start = Model::new(start);
            let total = crate::fuzzing::sequences(&alphabet, 5, |steps| {
                let mut model = start.clone();
                steps.iter().for_each(|step| model.step(*step));
            });
            assert_eq!(total, 15usize.pow(5));
        }
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
