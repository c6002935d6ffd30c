//! Block devices of the node in a pod: volumes without a file system (`volumeMode: Block`), which containerd gets as
//! devices, and hostPath volumes of a device's node.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::{ContainerConfig, Device, Int64Value};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::{sandbox_pid, shim_of};
use crate::container::{Container, eventually};
use crate::loops::Loop;
use crate::node::{self, Directory};
use crate::suite::{Case, SLEEP, Suite, case, not_here, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "volumes",
        "raw block volume: shared by the pod's containers as their rules say, grown, and free after them",
        shared,
    ),
    smoke(
        "volumes",
        "raw block volume: free on the node after its VMM or its shim was killed",
        killed,
    ),
    case(
        "volumes",
        "hostPath block device: by a device rule, with its owner, and else refused",
        by_path,
    ),
    case(
        "volumes",
        "raw block volume: of a privileged container, also at the device's path on the node",
        of_privileged,
    ),
    case(
        "volumes",
        "raw block volume: read-only is held against the guest's root",
        read_only,
    ),
    case(
        "volumes",
        "raw block volume: of a device that is read-only on the node",
        read_only_on_node,
    ),
    case(
        "volumes",
        "raw block volume: outside /dev, with its owner and mode, for who has no capabilities",
        outside_dev,
    ),
    case(
        "volumes",
        "raw block volume: a partition that has grown, when the next container takes it",
        partition,
    ),
];

const MIB: u64 = 1 << 20;

/// As kubelet asks for a volume of `volumeDevices`.
pub(super) fn volume(
    disk: &Loop,
    path: &str,
    permissions: &str,
) -> impl FnOnce(&mut ContainerConfig) {
    let device = Device {
        container_path: path.to_owned(),
        host_path: disk.node(),
        permissions: permissions.to_owned(),
    };
    move |config| config.devices.push(device)
}

/// What is at a sector.
pub(super) fn at(container: &Container, path: &str, sector: u32) -> Result<String> {
    container.sh(&format!(
        "dd if={path} bs=512 skip={sector} count=1 2>/dev/null | head -n 1"
    ))
}

/// Of `/dev/data`.
pub(super) fn number(container: &Container) -> Result<String> {
    container.sh("set -- $(stat -c '%t %T' /dev/data); echo $((0x$1)):$((0x$2))")
}

pub(super) fn write(path: &str, sector: u32, text: &str) -> String {
    format!("echo {text} | dd of={path} bs=512 seek={sector} conv=notrunc,sync,fsync 2>&1")
}

fn shared(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block")?;
    let disk = Loop::new(&directory.path.join("disk"), 8 * MIB)?;
    let pod = &suite.shared()?.pod;
    let writer = pod
        .container("block-writer", SLEEP)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .edit(volume(&disk, "/dev/again", "mrw"))
        .start()?;
    equal(
        "size",
        (8 * MIB).to_string(),
        writer.sh("test -b /dev/data && wc -c < /dev/data")?,
    )?;
    writer.sh(&write("/dev/data", 8, "flushed"))?;
    contains(
        "on the node",
        "flushed",
        &String::from_utf8_lossy(&disk.read(4096, 8)?),
    )?;
    let number = writer.sh("stat -c '%t %T' /dev/data")?;
    equal(
        "of both names",
        &number,
        &writer.sh("stat -c '%t %T' /dev/again")?,
    )?;

    let reader = pod
        .container("block-reader", SLEEP)
        .edit(volume(&disk, "/dev/mine", "r"))
        .start()?;
    equal(
        "what the writer wrote",
        "flushed",
        at(&reader, "/dev/mine", 8)?,
    )?;
    // Seen by the other before it is on the disk.
    writer.sh("echo early | dd of=/dev/data bs=512 seek=9 conv=notrunc,sync 2>/dev/null")?;
    equal("what is not flushed", "early", at(&reader, "/dev/mine", 9)?)?;
    reader.sh_fails(&write("/dev/mine", 10, "refused"))?;

    let other = pod.container("block-other", SLEEP).start()?;
    let node = format!("set -- {number}; mknod /dev/stolen b $((0x$1)) $((0x$2))");
    other.sh(&format!(
        "{node} && ! test -e /dev/data && ! head -c 1 /dev/stolen"
    ))?;
    drop(other);

    disk.grow(16 * MIB)?;
    eventually("it has grown", clock::seconds(3), || {
        let size = writer.sh("wc -c < /dev/data")?;
        Ok((size == (16 * MIB).to_string()).then_some(()))
    })?;
    writer.sh(&write("/dev/data", 24576, "beyond"))?;
    equal("in what is new", "beyond", at(&reader, "/dev/mine", 24576)?)?;

    writer.remove().context("the writer")?;
    equal("one is left", "beyond", at(&reader, "/dev/mine", 24576)?)?;
    reader.remove().context("the reader")?;
    disk.freed()
}

