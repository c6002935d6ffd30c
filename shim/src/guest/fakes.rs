//! Stand-ins for the node, the VMM and the guest's agent, for the tests of the shim's logic: a child
//! process with a control-socket thread instead of brig-vmm, and a ttrpc server instead of the agent.

pub(crate) mod raw;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ChildStdin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use brig_agent_protocol::agent::{
    AdjustClockRequest, AdjustClockResponse, ConnectPortRequest, ContainerRef,
    CreateContainerRequest, CreateExecRequest, Empty, Event, LookRequest, LookResponse,
    MemoryFigures, ProcessExited, ProcessList, ProcessRef, ProcessStarted, ResizeMemoryRequest,
    ResizePtyRequest, SetCpusRequest, ShutdownRequest, SignalRequest, StartSandboxRequest,
    StartSandboxResponse, StatsResponse, UpdateRequest, UpdateVolumeRequest, VolumeRef, event,
};
use brig_agent_protocol::agent_ttrpc::{Agent, create_agent};
use brig_hypervisor::control::{
    self, Counters, DebugRequest, DeviceConfig, Event as VmmEvent, FromVmm, Registers, Reply,
    ReplyBody, Request, RequestBody, Stopped, VmConfig,
};
use futures::StreamExt as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::sync::mpsc;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext};

use crate::error::{Error, Result};
use crate::guest::vm::watch::tests::FakeProcess;
use crate::guest::vm::{
    Attributes, GuestOrigin, Host, LaterMount, Launched, LeftOut, Mounts, Plan, RootfsMount,
};
use crate::node::cgroup::Cgroup;

/// What was asked of the fakes, in order.
#[derive(Clone, Default)]
pub(crate) struct Record {
    entries: Arc<Mutex<Vec<String>>>,
    added: Arc<tokio::sync::Notify>,
}

impl Record {
    pub(crate) fn add(&self, entry: impl Into<String>) {
        self.entries.lock().unwrap().push(entry.into());
        self.added.notify_waiters();
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.entries.lock().unwrap().clone()
    }

    pub(crate) fn has(&self, entry: &str) -> bool {
        self.all().iter().any(|seen| seen == entry)
    }

    /// Waits until this was asked.
    pub(crate) async fn until(&self, entry: &str) {
        loop {
            // Before the look, so that what is added in between is not missed.
            let added = self.added.notified();
            if self.has(entry) {
                return;
            }
            added.await;
        }
    }

    fn position(&self, entry: &str) -> usize {
        let all = self.all();
        all.iter()
            .position(|seen| seen == entry)
            .unwrap_or_else(|| panic!("no {entry} in {all:?}"))
    }

    /// Whether one entry came before another.
    pub(crate) fn in_order(&self, first: &str, second: &str) -> bool {
        self.position(first) < self.position(second)
    }
}

/// How the fakes behave.
#[derive(Clone, Default)]
pub(crate) struct Behaviour {
    /// The VMM refuses to build the machine with this sentence.
    pub(crate) refuse_start: Option<String>,
    /// The VMM takes this long to be launched.
    pub(crate) slow_launch: Duration,
    /// The agent never calls.
    pub(crate) silent_agent: bool,
    /// The VMM ends with this code instead of starting the machine.
    pub(crate) die_with: Option<i32>,
    /// CreateContainer is never answered.
    pub(crate) stuck_create: bool,
    /// CreateContainer is answered after this time.
    pub(crate) slow_create: Duration,
    /// Processes end by themselves as soon as they are started, even before the answer says so.
    pub(crate) exits_at_once: Option<u32>,
    /// The guest's clock is ahead by so many seconds.
    pub(crate) clock_ahead: i64,
    /// StartProcess of this exec fails.
    pub(crate) unstartable: Option<String>,
    /// What a process writes to each of its outputs before it ends.
    pub(crate) last_words: &'static str,
    /// Something keeps the outputs of an exec open after its end, until it is deleted.
    pub(crate) left_behind: bool,
    /// Processes take all of the grace of a Shutdown, and more.
    pub(crate) stubborn: bool,
    /// Bytes that the guest could do without.
    pub(crate) spare: Option<u64>,
    /// The most bytes beyond those of its start that it takes.
    pub(crate) takes: Option<u64>,
    /// The least that it keeps of them.
    pub(crate) keeps: u64,
    /// The agent is one that breaks the rules.
    pub(crate) raw: Option<raw::RawAgent>,
}

