//! The sandbox: what all containers share, the table of containers, and their creation.
use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use brig_agent_protocol::agent;
use tokio::{sync::mpsc, sync::watch, time::timeout};

use crate::{
    cgroup::{self, Cgroup},
    container::{self, Command, Container, Mailbox, Parts},
    control::{Create, Instructions, MountSource},
    error::{Error, Result},
    events::Events,
    huge_pages::{HugePages, Reservation},
    launch::Launcher,
    reaper::Reaper,
    spec::{self, Spec},
    stdio::ChildEnds,
    streams::Streams,
    validate,
    volume::{self, Volumes},
};

/// Where the agent keeps things; differs between the guest and component tests.
#[derive(Clone, Debug)]
pub struct Places {
    /// The agent's own directory, invisible to containers.
    pub run: PathBuf,
    /// Where the share is, or is mounted.
    pub share: PathBuf,
    /// The cgroup v2 mount.
    pub cgroup_root: PathBuf,
    /// The parent of container cgroups, below it.
    pub cgroup_base: PathBuf,
    /// In a guest: mounts, clock, and power belong to the agent.
    pub owns_machine: bool,
}

/// How long [`Context::end_all`] waits for output that nobody reads.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// Counts copies of output that are still under way.
pub struct Outputs {
    busy: watch::Sender<usize>,
}

impl Default for Outputs {
    fn default() -> Self {
        Self {
            busy: watch::Sender::new(0),
        }
    }
}

impl Outputs {
    /// Counts `done` as under way until it resolves.
    pub fn spawn(&self, done: impl Future<Output = ()> + Send + 'static) {
        self.busy.send_modify(|n| *n += 1);
        let busy = self.busy.clone();
        tokio::spawn(async move {
            done.await;
            busy.send_modify(|n| *n -= 1);
        });
    }

    async fn idle(&self) {
        let mut receiver = self.busy.subscribe();
        let _ = receiver.wait_for(|n| *n == 0).await;
    }
}

enum Entry {
    /// Its id is taken; it cannot be spoken to yet.
    Creating,
    Ready(Mailbox),
}

/// What requests and container tasks share.
pub struct Context {
    /// See [`Places`].
    pub places: Places,
    /// The host's streams.
    pub streams: Streams,
    /// Starts helpers.
    pub launcher: Launcher,
    /// The event queue.
    pub events: Events,
    /// Copies under way.
    pub outputs: Outputs,
    /// Volumes in the guest's memory.
    pub volumes: Arc<Volumes>,
    /// Its huge pages.
    pub huge_pages: Arc<HugePages>,
    /// The log.
    pub logger: slog::Logger,
    containers: Mutex<HashMap<String, Entry>>,
    /// The process that holds the pid namespace which containers share, once one wants it.
    pid_holder: tokio::sync::OnceCell<i32>,
    /// Everything is being killed.
    ending: Arc<AtomicBool>,
}

