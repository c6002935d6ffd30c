//! Devices of the node in pods that go on from a template, whose memory is the template's until they write it: what a
//! device reads and writes there is what the guest does. The node needs an IOMMU (`BRIG_NODE_VFIO=1`).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::given::{Given, NVME, interface};

use super::devices::vmm_of;
use super::template_pods::{BRIEF, Handler, TEMPLATES, brig_command};
use crate::suite::{Case, Suite, brig};

pub const CASES: &[Case] = &[brig(
    "passthrough",
    "a pod of a template is given a device: DMA sees what the guest sees, and the template and its other pods nothing",
    clone,
)];

const SLEEP: &str = "exec sleep 1000";
/// MiB of the pods, as no other case's have.
const MEMORY: u64 = 168;

/// Random bytes go out by the device and come back, by pages that the guest writes first (`direct`), and by those of the
/// page cache, which the device is the first to write: most of them are the template's until then.
const THERE_AND_BACK: &str = "disk=$(ls /dev/nvme?n1) && dd if=/dev/urandom of=/dev/shm/data bs=1M count=40 2>/dev/null && \
    dd if=/dev/shm/data of=$disk bs=1M oflag=direct 2>/dev/null && sum() { sha256sum | cut -d' ' -f1; } && \
    sum < /dev/shm/data && rm /dev/shm/data && dd if=$disk bs=1M count=40 iflag=direct 2>/dev/null | sum && \
    head -c 41943040 $disk | sum";

/// What `brig inspect` calls the template of a pod.
fn template_of(suite: &Suite, id: &str) -> Result<Option<String>> {
    let text = brig_command(&["inspect", "-n", &suite.ctr.namespace, id, "--json"])?;
    let told: serde_json::Value = serde_json::from_str(&text)?;
    Ok(told["shim"]["template"].as_str().map(str::to_owned))
}

fn pinned(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().next());
    Ok(number.context("no VmLck")?.parse()?)
}

fn clone(suite: &mut Suite) -> Result<()> {
    let (one, two) = (Given::nth(NVME, 0)?, Given::nth(NVME, 1)?);
    let handler = Handler::new(suite, MEMORY, "")?;
    handler.sh(suite, BRIEF)?;
    let key = handler.made()?;
    let file = Path::new(TEMPLATES).join(&key);
    let before = fs::read(&file)?;
    let with = |given: &Given| {
        let run = handler.run(SLEEP).with("--device", &given.node());
        run.with("--device", interface())
    };
    let neighbour = suite.ctr.start(&handler.run(SLEEP))?;
    let first = suite.ctr.start(&with(&one))?;
    let second = suite.ctr.start(&with(&two))?;
    for (container, given) in [(&first, &one), (&second, &two)] {
        equal(
            "its template",
            Some(key.as_str()),
            template_of(suite, &container.id)?.as_deref(),
        )?;
        let locked = pinned(vmm_of(suite, &container.id)?)?;
        that(
            &format!("all of {MEMORY} MiB is pinned, not {locked} KiB"),
            locked >= MEMORY << 10,
        )?;
        for _ in 0..2 {
            let outcome = container.exec(&["sh", "-c", THERE_AND_BACK])?.success()?;
            let text = outcome.text();
            let sums: Vec<_> = text.lines().collect();
            that(
                &format!("three sums are one: {sums:?}"),
                sums.len() == 3 && sums.iter().all(|sum| *sum == sums[0]),
            )?;
        }
        given.is_with("vfio-pci")?;
    }
    // Its memory is still the template's.
    let own = fs::read_to_string(format!("/proc/{}/status", vmm_of(suite, &neighbour.id)?))?;
    that(
        "the neighbour locks nothing",
        own.contains("VmLck:\t       0 kB"),
    )?;
    neighbour
        .exec(&["sh", "-c", "! ls /dev/nvme?n1"])?
        .success()?;
    drop((first, second));
    equal("the template", true, before == fs::read(&file)?)?;
    // The next one goes on as the first one did, with the device of the one before.
    let next = suite.ctr.start(&with(&one))?;
    equal("its template", Some(key), template_of(suite, &next.id)?)?;
    next.exec(&["sh", "-c", THERE_AND_BACK])?.success()?;
    drop((next, neighbour));
    one.is_with("vfio-pci")?;

    // One whose handler gives its pods a device from the start boots.
    let list = format!("devices = [\"{}\"]", one.address);
    let listed = Handler::new(suite, MEMORY, &list)?;
    let booted = suite.ctr.start(&listed.run(SLEEP))?;
    equal("its template", None, template_of(suite, &booted.id)?)?;
    let outcome = booted.exec(&["sh", "-c", THERE_AND_BACK])?.success()?;
    equal("sums", 3, outcome.text().lines().count())
}
