//! The shim's end of the control socket to brig-vmm: requests with replies, and events.
//!
//! One task owns the socket. The VMM faces the guest and is not trusted: replies to unknown ids are
//! dropped, sizes are bounded by the protocol, and its events only ever touch what was opened here.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::node::watched::watched;
use brig_hypervisor::control::{
    self, Counters, DebugRequest, DeviceConfig, ErrorReply, Event, FromVmm, ReplyBody, Request,
    RequestBody, Stopped, StreamConfig, VmConfig,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Why a request over the control socket failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The VMM refused it.
    #[error(transparent)]
    Refused(#[from] ErrorReply),
    /// The VMM has ended; its process says why.
    #[error("the VMM has ended")]
    Ended,
    /// The VMM lives but does not answer.
    #[error("the VMM did not {what} within {:.0} s", limit.as_secs_f64())]
    Silent {
        /// What it was asked to do.
        what: String,
        /// How long that was waited for.
        limit: Duration,
    },
    /// The VMM answered something else than was asked.
    #[error("the VMM gave an answer of another kind")]
    Confused,
}

type Result<T> = std::result::Result<T, ControlError>;

/// The VMM answers from its event loop, in microseconds; building the machine takes longest. Far above
/// that also under emulation, so it is met by a VMM that no longer plays by the rules alone.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Requests that wait to be sent.
const QUEUE: usize = 64;
/// Events that wait for the pod; more are dropped, for they are only told of.
const EVENTS: usize = 256;

type ReplySender = oneshot::Sender<std::result::Result<ReplyBody, ErrorReply>>;

type Answer = oneshot::Receiver<std::result::Result<ReplyBody, ErrorReply>>;

async fn answered(answer: Answer) -> Result<ReplyBody> {
    Ok(answer.await.map_err(|_| ControlError::Ended)??)
}

struct Command {
    body: RequestBody,
    fds: Vec<OwnedFd>,
    reply: ReplySender,
    closed: Option<(u64, oneshot::Sender<()>)>,
}

/// Sends requests; cheap to clone. When the last clone is gone the socket is closed and the VMM ends.
#[derive(Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
}

/// What the VMM says by itself.
pub struct Incoming {
    /// Resolves when the agent's stream is open.
    pub agent_connected: oneshot::Receiver<()>,
    /// Boot marks and console lines; ends with the connection.
    pub events: mpsc::Receiver<Event>,
}

/// A machine that has started.
#[derive(Debug)]
pub struct Started {
    /// The functions of its devices of the node.
    pub functions: Vec<u8>,
    /// Its guest goes on from the template.
    pub cloned: bool,
    /// Why not, if there was one.
    pub refused: Option<String>,
}

/// Resolves when the stream has ended or its VMM has.
pub type StreamEnd = oneshot::Receiver<()>;

