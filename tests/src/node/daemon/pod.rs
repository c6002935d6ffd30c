//! Pods and their containers, asked for in the order in which each containerd asks.
//!
//! A sandbox is made by the Sandbox API or by a pause container. Containers join it: with version 3 by the
//! address that containerd knows and nothing else, with version 2 by a `start` each, and a `delete` each in
//! the end. Every task has a connection of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, CreateTaskResponse, DeleteResponse, ExecProcessRequest,
    Mount, StartRequest, StartResponse, WaitResponse,
};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
    StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use serde_json::{Value, json};

use super::Daemon;
use super::bundle::{Bundle, Output, Place, spec};
use super::connection::Connection;
use super::generation::{Endpoint, Generation};
use super::pod_config::PodConfig;
use crate::node::{clock, process};

/// A network namespace of the node, as CNI leaves one: there before the sandbox and after it.
pub struct Netns {
    name: String,
    /// Its path.
    pub path: PathBuf,
}

fn ip(args: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(args);
    process::run(command, clock::seconds(5))?.success()?;
    Ok(())
}

impl Netns {
    /// Makes one.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("brigd-{name}");
        let _ = ip(&["netns", "delete", &name]);
        ip(&["netns", "add", &name])?;
        ip(&["-netns", &name, "link", "set", "lo", "up"])?;
        let path = Path::new("/run/netns").join(&name);
        Ok(Self { name, path })
    }

    /// Gives it an interface with this address (`10.0.0.2/24`), whose other end is in a bridge of the node.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn join(&self, bridge: &str, address: &str) -> Result<()> {
        let number = address.split(['.', '/']).nth(3).unwrap_or_default();
        let near = format!("brigd{number}");
        let _ = ip(&["link", "delete", &near]);
        ip(&[
            "link", "add", &near, "type", "veth", "peer", "name", "eth0", "netns", &self.name,
        ])?;
        ip(&["link", "set", &near, "master", bridge, "up"])?;
        ip(&[
            "-netns", &self.name, "address", "add", address, "dev", "eth0",
        ])?;
        ip(&["-netns", &self.name, "link", "set", "eth0", "up"])
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// As CRI has a container join the user namespace of its pod.
fn join_user_namespace(spec: &mut Value, pid: u32, map: &[[u32; 3]]) -> Result<()> {
    let ranges: Vec<_> = map
        .iter()
        .map(|[inside, outside, size]| json!({"containerID": inside, "hostID": outside, "size": size}))
        .collect();
    let linux = &mut spec["linux"];
    linux["uidMappings"] = json!(ranges);
    linux["gidMappings"] = json!(ranges);
    let path = format!("/proc/{pid}/ns/user");
    let namespaces = linux["namespaces"].as_array_mut().context("namespaces")?;
    namespaces.push(json!({"type": "user", "path": path}));
    Ok(())
}

/// Where a container's streams are, as URIs; empty ones are not there.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A pod.
pub struct Pod<'a> {
    /// Its sandbox.
    pub id: String,
    /// The sandbox's bundle.
    pub bundle: Bundle,
    /// Where its shim serves.
    pub endpoint: Endpoint,
    /// The sandbox's connection.
    pub connection: Connection,
    /// Of the sandbox.
    pub pid: u32,
    daemon: &'a Daemon,
    has_pause: bool,
    /// Its user namespace's.
    map: Vec<[u32; 3]>,
    _netns: Netns,
}

impl<'a> Pod<'a> {
    /// `start`, CreateSandbox and StartSandbox.
    ///
    /// # Errors
    /// What the shim says.
    pub fn by_sandbox_api(daemon: &'a Daemon, id: &str, config: &PodConfig) -> Result<Self> {
        let netns = Netns::new(id)?;
        let bundle = daemon.bundle(id, None)?;
        let endpoint = daemon.start(&bundle)?;
        let connection = Connection::open(&endpoint)?;
        let create = CreateSandboxRequest {
            sandbox_id: id.to_owned(),
            bundle_path: bundle.path.display().to_string(),
            options: MessageField::some(config.options()?),
            netns_path: netns.path.display().to_string(),
            ..CreateSandboxRequest::default()
        };
        let logged = |error: anyhow::Error| error.context(bundle.log());
        let _: CreateSandboxResponse = connection
            .sandbox("CreateSandbox", &create)
            .map_err(logged)?;
        let start = StartSandboxRequest {
            sandbox_id: id.to_owned(),
            ..StartSandboxRequest::default()
        };
        let started: StartSandboxResponse =
            connection.sandbox("StartSandbox", &start).map_err(logged)?;
        Ok(Self {
            id: id.to_owned(),
            bundle,
            endpoint,
            connection,
            pid: started.pid,
            daemon,
            has_pause: false,
            map: config.map().to_vec(),
            _netns: netns,
        })
    }

