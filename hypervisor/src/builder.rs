//! Builds the machine that a `Start` request describes: the boot recipe, from top to bottom.
//!
//! The configuration and its descriptors come from the shim and are trusted, but checked, since a
//! wrong one should end in a sentence and not in a guest that hangs.

mod board;
mod capture;
mod clone;
mod descriptors;
mod error;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use slog::{Logger, debug, warn};
use vm_memory::{GuestMemory, GuestMemoryAtomic, GuestMemoryMmap};

pub use self::board::VECTORS_PER_CPU;
pub use self::board::plug::Plugging;
use self::board::{Board, Handles, MAX_DEVICES, Space};
use self::capture::Capture;
pub use self::descriptors::Descriptors;
pub use self::error::StartError;
use crate::arch::x86_64::acpi::Platform;
use crate::arch::x86_64::boot::{self, BootInfo};
use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::{cpuid, layout};
use crate::control::{
    DebugRequest, DeviceConfig, DeviceCounters, DeviceWord, MAX_BREAKPOINTS, Stopped, VmConfig,
    exit,
};
use crate::debugger::{Debugged, Debugger};
use crate::exits::ExitCounters;
use crate::jail::seccomp::{self, SeccompError, ThreadKind};
use crate::kernel;
use crate::kvm;
use crate::memory;
use crate::notice::{Notice, Notifier};
use crate::template::Shape;
use crate::vcpu::{self, Machine};
use crate::virtio::fs::FsHandle;
use crate::virtio::vsock::VsockHandle;

/// The most CPUs of a VM.
pub const MAX_VCPUS: u8 = 64;
/// Less than this cannot hold the kernel.
pub const MIN_MEMORY: u64 = 64 << 20;
/// A machine whose CPUs have not run yet.
pub struct Built {
    vcpus: Vec<VcpuFd>,
    vm: Vm,
    /// What became of the template, if there was one: used, or why not.
    template: Option<Result<(), String>>,
}

/// A running machine.
pub struct Vm {
    machine: Arc<Machine>,
    counters: Vec<Arc<ExitCounters>>,
    handles: Handles,
    board: Board,
    cpus: Cpus,
    /// Functions of the devices of the node that were there from the start.
    given: Vec<u8>,
    capture: Option<Capture>,
    debugger: Option<Debugger>,
}

/// How a thread is confined to the list of its kind.
type Confine = fn(ThreadKind) -> Result<(), SeccompError>;

/// What it takes to make a CPU.
struct Cpus {
    kvm: Arc<VmFd>,
    supported: CpuId,
    /// As many as there may be, which is the topology that the guest sees.
    most: u8,
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

    /// What is at this path of the share, or will be, may never answer; see [`FsHandle::expect_remote`].
    ///
    /// # Errors
    /// If this VM has no share.
    pub fn remote_share(&self, path: &str) -> Result<(), String> {
        let share = self.handles.share.as_ref();
        let share = share.ok_or_else(|| "this VM has no share".to_owned())?;
        share.expect_remote(path);
        Ok(())
    }

    /// Requests to the file server so far.
    #[must_use]
    pub fn file_requests(&self) -> u64 {
        self.handles.share.as_ref().map_or(0, FsHandle::requests)
    }

    /// Opens and closes streams.
    #[must_use]
    pub fn vsock(&self) -> &VsockHandle {
        &self.handles.vsock
    }

    /// Puts one more device on the bus, now or later.
    ///
    /// # Errors
    /// [`StartError`]; the machine is as before.
    pub fn plug(
        &mut self,
        device: &DeviceConfig,
        fds: &mut Descriptors,
    ) -> Result<Plugging, StartError> {
        let vcpus = u8::try_from(self.counters.len()).unwrap_or(u8::MAX);
        self.board.plug(device, vcpus, fds)
    }

    /// Whether devices of the node may be plugged.
    #[must_use]
    pub fn takes_devices(&self) -> bool {
        self.board.takes_devices()
    }

    /// Functions of the devices of the node that the guest booted with, in the order of the configuration.
    #[must_use]
    pub fn given(&self) -> &[u8] {
        &self.given
    }

    /// What to wait on for what the node says of a device.
    #[must_use]
    pub fn words(&self, function: u8) -> Vec<(DeviceWord, RawFd)> {
        self.board.words(function)
    }

    /// Whether the node has said this of a device since this was last asked.
    #[must_use]
    pub fn hears(&self, function: u8, word: DeviceWord) -> bool {
        self.board.hears(function, word)
    }

