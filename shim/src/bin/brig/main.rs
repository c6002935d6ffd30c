//! `brig`, the operator's command: what this node lacks, which pods run, how one booted, what its VM
//! did. Runs as root and trusts the files below the state directory.

mod check;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brig_shim::asked::config::Config;
use brig_shim::containerd::server::{COUNTERS_METHOD, DEBUG_SERVICE};
use brig_shim::error::{Error, Result};
use brig_shim::node::journal::{self, StateDir};
use brig_shim::pod::timeline::Timeline;
use ttrpc::asynchronous::Client;

const USAGE: &str = "\
usage: brig COMMAND

  check [--config FILE]              what a VM needs of this node, and what is missing
  list                               the pods of this node
  timeline [-n NAMESPACE] [--json] ID  how a pod booted
  counters [-n NAMESPACE] ID         boot marks and VM exits of a running pod, as JSON
  version
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("brig: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(words: &[String]) -> Result<bool> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let Some((command, rest)) = words.split_first() else {
        return Err(Error::invalid(USAGE));
    };
    match *command {
        "check" => run_check(rest),
        "list" | "ls" => list(&base()?).map(|()| true),
        "timeline" => timeline(&base()?, &Selection::parse(rest)?).map(|()| true),
        "counters" => counters(&base()?, &Selection::parse(rest)?).map(|()| true),
        "version" | "-v" | "--version" => {
            print(&format!("brig {}\n", env!("CARGO_PKG_VERSION"))).map(|()| true)
        }
        "help" | "-h" | "--help" => print(USAGE).map(|()| true),
        _ => Err(Error::invalid(format!(
            "unknown command {command:?}\n{USAGE}"
        ))),
    }
}

fn base() -> Result<PathBuf> {
    Ok(Config::load(None)?.state_dir)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::io("standard output", &error))
}

fn run_check(words: &[&str]) -> Result<bool> {
    let path = match words {
        [] => None,
        ["--config", path] => Some(Path::new(*path)),
        _ => return Err(Error::invalid(USAGE)),
    };
    let findings = check::node(path);
    let mut text = String::new();
    for finding in &findings {
        text.push_str(&finding.to_string());
        text.push('\n');
    }
    print(&text)?;
    Ok(findings.iter().all(|finding| !finding.is_fatal()))
}

fn list(base: &Path) -> Result<()> {
    let mut text = format!(
        "{:<16} {:<40} {:>8} {:>8}  STATE\n",
        "NAMESPACE", "ID", "SHIM", "VMM"
    );
    for (namespace, id) in journal::list(base) {
        let Ok(Some(journal)) = StateDir::new(base, &namespace, &id).and_then(|dir| dir.read())
        else {
            continue;
        };
        let alive = |identity: Option<brig_shim::node::identity::Identity>| {
            identity.is_some_and(|identity| identity.is_alive())
        };
        let state = match (alive(Some(journal.shim)), alive(journal.vmm)) {
            (true, true) => "running",
            (true, false) if journal.vmm.is_none() => "starting",
            (true, false) => "ended",
            (false, _) => "abandoned",
        };
        let vmm = journal
            .vmm
            .map_or_else(|| "-".to_owned(), |vmm| vmm.pid.to_string());
        text.push_str(&format!(
            "{namespace:<16} {id:<40} {:>8} {vmm:>8}  {state}\n",
            journal.shim.pid
        ));
    }
    print(&text)
}

/// A pod as named on the command line.
struct Selection {
    namespace: Option<String>,
    id: String,
    json: bool,
}

impl Selection {
    fn parse(words: &[&str]) -> Result<Self> {
        let (mut namespace, mut id, mut json) = (None, None, false);
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "-n" | "--namespace" => {
                    namespace = Some(words.next().ok_or_else(|| Error::invalid(USAGE))?);
                }
                "--json" => json = true,
                word if !word.starts_with('-') && id.is_none() => id = Some(word.to_owned()),
                _ => return Err(Error::invalid(USAGE)),
            }
        }
        Ok(Self {
            namespace: namespace.map(|name| (*name).to_owned()),
            id: id.ok_or_else(|| Error::invalid(USAGE))?,
            json,
        })
    }

    /// The pod's directory; without a namespace, of the only pod with this id.
    fn find(&self, base: &Path) -> Result<StateDir> {
        let mut found = journal::list(base).into_iter().filter(|(namespace, id)| {
            *id == self.id
                && self
                    .namespace
                    .as_ref()
                    .is_none_or(|wanted| wanted == namespace)
        });
        let missing = || Error::not_found(format!("no pod {} on this node", self.id));
        let (namespace, id) = found.next().ok_or_else(missing)?;
        if found.next().is_some() {
            return Err(Error::invalid(
                "several namespaces have this id; choose one with -n",
            ));
        }
        StateDir::new(base, &namespace, &id)
    }
}

fn timeline(base: &Path, selection: &Selection) -> Result<()> {
    let bytes = selection.find(base)?.read_timeline()?;
    let damaged =
        |error: serde_json::Error| Error::internal(format!("the timeline is damaged: {error}"));
    let timeline: Timeline = serde_json::from_slice(&bytes).map_err(damaged)?;
    if selection.json {
        return print(&format!(
            "{}\n",
            serde_json::to_string(&timeline).map_err(damaged)?
        ));
    }
    let mut text = timeline.draw();
    if !timeline.exits.is_empty() {
        let exits = timeline
            .exits
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"));
        text.push_str(&format!(
            "VM exits: {}\n",
            exits.collect::<Vec<_>>().join(", ")
        ));
    }
    print(&text)
}

fn counters(base: &Path, selection: &Selection) -> Result<()> {
    let dir = selection.find(base)?;
    let socket = dir.read()?.and_then(|journal| journal.socket);
    let socket = socket.ok_or_else(|| Error::state("the pod has no shim to ask"))?;
    let failed = |error: io::Error| Error::io("cannot ask the shim", &error);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let answer = runtime.block_on(async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await?;
        let mut request = ttrpc::Request::new();
        request.service = DEBUG_SERVICE.to_owned();
        request.method = COUNTERS_METHOD.to_owned();
        request.timeout_nano = 10_000_000_000;
        client.request(request).await
    });
    let answer = answer.map_err(Error::from_agent)?;
    print(&format!("{}\n", String::from_utf8_lossy(&answer.payload)))
}