    /// `start`, Create and Start of a pause container.
    ///
    /// # Errors
    /// What the shim says.
    pub fn by_pause_container(daemon: &'a Daemon, id: &str) -> Result<Self> {
        Self::by_pause_container_in(daemon, id, Netns::new(id)?)
    }

    /// As [`Self::by_pause_container`], in this network.
    ///
    /// # Errors
    /// What the shim says.
    pub fn by_pause_container_in(daemon: &'a Daemon, id: &str, netns: Netns) -> Result<Self> {
        let place = Place::Pause { netns: &netns.path };
        // Brig never runs it; any other runtime needs a program that stays.
        let program = ["/bin/brig-probe", "sleep"];
        let bundle = daemon.bundle(id, Some(&spec(id, &program, place)))?;
        let endpoint = daemon.start(&bundle)?;
        let connection = Connection::open(&endpoint)?;
        let rootfs = bundle.rootfs(daemon.image())?;
        let logged = |error: anyhow::Error| error.context(bundle.log());
        let pid = create(
            &connection,
            &bundle,
            rootfs,
            &Streams::default(),
            daemon.options.as_ref(),
        )
        .map_err(logged)?;
        connection.start(id).map_err(logged)?;
        Ok(Self {
            id: id.to_owned(),
            bundle,
            endpoint,
            connection,
            pid,
            daemon,
            has_pause: true,
            map: Vec::new(),
            _netns: netns,
        })
    }

