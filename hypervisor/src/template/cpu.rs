//! What KVM keeps of a CPU: read where a guest stands still, and given to the CPU of a clone.
//!
//! Time goes on from where it stood: the guest's clocks have not seen the time in between, and its agent sets the wall clock.

use kvm_bindings::{
    CpuId, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::cpuid::same_but_caches;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// More cycles than any CPU has in a second, and few beside what the counter holds.
const FAR: u64 = 1 << 36;
/// IA32_TSC_DEADLINE: counts by the TSC and needs the timer's mode, so it comes last.
const TSC_DEADLINE: u32 = 0x6e0;
/// Types of memory by address (Intel SDM 3A §12.11): variable ranges, fixed ones, and the default with the switch for all. KVM
/// keeps them and lists none of them. A fresh CPU has none in force, and its guest believes that what it had set at boot holds:
/// with a device of the node that does not snoop, all of its memory would be uncached.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];
/// MSR_KVM_WALL_CLOCK, old and new. To set one writes the host's time into guest memory, which the guest asked for once, at boot.
const WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
/// KVM takes 256 in one call.
const MAX_MSRS: usize = 256;

/// A CPU could not be read, or not be set.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A register of the model cannot be set.
    #[error("KVM does not take the value {value:#x} of MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// What it was to be.
        value: u64,
    },
    /// It says something else of itself than it said then.
    #[error("this host's CPU is another one")]
    Model,
    /// Its counter of time is behind where it stood, and a guest's clocks would stand still until it is there again.
    #[error("KVM has set the TSC to {is:#x}, and not to {wanted:#x} or later")]
    Tsc {
        /// What it is now.
        is: u64,
        /// What it was.
        wanted: u64,
    },
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Call { call, source }
}

/// One CPU.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
    /// KVM's clock of the VM in nanoseconds.
    clock: u64,
}

/// FPU and vector registers.
#[derive(Serialize, Deserialize)]
struct Xsave(kvm_xsave);

impl std::fmt::Debug for Xsave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xsave")
    }
}

/// The registers of its model that this host's KVM can save. To be asked before the filters are in force.
///
/// # Errors
/// What KVM says.
pub fn model_registers(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    Ok(kept(kvm.get_msr_index_list()?.as_slice().to_vec()))
}

/// What is kept, where KVM lists this.
fn kept(mut all: Vec<u32>) -> Vec<u32> {
    all.retain(|index| !WALL_CLOCKS.contains(index) && *index != TSC_DEADLINE && !is_mtrr(*index));
    all.extend(MTRRS.into_iter().flatten());
    all.push(TSC_DEADLINE);
    all
}

fn is_mtrr(index: u32) -> bool {
    MTRRS.iter().any(|range| range.contains(&index))
}

