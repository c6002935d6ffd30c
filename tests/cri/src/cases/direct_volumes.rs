//! Volumes that a storage driver hands over as block devices, as it does for Kata Containers: their file systems are the
//! guest's, and the node mounts nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use serde_json::{Value, json};

use super::block::ReadOnly;
use super::sandbox::DropIn;
use crate::container::{Container, eventually};
use crate::loops::Loop;
use crate::mounted::Mounted;
use crate::node::{self, Directory, TOOLS};
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "direct volume: the guest's file system, its group's, shared by the pod, grown online, and free afterwards",
        used,
    ),
    case(
        "volumes",
        "direct volume: what cannot be had, or is not allowed, is refused with the reason, and nothing is left",
        refusals,
    ),
    case(
        "volumes",
        "direct volume: an image in a file is one pod's alone, or read by several, and refused while the node has it",
        image_alone,
    ),
    case(
        "volumes",
        "direct volume: brig direct-volume makes, lists, measures, grows and removes one",
        commanded,
    ),
];

const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const ALLOWED: &str = "direct_volumes = true\n";
const MIB: u64 = 1 << 20;
const GROUP: &str = "4242";

/// A volume as kubelet and a driver prepare it.
pub(super) struct Direct {
    /// Where kubelet has it, with nothing in it.
    pub(super) path: PathBuf,
    /// What the driver has written.
    written: PathBuf,
    directory: Directory,
}

impl Direct {
    pub(super) fn new(name: &str) -> Result<Self> {
        let directory = Directory::volume("kubernetes.io~csi", name)?;
        let path = directory.directory("mount")?;
        // By another program than the one under test.
        let encode = format!("printf %s {} | base64 -w0 | tr '+/' '-_'", path.display());
        let written = Path::new(ROOT).join(node::run("sh", &["-c", &encode])?.trim());
        fs::create_dir_all(&written)?;
        Ok(Self {
            path,
            written,
            directory,
        })
    }

    fn write(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.written.join("mountInfo.json"), text)?)
    }

    pub(super) fn of(&self, device: &str, kind: &str, metadata: &str) -> Result<()> {
        self.write(&format!(
            r#"{{"volume-type":"block","device":"{device}","fstype":"{kind}","metadata":{{{metadata}}},"options":["noatime"]}}"#
        ))
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.written);
        // If they were made for this.
        let _ = fs::remove_dir(ROOT);
    }
}

/// A disk with ext4 on it.
fn formatted(directory: &Directory, bytes: u64) -> Result<Loop> {
    let disk = Loop::new(&directory.path.join("disk"), bytes)?;
    node::run("mkfs.ext4", &["-q", "-F", &disk.node()])?;
    Ok(disk)
}

