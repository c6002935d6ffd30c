//! Directories of the node that lie in one another, mounted by several containers of a pod: whatever part of something a
//! container has, it is the same files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains_one, equal};
use brig_tests::node::clock;
use k8s_cri::v1::MountPropagation;

use crate::container::{Container, eventually};
use crate::mounted::Mounted;
use crate::node::{Directory, PROBE};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "subPath: the parts of a volume are one file system for the pod's containers",
        sub_paths,
    ),
    case(
        "volumes",
        "hostPath in another hostPath: one file system, and each as writable as it was asked for",
        nested,
    ),
    case(
        "volumes",
        "hostPath: a mount below that the node has replaced is the new one for a later container",
        replaced,
    ),
    case(
        "volumes",
        "HostToContainer: a mount that the node replaces at once is seen",
        replaced_at_once,
    ),
];

/// Device and inode number of a file as a container sees it.
fn file(container: &Container, path: &str) -> Result<String> {
    container.sh(&format!("stat -c '%d %i' {path}"))
}

/// A named pipe connects two containers that have the same directory at these paths.
fn pipe(reader: (&Container, &str), writer: (&Container, &str)) -> Result<()> {
    let (reader, at) = reader;
    // No stream of the exec may stay with the one that waits.
    reader.sh(&format!(
        "mkfifo {at}/pipe && (cat {at}/pipe > {at}/got 2>&1 < /dev/null &)"
    ))?;
    let (writer, to) = writer;
    writer.sh(&format!("timeout 20 sh -c 'echo through > {to}/pipe'"))?;
    eventually("a named pipe connects them", clock::seconds(2), || {
        Ok((reader.sh(&format!("cat {at}/got"))? == "through").then_some(()))
    })?;
    reader.sh(&format!("rm {at}/pipe {at}/got")).map(drop)
}

fn sub_paths(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    suite.image(PROBE)?;
    let volume = Directory::volume("kubernetes.io~local-volume", "parts")?;
    let app = volume.directory("app")?;
    volume.file("outside", "not for it\n")?;
    // Kubelet binds the directory anew for each container.
    let main = volume.sub_path()?;
    let side = main
        .ancestors()
        .nth(2)
        .context("not kubelet's path")?
        .join("side/1");
    let mut bound = Vec::new();
    for at in [&main, &side] {
        fs::create_dir_all(at)?;
        bound.push(Mounted::bind(&app, at)?);
    }
    let start = |name: &str, source: &Path| {
        shared
            .pod
            .container(name, SLEEP)
            .mount(source, "/v")
            .start()
    };
    let first = start("parts-main", &main)?;
    let second = start("parts-side", &side)?;
    first.sh("echo one > /v/f")?;
    equal("by both", file(&first, "/v/f")?, file(&second, "/v/f")?)?;
    pipe((&first, "/v"), (&second, "/v"))?;
    first.remove()?;
    second.remove()?;
    let whole = start("parts-whole", &volume.path)?;
    let first = start("parts-main-again", &main)?;
    equal(
        "in the whole",
        file(&whole, "/v/app/f")?,
        file(&first, "/v/f")?,
    )?;
    pipe((&first, "/v"), (&whole, "/v/app"))?;
    first.sh_fails("cat /v/../outside")?;
    let watcher = shared
        .pod
        .container("parts-watcher", &["/bin/brig-probe", "watch", "/v", "news"])
        .image(PROBE.0)
        .mount_readonly(&side, "/v")
        .start()?;
    watcher.wait_line("ready")?;
    whole.sh("echo x > /v/app/.news && mv /v/app/.news /v/app/news")?;
    equal("exit code of who watches", 0, watcher.wait()?.exit_code)?;
    equal(
        "on the node",
        "one\n",
        fs::read_to_string(app.join("f"))?.as_str(),
    )
}

fn nested(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("nested-parts")?;
    let inner = volume.directory("a/inner")?;
    let single = volume.file("a/file", "single\n")?;
    let container = shared
        .pod
        .container("nested-parts", SLEEP)
        .mount(&single, "/file")
        .mount_readonly(&inner, "/inner")
        .mount(&volume.path, "/outer")
        .start()?;
    container.sh("echo x > /outer/a/inner/f")?;
    for (part, whole) in [("/inner/f", "/outer/a/inner/f"), ("/file", "/outer/a/file")] {
        equal(part, file(&container, whole)?, file(&container, part)?)?;
    }
    let error = container.sh_fails("touch /inner/new")?;
    contains_one("a part that is read", &["read-only file system"], &error)?;
    container.remove()?;
    // A whole that is read is not written to because a part is.
    let reader = shared
        .pod
        .container("nested-reader", SLEEP)
        .mount_readonly(&volume.path, "/outer")
        .mount(&inner, "/inner")
        .start()?;
    reader.sh("echo y > /inner/g")?;
    let error = reader.sh_fails("touch /outer/a/new")?;
    contains_one("a whole that is read", &["read-only file system"], &error)?;
    equal(
        "on the node",
        "y\n",
        fs::read_to_string(inner.join("g"))?.as_str(),
    )
}

/// A tmpfs whose only file says which it is.
fn marked(at: &Path, mark: &str) -> Result<Mounted> {
    let mounted = Mounted::tmpfs(at, "size=1m")?;
    fs::write(at.join("mark"), mark)?;
    Ok(mounted)
}

fn replaced(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("replaced")?;
    let below: PathBuf = volume.directory("below")?;
    let mut mounted = marked(&below, "0")?;
    let mut before = Vec::new();
    // The kernel mostly gives the mount the number of the one before.
    for mark in ["0", "1", "2"] {
        if mark != "0" {
            mounted.unmount()?;
            mounted = marked(&below, mark)?;
        }
        let container = shared
            .pod
            .container(&format!("replaced-{mark}"), SLEEP)
            .mount(&volume.path, "/v")
            .start()?;
        equal("what it sees", mark, container.sh("cat /v/below/mark")?)?;
        before.push((mark, container));
    }
    for (mark, container) in before {
        equal("those before", mark, container.sh("cat /v/below/mark")?)?;
        container.remove()?;
    }
    mounted.unmount().context("after its containers")
}

fn replaced_at_once(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("replaced-at-once")?;
    let below = volume.directory("below")?;
    let bound = Mounted::bind(&volume.path, &volume.path)?;
    bound.share()?;
    let container = shared
        .pod
        .container("replaced-at-once", SLEEP)
        .mount_with(&volume.path, "/v", |mount| {
            mount.propagation = MountPropagation::PropagationHostToContainer.into();
        })
        .start()?;
    let mut mounted = marked(&below, "first")?;
    for mark in ["first", "second", "third"] {
        if mark != "first" {
            mounted.unmount()?;
            mounted = marked(&below, mark)?;
        }
        eventually("the mount that is there", clock::seconds(3), || {
            let seen = container.exec(&["cat", "/v/below/mark"])?.text();
            Ok((seen == mark).then_some(()))
        })?;
    }
    container.remove()?;
    mounted.unmount()
}