impl Context {
    /// An empty sandbox. `binary` is the agent's own, for helpers.
    ///
    /// # Errors
    /// When the agent's directories or cgroups cannot be made.
    pub fn new(
        places: Places,
        binary: OwnedFd,
        reaper: Reaper,
        streams: Streams,
        logger: slog::Logger,
    ) -> io::Result<Self> {
        fs::create_dir_all(places.run.join("containers"))?;
        fs::create_dir_all(places.run.join("shm"))?;
        fs::create_dir_all(&places.share)?;
        cgroup::prepare(&places.cgroup_root, &places.cgroup_base)?;
        Ok(Self {
            streams,
            launcher: Launcher::new(binary, reaper, logger.clone()),
            events: Events::default(),
            outputs: Outputs::default(),
            volumes: Arc::new(Volumes::new(&places.run, &places.share)),
            huge_pages: Arc::new(HugePages::new(places.owns_machine)),
            logger,
            containers: Mutex::default(),
            pid_holder: tokio::sync::OnceCell::new(),
            ending: Arc::default(),
            places,
        })
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Where to send commands for a container.
    ///
    /// # Errors
    /// `NotFound`, or `FailedPrecondition` while it is being created.
    pub fn mailbox(&self, id: &str) -> Result<Mailbox> {
        match self.containers().get(id) {
            Some(Entry::Ready(mailbox)) => Ok(mailbox.clone()),
            Some(Entry::Creating) => Err(Error::FailedPrecondition(format!(
                "container {id} is still being created"
            ))),
            None => Err(Error::NotFound(format!(
                "there is no container {id} in this sandbox"
            ))),
        }
    }

    /// Frees a container's id.
    pub fn forget(&self, id: &str) {
        self.containers().remove(id);
    }

    async fn reserve_huge_pages(&self, spec: &Spec) -> Result<Option<Reservation>> {
        let Some(resources) = spec.linux.resources.clone() else {
            return Ok(None);
        };
        let pages = Arc::clone(&self.huge_pages);
        tokio::task::spawn_blocking(move || pages.reserve(&resources))
            .await
            .map_err(|error| Error::Internal(format!("reserving huge pages: {error}")))?
    }

    /// The cgroup directory that a process is in now.
    pub fn cgroup_of(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
        (!path.split('/').any(|c| c == "..")).then(|| self.places.cgroup_root.join(path))
    }

    /// Creates a container up to the point where its init process waits for its start.
    ///
    /// # Errors
    /// `AlreadyExists`, or why it cannot be created; nothing of it is then left.
    pub async fn create(self: &Arc<Self>, request: agent::CreateContainerRequest) -> Result<u32> {
        validate::id(&request.id)?;
        validate::share_path(&request.rootfs)?;
        let spec: Spec = spec::parse(&request.spec).map_err(|e| {
            Error::InvalidArgument(format!("the spec of container {}: {e}", request.id))
        })?;
        validate::spec(&spec)?;
        let mount_sources = validate::mount_sources(&spec, &request.mount_sources)?;
        {
            let mut containers = self.containers();
            if containers.contains_key(&request.id) {
                return Err(Error::AlreadyExists(format!(
                    "container {} already exists",
                    request.id
                )));
            }
            containers.insert(request.id.clone(), Entry::Creating);
        }
        let id = request.id.clone();
        let outcome = self.build(request, spec, mount_sources).await;
        match &outcome {
            Ok(pid) => {
                slog::info!(self.logger, "container created"; "container" => &id, "pid" => pid)
            }
            Err(error) => {
                slog::warn!(self.logger, "container not created"; "container" => &id, "error" => %error);
                self.forget(&id);
            }
        }
        outcome
    }

    async fn build(
        self: &Arc<Self>,
        request: agent::CreateContainerRequest,
        spec: Spec,
        mount_sources: std::collections::BTreeMap<u32, MountSource>,
    ) -> Result<u32> {
        let id = request.id;
        let stdio = request.stdio.into_option().unwrap_or_default();
        self.note_ignored(&id, &spec);
        let pid_namespace = match request.pid_namespace_of.as_str() {
            "" if wants_shared_pids(&spec) => Some(self.shared_pid_namespace().await?),
            "" => None,
            target => {
                let command = |reply| Command::PidNamespace { reply };
                Some(self.ask(target, command).await?)
            }
        };
        let huge_pages = self.reserve_huge_pages(&spec).await?;
        let dir = self.places.run.join("containers").join(&id);
        let root_mount = dir.join("rootfs");
        fs::create_dir_all(&root_mount).map_err(|e| Error::io("container directory", e))?;
        let cgroup = Cgroup::create(
            self.places.cgroup_base.join(&id),
            spec.linux.resources.as_ref(),
            &self.logger,
        );
        let cgroup = cgroup.inspect_err(|_| drop(fs::remove_dir_all(&dir)))?;
        let parts = Parts {
            id: id.clone(),
            dir,
            seccomp: spec.linux.seccomp.clone(),
            uid_mappings: spec.linux.uid_mappings.clone(),
            gid_mappings: spec.linux.gid_mappings.clone(),
            time_namespace: spec.linux.namespaces.iter().any(|n| n.kind == "time"),
            cgroup,
            _huge_pages: huge_pages,
        };
        let instructions = Instructions::Create(Box::new(Create {
            id: id.clone(),
            spec,
            root_mount,
            share: self.places.share.clone(),
            rootfs: request.rootfs,
            mount_sources,
            volumes: volume::directory(&self.places.run),
            shm: self.places.run.join("shm"),
            cgroup: parts.cgroup.path().to_owned(),
            pid_namespace,
            terminal: container::terminal_of(&stdio),
        }));
        let (mailbox, commands) = mpsc::unbounded_channel();
        let init = match container::prepare(self, &instructions, &stdio, &mailbox, ("", 0)).await {
            Ok(init) => init,
            Err(error) => {
                if let Err(left) = cgroup::remove(parts.cgroup.path()).await {
                    slog::warn!(self.logger, "cgroup stays"; "container" => &id, "error" => %left);
                }
                let _ = fs::remove_dir_all(&parts.dir);
                return Err(error);
            }
        };
        let pid = init.pid();
        self.containers().insert(id, Entry::Ready(mailbox.clone()));
        tokio::spawn(Container::new(parts, Arc::clone(self), mailbox, init).run(commands));
        Ok(pid)
    }

    /// Host security modules have no meaning here: noted, not refused, or no pod of such a host
    /// would start.
    fn note_ignored(&self, id: &str, spec: &Spec) {
        let process = spec.process.as_ref();
        let ignored = [
            (
                "apparmorProfile",
                process.is_some_and(|p| !p.apparmor_profile.is_empty()),
            ),
            (
                "selinuxLabel",
                process.is_some_and(|p| !p.selinux_label.is_empty()),
            ),
            ("mountLabel", !spec.linux.mount_label.is_empty()),
        ];
        for (field, _) in ignored.iter().filter(|(_, present)| *present) {
            slog::info!(self.logger, "a label of the node has no meaning in the guest and is left out"; "container" => id, "field" => field);
        }
    }

    /// A pid namespace for containers that share one (a path in the spec), or that would have the
    /// host's (no entry): never the agent's own.
    async fn shared_pid_namespace(&self) -> Result<PathBuf> {
        let pid = self
            .pid_holder
            .get_or_try_init(async || {
                let (logger, ending) = (self.logger.clone(), Arc::clone(&self.ending));
                let on_exit = move |_| {
                    if !ending.load(Ordering::Relaxed) {
                        slog::error!(logger, "the holder of the shared pid namespace ended");
                    }
                };
                // No container has this id (validate::id).
                let cgroup = self.places.cgroup_base.join("_pause");
                fs::create_dir_all(&cgroup)
                    .map_err(|e| Error::io(format_args!("cgroup {}", cgroup.display()), e))?;
                let instructions = Instructions::HoldPidNamespace { cgroup };
                let prepared = self
                    .launcher
                    .prepare(&instructions, ChildEnds::null(), on_exit)
                    .await?;
                Ok(prepared.pid.as_raw())
            })
            .await?;
        Ok(PathBuf::from(format!("/proc/{pid}/ns/pid")))
    }

    /// Sends SIGTERM to every process of every container, and waits at most `grace` for their end.
    pub async fn terminate_all(&self, grace: Duration) {
        let ids: Vec<String> = self.containers().keys().cloned().collect();
        slog::info!(self.logger, "the containers are asked to end"; "containers" => ids.len(), "grace_ms" => grace.as_millis());
        let ended = ids.iter().map(|id| async move {
            let command = |reply| Command::Signal {
                exec_id: String::new(),
                signal: libc::SIGTERM,
                all: true,
                reply,
            };
            // One that has ended meanwhile is what is wanted.
            let _ = self.ask(id, command).await;
            let events = self.places.cgroup_base.join(id).join("cgroup.events");
            let empty = |text: &str| text.lines().any(|line| line == "populated 0");
            cgroup::watch::until(&events, grace, empty).await
        });
        // At once: the grace is one for all.
        let _ = timeout(grace, futures::future::join_all(ended)).await;
    }

    /// Kills every container and waits a little for their output.
    pub async fn end_all(&self) {
        let base: &Path = &self.places.cgroup_base;
        self.ending.store(true, Ordering::Relaxed);
        if let Err(error) = fs::write(base.join("cgroup.kill"), "1") {
            slog::warn!(self.logger, "cannot kill the containers"; "error" => %error);
        }
        let _ = timeout(DRAIN_TIME, self.outputs.idle()).await;
    }

    /// Sends a command and waits for the container's answer.
    ///
    /// # Errors
    /// The container's own, or `NotFound` when it went away meanwhile.
    pub async fn ask<T>(
        &self,
        id: &str,
        command: impl FnOnce(crate::process::Reply<T>) -> Command,
    ) -> Result<T> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let gone = || Error::NotFound(format!("container {id} has just been removed"));
        self.mailbox(id)?.send(command(reply)).map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}

fn wants_shared_pids(spec: &Spec) -> bool {
    !spec
        .linux
        .namespaces
        .iter()
        .any(|n| n.kind == "pid" && n.path.is_empty())
}
