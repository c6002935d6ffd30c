//! Builds the machine that a `Start` request describes: the boot recipe, from top to bottom.
//!
//! The configuration and its descriptors come from the shim and are trusted, but checked, since a
//! wrong one should end in a sentence and not in a guest that hangs.

mod board;
mod descriptors;
mod error;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::{VcpuFd, VmFd};
use slog::{Logger, debug};
use vm_memory::{GuestMemory, GuestMemoryAtomic};

pub use self::board::plug::Plugging;
use self::board::{Board, Handles, MAX_DEVICES};
pub use self::descriptors::Descriptors;
pub use self::error::StartError;
use crate::arch::x86_64::acpi::Platform;
use crate::arch::x86_64::boot::{self, BootInfo};
use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::{cpuid, layout};
use crate::control::{DeviceConfig, VmConfig, exit};
use crate::exits::ExitCounters;
use crate::jail::seccomp::{self, ThreadKind};
use crate::kernel;
use crate::kvm;
use crate::memory;
use crate::notice::{Notice, Notifier};
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
}

/// A running machine.
pub struct Vm {
    machine: Arc<Machine>,
    counters: Vec<Arc<ExitCounters>>,
    handles: Handles,
    board: Board,
    _kvm: Arc<VmFd>,
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
        self.board.plug(device, fds)
    }

    /// Whether devices of the node may be plugged.
    #[must_use]
    pub fn takes_devices(&self) -> bool {
        self.board.takes_devices()
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
    let mut board = Board::new(
        &vm,
        GuestMemoryAtomic::new(ram),
        mmio64,
        ram_regions,
        notifier,
        log,
    )?;
    let handles = board.add_devices(config, &mut fds)?;
    board.mirror_configuration(&vm, ram_regions)?;
    let vcpus = create_vcpus(&vm, &supported, config.vcpus, kernel.entry, start_info)?;
    let counters = vcpus.iter().map(|_| Arc::default()).collect();
    Ok(Built {
        vcpus,
        vm: Vm {
            machine: Arc::new(Machine::new(Arc::clone(&board.bus), notifier.clone())),
            counters,
            handles,
            board,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::ErrorKind;
    use std::os::fd::OwnedFd;

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
            passthrough: false,
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
