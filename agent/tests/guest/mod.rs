//! A running agent in component-test mode, and containers from busybox in it. Needs root.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]
use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use brig_agent_protocol::{
    FIRST_PROCESS_STREAM, agent::*, agent_ttrpc::AgentClient, stream_header,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};
use ttrpc::r#async::{ClientStreamReceiver, transport::Socket};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn ctx() -> ttrpc::context::Context {
    ttrpc::context::with_duration(PATIENCE)
}

/// The agent and everything it needs; ends with its connection.
pub struct Guest {
    pub client: AgentClient,
    pub dir: tempfile::TempDir,
    events: ClientStreamReceiver<Event>,
    seen: Vec<Event>,
    next_stream: u64,
    child: Child,
}

/// What a process wrote and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub status: u32,
}

/// The host's ends of a process's streams.
#[derive(Default)]
pub struct Ends {
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

impl Guest {
    pub async fn start() -> Self {
        Self::start_with(StartSandboxRequest {
            id: "sandbox".into(),
            hostname: "pod-1".into(),
            ..Default::default()
        })
        .await
    }

    pub async fn start_with(request: StartSandboxRequest) -> Self {
        let guest = Self::boot().await;
        guest.client.start_sandbox(ctx(), &request).await.unwrap();
        guest
    }

