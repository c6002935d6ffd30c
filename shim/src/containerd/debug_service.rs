//! Brig's own service on the shim's socket, for `brig`, the operator's command: asked by root alone, as the socket
//! is root's. It answers from what the pod keeps anyway, and costs a pod that is not asked nothing.
//!
//! Requests and answers are JSON, but for what is looked at in the guest, which is the guest's bytes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use brig_agent_protocol::OPEN_LOOKS;
use brig_hypervisor::control::DebugRequest;
use serde::Serialize;
use serde_json::{Value, json};
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};

use super::inspected::{Container, Inspected};
use crate::asked::config::LogLevel;
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::log::Control;
use crate::pod::actor::PodHandle;
use crate::pod::container::{ContainerHandle, Request};
use crate::pod::process::Phase;

/// The service.
pub const NAME: &str = "brig.Debug";

/// What it can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The VMM's counters.
    Counters,
    /// The pod: state, configuration in force, containers.
    Inspect,
    /// Something of the guest: `{"words": ["dmesg"]}`.
    Look,
    /// Lines of the log: `{"from": 0}`.
    Logs,
    /// Changes the level of the log: `{"level": "debug"}`.
    Level,
    /// Stops the VM's CPUs, looks at them or lets them go on: a [`DebugRequest`]; the answer is an `Option` of
    /// [`brig_hypervisor::control::Stopped`].
    Debug,
    /// Lets a volume on a disk have all of it: `{"volume": "/path", "least": 0}`, the fewest bytes that the disk must have.
    Grow,
}

impl Method {
    const ALL: [Self; 7] = [
        Self::Counters,
        Self::Inspect,
        Self::Look,
        Self::Logs,
        Self::Level,
        Self::Debug,
        Self::Grow,
    ];

    /// Its name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counters => "Counters",
            Self::Inspect => "Inspect",
            Self::Look => "Look",
            Self::Logs => "Logs",
            Self::Level => "Level",
            Self::Debug => "Debug",
            Self::Grow => "Grow",
        }
    }
}

/// The service for this pod and its log.
pub fn service(pod: &PodHandle, log: &Arc<Control>) -> HashMap<String, Service> {
    // The agent keeps one answer at a time.
    let looking = Arc::new(tokio::sync::Mutex::new(()));
    let methods = Method::ALL.map(|method| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Handler {
            method,
            pod: pod.clone(),
            log: Arc::clone(log),
            looking: Arc::clone(&looking),
        });
        (method.name().to_owned(), handler)
    });
    let service = Service {
        methods: HashMap::from(methods),
        streams: HashMap::new(),
    };
    HashMap::from([(NAME.to_owned(), service)])
}

struct Handler {
    method: Method,
    pod: PodHandle,
    log: Arc<Control>,
    looking: Arc<tokio::sync::Mutex<()>>,
}

#[async_trait]
impl MethodHandler for Handler {
    async fn handler(
        &self,
        _: TtrpcContext,
        request: ttrpc::Request,
    ) -> ttrpc::Result<ttrpc::Response> {
        let answer = match self.method {
            Method::Counters => self.counters().await,
            Method::Inspect => self.inspect().await,
            Method::Look => self.look(&request.payload).await,
            Method::Logs => self.logs(&request.payload),
            Method::Level => self.level(&request.payload),
            Method::Debug => self.debug(&request.payload).await,
            Method::Grow => self.grow(&request.payload).await,
        };
        let mut response = ttrpc::Response::new();
        match answer {
            Ok(payload) => {
                response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
                response.payload = payload;
            }
            Err(error) => {
                let code = error.code();
                response.set_status(ttrpc::get_status(code, error.message));
            }
        }
        Ok(response)
    }
}

impl Handler {
    async fn counters(&self) -> Result<Vec<u8>> {
        let vm = self.pod.vm().await;
        let vm = vm.ok_or_else(|| Error::state("the pod has no VM"))?;
        match vm.control().counters().await {
            Ok(counters) => bytes(&json!(counters)),
            Err(error) => Err(vm.explain(error).await),
        }
    }

