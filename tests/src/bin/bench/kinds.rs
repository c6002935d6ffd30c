//! The kinds of storage that a pod has, and what each is made of: what a runtime is handed, and what QEMU is.

use std::path::{Path, PathBuf};

use anyhow::Result;
use brig_tests::node::daemon::snapshot::{self, mount};
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};

use crate::ground::{Ground, Mounted, run, text};

/// A kind of storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A root file system as the overlayfs snapshotter gives it.
    Overlay,
    /// As the blockfile snapshotter.
    Blockfile,
    /// As the erofs snapshotter of containerd 2.2.
    Erofs,
    /// A directory of the node, as hostPath and CSI file systems are.
    Volume,
    /// An emptyDir on a disk.
    EmptyDir,
    /// A volume with `volumeMode: Block`.
    Block,
}

/// Who uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The reference.
    Runc,
    /// What is measured.
    Brig,
    /// What else one might take.
    Qemu,
}

impl Who {
    /// In names of files and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Brig => "brig",
            Self::Qemu => "qemu",
        }
    }
}

/// What a container is made from.
pub struct Container {
    /// Its root file system.
    pub rootfs: Vec<Mount>,
    /// What its specification has besides.
    pub mounts: Vec<Value>,
    /// A block device of the node: its minor number among the disks of memory.
    pub device: Option<u32>,
    /// What was mounted on the node for a runtime that cannot do it itself.
    pub mounted: Mounted,
}

/// What a guest of QEMU is made from.
pub struct Guest {
    /// Its disks, the root first.
    pub disks: Vec<PathBuf>,
    /// The root's file system.
    pub root: &'static str,
    /// A directory of the node that virtiofsd serves.
    pub served: Option<PathBuf>,
    /// What makes the place of the files.
    pub script: &'static str,
    /// See there.
    pub mounted: Mounted,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 6] = [
        Self::Overlay,
        Self::Blockfile,
        Self::Erofs,
        Self::Volume,
        Self::EmptyDir,
        Self::Block,
    ];

    /// In the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlay => "root, overlayfs",
            Self::Blockfile => "root, blockfile",
            Self::Erofs => "root, erofs",
            Self::Volume => "hostPath, CSI",
            Self::EmptyDir => "emptyDir",
            Self::Block => "block volume",
        }
    }

    /// The way into the guest.
    pub fn way(self) -> &'static str {
        match self {
            Self::Overlay | Self::Volume | Self::EmptyDir => "virtio-fs",
            Self::Blockfile | Self::Erofs | Self::Block => "virtio-blk",
        }
    }

    /// Where its files are in a container; a device has none.
    pub fn directory(self) -> Option<&'static str> {
        match self {
            Self::Overlay | Self::Blockfile | Self::Erofs => Some("/data"),
            Self::Volume | Self::EmptyDir => Some("/volume"),
            Self::Block => None,
        }
    }

    /// What fio reads and writes in a container.
    pub fn file(self) -> String {
        self.directory()
            .map_or_else(|| "/dev/volume".to_owned(), |dir| format!("{dir}/file"))
    }

    /// Makes what a container of `who` has. `name` tells it from others of the kind.
    pub fn container(self, ground: &Ground, who: Who, name: &str) -> Result<Container> {
        let name = format!("{self:?}-{}-{name}", who.name());
        let mut made = Container {
            rootfs: Vec::new(),
            mounts: Vec::new(),
            device: None,
            mounted: Mounted::default(),
        };
        match self {
            Self::Blockfile => {
                let image = ground.ext4(&name, true)?;
                made.rootfs
                    .push(mount("ext4", &text(&image), &["rw", "loop"]));
            }
            Self::Erofs => {
                let (layer, writable) = (ground.erofs()?, ground.ext4(&name, false)?);
                made.rootfs = match who {
                    Who::Brig => snapshot::erofs(&text(&writable), &[text(&layer)]),
                    _ => mounted_erofs(ground, &name, &layer, &writable, &mut made.mounted)?,
                };
            }
            _ => made.rootfs = overlay(ground, &name)?,
        }
        let source = match self {
            Self::Volume => Some(ground.directory(&format!("volume-{name}"))?),
            // By this path a runtime tells what kubelet has made.
            Self::EmptyDir => Some(ground.directory(&format!(
                "pods/{name}/volumes/kubernetes.io~empty-dir/cache"
            ))?),
            Self::Block => {
                made.device = Some(if who == Who::Brig { 2 } else { 1 });
                None
            }
            _ => None,
        };
        if let Some(source) = source {
            made.mounts.push(json!({
                "destination": "/volume", "type": "bind", "source": source, "options": ["rbind", "rw"],
            }));
        }
        Ok(made)
    }

    /// Makes what a guest of QEMU has.
    pub fn guest(self, ground: &Ground) -> Result<Guest> {
        let name = format!("{self:?}-qemu");
        let mut made = Guest {
            disks: Vec::new(),
            root: "ext4",
            served: None,
            script: "mkdir -p /data",
            mounted: Mounted::default(),
        };
        match self {
            Self::Erofs => {
                made.disks = vec![ground.erofs()?, ground.ext4(&name, false)?];
                made.root = "erofs";
                made.script = "mount -t ext4 /dev/vdb /mnt && mkdir /mnt/upper /mnt/work /mnt/root && \
                     mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root && \
                     mkdir -p /mnt/root/data";
                return Ok(made);
            }
            Self::Block => made.disks = vec!["/dev/ram3".into()],
            Self::Overlay => {
                let place = ground.directory(&format!("merged-{name}"))?;
                let all = overlay(ground, &name)?;
                let options = all[0].options.join(",");
                made.mounted
                    .add(&["-t", "overlay", "overlay", "-o", &options, &text(&place)])?;
                made.served = Some(place);
            }
            Self::Volume | Self::EmptyDir => {
                made.served = Some(ground.directory(&format!("volume-{name}"))?);
            }
            Self::Blockfile => {}
        }
        if made.served.is_some() {
            made.script = "mount -t virtiofs shared /volume";
        }
        made.disks.insert(0, ground.ext4(&name, true)?);
        Ok(made)
    }

    /// Where its files are in QEMU's guest.
    pub fn place_in_guest(self) -> Option<&'static str> {
        match self {
            Self::Erofs => Some("/mnt/root/data"),
            Self::Blockfile => Some("/data"),
            Self::Overlay | Self::Volume | Self::EmptyDir => Some("/volume"),
            Self::Block => None,
        }
    }

    /// What fio reads and writes there.
    pub fn file_in_guest(self) -> String {
        self.place_in_guest()
            .map_or_else(|| "/dev/vdb".to_owned(), |dir| format!("{dir}/file"))
    }
}

