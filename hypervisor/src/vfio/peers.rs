//! The BARs of a VM's devices in the address space that its devices have, so that one can read and write another without
//! the CPU (peer to peer). Nothing is mapped for a device that is alone.
//!
//! Only what the guest can reach without an exit is mapped, and where it reaches it: never a table of interrupts. The
//! guest moves BARs as it likes within the bus's windows, where there is no RAM; what meets something else there is not
//! mapped, and no harm. Where the node's kernel maps no BARs (iommufd before Linux 6.19) devices do without.

use std::io;
use std::sync::{Arc, Mutex};

use super::dma::Dma;
use crate::sync::lock;

/// Mapped memory of a BAR, where the guest has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where it is in this process.
    pub host: u64,
}

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// Nobody is there to reach it.
    Alone,
    /// Other devices reach it.
    Mapped,
    /// The kernel does not map it.
    Refused,
}

struct Part {
    device: String,
    bar: u8,
    placed: Placed,
    reach: Reach,
}

#[derive(Default)]
struct State {
    parts: Vec<Part>,
    /// A refusal has been told.
    told: bool,
}

impl State {
    fn has_peers(&self) -> bool {
        let mut devices = self.parts.iter().map(|part| &part.device);
        let first = devices.next();
        devices.any(|device| Some(device) != first)
    }
}

/// Those of one VM.
pub struct Peers {
    dma: Arc<dyn Dma>,
    state: Mutex<State>,
}

impl Peers {
    /// None yet.
    #[must_use]
    pub fn new(dma: Arc<dyn Dma>) -> Self {
        Self {
            dma,
            state: Mutex::default(),
        }
    }

    /// The BAR of a device is here from now on, or nowhere if that is nothing. To be called on a thread that may make
    /// VFIO's calls, and before what was there is unmapped from this process.
    ///
    /// # Errors
    /// What the kernel says when it maps no BAR, the first time: the devices work, but do not reach each other.
    pub fn moved(&self, device: &str, bar: u8, placed: &[Placed]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let old = |part: &Part| part.device == device && part.bar == bar;
        for part in state.parts.extract_if(.., |part| old(part)) {
            self.unmap(&part);
        }
        state.parts.extend(placed.iter().map(|placed| Part {
            device: device.to_owned(),
            bar,
            placed: *placed,
            reach: Reach::Alone,
        }));
        if !state.has_peers() {
            for part in &mut state.parts {
                self.unmap(part);
                part.reach = Reach::Alone;
            }
            return Ok(());
        }
        let mut result = Ok(());
        for part in &mut state.parts {
            if part.reach == Reach::Alone {
                let Placed { guest, size, host } = part.placed;
                part.reach = match self.dma.map(guest, host, size) {
                    Ok(()) => Reach::Mapped,
                    Err(error) => {
                        result = Err(error);
                        Reach::Refused
                    }
                };
            }
        }
        if result.is_err() && std::mem::replace(&mut state.told, true) {
            return Ok(());
        }
        result
    }

    fn unmap(&self, part: &Part) {
        if part.reach == Reach::Mapped {
            let _ = self.dma.unmap(part.placed.guest, part.placed.size);
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        for part in &lock(&self.state).parts {
            self.unmap(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::MappedSpace;
    use super::*;

    const PAGE: u64 = 4096;

    fn placed(guest: u64) -> Placed {
        Placed {
            guest,
            size: 2 * PAGE,
            host: guest + (1 << 44),
        }
    }

    fn mapped(places: &[u64]) -> Vec<(u64, u64)> {
        places.iter().map(|guest| (*guest, 2 * PAGE)).collect()
    }

    #[test]
    fn bars_are_mapped_while_there_is_another_device_and_where_they_are() {
        let space = Arc::new(MappedSpace::default());
        let dma: Arc<dyn Dma> = space.clone();
        let peers = Peers::new(dma);
        let moved = |device, bar, places: &[u64]| {
            let placed: Vec<_> = places.iter().map(|guest| placed(*guest)).collect();
            peers.moved(device, bar, &placed).unwrap();
        };
        moved("one", 0, &[0x10_0000, 0x20_0000]);
        moved("one", 2, &[0x30_0000]);
        assert_eq!(space.all(), []);
        moved("two", 0, &[0x40_0000]);
        assert_eq!(
            space.all(),
            mapped(&[0x10_0000, 0x20_0000, 0x30_0000, 0x40_0000])
        );
        // Over its own old place, and off.
        moved("two", 0, &[0x40_1000]);
        moved("one", 0, &[]);
        assert_eq!(space.all(), mapped(&[0x30_0000, 0x40_1000]));
        moved("one", 0, &[0x10_0000]);
        moved("two", 0, &[]);
        assert_eq!(space.all(), []);
        moved("two", 0, &[0x40_0000]);
        assert_eq!(space.all(), mapped(&[0x10_0000, 0x30_0000, 0x40_0000]));
        drop(peers);
        assert_eq!(space.all(), []);
    }

    #[test]
    fn what_meets_something_else_is_not_mapped_and_is_where_that_has_gone() {
        let space = Arc::new(MappedSpace::default());
        let dma: Arc<dyn Dma> = space.clone();
        let peers = Peers::new(dma);
        peers.moved("one", 0, &[placed(0x10_0000)]).unwrap();
        // The guest has put one over the other.
        assert!(peers.moved("two", 0, &[placed(0x10_1000)]).is_err());
        assert_eq!(space.all(), mapped(&[0x10_0000]));
        peers.moved("one", 0, &[]).unwrap();
        assert_eq!(space.all(), []);
        peers.moved("one", 0, &[placed(0x20_0000)]).unwrap();
        peers.moved("two", 0, &[placed(0x10_1000)]).unwrap();
        assert_eq!(space.all(), mapped(&[0x10_1000, 0x20_0000]));
    }

    #[test]
    fn a_kernel_that_maps_no_bars_says_so_once() {
        let space = Arc::new(MappedSpace::default());
        space.refuses(libc::EFAULT);
        let dma: Arc<dyn Dma> = space.clone();
        let peers = Peers::new(dma);
        peers.moved("one", 0, &[placed(0x10_0000)]).unwrap();
        let error = peers.moved("two", 0, &[placed(0x20_0000)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        peers.moved("two", 0, &[placed(0x30_0000)]).unwrap();
        peers.moved("two", 0, &[]).unwrap();
        assert_eq!(space.all(), []);
    }
}
