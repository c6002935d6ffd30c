//! A worker thread: owns devices, waits for what they registered, and takes commands from CPU
//! threads.
//!
//! Commands are few (activate, deactivate) and acknowledged through channels. A device that fails
//! is deactivated and its driver told to reset it; the other devices and the VM go on.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use slog::{Logger, error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::counts::DeviceCounts;
use super::{Activation, Sources, VirtioDevice};

/// The slot of the worker's own wake-up event.
const WAKE_SLOT: u32 = u32::MAX;
const BATCH: usize = 32;

enum Command {
    Add(u32, Slot),
    Activate(u32, Box<Activation>),
    Deactivate(u32, SyncSender<()>),
    Refresh(u32, Option<SyncSender<()>>),
    Remove(u32, OnRemoved),
    Stop,
}

/// Called on the worker's thread when its device failed: sets DEVICE_NEEDS_RESET.
pub type OnFailure = Box<dyn Fn() + Send>;
/// Called first on the worker's thread: seccomp. An error ends the VM.
pub type Prologue = Box<dyn FnOnce() -> Result<(), String> + Send>;
/// Called on the worker's thread when a device is gone.
pub type OnRemoved = Box<dyn FnOnce() + Send>;
/// Called when the thread itself cannot go on.
pub type OnFatal = Box<dyn Fn(String) + Send>;

/// A device to run.
pub struct Slot {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// What to do when it fails.
    pub on_failure: OnFailure,
    /// What wakes it is counted here.
    pub counts: Arc<DeviceCounts>,
}

