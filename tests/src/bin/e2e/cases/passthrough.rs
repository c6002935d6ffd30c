//! Devices of the node in a pod, as a device plugin gives them: by their group's node. The node needs an IOMMU
//! (`BRIG_NODE_VFIO=1`); its disks to give away are a virtio disk, whose driver every guest has, and an NVMe disk,
//! whose driver is a module.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use brig_suite::case::not_here;
use brig_tests::node::check::{equal, that};
use brig_tests::node::ctr::Run;
use brig_tests::node::given::{EDU, Given, Kind, NVME, VIRTIO, interface};

use serde_json::json;

use crate::suite::{Case, Suite, brig};

pub const CASES: &[Case] = &[
    brig(
        "passthrough",
        "a disk of the node is written in one pod and read in the next, also after the VMM was killed",
        |suite| disk(suite, VIRTIO, "/dev/vd?"),
    ),
    brig(
        "passthrough",
        "an NVMe disk has its driver loaded, is written in one pod and read in the next",
        |suite| disk(suite, NVME, "/dev/nvme?n1"),
    ),
    brig(
        "passthrough",
        "a privileged container has the device that it asks for beside all of the node's, and no other",
        privileged,
    ),
    brig(
        "passthrough",
        "a device that cannot be given is refused with the fix",
        refusals,
    ),
    brig(
        "passthrough",
        "a CDI name of an annotation that nobody has looked up stands for its device, or is refused",
        annotation,
    ),
    brig(
        "passthrough",
        "a driver bundle brings a device's module, firmware and library to the container that has it",
        bundle,
    ),
    brig(
        "passthrough",
        "a driver bundle that is missing or wrong is named",
        wrong_bundle,
    ),
];

const BUSYBOX: &str = "docker.io/brig/busybox:test";

fn run(node: &str, args: &[&str]) -> Run {
    Run::new("given", BUSYBOX, args)
        .with("--device", node)
        .with("--device", interface())
}

const MARK: &str = "written by the first pod";

/// `disk` is how a shell finds it in the guest.
fn disk(suite: &mut Suite, kind: Kind, disk: &str) -> Result<()> {
    let given = Given::take(kind)?;
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let ctr = suite.ctr.clone();
    let node = given.node();
    let shell = |script: String| run(&node, &["sh", "-c", &script]);

    let write = format!(
        "ls /dev/vfio /dev/iommu 2>/dev/null | grep . && exit 9; disk=$(ls {disk}) && echo $disk && printf '{MARK}' > $disk && sync && cat $disk > /dev/null"
    );
    ctr.run(&shell(write))?.success().context("the first pod")?;
    given.is_with("vfio-pci")?;

    // Its owner dies while it reads.
    let reader = ctr.start(&shell(format!("while :; do cat {disk} > /dev/null; done")))?;
    let vmm = super::devices::vmm_of(suite, &reader.id)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vmm),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    suite.ctr.remove(&reader.id);
    drop(reader);

    for round in 0..3 {
        let read = format!("head -c {} {disk}", MARK.len());
        let outcome = suite
            .ctr
            .run(&shell(read))?
            .success()
            .with_context(|| format!("pod {round} after the death"))?;
        equal("what is on the disk", MARK, outcome.text().trim())?;
    }
    let none = format!("! ls {disk}");
    let other = Run::new("other", BUSYBOX, &["sh", "-c", &none]);
    that(
        "another pod has no such disk",
        suite.ctr.run(&other)?.code == 0,
    )?;
    given.is_with("vfio-pci")
}

fn privileged(suite: &mut Suite) -> Result<()> {
    let given = Given::take(VIRTIO)?;
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let node = given.node();
    let shell = |script| {
        let run = Run::new("given", BUSYBOX, &["sh", "-c", script]);
        run.flag("--privileged")
    };
    let asks = shell("ls /dev/vfio 2>/dev/null | grep . && exit 9; cat /dev/vd? > /dev/null");
    let asks = asks.with("--device", &node).with("--device", interface());
    suite.ctr.run(&asks)?.success()?;
    given.is_with("vfio-pci")?;
    // Its specification names the group as one of the node's devices.
    suite.ctr.run(&shell("! ls /dev/vd?"))?.success()?;
    Ok(())
}

fn refusals(suite: &mut Suite) -> Result<()> {
    let given = Given::take(VIRTIO)?;
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let ctr = suite.ctr.clone();
    let holder = ctr.start(&run(&given.node(), &["sleep", "1000"]))?;
    let refused = ctr.run(&run(&given.node(), &["true"]))?;
    let said = &refused.stderr;
    that(
        &format!("a device in another pod is refused so, not: {said}"),
        refused.code != 0 && said.contains("in use by another pod"),
    )?;
    drop(holder);
    let again = ctr.run(&run(&given.node(), &["true"]))?;
    that(
        &format!("it is free again, not: {}", again.stderr),
        again.code == 0,
    )?;
    Ok(())
}

const DEBIAN: &str = "docker.io/brig/debian:test";
/// What tests/driver-bundle/build makes.
const BUNDLE: &str = "/host/bin/edu.erofs";
/// Where the node says what its CDI names mean.
const NAMES: &str = "/etc/cdi/brig-edu.json";

