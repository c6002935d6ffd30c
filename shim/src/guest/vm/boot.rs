//! Brings one VM up: launch, machine, agent, sandbox. Two moments are told apart, because host-side
//! work such as the root file system needs only the process and runs while the guest boots.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use brig_agent_protocol::agent::{Empty, Event, StartSandboxRequest};
use brig_agent_protocol::agent_ttrpc::AgentClient;
use brig_agent_protocol::{LOG_STREAM, MODULES_PATH, SHARE_TAG};
use brig_hypervisor::control::{VmConfig, mark};
use slog::{Logger, debug, error, warn};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch as watch_channel};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use super::clock;
use super::control::{Control, ControlError, Incoming, Started};
use super::debug_session;
use super::frames::{Ending, Guarded};
use super::kill::Kill;
use super::late::Late;
use super::lines;
use super::passthrough;
use super::patience::Patience;
use super::size::{Cpus, Memory};
use super::watch::Watch;
use super::{
    Attributes, Given, GuestOrigin, Host, Launched, MAX_SIGNALS, Plan, Timeouts, Vm, first_stream,
};
use crate::asked::config::Netfilter;
use crate::asked::spec::Network;
use crate::error::{Error, Kind, Result};
use crate::guest::forward::{ForwardError, Localhost};
use crate::node::cgroup::Cgroup;
use crate::node::heap;
use crate::node::network::{self, GuestNetwork, Inherited, Known};
use crate::node::pod_resources;
use crate::node::templates::{Recipe, Templates, maker};

/// The moment from which the pod can be used.
pub const SANDBOX_STARTED: &str = "sandbox.started";
/// The longest name of a kernel's release in bytes (`__NEW_UTS_LEN`).
const MAX_RELEASE: usize = 64;
/// kubelet has this long to say what it has assigned, in seconds.
const KUBELET: u32 = 5;
/// Words of devices that wait for what is done about them.
const WORDS: usize = 64;
/// Missed signs of life after which the agent counts as silent.
const MISSES: u32 = 3;
/// By then the first containers have started, and what that took of this process's heap is free again.
const SETTLED: Duration = Duration::from_secs(5);

/// How far a VM is.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Nothing exists yet.
    Launching,
    /// The process exists.
    Launched(Arc<Vm>),
    /// The agent answers and the sandbox is set up.
    Ready(Arc<Vm>),
    /// It did not come up.
    Failed(Error),
}

/// What a boot tells the pod.
#[derive(Debug)]
pub enum News {
    /// The pod's cgroup was made.
    Cgroup(Cgroup),
    /// The VMM's process exists.
    Launched(Arc<Vm>),
    /// A moment for the timeline.
    Mark(String, SystemTime),
    /// VM exits by reason up to now.
    Exits(BTreeMap<String, u64>),
    /// The agent reported something.
    Agent(Box<Event>),
}

/// Watches the progress of a boot; cheap to clone.
#[derive(Debug, Clone)]
pub struct Boot {
    progress: watch_channel::Receiver<Progress>,
    cgroup: Arc<OnceLock<Cgroup>>,
}

/// What the guest is told at once.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    /// The pod's id.
    pub id: String,
    /// Its host name.
    pub hostname: String,
    /// Kernel parameters of the pod, by name.
    pub sysctls: BTreeMap<String, String>,
    /// Size of its shared memory in bytes; 0: the agent's default.
    pub shm_size: u64,
    /// What it keeps of files that nobody uses goes back to the node while it is idle.
    pub return_files: bool,
    /// Its network, once the VM is launched.
    pub network: GuestNetwork,
}

impl Boot {
    /// Starts a VM in the background. The plan comes last, because making it may take time.
    pub fn start(
        host: Arc<dyn Host>,
        plan: Plan,
        sandbox: Sandbox,
        news: mpsc::Sender<News>,
        logger: Logger,
    ) -> Self {
        let (sender, progress) = watch_channel::channel(Progress::Launching);
        let cgroup = Arc::new(OnceLock::new());
        let made = Arc::clone(&cgroup);
        tokio::spawn(async move {
            let result = boot(host, plan, sandbox, &made, &sender, news, &logger).await;
            sender.send_replace(match result {
                Ok(vm) => Progress::Ready(vm),
                Err(error) => {
                    error!(logger, "the VM did not start"; "reason" => &error.message);
                    Progress::Failed(error)
                }
            });
        });
        Self { progress, cgroup }
    }

