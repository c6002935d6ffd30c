//! Volumes as kubelet prepares them: everything is a bind mount of something on the node.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains_one, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::MountPropagation;

use crate::container::eventually;
use crate::mounted::Mounted;
use crate::node::{self, Directory};
use crate::suite::{Case, SLEEP, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "volumes",
        "hostPath directory: both sides see what the other writes",
        host_path,
    ),
    case(
        "volumes",
        "hostPath directory: owner, mode and links are kept",
        ownership,
    ),
    smoke(
        "volumes",
        "hostPath directory, read-only: writes are refused",
        read_only,
    ),
    case(
        "volumes",
        "hostPath file: writable, without its siblings",
        single_file,
    ),
    case("volumes", "hostPath by a symbolic link", by_symlink),
    case("volumes", "hostPath that is not there is made", made),
    case(
        "volumes",
        "emptyDir: shared by the pod's containers",
        empty_dir,
    ),
    case(
        "volumes",
        "emptyDir: what is being written is the pod's at once, the node's soon and when its container ends",
        empty_dir_open,
    ),
    case(
        "volumes",
        "emptyDir: it is one for containers that mount it with and without propagation",
        empty_dir_propagation,
    ),
    case(
        "volumes",
        "emptyDir: a full disk is told to who closes or syncs what does not fit, and to nobody else",
        empty_dir_full,
    ),
    smoke(
        "volumes",
        "emptyDir in memory: its limit holds",
        empty_dir_memory,
    ),
    case("volumes", "subPath: one directory of a volume", sub_path),
    case("volumes", "a volume inside a volume", nested),
    case(
        "volumes",
        "termination log: written by the container, read by the node",
        termination_log,
    ),
    smoke("volumes", "fsGroup: a user of the group writes", fs_group),
    case(
        "volumes",
        "HostToContainer: a later mount of the node is seen",
        host_to_container,
    ),
    case(
        "volumes",
        "private: a later mount of the node is not seen",
        private,
    ),
    smoke(
        "volumes",
        "a removed pod's volume is free on the node",
        freed,
    ),
];

fn host_path(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("host-path")?;
    volume.file("from-node", "node\n")?;
    let container = shared
        .pod
        .container("host-path", SLEEP)
        .mount(&volume.path, "/data/deep")
        .start()?;
    equal(
        "the node's file",
        "node",
        container.sh("cat /data/deep/from-node")?,
    )?;
    container.sh("mkdir /data/deep/d && echo container > /data/deep/d/f")?;
    equal(
        "the container's file",
        "container\n",
        fs::read_to_string(volume.path.join("d/f"))?.as_str(),
    )?;
    volume.file("later", "later\n")?;
    eventually("a later file is seen", clock::seconds(2), || {
        Ok((container.exec(&["cat", "/data/deep/later"])?.text() == "later").then_some(()))
    })
}

fn ownership(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("ownership")?;
    let file = volume.file("f", "x")?;
    chown(&file, Some(1234), Some(70_000))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o2751))?;
    fs::hard_link(&file, volume.path.join("hard"))?;
    symlink("f", volume.path.join("soft"))?;
    let container = shared
        .pod
        .container("ownership", SLEEP)
        .mount(&volume.path, "/v")
        .start()?;
    equal(
        "as seen inside",
        "1234 70000 2751 2",
        container.sh("stat -c '%u %g %a %h' /v/f")?,
    )?;
    equal("the symbolic link", "f", container.sh("readlink /v/soft")?)?;
    container.sh("echo y > /v/made && chown 4321:80000 /v/made && chmod 600 /v/made")?;
    let made = fs::metadata(volume.path.join("made"))?;
    equal(
        "as seen outside",
        (4321, 80_000, 0o600),
        (made.uid(), made.gid(), made.mode() & 0o7777),
    )
}

fn read_only(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("read-only")?;
    volume.file("f", "kept\n")?;
    let container = shared
        .pod
        .container("read-only", SLEEP)
        .mount_readonly(&volume.path, "/v")
        .start()?;
    equal("it can be read", "kept", container.sh("cat /v/f")?)?;
    for script in ["echo x > /v/f", "touch /v/new", "rm /v/f", "chmod 777 /v/f"] {
        let error = container.sh_fails(script)?;
        contains_one(script, &["read-only file system"], &error)?;
    }
    equal(
        "the file",
        "kept\n",
        fs::read_to_string(volume.path.join("f"))?.as_str(),
    )
}

