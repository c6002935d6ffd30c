//! cgroup v2 directories of containers: life, membership, freezing and killing.
//!
//! A container may create cgroups below its own and fill them; nothing here trusts what is below.
mod cpuset;
pub mod device;
mod file;
pub mod resources;
pub mod stats;
pub mod tree;
mod undo;
pub mod watch;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    error::{Error, Result},
    process::Reply,
    spec::{DeviceRule, Resources},
    sync::lock,
};
use undo::Undo;

/// How long the processes of a cgroup may take to die: those in uninterruptible sleep are slow.
const KILL_TIME: Duration = Duration::from_secs(30);

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    devices: Arc<Mutex<Devices>>,
    logger: slog::Logger,
}

/// Who may use which devices.
#[derive(Debug, Default)]
struct Devices {
    program: Option<OwnedFd>,
    /// The rules in force, of a container whose rules may have to change by themselves.
    kept_rules: Option<Vec<DeviceRule>>,
    /// What was revoked of them, in its order.
    revoked: Vec<DeviceRule>,
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

/// All containers in `base` may have so many processes and threads together.
///
/// # Errors
/// `Internal` when the kernel refuses.
pub fn limit_processes(base: &Path, most: u64) -> Result<()> {
    write(base, "pids.max", &most.to_string())
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
        let cgroup = Self {
            path,
            devices: Arc::default(),
            logger: logger.clone(),
        };
        let default = Resources::default();
        let resources = resources.unwrap_or(&default);
        let outcome =
            limit_depth(&cgroup.path).and_then(|()| resources::apply(&cgroup.path, resources));
        let outcome = outcome.and_then(|notes| {
            log(&notes, &cgroup.path, logger);
            lock(&cgroup.devices).limit(&cgroup.path, &resources.devices, 0)
        });
        if let Err(error) = outcome {
            let _ = fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }

    /// Keeps the rules that it was made with, for [`Self::revoke`].
    pub fn keep_rules(&mut self, resources: Option<&Resources>) {
        let rules = resources.map(|resources| resources.devices.clone());
        lock(&self.devices).kept_rules = Some(rules.unwrap_or_default());
    }

    /// Allows nothing any more of what has these kinds and numbers.
    ///
    /// # Errors
    /// As of [`Self::create`]; the old rules hold then.
    pub fn revoke(&mut self, nodes: &[(String, (i64, i64))]) -> Result<()> {
        lock(&self.devices).revoke(&self.path, nodes)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the limits that `resources` names and answers `done`, on a thread of its own: the kernel
    /// makes who lowers a memory limit wait until the memory is found. When one of them is refused all are the old ones.
    pub fn update(&mut self, resources: Resources, done: Reply<()>) {
        let (path, logger) = (self.path.clone(), self.logger.clone());
        let devices = Arc::clone(&self.devices);
        // The rules are those of now, whatever is revoked until they hold.
        let revoked = lock(&devices).revoked.len();
        tokio::task::spawn_blocking(move || {
            let mut undo = Undo::default();
            let outcome = resources::change(&path, &resources, &mut undo).and_then(|notes| {
                log(&notes, &path, &logger);
                match resources.devices.as_slice() {
                    [] => Ok(()),
                    rules => lock(&devices).limit(&path, rules, revoked),
                }
            });
            if outcome.is_err() {
                for kept in undo.all(&path) {
                    slog::warn!(logger, "a limit could not be set back"; "cgroup" => %path.display(), "limit" => kept);
                }
            }
            let _ = done.send(outcome);
        });
    }

    /// Kills every process with SIGKILL, at once.
    ///
    /// # Errors
    /// `Internal` when the kernel refuses.
    pub fn kill(&self) -> Result<()> {
        write(&self.path, "cgroup.kill", "1")
    }
}

impl Devices {
    /// Has these rules hold, but for what was revoked after the first `known`.
    fn limit(&mut self, path: &Path, rules: &[DeviceRule], known: usize) -> Result<()> {
        let rules = without(rules, &self.revoked, known);
        self.program = Some(device::attach(path, &rules, self.program.as_ref())?);
        if let Some(kept) = &mut self.kept_rules {
            *kept = rules;
        }
        Ok(())
    }

    fn revoke(&mut self, path: &Path, nodes: &[(String, (i64, i64))]) -> Result<()> {
        let Some(rules) = &mut self.kept_rules else {
            return Ok(());
        };
        let revoked = nodes.iter().map(DeviceRule::none_of);
        self.revoked.extend(revoked.clone());
        rules.extend(revoked);
        self.program = Some(device::attach(path, rules, self.program.as_ref())?);
        Ok(())
    }
}

/// The rules, and what was revoked after the first `known`: a later rule counts.
fn without(rules: &[DeviceRule], revoked: &[DeviceRule], known: usize) -> Vec<DeviceRule> {
    let since = revoked.get(known..).unwrap_or_default();
    rules.iter().chain(since).cloned().collect()
}

fn log(notes: &[String], path: &Path, logger: &slog::Logger) {
    for note in notes {
        slog::warn!(logger, "a limit is left out"; "cgroup" => %path.display(), "note" => note);
    }
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
    let each = tree::each(path, |cgroup| {
        let text = tree::read(cgroup, "cgroup.procs").unwrap_or_default();
        // 0 stands for a process outside the agent's pid namespace; there is none.
        let listed = text.lines().filter_map(|line| line.parse::<u32>().ok());
        pids.extend(listed.filter(|pid| *pid != 0));
        Ok(())
    });
    each.map_err(|e| Error::io("cgroup.procs", e))?;
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
    let top = path.to_owned();
    // There may be as many as the guest's memory takes.
    let removed = tokio::task::spawn_blocking(move || tree::remove(&top)).await;
    removed
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|e| Error::io(format_args!("cgroup {}", path.display()), e))
}

/// A container that may write its cgroup makes others below it: no deeper than they are followed.
fn limit_depth(path: &Path) -> Result<()> {
    write(path, "cgroup.max.depth", &tree::MAX_DEPTH.to_string())
}

fn write(path: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(path.join(file), value).map_err(|e| Error::io(file, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_revoked_while_rules_change_is_not_brought_back() {
        let revoke = |minor| DeviceRule::none_of(&("b".to_owned(), (254, minor)));
        let allow = DeviceRule {
            allow: true,
            ..revoke(2)
        };
        let revoked = [revoke(1), revoke(2)];
        let minors = |known| -> Vec<_> {
            let rules = without(std::slice::from_ref(&allow), &revoked, known);
            rules.iter().map(|rule| (rule.allow, rule.minor)).collect()
        };
        assert_eq!(minors(2), [(true, Some(2))]);
        assert_eq!(minors(1), [(true, Some(2)), (false, Some(2))]);
        assert_eq!(minors(5), [(true, Some(2))]);
    }
}
