//! containerd as it runs on this node: whether Brig works with its release, what its configuration has of Brig, and whether it
//! has read that configuration.
//!
//! Which containerd: where several run (Docker has one of its own), the one whose configuration has Brig's handlers, else the
//! first that serves Kubernetes. Trusts root, who has started it and has written its files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use brig_shim::error::Error;
use brig_shim::node::daemon::Daemon;
use brig_shim::node::release::Release;
use serde_json::json;

use super::finding::Finding;
use super::handler::Search;
use crate::configured::{self, Configuration, Configured};
use crate::handlers::CONTAINERD;
use crate::shims::single_threaded;

/// Its program's name.
const NAME: &str = "containerd";
/// The first and the last release that Brig is shown to work with.
const OLDEST: (u32, u32) = (1, 6);
const NEWEST: (u32, u32) = (2, 4);
/// How long it may take to say which release it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// The node's.
pub struct Containerd {
    /// Its process, if it runs.
    pub process: Option<Daemon>,
    /// What it says that it is, or why it says nothing.
    release: Result<Release, String>,
    /// The file that it was started with, or would be.
    file: PathBuf,
    configuration: Configuration,
}

impl Containerd {
    /// Looks for it; `proc` is where procfs is.
    pub fn find(proc: &Path) -> Self {
        let running = Daemon::named(proc, NAME).into_iter().map(|process| {
            let file = file_of(&process);
            let configuration = configured::read(&file, None);
            (process, file, configuration)
        });
        // The last of those that are best: so from the last to the first.
        let best = running.rev().max_by_key(|(_, _, configuration)| {
            let serves = configuration.disabled.is_none();
            (!configuration.handlers.is_empty(), serves)
        });
        let Some((process, file, configuration)) = best else {
            let file = PathBuf::from(CONTAINERD);
            return Self {
                process: None,
                release: Err("it does not run".to_owned()),
                configuration: configured::read(&file, None),
                file,
            };
        };
        let release = asked(&socket_of(&process, configuration.socket));
        let major = release.as_ref().ok().map(|release| release.number.0);
        Self {
            process: Some(process),
            release,
            configuration: configured::read(&file, major),
            file,
        }
    }

    /// Brig's handlers.
    pub fn handlers(&self) -> &[Configured] {
        &self.configuration.handlers
    }

    /// Where it looks for shims.
    pub fn search(&self) -> Option<Search> {
        let process = self.process.as_ref()?;
        Some(Search {
            path: process.variable("PATH")?,
            beside: process.program()?.parent()?.to_owned(),
        })
    }

    /// What there is to say of it as a whole. Pods of Kubernetes want a containerd, VMs do not: nothing of it is fatal.
    pub fn findings(&self) -> Vec<Finding> {
        let note = |said: String, fix: String| Finding::of(NAME, Err(said)).or(fix).noted();
        let mut findings = vec![self.its_release()];
        if let Some(changed) = self.changed() {
            findings.push(note(
                format!(
                    "it was started before {} was changed, and does not know yet what that says now",
                    changed.display()
                ),
                "systemctl restart containerd: pods live on".to_owned(),
            ));
        }
        let faults = self.configuration.faults.iter();
        findings.extend(faults.map(|(said, fix)| note(said.clone(), fix.clone())));
        if let Some((part, file)) = &self.configuration.disabled {
            findings.push(note(
                format!(
                    "{} has {part} in disabled_plugins, so it serves no Kubernetes",
                    file.display()
                ),
                "take it out, then systemctl restart containerd".to_owned(),
            ));
        }
        if self.handlers().is_empty() {
            let option = match self.file == Path::new(CONTAINERD) {
                true => String::new(),
                false => format!(" --config {}", self.file.display()),
            };
            findings.push(note(
                format!(
                    "{} has no handler of Brig's, so no RuntimeClass leads to it",
                    self.file.display()
                ),
                format!("brig containerd add{option}, then systemctl restart containerd"),
            ));
        }
        findings
    }

    fn its_release(&self) -> Finding {
        let with = format!("with {}", self.file.display());
        let finding = match &self.release {
            Err(error) if self.process.is_none() => {
                Finding::of(NAME, Err(error.clone())).or("systemctl start containerd")
            }
            Err(error) => {
                let said = format!("it does not say which release it is ({error}), {with}");
                Finding::of(NAME, Err(said)).or("journalctl --unit containerd says what ails it")
            }
            Ok(Release { name, number }) => {
                let shown = format!("{}.{} to {}.{}", OLDEST.0, OLDEST.1, NEWEST.0, NEWEST.1);
                let (how, fix) = if *number < OLDEST {
                    ("older", "upgrade containerd")
                } else {
                    (
                        "newer",
                        "see whether there is a newer Brig, or try a pod of each handler",
                    )
                };
                if (OLDEST..=NEWEST).contains(number) {
                    Finding::of(NAME, Ok(format!("{name}, {with}")))
                } else {
                    let said =
                        format!("{name} is {how} than what Brig is shown to work with ({shown})");
                    Finding::of(NAME, Err(said)).or(fix)
                }
            }
        };
        let release = self.release.as_ref().ok().map(|release| &release.name);
        let handlers = self.handlers().iter().map(|handler| &handler.name);
        finding.noted().about(
            NAME,
            json!({
                "running": self.process.is_some(),
                "release": release,
                "configuration": self.configuration.files,
                "handlers": handlers.collect::<Vec<_>>(),
            }),
        )
    }