fn single_file(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("single-file")?;
    let file = volume.file("wanted", "one\n")?;
    volume.file("sibling", "secret\n")?;
    let container = shared
        .pod
        .container("single-file", SLEEP)
        .mount(&file, "/etc/brig/wanted")
        .start()?;
    equal("the file", "one", container.sh("cat /etc/brig/wanted")?)?;
    container.sh("echo two >> /etc/brig/wanted")?;
    equal(
        "as the node sees it",
        "one\ntwo\n",
        fs::read_to_string(&file)?.as_str(),
    )?;
    equal("its directory", "wanted", container.sh("ls /etc/brig")?)
}

fn by_symlink(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("by-symlink")?;
    let real = volume.directory("real")?;
    fs::write(real.join("f"), "behind\n")?;
    let link = volume.path.join("link");
    symlink(&real, &link)?;
    let container = shared
        .pod
        .container("by-symlink", SLEEP)
        .mount(&link, "/v")
        .start()?;
    equal("the file", "behind", container.sh("cat /v/f")?)?;
    container.sh("echo x > /v/written")?;
    that("the link's target has it", real.join("written").exists())
}

fn made(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("made")?;
    let path = volume.path.join("not/yet");
    let container = shared
        .pod
        .container("made", SLEEP)
        .mount(&path, "/v")
        .start()?;
    container.sh("touch /v/f")?;
    that("containerd made it", path.join("f").exists())
}

fn empty_dir(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::volume("kubernetes.io~empty-dir", "scratch")?;
    fs::set_permissions(&volume.path, fs::Permissions::from_mode(0o777))?;
    let writer = shared
        .pod
        .container("writer", SLEEP)
        .mount(&volume.path, "/w")
        .start()?;
    let reader = shared
        .pod
        .container("reader", SLEEP)
        .mount(&volume.path, "/r")
        .start()?;
    writer.sh("echo first > /w/f")?;
    equal("what the other reads", "first", reader.sh("cat /r/f")?)?;
    writer.sh("echo second > /w/.f && mv /w/.f /w/f")?;
    equal("after a rename", "second", reader.sh("cat /r/f")?)?;
    // No stream of the exec may stay with the one that waits.
    reader.sh("mkfifo /r/pipe && (cat /r/pipe > /r/got 2>&1 < /dev/null &)")?;
    writer.sh("echo through > /w/pipe")?;
    eventually("a named pipe connects them", clock::seconds(2), || {
        Ok((reader.sh("cat /r/got")? == "through").then_some(()))
    })
}

fn empty_dir_open(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::volume("kubernetes.io~empty-dir", "open")?;
    let inner = volume.directory("inner")?;
    let bound = volume.sub_path()?;
    fs::create_dir(&bound)?;
    let _bound = Mounted::bind(&inner, &bound)?;
    let writer = shared
        .pod
        .container("open", SLEEP)
        .mount(&volume.path, "/w")
        .start()?;
    let reader = shared
        .pod
        .container("sub-path-of-open", SLEEP)
        .mount(&bound, "/r")
        .start()?;
    let keep_open = |name: &str, text: &str| -> Result<()> {
        let file = format!("/w/inner/{name}");
        // No stream of the exec may stay with the one that waits.
        let stays = format!(
            "(exec 3>>{file}; echo {text} >&3; sleep 10000) > /dev/null 2>&1 < /dev/null &"
        );
        writer.sh(&stays)?;
        eventually("it is written", clock::seconds(2), || {
            let seen = writer.sh(&format!("cat {file} 2> /dev/null || true"))?;
            Ok((seen == text).then_some(()))
        })
    };
    keep_open("log", "first")?;
    equal("by a sub-path", "first", reader.sh("cat /r/log")?)?;
    eventually("on the node", clock::seconds(4), || {
        Ok((fs::read_to_string(inner.join("log"))? == "first\n").then_some(()))
    })?;
    reader.sh("echo more >> /r/log && truncate -s 100000 /r/log")?;
    let closed = fs::read(inner.join("log"))?;
    equal("once it was closed", 100_000, closed.len())?;
    that("what was appended", closed.starts_with(b"first\nmore\n\0"))?;
    equal(
        "its size for the one that has it open",
        "100000",
        writer.sh("stat -c %s /w/inner/log")?,
    )?;
    keep_open("last", "kept")?;
    writer.remove()?;
    let kept = fs::read_to_string(inner.join("last"))?;
    equal("after the container's end", "kept\n", kept.as_str())
}

