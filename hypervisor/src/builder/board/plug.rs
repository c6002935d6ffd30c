//! Devices that come to the running machine and go. The guest finds and forgets them by scanning its bus and by
//! removing them there; nothing tells it.
//!
//! A device is refused before the guest can see it: function numbers, interrupt vectors, places for BARs and
//! descriptors are counted first. It leaves in three steps: the function goes from the bus, so that no access of the
//! guest reaches it; its worker ends the I/O in flight and drops it ([`Notice::Removed`]); then what it used is free.

use std::sync::Arc;

use slog::{info, o};

use super::{Board, MAX_DEVICES, check_vectors, disk_queues, new_disk};
use crate::builder::descriptors::{self, Descriptors};
use crate::builder::error::StartError;
use crate::control::{DeviceConfig, exit};
use crate::jail::seccomp::{self, ThreadKind};
use crate::notice::Notice;
use crate::vfio::owner::Owner;
use crate::vfio::words::Words;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::Description;
use crate::virtio::pci::interrupt::VirtioInterrupt;
use crate::virtio::worker::{self, DeviceHandle, Slot, Worker};

/// What a plugged device uses.
pub(super) struct Plugged {
    pub(super) name: String,
    pub(super) behind: Behind,
    pub(super) vectors: u32,
    /// Where its BARs were put.
    pub(super) bases: Vec<Base>,
    pub(super) leaving: bool,
}

/// A place in one of the windows.
pub(super) enum Base {
    Low(u64),
    High(u64),
}

/// What is behind the function.
pub(super) enum Behind {
    /// A virtio device, and its thread if it has one of its own.
    Virtio(DeviceHandle, Option<Worker>),
    /// As that, an interface.
    Net(DeviceHandle),
    /// A device of the node, and what is said of it there.
    Device(Owner, Arc<Words>),
}

/// What becomes of a device that is plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugging {
    /// It is on the bus, as this function.
    Done(u8),
    /// It will be this function; [`Notice::Prepared`] says when.
    Later(u8),
}

/// Where a device runs.
pub(super) enum Place {
    /// On the thread of the interfaces, which never blocks.
    Shared,
    /// On that of quiet devices.
    Quiet,
    /// On a thread of its own, because its I/O blocks.
    Own(&'static str, ThreadKind),
}

impl Board {
    /// Adds a device to the running machine, which has so many CPUs; the number of its function.
    ///
    /// # Errors
    /// See [`StartError`]: what has run out is told with the numbers. The guest sees nothing of the device then.
    pub fn plug(
        &mut self,
        device: &DeviceConfig,
        vcpus: u8,
        fds: &mut Descriptors,
    ) -> Result<Plugging, StartError> {
        match device {
            DeviceConfig::Net(net) => {
                if self.nets >= MAX_DEVICES {
                    return Err(StartError::Limit(format!(
                        "at most {MAX_DEVICES} network interfaces are possible"
                    )));
                }
                let device = self.new_net(net, fds)?;
                let (function, _) = self.plug_virtio(device, Place::Shared)?;
                self.nets += 1;
                Ok(Plugging::Done(function))
            }
            DeviceConfig::Disk(disk) => {
                let queues = disk_queues(self.vectors, self.vcpus, vcpus);
                let device = new_disk(disk, queues, fds)?;
                let (function, _) =
                    self.plug_virtio(Box::new(device), Place::Own("block", ThreadKind::Disk))?;
                Ok(Plugging::Done(function))
            }
            DeviceConfig::Pmem(pmem) => Ok(Plugging::Done(self.plug_pmem(pmem, fds)?)),
            DeviceConfig::Vfio(vfio) => {
                let function = self.prepare_passthrough(vfio, fds, seccomp::narrow, true)?;
                Ok(Plugging::Later(function))
            }
        }
    }

