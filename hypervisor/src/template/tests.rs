use std::collections::BTreeSet;
use std::io::Write as _;

use proptest::prelude::*;
use serde_json::json;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::arch::x86_64::layout;
use crate::memory;

const RAM: u64 = 4 << 20;

/// A head of a machine that no KVM has ever had: its registers are zero.
fn head(extents: Vec<Extent>) -> Head {
    let nothing: [u8; 0] = [];
    let cpu = json!({
        "cpuid": [], "regs": nothing, "sregs": nothing, "xsave": nothing, "xcrs": nothing, "debug": nothing,
        "lapic": nothing, "mp_state": nothing, "events": nothing, "msrs": [[0x10, 7]], "clock": 5,
    });
    Head {
        shape: Shape {
            ram_bytes: RAM,
            growth: 0..0,
            mmio64: 0..0,
            most_cpus: 1,
            share_tag: Some("brig".to_owned()),
        },
        cpu: serde_json::from_value(cpu).unwrap(),
        functions: 5,
        devices: Vec::new(),
        extents,
    }
}

fn page(number: u64) -> GuestAddress {
    GuestAddress(number * PAGE)
}

/// A template of RAM in which these pages have their number in them.
fn written(pages: &BTreeSet<u64>) -> File {
    let ram = memory::allocate(RAM).unwrap();
    for number in pages {
        ram.write_obj(*number + 1, page(*number)).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let head = head(pages::extents(&ram).unwrap());
    let length = head.write(&ram, &file).unwrap();
    assert_eq!(file.metadata().unwrap().len(), length);
    file
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_clone_has_the_captured_memory_and_what_it_writes_stays_its_own(
        pages in prop::collection::btree_set(0u64..1024, 1..60)
    ) {
        let file = written(&pages);
        let before = bytes(&file);
        let template = Template::open(file.try_clone().unwrap()).unwrap();
        let clones = [memory::allocate(RAM).unwrap(), memory::allocate(RAM).unwrap()];
        for ram in &clones {
            template.map(ram).unwrap();
            for number in 0..1024 {
                let expected = if pages.contains(&number) { number + 1 } else { 0 };
                prop_assert_eq!(ram.read_obj::<u64>(page(number)).unwrap(), expected);
                ram.write_obj(u64::MAX, page(number)).unwrap();
            }
        }
        prop_assert_eq!(bytes(&file), before);
    }

    #[test]
    fn runs_of_pages_are_in_order_and_apart_by_more_than_is_bridged(
        pages in prop::collection::btree_set(0u64..1024, 1..60)
    ) {
        let ram = memory::allocate(RAM).unwrap();
        for number in &pages {
            ram.write_obj(1u8, page(*number)).unwrap();
        }
        let found = pages::extents(&ram).unwrap();
        prop_assert!(pages::check(&found, RAM, RAM).is_ok());
        for pair in found.windows(2) {
            prop_assert!(pair[1].guest - (pair[0].guest + pair[0].bytes) > 16 * PAGE);
        }
        for number in pages {
            let address = number * PAGE;
            prop_assert!(found.iter().any(|run| (run.guest..run.guest + run.bytes).contains(&address)));
        }
    }
}

proptest! {
    #[test]
    fn runs_that_are_accepted_are_whole_pages_of_ram_that_the_file_has(
        runs in prop::collection::vec((0u64..1100, 0u64..40, 0u64..3), 0..8),
        held in 0u64..200,
        wild: Option<(u64, u64)>,
    ) {
        let mut extents: Vec<Extent> = runs
            .into_iter()
            .map(|(guest, pages, off)| Extent { guest: guest * PAGE + off / 2, bytes: pages * PAGE })
            .collect();
        extents.extend(wild.map(|(guest, bytes)| Extent { guest, bytes }));
        if pages::check(&extents, RAM, held * PAGE).is_ok() {
            let mut after = 0;
            let mut sum = 0;
            for run in &extents {
                prop_assert!(run.guest % PAGE == 0 && run.bytes % PAGE == 0 && run.bytes > 0);
                prop_assert!(run.guest >= after && run.guest + run.bytes <= RAM);
                after = run.guest + run.bytes;
                sum += run.bytes;
            }
            prop_assert!(sum <= held * PAGE);
        }
    }

    #[test]
    fn a_file_that_was_changed_or_cut_anywhere_is_refused_or_can_still_be_mapped(
        at in 0usize..4096, value: u8, cut in 0usize..20_000, shorten: bool
    ) {
        let mut bytes = bytes(&written(&BTreeSet::from([3, 4, 900])));
        let at = at % bytes.len();
        bytes[at] = value;
        if shorten {
            bytes.truncate(cut.min(bytes.len()));
        }
        if let Ok(template) = Template::open(file_of(&bytes)) {
            let ram_bytes = template.head.shape.ram_bytes;
            if ram_bytes == RAM {
                let ram = memory::allocate(RAM).unwrap();
                template.map(&ram).unwrap();
                ram.read_obj::<u64>(page(900)).unwrap();
            }
        }
    }
}

#[test]
fn runs_over_the_hole_below_4_gib_are_refused() {
    let ram = layout::LOW_RAM_END + (4 << 20);
    let over = Extent {
        guest: layout::LOW_RAM_END - PAGE,
        bytes: 2 * PAGE,
    };
    assert!(pages::check(&[over], ram, u64::MAX).is_err());
    let above = Extent {
        guest: layout::HIGH_RAM,
        bytes: 4 << 20,
    };
    assert!(pages::check(&[above], ram, u64::MAX).is_ok());
}

#[test]
fn another_version_a_longer_head_and_no_template_are_told_apart_from_one() {
    let good = bytes(&written(&BTreeSet::from([1])));
    let with = |at: usize, value: &[u8]| {
        let mut changed = good.clone();
        changed[at..at + value.len()].copy_from_slice(value);
        Template::open(file_of(&changed)).unwrap_err().to_string()
    };
    assert!(with(0, b"ELF!").contains("it is none"));
    assert!(with(8, &2u32.to_le_bytes()).contains("another version"));
    assert!(with(12, &u32::MAX.to_le_bytes()).contains("too long"));
    assert!(Template::open(file_of(b"")).is_err());
    let unknown = String::from_utf8_lossy(&good[16..60]).replace("shape", "shapf");
    assert!(with(16, unknown.as_bytes()).contains("damaged"));
}