/// A node whose VMs are fakes.
pub(crate) struct FakeHost {
    pub(crate) record: Record,
    pub(crate) behaviour: Behaviour,
    runtime: tokio::runtime::Handle,
    streams: Streams,
    power: Power,
    /// The VMM's end of the control socket.
    control: Mutex<Option<OwnedFd>>,
}

impl FakeHost {
    /// The VM dies, after having written this to every output.
    pub(crate) fn crash(&self, last: &str) {
        for (_, ends) in self.streams.lock().unwrap().drain() {
            for end in ends {
                // Standard input's end does not take it.
                let _ = rustix::io::write(&end, last.as_bytes());
            }
        }
        self.power.lock().unwrap().take();
        let control = self.control.lock().unwrap().take().unwrap();
        let _ = rustix::net::shutdown(&control, rustix::net::Shutdown::Both);
    }

    pub(crate) fn new(behaviour: Behaviour) -> Arc<Self> {
        Arc::new(Self {
            record: Record::default(),
            behaviour,
            runtime: tokio::runtime::Handle::current(),
            streams: Streams::default(),
            power: Power::default(),
            control: Mutex::default(),
        })
    }
}

impl Host for FakeHost {
    fn launch(&self, plan: &Plan) -> Result<Launched> {
        self.record.add(format!("launch {}", plan.memory));
        std::thread::sleep(self.behaviour.slow_launch);
        let (control, vmm_control) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| Error::io("socketpair", &errno.into()))?;
        let failed = |error: io::Error| Error::io("fake", &error);
        let (agent, vmm_agent) = UnixStream::pair().map_err(failed)?;
        let (stderr, vmm_stderr) = rustix::pipe::pipe().map_err(|errno| failed(errno.into()))?;
        let script = match self.behaviour.die_with {
            Some(code) => format!("read x; exit {code}"),
            None => "read x; exit 0".to_owned(),
        };
        let (process, stdin) = FakeProcess::with_stdin(&script);
        *self.power.lock().unwrap() = Some(stdin);
        *self.control.lock().unwrap() = Some(vmm_control.try_clone().map_err(failed)?);
        let vmm = FakeVmm {
            record: self.record.clone(),
            behaviour: self.behaviour.clone(),
            runtime: self.runtime.clone(),
            agent: Some(vmm_agent),
            streams: Arc::clone(&self.streams),
            power: Arc::clone(&self.power),
            plugged: 0,
            memory: Arc::new(AtomicU64::new(plan.memory)),
            _stderr: vmm_stderr,
        };
        std::thread::spawn(move || vmm.run(vmm_control));
        let machine = VmConfig {
            vcpus: 1,
            max_vcpus: plan.config.max_vcpus,
            memory_bytes: plan.memory,
            max_memory_bytes: plan.max_memory,
            kvm: 0,
            kernel: 0,
            initramfs: 0,
            cmdline: String::new(),
            template: None,
            capture: None,
            agent: 0,
            nets: Vec::new(),
            disks: Vec::new(),
            share_tag: None,
            debug_console: false,
            debugger: plan.config.debug,
            allow_slow_kvm: false,
            passthrough: false,
            devices: Vec::new(),
        };
        Ok(Launched {
            process: Box::new(process),
            control,
            agent,
            stderr,
            mounts: Arc::new(FakeMounts(self.record.clone())),
            origin: GuestOrigin::Boot,
            machine: (machine, Vec::new()),
            network: crate::node::network::GuestNetwork::default(),
            netns: None,
            given: None,
        })
    }

    fn make_cgroup(&self, path: &str) -> Result<Option<Cgroup>> {
        self.record.add(format!("cgroup {path}"));
        Ok(None)
    }
}

