//! Images whose mount targets are links: what containerd and kubelet mount goes where the links lead, inside the
//! image.

use std::fs;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, contains_one, equal, that};

use crate::node::{Directory, LINKS};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "images",
        "/etc/hosts and /etc/resolv.conf may be links to nothing",
        own_files,
    ),
    case(
        "images",
        "volumes and the working directory go where links of the image lead",
        volumes,
    ),
    case(
        "images",
        "links in a circle and a file for a directory are refused",
        refused,
    ),
];

fn own_files(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    suite.image(LINKS)?;
    let container = shared
        .pod
        .container("own-files", SLEEP)
        .image(LINKS.0)
        .start()?;
    equal(
        "the links stay",
        "../run/systemd/resolve/stub-resolv.conf\n/nowhere/hosts",
        container.sh("readlink /etc/resolv.conf; readlink /etc/hosts")?,
    )?;
    for (link, place) in [
        ("/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
        ("/etc/hosts", "/nowhere/hosts"),
    ] {
        let script = format!("cmp {link} {place} && grep -c ' {place} ' /proc/mounts");
        equal(place, "1", container.sh(&script)?)?;
    }
    contains("/etc/hosts", "localhost", &container.sh("cat /etc/hosts")?)
}

fn volumes(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    suite.image(LINKS)?;
    let volume = Directory::new("image-links")?;
    volume.file("in", "of the node")?;
    let file = volume.file("single", "one file")?;
    let container = shared
        .pod
        .container("links", SLEEP)
        .image(LINKS.0)
        .edit(|config| config.working_dir = "/work/a/b".to_owned())
        .mount(&volume.path, "/data")
        .mount(&volume.path, "/srv/x/y")
        .mount(&file, "/out/file")
        .start()?;
    equal(
        "what is mounted",
        "of the node/of the node/one file/",
        container.sh(
            "for f in /mnt/data/in /not/there/x/y/in /outside/file; do cat $f; printf /; done",
        )?,
    )?;
    equal("the working directory", "/tmp/a/b", container.sh("pwd")?)?;
    equal(
        "what was made on the way",
        "755 0\n755 0",
        container.sh("stat -c '%a %u' /not /not/there/x")?,
    )?;
    container.sh("echo written > /srv/x/y/new")?;
    let written = fs::read_to_string(volume.path.join("new")).context("the volume")?;
    equal("what the container wrote", "written\n", written)?;
    that(
        "nothing was made on the node",
        !["/outside", "/nowhere", "/not"]
            .iter()
            .any(|path| fs::symlink_metadata(path).is_ok()),
    )
}

fn refused(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    suite.image(LINKS)?;
    let volume = Directory::new("image-circle")?;
    for (name, at, words) in [
        (
            "circle",
            "/circle/x",
            &["too many levels of symbolic links"][..],
        ),
        ("file", "/file", &["not a directory"]),
        ("below-file", "/file/x", &["not a directory"]),
    ] {
        let made = shared
            .pod
            .container(name, SLEEP)
            .image(LINKS.0)
            .mount(&volume.path, at)
            .start();
        let error = match made {
            Ok(_) => anyhow::bail!("a container with a volume at {at} started"),
            Err(error) => format!("{error:#}"),
        };
        contains_one(at, words, &error)?;
        if suite.is_brig() {
            let link = if name == "circle" {
                "circle ->"
            } else {
                "/file -> etc/passwd"
            };
            contains_one("the link", &[link, "/round -> /circle"], &error)?;
        }
    }
    Ok(())
}
