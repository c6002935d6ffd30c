//! What a guest CPU says it is.
//!
//! KVM's supported set, minus nested virtualisation and what cannot be offered, plus the topology
//! of one socket with one thread a core. Trusts the host's CPUID.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The most CPUID entries KVM has.
pub const MAX_ENTRIES: usize = 256;

const FEATURES: u32 = 1;
/// Caches and TLBs as bytes with a meaning of their own each.
const DESCRIPTORS: u32 = 2;
const CACHES: u32 = 4;
const THERMAL_POWER: u32 = 6;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_FIRST_LEVEL: u32 = 0x8000_0005;
const AMD_OTHER_LEVELS: u32 = 0x8000_0006;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_ENCRYPTION: u32 = 0x8000_001f;
const AMD_PERFORMANCE: u32 = 0x8000_0022;

/// Whether the host's CPU can virtualise, by its CPUID flags.
#[must_use]
pub fn host_virtualises() -> bool {
    let intel = __cpuid(FEATURES).ecx & 1 << 5 != 0;
    let extended = __cpuid(0x8000_0000).eax;
    let amd = extended >= AMD_FEATURES && __cpuid(AMD_FEATURES).ecx & 1 << 2 != 0;
    intel || amd
}

/// What tells this host's CPU from one of another model, or of other features: its identification, whichever CPU is asked.
#[must_use]
pub fn host_model() -> Vec<u32> {
    let mut all = Vec::new();
    for leaf in [
        0,
        FEATURES,
        7,
        AMD_FEATURES,
        0x8000_0002,
        0x8000_0003,
        0x8000_0004,
        ADDRESS_SIZES,
    ] {
        let said = __cpuid_count(leaf, 0);
        // Leaf 1 has the number of the CPU that was asked there.
        let ebx = if leaf == FEATURES { 0 } else { said.ebx };
        all.extend([said.eax, ebx, said.ecx, said.edx]);
    }
    all
}

/// Whether two CPUs are the same but for their caches, which cores of one host may have different ones of: KVM gives those of
/// the core that asks (Intel's hybrid parts, AMD's with a stacked cache on one die).
#[must_use]
pub fn same_but_caches(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    let is_else = |entry: &&kvm_cpuid_entry2| {
        !matches!(
            entry.function,
            DESCRIPTORS | CACHES | AMD_FIRST_LEVEL | AMD_OTHER_LEVELS | AMD_CACHES
        )
    };
    one.iter().filter(is_else).eq(other.iter().filter(is_else))
}

/// Physical address bits of a CPU with these entries.
#[must_use]
pub fn phys_bits(supported: &CpuId) -> u8 {
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == ADDRESS_SIZES)
        .map_or(36, |entry| entry.eax.to_le_bytes()[0])
}

/// Makes the entries of the CPU with APIC id `id` out of KVM's supported ones.
///
/// # Errors
/// `EINVAL` if there are more entries than KVM takes.
pub fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
    let topology = Topology::new(id, vcpus);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .collect();
    for entry in &mut entries {
        adjust(entry, &topology);
    }
    entries.extend(topology.leaf());
    CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
}

struct Topology {
    id: u32,
    vcpus: u32,
    /// Bits of the APIC id that number cores.
    core_bits: u32,
}

impl Topology {
    fn new(id: u8, vcpus: u8) -> Self {
        let vcpus = u32::from(vcpus.max(1));
        Self {
            id: u32::from(id),
            vcpus,
            core_bits: vcpus.next_power_of_two().trailing_zeros(),
        }
    }

