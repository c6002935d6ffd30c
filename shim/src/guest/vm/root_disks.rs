//! The disks of a container's root file system, where its snapshotter hands over devices and images: all files that are
//! read are one disk, however many layers there are.

use std::io;
use std::os::fd::OwnedFd;

use brig_agent_protocol::agent::{
    IdRange, RootDevice, RootDirectory, RootDisk, RootMount, RootPlace, RootVerity,
};
use brig_hypervisor::control::{DeviceConfig, DiskConfig, DiskPiece, PMEM_START, PmemConfig};
use brig_hypervisor::share;
use slog::{Logger, info, warn};

use super::Vm;
use super::held_disks::GivenRoot;
use super::root_given::RootGiven;
use crate::asked::rootfs::{Place, Plan, Sidecar};
use crate::error::{Error, Kind, Result};
use crate::node::disk::Opened;
use crate::node::image::{self, Image};
use crate::node::verity::{self, Tree};

/// Bytes of a logical block of a disk of files.
const BLOCK: u32 = 512;

/// The images of a plan, open.
struct Images {
    plan: Plan,
    /// Files that are read with their lengths, and which they are.
    files: Vec<(OwnedFd, u64)>,
    identities: Vec<(u64, u64)>,
    disks: Vec<Opened>,
    /// By mount and image.
    places: Vec<Vec<Where>>,
    /// By mount: what its image is checked against.
    trees: Vec<Option<Tree>>,
}

enum Where {
    File(usize),
    Disk(usize),
}

impl Images {
    /// Blocking.
    fn open(plan: Plan) -> Result<Self> {
        let (mut files, mut identities, mut disks) = (Vec::new(), Vec::new(), Vec::new());
        let (mut places, mut trees) = (Vec::new(), Vec::new());
        for mount in &plan.mounts {
            let tree = match &mount.verity {
                Some(sidecar) => tree_of(sidecar)?,
                None => None,
            };
            trees.push(tree);
            let mut of_mount = Vec::new();
            for path in &mount.images {
                of_mount.push(match image::open(path, mount.readonly)? {
                    Image::Disk(opened) => {
                        disks.push(opened);
                        Where::Disk(disks.len() - 1)
                    }
                    Image::File {
                        file,
                        identity,
                        length,
                    } => {
                        files.push((file, length));
                        identities.push(identity);
                        Where::File(files.len() - 1)
                    }
                });
            }
            places.push(of_mount);
        }
        Ok(Self {
            plan,
            files,
            identities,
            disks,
            places,
            trees,
        })
    }
}

fn tree_of(sidecar: &Sidecar) -> Result<Option<Tree>> {
    let tree = verity::read(&sidecar.path)?;
    if tree.is_none() && sidecar.required {
        return Err(Error::new(
            Kind::FailedPrecondition,
            format!(
                "{} is not there, which says what its layer is checked against (dm-verity): remove the image and pull it again",
                sidecar.path.display()
            ),
        ));
    }
    Ok(tree)
}