struct FakeMounts(Record);

impl Mounts for FakeMounts {
    fn attach_rootfs(&self, path: &str, _: &[RootfsMount]) -> Result<()> {
        self.0.add(format!("attach {path}"));
        Ok(())
    }
    fn attach(&self, path: &str, source: &Path, how: Attributes) -> Result<Vec<LeftOut>> {
        if !source.exists() {
            return Err(Error::not_found(format!("{} is missing", source.display())));
        }
        let mode = match (how.readonly, how.writable_below) {
            (false, _) => "",
            (true, false) => " ro",
            (true, true) => " ro, writable below",
        };
        let mapped = if how.id_map.is_some() { " mapped" } else { "" };
        self.0.add(format!("attach {path}{mode}{mapped}"));
        Ok(Vec::new())
    }
    fn attach_below(&self, path: &str, later: &LaterMount<'_>, readonly: bool) -> Result<()> {
        let mode = if readonly { " ro" } else { "" };
        self.0
            .add(format!("attach {path} below {}{mode}", later.way.display()));
        Ok(())
    }
    fn detach_below(&self, path: &str, below: &Path) -> Result<()> {
        self.0
            .add(format!("detach {path} below {}", below.display()));
        Ok(())
    }
    fn set_readonly(&self, path: &str, readonly: bool) -> Result<()> {
        let mode = if readonly { "ro" } else { "rw" };
        self.0.add(format!("remount {path} {mode}"));
        Ok(())
    }
    fn detach(&self, path: &str) -> Result<()> {
        self.0.add(format!("detach {path}"));
        Ok(())
    }
}

/// Descriptors of the open streams; with one the stream goes.
type Streams = Arc<Mutex<HashMap<u64, Vec<OwnedFd>>>>;
/// The fake VMM's process runs as long as this is there.
type Power = Arc<Mutex<Option<ChildStdin>>>;

struct FakeVmm {
    record: Record,
    behaviour: Behaviour,
    runtime: tokio::runtime::Handle,
    agent: Option<UnixStream>,
    streams: Streams,
    power: Power,
    /// Devices it was ever given.
    plugged: u8,
    /// Bytes that the guest is to have.
    memory: Arc<AtomicU64>,
    _stderr: OwnedFd,
}

