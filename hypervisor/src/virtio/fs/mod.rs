//! virtio-fs (virtio 1.3 §5.11): the guest's view of `/shared`, one FUSE request a descriptor chain.
//!
//! The queues and the configuration space are here. fuse-backend-rs reads and writes the protocol but for
//! what is in [`requests`]; what a request does is [`served`]'s. The device is alone on its worker thread, so blocking file I/O is fine; it may not be
//! shared with other devices. No DAX window, no notification queue.
//!
//! The guest is hostile: a broken ring or chain needs a reset, a broken FUSE message is answered with an
//! error or an empty buffer. What the guest can reach is bounded by the mounts below the share's root
//! and by the thread's jail, not by this code alone.

mod requests;
mod served;
mod xattr;

use std::io;
use std::path::Path;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::ring::Ring;
use super::{Activation, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources, VirtioDevice};
use requests::Session;
use served::Served;

const NAME: &str = "fs";
/// §5.11.4: `tag[36]`, `num_request_queues`.
const TAG_LENGTH: usize = 36;
const REQUEST_QUEUES: u32 = 1;
/// §5.11.2: FORGET and INTERRUPT, which must not wait behind requests.
const HIPRIO: u16 = 0;
const HIPRIO_SIZE: u16 = 128;
/// All other requests.
const REQUEST: u16 = 1;
/// A request of 1 MiB is 256 pages and some headers.
const REQUEST_SIZE: u16 = 512;
/// Requests served before the worker looks at its other events again.
const BATCH: usize = 64;

/// Why there is no file server.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit the configuration space.
    #[error("the share's tag {tag:?} must have 1 to {TAG_LENGTH} bytes")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// The directory cannot be served.
    #[error("cannot serve {root}: {source}")]
    Root {
        /// The directory.
        root: String,
        /// What the host said.
        source: io::Error,
    },
}

/// The device.
pub struct Fs {
    config: Arc<Vec<u8>>,
    served: Arc<Served>,
    session: Session,
    server: Server<Arc<Served>>,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    hiprio: Ring,
    request: Ring,
}

/// Reaches the file server from the control thread.
#[derive(Clone)]
pub struct FsHandle {
    served: Arc<Served>,
}

impl FsHandle {
    /// Drops every inode and open file that the server holds at and below this path of the share, so that
    /// a mount there can be released. The guest must have unmounted it; whatever it still asks about the
    /// files is answered with an error.
    pub fn forget(&self, path: &str) {
        self.served.forget_path(path);
    }

    /// Sets what is called, on the file server's thread, when the guest's inodes have taken three quarters
    /// of the descriptors: the guest should drop its inode cache, or it will meet `ENFILE`. Repeated
    /// now and then while that lasts. The first caller stays.
    pub fn on_pressure(&self, told: impl Fn() + Send + Sync + 'static) {
        self.served.on_pressure(Box::new(told));
    }
}

impl Fs {
    /// Serves [`crate::jail::SHARED`] under `tag`. To be called inside the jail: `/proc` must be the
    /// jail's own.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(tag: &str) -> Result<(Self, FsHandle), FsError> {
        Self::with_root(tag, Path::new(crate::jail::SHARED))
    }

    /// Serves any directory: for tests.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn with_root(tag: &str, root: &Path) -> Result<(Self, FsHandle), FsError> {
        if tag.is_empty() || tag.len() > TAG_LENGTH {
            return Err(FsError::Tag {
                tag: tag.chars().take(64).collect(),
            });
        }
        let mut config = vec![0; TAG_LENGTH];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config.extend_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let served = Arc::new(Served::new(root).map_err(|source| FsError::Root {
            root: root.display().to_string(),
            source,
        })?);
        let device = Self {
            config: Arc::new(config),
            session: Session::default(),
            server: Server::new(Arc::clone(&served)),
            served: Arc::clone(&served),
            active: None,
        };
        Ok((device, FsHandle { served }))
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        // The binding is u32; the value is 26.
        u16::try_from(VIRTIO_ID_FS).unwrap_or_default()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![HIPRIO_SIZE, REQUEST_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as Arc<dyn ConfigSpace>
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let opened = activation.open(NAME, sources)?;
        let [hiprio, request] = opened.rings;
        for (token, ring) in [(HIPRIO, &hiprio), (REQUEST, &request)] {
            ring.wait_for_edges(u32::from(token), sources)?;
        }
        self.active = Some(Active {
            memory: opened.memory,
            interrupt: opened.interrupt,
            hiprio,
            request,
        });
        Ok(())
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let ring = if token == u32::from(HIPRIO) {
            &mut active.hiprio
        } else {
            &mut active.request
        };
        let memory = active.memory.memory();
        let answerer = Answerer {
            server: &self.server,
            served: &self.served,
            session: &self.session,
        };
        answerer.serve(ring, &memory, active.interrupt.as_ref())
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        if let Some(active) = self.active.take() {
            active.hiprio.release(sources);
            active.request.release(sources);
        }
        // The next driver starts with INIT and knows no inode.
        // Without a root every later request fails.
        let _ = self.served.reset();
        self.session = Session::default();
        self.server = Server::new(Arc::clone(&self.served));
    }
}

/// What a request is served by.
struct Answerer<'a> {
    server: &'a Server<Arc<Served>>,
    served: &'a Served,
    session: &'a Session,
}

impl Answerer<'_> {
    fn serve(
        &self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceError> {
        ring.disable_kick(memory)?;
        let mut left = BATCH;
        loop {
            while let Some(descriptors) = ring.pop_descriptors(memory)? {
                let head = descriptors.head_index();
                // Checked once as a whole: the library stops at a broken link as if it were the end.
                Chain::parse(descriptors.clone(), memory).map_err(|error| ring.guest(error))?;
                let written = self.answer(memory, descriptors);
                self.served.request_ended();
                ring.push(memory, head, written)?;
                // Each request is its own wait in the guest, and the next one may take long.
                ring.notify(memory, interrupt)?;
                left -= 1;
                if left == 0 {
                    return ring.call_again();
                }
            }
            if !ring.enable_kick(memory)? {
                return Ok(());
            }
            ring.disable_kick(memory)?;
        }
    }

    /// Serves one request; returns the bytes of its reply, 0 for none.
    fn answer(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: DescriptorChain<&GuestMemoryMmap>,
    ) -> u32 {
        let read = |from| Reader::from_descriptor_chain::<&GuestMemoryMmap>(memory, from);
        let writer = VirtioFsWriter::new::<&GuestMemoryMmap>(memory, descriptors.clone());
        // A buffer over the end of a region of RAM: no driver does that.
        let (Ok(mut reader), Ok(writer)) = (read(descriptors.clone()), writer) else {
            return 0;
        };
        // Too short for a header: there is nobody to answer.
        let Ok(header) = reader.read_obj::<InHeader>() else {
            return 0;
        };
        if requests::knows(header.opcode) {
            return requests::answer(self.served, self.session, header, reader, writer);
        }
        // The library reads the header again, and believes only what it reads itself.
        let Ok(reader) = read(descriptors) else {
            return 0;
        };
        self.server
            .handle_message(reader, Writer::VirtioFs(writer), None, None)
            .ok()
            .and_then(|written| u32::try_from(written).ok())
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
