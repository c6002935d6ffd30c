//! Layers with a tree of hashes (dm-verity), as containerd's erofs differ makes them from 2.3 on: their blocks are checked as they are read.

use std::fs;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::Pod;
use brig_tests::node::daemon::snapshot;
use containerd_shim_protos::api::Mount;
use sha2::{Digest as _, Sha256};

use super::daemon_pods::config;
use super::leaks::baseline;
use super::root_disks::Layers;
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[brig(
    "disks",
    "2.3: layers are checked by dm-verity as they are read",
    checked,
)];

const BLOCK: usize = 4096;
const SALT: [u8; 32] = [0; 32];

fn hash(block: &[u8]) -> Vec<u8> {
    Sha256::new()
        .chain_update(SALT)
        .chain_update(block)
        .finalize()
        .to_vec()
}

/// Blocks of the hashes of `data`'s blocks.
fn level(data: &[u8]) -> Vec<u8> {
    let mut hashes: Vec<u8> = data.chunks(BLOCK).flat_map(hash).collect();
    hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
    hashes
}

/// The superblock of a tree of SHA-256.
fn superblock(blocks: usize) -> Vec<u8> {
    let mut bytes = b"verity\0\0".to_vec();
    bytes.extend([1u32.to_le_bytes(), 1u32.to_le_bytes()].concat());
    bytes.extend([0x5a; 16]);
    bytes.extend(b"sha256");
    bytes.resize(64, 0);
    bytes.extend([4096u32.to_le_bytes(), 4096u32.to_le_bytes()].concat());
    bytes.extend((blocks as u64).to_le_bytes());
    bytes.extend([32, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(SALT);
    bytes.resize(BLOCK, 0);
    bytes
}

/// Appends a tree to a layer and writes the file beside it, whose path is returned.
pub(super) fn add_tree(layer: &str) -> Result<String> {
    let mut image = fs::read(layer)?;
    image.resize(image.len().next_multiple_of(BLOCK), 0);
    let offset = image.len();
    let mut levels = vec![level(&image)];
    while levels.last().is_some_and(|top| top.len() > BLOCK) {
        levels.extend(levels.last().map(|top| level(top)));
    }
    let root = hash(levels.last().context("a level")?);
    image.extend(superblock(offset / BLOCK));
    // The top comes first.
    image.extend(levels.iter().rev().flatten());
    fs::write(layer, image)?;
    let root: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
    let sidecar = sidecar(layer);
    fs::write(
        &sidecar,
        format!("{{\"roothash\": \"{root}\", \"hashoffset\": {offset}}}"),
    )?;
    Ok(sidecar)
}

/// What says what a layer is checked against.
pub(super) fn sidecar(layer: &str) -> String {
    format!("{layer}.dmverity")
}

pub(super) fn option(layer: &str) -> String {
    format!("X-containerd.dmverity={}", sidecar(layer))
}

/// The mounts with their layers checked.
fn with_trees(writable: &str, layers: &[String]) -> Vec<Mount> {
    let mut mounts = snapshot::erofs(writable, layers);
    for mount in mounts.iter_mut().filter(|mount| mount.type_ == "erofs") {
        mount.options.push(option(&mount.source));
    }
    mounts
}

fn checked(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    let base = layers.base()?;
    let top = layers.make("top", |tree| {
        Ok(fs::write(tree.join("big"), [b'B'; 2 * BLOCK])?)
    })?;
    for layer in [&base, &top] {
        add_tree(layer)?;
    }
    let broken = layers.path("broken.erofs");
    let mut image = fs::read(&top)?;
    let at = image
        .windows(BLOCK)
        .position(|bytes| bytes.iter().all(|byte| *byte == b'B'));
    image[at.context("the file is in the layer")?] = b'C';
    fs::write(&broken, image)?;
    fs::copy(sidecar(&top), sidecar(&broken))?;

    let daemon = Daemon::new(Generation::V2_3, &suite.ctr.runtime, "verity")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "verity", &config())?;
    let run = |name: &str, mounts: Vec<Mount>| -> Result<String> {
        let script = "busybox ls /sys/block | busybox grep -c ^dm-; busybox cat /big > /tmp/read && echo read || echo refused; busybox tr -d B < /tmp/read";
        let shell = ["/bin/busybox", "sh", "-c", script];
        let container = pod.container_from(name, &shell, Some(mounts))?;
        let (said, _) = container.run(patience())?;
        container.delete()?;
        Ok(said)
    };
    let writable = layers.writable("one.img")?;
    let stack = [top.clone(), base.clone()];
    equal(
        "both are checked",
        "2\nread\n",
        run("right", with_trees(&writable, &stack))?.as_str(),
    )?;
    equal(
        "none is left",
        "0\nread\n",
        run("plain", snapshot::erofs(&writable, &stack))?.as_str(),
    )?;
    let said = run(
        "broken",
        with_trees(&writable, &[broken.clone(), base.clone()]),
    )?;
    equal(
        "what was changed is not read",
        "2\nrefused\n",
        said.as_str(),
    )?;
    let said = run(
        "unchecked",
        snapshot::erofs(&writable, &[broken, base.clone()]),
    )?;
    equal("and would be without the tree", "0\nread\nC", said.as_str())?;

    let refused = |name: &str, reason: &str| -> Result<()> {
        let outcome = pod.container_from(name, &["true"], Some(with_trees(&writable, &stack)));
        let error = outcome
            .err()
            .with_context(|| format!("{name}: not refused"))?;
        contains("the refusal", reason, &format!("{error:#}"))
    };
    let sidecar = sidecar(&top);
    let right = fs::read_to_string(&sidecar)?;
    let other = fs::read_to_string(self::sidecar(&base))?;
    fs::write(&sidecar, other)?;
    refused("of-another", "erofs of the root file system")?;
    fs::write(&sidecar, "{}")?;
    refused("empty", "top.erofs.dmverity")?;
    fs::remove_file(&sidecar)?;
    refused("gone", "top.erofs.dmverity is not there")?;
    fs::write(&sidecar, right)?;
    equal(
        "the pod goes on",
        "2\nread\n",
        run("again", with_trees(&writable, &stack))?.as_str(),
    )?;
    pod.end()?;
    drop(daemon);
    before.nothing_left(patience())
}