impl Vm {
    /// Gives the guest the disks of a root file system, for the container `owner`. [`Self::take_disks`] takes them back,
    /// also when this fails.
    ///
    /// # Errors
    /// One sentence: the node's, the VMM's or the guest's.
    pub async fn give_root(&self, plan: Plan, owner: &str, logger: &Logger) -> Result<RootGiven> {
        let opened = tokio::task::spawn_blocking(move || Images::open(plan));
        let images = opened.await??;
        let Images {
            plan,
            files,
            identities,
            disks,
            places,
            trees,
        } = images;
        let mut given = RootGiven::default();
        let lengths: Vec<u64> = files.iter().map(|(_, length)| *length).collect();
        let layers = files.len();
        let mut is_cut = false;
        if layers > 0 {
            let disk = self.give_layers(files, &identities, owner, logger).await?;
            // A single file is a whole disk; in memory it lies behind something.
            is_cut = layers > 1 || disk.memory;
            given.disks.push(RootDisk {
                function: disk.function.into(),
                pieces: if is_cut { lengths } else { Vec::new() },
                start: if disk.memory { PMEM_START } else { 0 },
                memory: disk.memory,
                ..RootDisk::default()
            });
        }
        // The disk of files is the first.
        let before = given.disks.len();
        for disk in disks {
            let disk = self.give_one(disk, owner).await?;
            given.disks.push(RootDisk {
                function: disk.function.into(),
                ..RootDisk::default()
            });
        }
        let device = |place: &Where| {
            let number = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
            let (disk, piece) = match place {
                Where::File(_) if !is_cut => (0, 0),
                Where::File(index) => (0, number(index + 1)),
                Where::Disk(index) => (number(before + index), 0),
            };
            RootDevice {
                disk,
                piece,
                ..RootDevice::default()
            }
        };
        for ((mount, places), tree) in plan.mounts.into_iter().zip(&places).zip(trees) {
            let (upper, work) = mount
                .upper
                .as_ref()
                .map(|(upper, work)| (told(upper), told(work)))
                .unzip();
            let directories = mount.directories.iter().map(|(place, mode)| RootDirectory {
                place: Some(told(place)).into(),
                mode: *mode,
                ..RootDirectory::default()
            });
            let map = mount.map.unwrap_or_default();
            given.mounts.push(RootMount {
                type_: mount.kind,
                devices: places.iter().map(device).collect(),
                options: mount.options,
                lower: mount.lower.iter().map(told).collect(),
                upper: upper.into(),
                work: work.into(),
                directories: directories.collect(),
                users: ranges(&map.users),
                groups: ranges(&map.groups),
                verity: tree.map(checked_by).into(),
                ..RootMount::default()
            });
        }
        info!(logger, "the root file system is on disks"; "container" => owner, "disks" => given.disks.len(),
            "layers" => layers, "in_memory" => given.disks.first().is_some_and(|disk| disk.memory));
        Ok(given)
    }

    /// One disk of files, the same for all containers of the pod that have these.
    async fn give_layers(
        &self,
        files: Vec<(OwnedFd, u64)>,
        identities: &[(u64, u64)],
        owner: &str,
        logger: &Logger,
    ) -> Result<GivenRoot> {
        let (files, lengths): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let pieces = || {
            let pieces = lengths.iter().enumerate();
            pieces
                .map(|(file, length)| DiskPiece {
                    file,
                    length: Some(*length),
                })
                .collect()
        };
        if self.maps_layers {
            let copies: io::Result<Vec<OwnedFd>> = files.iter().map(OwnedFd::try_clone).collect();
            let copies = copies.map_err(|error| Error::io("layers of an image", &error))?;
            let device = DeviceConfig::Pmem(PmemConfig { pieces: pieces() });
            match self
                .hold_root(Some(identities), device, copies, owner)
                .await
            {
                Ok(given) => return Ok(given),
                Err(error) if self.death().is_some() => return Err(error),
                Err(error) => {
                    warn!(logger, "the layers of an image are a disk, and not memory"; "container" => owner,
                        "reason" => error.message);
                }
            }
        }
        let config = DiskConfig {
            pieces: pieces(),
            readonly: true,
            serial: "layers".to_owned(),
            block_size: BLOCK,
        };
        self.hold_root(Some(identities), DeviceConfig::Disk(config), files, owner)
            .await
    }

    async fn give_one(&self, disk: Opened, owner: &str) -> Result<GivenRoot> {
        let config = DiskConfig {
            pieces: vec![DiskPiece::whole(0)],
            readonly: disk.readonly,
            serial: "root".to_owned(),
            block_size: disk.block_size,
        };
        self.hold_root(None, DeviceConfig::Disk(config), vec![disk.file], owner)
            .await
    }
}

fn checked_by(tree: Tree) -> RootVerity {
    RootVerity {
        root_hash: tree.root_hash,
        hash_offset: tree.hash_offset,
        ..RootVerity::default()
    }
}

fn ranges(of: &[share::IdRange]) -> Vec<IdRange> {
    let told = |range: &share::IdRange| IdRange {
        inside: range.stored,
        outside: range.seen,
        size: range.length,
        ..IdRange::default()
    };
    of.iter().map(told).collect()
}

fn told(place: &Place) -> RootPlace {
    let mount = place.mount.map_or(0, |index| index + 1);
    RootPlace {
        mount: u32::try_from(mount).unwrap_or(u32::MAX),
        path: place.path.clone(),
        ..RootPlace::default()
    }
}
