//! Puts the devices of a configuration on the bus, each behind a worker thread. [`plug`] is what comes and goes
//! while the machine runs.
//!
//! Trusts the shim's configuration.

mod followers;
mod growth;
mod passthrough;
pub mod plug;
mod pmem;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use brig_agent_protocol::{GUEST_CID, OWN_TAG};
use kvm_ioctls::VmFd;
use slog::{Logger, o};

use self::followers::Followers;
use self::growth::Growth;
use self::passthrough::Passthrough;
use self::plug::Plugged;
use self::pmem::FileMemory;
use super::descriptors::{self, Descriptors};
use super::error::StartError;
use crate::arch::x86_64::layout;
use crate::control::{DeviceCounters, DiskConfig, DiskPiece, FdIndex, NetConfig, VmConfig, exit};
use crate::jail::seccomp::{self, ThreadKind};
use crate::kvm::{KvmIoEventFds, KvmMemorySlots, KvmRoutes};
use crate::notice::{Notice, Notifier};
use crate::pci::bus::Bus;
use crate::pci::host_bridge::HostBridge;
use crate::pci::mirror::KvmMirror;
use crate::pci::msix::Msix;
use crate::pci::window::Window;
use crate::reclaim::Reclaim;
use crate::template::registers::{self, RegisterError, Write};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{self, Block};
use crate::virtio::counts::DeviceCounts;
use crate::virtio::fs::{Fs, FsHandle};
use crate::virtio::net::{Net, VhostNet};
use crate::virtio::pci::capability::BAR_SIZE;
use crate::virtio::pci::interrupt::VirtioInterrupt;
use crate::virtio::pci::{Description, Services, VirtioPci};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockHandle};
use crate::virtio::worker::{self, DeviceHandle, Slot, Worker};
use crate::virtio::{GuestMemory, VirtioDevice};

/// The most network interfaces and the most disks.
pub const MAX_DEVICES: usize = 16;

/// Interrupt vectors of a CPU that devices may have: Linux keeps some 50 of 256 for itself, and a
/// vector that moves to another CPU needs one on both for a moment. There is no INTx to fall back on.
pub const VECTORS_PER_CPU: u32 = 180;

/// The list of a worker whose interfaces may have threads for their queue pairs: that of [`ThreadKind::Worker`], and
/// threads like itself, as a disk's worker has it.
const WITH_PAIRS: ThreadKind = ThreadKind::Disk;

/// How the main thread reaches devices.
pub struct Handles {
    /// Opens and closes streams.
    pub vsock: VsockHandle,
    /// Drops inodes of the share, if there is one.
    pub share: Option<FsHandle>,
}

/// Parts of the guest-physical space above RAM.
pub struct Space {
    /// The 64-bit MMIO window.
    pub mmio64: std::ops::Range<u64>,
    /// Where more memory may come.
    pub growth: std::ops::Range<u64>,
    /// Where files may be that are memory.
    pub files: std::ops::Range<u64>,
}

