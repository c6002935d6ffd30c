//! What a volume mount can ask for beyond a directory: sockets, images, read-only all the way down,
//! and propagation towards the node.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, contains_one, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::{ImageSpec, MountPropagation};

use crate::container::eventually;
use crate::loops::Loop;
use crate::mounted::Mounted;
use crate::node::{self, Directory, PROBE};
use crate::suite::{Case, SLEEP, Suite, case, not_here, smoke};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "hostPath socket: it answers, or is refused by its name",
        socket,
    ),
    case(
        "volumes",
        "recursive read-only: a mount below is read-only too",
        recursive_read_only,
    ),
    case("volumes", "an image as a volume", image),
    case(
        "volumes",
        "Bidirectional: the pod sees a container's mount, and runc's node too",
        bidirectional,
    ),
    case(
        "volumes",
        "a file larger than the pod's memory is written and read back",
        large_file,
    ),
    smoke(
        "volumes",
        "what was mounted on the node when a pod started is free once the node has unmounted it",
        not_the_pods,
    ),
];

/// Another pod's volume, say: its disk may be taken away as soon as it is unmounted, and has to have all that was written.
fn not_the_pods(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("not-the-pods")?;
    let disk = Loop::new(&directory.path.join("image"), 8 << 20)?;
    node::run("mkfs.ext4", &["-q", "-F", &disk.node()])?;
    let place = directory.directory("mounted")?;
    node::run("mount", &[&disk.node(), &place.display().to_string()])?;
    let mounted = Mounted::made(&place);
    let pod = suite.run("not-the-pods")?;
    let container = pod.container("main", SLEEP).start()?;
    mounted.unmount()?;
    disk.freed().context("while a pod runs that never had it")?;
    equal("the pod", "runs", container.sh("echo runs")?.as_str())
}

fn socket(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    suite.image(PROBE)?;
    let directory = Directory::new("socket")?;
    let path = directory.path.join("server.sock");
    let listener = UnixListener::bind(&path)?;
    // Ends with the process: a case does not wait for a caller that never came.
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut line = String::new();
            let mut reader = BufReader::new(&stream);
            let _ = reader.read_line(&mut line);
            let _ = (&stream).write_all(format!("heard {line}").as_bytes());
        }
    });
    let outcome = shared
        .pod
        .container("socket", &["/bin/brig-probe", "dial", "/run/server.sock"])
        .image(PROBE.0)
        .mount(&path, "/run/server.sock")
        .finish();
    match outcome {
        Err(error) if suite.is_brig() => {
            let error = format!("{error:#}");
            contains("the refusal", "server.sock", &error)?;
            contains("the refusal", "socket", &error)
        }
        Err(error) => Err(error),
        Ok((container, status)) => {
            equal("exit code", 0, status.exit_code)?;
            container.wait_line("heard hello")
        }
    }
}

fn recursive_read_only(suite: &mut Suite) -> Result<()> {
    if suite.containerd.starts_with("1.") {
        return not_here("containerd 1.x does not know recursive read-only mounts");
    }
    if suite.is_brig() {
        return not_here(
            "before 2.3 containerd asks no shim but runc's for its features; asked for such a mount, 2.1.9 itself panics",
        );
    }
    let shared = suite.shared()?;
    let volume = Directory::new("recursive")?;
    let below = volume.directory("below")?;
    let _tmpfs = Mounted::tmpfs(&below, "size=1m")?;
    let container = shared
        .pod
        .container("recursive", SLEEP)
        .mount_with(&volume.path, "/v", |mount| {
            mount.readonly = true;
            mount.recursive_read_only = true;
        })
        .start()?;
    for path in ["/v/x", "/v/below/x"] {
        let error = container.sh_fails(&format!("touch {path}"))?;
        contains_one(path, &["read-only file system"], &error)?;
    }
    Ok(())
}

fn image(suite: &mut Suite) -> Result<()> {
    if suite.containerd.starts_with("1.") {
        return not_here("containerd has image volumes since 2.1");
    }
    let shared = suite.shared()?;
    suite.image(PROBE)?;
    let container = shared
        .pod
        .container("image-volume", SLEEP)
        .edit(|config| {
            config.mounts.push(k8s_cri::v1::Mount {
                container_path: "/image".to_owned(),
                readonly: true,
                image: Some(ImageSpec {
                    image: PROBE.0.to_owned(),
                    ..ImageSpec::default()
                }),
                ..k8s_cri::v1::Mount::default()
            });
        })
        .start()?;
    equal(
        "a program of it runs",
        "from an image",
        container.sh("/image/bin/brig-probe echo 'from an image'")?,
    )?;
    let error = container.sh_fails("touch /image/x")?;
    contains_one("a write", &["read-only file system"], &error)
}

/// A CSI driver's node plugin in a pod mounts for the node. A VM's mounts never reach it: only the pod's
/// other containers see them.
fn bidirectional(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("bidirectional")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let volume = Directory::new("rshared")?;
    let bound = Mounted::bind(&volume.path, &volume.path)?;
    bound.share()?;
    let start = |name: &str, mode: MountPropagation| {
        pod.container(name, SLEEP)
            .security(|security| security.privileged = true)
            .mount_with(&volume.path, "/v", |mount| mount.propagation = mode.into())
            .start()
    };
    let container = start("main", MountPropagation::PropagationBidirectional)?;
    let other = start("other", MountPropagation::PropagationHostToContainer)?;
    container.sh("mkdir /v/below && mount -t tmpfs none /v/below && echo up > /v/below/f")?;
    let seen = eventually("the mount", clock::seconds(1), || {
        Ok(fs::read_to_string(volume.path.join("below/f")).ok())
    });
    let by_other = other.exec(&["cat", "/v/below/f"])?.text();
    container.sh("umount /v/below")?;
    equal("another container of the pod sees", "up", by_other.as_str())?;
    if suite.is_brig() {
        return that("the node sees nothing of it", seen.is_err());
    }
    equal("the node sees", "up\n", seen?.as_str())
}

fn large_file(suite: &mut Suite) -> Result<()> {
    const MIB: u64 = 96;
    let shared = suite.shared()?;
    let volume = Directory::new("large-file")?;
    let container = shared
        .pod
        .container("large-file", SLEEP)
        .resources(|wanted| wanted.memory_limit_in_bytes = 48 << 20)
        .mount(&volume.path, "/v")
        .start()?;
    let script =
        format!("dd if=/dev/zero of=/v/f bs=1M count={MIB} 2>/dev/null && sync /v/f; wc -c < /v/f");
    equal("bytes", (MIB << 20).to_string(), container.sh(&script)?)?;
    let size = fs::metadata(volume.path.join("f"))
        .context("the file")?
        .len();
    equal("bytes on the node", MIB << 20, size)?;
    that("its writer lives", container.status()?.finished_at == 0)
}
