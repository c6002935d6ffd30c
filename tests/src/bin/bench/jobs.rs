//! What is done with storage: fio's jobs, and many small files. Fixed amounts, so that counts can be divided by them.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::subjects::Subject;

/// Bytes of fio's file, and of a sequential job.
pub const MIB: u64 = 16;

/// A job of fio.
pub struct Job {
    /// In the table.
    pub name: &'static str,
    /// What counts are divided by.
    pub unit: &'static str,
    /// How many of these it does.
    pub units: u64,
    args: &'static [&'static str],
    bytes: u64,
}

const KIB_4: u64 = 4096;

const fn small(name: &'static str, units: u64, args: &'static [&'static str]) -> Job {
    Job {
        name,
        unit: "4 KiB",
        units,
        args,
        bytes: units * KIB_4,
    }
}

/// All of them, in the order in which they are done.
pub const JOBS: [Job; 7] = [
    Job {
        name: "write, 1 MiB each, then fsync",
        unit: "MiB",
        units: MIB,
        args: &["--rw=write", "--bs=1m", "--ioengine=psync", "--end_fsync=1"],
        bytes: MIB << 20,
    },
    Job {
        name: "read, 1 MiB each",
        unit: "MiB",
        units: MIB,
        args: &["--rw=read", "--bs=1m", "--ioengine=psync"],
        bytes: MIB << 20,
    },
    small(
        "random read, direct, one at a time",
        256,
        &["--rw=randread", "--bs=4k", "--ioengine=psync", "--direct=1"],
    ),
    small(
        "random write, direct, one at a time",
        256,
        &[
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=psync",
            "--direct=1",
        ],
    ),
    small(
        "random read, direct, 32 at once",
        512,
        &[
            "--rw=randread",
            "--bs=4k",
            "--ioengine=libaio",
            "--iodepth=32",
            "--direct=1",
        ],
    ),
    small(
        "random write, direct, 32 at once",
        512,
        &[
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=libaio",
            "--iodepth=32",
            "--direct=1",
        ],
    ),
    small(
        "write and fsync each",
        64,
        &["--rw=write", "--bs=4k", "--ioengine=psync", "--fsync=1"],
    ),
];

/// Steps with small files, in their order.
pub const STEPS: [&str; 4] = ["create", "stat", "readdir", "unlink"];

impl Job {
    /// The command on this file.
    pub fn command(&self, file: &str) -> Vec<String> {
        fio(file, self.args, self.bytes)
    }

    /// Runs it; microseconds, as fio has them for the reads or writes.
    pub fn run(&self, subject: &mut Subject<'_>, file: &str) -> Result<u64> {
        let command = self.command(file);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let said = subject.runner.run(&command)?;
        micros(&said, self.bytes).with_context(|| format!("{} on {file}", self.name))
    }
}

fn fio(file: &str, args: &[&str], bytes: u64) -> Vec<String> {
    let own = [
        "/usr/bin/fio",
        "--output-format=json",
        "--name=job",
        "--thread",
        "--fallocate=none",
        "--clocksource=clock_gettime",
        "--disk_util=0",
    ];
    let mut command: Vec<String> = own.iter().map(|arg| (*arg).to_owned()).collect();
    command.extend(args.iter().map(|arg| (*arg).to_owned()));
    command.push(format!("--filename={file}"));
    command.push(format!("--size={MIB}m"));
    command.push(format!("--io_size={bytes}"));
    command
}

/// fio's start and one read: what is in every count, and no part of a job.
pub fn start(file: &str) -> Vec<String> {
    fio(file, &["--rw=read", "--bs=4k", "--ioengine=psync"], KIB_4)
}

/// Writes the file once, so that later jobs find it.
pub fn lay_out(subject: &mut Subject<'_>, file: &str) -> Result<()> {
    JOBS[0].run(subject, file).map(drop)
}

fn micros(said: &str, bytes: u64) -> Result<u64> {
    let json = said.find('{').and_then(|start| said.get(start..));
    let told: Value = serde_json::from_str(json.context("fio says nothing")?)?;
    let job = &told["jobs"][0];
    ensure!(job["error"] == 0, "fio's error {}", job["error"]);
    let sum = |field: &str| -> u64 {
        ["read", "write"]
            .iter()
            .filter_map(|side| job[*side][field].as_u64())
            .sum()
    };
    ensure!(
        sum("io_bytes") == bytes,
        "fio has moved {} bytes of {bytes}",
        sum("io_bytes")
    );
    Ok(sum("runtime") * 1000)
}

/// The command of a step with small files.
pub fn step<'a>(step: &'a str, directory: &'a str, files: &'a str) -> [&'a str; 5] {
    ["/bin/brig-probe", "metadata", step, directory, files]
}

/// What a program of ours measured.
pub fn told_micros(said: &str) -> Result<u64> {
    let told: Value = serde_json::from_str(said.trim())?;
    told["micros"].as_u64().context("no time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_moved_less_than_it_should_is_no_measurement() {
        let said = "note: hello\n{\"jobs\": [{\"error\": 0, \"read\": {\"io_bytes\": 4096, \"runtime\": 7}, \
             \"write\": {\"io_bytes\": 0, \"runtime\": 0}}]}";
        assert_eq!(micros(said, 4096).unwrap(), 7000);
        assert!(micros(said, 8192).is_err());
        assert!(micros("", 1).is_err());
    }
}
