//! Volumes whose file systems the guest mounts from disks of its own. One serves all containers of the pod that mount it: the
//! first has it plugged, with the last it goes.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brig_agent_protocol::agent::VolumeDisk;
use slog::Logger;
use tokio::sync::Mutex;

use crate::error::{Error, Result};
use crate::guest::vm::{DiskVolume, Vm, shown};
use crate::node::direct_volumes::mount_info::DirectVolume;

/// Such a volume of a pod.
pub(super) struct OnDisk {
    pub(super) wanted: DirectVolume,
    volume: DiskVolume,
    vm: Arc<Vm>,
    logger: Logger,
    uses: AtomicUsize,
    /// The guest has it.
    given: Mutex<bool>,
}

/// One container's use of one. To be given back with [`OnDisk::release`].
pub(super) struct Use {
    /// Index into the spec's mounts.
    pub(super) index: usize,
    /// Where it appears in the container.
    pub(super) destination: String,
    /// What of it is mounted; empty for all.
    pub(super) inside: PathBuf,
    pub(super) volume: Arc<OnDisk>,
}

impl OnDisk {
    /// Nothing is plugged yet.
    pub(super) fn new(wanted: DirectVolume, id: String, vm: Arc<Vm>, logger: Logger) -> Self {
        let file_system = VolumeDisk {
            type_: wanted.file_system.clone(),
            options: wanted.options.clone(),
            has_group: wanted.group.is_some(),
            group: wanted.group.map_or(0, |group| group.gid),
            group_unless_root: wanted.group.is_some_and(|group| group.unless_root),
            ..VolumeDisk::default()
        };
        Self {
            volume: DiskVolume {
                id,
                path: wanted.path.clone(),
                device: wanted.device.clone(),
                readonly: wanted.readonly(),
                file_system,
            },
            wanted,
            vm,
            logger,
            uses: AtomicUsize::new(0),
            given: Mutex::new(false),
        }
    }

    /// The guest's name of it.
    pub(super) fn id(&self) -> &str {
        &self.volume.id
    }

    /// Somebody more uses it.
    pub(super) fn acquire(&self) {
        self.uses.fetch_add(1, Ordering::SeqCst);
    }

    /// Has the guest mount it, unless it has.
    pub(super) async fn ready(&self, destination: &str) -> Result<()> {
        let mut given = self.given.lock().await;
        if *given {
            return Ok(());
        }
        let path = shown(&self.wanted.path);
        let done = self.vm.give_volume(&self.volume, &self.logger).await;
        done.map_err(|error| {
            let message = format!(
                "mount on {destination}: direct volume {path}: {}",
                error.message
            );
            Error::new(error.kind, message)
        })?;
        *given = true;
        Ok(())
    }

    /// Gives a use back. After the last the device is free on the node.
    pub(super) async fn release(&self) {
        if self.uses.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let mut given = self.given.lock().await;
        // A new container may have come while another waited for the lock.
        if *given && self.uses.load(Ordering::SeqCst) == 0 {
            self.vm.take_volume(self.id(), &self.logger).await;
            *given = false;
        }
    }
}
