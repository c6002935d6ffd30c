//! cgroup v2 directories of containers: life, membership, freezing and killing.
//!
//! A container may create cgroups below its own and fill them; nothing here trusts what is below.
pub mod device;
pub mod resources;
pub mod stats;
pub mod watch;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    error::{Error, Result},
    process::Reply,
    spec::{DeviceRule, Resources},
};

/// Deepest cgroup below a container that is listed.
const MAX_DEPTH: usize = 32;

/// How long the processes of a cgroup may take to die: those in uninterruptible sleep are slow.
const KILL_TIME: Duration = Duration::from_secs(30);

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    device_program: Option<OwnedFd>,
    /// The rules in force, of a container whose rules may have to change by themselves.
    kept_rules: Option<Vec<DeviceRule>>,
    logger: slog::Logger,
}

/// Makes `base` a place for container cgroups: delegates every controller down to its children.
///
/// # Errors
/// When the directory cannot be made. A controller that cannot be delegated is skipped here and
/// reported when a container asks for it.
pub fn prepare(root: &Path, base: &Path) -> io::Result<()> {
    fs::create_dir_all(base)?;
    for dir in [root, base] {
        for controller in fs::read_to_string(dir.join("cgroup.controllers"))?.split_whitespace() {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

impl Cgroup {
    /// Creates the cgroup and applies its limits.
    ///
    /// # Errors
    /// `InvalidArgument` for a limit this kernel cannot set; the directory is then gone again.
    pub fn create(
        path: PathBuf,
        resources: Option<&Resources>,
        logger: &slog::Logger,
    ) -> Result<Self> {
        fs::create_dir(&path)
            .map_err(|e| Error::io(format_args!("cgroup {}", path.display()), e))?;
        let mut cgroup = Self {
            path,
            device_program: None,
            kept_rules: None,
            logger: logger.clone(),
        };
        let default = Resources::default();
        let resources = resources.unwrap_or(&default);
        let outcome =
            apply(&cgroup.path, resources, logger).and_then(|()| cgroup.limit_devices(resources));
        if let Err(error) = outcome {
            let _ = fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }

    /// Keeps the rules that it was made with, for [`Self::revoke`].
    pub fn keep_rules(&mut self, resources: Option<&Resources>) {
        let rules = resources.map(|resources| resources.devices.clone());
        self.kept_rules = Some(rules.unwrap_or_default());
    }

    /// Allows nothing any more of what has these kinds and numbers.
    ///
    /// # Errors
    /// As of [`Self::create`]; the old rules hold then.
    pub fn revoke(&mut self, nodes: &[(String, (i64, i64))]) -> Result<()> {
        let Some(rules) = &mut self.kept_rules else {
            return Ok(());
        };
        rules.extend(nodes.iter().map(DeviceRule::none_of));
        self.device_program = Some(device::attach(
            &self.path,
            rules,
            self.device_program.as_ref(),
        )?);
        Ok(())
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the limits that `resources` names and answers `done`, on a thread of its own: the kernel
    /// makes who lowers a memory limit wait until the memory is found.
    pub fn update(&mut self, resources: Resources, done: Reply<()>) {
        let devices = match resources.devices.as_slice() {
            [] => Ok(()),
            _ => self.limit_devices(&resources),
        };
        let (path, logger) = (self.path.clone(), self.logger.clone());
        tokio::task::spawn_blocking(move || {
            let _ = done.send(devices.and_then(|()| apply(&path, &resources, &logger)));
        });
    }

    fn limit_devices(&mut self, resources: &Resources) -> Result<()> {
        let program = device::attach(&self.path, &resources.devices, self.device_program.as_ref())?;
        self.device_program = Some(program);
        if let Some(kept) = &mut self.kept_rules {
            kept.clone_from(&resources.devices);
        }
        Ok(())
    }

    /// Kills every process with SIGKILL, at once.
    ///
    /// # Errors
    /// `Internal` when the kernel refuses.
    pub fn kill(&self) -> Result<()> {
        write(&self.path, "cgroup.kill", "1")
    }
}

fn apply(path: &Path, resources: &Resources, logger: &slog::Logger) -> Result<()> {
    for note in resources::apply(path, resources)? {
        slog::warn!(logger, "a limit is left out"; "cgroup" => %path.display(), "note" => note);
    }
    Ok(())
}

/// Freezes or thaws every process of the cgroup `path` and waits for the kernel to say so.
///
/// # Errors
/// `Internal` when the kernel refuses, or does not finish in `patience`; it may finish later.
pub async fn freeze(path: &Path, frozen: bool, patience: Duration) -> Result<()> {
    write(path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    let events = path.join("cgroup.events");
    watch::until(&events, patience, |text| text.lines().any(|l| l == wanted))
        .await
        .map_err(|e| Error::io("cgroup.freeze: a process cannot be frozen", e))
}

/// Thaws without waiting.
///
/// # Errors
/// `Internal` when the kernel refuses.
pub fn thaw(path: &Path) -> Result<()> {
    write(path, "cgroup.freeze", "0")
}

/// Pids, in the agent's namespace, of every process in the cgroup `path` and below.
///
/// # Errors
/// `Internal` when it cannot be read.
pub fn processes(path: &Path) -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    collect_processes(path, 0, &mut pids).map_err(|e| Error::io("cgroup.procs", e))?;
    Ok(pids)
}

/// Kills what is left in the cgroup `path`, waits until it is gone and removes the directory.
///
/// # Errors
/// `Internal` when a process cannot be killed in time.
pub async fn remove(path: &Path) -> Result<()> {
    // A frozen cgroup dies too: cgroup.kill wakes it.
    write(path, "cgroup.kill", "1")?;
    let events = path.join("cgroup.events");
    let empty = |text: &str| text.lines().any(|l| l == "populated 0");
    watch::until(&events, KILL_TIME, empty)
        .await
        .map_err(|e| Error::io(format_args!("cgroup {} does not empty", path.display()), e))?;
    remove_tree(path).map_err(|e| Error::io(format_args!("cgroup {}", path.display()), e))
}

fn write(path: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(path.join(file), value).map_err(|e| Error::io(file, e))
}

fn collect_processes(dir: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    // EOPNOTSUPP: a threaded cgroup lists its processes in its domain only.
    if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
        // 0 stands for a process outside the agent's pid namespace; there is none.
        pids.extend(
            text.lines()
                .filter_map(|l| l.parse::<u32>().ok())
                .filter(|pid| *pid != 0),
        );
    }
    if depth < MAX_DEPTH {
        for child in child_dirs(dir)? {
            match collect_processes(&child, depth + 1, pids) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Removes a cgroup without processes and those below it.
///
/// # Errors
/// Those of rmdir(2).
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    remove_below(dir, 0)
}

fn remove_below(dir: &Path, depth: usize) -> io::Result<()> {
    if depth < MAX_DEPTH {
        for child in child_dirs(dir)? {
            remove_below(&child, depth + 1)?;
        }
    }
    fs::remove_dir(dir)
}

fn child_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}
