//! A pod in a network namespace that somebody else prepared, as CNI does.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::{clock, process};

use crate::suite::{Case, PROBE, Suite, brig, case, patience};

const NAMESPACE: &str = "brig-e2e-net";
const NODE_LINK: &str = "brige2e0";
const NODE: &str = "10.99.0.1";
const POD: &str = "10.99.0.2";

/// The node's end of its CNI bridge.
const BRIDGE: &str = "10.88.0.1";

pub const CASES: &[Case] = &[
    case(
        "network",
        "a pod has its namespace's address, both ways, and leaves the namespace as it was",
        both_ways,
    ),
    case(
        "network",
        "a network that CNI makes between create and start is the pod's",
        after_create,
    ),
    brig(
        "network",
        "a second VM in a network namespace is refused by name, and leaves the first one its network",
        second_vm,
    ),
];

fn ip(args: &[&str]) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(args);
    let outcome = process::run(command, clock::seconds(3))?
        .success()
        .with_context(|| format!("ip {}", args.join(" ")))?;
    Ok(outcome.text())
}

/// A namespace with an address; gone at the end of its scope.
struct Namespace;

impl Namespace {
    fn make() -> Result<Self> {
        let _ = ip(&["netns", "delete", NAMESPACE]);
        ip(&["netns", "add", NAMESPACE])?;
        let namespace = Self;
        let node_address = format!("{NODE}/24");
        let pod_address = format!("{POD}/24");
        for args in [
            &[
                "link", "add", NODE_LINK, "type", "veth", "peer", "name", "eth0", "netns",
                NAMESPACE,
            ][..],
            &["address", "add", &node_address, "dev", NODE_LINK],
            &["link", "set", NODE_LINK, "up"],
            &[
                "-n",
                NAMESPACE,
                "address",
                "add",
                &pod_address,
                "dev",
                "eth0",
            ],
            &["-n", NAMESPACE, "link", "set", "eth0", "up"],
            &["-n", NAMESPACE, "link", "set", "lo", "up"],
            &["-n", NAMESPACE, "route", "add", "default", "via", NODE],
        ] {
            ip(args)?;
        }
        Ok(namespace)
    }

    /// Interfaces and traffic control: what a runtime may have added.
    fn state() -> Result<(String, String)> {
        let links = ip(&["-n", NAMESPACE, "-brief", "link"])?;
        let names: Vec<&str> = links
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        let mut command = Command::new("tc");
        command.args(["-n", NAMESPACE, "qdisc", "show", "dev", "eth0"]);
        let qdiscs = process::run(command, clock::seconds(3))?.success()?.text();
        Ok((names.join(" "), qdiscs))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", NODE_LINK]);
        let _ = ip(&["netns", "delete", NAMESPACE]);
    }
}

/// Accepts one connection and answers it; returns what was asked.
pub fn answer_once(listener: TcpListener) -> std::thread::JoinHandle<Result<String>> {
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept()?;
        let mut request = [0u8; 64];
        let length = stream.read(&mut request)?;
        stream.write_all(format!("hello {}", peer.ip()).as_bytes())?;
        Ok(String::from_utf8_lossy(&request[..length]).into_owned())
    })
}

fn both_ways(suite: &mut Suite) -> Result<()> {
    let namespace = Namespace::make()?;
    let before = Namespace::state()?;
    let run = suite
        .probe("network", &["serve", "8080", "from the pod"])
        .with("--with-ns", &format!("network:/run/netns/{NAMESPACE}"));
    let container = suite.ctr.start(&run)?;

    let listener = TcpListener::bind((NODE, 0))?;
    let target = format!("{NODE}:{}", listener.local_addr()?.port());
    let asked = answer_once(listener);
    let outcome = container.exec(&[PROBE, "connect", &target])?.success()?;
    // No address translation: the node sees the pod's own address.
    equal("the node's answer", format!("hello {POD}"), outcome.text())?;
    let request = asked
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    contains("the pod's request", "GET /", &request)?;

    equal("the pod's answer", "from the pod", ask()?)?;

    drop(container);
    let mut after = Namespace::state()?;
    let end = Instant::now() + patience();
    while after != before && Instant::now() < end {
        // The last traces go with the VMM, whose end nobody announces here.
        std::thread::sleep(Duration::from_millis(200));
        after = Namespace::state()?;
    }
    equal("interfaces and queueing of the namespace", before, after)?;
    drop(namespace);
    Ok(())
}

/// Reads what the pod's server says to whoever connects; it may not listen yet.
fn ask() -> Result<String> {
    let end = Instant::now() + patience();
    loop {
        let mut answer = String::new();
        let asked = TcpStream::connect((POD, 8080))
            .and_then(|mut stream| stream.read_to_string(&mut answer).map(|_| ()));
        match asked {
            Ok(()) => return Ok(answer),
            Err(error) => that(
                &format!("the pod's server answers, not: {error}"),
                Instant::now() < end,
            )?,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn second_vm(suite: &mut Suite) -> Result<()> {
    let _namespace = Namespace::make()?;
    let within = format!("network:/run/netns/{NAMESPACE}");
    let first = suite
        .probe("first", &["serve", "8080", "from the first"])
        .with("--with-ns", &within);
    let first = suite.ctr.start(&first)?;
    equal("the answer", "from the first", ask()?)?;
    let second = suite.probe("second", &["facts"]).with("--with-ns", &within);
    let outcome = suite.ctr.run(&second)?;
    that("a second one is refused", outcome.code != 0)?;
    for part in ["eth0", NAMESPACE, "vethbrig0"] {
        contains("the error", part, &outcome.stderr)?;
    }
    // Its end has taken nothing away.
    equal("the answer", "from the first", ask()?)?;
    drop(first);
    // And once the first has gone, whose end nobody announces here, the namespace is anybody's.
    let end = Instant::now() + patience();
    while let Err(error) = suite.ctr.run(&second)?.success() {
        that(
            &format!("the namespace is free, not: {error}"),
            Instant::now() < end,
        )?;
    }
    Ok(())
}

/// `ctr run --cni` calls the plug-ins with the namespace of the pid that Create has returned.
fn after_create(suite: &mut Suite) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", 0))?;
    let target = format!("{BRIDGE}:{}", listener.local_addr()?.port());
    let asked = answer_once(listener);
    let run = suite.probe("cni", &["connect", &target]).flag("--cni");
    let outcome = suite.ctr.run(&run)?.success()?;
    contains("the node's answer", "hello 10.88.", &outcome.text())?;
    let request = asked
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    contains("the pod's request", "GET /", &request)
}