/// The bus, and what it takes to put a device on it.
pub struct Board {
    /// The bus.
    pub bus: Arc<Bus>,
    vectors: u32,
    /// Places of BARs below 4 GiB.
    low: Window,
    /// Those above RAM.
    high: Window,
    slots: Arc<KvmMemorySlots>,
    reclaim: Arc<Reclaim>,
    passthrough: Passthrough,
    memory: GuestMemory,
    growth: Growth,
    file_memory: FileMemory,
    routes: Arc<KvmRoutes>,
    ioeventfds: Arc<KvmIoEventFds>,
    resuming: Arc<AtomicBool>,
    /// The threads of the devices.
    workers: Vec<Worker>,
    /// The one of quiet devices.
    quiet_worker: usize,
    /// The one that takes interfaces which are plugged later: that of the others, or that of quiet devices.
    net_worker: usize,
    nets: usize,
    /// What was plugged into the running machine, by function.
    plugged: BTreeMap<u8, Plugged>,
    followers: Followers,
    /// Interfaces may be served by vhost-net.
    vhost: bool,
    /// The worker of the interfaces may start threads for their queue pairs.
    pairs: bool,
    /// What each virtio device on the bus has done, by function.
    counts: BTreeMap<u8, (&'static str, Arc<DeviceCounts>)>,
    /// Descriptors that the process may have open.
    max_files: u64,
    /// Bytes that it may lock, if that is limited.
    lockable: Option<u64>,
    vcpus: u8,
    notifier: Notifier,
    log: Logger,
}

impl Board {
    /// A bus with a host bridge, at which the guest can read what it is `told`.
    ///
    /// # Errors
    /// [`StartError::Bus`], which an empty bus does not give.
    pub fn new(
        vm: &Arc<VmFd>,
        memory: GuestMemory,
        space: Space,
        ram_slots: u32,
        told: &[u8],
        notifier: &Notifier,
        log: &Logger,
    ) -> Result<Self, StartError> {
        let bus = Arc::new(Bus::new(vec![layout::MMIO32, space.mmio64.clone()]));
        bus.add(Arc::new(HostBridge::telling(told)))?;
        Ok(Self {
            bus,
            vectors: 0,
            low: Window::new(layout::MMIO32),
            high: Window::new(space.mmio64),
            // After RAM and the mirror of configuration space.
            slots: Arc::new(KvmMemorySlots::new(Arc::clone(vm), ram_slots + 1)),
            reclaim: Arc::default(),
            passthrough: Passthrough::default(),
            growth: Growth::new(&memory, space.growth),
            file_memory: FileMemory::new(space.files),
            memory,
            routes: Arc::new(KvmRoutes::new(Arc::clone(vm))),
            ioeventfds: Arc::new(KvmIoEventFds(Arc::clone(vm))),
            resuming: Arc::default(),
            workers: Vec::new(),
            quiet_worker: 0,
            net_worker: 0,
            nets: 0,
            plugged: BTreeMap::new(),
            followers: Followers::default(),
            vhost: false,
            pairs: false,
            counts: BTreeMap::new(),
            max_files: descriptors::limit(),
            lockable: descriptors::lockable(),
            vcpus: 1,
            notifier: notifier.clone(),
            log: log.clone(),
        })
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What each virtio device has done, in the order of functions.
    pub fn counted(&self) -> impl Iterator<Item = DeviceCounters> {
        self.counts
            .iter()
            .map(|(function, (name, counts))| DeviceCounters {
                device: (*name).to_owned(),
                function: *function,
                wakeups: counts.wakeups.get(),
                queues: counts.of_queues(),
            })
    }

    /// Bytes of guest memory that have gone back to the node since the start.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.reclaim.given_up()
    }

    /// To be called when all functions are on the bus. Memory slots below `slot` are RAM.
    ///
    /// # Errors
    /// If the host gives no memory or slot.
    pub fn mirror_configuration(&self, vm: &Arc<VmFd>, slot: u32) -> Result<(), StartError> {
        let functions = self.bus.next()?;
        let mirror = KvmMirror::new(Arc::clone(vm), slot, functions, self.log.clone())?;
        self.bus.set_mirror(Box::new(mirror));
        Ok(())
    }

