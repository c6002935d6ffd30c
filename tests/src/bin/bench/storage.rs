//! Storage of each kind in a pod: fio's jobs and many small files under runc, Brig and QEMU's microvm, side by side.

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::pod::Netns;
use serde_json::{Value, json};

use crate::ground::Ground;
use crate::jobs::{self, JOBS, STEPS};
use crate::kinds::{Kind, Who};
use crate::lines::{Line, beyond, words};
use crate::qemu::Listener;
use crate::subjects::{Subject, daemon};

/// All kinds, or those whose names contain `only`.
pub fn measure(results: &Place, rounds: usize, files: u64, only: &str) -> Result<()> {
    let ground = Ground::prepare()?;
    let (runc, brig) = (
        daemon(Who::Runc, "runc", "")?,
        daemon(Who::Brig, "brig", "")?,
    );
    let listener = Listener::open()?;
    let mut table = Line::table(
        &format!(
            "Storage: durations as ratios, medians of {rounds} rounds; VM exits, and host system calls of the VMM (QEMU: and of virtiofsd)"
        ),
        "storage",
    );
    let mut all: Vec<Value> = Vec::new();
    for kind in Kind::ALL {
        if !kind.name().contains(only) {
            continue;
        }
        let lines = one(kind, &ground, [&runc, &brig], &listener, rounds, files)
            .with_context(|| kind.name())?;
        let first = format!("{} ({})", kind.name(), kind.way());
        for line in lines {
            line.add_to(&mut table, &first);
            all.push(line.json(&first));
        }
        // After each, so that a kind that fails costs no other its figures.
        results.write("storage.json", &json!({"rounds": rounds, "rows": all}))?;
    }
    table.print();
    println!("\nJSON: {}", results.file("storage.json").display());
    Ok(())
}

/// One kind under all three. A guest of QEMU that does not start is said and left out.
fn one(
    kind: Kind,
    ground: &Ground,
    [runc, brig]: [&Daemon; 2],
    listener: &Listener,
    rounds: usize,
    files: u64,
) -> Result<Vec<Line>> {
    eprintln!("storage: {}", kind.name());
    let mut subjects: Vec<Subject<'_>> = Vec::new();
    for (daemon, who) in [(runc, Who::Runc), (brig, Who::Brig)] {
        let id = format!("{}-{kind:?}", who.name()).to_lowercase();
        let made = kind.container(ground, who, "one")?;
        let netns = Netns::new(&id)?;
        let mut subject = Subject::pod(daemon, who, &id, netns, made)?;
        if let Some(directory) = kind.directory() {
            subject.runner.run(&["/bin/mkdir", "-p", directory])?;
        }
        subjects.push(subject);
    }
    match kind
        .guest(ground)
        .and_then(|made| Subject::guest(listener, ground, made))
    {
        Ok(subject) => subjects.push(subject),
        Err(error) => eprintln!("storage: {} under QEMU: {error:#}", kind.name()),
    }
    let file = |who: Who| match who {
        Who::Qemu => kind.file_in_guest(),
        _ => kind.file(),
    };
    for subject in &mut subjects {
        jobs::lay_out(subject, &file(subject.who))?;
    }

    let mut lines: Vec<Line> = JOBS
        .iter()
        .map(|job| Line::new(job.name.to_owned(), job.unit, job.units))
        .collect();
    for round in 0..rounds {
        eprintln!("  round {} of {rounds}", round + 1);
        for (job, line) in JOBS.iter().zip(&mut lines) {
            for (subject, samples) in subjects.iter_mut().zip(&mut line.samples) {
                let micros = job
                    .run(subject, &file(subject.who))
                    .with_context(|| subject.who.name())?;
                samples.push(micros);
            }
        }
    }
    for (index, subject) in subjects.iter_mut().enumerate().skip(1) {
        let file = file(subject.who);
        let start = subject.counted(&words(&jobs::start(&file)))?;
        for (job, line) in JOBS.iter().zip(&mut lines) {
            let whole = subject.counted(&words(&job.command(&file)))?;
            line.costs[index] = beyond(whole, start);
        }
    }
    if kind.directory().is_some() {
        lines.extend(metadata(kind, &mut subjects, rounds, files)?);
    }
    for subject in subjects {
        subject.end()?;
    }
    Ok(lines)
}

/// Many small files of one directory.
fn metadata(
    kind: Kind,
    subjects: &mut [Subject<'_>],
    rounds: usize,
    files: u64,
) -> Result<Vec<Line>> {
    let count = files.to_string();
    let mut lines: Vec<Line> = STEPS
        .iter()
        .map(|step| Line::new(format!("{step} of {files} files"), "file", files))
        .collect();
    let places: Vec<String> = subjects
        .iter_mut()
        .map(|subject| {
            let place = match subject.who {
                Who::Qemu => kind.place_in_guest(),
                _ => kind.directory(),
            };
            let place = format!("{}/many", place.context("a device has no files")?);
            subject.runner.run(&["/bin/mkdir", "-p", &place])?;
            Ok(place)
        })
        .collect::<Result<_>>()?;
    for round in 0..=rounds {
        for (step, line) in STEPS.iter().zip(&mut lines) {
            for (index, (subject, place)) in subjects.iter_mut().zip(&places).enumerate() {
                let command = jobs::step(step, place, &count);
                if round < rounds {
                    let said = subject.runner.run(&command)?;
                    line.samples[index].push(jobs::told_micros(&said)?);
                } else {
                    // Of no file: the program's start.
                    let start = subject.counted(&jobs::step("stat", place, "0"))?;
                    line.costs[index] = beyond(subject.counted(&command)?, start);
                }
            }
        }
    }
    Ok(lines)
}
