//! A worker with a device that does what the test tells it.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use slog::{Discard, o};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::virtio::counts::DeviceCounts;
use crate::virtio::{ActiveQueue, ConfigSpace, DeviceError, Interrupt};

const PATIENCE: Duration = Duration::from_secs(10);

struct Silent;

impl Interrupt for Silent {
    fn queue(&self, _: u16) -> io::Result<()> {
        Ok(())
    }
    fn event(&self, _: u16) -> io::Result<Option<EventFd>> {
        Ok(None)
    }
    fn config(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Reports what happens to it; fails when `fail_on` kicks have been counted.
struct Fake {
    seen: mpsc::Sender<&'static str>,
    kick: Option<EventFd>,
    fails: bool,
}

fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl VirtioDevice for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn device_type(&self) -> u16 {
        4
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(Vec::new())
    }
    fn activate(&mut self, mut a: Activation, s: &mut Sources<'_>) -> Result<(), DeviceError> {
        let kick = a.queues.remove(0).kick;
        s.add(fd(&kick), 7, EventSet::IN).unwrap();
        self.kick = Some(kick);
        self.seen.send("activate").unwrap();
        Ok(())
    }
    fn process(&mut self, t: u32, _: EventSet, _: &mut Sources<'_>) -> Result<(), DeviceError> {
        assert_eq!(t, 7);
        self.kick.as_ref().unwrap().read().unwrap();
        self.seen.send("process").unwrap();
        if self.fails {
            return Err(DeviceError::Guest {
                device: "fake",
                reason: "test".to_owned(),
            });
        }
        Ok(())
    }
    fn deactivate(&mut self, s: &mut Sources<'_>) {
        if let Some(kick) = self.kick.take() {
            s.remove(fd(&kick)).unwrap();
        }
        self.seen.send("deactivate").unwrap();
    }
}

fn activation(kick: &EventFd) -> Activation {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    Activation {
        memory: GuestMemoryAtomic::new(memory),
        features: 0,
        queues: vec![ActiveQueue {
            index: 0,
            queue: Queue::new(16).unwrap(),
            kick: kick.try_clone().unwrap(),
            counts: Arc::default(),
        }],
        interrupt: Arc::new(Silent),
    }
}

struct Setup {
    worker: Worker,
    handles: Vec<DeviceHandle>,
    seen: Vec<mpsc::Receiver<&'static str>>,
    failed: mpsc::Receiver<()>,
}

fn setup(fails: &[bool]) -> Setup {
    let (failure, failed) = mpsc::channel();
    let mut seen = Vec::new();
    let slots = fails
        .iter()
        .map(|fails| {
            let (sender, receiver) = mpsc::channel();
            seen.push(receiver);
            let failure = failure.clone();
            Slot {
                device: Box::new(Fake {
                    seen: sender,
                    kick: None,
                    fails: *fails,
                }),
                on_failure: Box::new(move || failure.send(()).unwrap()),
                counts: Arc::default(),
            }
        })
        .collect();
    let (worker, handles) = spawn(
        "test",
        slots,
        Box::new(|| Ok(())),
        Box::new(|reason| panic!("{reason}")),
        Logger::root(Discard, o!()),
    )
    .unwrap();
    Setup {
        worker,
        handles,
        seen,
        failed,
    }
}

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

fn expect(seen: &mpsc::Receiver<&'static str>, what: &str) {
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), what);
}

#[test]
fn a_device_is_activated_kicked_deactivated_and_activated_again() {
    let setup = setup(&[false]);
    for _ in 0..2 {
        let kick = event();
        setup.handles[0].activate(activation(&kick));
        expect(&setup.seen[0], "activate");
        kick.write(1).unwrap();
        expect(&setup.seen[0], "process");
        let done = setup.handles[0].deactivate();
        done.recv_timeout(PATIENCE).unwrap();
        expect(&setup.seen[0], "deactivate");
        kick.write(1).unwrap();
    }
    drop(setup.worker);
    assert!(setup.seen[0].try_recv().is_err());
}

