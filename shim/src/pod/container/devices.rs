//! Devices of the node that a container asks for in its specification: as device plugins and DRA drivers put them there
//! (VFIO), and block devices, as volumes without a file system are.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use brig_agent_protocol::agent::{GivenDevice, GivenDisk, MountSource};
use slog::Logger;

use super::creation::Creation;
use super::privileged;
use crate::asked::spec::{Access, Device};
use crate::error::{Error, Kind, Result};
use crate::guest::vm::Vm;
use crate::node::cdi::{self, Edits, Names};
use crate::node::disk::{Numbers, Owner};
use crate::node::vfio::{Named, Node};
use crate::pod::volume::DiskMount;

/// What a container asks for.
pub(super) struct Asked {
    id: String,
    /// Entries of `linux.devices`.
    devices: Vec<Device>,
    privileged: bool,
    /// CDI names of its annotations.
    names: Vec<String>,
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
    /// Likewise, the node's owner and mode, with its type. An entry has its own in the specification, and none here.
    owner: Owner,
}

/// What the agent is to be told.
#[derive(Default)]
pub(super) struct Given {
    pub(super) devices: Vec<GivenDevice>,
    pub(super) disks: Vec<GivenDisk>,
    /// Mounts of disks.
    pub(super) sources: Vec<MountSource>,
    /// Variables.
    pub(super) env: Vec<String>,
}

/// A device that is VFIO's.
struct Found {
    /// Of its entry; empty if a CDI name stands for it.
    path: String,
    named: Named,
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
                // A node that nobody may open is shown as that, and is no entry's.
                owner: Owner {
                    mode: mount.owner.mode | libc::S_IFBLK,
                    ..mount.owner
                },
            }
        });
        Self {
            id: creation.id.clone(),
            devices: spec.devices().to_vec(),
            privileged: spec.is_privileged(),
            names: cdi::asked(spec.annotations()),
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
        if self.devices.is_empty() && self.blocks.is_empty() && self.names.is_empty() {
            return Ok(given);
        }
        let looked = tokio::task::spawn_blocking(move || {
            let looked = self.look()?;
            Ok::<_, Error>((self, looked))
        });
        let (asked, (found, env)) = looked.await??;
        given.env = env;
        for Found { path, named } in found {
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

    /// Those of the entries that are VFIO's. Of a privileged container's only those count that were asked for. Blocking.
    fn look(&mut self) -> Result<(Vec<Found>, Vec<String>)> {
        if self.privileged {
            self.devices = privileged::asked(&self.devices, node_has);
            let mut asked: Vec<_> = self.devices.iter().collect();
            self.blocks.retain(|block| {
                let is_it = |device: &&Device| {
                    device.block() == Some(block.numbers)
                        && block.path.as_ref() == Some(&device.path)
                };
                let place = asked.iter().position(is_it);
                place.map(|place| asked.swap_remove(place)).is_some() || block.path.is_none()
            });
        }
        let node = Node::new();
        let mut found = named(&node, &self.devices);
        let env = add_names(&self.names, &node, &Names::default(), &mut found)?;
        Ok((found, env))
    }
}

/// Whether the node has the device at its path.
fn node_has(device: &Device) -> bool {
    let Ok(found) = fs::metadata(&device.path) else {
        return false;
    };
    let numbers = Some((libc::major(found.rdev()), libc::minor(found.rdev())));
    let kind = found.file_type();
    (kind.is_block_device() && device.block() == numbers)
        || (kind.is_char_device() && device.character() == numbers)
}

fn group(named: Named) -> Option<u32> {
    named.group().map(|(number, _)| number)
}

/// Those of the entries that are VFIO's; a group that is named twice, as a device and as a group, counts once.
fn named(node: &Node, asked: &[Device]) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for device in asked {
        let Some(named) = device.character().and_then(|numbers| node.named(numbers)) else {
            continue;
        };
        let again = found.iter().any(|other| group(other.named) == group(named));
        let named = if again { Named::Interface } else { named };
        let path = device.path.clone();
        found.push(Found { path, named });
    }
    found
}

