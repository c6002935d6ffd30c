//! virtio-fs (virtio 1.3 §5.11): the guest's view of `/shared`, one FUSE request a descriptor chain.
//!
//! The device and its configuration space are here, its queues in [`queues`]. fuse-backend-rs reads and writes the protocol
//! but for what is in [`requests`] and [`read`]; what a request does is [`served`]'s. The device is alone on its worker
//! thread, which does what takes no time itself and hands the rest to helpers ([`slow`]), so that a volume that hangs
//! holds up no other. No DAX window, no notification queue.
//!
//! The guest is hostile: a broken ring or chain needs a reset, a broken FUSE message is answered with an
//! error or an empty buffer. What the guest can reach is bounded by the mounts below the share's root
//! and by the thread's jail, not by this code alone.

mod answer;
mod queues;
mod read;
mod requests;
mod served;
mod slow;
mod xattr;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::epoll::EventSet;

use brig_agent_protocol::OWN_DIRECTORY;

use super::helpers::Helpers;
use super::{Activation, ConfigSpace, DeviceError, Sources, VirtioDevice};
use answer::Serving;
use queues::{Active, Desk, Job, Queues};
use served::Served;
use slow::Slow;

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
/// How long after a request FORGETs, for which nobody waits, may wait: the guest is not asked to say that it has put one
/// into its queue.
const PUT_OFF: Duration = Duration::from_millis(10);

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
    serving: Arc<Serving>,
    queues: Arc<Queues>,
    helpers: Option<Helpers<Job>>,
    slow: Slow,
}

/// Reaches the file server from the control thread.
#[derive(Clone)]
pub struct FsHandle {
    served: Arc<Served>,
    /// The file server of what is the pod's own, below this one's root.
    own: Option<Arc<Served>>,
}

impl FsHandle {
    /// Drops every inode and open file that the server holds at and below this path of the share, so that
    /// a mount there can be released. The guest must have unmounted it; whatever it still asks about the
    /// files is answered with an error.
    pub fn forget(&self, path: &str) {
        // A guest may have looked at what is its own by way of both.
        self.served.forget_path(path);
        if let Some((own, below)) = self.own_at(path) {
            own.forget_path(below);
        }
    }

    /// What is at this path of the share, now or later, may never answer, or something that is mounted in it: helpers ask it
    /// alone, also when the guest first looks at it. Until the path is forgotten.
    pub fn expect_remote(&self, path: &str) {
        self.served.expect_remote(path);
        if let Some((own, below)) = self.own_at(path) {
            own.expect_remote(below);
        }
    }

    /// Who else serves a path, and as what.
    fn own_at<'a>(&self, path: &'a str) -> Option<(&Served, &'a str)> {
        let below = path.strip_prefix(OWN_DIRECTORY)?.strip_prefix('/')?;
        Some((self.own.as_deref()?, below))
    }

    /// How many requests there were.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let own = self.own.as_ref().map_or(0, |own| own.requests());
        self.served.requests() + own
    }

    /// Sets what is called, on the file server's thread, when the guest's inodes have taken three quarters
    /// of the descriptors: the guest should drop its inode cache, or it will meet `ENFILE`. Repeated
    /// now and then while that lasts. The first caller stays.
    pub fn on_pressure(&self, told: impl Fn() + Send + Sync + 'static) {
        let told = Arc::new(told);
        if let Some(own) = &self.own {
            let told = Arc::clone(&told);
            own.on_pressure(Box::new(move || told()));
        }
        self.served.on_pressure(Box::new(move || told()));
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

    /// A second device, which serves what is the pod's own in [`OWN_DIRECTORY`] of the share, under `tag`: there the guest's
    /// kernel may keep what is written. The share's handle is for both from now on.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn of_own(tag: &str, share: &mut FsHandle) -> Result<Self, FsError> {
        let root = Path::new(crate::jail::SHARED).join(OWN_DIRECTORY);
        let (device, handle) = Self::serving(tag, &root, true)?;
        share.own = Some(handle.served);
        Ok(device)
    }

    /// Serves any directory: for tests.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn with_root(tag: &str, root: &Path) -> Result<(Self, FsHandle), FsError> {
        Self::serving(tag, root, false)
    }

    fn serving(tag: &str, root: &Path, own: bool) -> Result<(Self, FsHandle), FsError> {
        if tag.is_empty() || tag.len() > TAG_LENGTH {
            return Err(FsError::Tag {
                tag: tag.chars().take(64).collect(),
            });
        }
        let mut config = vec![0; TAG_LENGTH];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config.extend_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let served = Arc::new(Served::new(root, own).map_err(|source| FsError::Root {
            root: root.display().to_string(),
            source,
        })?);
        let device = Self {
            config: Arc::new(config),
            serving: Serving::new(&served),
            served: Arc::clone(&served),
            queues: Arc::default(),
            helpers: None,
            slow: Slow::default(),
        };
        Ok((device, FsHandle { served, own: None }))
    }

    /// With threads for what takes long, which are started when there is such a thing. Without, the device's thread does
    /// everything.
    #[must_use]
    pub fn with_helpers(mut self) -> Self {
        let queues = Arc::clone(&self.queues);
        self.helpers = Some(Helpers::new(
            "fs-io",
            slow::HELPERS,
            served::helper_begins,
            move |job| queues.help(job),
        ));
        self
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
        for (token, ring) in [HIPRIO, REQUEST].into_iter().zip(&opened.rings) {
            ring.wait_for_edges(u32::from(token), sources)?;
        }
        self.queues
            .activate(Active::new(opened.memory, opened.interrupt, opened.rings));
        Ok(())
    }

    fn process(
        &mut self,
        token: u32,
        _events: EventSet,
        _sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        if token == u32::from(HIPRIO) {
            return self.queues.forgets(&self.serving);
        }
        self.queues.requests(&mut Desk {
            serving: &self.serving,
            helpers: self.helpers.as_ref(),
            slow: &mut self.slow,
        })
    }

    fn puts_off(&self) -> Option<Duration> {
        self.queues.is_busy().then_some(PUT_OFF)
    }

    fn catch_up(&mut self) -> Result<(), DeviceError> {
        self.served
            .requests_pause()
            .map_err(|source| DeviceError::Host {
                device: NAME,
                source,
            })?;
        self.queues.catch_up(&self.serving)
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        if let Some(helpers) = &self.helpers {
            // The driver has given up what nobody has begun.
            drop(helpers.settle());
        }
        self.slow = Slow::default();
        self.queues.deactivate(sources);
        // The next driver starts with INIT and knows no inode.
        // Without a root every later request fails.
        let _ = self.served.reset();
        self.serving = Serving::new(&self.served);
    }
}

#[cfg(test)]
mod tests;
