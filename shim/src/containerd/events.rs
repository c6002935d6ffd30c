//! Task events to containerd, over its ttrpc socket: in order, each until containerd has taken it.
//!
//! One queue and one task. While containerd restarts, the queue grows to a bound and the task tries
//! to reconnect; beyond the bound the newest events are refused and logged. Publishing never blocks.
//!
//! A hostile guest can cause OOM events at will, and no others without containerd's doing. They are
//! thinned out, and never take the places that the rest of the queue keeps for exits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use slog::{Logger, error, warn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use ttrpc::context;

use crate::pod::events::{Events, TaskEvent};

/// Events kept while containerd is away.
const QUEUE: usize = 4096;
/// Places of the queue that OOM events do not get.
const RESERVED: usize = 1024;
/// OOM events of one container that are closer together than this count as one. containerd only notes
/// that there was one.
const OOM_GAP: Duration = Duration::from_secs(1);
/// Between attempts to reach containerd: there is nothing to wait for but its socket.
const RETRY: Duration = Duration::from_millis(200);
/// How long containerd may take for one event.
const FORWARD: Duration = Duration::from_secs(10);

/// Topic and message, as containerd defines them.
fn encode(event: TaskEvent) -> (&'static str, protobuf::Result<Any>) {
    use containerd_shim_protos::topics as t;
    match event {
        TaskEvent::Create {
            id,
            bundle,
            rootfs,
            io,
            pid,
        } => pack(
            t::TASK_CREATE_EVENT_TOPIC,
            "containerd.events.TaskCreate",
            &TaskCreate {
                container_id: id,
                bundle,
                rootfs,
                io: MessageField::some(TaskIO {
                    stdin: io.stdin,
                    stdout: io.stdout,
                    stderr: io.stderr,
                    terminal: io.terminal,
                    ..TaskIO::default()
                }),
                pid,
                ..TaskCreate::default()
            },
        ),
        TaskEvent::Start { id, pid } => pack(
            t::TASK_START_EVENT_TOPIC,
            "containerd.events.TaskStart",
            &TaskStart {
                container_id: id,
                pid,
                ..TaskStart::default()
            },
        ),
        TaskEvent::ExecAdded { id, exec_id } => pack(
            t::TASK_EXEC_ADDED_EVENT_TOPIC,
            "containerd.events.TaskExecAdded",
            &TaskExecAdded {
                container_id: id,
                exec_id,
                ..TaskExecAdded::default()
            },
        ),
        TaskEvent::ExecStarted { id, exec_id, pid } => pack(
            t::TASK_EXEC_STARTED_EVENT_TOPIC,
            "containerd.events.TaskExecStarted",
            &TaskExecStarted {
                container_id: id,
                exec_id,
                pid,
                ..TaskExecStarted::default()
            },
        ),
        TaskEvent::Exit {
            id,
            process,
            pid,
            exit,
        } => pack(
            t::TASK_EXIT_EVENT_TOPIC,
            "containerd.events.TaskExit",
            &TaskExit {
                container_id: id,
                id: process,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(Timestamp::from(exit.at)),
                ..TaskExit::default()
            },
        ),
        TaskEvent::Delete { id, pid, exit } => pack(
            t::TASK_DELETE_EVENT_TOPIC,
            "containerd.events.TaskDelete",
            &TaskDelete {
                container_id: id,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(Timestamp::from(exit.at)),
                ..TaskDelete::default()
            },
        ),
        TaskEvent::Oom { id } => pack(
            t::TASK_OOM_EVENT_TOPIC,
            "containerd.events.TaskOOM",
            &TaskOOM {
                container_id: id,
                ..TaskOOM::default()
            },
        ),
        TaskEvent::Paused { id } => pack(
            t::TASK_PAUSED_EVENT_TOPIC,
            "containerd.events.TaskPaused",
            &TaskPaused {
                container_id: id,
                ..TaskPaused::default()
            },
        ),
        TaskEvent::Resumed { id } => pack(
            t::TASK_RESUMED_EVENT_TOPIC,
            "containerd.events.TaskResumed",
            &TaskResumed {
                container_id: id,
                ..TaskResumed::default()
            },
        ),
    }
}

