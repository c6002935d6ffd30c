//! A device that remembers what was asked of it, what an NVMe's configuration space looks like, and an address space.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use super::device::{CONFIG_REGION, Device, Kind, Mapping, Region, Vectors, Word};
use super::dma::Dma;
use crate::pci::config::SIZE;
use crate::sync::lock;

/// What was asked, in order.
#[derive(Default)]
pub(crate) struct Record {
    entries: Mutex<Vec<String>>,
    /// Which vectors have an event.
    live: Mutex<Vec<bool>>,
}

impl Record {
    pub(crate) fn add(&self, entry: impl Into<String>) {
        lock(&self.entries).push(entry.into());
    }

    pub(crate) fn all(&self) -> Vec<String> {
        lock(&self.entries).clone()
    }

    pub(crate) fn live(&self, count: usize) -> Vec<bool> {
        let mut live = lock(&self.live).clone();
        live.resize(count, false);
        live
    }
}

/// The configuration space of an NVMe with a vital product data capability and an I/O BAR besides.
pub(crate) fn nvme() -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x00, 0x04, 0x10, 0x00]);
    put(0x08, &[0x02, 0x02, 0x08, 0x01, 0x00, 0x00, 0x80]);
    put(0x10, &[0x04]);
    put(0x18, &[0x01]);
    put(0x34, &[0x40]);
    put(0x3d, &[1]);
    // MSI-X: 65 vectors in BAR 0.
    put(
        0x40,
        &[0x11, 0x50, 64, 0, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0],
    );
    put(0x50, &[0x03, 0x60]);
    put(0x60, &[0x01, 0x70, 0x03, 0xc8, 0, 0, 0, 0]);
    // MSI: four messages, 64-bit.
    put(0x70, &[0x05, 0x80, 0x84, 0]);
    put(0x80, &[0x10, 0x00, 0x02, 0]);
    bytes
}

/// Its BARs.
pub(crate) fn nvme_regions() -> [Region; 6] {
    let mut regions: [Region; 6] = Default::default();
    regions[0] = Region {
        size: 0x4000,
        mappable: std::iter::once(0..0x4000).collect(),
    };
    regions[2].size = 0x20;
    regions
}

/// The device.
pub(crate) struct Mock {
    record: Arc<Record>,
    config: [u8; SIZE],
    regions: [Region; 6],
}

impl Mock {
    pub(crate) fn nvme(record: Arc<Record>) -> Self {
        Self {
            record,
            config: nvme(),
            regions: nvme_regions(),
        }
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.record.add("closed");
    }
}

struct MockMapping {
    record: Arc<Record>,
    host: u64,
}

impl Mapping for MockMapping {
    fn host(&self) -> u64 {
        self.host
    }
}

impl Drop for MockMapping {
    fn drop(&mut self) {
        self.record.add(format!("unmapped {:#x}", self.host));
    }
}

impl Device for Mock {
    fn region(&self, index: u32) -> io::Result<Region> {
        Ok(self
            .regions
            .get(index as usize)
            .cloned()
            .unwrap_or_default())
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        if region == CONFIG_REGION {
            data.copy_from_slice(&self.config[start..start + data.len()]);
        } else {
            data.fill(0xdd);
        }
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.record
            .add(format!("write {region} {offset:#x} {data:x?}"));
        Ok(())
    }

    fn map(&self, _: u32, part: &Range<u64>, _: u64) -> io::Result<Box<dyn Mapping>> {
        Ok(Box::new(MockMapping {
            record: Arc::clone(&self.record),
            host: 0x7000_0000_0000 + part.start,
        }))
    }

    fn vectors(&self, kind: Kind) -> io::Result<Vectors> {
        Ok(Vectors {
            count: if kind == Kind::Msix { 65 } else { 4 },
            resizable: true,
        })
    }

    fn set_triggers(&self, _: Kind, first: u16, events: &[Option<RawFd>]) -> io::Result<()> {
        let words: Vec<&str> = events
            .iter()
            .map(|event| if event.is_some() { "on" } else { "off" })
            .collect();
        self.record
            .add(format!("triggers {first}: {}", words.join(" ")));
        let mut live = lock(&self.record.live);
        let end = usize::from(first) + events.len();
        let length = live.len().max(end);
        live.resize(length, false);
        for (place, event) in live[usize::from(first)..end].iter_mut().zip(events) {
            *place = event.is_some();
        }
        Ok(())
    }

    fn disable(&self, _: Kind) -> io::Result<()> {
        self.record.add("disable");
        lock(&self.record.live).clear();
        Ok(())
    }

    fn hear(&self, word: Word, _: RawFd) -> io::Result<()> {
        self.record.add(format!("hear {word:?}"));
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.record.add("reset");
        Ok(())
    }
}

/// An address space that keeps to the kernel's rules: no mapping meets another one, and one goes as it came.
#[derive(Default)]
pub(crate) struct MappedSpace {
    mapped: Mutex<BTreeMap<u64, u64>>,
    refuses: Mutex<Option<i32>>,
}

impl MappedSpace {
    /// Where something is mapped, and how long it is.
    pub(crate) fn all(&self) -> Vec<(u64, u64)> {
        let mapped = lock(&self.mapped);
        mapped.iter().map(|(at, size)| (*at, *size)).collect()
    }

    /// From now on nothing can be mapped.
    pub(crate) fn refuses(&self, errno: i32) {
        *lock(&self.refuses) = Some(errno);
    }
}

impl Dma for MappedSpace {
    fn map(&self, iova: u64, _: u64, size: u64) -> io::Result<()> {
        if let Some(errno) = *lock(&self.refuses) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut mapped = lock(&self.mapped);
        if mapped
            .iter()
            .any(|(at, length)| *at < iova + size && iova < at + length)
        {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        mapped.insert(iova, size);
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        assert_eq!(lock(&self.mapped).remove(&iova), Some(size));
        Ok(())
    }
}
