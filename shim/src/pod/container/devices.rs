//! Devices of the node that a container asks for in its specification: as device plugins and DRA drivers put them there
//! (VFIO), and block devices, as volumes without a file system are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use brig_agent_protocol::agent::{GivenDevice, GivenDisk, MountSource};
use slog::Logger;

use super::creation::Creation;
use crate::asked::spec::{Access, Device};
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::node::disk::{self, Numbers, Owner};
use crate::node::vfio::{Named, Node};
use crate::pod::volume::DiskMount;

/// What a container asks for.
pub(super) struct Asked {
    id: String,
    /// Entries of `linux.devices`.
    devices: Vec<Device>,
    privileged: bool,
    blocks: Vec<Block>,
    /// The handler's image of drivers.
    bundle: Option<PathBuf>,
}

/// A block device, by an entry or a mount.
struct Block {
    /// For messages.
    what: String,
    /// Where, of an entry.
    path: Option<String>,
    numbers: Numbers,
    access: Access,
    /// Of a mount: its index.
    index: Option<u32>,
    /// Likewise, the node's owner.
    owner: Owner,
}

/// What the agent is to be told.
#[derive(Default)]
pub(super) struct Given {
    pub(super) devices: Vec<GivenDevice>,
    pub(super) disks: Vec<GivenDisk>,
    /// Mounts of disks.
    pub(super) sources: Vec<MountSource>,
}

impl Asked {
    /// By a container's specification, and by those of its mounts that are block devices.
    pub(super) fn by(creation: &Creation, mounts: Vec<DiskMount>, bundle: Option<PathBuf>) -> Self {
        let spec = &creation.spec;
        let entries = spec.devices().iter().filter_map(|device| {
            let (major, minor) = device.block()?;
            Some(Block {
                what: format!("linux.devices {} (b {major}:{minor})", device.path),
                path: Some(device.path.clone()),
                numbers: (major, minor),
                access: spec.block_access((major, minor)),
                index: None,
                owner: Owner::default(),
            })
        });
        let mounts = mounts.into_iter().map(|mount| {
            let mut access = spec.block_access(mount.numbers);
            access.write &= !mount.readonly;
            Block {
                what: format!("mount on {}", mount.destination),
                path: None,
                numbers: mount.numbers,
                access,
                index: Some(mount.index),
                owner: mount.owner,
            }
        });
        Self {
            id: creation.id.clone(),
            devices: spec.devices().to_vec(),
            privileged: spec.is_privileged(),
            blocks: entries.chain(mounts).collect(),
            bundle,
        }
    }

    /// Gives it to the VM. It is taken back by [`Vm::take_groups`] and [`Vm::take_disks`], also when this fails.
    ///
    /// # Errors
    /// One sentence with the fix.
    pub(super) async fn give(mut self, vm: Arc<Vm>, logger: Logger) -> Result<Given> {
        let mut given = Given::default();
        // A privileged one sees all that the guest has.
        if !self.privileged {
            let functions = vm.devices_of_pod(self.bundle.as_deref()).await?;
            if !functions.is_empty() {
                given.devices.push(GivenDevice {
                    functions: functions.into_iter().map(u32::from).collect(),
                    ..GivenDevice::default()
                });
            }
        }
        // Most containers ask for none, and then nothing is looked at.
        if self.devices.is_empty() && self.blocks.is_empty() {
            return Ok(given);
        }
        let looked = tokio::task::spawn_blocking(move || {
            let named = self.look();
            (self, named)
        });
        let (asked, named) = looked
            .await
            .map_err(|error| Error::internal(format!("a worker has ended: {error}")))?;
        for (path, named) in named {
            let functions = match named.group() {
                None => Vec::new(),
                Some(group) => {
                    let bundle = asked.bundle.as_deref();
                    vm.give_group(group, &asked.id, bundle, &logger).await?
                }
            };
            given.devices.push(GivenDevice {
                path,
                functions: functions.into_iter().map(u32::from).collect(),
                ..GivenDevice::default()
            });
        }
        asked.give_disks(&vm, &mut given, &logger).await?;
        Ok(given)
    }

    async fn give_disks(&self, vm: &Vm, given: &mut Given, logger: &Logger) -> Result<()> {
        for block in &self.blocks {
            if !block.access.read && !block.access.write {
                let Block { what, numbers, .. } = block;
                return Err(Error::invalid(format!(
                    "{what}: no device rule lets the container read or write block device {}:{} of the node; ask for it \
                     with permissions r or rw, as a volumeDevice has them",
                    numbers.0, numbers.1
                )));
            }
        }
        for block in &self.blocks {
            let mut same = self
                .blocks
                .iter()
                .filter(|other| other.numbers == block.numbers);
            let write = same.any(|other| other.access.write);
            let disk = vm.give_disk(block.numbers, write, &self.id, logger).await;
            let disk = disk.map_err(|error| {
                Error::new(error.kind, format!("{}: {}", block.what, error.message))
            })?;
            if let Some(index) = block.index {
                given.sources.push(MountSource {
                    index,
                    device: disk.name,
                    ..MountSource::default()
                });
            }
            let (major, minor) = block.numbers;
            let Owner { uid, gid, mode } = block.owner;
            given.disks.push(GivenDisk {
                function: disk.function.into(),
                major,
                minor,
                mode,
                uid,
                gid,
                ..GivenDisk::default()
            });
        }
        Ok(())
    }

    /// Those of the entries that are VFIO's. Of a privileged container's, which are all of the node's devices, none
    /// counts but a block device that the node does not have at that path: that one was asked for. Blocking.
    fn look(&mut self) -> Vec<(String, Named)> {
        if self.privileged {
            self.blocks.retain(|block| match &block.path {
                Some(path) => {
                    disk::at(Path::new(path)).is_none_or(|(numbers, _)| numbers != block.numbers)
                }
                None => true,
            });
            return Vec::new();
        }
        named(&Node::new(), &self.devices)
    }
}

/// Those of the entries that are VFIO's; a group that is named twice, as a device and as a group, counts once.
fn named(node: &Node, asked: &[Device]) -> Vec<(String, Named)> {
    let mut found: Vec<(String, Named)> = Vec::new();
    for device in asked {
        let Some(named) = device.character().and_then(|numbers| node.named(numbers)) else {
            continue;
        };
        let number = |named: Named| named.group().map(|(number, _)| number);
        let again = found
            .iter()
            .any(|(_, other)| number(*other) == number(named));
        let named = if again { Named::Interface } else { named };
        found.push((device.path.clone(), named));
    }
    found
}
