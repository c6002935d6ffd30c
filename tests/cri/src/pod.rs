//! A pod's sandbox: what kubelet asks for, and a guard that removes it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PodSandboxStats, PodSandboxStatsRequest,
    PodSandboxStatus, PodSandboxStatusRequest, PortMapping, Protocol, RemovePodSandboxRequest,
    RunPodSandboxRequest, SecurityProfile, StopPodSandboxRequest, security_profile::ProfileType,
};

use crate::client::Cri;
use crate::container::ContainerSpec;

/// Where containers' logs go, as below /var/log/pods.
const LOGS: &str = "/var/log/brig-cri";
/// The parent of all pods' cgroups, as /kubepods.
const CGROUPS: &str = "/brig-cri";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A profile of kubelet's for one of the three types.
pub fn profile(kind: ProfileType) -> SecurityProfile {
    SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: String::new(),
    }
}

/// A sandbox to be.
pub struct PodSpec {
    handler: String,
    config: PodSandboxConfig,
    /// Files of the pod's cgroup, and what kubelet writes to them.
    limits: Vec<(&'static str, &'static str)>,
}

impl PodSpec {
    /// What kubelet asks for a pod that asks for nothing.
    pub fn new(handler: &str, name: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{name}-{}-{number}", std::process::id());
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption {
                network: NamespaceMode::Pod.into(),
                pid: NamespaceMode::Container.into(),
                ipc: NamespaceMode::Pod.into(),
                ..NamespaceOption::default()
            }),
            seccomp: Some(profile(ProfileType::RuntimeDefault)),
            ..LinuxSandboxSecurityContext::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: "brig-cri".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: format!("{LOGS}/{uid}"),
            labels: HashMap::from([("suite".to_owned(), "brig-cri".to_owned())]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("{CGROUPS}/{uid}"),
                security_context: Some(security),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        Self {
            handler: handler.to_owned(),
            config,
            limits: Vec::new(),
        }
    }

    /// Limits the pod's cgroup, as kubelet does for all of the pod's limits and its overhead.
    pub fn memory_limit(mut self, bytes: &'static str) -> Self {
        self.limits.push(("memory.max", bytes));
        self
    }

    /// Limits its processes, as kubelet does by `podPidsLimit`.
    pub fn pids_limit(mut self, processes: &'static str) -> Self {
        self.limits.push(("pids.max", processes));
        self
    }

    /// Changes anything.
    pub fn edit(mut self, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the sandbox's Linux part.
    pub fn linux(self, change: impl FnOnce(&mut LinuxPodSandboxConfig)) -> Self {
        self.edit(|config| change(config.linux.get_or_insert_default()))
    }

    /// Changes the sandbox's security context.
    pub fn security(self, change: impl FnOnce(&mut LinuxSandboxSecurityContext)) -> Self {
        self.linux(|linux| change(linux.security_context.get_or_insert_default()))
    }

    /// Changes the namespaces of the pod.
    pub fn namespaces(self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        self.security(|security| change(security.namespace_options.get_or_insert_default()))
    }

    /// Sets a sysctl.
    pub fn sysctl(self, name: &str, value: &str) -> Self {
        self.linux(|linux| {
            linux.sysctls.insert(name.to_owned(), value.to_owned());
        })
    }

    /// Sets the pod's name servers.
    pub fn dns(self, dns: DnsConfig) -> Self {
        self.edit(|config| config.dns_config = Some(dns))
    }

    /// Forwards a port of the node.
    pub fn host_port(self, protocol: Protocol, host_port: i32, container_port: i32) -> Self {
        self.edit(|config| {
            config.port_mappings.push(PortMapping {
                protocol: protocol.into(),
                container_port,
                host_port,
                host_ip: String::new(),
            });
        })
    }

    /// Runs the sandbox.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn run(self, cri: &Rc<Cri>) -> Result<Pod> {
        // Kubelet makes the log directory and the pod's cgroup.
        fs::create_dir_all(&self.config.log_directory)?;
        let cgroup = cgroup_path(&self.config);
        make_cgroup(&cgroup)?;
        for (file, value) in &self.limits {
            fs::write(cgroup.join(file), value)?;
        }
        let request = RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler.clone(),
        };
        let answer = cri.call("RunPodSandbox", |mut client| async move {
            client.run_pod_sandbox(request).await
        });
        let id = match answer {
            Ok(answer) => answer.pod_sandbox_id,
            Err(error) => {
                let _ = fs::remove_dir_all(&self.config.log_directory);
                remove_cgroup(&cgroup);
                return Err(error);
            }
        };
        Ok(Pod {
            cri: Rc::clone(cri),
            id,
            config: self.config,
        })
    }
}

