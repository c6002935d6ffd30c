//! The main thread: takes requests from the control socket, passes events on, and decides how the
//! process ends. When the control socket closes, it ends.
//!
//! The shim is trusted; it may be slow, so what is sent waits in a bounded queue and never blocks.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use slog::{Logger, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::builder::{self, Descriptors, Plugging, StartError, Vm};
use crate::control::{
    self, Counters, DeviceWord, ErrorKind, ErrorReply, Event, FromVmm, Reply, ReplyBody, Request,
    RequestBody, StreamConfig, VmConfig, exit, mark,
};
use crate::jail::seccomp::{self, ThreadKind};
use crate::log::LAST_WORDS;
use crate::notice::{Clock, Ended, Notice, Notifier};
use crate::settle;
use crate::template::cpu::CpuState;
use crate::virtio::vsock::{StreamParams, VsockError, VsockEvent};

const CONTROL: u64 = 0;
const NOTICES: u64 = 1;
/// Words of devices of the node: below it the function, and the word.
const WORDS: u64 = 1 << 16;
const FAILED: u64 = 1 << 8;
/// Messages that may wait for a slow shim.
const MAX_OUTBOX: usize = 8192;
/// How long the last messages may take.
const FAREWELL_MS: u16 = 1000;

/// The state of the main thread.
struct Server {
    control: OwnedFd,
    outbox: VecDeque<FromVmm>,
    marks: Vec<(u16, u64)>,
    /// Requests that wait for a device, by its function.
    plugging: BTreeMap<u8, u64>,
    /// Requests that wait for the end of a device, by its function.
    unplugging: BTreeMap<u8, u64>,
    clock: Clock,
    log: Logger,
}

/// What the loop does next.
enum Flow {
    Continue,
    End(Ended),
}