#[test]
fn a_device_that_fails_is_deactivated_and_its_neighbour_goes_on() {
    let setup = setup(&[true, false]);
    let kicks = [event(), event()];
    for (handle, kick) in setup.handles.iter().zip(&kicks) {
        handle.activate(activation(kick));
    }
    for seen in &setup.seen {
        expect(seen, "activate");
    }
    kicks[0].write(1).unwrap();
    setup.failed.recv_timeout(PATIENCE).unwrap();
    expect(&setup.seen[0], "process");
    expect(&setup.seen[0], "deactivate");
    kicks[0].write(1).unwrap();
    kicks[1].write(1).unwrap();
    expect(&setup.seen[1], "process");
    // A reset of the failed device is acknowledged without touching it again.
    setup.handles[0]
        .deactivate()
        .recv_timeout(PATIENCE)
        .unwrap();
    assert!(setup.seen[0].try_recv().is_err());
}

#[test]
fn a_device_can_be_given_to_a_running_worker() {
    let mut setup = setup(&[false]);
    let first = event();
    setup.handles[0].activate(activation(&first));
    expect(&setup.seen[0], "activate");
    let (sender, seen) = mpsc::channel();
    let counts = Arc::<DeviceCounts>::default();
    let late = setup.worker.add(Slot {
        device: Box::new(Fake {
            seen: sender,
            kick: None,
            fails: false,
        }),
        on_failure: Box::new(|| ()),
        counts: Arc::clone(&counts),
    });
    let kick = event();
    late.activate(activation(&kick));
    expect(&seen, "activate");
    kick.write(1).unwrap();
    expect(&seen, "process");
    assert_eq!(counts.wakeups.get(), 1);
    first.write(1).unwrap();
    expect(&setup.seen[0], "process");
    drop(setup.worker);
    expect(&seen, "deactivate");
}

#[test]
fn a_removed_device_is_drained_and_dropped_while_its_neighbour_goes_on_and_its_number_is_not_used_again()
 {
    let mut setup = setup(&[false, false]);
    let kicks = [event(), event()];
    for (handle, kick) in setup.handles.iter().zip(&kicks) {
        handle.activate(activation(kick));
    }
    for seen in &setup.seen {
        expect(seen, "activate");
    }
    let (gone, removed) = mpsc::channel();
    setup.handles[0].remove(Box::new(move || gone.send(()).unwrap()));
    removed.recv_timeout(PATIENCE).unwrap();
    expect(&setup.seen[0], "deactivate");
    // The device has been dropped by then, and with it all that it held.
    assert_eq!(
        setup.seen[0].try_recv(),
        Err(mpsc::TryRecvError::Disconnected)
    );
    kicks[1].write(1).unwrap();
    expect(&setup.seen[1], "process");
    // A newcomer does not hear what is still said to the one that left.
    let (sender, seen) = mpsc::channel();
    let late = setup.worker.add(Slot {
        device: Box::new(Fake {
            seen: sender,
            kick: None,
            fails: false,
        }),
        on_failure: Box::new(|| ()),
        counts: Arc::default(),
    });
    setup.handles[0].activate(activation(&kicks[0]));
    setup.handles[0]
        .deactivate()
        .recv_timeout(PATIENCE)
        .unwrap();
    assert!(seen.try_recv().is_err());
    late.activate(activation(&event()));
    expect(&seen, "activate");
}

#[test]
fn dropping_the_worker_deactivates_what_is_active() {
    let setup = setup(&[false]);
    setup.handles[0].activate(activation(&event()));
    expect(&setup.seen[0], "activate");
    drop(setup.worker);
    expect(&setup.seen[0], "deactivate");
    assert!(setup.handles[0].deactivate().recv().is_err());
}

#[test]
fn a_failed_prologue_is_fatal_and_said() {
    let (sender, fatal) = mpsc::channel();
    let (_worker, _handles) = spawn(
        "test",
        Vec::new(),
        Box::new(|| Err("no seccomp".to_owned())),
        Box::new(move |reason| sender.send(reason).unwrap()),
        Logger::root(Discard, o!()),
    )
    .unwrap();
    assert_eq!(fatal.recv_timeout(PATIENCE).unwrap(), "no seccomp");
}