    /// Creates a container whose output is read from a FIFO.
    ///
    /// # Errors
    /// What the shim says.
    pub fn container(&self, name: &str, args: &[&str]) -> Result<Container<'a>> {
        self.container_from(name, args, None)
    }

    /// As [`Self::container`], with this root file system.
    ///
    /// # Errors
    /// What the shim says.
    pub fn container_from(
        &self,
        name: &str,
        args: &[&str],
        rootfs: Option<Vec<Mount>>,
    ) -> Result<Container<'a>> {
        let fifo = |stream| Output::at(self.bundle.path.join(format!("{name}-{stream}")));
        let (output, errors) = (fifo("stdout")?, fifo("stderr")?);
        let streams = Streams {
            stdout: output.path.display().to_string(),
            stderr: errors.path.display().to_string(),
            ..Streams::default()
        };
        self.container_on(name, args, &streams, Some((output, errors)), rootfs, |_| ())
    }

    /// Creates a container with these streams and this root file system, whose specification is changed before.
    ///
    /// # Errors
    /// What the shim says.
    pub fn container_changed(
        &self,
        name: &str,
        args: &[&str],
        streams: &Streams,
        rootfs: Vec<Mount>,
        change: impl FnOnce(&mut Value),
    ) -> Result<Container<'a>> {
        self.container_on(name, args, streams, None, Some(rootfs), change)
    }

    /// Creates a container with these streams.
    ///
    /// # Errors
    /// What the shim says.
    pub fn container_with(
        &self,
        name: &str,
        args: &[&str],
        streams: &Streams,
    ) -> Result<Container<'a>> {
        self.container_on(name, args, streams, None, None, |_| ())
    }

    fn container_on(
        &self,
        name: &str,
        args: &[&str],
        streams: &Streams,
        fifos: Option<(Output, Output)>,
        rootfs: Option<Vec<Mount>>,
        change: impl FnOnce(&mut Value),
    ) -> Result<Container<'a>> {
        let id = format!("{}-{name}", self.id);
        let place = Place::Member {
            sandbox: &self.id,
            pid: self.pid,
        };
        let mut spec = spec(&id, args, place);
        if !self.map.is_empty() {
            join_user_namespace(&mut spec, self.pid, &self.map)?;
        }
        change(&mut spec);
        let bundle = self.daemon.bundle(&id, Some(&spec))?;
        let connection = self.join(&bundle)?;
        let rootfs = match rootfs {
            Some(rootfs) => rootfs,
            None => bundle.rootfs(self.daemon.image())?,
        };
        let pid = create(
            &connection,
            &bundle,
            rootfs,
            streams,
            self.daemon.options.as_ref(),
        )
        .map_err(|error| error.context(self.bundle.log()))?;
        Ok(Container {
            id,
            pid,
            bundle,
            connection,
            fifos,
            daemon: self.daemon,
            version: self.endpoint.version,
        })
    }

    /// The connection of a container of this pod.
    fn join(&self, bundle: &Bundle) -> Result<Connection> {
        if self.endpoint.version >= 3 {
            fs::write(bundle.path.join("sandbox"), &self.id)?;
            bundle.keep(&self.endpoint)?;
            return Connection::open(&self.endpoint);
        }
        let endpoint = self.daemon.start(bundle)?;
        ensure!(
            endpoint == self.endpoint,
            "{} is served at {endpoint:?}, its pod at {:?}",
            bundle.id,
            self.endpoint
        );
        Connection::open(&endpoint)
    }

    /// The daemon was away: connects again by what the bundle says, and asks what containerd asks first.
    ///
    /// # Errors
    /// If a containerd would take the shim for dead.
    pub fn reload(&mut self) -> Result<()> {
        self.endpoint = self.bundle.kept()?;
        self.connection = Connection::open(&self.endpoint)?;
        let connected = self.connection.connect(&self.id)?;
        ensure!(
            connected.task_pid == self.pid,
            "the sandbox's pid was {} and is {}",
            self.pid,
            connected.task_pid
        );
        let pids = self.connection.pids(&self.id);
        ensure!(
            !self.has_pause || pids.is_ok_and(|pids| !pids.processes.is_empty()),
            "a pause container without processes is taken for a leak"
        );
        Ok(())
    }

    /// StopSandbox.
    ///
    /// # Errors
    /// What the shim says.
    pub fn stop_sandbox(&self) -> Result<()> {
        let request = StopSandboxRequest {
            sandbox_id: self.id.clone(),
            ..StopSandboxRequest::default()
        };
        self.connection
            .sandbox("StopSandbox", &request)
            .map(|_: StopSandboxResponse| ())
    }

    /// WaitSandbox.
    ///
    /// # Errors
    /// What the shim says.
    pub fn wait_sandbox(&self) -> Result<WaitSandboxResponse> {
        let request = WaitSandboxRequest {
            sandbox_id: self.id.clone(),
            ..WaitSandboxRequest::default()
        };
        self.connection.sandbox("WaitSandbox", &request)
    }

    /// ShutdownSandbox.
    ///
    /// # Errors
    /// What the shim says.
    pub fn shutdown_sandbox(&self) -> Result<()> {
        let request = ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..ShutdownSandboxRequest::default()
        };
        self.connection
            .sandbox("ShutdownSandbox", &request)
            .map(|_: ShutdownSandboxResponse| ())
    }

    /// Ends the pod, hangs up, and runs `delete`, as containerd does when the connection has ended.
    ///
    /// # Errors
    /// What the shim says.
    pub fn end(self) -> Result<()> {
        if self.has_pause {
            self.connection.kill(&self.id, 9)?;
            self.connection.wait(&self.id)?;
            self.connection.delete(&self.id)?;
            self.connection.shutdown(&self.id)?;
        } else {
            self.stop_sandbox()?;
            self.wait_sandbox()?;
            self.shutdown_sandbox()?;
        }
        let Self {
            bundle,
            connection,
            daemon,
            ..
        } = self;
        drop(connection);
        daemon.delete(&bundle).map(drop)
    }
}

