//! Versions of Brig on a node: installed, upgraded with a pod living through it, rolled back, removed.

use std::collections::BTreeSet;
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

pub const CASES: &[Case] = &[
    brig(
        "install",
        "a pod keeps its version through an upgrade, and nothing is left when Brig is removed",
        versions,
    ),
    brig(
        "install",
        "the Debian package is installed, upgraded under a pod, kept while one runs, and leaves nothing when it is purged",
        package,
    ),
    brig(
        "install",
        "containerd reads the handlers that brig adds to its configuration, and the file is as it was without them",
        handlers,
    ),
];

fn run(program: &str, args: &[&str]) -> Result<Outcome> {
    let mut command = Command::new(program);
    command.args(args);
    process::run(command, clock::seconds(20))
}

/// Every name below the places an installation touches.
fn names() -> Result<String> {
    names_below(&["/etc", "/opt", "/usr/local", "/lib/systemd/system", ROOT])
}

fn names_below(places: &[&str]) -> Result<String> {
    let mut args = places.to_vec();
    // The size of a directory is what it once held.
    args.extend([
        "-xdev",
        "-type",
        "d",
        "-printf",
        "%p/\n",
        "-o",
        "-printf",
        "%p %l %s\n",
    ]);
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
        "vmlinux.debug",
        "vmlinux.debug-gdb.py",
        "modules.erofs",
        "modules.alias",
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
    for pod in [&old.id, &new.id] {
        contains("why Brig is not removed", pod, &refused.stderr)?;
    }

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

/// A directory that is elsewhere while this lives, if it is there at all.
struct Aside(&'static str);

impl Aside {
    fn of(path: &'static str) -> Result<Self> {
        if Path::new(path).exists() {
            fs::rename(path, format!("{path}.aside"))?;
        }
        Ok(Self(path))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}.aside", self.0), self.0);
    }
}

/// Removes what a failed run leaves.
struct Purged;

impl Drop for Purged {
    fn drop(&mut self) {
        let _ = run("dpkg", &["--purge", "brig"]);
        let _ = fs::remove_dir_all("/run/brig-e2e-deb");
    }
}

/// Whether a shim of the installation at `place` lives; the suite's own pod has another.
fn has_shims(place: &str) -> Result<bool> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let program = program.to_string_lossy().into_owned();
        if program.starts_with(place) && program.contains("containerd-shim-brig-v2") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn package(suite: &mut Suite) -> Result<()> {
    let places = ["/usr", "/etc", "/opt"];
    // A purge takes the operator's configuration too, which here is other cases'.
    let _aside = Aside::of("/etc/brig")?;
    let purged = Purged;
    let before = names_below(&places)?;
    let mut packages = Vec::new();
    for version in ["0.1.0+1", "0.1.0+2"] {
        let args = [
            "--from",
            "/host/bin",
            "--quick",
            "--out",
            "/run/brig-e2e-deb",
            "--version",
            version,
        ];
        let made = run("/host/repo/deploy/debian/build", &args)?.success()?;
        let path = made.text();
        packages.push(path.lines().next_back().context("no package")?.to_owned());
    }
    run("dpkg", &["--install", &packages[0]])?.success()?;
    let found = fs::canonicalize("/usr/bin/containerd-shim-brig-v2")?;
    contains(
        "where the shim is",
        "/usr/lib/brig/0.1.0+1/bin",
        &found.display().to_string(),
    )?;
    let ctr = Ctr {
        namespace: suite.ctr.namespace.clone(),
        runtime: "/usr/bin/containerd-shim-brig-v2".to_owned(),
    };
    let pod = ctr.start(&suite.probe("package", &["sleep"]))?;
    run("dpkg", &["--install", &packages[1]])?.success()?;
    that("the old version's files are gone", !found.exists())?;
    alive(&pod).context("the pod that was there before the upgrade")?;
    let refused = run("dpkg", &["--remove", "brig"])?;
    that("the package stays while a pod runs", refused.code != 0)?;
    contains("why it stays", "pods run in its VMs", &refused.stderr)?;
    run("/usr/bin/brig", &["list"])?.success()?;
    drop(pod);
    let end = std::time::Instant::now() + clock::seconds(10);
    while has_shims("/usr/lib/brig")? && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    run("dpkg", &["--purge", "brig"])?.success()?;
    drop(purged);
    let after = names_below(&places)?;
    let difference = |one: &str, other: &str| -> Vec<String> {
        let there: BTreeSet<&str> = other.lines().collect();
        let only = one.lines().filter(|line| !there.contains(line));
        only.map(str::to_owned).collect()
    };
    equal(
        "what is left",
        Vec::<String>::new(),
        difference(&after, &before),
    )?;
    equal(
        "what is missing",
        Vec::<String>::new(),
        difference(&before, &after),
    )
}

/// With the containerd that runs, which does not read the file that is made here.
fn handlers(_: &mut Suite) -> Result<()> {
    let _ = fs::remove_dir_all(ROOT);
    fs::create_dir_all(ROOT)?;
    let result = added();
    let _ = fs::remove_dir_all(ROOT);
    result
}

fn added() -> Result<()> {
    let file = format!("{ROOT}/config.toml");
    // The node's own, whose handlers have other names.
    let original = fs::read_to_string("/etc/containerd/config.toml")?
        .replace("runtimes.brig", "runtimes.other");
    fs::write(&file, &original)?;
    let before = names()?;
    let dumped = || -> Result<String> {
        let outcome = run("containerd", &["--config", &file, "config", "dump"])?;
        Ok(outcome.success()?.text())
    };
    let without = dumped()?;
    let said = run("brig", &["containerd", "add", "--config", &file])?.success()?;
    contains(
        "what is to be done",
        "systemctl restart containerd",
        &said.text(),
    )?;
    let with = dumped()?;
    for handler in [
        "runtimes.brig]",
        "runtimes.brig-debug]",
        "runtimes.brig-gpu]",
        "/etc/brig/debug.toml",
    ] {
        contains("what containerd reads", handler, &with)?;
    }
    let kept = without
        .lines()
        .filter(|line| !line.trim_start().starts_with("imports"));
    for line in kept {
        that(
            &format!("containerd still reads {line}"),
            with.contains(line),
        )?;
    }
    let again = run("brig", &["containerd", "add", "--config", &file, "--json"])?.success()?;
    equal(
        "what the second time changes",
        "{\"changed\":[],\"handlers\":[]}",
        again.text().trim(),
    )?;
    run("brig", &["containerd", "remove", "--config", &file])?.success()?;
    equal("the file", original, fs::read_to_string(&file)?)?;
    equal("what is on the node", before, names()?)
}
