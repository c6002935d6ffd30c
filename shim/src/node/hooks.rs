//! OCI hooks that run on the node: prestart, createRuntime, poststart and poststop (runtime-spec,
//! config.md, "POSIX-platform Hooks"). Their namespace is the runtime's, so they are the shim's to run;
//! those of the container's namespaces have nothing to run in, and the agent refuses them.
//!
//! Hooks come from whoever wrote the spec for containerd, nerdctl's network for one, and are trusted like
//! containerd. Each is bounded in time all the same, because a container waits for it.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use crate::asked::spec::Spec;
use crate::asked::spec::hooks::{Hook, Hooks};
use crate::error::{Error, Kind, Result};
use crate::node::limits;

/// How long a hook may take that names no time of its own.
const DEFAULT_LIMIT: Duration = Duration::from_secs(300);
/// What of a failed hook's standard error is told, in bytes.
const TOLD: u64 = 1024;

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// prestart and createRuntime: the container's namespaces exist, nothing of it runs.
    Create,
    /// poststart: its process was started.
    Started,
    /// poststop: it was deleted.
    Stopped,
}

/// The hooks of one container and what they are told of it.
#[derive(Debug, Clone)]
pub struct ContainerHooks {
    hooks: Hooks,
    id: String,
    bundle: PathBuf,
    annotations: serde_json::Value,
    /// Its pid on the node, if it is not the VMM's.
    own_pid: Option<u32>,
}

impl ContainerHooks {
    /// The hooks of this spec; `None` when it has none that run on the node.
    #[must_use]
    pub fn of(spec: &Spec, id: &str, bundle: &Path, own_pid: Option<u32>) -> Option<Self> {
        let hooks = spec.hooks()?.clone();
        let all = [
            &hooks.prestart,
            &hooks.create_runtime,
            &hooks.poststart,
            &hooks.poststop,
        ];
        if all.iter().all(|stage| stage.is_empty()) {
            return None;
        }
        Some(Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations().collect(),
            own_pid,
            hooks,
        })
    }

    /// Runs the hooks of a stage, one after another, with the VMM's pid for a container without one of its
    /// own. Blocking.
    ///
    /// # Errors
    /// Of the first hook that cannot be run, fails or takes too long; later ones are not run, but for those of
    /// the end.
    pub fn run(&self, stage: Stage, vmm: u32) -> Result<()> {
        let (hooks, status) = match stage {
            Stage::Create => (
                [&self.hooks.prestart[..], &self.hooks.create_runtime],
                "creating",
            ),
            Stage::Started => ([&self.hooks.poststart[..], &[]], "running"),
            Stage::Stopped => ([&self.hooks.poststop[..], &[]], "stopped"),
        };
        let mut state = json!({
            "ociVersion": "1.2.0",
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if stage != Stage::Stopped {
            state["pid"] = self.own_pid.unwrap_or(vmm).into();
        }
        let mut first = Ok(());
        for hook in hooks.into_iter().flatten() {
            let ran = run(hook, state.to_string().as_bytes(), &self.bundle);
            if first.is_ok() {
                first = ran;
            }
            if stage != Stage::Stopped && first.is_err() {
                break;
            }
        }
        first
    }
}

fn run(hook: &Hook, state: &[u8], bundle: &Path) -> Result<()> {
    let name = hook.path.display();
    let failed = |error: io::Error| Error::io(format_args!("hook {name}"), &error);
    if !hook.path.is_absolute() {
        return Err(Error::invalid(format!(
            "hook {name}: its path must be absolute"
        )));
    }
    // Files instead of pipes: a hook that reads nothing, or leaves a child behind, keeps nobody waiting.
    let mut input = memory().map_err(failed)?;
    let errors = memory().map_err(failed)?;
    input
        .write_all(state)
        .and_then(|()| input.rewind())
        .map_err(failed)?;
    let mut command = Command::new(&hook.path);
    let variables = hook.env.iter().filter_map(|entry| entry.split_once('='));
    command
        .args(hook.args.iter().skip(1))
        .env_clear()
        .envs(variables)
        .current_dir(bundle)
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(Stdio::from(errors.try_clone().map_err(failed)?));
    if let Some(zero) = hook.args.first() {
        std::os::unix::process::CommandExt::arg0(&mut command, zero);
    }
    limits::give_back_files(&mut command);
    let mut child = command.spawn().map_err(failed)?;
    let limit = hook
        .timeout
        .map_or(DEFAULT_LIMIT, |seconds| Duration::from_secs(seconds.into()));
    let ended = ends_within(&child, limit);
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    if !ended.map_err(failed)? {
        return Err(Error::new(
            Kind::DeadlineExceeded,
            format!("hook {name} did not end within {} s", limit.as_secs()),
        ));
    }
    if status.success() {
        return Ok(());
    }
    Err(Error::state(format!(
        "hook {name} failed ({status}): {}",
        last_words(errors)
    )))
}

fn memory() -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create(
        "hook",
        MemfdFlags::CLOEXEC,
    )?))
}