    /// Leaf 0xb: a thread level of one, a core level of all (Intel SDM 2A, CPUID).
    fn leaf(&self) -> [kvm_cpuid_entry2; 3] {
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: kind << 8 | index,
            edx: self.id,
            ..kvm_cpuid_entry2::default()
        };
        [
            level(0, 0, 1, 1),
            level(1, self.core_bits, self.vcpus, 2),
            level(2, 0, 0, 0),
        ]
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    let many = topology.vcpus > 1;
    match entry.function {
        FEATURES => {
            entry.ebx &= 0x0000_ffff;
            entry.ebx |= topology.id << 24 | topology.vcpus << 16;
            // VMX, debug store and perfmon capabilities go; x2APIC, TSC deadline and the
            // hypervisor bit come (KVM lists the deadline timer as a capability only).
            entry.ecx &= !(1 << 5 | 1 << 2 | 1 << 4 | 1 << 15);
            entry.ecx |= 1 << 21 | 1 << 24 | 1 << 31;
            entry.edx &= !(1 << 21 | 1 << 28);
            entry.edx |= u32::from(many) << 28;
        }
        CACHES => {
            let kind = entry.eax & 0x1f;
            if kind != 0 {
                // The last level is shared by all cores, the others by none.
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { topology.vcpus - 1 } else { 0 };
                entry.eax &= 0x3fff;
                entry.eax |= sharing << 14 | ((1 << topology.core_bits) - 1) << 26;
            }
        }
        // The APIC timer never stops (ARAT); no frequency or energy interfaces.
        THERMAL_POWER => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (4, 0, 0, 0),
        // No virtual PMU: it is attack surface, and each probe of it is an exit.
        PERFORMANCE | AMD_PERFORMANCE | SVM | AMD_ENCRYPTION => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        AMD_FEATURES => {
            // SVM and the performance counter extensions go; CmpLegacy as on any multi-core.
            entry.ecx &= !(1 << 2 | 1 << 1 | 1 << 23 | 1 << 24 | 1 << 28);
            entry.ecx |= u32::from(many) << 1;
        }
        ADDRESS_SIZES => {
            entry.ecx = topology.core_bits << 12 | (topology.vcpus - 1);
        }
        AMD_CACHES => {
            let kind = entry.eax & 0x1f;
            if kind != 0 {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { topology.vcpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
        }
        AMD_TOPOLOGY => {
            entry.eax = topology.id;
            // One thread a core; the core's number.
            entry.ebx = topology.id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x1f, 0, 0, 0),
            leaf(FEATURES, 0, u32::MAX, 1 << 5 | 1, 0),
            leaf(AMD_FEATURES, 0, 0, 1 << 2 | 1, 0),
            leaf(ADDRESS_SIZES, 0x3030, 0, 0, 0),
            leaf(SVM, 1, 2, 3, 4),
            leaf(TOPOLOGY_V2, 9, 9, 9, 9),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn a_guest_sees_neither_vmx_nor_svm_but_the_deadline_timer_and_x2apic() {
        let cpuid = for_vcpu(&supported(), 0, 1).unwrap();
        let features = find(&cpuid, FEATURES, 0);
        assert_eq!(features.ecx & 1 << 5, 0);
        for bit in [21, 24, 31] {
            assert_ne!(features.ecx & 1 << bit, 0, "bit {bit}");
        }
        assert_eq!(find(&cpuid, AMD_FEATURES, 0).ecx & 1 << 2, 0);
        assert_eq!(find(&cpuid, SVM, 0).eax, 0);
    }

    #[test]
    fn topology_is_one_socket_with_one_thread_a_core() {
        let cpuid = for_vcpu(&supported(), 2, 3).unwrap();
        let features = find(&cpuid, FEATURES, 0);
        assert_eq!(features.ebx >> 24, 2);
        assert_eq!(features.ebx >> 16 & 0xff, 3);
        assert_ne!(features.edx & 1 << 28, 0);
        let thread = find(&cpuid, TOPOLOGY, 0);
        assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, 2));
        let core = find(&cpuid, TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 2 << 8 | 1));
        assert!(
            !cpuid
                .as_slice()
                .iter()
                .any(|entry| entry.function == TOPOLOGY_V2)
        );
    }

    #[test]
    fn one_cpu_has_no_hyper_threading_flag_and_no_core_bits() {
        let cpuid = for_vcpu(&supported(), 0, 1).unwrap();
        assert_eq!(find(&cpuid, FEATURES, 0).edx & 1 << 28, 0);
        assert_eq!(find(&cpuid, TOPOLOGY, 1).eax, 0);
        assert_eq!(find(&cpuid, ADDRESS_SIZES, 0).ecx, 0);
    }

    #[test]
    fn cores_that_differ_in_their_caches_alone_are_of_one_cpu() {
        let leaf = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..kvm_cpuid_entry2::default()
        };
        let large = [
            leaf(FEATURES, 0, 7),
            leaf(CACHES, 0, 1),
            leaf(CACHES, 1, 3),
            leaf(SVM, 0, 1),
        ];
        let small = [
            leaf(FEATURES, 0, 7),
            leaf(DESCRIPTORS, 0, 9),
            leaf(CACHES, 0, 2),
            leaf(SVM, 0, 1),
        ];
        assert!(same_but_caches(&large, &small));
        assert!(!same_but_caches(&large, &small[..3]));
        let other = [leaf(FEATURES, 0, 6), leaf(SVM, 0, 1)];
        assert!(!same_but_caches(&large, &other));
    }

    #[test]
    fn physical_address_bits_come_from_the_supported_set() {
        assert_eq!(phys_bits(&supported()), 0x30);
    }
}
