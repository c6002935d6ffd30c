//! `brig-bench`: figures of Brig beside what a user would pick instead, in one node and one run,
//! interleaved and repeated; a table and JSON.
//! `--storage`, `--roots` and `--network` are tables of their own.
//!
//! Counts do not depend on the clock. Times do, and under emulation only their ratios mean anything,
//! which the output says. `--overhead` prints what a pod costs by its size instead, `--density` what many pods cost,
//! `--instructions` what a start executes, in a node that counts it.

mod boot;
mod containers;
mod density;
mod ground;
mod instructions;
mod jobs;
mod kinds;
mod lines;
mod network;
mod overhead;
mod qemu;
mod report;
mod roots;
mod runner;
mod storage;
mod subjects;
mod syscalls;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use brig_suite::results::Place;

const USAGE: &str = "usage: brig-bench [--rounds N] [--results DIR] [--files N] [--storage [KIND] | --roots | --network | --instructions]
       brig-bench --overhead [RUNTIME] | --density PODS [booted] [template] [runc]";

/// Rounds of what takes long in each.
const FEW: usize = 3;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("brig-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut rounds = None;
    let mut files = 1000;
    let mut results = PathBuf::from("/host/results");
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--rounds" => rounds = Some(value()?.parse::<usize>()?.max(1)),
            "--results" => results = value()?.into(),
            "--overhead" => {
                let runtime = args.next();
                return overhead::measure(runtime.as_deref().unwrap_or("io.containerd.brig.v2"));
            }
            // Run under strace by this program itself: one boot, nothing else.
            "--boot-brig-once" => return boot::brig_once(),
            "--boot-clone-once" => return boot::clone_once(),
            "--boot-qemu-once" => return boot::qemu_once(),
            "--instructions" => return instructions::measure(rounds.unwrap_or(FEW)),
            "--density" => {
                let pods = value()?.parse::<usize>()?.max(1);
                let kinds: Vec<String> = args.collect();
                return density::measure(pods, &kinds);
            }
            "--storage" => {
                let only = args.next().unwrap_or_default();
                return storage::measure(
                    &Place::prepare(&results)?,
                    rounds.unwrap_or(FEW),
                    files,
                    &only,
                );
            }
            "--network" => {
                return network::measure(&Place::prepare(&results)?, rounds.unwrap_or(FEW));
            }
            "--roots" => return roots::measure(&Place::prepare(&results)?, rounds.unwrap_or(FEW)),
            "--files" => files = value()?.parse::<u64>()?.max(1),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    let rounds = rounds.unwrap_or(7);
    // Before the work, so that its figures are not lost at the end.
    let results = Place::prepare(&results)?;
    let mut report = report::Report::new(rounds);
    boot::measure(&mut report, rounds)?;
    containers::measure(&mut report, rounds)?;
    report.print();
    report.write(&results)
}
