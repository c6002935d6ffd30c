//! What was synced is there after the VMM was killed: on a disk of the guest, and in a directory of the node.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use brig_suite::case::not_here;
use brig_tests::node::ctr::{Container, Run};
use brig_tests::node::process::{Lines, Running};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::root_snapshotters::{BUSYBOX, Blockfile, Configured, PROBE, forget_snapshots, restart};
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[brig(
    "disks",
    "what was synced is there after the VMM was killed at any moment, on a disk and in a volume",
    kills,
)];

/// How often; fifty for a release.
const KILLS: &str = "BRIG_KILLS";
const DIRECTORY: &str = "/var/lib/brig-e2e-commits";
/// Where the database is: the root file system is a disk, the other a directory of the node.
const PLACES: [&str; 2] = ["/commits", "/volume/commits"];

struct Database {
    first: String,
    lines: Lines,
    _running: Running,
}

fn kills(suite: &mut Suite) -> Result<()> {
    if suite.containerd.starts_with("1.6") {
        return not_here("containerd has the blockfile snapshotter since 1.7");
    }
    let rounds = match std::env::var(KILLS) {
        Ok(text) => text.parse().with_context(|| format!("{KILLS}={text}"))?,
        Err(_) => 3,
    };
    suite.forget_shared();
    let _ = std::fs::remove_dir_all(DIRECTORY);
    std::fs::create_dir_all(DIRECTORY)?;
    let configured = Configured::with(&Blockfile)?;
    suite.reconnect_events();
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let outcome = rounds_of(suite, rounds);
    forget_snapshots(&suite.ctr, "blockfile")?;
    drop(configured);
    suite.reconnect_events();
    std::fs::remove_dir_all(DIRECTORY)?;
    outcome
}

fn rounds_of(suite: &Suite, rounds: u32) -> Result<()> {
    let run = Run::new("commits", BUSYBOX, &["sleep", "100000"])
        .with("--snapshotter", "blockfile")
        .with(
            "--mount",
            &format!("type=bind,src=/host/bin/brig-probe,dst={PROBE},options=rbind:ro"),
        )
        .with(
            "--mount",
            &format!("type=bind,src={DIRECTORY},dst=/volume,options=rbind:rw"),
        );
    let container = suite.ctr.start(&run)?;
    let mut all = [0u64; PLACES.len()];
    for round in 0..rounds {
        let mut databases = Vec::new();
        for place in PLACES {
            databases.push(database(&container, place)?);
        }
        let moment = Duration::from_millis(any(2000));
        std::thread::sleep(moment);
        let vmm = super::devices::vmm_of(suite, &container.id)?;
        kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
        let mut said = Vec::new();
        for mut database in databases {
            let last = database.lines.rest(patience())?.pop();
            let last = last.unwrap_or(database.first);
            said.push(last.trim().parse::<u64>().context(last)?);
        }
        restart(&suite.ctr, &container)?;
        for ((place, said), before) in PLACES.into_iter().zip(said).zip(&mut all) {
            let flags = [PROBE, "commits-check", place, &said.to_string()];
            let checked = container
                .exec(&flags)?
                .success()
                .with_context(|| format!("{place}, round {round}, killed after {moment:?}"))?;
            let found: u64 = checked.text().trim().parse()?;
            ensure!(
                found >= said && said > *before,
                "{place}: {before}, {said}, {found}"
            );
            *before = found;
        }
    }
    println!("{rounds} kills; commits on a disk and in a volume: {all:?}");
    Ok(())
}

/// Starts it, and waits for its first commit.
fn database(container: &Container, place: &str) -> Result<Database> {
    let command = container.exec_process(&[], &[PROBE, "commits", place]);
    let (running, mut lines) = Lines::start(command)?;
    Ok(Database {
        first: lines.wait_for("", patience())?,
        lines,
        _running: running,
    })
}

/// A number below `end`, another one each time.
fn any(end: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::from(now.subsec_nanos()) / 1000 % end)
}
