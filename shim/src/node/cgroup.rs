//! The pod's host cgroup: where shim and VMM live, so that the node accounts for the pod there.
//!
//! cgroup v2 with `cgroupsPath` as a path or as systemd's `slice:prefix:name`. Paths come from containerd; `..` in one is refused.
//!
//! Pods share parents, and the last to leave takes away the ones Brig made: each carries a mark, so
//! that what kubelet or systemd made is never removed, whoever of us ends last.

mod kills;
mod parent;
mod taken;

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, inotify};
use serde::{Deserialize, Serialize};

use crate::error::ignore_missing;
use crate::error::{Error, Result};
pub use kills::Kills;
pub use parent::{Bounds, bounds_of_parent, huge_pages_of_parent, pids_of_parent};
pub use taken::Taken;

const ROOT: &str = "/sys/fs/cgroup";
/// Which controllers the children of a cgroup have.
const CONTROL: &str = "cgroup.subtree_control";
/// Directories of one creation that a concurrent removal may take away before we try again.
const ATTEMPTS: usize = 64;
/// The extended attribute of a parent that a shim made. `trusted.*` is kept by cgroup v2, and
/// no container can set or see it.
const MARK: &str = "trusted.brig";

/// A cgroup we made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directory.
    dirs: Vec<PathBuf>,
    /// Directories above that we made and could not mark, outermost first.
    parents: Vec<PathBuf>,
    /// Where this process was before; it returns there so that the cgroup can be removed. None: to the root of the hierarchy.
    home: Option<PathBuf>,
}

impl Cgroup {
    /// Where it is: one directory.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Makes the cgroup of this `cgroupsPath`.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that is none, `FailedPrecondition` on a node without cgroup v2, else what the host says.
    pub fn create(cgroups_path: &str) -> Result<Self> {
        Self::create_below(Path::new(ROOT), cgroups_path)
    }

    fn create_below(root: &Path, cgroups_path: &str) -> Result<Self> {
        let relative = relative_path(cgroups_path)?;
        let mut cgroup = Self {
            dirs: Vec::new(),
            parents: Vec::new(),
            home: None,
        };
        check_below(root)?;
        let dir = root.join(&relative);
        make(root, &relative, &mut cgroup.parents).map_err(|error| {
            cgroup.remove_dirs();
            remove_marked_parents(&dir);
            Error::io(
                format_args!("cannot make the cgroup {}", dir.display()),
                &error,
            )
        })?;
        cgroup.dirs.push(dir);
        cgroup.home = own_cgroup(root);
        Ok(cgroup)
    }

    /// Where this process was before is somebody else's, who may be about to remove it: it does not return there.
    #[must_use]
    pub fn without_return(self) -> Self {
        Self { home: None, ..self }
    }

