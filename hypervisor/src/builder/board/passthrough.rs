//! Devices of the node come to the machine, before it runs or while it does. All that takes long is done on the device's
//! own thread, which tells when it is through ([`Notice::Prepared`]): the reset, and the pinning of the guest's memory.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::os::fd::RawFd;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Weak};

use slog::info;

use super::plug::{Base, Behind, Plugged};
use super::{Board, check_vectors};
use crate::builder::descriptors::{self, Descriptors};
use crate::builder::error::StartError;
use crate::control::{DeviceWord, SpaceConfig, VfioConfig, exit};
use crate::jail::seccomp::{SeccompError, ThreadKind};
use crate::notice::Notice;
use crate::pci::Function;
use crate::pci::root_port::RootPort;
use crate::vfio::bars::MemorySlots;
use crate::vfio::coherence::{Coherence, KvmVfio};
use crate::vfio::device::Word;
use crate::vfio::dma::{Dma, DmaError, GuestDma};
use crate::vfio::function::{PassedThrough, Prepared};
use crate::vfio::kernel::KernelDevice;
use crate::vfio::owner::{self, Owner};
use crate::vfio::space::{Container, Ioas};
use crate::vfio::words::Words;

/// Events beside those of interrupts.
const DESCRIPTORS: usize = 4;

/// How a device's thread puts its filter in force: beside that of the loop that starts it, or first of all.
pub(super) type Confine = fn(ThreadKind) -> Result<(), SeccompError>;

/// What the machine has of the node's devices.
#[derive(Default)]
pub(super) struct Passthrough {
    /// It may have any.
    pub(super) allowed: bool,
    /// Guest memory as they see it, as long as there is one.
    dma: Weak<GuestDma>,
    /// Who is told of them, from the first one on.
    coherence: Option<Arc<dyn Coherence>>,
    /// Those that are being made ready, by function.
    preparing: BTreeMap<u8, Preparing>,
}

struct Preparing {
    name: String,
    owner: Owner,
    words: Arc<Words>,
    outcome: Receiver<Result<(Prepared, Weak<GuestDma>), StartError>>,
}

/// Where a device's memory mappings come from.
enum Source {
    /// The first device brings their address space.
    New(Arc<dyn Dma>),
    /// There are some.
    Shared(Arc<GuestDma>),
}

impl Board {
    /// Whether devices of the node may be plugged.
    pub fn takes_devices(&self) -> bool {
        self.passthrough.allowed
    }

    /// Puts devices on the bus of a machine that does not run yet; their functions.
    ///
    /// # Errors
    /// See [`StartError`]: the machine is not to run then.
    pub fn add_passthrough(
        &mut self,
        devices: &[VfioConfig],
        fds: &mut Descriptors,
        confine: Confine,
    ) -> Result<Vec<u8>, StartError> {
        let mut functions = Vec::new();
        // One after another: the memory that the first one pins is the others' too.
        for device in devices {
            let function = self.prepare_passthrough(device, fds, confine, false)?;
            self.prepared(function)?;
            functions.push(function);
        }
        Ok(functions)
    }

    /// What to wait on for what the node's kernel says of a device.
    pub fn words(&self, function: u8) -> Vec<(DeviceWord, RawFd)> {
        let Some(words) = self.words_of(function) else {
            return Vec::new();
        };
        let descriptors = words.descriptors().into_iter();
        descriptors
            .map(|(word, fd)| match word {
                Word::Wanted => (DeviceWord::Wanted, fd),
                Word::Failed => (DeviceWord::Failed, fd),
            })
            .collect()
    }

    /// Whether it has said this since it was last asked.
    pub fn hears(&self, function: u8, word: DeviceWord) -> bool {
        let word = match word {
            DeviceWord::Wanted => Word::Wanted,
            DeviceWord::Failed => Word::Failed,
        };
        self.words_of(function)
            .is_some_and(|words| words.take(word))
    }

    /// Who is told of devices; none if the node's KVM knows none.
    fn coherence(&mut self) -> Option<Arc<dyn Coherence>> {
        if self.passthrough.coherence.is_none() {
            match KvmVfio::new(&self.ioeventfds.0) {
                Ok(made) => self.passthrough.coherence = Some(Arc::new(made)),
                Err(error) => {
                    info!(self.log, "KVM takes devices for such that keep to the caches"; "error" => %error);
                }
            }
        }
        self.passthrough.coherence.clone()
    }

