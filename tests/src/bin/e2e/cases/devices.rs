//! Each device of the VM, by an effect that can be seen from outside.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::cpio;
use brig_tests::node::check::{equal, that};
use brig_tests::node::machine::{Boot, Machine};
use brig_tests::node::process::Lines;
use brig_tests::node::{leaks, memory, tap};
use brig_tests::pattern::{self, Checksum};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::suite::{Case, PROBE, Suite, brig, patience};

const MIB_TOUCHED: u64 = 200;
const SYNCED: u64 = 4 * 1024 * 1024;

pub const CASES: &[Case] = &[
    brig(
        "devices",
        "memory that the guest frees goes back to the host",
        balloon,
    ),
    brig(
        "devices",
        "randomness and the boot id differ from boot to boot",
        randomness,
    ),
    brig(
        "devices",
        "what was synced survives the death of the VMM",
        synced,
    ),
    brig(
        "devices",
        "a disk keeps what was synced when the VMM dies, and a read-only one refuses writes",
        disks,
    ),
    brig(
        "devices",
        "4 MiB each way over a network interface arrive unchanged",
        network,
    ),
    brig(
        "devices",
        "a pod has a VMM and a shim of its own, in the pod's cgroup",
        processes,
    ),
];

/// The pid of a pod's VMM.
pub fn vmm_of(suite: &Suite, id: &str) -> Result<i32> {
    let file = format!("/run/brig/{}/{id}/pod.json", suite.ctr.namespace);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    let pod: Value = serde_json::from_str(&text)?;
    let pid = pod
        .pointer("/vmm/pid")
        .and_then(Value::as_i64)
        .with_context(|| format!("{file} names no VMM"))?;
    Ok(i32::try_from(pid)?)
}

fn rss_mib(pid: i32) -> Result<u64> {
    Ok(memory::of(pid, 0)?.rss / 1024)
}

fn balloon(suite: &mut Suite) -> Result<()> {
    let run = suite
        .probe("balloon", &["sleep"])
        .with("--memory-limit", &(256u64 << 20).to_string());
    let config = "/run/brig-e2e/balloon.toml";
    fs::create_dir_all("/run/brig-e2e")?;
    fs::write(
        config,
        format!(
            "memory = \"512MiB\"\ntime_scale = {}\n",
            brig_tests::node::clock::scale()
        ),
    )?;
    let run = run.with("--runtime-config-path", config);
    let container = suite.ctr.start(&run)?;
    let vmm = vmm_of(suite, &run.id)?;
    let mut command = container.exec_process(&[], &[PROBE, "touch-free", &MIB_TOUCHED.to_string()]);
    command.stdin(Stdio::piped());
    let (mut running, mut lines) = Lines::start(command)?;
    let before = rss_mib(vmm)?;
    lines.wait_for("touched", patience())?;
    let full = rss_mib(vmm)?;
    that(
        &format!("RSS grew by about {MIB_TOUCHED} MiB, not from {before} to {full} MiB"),
        full >= before + MIB_TOUCHED * 8 / 10,
    )?;
    let mut stdin = running.child().stdin.take().context("no stdin")?;
    stdin.write_all(b"free\n")?;
    lines.wait_for("freed", patience())?;
    // The guest reports free pages two seconds after they are freed, and again while there are more.
    let end = Instant::now() + patience();
    let fallen = loop {
        let now = rss_mib(vmm)?;
        if now + MIB_TOUCHED * 8 / 10 <= full {
            break now;
        }
        if Instant::now() > end {
            bail!("RSS stayed at {now} MiB after {full} MiB; before it was {before} MiB");
        }
        std::thread::sleep(Duration::from_millis(250));
    };
    that("RSS fell", fallen < full)?;
    stdin.write_all(b"end\n")?;
    drop(stdin);
    equal("exit status", 0, running.finish(patience())?.code)
}

fn randomness(suite: &mut Suite) -> Result<()> {
    let first = suite.run_json(&suite.probe("random", &["random"]))?;
    let second = suite.run_json(&suite.probe("random", &["random"]))?;
    for key in ["random", "boot_id"] {
        that(
            &format!("{key} differs, but both are {}", first[key]),
            first[key] != second[key] && first[key].is_string(),
        )?;
    }
    for facts in [&first, &second] {
        that(
            &format!("the guest draws from virtio_rng, not {}", facts["hwrng"]),
            facts["hwrng"]
                .as_str()
                .is_some_and(|name| name.starts_with("virtio_rng")),
        )?;
    }
    Ok(())
}

