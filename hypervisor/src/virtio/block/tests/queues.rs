//! A disk with several queues.

use super::*;
use crate::virtio::block::MAX_QUEUES;

/// VIRTIO_BLK_F_MQ.
const MQ: u64 = 1 << 12;
const LONG: Duration = Duration::from_secs(60);

fn device(file: &File, queues: u16) -> Block {
    Block::new(file.try_clone().unwrap().into(), false, "many", 512, queues).unwrap()
}

/// A disk with helpers, a queue's thread of which rests for so long.
fn many(queues: u16, rest: Duration) -> Disk {
    let file = sectors();
    Disk::over(device(&file, queues).with_helpers().with_rest(rest), file)
}

impl Disk {
    /// Reads a sector by way of a queue, with the buffers of its number.
    fn read_by(&mut self, queue: usize, number: u64, sector: u64) -> (u64, u64) {
        let at = self.data + number * 512;
        self.harness.write(at, &[0xee; 512]);
        (
            self.add_to(queue, number, 0, sector, &[(at, 512, true)]),
            at,
        )
    }

    /// Both queues have something at once: the worker serves one, and the other waits.
    fn crowd(&mut self) {
        self.read_by(0, 0, 1);
        self.read_by(1, 1, 2);
        assert!(self.returned(2));
    }
}

#[test]
fn as_many_queues_are_offered_as_the_disk_was_given_and_one_is_not_spoken_of() {
    let file = sectors();
    for queues in 1..=MAX_QUEUES {
        let device = device(&file, queues);
        assert_eq!(device.queue_sizes(), vec![256; usize::from(queues)]);
        assert_eq!(device.features() & MQ != 0, queues > 1);
        let mut told = [0; 2];
        device.config().read(34, &mut told);
        assert_eq!(u16::from_le_bytes(told), queues);
    }
    for queues in [0, MAX_QUEUES + 1, u16::MAX] {
        let file = file.try_clone().unwrap();
        assert!(matches!(
            Block::new(file.into(), false, "", 512, queues),
            Err(BlockError::Queues(_))
        ));
    }
}

#[test]
fn a_request_is_answered_on_the_queue_that_it_came_by_and_without_a_thread() {
    let mut disk = many(4, LONG);
    for queue in [2, 0, 3, 1] {
        let sector = 10 + u64::try_from(queue).unwrap();
        let (status, data) = disk.read_by(queue, 0, sector);
        let index = u16::try_from(queue).unwrap();
        let before = disk.harness.interrupts.of(index);
        disk.harness.run();
        assert_eq!(disk.harness.queues[queue].used().len(), 1);
        assert_eq!(disk.harness.interrupts.of(index), before + 1);
        assert_eq!(disk.harness.read(status, 1), [OK]);
        let wanted = [u8::try_from(sector).unwrap(); 512];
        assert_eq!(disk.harness.read(data, 512), wanted);
    }
    let others: u64 = (0..4).map(|index| disk.harness.interrupts.of(index)).sum();
    assert_eq!(others, 4);
    assert_eq!(disk.harness.device.queue_threads(), [] as [u16; 0]);
}

#[test]
fn a_queue_that_waited_for_another_has_a_thread_until_it_rests() {
    let mut disk = many(2, Duration::from_millis(50));
    disk.crowd();
    assert_eq!(disk.harness.device.queue_threads(), [1]);
    // Nobody steps: the thread serves it alone.
    let end = Instant::now() + Duration::from_secs(20);
    let (status, _) = disk.read_by(1, 2, 5);
    while disk.harness.queues[1].used().is_empty() {
        assert!(Instant::now() < end, "the queue is nobody's");
        std::thread::yield_now();
    }
    assert_eq!(disk.harness.read(status, 1), [OK]);
    while !disk.harness.device.queue_threads().is_empty() {
        assert!(Instant::now() < end, "the thread does not rest");
        disk.harness.step(5).unwrap();
    }
    // The worker has it again.
    let (status, _) = disk.read_by(1, 3, 6);
    assert!(disk.returned(1));
    assert_eq!(disk.harness.read(status, 1), [OK]);
    assert!(disk.harness.device.queue_threads().is_empty());
}

/// What a thread says at its end comes by the kick of queue 0, which the worker may be about to take.
#[test]
fn a_queue_whose_thread_rests_while_the_worker_serves_is_served_again() {
    let mut disk = many(2, Duration::ZERO);
    for _ in 0..3000 {
        disk.crowd();
    }
}

