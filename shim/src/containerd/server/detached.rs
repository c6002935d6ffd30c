//! Calls whose work goes on when nobody waits for its answer any more.
//!
//! ttrpc drops a method's future at the caller's deadline and when the caller hangs up, wherever that future waits
//! just then; containerd's own shims do the work to its end. So the work has a task of its own, and the future
//! only waits for that.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};

/// Methods that look and change nothing. They end with their caller: a Wait may be without end, and every
/// restart of containerd brings new ones.
const LOOKS: [&str; 14] = [
    "State",
    "Pids",
    "Wait",
    "Stats",
    "Connect",
    "Platform",
    "WaitSandbox",
    "SandboxStatus",
    "PingSandbox",
    "SandboxMetrics",
    "Counters",
    "Inspect",
    "Look",
    "Logs",
];

/// These services, whose methods are done to their end but for those that only look.
pub(super) fn detached(services: HashMap<String, Service>) -> HashMap<String, Service> {
    let of_service = |service: Service| Service {
        methods: service.methods.into_iter().map(of_method).collect(),
        streams: service.streams,
    };
    services
        .into_iter()
        .map(|(name, service)| (name, of_service(service)))
        .collect()
}

type Handler = Box<dyn MethodHandler + Send + Sync>;

fn of_method((name, handler): (String, Handler)) -> (String, Handler) {
    if LOOKS.contains(&name.as_str()) {
        return (name, handler);
    }
    (name, Box::new(Detached(Arc::from(handler))))
}

struct Detached(Arc<dyn MethodHandler + Send + Sync>);

#[async_trait]
impl MethodHandler for Detached {
    async fn handler(
        &self,
        context: TtrpcContext,
        request: ttrpc::Request,
    ) -> ttrpc::Result<ttrpc::Response> {
        let handler = Arc::clone(&self.0);
        let work = tokio::spawn(async move { handler.handler(context, request).await });
        work.await
            .unwrap_or_else(|error| Err(ttrpc::Error::Others(error.to_string())))
    }
}
