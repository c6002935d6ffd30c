//! From exec to agent ready: brig-vmm against QEMU's microvm, with the same kernel and initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::clock;
use brig_tests::node::kvm::Counts;
use brig_tests::node::machine::{Boot, Machine};
use brig_tests::node::{memory, template};

use crate::qemu::{self, Listener, Qemu};
use crate::report::Report;
use crate::syscalls;

const GUEST_KIB: u64 = 256 * 1024;
/// The same as brig-vmm's, which writes early messages to its debug port.
pub const QEMU_CMDLINE: &str = "quiet loglevel=1 reboot=t panic=-1 tsc=reliable no_timer_check \
     rcupdate.rcu_expedited=1 random.trust_cpu=on swiotlb=noforce dummy.numdummies=0";
const LOG: &str = "/run/brig-bench-vmm.log";

/// What one boot cost.
struct Cost {
    micros: u64,
    faults: u64,
    kvm: Counts,
    pss: memory::Share,
}

pub fn installed() -> Boot {
    let mut boot = Boot::installed(Path::new(LOG));
    boot.share = false;
    boot
}

fn cost(pid: i32, micros: u64) -> Result<Cost> {
    Ok(Cost {
        micros,
        faults: faults(pid)?,
        kvm: Counts::of(pid),
        pss: memory::of(pid, GUEST_KIB)?,
    })
}

/// Minor and major page faults of a process (proc(5), stat fields 10 and 12).
pub fn faults(pid: i32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("stat has no name")?
        .1
        .split_whitespace()
        .collect();
    let field = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok());
    Ok(field(7).unwrap_or(0) + field(9).unwrap_or(0))
}

fn patience() -> Duration {
    clock::seconds(10)
}

fn boot_brig() -> Result<(Machine, Cost)> {
    let mut machine = Machine::start(&installed())?;
    let micros = machine
        .agent_connected(patience())
        .context("brig-vmm's log is /run/brig-bench-vmm.log")?;
    let cost = cost(i32::try_from(machine.pid())?, micros)?;
    Ok((machine, cost))
}

/// Where the template is, for the clone that strace watches too.
const TEMPLATE: &str = "/run/brig-bench-template";

/// Captures a guest, and lets a first clone go on from it, as a template's maker does; what the next ones are started with.
fn captured() -> Result<Boot> {
    let mut boot = installed();
    boot.cmdline = template::CMDLINE.to_owned();
    let (boot, file) = template::capture(boot, Path::new(TEMPLATE), |_| Ok(()))?;
    let mut first = Machine::start(&boot)?;
    first.agent_connected(patience())?;
    template::record(&file, &first)?;
    Ok(boot)
}

fn go_on(boot: &Boot) -> Result<(Machine, Cost)> {
    let mut machine = Machine::start(boot)?;
    let micros = machine.agent_connected(patience())?;
    let cost = cost(i32::try_from(machine.pid())?, micros)?;
    Ok((machine, cost))
}

fn boot_qemu(listener: &Listener, initramfs: &Path) -> Result<Cost> {
    let command = qemu::command(&installed().kernel, initramfs, QEMU_CMDLINE);
    let qemu = Qemu::boot(listener, command, patience())?;
    cost(qemu.pid()?, u64::try_from(qemu.ready.as_micros())?)
}

/// One boot for strace to watch.
pub fn brig_once() -> Result<()> {
    boot_brig().map(|_| ())
}

/// As [`brig_once`], of a clone.
pub fn clone_once() -> Result<()> {
    let mut boot = installed();
    boot.template = Some(Path::new(TEMPLATE).join("template"));
    go_on(&boot).map(|_| ())
}

/// As [`brig_once`], of QEMU.
pub fn qemu_once() -> Result<()> {
    let listener = Listener::open()?;
    let initramfs = PathBuf::from("/run/brig-bench-initramfs.cpio");
    boot_qemu(&listener, &initramfs).map(|_| ())
}

/// Interleaved rounds of both.
pub fn measure(report: &mut Report, rounds: usize) -> Result<()> {
    let initramfs = qemu::padded_initramfs(&installed().initramfs)?;
    let listener = Listener::open();
    let mut brig: Vec<Cost> = Vec::new();
    let mut other: Vec<Cost> = Vec::new();
    let mut clones: Vec<Cost> = Vec::new();
    let of_template = captured()?;
    let mut exits = BTreeMap::new();
    for round in 0..rounds {
        eprintln!("boot, round {} of {rounds}", round + 1);
        let (mut machine, cost) = boot_brig()?;
        exits = machine.counters()?.exits;
        drop(machine);
        brig.push(cost);
        clones.push(go_on(&of_template)?.1);
        match &listener {
            Ok(listener) => match boot_qemu(listener, &initramfs) {
                Ok(cost) => other.push(cost),
                Err(error) => eprintln!("QEMU: {error:#}"),
            },
            Err(error) => eprintln!("no QEMU rounds: {error:#}"),
        }
    }
    // Its port is wanted by the boots under strace.
    drop(listener);
    report.section(
        "(a) and (d) from exec to agent ready, 1 vCPU, 256 MiB, same kernel and initramfs",
    );
    rows(report, &brig, "qemu", &other);
    report.section("(e) the same of a clone, beside a boot");
    rows(report, &clones, "boot", &brig);

    report.exits(exits);
    let own = std::env::current_exe()?;
    for (who, flag, program) in [
        ("brig-vmm", "--boot-brig-once", "brig-vmm"),
        ("brig-vmm of a clone", "--boot-clone-once", "brig-vmm"),
        ("qemu", "--boot-qemu-once", "qemu-system-x86_64"),
    ] {
        match syscalls::count(&own, flag, program) {
            Ok(calls) => {
                report.syscalls(who, calls);
            }
            Err(error) => eprintln!("system calls of {who}: {error:#}"),
        }
    }
    fs::remove_dir_all(TEMPLATE)?;
    Ok(())
}

fn rows(report: &mut Report, brig: &[Cost], other_name: &'static str, other: &[Cost]) {
    let mut row = |what: &str, unit: &'static str, pick: fn(&Cost) -> u64| {
        report.row(
            what,
            unit,
            brig.iter().map(pick).collect(),
            other_name,
            other.iter().map(pick).collect(),
        );
    };
    row("exec to agent ready", "ms", |cost| cost.micros / 1000);
    row("VM exits, as KVM counts them", "count", |cost| {
        cost.kvm.exits
    });
    row("of them, MMIO", "count", |cost| cost.kvm.mmio);
    row("of them, ports", "count", |cost| cost.kvm.ports);
    row("of them, halts", "count", |cost| cost.kvm.halts);
    row("page faults of the guest on host memory", "count", |cost| {
        cost.kvm.faults
    });
    row("page faults of the VMM itself", "count", |cost| cost.faults);
    row("PSS of the VMM, guest included", "KiB", |cost| {
        cost.pss.total
    });
    row("of it, guest RAM touched", "KiB", |cost| cost.pss.guest);
    row("of it, the VMM itself", "KiB", |cost| cost.pss.own());
}
