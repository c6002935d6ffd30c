//! Builds the machine that a `Start` request describes: the boot recipe, from top to bottom.
//!
//! The configuration and its descriptors come from the shim and are trusted, but checked, since a
//! wrong one should end in a sentence and not in a guest that hangs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{VcpuFd, VmFd};
use slog::{Logger, debug, o};
use vm_memory::{GuestMemory as _, GuestMemoryAtomic};

use brig_agent_protocol::GUEST_CID;

use crate::arch::x86_64::acpi::Platform;
use crate::arch::x86_64::boot::{self, BootError, BootInfo};
use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::{cpuid, layout};
use crate::control::{ErrorKind, ErrorReply, FdIndex, VmConfig, exit};
use crate::exits::ExitCounters;
use crate::jail::seccomp::{self, ThreadKind};
use crate::kernel::{self, KernelError};
use crate::kvm::{self, KvmError, KvmNotifier, KvmRoutes};
use crate::memory::{self, MemoryError};
use crate::notice::{Notice, Notifier};
use crate::pci::bus::{Bus, BusFull};
use crate::pci::host_bridge::HostBridge;
use crate::pci::mirror::KvmMirror;
use crate::pci::msix::Msix;
use crate::vcpu::{self, Machine};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::fs::{Fs, FsHandle};
use crate::virtio::net::Net;
use crate::virtio::pci::capability::BAR_SIZE;
use crate::virtio::pci::interrupt::VirtioInterrupt;
use crate::virtio::pci::{Description, Services, TransportError, VirtioPci};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockHandle};
use crate::virtio::worker::{self, Slot, Worker};
use crate::virtio::{GuestMemory, VirtioDevice};

/// The most CPUs of a VM.
pub const MAX_VCPUS: u8 = 64;
/// Less than this cannot hold the kernel.
pub const MIN_MEMORY: u64 = 64 << 20;
/// The most network interfaces and the most disks.
pub const MAX_DEVICES: usize = 16;

/// Why a VM was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Invalid(String),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or the initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Boot information.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A virtio function.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The bus is full.
    #[error(transparent)]
    Bus(#[from] BusFull),
    /// A device could not be made.
    #[error("{device}: {reason}")]
    Device {
        /// Its name.
        device: &'static str,
        /// Why.
        reason: String,
    },
    /// A thread could not be started.
    #[error("starting the {name} thread: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl StartError {
    /// The error as the shim gets it.
    #[must_use]
    pub fn reply(&self) -> ErrorReply {
        let kind = match self {
            Self::Invalid(_) | Self::Boot(_) | Self::Kernel(KernelError::Format(_)) => {
                ErrorKind::Invalid
            }
            Self::Kernel(KernelError::NoRoom { .. }) | Self::Bus(_) => ErrorKind::Limit,
            Self::Kvm(_) | Self::Memory(_) | Self::Kernel(_) | Self::Thread { .. } => {
                ErrorKind::Host
            }
            Self::Device { .. } => ErrorKind::Host,
            Self::Transport(_) => ErrorKind::Internal,
        };
        ErrorReply {
            kind,
            message: format!("the VM did not start: {self}"),
        }
    }
}

/// Descriptors of a message, each taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of one message.
    #[must_use]
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes the descriptor that `what` names.
    ///
    /// # Errors
    /// If there is none with this index or it was taken before.
    pub fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd, StartError> {
        self.0.get_mut(index).and_then(Option::take).ok_or_else(|| {
            StartError::Invalid(format!("{what}: the message has no descriptor {index}"))
        })
    }
}

/// A machine whose CPUs have not run yet.
pub struct Built {
    vcpus: Vec<VcpuFd>,
    vm: Vm,
}

/// A running machine.
pub struct Vm {
    machine: Arc<Machine>,
    counters: Vec<Arc<ExitCounters>>,
    handles: Handles,
    _workers: Vec<Worker>,
    _kvm: Arc<VmFd>,
}

/// How the main thread reaches devices.
struct Handles {
    vsock: VsockHandle,
    share: Option<FsHandle>,
}