    fn words_of(&self, function: u8) -> Option<&Words> {
        match &self.plugged.get(&function)?.behind {
            Behind::Device(_, words) => Some(words),
            _ => None,
        }
    }

    /// Begins to make a device ready; the number that its function will have. `tells`: [`Notice::Prepared`] is to follow.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(super) fn prepare_passthrough(
        &mut self,
        vfio: &VfioConfig,
        fds: &mut Descriptors,
        confine: Confine,
        tells: bool,
    ) -> Result<u8, StartError> {
        if !self.passthrough.allowed {
            return Err(StartError::State(
                "when this VM was started the node had no device with vfio-pci, and the VM's jail allows none: bind the \
                 device first, then start the pod"
                    .to_owned(),
            ));
        }
        let device = fds.take(vfio.device, "device")?;
        let source = match vfio.space {
            Some(SpaceConfig::Container(index)) => {
                Source::New(Arc::new(Container(fds.take(index, "container")?)))
            }
            Some(SpaceConfig::Ioas { iommufd, id }) => {
                let iommufd = fds.take(iommufd, "iommufd")?;
                Source::New(Arc::new(Ioas { iommufd, id }))
            }
            None => Source::Shared(self.passthrough.dma.upgrade().ok_or_else(|| {
                StartError::State(
                    "no device is there whose address space this one could share".to_owned(),
                )
            })?),
        };
        let coherence = self.coherence();
        let words = Arc::new(Words::new().map_err(failed)?);
        let to_connect = Arc::clone(&words);
        let lockable = self.lockable;
        let function = self.bus.reserve()?;
        let (owner, orders) = owner::pair();
        let (told, outcome) = channel();
        let (memory, reclaim) = (self.memory.clone(), Arc::clone(&self.reclaim));
        let plugged = self.growth.plugged();
        let slots: Arc<dyn MemorySlots> = self.slots.clone();
        let (notifier, log) = (self.notifier.clone(), self.log.clone());
        let started = std::thread::Builder::new()
            .name("vfio".to_owned())
            .spawn(move || {
                if let Err(error) = confine(ThreadKind::Vfio) {
                    notifier.end(exit::INTERNAL, error.to_string());
                    return;
                }
                let made = KernelDevice::new(device)
                    .map_err(failed)
                    .and_then(|mut device| {
                        if let Some(Err(error)) = coherence.map(|it| device.tell(it)) {
                            info!(log, "KVM takes a device for one that keeps to the caches"; "error" => %error);
                        }
                        let dma = match source {
                            Source::New(space) => {
                                let has = |part| plugged.within(&part);
                                Arc::new(GuestDma::new(space, &memory, &reclaim, lockable, has)?)
                            }
                            Source::Shared(dma) => dma,
                        };
                        let prepared = Prepared::new(&device, slots).map_err(failed)?;
                        to_connect.connect(&device);
                        Ok((device, dma, prepared))
                    });
                let (served, outcome) = match made {
                    Ok((device, dma, prepared)) => {
                        let shared = Arc::downgrade(&dma);
                        (Some((device, dma)), Ok((prepared, shared)))
                    }
                    Err(error) => (None, Err(error)),
                };
                // Its descriptors go with the device.
                drop(to_connect);
                let _ = told.send(outcome);
                if tells {
                    notifier.send(Notice::Prepared(function));
                }
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
            words,
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
            words,
            outcome,
        } = preparing;
        let outcome = outcome.recv().map_err(failed)?;
        let (mut prepared, dma) = outcome?;
        let (vectors, wants_port) = (prepared.vectors(), prepared.wants_port());
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
        )
        .beside(Weak::clone(&dma));
        let mut made: Arc<dyn Function> = Arc::new(made);
        if wants_port {
            // Slots are its buses' numbers, so no two ports begin with the same.
            made = Arc::new(RootPort::above(made, function >> 3));
        }
        self.bus.fill(function, made);
        self.passthrough.dma = dma;
        self.vectors += u32::from(vectors);
        info!(self.log, "device plugged"; "device" => &name, "function" => function);
        let plugged = Plugged {
            name,
            behind: Behind::Device(owner, words),
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