    /// An open directory to be born into.
    ///
    /// # Errors
    /// What the host says; who went on without would be born where this process is.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |dir| rustix::fs::open(dir, flags, Mode::empty());
        Ok(self.dirs.first().map(open).transpose()?)
    }

    /// Writes a limit, as one line. A cgroup whose controllers were taken from it meanwhile gets them back for that.
    ///
    /// # Errors
    /// What the kernel says; `NotFound` when the cgroup cannot have the controller.
    pub fn write(&self, file: &str, line: &str) -> io::Result<()> {
        let write = || {
            let dir = self.dirs.first().ok_or(io::ErrorKind::NotFound)?;
            let file = fs::OpenOptions::new().write(true).open(dir.join(file))?;
            // In one write, which is a line of its own to the kernel.
            (&file).write_all(line.as_bytes())
        };
        match write() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let above = self
                    .dirs
                    .iter()
                    .flat_map(|dir| parents(Path::new(ROOT), dir));
                // The outermost first.
                above
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .for_each(delegate);
                write()
            }
            written => written,
        }
    }

    /// Moves this process in. For that the kernel waits until every CPU has been elsewhere (RCU), some milliseconds, in which
    /// nothing can be born into a named cgroup.
    ///
    /// # Errors
    /// What the host says.
    pub fn join(&self) -> io::Result<()> {
        for dir in &self.dirs {
            fs::write(dir.join("cgroup.procs"), std::process::id().to_string())?;
        }
        Ok(())
    }

    /// The lowest limit of memory that holds in here, in bytes, and the cgroup that has it. Blocking.
    #[must_use]
    pub fn memory_limit(&self) -> Option<(u64, PathBuf)> {
        self.memory_limit_below(Path::new(ROOT))
    }

    fn memory_limit_below(&self, root: &Path) -> Option<(u64, PathBuf)> {
        let places = self.dirs.iter().flat_map(|dir| dir.ancestors());
        let below = places.filter(|place| place.starts_with(root));
        let limits = below.filter_map(|place| {
            let text = fs::read_to_string(place.join("memory.max"));
            let limit = text.ok()?.trim().parse().ok()?;
            Some((limit, place.to_owned()))
        });
        limits.min_by_key(|(limit, _)| *limit)
    }

    /// Moves this process out and removes the cgroup, which must hold nobody else.
    ///
    /// # Errors
    /// What the host says; a cgroup that is gone is no error.
    pub fn leave_and_remove(&self) -> io::Result<()> {
        self.leave()?;
        self.remove()
    }

    /// Moves this process out. Takes as long as [`join`](Self::join).
    ///
    /// # Errors
    /// What the host says; a cgroup that is gone is no error.
    pub fn leave(&self) -> io::Result<()> {
        let pid = std::process::id().to_string();
        let enter = |dir: &Path| fs::write(dir.join("cgroup.procs"), &pid);
        if !self.dirs.is_empty() {
            let is_home = self.home.as_deref().is_some_and(|home| enter(home).is_ok());
            if !is_home {
                ignore_missing(enter(Path::new(ROOT)))?;
            }
        }
        Ok(())
    }

    /// Removes the cgroup, which must hold nobody.
    ///
    /// # Errors
    /// When somebody is in it; a cgroup that is gone is no error.
    pub fn remove(&self) -> io::Result<()> {
        self.remove_dirs();
        match self.dirs.iter().find(|dir| dir.exists()) {
            None => Ok(()),
            Some(dir) => Err(io::Error::other(format!(
                "{} is still in use",
                dir.display()
            ))),
        }
    }

    /// Kills whatever is left inside and removes the cgroup.
    ///
    /// # Errors
    /// `TimedOut` when something in it does not end.
    pub fn kill_and_remove(&self, timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        for dir in &self.dirs {
            if dir.exists() {
                let kill = fs::OpenOptions::new()
                    .write(true)
                    .open(dir.join("cgroup.kill"));
                let _ = kill.and_then(|mut file| file.write_all(b"1"));
                wait_empty(dir, deadline)?;
            }
        }
        self.remove_dirs();
        Ok(())
    }

    /// Removes what is empty: our directories, then the parents a shim made, innermost first.
    fn remove_dirs(&self) {
        for dir in &self.dirs {
            let _ = fs::remove_dir(dir);
            remove_marked_parents(dir);
        }
        for dir in self.parents.iter().rev() {
            let _ = fs::remove_dir(dir);
            remove_marked_parents(dir);
        }
    }
}

/// Refuses a node without the unified hierarchy. One that mounts it beside those of v1 has no controllers in it, so nothing of a pod
/// would be counted or limited.
///
/// # Errors
/// `FailedPrecondition`, with the fix.
pub fn check() -> Result<()> {
    check_below(Path::new(ROOT))
}

fn check_below(root: &Path) -> Result<()> {
    if root.join("cgroup.controllers").exists() {
        return Ok(());
    }
    let what = match root.join("unified").exists() {
        true => "cgroup v1 and v2 side by side (hybrid)",
        false => "no cgroup v2",
    };
    Err(Error::state(format!(
        "the node has {what} at {}, and Brig needs v2 alone: boot the node with systemd.unified_cgroup_hierarchy=1",
        root.display()
    )))
}

/// The directories above one in this hierarchy, innermost first.
fn parents<'a>(root: &'a Path, dir: &'a Path) -> impl Iterator<Item = &'a Path> {
    let above = dir.ancestors().skip(1);
    above.take_while(move |parent| parent.starts_with(root))
}

/// The cgroup of this process.
fn own_cgroup(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

/// Turns `cgroupsPath` into a path below the hierarchy's root.
fn relative_path(cgroups_path: &str) -> Result<PathBuf> {
    let invalid = || Error::invalid(format!("cgroupsPath {cgroups_path:?} is not a cgroup path"));
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = if let [slice, prefix, name] = parts[..] {
        let mut path = expand_slice(slice).ok_or_else(invalid)?;
        path.push(if prefix.is_empty() {
            format!("{name}.scope")
        } else {
            format!("{prefix}-{name}.scope")
        });
        path
    } else {
        PathBuf::from(cgroups_path.trim_start_matches('/'))
    };
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if path.as_os_str().is_empty() || !plain {
        return Err(invalid());
    }
    Ok(path)
}

/// `a-b.slice` lies at `a.slice/a-b.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    if slice.is_empty() {
        return Some(PathBuf::from("system.slice"));
    }
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

/// `mkdir -p` that marks the parents it makes, and tries again when another pod's removal takes one
/// away in between. Parents that take no mark are noted in `unmarked`.
fn make(hierarchy: &Path, relative: &Path, unmarked: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut last = Ok(());
    for _ in 0..ATTEMPTS {
        last = make_once(hierarchy, relative, unmarked);
        match &last {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return last,
        }
    }
    last
}

