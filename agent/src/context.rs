//! What requests and the tasks of containers share: the agent's services and the table of containers.
use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicBool},
};

use tokio::sync::{OnceCell, oneshot};

use crate::{
    cgroup,
    command::{Command, Mailbox},
    device_nodes::DeviceNodes,
    error::{Error, Result},
    events::Events,
    huge_pages::HugePages,
    launch::Launcher,
    limits::Limits,
    memory::Memory,
    outputs::Outputs,
    page_reporting::PageReporting,
    places::Places,
    process::Reply,
    reaper::Reaper,
    streams::Streams,
    submounts::Submounts,
    sync::lock,
    volume::Volumes,
};

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
    /// Told what is started and ends.
    pub page_reporting: PageReporting,
    /// Volumes of the share.
    pub submounts: Arc<Submounts>,
    /// Volumes in the guest's memory.
    pub volumes: Arc<Volumes>,
    /// Its huge pages.
    pub huge_pages: Arc<HugePages>,
    /// Its memory, as it grows and shrinks.
    pub memory: Memory,
    /// Resource limits where a specification names none.
    pub limits: Limits,
    /// The /dev of privileged containers.
    pub device_nodes: DeviceNodes,
    /// The log.
    pub logger: slog::Logger,
    containers: Mutex<HashMap<String, Entry>>,
    /// The process that holds the pid namespace which containers share, once one wants it.
    pub pid_holder: OnceCell<OwnedFd>,
    /// Everything is being killed.
    pub ending: Arc<AtomicBool>,
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
        let mounted = places.owns_machine.then(|| places.share.clone());
        let submounts = Arc::new(Submounts::new(mounted));
        Ok(Self {
            streams,
            launcher: Launcher::new(binary, reaper, logger.clone()),
            events: Events::default(),
            outputs: Outputs::default(),
            page_reporting: PageReporting::default(),
            volumes: Arc::new(Volumes::new(
                &places.run,
                &places.share,
                Arc::clone(&submounts),
            )),
            submounts,
            huge_pages: Arc::new(HugePages::new(places.owns_machine)),
            memory: Memory::new(),
            limits: Limits::default(),
            device_nodes: DeviceNodes::new("/dev".into(), logger.clone()),
            logger,
            containers: Mutex::default(),
            pid_holder: OnceCell::new(),
            ending: Arc::default(),
            places,
        })
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        lock(&self.containers)
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

    /// Takes an id for a container that is about to be created.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub fn claim(&self, id: &str) -> Result<()> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!(
                "container {id} already exists"
            )));
        }
        containers.insert(id.to_owned(), Entry::Creating);
        Ok(())
    }

    /// From now on the container of a claimed id can be spoken to.
    pub fn created(&self, id: String, mailbox: Mailbox) {
        self.containers().insert(id, Entry::Ready(mailbox));
    }

    /// The ids of all containers.
    pub fn ids(&self) -> Vec<String> {
        self.containers().keys().cloned().collect()
    }

    /// Frees a container's id and what is held for it.
    pub fn forget(&self, id: &str) {
        self.device_nodes.forget(id);
        self.containers().remove(id);
    }

    /// The cgroup directory that a process is in now.
    pub fn cgroup_of(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
        (!path.split('/').any(|c| c == "..")).then(|| self.places.cgroup_root.join(path))
    }

    /// Sends a command and waits for the container's answer.
    ///
    /// # Errors
    /// The container's own, or `NotFound` when it went away meanwhile.
    pub async fn ask<T>(&self, id: &str, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::NotFound(format!("container {id} has just been removed"));
        self.mailbox(id)?.send(command(reply)).map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}