    async fn inspect(&self) -> Result<Vec<u8>> {
        let mut pod = self.pod.inspect().await?;
        let mut containers = Vec::new();
        for (id, container) in std::mem::take(&mut pod.containers) {
            // One that is gone meanwhile is none.
            if let Ok(container) = described(id, &container).await {
                containers.push(container);
            }
        }
        bytes(&Inspected::of(pod, self.level_name(), containers))
    }

    async fn look(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let request = read(payload)?;
        let words = request["words"].as_array();
        let words = words.and_then(|words| {
            let words = words.iter().map(|word| Some(word.as_str()?.to_owned()));
            words.collect::<Option<Vec<String>>>()
        });
        let words = words.filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| Error::invalid("words: what is to be looked at?"))?;
        let open = OPEN_LOOKS.contains(&words[0].as_str());
        let vm = self.guest(open).await?;
        let _one = self.looking.lock().await;
        vm.look(words).await
    }

    async fn debug(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let request: DebugRequest = serde_json::from_slice(payload)
            .map_err(|error| Error::invalid(format!("no request of a debugger: {error}")))?;
        let vm = self.guest(false).await?;
        bytes(&json!(vm.debug(request).await?))
    }

    async fn grow(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let request = read(payload)?;
        let path = request["volume"].as_str().map(Path::new);
        let path = path.ok_or_else(|| Error::invalid("volume: which is to grow?"))?;
        let least = request["least"].as_u64().unwrap_or(0);
        let vm = self.pod.vm().await;
        let vm = vm.ok_or_else(|| Error::state("the pod has no VM"))?;
        bytes(&json!({ "deviceBytes": vm.grow_volume(path, least).await? }))
    }

    /// The VM of a pod whose guest may be looked into, or be asked for what is open to the node anyway.
    async fn guest(&self, open: bool) -> Result<Arc<Vm>> {
        let pod = self.pod.inspect().await?;
        if !open && !pod.config.is_some_and(|config| config.debug) {
            return Err(Error::state(
                "this pod's runtime handler does not let the node look into its guest: its operator allows it with \
                 debug = true in the handler's configuration, for pods that start from then on",
            ));
        }
        pod.vm.ok_or_else(|| Error::state("the pod has no VM"))
    }

    fn logs(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let from = read(payload)?["from"].as_u64().unwrap_or(0);
        bytes(&json!(self.log.from(from)))
    }

    fn level(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let request = read(payload)?;
        let level = request["level"].as_str().and_then(LogLevel::named);
        let level = level.ok_or_else(|| {
            let names = LogLevel::ALL.map(LogLevel::name).join(", ");
            Error::invalid(format!("level: one of {names}"))
        })?;
        let was = self.level_name();
        self.log.set_level(level.level());
        bytes(&json!({ "level": level.name(), "was": was }))
    }

    fn level_name(&self) -> &'static str {
        let level = self.log.level();
        let named = LogLevel::ALL
            .into_iter()
            .find(|named| named.level() == level);
        named.map_or("info", LogLevel::name)
    }
}

async fn described(id: String, container: &ContainerHandle) -> Result<Container> {
    let exec_id = String::new();
    let state = container
        .ask(|reply| Request::State { exec_id, reply })
        .await?;
    let (phase, exit_status) = match state.phase {
        Phase::Creating => ("creating", None),
        Phase::Created | Phase::Starting => ("created", None),
        Phase::Running if state.paused => ("paused", None),
        Phase::Running => ("running", None),
        Phase::Stopped(exit) => ("stopped", Some(exit.status)),
    };
    Ok(Container {
        id,
        bundle: state.bundle,
        state: phase,
        exit_status,
        pid: state.pid,
    })
}

fn read(payload: &[u8]) -> Result<Value> {
    serde_json::from_slice(payload)
        .map_err(|error| Error::invalid(format!("the request is no JSON: {error}")))
}

fn bytes(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::internal(error.to_string()))
}
