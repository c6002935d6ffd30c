//! What cases share: containerd, its events, and one long-lived pod for assertions that need no pod
//! of their own.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
pub use brig_suite::case::{brig, case, not_here, smoke};
use brig_suite::lock;
use brig_tests::node::ctr::{self, Container, Ctr, Run};
use brig_tests::node::events::Events;
use brig_tests::node::{clock, containerd, process};
use nix::fcntl::Flock;
use serde_json::Value;

use crate::options::Options;

/// The image with the probe.
pub const PROBE_IMAGE: &str = "docker.io/brig/probe:test";
/// Debian with nginx and python3.
pub const DEBIAN_IMAGE: &str = "docker.io/brig/debian:test";
/// The probe, in its image.
pub const PROBE: &str = "/bin/brig-probe";

/// One behaviour.
pub type Case = brig_suite::case::Case<Suite>;

/// The state of a run of the suite.
pub struct Suite {
    /// containerd.
    pub ctr: Ctr,
    /// Its version, "1.7".
    pub containerd: String,
    events: Option<Events>,
    shared: Option<Container>,
    /// Some container has run: what the runtime makes once is there.
    pub warm: bool,
    _lock: Flock<File>,
}

impl Suite {
    /// Switches containerd if asked to, imports images, follows events.
    pub fn prepare(options: &Options) -> Result<Self> {
        let lock = lock::only_one("brig-e2e")?;
        if let Some(version) = &options.common.containerd {
            containerd::switch(version)?;
        }
        let ctr = Ctr {
            namespace: "brig-e2e".to_owned(),
            runtime: options.runtime.clone(),
        };
        let version = ctr.ok(&["version"]).context("containerd does not answer")?;
        let version = version
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("Version:"))
            .map(containerd::short_version)
            .context("ctr version shows no version")?;
        let suite = Self {
            ctr,
            containerd: version,
            events: None,
            shared: None,
            warm: false,
            _lock: lock,
        };
        // Always: it may have been rebuilt since.
        suite.ctr.ok(&["image", "import", "/host/bin/probe.tar"])?;
        for leftover in suite.ctr.containers()? {
            suite.ctr.remove(&leftover);
        }
        Ok(suite)
    }

    /// Imports an image unless it is there.
    pub fn import(&self, image: &str, tar: &str) -> Result<()> {
        if Path::new(tar).exists() && !self.ctr.ok(&["image", "ls", "--quiet"])?.contains(image) {
            let mut command = self.ctr.command(&["image", "import"]);
            command.arg(tar);
            process::run(command, clock::seconds(60))?
                .success()
                .with_context(|| format!("cannot import {tar}"))?;
        }
        Ok(())
    }

    /// Whether Brig is the runtime.
    pub fn is_brig(&self) -> bool {
        self.ctr.runtime.contains("brig")
    }

    /// The event stream.
    pub fn events(&mut self) -> Result<&Events> {
        if self.events.is_none() {
            self.events = Some(Events::follow(&self.ctr.namespace, clock::seconds(6))?);
        }
        self.events.as_ref().context("no event stream")
    }

    /// Follows events anew: containerd was restarted.
    pub fn reconnect_events(&mut self) {
        self.events = None;
    }

    /// A pod that sleeps, for cases that need any running container.
    pub fn shared(&mut self) -> Result<&Container> {
        if self.shared.is_none() {
            let run = self.probe("shared", &["sleep"]);
            self.shared = Some(self.ctr.start(&run)?);
        }
        self.shared.as_ref().context("no shared pod")
    }

    /// Ends the shared pod.
    pub fn forget_shared(&mut self) {
        self.shared = None;
    }

    /// Ends everything the suite holds.
    pub fn finish(&mut self) {
        self.shared = None;
        self.events = None;
    }

    /// A run of the probe.
    pub fn probe(&self, name: &str, args: &[&str]) -> Run {
        let mut all = vec![PROBE];
        all.extend_from_slice(args);
        Run::new(name, PROBE_IMAGE, &all)
    }

    /// Runs the probe in a container of its own and returns its JSON.
    pub fn run_json(&self, run: &Run) -> Result<Value> {
        ctr::json(&self.ctr.run(run)?.success()?)
    }
}

/// How long to wait for what takes seconds on a real node.
pub fn patience() -> Duration {
    clock::seconds(8)
}