fn empty_dir_propagation(suite: &mut Suite) -> Result<()> {
    let volume = Directory::volume("kubernetes.io~empty-dir", "mixed")?;
    let pod = suite
        .pod("mixed")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let start = |name: &str, mode: MountPropagation| {
        pod.container(name, SLEEP)
            .security(|security| security.privileged = true)
            .mount_with(&volume.path, "/v", |mount| mount.propagation = mode.into())
            .start()
    };
    let writer = start("writer", MountPropagation::PropagationBidirectional)?;
    let follower = start("follower", MountPropagation::PropagationHostToContainer)?;
    let reader = start("reader", MountPropagation::PropagationPrivate)?;
    // No stream of the exec may stay with the one that waits.
    writer.sh("(exec 3>>/v/log; echo first >&3; sleep 1; echo second >&3; sleep 10000) > /dev/null 2>&1 < /dev/null &")?;
    for container in [&reader, &follower] {
        eventually("the log grows for all", clock::seconds(4), || {
            let size = container.sh("stat -c %s /v/log 2> /dev/null || true")?;
            let text = container.sh("cat /v/log 2> /dev/null || true")?;
            Ok((size == "13" && text == "first\nsecond").then_some(()))
        })?;
    }
    reader.sh("mkfifo /v/pipe && (cat /v/pipe > /v/got 2>&1 < /dev/null &)")?;
    writer.sh("echo through > /v/pipe")?;
    eventually("a named pipe connects them", clock::seconds(2), || {
        Ok((follower.sh("cat /v/got")? == "through").then_some(()))
    })?;
    writer.sh("mkdir /v/below && mount -t tmpfs none /v/below && echo up > /v/below/f")?;
    let seen =
        [&follower, &reader].map(|container| container.sh("cat /v/below/f 2> /dev/null || true"));
    writer.sh("umount /v/below")?;
    let [follower, reader] = seen;
    equal("who follows sees the mount", "up", follower?)?;
    equal("who does not sees none", "", reader?)
}

fn empty_dir_full(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let images = Directory::new("full")?;
    let image = images.path.join("image");
    fs::File::create(&image)?.set_len(16 << 20)?;
    let image = image.display().to_string();
    node::run("mkfs.ext4", &["-q", "-F", &image])?;
    let volume = Directory::volume("kubernetes.io~empty-dir", "full")?;
    let place = volume.path.display().to_string();
    node::run("mount", &["-o", "loop", &image, &place])?;
    let mounted = Mounted::made(&volume.path);
    let container = shared
        .pod
        .container("full", SLEEP)
        .mount(&volume.path, "/v")
        .start()?;
    container.sh("echo kept > /v/before && sync /v/before")?;
    for how in ["", "conv=fsync"] {
        let script = format!("dd if=/dev/zero of=/v/large bs=4096 count=8000 {how}");
        let error = container.sh_fails(&script)?;
        contains_one(&script, &["no space left"], &error)?;
        container.sh("rm /v/large")?;
    }
    container.sh("echo fits > /v/after && cat /v/before /v/after")?;
    equal(
        "on the node",
        "fits\n",
        fs::read_to_string(volume.path.join("after"))?.as_str(),
    )?;
    container.remove()?;
    mounted.unmount()
}

fn empty_dir_memory(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::volume("kubernetes.io~empty-dir", "memory")?;
    let _tmpfs = Mounted::tmpfs(&volume.path, "size=4m,mode=777")?;
    let container = shared
        .pod
        .container("memory", SLEEP)
        .mount(&volume.path, "/v")
        .start()?;
    equal(
        "its size in KiB",
        "4096",
        container.sh("df -k /v | awk 'END { print $2 }'")?,
    )?;
    container.sh("head -c 3000000 /dev/zero > /v/fits")?;
    let error = container.sh_fails("dd if=/dev/zero of=/v/too-much bs=100000 count=30")?;
    contains_one("beyond its limit", &["no space left"], &error)
}

