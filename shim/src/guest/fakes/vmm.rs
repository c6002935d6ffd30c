//! A thread that answers a control socket as the VMM does.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use brig_agent_protocol::agent_ttrpc::create_agent;
use brig_hypervisor::control::{
    self, Counters, DebugRequest, DeviceConfig, Event as VmmEvent, FromVmm, Registers, Reply,
    ReplyBody, Request, RequestBody, Stopped,
};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::agent::FakeAgent;
use super::{Behaviour, Power, Record, Streams};

pub(super) struct FakeVmm {
    pub(super) record: Record,
    pub(super) behaviour: Behaviour,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) agent: Option<UnixStream>,
    pub(super) streams: Streams,
    pub(super) power: Power,
    /// Devices it was ever given.
    pub(super) plugged: u8,
    /// Bytes that the guest is to have.
    pub(super) memory: Arc<AtomicU64>,
    pub(super) _stderr: OwnedFd,
}

impl FakeVmm {
    pub(super) fn run(mut self, socket: OwnedFd) {
        let socket = Arc::new(socket);
        while let Ok(Some((request, fds))) = control::receive::<Request>(socket.as_fd()) {
            let result = match request.body {
                RequestBody::Start(_) => match &self.behaviour {
                    Behaviour {
                        die_with: Some(_), ..
                    } => break,
                    Behaviour {
                        refuse_start: Some(message),
                        ..
                    } => Err(control::ErrorReply {
                        kind: control::ErrorKind::Host,
                        message: message.clone(),
                    }),
                    Behaviour {
                        silent_agent,
                        slow_start,
                        ..
                    } => {
                        std::thread::sleep(*slow_start);
                        if !silent_agent {
                            self.start_agent(&socket);
                            tell(&socket, VmmEvent::AgentConnected { micros: 5 });
                        }
                        Ok(ReplyBody::Started {
                            functions: Vec::new(),
                            cloned: false,
                            refused: None,
                        })
                    }
                },
                RequestBody::OpenStream(stream) => {
                    self.record.add(format!("stream {}", stream.stream));
                    self.streams.lock().unwrap().insert(stream.stream, fds);
                    Ok(ReplyBody::Done)
                }
                RequestBody::CloseStream { stream } => {
                    if self.streams.lock().unwrap().contains_key(&stream) {
                        self.record.add(format!("cut {stream}"));
                    }
                    close(&self.streams, &socket, stream);
                    Ok(ReplyBody::Done)
                }
                RequestBody::ForgetShare { path } => {
                    self.record.add(format!("forget {path}"));
                    Ok(ReplyBody::Done)
                }
                RequestBody::RemoteShare { path } => {
                    self.record.add(format!("remote {path}"));
                    Ok(ReplyBody::Done)
                }
                RequestBody::Plug(device) => {
                    self.record.add(match &device {
                        DeviceConfig::Net(net) => format!("plug {} taps", net.taps.len()),
                        DeviceConfig::Disk(disk) => format!("plug disk {}", disk.serial),
                        DeviceConfig::Pmem(pmem) => format!("plug {} files", pmem.pieces.len()),
                        DeviceConfig::Vfio(vfio) => format!("plug {}", vfio.name),
                    });
                    self.plugged += 1;
                    let function = 0x20 + self.plugged;
                    let plugged = Ok(ReplyBody::Plugged { function });
                    if let Some(answered) = self.behaviour.slow_plug.clone() {
                        let (socket, id) = (Arc::clone(&socket), request.id);
                        std::thread::spawn(move || {
                            answered.wait();
                            // As the real one holds them until then.
                            drop(fds);
                            reply(&socket, id, plugged);
                        });
                        continue;
                    }
                    plugged
                }
                RequestBody::Unplug { function } => {
                    self.record.add(format!("unplug {function:#x}"));
                    Ok(ReplyBody::Done)
                }
                RequestBody::Resize { function } => {
                    self.record.add(format!("resize {function:#x}"));
                    Ok(ReplyBody::Done)
                }
                RequestBody::Memory { bytes: wanted } => {
                    self.record.add(format!("size {wanted}"));
                    let bytes = self.memory.swap(wanted, Ordering::SeqCst);
                    let function = Some(0x30);
                    Ok(ReplyBody::Memory { function, bytes })
                }
                RequestBody::Debug(request) => {
                    self.record.add(format!("debug {request:?}"));
                    let stopped = (request == DebugRequest::Stop).then(|| Stopped {
                        cpu: None,
                        cpus: vec![Registers {
                            rip: 7,
                            ..Registers::default()
                        }],
                    });
                    Ok(ReplyBody::Debug(stopped))
                }
                RequestBody::Cpus { count } => {
                    self.record.add(format!("cpus {count}"));
                    Ok(ReplyBody::Done)
                }
                RequestBody::Counters => Ok(ReplyBody::Counters(Counters {
                    exits: BTreeMap::from([("hlt".to_owned(), 3)]),
                    marks: vec![(control::mark::KERNEL_ENTRY, 4)],
                    file_requests: 0,
                    devices: Vec::new(),
                    given_up_bytes: 0,
                })),
                RequestBody::Stop => break,
            };
            reply(&socket, request.id, result);
        }
        self.power.lock().unwrap().take();
        // As by the end of its process: the host keeps a descriptor to crash it.
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
    }

    fn start_agent(&mut self, control: &Arc<OwnedFd>) {
        let Some(stream) = self.agent.take() else {
            return;
        };
        if let Some(raw) = self.behaviour.raw {
            let record = self.record.clone();
            self.runtime.spawn(async move {
                stream.set_nonblocking(true).unwrap();
                let stream = tokio::net::UnixStream::from_std(stream).unwrap();
                raw.serve(stream, record).await;
            });
            return;
        }
        let (events, subscribed) = mpsc::unbounded_channel();
        let agent = FakeAgent {
            record: self.record.clone(),
            behaviour: self.behaviour.clone(),
            events,
            subscribed: tokio::sync::Mutex::new(subscribed),
            processes: Mutex::default(),
            left: Mutex::default(),
            streams: Arc::clone(&self.streams),
            power: Arc::clone(&self.power),
            control: Arc::clone(control),
            clock_moved: Mutex::new(self.behaviour.clock_ahead * 1_000_000_000),
        };
        self.runtime.spawn(async move {
            stream.set_nonblocking(true).unwrap();
            let stream = tokio::net::UnixStream::from_std(stream).unwrap();
            let once = futures::stream::once(async move { Ok(stream) });
            let never = futures::stream::pending::<io::Result<tokio::net::UnixStream>>();
            let mut server = Server::new()
                .add_listener(Listener::new(once.chain(never)))
                .register_service(create_agent(Arc::new(agent)));
            server.start().await.unwrap();
            std::future::pending::<()>().await;
        });
    }
}

fn reply(socket: &OwnedFd, id: u64, result: Result<ReplyBody, control::ErrorReply>) {
    let reply = FromVmm::Reply(Reply { id, result });
    let _ = control::send(socket.as_fd(), &reply, &[]);
}

fn tell(socket: &OwnedFd, event: VmmEvent) {
    let _ = control::send(socket.as_fd(), &FromVmm::Event(event), &[]);
}

/// Ends a stream, if it is open.
pub(super) fn close(streams: &Streams, socket: &OwnedFd, stream: u64) {
    if streams.lock().unwrap().remove(&stream).is_some() {
        let reset = false;
        tell(socket, VmmEvent::StreamClosed { stream, reset });
    }
}