fn ends_within(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&limit))? > 0)
}

/// The end of what a hook wrote to standard error, on one line.
fn last_words(mut errors: File) -> String {
    let mut bytes = Vec::new();
    let length = errors.metadata().map_or(0, |metadata| metadata.len());
    let from = io::SeekFrom::Start(length.saturating_sub(TOLD));
    let read = errors
        .seek(from)
        .and_then(|_| errors.take(TOLD).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes)
            .trim()
            .replace(['\n', '\r'], " "),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn hooks(dir: &Path, text: &str) -> ContainerHooks {
        let spec = format!(r#"{{"annotations":{{"k":"v"}},"hooks":{text}}}"#);
        let spec = Spec::parse(spec.as_bytes()).unwrap();
        ContainerHooks::of(&spec, "c1", dir, None).unwrap()
    }

    fn shell(script: &str) -> String {
        format!(r#"{{"path":"/bin/sh","args":["sh","-c","{script}"],"env":["WHO=me"]}}"#)
    }

    #[test]
    fn a_hook_gets_the_state_its_arguments_and_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let script = shell("cat > state; echo $WHO $HOME > env; pwd >> env");
        let hooks = hooks(dir.path(), &format!(r#"{{"createRuntime":[{script}]}}"#));
        hooks.run(Stage::Create, 42).unwrap();
        let state = std::fs::read(dir.path().join("state")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        assert_eq!(state["id"], "c1");
        assert_eq!(state["pid"], 42);
        assert_eq!(state["status"], "creating");
        assert_eq!(state["annotations"]["k"], "v");
        assert_eq!(state["bundle"], dir.path().to_str().unwrap());
        let env = std::fs::read_to_string(dir.path().join("env")).unwrap();
        assert_eq!(env, format!("me\n{}\n", dir.path().display()));
    }

    #[test]
    fn a_failure_is_told_with_its_last_words_and_ends_a_creation_or_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let (fails, marks) = (
            shell("echo no address left >&2; exit 3"),
            shell("touch ran"),
        );
        let text = format!(
            r#"{{"prestart":[{fails}],"createRuntime":[{marks}],"poststart":[{fails},{marks}],
            "poststop":[{fails},{marks}]}}"#
        );
        let hooks = hooks(dir.path(), &text);
        let error = hooks.run(Stage::Create, 1).unwrap_err();
        assert!(
            error.message.contains("/bin/sh") && error.message.contains("no address left"),
            "{error}"
        );
        assert!(hooks.run(Stage::Started, 1).is_err());
        assert!(!dir.path().join("ran").exists());
        assert!(hooks.run(Stage::Stopped, 1).is_err());
        assert!(dir.path().join("ran").exists());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"poststart":[{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}]}"#;
        let began = Instant::now();
        let error = hooks(dir.path(), text).run(Stage::Started, 1).unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded);
        assert!(began.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_missing_program_or_a_relative_path_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["/no/such/hook", "bin/hook"] {
            let text = format!(r#"{{"prestart":[{{"path":"{path}"}}]}}"#);
            let error = hooks(dir.path(), &text).run(Stage::Create, 1).unwrap_err();
            assert!(error.message.contains(path), "{error}");
        }
        let none = Spec::parse(br#"{"hooks":{"createContainer":[{"path":"/x"}]}}"#).unwrap();
        assert!(ContainerHooks::of(&none, "c1", dir.path(), None).is_none());
    }
}
