//! What goes wrong is said in one sentence that names the thing, as `ctr` shows it, and leaves
//! nothing behind. One table.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use brig_tests::cpio;
use brig_tests::node::check::{contains_one, that};
use brig_tests::node::leaks::Snapshot;
use brig_tests::node::process;
use brig_tests::node::{clock, ctr::Run};
use serde_json::{Value, json};

use super::leaks::baseline;
use crate::suite::{Case, PROBE_IMAGE, Suite, brig, case, patience};

pub const CASES: &[Case] = &[
    case("errors", "a command that is not there", |suite| {
        let run = Run::new("error", PROBE_IMAGE, &["/bin/no-such-program"]);
        fails(suite, &run, &["no such file", "not found"])
    }),
    case("errors", "a file that cannot be executed", |suite| {
        let run = Run::new("error", PROBE_IMAGE, &["/etc/passwd"]);
        fails(suite, &run, &["permission denied"])
    }),
    case("errors", "an unknown user", |suite| {
        let run = suite
            .probe("error", &["facts"])
            .with("--user", "nobody-here");
        fails(suite, &run, &["user"])
    }),
    case("errors", "a working directory that is a file", |suite| {
        let run = suite
            .probe("error", &["facts"])
            .with("--cwd", "/etc/passwd");
        fails(suite, &run, &["not a directory", "cwd"])
    }),
    case("errors", "a root file system that is not there", no_rootfs),
    case("errors", "a volume whose source is not there", |suite| {
        let run = suite.probe("error", &["facts"]).with(
            "--mount",
            "type=bind,src=/run/brig-e2e/no-such-volume,dst=/mnt/a,options=rbind:ro",
        );
        fails(suite, &run, &["no-such-volume"])
    }),
    brig("errors", "no /dev/kvm", no_kvm),
    brig("errors", "a guest kernel that is not there", |suite| {
        configured(
            suite,
            "kernel = \"/run/brig-e2e/no-such-kernel\"",
            &["no-such-kernel"],
        )
    }),
    brig("errors", "a guest kernel that is no kernel", |suite| {
        let file = scratch("corrupt-kernel", &vec![0x5a; 1 << 20])?;
        configured(suite, &format!("kernel = {file:?}"), &["kernel", "elf"])
    }),
    brig("errors", "a guest kernel that panics", |suite| {
        let mut empty = Vec::new();
        cpio::write(&mut empty, &[cpio::Entry::Directory("empty")])?;
        let file = scratch("no-init.cpio", &empty)?;
        configured(suite, &format!("initramfs = {file:?}"), &["panic"])
    }),
    brig("errors", "an agent that never answers", |suite| {
        let probe = fs::read("/host/bin/brig-probe")?;
        let file = scratch("mute.cpio", &cpio::init(&probe)?)?;
        configured(
            suite,
            // As /init the probe only waits.
            &format!("initramfs = {file:?}"),
            &["agent", "answer", "timed out", "ready"],
        )
    }),
    brig("errors", "less memory than a guest needs", |suite| {
        configured(suite, "memory = \"16MiB\"", &["64 MiB", "memory"])
    }),
    brig("errors", "a configuration with an unknown key", |suite| {
        configured(suite, "no_such_key = 1", &["no_such_key"])
    }),
    brig(
        "errors",
        "user namespaces are switched off on the node",
        no_user_namespaces,
    ),
    brig("errors", "the host's network is asked for", |suite| {
        let run = suite.probe("error", &["facts"]).flag("--net-host");
        fails(
            suite,
            &run,
            &["host network", "network namespace", "hostNetwork"],
        )
    }),
    brig(
        "errors",
        "the pid namespace of a process of the node is asked for",
        |suite| {
            let run = suite
                .probe("error", &["facts"])
                .with("--with-ns", "pid:/proc/1/ns/pid");
            fails(suite, &run, &["pid namespace /proc/1/ns/pid"])
        },
    ),
    brig("errors", "the host's IPC objects are asked for", no_ipc),
];

fn scratch(name: &str, data: &[u8]) -> Result<PathBuf> {
    let directory = Path::new("/run/brig-e2e");
    fs::create_dir_all(directory)?;
    let file = directory.join(name);
    fs::write(&file, data)?;
    Ok(file)
}

