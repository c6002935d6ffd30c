//! Devices of the node come to the running machine. All that takes long is done on the device's own thread, which tells
//! when it is through ([`Notice::Prepared`]): the reset, and the pinning of the guest's memory.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Weak};

use slog::info;

use super::plug::{Base, Behind, Plugged};
use super::{Board, check_vectors};
use crate::builder::descriptors::{self, Descriptors};
use crate::builder::error::StartError;
use crate::control::{VfioConfig, exit};
use crate::jail::seccomp::{self, ThreadKind};
use crate::notice::Notice;
use crate::vfio::bars::MemorySlots;
use crate::vfio::dma::{DmaError, GuestDma};
use crate::vfio::function::{PassedThrough, Prepared};
use crate::vfio::kernel::{Container, KernelDevice};
use crate::vfio::owner::{self, Owner};

/// Events beside those of interrupts.
const DESCRIPTORS: usize = 4;

/// What the machine has of the node's devices.
#[derive(Default)]
pub(super) struct Passthrough {
    /// It may have any.
    pub(super) allowed: bool,
    /// Guest memory as they see it, as long as there is one.
    dma: Weak<GuestDma>,
    /// Those that are being made ready, by function.
    preparing: BTreeMap<u8, Preparing>,
}

struct Preparing {
    name: String,
    owner: Owner,
    outcome: Receiver<Result<(Prepared, Weak<GuestDma>), StartError>>,
}

/// Where a device's memory mappings come from.
enum Source {
    /// The first device brings them.
    New(OwnedFd),
    /// There are some.
    Shared(Arc<GuestDma>),
}

impl Board {
    /// Whether devices of the node may be plugged.
    pub fn takes_devices(&self) -> bool {
        self.passthrough.allowed
    }

    /// Begins to make a device ready; the number that its function will have.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(super) fn prepare_passthrough(
        &mut self,
        vfio: &VfioConfig,
        fds: &mut Descriptors,
    ) -> Result<u8, StartError> {
        if !self.passthrough.allowed {
            return Err(StartError::State(
                "this VM was started on a node without devices to pass through, and its jail allows none".to_owned(),
            ));
        }
        let device = fds.take(vfio.device, "device")?;
        let source = match vfio.container {
            Some(index) => Source::New(fds.take(index, "container")?),
            None => Source::Shared(self.passthrough.dma.upgrade().ok_or_else(|| {
                StartError::State(
                    "no device is there whose container this one could share".to_owned(),
                )
            })?),
        };
        let function = self.bus.reserve()?;
        let (owner, orders) = owner::pair();
        let (told, outcome) = channel();
        let (memory, reclaim) = (self.memory.clone(), Arc::clone(&self.reclaim));
        let plugged = self.growth.plugged();
        let slots: Arc<dyn MemorySlots> = self.slots.clone();
        let notifier = self.notifier.clone();
        let started = std::thread::Builder::new()
            .name("vfio".to_owned())
            .spawn(move || {
                if let Err(error) = seccomp::narrow(ThreadKind::Vfio) {
                    notifier.end(exit::INTERNAL, error.to_string());
                    return;
                }
                let made = KernelDevice::new(device)
                    .map_err(failed)
                    .and_then(|device| {
                        let dma = match source {
                            Source::New(container) => {
                                let container = Box::new(Container(container));
                                Arc::new(GuestDma::new(container, &memory, &reclaim, |part| {
                                    plugged.within(&part)
                                })?)
                            }
                            Source::Shared(dma) => dma,
                        };
                        let prepared = Prepared::new(&device, slots).map_err(failed)?;
                        Ok((device, dma, prepared))
                    });
                let (served, outcome) = match made {
                    Ok((device, dma, prepared)) => {
                        let shared = Arc::downgrade(&dma);
                        (Some((device, dma)), Ok((prepared, shared)))
                    }
                    Err(error) => (None, Err(error)),
                };
                let _ = told.send(outcome);
                notifier.send(Notice::Prepared(function));
                if let Some((device, dma)) = served {
                    orders.serve(Box::new(device), dma);
                }
            });
        if let Err(source) = started {
            self.bus.release(function);
            let name = "vfio".to_owned();
            return Err(StartError::Thread { name, source });
        }
        let name = vfio.name.clone();
        let preparing = Preparing {
            name,
            owner,
            outcome,
        };
        self.passthrough.preparing.insert(function, preparing);
        Ok(function)
    }

    /// Puts a device that has been made ready on the bus.
    ///
    /// # Errors
    /// Why it could not be, or what has run out; nothing of it is left then.
    pub fn prepared(&mut self, function: u8) -> Result<(), StartError> {
        let Some(preparing) = self.passthrough.preparing.remove(&function) else {
            return Err(StartError::State(
                "no device was being made ready".to_owned(),
            ));
        };
        let owner = preparing.owner.clone();
        let result = self.put_through(function, preparing);
        if result.is_err() {
            owner.retire(Box::new(|| ()));
            self.bus.release(function);
        }
        result
    }

    fn put_through(&mut self, function: u8, preparing: Preparing) -> Result<(), StartError> {
        let Preparing {
            name,
            owner,
            outcome,
        } = preparing;
        let outcome = outcome.recv().map_err(failed)?;
        let (mut prepared, dma) = outcome?;
        let vectors = prepared.vectors();
        check_vectors(self.vectors + u32::from(vectors), self.vcpus)?;
        let needed = DESCRIPTORS + usize::from(vectors);
        descriptors::room_for(needed, self.max_files, &format!("device {name}"))?;
        let bases = self.place_bars(&mut prepared)?;
        let log = self.log.clone();
        let made = PassedThrough::new(
            name.clone(),
            prepared,
            owner.clone(),
            self.routes.clone(),
            log,
        );
        self.bus.fill(function, Arc::new(made));
        self.passthrough.dma = dma;
        self.vectors += u32::from(vectors);
        info!(self.log, "device plugged"; "device" => &name, "function" => function);
        let plugged = Plugged {
            name,
            behind: Behind::Device(owner),
            vectors: vectors.into(),
            bases,
            leaving: false,
        };
        self.plugged.insert(function, plugged);
        Ok(())
    }

    /// Gives each BAR a place of its own; those that can be above RAM are.
    fn place_bars(&mut self, prepared: &mut Prepared) -> Result<Vec<Base>, StartError> {
        let mut bases = Vec::new();
        for bar in prepared.bars().to_vec() {
            let placed = if bar.wide {
                self.high.allocate(bar.size).map(Base::High)
            } else {
                self.low.allocate(bar.size).map(Base::Low)
            };
            match placed {
                Ok(base) => {
                    let (Base::Low(address) | Base::High(address)) = base;
                    prepared.place(bar, address);
                    bases.push(base);
                }
                Err(error) => {
                    self.free(&bases);
                    return Err(error.into());
                }
            }
        }
        Ok(bases)
    }
}

fn failed(error: impl Display) -> StartError {
    StartError::Device {
        device: "VFIO",
        reason: error.to_string(),
    }
}

impl From<DmaError> for StartError {
    fn from(error: DmaError) -> Self {
        match error {
            DmaError::Limit { .. } => Self::Limit(error.to_string()),
            DmaError::Map { .. } => failed(error),
        }
    }
}
