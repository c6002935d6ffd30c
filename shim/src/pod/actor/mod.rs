//! The pod: one VM and the containers in it. An actor like a container: it routes, starts the VM for
//! the first container, ends it after the last, and keeps the journal and the timeline.

mod counting;
mod ending;
mod ends;
mod handle;
mod inspection;
mod oom;
mod sandbox;
mod sandbox_state;
mod tracing;
mod wanted;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use brig_agent_protocol::agent::{Event, event};
use futures::FutureExt as _;
use slog::{Logger, info, warn};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::asked::config::{Config, LogFormat, MIB};
use crate::asked::pod_name::PodName;
use crate::asked::spec::{Network, Role};
use crate::error::{Error, Kind, Result};
use crate::guest::vm::Host;
use crate::guest::vm::boot::{Boot, News, SANDBOX_STARTED};
use crate::log::{Control, JOURNAL, Journald};
use crate::node::cgroup::Cgroup;
use crate::node::collector::Collector;
use crate::node::identity::Identity;
use crate::node::journal::{Ending, Journal, StateDir};
use crate::node::remains::Remains;
use crate::node::stand_in::StandIn;
use crate::pod::container::{self, ContainerHandle, Context, Creation, Reply};
use crate::pod::doomed::Doomed;
use crate::pod::events::Events;
use crate::pod::node_limits::NodeLimits;
use crate::pod::process::Exit;
use crate::pod::size::PodSize;
use crate::pod::spans::Named;
use crate::pod::stdio::streaming::Streams;
use crate::pod::timeline::{CONTAINER_STARTED, Timeline};
use counting::Counting;
use handle::Message;
pub use handle::{Inspection, PodHandle, SandboxCreation, SandboxState};
use sandbox_state::Sandbox;
use tracing::Tracing;
use wanted::Wanted;

/// Messages that wait for the pod.
const MAILBOX: usize = 128;
/// News of the VM that wait for the pod.
const NEWS: usize = 256;

/// What the pod is told at its beginning.
pub struct Setup {
    /// containerd namespace.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// Its directory, which exists.
    pub state: StateDir,
    /// What is in the journal so far.
    pub journal: Journal,
    /// When `start` was called.
    pub began: SystemTime,
    /// The node.
    pub host: Arc<dyn Host>,
    /// Events to containerd.
    pub events: Events,
    /// The log.
    pub logger: Logger,
    /// What of it can be changed.
    pub log: Arc<Control>,
    /// containerd's streams.
    pub streams: Streams,
    /// Where containerd sends its spans, if it does.
    pub collector: Option<Collector>,
}

/// Where the pod's VM is.
#[derive(Debug)]
enum Stage {
    Empty,
    Up(Boot),
    Stopping,
    Stopped,
}

struct Pod {
    setup: Setup,
    mailbox: mpsc::Sender<Message>,
    context: Context,
    news: mpsc::Sender<News>,
    stage: Stage,
    containers: HashMap<String, ContainerHandle>,
    /// Through the Sandbox API; a pod of 1.x has a sandbox container instead.
    sandbox: Option<Sandbox>,
    /// Containers of the pod by their pids on the node.
    pids: HashMap<u32, String>,
    oom_scores: oom::OomScores,
    /// Between SIGTERM and SIGKILL when the node shuts down.
    grace: Duration,
    timeline: Timeline,
    tracing: Tracing,
    counting: Counting,
    waiting: Vec<oneshot::Sender<bool>>,
    /// The shim is to end with the pod.
    with_shim: bool,
    /// Turned true when both are at their end.
    over: watch::Sender<bool>,
    /// Cuts the grace short.
    hurry: Arc<Notify>,
    /// The sandbox container of a pod of CRI.
    stub: Option<String>,
    /// The configuration of its VM.
    in_force: Option<Config>,
    /// Why it failed, once that is known.
    failure: Option<Error>,
    /// Its state for those who look, and since when.
    state: &'static str,
    since: SystemTime,
}