impl Vm {
    /// Drops the file server's inodes below `path` of the share.
    ///
    /// # Errors
    /// If this VM has no share.
    pub fn forget_share(&self, path: &str) -> Result<(), String> {
        let share = self.handles.share.as_ref();
        let share = share.ok_or_else(|| "this VM has no share".to_owned())?;
        share.forget(path);
        Ok(())
    }

    /// Opens and closes streams.
    #[must_use]
    pub fn vsock(&self) -> &VsockHandle {
        &self.handles.vsock
    }

    /// Exits by reason, over all CPUs.
    #[must_use]
    pub fn exits(&self) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::new();
        for counters in &self.counters {
            counters.add_to(&mut totals);
        }
        self.machine.unknown_ports.add_to(&mut totals);
        totals
    }
}

/// Builds the machine.
///
/// # Errors
/// See [`StartError`].
pub fn build(
    config: &VmConfig,
    mut fds: Descriptors,
    notifier: &Notifier,
    log: &Logger,
) -> Result<Built, StartError> {
    let ram_bytes = check(config)?;
    let kvm = kvm::open(fds.take(config.kvm, "kvm")?, config.allow_slow_kvm)?;
    let supported = kvm
        .get_supported_cpuid(cpuid::MAX_ENTRIES)
        .map_err(kvm::failed("KVM_GET_SUPPORTED_CPUID"))?;
    let vm = Arc::new(kvm::create_vm(&kvm)?);

    let ram = memory::allocate(ram_bytes)?;
    memory::register(&vm, &ram)?;
    let kernel_file = File::from(fds.take(config.kernel, "kernel")?);
    let kernel = kernel::load(&ram, &kernel_file)?;
    let initramfs_file = File::from(fds.take(config.initramfs, "initramfs")?);
    let (initramfs, length) = kernel::load_initramfs(&ram, &initramfs_file, ram_bytes, &kernel)?;
    let mmio64 = layout::mmio64(ram_bytes, cpuid::phys_bits(&supported));
    let start_info = boot::write(
        &ram,
        &BootInfo {
            ram_bytes,
            cmdline: &config.cmdline,
            debug_console: config.debug_console,
            initramfs: Some((initramfs, length)),
            platform: Platform {
                vcpus: config.vcpus,
                mmio64: mmio64.clone(),
            },
        },
    )?;
    debug!(log, "guest memory ready"; "ram_bytes" => ram_bytes, "initramfs_bytes" => length);

    let ram_regions = u32::try_from(ram.num_regions()).unwrap_or(u32::MAX);
    let mut board = Board::new(&vm, GuestMemoryAtomic::new(ram), mmio64, notifier, log)?;
    let handles = board.add_devices(config, &mut fds)?;
    board.mirror_configuration(&vm, ram_regions)?;
    let vcpus = create_vcpus(&vm, &supported, config.vcpus, kernel.entry, start_info)?;
    let counters = vcpus.iter().map(|_| Arc::default()).collect();
    Ok(Built {
        vcpus,
        vm: Vm {
            machine: Arc::new(Machine::new(board.bus, notifier.clone())),
            counters,
            handles,
            _workers: board.workers,
            _kvm: vm,
        },
    })
}

/// Refuses what cannot work; returns the size of RAM in bytes.
fn check(config: &VmConfig) -> Result<u64, StartError> {
    let invalid = |reason: String| Err(StartError::Invalid(reason));
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        return invalid(format!(
            "{} vCPUs are not possible, 1 to {MAX_VCPUS} are",
            config.vcpus
        ));
    }
    if config.nets.len() > MAX_DEVICES || config.disks.len() > MAX_DEVICES {
        return invalid(format!(
            "at most {MAX_DEVICES} network interfaces and {MAX_DEVICES} disks are possible"
        ));
    }
    match config
        .memory_bytes
        .checked_next_multiple_of(layout::HUGE_PAGE)
    {
        Some(bytes) if (MIN_MEMORY..=1 << 45).contains(&bytes) => Ok(bytes),
        _ => invalid(format!(
            "{} bytes of memory are not possible, at least {MIN_MEMORY} are needed",
            config.memory_bytes
        )),
    }
}

