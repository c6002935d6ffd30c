//! A ttrpc server that answers as the guest's agent does.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use brig_agent_protocol::agent::{
    AdjustClockRequest, AdjustClockResponse, ConnectPortRequest, ContainerRef,
    CreateContainerRequest, CreateExecRequest, DeviceRef, Empty, Event, FindDeviceRequest,
    FoundDevice, LookRequest, LookResponse, MemoryFigures, ProcessExited, ProcessList, ProcessRef,
    ProcessStarted, ResizeMemoryRequest, ResizePtyRequest, SetCpusRequest, ShutdownRequest,
    SignalRequest, StartSandboxRequest, StartSandboxResponse, StatsResponse, UpdateRequest,
    UpdateVolumeRequest, VolumeRef, event,
};
use brig_agent_protocol::agent_ttrpc::Agent;
use tokio::sync::mpsc;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use super::vmm::close;
use super::{Behaviour, Power, Record, Streams};
use crate::error::Error;

pub(super) struct FakeAgent {
    pub(super) record: Record,
    pub(super) behaviour: Behaviour,
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) subscribed: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    /// Streams by exec id.
    pub(super) processes: Mutex<HashMap<String, Vec<u64>>>,
    /// Those of processes that have ended.
    pub(super) left: Mutex<HashMap<String, Vec<Vec<u64>>>>,
    pub(super) streams: Streams,
    pub(super) power: Power,
    pub(super) control: Arc<OwnedFd>,
    /// Nanoseconds.
    pub(super) clock_moved: Mutex<i64>,
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
        if request.stdio.rows != 0 {
            let (rows, columns) = (request.stdio.rows, request.stdio.columns);
            self.record.add(format!("sized {rows}x{columns}"));
        }
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
        let hangs = self.behaviour.unkillable.contains(&request.id.as_str());
        if request.signal == 9 && !hangs {
            self.end(&request.id, &request.exec_id, 137);
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        self.record
            .add(format!("resize {}x{}", request.rows, request.columns));
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<Empty> {
        self.record
            .add(format!("close stdin of {}", request.exec_id));
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
        tokio::time::sleep(self.behaviour.slow_update).await;
        match self.behaviour.refuse_update {
            Some(part) if text.contains(part) => Err(Error::invalid("no such limit").into()),
            _ => Ok(Empty::new()),
        }
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

    async fn find_device(
        &self,
        _: &TtrpcContext,
        request: FindDeviceRequest,
    ) -> Answer<FoundDevice> {
        self.record.add(format!("find {:#x}", request.function));
        tokio::time::sleep(self.behaviour.slow_bus).await;
        self.record.add(format!("found {:#x}", request.function));
        Ok(FoundDevice::default())
    }

    async fn remove_device(&self, _: &TtrpcContext, request: DeviceRef) -> Answer<Empty> {
        self.record.add(format!("remove {:#x}", request.function));
        tokio::time::sleep(self.behaviour.slow_bus).await;
        Ok(Empty::new())
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
        tokio::time::sleep(self.behaviour.slow_shutdown).await;
        self.power.lock().unwrap().take();
        let both = rustix::net::Shutdown::Both;
        let _ = rustix::net::shutdown(&*self.control, both);
        Ok(Empty::new())
    }
}