    /// An agent whose sandbox has not been started.
    pub async fn boot() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        fs::create_dir_all(dir.path().join("share")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_brig-agent"))
            .arg("--serve-unix")
            .arg(&socket)
            .arg("--state")
            .arg(dir.path())
            .spawn()
            .unwrap();
        let connection = timeout(PATIENCE, async {
            loop {
                match UnixStream::connect(&socket).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
        .await
        .expect("the agent listens");
        let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(connection)));
        let events = client
            .events(ttrpc::context::Context::default(), &Empty::new())
            .await
            .unwrap();
        Self {
            client,
            dir,
            events,
            seen: Vec::new(),
            next_stream: FIRST_PROCESS_STREAM,
            child,
        }
    }

    /// Runs a command of the host in the agent's network namespace.
    pub fn in_network(&self, command: &str) -> String {
        let output = Command::new("nsenter")
            .args([
                "--net",
                "--target",
                &self.child.id().to_string(),
                "sh",
                "-c",
                command,
            ])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Opens the stream with this number.
    pub async fn open_numbered(&self, number: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path().join("agent.sock.streams"))
            .await
            .unwrap();
        stream.write_all(&stream_header(number)).await.unwrap();
        stream
    }

    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// A root file system of busybox for container `id`.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let root = self.share().join(id).join("rootfs");
        for dir in [
            "bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/web",
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::copy("/usr/bin/busybox", root.join("bin/busybox")).expect("apt package busybox-static");
        let list = Command::new("/usr/bin/busybox")
            .arg("--list")
            .output()
            .unwrap();
        for applet in String::from_utf8(list.stdout)
            .unwrap()
            .lines()
            .filter(|a| *a != "busybox")
        {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/home/web:/bin/sh\n",
        )
        .unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        root
    }

    /// Opens a stream as the VMM does for the shim.
    pub async fn open_stream(&mut self) -> (u64, UnixStream) {
        let number = self.next_stream;
        self.next_stream += 1;
        (number, self.open_numbered(number).await)
    }

    pub async fn stdio(&mut self, stdin: bool, terminal: bool) -> (Stdio, Ends) {
        let mut stdio = Stdio {
            terminal,
            ..Default::default()
        };
        let mut ends = Ends::default();
        if stdin {
            let (number, stream) = self.open_stream().await;
            stdio.stdin = number;
            ends.stdin = Some(stream);
        }
        let (number, stream) = self.open_stream().await;
        stdio.stdout = number;
        ends.stdout = Some(stream);
        if !terminal {
            let (number, stream) = self.open_stream().await;
            stdio.stderr = number;
            ends.stderr = Some(stream);
        }
        (stdio, ends)
    }

    pub async fn create(
        &mut self,
        id: &str,
        spec: &Value,
        stdio: Stdio,
    ) -> ttrpc::Result<ProcessStarted> {
        self.create_with(id, spec, stdio, vec![]).await
    }

    pub async fn create_with(
        &mut self,
        id: &str,
        spec: &Value,
        stdio: Stdio,
        mounts: Vec<MountSource>,
    ) -> ttrpc::Result<ProcessStarted> {
        let request = CreateContainerRequest {
            id: id.into(),
            spec: serde_json::to_vec(spec).unwrap(),
            stdio: Some(stdio).into(),
            rootfs: format!("{id}/rootfs"),
            mount_sources: mounts,
            ..Default::default()
        };
        self.client.create_container(ctx(), &request).await
    }

    /// Starts a process and returns its pid.
    pub async fn run(&mut self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        Ok(self
            .client
            .start_process(ctx(), &reference(id, exec_id))
            .await?
            .pid)
    }

    /// Creates and starts a container of busybox; returns its pid.
    pub async fn started(&mut self, id: &str, spec: &Value, stdio: Stdio) -> u32 {
        self.rootfs(id);
        self.create(id, spec, stdio).await.unwrap();
        self.run(id, "").await.unwrap()
    }

    /// Creates and starts a process in a running container.
    pub async fn started_exec(&mut self, id: &str, exec_id: &str, process: &Value, stdio: Stdio) {
        self.create_exec(id, exec_id, process, stdio).await.unwrap();
        self.run(id, exec_id).await.unwrap();
    }

    /// Creates, runs and deletes a container.
    pub async fn whole(&mut self, id: &str, spec: &Value) -> Outcome {
        self.whole_with(id, spec, vec![]).await
    }

    pub async fn whole_with(
        &mut self,
        id: &str,
        spec: &Value,
        mounts: Vec<MountSource>,
    ) -> Outcome {
        let (stdio, ends) = self.stdio(false, false).await;
        self.create_with(id, spec, stdio, mounts).await.unwrap();
        self.run(id, "").await.unwrap();
        self.outcome(id, "", ends).await
    }

    /// What a running process writes until it ends; it is then deleted.
    pub async fn outcome(&mut self, id: &str, exec_id: &str, ends: Ends) -> Outcome {
        let (stdout, stderr) = ends.read_all().await;
        let status = self.exit_of(id, exec_id).await.status;
        let deleted = self.delete(id, exec_id).await.unwrap();
        assert_eq!(deleted.status, status);
        Outcome {
            stdout,
            stderr,
            status,
        }
    }

    /// Runs one process in a running container and deletes it.
    pub async fn exec(&mut self, id: &str, exec_id: &str, process: &Value) -> Outcome {
        let (stdio, ends) = self.stdio(false, false).await;
        self.started_exec(id, exec_id, process, stdio).await;
        self.outcome(id, exec_id, ends).await
    }

    pub async fn create_exec(
        &mut self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> ttrpc::Result<Empty> {
        let request = CreateExecRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client.create_exec(ctx(), &request).await
    }

    pub async fn delete(&mut self, id: &str, exec_id: &str) -> ttrpc::Result<ProcessExited> {
        self.client
            .delete_process(ctx(), &reference(id, exec_id))
            .await
    }

    pub async fn kill(
        &mut self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<Empty> {
        let request = SignalRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: u32::try_from(signal).unwrap(),
            all,
            ..Default::default()
        };
        self.client.signal_process(ctx(), &request).await
    }

    /// Waits for the exit event of a process.
    pub async fn exit_of(&mut self, id: &str, exec_id: &str) -> ProcessExited {
        loop {
            let found = self.seen.iter().find_map(|event| match &event.kind {
                Some(event::Kind::Exit(exit)) if exit.id == id && exit.exec_id == exec_id => {
                    Some(exit.exit.clone().unwrap())
                }
                _ => None,
            });
            if let Some(exit) = found {
                return exit;
            }
            let event = timeout(PATIENCE, self.events.recv())
                .await
                .expect("an exit event")
                .unwrap();
            self.seen.extend(event);
        }
    }

    /// Takes all events that are to come, to their end.
    ///
    /// # Errors
    /// When they are cut off.
    pub async fn last_events(&mut self) -> ttrpc::Result<()> {
        while let Some(event) = timeout(PATIENCE, self.events.recv())
            .await
            .expect("an end")?
        {
            self.seen.push(event);
        }
        Ok(())
    }

    /// Exits so far, as (container, exec id), in order.
    pub fn exits(&self) -> Vec<(String, String)> {
        self.seen
            .iter()
            .filter_map(|event| match &event.kind {
                Some(event::Kind::Exit(exit)) => Some((exit.id.clone(), exit.exec_id.clone())),
                _ => None,
            })
            .collect()
    }

    /// Ends the agent and waits for it.
    pub async fn stop(self) {
        let at_once = ShutdownRequest::new();
        self.client.shutdown(ctx(), &at_once).await.unwrap();
        self.ended().await;
    }

    /// Waits for the agent's end.
    pub async fn ended(mut self) {
        let status = tokio::task::spawn_blocking(move || self.child.wait())
            .await
            .unwrap()
            .unwrap();
        assert!(status.success(), "the agent ended with {status}");
    }
}

impl Ends {
    /// Waits until this is what standard output says next.
    pub async fn said(&mut self, expected: &str) {
        let stdout = self.stdout.as_mut().unwrap();
        let mut bytes = vec![0; expected.len()];
        tokio::time::timeout(PATIENCE, stdout.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(std::str::from_utf8(&bytes).unwrap(), expected);
    }

    /// Everything the process writes, to the end of both streams.
    pub async fn read_all(self) -> (String, String) {
        let read = async |stream: Option<UnixStream>| {
            let mut text = Vec::new();
            if let Some(mut stream) = stream {
                timeout(PATIENCE, stream.read_to_end(&mut text))
                    .await
                    .expect("the end of a stream")
                    .unwrap();
            }
            String::from_utf8(text).unwrap()
        };
        let Self {
            stdin,
            stdout,
            stderr,
        } = self;
        drop(stdin);
        tokio::join!(read(stdout), read(stderr))
    }
}

/// An address that is one like any other.
pub fn address(prefix: &str) -> Address {
    Address {
        prefix: prefix.into(),
        ..Default::default()
    }
}

pub fn container(id: &str) -> ContainerRef {
    ContainerRef {
        id: id.into(),
        ..Default::default()
    }
}

pub fn reference(id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

/// A process that runs `script` in a shell.
pub fn shell(script: &str) -> Value {
    json!({
        "args": ["/bin/sh", "-c", script], "cwd": "/", "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
        "capabilities": {
            "bounding": CAPS, "effective": CAPS, "permitted": CAPS
        },
        "noNewPrivileges": true
    })
}

/// containerd's default capabilities.
pub const CAPS: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A spec as containerd writes it, running `script` in a shell.
pub fn spec(script: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": shell(script),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/x",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// Checks that a request was refused with this code.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>, code: ttrpc::Code) {
    assert_eq!(refusal(result).0, code);
}

/// The code and text of a refused request.
#[track_caller]
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.expect_err("the request should be refused") {
        ttrpc::Error::RpcStatus(status) => (status.code.enum_value().unwrap(), status.message),
        other => panic!("not a status: {other}"),
    }
}

/// `key: value` lines as a map.
pub fn fields(text: &str) -> HashMap<String, String> {
    text.lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.trim().into(), v.trim().into()))
        .collect()
}

pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Runs `script` in a container whose spec `change` has changed, and returns its output.
pub async fn output(guest: &mut Guest, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let id = format!("o{}", fs::read_dir(guest.share()).unwrap().count());
    guest.rootfs(&id);
    let mut spec = spec(script);
    change(&mut spec);
    let outcome = guest.whole(&id, &spec).await;
    assert_eq!(outcome.stderr, "", "{script}");
    assert!(outcome.status < 100, "status {}: {script}", outcome.status);
    outcome.stdout
}
