//! Interfaces whose frames the node's kernel moves.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::{Context, Result, anyhow};
use brig_hypervisor::jail::audit::{Extent, differences, filters};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::LinuxContainerResources;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::handlers::Own;
use super::life::sandbox_pid;
use super::networks::in_both;
use super::transfer_cost::{SEGMENTS, counted, network_thread, receive, send};
use crate::container::{Container, eventually};
use crate::node::{self, Directory};
use crate::pod::{Pod, PodSpec};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "network",
        "vhost-net: frames pass both ways without a call of the VMM, also in memory that came later, and it dies with it",
        by_the_kernel,
    ),
    case(
        "network",
        "vhost-net: two networks, and a queue for each CPU",
        two_networks,
    ),
    case(
        "network",
        "vhost-net: where the node has none, the VMM moves the frames and one line says so",
        without,
    ),
];

const CONFIG: &str = "vhost_net = true\nvcpus = 2\n";
const DEVICE: &str = "/dev/vhost-net";
const BYTES: usize = 4 << 20;

fn by_the_kernel(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, CONFIG, &[])?;
    let pod = PodSpec::new(Own::HANDLER, "vhost")
        .sysctl(SEGMENTS.0, SEGMENTS.1)
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    moved_by(&pod, "vhost-net")?;
    let timeline = node::run("brig", &["timeline", &pod.id])?;
    contains("timeline", "network.vhost", &timeline)?;

    let vmm = sandbox_pid(&pod)?;
    let thread = network_thread(vmm)?;
    let out = counted(thread, || send(&container))?;
    let into = counted(thread, || receive(&container))?;
    equal(
        "writev and readv for frames out and in",
        [(0, 0); 2],
        [out, into],
    )?;
    unharmed(&container)?;

    let found = differences(u32::try_from(vmm)?, Extent::Filtered)?;
    equal("of the VMM from the list", Vec::<String>::new(), found)?;
    let found = filters::differences(u32::try_from(vmm)?)?;
    equal("of its threads' filters", Vec::<String>::new(), found)?;

    // The guest has most of its memory from now on, and its frames lie there.
    container.update(LinuxContainerResources {
        memory_limit_in_bytes: 640 << 20,
        memory_swap_limit_in_bytes: 640 << 20,
        ..LinuxContainerResources::default()
    })?;
    container.sh("head -c 300m /dev/zero > /dev/shm/filler || true; rm /dev/shm/filler")?;
    unharmed(&container)?;

    kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
    eventually("the pod is NotReady", clock::seconds(4), || {
        Ok(matches!(pod.is_ready(), Ok(false)).then_some(()))
    })?;
    drop(container);
    eventually("the pod is removed", clock::seconds(4), || {
        Ok(pod.stop().and_then(|()| pod.remove()).ok())
    })?;
    let users = fs::read_to_string("/sys/module/vhost_net/refcnt")?;
    equal("users of vhost-net", "0", users.trim())
}

fn two_networks(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, CONFIG, &[])?;
    let pod = PodSpec::new(Own::HANDLER, "two-networks");
    in_both(suite, pod, |pod| {
        moved_by(pod, "vhost-net")?;
        equal("interfaces", 2, interfaces(pod)?.len())?;
        let container = pod.container("queues", SLEEP).start()?;
        for interface in ["eth0", "eth1"] {
            let count = format!("ls -d /sys/class/net/{interface}/queues/rx-* | wc -l");
            equal("queues", "2", container.sh(&count)?)?;
        }
        Ok(())
    })
}

fn without(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, CONFIG, &[])?;
    let away = Away::new()?;
    let pod = PodSpec::new(Own::HANDLER, "vhost-none").run(&suite.cri)?;
    drop(away);
    let container = pod.container("main", SLEEP).start()?;
    moved_by(&pod, "brig-vmm")?;
    unharmed(&container)?;
    let log = node::run("brig", &["logs", &pod.id])?;
    let lines = log
        .lines()
        .filter(|line| line.contains("without vhost-net"));
    let lines: Vec<&str> = lines.collect();
    equal("lines of the log", 1, lines.len())?;
    contains("the line", "load the node's module vhost_net", lines[0])
}

/// The node has no vhost-net for a while.
struct Away;

impl Away {
    const PLACE: &str = "/dev/vhost-net.away";

    fn new() -> Result<Self> {
        fs::rename(DEVICE, Self::PLACE)?;
        Ok(Self)
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let _ = fs::rename(Self::PLACE, DEVICE);
    }
}

fn interfaces(pod: &Pod) -> Result<Vec<Value>> {
    let whole: Value = serde_json::from_str(&node::run("brig", &["inspect", "--json", &pod.id])?)?;
    let interfaces = whole["shim"]["interfaces"].as_array();
    Ok(interfaces.context("no interfaces")?.clone())
}

fn moved_by(pod: &Pod, wanted: &str) -> Result<()> {
    let interfaces = interfaces(pod)?;
    that("there is an interface", !interfaces.is_empty())?;
    for interface in interfaces {
        equal("frames by", Some(wanted), interface["framesBy"].as_str())?;
    }
    Ok(())
}

/// Random bytes arrive as they were sent, both ways.
fn unharmed(container: &Container) -> Result<()> {
    let listener = TcpListener::bind("10.88.0.1:0")?;
    let port = listener.local_addr()?.port();
    let echo = std::thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = vec![0; BYTES];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
        Ok(bytes)
    });
    let sums = container.sh(&format!(
        "head -c {BYTES} /dev/urandom > /tmp/sent && nc 10.88.0.1 {port} < /tmp/sent > /tmp/back && sha256sum < /tmp/sent && sha256sum < /tmp/back"
    ))?;
    let bytes = echo.join().map_err(|_| anyhow!("the node's end"))??;
    let directory = Directory::new("vhost-sum")?;
    let file = directory.path.join("bytes");
    fs::write(&file, bytes)?;
    let here = node::run("sha256sum", &[&file.display().to_string()])?;
    let here = here.split_whitespace().next().context("no sum")?;
    for sum in sums.lines() {
        equal(
            "sum",
            here,
            sum.split_whitespace().next().unwrap_or_default(),
        )?;
    }
    equal("sums", 2, sums.lines().count())
}