/// Starts the pod's actor.
#[must_use]
pub fn spawn(setup: Setup) -> PodHandle {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (news, news_in) = mpsc::channel(NEWS);
    let (removed, removed_in) = mpsc::unbounded_channel();
    let context = Context {
        namespace: setup.namespace.clone(),
        events: setup.events.clone(),
        logger: setup.logger.clone(),
        volumes: crate::pod::volume::Volumes::new(setup.logger.clone()),
        news: news.clone(),
        removed,
        drain: Duration::from_secs(10),
        driver_bundle: None,
        direct_volumes: false,
        streams: setup.streams.clone(),
        size: PodSize::default(),
        doomed: Doomed::default(),
        node_limits: NodeLimits::default(),
    };
    let began = setup.began;
    let tracing = Tracing::new(setup.collector.clone());
    let mut timeline = Timeline::new(began);
    timeline.mark("shim.serving", SystemTime::now());
    let pod = Pod {
        setup,
        mailbox: mailbox.clone(),
        context,
        news,
        stage: Stage::Empty,
        containers: HashMap::new(),
        sandbox: None,
        pids: HashMap::new(),
        oom_scores: oom::OomScores::default(),
        grace: Duration::ZERO,
        timeline,
        tracing,
        counting: Counting::default(),
        waiting: Vec::new(),
        with_shim: false,
        over: watch::Sender::new(false),
        hurry: Arc::default(),
        stub: None,
        in_force: None,
        failure: None,
        state: "creating",
        since: began,
    };
    let handle = pod.handle_of_it();
    tokio::spawn(pod.run(messages, news_in, removed_in));
    handle
}