/// What the overlayfs snapshotter hands over.
fn overlay(ground: &Ground, name: &str) -> Result<Vec<Mount>> {
    let upper = ground.directory(&format!("{name}/upper"))?;
    let work = ground.directory(&format!("{name}/work"))?;
    let options = [
        format!("workdir={}", text(&work)),
        format!("upperdir={}", text(&upper)),
        format!("lowerdir={}", text(&ground.tree())),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Ok(vec![mount("overlay", "overlay", &options)])
}

/// What containerd's mount manager makes on the node of what the erofs snapshotter hands over, for who does not mount for himself.
fn mounted_erofs(
    ground: &Ground,
    name: &str,
    layer: &Path,
    writable: &Path,
    mounted: &mut Mounted,
) -> Result<Vec<Mount>> {
    let below = text(&ground.directory(&format!("{name}/layer"))?);
    let above = text(&ground.directory(&format!("{name}/writable"))?);
    mounted.add(&["-t", "erofs", "-o", "ro,loop", &text(layer), &below])?;
    mounted.add(&["-t", "ext4", "-o", "rw,loop", &text(writable), &above])?;
    run(
        "mkdir",
        &["-p", &format!("{above}/upper"), &format!("{above}/work")],
    )?;
    let options = [
        format!("workdir={above}/work"),
        format!("upperdir={above}/upper"),
        format!("lowerdir={below}"),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Ok(vec![mount("overlay", "overlay", &options)])
}
