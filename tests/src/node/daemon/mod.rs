//! A containerd of a given release, as far as a shim can tell: it runs the shim's binary with that release's
//! command line, environment and standard input, in bundles like its own, and takes the shim's events.
//!
//! For releases that the node has no package of. It trusts nothing that the shim says: what is left on the
//! node is looked at there.

pub mod bundle;
pub mod connection;
pub mod event_log;
pub mod generation;
pub mod pod;
pub mod pod_config;
pub mod snapshot;
pub mod stream;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, Extension};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use serde_json::Value;

use self::bundle::Bundle;
use self::event_log::{EventLog, EventSocket};
use self::generation::{Endpoint, Generation};
use crate::node::process::{self, Outcome};
use crate::node::{clock, leaks};

/// The parent of all cgroups of these pods, which is kubelet's to make.
pub const CGROUP_PARENT: &str = "/brig-daemon";
/// What the containers see: the probe and empty directories.
const IMAGE: &str = "/var/lib/brig-daemon/image";

/// The daemon.
pub struct Daemon {
    /// Its release.
    pub generation: Generation,
    /// The containerd namespace of everything it makes.
    pub namespace: String,
    /// A directory of its own for shims' sockets, if it is configured to have one.
    pub socket_dir: Option<PathBuf>,
    /// The options of the runtime's handler.
    pub options: Option<Any>,
    /// What shims forwarded.
    pub events: EventLog,
    shim: PathBuf,
    state: PathBuf,
    root: PathBuf,
    socket: RefCell<Option<EventSocket>>,
    /// What `start` was run for, for the clean-up.
    started: RefCell<BTreeSet<String>>,
}

/// The binary of a runtime, as containerd finds it.
///
/// # Errors
/// If `PATH` has none.
pub fn binary_of(runtime: &str) -> Result<PathBuf> {
    if runtime.starts_with('/') {
        return Ok(runtime.into());
    }
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next(), parts.next());
    let name = name
        .zip(version)
        .map(|(name, version)| format!("containerd-shim-{name}-{version}"))
        .with_context(|| format!("{runtime} is no name of a runtime"))?;
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .map(|dir| Path::new(dir).join(&name))
        .find(|file| file.is_file())
        .with_context(|| format!("{name} is not in {path}"))
}

fn make_image() -> Result<()> {
    let image = Path::new(IMAGE);
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(image.join(dir))?;
    }
    let probe = image.join("bin/brig-probe");
    if !probe.exists() {
        let new = image.join("bin/.new");
        fs::copy("/host/bin/brig-probe", &new).context("/host/bin/brig-probe")?;
        fs::rename(new, probe)?;
    }
    Ok(())
}

impl Daemon {
    /// A daemon of this release that runs the shim of `runtime`; `name` tells its things from others'.
    ///
    /// # Errors
    /// If its directories or its socket cannot be made.
    pub fn new(generation: Generation, runtime: &str, name: &str) -> Result<Self> {
        let shim = binary_of(runtime)?;
        let namespace = format!("brigd-{name}");
        let state = Path::new("/run/brig-daemon").join(&namespace);
        let root = Path::new("/var/lib/brig-daemon").join(&namespace);
        for dir in [&state, &root] {
            let _ = fs::remove_dir_all(dir);
            fs::create_dir_all(dir)?;
        }
        make_image()?;
        // The first namespace with a name leaves a mount behind for the next.
        drop(pod::Netns::new(name)?);
        fs::create_dir_all(format!("/sys/fs/cgroup{CGROUP_PARENT}"))?;
        let daemon = Self {
            generation,
            namespace,
            socket_dir: None,
            options: None,
            events: EventLog::default(),
            shim,
            state,
            root,
            socket: RefCell::default(),
            started: RefCell::default(),
        };
        daemon.live()?;
        Ok(daemon)
    }

    fn address(&self) -> String {
        self.state.join("d.sock").display().to_string()
    }