/// Serves one VM on the control socket until it ends. Returns the exit code of the process.
#[must_use]
pub fn serve(control: OwnedFd, clock: Clock, marks: Vec<(u16, u64)>, log: Logger) -> i32 {
    let mut server = Server {
        control,
        outbox: VecDeque::new(),
        marks,
        plugging: BTreeMap::new(),
        unplugging: BTreeMap::new(),
        clock,
        log,
    };
    let ended = server.run().unwrap_or_else(|error| Ended {
        code: exit::INTERNAL,
        reason: format!("the control loop failed: {error}"),
    });
    // Logged before the shim can see the end of the process, and whatever the guest made us log.
    if [exit::POWER_OFF, exit::STOPPED, exit::CAPTURED].contains(&ended.code) {
        info!(server.log, #LAST_WORDS, "VM ended"; "code" => ended.code, "reason" => &ended.reason);
    } else {
        warn!(server.log, #LAST_WORDS, "VM ended"; "code" => ended.code, "reason" => &ended.reason);
    }
    server.event(Event::Ended {
        code: ended.code,
        reason: ended.reason,
    });
    server.farewell();
    ended.code
}

fn not_captured(error: &StartError) -> Ended {
    Ended {
        code: exit::INTERNAL,
        reason: error.reply("the guest was not captured").message,
    }
}

/// A CPU that could not be given what it touched does not know what was there.
fn explained(ended: Ended, vm: &Vm) -> Ended {
    let fault = matches!(ended.code, exit::INTERNAL | exit::GUEST_FAULT);
    match vm.shortened().filter(|_| fault) {
        Some(reason) => Ended {
            code: exit::INTERNAL,
            reason,
        },
        None => ended,
    }
}

fn stopped(reason: &str) -> Ended {
    Ended {
        code: exit::STOPPED,
        reason: reason.to_owned(),
    }
}

impl Server {
    fn run(&mut self) -> io::Result<Ended> {
        let (notifier, notices, wake) = Notifier::new(self.clock)?;
        let vm = match self.wait_for_start(&notifier)? {
            Ok(vm) => vm,
            Err(ended) => return Ok(ended),
        };
        // The process ends by `exit`: joining threads could wait for I/O of a hung host file
        // system, and the VMM must not outlive its control socket.
        let mut vm = std::mem::ManuallyDrop::new(vm);
        let epoll = Epoll::new()?;
        watch(
            &epoll,
            ControlOperation::Add,
            self.control.as_fd(),
            CONTROL,
            EventSet::IN,
        )?;
        watch(
            &epoll,
            ControlOperation::Add,
            wake_fd(&wake),
            NOTICES,
            EventSet::IN,
        )?;
        for function in vm.given() {
            watch_words(&epoll, &vm, *function)?;
        }
        fcntl(
            &self.control,
            FcntlArg::F_SETFL(OFlag::O_NONBLOCK | OFlag::O_RDWR),
        )?;
        let kind = ThreadKind::main(vm.takes_devices(), vm.takes_cpus(), vm.can_be_debugged());
        if let Err(error) = seccomp::apply(kind) {
            return Ok(Ended {
                code: exit::INTERNAL,
                reason: error.to_string(),
            });
        }
        settle::give_back();
        let mut waiting_to_send = false;
        loop {
            let sending = !self.flush()?;
            if sending != waiting_to_send {
                waiting_to_send = sending;
                let mut events = EventSet::IN;
                events.set(EventSet::OUT, sending);
                watch(
                    &epoll,
                    ControlOperation::Modify,
                    self.control.as_fd(),
                    CONTROL,
                    events,
                )?;
            }
            let mut events = [EpollEvent::default(); 4];
            let count = match epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                let flow = match event.data() {
                    NOTICES => {
                        let _ = wake.read();
                        self.take_notices(&notices, &mut vm, &epoll)
                    }
                    token if token & WORDS != 0 => {
                        self.take_word(token, &vm);
                        Flow::Continue
                    }
                    _ => self.take_requests(&mut vm),
                };
                if let Flow::End(ended) = flow {
                    return Ok(ended);
                }
            }
            if self.outbox.len() > MAX_OUTBOX {
                return Ok(Ended {
                    code: exit::INTERNAL,
                    reason: "the shim does not read its control socket".to_owned(),
                });
            }
        }
    }

    /// Blocks until Start; the socket is still blocking and the process has one thread.
    fn wait_for_start(&mut self, notifier: &Notifier) -> io::Result<Result<Vm, Ended>> {
        loop {
            let (request, fds) = match control::receive::<Request>(self.control.as_fd()) {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(Err(stopped("the control socket closed before Start"))),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.refuse_malformed(&error);
                    self.flush()?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let id = request.id;
            match request.body {
                RequestBody::Start(config) => {
                    return Ok(self.start(id, &config, fds, notifier));
                }
                RequestBody::Stop => {
                    self.reply(id, Ok(ReplyBody::Done));
                    return Ok(Err(stopped("stopped before Start")));
                }
                RequestBody::Counters => self.reply(id, Ok(self.counters(None))),
                _ => self.reply(id, Err(state("the VM has not been started"))),
            }
            self.flush()?;
        }
    }

    fn start(
        &mut self,
        id: u64,
        config: &VmConfig,
        fds: Vec<OwnedFd>,
        notifier: &Notifier,
    ) -> Result<Vm, Ended> {
        self.mark(mark::START);
        let built =
            builder::build(config, Descriptors::new(fds), notifier, &self.log).and_then(|built| {
                self.mark(mark::BUILT);
                let template = built.template().cloned();
                let cloned = matches!(template, Some(Ok(())));
                self.mark(if cloned {
                    mark::RESUMED
                } else {
                    mark::KERNEL_ENTRY
                });
                let refused = template.and_then(Result::err);
                Ok((built.start()?, cloned, refused))
            });
        match built {
            Ok((vm, cloned, refused)) => {
                let functions = vm.given().to_vec();
                let started = ReplyBody::Started {
                    functions,
                    cloned,
                    refused,
                };
                self.reply(id, Ok(started));
                info!(self.log, "VM started"; "vcpus" => config.vcpus,
                    "micros" => self.clock.micros());
                Ok(vm)
            }
            Err(error) => {
                let reply = error.reply("the VM did not start");
                self.reply(id, Err(reply.clone()));
                Err(Ended {
                    code: exit::INTERNAL,
                    reason: reply.message,
                })
            }
        }
    }

    fn take_requests(&mut self, vm: &mut Vm) -> Flow {
        loop {
            match control::receive::<Request>(self.control.as_fd()) {
                Ok(Some((request, fds))) => {
                    if let Flow::End(ended) = self.answer(request, fds, vm) {
                        return Flow::End(ended);
                    }
                }
                Ok(None) => return Flow::End(stopped("the control socket closed")),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Flow::Continue,
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::InvalidData => self.refuse_malformed(&error),
                    _ => return Flow::End(stopped(&format!("the control socket failed: {error}"))),
                },
            }
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>, vm: &mut Vm) -> Flow {
        let result = match request.body {
            RequestBody::Start(_) => Err(state("the VM has been started already")),
            RequestBody::OpenStream(stream) => open_stream(stream, fds, vm),
            RequestBody::CloseStream { stream } => {
                vm.vsock().close(stream);
                Ok(ReplyBody::Done)
            }
            RequestBody::ForgetShare { path } => vm
                .forget_share(&path)
                .map(|()| ReplyBody::Done)
                .map_err(|reason| state(&reason)),
            RequestBody::RemoteShare { path } => vm
                .remote_share(&path)
                .map(|()| ReplyBody::Done)
                .map_err(|reason| state(&reason)),
            RequestBody::Plug(device) => match vm.plug(&device, &mut Descriptors::new(fds)) {
                Ok(Plugging::Done(function)) => Ok(ReplyBody::Plugged { function }),
                // Answered when it is there.
                Ok(Plugging::Later(function)) => {
                    self.plugging.insert(function, request.id);
                    return Flow::Continue;
                }
                Err(error) => Err(error.reply("the device was not added")),
            },
            RequestBody::Unplug { function } => match vm.unplug(function) {
                // Answered when it is gone.
                Ok(()) => {
                    self.unplugging.insert(function, request.id);
                    return Flow::Continue;
                }
                Err(error) => Err(error.reply("the device was not removed")),
            },
            RequestBody::Resize { function } => vm
                .refresh(function)
                .map(|()| ReplyBody::Done)
                .map_err(|error| error.reply("the disk was not looked at")),
            RequestBody::Memory { bytes } => match vm.resize(bytes) {
                Ok((function, bytes)) => Ok(ReplyBody::Memory { function, bytes }),
                Err(error) => Err(error.reply("the VM's memory was not changed")),
            },
            RequestBody::Cpus { count } => match vm.add_cpus(count) {
                Ok(()) => Ok(ReplyBody::Done),
                Err(error) => Err(error.reply("the VM was given no CPU")),
            },
            RequestBody::Counters => Ok(self.counters(Some(vm))),
            RequestBody::Debug(request) => match vm.debug(&request) {
                Ok(stopped) => Ok(ReplyBody::Debug(stopped)),
                Err(error) => Err(error.reply("the VM's CPUs are not debugged")),
            },
            RequestBody::Stop => {
                self.reply(request.id, Ok(ReplyBody::Done));
                return Flow::End(stopped("stopped by the shim"));
            }
        };
        self.reply(request.id, result);
        Flow::Continue
    }

    fn counters(&self, vm: Option<&Vm>) -> ReplyBody {
        ReplyBody::Counters(Counters {
            exits: vm.map(Vm::exits).unwrap_or_default(),
            marks: self.marks.clone(),
            file_requests: vm.map(Vm::file_requests).unwrap_or_default(),
            devices: vm.map(Vm::devices).unwrap_or_default(),
            given_up_bytes: vm.map(Vm::given_up).unwrap_or_default(),
        })
    }

    fn take_word(&mut self, token: u64, vm: &Vm) {
        let function = u8::try_from(token & 0xff).unwrap_or(0);
        let word = if token & FAILED == 0 {
            DeviceWord::Wanted
        } else {
            DeviceWord::Failed
        };
        if vm.hears(function, word) {
            self.event(Event::Device { function, word });
        }
    }

    fn take_notices(&mut self, notices: &Receiver<Notice>, vm: &mut Vm, epoll: &Epoll) -> Flow {
        while let Ok(notice) = notices.try_recv() {
            match notice {
                Notice::Mark { mark, micros } => {
                    self.marks.push((u16::from(mark), micros));
                    self.event(Event::BootMark { mark, micros });
                }
                // Bounded by the console itself.
                Notice::Console(line) => self.event(Event::Console { line }),
                Notice::SharePressure => self.event(Event::SharePressure),
                Notice::Vsock(VsockEvent::AgentConnected, micros) => {
                    self.marks.push((mark::AGENT_CONNECTED, micros));
                    self.event(Event::AgentConnected { micros });
                }
                Notice::Vsock(VsockEvent::StreamClosed { stream, reset }, _) => {
                    self.event(Event::StreamClosed { stream, reset });
                }
                Notice::Prepared(function) => {
                    let result = vm
                        .prepared(function)
                        .map(|()| ReplyBody::Plugged { function })
                        .map_err(|error| error.reply("the device was not added"));
                    // Unheard, it is still given back when the pod ends.
                    if result.is_ok()
                        && let Err(error) = watch_words(epoll, vm, function)
                    {
                        warn!(self.log, "the node cannot ask for a device"; "error" => %error);
                    }
                    if let Some(id) = self.plugging.remove(&function) {
                        self.reply(id, result);
                    }
                }
                Notice::Removed(function) => {
                    vm.removed(function);
                    if let Some(id) = self.unplugging.remove(&function) {
                        self.reply(id, Ok(ReplyBody::Done));
                    }
                }
                Notice::Still => {
                    if let Err(error) = vm.still() {
                        return Flow::End(not_captured(&error));
                    }
                }
                Notice::Met(cpu) => {
                    if let Err(error) = vm.met(cpu) {
                        warn!(self.log, "not all CPUs have stopped"; "error" => error.reply("debugger").message);
                    }
                }
                Notice::Captured(cpu) => return Flow::End(self.captured(*cpu, vm)),
                Notice::Ended(ended) => return Flow::End(explained(ended, vm)),
            }
        }
        Flow::Continue
    }

    /// Writes the guest, which stands still without devices.
    fn captured(&self, cpu: CpuState, vm: &mut Vm) -> Ended {
        match vm.captured(cpu) {
            Ok((bytes, runs)) => {
                info!(self.log, "the guest was captured"; "bytes" => bytes, "runs" => runs);
                Ended {
                    code: exit::CAPTURED,
                    reason: "the guest was captured".to_owned(),
                }
            }
            Err(error) => not_captured(&error),
        }
    }

    fn mark(&mut self, mark: u16) {
        self.marks.push((mark, self.clock.micros()));
    }

    fn event(&mut self, event: Event) {
        self.outbox.push_back(FromVmm::Event(event));
    }

    fn reply(&mut self, id: u64, result: Result<ReplyBody, ErrorReply>) {
        self.outbox.push_back(FromVmm::Reply(Reply { id, result }));
    }

    /// A message that cannot be read has no id: the answer has 0.
    fn refuse_malformed(&mut self, error: &io::Error) {
        warn!(self.log, "malformed control message"; "error" => %error);
        self.reply(
            0,
            Err(ErrorReply {
                kind: ErrorKind::Invalid,
                message: format!("the control message is malformed: {error}"),
            }),
        );
    }

    /// Sends what the socket takes; false if something is left.
    fn flush(&mut self) -> io::Result<bool> {
        while let Some(message) = self.outbox.front() {
            match control::send(self.control.as_fd(), message, &[]) {
                Ok(()) => {
                    self.outbox.pop_front();
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(false),
                    io::ErrorKind::Interrupted => {}
                    // Nobody reads any more: the read side will end the process.
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                        self.outbox.clear();
                        return Ok(true);
                    }
                    io::ErrorKind::InvalidInput => {
                        warn!(self.log, "control message dropped"; "error" => %error);
                        self.outbox.pop_front();
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// Sends the last messages, for a bounded time.
    fn farewell(&mut self) {
        while matches!(self.flush(), Ok(false)) {
            let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::POLLOUT)];
            if !matches!(poll(&mut fds, PollTimeout::from(FAREWELL_MS)), Ok(1..)) {
                return;
            }
        }
    }
}

fn open_stream(stream: StreamConfig, fds: Vec<OwnedFd>, vm: &Vm) -> Result<ReplyBody, ErrorReply> {
    let mut fds = Descriptors::new(fds);
    let mut take = |index: Option<usize>, what| {
        index
            .map(|index| fds.take(index, what))
            .transpose()
            .map_err(|error| ErrorReply {
                kind: ErrorKind::Invalid,
                message: error.to_string(),
            })
    };
    let params = StreamParams {
        stream: stream.stream,
        port: stream.port,
        header: stream.header,
        input: take(stream.input, "stream input")?,
        output: take(stream.output, "stream output")?,
    };
    vm.vsock().open(params).map_err(|error| ErrorReply {
        kind: match error {
            VsockError::InUse(_) => ErrorKind::State,
            VsockError::Limit => ErrorKind::Limit,
            VsockError::Header(_) => ErrorKind::Invalid,
            VsockError::Gone => ErrorKind::Internal,
        },
        message: error.to_string(),
    })?;
    Ok(ReplyBody::Done)
}

/// Waits for what the node says of a device. The events leave with it.
fn watch_words(epoll: &Epoll, vm: &Vm, function: u8) -> io::Result<()> {
    for (word, fd) in vm.words(function) {
        let said = match word {
            DeviceWord::Wanted => 0,
            DeviceWord::Failed => FAILED,
        };
        let token = WORDS | said | u64::from(function);
        epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, token),
        )?;
    }
    Ok(())
}

fn state(reason: &str) -> ErrorReply {
    ErrorReply {
        kind: ErrorKind::State,
        message: reason.to_owned(),
    }
}

fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: BorrowedFd<'_>,
    token: u64,
    events: EventSet,
) -> io::Result<()> {
    epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, token))
}

fn wake_fd(wake: &Arc<EventFd>) -> BorrowedFd<'_> {
    // SAFETY: the event lives as long as the borrow of it.
    unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) }
}

#[cfg(test)]
mod tests;
