//! A container of a pod: what kubelet asks for, what it can be asked, and a guard that removes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_tests::node::{check, clock};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatsRequest,
    ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    KeyValue, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    RemoveContainerRequest, ReopenContainerLogRequest, StartContainerRequest, StopContainerRequest,
    UpdateContainerResourcesRequest, security_profile::ProfileType,
};

use crate::client::Cri;
use crate::log::{self, Line};
use crate::node::BUSYBOX;
use crate::pod::{Pod, profile};

/// The pause between two looks at something that has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Looks again until `look` finds something.
///
/// # Errors
/// After the time is up, with `what` was waited for; at once if `look` fails.
pub fn eventually<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + within;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("{what}: not within {} s", within.as_secs());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// A container to be.
pub struct ContainerSpec<'a> {
    pod: &'a Pod,
    config: ContainerConfig,
}

impl<'a> ContainerSpec<'a> {
    /// What kubelet asks for a container that asks for nothing but `args`.
    pub fn new(pod: &'a Pod, name: &str, args: &[&str]) -> Self {
        let namespaces = pod
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.clone());
        let security = LinuxContainerSecurityContext {
            namespace_options: namespaces,
            seccomp: Some(profile(ProfileType::RuntimeDefault)),
            // Kubelet's defaults.
            masked_paths: [
                "/proc/asound",
                "/proc/acpi",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/timer_stats",
                "/proc/sched_debug",
                "/proc/scsi",
                "/sys/firmware",
            ]
            .map(str::to_owned)
            .to_vec(),
            readonly_paths: [
                "/proc/bus",
                "/proc/fs",
                "/proc/irq",
                "/proc/sys",
                "/proc/sysrq-trigger",
            ]
            .map(str::to_owned)
            .to_vec(),
            ..LinuxContainerSecurityContext::default()
        };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: BUSYBOX.0.to_owned(),
                ..ImageSpec::default()
            }),
            command: args.iter().map(|arg| (*arg).to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(security),
            }),
            ..ContainerConfig::default()
        };
        Self { pod, config }
    }

    /// Changes anything.
    pub fn edit(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the security context.
    pub fn security(self, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Self {
        self.edit(|config| {
            let linux = config.linux.get_or_insert_default();
            change(linux.security_context.get_or_insert_default());
        })
    }

    /// Changes the resources.
    pub fn resources(self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        self.edit(|config| {
            let linux = config.linux.get_or_insert_default();
            change(linux.resources.get_or_insert_default());
        })
    }

    /// Another attempt at a container that has ended.
    pub fn attempt(self, attempt: u32) -> Self {
        self.edit(|config| {
            config.metadata.get_or_insert_default().attempt = attempt;
        })
    }

    /// Another image than busybox.
    pub fn image(self, name: &str) -> Self {
        self.edit(|config| config.image.get_or_insert_default().image = name.to_owned())
    }

    /// Adds a variable to the environment.
    pub fn env(self, key: &str, value: &str) -> Self {
        self.edit(|config| {
            config.envs.push(KeyValue {
                key: key.to_owned(),
                value: value.to_owned(),
            });
        })
    }

    /// Mounts something of the node, writable.
    pub fn mount(self, host: &Path, container: &str) -> Self {
        self.mount_with(host, container, |_| {})
    }

    /// Mounts something of the node, read-only.
    pub fn mount_readonly(self, host: &Path, container: &str) -> Self {
        self.mount_with(host, container, |mount| mount.readonly = true)
    }

    /// Mounts something of the node.
    pub fn mount_with(self, host: &Path, container: &str, change: impl FnOnce(&mut Mount)) -> Self {
        let mut mount = Mount {
            host_path: host.display().to_string(),
            container_path: container.to_owned(),
            ..Mount::default()
        };
        change(&mut mount);
        self.edit(|config| config.mounts.push(mount))
    }

    /// Creates the container.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn create(self) -> Result<Container> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config.clone()),
            sandbox_config: Some(self.pod.config.clone()),
        };
        let id = self
            .pod
            .cri
            .call("CreateContainer", |mut client| async move {
                client.create_container(request).await
            })?
            .container_id;
        Ok(Container {
            cri: Rc::clone(&self.pod.cri),
            id,
            log: Path::new(&self.pod.config.log_directory).join(&self.config.log_path),
        })
    }

    /// Creates and starts the container.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn start(self) -> Result<Container> {
        let container = self.create()?;
        container.start()?;
        Ok(container)
    }

    /// Runs the container to its end and returns its status.
    ///
    /// # Errors
    /// As [`Self::start`]; if it does not end in time.
    pub fn finish(self) -> Result<(Container, ContainerStatus)> {
        let container = self.start()?;
        let status = container.wait()?;
        Ok((container, status))
    }
}