    /// To be called at [`Notice::Prepared`]: puts the device on the bus.
    ///
    /// # Errors
    /// As of [`Self::plug`].
    pub fn prepared(&mut self, function: u8) -> Result<(), StartError> {
        self.board.prepared(function)
    }

    /// Takes a device that was plugged from the guest; [`Notice::Removed`] follows when it is gone.
    ///
    /// # Errors
    /// [`StartError::State`] if nothing was plugged there, or it is leaving already.
    pub fn unplug(&mut self, function: u8) -> Result<(), StartError> {
        self.board.unplug(function)
    }

    /// Lets a plugged disk look at its size again.
    ///
    /// # Errors
    /// [`StartError::State`] if no disk was plugged there.
    pub fn refresh(&self, function: u8) -> Result<(), StartError> {
        self.board.refresh(function)
    }

    /// To be called at [`Notice::Removed`]: what the function used is free from now on.
    pub fn removed(&mut self, function: u8) {
        self.board.removed(function);
    }

    /// Says how much memory the guest is to have; the function of the device by which it changes, if there is one, and
    /// what the guest has now, in bytes.
    ///
    /// # Errors
    /// [`StartError`], with the numbers; nothing has changed then.
    pub fn resize(&mut self, memory_bytes: u64) -> Result<(Option<u8>, u64), StartError> {
        self.board.resize(memory_bytes)
    }

    /// Whether CPUs may be added.
    #[must_use]
    pub fn takes_cpus(&self) -> bool {
        self.counters.len() < usize::from(self.cpus.most)
    }

    /// Makes CPUs until there are `count`, each with a thread that waits for the guest to start it.
    ///
    /// # Errors
    /// [`StartError::Limit`] with the numbers; what the host says. Those that were made stay.
    pub fn add_cpus(&mut self, count: u8) -> Result<(), StartError> {
        let most = self.cpus.most;
        if count > most {
            return Err(StartError::Limit(format!(
                "{count} CPUs were asked for, and this VM may have {most}"
            )));
        }
        let there = u8::try_from(self.counters.len()).unwrap_or(u8::MAX);
        for id in there..count {
            let vcpu = self.cpus.make(id)?;
            let counters = Arc::<ExitCounters>::default();
            self.run(id, vcpu, Arc::clone(&counters), seccomp::narrow)?;
            self.counters.push(counters);
        }
        Ok(())
    }