impl Control {
    /// Starts the task that owns our end of the socket.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking or watched.
    pub fn start(socket: OwnedFd) -> io::Result<(Self, Incoming)> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let socket = watched(socket, Interest::READABLE | Interest::WRITABLE)?;
        let (commands, queue) = mpsc::channel(QUEUE);
        let (event_sender, events) = mpsc::channel(EVENTS);
        let (connected, agent_connected) = oneshot::channel();
        let task = Task {
            socket,
            next_id: 1,
            replies: HashMap::new(),
            streams: HashMap::new(),
            connected: Some(connected),
            events: event_sender,
        };
        tokio::spawn(task.run(queue));
        let incoming = Incoming {
            agent_connected,
            events,
        };
        Ok((Self { commands }, incoming))
    }

    /// Sends a request; its answer follows.
    async fn tell(
        &self,
        body: RequestBody,
        fds: Vec<OwnedFd>,
        closed: Option<(u64, oneshot::Sender<()>)>,
    ) -> Result<Answer> {
        let (reply, answer) = oneshot::channel();
        let command = Command {
            body,
            fds,
            reply,
            closed,
        };
        let sent = self.commands.send(command).await;
        sent.map_err(|_| ControlError::Ended)?;
        Ok(answer)
    }

    /// Sends a request and waits for its answer, however long that takes.
    async fn ask(
        &self,
        body: RequestBody,
        fds: Vec<OwnedFd>,
        closed: Option<(u64, oneshot::Sender<()>)>,
    ) -> Result<ReplyBody> {
        answered(self.tell(body, fds, closed).await?).await
    }

    /// As [`Self::ask`], for what takes the VMM no time.
    async fn send(
        &self,
        body: RequestBody,
        fds: Vec<OwnedFd>,
        closed: Option<(u64, oneshot::Sender<()>)>,
    ) -> Result<ReplyBody> {
        timeout(ANSWER_LIMIT, self.ask(body, fds, closed))
            .await
            .unwrap_or_else(|_| {
                Err(ControlError::Silent {
                    what: "answer".to_owned(),
                    limit: ANSWER_LIMIT,
                })
            })
    }

    /// Sends a request whose answer is only its success.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn request(&self, body: RequestBody, fds: Vec<OwnedFd>) -> Result<()> {
        self.send(body, fds, None).await.map(drop)
    }

    /// Builds the machine and starts it. Sets no limit: with devices of the node it takes as long as there is memory.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn begin(&self, machine: Box<VmConfig>, fds: Vec<OwnedFd>) -> Result<Started> {
        match self.ask(RequestBody::Start(machine), fds, None).await? {
            ReplyBody::Started {
                functions,
                cloned,
                refused,
            } => Ok(Started {
                functions,
                cloned,
                refused,
            }),
            _ => Err(ControlError::Confused),
        }
    }

    /// Opens a stream; the returned future resolves at its end.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn open_stream(&self, stream: StreamConfig, fds: Vec<OwnedFd>) -> Result<StreamEnd> {
        let (closed, end) = oneshot::channel();
        let number = stream.stream;
        let body = RequestBody::OpenStream(stream);
        self.send(body, fds, Some((number, closed))).await?;
        Ok(end)
    }

    /// Boot marks and exit counters.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn counters(&self) -> Result<Counters> {
        match self.send(RequestBody::Counters, Vec::new(), None).await? {
            ReplyBody::Counters(counters) => Ok(counters),
            _ => Err(ControlError::Confused),
        }
    }

    /// Stops the CPUs, looks at them or lets them go on; what is in them, if they stand.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn debug(&self, request: DebugRequest) -> Result<Option<Stopped>> {
        match self
            .send(RequestBody::Debug(request), Vec::new(), None)
            .await?
        {
            ReplyBody::Debug(stopped) => Ok(stopped),
            _ => Err(ControlError::Confused),
        }
    }

    /// Says how much memory the guest is to have; where its device is, and what the guest has now.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn memory(&self, bytes: u64) -> Result<(Option<u8>, u64)> {
        let body = RequestBody::Memory { bytes };
        match self.send(body, Vec::new(), None).await? {
            ReplyBody::Memory { function, bytes } => Ok((function, bytes)),
            _ => Err(ControlError::Confused),
        }
    }

    /// Plugs a device in; its function. Sets no limit: whoever stops waiting does not know whether the VMM has it.
    ///
    /// # Errors
    /// [`ControlError`].
    pub(super) async fn plug(self, device: DeviceConfig, fds: Vec<OwnedFd>) -> Result<u8> {
        let answer = self.tell(RequestBody::Plug(device), fds, None).await?;
        // Else a VMM that never answers would be kept by whoever waits for it.
        drop(self);
        match answered(answer).await? {
            ReplyBody::Plugged { function } => Ok(function),
            _ => Err(ControlError::Confused),
        }
    }

    /// Takes a device from the machine; when this returns, the VMM has nothing of it. Sets no limit, as [`Self::plug`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub(super) async fn unplug(self, function: u8) -> Result<()> {
        let body = RequestBody::Unplug { function };
        let answer = self.tell(body, Vec::new(), None).await?;
        drop(self);
        answered(answer).await.map(drop)
    }
}

struct Task {
    socket: AsyncFd<OwnedFd>,
    next_id: u64,
    replies: HashMap<u64, ReplySender>,
    streams: HashMap<u64, oneshot::Sender<()>>,
    connected: Option<oneshot::Sender<()>>,
    events: mpsc::Sender<Event>,
}

