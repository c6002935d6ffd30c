//! Brings one VM up: launch, machine, agent, sandbox. Two moments are told apart, because host-side
//! work such as the root file system needs only the process and runs while the guest boots.

mod adopt;
mod living;
mod news;
mod sandbox;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use brig_hypervisor::control::NetConfig;
use slog::{Logger, debug, error, warn};
use tokio::sync::{mpsc, oneshot, watch as watch_channel};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::clock;
use super::control::{ControlError, Started};
use super::{GuestOrigin, Host, Plan, Timeouts, Vm};
use crate::asked::config::{ImageLayers, MIB};
use crate::asked::spec::Network;
use crate::error::{Error, Kind, Result};
use crate::guest::forward::{ForwardError, Localhost};
use crate::node::cgroup::Cgroup;
use crate::node::heap;
use crate::node::network;
use crate::node::pod_resources;
use crate::node::templates::{Recipe, Templates, maker};
use adopt::{AgentConnected, Machine, Parts, adopt};
pub use news::{News, SANDBOX_STARTED};
pub use sandbox::Sandbox;
use sandbox::{Wanted, inherit, share_modules, start_sandbox};

/// kubelet has this long to say what it has assigned, in seconds.
const KUBELET: u32 = 5;
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

/// Watches the progress of a boot; cheap to clone.
#[derive(Debug, Clone)]
pub struct Boot {
    progress: watch_channel::Receiver<Progress>,
    cgroup: Arc<OnceLock<Cgroup>>,
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
    sandbox: Sandbox,
    made: &OnceLock<Cgroup>,
    progress: &watch_channel::Sender<Progress>,
    news: mpsc::Sender<News>,
    logger: &Logger,
) -> Result<Arc<Vm>> {
    if let Some(path) = plan.cgroup_path.clone() {
        let host = Arc::clone(&host);
        let made = tokio::task::spawn_blocking(move || host.make_cgroup(&path));
        plan.cgroup = made.await??;
    }
    let mut entering = None;
    let (executed, born) = oneshot::channel();
    if let Some(cgroup) = &plan.cgroup {
        let _ = made.set(cgroup.clone());
        let _ = news.send(News::Cgroup(cgroup.clone())).await;
        entering = Some(tokio::spawn(enter(cgroup.clone(), born)));
    }
    let up = start(host, plan, sandbox, executed, progress, news, logger).await;
    // Also after a failure: what comes then removes the cgroup.
    let entered = match entering {
        Some(entering) => entering.await.unwrap_or_else(|error| Err(error.into())),
        None => Ok(()),
    };
    match (up, entered) {
        (Ok(vm), Err(error)) => {
            vm.kill();
            vm.ended().await;
            Err(error)
        }
        (up, _) => up,
    }
}

/// Moves this process to where its VMM was born, which takes the kernel as long as the VMM needs for its jail.
async fn enter(cgroup: Cgroup, born: oneshot::Receiver<()>) -> Result<()> {
    if born.await.is_err() {
        return Ok(());
    }
    let entered = tokio::task::spawn_blocking(move || {
        let dir = cgroup.dirs().first().cloned().unwrap_or_default();
        cgroup.join().map_err(|error| {
            Error::io(
                format_args!("cannot enter the cgroup {}", dir.display()),
                &error,
            )
        })
    });
    entered.await?
}

/// Launches the VMM, tells `executed` so, and brings its guest up.
async fn start(
    host: Arc<dyn Host>,
    mut plan: Plan,
    mut sandbox: Sandbox,
    executed: oneshot::Sender<()>,
    progress: &watch_channel::Sender<Progress>,
    news: mpsc::Sender<News>,
    logger: &Logger,
) -> Result<Arc<Vm>> {
    let timeouts = Timeouts::of(&plan.config);
    let cgroup = plan.cgroup.clone();
    let mark = |name: &str, at: SystemTime| {
        let _ = news.try_send(News::Mark(name.to_owned(), at));
    };
    ask_kubelet(&mut plan, logger).await?;
    mark("vmm.launch", SystemTime::now());
    let launched_at = SystemTime::now();
    let wanted = network::Wanted::of(&plan.config);
    let netns = match &plan.network {
        Network::Path(path) => Some(path.clone()),
        Network::New => None,
    };
    let modules = plan.config.modules.clone();
    let layers = plan.config.image_layers;
    let mut launched = tokio::task::spawn_blocking(move || host.launch(&plan, executed)).await??;
    mark("vmm.launched", SystemTime::now());
    sandbox.network = std::mem::take(&mut launched.network);
    sandbox.network.log(logger);
    if launched.machine.0.nets.iter().any(NetConfig::by_vhost) {
        mark("network.vhost", SystemTime::now());
    }
    let parts = Parts {
        timeouts,
        cgroup,
        wanted,
        filter: sandbox.network.filter.given(),
        // A device of the node that does I/O for a program reaches none of it.
        maps_layers: layers == ImageLayers::Memory && !launched.machine.0.passthrough,
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
    let called = connect(&vm, machine, incoming, logger).await;
    let is_useless = called.is_err() && is_to_blame(&vm);
    let up = match called {
        Ok(()) => bring_up(&vm, sandbox, &news, launched_at, logger).await,
        Err(error) => Err(error),
    };
    match up {
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
            if let (GuestOrigin::Template(recipe), Some(_), true) =
                (origin, vm.template(), is_useless)
            {
                drop_template(&recipe, &error.message, logger);
            }
            Err(error)
        }
    }
}