    /// Makes every device of the configuration.
    ///
    /// # Errors
    /// See [`StartError`]; also if the devices need more interrupt vectors than the CPUs have.
    pub fn add_devices(
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
        let mut quiet: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::new())];
        // A device pins all memory from the start: there is nothing to give back.
        if config.devices.is_empty() {
            quiet.push(Box::new(Balloon::new(Arc::clone(&self.reclaim))));
        }
        self.vhost = config.vhost;
        let ((name, kind), of_nets) = threads(config);
        self.pairs = of_nets.1 == WITH_PAIRS;
        self.add(name, kind, quiet)?;
        self.quiet_worker = self.workers.len() - 1;
        self.net_worker = self.quiet_worker;
        self.add_nets(config, of_nets, fds)?;
        self.add_disks(config, fds)?;
        self.vcpus = config.vcpus;
        self.passthrough.allowed = config.passthrough;
        check_vectors(self.vectors, self.vcpus)?;
        Ok(Handles { vsock, share })
    }

    /// Brings the devices to where those of a captured guest were, before a CPU runs. Those beyond are new to the guest.
    ///
    /// # Errors
    /// If they are not the devices that were captured.
    pub fn resume(&self, functions: u8, writes: &[Write]) -> Result<(), RegisterError> {
        self.resuming.store(true, Ordering::Release);
        let resumed = registers::replay(&self.bus, functions, writes);
        self.resuming.store(false, Ordering::Release);
        resumed
    }

    /// Takes all devices from a guest whose CPU stands still; their number and what brings others to where they were. When this returns no
    /// thread of theirs touches guest memory, and no interrupt of theirs is on its way: KVM has been told that there are none any more.
    ///
    /// # Errors
    /// If one of them is in no state to be captured.
    pub fn take_away(&mut self) -> Result<(u8, Vec<Write>), StartError> {
        let functions = self.bus.next()?;
        let writes = registers::record(&self.bus, functions)
            .map_err(|error| StartError::State(error.to_string()))?;
        registers::reset(&self.bus, functions);
        self.workers.clear();
        for function in 0..functions {
            drop(self.bus.remove(function));
        }
        Ok((functions, writes))
    }

    /// What is shared, and what is the pod's own, on one thread.
    fn add_share(&mut self, tag: &str) -> Result<FsHandle, StartError> {
        let (device, mut handle) = Fs::new(tag).map_err(device_error("fs"))?;
        let own = Fs::of_own(OWN_TAG, &mut handle).map_err(device_error("fs"))?;
        let notifier = self.notifier.clone();
        handle.on_pressure(move || notifier.send(Notice::SharePressure));
        let devices = [device, own].map(|device| Box::new(device.with_helpers()) as Box<_>);
        self.add("fs", ThreadKind::Fs, devices.into())?;
        Ok(handle)
    }

    /// All interfaces share a thread: a pod has one, as a rule. Queue pairs after an interface's first get others from it
    /// while they keep each other waiting.
    fn add_nets(
        &mut self,
        config: &VmConfig,
        (name, kind): (&'static str, ThreadKind),
        fds: &mut Descriptors,
    ) -> Result<(), StartError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for net in &config.nets {
            devices.push(self.new_net(net, fds)?);
        }
        if devices.is_empty() {
            return Ok(());
        }
        self.nets = devices.len();
        self.add(name, kind, devices)?;
        self.net_worker = self.workers.len() - 1;
        Ok(())
    }

    /// Each disk has its own thread, which starts others for what takes its time.
    fn add_disks(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StartError> {
        for disk in &config.disks {
            let queues = disk_queues(self.vectors, config.vcpus, config.vcpus);
            let device = new_disk(disk, queues, fds)?;
            self.add("block", ThreadKind::Disk, vec![Box::new(device)])?;
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
            let (slot, part) = self.prepare(device);
            self.vectors += u32::from(part.description.vectors());
            slots.push(slot);
            functions.push(part);
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
        for (part, handle) in functions.into_iter().zip(handles) {
            self.put_on_bus(part, handle)?;
        }
        Ok(())
    }

    /// A device's place on a worker, and its part on the bus.
    fn prepare(&self, device: Box<dyn VirtioDevice>) -> (Slot, Part) {
        let description = Description::of(&*device);
        let msix = Msix::new(description.vectors(), self.routes.clone());
        let interrupt = Arc::new(VirtioInterrupt::new(msix, description.queues()));
        let failed = Arc::clone(&interrupt);
        let slot = Slot {
            device,
            on_failure: Box::new(move || failed.fail()),
            counts: Arc::clone(interrupt.counts()),
        };
        let part = Part {
            description,
            interrupt,
        };
        (slot, part)
    }

    /// Puts a device on the bus; its function's number and where its BAR is.
    fn put_on_bus(&mut self, part: Part, handle: DeviceHandle) -> Result<(u8, u64), StartError> {
        let base = self.low.allocate(BAR_SIZE)?;
        let placed = self.put_at(base, part, handle);
        if placed.is_err() {
            self.low.free(base);
        }
        Ok((placed?, base))
    }

    fn put_at(&mut self, base: u64, part: Part, handle: DeviceHandle) -> Result<u8, StartError> {
        let multi_function = self.bus.next()?.is_multiple_of(8);
        let counts = Arc::clone(part.interrupt.counts());
        let follower = part.description.follows_memory().then(|| handle.clone());
        let function = VirtioPci::new(
            &part.description,
            handle,
            part.interrupt,
            Services {
                memory: self.memory.clone(),
                ioeventfds: self.ioeventfds.clone(),
                resuming: Arc::clone(&self.resuming),
                log: self.log.clone(),
            },
            base,
            multi_function,
        )?;
        let name = part.description.name();
        let number = self.bus.add(Arc::new(function))?;
        self.counts.insert(number, (name, counts));
        if let Some(handle) = follower {
            self.followers.insert(number, handle);
        }
        Ok(number)
    }

    fn new_net(
        &self,
        net: &NetConfig,
        fds: &mut Descriptors,
    ) -> Result<Box<dyn VirtioDevice>, StartError> {
        let mut take = |indexes: &[FdIndex], what| {
            let taken = indexes.iter().map(|index| fds.take(*index, what));
            taken.collect::<Result<Vec<_>, _>>()
        };
        let taps = take(&net.taps, "tap")?;
        let vhosts = take(&net.vhosts, "vhost-net")?;
        if vhosts.is_empty() {
            let device = Net::new(taps, net.mac, net.mtu).map_err(device_error("net"))?;
            return Ok(Box::new(if self.pairs {
                device.with_threads()
            } else {
                device
            }));
        }
        if !self.vhost {
            return Err(StartError::Invalid(
                "an interface has vhost-net in a VM that was started without".to_owned(),
            ));
        }
        let device = VhostNet::new(taps, vhosts, &self.memory, net.mac, net.mtu);
        Ok(Box::new(device.map_err(device_error("vhost-net"))?))
    }
}

/// What the transport needs of a device.
struct Part {
    description: Description,
    interrupt: Arc<VirtioInterrupt>,
}

/// A thread's name, and its list.
type Named = (&'static str, ThreadKind);

/// The threads of quiet devices and of interfaces. Interfaces that come later are on the first if there is none now, so it has
/// their list then. Where no interface has several queue pairs, which is so with one CPU, no list has a call more.
fn threads(config: &VmConfig) -> (Named, Named) {
    let later = config.nets.is_empty();
    let several = config.nets.iter().any(|net| net.taps.len() > 1) || later && config.vcpus > 1;
    let (with_nets, nets) = if config.vhost {
        // Where one of its interfaces is not the kernel's to serve, one thread serves all its pairs.
        ("memory-vhost", ("net-vhost", ThreadKind::VhostWorker))
    } else if several {
        ("memory-pairs", ("net-pairs", WITH_PAIRS))
    } else {
        ("memory", ("net", ThreadKind::Worker))
    };
    let quiet = if later {
        (with_nets, nets.1)
    } else {
        ("memory", ThreadKind::Worker)
    };
    (quiet, nets)
}

fn new_disk(disk: &DiskConfig, queues: u16, fds: &mut Descriptors) -> Result<Block, StartError> {
    let made = if let [DiskPiece { file, length: None }] = disk.pieces[..] {
        let file = fds.take(file, "disk")?;
        Block::new(file, disk.readonly, &disk.serial, disk.block_size, queues)
    } else {
        let mut files = Vec::new();
        for piece in &disk.pieces {
            let Some(length) = piece.length.filter(|_| disk.readonly) else {
                return Err(StartError::Invalid(
                    "a disk of pieces is read-only, and each has a length".to_owned(),
                ));
            };
            files.push((fds.take(piece.file, "disk")?, length));
        }
        Block::of_pieces(files, &disk.serial, queues)
    };
    Ok(made.map_err(device_error("block"))?.with_helpers())
}

fn device_error<E: std::fmt::Display>(device: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError::Device {
        device,
        reason: error.to_string(),
    }
}

/// The one place where the vector budget is kept.
fn check_vectors(needed: u32, vcpus: u8) -> Result<(), StartError> {
    let available = u32::from(vcpus) * VECTORS_PER_CPU;
    if needed <= available {
        return Ok(());
    }
    Err(StartError::Limit(format!(
        "the devices need {needed} interrupt vectors, but {vcpus} vCPUs have {available}: give the \
         VM more vCPUs or its interfaces fewer queues"
    )))
}

/// Queues of a disk that comes when `taken` vectors are: one for each of the CPUs there are, as long as devices have less than
/// half of the vectors of those that the guest booted with. Beyond that it has one, so that queues keep no device out.
fn disk_queues(taken: u32, boot_vcpus: u8, vcpus: u8) -> u16 {
    if taken > u32::from(boot_vcpus) * VECTORS_PER_CPU / 2 {
        return 1;
    }
    u16::from(vcpus).clamp(1, block::MAX_QUEUES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vcpus: u8, pairs: &[usize]) -> VmConfig {
        let net = |pairs: &usize| NetConfig {
            taps: vec![0; *pairs],
            vhosts: Vec::new(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        VmConfig {
            vcpus,
            max_vcpus: 0,
            memory_bytes: 128 << 20,
            max_memory_bytes: 0,
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            cmdline: String::new(),
            template: None,
            capture: None,
            agent: 3,
            nets: pairs.iter().map(net).collect(),
            disks: Vec::new(),
            share_tag: None,
            debug_console: false,
            debugger: false,
            allow_slow_kvm: false,
            passthrough: false,
            vhost: false,
            devices: Vec::new(),
        }
    }

    #[test]
    fn only_interfaces_with_several_queue_pairs_have_a_thread_that_may_start_others() {
        let worker = ThreadKind::Worker;
        let (quiet, net) = (("memory", worker), ("net", worker));
        for pairs in [&[][..], &[1], &[1, 1, 1]] {
            assert_eq!(threads(&config(1, pairs)), (quiet, net));
        }
        // One that has few for its CPUs is as good as one with a CPU.
        assert_eq!(threads(&config(4, &[1])), (quiet, net));
        let pairs = ("net-pairs", WITH_PAIRS);
        assert_eq!(threads(&config(2, &[1, 2])), (quiet, pairs));
        let later = ("memory-pairs", WITH_PAIRS);
        assert_eq!(threads(&config(2, &[])), (later, pairs));
        let mut config = config(2, &[2]);
        config.vhost = true;
        let vhost = ("net-vhost", ThreadKind::VhostWorker);
        assert_eq!(threads(&config), (quiet, vhost));
        config.nets.clear();
        assert_eq!(threads(&config), (("memory-vhost", vhost.1), vhost));
    }

    #[test]
    fn a_disk_has_a_queue_for_each_cpu_as_long_as_there_are_vectors_for_many_devices() {
        assert_eq!(disk_queues(10, 1, 1), 1);
        assert_eq!(disk_queues(10, 1, 3), 3);
        assert_eq!(disk_queues(10, 64, 64), block::MAX_QUEUES);
        assert_eq!(disk_queues(VECTORS_PER_CPU, 2, 2), 2);
        assert_eq!(disk_queues(VECTORS_PER_CPU + 1, 2, 2), 1);
        // Even where each of them takes most: two of a CPU's vectors a disk are what one with a queue takes.
        let mut taken = 0;
        let disks = (0..).take_while(|_| {
            taken += u32::from(disk_queues(taken, 1, 8)) + 1;
            check_vectors(taken, 1).is_ok()
        });
        assert!(disks.count() > 50);
    }

    #[test]
    fn more_vectors_than_the_cpus_have_are_refused_with_the_numbers() {
        assert!(check_vectors(VECTORS_PER_CPU, 1).is_ok());
        assert!(check_vectors(VECTORS_PER_CPU + 1, 2).is_ok());
        let message = check_vectors(VECTORS_PER_CPU + 1, 1)
            .unwrap_err()
            .to_string();
        assert!(message.contains("181") && message.contains("180"));
    }
}