fn synced(suite: &mut Suite) -> Result<()> {
    let directory = "/run/brig-e2e/synced";
    fs::create_dir_all(directory)?;
    let run = suite.probe("sync", &["sleep"]).with(
        "--mount",
        &format!("type=bind,src={directory},dst=/mnt/a,options=rbind:rw"),
    );
    let container = suite.ctr.start(&run)?;
    let vmm = vmm_of(suite, &run.id)?;
    let (_writer, mut lines) = Lines::start(container.exec_process(
        &[],
        &[PROBE, "write-fsync", "/mnt/a/data", &SYNCED.to_string()],
    ))?;
    lines.wait_for(&pattern::checksum(SYNCED), patience())?;
    kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
    let mut sum = Checksum::default();
    std::io::copy(&mut fs::File::open(format!("{directory}/data"))?, &mut sum)?;
    equal("checksum on the node", pattern::checksum(SYNCED), sum.hex())
}

fn processes(suite: &mut Suite) -> Result<()> {
    let before = leaks::pids_of("brig-vmm");
    let container = suite.ctr.start(&suite.probe("own", &["sleep"]))?;
    let vmm = vmm_of(suite, &container.id)?;
    that("the VMM is new", !before.contains(&vmm))?;
    let (_, pid) = suite.ctr.status(&container.id)?.context("no task")?;
    that(
        &format!("the task's pid {pid} is a live process of the node"),
        std::path::Path::new(&format!("/proc/{pid}")).exists(),
    )?;
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup"))?;
    that(
        &format!("the VMM is in the pod's cgroup, not {cgroup}"),
        cgroup.contains(&container.id),
    )?;
    let mounts = fs::read_to_string("/proc/1/mountinfo")?;
    that(
        "the node's mount table has nothing of the pod but what containerd mounted",
        !mounts
            .lines()
            .any(|line| line.contains("/run/brig") && !line.contains("/run/brig-")),
    )
}

/// A boot with the probe as init, told what to do.
fn probe_guest(what: &str) -> Result<Boot> {
    let directory = Path::new("/run/brig-e2e");
    fs::create_dir_all(directory)?;
    let initramfs = directory.join("probe-init.cpio");
    fs::write(&initramfs, cpio::init(&fs::read("/host/bin/brig-probe")?)?)?;
    let mut boot = Boot::installed(&directory.join("devices-vmm.log"));
    boot.initramfs = initramfs;
    boot.debug_console = true;
    boot.cmdline = format!("quiet loglevel=1 printk.devkmsg=on brig.probe={what}");
    Ok(boot)
}

fn disks(_: &mut Suite) -> Result<()> {
    let mut boot = probe_guest("disk")?;
    let written = Path::new("/run/brig-e2e/written.img");
    let readonly = Path::new("/run/brig-e2e/readonly.img");
    fs::File::create(written)?.set_len(16 << 20)?;
    pattern::write(&mut fs::File::create(readonly)?, SYNCED)?;
    boot.disks = vec![(written.to_owned(), false), (readonly.to_owned(), true)];
    let mut machine = Machine::start(&boot)?;
    equal(
        "serials",
        "disk0 disk1",
        machine.console("probe: serials ", patience())?,
    )?;
    equal(
        "checksum of the read-only disk in the guest",
        pattern::checksum(SYNCED),
        machine.console("probe: read ", patience())?,
    )?;
    machine.console("probe: the read-only disk refused a write", patience())?;
    machine.console("probe: synced", patience())?;
    kill(
        Pid::from_raw(i32::try_from(machine.pid())?),
        Signal::SIGKILL,
    )?;
    drop(machine);
    let mut sum = Checksum::default();
    std::io::copy(&mut fs::File::open(written)?.take(8 << 20), &mut sum)?;
    equal(
        "checksum on the node",
        pattern::checksum(8 << 20),
        sum.hex(),
    )?;
    let mut sum = Checksum::default();
    std::io::copy(&mut fs::File::open(readonly)?, &mut sum)?;
    equal("the read-only disk", pattern::checksum(SYNCED), sum.hex())
}

fn network(_: &mut Suite) -> Result<()> {
    let mut boot = probe_guest("net")?;
    boot.tap = Some(tap::open("brig-e2e0", "10.77.0.1/24")?);
    let mut machine = Machine::start(&boot)?;
    machine.console("probe: listening", patience())?;
    let mut stream = TcpStream::connect("10.77.0.2:7777")?;
    stream.set_read_timeout(Some(patience()))?;
    pattern::write(&mut stream, SYNCED)?;
    equal(
        "checksum in the guest",
        pattern::checksum(SYNCED),
        machine.console("probe: received ", patience())?,
    )?;
    let mut sum = Checksum::default();
    std::io::copy(&mut stream.take(SYNCED), &mut sum)?;
    equal("checksum on the node", pattern::checksum(SYNCED), sum.hex())?;
    drop(machine);
    // Our own descriptor is the last one: taps are not persistent.
    boot.tap = None;
    that(
        "no interface is left",
        !Path::new("/sys/class/net/brig-e2e0").exists(),
    )
}
