//! Static, hardware-reduced ACPI tables (ACPI 6.5 §4.1): no SCI, no GPEs, no interrupt controller
//! beside the local APICs, one PCI host bridge, whose other buses are behind ports that
//! come with a device of the node.
//!
//! Everything here comes from the VMM's own configuration.

use std::ops::Range;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::layout;

const OEM: [u8; 6] = *b"BRIG  ";
const OEM_TABLE: [u8; 8] = *b"BRIGVMM ";
const REVISION: u32 = 1;
/// `SLP_TYP` of the S5 state, as the DSDT declares it.
const S5: u8 = 5;

/// What the tables describe.
pub struct Platform {
    /// CPUs, whose APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// 64-bit MMIO window of the host bridge; empty for none.
    pub mmio64: Range<u64>,
}

/// Returns the bytes to be placed at [`layout::RSDP`].
#[must_use]
pub fn tables(platform: &Platform) -> Vec<u8> {
    let mut image = vec![0u8; Rsdp::len()];
    let dsdt = append(&mut image, &dsdt(platform));
    let fadt = append(&mut image, &fadt(dsdt));
    let madt = append(&mut image, &madt(platform.vcpus));
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, layout::LAST_BUS);
    let mcfg = append(&mut image, &mcfg);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = append(&mut image, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

/// Appends a table, aligned to 16 bytes, and returns its guest address.
fn append(image: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    image.resize(image.len().next_multiple_of(16), 0);
    let address = layout::RSDP + image.len() as u64;
    table.to_aml_bytes(image);
    address
}

fn port(address: u16) -> GAS {
    GAS::new(
        Space::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        // MSI addresses hold eight bits of destination: a logical x2APIC id would not fit.
        .flag(Flags::ForceApicPhysicalDestinationMode);
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = 1;
    // No VGA, no CMOS RTC, no 8042 (bits 2, 5; bit 1 clear), no legacy devices (bit 0 clear).
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let base = u32::try_from(layout::LOCAL_APIC).unwrap_or(u32::MAX);
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        REVISION,
        LocalInterruptController::Address(base),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(platform: &Platform) -> Sdt {
    let mut body = Vec::new();
    sleep_states(&mut body);
    motherboard(&mut body);
    host_bridge(platform, &mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// Power-off is a write of S5 to the sleep control register.
fn sleep_states(body: &mut Vec<u8>) {
    let zero = aml::ZERO;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&S5, &zero, &zero, &zero]),
    )
    .to_aml_bytes(body);
}

/// Linux uses ECAM only if the range is reserved by a motherboard resource.
fn motherboard(body: &mut Vec<u8>) {
    let base = u32::try_from(layout::ECAM.start).unwrap_or(u32::MAX);
    let length = u32::try_from(layout::ECAM.end - layout::ECAM.start).unwrap_or(0);
    aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(true, base, length)]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn host_bridge(platform: &Platform, body: &mut Vec<u8>) {
    use aml::AddressSpaceCacheable::NotCacheable;
    let bus = aml::AddressSpace::new_bus_number(0u16, u16::from(layout::LAST_BUS));
    let low = aml::AddressSpace::new_memory(
        NotCacheable,
        true,
        u32::try_from(layout::MMIO32.start).unwrap_or(0),
        u32::try_from(layout::MMIO32.end - 1).unwrap_or(0),
        None,
    );
    let high = (!platform.mmio64.is_empty()).then(|| {
        aml::AddressSpace::new_memory(
            NotCacheable,
            true,
            platform.mmio64.start,
            platform.mmio64.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &low];
    if let Some(high) = &high {
        resources.push(high);
    }
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(body);
}

/// What a write to the sleep control register asks for (ACPI 6.5 §4.8.3.7: SLP_EN is bit 5,
/// SLP_TYP bits 2 to 4).
#[must_use]
pub fn is_power_off(value: u8) -> bool {
    value & (1 << 5) != 0 && (value >> 2) & 7 == S5
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(image: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::RSDP).unwrap();
        let length = u32::from_le_bytes(image[start + 4..start + 8].try_into().unwrap());
        &image[start..start + usize::try_from(length).unwrap()]
    }

    fn every_table(image: &[u8]) -> Vec<&[u8]> {
        let xsdt = table(image, u64::from_le_bytes(image[24..32].try_into().unwrap()));
        let mut tables = vec![xsdt];
        for entry in xsdt[36..].chunks_exact(8) {
            tables.push(table(image, u64::from_le_bytes(entry.try_into().unwrap())));
        }
        let fadt = tables[1];
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        tables.push(table(image, dsdt));
        tables
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let image = tables(&Platform {
            vcpus: 3,
            mmio64: 0x1_4000_0000..0x100_0000_0000,
        });
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let tables = every_table(&image);
        let names: Vec<&[u8]> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
        for table in tables {
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
    }

    #[test]
    fn the_tables_fit_below_one_mebibyte_with_the_most_cpus() {
        let image = tables(&Platform {
            vcpus: 64,
            mmio64: 0..0,
        });
        assert!(layout::RSDP + image.len() as u64 <= layout::RESERVED_LOW.end);
    }

    #[test]
    fn only_s5_with_sleep_enable_is_a_power_off() {
        assert!(is_power_off(0b0011_0100));
        assert!(!is_power_off(0b0001_0100));
        assert!(!is_power_off(0b0010_0100));
        assert!(!is_power_off(0));
    }
}
