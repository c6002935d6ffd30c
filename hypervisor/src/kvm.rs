//! The virtual machine as KVM sees it: creation, interrupt routes and queue notifications.
//!
//! Trusts the host's kernel. [`verdict`] tells a KVM that virtualises from one that only emulates.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_READONLY,
    KVM_PMU_CAP_DISABLE, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::{cpuid, layout};
use crate::pci::msix::{Message, Route, Routes};
use crate::sync::lock;
use crate::vfio::bars::MemorySlots;
use crate::virtio::pci::IoEventFds;

/// KVM is not usable.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The CPU has no virtualisation.
    #[error(
        "/dev/kvm on this host emulates the guest in software (the CPU offers neither VMX nor SVM), \
         about a thousand times slower than hardware: use a host or an instance type with (nested) \
         virtualisation, or set allow_slow_kvm to start anyway"
    )]
    Slow,
    /// The descriptor is not `/dev/kvm` of a supported kernel.
    #[error("the KVM descriptor speaks API version {0}, expected 12: is it /dev/kvm?")]
    Version(i32),
    /// A capability is missing.
    #[error("the host's KVM lacks {0}: a kernel of 5.12 or later is needed")]
    Missing(&'static str),
    /// A call failed.
    #[error("KVM: {call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
}

/// Maps a failed call to its name.
pub fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { call, source }
}

/// Whether `/dev/kvm` of this host virtualises in hardware.
///
/// The CPU's own flags decide: without VMX or SVM a KVM can only be a software variant (PVM),
/// which runs an ordinary guest by emulation. A KVM nested in a virtual or an emulated CPU passes,
/// because that CPU shows the flag. Costs two CPUID instructions.
///
/// # Errors
/// [`KvmError::Slow`].
pub fn verdict() -> Result<(), KvmError> {
    if cpuid::host_virtualises() {
        Ok(())
    } else {
        Err(KvmError::Slow)
    }
}

/// Opens KVM from a descriptor of `/dev/kvm`.
///
/// # Errors
/// See [`KvmError`].
pub fn open(fd: OwnedFd, allow_slow: bool) -> Result<Kvm, KvmError> {
    if !allow_slow {
        verdict()?;
    }
    // SAFETY: we own the descriptor and give it away; that it is /dev/kvm is checked next.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(KvmError::Version(version));
    }
    for (capability, name) in [
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::TscDeadlineTimer, "the TSC deadline timer"),
        (Cap::ReadonlyMem, "read-only memory slots"),
        (Cap::SplitIrqchip, "the split interrupt controller"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Missing(name));
        }
    }
    Ok(kvm)
}

/// Creates a VM with in-kernel local APICs and no other interrupt controller: nothing is wired to
/// an IOAPIC or a PIC, all interrupts are MSIs.
///
/// # Errors
/// See [`KvmError`].
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::TSS)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..kvm_enable_cap::default()
    };
    split.args[0] = u64::from(layout::FIRST_MSI_GSI);
    vm.enable_cap(&split)
        .map_err(failed("KVM_CAP_SPLIT_IRQCHIP"))?;
    if let Some(off) = no_counters(kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into())) {
        vm.enable_cap(&off)
            .map_err(failed("KVM_CAP_PMU_CAPABILITY"))?;
    }
    Ok(vm)
}

/// How the VM's CPUs have no performance counters, where KVM can be told (from Linux 5.18). What CPUID says is not enough: an
/// AMD CPU has four that no bit tells of, which a guest could count with and see its neighbours by. To be done before there is
/// a CPU. `offered`: what KVM says of the capability, 0 where it does not know of it or has no counters to give.
fn no_counters(offered: i32) -> Option<kvm_enable_cap> {
    let mut off = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..kvm_enable_cap::default()
    };
    off.args[0] = KVM_PMU_CAP_DISABLE.into();
    let known = u32::try_from(offered).unwrap_or(0) & KVM_PMU_CAP_DISABLE != 0;
    known.then_some(off)
}

/// The VM's MSI routes. KVM takes the whole table at once, so it is kept here.
pub struct KvmRoutes {
    vm: Arc<VmFd>,
    table: Mutex<Vec<kvm_irq_routing_entry>>,
    sources: Mutex<Numbers>,
}

/// Which numbers are free, of interrupt sources or memory slots.
#[derive(Debug)]
struct Numbers {
    /// Never given out yet, from here to `end`.
    next: u32,
    end: u32,
    /// Given back.
    free: Vec<u32>,
}

impl Numbers {
    fn new(first: u32, end: u32) -> Self {
        Self {
            next: first,
            end,
            free: Vec::new(),
        }
    }

    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let number = self.next;
            (number < self.end).then(|| {
                self.next += 1;
                number
            })
        })
    }
}

impl KvmRoutes {
    /// No routes yet.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            table: Mutex::default(),
            sources: Mutex::new(Numbers::new(layout::FIRST_MSI_GSI, layout::GSI_END)),
        }
    }
}

impl Routes for KvmRoutes {
    fn allocate(&self) -> io::Result<Route> {
        let trigger = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut sources = lock(&self.sources);
        let Some(gsi) = sources.take() else {
            let all = layout::GSI_END - layout::FIRST_MSI_GSI;
            return Err(io::Error::other(format!(
                "all {all} interrupt sources of the VM are taken"
            )));
        };
        if let Err(error) = self.vm.register_irqfd(&trigger, gsi) {
            sources.free.push(gsi);
            return Err(error.into());
        }
        Ok(Route { gsi, trigger })
    }

