//! [`Device`] over a descriptor of VFIO, which the shim has opened and set up.
//!
//! Trusts the node's kernel.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as sys;

use super::coherence::{Coherence, Told};
use super::device::{CONFIG_REGION, Device, Kind, Mapping, Region, Vectors, Word};

/// `VFIO_TYPE` and `VFIO_BASE`: all requests are `_IO(';', 100 + n)`.
pub(super) const fn request(number: u32) -> u32 {
    0x3b64 + number
}

/// The requests made here, for the filter of the thread that makes them.
pub const REQUESTS: [u32; 4] = [GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, RESET];

const GET_REGION_INFO: u32 = request(8);
const GET_IRQ_INFO: u32 = request(9);
const SET_IRQS: u32 = request(10);
const RESET: u32 = request(11);

/// Capabilities of a region that are looked at.
const MAX_CAPABILITIES: usize = 16;
/// Bytes of a region's description with its capabilities.
const MAX_INFO: u32 = 4096;
/// Start, count and name of `vfio_irq_set` before its data.
const IRQ_SET_HEADER: usize = 20;

/// Makes a request whose argument lies in `bytes`, which starts with its length; the answer's number, 0 if all was done.
pub(super) fn ask(fd: &OwnedFd, request: u32, bytes: &mut [u8]) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most `argsz` bytes, which the callers set to the slice's length or less.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::Ioctl::from(request),
            bytes.as_mut_ptr(),
        )
    };
    Ok(Errno::result(result)?)
}

/// What the kernel has answered when `wanted` interrupts were to be enabled at once. It has no error for having fewer vectors: it
/// enables none then, and says how many there are.
fn enabled(answer: i32, wanted: usize) -> io::Result<()> {
    if answer == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "the node has {answer} interrupt vectors for the device, and {wanted} are wanted: none is on"
    )))
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(found) = at.checked_add(N).and_then(|end| bytes.get(at..end)) {
        value.copy_from_slice(found);
    }
    value
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}

fn index(kind: Kind) -> u32 {
    match kind {
        Kind::Msi => sys::VFIO_PCI_MSI_IRQ_INDEX,
        Kind::Msix => sys::VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

/// A device by its descriptor.
pub struct KernelDevice {
    fd: Told,
    /// Where the configuration space and the BARs are in the descriptor.
    offsets: [u64; 8],
}

impl KernelDevice {
    /// Looks the device's regions up.
    ///
    /// # Errors
    /// If it is not a VFIO device's descriptor.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut device = Self {
            fd: Told::nobody(fd),
            offsets: [0; 8],
        };
        for region in 0..=CONFIG_REGION {
            let info = device.info(region)?;
            if let Some(offset) = device.offsets.get_mut(region as usize) {
                *offset = get64(&info, 24);
            }
        }
        Ok(device)
    }

    /// Tells KVM of it.
    ///
    /// # Errors
    /// As of [`Coherence::add`].
    pub fn tell(&mut self, coherence: Arc<dyn Coherence>) -> io::Result<()> {
        self.fd.tell(coherence)
    }

    /// `vfio_region_info` with what capabilities it has.
    fn info(&self, region: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; MAX_INFO as usize];
        put(&mut bytes, 0, MAX_INFO);
        put(&mut bytes, 8, region);
        ask(self.fd.fd(), GET_REGION_INFO, &mut bytes)?;
        Ok(bytes)
    }

    /// Interrupts `first..` of an index signal these events.
    fn trigger(&self, index: u32, first: u16, events: &[Option<RawFd>]) -> io::Result<()> {
        let count = u32::try_from(events.len()).map_err(io::Error::other)?;
        let flags = sys::VFIO_IRQ_SET_DATA_EVENTFD | sys::VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut bytes = irq_set(index, flags, first.into(), count);
        for event in events {
            bytes.extend(event.unwrap_or(-1).to_le_bytes());
        }
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        put(&mut bytes, 0, length);
        enabled(ask(self.fd.fd(), SET_IRQS, &mut bytes)?, events.len())
    }

    fn place(&self, region: u32, offset: u64) -> io::Result<libc::off_t> {
        let base = self.offsets.get(region as usize).copied();
        base.and_then(|base| base.checked_add(offset))
            .and_then(|place| place.try_into().ok())
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// The mappable parts of a region by its description.
fn mappable(info: &[u8]) -> Vec<Range<u64>> {
    let flags = get32(info, 4);
    if flags & sys::VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Vec::new();
    }
    let size = get64(info, 16);
    let mut next = get32(info, 12);
    for _ in 0..MAX_CAPABILITIES {
        let at = next as usize;
        if flags & sys::VFIO_REGION_INFO_FLAG_CAPS == 0 || next == 0 {
            break;
        }
        let id = u16::from_le_bytes(get(info, at));
        if u32::from(id) == sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = get32(info, at + 8).min(MAX_INFO / 16) as usize;
            let areas = (0..count).map(|area| {
                let start = get64(info, at + 16 + area * 16);
                start
                    ..start
                        .saturating_add(get64(info, at + 24 + area * 16))
                        .min(size)
            });
            return areas.filter(|area| !area.is_empty()).collect();
        }
        next = get32(info, at + 4);
    }
    std::iter::once(0..size).collect()
}