fn make_once(hierarchy: &Path, relative: &Path, unmarked: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut path = hierarchy.to_owned();
    let leaf = hierarchy.join(relative);
    for part in relative.components() {
        delegate(&path);
        path.push(part);
        match fs::create_dir(&path) {
            // A pod that ends before this parent is marked leaves it alone. That is right: we are
            // about to make a child in it, and look at it again when that child goes.
            Ok(()) if path != leaf => mark(&path, unmarked)?,
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives the children of a cgroup the controllers it has itself, as runc does: without them the pod
/// has no figures, and what the kernel kills in it for memory is counted elsewhere. What cannot be given (a
/// directory with processes in it takes some controllers only) is done without.
fn delegate(dir: &Path) {
    let Ok(available) = fs::read_to_string(dir.join("cgroup.controllers")) else {
        return;
    };
    let control = dir.join(CONTROL);
    let given = fs::read_to_string(&control).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        if !given.split_ascii_whitespace().any(|one| one == controller) {
            let file = fs::OpenOptions::new().write(true).open(&control);
            // In one write, which `write!` would not be.
            let _ = file.and_then(|mut file| file.write_all(format!("+{controller}").as_bytes()));
        }
    }
}

/// Says that a shim made this directory.
fn mark(dir: &Path, unmarked: &mut Vec<PathBuf>) -> io::Result<()> {
    match rustix::fs::setxattr(dir, MARK, b"1", rustix::fs::XattrFlags::empty()) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::NOENT) => Err(rustix::io::Errno::NOENT.into()),
        // Not root in the initial user namespace, or a kernel without such attributes here.
        Err(_) => {
            if !unmarked.iter().any(|known| known == dir) {
                unmarked.push(dir.to_owned());
            }
            Ok(())
        }
    }
}

/// Removes the directories above `dir` that carry the mark and are empty, innermost first. An unmarked
/// one ends the walk: it stays, so nothing above it is empty.
fn remove_marked_parents(dir: &Path) {
    for parent in dir.ancestors().skip(1) {
        match rustix::fs::getxattr(parent, MARK, &mut [0u8; 1]) {
            Ok(_) if fs::remove_dir(parent).is_ok() => {}
            // Another pod's removal was faster; the next one up may be ours to take.
            Err(rustix::io::Errno::NOENT) => {}
            _ => {
                if parent.exists() {
                    return;
                }
            }
        }
    }
}

