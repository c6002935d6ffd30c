//! Each way in which a pod or a container can fail to start has one sentence of its own, which CRI's error carries to
//! `kubectl describe pod`: what, why, and what to do. The table of them is `docs/failures.md`, which this case compares
//! with what it was told.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use brig_tests::cpio;
use brig_tests::node::check::contains;
use k8s_cri::v1::{LinuxContainerSecurityContext, NamespaceMode, security_profile::ProfileType};

use crate::container::ContainerSpec;
use crate::node::Directory;
use crate::pod::{Pod, PodSpec, profile};
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[case(
    "failures",
    "each cause of a failure has a sentence of its own, and the documentation has it",
    sentences,
)];

const DROP_IN: &str = "/etc/brig/config.d/zz-failure.toml";
const PAGE: &str = "/host/repo/docs/failures.md";
const RESULT: &str = "/host/results/failures.md";

/// A drop-in of the configuration while it lives.
struct Configured;

impl Configured {
    fn with(text: &str) -> Result<Self> {
        fs::create_dir_all(Path::new(DROP_IN).parent().context("no directory")?)?;
        fs::write(DROP_IN, text)?;
        Ok(Self)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        let _ = fs::remove_file(DROP_IN);
        // If they were made for this.
        let _ = fs::remove_dir("/etc/brig/config.d");
        let _ = fs::remove_dir("/etc/brig");
    }
}

/// A sysctl while it lives.
struct Sysctl(&'static str, String);

impl Sysctl {
    fn set(path: &'static str, value: &str) -> Result<Self> {
        let was = fs::read_to_string(path)?;
        fs::write(path, value)?;
        Ok(Self(path, was))
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let _ = fs::write(self.0, self.1.trim());
    }
}

/// What a pod asks for besides.
type Change = fn(PodSpec) -> PodSpec;

/// The table that is made.
struct Table {
    rows: Vec<(String, String, String)>,
    files: PathBuf,
    missing: Vec<String>,
}

impl Table {
    /// A cause, what came of it, and what its sentence must have in it.
    fn add<T>(&mut self, what: &str, cause: &str, outcome: Result<T>, word: &str) {
        match outcome {
            Ok(_) => self.missing.push(format!("{cause}: it was not refused")),
            Err(error) => {
                let sentence = self.sentence(&format!("{error:#}"));
                if let Err(error) = contains(cause, word, &sentence) {
                    self.missing.push(format!("{error:#}"));
                }
                self.rows
                    .push((what.to_owned(), cause.to_owned(), sentence));
            }
        }
    }

    /// What the error says behind the words of those who passed it on, without what is another each time.
    fn sentence(&self, error: &str) -> String {
        let markers = [
            "failed to start shim: start failed: brig: ",
            "failed to start sandbox container task ",
            "failed to create shim task: ",
        ];
        let mut text = error;
        for marker in markers {
            if let Some((_, rest)) = text.split_once(marker) {
                text = rest;
            }
        }
        // The task's name.
        if let Some((_, rest)) = text
            .strip_prefix('"')
            .and_then(|text| text.split_once("\": "))
        {
            text = rest;
        }
        // containerd's name of the class.
        let classes = [
            ": unknown",
            ": exit status 1",
            ": unavailable",
            ": invalid argument",
            ": context deadline exceeded",
        ];
        for class in classes {
            text = text.strip_suffix(class).unwrap_or(text).trim_end();
        }
        let text = text.replace(&self.files.display().to_string(), "/DIR");
        let mut clean = String::new();
        for word in text
            .replace('\\', "")
            .split_inclusive(|c: char| !c.is_ascii_alphanumeric())
        {
            let id = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            if id.len() >= 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                clean.push_str("ID");
                clean.push_str(&word[id.len()..]);
            } else {
                clean.push_str(word);
            }
        }
        clean
            .replace('|', "\\|")
            .replace('\n', " ")
            .trim()
            .to_owned()
    }

    fn page(&self) -> String {
        let mut text = String::from(
            "# What a failure says\n\nWhat the error of CRI said, as `kubectl describe pod` shows it, for each cause that `brig-cri --filter failures/` brings \
             about in a node; made by that\ncase (`/host/results/failures.md` in the node), which fails when this page says something else. `brig dump POD` has more \
             of a pod that failed.\n\n| | cause | what is said |\n|---|---|---|\n",
        );
        for (what, cause, sentence) in &self.rows {
            let _ = writeln!(text, "| {what} | {cause} | {sentence} |");
        }
        text
    }
}

