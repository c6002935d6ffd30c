//! The one queue of a device whose requests are answered as they come: entropy, memory, and files that are memory.

use std::sync::Arc;

use vm_memory::{GuestAddressSpace as _, GuestMemoryMmap};

use super::chain::Chain;
use super::ring::Ring;
use super::{Activation, DeviceError, GuestMemory, Interrupt, Sources};

/// The index of the queue, under which it is waited for.
const TOKEN: u32 = 0;

/// The queue, as far as the driver has one.
#[derive(Default)]
pub struct RequestQueue(Option<Active>);

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    ring: Ring,
}

impl RequestQueue {
    /// Takes it over from the driver.
    ///
    /// # Errors
    /// As [`Activation::open`].
    pub fn open(
        &mut self,
        device: &'static str,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let opened = activation.open(device, sources)?;
        let [ring] = opened.rings;
        self.0 = Some(Active {
            memory: opened.memory,
            interrupt: opened.interrupt,
            ring,
        });
        Ok(())
    }

    /// Serves an event of `token`: at most `budget` requests, each by `answer`, which says how many bytes it wrote.
    ///
    /// # Errors
    /// Those of `answer`, and as [`Ring::drain`].
    pub fn serve(
        &mut self,
        token: u32,
        budget: usize,
        mut answer: impl for<'m> FnMut(&'m GuestMemoryMmap, Chain<'m>) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(active) = self.0.as_mut().filter(|_| token == TOKEN) else {
            return Ok(());
        };
        let memory = active.memory.memory();
        active
            .ring
            .drain(&memory, &*active.interrupt, budget, |chain| {
                let head = chain.head;
                Ok((head, answer(&memory, chain)?))
            })
            .map(drop)
    }

    /// Lets go of it; nobody waits for it then.
    pub fn close(&mut self, sources: &mut Sources<'_>) {
        if let Some(active) = self.0.take() {
            active.ring.release(sources);
        }
    }
}