/// A mapped part of a device.
struct Mapped {
    /// With what was reserved around it.
    reserved: (*mut libc::c_void, usize),
    host: u64,
}

// SAFETY: plain memory of the process, touched by the guest alone.
unsafe impl Send for Mapped {}
// SAFETY: as above; there is no access by way of this value.
unsafe impl Sync for Mapped {}

impl Mapping for Mapped {
    fn host(&self) -> u64 {
        self.host
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range was reserved for this mapping alone, and no memory slot refers to it any more.
        let _ = unsafe { libc::munmap(self.reserved.0, self.reserved.1) };
    }
}

impl Device for KernelDevice {
    fn region(&self, index: u32) -> io::Result<Region> {
        let info = self.info(index)?;
        Ok(Region {
            size: get64(&info, 16),
            mappable: mappable(&info),
        })
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let place = self.place(region, offset)?;
        // SAFETY: the kernel writes at most the slice's length into it.
        let count = unsafe {
            libc::pread(
                self.fd.fd().as_raw_fd(),
                data.as_mut_ptr().cast(),
                data.len(),
                place,
            )
        };
        complete(count, data.len())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let place = self.place(region, offset)?;
        // SAFETY: the kernel reads at most the slice's length from it.
        let count = unsafe {
            libc::pwrite(
                self.fd.fd().as_raw_fd(),
                data.as_ptr().cast(),
                data.len(),
                place,
            )
        };
        complete(count, data.len())
    }

    fn map(&self, region: u32, part: &Range<u64>, alignment: u64) -> io::Result<Box<dyn Mapping>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(part.end.saturating_sub(part.start)).map_err(|_| invalid())?;
        let alignment = usize::try_from(alignment).map_err(|_| invalid())?;
        let offset = self.place(region, part.start)?;
        let whole = length.checked_add(alignment).ok_or_else(invalid)?;
        // SAFETY: a fresh reservation anywhere.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                whole,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let within = usize::try_from(part.start).map_err(|_| invalid())? % alignment;
        let start = reserved.addr().next_multiple_of(alignment) + within;
        // Where the part's place modulo the alignment comes first in the reservation.
        let start = if start - alignment >= reserved.addr() {
            start - alignment
        } else {
            start
        };
        let mapped = Mapped {
            reserved: (reserved, whole),
            host: start as u64,
        };
        // SAFETY: the range lies inside the reservation, which nothing else uses.
        let result = unsafe {
            libc::mmap(
                reserved.with_addr(start),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.fd.fd().as_raw_fd(),
                offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Box::new(mapped))
    }

