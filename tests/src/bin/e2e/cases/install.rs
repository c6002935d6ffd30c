//! Versions of Brig on a node: installed, upgraded with a pod living through it, rolled back, removed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::ctr::{Container, Ctr, json};
use brig_tests::node::process::{self, Outcome};
use serde_json::Value;

use crate::suite::{Case, PROBE, Suite, brig};

const ROOT: &str = "/run/brig-e2e-install";

pub const CASES: &[Case] = &[brig(
    "install",
    "a pod keeps its version through an upgrade, and nothing is left when Brig is removed",
    versions,
)];

fn run(program: &str, args: &[&str]) -> Result<Outcome> {
    let mut command = Command::new(program);
    command.args(args);
    process::run(command, clock::seconds(20))
}

/// Every name below the places an installation touches.
fn names() -> Result<String> {
    let places = ["/etc", "/opt", "/usr/local", "/lib/systemd/system", ROOT];
    let mut args = places.to_vec();
    args.extend(["-xdev", "-printf", "%p %l %s\n"]);
    let found = run("find", &args)?.success()?.text();
    let mut lines: Vec<&str> = found.lines().collect();
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

struct Node {
    prefix: String,
    links: String,
}

impl Node {
    fn install(&self, from: &str) -> Result<()> {
        let args = ["--from", from, "--links", &self.links, &self.prefix];
        run("/host/repo/install", &args)?.success()?;
        Ok(())
    }

    fn brig(&self, args: &[&str]) -> Result<Outcome> {
        run(&format!("{}/bin/brig", self.links), args)
    }

    /// What `brig versions` says of the one that new pods get, or of the other.
    fn version(&self, current: bool) -> Result<Value> {
        let rows = json(&self.brig(&["versions", "--json"])?.success()?)?;
        let mut rows = rows.as_array().context("no list")?.iter();
        let row = rows.find(|row| row["current"] == current);
        Ok(row.context("no such version")?.clone())
    }

    /// A pod of the version that new pods get.
    fn pod(&self, suite: &Suite, name: &str) -> Result<Container> {
        let ctr = Ctr {
            namespace: suite.ctr.namespace.clone(),
            runtime: format!("{}/bin/containerd-shim-brig-v2", self.links),
        };
        ctr.start(&suite.probe(name, &["sleep"]))
    }
}

fn alive(container: &Container) -> Result<()> {
    let outcome = container.exec(&[PROBE, "exit", "7"])?;
    equal("exit status of an exec", 7, outcome.code)
}

fn versions(suite: &mut Suite) -> Result<()> {
    let _ = fs::remove_dir_all(ROOT);
    fs::create_dir_all(ROOT)?;
    let before = names()?;
    let result = upgraded(suite);
    let after = names()?;
    let _ = fs::remove_dir_all(ROOT);
    result?;
    equal("what is on the node after all is removed", before, after)
}

fn upgraded(suite: &mut Suite) -> Result<()> {
    let node = Node {
        prefix: format!("{ROOT}/opt"),
        links: format!("{ROOT}/local"),
    };
    fs::create_dir_all(&node.links)?;
    node.install("/host/bin")?;
    let old = node.pod(suite, "old")?;

    // The same but for its initramfs, at whose end the kernel ignores zeros.
    let build = Path::new("/run/brig-e2e-build");
    let _ = fs::remove_dir_all(build);
    fs::create_dir_all(build)?;
    for file in [
        "containerd-shim-brig-v2",
        "brig",
        "brig-vmm",
        "vmlinux",
        "modules.erofs",
        "brig-initramfs.cpio",
    ] {
        fs::copy(Path::new("/host/bin").join(file), build.join(file))?;
    }
    let mut initramfs = fs::read(build.join("brig-initramfs.cpio"))?;
    initramfs.extend([0; 512]);
    fs::write(build.join("brig-initramfs.cpio"), initramfs)?;
    node.install("/run/brig-e2e-build")?;
    fs::remove_dir_all(build)?;

    alive(&old).context("the pod that was there before the upgrade")?;
    let new = node.pod(suite, "new")?;
    let (current, other) = (node.version(true)?, node.version(false)?);
    contains(
        "pods of the new version",
        &new.id,
        &current["pods"].to_string(),
    )?;
    contains(
        "pods of the old version",
        &old.id,
        &other["pods"].to_string(),
    )?;
    that(
        "versions are told apart",
        current["version"] != other["version"],
    )?;

    let (current, other) = (text(&current)?, text(&other)?);
    let refused = node.brig(&["remove", &other])?;
    that("a version that a pod uses is kept", refused.code != 0)?;
    contains("why it is kept", &old.id, &refused.stderr)?;
    let refused = node.brig(&["remove", &current])?;
    contains(
        "why the current version is kept",
        "brig use",
        &refused.stderr,
    )?;
    let refused = node.brig(&["uninstall", "--links", &node.links])?;
    contains("why Brig is not removed", "used by 2 pods", &refused.stderr)?;

    node.brig(&["use", &other])?.success()?;
    let back = node.pod(suite, "back")?;
    let pods = node.version(true)?["pods"].to_string();
    contains("pods of the version rolled back to", &back.id, &pods)?;
    drop(new);
    node.brig(&["remove", &current])?.success()?;
    alive(&old).context("after the other version was removed")?;
    drop((old, back));
    node.brig(&["uninstall", "--links", &node.links])?
        .success()?;
    that("the prefix is gone", !Path::new(&node.prefix).exists())?;
    // `install -d` made these; they are the node's.
    fs::remove_dir_all(&node.links)?;
    Ok(())
}

fn text(row: &Value) -> Result<String> {
    Ok(row["version"].as_str().context("no version")?.to_owned())
}
