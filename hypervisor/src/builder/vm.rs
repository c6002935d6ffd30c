//! A machine that runs: what is plugged into it, asked of it, and changed of it.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::board::plug::Plugging;
use super::board::{Board, Handles};
use super::capture::Capture;
use super::cpus::Cpus;
use super::{Descriptors, StartError};
use crate::control::{
    DebugRequest, DeviceConfig, DeviceCounters, DeviceWord, MAX_BREAKPOINTS, Stopped, exit,
};
use crate::debugger::{Debugged, Debugger};
use crate::exits::ExitCounters;
use crate::jail::seccomp::{self, SeccompError, ThreadKind};
use crate::notice::Notice;
use crate::vcpu::{self, Machine};
use crate::virtio::fs::FsHandle;
use crate::virtio::vsock::VsockHandle;

/// A running machine.
pub struct Vm {
    pub(super) machine: Arc<Machine>,
    pub(super) counters: Vec<Arc<ExitCounters>>,
    pub(super) handles: Handles,
    pub(super) board: Board,
    pub(super) cpus: Cpus,
    /// Functions of the devices of the node that were there from the start.
    pub(super) given: Vec<u8>,
    pub(super) capture: Option<Capture>,
    pub(super) debugger: Option<Debugger>,
}

/// How a thread is confined to the list of its kind.
pub(super) type Confine = fn(ThreadKind) -> Result<(), SeccompError>;

impl Vm {
    /// Drops the file server's inodes below `path` of the share.
    ///
    /// # Errors
    /// If this VM has no share.
    pub fn forget_share(&self, path: &str) -> Result<(), String> {
        let share = self.handles.share.as_ref();
        let share = share.ok_or_else(|| "this VM has no share".to_owned())?;
        share.forget(path);
        Ok(())
    }

    /// What is at this path of the share, or will be, may never answer; see [`FsHandle::expect_remote`].
    ///
    /// # Errors
    /// If this VM has no share.
    pub fn remote_share(&self, path: &str) -> Result<(), String> {
        let share = self.handles.share.as_ref();
        let share = share.ok_or_else(|| "this VM has no share".to_owned())?;
        share.expect_remote(path);
        Ok(())
    }

    /// Requests to the file server so far.
    #[must_use]
    pub fn file_requests(&self) -> u64 {
        self.handles.share.as_ref().map_or(0, FsHandle::requests)
    }

    /// Opens and closes streams.
    #[must_use]
    pub fn vsock(&self) -> &VsockHandle {
        &self.handles.vsock
    }

    /// Puts one more device on the bus, now or later.
    ///
    /// # Errors
    /// [`StartError`]; the machine is as before.
    pub fn plug(
        &mut self,
        device: &DeviceConfig,
        fds: &mut Descriptors,
    ) -> Result<Plugging, StartError> {
        let vcpus = u8::try_from(self.counters.len()).unwrap_or(u8::MAX);
        self.board.plug(device, vcpus, fds)
    }

    /// Whether devices of the node may be plugged.
    #[must_use]
    pub fn takes_devices(&self) -> bool {
        self.board.takes_devices()
    }

    /// Functions of the devices of the node that the guest booted with, in the order of the configuration.
    #[must_use]
    pub fn given(&self) -> &[u8] {
        &self.given
    }

    /// What to wait on for what the node says of a device.
    #[must_use]
    pub fn words(&self, function: u8) -> Vec<(DeviceWord, RawFd)> {
        self.board.words(function)
    }

    /// Whether the node has said this of a device since this was last asked.
    #[must_use]
    pub fn hears(&self, function: u8, word: DeviceWord) -> bool {
        self.board.hears(function, word)
    }

    /// To be called at [`Notice::Prepared`]: puts the device on the bus.
    ///
    /// # Errors
    /// As of [`Self::plug`].
    pub fn prepared(&mut self, function: u8) -> Result<(), StartError> {
        self.board.prepared(function)
    }

    /// Takes a device that was plugged from the guest; [`Notice::Removed`] follows when it is gone.
    ///
    /// # Errors
    /// [`StartError::State`] if nothing was plugged there, or it is leaving already.
    pub fn unplug(&mut self, function: u8) -> Result<(), StartError> {
        self.board.unplug(function)
    }

    /// Lets a plugged disk look at its size again.
    ///
    /// # Errors
    /// [`StartError::State`] if no disk was plugged there.
    pub fn refresh(&self, function: u8) -> Result<(), StartError> {
        self.board.refresh(function)
    }

    /// To be called at [`Notice::Removed`]: what the function used is free from now on.
    pub fn removed(&mut self, function: u8) {
        self.board.removed(function);
    }

    /// Says how much memory the guest is to have; the function of the device by which it changes, if there is one, and
    /// what the guest has now, in bytes.
    ///
    /// # Errors
    /// [`StartError`], with the numbers; nothing has changed then.
    pub fn resize(&mut self, memory_bytes: u64) -> Result<(Option<u8>, u64), StartError> {
        self.board.resize(memory_bytes)
    }

