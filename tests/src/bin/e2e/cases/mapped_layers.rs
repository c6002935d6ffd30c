//! Layers of an image that are memory of the guest (`image_layers = "memory"`), as the erofs snapshotter of containerd 2.2
//! and later hands them over. Pages are counted, in the guests and on the node.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::{Container, Pod};
use brig_tests::node::daemon::snapshot::mount;
use brig_tests::node::kvm::Counts;
use brig_tests::pattern::Pattern;
use containerd_shim_protos::api::Mount;
use protobuf::well_known_types::any::Any;
use serde_json::Value;

use super::daemon_pods::config;
use super::leaks::baseline;
use super::root_disks::{Layers, run};
use super::template_pods::brig_command;
use super::verity_layers;
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "disks",
        "2.2: layers as memory: several pods that read an image have one copy of it, on the node",
        one_copy,
    ),
    brig(
        "disks",
        "2.2: layers as memory: any image works, nothing is written to one, and nothing is left of it",
        any_image,
    ),
    brig(
        "disks",
        "2.2: layers as memory: a layer that is cut short ends the pod that reads it, and no other",
        cut_short,
    ),
];

/// Bytes of the file that is read.
const BIG: usize = 24 << 20;
/// Pods at once, `BRIG_LAYER_PODS` if that is set.
const PODS: usize = 3;
const KIB: u64 = 1024;

/// A daemon whose handler has the layers of images so.
fn daemon(suite: &Suite, layers: &Layers, name: &str, kind: &str) -> Result<Daemon> {
    let file = layers.path(&format!("{name}.toml"));
    let scale = clock::scale();
    let text = format!(
        "time_scale = {scale}\nallow_slow_kvm = true\nmemory = \"256MiB\"\nimage_layers = \"{kind}\"\n"
    );
    fs::write(&file, text)?;
    let mut daemon = Daemon::new(Generation::V2_2, &suite.ctr.runtime, name)?;
    let length = u8::try_from(file.len())?;
    daemon.options = Some(Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        // `config_path`.
        value: [&[0x12, length], file.as_bytes()].concat(),
        ..Any::default()
    });
    Ok(daemon)
}

/// A container's mounts, what it writes being in a directory of the node. Layers that have a tree of hashes are checked.
fn writing_to(directory: &Path, layers: &[&str]) -> Result<Vec<Mount>> {
    let (upper, work) = (directory.join("fs"), directory.join("work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let mut all: Vec<Mount> = layers
        .iter()
        .map(|layer| mount("erofs", layer, &["ro", "loop"]))
        .collect();
    for layer in &mut all {
        if Path::new(&verity_layers::sidecar(&layer.source)).exists() {
            layer.options.push(verity_layers::option(&layer.source));
        }
    }
    let options = [
        format!("upperdir={}", upper.display()),
        format!("workdir={}", work.display()),
        format!("lowerdir={{{{ overlay 0 {} }}}}", layers.len() - 1),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    all.push(mount("format/mkdir/overlay", "overlay", &options));
    Ok(all)
}

fn wait(container: &Container<'_>) -> Result<String> {
    let (said, status) = container.run(patience())?;
    equal("exit status", 0, status).with_context(|| said.clone())?;
    Ok(said)
}

/// Waits for a file that a container makes.
fn appears(file: &Path) -> Result<String> {
    let end = Instant::now() + patience();
    loop {
        match fs::read_to_string(file) {
            Ok(text) if text.ends_with("end\n") => return Ok(text),
            _ if Instant::now() > end => bail!("{} does not come", file.display()),
            _ => sleep(Duration::from_millis(100)),
        }
    }
}

/// Numbers behind names, as `/proc/meminfo` has them.
fn numbers(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let number = rest.split_whitespace().next()?.parse().ok()?;
        Some((name.to_owned(), number))
    };
    text.lines().filter_map(line).collect()
}

/// KiB by name of a process's mappings of a file, which has no path where its mount is nowhere.
fn mapped(pid: u32, file: &Path) -> Result<BTreeMap<String, u64>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let inode = fs::metadata(file)?.ino().to_string();
    let mut sums = BTreeMap::new();
    let mut counts = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // Addresses, permissions, offset, device, inode.
            counts = words.nth(3) == Some(inode.as_str());
        } else if counts {
            for (name, number) in numbers(line) {
                *sums.entry(name).or_default() += number;
            }
        }
    }
    Ok(sums)
}

/// A process's memory in KiB, each page shared by as many as have it.
fn pss(pid: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(numbers(&rollup).get("Pss").copied().unwrap_or(0))
}

/// Faults of a process that took no I/O, and that did.
fn faults(pid: u32) -> Result<(u64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(") ").context("no name")?.1;
    let field = |index: usize| -> Result<u64> {
        let word = after.split_whitespace().nth(index).context("no field")?;
        Ok(word.parse()?)
    };
    Ok((field(7)?, field(9)?))
}

fn exits(daemon: &Daemon, pod: &str) -> Result<u64> {
    let text = brig_command(&["counters", "-n", &daemon.namespace, pod])?;
    let told: Value = serde_json::from_str(&text)?;
    let exits = told["exits"].as_object().context(text)?;
    Ok(exits.values().filter_map(Value::as_u64).sum())
}