/// Waits until nobody is in the cgroup: `cgroup.events` is modified when that changes.
fn wait_empty(dir: &Path, deadline: Instant) -> io::Result<()> {
    let events = dir.join("cgroup.events");
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    if inotify::add_watch(&watch, &events, inotify::WatchFlags::MODIFY).is_err() {
        return Ok(());
    }
    loop {
        let Ok(text) = fs::read_to_string(&events) else {
            return Ok(());
        };
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [rustix::event::PollFd::new(
            &watch,
            rustix::event::PollFlags::IN,
        )];
        if left.is_zero() || rustix::event::poll(&mut fds, Some(&limit))? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("processes in {} do not end", dir.display()),
            ));
        }
        let mut buffer = [0u8; 1024];
        let _ = rustix::io::read(&watch, &mut buffer)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_above_a_pod_holds_for_it() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod1");
        let own = pod.join("sandbox");
        fs::create_dir_all(&own).unwrap();
        let cgroup = Cgroup {
            dirs: vec![own.clone()],
            parents: Vec::new(),
            home: None,
        };
        let told = || cgroup.memory_limit_below(root.path());
        assert_eq!(told(), None);
        fs::write(own.join("memory.max"), "max\n").unwrap();
        fs::write(root.path().join("kubepods/memory.max"), "8388608\n").unwrap();
        assert_eq!(told(), Some((8 << 20, root.path().join("kubepods"))));
        fs::write(pod.join("memory.max"), "4194304\n").unwrap();
        assert_eq!(told(), Some((4 << 20, pod)));
    }

    #[test]
    fn both_notations_of_a_path_are_understood() {
        for (given, expected) in [
            ("/default/c1", "default/c1"),
            ("kubepods/pod1/c1", "kubepods/pod1/c1"),
            ("system.slice:brig:c1", "system.slice/brig-c1.scope"),
            (
                "kubepods-burstable-pod_1.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod_1.slice/cri-containerd-c1.scope",
            ),
            ("-.slice::c1", "c1.scope"),
            (":brig:c1", "system.slice/brig-c1.scope"),
        ] {
            assert_eq!(
                relative_path(given).unwrap(),
                Path::new(expected),
                "{given}"
            );
        }
    }

    #[test]
    fn paths_that_climb_or_are_empty_are_refused() {
        for given in [
            "",
            "/",
            "a/../b",
            "../x",
            "a--b.slice:p:n",
            "x:p:n",
            "a.slice::../x",
        ] {
            assert!(relative_path(given).is_err(), "{given}");
        }
    }

    #[test]
    fn a_node_without_the_unified_hierarchy_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let create = || Cgroup::create_below(root.path(), "/kubepods/pod1/sandbox").unwrap_err();
        for (dir, said) in [("memory", "no cgroup v2"), ("unified", "hybrid")] {
            fs::create_dir(root.path().join(dir)).unwrap();
            fs::write(root.path().join(dir).join("cgroup.procs"), "").unwrap();
            let error = create();
            assert_eq!(error.kind, crate::error::Kind::FailedPrecondition);
            assert!(error.message.contains(said), "{error}");
            assert!(error.message.contains("systemd.unified_cgroup_hierarchy=1"));
            assert!(!root.path().join(dir).join("kubepods").exists());
        }
    }

    fn hierarchy() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        fs::create_dir(root.path().join("old")).unwrap();
        root
    }

    #[test]
    fn what_was_made_is_removed_and_what_was_there_stays() {
        let root = hierarchy();
        let a = Cgroup::create_below(root.path(), "/old/new/a").unwrap();
        let b = Cgroup::create_below(root.path(), "/old/new/b").unwrap();
        assert!(root.path().join("old/new/a").is_dir());
        a.remove_dirs();
        assert!(root.path().join("old/new/b").is_dir());
        b.remove_dirs();
        a.remove_dirs();
        assert!(!root.path().join("old/new").exists());
        assert!(root.path().join("old").is_dir());
    }

    #[test]
    fn the_last_to_leave_removes_the_parents_whoever_made_them() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let root = hierarchy();
        let a = Cgroup::create_below(root.path(), "/old/x/y/a").unwrap();
        let b = Cgroup::create_below(root.path(), "/old/x/y/b").unwrap();
        let c = Cgroup::create_below(root.path(), "/old/x/c").unwrap();
        a.remove_dirs();
        assert!(root.path().join("old/x/y/b").is_dir());
        // As after kill -9: what `delete` knows comes from the journal.
        let json = serde_json::to_string(&b).unwrap();
        let b: Cgroup = serde_json::from_str(&json).unwrap();
        b.kill_and_remove(Duration::from_secs(1)).unwrap();
        assert!(!root.path().join("old/x/y").exists());
        assert!(root.path().join("old/x/c").is_dir());
        c.remove_dirs();
        assert!(!root.path().join("old/x").exists());
        assert!(root.path().join("old").is_dir());
    }

    #[test]
    fn children_get_the_controllers_that_their_parent_has() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("cgroup.subtree_control");
        fs::write(&control, "memory\n").unwrap();
        delegate(dir.path());
        assert_eq!(fs::read_to_string(&control).unwrap(), "memory\n");
        fs::write(dir.path().join("cgroup.controllers"), "memory\n").unwrap();
        delegate(dir.path());
        assert_eq!(fs::read_to_string(&control).unwrap(), "memory\n");
        fs::write(dir.path().join("cgroup.controllers"), "memory pids\n").unwrap();
        delegate(dir.path());
        assert!(fs::read_to_string(&control).unwrap().starts_with("+pids"));
    }

    #[test]
    fn a_directory_that_somebody_else_made_is_never_removed() {
        let root = hierarchy();
        let a = Cgroup::create_below(root.path(), "/x/y/a").unwrap();
        let theirs = root.path().join("x/y/theirs");
        fs::create_dir(&theirs).unwrap();
        let b = Cgroup::create_below(root.path(), "/x/y/theirs/b").unwrap();
        b.remove_dirs();
        a.remove_dirs();
        assert!(theirs.is_dir());
        assert!(root.path().join("old").is_dir());
    }

    #[test]
    fn pods_that_come_and_go_at_once_neither_fail_nor_leave_anything() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let root = hierarchy();
        let base = root.path();
        for _ in 0..20 {
            std::thread::scope(|scope| {
                for pod in 0..8 {
                    scope.spawn(move || {
                        for _ in 0..50 {
                            let path = format!("/old/p/{}/{pod}", pod % 2);
                            let cgroup = Cgroup::create_below(base, &path).unwrap();
                            assert!(base.join(&path[1..]).is_dir());
                            cgroup.remove_dirs();
                        }
                    });
                }
            });
            assert!(!base.join("old/p").exists());
            assert!(base.join("old").is_dir());
        }
    }
}
