//! Takes charge of a launched VMM: what watches it, what speaks to it, and what it is asked to build.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use brig_agent_protocol::agent_ttrpc::AgentClient;
use brig_hypervisor::control::VmConfig;
use slog::Logger;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch as watch_channel};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use super::living;
use crate::error::{Error, Result};
use crate::guest::vm::books::Books;
use crate::guest::vm::control::{Control, Incoming};
use crate::guest::vm::frames::Guarded;
use crate::guest::vm::kill::Kill;
use crate::guest::vm::late::{Interface, Late};
use crate::guest::vm::patience::Patience;
use crate::guest::vm::size::{Cpus, Memory};
use crate::guest::vm::watch::Watch;
use crate::guest::vm::{
    Given, GuestOrigin, Launched, MAX_SIGNALS, Timeouts, Vm, debug_session, first_stream,
    passthrough,
};
use crate::node::cgroup::Cgroup;
use crate::node::network;

/// Words of devices that wait for what is done about them.
const WORDS: usize = 64;

/// What the VMM is asked to build.
pub(super) struct Machine {
    pub(super) config: Box<VmConfig>,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) given: Option<Given>,
    pub(super) origin: GuestOrigin,
}

/// What a VM is told of its pod.
pub(super) struct Parts {
    pub(super) timeouts: Timeouts,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) wanted: network::Wanted,
    /// The state of the packet filter that it gets.
    pub(super) filter: Option<u32>,
    /// The layers of images are to be memory of the guest.
    pub(super) maps_layers: bool,
}

/// Takes charge of a launched VMM: from here on its end is noticed and it is reaped.
pub(super) fn adopt(
    launched: Launched,
    parts: Parts,
    logger: &Logger,
) -> Result<(Arc<Vm>, Machine, AgentConnected)> {
    let Parts {
        timeouts,
        cgroup,
        wanted,
        filter,
        maps_layers,
    } = parts;
    let failed = |error: std::io::Error| Error::io("cannot talk to the VMM", &error);
    let pid = launched.process.pid();
    let (control, incoming) = Control::start(launched.control).map_err(failed)?;
    let Incoming {
        agent_connected,
        events,
    } = incoming;
    launched.agent.set_nonblocking(true).map_err(failed)?;
    let agent = tokio::net::UnixStream::from_std(launched.agent).map_err(failed)?;
    let (guarded, ahead, connection) = Guarded::new(agent);
    let (death_sender, death) = watch_channel::channel(None);
    let kill = Arc::new(Kill::default());
    let pressure = Arc::new(Notify::new());
    let (words, heard) = mpsc::channel(WORDS);
    let watch = Watch {
        process: launched.process,
        events,
        stderr: launched.stderr,
        cgroup: cgroup.clone(),
        kill: Arc::clone(&kill),
        pressure: Arc::clone(&pressure),
        words,
        death: death_sender,
        logger: logger.clone(),
    };
    tokio::spawn(watch.run());
    let late = launched.netns.map(|netns| {
        let nets = launched.machine.0.nets.iter();
        let nets = nets.map(Interface::of).collect();
        Late::new(netns, wanted, (nets, launched.kept.interfaces), filter)
    });
    let vm = Arc::new_cyclic(|me| Vm {
        me: me.clone(),
        pid,
        control,
        agent: AgentClient::new(Client::new(Socket::new(guarded))),
        mounts: launched.mounts,
        death,
        kill,
        next_stream: first_stream(),
        timeouts,
        late,
        ahead,
        figures: Patience::new(timeouts.word),
        signals: Patience::new(timeouts.word),
        sending: Arc::new(Semaphore::new(MAX_SIGNALS)),
        deaf: AtomicBool::new(false),
        bus: Arc::default(),
        passthrough: Arc::default(),
        disks: Arc::default(),
        books: Books::default(),
        maps_layers,
        memory: Memory::new(
            launched.machine.0.memory_bytes,
            launched.machine.0.max_memory_bytes,
        ),
        cpus: Cpus::new(launched.machine.0.vcpus, launched.machine.0.max_vcpus),
        cgroup,
        kernel_release: OnceLock::new(),
        template: OnceLock::new(),
        debugged: debug_session::Session::default(),
    });
    vm.keep_open(launched.kept.multicast);
    tokio::spawn(living::watch_connection(
        Arc::downgrade(&vm),
        connection,
        logger.clone(),
    ));
    tokio::spawn(living::relieve(
        Arc::downgrade(&vm),
        pressure,
        logger.clone(),
    ));
    tokio::spawn(passthrough::heed(
        Arc::downgrade(&vm),
        heard,
        logger.clone(),
    ));
    let (config, fds) = launched.machine;
    let machine = Machine {
        config: Box::new(config),
        fds,
        given: launched.given,
        origin: launched.origin,
    };
    Ok((vm, machine, agent_connected))
}

/// Told when the agent calls.
pub(super) type AgentConnected = oneshot::Receiver<()>;