/// Whether it is the guest's or its VMM's own doing that the agent has not called, and not the node's or whoever ended the pod meanwhile.
fn is_to_blame(vm: &Vm) -> bool {
    vm.death().is_none_or(|death| !death.killed)
}

/// The next pod boots, and has another made.
fn drop_template(recipe: &Recipe, reason: &str, logger: &Logger) {
    warn!(logger, "the template is dropped"; "template" => &recipe.key, "reason" => reason);
    if let Err(error) = Templates::beside(&recipe.state_dir).drop_one(&recipe.key) {
        warn!(logger, "the template cannot be dropped"; "template" => &recipe.key, "error" => %error);
    }
}

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

/// A node that cannot forward ports gets its pods all the same.
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

/// Starts the machine, and waits for its agent's call.
async fn connect(
    vm: &Arc<Vm>,
    machine: Machine,
    agent_connected: AgentConnected,
    logger: &Logger,
) -> Result<()> {
    let Machine {
        config,
        fds,
        given,
        origin,
    } = machine;
    let boot_time = vm.timeouts.boot;
    // Devices of the node are given before the guest runs, and with them all its memory is pinned.
    let (what, limit) = if config.devices.is_empty() {
        ("build the machine".to_owned(), boot_time)
    } else {
        let what = format!(
            "build the machine, for whose devices of the node it pins all {} MiB of the memory,",
            config.memory_bytes.div_ceil(MIB)
        );
        (what, boot_time + vm.timeouts.pinning(config.memory_bytes))
    };
    let begun = timeout(limit, vm.control.begin(config, fds)).await;
    let started = match begun.unwrap_or(Err(ControlError::Silent { what, limit })) {
        Ok(started) => started,
        Err(error) => {
            // The VMM may have the devices as long as there is a process of it.
            let mut death = vm.death.clone();
            tokio::spawn(async move {
                let _ = death.wait_for(Option::is_some).await;
                drop(given);
            });
            return Err(vm.explain(error).await);
        }
    };
    if let Some(given) = given {
        vm.hold(given, &started.functions).await;
    }
    note_origin(vm, &origin, started, logger);
    match timeout(boot_time, agent_connected).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(vm.explain(ControlError::Ended).await),
        Err(_) => Err(Error::new(
            Kind::DeadlineExceeded,
            format!(
                "the guest's agent never answered: no call within {:.0} s of the VM's start \
                 (set debug_console to see the guest's kernel messages)",
                boot_time.as_secs_f64()
            ),
        )),
    }
}

/// Makes the guest whose agent has called the pod's.
async fn bring_up(
    vm: &Arc<Vm>,
    wanted: Wanted,
    news: &mpsc::Sender<News>,
    executed: SystemTime,
    logger: &Logger,
) -> Result<()> {
    let mark = |name: &str| {
        let _ = news.try_send(News::Mark(name.to_owned(), SystemTime::now()));
    };
    mark("agent.connected");
    if vm.template().is_some() {
        vm.have_built_cpus(logger).await?;
    }
    // None of the three waits for another, and each is a way to the guest and back.
    let log = async {
        living::follow_log(vm, logger).await;
        Ok(())
    };
    let sandbox = async {
        start_sandbox(vm, wanted, logger).await?;
        mark(SANDBOX_STARTED);
        Ok(())
    };
    tokio::try_join!(log, sandbox, living::subscribe(vm, news.clone(), logger))?;
    tokio::spawn(living::report_counters(
        Arc::clone(vm),
        news.clone(),
        executed,
    ));
    tokio::spawn(living::watch_agent(Arc::downgrade(vm), logger.clone()));
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