/// Judges one failing run: it fails, says why, and leaves nothing.
fn judge(
    suite: &Suite,
    before: &Snapshot,
    command: std::process::Command,
    id: &str,
    words: &[&str],
) -> Result<()> {
    let outcome = process::run(command, clock::seconds(30));
    suite.ctr.remove(id);
    let outcome = outcome?;
    that("ctr run fails", outcome.code != 0)?;
    contains_one("error", words, &outcome.stderr)?;
    that(
        &format!("the error is one readable line, not: {}", outcome.stderr),
        outcome.stderr.trim().lines().count() <= 2,
    )?;
    before.nothing_left(patience())
}

fn fails(suite: &mut Suite, run: &Run, words: &[&str]) -> Result<()> {
    let before = baseline(suite)?;
    let command = suite.ctr.run_command(run, &["--rm"]);
    judge(suite, &before, command, &run.id, words)
}

fn configured(suite: &mut Suite, toml: &str, words: &[&str]) -> Result<()> {
    // Brig's own time-outs at twice their real length: a boot under emulation fits, and waiting for
    // an agent that never answers does not take minutes.
    let file = scratch(
        "config.toml",
        format!("time_scale = {}\n{toml}\n", clock::scale().min(2.0)).as_bytes(),
    )?;
    let run = suite
        .probe("error", &["facts"])
        .with("--runtime-config-path", &file.to_string_lossy());
    fails(suite, &run, words)
}

fn no_rootfs(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let text = suite.ctr.ok(&["oci", "spec"])?;
    let mut spec: Value = serde_json::from_str(&text)?;
    spec["root"] = json!({"path": "/run/brig-e2e/no-such-rootfs"});
    spec["process"]["args"] = json!(["/bin/true"]);
    spec["linux"]["cgroupsPath"] = json!("/brig-e2e/no-rootfs");
    let file = scratch("no-rootfs.json", spec.to_string().as_bytes())?;
    let run = Run::new("error", PROBE_IMAGE, &[]);
    let mut command = suite
        .ctr
        .command(&["run", "--rm", "--runtime", &suite.ctr.runtime]);
    command.arg("--config").arg(file).arg(&run.id);
    judge(suite, &before, command, &run.id, &["no-such-rootfs"])
}

/// As `nerdctl run --ipc=host` has it: no entry.
fn no_ipc(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let text = suite.ctr.ok(&["oci", "spec"])?;
    let mut spec: Value = serde_json::from_str(&text)?;
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.context("the spec has no namespaces")?;
    namespaces.retain(|namespace| namespace["type"] != "ipc");
    spec["root"] = json!({"path": super::security::rootfs()?});
    spec["linux"]["cgroupsPath"] = json!("/brig-e2e/no-ipc");
    let file = scratch("no-ipc.json", spec.to_string().as_bytes())?;
    let run = Run::new("error", PROBE_IMAGE, &[]);
    let mut command = suite
        .ctr
        .command(&["run", "--rm", "--runtime", &suite.ctr.runtime]);
    command.arg("--config").arg(file).arg(&run.id);
    judge(suite, &before, command, &run.id, &["hostIPC"])
}

/// Moves a file away while it lives.
struct Hidden(&'static str);

impl Hidden {
    fn hide(path: &'static str) -> Result<Self> {
        fs::rename(path, format!("{path}.hidden"))
            .with_context(|| format!("cannot hide {path}"))?;
        Ok(Self(path))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}.hidden", self.0), self.0);
    }
}

fn no_kvm(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let hidden = Hidden::hide("/dev/kvm")?;
    let run = suite.probe("error", &["facts"]);
    let command = suite.ctr.run_command(&run, &["--rm"]);
    let result = judge(suite, &before, command, &run.id, &["/dev/kvm"]);
    drop(hidden);
    result
}

/// Sets a sysctl while it lives.
struct Sysctl {
    path: &'static str,
    old: String,
}

impl Sysctl {
    fn set(path: &'static str, value: &str) -> Result<Self> {
        let old = fs::read_to_string(path)?;
        fs::write(path, value)?;
        Ok(Self { path, old })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let _ = fs::write(self.path, self.old.trim());
    }
}

fn no_user_namespaces(suite: &mut Suite) -> Result<()> {
    let before = baseline(suite)?;
    let sysctl = Sysctl::set("/proc/sys/user/max_user_namespaces", "0")?;
    let run = suite.probe("error", &["facts"]);
    let command = suite.ctr.run_command(&run, &["--rm"]);
    let result = judge(
        suite,
        &before,
        command,
        &run.id,
        &["user namespace", "max_user_namespaces"],
    );
    drop(sysctl);
    result
}