fn cgroup_path(config: &PodSandboxConfig) -> PathBuf {
    let parent = config
        .linux
        .as_ref()
        .map(|linux| linux.cgroup_parent.as_str())
        .unwrap_or_default();
    Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/'))
}

/// Makes a pod's cgroup with the controllers kubelet gives it.
fn make_cgroup(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
    let root = Path::new("/sys/fs/cgroup");
    for directory in [Some(root), cgroup.parent(), Some(cgroup)]
        .into_iter()
        .flatten()
    {
        for controller in ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"] {
            // One that the kernel does not have is no controller of any pod here.
            let _ = fs::write(
                directory.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    }
    Ok(())
}

fn remove_cgroup(cgroup: &Path) {
    if let Ok(entries) = fs::read_dir(cgroup) {
        for entry in entries.flatten() {
            if entry.path().is_dir() {
                remove_cgroup(&entry.path());
            }
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// A running sandbox; stopped and removed at the end of its scope.
pub struct Pod {
    /// The connection it was made on.
    pub cri: Rc<Cri>,
    /// containerd's id of it.
    pub id: String,
    /// What was asked for.
    pub config: PodSandboxConfig,
}

impl Pod {
    /// Its status.
    ///
    /// # Errors
    /// If containerd does not know it.
    pub fn status(&self) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        self.cri
            .call("PodSandboxStatus", |mut client| async move {
                client.pod_sandbox_status(request).await
            })?
            .status
            .context("PodSandboxStatus: no status")
    }

    /// Whether it is ready.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.status()?.state() == PodSandboxState::SandboxReady)
    }

    /// Its addresses, the first one first.
    ///
    /// # Errors
    /// If it has none.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.status()?.network.context("the pod has no network")?;
        ensure!(!network.ip.is_empty(), "the pod has no address");
        let mut all = vec![network.ip];
        all.extend(network.additional_ips.into_iter().map(|more| more.ip));
        Ok(all)
    }

    /// Its IPv4 address.
    ///
    /// # Errors
    /// If it has none.
    pub fn ipv4(&self) -> Result<String> {
        let all = self.addresses()?;
        all.iter()
            .find(|ip| !ip.contains(':'))
            .cloned()
            .with_context(|| format!("no IPv4 address in {all:?}"))
    }

    /// Its IPv6 address.
    ///
    /// # Errors
    /// If it has none.
    pub fn ipv6(&self) -> Result<String> {
        let all = self.addresses()?;
        all.iter()
            .find(|ip| ip.contains(':'))
            .cloned()
            .with_context(|| format!("no IPv6 address in {all:?}"))
    }

    /// A container of it to be.
    pub fn container(&self, name: &str, args: &[&str]) -> ContainerSpec<'_> {
        ContainerSpec::new(self, name, args)
    }

    /// Its statistics.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn stats(&self) -> Result<PodSandboxStats> {
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri
            .call("PodSandboxStats", |mut client| async move {
                client.pod_sandbox_stats(request).await
            })?
            .stats
            .context("PodSandboxStats: no statistics")
    }

    /// Stops it.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri
            .call("StopPodSandbox", |mut client| async move {
                client.stop_pod_sandbox(request).await
            })
            .map(drop)
    }

    /// Removes it with its containers.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn remove(&self) -> Result<()> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri
            .call("RemovePodSandbox", |mut client| async move {
                client.remove_pod_sandbox(request).await
            })
            .map(drop)
    }

    /// Its cgroup on the node.
    pub fn cgroup(&self) -> PathBuf {
        cgroup_path(&self.config)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // What cannot be removed shows in the next case or in the leak cases.
        let _ = self.stop();
        if let Err(error) = self.remove() {
            eprintln!("brig-cri: {error:#}");
        }
        let _ = fs::remove_dir_all(&self.config.log_directory);
        remove_cgroup(&self.cgroup());
    }
}