    fn ttrpc_address(&self) -> String {
        format!("{}.ttrpc", self.address())
    }

    /// The daemon comes up: its socket is there. Connections to shims are the callers' to make.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn live(&self) -> Result<()> {
        self.die();
        let socket = EventSocket::bind(Path::new(&self.ttrpc_address()), &self.events)?;
        self.socket.replace(Some(socket));
        Ok(())
    }

    /// The daemon dies: its socket is gone. Connections to shims are the callers' to drop.
    pub fn die(&self) {
        drop(self.socket.take());
    }

    /// Makes a bundle.
    ///
    /// # Errors
    /// As [`Bundle::make`].
    pub fn bundle(&self, id: &str, spec: Option<&Value>) -> Result<Bundle> {
        Bundle::make(&self.state, &self.root, id, spec)
    }

    /// The image of every container.
    #[must_use]
    pub fn image(&self) -> &Path {
        Path::new(IMAGE)
    }

    fn command(&self, id: &str, bundle: Option<&Bundle>, dir: &Path) -> Command {
        let mut command = Command::new(&self.shim);
        command
            .current_dir(dir)
            .args(["-namespace", &self.namespace, "-address", &self.address()])
            .args(["-publish-binary", "/usr/bin/containerd", "-id", id]);
        if let Some(bundle) = bundle {
            command.arg("-bundle").arg(&bundle.path);
        }
        command
            .env("GOMAXPROCS", "2")
            .env("TTRPC_ADDRESS", self.ttrpc_address());
        if self.generation >= Generation::V1_7 {
            command
                .env("MAX_SHIM_VERSION", "2")
                .env("GRPC_ADDRESS", self.address())
                .env("NAMESPACE", &self.namespace);
        }
        command
    }

    /// The standard input of this release's `start`.
    ///
    /// # Errors
    /// None in practice: protobuf cannot encode.
    pub fn input(&self, id: &str) -> Result<Vec<u8>> {
        if !self.generation.sends_params() {
            return match &self.options {
                Some(options) => Ok(options.write_to_bytes()?),
                None => Ok(Vec::new()),
            };
        }
        Ok(self.params(id).write_to_bytes()?)
    }

    /// What a release that sends BootstrapParams sends.
    #[must_use]
    pub fn params(&self, id: &str) -> BootstrapParams {
        let extension = |options: &Any| Extension {
            value: MessageField::some(options.clone()),
            ..Extension::default()
        };
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: self.namespace.clone(),
            containerd_version: self.generation.release().to_owned(),
            containerd_ttrpc_address: self.ttrpc_address(),
            containerd_grpc_address: self.address(),
            containerd_binary: "/usr/bin/containerd".to_owned(),
            extensions: self.options.iter().map(extension).collect(),
            socket_dir: self
                .socket_dir
                .as_ref()
                .map(|dir| dir.display().to_string()),
            ..BootstrapParams::default()
        }
    }

    /// Runs `start` with this standard input, whatever comes of it.
    ///
    /// # Errors
    /// If it cannot run or does not end in time.
    pub fn run_start(&self, bundle: &Bundle, input: Vec<u8>) -> Result<Outcome> {
        let mut command = self.command(&bundle.id, None, &bundle.path);
        if let Some(dir) = &self.socket_dir
            && !self.generation.sends_params()
        {
            command.env("SHIM_SOCKET_DIR", dir);
        }
        command.arg("start");
        self.started.borrow_mut().insert(bundle.id.clone());
        if input.is_empty() {
            process::run(command, clock::seconds(10))
        } else {
            process::run_with_input(command, input, clock::seconds(10))
        }
    }

    /// Runs `start` and reads the answer as this release does; keeps it in the bundle.
    ///
    /// # Errors
    /// If it fails, or this release would not accept the answer.
    pub fn start(&self, bundle: &Bundle) -> Result<Endpoint> {
        self.start_with(bundle, self.input(&bundle.id)?)
    }

    /// As [`Self::start`], with another standard input.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(&self, bundle: &Bundle, input: Vec<u8>) -> Result<Endpoint> {
        let outcome = self.run_start(bundle, input)?;
        // containerd reads both streams as one answer.
        let printed = [&outcome.stdout[..], outcome.stderr.as_bytes()].concat();
        ensure!(
            outcome.code == 0,
            "start of {} exits with {}: {}",
            bundle.id,
            outcome.code,
            String::from_utf8_lossy(&printed)
        );
        let endpoint = self.generation.read_answer(&printed)?;
        bundle.keep(&endpoint)?;
        Ok(endpoint)
    }

    /// Runs `delete`, as containerd does when a connection to a shim has ended.
    ///
    /// # Errors
    /// If it fails or prints no DeleteResponse.
    pub fn delete(&self, bundle: &Bundle) -> Result<DeleteResponse> {
        let mut command = self.command(&bundle.id, Some(bundle), &bundle.path);
        command.arg("delete");
        let outcome = process::run(command, clock::seconds(5))?.success()?;
        ensure!(
            !outcome.stdout.is_empty(),
            "delete of {} prints nothing",
            bundle.id
        );
        DeleteResponse::parse_from_bytes(&outcome.stdout)
            .with_context(|| format!("delete of {} prints no DeleteResponse", bundle.id))
    }

    /// Runs `-info` with the handler's options on standard input, whatever comes of it.
    ///
    /// # Errors
    /// If it cannot run or does not end in time.
    pub fn run_info(&self, input: Vec<u8>) -> Result<Outcome> {
        let mut command = Command::new(&self.shim);
        command.arg("-info");
        process::run_with_input(command, input, clock::seconds(10))
    }

    /// Runs `-info` as the introspection service does.
    ///
    /// # Errors
    /// If it fails or prints no RuntimeInfo.
    pub fn info(&self) -> Result<RuntimeInfo> {
        let input = match &self.options {
            Some(options) => options.write_to_bytes()?,
            None => Vec::new(),
        };
        let outcome = self.run_info(input)?.success()?;
        RuntimeInfo::parse_from_bytes(&outcome.stdout).context("-info prints no RuntimeInfo")
    }

    /// The processes that serve this daemon's shims.
    #[must_use]
    pub fn servers(&self) -> Vec<i32> {
        let ours = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
                line.split(|byte| *byte == 0)
                    .any(|word| word == self.namespace.as_bytes())
            })
        };
        let name = self.shim.file_name().and_then(|name| name.to_str());
        leaks::pids_of(name.unwrap_or_default())
            .into_iter()
            .filter(ours)
            .collect()
    }

    /// Kills the processes that serve this daemon's shims, and waits for their end.
    ///
    /// # Errors
    /// If one does not end.
    pub fn kill_servers(&self) -> Result<()> {
        for pid in self.servers() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            ensure!(
                process::exited(pid, clock::seconds(5))?,
                "shim {pid} does not die"
            );
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill_servers();
        let started = std::mem::take(&mut *self.started.borrow_mut());
        for id in started {
            let dir = self.state.join(&id);
            if fs::create_dir_all(&dir).is_ok() {
                let mut command = self.command(&id, None, &dir);
                command.arg("-bundle").arg(&dir).arg("delete");
                let _ = process::run(command, clock::seconds(5));
            }
        }
        self.die();
        for dir in [&self.state, &self.root] {
            let _ = fs::remove_dir_all(dir);
        }
        let _ = fs::remove_dir(format!("/sys/fs/cgroup{CGROUP_PARENT}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_is_found_as_containerd_finds_it() {
        assert_eq!(binary_of("/opt/shim").unwrap(), Path::new("/opt/shim"));
        let error = binary_of("io.containerd.nosuch.v9").unwrap_err();
        assert!(error.to_string().contains("containerd-shim-nosuch-v9"));
        assert!(binary_of("nosuch").is_err());
    }
}