/// How an exec ended.
#[derive(Debug)]
pub struct Exec {
    /// Its exit status.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Exec {
    /// stdout as text, without white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

/// A container; killed and removed at the end of its scope.
pub struct Container {
    cri: Rc<Cri>,
    /// containerd's id of it.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

impl Container {
    /// The connection it was made on.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Starts it.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn start(&self) -> Result<()> {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .call("StartContainer", |mut client| async move {
                client.start_container(request).await
            })
            .map(drop)
    }

    /// Its status.
    ///
    /// # Errors
    /// If containerd does not know it.
    pub fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        self.cri
            .call("ContainerStatus", |mut client| async move {
                client.container_status(request).await
            })?
            .status
            .context("ContainerStatus: no status")
    }

    /// Waits until it has ended, as kubelet does: by asking.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait(&self) -> Result<ContainerStatus> {
        self.wait_within(clock::seconds(6))
    }

    /// As [`Self::wait`], within a time of its own.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_within(&self, within: Duration) -> Result<ContainerStatus> {
        eventually("the container ends", within, || {
            let status = self.status()?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
    }

    /// Runs a command in it, without a time-out of its own.
    ///
    /// # Errors
    /// With containerd's answer; a failed command is none.
    pub fn exec(&self, args: &[&str]) -> Result<Exec> {
        self.exec_within(args, 0)
    }

    /// Runs a command in it for at most `timeout` seconds (0: no limit).
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn exec_within(&self, args: &[&str], timeout: i64) -> Result<Exec> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: args.iter().map(|arg| (*arg).to_owned()).collect(),
            timeout,
        };
        let answer = self.cri.call("ExecSync", |mut client| async move {
            client.exec_sync(request).await
        })?;
        Ok(Exec {
            code: answer.exit_code,
            stdout: answer.stdout,
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Runs a shell script in it, which must succeed; returns what it wrote, trimmed.
    ///
    /// # Errors
    /// With its exit status and its output.
    pub fn sh(&self, script: &str) -> Result<String> {
        let outcome = self.exec(&["sh", "-c", script])?;
        if outcome.code != 0 {
            bail!(
                "`{script}` ended with {}; stdout: {}; stderr: {}",
                outcome.code,
                check::clip(&outcome.text()),
                check::clip(&outcome.stderr)
            );
        }
        Ok(outcome.text())
    }

    /// Runs a shell script in it, which must fail; returns its stderr.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn sh_fails(&self, script: &str) -> Result<String> {
        let outcome = self.exec(&["sh", "-c", script])?;
        if outcome.code == 0 {
            bail!(
                "`{script}` succeeded, but should be refused; stdout: {}",
                check::clip(&outcome.text())
            );
        }
        Ok(outcome.stderr)
    }

    /// Stops it: SIGTERM, and SIGKILL after `grace` seconds.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn stop(&self, grace: i64) -> Result<()> {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        let within = clock::seconds(10) + Duration::from_secs(grace.unsigned_abs());
        self.cri
            .call_within("StopContainer", within, |mut client| async move {
                client.stop_container(request).await
            })
            .map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn remove(&self) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .call("RemoveContainer", |mut client| async move {
                client.remove_container(request).await
            })
            .map(drop)
    }

    /// Its statistics.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn stats(&self) -> Result<ContainerStats> {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .call("ContainerStats", |mut client| async move {
                client.container_stats(request).await
            })?
            .stats
            .context("ContainerStats: no statistics")
    }

    /// Changes its resources while it runs.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn update(&self, resources: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..UpdateContainerResourcesRequest::default()
        };
        self.cri
            .call("UpdateContainerResources", |mut client| async move {
                client.update_container_resources(request).await
            })
            .map(drop)
    }

    /// Has containerd open its log file anew, after a rotation.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn reopen_log(&self) -> Result<()> {
        let request = ReopenContainerLogRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .call("ReopenContainerLog", |mut client| async move {
                client.reopen_container_log(request).await
            })
            .map(drop)
    }

    /// The lines in its log file.
    ///
    /// # Errors
    /// If a line is not of the CRI's format.
    pub fn lines(&self) -> Result<Vec<Line>> {
        log::parse(&fs::read_to_string(&self.log)?)
    }

    /// Waits for a line in the log, whole.
    ///
    /// # Errors
    /// If it does not come, with what is there.
    pub fn wait_line(&self, text: &str) -> Result<()> {
        eventually("a log line", clock::seconds(4), || {
            Ok(self
                .lines()?
                .iter()
                .any(|line| line.text == text)
                .then_some(()))
        })
        .with_context(|| {
            let data = fs::read_to_string(&self.log).unwrap_or_default();
            format!("no line '{text}' in the log: '{}'", check::clip(&data))
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Kills it first if it runs. The pod's end, which follows, takes what this leaves.
        let _ = self.remove();
    }
}