/// The transport's end of one device.
#[derive(Clone)]
pub struct DeviceHandle {
    slot: u32,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl DeviceHandle {
    /// Gives the device its queues. Returns at once.
    pub fn activate(&self, activation: Activation) {
        self.send(Command::Activate(self.slot, Box::new(activation)));
    }

    /// Takes the queues back. The receiver gets one message when no guest memory is touched any
    /// more; it is disconnected if the worker is gone.
    #[must_use]
    pub fn deactivate(&self) -> Receiver<()> {
        let (done, receiver) = sync_channel(1);
        self.send(Command::Deactivate(self.slot, done));
        receiver
    }

    /// Lets the device look again at what it stands on. Returns at once.
    pub fn refresh(&self) {
        self.send(Command::Refresh(self.slot, None));
    }

    /// As [`Self::refresh`]; the receiver gets one message when the device has looked, and is disconnected if the worker is
    /// gone.
    #[must_use]
    pub fn refreshed(&self) -> Receiver<()> {
        let (done, receiver) = sync_channel(1);
        self.send(Command::Refresh(self.slot, Some(done)));
        receiver
    }

    /// Takes the device from its worker: in-flight I/O is drained, and when the device has been dropped, with
    /// all that it holds of the host, `removed` is called. Returns at once.
    pub fn remove(&self, removed: OnRemoved) {
        self.send(Command::Remove(self.slot, removed));
    }

    fn send(&self, command: Command) {
        // A worker that is gone has said so; the VM is ending.
        if self.commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// A running worker thread. Dropping it stops the thread and joins it.
pub struct Worker {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Devices it has ever been given: no number is used twice, so that a late command for a device that is
    /// gone reaches no other.
    slots: u32,
}

impl Worker {
    /// Gives the running thread one more device, without a thread of its own: a filtered process has no way
    /// to start one.
    pub fn add(&mut self, slot: Slot) -> DeviceHandle {
        let handle = DeviceHandle {
            slot: self.slots,
            commands: self.commands.clone(),
            wake: Arc::clone(&self.wake),
        };
        self.slots += 1;
        handle.send(Command::Add(handle.slot, slot));
        handle
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.commands.send(Command::Stop).is_ok() {
            let _ = self.wake.write(1);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts a thread called `name` for `slots`; the handles are in their order.
///
/// # Errors
/// If the host gives no thread, epoll or eventfd.
pub fn spawn(
    name: &str,
    slots: Vec<Slot>,
    prologue: Prologue,
    on_fatal: OnFatal,
    log: Logger,
) -> io::Result<(Worker, Vec<DeviceHandle>)> {
    let (commands, receiver) = channel();
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let epoll = Epoll::new()?;
    epoll.ctl(
        ControlOperation::Add,
        std::os::fd::AsRawFd::as_raw_fd(&*wake),
        EpollEvent::new(EventSet::IN, u64::from(WAKE_SLOT) << 32),
    )?;
    let count = u32::try_from(slots.len()).map_err(io::Error::other)?;
    let handles = (0..count)
        .zip(&slots)
        .map(|(slot, _)| DeviceHandle {
            slot,
            commands: commands.clone(),
            wake: Arc::clone(&wake),
        })
        .collect();
    let mut thread_state = Thread {
        epoll,
        wake: Arc::clone(&wake),
        commands: receiver,
        slots: (0..).zip(slots.into_iter().map(Running::new)).collect(),
        log,
    };
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = prologue().and_then(|()| {
                thread_state
                    .run()
                    .map_err(|error| format!("device worker: {error}"))
            });
            if let Err(reason) = result {
                on_fatal(reason);
            }
        })?;
    Ok((
        Worker {
            commands,
            wake,
            thread: Some(thread),
            slots: count,
        },
        handles,
    ))
}

struct Running {
    slot: Slot,
    active: bool,
}

struct Thread {
    epoll: Epoll,
    wake: Arc<EventFd>,
    commands: Receiver<Command>,
    slots: BTreeMap<u32, Running>,
    log: Logger,
}

impl Thread {
    fn run(&mut self) -> io::Result<()> {
        let mut events = vec![EpollEvent::default(); BATCH];
        loop {
            let count = match self.epoll.wait(self.patience(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if count == 0 {
                self.catch_up();
            }
            let mut woken = false;
            for event in &events[..count] {
                let slot = u32::try_from(event.data() >> 32).unwrap_or(WAKE_SLOT);
                let token = u32::try_from(event.data() & 0xffff_ffff).unwrap_or(0);
                if slot == WAKE_SLOT {
                    woken = true;
                } else {
                    self.process(slot, token, event.event_set());
                }
            }
            // After the events: none of this batch belongs to a later activation.
            if woken {
                let _ = self.wake.read();
                if self.take_commands() {
                    return Ok(());
                }
            }
        }
    }

    /// Milliseconds until a device does what it has put off, or for ever.
    fn patience(&self) -> i32 {
        let active = self.slots.values().filter(|running| running.active);
        let shortest = active
            .filter_map(|running| running.slot.device.puts_off())
            .min();
        shortest.map_or(-1, |time| {
            i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
        })
    }

    fn catch_up(&mut self) {
        for (slot, running) in &mut self.slots {
            if running.active
                && running.slot.device.puts_off().is_some()
                && let Err(error) = running.slot.device.catch_up()
            {
                running.fail(&error, &mut Sources::new(&self.epoll, *slot), &self.log);
            }
        }
    }

    fn process(&mut self, slot: u32, token: u32, events: EventSet) {
        let Some(running) = self.slots.get_mut(&slot) else {
            return;
        };
        // Left over from before a deactivation.
        if !running.active {
            return;
        }
        running.slot.counts.wakeups.raise();
        let mut sources = Sources::new(&self.epoll, slot);
        if let Err(error) = running.slot.device.process(token, events, &mut sources) {
            running.fail(&error, &mut sources, &self.log);
        }
    }

    /// Returns true when told to stop.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Add(number, slot)) => {
                    self.slots.insert(number, Running::new(slot));
                }
                Ok(Command::Activate(slot, activation)) => self.activate(slot, *activation),
                Ok(Command::Deactivate(slot, done)) => {
                    self.deactivate(slot);
                    // A transport that stopped waiting has dropped its end.
                    let _ = done.send(());
                }
                Ok(Command::Refresh(slot, done)) => {
                    self.refresh(slot);
                    // One that stopped waiting has dropped its end.
                    if let Some(done) = done {
                        let _ = done.send(());
                    }
                }
                Ok(Command::Remove(slot, removed)) => {
                    self.deactivate(slot);
                    self.slots.remove(&slot);
                    removed();
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => {
                    let slots: Vec<u32> = self.slots.keys().copied().collect();
                    for slot in slots {
                        self.deactivate(slot);
                    }
                    return true;
                }
                Err(TryRecvError::Empty) => return false,
            }
        }
    }

    fn activate(&mut self, slot: u32, activation: Activation) {
        let Some(running) = self.slots.get_mut(&slot) else {
            return;
        };
        let mut sources = Sources::new(&self.epoll, slot);
        if running.active {
            error!(self.log, "device activated twice"; "device" => running.slot.device.name());
            return;
        }
        running.active = true;
        if let Err(error) = running.slot.device.activate(activation, &mut sources) {
            running.fail(&error, &mut sources, &self.log);
        }
    }

    fn refresh(&mut self, slot: u32) {
        if let Some(running) = self.slots.get_mut(&slot)
            && let Err(error) = running.slot.device.refresh()
        {
            running.fail(&error, &mut Sources::new(&self.epoll, slot), &self.log);
        }
    }

    fn deactivate(&mut self, slot: u32) {
        if let Some(running) = self.slots.get_mut(&slot)
            && std::mem::take(&mut running.active)
        {
            running
                .slot
                .device
                .deactivate(&mut Sources::new(&self.epoll, slot));
        }
    }
}

impl Running {
    fn new(slot: Slot) -> Self {
        Self {
            slot,
            active: false,
        }
    }

    /// The device gives its queues up at once; the driver sees DEVICE_NEEDS_RESET.
    fn fail(&mut self, error: &super::DeviceError, sources: &mut Sources<'_>, log: &Logger) {
        warn!(log, "device needs reset"; "device" => self.slot.device.name(), "error" => %error);
        self.active = false;
        self.slot.device.deactivate(sources);
        (self.slot.on_failure)();
    }
}

#[cfg(test)]
mod tests;
