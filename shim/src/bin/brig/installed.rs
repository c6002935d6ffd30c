//! The installed versions of Brig on this node: which there are, which one new pods get, which are in use.
//!
//! `./install` makes PREFIX/VERSION with everything a version consists of, and PREFIX/current, a link to
//! one of them through which containerd finds the shim. A shim resolves the link when it starts, so a pod
//! keeps the binaries, kernel and initramfs it began with. Trusts the files below PREFIX, which are root's.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use brig_shim::error::{Error, Result};
use brig_shim::node::journal::{self, StateDir};
use brig_shim::node::remains::Remains;
use brig_shim::node::templates::{Templates, maker};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::terminal;

/// The link to the version that new pods get.
const CURRENT: &str = "current";
/// In a version's directory, with the version's name in it. `./install` puts it there, and no directory is removed without.
const MARK: &str = ".brig-version";
/// What a version must have to be used.
const PARTS: [&str; 5] = [
    "bin/containerd-shim-brig-v2",
    "bin/brig",
    "bin/brig-vmm",
    "share/brig/vmlinux",
    "share/brig/brig-initramfs.cpio",
];
/// Where the Debian package has its versions.
const PACKAGED: &str = "/usr/lib/brig";
/// Directories in which `./install` makes links into PREFIX.
const LINKED: [&str; 3] = ["bin", "share/man/man1", "share/bash-completion/completions"];

/// An installation.
#[derive(Debug)]
pub struct Installation {
    prefix: PathBuf,
    /// Where pods keep their journals.
    state: PathBuf,
}

impl Installation {
    /// The one that this program is part of.
    ///
    /// # Errors
    /// `FailedPrecondition` for a program that `./install` has not put where it is.
    pub fn own(state: PathBuf) -> Result<Self> {
        let binary = std::env::current_exe().and_then(fs::canonicalize);
        let binary = binary.unwrap_or_default();
        let version = binary.ancestors().nth(2).filter(|dir| is_version(dir));
        let prefix = version.and_then(Path::parent).map(Path::to_owned);
        let prefix = prefix.filter(|prefix| prefix.join(CURRENT).is_symlink());
        let prefix = prefix.ok_or_else(|| Error::state(without_versions(&binary)))?;
        Ok(Self { prefix, state })
    }

    fn versions(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.prefix).map_err(|error| failed(&self.prefix, &error))?;
        let mut versions: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter(|entry| is_version(&entry.path()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        versions.sort_unstable();
        Ok(versions)
    }

    /// What an installation that did not end has left.
    fn unfinished(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.prefix).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.filter(|entry| {
            let hidden = format!(".{}.new", marked(&entry.path()).unwrap_or_default());
            entry.file_name().to_str() == Some(&hidden)
        })
        .map(|entry| entry.path())
        .collect()
    }

    /// Waits until `./install`, or another of these commands, is done with the prefix; it is theirs again when this is dropped.
    fn turn(&self) -> Result<File> {
        let taken = File::open(&self.prefix).and_then(|prefix| {
            flock(&prefix, FlockOperation::LockExclusive)?;
            Ok(prefix)
        });
        taken.map_err(|error| failed(&self.prefix, &error))
    }

