//! Block devices of the node in a pod: volumes without a file system (`volumeMode: Block`), which containerd gets as
//! devices, and hostPath volumes of a device's node.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context, Result};
use brig_hypervisor::control::Counters;
use brig_tests::node::check::{contains, contains_one, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::{ContainerConfig, Device, Int64Value};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::handlers::Own;
use super::life::{sandbox_pid, shim_of};
use crate::container::{Container, eventually};
use crate::loops::Loop;
use crate::mounted::Mounted;
use crate::node::{self, Directory};
use crate::pod::{Pod, PodSpec};
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
    case(
        "volumes",
        "raw block volume: a queue for each CPU, each used, a limit holds for all of them together",
        queues,
    ),
    case(
        "volumes",
        "raw block volume: in a guest that goes on from a template a queue for each CPU that the pod has, each used",
        queues_of_a_clone,
    ),
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

/// As kubelet asks for a volume of `volumeDevices`.
fn volume(disk: &Loop, path: &str, permissions: &str) -> impl FnOnce(&mut ContainerConfig) {
    let device = Device {
        container_path: path.to_owned(),
        host_path: disk.node(),
        permissions: permissions.to_owned(),
    };
    move |config| config.devices.push(device)
}

/// What is at a sector.
fn at(container: &Container, path: &str, sector: u32) -> Result<String> {
    container.sh(&format!(
        "dd if={path} bs=512 skip={sector} count=1 2>/dev/null | head -n 1"
    ))
}

fn write(path: &str, sector: u32, text: &str) -> String {
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

/// Has both CPUs write to `/dev/data` at once, each its own half, by the script that is returned.
fn both_write(pod: &Pod, container: &Container, disk: &Loop) -> Result<(String, f64)> {
    let number = number(container)?;
    let count = format!("ls -d /sys/dev/block/{number}/mq/* | wc -l");
    equal("queues", "2", container.sh(&count)?)?;
    let half = |cpu: u32| {
        format!(
            "yes cpu-{cpu} | taskset {mask:x} dd of=/dev/data bs=64k count=32 seek={seek} iflag=fullblock oflag=direct conv=notrunc 2>/dev/null",
            mask = 1 << cpu,
            seek = 32 * cpu
        )
    };
    let both = format!("{} & {}; wait", half(0), half(1));
    let taken = seconds(container, &both)?;
    for (cpu, offset) in [(0, 0), (1, 2 * MIB)] {
        let there = disk.read(offset, 6)?;
        equal(
            "on the node",
            format!("cpu-{cpu}\n"),
            String::from_utf8_lossy(&there),
        )?;
    }
    let counted = served(pod)?;
    that(
        &format!("both queues have served requests and interrupted: {counted:?}"),
        counted.len() == 2
            && counted
                .iter()
                .all(|(chains, interrupts)| *chains > 16 && *interrupts > 0),
    )?;
    Ok((both, taken))
}

/// Of `/dev/data`.
fn number(container: &Container) -> Result<String> {
    container.sh("set -- $(stat -c '%t %T' /dev/data); echo $((0x$1)):$((0x$2))")
}

/// The template of a handler's file, made now and dropped at the end.
struct Template(String);

impl Template {
    fn of(file: &Path) -> Result<Self> {
        let file = file.display().to_string();
        let built = node::run("brig", &["template", "build", "--json", "--config", &file])?;
        let built: Value = serde_json::from_str(&built)?;
        let key = built["template"].as_str().context("a template's key")?;
        Ok(Self(key.to_owned()))
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let _ = node::run("brig", &["template", "drop", &self.0]);
    }
}

fn queues_of_a_clone(suite: &mut Suite) -> Result<()> {
    // A guest is captured with one CPU; the other comes to it when it goes on.
    let own = Own::new(suite, "vcpus = 2\nmax_vcpus = 2\ntemplate = true\n", &[])?;
    let template = Template::of(own.file())?;
    let directory = Directory::new("block-queues")?;
    let disk = Loop::new(&directory.path.join("disk"), 8 * MIB)?;
    let pod = PodSpec::new(Own::HANDLER, "block-clone").run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let told = node::run("brig", &["inspect", "--json", &pod.id])?;
    let told: Value = serde_json::from_str(&told)?;
    equal(
        "what it goes on from",
        template.0.as_str(),
        told["shim"]["template"].as_str().unwrap_or("-"),
    )?;
    equal("its CPUs", "2", container.sh("nproc")?)?;
    both_write(&pod, &container, &disk)?;
    container.remove()?;
    drop(pod);
    disk.freed()
}

fn queues(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, "vcpus = 2\n", &[])?;
    let directory = Directory::new("block-queues")?;
    let disk = Loop::new(&directory.path.join("disk"), 8 * MIB)?;
    let pod = PodSpec::new(Own::HANDLER, "block-queues")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .edit(volume(&disk, "/dev/data", "mrw"))
        .start()?;
    let (both, unlimited) = both_write(&pod, &container, &disk)?;
    let number = number(&container)?;

    // 4 MiB at half of one a second, in a group below the container's own, which has no processes then.
    let limited = container.sh(&format!(
        "cd /sys/fs/cgroup; mkdir rest limited
        for pid in $(cat cgroup.procs); do echo $pid > rest/cgroup.procs 2>/dev/null; done
        echo +io > cgroup.subtree_control && echo '{number} wbps={limit}' > limited/io.max || exit 1
        echo $$ > limited/cgroup.procs; before=$(cut -d. -f1 /proc/uptime)
        {both}
        echo $(($(cut -d. -f1 /proc/uptime) - before))",
        limit = MIB / 2
    ))?;
    let limited: f64 = limited.parse()?;
    that(
        &format!("{limited} s with the limit are six at least, where {unlimited} s are without"),
        limited >= 6.0,
    )?;
    container.remove()?;
    disk.freed()
}

/// What a script takes by the clock of its guest.
fn seconds(container: &Container, script: &str) -> Result<f64> {
    let uptime = || -> Result<f64> { Ok(container.sh("cut -d' ' -f1 /proc/uptime")?.parse()?) };
    let before = uptime()?;
    container.sh(script)?;
    Ok(uptime()? - before)
}

/// Requests and interrupts of each queue of the pod's only disk.
fn served(pod: &Pod) -> Result<Vec<(u64, u64)>> {
    let counters: Counters = serde_json::from_str(&node::run("brig", &["counters", &pod.id])?)?;
    let mut disks = counters
        .devices
        .into_iter()
        .filter(|one| one.device == "block");
    let disk = disks.next().context("no disk")?;
    that("one disk", disks.next().is_none())?;
    Ok(disk.queues)
}

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