fn used(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc knows no direct volumes");
    }
    let directory = Directory::new("direct")?;
    let disk = formatted(&directory, 16 * MIB)?;
    let volume = Direct::new("pv")?;
    volume.of(&disk.node(), "ext4", &format!(r#""fsGroup":"{GROUP}""#))?;
    let configured = DropIn::new(ALLOWED)?;
    let pod = suite.run("direct")?;
    let writer = pod.container("writer", SLEEP).mount(&volume.path, "/data");
    let writer = writer
        .security(|security| {
            security.run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 });
            security.supplemental_groups = vec![4242];
        })
        .start()?;
    let shown = writer.sh("grep ' /data ' /proc/mounts; stat -c '%g %a' /data")?;
    contains("what is mounted", " ext4 ", &shown)?;
    contains("its options", "noatime", &shown)?;
    contains("who may write", "4242 2775", &shown)?;
    writer.sh("mkdir -p /data/a/b && echo text > /data/a/b/file && sync /data/a/b/file")?;
    let seen = fs::read_dir(&volume.path)?.count();
    equal("on the node", 0, seen)?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    that(
        "no mount of the node",
        !mounts.contains(&format!("{} ", disk.node())),
    )?;
    let elsewhere = directory.directory("elsewhere")?;
    let place = elsewhere.display().to_string();
    let mounted = node::run("mount", &[&disk.node(), &place]);
    refused(
        "a mount by the node meanwhile",
        mounted,
        &["Can't open blockdev", "busy"],
    )?;

    // Kubelet makes the directory of a sub-path where it has the volume, and binds it.
    fs::create_dir_all(volume.path.join("a/b"))?;
    let bound = volume.directory.sub_path()?;
    fs::create_dir(&bound)?;
    let bind = Mounted::bind(&volume.path.join("a/b"), &bound)?;
    let reader = pod
        .container("reader", SLEEP)
        .mount_readonly(&bound, "/part");
    let reader = reader.start()?;
    equal("a part of it", "text", reader.sh("cat /part/file")?)?;
    reader.sh_fails("echo more > /part/file")?;
    writer.sh("echo more >> /data/a/b/file")?;
    equal("at once", "text\nmore", reader.sh("cat /part/file")?)?;
    // And one that is not there is made in the volume.
    let fresh = pod.container("fresh", SLEEP);
    fs::create_dir_all(volume.path.join("new"))?;
    let fresh = fresh.mount(&volume.path.join("new"), "/new").start()?;
    fresh.sh("echo made > /new/file")?;
    equal("in the volume", "made", writer.sh("cat /data/new/file")?)?;

    let size = || -> Result<u64> {
        let kib = writer.sh("df -k /data | tail -n 1 | awk '{ print $2 }'")?;
        kib.trim().parse().context("df")
    };
    let before = size()?;
    ensure!(before < 16 << 10, "{before} KiB before it grows");
    disk.grow(48 * MIB)?;
    eventually("the file system has grown", clock::seconds(5), || {
        Ok((size()? > 40 << 10).then_some(()))
    })?;

    let other = suite.run("direct-other")?;
    let second = other
        .container("second", SLEEP)
        .mount(&volume.path, "/data");
    refused("another pod", second.start(), &["in use on the node"])?;

    writer.remove().context("the writer")?;
    equal(
        "left to the others",
        "text\nmore",
        reader.sh("cat /part/file")?,
    )?;
    fresh.remove().context("the one with a new part")?;
    reader.remove().context("the reader")?;
    // Unplugged, and clean.
    node::run("e2fsck", &["-fn", &disk.node()]).context("what is on the disk")?;
    let again = pod.container("again", SLEEP).mount(&volume.path, "/data");
    let again = again.start()?;
    equal(
        "it is there again",
        "text\nmore",
        again.sh("cat /data/a/b/file")?,
    )?;
    drop((again, configured));
    bind.unmount()?;
    drop(pod);
    disk.freed()
}

/// `brig direct-volume` with these arguments.
fn command(arguments: &[&str]) -> Result<String> {
    node::run("brig", &[&["direct-volume"], arguments].concat())
}

fn answer(arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&command(
        &[arguments, &["--json"]].concat(),
    )?)?)
}

/// KiB of a volume, as a container that has it sees it: all, used, available.
fn seen(container: &Container, place: &str) -> Result<[u64; 3]> {
    let text = container.sh(&format!(
        "df -k {place} | tail -n 1 | awk '{{ print $2, $3, $4 }}'"
    ))?;
    let figures: Vec<u64> = text
        .split_whitespace()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    figures.try_into().ok().context("three figures of df")
}

/// An image with xfs on it, whose program the node lacks.
fn xfs_image(suite: &mut Suite, directory: &Directory) -> Result<PathBuf> {
    suite.image(TOOLS)?;
    let pod = suite.run("direct-mkfs")?;
    let maker = pod.container("mkfs", SLEEP).image(TOOLS.0);
    let maker = maker.mount(&directory.path, "/made").start()?;
    maker.sh("truncate -s 320M /made/image && mkfs.xfs -q /made/image")?;
    Ok(directory.path.join("image"))
}