/// What pods that have read the same image cost, KiB.
#[derive(Debug, Default)]
struct Cost {
    /// Of all VMMs with their guests.
    pss: u64,
    /// What each guest has read of files, and what it has left.
    guest_cached: u64,
    guest_available: u64,
    guest_total: u64,
    /// Of one VMM's mappings of the file that was read.
    resident: u64,
    not_shared: u64,
}

/// Starts pods that read the same file, one after another, and counts.
fn cost(suite: &Suite, layers: &Layers, kind: &str, pods: usize, sum: &str) -> Result<Cost> {
    let (base, big) = (layers.path("base.erofs"), layers.path("big.erofs"));
    let daemon = daemon(suite, layers, kind, kind)?;
    let mut running = Vec::new();
    let script = "m() { echo $1; busybox cat /proc/meminfo; }
        (m before; busybox md5sum /big; m after; echo end) > /new; busybox mv /new /figures; exec busybox sleep 10000";
    let mut cost = Cost::default();
    for number in 0..pods {
        let id = format!("{kind}{number}");
        let pod = Pod::by_sandbox_api(&daemon, &id, &config())?;
        let counts = || -> Result<[u64; 5]> {
            let (pid, (few, many)) = (pod.pid, faults(pod.pid)?);
            // Zeros unless the node's debugfs is mounted.
            let kvm = Counts::of(i32::try_from(pid)?);
            Ok([exits(&daemon, &id)?, kvm.exits, kvm.faults, few, many])
        };
        let booted = counts()?;
        let directory = layers.directory.join(&id);
        let mounts = writing_to(&directory, &[&big, &base])?;
        let args = ["/bin/busybox", "sh", "-c", script];
        let container = pod.container_from(&format!("{id}-reads"), &args, Some(mounts))?;
        let created = counts()?;
        container.start()?;
        let text = appears(&directory.join("fs/figures"))?;
        let read = counts()?;
        contains("what was read", sum, &text)?;
        let (first, rest) = text.split_once("after\n").context("no figures")?;
        let (first, rest) = (numbers(first), numbers(rest));
        cost.guest_cached = rest["Cached"].saturating_sub(first["Cached"]);
        cost.guest_available = rest["MemAvailable"];
        cost.guest_total = rest["MemTotal"];
        let between =
            |from: [u64; 5], to: [u64; 5]| std::array::from_fn::<_, 5, _>(|at| to[at] - from[at]);
        println!(
            "      {kind}, pod {number}: exits to the VMM, exits of the CPU and of them for a page, faults of the VMM without and \
             with I/O: {:?} to make the container, {:?} to read; guest: {} KiB more cached, MemFree {} before and {} after, \
             slab {}, MemAvailable {} of {}",
            between(booted, created),
            between(created, read),
            cost.guest_cached,
            first["MemFree"],
            rest["MemFree"],
            rest["Slab"],
            cost.guest_available,
            cost.guest_total,
        );
        running.push((pod, container));
    }
    for (pod, _) in &running {
        cost.pss += pss(pod.pid)?;
        let mapping = mapped(pod.pid, Path::new(&big))?;
        let figure = |name: &str| mapping.get(name).copied().unwrap_or(0);
        cost.resident = figure("Rss");
        cost.not_shared = figure("Private_Clean") + figure("Private_Dirty");
    }
    println!("      {kind}, {pods} pods: {cost:?}");
    for (pod, container) in running {
        container.connection.kill(&container.id, 9)?;
        container.connection.wait(&container.id)?;
        container.delete()?;
        pod.end()?;
    }
    Ok(cost)
}

/// A layer with a file of bytes that no two pages have in common.
fn big(layers: &Layers, length: usize) -> Result<String> {
    let image = layers.make("big", |tree| {
        let mut bytes = vec![0; length];
        Pattern::default().fill(&mut bytes);
        Ok(fs::write(tree.join("big"), bytes)?)
    })?;
    let file = layers.directory.join("big.tree/big");
    let sum = run("md5sum", &[&file.display().to_string()])?;
    that("the layer is there", Path::new(&image).exists())?;
    let sum = sum.split_whitespace().next().context("no sum")?;
    Ok(sum.to_owned())
}