fn killed(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc's containers outlive their sandbox");
    }
    let directory = Directory::new("block-killed")?;
    for (name, victim) in [
        ("block-vmm", sandbox_pid as fn(&_) -> Result<i32>),
        ("block-shim", shim_of),
    ] {
        let disk = Loop::new(&directory.path.join(name), MIB)?;
        let pod = suite.run(name)?;
        let container = pod
            .container("main", SLEEP)
            .edit(volume(&disk, "/dev/data", "mrw"))
            .start()?;
        container.sh(&write("/dev/data", 1, "durable"))?;
        let pid = victim(&pod)?;
        that("a process of the pod's", pid > 1)?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        eventually("the pod is NotReady", clock::seconds(4), || {
            Ok(matches!(pod.is_ready(), Ok(false)).then_some(()))
        })?;
        let on_disk = disk.read(512, 8)?;
        contains(
            "what was synced",
            "durable",
            &String::from_utf8_lossy(&on_disk),
        )?;
        disk.freed().context(name)?;
        eventually("the pod is removed", clock::seconds(4), || {
            Ok(pod.stop().and_then(|()| pod.remove()).ok())
        })?;
    }
    Ok(())
}

fn by_path(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-path")?;
    let disk = Loop::new(&directory.path.join("disk"), MIB)?;
    std::os::unix::fs::chown(&disk.path, Some(0), Some(1234))?;
    let shared = suite.shared()?;
    let without = shared
        .pod
        .container("block-path", SLEEP)
        .mount(&disk.path, "/disk")
        .start();
    if suite.is_brig() {
        let error = without.err().context("a device without a rule was given")?;
        contains("the refusal", "mount on /disk", &format!("{error:#}"))?;
        contains("the refusal", "device rule", &format!("{error:#}"))?;
    } else {
        without?.sh_fails("head -c 1 /disk")?;
    }
    let pod = suite
        .pod("block-path")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .mount(&disk.path, "/disk")
        .start()?;
    equal(
        "type and owner",
        "block special file 0:1234",
        container.sh("stat -c '%F %u:%g' /disk")?,
    )?;
    // Who asks for the device as such leaves the node that the mount shows as it is.
    let mode = container.sh("stat -c %a /disk")?;
    let beside = pod.container("beside", SLEEP);
    let beside = beside.edit(volume(&disk, "/dev/data", "mrw")).start()?;
    equal(
        "owner and mode beside another's",
        format!("0:1234 {mode}"),
        container.sh("stat -c '%u:%g %a' /disk")?,
    )?;
    beside.remove()?;
    container.sh(&write("/disk", 3, "by-path"))?;
    contains(
        "on the node",
        "by-path",
        &String::from_utf8_lossy(&disk.read(1536, 8)?),
    )?;
    container.remove()?;
    disk.freed()
}

fn of_privileged(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-privileged")?;
    let disk = Loop::new(&directory.path.join("disk"), MIB)?;
    let pod = suite
        .pod("block-privileged")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    for (sector, path) in [(1, "/dev/mine".to_owned()), (2, disk.node())] {
        let container = pod
            .container("main", SLEEP)
            .security(|security| security.privileged = true)
            .edit(volume(&disk, &path, "mrw"))
            .start()?;
        container.sh(&write(&path, sector, &path))?;
        let there = disk.read(u64::from(sector) * 512, path.len())?;
        equal("on the node", path.as_bytes(), &there[..])?;
        container.remove()?;
    }
    disk.freed()
}

fn read_only(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("a privileged container has the node's devices");
    }
    let directory = Directory::new("block-ro")?;
    let disk = Loop::new(&directory.path.join("disk"), MIB)?;
    let pod = suite
        .pod("block-ro")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let reader = pod
        .container("reader", SLEEP)
        .edit(volume(&disk, "/dev/mine", "r"))
        .start()?;
    reader.sh("head -c 512 /dev/mine > /dev/null")?;
    // All that the guest has, and everything is allowed.
    let root = pod
        .container("root", SLEEP)
        .security(|security| security.privileged = true)
        .start()?;
    root.sh("test -b /dev/vda")?;
    root.sh_fails(&write("/dev/vda", 1, "refused"))?;
    root.sh("blockdev --setrw /dev/vda || true")?;
    let said = root.exec(&["sh", "-c", &write("/dev/vda", 1, "refused")])?;
    that("a write is refused by the disk", said.code != 0)?;
    equal("on the node", vec![0; 512], disk.read(512, 512)?)?;
    drop(root);
    reader.remove()?;
    disk.freed()
}

/// A device that is read-only on the node, until the end of its scope: the kernel keeps that beyond the loop device's.
pub(super) struct ReadOnly(String);

impl ReadOnly {
    pub(super) fn new(disk: &Loop) -> Result<Self> {
        node::run("blockdev", &["--setro", &disk.node()])?;
        Ok(Self(disk.node()))
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = node::run("blockdev", &["--setrw", &self.0]);
    }
}