fn commanded(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc knows no direct volumes");
    }
    let directory = Directory::new("direct")?;
    let disk = formatted(&directory, 16 * MIB)?;
    let image = xfs_image(suite, &directory)?;
    // As kata-runtime and kata-ctl are called, and by its parts.
    let (first, second) = (Direct::new("pv-1")?, Direct::new("pv-2")?);
    let (one, two) = (
        first.path.display().to_string(),
        second.path.display().to_string(),
    );
    let info = json!({ "volume-type": "block", "device": disk.node(), "fstype": "ext4" });
    command(&[
        "add",
        "--volume-path",
        &one,
        "--mount-info",
        &info.to_string(),
    ])?;
    let image_path = image.display().to_string();
    let parts = ["add", &two, "--device", &image_path, "--fstype", "xfs"];
    command(&[&parts[..], &["--options", "noatime", "--fs-group", GROUP]].concat())?;
    ensure!(
        first.written.join("mountInfo.json").exists(),
        "not where the shim looks for it"
    );
    refused(
        "what has no device",
        command(&["add", "/v", "--device", "/dev/brig-none", "--fstype", "xfs"]),
        &["/dev/brig-none is missing"],
    )?;
    refused(
        "figures that nobody can tell",
        command(&["stats", &one]),
        &["no running pod"],
    )?;
    contains(
        "growth before anybody has it",
        "when one mounts it",
        &command(&["resize", &one, &(16 * MIB).to_string()])?,
    )?;

    let configured = DropIn::new(ALLOWED)?;
    let pod = suite.run("direct-commands")?;
    let container = pod.container("main", SLEEP);
    let container = container.mount(&first.path, "/one");
    let container = container.mount(&second.path, "/two").start()?;
    let listed = answer(&["list"])?;
    let rows = listed.as_array().context("a list")?;
    for (path, kind) in [(&one, "ext4"), (&two, "xfs")] {
        let row = rows.iter().find(|row| row["path"] == **path);
        let row = row.with_context(|| format!("{path} is not in {listed}"))?;
        equal("its type", json!(kind), row["fileSystem"].clone())?;
        equal("its pod", json!(pod.id), row["pod"]["id"].clone())?;
    }
    container.sh(
        "head -c 4194304 /dev/urandom > /one/file && sync /one/file && stat -c %g /two | grep 4242",
    )?;
    let usage = answer(&["stats", "--volume-path", &one])?["usage"].clone();
    let [all, used, available] = seen(&container, "/one")?;
    for (figure, kib) in [("total", all), ("used", used), ("available", available)] {
        equal(figure, json!(kib * 1024), usage[0][figure].clone())?;
    }
    equal(
        "units",
        json!([1, 2]),
        json!([usage[0]["unit"], usage[1]["unit"]]),
    )?;
    ensure!(used > 4096, "{used} KiB are used");
    let inodes = container.sh("stat -f -c %c /one")?;
    equal("inodes", inodes.trim(), usage[1]["total"].to_string())?;

    refused(
        "what its device has not",
        command(&["resize", &one, "--size", &(48 * MIB).to_string()]),
        &["fewer than 50331648"],
    )?;
    disk.grow(48 * MIB)?;
    let grown = answer(&["resize", &one, &(48 * MIB).to_string()])?;
    equal("the device", json!(48 * MIB), grown["deviceBytes"].clone())?;
    let [all, ..] = seen(&container, "/one")?;
    ensure!(all > 40 << 10, "{all} KiB after it has grown");
    equal("told", json!(all * 1024), grown["fileSystemBytes"].clone())?;
    // Nothing of the node tells that a file has grown.
    let [before, ..] = seen(&container, "/two")?;
    fs::File::options()
        .write(true)
        .open(&image)?
        .set_len(640 * MIB)?;
    equal("not yet", before, seen(&container, "/two")?[0])?;
    command(&["resize", &two])?;
    let [after, ..] = seen(&container, "/two")?;
    ensure!(after > before + (300 << 10), "{before} KiB, then {after}");

    let kept = command(&["remove", &one]);
    refused("a volume in use", kept, &[pod.id.as_str()])?;
    container.remove()?;
    drop((pod, configured));
    for path in [&one, &two] {
        for was_there in [true, false] {
            let removed = answer(&["remove", path])?;
            equal("was there", json!(was_there), removed["removed"].clone())?;
        }
    }
    refused(
        "what is there no more",
        command(&["stats", &one]),
        &["there is no direct volume"],
    )?;
    node::run("e2fsck", &["-fn", &disk.node()]).context("what is on the disk")?;
    disk.freed()
}

