//! x86-64: PVH boot, hardware-reduced ACPI, split irqchip, x2APIC.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod regs;