    fn vectors(&self, kind: Kind) -> io::Result<Vectors> {
        let mut bytes = [0; 16];
        put(&mut bytes, 0, 16);
        put(&mut bytes, 8, index(kind));
        ask(self.fd.fd(), GET_IRQ_INFO, &mut bytes)?;
        Ok(Vectors {
            count: u16::try_from(get32(&bytes, 12)).unwrap_or(u16::MAX),
            resizable: get32(&bytes, 4) & sys::VFIO_IRQ_INFO_NORESIZE == 0,
        })
    }

    fn set_triggers(&self, kind: Kind, first: u16, events: &[Option<RawFd>]) -> io::Result<()> {
        self.trigger(index(kind), first, events)
    }

    fn disable(&self, kind: Kind) -> io::Result<()> {
        let flags = sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER;
        ask(
            self.fd.fd(),
            SET_IRQS,
            &mut irq_set(index(kind), flags, 0, 0),
        )
        .map(drop)
    }

    fn hear(&self, word: Word, event: RawFd) -> io::Result<()> {
        let index = match word {
            Word::Wanted => sys::VFIO_PCI_REQ_IRQ_INDEX,
            Word::Failed => sys::VFIO_PCI_ERR_IRQ_INDEX,
        };
        self.trigger(index, 0, &[Some(event)])
    }

    fn reset(&self) -> io::Result<()> {
        ask(self.fd.fd(), RESET, &mut []).map(drop)
    }
}

/// `vfio_irq_set` without data.
fn irq_set(index: u32, flags: u32, start: u32, count: u32) -> Vec<u8> {
    let mut bytes = vec![0; IRQ_SET_HEADER];
    for (at, value) in [(0, 20), (4, flags), (8, index), (12, start), (16, count)] {
        put(&mut bytes, at, value);
    }
    bytes
}

fn complete(count: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(count) {
        Ok(count) if count == wanted => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Range<u64> = 0..0x4000;

    fn info(flags: u32, size: u64, capabilities: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        put(&mut bytes, 4, flags);
        put(&mut bytes, 12, if capabilities.is_empty() { 0 } else { 32 });
        bytes[16..24].copy_from_slice(&size.to_le_bytes());
        bytes.extend(capabilities);
        bytes
    }

    #[test]
    fn a_region_is_mapped_whole_or_in_the_parts_that_the_kernel_names() {
        assert!(mappable(&info(3, 0x4000, &[])).is_empty());
        assert_eq!(mappable(&info(7, 0x4000, &[])), [WHOLE]);
        let mut sparse = Vec::new();
        for word in [
            1 | 1 << 16,
            0,
            2,
            0,
            0x1000,
            0,
            0x1000,
            0,
            0x3000,
            0,
            0xf000,
            0,
        ] {
            sparse.extend(u32::to_le_bytes(word));
        }
        // The second one leads out of the region.
        assert_eq!(
            mappable(&info(15, 0x4000, &sparse)),
            [0x1000..0x2000, 0x3000..0x4000]
        );
        // A list that leads back to itself ends.
        let mut endless = Vec::new();
        for word in [2 | 1 << 16, 32, 0, 0] {
            endless.extend(u32::to_le_bytes(word));
        }
        assert_eq!(mappable(&info(15, 0x4000, &endless)), [WHOLE]);
    }

    #[test]
    fn requests_have_the_numbers_and_lengths_of_the_kernels_header() {
        assert_eq!(REQUESTS, [0x3b6c, 0x3b6d, 0x3b6e, 0x3b6f]);
        assert_eq!(size_of::<sys::vfio_region_info>(), 32);
        assert_eq!(size_of::<sys::vfio_irq_info>(), 16);
        assert_eq!(irq_set(2, 36, 1, 2).len(), IRQ_SET_HEADER);
    }

    #[test]
    fn fewer_vectors_than_wanted_are_an_error_and_not_a_success() {
        enabled(0, 8).unwrap();
        let error = enabled(3, 8).unwrap_err().to_string();
        assert!(
            error.contains("has 3 ") && error.contains("8 are wanted"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(KernelDevice::new(null.into()).is_err());
    }
}
