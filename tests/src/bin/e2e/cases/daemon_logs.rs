//! Log URIs of containerd 2.2: `binary-v2`, whose program has to say that it is ready.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Result;
use brig_tests::node::check::{contains, equal};
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::connection::refused;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::{Pod, Streams};

use super::daemon_pods::config;
use super::leaks::baseline;
use crate::suite::{Case, PROBE, Suite, brig, patience};

pub const CASES: &[Case] = &[brig(
    "daemon",
    "2.2: a binary-v2 logger gets all output once it has written its byte, and without it Create fails",
    binary_v2,
)];

/// A directory of loggers and what they wrote.
struct Loggers(PathBuf);

impl Loggers {
    fn new() -> Result<Self> {
        let dir = PathBuf::from("/run/brigd-loggers");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir)?;
        Ok(Self(dir))
    }

    /// The URI of a logger that says it is ready as `ready` does and copies to the file of its name.
    fn uri(&self, scheme: &str, name: &str, ready: &str) -> Result<String> {
        let (program, log) = (self.0.join(name), self.0.join(format!("{name}.log")));
        fs::write(&program, format!("#!/bin/sh\n{ready}\ncat <&3 >\"$2\"\n"))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(format!(
            "{scheme}://{}?--to={}",
            program.display(),
            log.display()
        ))
    }

    fn written(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.0.join(format!("{name}.log")))?)
    }
}

impl Drop for Loggers {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Both outputs to this logger, as `ctr` and nerdctl ask.
fn to(uri: String) -> Streams {
    Streams {
        stderr: uri.clone(),
        stdout: uri,
        ..Streams::default()
    }
}

fn binary_v2(suite: &mut Suite) -> Result<()> {
    let daemon = Daemon::new(Generation::V2_2, &suite.ctr.runtime, "logs")?;
    let loggers = Loggers::new()?;
    let before = baseline(suite)?;
    let pod = Pod::by_sandbox_api(&daemon, "logs", &config())?;
    for (scheme, name, ready) in [
        ("binary-v2", "strict", "printf x >&5; exec 5>&-"),
        // The older scheme takes the end of the descriptor for ready, as before.
        ("binary", "lenient", "exec 5>&-"),
    ] {
        let uri = loggers.uri(scheme, name, ready)?;
        let container = pod.container_with(name, &[PROBE, "echo", "logged", "2"], &to(uri))?;
        let ended = container.waiting();
        container.start()?;
        equal(name, 2, ended.recv_timeout(patience())??.exit_status)?;
        container.delete()?;
        // Delete has waited for the logger.
        equal(name, "logged\n", loggers.written(name)?)?;
    }
    for (name, ready) in [("mute", "exec 5>&-"), ("dead", "exit 0")] {
        let uri = loggers.uri("binary-v2", name, ready)?;
        let created = pod.container_with(name, &[PROBE, "exit", "0"], &to(uri));
        let sentence = refused(name, ttrpc::Code::FAILED_PRECONDITION, created)?;
        contains("the refusal", "without writing a byte", &sentence)?;
    }
    pod.end()?;
    before.nothing_left(patience())
}