fn sub_path(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::volume("kubernetes.io~local-volume", "sub-path")?;
    let inner = volume.directory("inner")?;
    volume.file("outside", "not for it\n")?;
    // Kubelet bind-mounts the directory to a path of its own and gives that one.
    let bound = volume.sub_path()?;
    fs::create_dir(&bound)?;
    let _bound = Mounted::bind(&inner, &bound)?;
    let container = shared
        .pod
        .container("sub-path", SLEEP)
        .mount(&bound, "/v")
        .start()?;
    container.sh("echo x > /v/f")?;
    that("the directory has it", inner.join("f").exists())?;
    equal("what it sees", "f", container.sh("ls -A /v")?)?;
    container.sh_fails("cat /v/../outside").map(drop)
}

fn nested(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let outer = Directory::new("nested-outer")?;
    let inner = Directory::new("nested-inner")?;
    outer.directory("in")?;
    inner.file("f", "inner\n")?;
    let container = shared
        .pod
        .container("nested", SLEEP)
        .mount(&outer.path, "/v")
        .mount_readonly(&inner.path, "/v/in")
        .start()?;
    equal("the inner one", "inner", container.sh("cat /v/in/f")?)?;
    container.sh("touch /v/outer")?;
    container.sh_fails("touch /v/in/x").map(drop)
}

fn termination_log(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("termination")?;
    let file = volume.file("termination-log", "")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
    let script = [
        "sh",
        "-c",
        "echo 'because of this' > /dev/termination-log; exit 1",
    ];
    let (_container, status) = shared
        .pod
        .container("termination", &script)
        .mount(&file, "/dev/termination-log")
        .finish()?;
    equal("exit code", 1, status.exit_code)?;
    equal(
        "its message",
        "because of this\n",
        fs::read_to_string(&file)?.as_str(),
    )
}

fn fs_group(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let volume = Directory::new("fs-group")?;
    chown(&volume.path, Some(0), Some(2000))?;
    fs::set_permissions(&volume.path, fs::Permissions::from_mode(0o2770))?;
    let container = shared
        .pod
        .container("fs-group", SLEEP)
        .mount(&volume.path, "/v")
        .security(|security| {
            security.run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 });
            security.run_as_group = Some(k8s_cri::v1::Int64Value { value: 1000 });
            security.supplemental_groups = vec![2000];
        })
        .start()?;
    container.sh("echo x > /v/f")?;
    let file = fs::metadata(volume.path.join("f"))?;
    equal("owner and group", (1000, 2000), (file.uid(), file.gid()))
}

/// A volume whose mount on the node propagates to containers that ask for it, as kubelet's does.
fn propagation(suite: &mut Suite, name: &str, mode: MountPropagation) -> Result<String> {
    let shared = suite.shared()?;
    let volume = Directory::new(name)?;
    let below = volume.directory("below")?;
    let bound = Mounted::bind(&volume.path, &volume.path)?;
    bound.share()?;
    let container = shared
        .pod
        .container(name, SLEEP)
        .mount_with(&volume.path, "/v", |mount| mount.propagation = mode.into())
        .start()?;
    let _tmpfs = Mounted::tmpfs(&below, "size=1m")?;
    fs::write(below.join("later"), "later\n")?;
    let wanted = mode == MountPropagation::PropagationHostToContainer;
    let seen = eventually("the mount", clock::seconds(u32::from(wanted) + 1), || {
        let seen = container.exec(&["ls", "/v/below"])?.text();
        Ok((!seen.is_empty()).then_some(seen))
    });
    drop(container);
    Ok(seen.unwrap_or_default())
}

fn host_to_container(suite: &mut Suite) -> Result<()> {
    let mode = MountPropagation::PropagationHostToContainer;
    equal("what it sees", "later", propagation(suite, "rslave", mode)?)
}

fn private(suite: &mut Suite) -> Result<()> {
    let mode = MountPropagation::PropagationPrivate;
    equal("what it sees", "", propagation(suite, "rprivate", mode)?)
}

fn freed(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("freed")?;
    let volume = Directory::new("freed")?;
    let tmpfs = Mounted::tmpfs(&volume.path, "size=1m")?;
    let container = pod
        .container("main", SLEEP)
        .mount(&volume.path, "/v")
        .start()?;
    container.sh("echo x > /v/f && cat /v/f")?;
    container.remove()?;
    pod.stop()?;
    pod.remove()?;
    tmpfs.unmount().context("after its pod")
}