    /// A file of its configuration that it cannot have read as it is now. By the time of the last change to its inode,
    /// which nobody can choose: a file that was put there has perhaps an older time of its own.
    fn changed(&self) -> Option<&Path> {
        let started = self.process.as_ref()?.started()?;
        let files = self.configuration.files.iter().map(PathBuf::as_path);
        changed_after(started, files)
    }
}

fn changed_after<'a>(
    started: SystemTime,
    mut files: impl Iterator<Item = &'a Path>,
) -> Option<&'a Path> {
    files.find(|file| {
        let changed = fs::metadata(file).ok().and_then(|metadata| {
            let seconds = Duration::from_secs(u64::try_from(metadata.ctime()).ok()?);
            let nanos = Duration::from_nanos(u64::try_from(metadata.ctime_nsec()).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(seconds + nanos)
        });
        changed.is_some_and(|changed| changed > started)
    })
}

/// The files that the containerds of this node were started with, and the usual one.
#[must_use]
pub fn files() -> Vec<PathBuf> {
    let running = Daemon::named(Path::new("/proc"), NAME);
    let mut files: Vec<_> = running.iter().map(file_of).collect();
    files.push(PathBuf::from(CONTAINERD));
    files.sort();
    files.dedup();
    files
}

/// Whether every containerd that reads this file merges the files that it imports, as they do from 2.0 on. Those are the ones
/// that run with it, as they are and as their programs will be after the next start; where none runs, all that are installed.
#[must_use]
pub fn merges(file: &Path) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|dir| dir.join(NAME));
    merging(Path::new("/proc"), file, installed)
}

fn merging(proc: &Path, file: &Path, installed: impl Iterator<Item = PathBuf>) -> bool {
    let place = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let running: Vec<_> = Daemon::named(proc, NAME)
        .into_iter()
        .filter(|process| place(&file_of(process)) == place(file))
        .collect();
    let mut majors = Vec::new();
    if running.is_empty() {
        majors.extend(installed.filter_map(|program| installed_major(&program)));
    }
    for process in running {
        let release = asked(&socket_of(&process, configured::read(file, None).socket));
        majors.extend(release.ok().map(|release| release.number.0));
        majors.extend(process.program().as_deref().and_then(installed_major));
    }
    !majors.is_empty() && majors.iter().all(|major| *major >= 2)
}

/// The first number of what `containerd --version` says.
fn installed_major(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    major(&String::from_utf8_lossy(&output.stdout))
}

fn major(said: &str) -> Option<u32> {
    let words = said.split_whitespace();
    let mut versions = words.map(|word| word.trim_start_matches('v'));
    versions.find_map(|word| word.split_once('.')?.0.parse().ok())
}

/// Where it listens: what its command line says comes before its `configured` place.
fn socket_of(process: &Daemon, configured: PathBuf) -> PathBuf {
    let command = process.command();
    let told = configured::option(&command, ["-a", "--address"]).map(PathBuf::from);
    told.unwrap_or(configured)
}

/// The file that it was started with, from its own directory.
fn file_of(process: &Daemon) -> PathBuf {
    match configured::file_of(&process.command()) {
        Some(file) => process.directory().unwrap_or_default().join(file),
        None => PathBuf::from(CONTAINERD),
    }
}

fn asked(socket: &Path) -> Result<Release, String> {
    let runtime = single_threaded().map_err(|error| Error::io("cannot ask", &error).message)?;
    let asked = runtime.block_on(Release::of(socket, PATIENCE));
    asked.map_err(|error| format!("{}: {error}", socket.display()))
}