/// A container of a pod.
pub struct Container<'a> {
    /// Its id.
    pub id: String,
    /// What Create answered.
    pub pid: u32,
    /// Its bundle.
    pub bundle: Bundle,
    /// Its connection.
    pub connection: Connection,
    /// Of standard output and standard error.
    fifos: Option<(Output, Output)>,
    daemon: &'a Daemon,
    version: i64,
}

impl Container<'_> {
    /// Task.Start.
    ///
    /// # Errors
    /// What the shim says.
    pub fn start(&self) -> Result<()> {
        self.connection.start(&self.id).map(drop)
    }

    /// Task.Wait beside what follows.
    #[must_use]
    pub fn waiting(&self) -> Receiver<Result<WaitResponse>> {
        let (sender, receiver) = channel();
        let (connection, id) = (self.connection.clone(), self.id.clone());
        std::thread::spawn(move || {
            let answer = connection.wait(&id);
            drop(connection);
            let _ = sender.send(answer);
        });
        receiver
    }

    /// Everything the container wrote to standard output, where that is a FIFO.
    ///
    /// # Errors
    /// If its end does not come.
    pub fn written(&self, within: Duration) -> Result<String> {
        let (output, _) = self.fifos.as_ref().context("no FIFO was given")?;
        output.all(within)
    }

    /// Starts it and waits for its end: what it wrote to standard output, where that is a FIFO, and its exit status.
    ///
    /// # Errors
    /// What the shim says; if its end does not come.
    pub fn run(&self, within: Duration) -> Result<(String, u32)> {
        let ended = self.waiting();
        self.start()?;
        let said = self.written(within)?;
        Ok((said, ended.recv_timeout(within)??.exit_status))
    }

    /// Task.CloseIO of standard input.
    ///
    /// # Errors
    /// What the shim says.
    pub fn close_stdin(&self) -> Result<()> {
        let request = CloseIORequest {
            id: self.id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.connection.task("CloseIO", &request).map(|_: Empty| ())
    }

    /// Task.Exec and Task.Start of a second process.
    ///
    /// # Errors
    /// What the shim says.
    pub fn exec(&self, exec_id: &str, args: &[&str]) -> Result<()> {
        let process: Value = json!({
            "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": true,
        });
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        let _: Empty = self.connection.task("Exec", &request)?;
        let start = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        let started = self.connection.task("Start", &start);
        started.map(|_: StartResponse| ())
    }

    /// The daemon was away: connects again by what the bundle says.
    ///
    /// # Errors
    /// If a containerd would take the task for dead.
    pub fn reload(&mut self) -> Result<()> {
        self.connection = Connection::open(&self.bundle.kept()?)?;
        let connected = self.connection.connect(&self.id)?;
        ensure!(
            connected.task_pid == self.pid,
            "the task's pid was {} and is {}",
            self.pid,
            connected.task_pid
        );
        Ok(())
    }

    /// Task.Delete; Task.Shutdown where this release sends one; the end of the connection, and then `delete`
    /// where `start` was run.
    ///
    /// # Errors
    /// What the shim says.
    pub fn delete(self) -> Result<DeleteResponse> {
        let deleted = self.connection.delete(&self.id)?;
        if self.version < 3 || self.daemon.generation >= Generation::V2_4 {
            self.connection.shutdown(&self.id)?;
        }
        let Self {
            bundle,
            connection,
            daemon,
            version,
            ..
        } = self;
        drop(connection);
        if version < 3 {
            daemon.delete(&bundle)?;
        }
        Ok(deleted)
    }
}

fn create(
    connection: &Connection,
    bundle: &Bundle,
    rootfs: Vec<Mount>,
    streams: &Streams,
    options: Option<&Any>,
) -> Result<u32> {
    let request = CreateTaskRequest {
        id: bundle.id.clone(),
        bundle: bundle.path.display().to_string(),
        rootfs,
        stdin: streams.stdin.clone(),
        stdout: streams.stdout.clone(),
        stderr: streams.stderr.clone(),
        options: options.cloned().into(),
        ..CreateTaskRequest::default()
    };
    let created: CreateTaskResponse = connection.task("Create", &request)?;
    Ok(created.pid)
}
