//! Devices by their path: what a pod gets of a character device that is mounted into it, and what a privileged
//! container finds in /dev.

use std::path::Path;

use anyhow::Result;
use brig_tests::node::check::{contains, contains_one, equal};

use crate::node::DEBIAN;
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[
    case(
        "volumes",
        "hostPath character device: it is there, and its rules decide who opens it",
        by_path,
    ),
    case(
        "volumes",
        "hostPath character device that a VM lacks is refused with advice",
        lacking,
    ),
    case(
        "security",
        "a privileged container makes loop devices",
        loops,
    ),
];

fn by_path(suite: &mut Suite) -> Result<()> {
    let tun = Path::new("/dev/net/tun");
    let kmsg = Path::new("/dev/kmsg");
    let has_tun = tun.exists();
    let shared = suite.shared()?;
    let mut spec = shared
        .pod
        .container("devices", SLEEP)
        .mount(kmsg, "/dev/kmsg");
    if has_tun {
        spec = spec.mount(tun, "/dev/net/tun");
    }
    let container = spec.start()?;
    equal(
        "/dev/kmsg",
        "1:b",
        container.sh("test -c /dev/kmsg && stat -c %t:%T /dev/kmsg")?,
    )?;
    contains_one(
        "no rule allows the kernel's log",
        &["not permitted"],
        &container.sh_fails(": < /dev/kmsg")?,
    )?;
    if has_tun {
        equal(
            "/dev/net/tun",
            "a:c8",
            container.sh(": < /dev/net/tun && stat -c %t:%T /dev/net/tun")?,
        )?;
    }
    let pod = suite
        .pod("device-paths")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .mount(kmsg, "/log")
        .start()?;
    equal(
        "a privileged container reads the kernel's log",
        "1",
        container.sh("head -c 1 /log | wc -c")?,
    )
}

fn lacking(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("a container has the node's own devices");
    }
    let shared = suite.shared()?;
    for (name, path, words) in [
        ("lacking-mem", "/dev/mem", "VFIO, CDI"),
        ("lacking-ptmx", "/dev/ptmx", "of its own"),
    ] {
        let started = shared
            .pod
            .container(name, SLEEP)
            .mount(Path::new(path), "/d")
            .start();
        let error = match started {
            Ok(_) => anyhow::bail!("a container with the node's {path} was started"),
            Err(error) => format!("{error:#}"),
        };
        contains("the refusal", path, &error)?;
        contains("the refusal", words, &error)?;
    }
    Ok(())
}

/// With util-linux's losetup, which makes no nodes itself.
fn loops(suite: &mut Suite) -> Result<()> {
    suite.image(DEBIAN)?;
    let pod = suite
        .pod("loops")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .image(DEBIAN.0)
        .security(|security| security.privileged = true)
        .start()?;
    if container.exec(&["test", "-c", "/dev/loop-control"])?.code != 0 {
        return not_here("this node has no loop devices");
    }
    if !suite.is_brig() && container.exec(&["test", "-b", "/dev/loop0"])?.code != 0 {
        return not_here("runc shows the devices that the node had, and it had no loop device");
    }
    let script = "set -e; for n in 1 2 3 4 5 6 7 8 9 10; do
        echo content-$n > /image; truncate -s 1M /image; cp /image /image$n
        d=$(losetup --find --show /image$n); head -n 1 $d; done";
    let all: Vec<String> = (1..=10).map(|n| format!("content-{n}")).collect();
    equal(
        "what the devices show",
        all.join("\n"),
        container.sh(script)?,
    )?;
    container.sh("for n in /image*; do losetup --detach $(losetup --noheadings --output NAME --associated $n); done")?;
    equal(
        "a device that is free is used again",
        "again",
        container.sh(
            "echo again > /image1; truncate -s 1M /image1; head -n 1 $(losetup -f --show /image1)",
        )?,
    )
}