    fn update(&self, routes: &[(u32, Message)]) -> io::Result<()> {
        let mut table = lock(&self.table);
        let mut changed = table.clone();
        for (gsi, message) in routes {
            let entry = msi_entry(*gsi, *message);
            match changed.iter_mut().find(|old| old.gsi == *gsi) {
                Some(old) => *old = entry,
                None => changed.push(entry),
            }
        }
        let routing = KvmIrqRouting::from_entries(&changed)
            .map_err(|_| io::Error::other("too many routes"))?;
        self.vm.set_gsi_routing(&routing).map_err(io::Error::from)?;
        *table = changed;
        Ok(())
    }

    fn disconnect(&self, route: &Route) -> io::Result<()> {
        self.vm
            .unregister_irqfd(&route.trigger, route.gsi)
            .map_err(io::Error::from)
    }

    fn connect(&self, route: &Route) -> io::Result<()> {
        // KVM looks whether the event was signalled before.
        self.vm
            .register_irqfd(&route.trigger, route.gsi)
            .map_err(io::Error::from)
    }

    fn release(&self, route: Route) {
        // It may be disconnected. Closing the event would do it as well.
        let _ = self.vm.unregister_irqfd(&route.trigger, route.gsi);
        // KVM's own table follows with the next update: a route that nothing signals is inert.
        lock(&self.table).retain(|entry| entry.gsi != route.gsi);
        lock(&self.sources).free.push(route.gsi);
    }
}

fn msi_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi.address_lo = u32::try_from(message.address & 0xffff_ffff).unwrap_or(0);
    entry.u.msi.address_hi = u32::try_from(message.address >> 32).unwrap_or(0);
    entry.u.msi.data = message.data;
    entry
}

/// Memory slots of the VM for what is mapped beside RAM.
pub struct KvmMemorySlots {
    vm: Arc<VmFd>,
    numbers: Mutex<Numbers>,
}

impl KvmMemorySlots {
    /// Slots from `first` on, as many as KVM has.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, first: u32) -> Self {
        let end = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        Self {
            vm,
            numbers: Mutex::new(Numbers::new(first, end)),
        }
    }

    /// As [`MemorySlots::set`], for memory that the guest may read: its writes are exits.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn set_readonly(&self, guest: u64, size: u64, host: u64) -> io::Result<u32> {
        self.take(guest, size, host, KVM_MEM_READONLY)
    }

    /// A free slot for memory that its caller keeps mapped.
    fn take(&self, guest: u64, size: u64, host: u64, flags: u32) -> io::Result<u32> {
        let mut numbers = lock(&self.numbers);
        let Some(slot) = numbers.take() else {
            let all = numbers.end;
            return Err(io::Error::other(format!(
                "all {all} memory slots of the VM are taken"
            )));
        };
        let set = self.put(kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: host,
        });
        if set.is_err() {
            numbers.free.push(slot);
        }
        set.map(|()| slot)
    }

    /// A slot of no size is none.
    fn put(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: whoever sets a slot keeps its memory mapped (`MemorySlots::set`); KVM refuses one over another.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

impl MemorySlots for KvmMemorySlots {
    unsafe fn set(&self, guest: u64, size: u64, host: u64) -> io::Result<u32> {
        self.take(guest, size, host, 0)
    }

    fn clear(&self, slot: u32) {
        let none = kvm_userspace_memory_region {
            slot,
            ..kvm_userspace_memory_region::default()
        };
        if self.put(none).is_ok() {
            lock(&self.numbers).free.push(slot);
        }
    }
}

/// ioeventfds of the VM.
pub struct KvmIoEventFds(pub Arc<VmFd>);

impl IoEventFds for KvmIoEventFds {
    fn attach(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0
            .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    fn detach(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_agrees_with_what_the_kernel_says_of_this_cpu() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flagged = info
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        assert_eq!(verdict().is_ok(), flagged);
    }

    #[test]
    fn counters_are_switched_off_where_kvm_can_and_not_asked_for_where_it_cannot() {
        let off = no_counters(1).unwrap();
        assert_eq!((off.cap, off.args[0]), (212, 1));
        for without in [0, 2, -1] {
            assert!(no_counters(without).is_none());
        }
    }

    #[test]
    fn numbers_that_are_given_back_are_given_out_again_and_no_other_twice() {
        let mut sources = Numbers::new(layout::FIRST_MSI_GSI, layout::GSI_END);
        let all: Vec<u32> = std::iter::from_fn(|| sources.take()).collect();
        assert_eq!(
            all,
            (layout::FIRST_MSI_GSI..layout::GSI_END).collect::<Vec<_>>()
        );
        sources.free.push(77);
        assert_eq!((sources.take(), sources.take()), (Some(77), None));
    }

    #[test]
    fn an_emulating_kvm_is_refused_with_the_way_out() {
        let message = KvmError::Slow.to_string();
        assert!(message.contains("allow_slow_kvm"));
    }

    #[test]
    fn a_descriptor_that_is_not_kvm_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            open(null.into(), true),
            Err(KvmError::Version(-1))
        ));
    }
}
