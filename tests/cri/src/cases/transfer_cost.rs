//! What a transfer costs the VMM's network thread: system calls for each MiB, which no clock changes.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::strace;

use super::life::sandbox_pid;
use crate::container::Container;
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[case(
    "network",
    "a MiB leaves the guest, and comes, in few large frames",
    frames,
)];

const MIB: usize = 16;
const BYTES: usize = MIB << 20;
/// Linux makes a frame as large as what it sends in a millisecond, and on a slow machine that is two segments. So it is
/// told to take no less than fit into one.
pub(super) const SEGMENTS: (&str, &str) = ("net.ipv4.tcp_min_tso_segs", "44");
/// A frame of 64 KiB is sixteen of them; slow start and answers are smaller.
const MOST: usize = 120;

fn frames(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc's containers have no VMM");
    }
    let pod = suite
        .pod("transfer-cost")
        .sysctl(SEGMENTS.0, SEGMENTS.1)
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    let thread = network_thread(sandbox_pid(&pod)?)?;
    let out = counted(thread, || send(&container))?;
    let into = counted(thread, || receive(&container))?;
    eprintln!(
        "brig-cri: a MiB out: {out} writev; in: {} readv",
        into.1 / MIB,
        out = out.0 / MIB
    );
    that(
        &format!(
            "{} writev for {MIB} MiB are at most {MOST} each, and not none",
            out.0
        ),
        (1..=MOST * MIB).contains(&out.0),
    )
}

/// The thread that its interfaces are on.
pub(super) fn network_thread(vmm: i32) -> Result<i32> {
    let mut found = None;
    for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let thread = thread?;
        let name = fs::read_to_string(thread.path().join("comm"))?;
        let number: i32 = thread.file_name().to_string_lossy().parse()?;
        match name.trim() {
            "net" | "net-vhost" => return Ok(number),
            // One that was plugged later is with the quiet devices.
            "memory" => found = Some(number),
            _ => {}
        }
    }
    found.context("the VMM has no thread for its network")
}

/// `writev` and `readv` of a thread while `act` runs.
pub(super) fn counted(thread: i32, act: impl FnOnce() -> Result<()>) -> Result<(usize, usize)> {
    let trace = strace::calls(thread, act)?;
    let of = |call: &str| trace.lines().filter(|line| line.starts_with(call)).count();
    Ok((of("writev("), of("readv(")))
}

pub(super) fn send(container: &Container) -> Result<()> {
    let listener = TcpListener::bind("10.88.0.1:0")?;
    let port = listener.local_addr()?.port();
    let reader = std::thread::spawn(move || -> Result<usize> {
        let (mut stream, _) = listener.accept()?;
        let (mut buffer, mut all) = (vec![0; 1 << 16], 0);
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(all),
                count => all += count,
            }
        }
    });
    container.sh(&format!("head -c {BYTES} /dev/zero | nc 10.88.0.1 {port}"))?;
    let arrived = reader
        .join()
        .map_err(|_| anyhow::anyhow!("the reader ended"))??;
    equal("bytes that arrive", BYTES, arrived)
}

pub(super) fn receive(container: &Container) -> Result<()> {
    let listener = TcpListener::bind("10.88.0.1:0")?;
    let port = listener.local_addr()?.port();
    let writer = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        Ok(stream.write_all(&vec![0; BYTES])?)
    });
    let counted = container.sh(&format!("nc 10.88.0.1 {port} < /dev/null | wc -c"))?;
    writer
        .join()
        .map_err(|_| anyhow::anyhow!("the writer ended"))??;
    equal("bytes that arrive", BYTES.to_string(), counted)
}