fn sentences(suite: &mut Suite) -> Result<()> {
    if suite.handler != "brig" || !suite.containerd.starts_with("1.7") {
        return not_here(
            "one handler and one containerd: the words around the sentence are theirs",
        );
    }
    let files = Directory::new("failures")?;
    let junk = files.file("junk", &"junk".repeat(4096))?;
    let empty = files.path.join("empty.cpio");
    // Without an /init.
    let mut archive = Vec::new();
    cpio::write(&mut archive, &[])?;
    fs::write(&empty, archive)?;
    // An /init that is no agent and stays.
    let busybox = fs::read("/bin/busybox")?;
    let further = [
        cpio::Entry::Directory("bin"),
        cpio::Entry::Program("bin/busybox", &busybox),
    ];
    let idle = files.path.join("idle.cpio");
    let program = b"#!/bin/busybox sh\nwhile :; do busybox sleep 60; done\n";
    fs::write(&idle, cpio::init_with(program, &further)?)?;
    let mut table = Table {
        rows: Vec::new(),
        files: files.path.clone(),
        missing: Vec::new(),
    };
    let dir = files.path.display().to_string();
    let configurations: &[(&str, String, &str)] = &[
        ("an unknown key", "colour = 1".into(), "unknown key"),
        ("a misspelt key", "memroy = \"1GiB\"".into(), "did you mean"),
        (
            "a file that is no TOML",
            "memory =".into(),
            "zz-failure.toml",
        ),
        ("too little memory", "memory = \"16MiB\"".into(), "64 MiB"),
        (
            "a size that is none",
            "memory = \"lots\"".into(),
            "a size is",
        ),
        ("no CPU", "vcpus = 0".into(), "vcpus"),
        (
            "a word that is none",
            "netfilter = \"maybe\"".into(),
            "netfilter",
        ),
        ("too few files", "max_files = 1".into(), "max_files"),
        ("a relative path", "kernel = \"vmlinux\"".into(), "absolute"),
        (
            "a kernel that is not there",
            format!("kernel = \"{dir}/none\""),
            "none",
        ),
        (
            "a kernel that is none",
            format!("kernel = \"{}\"", junk.display()),
            "junk",
        ),
        (
            "an initramfs that is not there",
            format!("initramfs = \"{dir}/none\""),
            "none",
        ),
        (
            "a VMM that is not there",
            format!("vmm = \"{dir}/none\""),
            "none",
        ),
        (
            "a VMM that is no program",
            format!("vmm = \"{}\"", junk.display()),
            "x86-64 program",
        ),
        ("no KVM device", format!("kvm = \"{dir}/none\""), "none"),
        (
            "a KVM device that is none",
            "kvm = \"/dev/null\"".into(),
            "is it /dev/kvm?",
        ),
        (
            "an initramfs without an agent: the guest's kernel panics",
            format!("initramfs = \"{}\"", empty.display()),
            "panic",
        ),
        (
            "a guest whose agent does not begin",
            format!("time_scale = 0.1\ninitramfs = \"{}\"", idle.display()),
            "never answered",
        ),
    ];
    for (cause, text, word) in configurations {
        let _configured = Configured::with(text)?;
        table.add("configuration", cause, suite.run("failure"), word);
    }
    let annotated = |name: &str, value: &str| {
        let (name, value) = (name.to_owned(), value.to_owned());
        let pod = suite.pod("failure").edit(|config| {
            config.annotations.insert(name, value);
        });
        pod.run(&suite.cri)
    };
    table.add(
        "annotation",
        "one that is unknown",
        annotated("io.brig.colour", "red"),
        "unknown",
    );
    table.add(
        "annotation",
        "one that is not allowed",
        annotated("io.brig.memory", "1GiB"),
        "pod_annotations",
    );
    let allowed = Configured::with("pod_annotations = [\"memory\", \"vcpus\"]\n")?;
    table.add(
        "annotation",
        "a value out of range",
        annotated("io.brig.vcpus", "500"),
        "at most 64",
    );
    table.add(
        "annotation",
        "a value that is none",
        annotated("io.brig.memory", "much"),
        "a size is",
    );
    drop(allowed);

    let pods: &[(&str, Change, &str)] = &[
        (
            "hostNetwork",
            |pod| pod.namespaces(|all| all.network = NamespaceMode::Node.into()),
            "hostNetwork",
        ),
        (
            "hostPID",
            |pod| pod.namespaces(|all| all.pid = NamespaceMode::Node.into()),
            "hostPID",
        ),
        (
            "hostIPC",
            |pod| pod.namespaces(|all| all.ipc = NamespaceMode::Node.into()),
            "hostIPC",
        ),
        (
            "a sysctl that there is not",
            |pod| pod.sysctl("net.ipv4.no_such", "1"),
            "no_such",
        ),
        (
            "a host name that is too long",
            |pod| pod.edit(|config| config.hostname = "a".repeat(65)),
            "65 bytes",
        ),
    ];
    for (cause, change, word) in pods {
        table.add(
            "pod",
            cause,
            change(suite.pod("failure")).run(&suite.cri),
            word,
        );
    }
    {
        let _sysctl = Sysctl::set("/proc/sys/user/max_user_namespaces", "0")?;
        table.add(
            "node",
            "user namespaces are switched off",
            suite.run("failure"),
            "max_user_namespaces",
        );
    }

    let pod = suite.run("failing")?;
    containers(&mut table, &pod, &files)?;
    drop(pod);

    fs::write(RESULT, table.page())?;
    if !table.missing.is_empty() {
        bail!("{}", table.missing.join("\n"));
    }
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    let rows = |text: &str| -> BTreeMap<String, String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("| "));
        let cells = lines.filter_map(|line| line.rsplit_once(" | "));
        cells
            .map(|(cause, sentence)| (cause.to_owned(), sentence.to_owned()))
            .collect()
    };
    let (there, told) = (rows(&page), rows(&table.page()));
    let other = told
        .iter()
        .find(|(cause, sentence)| there.get(*cause) != Some(sentence));
    if let Some((cause, sentence)) = other {
        bail!(
            "docs/failures.md does not say of '{cause}': {sentence} (the whole page: results/…/failures.md)"
        );
    }
    Ok(())
}

