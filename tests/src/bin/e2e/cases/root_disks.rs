//! Root file systems that are disks of the guest, as the erofs snapshotter of containerd 2.2 and later hands them over:
//! unmounted. The suite is the daemon.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::Pod;
use brig_tests::node::daemon::pod_config::PodConfig;
use brig_tests::node::daemon::snapshot::{self, mount};
use brig_tests::node::{clock, process};
use containerd_shim_protos::api::Mount;

use super::daemon_pods::config;
use super::leaks::baseline;
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "disks",
        "2.2: a hundred erofs layers are one disk of the pod, the overlay is made in the guest",
        erofs,
    ),
    brig(
        "disks",
        "2.2: a root file system that cannot be is refused, and the pod goes on",
        refused,
    ),
    brig(
        "disks",
        "2.3: the layers of a pod with a user namespace belong to its users",
        mapped,
    ),
];

/// Where what these cases need is made.
pub const DIRECTORY: &str = "/var/lib/brig-e2e-disks";

/// Runs a program of the node, which must succeed.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    // The node has no udev: dmsetup makes the nodes itself.
    command.args(args).env("DM_DISABLE_UDEV", "1");
    let outcome = process::run(command, clock::seconds(20))?
        .success()
        .with_context(|| format!("{program} {}", args.join(" ")))?;
    Ok(outcome.text())
}

/// The node's mounts.
pub fn mounts() -> Result<BTreeSet<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().map(str::to_owned).collect())
}

/// Images of erofs, as the differ of containerd makes them.
pub struct Layers {
    pub directory: PathBuf,
}