fn image_alone(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc knows no direct volumes");
    }
    let directory = Directory::new("direct-image")?;
    let image = directory.path.join("image");
    fs::File::create(&image)?.set_len(16 * MIB)?;
    let image = image.display().to_string();
    node::run("mkfs.ext4", &["-q", "-F", &image])?;
    let volume = Direct::new("pv")?;
    let with = |option: &str| {
        volume.write(&format!(
            r#"{{"volume-type":"block","device":"{image}","fstype":"ext4","options":["{option}"]}}"#
        ))
    };
    with("noatime")?;
    let _configured = DropIn::new(ALLOWED)?;
    let (pod, other) = (suite.run("direct-image")?, suite.run("direct-image-other")?);
    let start = |pod: &Pod, name| {
        let container = pod.container(name, SLEEP).mount(&volume.path, "/data");
        container.start()
    };
    let writer = start(&pod, "writer")?;
    writer.sh("echo text > /data/file && sync /data/file")?;
    // As in a rollout: the new pod starts while the old one is still there.
    let by_pod = ["in use on the node: another pod has it, by way of /dev/loop"];
    refused("another pod", start(&other, "writer"), &by_pod)?;
    with("ro")?;
    refused("a reader beside it", start(&other, "reader"), &by_pod)?;
    let elsewhere = directory.directory("elsewhere")?;
    let place = elsewhere.display().to_string();
    let mount = || node::run("mount", &["-o", "loop", &image, &place]);
    refused(
        "a mount by the node meanwhile",
        mount(),
        &["Can't open blockdev", "busy"],
    )?;
    writer.remove().context("the writer")?;

    mount()?;
    let mounted = Mounted::made(&elsewhere);
    let by_node = [" of the node has it: unmount that and detach it (losetup"];
    refused("a reader meanwhile", start(&other, "reader"), &by_node)?;
    with("noatime")?;
    refused("a writer meanwhile", start(&other, "writer"), &by_node)?;
    mounted.unmount()?;
    let writer = start(&other, "writer")?;
    equal("from the first pod", "text", writer.sh("cat /data/file")?)?;
    writer.remove().context("the other pod's writer")?;

    with("ro")?;
    let (one, two) = (start(&pod, "reader")?, start(&other, "reader")?);
    for reader in [&one, &two] {
        equal("for all readers", "text", reader.sh("cat /data/file")?)?;
        reader.sh_fails("echo more > /data/file")?;
    }
    two.remove().context("a reader")?;
    with("noatime")?;
    refused(
        "a writer beside a reader",
        start(&other, "writer"),
        &["in use on the node: another pod reads it"],
    )?;
    one.remove().context("the last reader")?;
    drop((pod, other));
    node::run("e2fsck", &["-fn", &image]).context("what is in the image")?;
    Ok(())
}

fn refusals(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc knows no direct volumes");
    }
    let directory = Directory::new("direct")?;
    let disk = formatted(&directory, 16 * MIB)?;
    let blank = directory.directory("blank")?;
    let blank = Loop::new(&blank.join("disk"), 16 * MIB)?;
    let volume = Direct::new("pv")?;
    volume.of(&disk.node(), "ext4", "")?;
    {
        let pod = suite.run("direct-not-allowed")?;
        let container = pod.container("main", SLEEP).mount(&volume.path, "/data");
        refused(
            "a handler that takes none",
            container.start(),
            &["direct_volumes = true"],
        )?;
    }
    let _configured = DropIn::new(ALLOWED)?;
    let pod = suite.run("direct-refused")?;
    let refused_for = |what: &str, reason: &str| -> Result<()> {
        let container = pod.container("main", SLEEP).mount(&volume.path, "/data");
        let started = container.start();
        refused(what, started, &[reason]).with_context(|| what.to_owned())
    };
    volume.write("{ \"device\": ")?;
    refused_for("what is no JSON", "not what a storage driver writes")?;
    volume.of("/dev/brig-no-such-device", "ext4", "")?;
    refused_for("a device that is not there", "missing on this node")?;
    volume.of("/dev/null", "ext4", "")?;
    refused_for("what is no block device", "neither a block device")?;
    volume.of(&disk.node(), "nosuchfs", "")?;
    refused_for(
        "a file system that the guest lacks",
        "no file system \"nosuchfs\"",
    )?;
    volume.of(&disk.node(), "proc", "")?;
    refused_for("the kernel's own file system", "no file system of a disk")?;
    volume.of(&blank.node(), "ext4", "")?;
    refused_for("a device with nothing on it", "mounting it as ext4")?;
    volume.of(&disk.node(), "ext4", r#""encryptionKey":"x""#)?;
    refused_for("what is encrypted", "encryptionKey")?;
    {
        let _readonly = ReadOnly::new(&disk)?;
        volume.of(&disk.node(), "ext4", "")?;
        refused_for(
            "a device that is read-only on the node",
            "is read-only on the node, and is to be written to",
        )?;
    }
    // The pod is none the worse, and the devices are free though it lives.
    let plain = pod.container("main", SLEEP).start()?;
    equal(
        "disks of the guest",
        "0",
        plain.sh("ls /sys/block | grep -c ^vd || true")?,
    )?;
    blank.freed()?;
    disk.freed()
}
