//! Threads for the queue pairs of an interface: none while one thread is enough, one for a pair that others wait for, within
//! the same walls, and gone again.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use brig_hypervisor::jail::audit::{Extent, differences, filters};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;

use super::handlers::Own;
use super::life::sandbox_pid;
use super::template::Template;
use super::transfer_cost::{receive, send};
use crate::container::eventually;
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "network",
        "queue pairs: two streams of two CPUs get a thread that is walled like the first, and it goes when they have ended",
        lent,
    ),
    case(
        "network",
        "queue pairs: a guest that goes on from a template uses one for each CPU that it is given",
        of_clone,
    ),
];

/// As hypervisor/src/virtio/net/pair_thread.rs names it.
const THREAD: &str = "net-pair";

fn lent(suite: &mut Suite) -> Result<()> {
    let _own = Own::new(suite, "vcpus = 2\n", &[])?;
    let pod = PodSpec::new(Own::HANDLER, "queue-pairs").run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    let vmm = u32::try_from(sandbox_pid(&pod)?)?;
    equal("threads for pairs at first", 0, lent_of(vmm)?)?;
    let before = anonymous(vmm)?;

    let sinks = [Sink::new()?, Sink::new()?];
    let streams: String = sinks
        .iter()
        .enumerate()
        .map(|(cpu, sink)| {
            let (mask, port) = (1 << cpu, sink.port);
            format!("taskset {mask} nc 10.88.0.1 {port} < /dev/zero > /dev/null & ")
        })
        .collect();
    container.sh(&format!("({streams}) > /dev/null 2>&1"))?;
    eventually("a pair has a thread", clock::seconds(4), || {
        Ok((lent_of(vmm)? > 0).then_some(()))
    })?;
    eprintln!(
        "brig-cri: private memory of the VMM beside the guest's with threads for {} pairs: {before} KiB before, {} KiB with them",
        lent_of(vmm)?,
        anonymous(vmm)?
    );
    let mut found = differences(vmm, Extent::Filtered)?;
    found.extend(filters::differences(vmm)?);
    equal("differences from the list", String::new(), found.join("; "))?;
    that("they live while that is looked at", lent_of(vmm)? > 0)?;

    container.sh("killall nc")?;
    for sink in sinks {
        that("a stream has carried something", sink.end()? > 1 << 20)?;
    }
    // Ten seconds of rest, by the node's clock.
    eventually(
        "the pairs are with the worker again",
        clock::seconds(4) * 5,
        || Ok((lent_of(vmm)? == 0).then_some(())),
    )?;
    send(&container)?;
    receive(&container)
}

fn of_clone(suite: &mut Suite) -> Result<()> {
    // A guest is captured with one CPU, and its driver finds the interface before the other one comes.
    let own = Own::new(suite, "vcpus = 2\nmax_vcpus = 2\ntemplate = true\n", &[])?;
    let template = Template::of(own.file())?;
    let pod = PodSpec::new(Own::HANDLER, "queue-pairs-clone").run(&suite.cri)?;
    template.is_of(&pod)?;
    let container = pod.container("main", SLEEP).start()?;
    for direction in ["rx", "tx"] {
        let count = format!("ls -d /sys/class/net/eth0/queues/{direction}-* | wc -l");
        equal(direction, "2", container.sh(&count)?)?;
    }
    send(&container)?;
    receive(&container)
}

/// The VMM's threads that have a pair.
fn lent_of(vmm: u32) -> Result<usize> {
    let mut count = 0;
    for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
        // One may end meanwhile.
        let name = fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        count += usize::from(name.trim() == THREAD);
    }
    Ok(count)
}

/// KiB that the VMM has written to in its small mappings: its heap and its stacks, and not the guest's memory.
fn anonymous(vmm: u32) -> Result<u64> {
    const LARGE: u64 = 16 << 10;
    let smaps = fs::read_to_string(format!("/proc/{vmm}/smaps"))?;
    let (mut size, mut all) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next());
        let value = || value.and_then(|value| value.parse::<u64>().ok());
        match name {
            Some("Size:") => size = value().context("a size")?,
            Some("Private_Dirty:") if size < LARGE => all += value().context("a count")?,
            _ => {}
        }
    }
    Ok(all)
}

/// What takes a stream on the node and counts it.
struct Sink {
    port: u16,
    thread: JoinHandle<Result<u64>>,
}

impl Sink {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("10.88.0.1:0")?;
        let port = listener.local_addr()?.port();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            let (mut buffer, mut all) = (vec![0; 1 << 16], 0);
            loop {
                match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => all += u64::try_from(count)?,
                    // A sender that is killed resets its stream.
                    _ => return Ok(all),
                }
            }
        });
        Ok(Self { port, thread })
    }

    /// Bytes, once the stream has ended.
    fn end(self) -> Result<u64> {
        let ended = self.thread.join();
        ended.map_err(|_| anyhow::anyhow!("the sink ended"))?
    }
}
