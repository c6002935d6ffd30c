//! What a guest is told of its pod, once, and what of that is found out while it boots.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use brig_agent_protocol::agent::StartSandboxRequest;
use brig_agent_protocol::{MODULES_PATH, SHARE_TAG};
use slog::{Logger, warn};
use tokio::task::JoinHandle;
use ttrpc::context;

use crate::asked::config::Netfilter;
use crate::error::Result;
use crate::guest::vm::{Attributes, Vm};
use crate::node::limits;
use crate::node::network::{self, GuestNetwork, Inherited};

/// The longest name of a kernel's release in bytes (`__NEW_UTS_LEN`).
const MAX_RELEASE: usize = 64;

/// What the guest is told at once.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    /// The pod's id.
    pub id: String,
    /// Its host name.
    pub hostname: String,
    /// Kernel parameters of the pod, by name.
    pub sysctls: BTreeMap<String, String>,
    /// Size of its shared memory in bytes; 0: the agent's default.
    pub shm_size: u64,
    /// What it keeps of files that nobody uses goes back to the node while it is idle.
    pub return_files: bool,
    /// As many processes and threads as its containers may have together; 0: no limit.
    pub max_pids: u64,
    /// Its network, once the VM is launched.
    pub network: GuestNetwork,
}

/// A sandbox, and what of it is still being found out.
pub(super) struct Wanted {
    pub(super) sandbox: Sandbox,
    pub(super) inherited: JoinHandle<Inherited>,
    pub(super) modules: JoinHandle<Result<()>>,
    pub(super) netfilter: Netfilter,
}

/// Puts the image of the kernel's modules where the guest finds it when it wants one. It is one mount of the VMM's namespace;
/// the guest does not look at it before.
pub(super) fn share_modules(vm: Arc<Vm>, image: PathBuf) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        let how = Attributes {
            readonly: true,
            ..Attributes::default()
        };
        let attached = vm
            .with_mounts(move |mounts| mounts.attach(MODULES_PATH, &image, how).map(drop))
            .await;
        // Held no longer than that: the VM goes with its last holder.
        drop(vm);
        attached
    })
}

/// Reads the parameters of the node and of the pod's network namespace.
pub(super) fn inherit(netns: Option<PathBuf>, interfaces: Vec<String>) -> JoinHandle<Inherited> {
    tokio::task::spawn_blocking(move || {
        // A namespace that has just gone ends the pod by itself.
        let found = netns.and_then(|path| network::inherited(&path, &interfaces).ok());
        let mut inherited = found.unwrap_or_default();
        inherited.general.splice(0..0, network::limits_of_node());
        inherited
    })
}

pub(super) async fn start_sandbox(vm: &Vm, wanted: Wanted, logger: &Logger) -> Result<()> {
    let Wanted {
        mut sandbox,
        inherited,
        modules,
        netfilter,
    } = wanted;
    let inherited = inherited.await?;
    // Before anything of the pod may ask for one. A pod without modules runs as long as it needs none.
    if let Err(error) = modules.await? {
        warn!(logger, "this pod's kernel has no modules"; "reason" => &error.message);
    }
    sandbox.network.inherit(inherited);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let network = sandbox.network;
    let request = StartSandboxRequest {
        id: sandbox.id,
        hostname: sandbox.hostname,
        sysctls: sandbox.sysctls.into_iter().collect(),
        shm_size: sandbox.shm_size,
        return_files: sandbox.return_files,
        limits: limits::own(),
        max_pids: sandbox.max_pids,
        unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        share_tag: SHARE_TAG.to_owned(),
        interfaces: network.interfaces,
        routes: network.routes,
        neighbours: network.neighbours,
        inherited: network.sysctls,
        netfilter: network.filter.request(netfilter).into(),
        ..StartSandboxRequest::default()
    };
    let answer = vm
        .agent
        .start_sandbox(context::Context::default(), &request);
    let answer = vm.call("StartSandbox", answer).await?;
    if let Some(late) = &vm.late {
        late.loaded(answer.netfilter_generation);
    }
    let release = answer.kernel_release.chars();
    let release = release.filter(char::is_ascii_graphic).take(MAX_RELEASE);
    let _ = vm.kernel_release.set(release.collect());
    let refused = &answer.netfilter_refused;
    Ok(network.filter.accept(refused, netfilter, logger)?)
}