#[test]
fn a_busy_queue_leaves_the_worker_when_the_first_one_waits() {
    let mut disk = many(3, LONG);
    disk.read_by(0, 0, 1);
    disk.read_by(2, 1, 1);
    // The worker hears of queue 2 before it has looked at queue 0.
    disk.harness.try_deliver(2).unwrap();
    assert_eq!(disk.harness.device.queue_threads(), [2]);
    assert!(disk.returned(2));
}

#[test]
fn a_deactivation_ends_the_threads_and_what_comes_then_is_nobodys() {
    let mut disk = many(2, LONG);
    disk.crowd();
    disk.harness.deactivate();
    assert!(disk.harness.device.queue_threads().is_empty());
    let (status, _) = disk.read_by(1, 2, 5);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.harness.read(status, 1), [0xee]);
    // And the device can be used again.
    let features = disk.harness.device.features();
    disk.harness.activate(features);
    disk.crowd();
    assert_eq!(disk.harness.device.queue_threads(), [1]);
}

#[test]
fn a_device_that_is_dropped_while_it_is_active_ends_its_threads() {
    let mut disk = many(2, LONG);
    disk.crowd();
    drop(disk);
}

#[test]
fn a_driver_that_breaks_the_rules_of_a_queue_with_a_thread_is_told_by_the_worker() {
    let mut disk = many(2, LONG);
    disk.crowd();
    disk.harness.queues[1].set_available_index(2000);
    disk.harness.queues[1].kick();
    disk.is_stopped();
    disk.harness.deactivate();
    let features = disk.harness.device.features();
    disk.harness.activate(features);
    disk.crowd();
}

#[test]
fn slow_requests_of_one_queue_leave_threads_for_another() {
    let gate = Arc::new(Barrier::new(6));
    let file = sectors();
    let device = device(&file, 2).gated(Arc::clone(&gate)).with_helpers();
    let mut disk = Disk::over(device, file);
    for number in 0..8 {
        disk.add_to(0, number, 4, 0, &[]);
    }
    disk.add_to(1, 8, 4, 0, &[]);
    while disk.harness.step(5).unwrap() > 0 {}
    // Four of the first queue and one of the second meet at the gate, with this thread.
    gate.wait();
    let opener = std::thread::spawn(move || {
        // The other four, and whoever is missing.
        gate.wait();
    });
    let filler: Vec<_> = (9..10)
        .map(|number| disk.add_to(1, number, 4, 0, &[]))
        .collect();
    assert!(disk.returned(10));
    assert_eq!(filler.len(), 1);
    opener.join().unwrap();
}

#[test]
fn a_driver_that_does_not_know_of_several_queues_has_the_first_alone() {
    let file = sectors();
    let mut harness = Harness::new(device(&file, 3).with_helpers());
    let features = harness.device.features() & !MQ;
    harness.activate(features);
    let page = harness.alloc(0x1000);
    harness.write(page + 100, &[0xee]);
    for queue in [1, 2, 0] {
        harness.queues[queue].add(&[(page, 16, false), (page + 100, 1, true)]);
        harness.run();
        let served = usize::from(queue == 0);
        assert_eq!(harness.queues[queue].used().len(), served, "{queue}");
    }
}

#[test]
fn queues_that_the_driver_leaves_out_are_not_missed_but_the_first_is() {
    let file = sectors();
    let mut harness = Harness::new(device(&file, 4).with_helpers());
    let features = harness.device.features();
    let without_first = harness.try_activate_some(features, |index| index != 0);
    assert!(matches!(without_first, Err(DeviceError::Guest { .. })));
    harness
        .try_activate_some(features, |index| index != 2)
        .unwrap();
    let page = harness.alloc(0x1000);
    harness.queues[3].add(&[(page, 16, false), (page + 100, 1, true)]);
    harness.run();
    assert_eq!(harness.queues[3].used().len(), 1);
    harness.deactivate();
}

proptest! {
    /// Whatever comes by whichever queue, with resets in between, all of it is done once, and each sector has what was
    /// written to it last.
    #[test]
    fn nothing_is_lost_or_mixed_up_among_queues(
        rest in 0u64..3,
        rounds in prop::collection::vec(
            (prop::collection::vec((0usize..4, 0u32..3, 0u64..60), 1..50), any::<bool>()),
            1..8,
        ),
    ) {
        check_rounds(&mut many(4, Duration::from_millis(rest)), rounds)?;
    }
}
