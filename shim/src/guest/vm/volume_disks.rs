//! Disks whose file systems are volumes of the pod: nobody on the node mounts them, and each is one volume's alone.

use std::path::Path;

use brig_agent_protocol::agent::update_volume_request::Kind;
use brig_agent_protocol::agent::{UpdateVolumeRequest, VolumeRef};
use brig_hypervisor::control::{DiskConfig, DiskPiece, RequestBody};
use nix::sys::stat::fstat;
use slog::{Logger, info, warn};
use ttrpc::context;

use super::books::Of;
use super::held_disks::{DiskVolume, Volume};
use super::{Vm, written_back};
use crate::error::{Error, Result};
use crate::node::direct_volumes::mount_info::is_large_enough;
use crate::node::disk;
use crate::node::image::{self, Image};

/// Bytes of a logical block of a file.
const BLOCK: u32 = 512;
/// The file systems that grow while they are mounted.
const GROWING: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "btrfs"];

impl Vm {
    /// Gives the guest a disk and has its file system mounted as a volume. [`Self::take_volume`] takes it back.
    ///
    /// # Errors
    /// One sentence: the node's, the VMM's or the guest's. Nothing is left of it then.
    pub async fn give_volume(&self, volume: &DiskVolume, logger: &Logger) -> Result<()> {
        let (device, readonly) = (volume.device.clone(), volume.readonly);
        let of = Of::Volume(device.clone());
        if let Some(why) = self.books.under_way(&of) {
            return Err(Error::state(why));
        }
        let opened = tokio::task::spawn_blocking(move || image::open(&device, readonly)).await??;
        let (piece, file, readonly, block_size) = match opened {
            Image::Disk(opened) => {
                let piece = DiskPiece::whole(0);
                (piece, opened.file, opened.readonly, opened.block_size)
            }
            Image::File { file, length, .. } => {
                let piece = DiskPiece {
                    file: 0,
                    length: Some(length),
                };
                (piece, file, true, BLOCK)
            }
        };
        // Of what can grow.
        let numbers = fstat(&file)
            .ok()
            .filter(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFBLK)
            .map(|stat| (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)));
        let size = numbers.and_then(disk::size);
        let config = DiskConfig {
            pieces: vec![piece],
            readonly,
            serial: volume.id.clone(),
            block_size,
        };
        let mut disks = self.disks.lock().await;
        let plugged = self.plug_growing(&mut disks, of, config, file, logger);
        let (function, _) = plugged.await?;
        let mut file_system = volume.file_system.clone();
        file_system.function = function.into();
        disks.volumes.push(Volume {
            id: volume.id.clone(),
            path: volume.path.clone(),
            device: volume.device.clone(),
            readonly,
            function,
            numbers,
            file_system: file_system.clone(),
        });
        // What is on it may take long.
        drop(disks);
        let request = UpdateVolumeRequest {
            id: volume.id.clone(),
            kind: Kind::DISK.into(),
            disk: Some(file_system).into(),
            ..UpdateVolumeRequest::default()
        };
        let answer = self
            .agent()
            .update_volume(context::Context::default(), &request);
        let limit = self.timeouts().setup;
        match self.call_within(limit, "UpdateVolume", answer).await {
            Ok(_) => {
                info!(logger, "a volume is on a disk"; "volume" => &volume.id, "device" => %volume.device.display(),
                    "writable" => !readonly, "function" => function);
                // Nothing could be told to grow that was not mounted yet.
                if !readonly
                    && numbers.and_then(disk::size) != size
                    && let Err(error) = self.grow_volume(&volume.path, 0).await
                {
                    warn!(logger, "a volume did not grow with its disk"; "volume" => &volume.id, "error" => error.message);
                }
                Ok(())
            }
            Err(error) => {
                self.take_volume(&volume.id, logger).await;
                Err(error)
            }
        }
    }

    /// Lets the file system of the volume at `path` have all of its device, as large as that is by now, which must be at
    /// least `least` bytes; how many it is. Whoever asks need not wait for the node to tell of a change, and one that it
    /// never tells of, of an image in a file, is looked for.
    ///
    /// # Errors
    /// `NotFound` if the guest has no volume of this path; `FailedPrecondition` for one that cannot grow, with the reason.
    pub async fn grow_volume(&self, path: &Path, least: u64) -> Result<u64> {
        let volume = {
            let disks = self.disks.lock().await;
            let mut volumes = disks.volumes.iter();
            volumes.find(|volume| volume.path == path).cloned()
        };
        let shown = path.display();
        let volume =
            volume.ok_or_else(|| Error::not_found(format!("the pod has no volume {shown}")))?;
        let refused = |why: String| Error::state(format!("volume {shown}: {why}"));
        let kind = &volume.file_system.type_;
        if !GROWING.contains(&kind.as_str()) {
            let list = GROWING.join(", ");
            let why = format!("a file system of type {kind} does not grow: {list} do");
            return Err(refused(why));
        }
        if volume.readonly {
            return Err(refused("it is read-only, and stays as it is".to_owned()));
        }
        let device = volume.device.display();
        let gone = || refused(format!("its device {device} is gone from the node"));
        let numbers = volume.numbers.ok_or_else(gone)?;
        if volume.device.is_file() {
            tokio::task::spawn_blocking(move || image::follow_file(numbers)).await??;
        }
        let size = disk::size(numbers).ok_or_else(gone)?;
        is_large_enough(&volume.device, size, least).map_err(refused)?;
        let body = RequestBody::Resize {
            function: volume.function,
        };
        if let Err(error) = self.control.request(body, Vec::new()).await {
            return Err(self.explain(error).await);
        }
        let request = volume.growth().ok_or_else(gone)?;
        let answer = self
            .agent()
            .update_volume(context::Context::default(), &request);
        self.call_within(self.timeouts().setup, "UpdateVolume", answer)
            .await?;
        Ok(size)
    }

    /// Takes a volume's disk back, after the guest has let go of its file system. With the VM it is back by itself.
    pub async fn take_volume(&self, id: &str, logger: &Logger) {
        let function = {
            let mut disks = self.disks.lock().await;
            let place = disks.volumes.iter().position(|volume| volume.id == id);
            let volume = place.map(|place| disks.volumes.swap_remove(place));
            disks.rest();
            volume.map(|volume| volume.function)
        };
        let Some(function) = function.filter(|_| self.death().is_none()) else {
            return;
        };
        let request = VolumeRef {
            id: id.to_owned(),
            ..VolumeRef::default()
        };
        let answer = self
            .agent()
            .remove_volume(context::Context::default(), &request);
        // What the guest has kept is written first.
        let limit = self.timeouts.call;
        let removed = self.call_within(limit * written_back::MOST, "RemoveVolume", answer);
        let error = match self.while_disks_get_on(limit, removed).await {
            Some(Ok(_)) => None,
            Some(Err(error)) => Some(error.message),
            None => Some("it did not answer, and its disks stand still".to_owned()),
        };
        if let Some(error) = error {
            warn!(logger, "the guest did not let go of a volume as it should"; "volume" => id, "error" => error);
        }
        if let Err(error) = self.unplug(function).await {
            warn!(logger, "the disk of a volume stays with the VM"; "volume" => id, "error" => error.message);
        }
    }
}