    /// What each virtio device has done.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceCounters> {
        self.board.counted().collect()
    }

    /// Bytes of guest memory that have gone back to the node since the start.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.board.given_up()
    }

    /// Gives a CPU its thread.
    fn run(
        &mut self,
        id: u8,
        vcpu: VcpuFd,
        counters: Arc<ExitCounters>,
        confine: Confine,
    ) -> Result<(), StartError> {
        let machine = Arc::clone(&self.machine);
        let kind = match (&self.capture, &self.debugger) {
            (Some(_), _) => ThreadKind::CapturedVcpu,
            (None, Some(_)) => ThreadKind::DebuggedVcpu,
            (None, None) => ThreadKind::Vcpu,
        };
        let debugged = self.debugger.as_mut().map(Debugger::next_cpu);
        let thread = spawn_vcpu(id, vcpu, machine, counters, debugged, (kind, confine))?;
        if let Some(debugger) = &mut self.debugger {
            debugger.started(thread);
        }
        Ok(())
    }

    /// Whether the CPUs may be stopped and looked at.
    #[must_use]
    pub fn can_be_debugged(&self) -> bool {
        self.debugger.is_some()
    }

    /// Stops the CPUs, looks at them or lets them go on; what is in them, if they stand.
    ///
    /// # Errors
    /// [`StartError::State`] if this VM's CPUs are not to be debugged, or do not stop.
    pub fn debug(&mut self, request: &DebugRequest) -> Result<Option<Stopped>, StartError> {
        let debugger = self.debugger.as_mut().ok_or_else(|| {
            StartError::State("this VM was not started to be debugged".to_owned())
        })?;
        let state = |error: std::io::Error| StartError::State(error.to_string());
        match request {
            DebugRequest::Stop => debugger.stop().map(Some).map_err(state),
            DebugRequest::State => Ok(debugger.stopped()),
            DebugRequest::Go {
                only,
                step,
                breakpoints,
            } => {
                if breakpoints.len() > MAX_BREAKPOINTS {
                    return Err(StartError::Limit(format!(
                        "{} breakpoints were asked for, and a CPU has {MAX_BREAKPOINTS}",
                        breakpoints.len()
                    )));
                }
                debugger.go(*only, *step, breakpoints).map_err(state)?;
                Ok(None)
            }
        }
    }

    /// To be called at [`Notice::Met`].
    ///
    /// # Errors
    /// [`StartError::State`] if the other CPUs do not stop.
    pub fn met(&mut self, cpu: u8) -> Result<(), StartError> {
        let met = self.debugger.as_mut().map(|debugger| debugger.met(cpu));
        met.unwrap_or(Ok(()))
            .map_err(|error| StartError::State(error.to_string()))
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

/// A machine without devices, its CPUs about to run.
struct Bare {
    vm: Arc<VmFd>,
    ram: GuestMemoryMmap,
    vcpus: Vec<VcpuFd>,
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
    let phys_bits = cpuid::phys_bits(&supported);
    let growth = layout::growth(ram_bytes, config.max_memory_bytes, phys_bits);
    let shape = Shape {
        ram_bytes,
        mmio64: layout::mmio64(ram_bytes, &growth, phys_bits),
        growth,
        most_cpus: config.vcpus.max(config.max_vcpus),
        share_tag: config.share_tag.clone(),
    };
    let capture = config
        .capture
        .map(|index| Capture::prepare(File::from(fds.take(index, "capture")?), &kvm, &shape))
        .transpose()?;
    let template = config
        .template
        .map(|index| fds.take(index, "template"))
        .transpose()?
        .map(|file| clone::bare(File::from(file), &kvm, &supported, &shape));
    let (bare, devices, template) = match template {
        Some(Ok((bare, devices))) => (bare, Some(devices), Some(Ok(()))),
        Some(Err(error)) => {
            warn!(log, "the template is of no use, the guest boots"; "reason" => %error);
            let bare = boot(config, &mut fds, &kvm, &supported, &shape, log)?;
            (bare, None, Some(Err(error.to_string())))
        }
        None => (
            boot(config, &mut fds, &kvm, &supported, &shape, log)?,
            None,
            None,
        ),
    };
    let Bare { vm, ram, vcpus } = bare;
    let ram_regions = u32::try_from(ram.num_regions()).unwrap_or(u32::MAX);
    let told = match devices {
        Some(_) => clone::resumption(!config.nets.is_empty() || !config.disks.is_empty())?,
        None => Vec::new(),
    };
    let mut board = Board::new(
        &vm,
        GuestMemoryAtomic::new(ram),
        Space {
            mmio64: shape.mmio64,
            growth: shape.growth,
        },
        ram_regions,
        &told,
        notifier,
        log,
    )?;
    let handles = board.add_devices(config, &mut fds)?;
    board.mirror_configuration(&vm, ram_regions)?;
    let given = board.add_passthrough(&config.devices, &mut fds, seccomp::apply)?;
    let mut machine = Machine::new(Arc::clone(&board.bus), notifier.clone());
    if let Some(devices) = devices {
        devices.resume(&board)?;
    }
    let cpus = Cpus {
        kvm: vm,
        supported,
        most: shape.most_cpus,
    };
    let capture = match capture {
        Some(prepared) => Some(prepared.arm(&cpus, &mut machine)?),
        None => None,
    };
    let debugger = (config.debugger && capture.is_none())
        .then(|| Debugger::new(notifier.clone()))
        .transpose()
        .map_err(|source| StartError::Thread {
            name: "debugger".to_owned(),
            source,
        })?;
    let counters = vcpus.iter().map(|_| Arc::default()).collect();
    Ok(Built {
        vcpus,
        vm: Vm {
            machine: Arc::new(machine),
            counters,
            handles,
            board,
            cpus,
            given,
            capture,
            debugger,
        },
        template,
    })
}

/// A machine that is about to enter the kernel.
fn boot(
    config: &VmConfig,
    fds: &mut Descriptors,
    kvm: &Kvm,
    supported: &CpuId,
    shape: &Shape,
    log: &Logger,
) -> Result<Bare, StartError> {
    let vm = Arc::new(kvm::create_vm(kvm)?);
    let ram_bytes = shape.ram_bytes;
    let ram = memory::allocate(ram_bytes)?;
    memory::register(&vm, &ram)?;
    let kernel_file = File::from(fds.take(config.kernel, "kernel")?);
    let kernel = kernel::load(&ram, &kernel_file)?;
    let initramfs_file = File::from(fds.take(config.initramfs, "initramfs")?);
    let (initramfs, length) = kernel::load_initramfs(&ram, &initramfs_file, ram_bytes, &kernel)?;
    let cmdline = boot::with_cpus(&config.cmdline, config.vcpus, config.max_vcpus);
    let start_info = boot::write(
        &ram,
        &BootInfo {
            ram_bytes,
            cmdline: &cmdline,
            debug_console: config.debug_console,
            initramfs: Some((initramfs, length)),
            platform: Platform {
                vcpus: shape.most_cpus,
                mmio64: shape.mmio64.clone(),
            },
        },
    )?;
    debug!(log, "guest memory ready"; "ram_bytes" => ram_bytes, "initramfs_bytes" => length);
    let entry = Entry {
        rip: kernel.entry,
        start_info,
    };
    let make = |id| {
        let vcpu = make_vcpu(&vm, supported, id, shape.most_cpus)?;
        regs::set(&vcpu, (id == 0).then_some(entry)).map_err(kvm::failed("setting registers"))?;
        Ok(vcpu)
    };
    let vcpus = (0..config.vcpus).map(make);
    let vcpus = vcpus.collect::<Result<Vec<_>, StartError>>()?;
    Ok(Bare { vm, ram, vcpus })
}

/// Refuses what cannot work; returns the size of RAM in bytes.
fn check(config: &VmConfig) -> Result<u64, StartError> {
    let invalid = |reason: String| Err(StartError::Invalid(reason));
    let most = config.vcpus.max(config.max_vcpus);
    if config.vcpus == 0 || most > MAX_VCPUS {
        return invalid(format!(
            "{} to {most} vCPUs are not possible, 1 to {MAX_VCPUS} are",
            config.vcpus
        ));
    }
    if config.capture.is_some() && config.vcpus != 1 {
        return invalid(format!(
            "a guest that is to be captured boots with one vCPU, not {}",
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

impl Cpus {
    /// The CPU with APIC id `id`, which waits for another to start it.
    fn make(&self, id: u8) -> Result<VcpuFd, StartError> {
        let vcpu = make_vcpu(&self.kvm, &self.supported, id, self.most)?;
        regs::set(&vcpu, None).map_err(kvm::failed("setting registers"))?;
        Ok(vcpu)
    }
}

/// The CPU with APIC id `id` of as many as there may be, in no state yet.
fn make_vcpu(vm: &VmFd, supported: &CpuId, id: u8, most: u8) -> Result<VcpuFd, StartError> {
    let vcpu = vm
        .create_vcpu(u64::from(id))
        .map_err(kvm::failed("KVM_CREATE_VCPU"))?;
    let entries = cpuid::for_vcpu(supported, id, most).map_err(kvm::failed("CPUID"))?;
    vcpu.set_cpuid2(&entries)
        .map_err(kvm::failed("KVM_SET_CPUID2"))?;
    Ok(vcpu)
}

impl Built {
    /// What became of the template, if there was one: used, or why not.
    #[must_use]
    pub fn template(&self) -> Option<&Result<(), String>> {
        self.template.as_ref()
    }

    /// Starts the CPU threads.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(self) -> Result<Vm, StartError> {
        let mut vm = self.vm;
        let counters = vm.counters.clone();
        for ((vcpu, counters), id) in self.vcpus.into_iter().zip(counters).zip(0u8..) {
            vm.run(id, vcpu, counters, seccomp::apply)?;
        }
        Ok(vm)
    }
}

fn spawn_vcpu(
    id: u8,
    mut vcpu: VcpuFd,
    machine: Arc<Machine>,
    counters: Arc<ExitCounters>,
    debugged: Option<Debugged>,
    (kind, confine): (ThreadKind, Confine),
) -> Result<JoinHandle<()>, StartError> {
    let name = match debugged {
        Some(_) => format!("vcpu{id}-debug"),
        None => format!("vcpu{id}"),
    };
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || match confine(kind) {
            Ok(()) => {
                let ended = vcpu::run(&mut vcpu, &machine, &counters, debugged.as_ref());
                machine.notifier.send(Notice::Ended(ended));
            }
            Err(error) => machine.notifier.end(exit::INTERNAL, error.to_string()),
        })
        .map_err(|source| StartError::Thread { name, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::ErrorKind;
    use std::os::fd::OwnedFd;

    fn config() -> VmConfig {
        VmConfig {
            vcpus: 1,
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
            nets: Vec::new(),
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
            assert_eq!(error.reply("refused").kind, ErrorKind::Invalid);
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
