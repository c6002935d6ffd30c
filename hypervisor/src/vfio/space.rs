//! [`Dma`] over what the node's kernel has for it: a container of groups (`linux/vfio.h`), or an I/O address space of iommufd
//! (`linux/iommufd.h`). The shim has made either and has put the devices in it.
//!
//! Trusts the node's kernel.

use std::io;
use std::os::fd::OwnedFd;

use vfio_bindings::bindings::vfio as sys;

use super::dma::Dma;
use super::kernel::{ask, put, request};

/// The requests made here, for the filter of the thread that makes them.
pub const REQUESTS: [u32; 4] = [MAP_DMA, UNMAP_DMA, IOAS_MAP, IOAS_UNMAP];

const MAP_DMA: u32 = request(13);
const UNMAP_DMA: u32 = request(14);
/// `IOMMUFD_TYPE` is VFIO's; its commands begin at 0x80.
const IOAS_MAP: u32 = 0x3b85;
const IOAS_UNMAP: u32 = 0x3b86;

/// `IOMMU_IOAS_MAP_FIXED_IOVA`, `_WRITEABLE` and `_READABLE`.
const FIXED_READ_WRITE: u32 = 7;

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// A container with a type 1 IOMMU.
#[derive(Debug)]
pub struct Container(pub OwnedFd);

impl Container {
    /// `vfio_iommu_type1_dma_map`.
    fn map_request(iova: u64, host: u64, size: u64) -> [u8; 32] {
        let mut bytes = [0; 32];
        put(&mut bytes, 0, 32);
        put(
            &mut bytes,
            4,
            sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE,
        );
        for (at, value) in [(8, host), (16, iova), (24, size)] {
            put64(&mut bytes, at, value);
        }
        bytes
    }

    /// `vfio_iommu_type1_dma_unmap`.
    fn unmap_request(iova: u64, size: u64) -> [u8; 24] {
        let mut bytes = [0; 24];
        put(&mut bytes, 0, 24);
        for (at, value) in [(8, iova), (16, size)] {
            put64(&mut bytes, at, value);
        }
        bytes
    }
}

impl Dma for Container {
    fn map(&self, iova: u64, host: u64, size: u64) -> io::Result<()> {
        ask(&self.0, MAP_DMA, &mut Self::map_request(iova, host, size)).map(drop)
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        ask(&self.0, UNMAP_DMA, &mut Self::unmap_request(iova, size)).map(drop)
    }
}

/// An I/O address space of iommufd.
#[derive(Debug)]
pub struct Ioas {
    /// `/dev/iommu`.
    pub iommufd: OwnedFd,
    /// Its number there.
    pub id: u32,
}

impl Ioas {
    /// `iommu_ioas_map`.
    fn map_request(&self, iova: u64, host: u64, size: u64) -> [u8; 40] {
        let mut bytes = [0; 40];
        for (at, value) in [(0, 40), (4, FIXED_READ_WRITE), (8, self.id)] {
            put(&mut bytes, at, value);
        }
        for (at, value) in [(16, host), (24, size), (32, iova)] {
            put64(&mut bytes, at, value);
        }
        bytes
    }

    /// `iommu_ioas_unmap`.
    fn unmap_request(&self, iova: u64, size: u64) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (at, value) in [(0, 24), (4, self.id)] {
            put(&mut bytes, at, value);
        }
        for (at, value) in [(8, iova), (16, size)] {
            put64(&mut bytes, at, value);
        }
        bytes
    }
}

impl Dma for Ioas {
    fn map(&self, iova: u64, host: u64, size: u64) -> io::Result<()> {
        let mut request = self.map_request(iova, host, size);
        ask(&self.iommufd, IOAS_MAP, &mut request).map(drop)
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        let mut request = self.unmap_request(iova, size);
        ask(&self.iommufd, IOAS_UNMAP, &mut request).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    /// The words of a request, 32 bits each.
    fn words(bytes: &[u8]) -> Vec<u32> {
        let words = bytes.chunks(4);
        words
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn requests_are_laid_out_as_the_kernels_headers_have_them() {
        assert_eq!(REQUESTS, [0x3b71, 0x3b72, 0x3b85, 0x3b86]);
        let (iova, host, size) = (1 << 32 | 2, 3 << 32 | 4, 5 << 32 | 6);
        let map = Container::map_request(iova, host, size);
        assert_eq!(map.len(), size_of::<sys::vfio_iommu_type1_dma_map>());
        assert_eq!(words(&map), [32, 3, 4, 3, 2, 1, 6, 5]);
        let unmap = Container::unmap_request(iova, size);
        assert_eq!(unmap.len(), size_of::<sys::vfio_iommu_type1_dma_unmap>());
        assert_eq!(words(&unmap), [24, 0, 2, 1, 6, 5]);
        let ioas = Ioas {
            iommufd: null(),
            id: 9,
        };
        let map = ioas.map_request(iova, host, size);
        assert_eq!(words(&map), [40, 7, 9, 0, 4, 3, 6, 5, 2, 1]);
        let unmap = ioas.unmap_request(iova, size);
        assert_eq!(words(&unmap), [24, 9, 2, 1, 6, 5]);
    }

    #[test]
    fn what_is_no_address_space_takes_no_memory() {
        let ioas = Ioas {
            iommufd: null(),
            id: 1,
        };
        assert!(ioas.map(0, 0, 4096).is_err() && ioas.unmap(0, 4096).is_err());
        let container = Container(null());
        assert!(container.map(0, 0, 4096).is_err() && container.unmap(0, 4096).is_err());
    }
}