impl Pod {
    async fn run(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        mut news: mpsc::Receiver<News>,
        mut removed: mpsc::UnboundedReceiver<String>,
    ) {
        loop {
            // Removals first: a Shutdown that follows a Delete must see it.
            tokio::select! {
                biased;
                Some(id) = removed.recv() => self.removed(&id).await,
                Some(news) = news.recv() => {
                    self.news(news).await;
                    // In turns: a guest that never stops talking must not keep containerd waiting.
                    while let Ok(id) = removed.try_recv() {
                        self.removed(&id).await;
                    }
                    if let Ok(message) = messages.try_recv() {
                        self.handle(message).await;
                    }
                }
                message = messages.recv() => match message {
                    Some(message) => self.handle(message).await,
                    None => return,
                }
            }
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Create {
                creation,
                config,
                reply,
            } => {
                let mut creation = *creation;
                let named = self.name_pids(&mut creation).await;
                match named.and_then(|()| self.add_files(&mut creation)) {
                    Ok(()) => self.create(creation, config, reply),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Message::Find { id, reply } => {
                let found = self.containers.get(&id).cloned();
                let _ = reply.send(
                    found.ok_or_else(|| Error::not_found(format!("container {id} not found"))),
                );
            }
            Message::Vm { reply } => {
                let vm = match &self.stage {
                    Stage::Up(boot) => boot.vm(),
                    _ => None,
                };
                let _ = reply.send(vm);
            }
            Message::Sandbox(ask) => self.sandbox_asked(ask).await,
            Message::Inspect { reply } => drop(reply.send(self.inspection())),
            // What is asked for twice is there.
            Message::PartOf(trace) => self.tracing.part_of(trace),
            Message::Refused(id, error) => {
                // A pod that has others goes on, and what was refused may be asked for again.
                let others = self.containers.keys().any(|one| *one != id);
                let of_sandbox = self.sandbox.is_some() && self.setup.id != id;
                if !others && !of_sandbox && error.kind != Kind::AlreadyExists {
                    self.failure.get_or_insert(error);
                }
            }
            Message::VmEnded(death) => {
                if matches!(self.stage, Stage::Up(_)) {
                    self.enter("ended");
                }
                self.sandbox_ended(death.at);
                for container in self.containers.values() {
                    container.vm_ended(death.clone()).await;
                }
            }
            Message::Shutdown { end, reply } => self.end(end, reply).await,
            Message::Stopped => {
                self.stage = Stage::Stopped;
                self.enter("stopped");
                self.sandbox_ended(SystemTime::now());
                self.tell_end();
            }
        }
    }

    fn handle_of_it(&self) -> PodHandle {
        PodHandle {
            mailbox: self.mailbox.clone(),
            over: self.over.subscribe(),
        }
    }

    /// Gives a container of a pod its pid on the node, and finds whose pid namespace it joins by the
    /// pid in its spec: another container's, or the sandbox's, which is the VMM's.
    async fn name_pids(&mut self, creation: &mut Creation) -> Result<()> {
        let Role::Member(_) = creation.role else {
            return Ok(());
        };
        if let Some(pid) = creation.spec.pid_namespace_of() {
            creation.pid_namespace_of = self.pids.get(&pid).cloned();
            let vmm = match &self.stage {
                Stage::Up(boot) => boot.vm().map(|vm| vm.pid()),
                _ => None,
            };
            if creation.pid_namespace_of.is_none() && vmm.is_some_and(|vmm| vmm != pid) {
                return Err(Error::state(format!(
                    "the container whose pid namespace {} joins (pid {pid}) is not in this pod",
                    creation.id
                )));
            }
        }
        match StandIn::start(self.setup.journal.netns.clone()).await {
            Ok(stand_in) => creation.stand_in = Some(stand_in),
            Err(error) => {
                warn!(self.setup.logger, "a container has no pid of its own, so none can join its pid namespace";
                    "container" => &creation.id, "error" => %error);
            }
        }
        Ok(())
    }

    fn create(&mut self, creation: Creation, config: Option<Box<Config>>, reply: Reply<u32>) {
        let refused = match self.stage {
            Stage::Stopping | Stage::Stopped => Some(Error::state("the pod has ended")),
            _ if self.containers.contains_key(&creation.id) => Some(Error::already_exists(
                format!("container {} exists already", creation.id),
            )),
            _ => None,
        };
        if let Some(error) = refused {
            let _ = reply.send(Err(error));
            return;
        }
        let boot = match (&self.stage, config) {
            (Stage::Up(boot), _) => boot.clone(),
            (_, None) => {
                let sandbox = match &creation.role {
                    Role::Member(sandbox) => sandbox,
                    Role::Single | Role::Sandbox => &creation.id,
                };
                let error = format!("the sandbox {sandbox} has no VM; create the pod again");
                let _ = reply.send(Err(Error::state(error)));
                return;
            }
            (_, Some(config)) => match Wanted::of(&creation.spec, &creation.role, *config) {
                Ok(wanted) => {
                    self.setup.journal.pod = PodName::of_annotations(creation.spec.annotations());
                    self.boot(wanted)
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    return;
                }
            },
        };
        let id = creation.id.clone();
        if let Some(stand_in) = &creation.stand_in {
            self.pids.insert(stand_in.pid(), id.clone());
        }
        if let Role::Member(_) = creation.role {
            let adjustment = creation.spec.oom_score_adj().unwrap_or(0);
            self.oom_scores.add(&id, adjustment);
            if let Some(vm) = boot.vm() {
                self.oom_scores.apply(vm.pid(), &self.setup.logger);
            }
        }
        let context = self.context.clone();
        let handle = if creation.role == Role::Sandbox {
            self.stub = Some(id.clone());
            let pod = self.handle_of_it();
            let end_pod = Box::new(move || {
                let pod = pod.clone();
                async move { pod.stop().await }.boxed()
            });
            container::sandbox::spawn(context, creation, boot, end_pod, reply)
        } else {
            container::spawn(context, creation, boot, reply)
        };
        self.containers.insert(id, handle);
    }

    fn boot(&mut self, wanted: Wanted) -> Boot {
        self.timeline.mark("create.received", SystemTime::now());
        self.context.drain = wanted.config.timeout(10);
        self.context
            .driver_bundle
            .clone_from(&wanted.config.driver_bundle);
        self.context.direct_volumes = wanted.config.direct_volumes;
        self.grace = wanted.config.scaled(wanted.config.shutdown_grace);
        if let Network::Path(path) = &wanted.network {
            self.setup.journal.netns = Some(path.clone());
        }
        let (mut plan, sandbox, size) = wanted.plan(&self.setup.id);
        plan.pod.clone_from(&self.setup.journal.pod);
        self.context.size = size;
        let (level, format) = (plan.config.log_level, plan.config.log_format);
        self.setup
            .log
            .configure(level.level(), format == LogFormat::Json);
        if plan.config.journald {
            match Journald::connect(Path::new(JOURNAL)) {
                Ok(journal) => self.setup.log.enter_into(journal),
                Err(error) => warn!(self.setup.logger, "nothing is logged to the journal";
                    "socket" => JOURNAL, "reason" => %error),
            }
        }
        self.in_force = Some(Config {
            memory: plan.memory,
            ..plan.config.clone()
        });
        self.enter("starting");
        info!(self.setup.logger, "a VM is started";
            "vcpus" => plan.config.vcpus, "memory_mib" => plan.memory / MIB);
        let host = Arc::clone(&self.setup.host);
        let logger = self.setup.logger.clone();
        let boot = Boot::start(host, plan, sandbox, self.news.clone(), logger);
        self.stage = Stage::Up(boot.clone());
        boot
    }

    async fn news(&mut self, news: News) {
        match news {
            News::Cgroup(cgroup) => {
                self.context.node_limits.is_in(cgroup.clone());
                self.setup.journal.cgroup = Some(cgroup);
                self.write_journal().await;
            }
            News::Launched(vm) => {
                self.setup.journal.vmm = Identity::of(vm.pid());
                self.write_journal().await;
                let mailbox = self.mailbox.clone();
                tokio::spawn(async move {
                    let death = vm.ended().await;
                    let _ = mailbox.send(Message::VmEnded(death)).await;
                });
            }
            News::Mark(name, at) => {
                self.timeline.mark(&name, at);
                if name == SANDBOX_STARTED {
                    self.enter("ready");
                }
                if name.starts_with("container.") {
                    self.write_timeline().await;
                }
                if name == CONTAINER_STARTED {
                    let named = Named {
                        namespace: &self.setup.namespace,
                        id: &self.setup.id,
                        pod: self.setup.journal.pod.as_ref(),
                    };
                    let logger = &self.setup.logger;
                    self.tracing.started(&self.timeline, &named, logger);
                    self.count_start();
                }
            }
            News::Exits(exits) => {
                self.timeline.exits = exits.into_iter().take(64).collect::<BTreeMap<_, _>>();
                self.write_timeline().await;
            }
            News::Agent(event) => self.agent_event(*event).await,
        }
    }

    /// What the agent says is believed only about containers that exist.
    async fn agent_event(&mut self, event: Event) {
        match event.kind {
            Some(event::Kind::Exit(exit)) => {
                let Some(container) = self.containers.get(&exit.id) else {
                    return;
                };
                let status = exit.exit.status;
                let at = Duration::from_nanos(exit.exit.exited_at_unix_ns);
                let at = SystemTime::UNIX_EPOCH + at;
                container.exited(exit.exec_id, Exit { status, at }).await;
            }
            Some(event::Kind::Oom(oom)) => {
                if let Some(container) = self.containers.get(&oom.id) {
                    container.oom().await;
                }
            }
            _ => {}
        }
    }

    async fn removed(&mut self, id: &str) {
        self.containers.remove(id);
        self.context.size.gone(id);
        self.context.node_limits.gone(id, &self.setup.logger);
        self.pids.retain(|_, container| container != id);
        self.oom_scores.remove(id);
        if let Stage::Up(boot) = &self.stage
            && let Some(vm) = boot.vm()
        {
            self.oom_scores.apply(vm.pid(), &self.setup.logger);
        }
        let over = self.containers.is_empty() && self.sandbox.is_none();
        if over && matches!(self.stage, Stage::Up(_)) {
            self.stop(Duration::ZERO).await;
        }
    }

    /// Ends the VM, with `grace` for its processes, and undoes what the pod left on the host; repeatable, and
    /// the second time without grace cuts that of the first short.
    async fn stop(&mut self, grace: Duration) {
        let account = self.last_account();
        let boot = match std::mem::replace(&mut self.stage, Stage::Stopping) {
            Stage::Up(boot) => Some(boot),
            Stage::Empty => None,
            stage @ (Stage::Stopping | Stage::Stopped) => {
                self.stage = stage;
                if grace.is_zero() {
                    self.hurry.notify_one();
                }
                return;
            }
        };
        self.enter("stopping");
        self.count_start();
        let counted = self.counting.last();
        self.setup.journal.ending = Some(if self.containers.is_empty() {
            Ending::Emptied
        } else {
            Ending::Inhabited
        });
        // One without a VM is gone before anybody could read it.
        if boot.is_some() {
            self.write_journal().await;
        }
        let state = self.setup.state.clone();
        let (mailbox, logger) = (self.mailbox.clone(), self.setup.logger.clone());
        let mut cgroup = self.setup.journal.cgroup.clone();
        let netns = self.setup.journal.netns.clone();
        let hurry = Arc::clone(&self.hurry);
        // The sandbox container's end follows that of the pod.
        let is_stub = |id: &String| self.stub.as_ref() == Some(id);
        let containers: Vec<ContainerHandle> = self
            .containers
            .iter()
            .filter(|(id, _)| !is_stub(id))
            .map(|(_, container)| container.clone())
            .collect();
        let drain = self.context.drain;
        tokio::spawn(async move {
            if let Some(boot) = boot {
                cgroup = ending::end(&boot, (grace, &hurry), (&containers, drain), cgroup).await;
            }
            if let Some(counted) = counted {
                let _ = counted.await;
            }
            let log = logger.clone();
            let cleaned = tokio::task::spawn_blocking(move || {
                // CNI removes the namespace anyway, in its own time.
                if let Some(netns) = netns
                    && let Err(error) = crate::node::network::undo(&netns)
                {
                    warn!(log, "the pod's network is left redirected"; "error" => %error);
                }
                if let Some(account) = account {
                    account();
                }
                let remove = |it: Cgroup| it.remove().or_else(|_| it.leave_and_remove());
                let removed = cgroup.map_or(Ok(()), remove);
                state.remove();
                removed
            })
            .await;
            if let Ok(Err(error)) = cleaned {
                warn!(logger, "the pod's cgroup is left"; "error" => %error);
            }
            let _ = mailbox.send(Message::Stopped).await;
        });
    }

    fn count_start(&mut self) {
        let remains = Remains::beside(self.setup.state.base());
        self.counting
            .once(&self.timeline, remains, &self.setup.logger);
    }

    async fn write_journal(&self) {
        let (state, journal) = (self.setup.state.clone(), self.setup.journal.clone());
        let written = tokio::task::spawn_blocking(move || state.write(&journal)).await;
        if let Ok(Err(error)) = written {
            warn!(self.setup.logger, "the journal cannot be written"; "error" => error.message);
        }
    }

    async fn write_timeline(&self) {
        let Ok(bytes) = serde_json::to_vec(&self.timeline) else {
            return;
        };
        let state = self.setup.state.clone();
        // For show only; the directory may be gone already.
        let _ = tokio::task::spawn_blocking(move || state.write_timeline(&bytes)).await;
    }
}
