//! What a pod keeps of its node's memory when it has nothing to do.

use std::fs::File;

use anyhow::{Context, Result};
use brig_tests::node::check::that;
use brig_tests::node::clock;

use super::handlers::Own;
use super::resize::resident;
use crate::container::eventually;
use crate::node::Directory;
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "resources",
    "idle_files = \"return\": what an idle pod has read of files is the node's again",
    files,
)];

/// Bytes of the file, and KiB.
const SIZE: u64 = 120 << 20;
const SIZE_KIB: u64 = SIZE >> 10;

fn files(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, "idle_files = \"return\"\n", &[])?;
    let data = Directory::new("idle-files")?;
    File::create(data.path.join("large"))
        .and_then(|file| file.set_len(SIZE))
        .context("a large file")?;
    let pod = PodSpec::new(Own::HANDLER, "idle-files").run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .mount_readonly(&data.path, "/data")
        .start()?;
    let before = resident(&pod)?;
    container.sh("cat /data/large | wc -c")?;
    let full = resident(&pod)?;
    that(
        &format!("the VMM had {before} KiB and has {full} after {SIZE_KIB} KiB were read"),
        full > before + SIZE_KIB * 3 / 4,
    )?;
    let left = eventually("the node has its memory back", clock::seconds(30), || {
        let now = resident(&pod)?;
        Ok((now + SIZE_KIB / 2 < full).then_some(now))
    })?;
    println!("the VMM's RSS {before} -> {full} -> {left} KiB");
    let again = container.sh("cat /data/large | wc -c")?;
    that("all of it can be read again", again == SIZE.to_string())
}
