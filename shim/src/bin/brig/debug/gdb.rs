//! gdb's remote protocol on standard input and output, for its `target remote | brig debug ID --gdb`. CPUs are threads.
//!
//! Registers and memory are read and not written, so that a guest under a debugger is what it would be without.
//! Breakpoints are the CPU's own, also those that gdb would have planted.

use std::collections::VecDeque;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use brig_hypervisor::control::{DebugRequest, MAX_BREAKPOINTS, Stopped};
use brig_shim::error::{Error, Result};
use gdbstub::common::{Signal, Tid};
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::memory::GuestMemory;
use super::pod::Pod;
use super::registers::{Architecture, Registers};
use super::session::Session;
use crate::terminal;

/// Between two looks at whether a CPU has met a breakpoint.
const LOOK: Duration = Duration::from_millis(50);

/// Serves one gdb until it goes away. The guest stands still from the beginning, and goes on then.
///
/// # Errors
/// The shim's; that gdb breaks its protocol.
pub(super) fn serve(pod: &Pod) -> Result<()> {
    if io::stdin().is_terminal() {
        return Err(Error::invalid(format!(
            "--gdb speaks gdb's protocol and is for its 'target remote | brig debug {} --gdb': 'brig debug {}' starts it",
            pod.id, pod.id
        )));
    }
    let failed = |error: io::Error| Error::io("cannot read the guest's memory", &error);
    let memory = GuestMemory::of(pod.vmm, pod.first).map_err(failed)?;
    let (session, stopped) = Session::begin(&pod.socket)?;
    let mut guest = Guest {
        session,
        memory,
        stopped,
        breakpoints: Vec::new(),
        resume: Resume::default(),
    };
    let mut stdio = Stdio::default();
    stdio.forget_repetitions();
    let gdb = GdbStub::new(stdio);
    let served = gdb.run_blocking::<Serving>(&mut guest);
    match served {
        Ok(_) => Ok(()),
        // Without a word.
        Err(error) if error.is_connection_error() => Ok(()),
        Err(error) => Err(Error::internal(format!("gdb: {error}"))),
    }
}

/// A breakpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Breakpoint {
    address: u64,
    /// gdb asked for one of the CPU's.
    hardware: bool,
}

/// What gdb sees.
struct Guest {
    session: Session,
    memory: GuestMemory,
    /// As it stood when it was last looked at.
    stopped: Stopped,
    breakpoints: Vec<Breakpoint>,
    /// How the CPUs are to go on.
    resume: Resume,
}

/// How gdb wants the CPUs to go on.
#[derive(Debug, Default, Clone, Copy)]
struct Resume {
    /// The CPU that was named.
    named: Option<u8>,
    /// It is to make one step, and the others none.
    step: bool,
    /// The others are to stay.
    locked: bool,
}

impl Guest {
    fn cpu(&self, tid: Tid) -> TargetResult<&brig_hypervisor::control::Registers, Self> {
        let cpu = self.stopped.cpus.get(tid.get() - 1);
        cpu.ok_or(TargetError::NonFatal)
    }

    fn set(&mut self, address: u64, hardware: bool) -> TargetResult<bool, Self> {
        if self.breakpoints.len() >= MAX_BREAKPOINTS {
            terminal::complain(&format!(
                "a CPU has {MAX_BREAKPOINTS} breakpoints, and all are in use"
            ));
            return Ok(false);
        }
        self.breakpoints.push(Breakpoint { address, hardware });
        Ok(true)
    }

    fn clear(&mut self, address: u64, hardware: bool) -> TargetResult<bool, Self> {
        let is_it = |one: &Breakpoint| one.address == address && one.hardware == hardware;
        let place = self.breakpoints.iter().position(is_it);
        Ok(place.map(|place| self.breakpoints.remove(place)).is_some())
    }

    /// Why the CPUs stand.
    fn reason(&self) -> MultiThreadStopReason<u64> {
        let Some((tid, cpu)) = self
            .stopped
            .cpu
            .and_then(|cpu| Some((thread(cpu)?, self.stopped.cpus.get(usize::from(cpu))?)))
        else {
            return MultiThreadStopReason::Signal(Signal::SIGINT);
        };
        let at = |breakpoint: &&Breakpoint| breakpoint.address == cpu.rip;
        match self.breakpoints.iter().find(at) {
            Some(Breakpoint { hardware: true, .. }) => MultiThreadStopReason::HwBreak(tid),
            Some(_) => MultiThreadStopReason::SwBreak(tid),
            None => MultiThreadStopReason::SignalWithThread {
                tid,
                signal: Signal::SIGTRAP,
            },
        }
    }
}

