//! Queue pairs that keep each other waiting, and their threads.

use std::time::{Duration, Instant};

use super::*;

const LONG: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(20);
const NONE: [usize; 0] = [];

/// An interface, all pairs of which are in use and have buffers, with threads that rest for so long.
fn many(lanes: usize, rest: Duration) -> Setup {
    let mut net = Setup::with(lanes, u64::MAX, |device| device.with_rest(rest));
    net.begin();
    net
}

impl Setup {
    /// What a driver does with all its pairs at first.
    fn begin(&mut self) {
        let lanes = self.wires.len();
        if lanes > 1 {
            assert_eq!(self.set_pairs(u16::try_from(lanes).unwrap()), 0);
        }
        for pair in 0..lanes {
            self.post(pair, 60, 1536);
        }
    }

    /// As a driver that resets the device and begins again.
    fn reset(&mut self) {
        self.harness.deactivate();
        self.buffers.clear();
        let features = self.harness.device.features();
        self.harness.activate(features);
        self.begin();
    }

    fn lent(&self) -> Vec<usize> {
        self.harness.device.lent()
    }

    /// Waits for what a thread does.
    fn wait_for<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            assert!(Instant::now() < end, "{what}");
            std::thread::yield_now();
        }
    }

    /// What was offered to a pair has left by the lane of its number, once.
    fn leaves(&mut self, pair: usize, frame: &[u8]) {
        let sent = self.wait_for("a frame is not sent", |net| {
            net.harness.run();
            net.sent(pair)
        });
        assert_eq!(sent[HEADER..], *frame);
        self.wait_for("its buffers are not given back", |net| {
            net.harness.queues[2 * pair + 1].used().pop()
        });
        assert!(self.sent(pair).is_none());
    }

    /// A frame that comes by a lane is received on a pair, once.
    fn comes(&mut self, lane: usize, pair: usize, frame: &[u8]) {
        self.arrive(lane, frame);
        let frames = self.wait_for("a frame is not received", |net| {
            let frames = net.received(pair);
            (!frames.is_empty()).then_some(frames)
        });
        assert_eq!(frames, [(1, frame.to_vec())]);
        self.post(pair, 1, 1536);
    }

    /// These pairs have something to send at once: the worker serves one, and the others wait.
    fn crowd(&mut self, pairs: &[usize]) {
        let frame = pattern(60);
        for pair in pairs {
            self.offer(*pair, [0; HEADER], &frame);
        }
        for pair in pairs {
            self.leaves(*pair, &frame);
        }
    }
}

#[test]
fn a_pair_that_waited_for_another_has_a_thread_until_it_rests() {
    let mut net = many(2, Duration::from_millis(50));
    assert_eq!(net.lent(), NONE);
    net.crowd(&[0, 1]);
    assert_eq!(net.lent(), [1]);
    // Nobody steps: the thread serves both directions alone.
    net.offer(1, [0; HEADER], &pattern(70));
    let sent = net.wait_for("nothing is sent", |net| net.sent(1));
    assert_eq!(sent[HEADER..], pattern(70));
    net.arrive(1, &pattern(80));
    let used = net.wait_for("nothing is received", |net| {
        net.harness.queues[2].used().pop()
    });
    assert_eq!(used.1, 92);
    net.wait_for("the thread does not rest", |net| {
        net.harness.step(5).unwrap();
        net.lent().is_empty().then_some(())
    });
    // The worker has both again.
    net.buffers.clear();
    net.reset();
    net.comes(1, 1, &pattern(90));
    net.send(1, [0; HEADER], &pattern(60));
    assert!(net.sent(1).is_some());
    assert_eq!(net.lent(), NONE);
}

#[test]
fn a_thread_that_rests_gives_the_worker_what_comes_in_that_moment() {
    let mut net = many(2, Duration::ZERO);
    for _ in 0..500 {
        net.crowd(&[0, 1]);
        net.comes(1, 1, &pattern(60));
    }
}

/// A tap blocks nobody. That this one does shows who is at work.
#[test]
fn a_pair_whose_thread_hangs_does_not_hold_up_the_others() {
    let mut net = many(3, LONG);
    net.crowd(&[0, 1]);
    net.crowd(&[0, 2]);
    assert_eq!(net.lent(), [1, 2]);
    net.taps[1].set_nonblocking(false).unwrap();
    let frame = pattern(60_000);
    let mut offered = 0;
    let mut hangs = false;
    while !hangs {
        net.offer(1, [0; HEADER], &frame);
        offered += 1;
        assert!(offered < 50, "the wire takes everything");
        let end = Instant::now() + Duration::from_millis(100);
        while net.harness.queues[3].used().is_empty() && !hangs {
            hangs = Instant::now() > end;
        }
    }
    for _ in 0..10 {
        net.crowd(&[0, 2]);
        net.comes(0, 0, &pattern(60));
        net.comes(2, 2, &pattern(61));
    }
    assert_eq!(net.harness.queues[3].used(), []);
    for _ in 0..offered {
        let sent = net.wait_for("a frame is lost", |net| net.sent(1));
        assert_eq!(sent[HEADER..], frame);
    }
    net.taps[1].set_nonblocking(true).unwrap();
    net.crowd(&[0, 1, 2]);
}

#[test]
fn an_interface_with_one_pair_has_never_a_thread_nor_has_one_on_a_worker_that_may_start_none() {
    let mut one = many(1, LONG);
    let mut without = Setup::new(2, u64::MAX);
    without.begin();
    for _ in 0..20 {
        one.flood(0);
        one.crowd(&[0]);
        without.flood(1);
        without.crowd(&[0, 1]);
        without.comes(1, 1, &pattern(60));
    }
    assert_eq!(one.lent(), NONE);
    assert_eq!(without.lent(), NONE);
}