fn variable(name: &str, otherwise: usize) -> usize {
    let set = std::env::var(name).ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn one_copy(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    layers.base()?;
    let length = variable("BRIG_LAYER_BYTES", BIG);
    let sum = big(&layers, length)?;
    let (pods, kib) = (variable("BRIG_LAYER_PODS", PODS), length as u64 / KIB);
    let before = baseline(suite)?;
    let disk = cost(suite, &layers, "disk", pods, &sum)?;
    let memory = cost(suite, &layers, "memory", pods, &sum)?;
    before.nothing_left(patience())?;
    // A guest with a disk has what it has read in its own memory, and the VMM has nothing of it mapped.
    that("a disk's pages are the guest's", disk.guest_cached >= kib)?;
    equal("mapped of a disk", 0, disk.resident)?;
    // One that has them as memory has none, and the VMMs have the same pages.
    that("the guest has no copy", memory.guest_cached < kib / 4)?;
    that("the node's pages are mapped", memory.resident >= kib)?;
    // What all pods have together is printed alone: when guests give back what they needed to start is their own affair.
    that("all VMMs have them", memory.not_shared < kib / 16)
}

fn any_image(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    let base = layers.base()?;
    let text = |tree: &Path| Ok(fs::write(tree.join("text"), "text\n".repeat(3000))?);
    let made = [
        layers.make_with("small-blocks", &["-b512"], text)?,
        layers.make_with("inline", &["-b4096"], text)?,
        layers.make_with("compressed", &["-b4096", "-zlz4"], text)?,
        layers.make("plain", text)?,
        layers.make("checked", text)?,
    ];
    verity_layers::add_tree(&made[4])?;
    let before = baseline(suite)?;
    let daemon = daemon(suite, &layers, "any", "memory")?;
    let pod = Pod::by_sandbox_api(&daemon, "any", &config())?;
    let script =
        "busybox wc -c < /text; echo x > /text && echo changed > /new; busybox wc -c < /text
        busybox ls /sys/block | busybox grep -c pmem || true";
    let args = ["/bin/busybox", "sh", "-c", script];
    for (number, image) in made.iter().enumerate() {
        let name = format!("any{number}");
        let digest = fs::read(image)?;
        let mounts = writing_to(&layers.directory.join(&name), &[image, &base])?;
        let container = pod.container_from(&name, &args, Some(mounts))?;
        equal(image, "15000\n2\n1\n", wait(&container)?.as_str())?;
        let own = Path::new(image);
        that("it is mapped", !mapped(pod.pid, own)?.is_empty())?;
        container.delete()?;
        that("nothing of it is mapped", mapped(pod.pid, own)?.is_empty())?;
        that("nothing was written", fs::read(image)? == digest)?;
    }
    // One that is larger than the VM: its kernel would have to describe each page of it.
    let large = layers.path("large.erofs");
    fs::copy(&made[3], &large)?;
    File::options()
        .write(true)
        .open(&large)?
        .set_len(300 << 20)?;
    let mounts = writing_to(&layers.directory.join("large"), &[&large, &base])?;
    let container = pod.container_from("large", &args, Some(mounts))?;
    equal(&large, "15000\n2\n0\n", wait(&container)?.as_str())?;
    container.delete()?;
    // A layer alone, to which nobody can write.
    let view = vec![mount("erofs", &base, &["ro", "loop"])];
    let script = "busybox cat /which; echo x > /which || echo refused; busybox grep -c brig /proc/partitions";
    let args = ["/bin/busybox", "sh", "-c", script];
    let container = pod.container_from("view", &args, Some(view))?;
    contains("a view", "base\nrefused\n", &container.run(patience())?.0)?;
    container.delete()?;
    pod.end()?;
    drop(daemon);
    before.nothing_left(patience())
}

fn cut_short(suite: &mut Suite) -> Result<()> {
    let layers = Layers::new()?;
    let base = layers.base()?;
    big(&layers, 4 << 20)?;
    let (one, other) = (layers.path("one.erofs"), layers.path("other.erofs"));
    fs::copy(layers.path("big.erofs"), &one)?;
    fs::copy(layers.path("big.erofs"), &other)?;
    let before = baseline(suite)?;
    let daemon = daemon(suite, &layers, "cut", "memory")?;
    let reader = |name: &str, layer: &str| -> Result<(Pod<'_>, Container<'_>, PathBuf)> {
        let pod = Pod::by_sandbox_api(&daemon, name, &config())?;
        let directory = layers.directory.join(name);
        let mounts = writing_to(&directory, &[layer, &base])?;
        let script = "echo end > /new; while busybox sleep 1; do
            if [ -e /go ]; then busybox cat /big > /dev/null; echo end > /done; fi; done";
        let args = ["/bin/busybox", "sh", "-c", script];
        let container = pod.container_from(&format!("{name}-reads"), &args, Some(mounts))?;
        container.start()?;
        appears(&directory.join("fs/new"))?;
        Ok((pod, container, directory.join("fs")))
    };
    let (victim, cut, _) = reader("victim", &one)?;
    let (second, whole, seen) = reader("second", &other)?;
    File::options().write(true).open(&one)?.set_len(1 << 20)?;
    // By the guest, which alone may write where it writes.
    cut.exec("go", &["/bin/busybox", "touch", "/go"])?;
    let ended = cut.waiting();
    ended.recv_timeout(patience())??;
    let log = victim.bundle.log();
    let reason = "has become shorter, 1048576 instead of";
    contains("why it has ended, with the sizes", reason, &log)?;
    // The other one has nothing to do with it.
    whole.exec("go", &["/bin/busybox", "touch", "/go"])?;
    appears(&seen.join("done"))?;
    cut.delete()?;
    let _ = victim.end();
    whole.connection.kill(&whole.id, 9)?;
    whole.connection.wait(&whole.id)?;
    whole.delete()?;
    second.end()?;
    drop(daemon);
    before.nothing_left(patience())
}
