//! How many instructions a start and an exec are: all that the node's CPU executes for them, guests with it.
//!
//! QEMU can emulate a CPU whose clock counts what it executes (`-icount`). In such a node the time in which the CPU was not idle is a
//! number of instructions, whatever else the machine does meanwhile. That the node has such a clock is tried, not believed.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::equal;
use brig_tests::node::process::Outcome;
use brig_tests::node::{clock, process};
use serde_json::Value;

use crate::containers::{PROBE, Subject, brig};
use crate::report::{median, ratio};
use crate::table::Table;

/// What the clock is tried with: rounds of two instructions.
const TRIAL: u64 = 20_000_000;
/// An instruction more in a hundred is an interrupt's.
const TOLERANCE: u64 = 100;

/// Samples of one subject, in thousands of instructions.
#[derive(Default)]
struct Samples {
    run: Vec<u64>,
    /// What could have been executed while everybody waited.
    run_idle: Vec<u64>,
    exec: Vec<u64>,
    exec_idle: Vec<u64>,
    /// Of a start: each mark of the timeline with the instructions since the one before, and the CPU's idle time in them.
    stages: Vec<(String, Vec<u64>)>,
    idle: Vec<u64>,
}

/// Prints what starts of pods that boot, of pods that go on from a template and of runc's execute.
pub fn measure(rounds: usize) -> Result<()> {
    let clock = Clock::tried()?;
    Subject::of("")
        .ctr
        .ok(&["image", "import", "/host/bin/probe.tar"])?;
    let subjects = [
        ("booted", Subject::of("io.containerd.brig.v2")),
        ("gone on", Subject::of_template()?),
        ("runc", Subject::of("io.containerd.runc.v2")),
    ];
    let mut samples = [(); 3].map(|()| Samples::default());
    // The first round fills caches.
    for round in 0..=rounds {
        eprintln!("instructions, round {round} of {rounds}");
        for ((name, subject), samples) in subjects.iter().zip(&mut samples) {
            let mut unseen = Samples::default();
            let kept = if round == 0 { &mut unseen } else { samples };
            one(clock, subject, kept).with_context(|| (*name).to_owned())?;
        }
    }
    let mut table = Table::new(
        &format!("Thousands of instructions of the node's CPU, medians of {rounds} rounds"),
        &[
            "",
            "booted",
            "gone on",
            "runc",
            "booted : runc",
            "gone on : runc",
            "gone on : booted",
        ],
    );
    let mut row = |what: &str, of: fn(&Samples) -> &[u64]| {
        let [booted, cloned, runc] = samples.each_ref().map(|one| median(of(one)).unwrap_or(0));
        table.row([
            what.to_owned(),
            booted.to_string(),
            cloned.to_string(),
            runc.to_string(),
            ratio(booted, runc),
            ratio(cloned, runc),
            ratio(cloned, booted),
        ]);
    };
    row("ctr run of a program that exits at once", |one| &one.run);
    row("idle meanwhile", |one| &one.run_idle);
    row("ctr exec of the same", |one| &one.exec);
    row("idle meanwhile", |one| &one.exec_idle);
    table.print();
    for ((name, _), samples) in subjects.iter().zip(&samples).take(2) {
        let mut table = Table::new(
            &format!("Thousands of instructions since the line before, idle ones too: {name}"),
            &["up to", "instructions"],
        );
        for (mark, counts) in &samples.stages {
            table.row([mark.clone(), median(counts).unwrap_or(0).to_string()]);
        }
        let idle = median(&samples.idle).unwrap_or(0).to_string();
        table.row(["of all that idle".to_owned(), idle]);
        table.print();
    }
    Ok(())
}

