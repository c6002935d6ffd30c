//! Which block devices of the node a VM has as disks, and for whom.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use brig_agent_protocol::agent::update_volume_request::Kind;
use brig_agent_protocol::agent::{UpdateVolumeRequest, VolumeDisk};
use tokio::task::JoinHandle;

use super::shown::Show;
use crate::node::disk::{self, Numbers};

/// The disks of a VM.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pub(super) held: BTreeMap<Key, Held>,
    pub(super) roots: Vec<Root>,
    pub(super) volumes: Vec<Volume>,
    /// While there is one.
    pub(super) watch: Option<Watch>,
}

/// Which device, and whether it was asked for to be written to: the guest cannot be told that a disk has become
/// writable.
pub(super) type Key = (Numbers, bool);

/// A disk and who has it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) disk: Disk,
    /// The containers that have it.
    pub(super) owners: BTreeSet<String>,
}

/// A disk that root file systems are on.
#[derive(Debug)]
pub(super) struct Root {
    /// The files of one that several containers may have, by device and inode.
    pub(super) files: Option<Vec<(u64, u64)>>,
    pub(super) given: GivenRoot,
    pub(super) owners: BTreeSet<String>,
}

/// How the guest has such a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GivenRoot {
    /// On the guest's bus.
    pub(super) function: u8,
    /// As memory.
    pub(super) memory: bool,
}

/// A disk whose file system is a volume.
#[derive(Debug, Clone)]
pub(super) struct Volume {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) device: PathBuf,
    pub(super) readonly: bool,
    pub(super) function: u8,
    /// Of the node's device, unless it is a file.
    pub(super) numbers: Option<Numbers>,
    /// As the agent was told.
    pub(super) file_system: VolumeDisk,
}

impl Volume {
    /// The request by which it grows with its disk; none if the disk's size cannot be told.
    pub(super) fn growth(&self) -> Option<UpdateVolumeRequest> {
        Some(UpdateVolumeRequest {
            id: self.id.clone(),
            kind: Kind::DISK.into(),
            size: disk::size(self.numbers?)?,
            disk: Some(self.file_system.clone()).into(),
            ..UpdateVolumeRequest::default()
        })
    }
}

/// A volume on a disk, as it is asked for.
#[derive(Debug, Clone)]
pub struct DiskVolume {
    /// The guest's name of it.
    pub id: String,
    /// What it is called on the node.
    pub path: PathBuf,
    /// The node's block device, or an image in a file.
    pub device: PathBuf,
    /// Nothing is to be written.
    pub readonly: bool,
    /// What the agent mounts; the function is not known yet.
    pub file_system: VolumeDisk,
}

/// What an operator is told of one that the guest has.
#[derive(Debug, Clone)]
pub struct VolumeShown {
    /// The guest's name of it.
    pub id: String,
    /// What it is called on the node.
    pub path: PathBuf,
    /// What it is on.
    pub device: PathBuf,
    /// The type of what is on it.
    pub file_system: String,
    /// Nothing can be written.
    pub readonly: bool,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// On the guest's bus.
    pub function: u8,
    /// Its name below the guest's /dev, as the agent says.
    pub name: String,
}

/// Follows the node's devices until it is dropped.
#[derive(Debug)]
pub(super) struct Watch(pub(super) JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What an operator is told of a VM's disks.
#[derive(Debug, Clone, Default)]
pub(super) struct DisksShown {
    /// Block devices of the node.
    pub(super) devices: Vec<DiskShown>,
    pub(super) volumes: Vec<VolumeShown>,
}

/// What an operator is told of a block device of the node that the guest has as a disk.
#[derive(Debug, Clone)]
pub struct DiskShown {
    /// Of the node.
    pub numbers: Numbers,
    /// It was asked for to be written to.
    pub writable: bool,
    /// Below the guest's /dev: its agent's word.
    pub name: String,
    /// The containers that asked.
    pub containers: Vec<String>,
}

impl Show for Disks {
    type Seen = DisksShown;

    fn show(&self) -> DisksShown {
        let devices = self.held.iter().map(|((numbers, write), held)| DiskShown {
            numbers: *numbers,
            writable: *write,
            name: held.disk.name.clone(),
            containers: held.owners.iter().cloned().collect(),
        });
        let volumes = self.volumes.iter().map(|volume| VolumeShown {
            id: volume.id.clone(),
            path: volume.path.clone(),
            device: volume.device.clone(),
            file_system: volume.file_system.type_.clone(),
            readonly: volume.readonly,
        });
        DisksShown {
            devices: devices.collect(),
            volumes: volumes.collect(),
        }
    }
}

impl Disks {
    /// One for whoever wants to read may be one that others write to: the rules hold a reader.
    pub(super) fn find(&mut self, numbers: Numbers, write: bool) -> Option<&mut Held> {
        let key = if write || self.held.contains_key(&(numbers, true)) {
            (numbers, true)
        } else {
            (numbers, false)
        };
        self.held.get_mut(&key)
    }

    /// The functions of a device's disks, or of all that can grow.
    pub(super) fn of(&self, numbers: Option<Numbers>) -> impl Iterator<Item = u8> {
        let is = move |other: &Numbers| numbers.is_none_or(|numbers| *other == numbers);
        let held = self.held.iter().filter(move |((other, _), _)| is(other));
        let held = held.map(|(_, held)| held.disk.function);
        held.chain(self.volumes_of(numbers).map(|volume| volume.function))
    }

    /// The volumes on a device, or on all that can grow.
    pub(super) fn volumes_of(&self, numbers: Option<Numbers>) -> impl Iterator<Item = &Volume> {
        let is = move |other: &Numbers| numbers.is_none_or(|numbers| *other == numbers);
        let volumes = self.volumes.iter();
        volumes.filter(move |volume| volume.numbers.as_ref().is_some_and(is))
    }

    /// Nothing is followed if there is nothing to be.
    pub(super) fn rest(&mut self) {
        if self.held.is_empty() && self.volumes.is_empty() {
            self.watch = None;
        }
    }
}
