//! A pod with twenty volumes of every kind, whose containers go in any order.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use brig_tests::node::check::equal;
use brig_tests::sequence::Sequence;
use k8s_cri::v1::Device;

use super::config_volumes::Atomic;
use super::direct_volumes::Direct;
use super::sandbox::DropIn;
use crate::container::{Container, ContainerSpec};
use crate::loops::Loop;
use crate::mounted::Mounted;
use crate::node::{self, Directory};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "volumes",
    "twenty volumes of every kind, unplugged in any order, are free on the node",
    any_order,
)];

/// Another order than that of the process's number.
const SEED: &str = "BRIG_VOLUMES_SEED";
const VOLUMES: usize = 20;
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const MIB: u64 = 1 << 20;

/// What a container is given.
struct Volume {
    source: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// A file or a directory that is written to.
    Files,
    /// What kubelet copies for the pod, read alone.
    Copy,
    /// A raw block volume.
    Raw,
    /// The same without leave to write.
    RawReadOnly,
    /// An emptyDir of huge pages.
    HugePages,
}

/// The volumes, and what of the node they stand on: mounts first, and then the disks below them.
#[derive(Default)]
struct Node {
    volumes: Vec<Volume>,
    mounts: Vec<Mounted>,
    loops: Vec<Loop>,
    copies: Vec<Atomic>,
    directories: Vec<Directory>,
    direct: Vec<Direct>,
}

impl Node {
    fn new(suite: &Suite) -> Result<Self> {
        let mut node = Self::default();
        for number in 0..4 {
            node.raw(number)?;
        }
        for number in 0..2 {
            let directory = Directory::new(&format!("many-path-{number}"))?;
            node.mount_memory(directory)?;
        }
        node.huge_pages()?;
        for number in 0..2 {
            node.empty_dir(number)?;
        }
        node.direct(suite)?;
        for number in 0..2 {
            node.mount_memory(Directory::volume(
                EMPTY_DIR,
                &format!("many-memory-{number}"),
            )?)?;
            node.sub_path(number)?;
            let directory = Directory::new(&format!("many-file-{number}"))?;
            let file = directory.file("file", "content\n")?;
            node.add(file, Kind::Files);
            node.directories.push(directory);
        }
        for (number, kind) in ["configmap", "configmap", "secret", "projected"]
            .iter()
            .enumerate()
        {
            let kind = format!("kubernetes.io~{kind}");
            let copy = Atomic::new(&kind, &format!("many-copy-{number}"), &[("key", "value")])?;
            node.add(copy.volume.path.clone(), Kind::Copy);
            node.copies.push(copy);
        }
        equal("volumes", VOLUMES, node.volumes.len())?;
        Ok(node)
    }

    fn add(&mut self, source: PathBuf, kind: Kind) {
        self.volumes.push(Volume { source, kind });
    }

    fn raw(&mut self, number: usize) -> Result<()> {
        let directory = Directory::new(&format!("many-raw-{number}"))?;
        let disk = Loop::new(&directory.path.join("disk"), MIB)?;
        let kind = match number % 2 {
            0 => Kind::Raw,
            _ => Kind::RawReadOnly,
        };
        self.add(disk.path.clone(), kind);
        self.loops.push(disk);
        self.directories.push(directory);
        Ok(())
    }

    fn mount_memory(&mut self, directory: Directory) -> Result<()> {
        self.mounts
            .push(Mounted::tmpfs(&directory.path, "size=1m,mode=777")?);
        self.add(directory.path.clone(), Kind::Files);
        self.directories.push(directory);
        Ok(())
    }

    fn huge_pages(&mut self) -> Result<()> {
        let volume = Directory::volume(EMPTY_DIR, "many-huge")?;
        let mounted = Mounted::hugetlbfs(&volume.path, "pagesize=2Mi,mode=777")?;
        self.mounts.push(mounted);
        self.add(volume.path.clone(), Kind::HugePages);
        self.directories.push(volume);
        Ok(())
    }

    /// A file system of the guest's, and for runc one that is mounted by the node.
    fn direct(&mut self, suite: &Suite) -> Result<()> {
        let images = Directory::new("many-direct")?;
        let disk = Loop::new(&images.path.join("image"), 8 * MIB)?;
        node::run("mkfs.ext4", &["-q", "-F", &disk.node()])?;
        let volume = Direct::new("many-direct")?;
        if suite.is_brig() {
            volume.of(&disk.node(), "ext4", "")?;
        } else {
            let path = volume.path.display().to_string();
            node::run("mount", &[&disk.node(), &path])?;
            self.mounts.push(Mounted::made(&volume.path));
        }
        self.add(volume.path.clone(), Kind::Files);
        self.loops.push(disk);
        self.directories.push(images);
        self.direct.push(volume);
        Ok(())
    }

