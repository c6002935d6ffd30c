//! Disks that are full, fail or vanish: errors to who asks, and to nobody else.

use anyhow::{Context, Result};
use brig_tests::node::check::{contains_one, equal, that};
use k8s_cri::v1::Device;

use super::block::{at, volume, write};
use crate::loops::Loop;
use crate::mounted::Mounted;
use crate::node::{self, Directory};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "raw block volume: a disk that is full is an error to its writer alone",
        full,
    ),
    case(
        "volumes",
        "raw block volume: a disk that fails, and one that is gone, are errors to who asks, and nothing is left",
        failing,
    ),
];

const MIB: u64 = 1 << 20;

fn full(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-full")?;
    let small = directory.directory("small")?;
    let tmpfs = Mounted::tmpfs(&small, "size=2m")?;
    let disk = Loop::new(&small.join("disk"), 8 * MIB)?;
    let pod = &suite.shared()?.pod;
    let container = pod
        .container("block-full", SLEEP)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let fill = "dd if=/dev/urandom of=/dev/data bs=1M count=6 conv=notrunc,fsync 2>&1";
    let said = container.exec(&["sh", "-c", fill])?;
    that("the writer is told", said.code != 0)?;
    contains_one(
        "what it is told",
        &["Input/output error", "No space"],
        &said.text(),
    )?;
    container.sh("dd if=/dev/data bs=512 count=1 of=/dev/null 2>/dev/null")?;
    let other = pod.container("block-beside", SLEEP).start()?;
    other.sh("true").context("a container beside it")?;
    container.remove()?;
    disk.freed()?;
    tmpfs.unmount()
}

/// A device-mapper device of one loop device, removed at the end of its scope.
struct Mapped(&'static str);

impl Mapped {
    fn new(name: &'static str, below: &Loop, bytes: u64) -> Result<Self> {
        let table = format!("0 {} linear {} 0", bytes / 512, below.node());
        node::run("dmsetup", &["create", name, "--table", &table])?;
        Ok(Self(name))
    }

    fn node(&self) -> String {
        format!("/dev/mapper/{}", self.0)
    }

    /// From now on it answers every request with EIO.
    fn fail(&self, bytes: u64) -> Result<()> {
        let table = format!("0 {} error", bytes / 512);
        node::run("dmsetup", &["suspend", "--noflush", "--nolockfs", self.0])?;
        node::run("dmsetup", &["reload", self.0, "--table", &table])?;
        node::run("dmsetup", &["resume", self.0]).map(drop)
    }

    /// It has no content any more, as a disk that was pulled out.
    fn vanish(&self) -> Result<()> {
        node::run("dmsetup", &["wipe_table", "--noflush", self.0]).map(drop)
    }

    /// Nobody has it.
    fn remove(self) -> Result<()> {
        node::run("dmsetup", &["remove", self.0])?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = node::run("dmsetup", &["remove", "--force", self.0]);
    }
}

fn failing(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-failing")?;
    let pod = &suite.shared()?.pod;
    let healthy = Loop::new(&directory.path.join("healthy"), 8 * MIB)?;
    for (name, vanishes) in [("brig-cri-eio", false), ("brig-cri-gone", true)] {
        let below = Loop::new(&directory.path.join(name), 8 * MIB)?;
        let disk = Mapped::new(name, &below, 8 * MIB)?;
        let device = Device {
            container_path: "/dev/data".to_owned(),
            host_path: disk.node(),
            permissions: "mrw".to_owned(),
        };
        let container = pod
            .container(name, SLEEP)
            .edit(|config| config.devices.push(device))
            .edit(volume(&healthy, "/dev/healthy", "mrw"))
            .start()?;
        container.sh(&write("/dev/data", 1, "before"))?;
        if vanishes {
            disk.vanish()?;
        } else {
            disk.fail(8 * MIB)?;
        }
        for ask in [
            write("/dev/data", 9, "lost"),
            "dd if=/dev/data bs=4096 skip=100 count=1 iflag=direct 2>&1".to_owned(),
        ] {
            let said = container.exec(&["sh", "-c", &ask])?;
            that(&format!("{name}: {ask} fails"), said.code != 0)?;
            contains_one(&ask, &["Input/output error", "I/O error"], &said.text())?;
        }
        container.sh(&write("/dev/healthy", 1, name))?;
        equal(name, name, at(&container, "/dev/healthy", 1)?)?;
        container.remove()?;
        disk.remove()?;
        below.freed()?;
    }
    healthy.freed()
}
