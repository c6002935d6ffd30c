//! The CPUs of a machine: those that it starts with, and those that come later.

use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};

use super::StartError;
use crate::arch::x86_64::{cpuid, regs};
use crate::kvm;

/// What it takes to make a CPU.
pub(super) struct Cpus {
    pub(super) kvm: Arc<VmFd>,
    pub(super) supported: CpuId,
    /// As many as there may be, which is the topology that the guest sees.
    pub(super) most: u8,
}

impl Cpus {
    /// The CPU with APIC id `id`, which waits for another to start it.
    pub(super) fn make(&self, id: u8) -> Result<VcpuFd, StartError> {
        let vcpu = make_vcpu(&self.kvm, &self.supported, id, self.most)?;
        regs::set(&vcpu, None).map_err(kvm::failed("setting registers"))?;
        Ok(vcpu)
    }
}

/// The CPU with APIC id `id` of as many as there may be, in no state yet.
pub(super) fn make_vcpu(
    vm: &VmFd,
    supported: &CpuId,
    id: u8,
    most: u8,
) -> Result<VcpuFd, StartError> {
    let vcpu = vm
        .create_vcpu(u64::from(id))
        .map_err(kvm::failed("KVM_CREATE_VCPU"))?;
    let entries = cpuid::for_vcpu(supported, id, most).map_err(kvm::failed("CPUID"))?;
    vcpu.set_cpuid2(&entries)
        .map_err(kvm::failed("KVM_SET_CPUID2"))?;
    Ok(vcpu)
}
