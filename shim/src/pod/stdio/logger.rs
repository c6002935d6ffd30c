//! `binary://` and `binary-v2://` stdio: a logging program of the node's that reads a container's output
//! from pipes.
//!
//! containerd's contract: descriptors 3 and 4 are the read ends of stdout and stderr, descriptor 5 tells
//! when the program is ready, the environment names container and namespace, and the URI's query becomes
//! its arguments. With `binary` both a byte on descriptor 5 and its end mean ready, so a program that
//! fails at once loses the container's output; `binary-v2` (containerd 2.2) wants the byte. The program
//! is trusted as containerd's own choice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::percent::decode;
use crate::error::{Error, Kind, Result};
use crate::node::limits;
use crate::node::watched::watched;

/// The schemes of an URI that names a logger.
pub const SCHEMES: [&str; 2] = ["binary", "binary-v2"];
/// The scheme whose programs must write a byte when they are ready.
const STRICT: &str = "binary-v2";

/// How long a logger may take to finish once its pipes are closed.
const FINISH: Duration = Duration::from_secs(10);

/// A running logger.
#[derive(Debug)]
pub struct LoggerProcess {
    child: Child,
    pidfd: AsyncFd<OwnedFd>,
}

/// Starts the logger of this URI and waits until it is ready. Returns the write ends of its stdout
/// and stderr pipes.
///
/// # Errors
/// `InvalidArgument` for an URI that is none, `NotFound` for a missing program, `DeadlineExceeded`,
/// `FailedPrecondition` for a program of `binary-v2` that ends or closes descriptor 5 instead.
pub async fn start(
    uri: &str,
    namespace: &str,
    id: &str,
    limit: Duration,
) -> Result<(OwnedFd, OwnedFd, LoggerProcess)> {
    let Logger {
        program,
        arguments,
        strict,
    } = parse(uri)?;
    let failed = |error: io::Error| Error::io(format_args!("logger {program}"), &error);
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()));
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    let (ready, ready_write) = pipe()?;
    for write in [&stdout_write, &stderr_write] {
        rustix::io::ioctl_fionbio(write, true).map_err(|errno| failed(errno.into()))?;
    }
    let mut command = Command::new(&program);
    command
        .args(arguments)
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    place(&mut command, [stdout, stderr, ready_write])?;
    limits::give_back_files(&mut command);
    let mut child = command.spawn().map_err(failed)?;
    // The command's closure holds our copies of the child's ends.
    drop(command);
    let opened = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .map_err(io::Error::from)
        .and_then(|pidfd| watched(pidfd, Interest::READABLE));
    let pidfd = match opened {
        Ok(pidfd) => pidfd,
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(error));
        }
    };
    let process = LoggerProcess { child, pidfd };
    rustix::io::ioctl_fionbio(&ready, true).map_err(|errno| failed(errno.into()))?;
    let ready = watched(ready, Interest::READABLE).map_err(failed)?;
    let error = match timeout(limit, ready.readable()).await {
        Ok(_) if !strict || wrote(ready.get_ref()) => {
            return Ok((stdout_write, stderr_write, process));
        }
        Ok(_) => Error::state(format!(
            "logger {program} was not ready: it ended or closed descriptor 5 without writing a byte to it"
        )),
        Err(_) => {
            let how = if strict { "write a byte to" } else { "close" };
            let message =
                format!("logger {program} did not become ready (it must {how} descriptor 5)");
            Error::new(Kind::DeadlineExceeded, message)
        }
    };
    process.kill().await;
    Err(error)
}

/// Whether what made the pipe readable was a byte, and not its end.
fn wrote(ready: &OwnedFd) -> bool {
    let mut byte = [0; 1];
    matches!(rustix::io::read(ready, &mut byte), Ok(1))
}

impl LoggerProcess {
    /// Waits for its end, which its pipes' end brings; kills it when that takes too long.
    pub async fn end(mut self) {
        if timeout(FINISH, self.pidfd.readable()).await.is_ok() {
            let _ = self.child.try_wait();
        } else {
            self.kill().await;
        }
    }

    async fn kill(mut self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL);
        let _ = self.pidfd.readable().await.map(|_| ());
        let _ = self.child.try_wait();
    }
}

