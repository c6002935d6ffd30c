//! A disk whose requests take their time.

use super::*;

#[test]
fn requests_that_take_their_time_are_in_flight_together_and_hold_no_read_up() {
    let gate = Arc::new(Barrier::new(3));
    let mut disk = helped(Some(&gate));
    let data = disk.data;
    let first = disk.add(0, 4, 0, &[]);
    let second = disk.add(1, 4, 0, &[]);
    while disk.harness.step(5).unwrap() > 0 {}
    // Both wait at the gate, and what is in memory is read all the same: the driver says that it has come.
    assert!(disk.harness.queues[0].wants_next_kick());
    let read = disk.add(2, 0, 7, &[(data, 512, true)]);
    assert!(disk.returned(1));
    assert_eq!(disk.harness.read(read, 1), [OK]);
    assert_eq!(disk.harness.read(data, 512), [7; 512]);
    assert_eq!(disk.harness.read(first, 1), [0xee]);
    gate.wait();
    assert!(disk.returned(2));
    assert_eq!(disk.harness.read(first, 1), [OK]);
    assert_eq!(disk.harness.read(second, 1), [OK]);
}

#[test]
fn a_deactivation_waits_for_what_is_in_flight() {
    let gate = Arc::new(Barrier::new(2));
    let mut disk = helped(Some(&gate));
    let status = disk.add(0, 4, 0, &[]);
    while disk.harness.step(5).unwrap() > 0 {}
    // What waits for a helper is not in flight, and is dropped.
    while !disk.harness.device.all_begun() {
        std::thread::yield_now();
    }
    let opener = Arc::clone(&gate);
    let opened = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        opener.wait();
    });
    disk.harness.deactivate();
    assert_eq!(disk.harness.read(status, 1), [OK]);
    opened.join().unwrap();
}

#[test]
fn a_request_that_is_changed_after_it_was_taken_is_judged_as_it_is_when_it_is_done() {
    let gate = Arc::new(Barrier::new(5));
    let mut disk = helped(Some(&gate));
    let (page, data) = (disk.page, disk.data);
    for number in 0..4 {
        disk.add(number, 4, 0, &[]);
    }
    // All helpers wait at the gate, so this one waits for them.
    disk.add(4, 1, 0, &[(data, 512, false)]);
    let head = disk.harness.queues[0].last_head();
    while disk.harness.step(5).unwrap() > 0 {}
    disk.harness.queues[0].raw_descriptor(head, page, 16, 0, 0);
    gate.wait();
    disk.is_stopped();
    disk.harness.deactivate();
    assert_eq!(disk.sector(0), [0; 512]);
}

#[test]
fn a_driver_that_asks_for_more_at_once_than_there_are_descriptors_is_stopped() {
    let gate = Arc::new(Barrier::new(5));
    let mut disk = helped(Some(&gate));
    disk.add(0, 4, 0, &[]);
    let head = disk.harness.queues[0].last_head();
    let size = usize::from(disk.harness.queues[0].size());
    let mut stopped = false;
    // The same descriptors again and again.
    for _ in 0..4 * size {
        disk.harness.queues[0].make_available(head);
        disk.harness.queues[0].kick();
        stopped |= disk.harness.step(5).is_err();
        if stopped {
            break;
        }
    }
    assert!(stopped);
    gate.wait();
    disk.harness.deactivate();
}