fn create_vcpus(
    vm: &VmFd,
    supported: &kvm_bindings::CpuId,
    count: u8,
    rip: u64,
    start_info: u64,
) -> Result<Vec<VcpuFd>, StartError> {
    (0..count)
        .map(|id| {
            let vcpu = vm
                .create_vcpu(u64::from(id))
                .map_err(kvm::failed("KVM_CREATE_VCPU"))?;
            let entries = cpuid::for_vcpu(supported, id, count).map_err(kvm::failed("CPUID"))?;
            vcpu.set_cpuid2(&entries)
                .map_err(kvm::failed("KVM_SET_CPUID2"))?;
            let entry = (id == 0).then_some(Entry { rip, start_info });
            regs::set(&vcpu, entry).map_err(kvm::failed("setting registers"))?;
            Ok(vcpu)
        })
        .collect()
}

impl Built {
    /// Starts the CPU threads.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(self) -> Result<Vm, StartError> {
        for ((vcpu, counters), id) in self.vcpus.into_iter().zip(&self.vm.counters).zip(0u8..) {
            let machine = Arc::clone(&self.vm.machine);
            let counters = Arc::clone(counters);
            spawn_vcpu(id, vcpu, machine, counters)?;
        }
        Ok(self.vm)
    }
}

fn spawn_vcpu(
    id: u8,
    mut vcpu: VcpuFd,
    machine: Arc<Machine>,
    counters: Arc<ExitCounters>,
) -> Result<(), StartError> {
    let name = format!("vcpu{id}");
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || match seccomp::apply(ThreadKind::Vcpu) {
            Ok(()) => {
                let ended = vcpu::run(&mut vcpu, &machine, &counters);
                machine.notifier.send(Notice::Ended(ended));
            }
            Err(error) => machine.notifier.end(exit::INTERNAL, error.to_string()),
        })
        .map(|_| ())
        .map_err(|source| StartError::Thread { name, source })
}

/// The bus while it is being filled.
struct Board {
    bus: Bus,
    functions: u8,
    memory: GuestMemory,
    routes: Arc<KvmRoutes>,
    ioeventfds: Arc<KvmNotifier>,
    workers: Vec<Worker>,
    notifier: Notifier,
    log: Logger,
}

impl Board {
    fn new(
        vm: &Arc<VmFd>,
        memory: GuestMemory,
        mmio64: std::ops::Range<u64>,
        notifier: &Notifier,
        log: &Logger,
    ) -> Result<Self, StartError> {
        let bus = Bus::new(vec![layout::MMIO32, mmio64]);
        bus.add(Arc::new(HostBridge::new()))?;
        Ok(Self {
            bus,
            functions: 1,
            memory,
            routes: Arc::new(KvmRoutes::new(Arc::clone(vm))),
            ioeventfds: Arc::new(KvmNotifier(Arc::clone(vm))),
            workers: Vec::new(),
            notifier: notifier.clone(),
            log: log.clone(),
        })
    }

    /// To be called when all functions are on the bus. Memory slots below `slot` are RAM.
    fn mirror_configuration(&self, vm: &Arc<VmFd>, slot: u32) -> Result<(), StartError> {
        let mirror = KvmMirror::new(Arc::clone(vm), slot, self.functions, self.log.clone())?;
        self.bus.set_mirror(Box::new(mirror));
        Ok(())
    }

    fn add_devices(
        &mut self,
        config: &VmConfig,
        fds: &mut Descriptors,
    ) -> Result<Handles, StartError> {
        let events = self.notifier.clone();
        let (device, vsock) = Vsock::new(
            GUEST_CID,
            fds.take(config.agent, "agent")?,
            Box::new(move |event| events.send(Notice::Vsock(event, events.micros()))),
        );
        self.add("vsock", ThreadKind::Worker, vec![Box::new(device)])?;
        let share = match &config.share_tag {
            Some(tag) => Some(self.add_share(tag)?),
            None => None,
        };
        self.add(
            "memory",
            ThreadKind::Worker,
            vec![Box::new(Rng::new()), Box::new(Balloon::new())],
        )?;
        self.add_nets(config, fds)?;
        self.add_disks(config, fds)?;
        Ok(Handles { vsock, share })
    }

