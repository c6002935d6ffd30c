//! What cases share: the connection, the handler under test, and one long-lived pod for assertions
//! that need no pod of their own.

use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
pub use brig_suite::case::{case, not_here, smoke};
use brig_tests::node::{check, containerd};
use k8s_cri::v1::{
    ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest, VersionRequest,
};

use crate::client::Cri;
use crate::container::Container;
use crate::node::{self, Image};
use crate::pod::{Pod, PodSpec};

/// What keeps a container alive.
pub const SLEEP: &[&str] = &["sleep", "1000000"];

/// One behaviour.
pub type Case = brig_suite::case::Case<Suite>;

/// A pod with one sleeping container.
pub struct Shared {
    // Dropped in this order.
    /// A busybox that sleeps.
    pub container: Container,
    /// Its pod.
    pub pod: Pod,
}

/// The state of a run with one handler.
pub struct Suite {
    /// The connection.
    pub cri: Rc<Cri>,
    /// "runc", "brig", "brig-shim", "brig-streaming".
    pub handler: String,
    /// containerd's version, "1.7".
    pub containerd: String,
    /// The same in full.
    pub containerd_release: String,
    shared: Option<Rc<Shared>>,
    images: Vec<Image>,
}

impl Suite {
    /// Connects, and removes what an earlier run has left.
    pub fn new(handler: &str) -> Result<Self> {
        let cri = Rc::new(Cri::connect()?);
        let version = cri
            .call("Version", |mut client| async move {
                client.version(VersionRequest::default()).await
            })?
            .runtime_version;
        let suite = Self {
            cri,
            handler: handler.to_owned(),
            containerd: containerd::short_version(&version),
            containerd_release: version,
            shared: None,
            images: Vec::new(),
        };
        suite.remove_leftovers()?;
        Ok(suite)
    }

    /// Ids of all pods of this suite that containerd knows.
    pub fn pods(&self) -> Result<Vec<String>> {
        let all = self.cri.call("ListPodSandbox", |mut client| async move {
            client
                .list_pod_sandbox(ListPodSandboxRequest::default())
                .await
        })?;
        Ok(all
            .items
            .into_iter()
            .filter(|pod| {
                pod.labels
                    .get("suite")
                    .is_some_and(|name| name == "brig-cri")
            })
            .map(|pod| pod.id)
            .collect())
    }

    fn remove_leftovers(&self) -> Result<()> {
        for id in self.pods()? {
            let stop = StopPodSandboxRequest {
                pod_sandbox_id: id.clone(),
            };
            let remove = RemovePodSandboxRequest { pod_sandbox_id: id };
            let _ = self.cri.call("StopPodSandbox", |mut client| async move {
                client.stop_pod_sandbox(stop).await
            });
            self.cri.call("RemovePodSandbox", |mut client| async move {
                client.remove_pod_sandbox(remove).await
            })?;
        }
        Ok(())
    }

    /// Whether Brig is under test: every handler but runc's is one of it.
    pub fn is_brig(&self) -> bool {
        self.handler != "runc"
    }

    /// Sees to it that containerd has an image.
    pub fn image(&mut self, image: Image) -> Result<()> {
        if !self.images.contains(&image) {
            node::import(image)?;
            self.images.push(image);
        }
        Ok(())
    }

    /// A pod to be, of the handler under test.
    pub fn pod(&self, name: &str) -> PodSpec {
        PodSpec::new(&self.handler, name)
    }

    /// Runs a pod that asks for nothing.
    pub fn run(&self, name: &str) -> Result<Pod> {
        self.pod(name).run(&self.cri)
    }

    /// A pod with a container that sleeps, for cases that need any.
    pub fn shared(&mut self) -> Result<Rc<Shared>> {
        if self.shared.is_none() {
            let pod = self.run("shared")?;
            let container = pod.container("main", SLEEP).start()?;
            self.shared = Some(Rc::new(Shared { container, pod }));
        }
        self.shared.clone().context("no shared pod")
    }

    /// Ends the shared pod.
    pub fn forget_shared(&mut self) {
        self.shared = None;
    }
}

/// Fails unless the call was refused for a reason that names one of `words`.
pub fn refused<T>(what: &str, outcome: Result<T>, words: &[&str]) -> Result<()> {
    match outcome {
        Ok(_) => bail!("{what} was accepted, but should be refused"),
        Err(error) => check::contains_one(what, words, &format!("{error:#}")),
    }
}

/// Fails unless `low <= actual <= high`.
pub fn between(what: &str, low: u64, high: u64, actual: u64) -> Result<()> {
    ensure!(
        (low..=high).contains(&actual),
        "{what}: expected {low} to {high}, got {actual}"
    );
    Ok(())
}