    async fn until(&self, far_enough: impl Fn(&Progress) -> Option<Arc<Vm>>) -> Result<Arc<Vm>> {
        let mut progress = self.progress.clone();
        let reached = progress
            .wait_for(|now| matches!(now, Progress::Failed(_)) || far_enough(now).is_some())
            .await;
        match reached {
            Ok(now) => match &*now {
                Progress::Failed(error) => Err(error.clone()),
                now => far_enough(now).ok_or_else(|| Error::internal("the boot went backwards")),
            },
            Err(_) => Err(Error::internal("the boot was abandoned")),
        }
    }

    /// The VM as soon as its process exists.
    ///
    /// # Errors
    /// Why it could not be launched.
    pub async fn launched(&self) -> Result<Arc<Vm>> {
        self.until(|now| match now {
            Progress::Launched(vm) | Progress::Ready(vm) => Some(Arc::clone(vm)),
            _ => None,
        })
        .await
    }

    /// The VM as soon as its agent can be asked.
    ///
    /// # Errors
    /// Why it did not come up.
    pub async fn ready(&self) -> Result<Arc<Vm>> {
        self.until(|now| match now {
            Progress::Ready(vm) => Some(Arc::clone(vm)),
            _ => None,
        })
        .await
    }

    /// The VM as far as it exists now.
    #[must_use]
    pub fn vm(&self) -> Option<Arc<Vm>> {
        match &*self.progress.borrow() {
            Progress::Launched(vm) | Progress::Ready(vm) => Some(Arc::clone(vm)),
            _ => None,
        }
    }

    /// The pod's cgroup, once it is made: known here before the news of it arrive.
    #[must_use]
    pub fn cgroup(&self) -> Option<Cgroup> {
        self.cgroup.get().cloned()
    }

    /// Why the VM is no use, if it did not come up or has ended.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        match &*self.progress.borrow() {
            Progress::Failed(error) => Some(error.clone()),
            Progress::Launched(vm) | Progress::Ready(vm) => vm.death().map(|death| death.error()),
            Progress::Launching => None,
        }
    }

    /// Whether the agent can be asked.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(&*self.progress.borrow(), Progress::Ready(_))
    }

    /// Waits until the boot has come to its end, whichever.
    pub async fn settled(&self) {
        let _ = self.ready().await;
    }
}