/// Puts the descriptors at 3, 4 and 5 of the child.
fn place(command: &mut Command, fds: [OwnedFd; 3]) -> Result<()> {
    const FIRST: RawFd = 3;
    // Above every target, so that no dup overwrites a source.
    let mut high = Vec::new();
    for fd in fds {
        let moved = rustix::io::fcntl_dupfd_cloexec(&fd, 10)
            .map_err(|errno| Error::io("cannot prepare a logger", &errno.into()))?;
        high.push(moved);
    }
    let place = move || {
        for (target, fd) in (FIRST..).zip(&high) {
            // SAFETY: dup2 is async-signal-safe; both numbers are plain integers and the source is
            // open, as this closure owns it.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes bare system calls and allocates nothing.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// What an URI says of a logger.
struct Logger {
    program: String,
    arguments: Vec<String>,
    /// It must write a byte when it is ready.
    strict: bool,
}

/// Splits `binary:///path?key=value&flag` into the program and its arguments.
fn parse(uri: &str) -> Result<Logger> {
    let invalid = || Error::invalid("a binary:// logger needs an absolute path");
    let (scheme, rest) = uri.split_once("://").ok_or_else(invalid)?;
    if !SCHEMES.contains(&scheme) {
        return Err(invalid());
    }
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let program = decode(path, false)
        .filter(|path| path.starts_with('/'))
        .ok_or_else(invalid)?;
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        for part in [key, value] {
            if !part.is_empty() {
                arguments.push(decode(part, true).ok_or_else(invalid)?);
            }
        }
    }
    Ok(Logger {
        program,
        arguments,
        strict: scheme == STRICT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_uri_becomes_program_and_arguments() {
        for (scheme, strict) in [("binary", false), ("binary-v2", true)] {
            let logger = parse(&format!("{scheme}:///usr/bin/log%20er?--out=/a+b&-v")).unwrap();
            assert_eq!(logger.program, "/usr/bin/log er");
            assert_eq!(logger.arguments, ["--out", "/a b", "-v"]);
            assert_eq!(logger.strict, strict, "{scheme}");
        }
        for bad in [
            "binary://relative",
            "binary:///a%zz",
            "binary:///a%00",
            "file:///a",
            "binary-v3:///a",
            "/a",
            "binary:///a%",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    /// A logger that says it is ready as `ready` does.
    async fn logs(scheme: &str, ready: &str) {
        let dir = tempfile::tempdir().unwrap();
        let (script, result) = (dir.path().join("logger"), dir.path().join("result"));
        let body = format!(
            "#!/bin/sh\n{ready}\n{{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1\"; cat <&3; cat <&4; }} > {}\n",
            result.display()
        );
        fs::write(&script, body).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("{scheme}://{}?arg", script.display());
        let (stdout, stderr, process) = start(&uri, "ns", "c1", Duration::from_secs(10))
            .await
            .unwrap();
        File::from(stderr).write_all(b"err\n").unwrap();
        File::from(stdout).write_all(b"out\n").unwrap();
        process.end().await;
        assert_eq!(fs::read_to_string(result).unwrap(), "ns/c1 arg\nout\nerr\n");
    }

    #[tokio::test]
    async fn a_logger_gets_both_outputs_and_ends_with_them() {
        logs("binary", "exec 5>&-").await;
        logs("binary", "printf x >&5").await;
        logs("binary-v2", "printf x >&5; exec 5>&-").await;
    }

    async fn refused(scheme: &str, body: &str, limit: Duration) -> Error {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("logger");
        fs::write(&script, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("{scheme}://{}", script.display());
        start(&uri, "ns", "c1", limit).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_logger_that_never_says_ready_is_killed() {
        for scheme in SCHEMES {
            let error = refused(scheme, "exec sleep 60", Duration::from_millis(300)).await;
            assert_eq!(error.kind, Kind::DeadlineExceeded, "{scheme}");
        }
    }

    #[tokio::test]
    async fn a_strict_logger_that_ends_or_closes_is_not_ready() {
        for body in ["exit 3", "exec 5>&-; exec sleep 60"] {
            let error = refused("binary-v2", body, Duration::from_secs(20)).await;
            assert_eq!(error.kind, Kind::FailedPrecondition, "{body}");
            assert!(error.message.contains("byte"), "{}", error.message);
        }
    }

    proptest! {
        #[test]
        fn any_uri_is_parsed_or_refused(uri in "(binary|binary-v2|x)(://)?.{0,60}") {
            let _ = parse(&uri);
        }
    }
}
