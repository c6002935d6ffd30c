//! Builds the machine that a `Start` request describes: the boot recipe, from top to bottom.
//!
//! The configuration and its descriptors come from the shim and are trusted, but checked, since a
//! wrong one should end in a sentence and not in a guest that hangs.

mod board;
mod capture;
mod clone;
mod cpus;
mod descriptors;
mod error;
mod vm;

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use slog::{Logger, debug, warn};
use vm_memory::{GuestMemory, GuestMemoryAtomic, GuestMemoryMmap};

pub use self::board::VECTORS_PER_CPU;
pub use self::board::plug::Plugging;
use self::board::{Board, MAX_DEVICES, Space};
use self::capture::Capture;
use self::cpus::{Cpus, make_vcpu};
pub use self::descriptors::Descriptors;
pub use self::error::StartError;
pub use self::vm::Vm;
use crate::arch::x86_64::acpi::Platform;
use crate::arch::x86_64::boot::{self, BootInfo};
use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::{cpuid, layout};
use crate::control::VmConfig;
use crate::debugger::Debugger;
use crate::jail::seccomp::{self};
use crate::kernel;
use crate::kvm;
use crate::memory;
use crate::notice::Notifier;
use crate::template::Shape;
use crate::vcpu::Machine;

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
            files: layout::files(&shape.mmio64, phys_bits),
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