async fn boot(
    host: Arc<dyn Host>,
    mut plan: Plan,
    mut sandbox: Sandbox,
    made: &OnceLock<Cgroup>,
    progress: &watch_channel::Sender<Progress>,
    news: mpsc::Sender<News>,
    logger: &Logger,
) -> Result<Arc<Vm>> {
    let timeouts = Timeouts::of(&plan.config);
    if let Some(path) = plan.cgroup_path.clone() {
        let host = Arc::clone(&host);
        let made = tokio::task::spawn_blocking(move || host.make_cgroup(&path));
        plan.cgroup = made.await.map_err(worker_ended)??;
    }
    let cgroup = plan.cgroup.clone();
    if let Some(cgroup) = &cgroup {
        let _ = made.set(cgroup.clone());
        let _ = news.send(News::Cgroup(cgroup.clone())).await;
    }
    let mark = |name: &str, at: SystemTime| {
        let _ = news.try_send(News::Mark(name.to_owned(), at));
    };
    ask_kubelet(&mut plan, logger).await?;
    mark("vmm.launch", SystemTime::now());
    let executed = SystemTime::now();
    let wanted = network::Wanted::of(&plan.config);
    let netns = match &plan.network {
        Network::Path(path) => Some(path.clone()),
        Network::New => None,
    };
    let modules = plan.config.modules.clone();
    let mut launched = tokio::task::spawn_blocking(move || host.launch(&plan))
        .await
        .map_err(worker_ended)??;
    mark("vmm.launched", SystemTime::now());
    sandbox.network = std::mem::take(&mut launched.network);
    for what in &sandbox.network.left_out {
        warn!(logger, "the guest's network is not all of the pod's"; "left_out" => what);
    }
    let parts = Parts {
        timeouts,
        cgroup,
        wanted,
        filter: sandbox.network.filter.given(),
    };
    let origin = launched.origin.clone();
    let (vm, machine, incoming) = adopt(launched, parts, logger)?;
    let _ = news.send(News::Launched(Arc::clone(&vm))).await;
    progress.send_replace(Progress::Launched(Arc::clone(&vm)));
    // Meanwhile the guest boots.
    let inherited = inherit(netns.clone(), sandbox.network.interface_names());
    let localhost = tokio::task::spawn_blocking(move || {
        netns.map(|path| Localhost::take_over(&path)).transpose()
    });
    let sandbox = Wanted {
        sandbox,
        inherited,
        modules: share_modules(Arc::clone(&vm), modules),
        netfilter: wanted.netfilter,
    };
    match bring_up(&vm, machine, incoming, sandbox, &news, executed, logger).await {
        Ok(()) => {
            forward_ports(localhost, &vm, logger).await;
            if let GuestOrigin::BootFirst(recipe) = origin {
                let logger = logger.clone();
                // A thread of its own: nothing waits for it, not even the end of the pod.
                std::thread::spawn(move || maker::have_made(&recipe, &logger));
            }
            Ok(vm)
        }
        Err(error) => {
            vm.kill();
            vm.ended().await;
            if let (GuestOrigin::Template(recipe), Some(_)) = (origin, vm.template()) {
                drop_template(&recipe, &error.message, logger);
            }
            Err(error)
        }
    }
}

/// The next pod boots, and has another made.
fn drop_template(recipe: &Recipe, reason: &str, logger: &Logger) {
    warn!(logger, "the template is dropped"; "template" => &recipe.key, "reason" => reason);
    if let Err(error) = Templates::beside(&recipe.state_dir).drop_one(&recipe.key) {
        warn!(logger, "the template cannot be dropped"; "template" => &recipe.key, "error" => %error);
    }
}

