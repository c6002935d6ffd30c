//! Limits of the I/O on the node's own disks, which hold for who reads and writes there for the guest.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::ctr::{Container, Run};
use brig_tests::node::process::Lines;
use brig_tests::node::task;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::security;
use crate::suite::{Case, PROBE, PROBE_IMAGE, Suite, case, patience};

pub const CASES: &[Case] = &[case(
    "resources",
    "I/O limits of the node's disk hold from the start, change by an update, and are refused for a device that cannot have them",
    limited,
)];

const CGROUP: &str = "/brig-e2e/node-io";
const MIB: usize = 1 << 20;

fn limited(suite: &mut Suite) -> Result<()> {
    let files = Directory::new()?;
    let device = fs::metadata(&files.0)?.dev();
    let numbers = (major(device), minor(device));
    let rate = |rate: usize| json!([{"major": numbers.0, "minor": numbers.1, "rate": rate}]);

    let mut spec: Value = serde_json::from_str(&suite.ctr.ok(&["oci", "spec"])?)?;
    spec["root"] = json!({"path": security::rootfs()?, "readonly": true});
    spec["process"]["args"] = json!([PROBE, "sleep"]);
    spec["linux"]["cgroupsPath"] = json!(CGROUP);
    spec["linux"]["resources"]["blockIO"] = json!({ "throttleWriteBpsDevice": rate(MIB) });
    spec["mounts"]
        .as_array_mut()
        .context("no mounts")?
        .push(json!({
            "destination": "/work", "source": files.0, "type": "bind", "options": ["rbind", "rw"],
        }));
    let run = Run::new("node-io", PROBE_IMAGE, &[]);
    let container = start(suite, &run, &spec)?;
    let of_disk = format!("{}:{} ", numbers.0, numbers.1);
    contains(
        "io.max at first",
        &format!("{of_disk}rbps=max wbps={MIB} "),
        &io_max()?,
    )?;
    // A lower bound, which a slow node meets as well.
    let begin = Instant::now();
    let write = [PROBE, "write-fsync", "/work/file", "4194304"];
    let (_writer, mut lines) = Lines::start(container.exec_process(&[], &write))?;
    lines.wait_for("synced", patience())?;
    that(
        &format!("4 MiB at 1 MiB a second take {:?}", begin.elapsed()),
        begin.elapsed() > Duration::from_secs(2),
    )?;

    let update = |change: Value| task::update(&suite.ctr.namespace, &run.id, &change);
    update(
        json!({"blockIO": {"throttleWriteBpsDevice": rate(0), "throttleReadIOPSDevice": rate(9)}}),
    )?;
    contains(
        "io.max after an update",
        &format!("{of_disk}rbps=max wbps=max riops=9 "),
        &io_max()?,
    )?;
    // What is not named stays.
    update(json!({"pids": {"limit": 50}}))?;
    contains("io.max after another one", "riops=9 ", &io_max()?)?;
    let none = json!([{"major": 4095, "minor": 1, "rate": 1}]);
    let refused = update(json!({"blockIO": {"throttleReadBpsDevice": none}}));
    let refused = format!("{:#}", refused.err().context("it was taken")?);
    contains("what is said", "4095:1", &refused)?;
    contains("what is said", "no whole disk that this node has", &refused)?;
    contains("io.max after it", "riops=9 ", &io_max()?)?;
    update(json!({"blockIO": {"throttleReadIOPSDevice": rate(0)}}))?;
    equal("io.max without limits", "", io_max()?.trim())?;
    drop(container);

    spec["linux"]["resources"]["blockIO"] = json!({ "throttleReadBpsDevice": none });
    let failed = start(suite, &run, &spec).err().context("it was started")?;
    contains("what is said", "4095:1", &format!("{failed:#}"))
}

fn start(suite: &Suite, run: &Run, spec: &Value) -> Result<Container> {
    let file = Path::new("/run/brig-e2e/node-io.json");
    fs::write(file, spec.to_string())?;
    suite.ctr.start_by(file, run)
}

fn io_max() -> Result<String> {
    let file = format!("/sys/fs/cgroup{CGROUP}/io.max");
    fs::read_to_string(&file).with_context(|| file)
}

/// A directory on the node's disk.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        let path = PathBuf::from("/var/lib/brig-e2e-node-io");
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
