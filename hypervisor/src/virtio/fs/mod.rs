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
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::ring::{Descriptors, Ring};
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
/// How long nobody is told what nobody waits for, while requests come: the guest is not asked to say that it has put
/// a FORGET into its queue, and hears of a closed file with the next answer.
const PUT_OFF: Duration = Duration::from_millis(10);
/// FORGETs and closed files that are put off, at most.
const MOST_PUT_OFF: u16 = 32;
/// RELEASE and RELEASEDIR.
const CLOSING: [u32; 2] = [18, 29];

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
    /// Requests came a moment ago, so things are put off.
    busy: bool,
    /// Closed files that the guest has not been told of.
    untold: u16,
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

    /// How many requests there were.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.served.requests()
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
            busy: false,
            untold: 0,
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
        let answerer = Answerer {
            server: &self.server,
            served: &self.served,
            session: &self.session,
        };
        if token == u32::from(HIPRIO) {
            active.forgets(&answerer)
        } else {
            active.requests(&answerer)
        }
    }

    fn puts_off(&self) -> Option<Duration> {
        let busy = self.active.as_ref().is_some_and(|active| active.busy);
        busy.then_some(PUT_OFF)
    }

    fn catch_up(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let answerer = Answerer {
            server: &self.server,
            served: &self.served,
            session: &self.session,
        };
        active.catch_up(&answerer)
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

impl Active {
    fn requests(&mut self, answerer: &Answerer<'_>) -> Result<(), DeviceError> {
        let memory = self.memory.memory().into_inner();
        if !std::mem::replace(&mut self.busy, true) {
            self.hiprio.disable_kick(&memory)?;
        }
        self.request.disable_kick(&memory)?;
        let mut left = BATCH;
        loop {
            while let Some(descriptors) = self.request.pop_descriptors(&memory)? {
                let answered = answerer.serve(&mut self.request, &memory, descriptors)?;
                if answered == Some(Waits::Nobody) && self.untold < MOST_PUT_OFF {
                    self.untold += 1;
                } else {
                    // Each request is its own wait in the guest, and the next one may take long.
                    self.request.notify(&memory, self.interrupt.as_ref())?;
                    self.untold = 0;
                }
                left -= 1;
                if left == 0 {
                    return self.request.call_again();
                }
            }
            if !self.request.enable_kick(&memory)? {
                break;
            }
            self.request.disable_kick(&memory)?;
        }
        if self.hiprio.pending(&memory)? >= MOST_PUT_OFF {
            self.some_forgets(answerer, &memory)?;
        }
        Ok(())
    }

    /// FORGETs that are there, so many that other events do not have to wait; true if more may be.
    fn some_forgets(
        &mut self,
        answerer: &Answerer<'_>,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<bool, DeviceError> {
        for _ in 0..BATCH {
            let Some(descriptors) = self.hiprio.pop_descriptors(memory)? else {
                self.hiprio.notify(memory, self.interrupt.as_ref())?;
                return Ok(false);
            };
            answerer.serve(&mut self.hiprio, memory, descriptors)?;
        }
        self.hiprio.notify(memory, self.interrupt.as_ref())?;
        Ok(true)
    }

    fn forgets(&mut self, answerer: &Answerer<'_>) -> Result<(), DeviceError> {
        if self.busy {
            // The last one that the guest was asked to tell of.
            return Ok(());
        }
        let memory = self.memory.memory().into_inner();
        self.hiprio.disable_kick(&memory)?;
        loop {
            if self.some_forgets(answerer, &memory)? {
                return self.hiprio.call_again();
            }
            if !self.hiprio.enable_kick(&memory)? {
                return Ok(());
            }
            self.hiprio.disable_kick(&memory)?;
        }
    }

    fn catch_up(&mut self, answerer: &Answerer<'_>) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        self.busy = false;
        self.untold = 0;
        let restored = Served::requests_pause();
        restored.map_err(|source| DeviceError::Host {
            device: NAME,
            source,
        })?;
        self.request.notify(&memory, self.interrupt.as_ref())?;
        self.forgets(answerer)
    }
}

/// Whether somebody in the guest waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Somebody,
    Nobody,
}

impl Answerer<'_> {
    /// Serves one chain and returns it; tells who waits for it, if it is a request.
    fn serve(
        &self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
    ) -> Result<Option<Waits>, DeviceError> {
        let head = descriptors.head_index();
        // Checked once as a whole: the library stops at a broken link as if it were the end.
        Chain::parse(descriptors.clone(), memory).map_err(|error| ring.guest(error))?;
        let (written, waits) = self.answer(memory, descriptors).unzip();
        self.served.request_ended();
        ring.push(memory, head, written.unwrap_or(0))?;
        Ok(waits)
    }

    /// Serves one request; the bytes of its reply, 0 for none, and who waits for it. None for what is no request.
    fn answer(&self, memory: &GuestMemoryMmap, descriptors: Descriptors) -> Option<(u32, Waits)> {
        let read = |from| Reader::from_descriptor_chain::<Arc<GuestMemoryMmap>>(memory, from);
        let writer = VirtioFsWriter::new::<Arc<GuestMemoryMmap>>(memory, descriptors.clone());
        // A buffer over the end of a region of RAM: no driver does that.
        let (mut reader, writer) = (read(descriptors.clone()).ok()?, writer.ok()?);
        // Too short for a header: there is nobody to answer.
        let header = reader.read_obj::<InHeader>().ok()?;
        let waits = if CLOSING.contains(&header.opcode) {
            Waits::Nobody
        } else {
            Waits::Somebody
        };
        // Never as somebody else than is meant.
        self.served.request_begins(header.opcode).ok()?;
        if requests::knows(header.opcode) {
            let written = requests::answer(self.served, self.session, header, reader, writer);
            return Some((written, waits));
        }
        // The library reads the header again, and believes only what it reads itself.
        let reader = read(descriptors).ok()?;
        let written = self
            .server
            .handle_message(reader, Writer::VirtioFs(writer), None, None)
            .ok()
            .and_then(|written| u32::try_from(written).ok())
            .unwrap_or(0);
        Some((written, waits))
    }
}

#[cfg(test)]
mod tests;