/// A node that cannot forward ports gets its pods all the same.
/// Has the devices that kubelet has assigned to the pod in its plan, if the handler's configuration says where to ask. A pod
/// with any boots its guest: a template has no room for them.
async fn ask_kubelet(plan: &mut Plan, logger: &Logger) -> Result<()> {
    let (Some(socket), Some(pod)) = (&plan.config.pod_resources, &plan.pod) else {
        return Ok(());
    };
    let patience = plan.config.timeout(KUBELET);
    let asked = pod_resources::of_pod(socket, pod, patience).await;
    plan.assigned = asked.map_err(|error| {
        Error::unavailable(format!(
            "kubelet does not say at {} (pod_resources of Brig's configuration) which devices the pod has: {error}",
            socket.display()
        ))
    })?;
    if !plan.assigned.is_empty() {
        plan.template = None;
        let names = plan.assigned.iter().map(|one| one.name.as_str());
        debug!(logger, "kubelet has assigned devices"; "names" => names.collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

async fn forward_ports(
    localhost: JoinHandle<std::result::Result<Option<Localhost>, ForwardError>>,
    vm: &Arc<Vm>,
    logger: &Logger,
) {
    let reason = match localhost.await {
        Ok(Ok(None)) => return,
        Ok(Ok(Some(localhost))) => {
            tokio::spawn(localhost.serve(Arc::clone(vm), logger.clone()));
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    warn!(logger, "port-forward will not work for this pod"; "reason" => reason);
}

/// A sandbox, and what of it is still being found out.
struct Wanted {
    sandbox: Sandbox,
    inherited: JoinHandle<Inherited>,
    modules: JoinHandle<Result<()>>,
    netfilter: Netfilter,
}

/// Puts the image of the kernel's modules where the guest finds it when it wants one. It is one mount of the VMM's namespace;
/// the guest does not look at it before.
fn share_modules(vm: Arc<Vm>, image: PathBuf) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        let how = Attributes {
            readonly: true,
            ..Attributes::default()
        };
        let attached = vm
            .with_mounts(move |mounts| mounts.attach(MODULES_PATH, &image, how).map(drop))
            .await;
        // Held no longer than that: the VM goes with its last holder.
        drop(vm);
        attached
    })
}

/// Reads the parameters of the node and of the pod's network namespace.
fn inherit(netns: Option<PathBuf>, interfaces: Vec<String>) -> JoinHandle<Inherited> {
    tokio::task::spawn_blocking(move || {
        // A namespace that has just gone ends the pod by itself.
        let found = netns.and_then(|path| network::inherited(&path, &interfaces).ok());
        let mut inherited = found.unwrap_or_default();
        inherited.general.splice(0..0, network::limits_of_node());
        inherited
    })
}

fn worker_ended(error: tokio::task::JoinError) -> Error {
    Error::internal(format!("a worker of the launch ended: {error}"))
}

/// What the VMM is asked to build.
struct Machine {
    config: Box<VmConfig>,
    fds: Vec<OwnedFd>,
    given: Option<Given>,
    origin: GuestOrigin,
}

/// What a VM is told of its pod.
struct Parts {
    timeouts: Timeouts,
    cgroup: Option<Cgroup>,
    wanted: network::Wanted,
    /// The state of the packet filter that it gets.
    filter: Option<u32>,
}

/// Takes charge of a launched VMM: from here on its end is noticed and it is reaped.
fn adopt(
    launched: Launched,
    parts: Parts,
    logger: &Logger,
) -> Result<(Arc<Vm>, Machine, AgentConnected)> {
    let Parts {
        timeouts,
        cgroup,
        wanted,
        filter,
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
        let known = Known {
            interfaces: nets.map(|net| net.mac).collect(),
            filter,
        };
        Late::new(netns, wanted, known)
    });
    let vm = Arc::new(Vm {
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
        passthrough: Arc::default(),
        disks: Arc::default(),
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
    tokio::spawn(watch_connection(
        Arc::downgrade(&vm),
        connection,
        logger.clone(),
    ));
    tokio::spawn(relieve(Arc::downgrade(&vm), pressure, logger.clone()));
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

type AgentConnected = tokio::sync::oneshot::Receiver<()>;

async fn bring_up(
    vm: &Arc<Vm>,
    machine: Machine,
    agent_connected: AgentConnected,
    wanted: Wanted,
    news: &mpsc::Sender<News>,
    executed: SystemTime,
    logger: &Logger,
) -> Result<()> {
    let boot_time = vm.timeouts.boot;
    let connected = async {
        let Machine {
            config,
            fds,
            given,
            origin,
        } = machine;
        let begun = vm.control.begin(config, fds).await;
        let connected = match begun {
            Ok(started) => {
                if let Some(given) = given {
                    vm.hold(given, &started.functions).await;
                }
                note_origin(vm, &origin, started, logger);
                agent_connected.await.map_err(|_| ControlError::Ended)
            }
            Err(error) => Err(error),
        };
        match connected {
            Ok(()) => Ok(()),
            Err(error) => Err(vm.explain(error).await),
        }
    };
    match timeout(boot_time, connected).await {
        Ok(result) => result?,
        Err(_) => {
            return Err(Error::new(
                Kind::DeadlineExceeded,
                format!(
                    "the guest's agent never answered: no call within {:.0} s of the VM's start \
                     (set debug_console to see the guest's kernel messages)",
                    boot_time.as_secs_f64()
                ),
            ));
        }
    }
    let mark = |name: &str| {
        let _ = news.try_send(News::Mark(name.to_owned(), SystemTime::now()));
    };
    mark("agent.connected");
    if vm.template().is_some() {
        vm.have_built_cpus(logger).await?;
    }
    // None of the three waits for another, and each is a way to the guest and back.
    let log = async {
        follow_log(vm, logger).await;
        Ok(())
    };
    let sandbox = async {
        start_sandbox(vm, wanted, logger).await?;
        mark(SANDBOX_STARTED);
        Ok(())
    };
    tokio::try_join!(log, sandbox, subscribe(vm, news.clone(), logger))?;
    tokio::spawn(report_counters(Arc::clone(vm), news.clone(), executed));
    tokio::spawn(watch_agent(Arc::downgrade(vm), logger.clone()));
    tokio::spawn(clock::keep(Arc::clone(vm), logger.clone()));
    tokio::spawn(async {
        sleep(SETTLED).await;
        heap::trim();
    });
    Ok(())
}

/// Remembers whether the guest goes on from its template.
fn note_origin(vm: &Vm, origin: &GuestOrigin, started: Started, logger: &Logger) {
    let GuestOrigin::Template(recipe) = origin else {
        return;
    };
    if started.cloned {
        let _ = vm.template.set(recipe.key.clone());
    } else if let Some(reason) = started.refused {
        drop_template(recipe, &reason, logger);
    }
}

async fn start_sandbox(vm: &Vm, wanted: Wanted, logger: &Logger) -> Result<()> {
    let Wanted {
        mut sandbox,
        inherited,
        modules,
        netfilter,
    } = wanted;
    let inherited = inherited.await.map_err(worker_ended)?;
    // Before anything of the pod may ask for one. A pod without modules runs as long as it needs none.
    if let Err(error) = modules.await.map_err(worker_ended)? {
        warn!(logger, "this pod's kernel has no modules"; "reason" => &error.message);
    }
    sandbox.network.inherit(inherited);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let network = sandbox.network;
    let request = StartSandboxRequest {
        id: sandbox.id,
        hostname: sandbox.hostname,
        sysctls: sandbox.sysctls.into_iter().collect(),
        shm_size: sandbox.shm_size,
        return_files: sandbox.return_files,
        unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        share_tag: SHARE_TAG.to_owned(),
        interfaces: network.interfaces,
        routes: network.routes,
        neighbours: network.neighbours,
        inherited: network.sysctls,
        netfilter: network.filter.request(netfilter).into(),
        ..StartSandboxRequest::default()
    };
    let answer = vm
        .agent
        .start_sandbox(context::Context::default(), &request);
    let answer = vm.call("StartSandbox", answer).await?;
    if let Some(late) = &vm.late {
        late.loaded(answer.netfilter_generation);
    }
    let release = answer.kernel_release.chars();
    let release = release.filter(char::is_ascii_graphic).take(MAX_RELEASE);
    let _ = vm.kernel_release.set(release.collect());
    let refused = &answer.netfilter_refused;
    Ok(network.filter.accept(refused, netfilter, logger)?)
}

/// Forwards the agent's own log.
async fn follow_log(vm: &Vm, logger: &Logger) {
    let Ok((read, write)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) else {
        return;
    };
    match vm.open_numbered(LOG_STREAM, None, Some(write)).await {
        Ok(_end) => {
            tokio::spawn(lines::forward(read, "agent", logger.clone()));
        }
        Err(error) => warn!(logger, "no log of the agent"; "error" => error.message),
    }
}

/// Passes the agent's events to the pod, in order, until the VM ends.
async fn subscribe(vm: &Arc<Vm>, news: mpsc::Sender<News>, logger: &Logger) -> Result<()> {
    let request = Empty::new();
    let answer = vm.agent.events(context::Context::default(), &request);
    let mut events = vm.call("Events", answer).await?;
    let (ahead, logger) = (Arc::clone(&vm.ahead), logger.clone());
    let vm = Arc::downgrade(vm);
    tokio::spawn(async move {
        while let Ok(Some(event)) = events.recv().await {
            if news.send(News::Agent(Box::new(event))).await.is_err() {
                return;
            }
            ahead.taken();
        }
        debug!(logger, "the agent's events have ended");
        // Without them no end of a process would be heard of.
        let why = "ended its events, or sent one that is none";
        end_unless_over(vm, why, &logger).await;
    });
    Ok(())
}

/// Ends a VM whose agent has broken the connection, or the rules of it.
async fn watch_connection(vm: Weak<Vm>, ended: oneshot::Receiver<Ending>, logger: Logger) {
    match ended.await {
        Ok(Ending::Broken(rule)) => {
            if let Some(vm) = vm.upgrade() {
                cut_off(&vm, &rule, &logger);
            }
        }
        Ok(Ending::Closed) | Err(_) => end_unless_over(vm, "closed its connection", &logger).await,
    }
}

/// Ends a VM that goes on although its agent has ended. A guest that powers off closes everything shortly before.
async fn end_unless_over(vm: Weak<Vm>, why: &str, logger: &Logger) {
    let Some(vm) = vm.upgrade() else { return };
    if timeout(vm.timeouts.stop, vm.ended()).await.is_err() {
        cut_off(&vm, why, logger);
    }
}

fn cut_off(vm: &Vm, why: &str, logger: &Logger) {
    let reason = format!("the guest's agent {why}, and the VM was stopped");
    error!(logger, "the VM is stopped"; "reason" => &reason);
    vm.end(reason);
}

/// The VMM's own boot marks and its exits up to the agent's call, for the timeline.
async fn report_counters(vm: Arc<Vm>, news: mpsc::Sender<News>, executed: SystemTime) {
    let Ok(counters) = vm.control.counters().await else {
        return;
    };
    for (value, micros) in counters.marks.into_iter().take(32) {
        let name = match value {
            mark::VMM_MAIN => "vmm.main".to_owned(),
            mark::JAILED => "vmm.jailed".to_owned(),
            mark::START => "vmm.start".to_owned(),
            mark::BUILT => "vmm.built".to_owned(),
            mark::KERNEL_ENTRY => "kernel.entry".to_owned(),
            mark::RESUMED => "guest.resumed".to_owned(),
            // The shim has its own mark for this moment.
            mark::AGENT_CONNECTED => continue,
            0xB1 => "guest.init".to_owned(),
            0xB2 => "guest.agent".to_owned(),
            other => format!("mark.{other:#x}"),
        };
        let at = executed + Duration::from_micros(micros);
        let _ = news.try_send(News::Mark(name, at));
    }
    let _ = news.try_send(News::Exits(counters.exits));
}

/// Asks the guest to let go of cached files when the file server runs short of descriptors; one
/// request at a time.
async fn relieve(vm: Weak<Vm>, pressure: Arc<Notify>, logger: Logger) {
    loop {
        let Some(held) = vm.upgrade() else { return };
        tokio::select! {
            () = pressure.notified() => {}
            _ = held.ended() => return,
        }
        debug!(logger, "the guest is asked to drop its caches");
        let request = Empty::new();
        let answer = held
            .agent
            .drop_caches(context::Context::default(), &request);
        let _ = held.call("DropCaches", answer).await;
    }
}

/// Asks the agent for a sign of life now and then; one that is silent for several is stopped.
async fn watch_agent(vm: Weak<Vm>, logger: Logger) {
    let mut missed = 0;
    loop {
        let Some(held) = vm.upgrade() else { return };
        let interval = held.timeouts.ping;
        drop(held);
        sleep(interval).await;
        let Some(vm) = vm.upgrade() else { return };
        if vm.death().is_some() {
            return;
        }
        let request = Empty::new();
        let answer = vm.agent.ping(context::Context::default(), &request);
        match timeout(interval, answer).await {
            Ok(Ok(_)) => {
                missed = 0;
                // Awake anyway.
                heap::trim();
            }
            // Its CPUs stand still, or did.
            _ if vm.is_debugged() => missed = 0,
            _ => {
                missed += 1;
                warn!(logger, "the guest's agent is silent"; "missed" => missed);
            }
        }
        if missed == MISSES {
            let seconds = (interval * (2 * MISSES)).as_secs_f64();
            cut_off(&vm, &format!("was silent for {seconds:.0} s"), &logger);
            return;
        }
    }
}
