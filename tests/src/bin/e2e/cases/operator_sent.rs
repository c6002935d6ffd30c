//! What Brig sends of a pod by itself, where the operator wants it: the spans of its start to the collector of
//! containerd's tracing, its log to the node's journal.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::process;
use brig_tests::node::{clock, containerd};
use serde_json::Value;

use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[brig(
    "operator",
    "the spans of a start go where containerd's do, and the log into the node's journal",
    sent,
)];

const CONFIG: &str = "/run/brig-e2e-journald.toml";
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Takes what anybody sends, and passes on what is JSON, as containerd's is not.
fn collect(listener: TcpListener, documents: Sender<String>) {
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let documents = documents.clone();
            // A client that breaks off has nothing more to say.
            thread::spawn(move || converse(client, &documents));
        }
    });
}

fn converse(client: TcpStream, documents: &Sender<String>) -> Result<()> {
    let mut answers = client.try_clone()?;
    let mut reader = BufReader::new(client);
    loop {
        let (mut length, mut is_json) = (0, false);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", value)) => length = value.parse()?,
                Some(("content-type", value)) => is_json = value == "application/json",
                _ if line.is_empty() => break,
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        answers.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
        if is_json {
            documents.send(String::from_utf8(body)?)?;
        }
    }
}

/// containerd with these words of `systemctl` said before.
fn restart_containerd(suite: &mut Suite, words: &[&str]) -> Result<()> {
    let mut systemctl = Command::new("systemctl");
    systemctl.args(words);
    process::run(systemctl, clock::seconds(30))?.success()?;
    containerd::restart()?;
    suite.reconnect_events();
    Ok(())
}

const JOURNALD: [&str; 3] = [
    "systemd-journald.socket",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
];

/// A journal, in a node that does not have one running.
fn with_journal(run: impl FnOnce() -> Result<()>) -> Result<()> {
    let systemctl = |word: &str| {
        let mut systemctl = Command::new("systemctl");
        systemctl.arg(word).args(JOURNALD);
        process::run(systemctl, clock::seconds(30))
    };
    let was_there = systemctl("is-active")?.code == 0;
    systemctl("start")?.success()?;
    let result = run();
    if !was_there {
        systemctl("stop")?.success()?;
    }
    result
}

fn sent(suite: &mut Suite) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let setting = format!("{ENDPOINT}=http://{}", listener.local_addr()?);
    let (sender, documents) = mpsc::channel();
    collect(listener, sender);
    restart_containerd(suite, &["set-environment", &setting])?;
    let result = with_journal(|| pod(suite, &documents));
    restart_containerd(suite, &["unset-environment", ENDPOINT])?;
    let _ = fs::remove_file(CONFIG);
    result
}

fn pod(suite: &mut Suite, documents: &Receiver<String>) -> Result<()> {
    let scale = clock::scale();
    let text = format!("time_scale = {scale}\nallow_slow_kvm = true\njournald = true\n");
    fs::write(CONFIG, text)?;
    let run = suite
        .probe("sent", &["sleep"])
        .with("--runtime-config-path", CONFIG);
    let _container = suite.ctr.start(&run)?;

    let document = documents.recv_timeout(patience());
    let document = document.context("no spans came")?;
    contains("whose spans they are", &run.id, &document)?;
    let document: Value = serde_json::from_str(&document)?;
    let spans = &document["resourceSpans"][0]["scopeSpans"][0]["spans"];
    let spans = spans.as_array().context("no spans in it")?;
    let names: Vec<&str> = spans
        .iter()
        .filter_map(|span| span["name"].as_str())
        .collect();
    equal("the first", names.first(), Some(&"brig.pod.start"))?;
    for name in [
        "vmm.launched",
        "kernel.entry",
        "sandbox.started",
        "container.started",
    ] {
        that(&format!("{name} is among {names:?}"), names.contains(&name))?;
    }
    let times = |span: &Value| {
        let time = |name: &str| span[name].as_str()?.parse::<u64>().ok();
        Some((time("startTimeUnixNano")?, time("endTimeUnixNano")?))
    };
    let whole = times(&spans[0]).context("the start has no times")?;
    let inside = |span: &Value| {
        times(span).is_some_and(|(from, to)| whole.0 <= from && from <= to && to <= whole.1)
    };
    that(
        "every step is inside of the start",
        spans.iter().all(inside),
    )?;
    // containerd says from 2.0 on which trace a request is part of.
    let is_part = spans[0]["parentSpanId"].is_string();
    that(
        "it is part of containerd's trace",
        is_part || suite.containerd.starts_with('1'),
    )?;

    let mut journalctl = Command::new("journalctl");
    let wanted = format!("BRIG_SANDBOX={}", run.id);
    journalctl.args(["--identifier=brig", "--output=json", &wanted]);
    let entries = process::run(journalctl, clock::seconds(20))?
        .success()?
        .text();
    let entries: Vec<Value> = entries
        .lines()
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    let ready = entries
        .iter()
        .find(|entry| entry["MESSAGE"] == "the sandbox is ready");
    let ready = ready.with_context(|| format!("the journal has {entries:?}"))?;
    equal("its level", ready["PRIORITY"].as_str(), Some("6"))?;
    that("how long it took", ready["BRIG_FOR_MS"].is_string())
}