/// `name` is the message's in full. The library knows it too, but to tell it would build the descriptors of all messages around it, which hold
/// 300 KiB of each shim for good.
fn pack(
    topic: &'static str,
    name: &'static str,
    message: &impl Message,
) -> (&'static str, protobuf::Result<Any>) {
    let any = message.write_to_bytes().map(|value| Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    });
    (topic, any)
}

enum Entry {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The sending side; cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Entry>,
    namespace: String,
    logger: Logger,
    shared: Arc<Shared>,
}

/// What all clones of a publisher know.
#[derive(Default)]
struct Shared {
    /// Events refused since the last one that was taken.
    lost: AtomicU64,
    /// When the last OOM event of a container was let through. containerd's containers only, until they
    /// are deleted.
    ooms: Mutex<HashMap<String, Instant>>,
}

impl Shared {
    /// Whether an event may pass; a later OOM event of the same container may not for a while.
    fn admits(&self, event: &TaskEvent, now: Instant) -> bool {
        let mut ooms = self.ooms.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            TaskEvent::Oom { id } => {
                let recent = ooms
                    .get(id)
                    .is_some_and(|last| now.duration_since(*last) < OOM_GAP);
                if !recent {
                    ooms.insert(id.clone(), now);
                }
                !recent
            }
            TaskEvent::Delete { id, .. } => {
                ooms.remove(id);
                true
            }
            _ => true,
        }
    }
}

impl Publisher {
    /// A publisher to the ttrpc socket at `address`; without one, events go nowhere.
    #[must_use]
    pub fn new(address: Option<String>, namespace: String, logger: Logger) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(forward_all(address, entries, logger.clone()));
        Self {
            queue,
            namespace,
            logger,
            shared: Arc::default(),
        }
    }

    /// What a pod tells its events to.
    #[must_use]
    pub fn events(&self) -> Events {
        let publisher = self.clone();
        Events::to(move |event| publisher.publish(event))
    }

    /// Puts an event into the queue.
    pub fn publish(&self, event: TaskEvent) {
        if !self.shared.admits(&event, Instant::now()) {
            return;
        }
        let spare = match event {
            TaskEvent::Oom { .. } => RESERVED,
            _ => 0,
        };
        let (topic, packed) = encode(event);
        let Ok(packed) = packed else {
            error!(self.logger, "an event cannot be encoded"; "topic" => topic);
            return;
        };
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::from(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(packed),
            ..Envelope::default()
        };
        let taken = self.queue.capacity() > spare
            && self
                .queue
                .try_send(Entry::Event(Box::new(envelope)))
                .is_ok();
        if taken {
            let lost = self.shared.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                error!(self.logger, "events were lost"; "lost" => lost);
            }
        } else if self.shared.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            // Once: the log would be flooded as well.
            error!(self.logger, "an event is lost: containerd has not taken any for too long";
                "topic" => topic, "queued" => QUEUE);
        }
    }

    /// Waits until everything published before has been taken, at most so long.
    pub async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        let all = async {
            if self.queue.send(Entry::Flush(done)).await.is_ok() {
                let _ = flushed.await;
            }
        };
        if timeout(limit, all).await.is_err() {
            warn!(self.logger, "the last events were not taken by containerd");
        }
    }
}

