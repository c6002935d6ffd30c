//! What a pod costs its node beyond the guest RAM it touches, by size of the VM and by files its guest
//! knows: the figures behind docs/overhead.md.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::ctr::{Container, Ctr, Run};
use brig_tests::node::memory;

use crate::containers::shim_of;

const IMAGE: &str = "docker.io/brig/busybox:test";
/// The guest has reported what it does not use by then.
const SETTLE: Duration = Duration::from_secs(26);
const MEMORY_MIB: [u32; 4] = [128, 256, 512, 1024];
const VCPUS: [u32; 2] = [1, 2];
/// CPUs that a VM of one may have later.
const MAX_VCPUS: [u32; 3] = [2, 4, 8];
const FILES: u32 = 10_000;

/// KiB of one pod.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Proportional set sizes.
    vmm: u64,
    shim: u64,
    guest: u64,
    /// The cgroup's memory less guest RAM: charged in full to whoever touched a shared page first.
    charged: u64,
    /// The kernel's part of it.
    kernel: u64,
}

/// Prints a line for each size, and one for a guest that holds many files.
pub fn measure(runtime: &str) -> Result<()> {
    let ctr = Ctr {
        namespace: "brig-overhead".to_owned(),
        runtime: runtime.to_owned(),
    };
    ctr.ok(&["image", "import", "/host/assets/images/busybox.tar"])?;
    println!("memory MiB  vCPUs  VMM KiB  shim KiB  guest KiB  cgroup-guest KiB  of it kernel KiB");
    for vcpus in VCPUS {
        for memory in MEMORY_MIB {
            let pod = Pod::start(&ctr, memory, vcpus, vcpus)?;
            print(&format!("{memory:10}  {vcpus:5}"), pod.cost()?);
        }
    }
    for most in MAX_VCPUS {
        let pod = Pod::start(&ctr, 256, 1, most)?;
        print(&format!("       256  1 of {most}"), pod.cost()?);
    }
    let pod = Pod::start(&ctr, 512, 1, 1)?;
    let before = pod.cost()?;
    let script =
        format!("mkdir /many; i=0; while [ $i -lt {FILES} ]; do : > /many/$i; i=$((i+1)); done");
    pod.container
        .exec(&["sh", "-c", &script])?
        .success()
        .context("making files")?;
    std::thread::sleep(SETTLE);
    let after = pod.cost()?;
    print("empty           ", before);
    print(&format!("{FILES} files     "), after);
    Ok(())
}

fn print(what: &str, cost: Cost) {
    println!(
        "{what}  {:7}  {:8}  {:9}  {:16}  {:16}",
        cost.vmm, cost.shim, cost.guest, cost.charged, cost.kernel
    );
}

struct Pod {
    container: Container,
    cgroup: String,
    vmm: i32,
    shim: i32,
}

impl Pod {
    fn start(ctr: &Ctr, memory: u32, vcpus: u32, max_vcpus: u32) -> Result<Self> {
        let config = format!("/run/brig-overhead-{memory}-{vcpus}-{max_vcpus}.toml");
        let more = match max_vcpus > vcpus {
            true => format!("max_vcpus = {max_vcpus}\n"),
            false => String::new(),
        };
        fs::write(
            &config,
            format!("memory = {memory}\nvcpus = {vcpus}\ntime_scale = 10.0\n{more}"),
        )?;
        let run = Run::new("overhead", IMAGE, &["sleep", "100000"])
            .with("--runtime-config-path", &config);
        let cgroup = format!("/brig-overhead/{}", run.id);
        let run = run.with("--cgroup", &cgroup);
        let container = ctr.start(&run)?;
        std::thread::sleep(SETTLE);
        let (_, pid) = ctr.status(&run.id)?.context("no task")?;
        let vmm = i32::try_from(pid)?;
        Ok(Self {
            shim: shim_of(ctr, &run.id, vmm)?,
            vmm,
            container,
            cgroup,
        })
    }

    fn cost(&self) -> Result<Cost> {
        let vmm = memory::of(self.vmm, memory::largest(self.vmm)?)?;
        let stat = Path::new("/sys/fs/cgroup")
            .join(self.cgroup.trim_start_matches('/'))
            .join("memory.stat");
        let stat = fs::read_to_string(stat)?;
        let stat: BTreeMap<&str, u64> = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(name, value)| Some((name, value.parse::<u64>().ok()? / 1024)))
            .collect();
        let of = |name: &str| stat.get(name).copied().unwrap_or(0);
        let kernel = of("kernel");
        Ok(Cost {
            vmm: vmm.own(),
            shim: memory::of(self.shim, 0)?.total,
            guest: vmm.guest,
            charged: (of("anon") + of("file") + kernel).saturating_sub(vmm.guest),
            kernel,
        })
    }
}
