//! Stand-ins for the node, the VMM and the guest's agent, for the tests of the shim's logic: a child
//! process with a control-socket thread instead of brig-vmm, and a ttrpc server instead of the agent.

mod agent;
pub(crate) mod raw;
mod vmm;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ChildStdin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use brig_hypervisor::control::{VfioConfig, VmConfig};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::guest::vm::watch::tests::FakeProcess;
use crate::guest::vm::{
    Attributes, GuestOrigin, Host, LaterMount, Launched, LeftOut, Mounts, Plan, RootfsMount,
};
use crate::node::cgroup::Cgroup;
use vmm::FakeVmm;

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
    /// The VMM takes this long to build the machine.
    pub(crate) slow_start: Duration,
    /// The machine has a device of the node.
    pub(crate) has_devices: bool,
    /// A plug is answered when the test says so, and everything else meanwhile.
    pub(crate) slow_plug: Option<Arc<Barrier>>,
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
    /// The guest takes this long to power off.
    pub(crate) slow_shutdown: Duration,
    /// These containers wait for what never comes, and cannot be killed.
    pub(crate) unkillable: &'static [&'static str],
    /// UpdateContainer is answered after this time.
    pub(crate) slow_update: Duration,
    /// UpdateContainer refuses what has this in it.
    pub(crate) refuse_update: Option<&'static str>,
    /// Bytes that the guest could do without.
    pub(crate) spare: Option<u64>,
    /// The most bytes beyond those of its start that it takes.
    pub(crate) takes: Option<u64>,
    /// The least that it keeps of them.
    pub(crate) keeps: u64,
    /// The agent's answers to FindDevice and RemoveDevice take this long.
    pub(crate) slow_bus: Duration,
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
    fn launch(&self, plan: &Plan, _: oneshot::Sender<()>) -> Result<Launched> {
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
            vhost: false,
            devices: self
                .behaviour
                .has_devices
                .then(device)
                .into_iter()
                .collect(),
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
            kept: crate::node::network::Kept::default(),
            netns: None,
            given: None,
        })
    }

    fn make_cgroup(&self, path: &str) -> Result<Option<Cgroup>> {
        self.record.add(format!("cgroup {path}"));
        Ok(None)
    }
}

fn device() -> VfioConfig {
    VfioConfig {
        device: 0,
        space: None,
        name: "0000:3b:00.0".to_owned(),
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