/// As a container of a device plugin's has it under a containerd that knows nothing of CDI.
fn annotation(suite: &mut Suite) -> Result<()> {
    let given = Given::take(VIRTIO)?;
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let edits = |rest: serde_json::Value| {
        let mut edits = json!({"deviceNodes": [{"path": given.node()}], "env": ["FROM=the file"]});
        if let (Some(edits), Some(rest)) = (edits.as_object_mut(), rest.as_object()) {
            edits.extend(rest.clone());
        }
        edits
    };
    let library = json!({"mounts": [{"hostPath": "/etc/passwd", "containerPath": "/x"}]});
    let file = json!({
        "cdiVersion": "0.5.0",
        "kind": "brig.io/disk",
        "devices": [
            {"name": "plain", "containerEdits": edits(json!({}))},
            {"name": "library", "containerEdits": edits(library)},
        ],
    });
    fs::create_dir_all("/etc/cdi")?;
    fs::write("/etc/cdi/brig-disk.json", file.to_string())?;
    let run = |name: &str| {
        let script =
            "echo $FROM && test -b /dev/vda && ls /dev/vfio /dev/iommu 2>/dev/null | wc -l";
        let annotation = format!("cdi.k8s.io/brig={name}");
        let run = Run::new("named", BUSYBOX, &["sh", "-c", script]);
        suite.ctr.run(&run.with("--annotation", &annotation))
    };
    let outcome = run("brig.io/disk=plain")?.success()?;
    equal("what it has", "the file\n0", outcome.text().trim())?;
    given.is_with("vfio-pci")?;
    for (name, expected) in [
        (
            "brig.io/disk=library",
            "has mounts of the node, which a guest cannot use",
        ),
        ("brig.io/disk=none", "has CDI device brig.io/disk=none"),
    ] {
        let refused = run(name)?;
        that(
            &format!(
                "{name} is refused with {expected:?}, not: {}",
                refused.stderr
            ),
            refused.code != 0 && refused.stderr.contains(expected),
        )?;
    }
    Ok(())
}

/// What to ask for: the device's name by CDI, where containerd takes one from its client, else its node.
fn device(suite: &Suite, given: &Given) -> Result<String> {
    if suite.containerd.starts_with("1.") {
        return Ok(given.node());
    }
    let file = json!({
        "cdiVersion": "0.5.0",
        "kind": "brig.io/edu",
        "devices": [{"name": "one", "containerEdits": {"deviceNodes": [{"path": given.node()}]}}],
    });
    fs::create_dir_all("/etc/cdi")?;
    fs::write(NAMES, file.to_string())?;
    Ok("brig.io/edu=one".to_owned())
}

/// A container of a handler with a bundle, that has the device.
fn with_bundle(device: &str, bundle: &str, image: &str, script: &str) -> Result<Run> {
    let config = "/run/brig-e2e/bundle.toml";
    fs::create_dir_all("/run/brig-e2e")?;
    let scale = brig_tests::node::clock::scale();
    fs::write(
        config,
        format!("driver_bundle = \"{bundle}\"\ntime_scale = {scale}\n"),
    )?;
    Ok(Run::new("bundle", image, &["sh", "-c", script])
        .with("--runtime-config-path", config)
        .with("--device", device))
}

fn bundle(suite: &mut Suite) -> Result<()> {
    if !Path::new(BUNDLE).exists() {
        return not_here("tests/driver-bundle/build has not made the node's edu.erofs");
    }
    let given = Given::take(EDU)?;
    let device = device(suite, &given)?;
    suite.import(DEBIAN, "/host/assets/images/debian.tar")?;
    // Twice: what a device was given to works for the next.
    for _ in 0..2 {
        let script = "edu-factorial 10 && edu-factorial 12 && stat -c %a:%F /dev/edu0 && id -G && ls /dev/vfio 2>&1;
            cat /sys/module/brig_edu/parameters/mode && grep -c squashfs /proc/filesystems; touch /usr/local/edu/x";
        let run = with_bundle(&device, BUNDLE, DEBIAN, script)?;
        let outcome = suite.ctr.run(&run)?;
        let said: Vec<_> = outcome.text().lines().map(str::to_owned).collect();
        let expected = [
            "3628800",
            "479001600",
            "666:character special file",
            "0 4242",
            "ls: cannot access '/dev/vfio': No such file or directory",
            "tested",
            "1",
        ];
        equal(
            "what the container found",
            expected.map(str::to_owned).to_vec(),
            said,
        )
        .with_context(|| outcome.stderr.clone())?;
        that(
            &format!("the library is read-only, not: {}", outcome.stderr),
            outcome.stderr.contains("Read-only file system"),
        )?;
        given.is_with("vfio-pci")?;
    }
    // A pod of the same handler that asks for nothing gets nothing of it.
    let none = Run::new(
        "none",
        DEBIAN,
        &[
            "sh",
            "-c",
            "! ls /usr/local/edu /dev/edu0 /sys/module/brig_edu",
        ],
    )
    .with("--runtime-config-path", "/run/brig-e2e/bundle.toml");
    suite.ctr.run(&none)?.success().context("a pod without")?;
    Ok(())
}

fn wrong_bundle(suite: &mut Suite) -> Result<()> {
    let given = Given::take(EDU)?;
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    for (bundle, expected) in [
        ("/run/brig-e2e/none.erofs", "No such file"),
        ("/etc/passwd", "driver bundle cannot be mounted"),
        ("/host/assets/kernel/modules.erofs", "no module is for it"),
    ] {
        let refused = suite
            .ctr
            .run(&with_bundle(&given.node(), bundle, BUSYBOX, "true")?)?;
        that(
            &format!(
                "{bundle} is refused with {expected:?}, not: {}",
                refused.stderr
            ),
            refused.code != 0 && refused.stderr.contains(expected),
        )?;
        given.is_with("vfio-pci")?;
    }
    Ok(())
}
