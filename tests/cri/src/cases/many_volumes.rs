//! A pod with twenty volumes of every kind, whose containers go in any order.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use brig_tests::node::check::equal;
use k8s_cri::v1::Device;

use super::config_volumes::Atomic;
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
#[derive(Clone)]
struct Volume {
    source: PathBuf,
    readonly: bool,
    /// A raw block volume.
    block: bool,
}

/// The volumes, and what of the node they stand on: mounts first, and then the disks below them.
#[derive(Default)]
struct Node {
    volumes: Vec<Volume>,
    mounts: Vec<Mounted>,
    loops: Vec<Loop>,
    copies: Vec<Atomic>,
    directories: Vec<Directory>,
}

impl Node {
    fn new() -> Result<Self> {
        let mut node = Self::default();
        for number in 0..4 {
            node.raw(number)?;
        }
        for number in 0..3 {
            let directory = Directory::new(&format!("many-path-{number}"))?;
            node.mount_memory(directory)?;
        }
        for number in 0..3 {
            node.empty_dir(number)?;
        }
        for number in 0..2 {
            node.mount_memory(Directory::volume(
                EMPTY_DIR,
                &format!("many-memory-{number}"),
            )?)?;
            node.sub_path(number)?;
            let directory = Directory::new(&format!("many-file-{number}"))?;
            let file = directory.file("file", "content\n")?;
            node.add(file, false);
            node.directories.push(directory);
        }
        for (number, kind) in ["configmap", "configmap", "secret", "projected"]
            .iter()
            .enumerate()
        {
            let kind = format!("kubernetes.io~{kind}");
            let copy = Atomic::new(&kind, &format!("many-copy-{number}"), &[("key", "value")])?;
            node.add(copy.volume.path.clone(), true);
            node.copies.push(copy);
        }
        equal("volumes", VOLUMES, node.volumes.len())?;
        Ok(node)
    }

    fn add(&mut self, source: PathBuf, readonly: bool) {
        self.volumes.push(Volume {
            source,
            readonly,
            block: false,
        });
    }

    fn raw(&mut self, number: usize) -> Result<()> {
        let directory = Directory::new(&format!("many-raw-{number}"))?;
        let disk = Loop::new(&directory.path.join("disk"), MIB)?;
        self.volumes.push(Volume {
            source: disk.path.clone(),
            readonly: number % 2 == 1,
            block: true,
        });
        self.loops.push(disk);
        self.directories.push(directory);
        Ok(())
    }

    fn mount_memory(&mut self, directory: Directory) -> Result<()> {
        self.mounts
            .push(Mounted::tmpfs(&directory.path, "size=1m,mode=777")?);
        self.add(directory.path.clone(), false);
        self.directories.push(directory);
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
        self.add(volume.path.clone(), false);
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
        self.add(bound, false);
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
        spec = match volume {
            Volume {
                block: true,
                source,
                readonly,
            } => {
                let device = Device {
                    container_path: at,
                    host_path: source.display().to_string(),
                    permissions: if *readonly { "r" } else { "rwm" }.to_owned(),
                };
                spec.edit(|config| config.devices.push(device))
            }
            Volume {
                readonly: true,
                source,
                ..
            } => spec.mount_readonly(source, &at),
            Volume { source, .. } => spec.mount(source, &at),
        };
    }
    spec
}

/// Each can be used as it should.
fn use_all(container: &Container, volumes: &[(usize, &Volume)]) -> Result<()> {
    let mut script = "set -e\n".to_owned();
    for (number, volume) in volumes {
        let at = format!("/v/{number}");
        script += &match volume {
            Volume {
                block: true,
                readonly: true,
                ..
            } => format!("head -c 512 {at} | wc -c | grep -qx 512\n"),
            Volume { block: true, .. } => {
                format!("echo {number} | dd of={at} bs=512 conv=sync,fsync 2> /dev/null\n")
            }
            Volume { readonly: true, .. } => format!("grep -qx value {at}/key\n"),
            Volume { source, .. } if source.is_file() => format!("echo more >> {at}\n"),
            Volume { .. } => {
                format!("echo {number} > {at}/written; grep -qx {number} {at}/written\n")
            }
        };
    }
    container.sh(&script).map(drop)
}

/// Numbers in an order that a seed gives (xorshift).
fn shuffled(count: usize, mut seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // Less than `count`.
        let other = usize::try_from(seed % (last as u64 + 1)).unwrap_or(0);
        order.swap(last, other);
    }
    order
}

fn any_order(suite: &mut Suite) -> Result<()> {
    let seed: u64 = match std::env::var(SEED) {
        Ok(text) => text.parse().with_context(|| format!("{SEED}={text}"))?,
        Err(_) => u64::from(std::process::id()),
    };
    let node = Node::new()?;
    let all: Vec<(usize, &Volume)> = node.volumes.iter().enumerate().collect();
    let pod = suite.run("many-volumes")?;
    let order = shuffled(all.len(), seed);
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
    let order = shuffled(containers.len(), seed.rotate_left(32) | 1);
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