#[cfg(test)]
mod tests {
    use super::super::finding::said;
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    /// One that runs with this file and says that it is this release.
    fn running(proc: &Path, pid: u32, file: &Path, release: &str) -> Containerd {
        let place = proc.join(pid.to_string());
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("comm"), "containerd\n").unwrap();
        let command = format!("containerd\0--config\0{}\0", file.display());
        fs::write(place.join("cmdline"), command).unwrap();
        let mut found = Containerd::find(proc);
        let number = release.split('.').map(|number| number.parse().unwrap());
        let number: Vec<u32> = number.take(2).collect();
        found.release = Ok(Release {
            name: release.to_owned(),
            number: (number[0], number[1]),
        });
        found
    }

    /// A containerd that says on its command line that it is this one.
    fn program(dir: &Path, version: &str) -> PathBuf {
        let program = dir.join(format!("containerd-{version}"));
        let said = format!(
            "#!/bin/sh\necho containerd github.com/containerd/containerd v{version} 75cb2b7\n"
        );
        fs::write(&program, said).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    #[test]
    fn whether_files_are_merged_is_said_by_the_containerd_whose_file_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (program(dir.path(), "1.7.24"), program(dir.path(), "2.1.4"));
        let (one, other) = (dir.path().join("one.toml"), dir.path().join("two.toml"));
        let proc = dir.path().join("proc");
        let starts = |pid: &str, file: &Path, program: &Path| {
            let place = proc.join(pid);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("comm"), "containerd\n").unwrap();
            let command = format!("containerd\0-a\0/nonexistent\0-c\0{}\0", file.display());
            fs::write(place.join("cmdline"), command).unwrap();
            symlink(program, place.join("exe")).unwrap();
        };
        let merges = |file: &Path, installed: &[&PathBuf]| {
            merging(&proc, file, installed.iter().map(|path| (*path).clone()))
        };
        let nowhere = dir.path().join("nowhere");
        // None runs: what is installed, all of it.
        assert!(merges(&one, &[&nowhere, &new]));
        assert!(!merges(&one, &[&new, &old]) && !merges(&one, &[&nowhere]));
        starts("7", &one, &old);
        assert!(!merges(&one, &[&new]) && merges(&other, &[&new]));
        starts("8", &other, &new);
        assert!(merges(&other, &[&old]));
        // Two that do not agree.
        starts("9", &other, &old);
        assert!(!merges(&other, &[&new]));
    }

    #[test]
    fn a_version_is_read_as_containerd_says_it() {
        assert_eq!(
            major("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+b4"),
            Some(1)
        );
        assert_eq!(
            major("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7"),
            Some(2)
        );
        assert_eq!(major(""), None);
    }

    const HANDLER: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.brig]\n\
                           runtime_type = \"io.containerd.brig.v2\"\n";

    #[test]
    fn a_release_that_brig_is_not_shown_with_is_told_and_any_other_is_well() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, HANDLER).unwrap();
        for (release, words) in [
            ("1.6.0", "ok    containerd       1.6.0, with "),
            ("2.4.9", "ok    containerd       2.4.9, with "),
            (
                "1.5.18",
                "note  containerd       1.5.18 is older than what Brig is shown to work with (1.6 to 2.4)",
            ),
            ("2.5.0", "note  containerd       2.5.0 is newer than "),
            ("3.0.1", "note  containerd       3.0.1 is newer than "),
        ] {
            let containerd = running(dir.path(), 9, &file, release);
            let said = said(&containerd.findings());
            assert!(said.starts_with(words), "{said}");
            let lines = if words.starts_with("ok") { 1 } else { 2 };
            assert_eq!(said.lines().count(), lines, "{said}");
        }
    }

    #[test]
    fn the_containerd_that_has_brigs_handlers_is_meant_wherever_others_run() {
        let dir = tempfile::tempdir().unwrap();
        let (docker, kubernetes) = (dir.path().join("docker.toml"), dir.path().join("k.toml"));
        fs::write(&docker, "disabled_plugins = [\"cri\"]\n").unwrap();
        fs::write(&kubernetes, "version = 2\n").unwrap();
        let found = running(dir.path(), 3, &docker, "2.0.0");
        let told = said(&found.findings());
        assert!(
            told.contains("docker.toml has cri in disabled_plugins"),
            "{told}"
        );
        assert_eq!(
            running(dir.path(), 5, &kubernetes, "2.0.0").file,
            kubernetes
        );
        // And with it one that serves as well.
        let other = dir.path().join("other.toml");
        fs::write(&other, HANDLER).unwrap();
        assert_eq!(
            running(dir.path(), 7, &kubernetes, "2.0.0").file,
            kubernetes
        );
        assert_eq!(running(dir.path(), 8, &other, "2.0.0").file, other);
        let parts = running(dir.path(), 8, &other, "2.0.0").findings()[0].json();
        assert_eq!(parts["containerd"]["handlers"], json!(["brig"]));
        assert_eq!(parts["containerd"]["configuration"], json!([other]));
    }

    #[test]
    fn a_configuration_without_brig_is_told_with_the_command_that_adds_it_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, "version = 3\n").unwrap();
        let said = said(&running(dir.path(), 9, &file, "2.1.0").findings());
        let fix = format!("fix: brig containerd add --config {}, then", file.display());
        assert!(
            said.contains("no handler of Brig's") && said.contains(&fix),
            "{said}"
        );
    }

    #[test]
    fn what_was_changed_after_the_start_is_not_known_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, HANDLER).unwrap();
        // A time that somebody has given it says nothing.
        let old = SystemTime::now() - Duration::from_secs(1 << 20);
        fs::File::open(&file).unwrap().set_modified(old).unwrap();
        let second = Duration::from_secs(1);
        let now = SystemTime::now();
        let of = |started| changed_after(started, [file.as_path()].into_iter());
        assert_eq!(of(now + second), None);
        assert_eq!(of(now - second), Some(file.as_path()));
        assert_eq!(
            changed_after(now, [Path::new("/nonexistent")].into_iter()),
            None
        );
    }

    #[test]
    fn a_node_without_containerd_is_told_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let found = Containerd::find(dir.path());
        let first = found.findings()[0].to_string();
        assert!(
            first.contains("does not run") && first.contains("systemctl start containerd"),
            "{first}"
        );
        assert!(found.search().is_none());
    }
}