/// Adds what CDI names stand for that nobody has looked up: of one that containerd has, the entries are there. Their
/// variables are the result.
fn add_names(
    names: &[String],
    node: &Node,
    files: &Names,
    found: &mut Vec<Found>,
) -> Result<Vec<String>> {
    // Whoever has looked them up before has put their nodes there, and their variables.
    let entries: Vec<_> = found
        .iter()
        .filter_map(|found| group(found.named))
        .collect();
    let (mut common, mut env, mut files_seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for name in names {
        let refused = |why: &str| {
            Error::new(
                Kind::FailedPrecondition,
                format!("annotation {}: {why}", cdi::ANNOTATION),
            )
        };
        let edits = files
            .look_up(name)
            .map_err(|error| refused(&error.to_string()))?;
        let Edits {
            nodes,
            others,
            file,
            ..
        } = &edits;
        let nodes = nodes.iter().filter_map(|path| node.named_at(path));
        let mut new: Vec<_> = nodes
            .filter(|named| group(*named).is_some_and(|group| !entries.contains(&group)))
            .collect();
        if new.is_empty() {
            continue;
        }
        // Another name may stand for another device of the same group, and has variables of its own.
        new.retain(|named| {
            let mut others = found.iter();
            others.all(|other| group(other.named) != group(*named))
        });
        if !others.is_empty() {
            return Err(refused(&format!(
                "{name} ({}) has {} of the node, which a guest cannot use: put what it needs into a driver bundle \
                 (docs/driver-bundles.md), or name the device's node alone",
                file.display(),
                others.join(" and ")
            )));
        }
        found.extend(new.into_iter().map(|named| Found {
            path: String::new(),
            named,
        }));
        if files_seen.insert(edits.file) {
            common.extend(edits.common_env);
        }
        env.extend(edits.env);
    }
    common.extend(env);
    Ok(common)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::vfio::testing::Fake;

    /// Stand-ins whose numbers are VFIO's here, as they are there on every machine: two of one group, and one of another.
    fn node() -> Fake {
        let fake = Fake::new();
        fake.character("1:3", "devices/virtual/vfio/12");
        fake.character("1:5", "devices/virtual/vfio/12");
        fake.character("1:7", "devices/virtual/vfio/13");
        fake
    }

    fn edits(name: &str, node: &str) -> String {
        format!(
            r#"{{"name": "{name}", "containerEdits": {{"env": ["OF_{name}=1", "LAST={name}"], "deviceNodes": [{{"path": "{node}"}}]}}}}"#
        )
    }

    #[test]
    fn each_name_has_its_variables_and_those_of_its_file_come_first() {
        let cdi = tempfile::tempdir().unwrap();
        let devices = [
            edits("a", "/dev/null"),
            edits("b", "/dev/zero"),
            edits("c", "/dev/full"),
        ];
        let file = format!(
            r#"{{"kind": "v.com/c", "containerEdits": {{"env": ["LAST=none"]}}, "devices": [{}]}}"#,
            devices.join(", ")
        );
        fs::write(cdi.path().join("a.json"), file).unwrap();
        let (fake, files) = (node(), Names::of(&[cdi.path()]));
        let names = ["v.com/c=b", "v.com/c=a", "v.com/c=c"].map(str::to_owned);
        let mut found = Vec::new();
        let env = add_names(&names, &fake.node, &files, &mut found).unwrap();
        // Two are of one group, which is given once.
        let groups: Vec<_> = found.iter().map(|found| group(found.named)).collect();
        assert_eq!(groups, [Some(12), Some(13)]);
        assert_eq!(
            env,
            [
                "LAST=none",
                "OF_b=1",
                "LAST=b",
                "OF_a=1",
                "LAST=a",
                "OF_c=1",
                "LAST=c"
            ]
        );
        // Of a name that containerd has looked up, everything is there.
        let mut found = vec![Found {
            path: "/dev/vfio/12".to_owned(),
            named: Named::Group(12),
        }];
        let env = add_names(&names[..2], &fake.node, &files, &mut found).unwrap();
        assert!(env.is_empty() && found.len() == 1);
    }

    #[test]
    fn a_device_that_brings_libraries_is_refused_with_its_file() {
        let cdi = tempfile::tempdir().unwrap();
        let file = r#"{"kind": "v.com/c", "devices": [{"name": "a", "containerEdits":
            {"deviceNodes": [{"path": "/dev/null"}], "mounts": [{"hostPath": "/x"}]}}]}"#;
        fs::write(cdi.path().join("a.json"), file).unwrap();
        let (fake, files) = (node(), Names::of(&[cdi.path()]));
        let refused = add_names(
            &["v.com/c=a".to_owned()],
            &fake.node,
            &files,
            &mut Vec::new(),
        );
        let message = refused.unwrap_err().message;
        assert!(
            message.contains("v.com/c=a") && message.contains("a.json"),
            "{message}"
        );
    }
}
