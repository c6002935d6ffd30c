//! What KVM costs on this host, measured for `brig check --bench`: VMs that do next to nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::layout;
use crate::kvm::{self, KvmError, failed};
use crate::memory::{self, MemoryError};

/// VMs that are made, and exits that are taken.
const VMS: usize = 9;
const EXITS: u32 = 20_000;
/// Where the guest's code is: `out dx, al` and a jump back to it, for ever.
const CODE: (u64, [u8; 3]) = (0x1000, [0xee, 0xeb, 0xfd]);

/// It could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchmarkError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for a VM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The code did not fit.
    #[error("writing to guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// The descriptor could not be duplicated.
    #[error("the KVM descriptor: {0}")]
    Descriptor(#[from] std::io::Error),
    /// A VM did what its code does not.
    #[error("a VM left with {0} instead of writing to its port")]
    Exit(String),
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// To make a VM with its interrupt controllers and one CPU: the median.
    pub create: Duration,
    /// To leave the guest for this process and to enter it again: the mean.
    pub exit: Duration,
}

/// Measures with a descriptor of `/dev/kvm`.
///
/// # Errors
/// See [`BenchmarkError`].
pub fn measure(kvm: &OwnedFd) -> Result<Costs, BenchmarkError> {
    let kvm = kvm::open(kvm.as_fd().try_clone_to_owned()?, true)?;
    let mut times = Vec::with_capacity(VMS);
    for _ in 0..VMS {
        let began = Instant::now();
        let vm = kvm::create_vm(&kvm)?;
        let _cpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        times.push(began.elapsed());
    }
    times.sort_unstable();

    // In real mode: no tables to make.
    let vm = kvm::create_vm(&kvm)?;
    let memory = memory::allocate(layout::HUGE_PAGE)?;
    memory::register(&vm, &memory)?;
    memory.write_slice(&CODE.1, GuestAddress(CODE.0))?;
    let mut cpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let mut special = cpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    (special.cs.base, special.cs.selector) = (0, 0);
    cpu.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
    let mut registers = cpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    (registers.rip, registers.rflags, registers.rdx) = (CODE.0, 2, 0x80);
    cpu.set_regs(&registers).map_err(failed("KVM_SET_REGS"))?;
    let mut began = Instant::now();
    // The first builds what the guest's memory is seen through.
    for exit in 0..=EXITS {
        match cpu.run().map_err(failed("KVM_RUN"))? {
            VcpuExit::IoOut(0x80, _) => {}
            other => return Err(BenchmarkError::Exit(format!("{other:?}"))),
        }
        if exit == 0 {
            began = Instant::now();
        }
    }
    Ok(Costs {
        create: times[VMS / 2],
        exit: began.elapsed() / EXITS,
    })
}