fn containers(table: &mut Table, pod: &Pod, files: &Directory) -> Result<()> {
    let start = |spec: ContainerSpec<'_>| {
        let container = spec.create()?;
        let started = container.start();
        // A name is free again when its container is gone.
        let _ = container.remove();
        started
    };
    let secured = |name: &str, change: fn(&mut LinuxContainerSecurityContext)| {
        pod.container(name, SLEEP).security(change)
    };
    table.add(
        "container",
        "a command that is not there",
        start(pod.container("c1", &["/no/such/program"])),
        "no/such/program",
    );
    table.add(
        "container",
        "a command that may not be executed",
        start(pod.container("c2", &["/etc/passwd"])),
        "ermission denied",
    );
    let cwd = pod
        .container("c3", SLEEP)
        .edit(|config| config.working_dir = "/etc/passwd".to_owned());
    table.add(
        "container",
        "a working directory that is a file",
        start(cwd),
        "/etc/passwd",
    );
    let over = pod.container("c5", SLEEP).mount(&files.path, "/etc/passwd");
    table.add(
        "container",
        "a directory mounted onto a file",
        start(over),
        "/etc/passwd",
    );
    table.add(
        "container",
        "a seccomp profile that is not there",
        start(secured("c8", |security| {
            let mut profile = profile(ProfileType::Localhost);
            profile.localhost_ref = "/no/such/profile.json".to_owned();
            security.seccomp = Some(profile);
        })),
        "profile.json",
    );
    Ok(())
}
