//! Soak: pods come and go under mixed load while processes of them, and containerd, are killed at random.
//! One pod stays: whatever dies beside it, it serves, its ConfigMap is updated and its port forwarded.
//! Nothing of the node may grow, and no state may be wrong.
//!
//! The order of kills comes from a seed, which is told, so that a run can be repeated.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_suite::run::Totals;
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::sequence::Sequence;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::cases::config_volumes::Atomic;
use crate::cases::life;
use crate::container::{Container, eventually};
use crate::growth::Growth;
use crate::node;
use crate::pod::Pod;
use crate::stream::Forwarded;
use crate::suite::{SLEEP, Suite};

/// The first order of kills; any other number is another, so that nodes side by side do not all do the same.
pub const SEED: u64 = 0x5eed_0fb1_661e_5afe;

/// Who dies in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Nobody,
    Shim,
    Vmm,
    Agent,
    Containerd,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Shim => "the shim",
            Self::Vmm => "the VMM",
            Self::Agent => "the agent, with its kernel",
            Self::Containerd => "containerd",
        }
    }

    /// Those whose death the runtime is to take without a fault: runc's shim on containerd 2 leaves things
    /// behind, and has neither VMM nor agent.
    fn of(handler: &str) -> &'static [Self] {
        match handler {
            "runc" => &[Self::Nobody, Self::Containerd],
            _ => &[
                Self::Nobody,
                Self::Shim,
                Self::Vmm,
                Self::Agent,
                Self::Containerd,
            ],
        }
    }
}

/// The pod that stays.
struct Resident {
    // Dropped in this order.
    container: Container,
    pod: Pod,
    map: Atomic,
}

impl Resident {
    fn start(suite: &Suite) -> Result<Self> {
        let map = config(0)?;
        let pod = suite.run("resident")?;
        let container = pod
            .container("main", SLEEP)
            .mount_readonly(&map.volume.path, "/config")
            .start()?;
        // It goes to the background once it listens.
        container.sh("httpd -p 127.0.0.1:8100 -h /config")?;
        Ok(Self {
            container,
            pod,
            map,
        })
    }

    /// It serves, sees its ConfigMap's next generation, and its port can be forwarded to.
    fn check(&mut self, round: u32) -> Result<()> {
        let text = format!("round {round}\n");
        self.map.write(&[("color", &text)])?;
        eventually("the resident sees its ConfigMap", clock::seconds(3), || {
            let said = self.container.exec(&["cat", "/config/color"])?.text();
            Ok((said.trim() == text.trim()).then_some(()))
        })?;
        let mut stream = Forwarded::open(&self.pod, 8100)?;
        stream.send(b"GET /color HTTP/1.0\r\n\r\n")?;
        let (answer, reason) = stream.finish()?;
        contains(
            "what the resident's forwarded port serves",
            text.trim(),
            &String::from_utf8_lossy(&answer),
        )
        .with_context(|| format!("reason given: '{reason}'"))?;
        that("the resident is ready", self.pod.is_ready()?)
    }
}

fn config(round: u32) -> Result<Atomic> {
    let text = format!("first {round}\n");
    let name = format!("soak-{round}");
    Atomic::new("kubernetes.io~configmap", &name, &[("color", &text)])
}

