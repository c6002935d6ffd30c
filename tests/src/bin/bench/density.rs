//! What many pods of one image cost a node: memory by their number, processes, wake-ups at rest, and what asks about all of them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::ctr::{Container, Ctr};
use brig_tests::node::{clock, memory, process};

use crate::containers::{Subject, brig, shim_of};
use crate::report::ratio;

/// Where memory is looked at, as far as there are so many pods.
const AT: [usize; 4] = [1, 10, 20, 50];
/// Guests have reported what they do not use by then.
const SETTLE: Duration = Duration::from_secs(45);
/// How long rest is looked at.
const REST: Duration = Duration::from_secs(60);

/// Prints a table for each kind of pod; all of them if none is named.
pub fn measure(pods: usize, kinds: &[String]) -> Result<()> {
    let all = ["booted", "template", "runc"].map(str::to_owned);
    let kinds = if kinds.is_empty() { &all } else { kinds };
    for kind in kinds {
        let runtime = "io.containerd.brig.v2";
        Subject::of(runtime)
            .ctr
            .ok(&["image", "import", "/host/bin/probe.tar"])?;
        let subject = match kind.as_str() {
            "booted" => Subject::of(runtime),
            "template" => Subject::of_template()?,
            "runc" => Subject::of("io.containerd.runc.v2"),
            other => bail!("{other} is no kind of pod: booted, template and runc are"),
        };
        println!("{pods} pods, {kind}");
        one(&subject, pods).with_context(|| kind.clone())?;
    }
    Ok(())
}

/// A pod of the crowd.
struct Pod {
    _container: Container,
    /// The shim, and the VMM or the container's own process.
    processes: [i32; 2],
}

fn one(subject: &Subject, count: usize) -> Result<()> {
    let ctr = &subject.ctr;
    let mut pods: Vec<Pod> = Vec::new();
    let mut spent = Duration::ZERO;
    let mut first_free = 0;
    for number in 1..=count {
        let run = subject.run("crowd", &["sleep"]);
        let start = Instant::now();
        let container = ctr.start(&run)?;
        spent += start.elapsed();
        let (_, pid) = ctr.status(&run.id)?.context("no task")?;
        let pid = i32::try_from(pid)?;
        pods.push(Pod {
            processes: [shim_of(ctr, &run.id, pid)?, pid],
            _container: container,
        });
        if AT.contains(&number) || number == count {
            std::thread::sleep(SETTLE);
            let share = |of: fn(i32) -> Result<u64>| -> Result<u64> {
                let all = pods.iter().flat_map(|pod| pod.processes);
                all.map(of).sum::<Result<u64>>()
            };
            let pss = share(|pid| Ok(memory::of(pid, 0)?.total))?;
            let own = share(memory::private)?;
            let each = |kib: u64| kib / number as u64;
            println!(
                "  {number} pods: PSS {} KiB each, private and written {} KiB each",
                each(pss),
                each(own)
            );
            if number == 1 {
                first_free = available()?;
            } else {
                let taken = first_free.saturating_sub(available()?);
                println!(
                    "    the node has {} KiB less for each after the first",
                    taken / (number as u64 - 1)
                );
            }
        }
    }
    let pods_number = count as u64;
    println!(
        "  starts: {} ms each",
        spent.as_millis() / u128::from(pods_number)
    );
    for (name, index) in [("shim", 0), ("VMM or container", 1)] {
        let of = |what: &str| -> Result<String> {
            let dirs = pods
                .iter()
                .map(|pod| format!("/proc/{}/{what}", pod.processes[index]));
            let counts = dirs.map(|dir| Ok(fs::read_dir(dir)?.count()));
            let sum = counts.sum::<Result<usize>>()?;
            Ok(ratio(sum as u64, pods_number))
        };
        println!(
            "  {name}: {} threads and {} descriptors each",
            of("task")?,
            of("fd")?
        );
    }
    rest(&pods)?;
    asked(subject, ctr, &pods)
}

/// Who wakes, and how often, while nothing happens.
fn rest(pods: &[Pod]) -> Result<()> {
    let switches = || -> Result<BTreeMap<(usize, String), u64>> {
        let mut found = BTreeMap::new();
        for (index, pid) in pods
            .iter()
            .flat_map(|pod| pod.processes.into_iter().enumerate())
        {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let task = task?.path();
                let Ok(status) = fs::read_to_string(task.join("status")) else {
                    continue;
                };
                let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
                let name = field("Name:").unwrap_or("").trim().to_owned();
                let count = field("voluntary_ctxt_switches:")
                    .unwrap_or("")
                    .trim()
                    .parse::<u64>();
                *found.entry((index, name)).or_insert(0) += count.unwrap_or(0);
            }
        }
        Ok(found)
    };
    let before = switches()?;
    std::thread::sleep(REST);
    let seconds = REST.as_secs() * pods.len() as u64;
    let mut sum = 0;
    for (key, after) in switches()? {
        let woken = after.saturating_sub(before.get(&key).copied().unwrap_or(0));
        let name = key.1;
        if woken > 0 {
            sum += woken;
            println!(
                "    wakes at rest: {name} {} a second",
                ratio(woken, seconds)
            );
        }
    }
    println!("  wakes at rest: {} a second and pod", ratio(sum, seconds));
    Ok(())
}

/// How long those take who ask about all.
fn asked(subject: &Subject, ctr: &Ctr, pods: &[Pod]) -> Result<()> {
    let timed = |what: &str, args: &[&str]| -> Result<()> {
        let outcome = process::run(brig(args), clock::seconds(60))?;
        let elapsed = outcome.elapsed;
        let lines = outcome.success()?.text().lines().count();
        println!("  {what}: {} ms, {lines} lines", elapsed.as_millis());
        Ok(())
    };
    if subject.is_brig() {
        timed("brig list", &["list"])?;
        timed("brig ps", &["ps"])?;
        timed("brig metrics", &["metrics"])?;
    }
    let start = Instant::now();
    for id in ctr.containers()? {
        ctr.ok(&["task", "metrics", &id])?;
    }
    println!(
        "  ctr task metrics of all, one after another: {} ms",
        start.elapsed().as_millis() / pods.len().max(1) as u128
    );
    Ok(())
}

/// KiB that the node could give to somebody.
fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word.context("no MemAvailable")?.parse()?)
}