    /// Whether CPUs may be added.
    #[must_use]
    pub fn takes_cpus(&self) -> bool {
        self.counters.len() < usize::from(self.cpus.most)
    }

    /// Makes CPUs until there are `count`, each with a thread that waits for the guest to start it.
    ///
    /// # Errors
    /// [`StartError::Limit`] with the numbers; what the host says. Those that were made stay.
    pub fn add_cpus(&mut self, count: u8) -> Result<(), StartError> {
        let most = self.cpus.most;
        if count > most {
            return Err(StartError::Limit(format!(
                "{count} CPUs were asked for, and this VM may have {most}"
            )));
        }
        let there = u8::try_from(self.counters.len()).unwrap_or(u8::MAX);
        for id in there..count {
            let vcpu = self.cpus.make(id)?;
            let counters = Arc::<ExitCounters>::default();
            self.run(id, vcpu, Arc::clone(&counters), seccomp::narrow)?;
            self.counters.push(counters);
        }
        Ok(())
    }

    /// Why the VM has ended, if that is for a file that the guest had as memory.
    #[must_use]
    pub fn shortened(&self) -> Option<String> {
        self.board.shortened().map(|short| short.to_string())
    }

    /// What each virtio device has done.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceCounters> {
        self.board.counted().collect()
    }

    /// Bytes of guest memory that have gone back to the node since the start.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.board.given_up()
    }

    /// Gives a CPU its thread.
    pub(super) fn run(
        &mut self,
        id: u8,
        vcpu: VcpuFd,
        counters: Arc<ExitCounters>,
        confine: Confine,
    ) -> Result<(), StartError> {
        let machine = Arc::clone(&self.machine);
        let kind = match (&self.capture, &self.debugger) {
            (Some(_), _) => ThreadKind::CapturedVcpu,
            (None, Some(_)) => ThreadKind::DebuggedVcpu,
            (None, None) => ThreadKind::Vcpu,
        };
        let debugged = self.debugger.as_mut().map(Debugger::next_cpu);
        let thread = spawn_vcpu(id, vcpu, machine, counters, debugged, (kind, confine))?;
        if let Some(debugger) = &mut self.debugger {
            debugger.started(thread);
        }
        Ok(())
    }

    /// Whether the CPUs may be stopped and looked at.
    #[must_use]
    pub fn can_be_debugged(&self) -> bool {
        self.debugger.is_some()
    }

    /// Stops the CPUs, looks at them or lets them go on; what is in them, if they stand.
    ///
    /// # Errors
    /// [`StartError::State`] if this VM's CPUs are not to be debugged, or do not stop.
    pub fn debug(&mut self, request: &DebugRequest) -> Result<Option<Stopped>, StartError> {
        let debugger = self.debugger.as_mut().ok_or_else(|| {
            StartError::State("this VM was not started to be debugged".to_owned())
        })?;
        let state = |error: std::io::Error| StartError::State(error.to_string());
        match request {
            DebugRequest::Stop => debugger.stop().map(Some).map_err(state),
            DebugRequest::State => Ok(debugger.stopped()),
            DebugRequest::Go {
                only,
                step,
                breakpoints,
            } => {
                if breakpoints.len() > MAX_BREAKPOINTS {
                    return Err(StartError::Limit(format!(
                        "{} breakpoints were asked for, and a CPU has {MAX_BREAKPOINTS}",
                        breakpoints.len()
                    )));
                }
                debugger.go(*only, *step, breakpoints).map_err(state)?;
                Ok(None)
            }
        }
    }

    /// To be called at [`Notice::Met`].
    ///
    /// # Errors
    /// [`StartError::State`] if the other CPUs do not stop.
    pub fn met(&mut self, cpu: u8) -> Result<(), StartError> {
        let met = self.debugger.as_mut().map(|debugger| debugger.met(cpu));
        met.unwrap_or(Ok(()))
            .map_err(|error| StartError::State(error.to_string()))
    }

    /// Exits by reason, over all CPUs.
    #[must_use]
    pub fn exits(&self) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::new();
        for counters in &self.counters {
            counters.add_to(&mut totals);
        }
        self.machine.unknown_ports.add_to(&mut totals);
        totals
    }
}

fn spawn_vcpu(
    id: u8,
    mut vcpu: VcpuFd,
    machine: Arc<Machine>,
    counters: Arc<ExitCounters>,
    debugged: Option<Debugged>,
    (kind, confine): (ThreadKind, Confine),
) -> Result<JoinHandle<()>, StartError> {
    let name = match debugged {
        Some(_) => format!("vcpu{id}-debug"),
        None => format!("vcpu{id}"),
    };
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || match confine(kind) {
            Ok(()) => {
                let ended = vcpu::run(&mut vcpu, &machine, &counters, debugged.as_ref());
                machine.notifier.send(Notice::Ended(ended));
            }
            Err(error) => machine.notifier.end(exit::INTERNAL, error.to_string()),
        })
        .map_err(|source| StartError::Thread { name, source })
}