fn read_only_on_node(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-ro-node")?;
    let disk = Loop::new(&directory.path.join("disk"), MIB)?;
    let readonly = ReadOnly::new(&disk)?;
    let pod = &suite.shared()?.pod;
    let container = pod
        .container("block-ro-node", SLEEP)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let number = number(&container)?;
    equal(
        "read-only, as it says itself",
        "1",
        container.sh(&format!("cat /sys/dev/block/{number}/ro"))?,
    )?;
    container.sh_fails(&write("/dev/data", 1, "refused"))?;
    container.sh("head -c 512 /dev/data > /dev/null")?;
    equal("on the node", vec![0; 512], disk.read(512, 512)?)?;
    container.remove()?;
    drop(readonly);
    disk.freed()
}

fn outside_dev(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-outside")?;
    let pod = &suite.shared()?.pod;
    for (name, owner) in [("block-user", 1000), ("block-root", 0)] {
        let disk = Loop::new(&directory.path.join(name), MIB)?;
        // containerd asks for owner and mode of the node's node.
        let of_node = |owner, mode| -> Result<()> {
            std::os::unix::fs::chown(&disk.path, Some(owner), Some(owner))?;
            Ok(fs::set_permissions(
                &disk.path,
                fs::Permissions::from_mode(mode),
            )?)
        };
        of_node(owner, 0o640)?;
        let container = pod
            .container(name, SLEEP)
            .security(|security| {
                security.run_as_user = Some(Int64Value {
                    value: owner.into(),
                });
                let capabilities = security.capabilities.get_or_insert_default();
                capabilities.drop_capabilities = vec!["ALL".to_owned()];
            })
            .edit(volume(&disk, "/mnt/block", "mrw"))
            .start()?;
        equal(
            "the container's node",
            format!("block special file {owner}:{owner} 640"),
            container.sh("stat -c '%F %u:%g %a' /mnt/block")?,
        )?;
        container.sh(&write("/mnt/block", 1, name))?;
        equal(name, name, at(&container, "/mnt/block", 1)?)?;
        let on_node = disk.read(512, name.len())?;
        equal("on the node", name.as_bytes(), &on_node[..])?;
        container.remove()?;
        of_node(0, 0o600)?;
        disk.freed()?;
    }
    Ok(())
}

/// The only partition of a loop device, gone at the end of its scope.
struct Partition(String);

impl Partition {
    fn new(file: &Path, bytes: u64) -> Result<Self> {
        fs::File::create(file)?.set_len(8 * MIB)?;
        Self::table(file, bytes)?;
        let file = file.display().to_string();
        let whole = node::run("losetup", &["--partscan", "--find", "--show", &file])?;
        Ok(Self(whole.trim().to_owned()))
    }

    /// A table (MBR) with one partition of Linux's, from the second MiB on.
    fn table(disk: &Path, bytes: u64) -> Result<()> {
        let mut table = [0; 512];
        let sectors = u32::try_from(bytes / 512)?;
        table[450] = 0x83;
        table[454..458].copy_from_slice(&2048_u32.to_le_bytes());
        table[458..462].copy_from_slice(&sectors.to_le_bytes());
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        let disk = OpenOptions::new().write(true).open(disk)?;
        disk.write_all_at(&table, 0)?;
        Ok(disk.sync_all()?)
    }

    fn node(&self) -> String {
        format!("{}p1", self.0)
    }

    fn grow(&self, bytes: u64) -> Result<()> {
        Self::table(Path::new(&self.0), bytes)?;
        node::run("partx", &["--update", &self.0]).map(drop)
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let _ = node::run("partx", &["--delete", &self.0]);
        let _ = node::run("losetup", &["--detach", &self.0]);
    }
}

fn partition(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("block-partition")?;
    let disk = Partition::new(&directory.path.join("disk"), 2 * MIB)?;
    // One that nobody has open at the moment, as runc's containers do not, may get another number when it grows.
    let _open = fs::File::open(disk.node())?;
    let pod = &suite.shared()?.pod;
    let with = |name| {
        let device = Device {
            container_path: "/dev/data".to_owned(),
            host_path: disk.node(),
            permissions: "mrw".to_owned(),
        };
        let container = pod.container(name, SLEEP);
        container.edit(|config| config.devices.push(device)).start()
    };
    let size = |container: &Container| container.sh("wc -c < /dev/data");
    let first = with("block-part")?;
    equal("its size", (2 * MIB).to_string(), size(&first)?)?;
    disk.grow(4 * MIB)?;
    let next = with("block-part-next")?;
    for (name, container) in [("of the next", next), ("of the first", first)] {
        eventually(name, clock::seconds(3), || {
            Ok((size(&container)? == (4 * MIB).to_string()).then_some(()))
        })?;
        container.remove()?;
    }
    Ok(())
}
