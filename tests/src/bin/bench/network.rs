//! The pod's network: iperf3 both ways and a byte to and fro, between a pod and its node, under runc, Brig and QEMU's microvm.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_suite::results::Place;
use brig_tests::node::clock;
use brig_tests::node::daemon::pod::Netns;
use serde_json::{Value, json};

use crate::ground::{Ground, run};
use crate::jobs;
use crate::kinds::{Kind, Who};
use crate::lines::{Line, beyond, words};
use crate::qemu::{Listener, Qemu};
use crate::subjects::{Subject, daemon, machine};

const BRIDGE: &str = "brig-bench";
const NODE: &str = "10.99.0.1";
const TAP: &str = "brig-bench-tap";
/// What iperf3 moves.
const MIB: u64 = 64;
/// How often the byte goes to and fro.
const PINGS: u64 = 300;
const ECHO: u16 = 5300;

/// What is done, as commands in the pod.
struct Transfer {
    name: &'static str,
    unit: &'static str,
    units: u64,
    command: Vec<String>,
    /// Its start alone, as nearly as the program has that.
    start: Vec<String>,
    micros: fn(&str) -> Result<u64>,
}

/// A bridge of the node with an address, and what serves there.
struct Network {
    servers: Vec<Child>,
}

impl Network {
    fn new(ground: &Ground) -> Result<Self> {
        let _ = run("ip", &["link", "delete", BRIDGE]);
        run("ip", &["link", "add", BRIDGE, "type", "bridge"])?;
        let address = format!("{NODE}/24");
        run("ip", &["address", "add", &address, "dev", BRIDGE])?;
        run("ip", &["link", "set", BRIDGE, "up"])?;
        let mut network = Self {
            servers: Vec::new(),
        };
        let mut iperf3 = ground.tool("/usr/bin/iperf3");
        iperf3.args(["--server", "--bind", NODE]);
        network.serve(iperf3)?;
        let mut echo = ground.tool("/bin/brig-probe");
        echo.args(["echo-bytes", &ECHO.to_string()]);
        network.serve(echo)?;
        let end = Instant::now() + clock::seconds(5);
        while std::net::TcpStream::connect((NODE, 5201)).is_err() {
            ensure!(Instant::now() < end, "iperf3 does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(network)
    }

    fn serve(&mut self, mut command: Command) -> Result<()> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.servers.push(command.spawn()?);
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for interface in [TAP, BRIDGE] {
            let _ = run("ip", &["link", "delete", interface]);
        }
    }
}

/// By the VMM and by the node's kernel, each beside runc and QEMU.
pub fn measure(results: &Place, rounds: usize) -> Result<()> {
    let ground = Ground::prepare()?;
    let _network = Network::new(&ground)?;
    let mut table = Line::table(
        &format!(
            "Network: durations as ratios, medians of {rounds} rounds; VM exits, and host system calls of the VMM"
        ),
        "frames by",
    );
    let mut all: Vec<Value> = Vec::new();
    for vhost in [false, true] {
        let first = if vhost { "vhost-net" } else { "the VMM" };
        for line in one(&ground, vhost, rounds).context(first)? {
            line.add_to(&mut table, first);
            all.push(line.json(first));
        }
        results.write("network.json", &json!({"rounds": rounds, "rows": all}))?;
    }
    table.print();
    println!("\nJSON: {}", results.file("network.json").display());
    Ok(())
}

fn one(ground: &Ground, vhost: bool, rounds: usize) -> Result<Vec<Line>> {
    let name = if vhost { "vhost" } else { "user" };
    let runc = daemon(Who::Runc, &format!("net-runc-{name}"), "")?;
    let brig = daemon(
        Who::Brig,
        &format!("net-brig-{name}"),
        &format!("vhost_net = {vhost}\n"),
    )?;
    let mut subjects = Vec::new();
    for (number, (daemon, who)) in (10..).zip([(&runc, Who::Runc), (&brig, Who::Brig)]) {
        let id = format!("{}-{name}", who.name());
        let netns = Netns::new(&id)?;
        netns.join(BRIDGE, &format!("10.99.0.{number}/24"))?;
        let made = Kind::Overlay.container(ground, who, name)?;
        subjects.push(Subject::pod(daemon, who, &id, netns, made)?);
    }
    let listener = Listener::open()?;
    match guest(ground, &listener, vhost) {
        Ok(subject) => subjects.push(subject),
        Err(error) => eprintln!("network: {name} under QEMU: {error:#}"),
    }

    let transfers = transfers();
    let mut lines: Vec<Line> = transfers
        .iter()
        .map(|one| Line::new(one.name.to_owned(), one.unit, one.units))
        .collect();
    for round in 0..rounds {
        eprintln!("network: {name}, round {} of {rounds}", round + 1);
        for (transfer, line) in transfers.iter().zip(&mut lines) {
            for (subject, samples) in subjects.iter_mut().zip(&mut line.samples) {
                let said = subject.runner.run(&words(&transfer.command))?;
                let micros = (transfer.micros)(&said).with_context(|| transfer.name)?;
                samples.push(micros);
            }
        }
    }
    for (index, subject) in subjects.iter_mut().enumerate().skip(1) {
        for (transfer, line) in transfers.iter().zip(&mut lines) {
            let start = subject.counted(&words(&transfer.start))?;
            let whole = subject.counted(&words(&transfer.command))?;
            line.costs[index] = beyond(whole, start);
        }
    }
    for subject in subjects {
        subject.end()?;
    }
    Ok(lines)
}

/// A guest of QEMU with a tap in the bridge.
fn guest(ground: &Ground, listener: &Listener, vhost: bool) -> Result<Subject<'static>> {
    let _ = run("ip", &["link", "delete", TAP]);
    run(
        "ip",
        &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"],
    )?;
    run("ip", &["link", "set", TAP, "master", BRIDGE, "up"])?;
    let mut command = machine("ext4");
    let disk = ground.ext4("network-qemu", true)?;
    command
        .arg("-drive")
        .arg(format!(
            "if=none,id=disk,format=raw,file={}",
            disk.display()
        ))
        .args(["-device", "virtio-blk-pci,drive=disk"])
        .arg("-netdev")
        .arg(format!(
            "tap,id=net,ifname={TAP},script=no,downscript=no,vhost={}",
            if vhost { "on" } else { "off" }
        ))
        .args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    let qemu = Qemu::boot(listener, command, clock::seconds(10))?;
    let mut subject = Subject::in_guest_alone(qemu)?;
    subject
        .runner
        .sh("ip address add 10.99.0.20/24 dev eth0 && ip link set eth0 up")?;
    Ok(subject)
}