async fn forward_all(address: Option<String>, mut entries: mpsc::Receiver<Entry>, logger: Logger) {
    let address = address
        .filter(|address| !address.is_empty())
        .map(|address| {
            let path = address.strip_prefix("unix://").unwrap_or(&address);
            format!("unix://{}", Path::new(path).display())
        });
    let mut client = None;
    while let Some(entry) = entries.recv().await {
        match (entry, &address) {
            (Entry::Flush(done), _) => {
                let _ = done.send(());
            }
            (Entry::Event(_), None) => {}
            (Entry::Event(envelope), Some(address)) => {
                forward(address, &mut client, *envelope, &logger).await;
            }
        }
    }
}

/// Sends one event, again after each broken connection, until containerd has answered.
async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: Envelope,
    logger: &Logger,
) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..ForwardRequest::default()
    };
    loop {
        let connected = match client {
            Some(client) => client,
            None => match Client::connect(address).await {
                Ok(connection) => client.insert(EventsClient::new(connection)),
                Err(_) => {
                    sleep(RETRY).await;
                    continue;
                }
            },
        };
        match timeout(
            FORWARD,
            connected.forward(context::Context::default(), &request),
        )
        .await
        {
            Ok(Ok(_)) => return,
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                error!(logger, "containerd refused an event"; "topic" => topic, "error" => status.message);
                return;
            }
            Ok(Err(_)) | Err(_) => *client = None,
        }
        sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::process::Exit;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::MessageFull;
    use protobuf::well_known_types::empty::Empty;
    use std::sync::Arc;
    use tokio::sync::mpsc::UnboundedSender;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    struct Containerd {
        seen: UnboundedSender<(String, String)>,
    }

    #[async_trait::async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap();
            self.seen
                .send((envelope.topic, envelope.event.type_url.clone()))
                .unwrap();
            Ok(Empty::default())
        }
    }

    async fn containerd(path: &Path, seen: UnboundedSender<(String, String)>) -> Server {
        let _ = std::fs::remove_file(path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd { seen })));
        server.start().await.unwrap();
        server
    }

    #[test]
    fn events_have_the_names_of_their_messages() {
        fn of<M: MessageFull>(event: TaskEvent) {
            let (_, any) = encode(event);
            assert_eq!(any.unwrap().type_url, M::descriptor().full_name());
        }
        let (id, exec_id) = ("c".to_owned(), "e".to_owned());
        let exit = Exit {
            status: 1,
            at: SystemTime::now(),
        };
        of::<TaskCreate>(TaskEvent::Create {
            id: id.clone(),
            bundle: String::new(),
            rootfs: Vec::new(),
            io: crate::pod::process::Io::default(),
            pid: 1,
        });
        of::<TaskStart>(paused(1));
        of::<TaskExecAdded>(TaskEvent::ExecAdded {
            id: id.clone(),
            exec_id: exec_id.clone(),
        });
        of::<TaskExecStarted>(TaskEvent::ExecStarted {
            id: id.clone(),
            exec_id,
            pid: 1,
        });
        of::<TaskExit>(TaskEvent::Exit {
            id: id.clone(),
            process: id.clone(),
            pid: 1,
            exit,
        });
        of::<TaskDelete>(TaskEvent::Delete {
            id: id.clone(),
            pid: 1,
            exit,
        });
        of::<TaskOOM>(TaskEvent::Oom { id: id.clone() });
        of::<TaskPaused>(TaskEvent::Paused { id: id.clone() });
        of::<TaskResumed>(TaskEvent::Resumed { id });
    }

    fn paused(n: u32) -> TaskEvent {
        TaskEvent::Start {
            id: "c".into(),
            pid: n,
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_across_a_restart_of_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (seen, mut arrived) = mpsc::unbounded_channel();
        let logger = Logger::root(slog::Discard, slog::o!());
        let address = path.to_str().unwrap().to_owned();
        let publisher = Publisher::new(Some(address), "ns".into(), logger);

        // containerd is not there yet.
        publisher.publish(TaskEvent::Paused { id: "c".into() });
        let mut first = containerd(&path, seen.clone()).await;
        assert_eq!(arrived.recv().await.unwrap().0, "/tasks/paused");

        first.shutdown().await.unwrap();
        publisher.publish(paused(1));
        publisher.publish(TaskEvent::Resumed { id: "c".into() });
        publisher.publish(TaskEvent::Oom { id: "c".into() });
        let _second = containerd(&path, seen).await;
        let mut topics = Vec::new();
        for _ in 0..3 {
            topics.push(arrived.recv().await.unwrap());
        }
        let names: Vec<&str> = topics.iter().map(|(topic, _)| topic.as_str()).collect();
        assert_eq!(names, ["/tasks/start", "/tasks/resumed", "/tasks/oom"]);
        assert_eq!(topics[0].1, "containerd.events.TaskStart");
        publisher.flush(Duration::from_secs(5)).await;
    }

    fn exit(process: &str) -> TaskEvent {
        TaskEvent::Exit {
            id: "c".into(),
            process: process.into(),
            pid: 1,
            exit: Exit {
                status: 137,
                at: SystemTime::UNIX_EPOCH,
            },
        }
    }

    #[tokio::test]
    async fn a_flood_of_ooms_pushes_out_no_exit_and_does_not_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (seen, mut arrived) = mpsc::unbounded_channel();
        let lines = Lines::default();
        let logger = Logger::root(slog::Fuse(lines.clone()), slog::o!());
        let address = path.to_str().unwrap().to_owned();
        let publisher = Publisher::new(Some(address), "ns".into(), logger);

        // containerd is away, the guest's agent floods: one container, then as many as there are ids.
        for _ in 0..2 * QUEUE {
            publisher.publish(TaskEvent::Oom { id: "c".into() });
        }
        for n in 0..2 * QUEUE {
            publisher.publish(TaskEvent::Oom {
                id: format!("c{n}"),
            });
        }
        for n in 0..RESERVED - 1 {
            publisher.publish(exit(&format!("e{n}")));
        }
        publisher.publish(exit("c"));
        assert_eq!(
            lines.0.lock().unwrap().len(),
            2,
            "the first loss, and how many"
        );

        let _containerd = containerd(&path, seen).await;
        let mut exits = 0;
        let mut ooms = 0;
        while exits < RESERVED {
            match arrived.recv().await.unwrap().0.as_str() {
                "/tasks/oom" => ooms += 1,
                _ => exits += 1,
            }
        }
        assert!(ooms <= QUEUE - RESERVED + 1, "{ooms}");
    }

    #[test]
    fn oom_events_of_a_container_are_thinned_out_until_it_is_deleted() {
        let shared = Shared::default();
        let now = Instant::now();
        let oom = |id: &str| TaskEvent::Oom { id: id.into() };
        assert!(shared.admits(&oom("a"), now));
        assert!(!shared.admits(&oom("a"), now + OOM_GAP / 2));
        assert!(shared.admits(&oom("b"), now));
        assert!(shared.admits(&oom("a"), now + OOM_GAP));
        assert!(shared.admits(&exit("a"), now + OOM_GAP));
        let TaskEvent::Exit { exit, .. } = exit("a") else {
            unreachable!();
        };
        let delete = TaskEvent::Delete {
            id: "a".into(),
            pid: 1,
            exit,
        };
        assert!(shared.admits(&delete, now + OOM_GAP));
        assert!(shared.admits(&oom("a"), now + OOM_GAP));
    }

    /// Keeps the messages of log lines.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    impl slog::Drain for Lines {
        type Ok = ();
        type Err = slog::Never;
        fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
            self.0.lock().unwrap().push(record.msg().to_string());
            Ok(())
        }
    }

    #[tokio::test]
    async fn without_an_address_publishing_and_flushing_do_nothing() {
        let logger = Logger::root(slog::Discard, slog::o!());
        let publisher = Publisher::new(None, "ns".into(), logger);
        publisher.publish(paused(1));
        publisher.flush(Duration::from_secs(5)).await;
    }
}
