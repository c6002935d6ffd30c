//! `brig check --bench`: what KVM costs on this node, and a VM that is started up to its agent and ended again, as a
//! pod's is. Times: to be compared on one machine, not between machines.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use brig_hypervisor::benchmark::measure;
use brig_shim::asked::config::Config;
use brig_shim::asked::spec::Network;
use brig_shim::error::{Error, Result};
use brig_shim::guest::vm::boot::{Boot, News, Sandbox};
use brig_shim::guest::vm::host::{Node, open_kvm};
use brig_shim::guest::vm::{Plan, Timeouts};
use slog::{Discard, Logger, o};
use tokio::sync::mpsc;

use crate::check::Finding;
use crate::shims::single_threaded;

/// The moment at which the VMM lets the guest run, as the timeline has it.
const ENTRY: &str = "kernel.entry";

/// What was measured, a line each.
#[must_use]
pub fn findings(config: Option<&Path>) -> Vec<Finding> {
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => return vec![Finding::of("benchmark", Err(error.message))],
    };
    vec![
        Finding::of("kvm cost", costs(&config).map_err(|error| error.message)),
        Finding::of("a VM's start", start(config).map_err(|error| error.message)),
    ]
}

fn costs(config: &Config) -> Result<String> {
    let costs = measure(&open_kvm(&config.kvm)?)
        .map_err(|error| Error::unavailable(format!("KVM cannot be measured: {error}")))?;
    Ok(format!(
        "{:.2} ms to make a VM with one CPU, {:.1} us an exit to the VMM",
        millis(costs.create),
        millis(costs.exit) * 1000.0
    ))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Starts a VM without a network and with nothing to run.
fn start(config: Config) -> Result<String> {
    let runtime = single_threaded().map_err(|error| Error::io("cannot start a VM", &error))?;
    runtime.block_on(started(config))
}

async fn started(config: Config) -> Result<String> {
    let timeouts = Timeouts::of(&config);
    let plan = Plan::of(config, Network::New);
    let sandbox = Sandbox {
        id: "brig-check".to_owned(),
        hostname: "brig-check".to_owned(),
        ..Sandbox::default()
    };
    let (sender, mut news) = mpsc::channel(64);
    let began = SystemTime::now();
    let boot = Boot::start(
        Arc::new(Node),
        plan,
        sandbox,
        sender,
        Logger::root(Discard, o!()),
    );
    let vm = boot.ready().await?;
    let took = began.elapsed().unwrap_or_default();
    // What it has said before it answers this has been read by then.
    let _ = vm.control().counters().await;
    vm.kill();
    // A VMM that does not end is killed with this process.
    let _ = tokio::time::timeout(timeouts.stop, vm.ended()).await;
    let mut entry = None;
    while let Ok(told) = news.try_recv() {
        if let News::Mark(name, at) = told
            && name == ENTRY
        {
            entry = at.duration_since(began).ok();
        }
    }
    let before = entry.map_or_else(String::new, |entry| {
        format!(", of which {:.0} before the guest ran", millis(entry))
    });
    Ok(format!(
        "{:.0} ms to an agent that answers{before}",
        millis(took)
    ))
}
