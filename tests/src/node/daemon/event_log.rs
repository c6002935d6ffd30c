//! containerd's ttrpc socket for events: remembers what shims forward, across restarts of the daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart,
};
use containerd_shim_protos::shim_sync::{Events, create_events};
use protobuf::Message as _;
use protobuf::well_known_types::empty::Empty;

/// A forwarded event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// "/tasks/exit".
    pub topic: String,
    /// The namespace of its envelope.
    pub namespace: String,
    /// The container.
    pub container: String,
    /// The process: the container's own id, or an exec's.
    pub process: String,
    /// Its pid, where the event has one.
    pub pid: u32,
    /// Its exit status, where the event has one.
    pub status: u32,
}

fn decode(topic: &str, value: &[u8]) -> protobuf::Result<Forwarded> {
    let mut event = Forwarded::default();
    match topic {
        "/tasks/create" => {
            let body = TaskCreate::parse_from_bytes(value)?;
            (event.container, event.pid) = (body.container_id, body.pid);
        }
        "/tasks/start" => {
            let body = TaskStart::parse_from_bytes(value)?;
            (event.container, event.pid) = (body.container_id, body.pid);
        }
        "/tasks/exec-added" => {
            let body = TaskExecAdded::parse_from_bytes(value)?;
            (event.container, event.process) = (body.container_id, body.exec_id);
        }
        "/tasks/exec-started" => {
            let body = TaskExecStarted::parse_from_bytes(value)?;
            (event.container, event.process, event.pid) =
                (body.container_id, body.exec_id, body.pid);
        }
        "/tasks/exit" => {
            let body = TaskExit::parse_from_bytes(value)?;
            (event.container, event.process) = (body.container_id, body.id);
            (event.pid, event.status) = (body.pid, body.exit_status);
        }
        "/tasks/delete" => {
            let body = TaskDelete::parse_from_bytes(value)?;
            (event.container, event.pid, event.status) =
                (body.container_id, body.pid, body.exit_status);
        }
        "/tasks/oom" => event.container = TaskOOM::parse_from_bytes(value)?.container_id,
        _ => {}
    }
    Ok(event)
}

/// Everything that was forwarded so far.
#[derive(Clone, Default)]
pub struct EventLog {
    seen: Arc<(Mutex<Vec<Forwarded>>, Condvar)>,
}

impl EventLog {
    /// Everything of one container.
    #[must_use]
    pub fn of(&self, container: &str) -> Vec<Forwarded> {
        let seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter()
            .filter(|event| event.container == container)
            .cloned()
            .collect()
    }

    /// The topics of one container's events, in order.
    #[must_use]
    pub fn topics(&self, container: &str) -> Vec<String> {
        self.of(container)
            .into_iter()
            .map(|event| event.topic)
            .collect()
    }

    /// Waits for an event of this topic and container.
    ///
    /// # Errors
    /// At the deadline, with what came of that container.
    pub fn wait(&self, topic: &str, container: &str, within: Duration) -> Result<Forwarded> {
        let end = Instant::now() + within;
        let mut seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let found = seen
                .iter()
                .find(|event| event.topic == topic && event.container == container);
            if let Some(event) = found {
                return Ok(event.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(seen);
                let came = self.topics(container);
                bail!("no {topic} of {container} in time; what came: {came:?}");
            }
            seen = self
                .seen
                .1
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Events for EventLog {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        let event = decode(&envelope.topic, &envelope.event.value).map_err(|error| {
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, error.to_string());
            ttrpc::Error::RpcStatus(status)
        })?;
        let event = Forwarded {
            topic: envelope.topic,
            namespace: envelope.namespace,
            ..event
        };
        let mut seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(event);
        self.seen.1.notify_all();
        Ok(Empty::new())
    }
}

/// The socket; it goes with this value.
pub struct EventSocket {
    server: Option<ttrpc::Server>,
    path: PathBuf,
}

impl EventSocket {
    /// Serves at `path` into `log`.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(path: &Path, log: &EventLog) -> Result<Self> {
        let _ = fs::remove_file(path);
        let service = create_events(Arc::new(log.clone()));
        let mut server = ttrpc::Server::new()
            .bind(&format!("unix://{}", path.display()))
            .with_context(|| format!("cannot serve events at {}", path.display()))?
            .register_service(service);
        server.start().context("cannot serve events")?;
        Ok(Self {
            server: Some(server),
            path: path.to_owned(),
        })
    }
}

impl Drop for EventSocket {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::shim::event::Envelope;
    use containerd_shim_protos::shim_sync::{Client, EventsClient};
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;
    use ttrpc::context;

    fn forward(path: &Path, container: &str) {
        let exit = TaskExit {
            container_id: container.to_owned(),
            id: container.to_owned(),
            exit_status: 3,
            ..TaskExit::default()
        };
        let envelope = Envelope {
            namespace: "ns".to_owned(),
            topic: "/tasks/exit".to_owned(),
            event: MessageField::some(Any {
                value: exit.write_to_bytes().unwrap(),
                ..Any::default()
            }),
            ..Envelope::default()
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let client = Client::connect(&format!("unix://{}", path.display())).unwrap();
        let client = EventsClient::new(client);
        client
            .forward(context::with_timeout(20_000_000_000), &request)
            .unwrap();
    }

    #[test]
    fn events_are_kept_across_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.ttrpc");
        let log = EventLog::default();
        for container in ["a", "b"] {
            let socket = EventSocket::bind(&path, &log).unwrap();
            forward(&path, container);
            let event = log
                .wait("/tasks/exit", container, Duration::from_secs(20))
                .unwrap();
            assert_eq!((event.status, event.namespace.as_str()), (3, "ns"));
            drop(socket);
            assert!(!path.exists());
        }
        assert_eq!(log.topics("a"), ["/tasks/exit"]);
        assert!(log.wait("/tasks/exit", "c", Duration::ZERO).is_err());
    }
}