fn one(clock: Clock, subject: &Subject, samples: &mut Samples) -> Result<()> {
    let ctr = &subject.ctr;
    let ends_well =
        |outcome: Outcome| equal("exit status", 0, outcome.code).context(outcome.stderr);
    let (outcome, spent) = clock.count(|| ctr.run(&subject.run("true", &["exit", "0"])))?;
    ends_well(outcome)?;
    samples.run.push(spent.busy);
    samples.run_idle.push(spent.idle);

    let (container, spent) = clock.count(|| ctr.start(&subject.run("stays", &["sleep"])))?;
    if subject.is_brig() {
        samples.idle.push(spent.idle);
        let told = process::run(
            brig(&["timeline", &container.id, "--json"]),
            clock::seconds(20),
        )?;
        let told: Value = serde_json::from_slice(&told.success()?.stdout)?;
        let marks = told["marks"].as_array().context("a timeline has marks")?;
        let mut marks: Vec<(&str, u64)> = marks
            .iter()
            .filter_map(|mark| Some((mark["name"].as_str()?, mark["micros"].as_u64()?)))
            .collect();
        marks.sort_by_key(|(_, micros)| *micros);
        let mut before = 0;
        for (name, micros) in marks {
            let count = clock.instructions(Duration::from_micros(micros - before));
            before = micros;
            match samples.stages.iter_mut().find(|(known, _)| known == name) {
                Some((_, counts)) => counts.push(count),
                None => samples.stages.push((name.to_owned(), vec![count])),
            }
        }
    }
    let (outcome, spent) = clock.count(|| container.exec(&[PROBE, "exit", "0"]))?;
    ends_well(outcome)?;
    samples.exec.push(spent.busy);
    samples.exec_idle.push(spent.idle);
    Ok(())
}

/// What something cost, in thousands of instructions.
struct Spent {
    busy: u64,
    /// What could have been executed while the CPU was idle.
    idle: u64,
}

/// A clock that counts instructions.
#[derive(Clone, Copy)]
struct Clock {
    /// Nanoseconds for each.
    step: u64,
}

impl Clock {
    fn tried() -> Result<Self> {
        // The shortest one has met the fewest interrupts; all are about as long, so that none is so by chance.
        let mut trials = [(); 5].map(|()| {
            let start = Instant::now();
            spin(TRIAL);
            u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
        });
        trials.sort_unstable();
        let [took, .., longest] = trials;
        let executed = 2 * TRIAL;
        let step = (took + executed / 2) / executed;
        let whole = executed.saturating_mul(step);
        let is_whole = |took: u64| took.abs_diff(whole) < whole / TOLERANCE;
        let exact = step.is_power_of_two() && is_whole(took) && is_whole(longest);
        ensure!(
            exact,
            "{executed} instructions took {took} ns, so the node's clock does not count them: \
             boot one with BRIG_NODE_COUNTS=1"
        );
        Ok(Self { step })
    }

    fn instructions(self, time: Duration) -> u64 {
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) / self.step / 1000
    }

    fn count<T>(self, act: impl FnOnce() -> Result<T>) -> Result<(T, Spent)> {
        let idle = idle()?;
        let start = Instant::now();
        let done = act()?;
        let elapsed = start.elapsed();
        let idle = self::idle()?.saturating_sub(idle);
        let spent = Spent {
            busy: self.instructions(elapsed.saturating_sub(idle)),
            idle: self.instructions(idle),
        };
        Ok((done, spent))
    }
}

/// Executes two instructions a round, and a few.
fn spin(rounds: u64) {
    // SAFETY: it counts a register down.
    unsafe {
        std::arch::asm!(
            "2: dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds => _,
            options(nomem, nostack)
        );
    }
}

/// For how long the CPU has been idle since the node was booted, also while a disk was waited for, in which the clock follows that of the
/// machine. /proc/stat has it in hundredths of a second only.
fn idle() -> Result<Duration> {
    let list = fs::read_to_string("/proc/timer_list").context("/proc/timer_list")?;
    let nanoseconds = idle_of(&list).context("/proc/timer_list has no idle time")?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// Nanoseconds; none where the list does not say.
fn idle_of(list: &str) -> Option<u64> {
    let numbers = list.lines().map(str::trim).filter_map(|line| {
        let kinds = [".idle_sleeptime", ".iowait_sleeptime"];
        let line = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
        let number = line
            .split_whitespace()
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        Some(number.and_then(|number| number.parse::<u64>().ok()))
    });
    numbers.reduce(|one, other| Some(one? + other?))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_that_of_all_cpus() {
        let list = "cpu: 0\n  .idle_entrytime : 17 nsecs\n  .idle_sleeptime : 23081 nsecs\n  .iowait_sleeptime: 100 nsecs\ncpu: 1\n  .idle_sleeptime : 9 nsecs\n";
        assert_eq!(idle_of(list), Some(23_190));
        assert_eq!(idle_of("cpu: 0\n  .nohz_mode : 2\n"), None);
        assert_eq!(idle_of("  .idle_sleeptime : x nsecs\n"), None);
    }

    #[test]
    fn a_clock_of_four_nanoseconds_an_instruction_counts_a_quarter() {
        let clock = Clock { step: 4 };
        assert_eq!(clock.instructions(Duration::from_micros(20)), 5);
    }
}