    fn current(&self) -> Option<String> {
        let target = fs::read_link(self.prefix.join(CURRENT)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// The directory of a version.
    fn version(&self, name: &str) -> Result<PathBuf> {
        let versions = self.versions()?;
        if versions.iter().any(|version| version == name) {
            return Ok(self.prefix.join(name));
        }
        Err(Error::not_found(format!(
            "there is no version {name} in {}; there are: {}",
            self.prefix.display(),
            versions.join(", ")
        )))
    }

    /// The pods of which a process runs from `dir`; by its pid one that has no journal in this place: it begins just now, or
    /// its handler has a `state_dir` of its own.
    fn users(&self, dir: &Path) -> Vec<String> {
        let mut pids = running(dir);
        let mut users = Vec::new();
        for (namespace, id) in journal::list(&self.state) {
            let state = StateDir::new(&self.state, &namespace, &id);
            let journal = state.and_then(|state| state.read()).ok().flatten();
            let processes = journal.map(|journal| [Some(journal.shim), journal.vmm]);
            let mut uses = false;
            for process in processes.into_iter().flatten().flatten() {
                uses |= process.is_alive() && pids.remove(&process.pid);
            }
            if uses {
                users.push(format!("{namespace}/{id}"));
            }
        }
        users.extend(pids.iter().map(|pid| format!("process {pid}")));
        users
    }

    /// The versions, the one in use for new pods marked, with the pods of each.
    ///
    /// # Errors
    /// `Internal` when the directory cannot be read.
    pub fn list(&self, as_json: bool) -> Result<String> {
        let current = self.current();
        let rows = self.versions()?.into_iter().map(|version| {
            let pods = self.users(&self.prefix.join(&version));
            let is_current = current.as_ref() == Some(&version);
            (version, is_current, pods)
        });
        if as_json {
            let rows = rows.map(|(version, current, pods)| {
                json!({ "version": version, "current": current, "pods": pods })
            });
            return Ok(format!("{}\n", rows.collect::<Value>()));
        }
        let rows = rows.map(|(version, is_current, pods)| {
            let mark = if is_current { "*" } else { "" };
            vec![version, mark.to_owned(), pods.len().to_string()]
        });
        let rows: Vec<_> = rows.collect();
        Ok(terminal::table(&["VERSION", "CURRENT", "PODS"], &rows))
    }

    /// Gives `version` to the pods that start from now on. Those that run keep theirs.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for a version of which a part is missing.
    pub fn switch(&self, version: &str) -> Result<()> {
        let _turn = self.turn()?;
        let dir = self.version(version)?;
        if let Some(part) = PARTS.iter().find(|part| !dir.join(part).is_file()) {
            return Err(Error::state(format!(
                "{} has no {part}: install that version again",
                dir.display()
            )));
        }
        let (link, new) = (self.prefix.join(CURRENT), self.prefix.join(".current.new"));
        let switched = ignore_absent(fs::remove_file(&new))
            .and_then(|()| symlink(version, &new))
            .and_then(|()| fs::rename(&new, &link));
        switched.map_err(|error| failed(&link, &error))
    }

    /// Removes a version that nothing uses.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` that says who uses it.
    pub fn remove(&self, version: &str) -> Result<()> {
        let _turn = self.turn()?;
        let dir = self.version(version)?;
        if self.current().as_deref() == Some(version) {
            return Err(Error::state(format!(
                "{version} is what new pods get: switch to another with 'brig use VERSION', or remove all with 'brig uninstall'"
            )));
        }
        self.refuse_users(&dir, version)?;
        fs::remove_dir_all(&dir).map_err(|error| failed(&dir, &error))?;
        // Those that were made from it.
        let templates = Templates::beside(&self.state);
        templates
            .drop_useless()
            .map_err(|error| failed(&self.state, &error))
    }

    fn refuse_users(&self, dir: &Path, what: &str) -> Result<()> {
        let users = self.users(dir);
        if users.is_empty() {
            return Ok(());
        }
        Err(Error::state(format!(
            "{what} is used by pods that need it until they end: {}",
            users.join(", ")
        )))
    }

    /// Refuses while a pod runs.
    ///
    /// # Errors
    /// `FailedPrecondition` that says which.
    pub fn refuse_pods(&self) -> Result<()> {
        self.refuse_users(&self.prefix, "Brig")
    }

    /// Whether this is a link into the prefix, by whatever path to it.
    #[must_use]
    pub fn is_ours(&self, link: &Path) -> bool {
        fs::read_link(link).is_ok_and(|to| {
            let leads = fs::canonicalize(link).unwrap_or_default();
            to.starts_with(&self.prefix) || leads.starts_with(&self.prefix)
        })
    }

    /// Removes all versions and the links to them in `links`, and the operator's `configuration` if given; as the last
    /// installation what is kept of pods that failed and all templates too. Says where the versions were.
    ///
    /// # Errors
    /// `FailedPrecondition` that says which pods run; `Internal` with what could not be removed.
    pub fn uninstall(
        &self,
        links: &Path,
        configuration: Option<&Path>,
        is_last: bool,
    ) -> Result<PathBuf> {
        let _turn = self.turn()?;
        self.refuse_pods()?;
        for dir in LINKED {
            let dir = links.join(dir);
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if self.is_ours(&path) {
                    fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
                }
            }
        }
        // Those that were made for the links alone.
        for dir in [LINKED[1], LINKED[2], "share/bash-completion"] {
            let _ = fs::remove_dir(links.join(dir));
        }
        let versions = self.versions()?.into_iter();
        let versions = versions.map(|version| self.prefix.join(version));
        for dir in versions.chain(self.unfinished()) {
            fs::remove_dir_all(&dir).map_err(|error| failed(&dir, &error))?;
        }
        for link in [CURRENT, "bin", "share"].map(|name| self.prefix.join(name)) {
            if link.is_symlink() {
                fs::remove_file(&link).map_err(|error| failed(&link, &error))?;
            }
        }
        if let Some(dir) = configuration {
            ignore_absent(fs::remove_dir_all(dir)).map_err(|error| failed(dir, &error))?;
        }
        let templates = Templates::beside(&self.state);
        let forgotten = if is_last {
            // No maker runs: it would be a user.
            maker::remove_cgroup();
            let remains = Remains::beside(&self.state);
            remains.remove().and_then(|()| templates.remove())
        } else {
            templates.drop_useless()
        };
        forgotten.map_err(|error| failed(&self.state, &error))?;
        // What somebody else keeps in these stays.
        let _ = fs::remove_dir(&self.prefix);
        let _ = fs::remove_dir(&self.state);
        Ok(self.prefix.clone())
    }
}

/// The version that a directory is marked as.
fn marked(dir: &Path) -> Option<String> {
    let mark = fs::read_to_string(dir.join(MARK)).ok()?;
    Some(mark.trim_end().to_owned())
}

/// Whether a directory is a whole version: one that is not yet has another name.
fn is_version(dir: &Path) -> bool {
    marked(dir).is_some_and(|mark| dir.file_name().and_then(|name| name.to_str()) == Some(&mark))
}

/// The directory of the installation that a program is of; its own, for one that is of none.
#[must_use]
pub fn place(program: &Path) -> PathBuf {
    if program.starts_with(PACKAGED) {
        return PathBuf::from(PACKAGED);
    }
    let version = program.ancestors().nth(2).filter(|dir| is_version(dir));
    let place = version.or(Some(program)).and_then(Path::parent);
    place.unwrap_or(program).to_owned()
}

/// Marks a directory as the version of its name.
#[cfg(test)]
pub fn mark(dir: &Path) {
    let name = dir.file_name().unwrap().to_str().unwrap();
    fs::write(dir.join(MARK), format!("{name}\n")).unwrap();
}

/// Why a program at this place knows of no versions.
fn without_versions(binary: &Path) -> &'static str {
    if binary.starts_with(PACKAGED) {
        "this brig is of the Debian package, which has one version at a time: 'apt install' of another upgrades it or rolls \
         it back, 'apt remove brig' removes it"
    } else {
        "this brig was not put here by ./install, so it knows of no versions: run /usr/local/bin/brig"
    }
}