impl FakeVmm {
    fn run(mut self, socket: OwnedFd) {
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
                    Behaviour { silent_agent, .. } => {
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
                RequestBody::Plug(device) => {
                    self.record.add(match &device {
                        DeviceConfig::Net(net) => format!("plug {} taps", net.taps.len()),
                        DeviceConfig::Disk(disk) => format!("plug disk {}", disk.serial),
                        DeviceConfig::Vfio(vfio) => format!("plug {}", vfio.name),
                    });
                    self.plugged += 1;
                    let function = 0x20 + self.plugged;
                    Ok(ReplyBody::Plugged { function })
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
            let reply = Reply {
                id: request.id,
                result,
            };
            let _ = control::send(socket.as_fd(), &FromVmm::Reply(reply), &[]);
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

fn tell(socket: &OwnedFd, event: VmmEvent) {
    let _ = control::send(socket.as_fd(), &FromVmm::Event(event), &[]);
}

fn close(streams: &Streams, socket: &OwnedFd, stream: u64) {
    if streams.lock().unwrap().remove(&stream).is_some() {
        let reset = false;
        tell(socket, VmmEvent::StreamClosed { stream, reset });
    }
}

struct FakeAgent {
    record: Record,
    behaviour: Behaviour,
    events: mpsc::UnboundedSender<Event>,
    subscribed: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    /// Streams by exec id.
    processes: Mutex<HashMap<String, Vec<u64>>>,
    /// Those of processes that have ended.
    left: Mutex<HashMap<String, Vec<Vec<u64>>>>,
    streams: Streams,
    power: Power,
    control: Arc<OwnedFd>,
    /// Nanoseconds.
    clock_moved: Mutex<i64>,
}

impl FakeAgent {
    /// The process ends: its streams close and the event goes out.
    fn end(&self, id: &str, exec_id: &str, status: u32) {
        let mut numbers = self.processes.lock().unwrap().remove(exec_id);
        if self.behaviour.left_behind && !exec_id.is_empty() {
            let kept = numbers.take().into_iter().collect();
            self.left.lock().unwrap().insert(exec_id.to_owned(), kept);
        }
        for number in numbers.into_iter().flatten() {
            for end in self
                .streams
                .lock()
                .unwrap()
                .get(&number)
                .into_iter()
                .flatten()
            {
                // Standard input's end does not take it.
                let _ = rustix::io::write(end, self.behaviour.last_words.as_bytes());
            }
            close(&self.streams, &self.control, number);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let exit = event::Exit {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            exit: Some(ProcessExited {
                pid: 7,
                status,
                exited_at_unix_ns: u64::try_from(now.as_nanos()).unwrap(),
                ..ProcessExited::default()
            })
            .into(),
            ..event::Exit::default()
        };
        let _ = self.events.send(Event {
            kind: Some(event::Kind::Exit(exit)),
            ..Event::default()
        });
    }

    fn keep(&self, exec_id: &str, stdio: &brig_agent_protocol::agent::Stdio) {
        let numbers = [stdio.stdin, stdio.stdout, stdio.stderr];
        let numbers = numbers.into_iter().filter(|&number| number != 0).collect();
        let mut processes = self.processes.lock().unwrap();
        processes.insert(exec_id.to_owned(), numbers);
    }
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Agent for FakeAgent {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Answer<StartSandboxResponse> {
        self.record.add(format!("sandbox {}", request.hostname));
        Ok(StartSandboxResponse::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<ProcessStarted> {
        self.record.add(format!("create {}", request.id));
        if !request.pid_namespace_of.is_empty() {
            let joins = format!("{} joins {}", request.id, request.pid_namespace_of);
            self.record.add(joins);
        }
        if self.behaviour.stuck_create {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(self.behaviour.slow_create).await;
        self.record.add(format!("created {}", request.id));
        self.keep("", &request.stdio);
        Ok(ProcessStarted::default())
    }

    async fn look(&self, _: &TtrpcContext, request: LookRequest) -> Answer<LookResponse> {
        let mut answer = LookResponse::default();
        match request.words.first().map(String::as_str) {
            // An answer without end.
            Some("cat") | None => {
                answer.content = vec![b'x'; 20_000];
                answer.more = true;
            }
            Some(word) => answer.content = format!("{word}\u{1b}[2J").into_bytes(),
        }
        Ok(answer)
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> Answer<Empty> {
        self.record.add(format!("exec {}", request.exec_id));
        self.keep(&request.exec_id, &request.stdio);
        Ok(Empty::new())
    }

    async fn start_process(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<ProcessStarted> {
        self.record.add(format!("start {}", request.exec_id));
        if self.behaviour.unstartable.as_deref() == Some(&request.exec_id) {
            return Err(Error::invalid("exec format error").into());
        }
        if let Some(status) = self.behaviour.exits_at_once {
            self.end(&request.id, &request.exec_id, status);
            // The event is on its way; the answer follows later.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(ProcessStarted {
            pid: 40 + u32::from(!request.exec_id.is_empty()),
            ..ProcessStarted::default()
        })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalRequest) -> Answer<Empty> {
        self.record
            .add(format!("signal {} {}", request.signal, request.exec_id));
        if request.signal == 9 {
            self.end(&request.id, &request.exec_id, 137);
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        self.record
            .add(format!("resize {}x{}", request.rows, request.columns));
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, _: ProcessRef) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<ProcessExited> {
        self.record.add(format!("delete {}", request.exec_id));
        let left = self.left.lock().unwrap().remove(&request.exec_id);
        for number in left.into_iter().flatten().flatten() {
            close(&self.streams, &self.control, number);
        }
        Ok(ProcessExited::default())
    }

    async fn list_processes(&self, _: &TtrpcContext, _: ContainerRef) -> Answer<ProcessList> {
        Ok(ProcessList {
            pids: vec![40, 41],
            ..ProcessList::default()
        })
    }

    async fn pause_container(&self, _: &TtrpcContext, _: ContainerRef) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: ContainerRef) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateRequest) -> Answer<Empty> {
        let text = String::from_utf8_lossy(&request.resources).into_owned();
        self.record.add(format!("update {text}"));
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRef) -> Answer<StatsResponse> {
        Ok(StatsResponse {
            pids_current: 2,
            ..StatsResponse::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        sender: ServerStreamSender<Event>,
    ) -> Answer<()> {
        let mut events = self.subscribed.lock().await;
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }

    /// Noted as the volume's id, its links with their targets and its other entries' names.
    async fn update_volume(&self, _: &TtrpcContext, request: UpdateVolumeRequest) -> Answer<Empty> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let names = request
            .entries
            .iter()
            .filter(|entry| !entry.path.is_empty());
        let names: Vec<String> = names
            .map(|entry| match entry.mode & libc::S_IFMT {
                libc::S_IFLNK => format!("{}>{}", text(&entry.path), text(&entry.content)),
                _ => text(&entry.path),
            })
            .collect();
        if names.iter().any(|name| name == "refused-once") && !self.record.has("refused") {
            self.record.add("refused");
            return Err(Error::internal("no space").into());
        }
        self.record
            .add(format!("volume {} {}", request.id, names.join(" ")));
        Ok(Empty::new())
    }

    async fn remove_volume(&self, _: &TtrpcContext, request: VolumeRef) -> Answer<Empty> {
        self.record.add(format!("remove volume {}", request.id));
        Ok(Empty::new())
    }

    async fn memory(&self, _: &TtrpcContext, _: Empty) -> Answer<MemoryFigures> {
        Ok(MemoryFigures {
            available: self.behaviour.spare.unwrap_or(u64::MAX),
            ..MemoryFigures::default()
        })
    }

    async fn resize_memory(
        &self,
        _: &TtrpcContext,
        request: ResizeMemoryRequest,
    ) -> Answer<MemoryFigures> {
        self.record.add(format!("memory {}", request.added));
        let most = self.behaviour.takes.unwrap_or(u64::MAX);
        let least = self.behaviour.keeps;
        Ok(MemoryFigures {
            added: request.added.min(most).max(least),
            ..MemoryFigures::default()
        })
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: SetCpusRequest) -> Answer<Empty> {
        self.record.add(format!("online {}", request.count));
        Ok(Empty::new())
    }

    async fn drop_caches(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        self.record.add("drop_caches");
        Ok(Empty::new())
    }

    /// Somebody listens on every port but 9.
    async fn connect_port(&self, _: &TtrpcContext, request: ConnectPortRequest) -> Answer<Empty> {
        self.record.add(format!("connect {}", request.port));
        if request.port == 9 {
            return Err(Error::state("nobody listens").into());
        }
        Ok(Empty::new())
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> Answer<AdjustClockResponse> {
        let mut moved = self.clock_moved.lock().unwrap();
        if request.offset_ns != 0 {
            *moved += request.offset_ns;
            let seconds = request.offset_ns / 1_000_000_000;
            self.record.add(format!("clock moved {seconds} s"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = i64::try_from(now.as_nanos()).unwrap() + *moved;
        Ok(AdjustClockResponse {
            unix_time_ns: u64::try_from(now).unwrap(),
            ..AdjustClockResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        self.record.add(match request.grace_ms {
            0 => "shutdown".to_owned(),
            grace => format!("shutdown after {grace} ms"),
        });
        if self.behaviour.stubborn && request.grace_ms > 0 {
            std::future::pending::<()>().await;
        }
        self.power.lock().unwrap().take();
        let both = rustix::net::Shutdown::Both;
        let _ = rustix::net::shutdown(&*self.control, both);
        Ok(Empty::new())
    }
}