/// The thread that a CPU is: the one after its number.
fn thread(cpu: u8) -> Option<Tid> {
    Tid::new(usize::from(cpu) + 1)
}

impl Target for Guest {
    type Arch = Architecture;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut Registers, tid: Tid) -> TargetResult<(), Self> {
        registers.0 = self.cpu(tid)?.clone();
        Ok(())
    }

    fn write_registers(&mut self, _: &Registers, _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, at: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        match self.memory.read_virtual(self.cpu(tid)?, at, data) {
            0 if !data.is_empty() => Err(TargetError::NonFatal),
            read => Ok(read),
        }
    }

    fn write_addrs(&mut self, _: u64, _: &[u8], _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<()> {
        (1..=self.stopped.cpus.len())
            .filter_map(Tid::new)
            .for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Guest {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize> {
        let text = format!("CPU {}", tid.get() - 1);
        let length = text.len().min(buffer.len());
        buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
        Ok(length)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<()> {
        let go = DebugRequest::Go {
            only: self
                .resume
                .named
                .filter(|_| self.resume.step || self.resume.locked),
            step: self.resume.step,
            breakpoints: self.breakpoints.iter().map(|one| one.address).collect(),
        };
        self.session.ask(&go).map(drop)
    }

    fn clear_resume_actions(&mut self) -> Result<()> {
        self.resume = Resume::default();
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<()> {
        if !self.resume.step {
            self.resume.named = u8::try_from(tid.get() - 1).ok();
        }
        Ok(())
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<()> {
        self.resume.named = u8::try_from(tid.get() - 1).ok();
        self.resume.step = true;
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<()> {
        self.resume.locked = true;
        Ok(())
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set(address, false)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.clear(address, false)
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set(address, true)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.clear(address, true)
    }
}

/// What is done while the guest runs.
enum Serving {}

impl BlockingEventLoop for Serving {
    type Target = Guest;
    type Connection = Stdio;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        guest: &mut Guest,
        gdb: &mut Stdio,
    ) -> std::result::Result<Event<Self::StopReason>, WaitForStopReasonError<Error, io::Error>>
    {
        loop {
            let word = gdb.wait(LOOK).map_err(WaitForStopReasonError::Connection)?;
            if word {
                let byte = gdb.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
            let stopped = guest.session.ask(&DebugRequest::State);
            if let Some(stopped) = stopped.map_err(WaitForStopReasonError::Target)? {
                guest.stopped = stopped;
                return Ok(Event::TargetStopped(guest.reason()));
            }
        }
    }

    fn on_interrupt(guest: &mut Guest) -> Result<Option<Self::StopReason>> {
        if let Some(stopped) = guest.session.ask(&DebugRequest::Stop)? {
            guest.stopped = stopped;
        }
        Ok(Some(guest.reason()))
    }
}

/// Standard input and output.
#[derive(Default)]
struct Stdio {
    /// Read and not yet taken.
    read: VecDeque<u8>,
    /// Not yet written.
    written: Vec<u8>,
}

impl Stdio {
    /// Whether there is something to take, which may also be the end, within this time.
    fn wait(&self, time: Duration) -> io::Result<bool> {
        if !self.read.is_empty() {
            return Ok(true);
        }
        let stdin = io::stdin();
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        Ok(poll(&mut fds, Some(&time))? > 0)
    }

    /// gdb repeats its first packet each two seconds in which nobody answers: of those that came before the CPUs stood,
    /// the last is as good as all.
    fn forget_repetitions(&mut self) {
        loop {
            let known = self.read.len();
            let stdin = io::stdin();
            let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
            let more = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
            // Its end is noticed later.
            if !more || self.fill().is_err() || self.read.len() == known {
                break;
            }
        }
        if let Some(last) = self.read.iter().rposition(|byte| *byte == b'$') {
            self.read.drain(..last);
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let count = rustix::io::read(io::stdin().as_fd(), &mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read.extend(&buffer[..count]);
        Ok(())
    }
}

impl Connection for Stdio {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.written.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut output = io::stdout().lock();
        output.write_all(&std::mem::take(&mut self.written))?;
        output.flush()
    }
}

impl ConnectionExt for Stdio {
    fn read(&mut self) -> io::Result<u8> {
        loop {
            if let Some(byte) = self.read.pop_front() {
                return Ok(byte);
            }
            self.fill()?;
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.wait(Duration::ZERO)? && self.read.is_empty() {
            self.fill()?;
        }
        Ok(self.read.front().copied())
    }
}