    /// On a disk of its own.
    fn empty_dir(&mut self, number: usize) -> Result<()> {
        let images = Directory::new(&format!("many-image-{number}"))?;
        let disk = Loop::new(&images.path.join("image"), 8 * MIB)?;
        node::run("mkfs.ext4", &["-q", "-F", &disk.node()])?;
        let volume = Directory::volume(EMPTY_DIR, &format!("many-disk-{number}"))?;
        node::run("mount", &[&disk.node(), &volume.path.display().to_string()])?;
        self.mounts.push(Mounted::made(&volume.path));
        self.add(volume.path.clone(), Kind::Files);
        self.loops.push(disk);
        self.directories.extend([images, volume]);
        Ok(())
    }

    fn sub_path(&mut self, number: usize) -> Result<()> {
        let volume = Directory::volume(EMPTY_DIR, &format!("many-part-{number}"))?;
        let part = volume.directory("a/part")?;
        let bound = volume.sub_path()?;
        fs::create_dir(&bound)?;
        self.mounts.push(Mounted::bind(&part, &bound)?);
        self.add(bound, Kind::Files);
        self.directories.push(volume);
        Ok(())
    }

    /// Nobody has any of it.
    fn free(self) -> Result<()> {
        for mounted in self.mounts {
            mounted.unmount()?;
        }
        self.loops.into_iter().try_for_each(Loop::freed)
    }
}

fn given<'a>(mut spec: ContainerSpec<'a>, volumes: &[(usize, &Volume)]) -> ContainerSpec<'a> {
    for (number, volume) in volumes {
        let at = format!("/v/{number}");
        let source = &volume.source;
        let device = |permissions: &str| Device {
            container_path: at.clone(),
            host_path: source.display().to_string(),
            permissions: permissions.to_owned(),
        };
        spec = match volume.kind {
            Kind::Raw => spec.edit(|config| config.devices.push(device("rwm"))),
            Kind::RawReadOnly => spec.edit(|config| config.devices.push(device("r"))),
            Kind::Copy => spec.mount_readonly(source, &at),
            Kind::Files | Kind::HugePages => spec.mount(source, &at),
        };
    }
    spec
}

/// Each can be used as it should.
fn use_all(container: &Container, volumes: &[(usize, &Volume)]) -> Result<()> {
    let mut script = "set -e\n".to_owned();
    for (number, volume) in volumes {
        let at = format!("/v/{number}");
        script += &match volume.kind {
            Kind::RawReadOnly => format!("head -c 512 {at} | wc -c | grep -qx 512\n"),
            Kind::Raw => {
                format!("echo {number} | dd of={at} bs=512 conv=sync,fsync 2> /dev/null\n")
            }
            Kind::Copy => format!("grep -qx value {at}/key\n"),
            Kind::Files if volume.source.is_file() => format!("echo more >> {at}\n"),
            Kind::Files => {
                format!("echo {number} > {at}/written; grep -qx {number} {at}/written\n")
            }
            // Its files can be mapped and have a length, and are not written to.
            Kind::HugePages => format!(
                "grep -q ' {at} hugetlbfs ' /proc/mounts; truncate -s 2097152 {at}/file; stat -c %s {at}/file | grep -qx 2097152\n"
            ),
        };
    }
    container.sh(&script).map(drop)
}

fn any_order(suite: &mut Suite) -> Result<()> {
    let seed: u64 = match std::env::var(SEED) {
        Ok(text) => text.parse().with_context(|| format!("{SEED}={text}"))?,
        Err(_) => u64::from(std::process::id()),
    };
    // For runc it is a file that nobody reads.
    let _allowed = DropIn::new("direct_volumes = true\n")?;
    let node = Node::new(suite)?;
    let all: Vec<(usize, &Volume)> = node.volumes.iter().enumerate().collect();
    let mut sequence = Sequence::new(seed);
    let pod = suite.run("many-volumes")?;
    let mut order: Vec<usize> = (0..all.len()).collect();
    sequence.shuffle(&mut order);
    // Everything at once, and each part again by another container.
    let mut parts: Vec<Vec<(usize, &Volume)>> = vec![all.clone()];
    parts.extend(
        order
            .chunks(7)
            .map(|part| part.iter().map(|number| all[*number]).collect()),
    );
    let mut containers = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let spec = pod.container(&format!("part-{number}"), SLEEP);
        let container = given(spec, part).start()?;
        use_all(&container, part).with_context(|| format!("container {number}"))?;
        containers.push(Some(container));
    }
    let mut order: Vec<usize> = (0..containers.len()).collect();
    sequence.shuffle(&mut order);
    for (gone, number) in order.iter().enumerate() {
        let container = containers[*number].take().context("gone twice")?;
        container.remove()?;
        for left in &order[gone + 1..] {
            let container = containers[*left].as_ref().context("gone already")?;
            use_all(container, &parts[*left])
                .with_context(|| format!("{SEED}={seed}: container {left} after {number}"))?;
        }
    }
    node.free().with_context(|| format!("{SEED}={seed}"))
}