/// The shims and VMMs that run from `dir`.
fn running(dir: &Path) -> BTreeSet<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let binary = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let ours = [PARTS[0], PARTS[2]];
        binary.starts_with(dir) && ours.iter().any(|part| binary.ends_with(part))
    })
    .collect()
}

fn ignore_absent(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::io(format_args!("cannot change {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_shim::node::identity::Identity;
    use brig_shim::node::journal::Journal;
    use std::process::{Child, Command};

    /// All of a version in a directory.
    fn put(dir: &Path, version: &str) {
        for part in PARTS {
            let part = dir.join(part);
            fs::create_dir_all(part.parent().unwrap()).unwrap();
            fs::write(part, version).unwrap();
        }
        fs::write(dir.join(MARK), format!("{version}\n")).unwrap();
    }

    /// Two versions, of which the second is current, and one that is being installed.
    fn two() -> (Installation, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("opt");
        for version in ["1.0-a", "1.1-b"] {
            put(&prefix.join(version), version);
        }
        put(&prefix.join(".1.2-c.new"), "1.2-c");
        symlink("1.1-b", prefix.join(CURRENT)).unwrap();
        symlink("current/bin", prefix.join("bin")).unwrap();
        let state = dir.path().join("run");
        (Installation { prefix, state }, dir)
    }

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    /// A pod whose shim is a program of `version`.
    fn pod(installation: &Installation, version: &str) -> Running {
        let binary = installation.prefix.join(version).join(PARTS[0]);
        fs::copy("/bin/sleep", &binary).unwrap();
        let child = Command::new(&binary).arg("100").spawn().unwrap();
        let dir = StateDir::new(&installation.state, "k8s.io", "web").unwrap();
        dir.create().unwrap();
        let shim = Identity::of(child.id()).unwrap();
        let running = Running(child);
        let journal = Journal::new(shim);
        dir.write(&journal).unwrap();
        running
    }

    #[test]
    fn a_version_goes_only_when_no_pod_and_no_new_pod_uses_it() {
        let (installation, _dir) = two();
        let error = installation.remove("1.1-b").unwrap_err();
        assert!(error.message.contains("brig use"), "{error}");
        let error = installation.remove("../x").unwrap_err();
        assert!(error.message.contains("1.0-a, 1.1-b"), "{error}");
        let running = pod(&installation, "1.0-a");
        let error = installation.remove("1.0-a").unwrap_err();
        assert!(error.message.contains("k8s.io/web"), "{error}");
        drop(running);
        // One that is not known by its journal.
        let running = pod(&installation, "1.0-a");
        fs::remove_dir_all(&installation.state).unwrap();
        let error = installation.remove("1.0-a").unwrap_err();
        let process = format!("process {}", running.0.id());
        assert!(error.message.contains(&process), "{error}");
        drop(running);
        installation.remove("1.0-a").unwrap();
        assert_eq!(installation.versions().unwrap(), ["1.1-b"]);
    }

    #[test]
    fn new_pods_get_the_version_switched_to_and_old_ones_keep_theirs() {
        let (installation, _dir) = two();
        let _running = pod(&installation, "1.1-b");
        installation.switch("1.0-a").unwrap();
        assert_eq!(installation.current().as_deref(), Some("1.0-a"));
        let rows: Value = serde_json::from_str(&installation.list(true).unwrap()).unwrap();
        assert_eq!(
            rows[0],
            json!({"version": "1.0-a", "current": true, "pods": []})
        );
        assert_eq!(rows[1]["pods"][0], "k8s.io/web");
        let text = installation.list(false).unwrap();
        assert!(text.lines().nth(1).unwrap().contains('*'), "{text}");
    }

    #[test]
    fn what_the_package_brought_is_left_to_the_package() {
        let said = without_versions(Path::new("/usr/lib/brig/0.1.0+1/bin/brig"));
        assert!(said.contains("apt remove brig"), "{said}");
        let said = without_versions(Path::new("/host/bin/brig"));
        assert!(said.contains("/usr/local/bin/brig"), "{said}");
    }

    #[test]
    fn a_version_is_not_removed_while_one_is_being_installed() {
        let (installation, _dir) = two();
        let turn = installation.turn().unwrap();
        std::thread::scope(|scope| {
            let removing = scope.spawn(|| installation.remove("1.0-a"));
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert_eq!(installation.versions().unwrap().len(), 2);
            drop(turn);
            removing.join().unwrap().unwrap();
        });
        assert_eq!(installation.versions().unwrap(), ["1.1-b"]);
    }

    #[test]
    fn half_a_version_is_not_switched_to() {
        let (installation, _dir) = two();
        fs::remove_file(installation.prefix.join("1.0-a/share/brig/vmlinux")).unwrap();
        let error = installation.switch("1.0-a").unwrap_err();
        assert!(error.message.contains("vmlinux"), "{error}");
        assert_eq!(installation.current().as_deref(), Some("1.1-b"));
    }

    #[test]
    fn what_only_looks_like_a_version_is_none() {
        let (installation, _dir) = two();
        // Another installation in this one's directory, without a mark or with that of another name.
        let other = installation.prefix.join("brig");
        put(&other, "1.1-b");
        let error = installation.switch(".1.2-c.new").unwrap_err();
        assert!(error.message.contains("there are: 1.0-a, 1.1-b"), "{error}");
        fs::remove_file(other.join(MARK)).unwrap();
        assert_eq!(installation.versions().unwrap(), ["1.0-a", "1.1-b"]);
        let links = installation.prefix.join("no-links");
        installation.uninstall(&links, None, true).unwrap();
        let left: Vec<_> = fs::read_dir(&installation.prefix).unwrap().collect();
        assert!(left.len() == 1 && other.join(PARTS[1]).exists(), "{left:?}");
    }

    #[test]
    fn what_is_kept_of_pods_stays_for_another_installation() {
        let (installation, dir) = two();
        let kept = dir.path().join("run.ended");
        fs::create_dir(&kept).unwrap();
        let links = dir.path().join("local");
        installation.uninstall(&links, None, false).unwrap();
        assert!(!installation.prefix.exists() && kept.exists());
    }

    #[test]
    fn uninstalling_leaves_only_what_is_not_ours() {
        let (installation, dir) = two();
        let links = dir.path().join("local");
        fs::create_dir_all(links.join("bin")).unwrap();
        symlink(
            installation.prefix.join("current/bin/brig"),
            links.join("bin/brig"),
        )
        .unwrap();
        // By the path that the operator gave, which has a link in it.
        symlink(&installation.prefix, dir.path().join("named")).unwrap();
        symlink(
            dir.path().join("named/current/bin/brig-vmm"),
            links.join("bin/brig-vmm"),
        )
        .unwrap();
        let templates = dir.path().join("run.templates");
        fs::create_dir(&templates).unwrap();
        fs::write(templates.join("key"), "30 MiB").unwrap();
        let kept = dir.path().join("run.ended");
        fs::create_dir(&kept).unwrap();
        symlink("/bin/true", links.join("bin/other")).unwrap();
        let configuration = dir.path().join("etc");
        fs::create_dir(&configuration).unwrap();
        let running = pod(&installation, "1.1-b");
        let error = installation.uninstall(&links, None, true).unwrap_err();
        assert!(error.message.contains("k8s.io/web"), "{error}");
        assert!(links.join("bin/brig").is_symlink());
        drop(running);
        installation.uninstall(&links, None, true).unwrap();
        assert!(!installation.prefix.exists() && !templates.exists() && !kept.exists());
        for link in ["bin/brig", "bin/brig-vmm"] {
            assert!(!links.join(link).is_symlink(), "{link}");
        }
        assert!(links.join("bin/other").is_symlink() && configuration.exists());
    }
}