impl Setup {
    /// As many frames as are moved at once; none of them goes on the wire.
    fn flood(&mut self, pair: usize) {
        let address = self.harness.alloc(128);
        self.harness.write(address, &[0xff; 128]);
        let queue = &mut self.harness.queues[2 * pair + 1];
        for _ in 0..queue.room() {
            queue.add(&[(address, 128, false)]);
        }
        self.wait_for("buffers are not given back", |net| {
            net.harness.run();
            let queue = &mut net.harness.queues[2 * pair + 1];
            queue.used();
            (queue.room() == usize::from(queue.size())).then_some(())
        });
    }
}

#[test]
fn a_pair_that_keeps_all_waiting_leaves_the_worker_unless_it_is_the_first() {
    let mut net = many(3, LONG);
    net.flood(0);
    assert_eq!(net.lent(), NONE);
    net.flood(2);
    assert_eq!(net.lent(), [2]);
    net.crowd(&[0, 1, 2]);
}

#[test]
fn a_reset_ends_the_threads_and_what_comes_then_is_nobodys() {
    let mut net = many(2, LONG);
    for _ in 0..3 {
        net.crowd(&[0, 1]);
        assert_eq!(net.lent(), [1]);
        net.harness.deactivate();
        assert_eq!(net.lent(), NONE);
        net.offer(1, [0; HEADER], &pattern(60));
        std::thread::sleep(Duration::from_millis(20));
        assert!(net.sent(1).is_none());
        net.reset();
    }
}

#[test]
fn a_device_that_is_dropped_while_it_is_active_ends_its_threads() {
    let mut net = many(2, LONG);
    net.crowd(&[0, 1]);
    drop(net);
}

#[test]
fn a_pair_that_the_driver_gives_up_loses_its_thread_and_its_frames_go_to_another() {
    let mut net = many(3, LONG);
    net.crowd(&[0, 1]);
    net.crowd(&[0, 2]);
    assert_eq!(net.lent(), [1, 2]);
    assert_eq!(net.set_pairs(2), 0);
    assert_eq!(net.lent(), NONE);
    net.comes(2, 0, &pattern(60));
    net.comes(1, 1, &pattern(60));
    // No other tap delivers to pair 1, so it can be alone; one that is not in use cannot.
    net.crowd(&[0, 1, 2]);
    net.crowd(&[0, 1]);
    assert_eq!(net.lent(), [1]);
    assert_eq!(net.set_pairs(1), 0);
    assert_eq!(net.lent(), NONE);
    for lane in 0..3 {
        net.comes(lane, 0, &pattern(60));
    }
    net.crowd(&[0, 1, 2]);
    assert_eq!(net.lent(), NONE);
    assert_eq!(net.set_pairs(3), 0);
    net.crowd(&[0, 2]);
    assert_eq!(net.lent(), [2]);
    net.comes(2, 2, &pattern(60));
}

#[test]
fn a_driver_that_breaks_the_rules_of_a_pair_with_a_thread_is_told_by_the_worker() {
    for queue in [2, 3] {
        let mut net = many(2, LONG);
        net.crowd(&[0, 1]);
        net.harness.queues[queue].set_available_index(2000);
        net.harness.queues[queue].kick();
        if queue == 2 {
            // The queue is looked at when there is something for it.
            for _ in 0..60 {
                let _ = net.wires[1].send(&[0; 60]);
            }
        }
        let refused = net.wait_for("nobody tells", |net| net.harness.step(5).err());
        assert!(matches!(refused, DeviceError::Guest { .. }), "{refused}");
        // A control command would have told as well.
        net.reset();
        net.crowd(&[0, 1]);
        assert_eq!(net.lent(), [1]);
    }
}

/// Every order of a few steps, each of which may meet a thread at its work, at its end or not at all.
#[test]
fn whatever_comes_in_whichever_order_is_moved_once() {
    const STEPS: u32 = 7;
    const LENGTH: u32 = 3;
    for rest in [Duration::ZERO, LONG] {
        for mut order in 0..STEPS.pow(LENGTH) {
            let mut net = many(2, rest);
            let mut in_use = 2;
            for _ in 0..LENGTH {
                match order % STEPS {
                    0 => net.crowd(&[0, 1]),
                    1 => net.crowd(&[1]),
                    2 => net.comes(0, 0, &pattern(60)),
                    3 => net.comes(1, 1 % in_use, &pattern(61)),
                    4 => {
                        in_use = 3 - in_use;
                        assert_eq!(net.set_pairs(u16::try_from(in_use).unwrap()), 0);
                    }
                    5 => net.flood(1),
                    _ => {
                        in_use = 2;
                        net.reset();
                    }
                }
                order /= STEPS;
            }
            net.crowd(&[0, 1]);
            net.comes(1, 1 % in_use, &pattern(62));
        }
    }
}

proptest! {
    #[test]
    fn any_descriptors_are_survived_by_a_thread(
        queue in 2usize..4,
        table in prop::collection::vec(any_descriptor(20), 1..8),
        heads in prop::collection::vec(0u16..20, 1..6),
        frames in prop::collection::vec(1usize..3000, 0..4),
        rest in 0u64..2,
    ) {
        let mut net = many(2, Duration::from_millis(rest * 1000));
        net.crowd(&[0, 1]);
        net.harness.raw_chains(queue, &table, &heads);
        for length in frames {
            net.arrive(1, &pattern(length));
        }
        for _ in 0..3 {
            if net.harness.try_run().is_err() {
                break;
            }
        }
        net.reset();
        while net.sent(1).is_some() {}
        net.crowd(&[0, 1]);
    }
}