fn transfers() -> [Transfer; 3] {
    let iperf3 = |more: &[&str], bytes: u64| -> Vec<String> {
        // It looks whether it has moved enough as often as it reports.
        let own = ["--client", NODE, "--json", "--interval", "0.1"];
        let mut command = vec!["/usr/bin/iperf3".to_owned()];
        command.extend(own.map(str::to_owned));
        command.extend(more.iter().map(|arg| (*arg).to_owned()));
        command.extend(["--bytes".to_owned(), bytes.to_string()]);
        command
    };
    let ping = |rounds: u64| -> Vec<String> {
        let target = format!("{NODE}:{ECHO}");
        ["/bin/brig-probe", "ping", &target, &rounds.to_string()]
            .map(str::to_owned)
            .to_vec()
    };
    [
        Transfer {
            name: "TCP out of the pod",
            unit: "MiB",
            units: MIB,
            command: iperf3(&[], MIB << 20),
            start: iperf3(&[], 1),
            micros: iperf3_micros,
        },
        Transfer {
            name: "TCP into the pod",
            unit: "MiB",
            units: MIB,
            command: iperf3(&["--reverse"], MIB << 20),
            start: iperf3(&["--reverse"], 1),
            micros: iperf3_micros,
        },
        Transfer {
            name: "a byte to the node and back",
            unit: "round",
            units: PINGS,
            command: ping(PINGS),
            start: ping(0),
            micros: jobs::told_micros,
        },
    ]
}

/// The time for the bytes that arrived, as for as many as were asked for: iperf3 ends a little after them.
fn iperf3_micros(said: &str) -> Result<u64> {
    let told: Value = serde_json::from_str(said)?;
    let sum = &told["end"]["sum_received"];
    let bytes = sum["bytes"].as_u64().context("iperf3 tells no bytes")?;
    let seconds = sum["seconds"].as_f64().context("iperf3 tells no time")?;
    ensure!(bytes > 0, "iperf3 has moved nothing");
    let micros = u64::try_from(Duration::try_from_secs_f64(seconds)?.as_micros())?;
    Ok(micros * (MIB << 20) / bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_that_of_the_bytes_that_were_asked_for() {
        let said = |bytes: u64| {
            json!({"end": {"sum_received": {"bytes": bytes, "seconds": 2.0}}}).to_string()
        };
        assert_eq!(iperf3_micros(&said(MIB << 20)).unwrap(), 2_000_000);
        assert_eq!(iperf3_micros(&said(MIB << 21)).unwrap(), 1_000_000);
        assert!(iperf3_micros(&said(0)).is_err());
    }
}