impl CpuState {
    /// Reads a CPU that has completed its last exit, and its VM's clock. `msrs` are [`model_registers`]; those that KVM does not give,
    /// or does not take back, are left out.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn read(vcpu: &VcpuFd, vm: &VmFd, cpuid: &CpuId, msrs: &[u32]) -> Result<Self, CpuError> {
        let mut msrs = read_msrs(vcpu, msrs).map_err(failed("KVM_GET_MSRS"))?;
        // As a fresh CPU has it.
        msrs.retain(|(index, value)| !is_mtrr(*index) || *value != 0);
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: Xsave(vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            mp_state: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock,
            msrs: settable(vcpu, msrs).map_err(failed("KVM_SET_MSRS"))?,
        })
    }

    /// Makes a fresh CPU, which has been told to be `cpuid`, and its VM's clock what they were. Its caches are told to be those that it
    /// had, whichever core of the host this is.
    ///
    /// # Errors
    /// [`CpuError`]; the VM is of no use then.
    pub fn write(&self, vcpu: &VcpuFd, vm: &VmFd, cpuid: &CpuId) -> Result<(), CpuError> {
        if cpuid.as_slice() != self.cpuid {
            if !same_but_caches(cpuid.as_slice(), &self.cpuid) {
                return Err(CpuError::Model);
            }
            let captured = CpuId::from_entries(&self.cpuid).map_err(|_| CpuError::Model)?;
            vcpu.set_cpuid2(&captured)
                .map_err(failed("KVM_SET_CPUID2"))?;
        }
        let clock = kvm_clock_data {
            clock: self.clock,
            ..kvm_clock_data::default()
        };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        // SAFETY: it has the 4 KiB that KVM reads as long as nobody has asked for dynamic features (arch_prctl), which Brig never does.
        unsafe { vcpu.set_xsave(&self.xsave.0) }.map_err(failed("KVM_SET_XSAVE"))?;
        // None where the host's CPU has no XSAVE, and KVM refuses to set none.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(failed("KVM_SET_LAPIC"))?;
        self.write_msrs(vcpu)?;
        self.check_tsc(vcpu)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("KVM_SET_MP_STATE"))
    }

    fn write_msrs(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        let call = failed("KVM_SET_MSRS");
        // KVM before Linux 6.7 takes a TSC within a second of that of a fresh CPU, as a guest's is that was captured at once, for
        // one that is to go with those of other CPUs, and keeps the fresh one. It is not within a second of this one.
        if let Some(tsc) = self.tsc() {
            let far = msrs(&[(TSC, tsc.wrapping_add(FAR))]).map_err(&call)?;
            vcpu.set_msrs(&far).map_err(&call)?;
        }
        let msrs = msrs(&self.msrs).map_err(&call)?;
        let set = vcpu.set_msrs(&msrs).map_err(&call)?;
        match self.msrs.get(set) {
            None => Ok(()),
            Some((index, value)) => Err(CpuError::Msr {
                index: *index,
                value: *value,
            }),
        }
    }

    fn tsc(&self) -> Option<u64> {
        let tsc = self.msrs.iter().find(|(index, _)| *index == TSC);
        tsc.map(|(_, value)| *value)
    }

    fn check_tsc(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        let now = read_msrs(vcpu, &[TSC]).map_err(failed("KVM_GET_MSRS"))?;
        match (now.first(), self.tsc()) {
            // It may have passed its end meanwhile.
            (Some((_, is)), Some(wanted)) if is.wrapping_sub(wanted).cast_signed() < 0 => {
                Err(CpuError::Tsc { is: *is, wanted })
            }
            _ => Ok(()),
        }
    }
}

fn msrs(entries: &[(u32, u64)]) -> Result<Msrs, kvm_ioctls::Error> {
    let entry = |(index, data): &(u32, u64)| kvm_msr_entry {
        index: *index,
        data: *data,
        ..kvm_msr_entry::default()
    };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    if entries.len() > MAX_MSRS {
        return Err(kvm_ioctls::Error::new(libc::E2BIG));
    }
    Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
}

/// KVM stops at the first that it does not give.
fn read_msrs(vcpu: &VcpuFd, mut indices: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let part = &indices[..indices.len().min(MAX_MSRS)];
        let zeros: Vec<_> = part.iter().map(|index| (*index, 0)).collect();
        let mut read = msrs(&zeros)?;
        let count = vcpu.get_msrs(&mut read)?;
        let given = read.as_slice().iter().take(count);
        found.extend(given.map(|entry| (entry.index, entry.data)));
        let refused = usize::from(count < part.len());
        indices = &indices[count + refused..];
    }
    Ok(found)
}

/// Those that KVM takes back, which is tried here, where they change nothing.
fn settable(vcpu: &VcpuFd, all: Vec<(u32, u64)>) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut taken = Vec::with_capacity(all.len());
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MAX_MSRS)];
        let count = vcpu.set_msrs(&msrs(part)?)?;
        taken.extend(part.iter().take(count));
        let refused = usize::from(count < part.len());
        rest = &rest[count + refused..];
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_memory_are_kept_whether_or_not_kvm_lists_them_and_the_deadline_comes_last() {
        for listed in [vec![0x174, TSC_DEADLINE, 0x277], vec![0x2ff, TSC_DEADLINE]] {
            let kept = kept([listed, WALL_CLOCKS.to_vec()].concat());
            for index in [0x200, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x26f, 0x2ff] {
                let times = kept.iter().filter(|kept| **kept == index).count();
                assert_eq!(times, 1, "{index:#x}");
            }
            assert!(!WALL_CLOCKS.iter().any(|index| kept.contains(index)));
            assert_eq!(kept.last(), Some(&TSC_DEADLINE));
        }
    }
}