impl Task {
    /// Runs until the VMM closes its end or nobody can send any more. Dropping the maps then tells
    /// every waiter.
    async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = queue.recv() => {
                    let Some(command) = command else { return };
                    if self.transmit(command).await.is_err() {
                        // What the VMM said before it went is still to be read.
                        self.drain();
                        return;
                    }
                }
                message = receive(&self.socket) => match message {
                    Ok(Some(message)) => self.take(message),
                    _ => return,
                }
            }
        }
    }

    async fn transmit(&mut self, command: Command) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        self.replies.insert(id, command.reply);
        if let Some((stream, closed)) = command.closed {
            self.streams.insert(stream, closed);
        }
        let request = Request {
            id,
            body: command.body,
        };
        let fds: Vec<_> = command.fds.iter().map(AsFd::as_fd).collect();
        let send = |socket: &OwnedFd| control::send(socket.as_fd(), &request, &fds);
        match self.socket.async_io(Interest::WRITABLE, send).await {
            // Too large: the fault of this request alone.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                if let Some(reply) = self.replies.remove(&id) {
                    let _ = reply.send(Err(ErrorReply {
                        kind: control::ErrorKind::Invalid,
                        message: error.to_string(),
                    }));
                }
                Ok(())
            }
            result => result,
        }
    }

    fn drain(&mut self) {
        while let Ok(Some(message)) = control::receive_from_vmm(self.socket.get_ref().as_fd()) {
            self.take(message);
        }
    }

    fn take(&mut self, message: FromVmm) {
        match message {
            FromVmm::Reply(reply) => {
                if let Some(waiter) = self.replies.remove(&reply.id) {
                    let _ = waiter.send(reply.result);
                }
            }
            FromVmm::Event(Event::StreamClosed { stream, .. }) => {
                if let Some(waiter) = self.streams.remove(&stream) {
                    let _ = waiter.send(());
                }
            }
            FromVmm::Event(event) => {
                if matches!(event, Event::AgentConnected { .. })
                    && let Some(waiter) = self.connected.take()
                {
                    let _ = waiter.send(());
                }
                let _ = self.events.try_send(event);
            }
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<FromVmm>> {
    let read = |socket: &OwnedFd| control::receive_from_vmm(socket.as_fd());
    socket.async_io(Interest::READABLE, read).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_hypervisor::control::{ErrorKind, Reply};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn stream(number: u64) -> StreamConfig {
        StreamConfig {
            stream: number,
            port: 1025,
            header: Vec::new(),
            input: None,
            output: Some(0),
        }
    }

    /// A VMM that answers each request by `answer`, then what `answer` adds.
    fn vmm(socket: OwnedFd, answer: impl Fn(Request, usize) -> Vec<FromVmm> + Send + 'static) {
        std::thread::spawn(move || {
            while let Ok(Some((request, fds))) = control::receive::<Request>(socket.as_fd()) {
                for message in answer(request, fds.len()) {
                    control::send(socket.as_fd(), &message, &[]).unwrap();
                }
            }
        });
    }

    fn done(id: u64) -> FromVmm {
        FromVmm::Reply(Reply {
            id,
            result: Ok(ReplyBody::Done),
        })
    }

    #[tokio::test]
    async fn replies_find_their_request_and_unknown_ones_are_dropped() {
        let (ours, theirs) = pair();
        vmm(theirs, |request, _| {
            let refused = FromVmm::Reply(Reply {
                id: request.id,
                result: Err(ErrorReply {
                    kind: ErrorKind::Limit,
                    message: "full".into(),
                }),
            });
            vec![done(999), refused]
        });
        let (control, _incoming) = Control::start(ours).unwrap();
        let error = control
            .request(RequestBody::Stop, vec![])
            .await
            .unwrap_err();
        assert!(matches!(error, ControlError::Refused(reply) if reply.message == "full"));
    }

    #[tokio::test]
    async fn a_stream_end_is_told_even_when_it_comes_with_the_reply() {
        let (ours, theirs) = pair();
        vmm(theirs, |request, fds| {
            assert_eq!(fds, 1);
            let closed = FromVmm::Event(Event::StreamClosed {
                stream: 16,
                reset: false,
            });
            vec![done(request.id), closed]
        });
        let (control, _incoming) = Control::start(ours).unwrap();
        let (_, output) = rustix::pipe::pipe().unwrap();
        let end = control.open_stream(stream(16), vec![output]).await.unwrap();
        end.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_vmm_ends_streams_requests_and_events() {
        let (ours, theirs) = pair();
        let (control, mut incoming) = Control::start(ours).unwrap();
        let asked = tokio::spawn(async move { control.request(RequestBody::Stop, vec![]).await });
        tokio::task::yield_now().await;
        control::send(
            theirs.as_fd(),
            &FromVmm::Event(Event::Console {
                line: "Oops".into(),
            }),
            &[],
        )
        .unwrap();
        drop(theirs);
        let error = asked.await.unwrap().unwrap_err();
        assert!(matches!(error, ControlError::Ended));
        let last = incoming.events.recv().await.unwrap();
        assert!(matches!(last, Event::Console { line } if line == "Oops"));
        assert!(incoming.events.recv().await.is_none());
        assert!(incoming.agent_connected.await.is_err());
    }
}