/// Runs so many pods with a handler, or as many as so many hours take; what grows and each round that goes
/// wrong is counted.
pub fn run(
    handler: &str,
    (pods, hours): (u32, f64),
    seed: u64,
    results: &Place,
    totals: &mut Totals,
) -> Result<()> {
    let begin = Instant::now();
    let suite = Suite::new(handler)?;
    let title = format!("{handler} on {}: soak of {pods} pods", suite.containerd);
    println!("{title}, seed {seed}");
    let mut order = Sequence::new(seed);
    let mut kills: BTreeMap<&str, u32> = BTreeMap::new();
    let mut growth = Growth::default();
    let mut resident = Some(Resident::start(&suite)?);
    let (mut rounds, mut rights) = (0, 0);
    for number in 0..pods {
        if begin.elapsed().as_secs_f64() >= hours * 3600.0 {
            break;
        }
        rounds += 1;
        let victims = Victim::of(handler);
        let victim = victims[order.below(victims.len())];
        let outcome = round(&suite, number, victim).and_then(|()| {
            let resident = resident.as_mut().context("no resident")?;
            resident.check(number)
        });
        *kills.entry(victim.name()).or_default() += 1;
        if let Err(error) = outcome {
            let name = format!("{title}/pod {number}, killed: {}", victim.name());
            println!("FAIL  {name}\n      {error:#}");
            totals.count(false, &name);
            // The next rounds say nothing about a resident that is broken. The old one goes first: its volume has
            // the new one's place.
            drop(resident.take());
            resident = Some(Resident::start(&suite)?);
        } else {
            rights += 1;
            println!(
                "ok    pod {number}, killed: {}, {} s",
                victim.name(),
                begin.elapsed().as_secs()
            );
        }
        growth.sample(victim == Victim::Containerd)?;
    }
    drop(resident);
    println!(
        "{rounds} pods in {} s, {rights} without a fault",
        begin.elapsed().as_secs()
    );
    for (name, count) in &kills {
        println!("killed: {name}, {count} times");
    }
    let mut more = serde_json::Map::new();
    more.insert("killed".to_owned(), json!(kills));
    more.insert("pods".to_owned(), json!(rounds));
    more.insert("without a fault".to_owned(), json!(rights));
    // As text: a number of 64 bits is rounded by most who read JSON, and would repeat another run.
    more.insert("seed".to_owned(), json!(seed.to_string()));
    let file = format!("soak-{handler}-{}.json", suite.containerd);
    growth.judge(&title, &file, more, results, totals)
}

/// A pod's whole life: volumes, exec, a job; then somebody dies.
fn round(suite: &Suite, number: u32, victim: Victim) -> Result<()> {
    let map = config(number + 1)?;
    let agent = victim == Victim::Agent;
    let pod = suite.pod("soak").security(|it| it.privileged = agent);
    let pod = pod.run(&suite.cri)?;
    let main = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = agent)
        .mount_readonly(&map.volume.path, "/config")
        .start()?;
    let said = main.sh("cat /config/color; hostname")?;
    equal("an exec", format!("first {}\nsoak", number + 1), said)?;
    job(&pod, number)?;
    match victim {
        Victim::Nobody => Ok(()),
        Victim::Containerd => {
            node::kill_containerd(&suite.cri)?;
            that("the pod is ready", pod.is_ready()?)?;
            equal("an exec after it", "alive", main.sh("echo alive")?)?;
            job(&pod, number + 1)
        }
        Victim::Shim => {
            let shim = life::shim_of(&pod)?;
            kill(Pid::from_raw(shim), Signal::SIGKILL).context("cannot kill the shim")?;
            gone(&pod)
        }
        Victim::Vmm => {
            let vmm = life::sandbox_pid(&pod)?;
            that("the sandbox has a pid", vmm > 1)?;
            kill(Pid::from_raw(vmm), Signal::SIGKILL).context("cannot kill the VMM")?;
            that("its container has failed", main.wait()?.exit_code != 0)?;
            gone(&pod)
        }
        Victim::Agent => {
            // Its own kernel, crashed by a privileged process of the pod: the exec never ends in order.
            let _ = main.exec_within(&["sh", "-c", "echo c >/proc/sysrq-trigger"], 5);
            that("its container has failed", main.wait()?.exit_code != 0)?;
            gone(&pod)
        }
    }
    .with_context(|| format!("killed: {}", victim.name()))
}

fn job(pod: &Pod, number: u32) -> Result<()> {
    let script = format!("exit {}", number % 100);
    let name = format!("job-{number}");
    let (_job, status) = pod.container(&name, &["sh", "-c", &script]).finish()?;
    equal("exit code", i32::try_from(number % 100)?, status.exit_code)
}

/// The pod is NotReady, and goes as kubelet would have it: both calls are repeated until they work.
fn gone(pod: &Pod) -> Result<()> {
    eventually("the pod is NotReady", clock::seconds(4), || {
        // An error is no answer: kubelet asks again.
        Ok(matches!(pod.is_ready(), Ok(false)).then_some(()))
    })?;
    eventually("the pod is removed", clock::seconds(4), || {
        Ok(pod.stop().and_then(|()| pod.remove()).ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_victim_of_a_handler_has_its_turn() {
        let mut order = Sequence::new(SEED);
        let victims = Victim::of("brig");
        let mut killed = BTreeMap::new();
        for _ in 0..100 {
            *killed.entry(victims[order.below(5)]).or_insert(0) += 1;
        }
        assert_eq!(killed.len(), 5);
        assert!(killed.values().all(|count| *count > 8), "{killed:?}");
    }
}