    pub(super) fn plug_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        place: Place,
    ) -> Result<(u8, Arc<VirtioInterrupt>), StartError> {
        let name = device.name();
        self.bus.next()?;
        let (slot, part) = self.prepare(device);
        let interrupt = Arc::clone(&part.interrupt);
        let vectors = u32::from(part.description.vectors());
        check_vectors(self.vectors + vectors, self.vcpus)?;
        descriptors::room_for(descriptors_of(&part.description), self.max_files, name)?;
        let (handle, behind) = match place {
            Place::Shared => {
                let handle = self.workers[self.net_worker].add(slot);
                (handle.clone(), Behind::Net(handle))
            }
            Place::Quiet => {
                let handle = self.workers[self.quiet_worker].add(slot);
                (handle.clone(), Behind::Virtio(handle, None))
            }
            Place::Own(thread, kind) => {
                let (handle, worker) = self.start_worker(thread, kind, slot)?;
                (handle.clone(), Behind::Virtio(handle, Some(worker)))
            }
        };
        let (function, base) = match self.put_on_bus(part, handle.clone()) {
            Ok(placed) => placed,
            Err(error) => {
                handle.remove(Box::new(|| ()));
                return Err(error);
            }
        };
        self.vectors += vectors;
        info!(self.log, "device plugged"; "device" => name, "function" => function);
        self.plugged.insert(
            function,
            Plugged {
                name: name.to_owned(),
                behind,
                vectors,
                bases: vec![Base::Low(base)],
                leaving: false,
            },
        );
        Ok((function, interrupt))
    }

    /// A thread for one device. It inherits this thread's filter, and takes that of a worker besides.
    fn start_worker(
        &self,
        thread: &'static str,
        kind: ThreadKind,
        slot: Slot,
    ) -> Result<(DeviceHandle, Worker), StartError> {
        let failed = |source| StartError::Thread {
            name: thread.to_owned(),
            source,
        };
        let notifier = self.notifier.clone();
        let (worker, mut handles) = worker::spawn(
            thread,
            vec![slot],
            Box::new(move || seccomp::narrow(kind).map_err(|error| error.to_string())),
            Box::new(move |reason| notifier.end(exit::INTERNAL, reason)),
            self.log.new(o!("thread" => thread)),
        )
        .map_err(failed)?;
        let handle = handles
            .pop()
            .ok_or_else(|| failed(std::io::Error::other("no handle")))?;
        Ok((handle, worker))
    }

    /// Takes a plugged device from the guest. [`Notice::Removed`] follows.
    ///
    /// # Errors
    /// [`StartError::State`].
    pub fn unplug(&mut self, function: u8) -> Result<(), StartError> {
        let there = self.plugged.get_mut(&function);
        let Some(plugged) = there.filter(|plugged| !plugged.leaving) else {
            return Err(StartError::State(format!(
                "no device was plugged as function {}, or it is leaving already",
                show(function)
            )));
        };
        plugged.leaving = true;
        self.followers.remove(function);
        // With it go its mapped BARs.
        drop(self.bus.remove(function));
        let notifier = self.notifier.clone();
        let removed = Box::new(move || notifier.send(Notice::Removed(function)));
        match &plugged.behind {
            Behind::Virtio(handle, _) | Behind::Net(handle) => handle.remove(removed),
            Behind::Device(owner, _) => owner.retire(removed),
        }
        Ok(())
    }

    /// Lets a plugged device look again at what it stands on.
    ///
    /// # Errors
    /// [`StartError::State`].
    pub fn refresh(&self, function: u8) -> Result<(), StartError> {
        match self.plugged.get(&function) {
            Some(Plugged {
                behind: Behind::Virtio(handle, _),
                leaving: false,
                ..
            }) => {
                handle.refresh();
                Ok(())
            }
            _ => Err(StartError::State(format!(
                "no disk was plugged as function {}, or it is leaving",
                show(function)
            ))),
        }
    }

    /// What the function used is free. Does nothing for one that was not unplugged.
    pub fn removed(&mut self, function: u8) {
        let Some(plugged) = self.plugged.remove(&function) else {
            return;
        };
        self.vectors -= plugged.vectors;
        self.unmap_files(function);
        self.free(&plugged.bases);
        match plugged.behind {
            // Its thread, if it has one, has nothing left to do: this does not wait.
            Behind::Virtio(_, worker) => drop(worker),
            Behind::Net(_) => self.nets -= 1,
            Behind::Device(..) => {}
        }
        self.bus.release(function);
        self.counts.remove(&function);
        info!(self.log, "device removed"; "device" => plugged.name, "function" => function);
    }

    pub(super) fn free(&mut self, bases: &[Base]) {
        for base in bases {
            match base {
                Base::Low(base) => self.low.free(*base),
                Base::High(base) => self.high.free(*base),
            }
        }
    }
}

/// The most that a device opens: its thread's epoll set and wake-up, each queue's event, the copy of it that is the
/// device's and the one of a thread for it, what that thread and the worker call each other by, an event for each vector.
fn descriptors_of(description: &Description) -> usize {
    2 + 4 * description.queues() + usize::from(description.vectors())
}

/// As Linux names it: `00:04.2`.
fn show(function: u8) -> String {
    format!("00:{:02x}.{}", function >> 3, function & 7)
}
