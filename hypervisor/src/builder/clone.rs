//! A machine that goes on from a template.

use std::fs::File;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use brig_agent_protocol::Resumption;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use rustix::rand::{GetRandomFlags, getrandom};

use super::board::Board;
use super::cpus::make_vcpu;
use super::{Bare, StartError};
use crate::arch::x86_64::cpuid;
use crate::kvm;
use crate::memory;
use crate::template::registers::Write;
use crate::template::{Shape, Template, TemplateError};

/// Where the devices of the captured guest were.
pub(super) struct Devices {
    functions: u8,
    writes: Vec<Write>,
}

impl Devices {
    /// Brings those of the clone there.
    pub(super) fn resume(&self, board: &Board) -> Result<(), StartError> {
        let resumed = board.resume(self.functions, &self.writes);
        resumed.map_err(|error| TemplateError::Registers(error).into())
    }
}

/// Memory and CPU of the captured guest, of a machine of this shape.
pub(super) fn bare(
    file: File,
    kvm: &Kvm,
    supported: &CpuId,
    shape: &Shape,
) -> Result<(Bare, Devices), StartError> {
    let template = Template::open(file)?;
    if template.head.shape != *shape {
        return Err(TemplateError::Other("memory, CPUs or the share differ").into());
    }
    let vm = Arc::new(kvm::create_vm(kvm)?);
    let ram = memory::allocate(shape.ram_bytes)?;
    template.map(&ram).map_err(TemplateError::File)?;
    memory::register(&vm, &ram)?;
    let vcpu = make_vcpu(&vm, supported, 0, shape.most_cpus)?;
    let entries = cpuid::for_vcpu(supported, 0, shape.most_cpus).map_err(kvm::failed("CPUID"))?;
    let cpu = &template.head.cpu;
    cpu.write(&vcpu, &vm, &entries)
        .map_err(TemplateError::Cpu)?;
    template.warm(&vcpu);
    let head = template.head;
    let bare = Bare {
        vm,
        ram,
        vcpus: vec![vcpu],
    };
    let devices = Devices {
        functions: head.functions,
        writes: head.devices,
    };
    Ok((bare, devices))
}

/// What the clone is told first.
pub(super) fn resumption(new_devices: bool) -> Result<Vec<u8>, StartError> {
    let mut seed = [0; Resumption::SEED];
    // Up to 256 bytes come whole. It blocks only before the host's generator is ready, early in the host's boot.
    let random = getrandom(&mut seed, GetRandomFlags::empty());
    random.map_err(|errno| TemplateError::File(errno.into()))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let told = Resumption {
        new_devices,
        unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        seed,
    };
    Ok(told.to_bytes().to_vec())
}
