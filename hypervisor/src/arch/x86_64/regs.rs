//! The state in which CPUs start.
//!
//! The boot CPU enters the kernel as PVH defines it: 32-bit protected mode, paging off, flat
//! segments, `ebx` pointing at `hvm_start_info`. Other CPUs wait for INIT and SIPI in KVM.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Protection enable; bit 4 is fixed to one on every CPU since the 486.
const CR0_PE_ET: u64 = 0x11;
/// Enabled and x2APIC mode (Intel SDM 3A §11.12.1).
const APIC_ENABLED_X2APIC: u64 = 1 << 11 | 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, all memory write-back: without it Linux also gives up PAT.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets the registers of one vCPU; `entry` is given for the boot CPU.
///
/// # Errors
/// What KVM says.
pub fn set(vcpu: &VcpuFd, entry: Option<Entry>) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.apic_base |= APIC_ENABLED_X2APIC;
    if let Some(entry) = entry {
        flat_protected_mode(&mut sregs);
        vcpu.set_regs(&kvm_regs {
            rip: entry.rip,
            rbx: entry.start_info,
            rflags: 2,
            ..kvm_regs::default()
        })?;
    }
    vcpu.set_sregs(&sregs)?;
    set_msrs(vcpu)
}

/// Where the boot CPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The kernel's PVH entry.
    pub rip: u64,
    /// Guest address of `hvm_start_info`.
    pub start_info: u64,
}

fn flat_protected_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x08,
        type_: 11,
        ..data
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.tr = kvm_segment {
        base: 0,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.cr0 = CR0_PE_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        // Last: an AMD host may refuse it, and KVM stops at the first refusal.
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ])
    .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
    if vcpu.set_msrs(&msrs)? == 0 {
        return Err(kvm_ioctls::Error::new(libc::EIO));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_entry_state_is_flat_32_bit_with_paging_off() {
        let mut sregs = kvm_sregs {
            cr0: u64::MAX,
            cr4: u64::MAX,
            efer: u64::MAX,
            ..kvm_sregs::default()
        };
        flat_protected_mode(&mut sregs);
        assert_eq!(sregs.cr0 & (1 << 31), 0);
        assert_eq!(sregs.cr0 & 1, 1);
        assert_eq!((sregs.cr4, sregs.efer), (0, 0));
        assert_eq!(
            (sregs.cs.base, sregs.cs.limit, sregs.cs.l),
            (0, u32::MAX, 0)
        );
        assert_eq!(sregs.cs.type_ & 8, 8);
        assert_eq!(sregs.ss.type_ & 2, 2);
    }
}
