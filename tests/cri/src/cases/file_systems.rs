//! Volumes on file systems that somebody else serves: what a pod with a network volume stands on.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::Int64Value;

use crate::container::{Container, eventually};
use crate::mounted::Mounted;
use crate::node::{self, Directory};
use crate::served::{Nfs, fuse};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "hostPath on NFS: files, owners, size, and free after the pod",
        on_nfs,
    ),
    case(
        "volumes",
        "hostPath on FUSE: files, owners, size, and free after the pod",
        on_fuse,
    ),
    case(
        "volumes",
        "a volume is a file system of its own: find -xdev, mount points, df, in all containers of the pod",
        device_numbers,
    ),
];

fn device_numbers(suite: &mut Suite) -> Result<()> {
    let volume = Directory::new("numbers")?;
    let (disk, memory) = (volume.directory("disk")?, volume.directory("memory")?);
    let mounted = Mounted::tmpfs(&memory, "size=3m")?;
    fs::create_dir(disk.join("below"))?;
    for (directory, marker) in [(&disk, "below/marker"), (&memory, "marker")] {
        fs::write(directory.join(marker), "marked")?;
    }
    let pod = suite.run("numbers")?;
    let start = |name: &str| {
        pod.container(name, SLEEP)
            .mount(&disk, "/disk")
            .mount(&memory, "/mnt/memory")
            .start()
    };
    let numbers = |container: &Container| -> Result<Vec<String>> {
        let text = container.sh("stat -c %d / /disk /disk/below /mnt/memory /mnt/memory/marker")?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let first = start("first")?;
    let [root, on_disk, below, in_memory, file] = &numbers(&first)?[..] else {
        bail!("five numbers are wanted");
    };
    that(
        "three file systems",
        root != on_disk && root != in_memory && on_disk != in_memory,
    )?;
    equal("below a volume's top", (on_disk, in_memory), (below, file))?;
    equal(
        "find stops at a volume",
        "",
        first.sh("find / -xdev -name marker")?,
    )?;
    equal(
        "and goes through one",
        "/disk/below/marker",
        first.sh("find /disk -xdev -name marker")?,
    )?;
    // What mountpoint(1) and many programs compare.
    for (path, is_one) in [
        ("/disk", true),
        ("/mnt/memory", true),
        ("/disk/below", false),
        ("/etc", false),
    ] {
        let differs =
            format!("test $(stat -c %d {path}) != $(stat -c %d {path}/..) && echo yes; true");
        equal(
            &format!("mountpoint {path}"),
            is_one,
            first.sh(&differs)? == "yes",
        )?;
    }
    for path in ["/disk", "/mnt/memory"] {
        let last = format!("df {path} | tail -n 1 | sed 's/.* //'");
        equal("df's mount point", path, first.sh(&last)?)?;
    }
    equal(
        "size of the smaller",
        "768",
        first.sh("stat -f -c %b /mnt/memory")?,
    )?;
    // From one to the other, as between any two.
    first.sh_fails("ln /disk/below/marker /mnt/memory/linked")?;
    first.sh_fails("ln /disk/below/marker /linked")?;
    first.sh("mv /disk/below/marker /mnt/memory/moved && cp -a /mnt/memory/moved / && sync")?;
    equal(
        "moved",
        "marked",
        first.sh("cat /mnt/memory/moved /moved | head -c 6")?,
    )?;

    // The same one in the next container, and in one that comes when the first has gone.
    let second = start("second")?;
    equal(
        "numbers",
        numbers(&first)?[1..].to_vec(),
        numbers(&second)?[1..].to_vec(),
    )?;
    // Nothing of the reader's is the exec's, which would wait for it.
    first.sh("mkfifo /disk/fifo && (cat /disk/fifo >/mnt/memory/read 2>/dev/null &)")?;
    second.sh("echo through >/disk/fifo")?;
    eventually("what went through the pipe", clock::seconds(5), || {
        let read = fs::read_to_string(memory.join("read")).unwrap_or_default();
        Ok((read == "through\n").then_some(()))
    })?;
    first.stop(0)?;
    first.remove()?;
    let third = start("third")?;
    equal(
        "numbers",
        numbers(&second)?[1..].to_vec(),
        numbers(&third)?[1..].to_vec(),
    )?;
    for container in [second, third] {
        container.stop(0)?;
        container.remove()?;
    }
    // Nobody has it any more: it is free, and can be had again.
    mounted.unmount()?;
    let fourth = start("fourth")?;
    equal("the tmpfs has gone", "", fourth.sh("ls /mnt/memory")?)?;
    equal("the other is there", "below\nfifo", fourth.sh("ls /disk")?)
}

fn on_nfs(suite: &mut Suite) -> Result<()> {
    let volume = Directory::new("nfs")?;
    let (from, to) = (volume.directory("export")?, volume.directory("mount")?);
    let nfs = Nfs::new(&from, &to)?;
    works(suite, "nfs", &from, &to, |root| {
        made_again(root, &from.join("again"))
    })?;
    nfs.unmount()
}

/// Another client of the server, as which the node is one here, puts another file in the place of one that the pod knows.
fn made_again(root: &Container, file: &Path) -> Result<()> {
    fs::write(file, "old\n")?;
    let before = fs::metadata(file)?.ino();
    eventually("the first file", clock::seconds(10), || {
        Ok((root.exec(&["cat", "/v/again"])?.text() == "old").then_some(()))
    })?;
    root.sh("stat /v/again")?;
    // The server's disk mostly gives the new one the number of the old one, but need not.
    for _ in 0..50 {
        fs::remove_file(file)?;
        fs::write(file, "new\n")?;
        if fs::metadata(file)?.ino() == before {
            break;
        }
    }
    eventually("the second file", clock::seconds(10), || {
        Ok((root.exec(&["cat", "/v/again"])?.text() == "new").then_some(()))
    })?;
    root.sh("chmod 604 /v/again")?;
    equal(
        "its mode",
        0o604,
        fs::metadata(file)?.permissions().mode() & 0o7777,
    )
}

fn on_fuse(suite: &mut Suite) -> Result<()> {
    let volume = Directory::new("fuse")?;
    let (from, to) = (volume.directory("source")?, volume.directory("mount")?);
    let mounted = fuse(&from, &to)?;
    works(suite, "fuse", &from, &to, |_| Ok(()))?;
    mounted.unmount()
}

/// Trees are removed at once, and nothing is left of what is in them.
fn removes(root: &Container, behind: &Path) -> Result<()> {
    let removed = behind.join("removed");
    for files in [3, 100] {
        root.sh(&format!(
            "mkdir -p /v/removed/in && cd /v/removed/in && for i in $(seq {files}); do echo $i > $i; done \
             && ln -s 1 link && ls -l >/dev/null && cd / && rm -r /v/removed"
        ))?;
        that("the tree has gone", !removed.exists())?;
    }
    // What is left when the last file has gone, seen by whoever looks at the server.
    root.sh("mkdir /v/removed && cd /v/removed && touch a b && ls -l >/dev/null && rm a b")?;
    equal("what is left", Vec::<String>::new(), names(&removed)?)?;
    // Another file in its place, and one that has a second name elsewhere.
    equal(
        "the file, by its name, its other name, and that when the first has gone",
        "new\nnew\nnew",
        root.sh(
            "cd /v/removed && echo old > f && echo new > /v/moved && cat f /v/moved >/dev/null \
             && mv /v/moved f && cat f && ln f /v/linked && cat /v/linked && cd / && rm -r /v/removed \
             && cat /v/linked",
        )?,
    )?;
    // Removed while it is open, and closed.
    root.sh(
        "mkdir /v/removed && echo kept > /v/removed/open && exec 3</v/removed/open && rm /v/removed/open \
         && test \"$(cat <&3)\" = kept",
    )?;
    eventually("the tree has gone", clock::seconds(5), || {
        Ok((root.exec(&["rm", "-r", "/v/removed"])?.code == 0).then_some(()))
    })
}

/// A pod uses `volume`, whose files are in `behind` on the node, and does `more`. The pod is gone when this returns.
fn works(
    suite: &mut Suite,
    name: &str,
    behind: &Path,
    volume: &Path,
    more: impl FnOnce(&Container) -> Result<()>,
) -> Result<()> {
    fs::write(behind.join("from-node"), "node\n")?;
    let group = behind.join("group");
    fs::create_dir(&group)?;
    chown(&group, Some(0), Some(2000))?;
    fs::set_permissions(&group, fs::Permissions::from_mode(0o2770))?;
    let at = volume.display().to_string();
    let pod = suite.run(name)?;
    let root = pod
        .container("root", SLEEP)
        .mount(volume, "/v")
        .start()
        .context("a container of root")?;
    equal("the node's file", "node", root.sh("cat /v/from-node")?)?;
    root.sh(
        "cd /v && mkdir d && echo one > d/new && echo two >> d/new && mv d/new d/f && ln -s f d/link \
         && echo x > d/gone && rm d/gone && sync d/f",
    )?;
    equal(
        "a renamed file",
        "one\ntwo\n",
        fs::read_to_string(behind.join("d/f"))?.as_str(),
    )?;
    equal(
        "what is there",
        vec!["f".to_owned(), "link".to_owned()],
        names(&behind.join("d"))?,
    )?;
    equal("through the link", "one\ntwo", root.sh("cat /v/d/link")?)?;
    root.sh("chown 1234:4321 /v/d/f && chmod 640 /v/d/f")?;
    let file = fs::metadata(behind.join("d/f"))?;
    equal(
        "owner, group and mode on the node",
        (1234, 4321, 0o640),
        (file.uid(), file.gid(), file.mode() & 0o7777),
    )?;
    equal(
        "the same in the pod",
        "1234 4321 640",
        root.sh("stat -c '%u %g %a' /v/d/f")?,
    )?;
    root.sh("dd if=/dev/urandom of=/v/large bs=64k count=64 2>/dev/null && sync /v/large")?;
    let sum = root.sh("md5sum < /v/large | cut -d' ' -f1")?;
    let large = behind.join("large").display().to_string();
    let on_node = node::run("md5sum", &[&large])?;
    equal(
        "4 MiB, as the node reads them",
        sum.as_str(),
        on_node.split(' ').next().unwrap_or_default(),
    )?;
    // What df reads: all blocks, and the size of one.
    equal(
        "size of the file system",
        node::run("stat", &["-f", "-c", "%b %S", &at])?.trim(),
        root.sh("stat -f -c '%b %S' /v")?,
    )?;
    fs::write(behind.join("later"), "later\n")?;
    eventually("a later file is seen", clock::seconds(10), || {
        Ok((root.exec(&["cat", "/v/later"])?.text() == "later").then_some(()))
    })?;
    removes(&root, behind)?;
    more(&root)?;
    let user = pod
        .container("user", SLEEP)
        .mount(volume, "/v")
        .security(|security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 1000 });
            security.supplemental_groups = vec![2000];
        })
        .start()
        .context("a container of a user")?;
    user.sh("echo mine > /v/group/f")?;
    let file = fs::metadata(group.join("f"))?;
    equal(
        "a file of the group's directory",
        (1000, 2000),
        (file.uid(), file.gid()),
    )?;
    user.sh_fails("cat /v/d/f")?;
    user.sh_fails("touch /v/d/x")?;
    drop((root, user));
    pod.stop()?;
    pod.remove()
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}