impl Layers {
    pub fn new() -> Result<Self> {
        let directory = PathBuf::from(DIRECTORY);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    pub fn make(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<String> {
        // The differ's own options: no part of a file lies beside its inode.
        self.make_with(name, &["-b4096", "-Enoinline_data"], fill)
    }

    pub fn make_with(
        &self,
        name: &str,
        options: &[&str],
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<String> {
        let tree = self.directory.join(format!("{name}.tree"));
        fs::create_dir_all(&tree)?;
        fill(&tree)?;
        let image = self.path(&format!("{name}.erofs"));
        let tree = tree.display().to_string();
        run(
            "mkfs.erofs",
            &[&["--quiet"], options, &[&image, &tree]].concat(),
        )?;
        Ok(image)
    }

    /// A layer with a shell, and with the places of what a pod mounts.
    pub fn base(&self) -> Result<String> {
        self.make("base", |tree| {
            for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
                fs::create_dir(tree.join(directory))?;
            }
            for file in ["hostname", "hosts", "resolv.conf"] {
                fs::write(tree.join("etc").join(file), "")?;
            }
            fs::copy("/usr/bin/busybox", tree.join("bin/busybox"))?;
            std::os::unix::fs::symlink("busybox", tree.join("bin/sh"))?;
            Ok(fs::write(tree.join("which"), "base\n")?)
        })
    }

    pub fn writable(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        File::create(&path)?.set_len(32 << 20)?;
        run("mkfs.ext4", &["-q", "-F", &path])?;
        Ok(path)
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn erofs(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    let base = layers.base()?;
    let middle = layers.make("middle", |tree| {
        Ok(fs::write(tree.join("which"), "middle\n")?)
    })?;
    let top = layers.make("top", |tree| Ok(fs::write(tree.join("which"), "top\n")?))?;
    // The uppermost first.
    let mut stack = vec![top];
    for number in 0..98 {
        let copy = layers.path(&format!("middle-{number}.erofs"));
        fs::copy(&middle, &copy)?;
        stack.push(copy);
    }
    stack.push(base.clone());

    let daemon = Daemon::new(Generation::V2_2, &suite.ctr.runtime, "disks")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "disks", &config())?;
    let shell = |script| ["/bin/busybox", "sh", "-c", script];
    let disks = "busybox ls /sys/block | busybox grep -c vd";
    let wait = |container: &brig_tests::node::daemon::pod::Container<'_>| -> Result<String> {
        let (said, status) = container.run(patience())?;
        equal("exit status", 0, status).with_context(|| said.clone())?;
        Ok(said)
    };

    let mounted = mounts()?;
    let one = layers.writable("one.img")?;
    let script = format!("busybox cat /which; echo written > /new; busybox rm /which; {disks}");
    let first = pod.container_from("one", &shell(&script), Some(snapshot::erofs(&one, &stack)))?;
    let added: Vec<_> = mounts()?.difference(&mounted).cloned().collect();
    equal("mounts of the node", Vec::<String>::new(), added)?;
    equal(
        "of a hundred layers and one disk",
        "top\n2\n",
        wait(&first)?.as_str(),
    )?;
    let two = layers.writable("two.img")?;
    let second = pod.container_from("two", &shell(&script), Some(snapshot::erofs(&two, &stack)))?;
    equal(
        "the layers are there once",
        "top\n3\n",
        wait(&second)?.as_str(),
    )?;
    first.delete()?;
    second.delete()?;
    that("no loop device is left", !loops()?.contains(DIRECTORY))?;
    run("e2fsck", &["-f", "-n", &one]).context("the writable disk")?;
    let new = run("debugfs", &["-R", "cat /upper/new", &one])?;
    equal("on the writable disk", "written", new.trim())?;

    // What is written goes to a directory of the node.
    let (upper, work) = (layers.directory.join("fs"), layers.directory.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let (upper_option, work_option) = (
        format!("upperdir={}", upper.display()),
        format!("workdir={}", work.display()),
    );
    let shared = vec![
        mount("erofs", &stack[0], &["ro", "loop"]),
        mount("erofs", &base, &["ro", "loop"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &[&work_option, &upper_option, "lowerdir={{ overlay 0 1 }}"],
        ),
    ];
    let third = pod.container_from("three", &shell(&script), Some(shared))?;
    equal("with a directory", "top\n1\n", wait(&third)?.as_str())?;
    third.delete()?;
    equal(
        "on the node",
        "written\n",
        fs::read_to_string(upper.join("new"))?.as_str(),
    )?;

    // A view of one layer.
    let view = vec![mount("erofs", &base, &["ro", "loop"])];
    let script = "busybox cat /which; echo x > /new && echo written";
    let fourth = pod.container_from("four", &shell(script), Some(view))?;
    let ended = fourth.waiting();
    fourth.start()?;
    equal(
        "a layer alone",
        "base\n",
        fourth.written(patience())?.as_str(),
    )?;
    equal(
        "nothing is written to it",
        1,
        ended.recv_timeout(patience())??.exit_status,
    )?;
    fourth.delete()?;

    pod.end()?;
    drop(daemon);
    before.nothing_left(patience())
}

/// Each is refused with what helps, and the next container is made in the same pod.
fn refused(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    let base = layers.base()?;
    let garbage = layers.path("garbage.img");
    fs::write(&garbage, vec![0x5a; 1 << 20])?;
    let empty = layers.path("empty.img");
    File::create(&empty)?;
    let gone = layers.path("gone.erofs");
    let layer = |path: &str| mount("erofs", path, &["ro", "loop"]);
    let overlay = |lower: &str| {
        let lower = format!("lowerdir={lower}");
        mount("format/overlay", "overlay", &[&lower])
    };
    let wrong: Vec<(Vec<Mount>, &str)> = vec![
        (
            vec![mount(
                "ext4",
                &garbage,
                &["rw", "loop", "X-containerd.dmverity=/x"],
            )],
            "dmverity_mode",
        ),
        (vec![layer(&gone)], "gone.erofs"),
        (vec![layer(&empty)], "empty.img"),
        (
            vec![mount("ext4", "/dev/mapper/brig-e2e-gone", &[])],
            "brig-e2e-gone",
        ),
        // The guest's kernel does not find what it is said to be.
        (
            vec![mount("ext4", &garbage, &["rw", "loop"])],
            "ext4 of the root file system",
        ),
        (
            vec![mount("xfs", &garbage, &["rw", "loop"])],
            "xfs of the root file system",
        ),
        (
            vec![layer(&base), mount("f2fs", &base, &["ro"])],
            "f2fs of the root file system",
        ),
        (
            vec![layer(&base), overlay("{{ mount 1 }}")],
            "no place in an earlier mount",
        ),
        (vec![layer(&base); 251], "251 layers"),
        (
            vec![mount("ext4", &garbage, &["rw", "loop", "nonsense=1"])],
            "nonsense",
        ),
    ];
    let daemon = Daemon::new(Generation::V2_2, &suite.ctr.runtime, "refused")?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "refused", &config())?;
    for (number, (rootfs, reason)) in wrong.into_iter().enumerate() {
        let name = format!("wrong{number}");
        let outcome = pod.container_from(&name, &["true"], Some(rootfs));
        let error = outcome
            .err()
            .with_context(|| format!("taken, and not refused for {reason:?}"))?;
        contains("the refusal", reason, &format!("{error:#}"))?;
        that("no loop device is left", !loops()?.contains(DIRECTORY))?;
    }
    let args = [
        "/bin/busybox",
        "sh",
        "-c",
        "busybox ls /sys/block | busybox grep -c vd",
    ];
    let right = pod.container_from("right", &args, Some(vec![layer(&base)]))?;
    let (said, status) = right.run(patience())?;
    equal("disks", "1\n", said.as_str())?;
    equal("exit status", 0, status)?;
    right.delete()?;
    pod.end()?;
    drop(daemon);
    before.nothing_left(patience())
}

/// `remap_ids` of the snapshotter: the overlay is asked for with the pod's map, and the layers are as they are.
fn mapped(suite: &mut Suite) -> Result<()> {
    const ROOT: u32 = 200_000;
    let layers = Layers::new()?;
    let base = layers.base()?;
    let top = layers.make("top", |tree| {
        let file = tree.join("mine");
        fs::write(&file, "")?;
        Ok(chown(&file, Some(7), Some(9))?)
    })?;
    let daemon = Daemon::new(Generation::V2_3, &suite.ctr.runtime, "mapped")?;
    let before = baseline(suite)?;
    let config = PodConfig {
        user_namespace: Some((0, vec![[0, ROOT, 65_536]])),
        ..config()
    };
    let pod = Pod::by_sandbox_api(&daemon, "mapped", &config)?;
    let writable = layers.writable("mapped.img")?;
    let mut mounts = snapshot::erofs(&writable, &[top, base]);
    let map = format!("map=0:{ROOT}:65536");
    let overlay = mounts.last_mut().context("an overlay")?;
    overlay
        .options
        .extend([format!("uid{map}"), format!("gid{map}")]);
    // What is written goes to a directory of the node, which the snapshotter gives to the pod's root.
    let (upper, work) = (layers.directory.join("fs"), layers.directory.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    chown(&upper, Some(ROOT), Some(ROOT))?;
    let mut shared = mounts[1..].to_vec();
    let overlay = shared.last_mut().context("an overlay")?;
    overlay.options = vec![
        format!("workdir={}", work.display()),
        format!("upperdir={}", upper.display()),
        "lowerdir={{ overlay 0 1 }}".to_owned(),
        format!("uid{map}"),
        format!("gid{map}"),
    ];

    let script = "exec 2>&1; busybox stat -c %u:%g / /which /mine; echo x > /new && echo y >> /which && \
                  busybox stat -c %u:%g /new /which";
    let shell = ["/bin/busybox", "sh", "-c", script];
    for (name, mounts) in [("disk", mounts), ("directory", shared)] {
        let container = pod.container_from(name, &shell, Some(mounts))?;
        let (said, status) = container.run(patience())?;
        equal(name, "0:0\n0:0\n7:9\n0:0\n0:0\n", said.as_str())?;
        equal(name, 0, status)?;
        container.delete()?;
    }
    for file in ["new", "which"] {
        let told = run(
            "debugfs",
            &["-R", &format!("stat /upper/{file}"), &writable],
        )?;
        let words: Vec<&str> = told.split_whitespace().collect();
        let owner = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.parse().ok()
        };
        let owners = (owner("User:"), owner("Group:"));
        equal("on the disk", (Some(ROOT), Some(ROOT)), owners).context(file)?;
        let on_node = fs::metadata(upper.join(file))?;
        equal("on the node", (ROOT, ROOT), (on_node.uid(), on_node.gid())).context(file)?;
    }
    pod.end()?;
    drop(daemon);
    before.nothing_left(patience())
}

/// Files behind the node's loop devices.
pub fn loops() -> Result<String> {
    run(
        "losetup",
        &["--list", "--noheadings", "--output", "BACK-FILE"],
    )
}