    fn add_share(&mut self, tag: &str) -> Result<FsHandle, StartError> {
        let (device, handle) = Fs::new(tag).map_err(device_error("fs"))?;
        self.add("fs", ThreadKind::Fs, vec![Box::new(device)])?;
        Ok(handle)
    }

    /// All interfaces share a thread: a pod has one, as a rule.
    fn add_nets(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StartError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for net in &config.nets {
            let taps = net.taps.iter().map(|tap| fds.take(*tap, "tap"));
            let taps = taps.collect::<Result<Vec<_>, _>>()?;
            let device = Net::new(taps, net.mac, net.mtu).map_err(device_error("net"))?;
            devices.push(Box::new(device));
        }
        if devices.is_empty() {
            return Ok(());
        }
        self.add("net", ThreadKind::Worker, devices)
    }

    /// Each disk has its own thread: its I/O is synchronous.
    fn add_disks(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StartError> {
        for disk in &config.disks {
            let file = fds.take(disk.file, "disk")?;
            let device =
                Block::new(file, disk.readonly, &disk.serial).map_err(device_error("block"))?;
            self.add("block", ThreadKind::Worker, vec![Box::new(device)])?;
        }
        Ok(())
    }

    /// Puts devices on a thread of their own and each on the bus.
    fn add(
        &mut self,
        thread: &'static str,
        kind: ThreadKind,
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<(), StartError> {
        let mut slots = Vec::new();
        let mut functions = Vec::new();
        for device in devices {
            let description = Description::of(&*device);
            let msix = Msix::new(description.vectors(), self.routes.clone());
            let interrupt = Arc::new(VirtioInterrupt::new(msix, description.queues()));
            let failed = Arc::clone(&interrupt);
            slots.push(Slot {
                device,
                on_failure: Box::new(move || failed.fail()),
            });
            functions.push((description, interrupt));
        }
        let notifier = self.notifier.clone();
        let (worker, handles) = worker::spawn(
            thread,
            slots,
            Box::new(move || seccomp::apply(kind).map_err(|error| error.to_string())),
            Box::new(move |reason| notifier.end(exit::INTERNAL, reason)),
            self.log.new(o!("thread" => thread)),
        )
        .map_err(|source| StartError::Thread {
            name: thread.to_owned(),
            source,
        })?;
        self.workers.push(worker);
        for ((description, interrupt), handle) in functions.into_iter().zip(handles) {
            let base = layout::MMIO32.start + u64::from(self.functions) * BAR_SIZE;
            let function = VirtioPci::new(
                &description,
                handle,
                interrupt,
                Services {
                    memory: self.memory.clone(),
                    notifier: self.ioeventfds.clone(),
                    log: self.log.clone(),
                },
                base,
                self.functions.is_multiple_of(8),
            )?;
            self.functions = self.bus.add(Arc::new(function))? + 1;
        }
        Ok(())
    }
}

fn device_error<E: std::fmt::Display>(device: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError::Device {
        device,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            vcpus: 1,
            memory_bytes: 128 << 20,
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            cmdline: String::new(),
            agent: 3,
            nets: Vec::new(),
            disks: Vec::new(),
            share_tag: None,
            debug_console: false,
            allow_slow_kvm: false,
        }
    }

    #[test]
    fn memory_is_rounded_up_and_impossible_sizes_are_refused() {
        let size = |bytes| {
            check(&VmConfig {
                memory_bytes: bytes,
                ..config()
            })
        };
        assert_eq!(size((128 << 20) + 1).unwrap(), 130 << 20);
        assert!(size(1 << 20).is_err());
        assert!(size(u64::MAX).is_err());
    }

    #[test]
    fn impossible_cpu_counts_are_refused() {
        for vcpus in [0, MAX_VCPUS + 1] {
            let error = check(&VmConfig { vcpus, ..config() }).unwrap_err();
            assert_eq!(error.reply().kind, ErrorKind::Invalid);
        }
    }

    #[test]
    fn a_descriptor_is_taken_once() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut fds = Descriptors::new(vec![null()]);
        assert!(fds.take(0, "kernel").is_ok());
        let error = fds.take(0, "initramfs").unwrap_err();
        assert!(error.to_string().contains("initramfs"));
        assert!(fds.take(9, "kvm").is_err());
    }
}
