//! `start`: makes the server's socket, leaves the server behind and prints its address.
//!
//! The server is this binary again, without an action. Its listening socket is its standard input,
//! so that no descriptor number has to be agreed on; `start`'s standard output and error are not
//! inherited, because containerd waits until they are closed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use rustix::fs::Mode;
use sha2::{Digest, Sha256};

use super::args::Args;
use super::options;
use super::reply::{self, Input};
use crate::asked::config::Config;
use crate::asked::spec::{self, Role, Spec};
use crate::error::{Error, Kind, Result};
use crate::node::limits;

/// Where containerd's shims have their sockets unless BootstrapParams say otherwise.
pub const SOCKET_DIR: &str = "/run/containerd/s";
/// The environment variable of builds of containerd that have a directory of their own for sockets, but no
/// BootstrapParams to say it in.
pub const SOCKET_DIR_VARIABLE: &str = "SHIM_SOCKET_DIR";
/// The environment variable that names containerd's ttrpc socket, for events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Tells the server when `start` began: nanoseconds since the epoch.
pub const STARTED_AT: &str = "BRIG_STARTED_AT";
/// Tells the server which configuration file the handler names, for sandboxes, whose creation does not say.
pub const CONFIG_PATH: &str = "BRIG_CONFIG_PATH";
/// In the bundle: the server's address, for containerd's reload and for `delete`.
pub const ADDRESS_FILE: &str = "address";
/// In the bundle: the directory of all pods that the server's is in, for `delete`.
pub const STATE_FILE: &str = "brig-state";

/// Runs `start` with what came on standard input; returns what to print.
///
/// # Errors
/// A sentence for containerd's log; nothing is left behind.
pub fn start(args: &Args, stdin: &[u8]) -> Result<Vec<u8>> {
    let began = SystemTime::now();
    let input = reply::classify(stdin, &args.namespace, &args.id);
    let config = options::of_start(stdin, &input)?;
    let dir = std::env::var_os(SOCKET_DIR_VARIABLE).filter(|dir| !dir.is_empty());
    let mut dir = dir.map_or_else(|| PathBuf::from(SOCKET_DIR), PathBuf::from);
    let (mut ttrpc, mut debug) = (None, args.debug);
    if let Input::Params(params) = &input {
        if let Some(socket_dir) = params.socket_dir.as_deref().filter(|dir| !dir.is_empty()) {
            dir = PathBuf::from(socket_dir);
        }
        let address = params.containerd_ttrpc_address.as_str();
        ttrpc = (!address.is_empty()).then(|| address.to_owned());
        debug |= params.log_level.value() < 0;
    }
    let sandbox = sandbox_of_bundle(Path::new("."))?;
    let socket = socket_path(&dir, args, sandbox.as_deref().unwrap_or(&args.id));
    let address = format!("unix://{}", socket.display());
    let encoded = reply::encode(&input, &address).map_err(|e| Error::internal(e.to_string()))?;
    if let Some(sandbox) = sandbox {
        // A container of a pod is served by the pod's server.
        if UnixStream::connect(&socket).is_err() {
            return Err(Error::state(format!(
                "the sandbox {sandbox} of container {} is not running; create the pod again",
                args.id
            )));
        }
        return write_address(&address).map(|()| encoded);
    }
    // A configuration nobody can use should fail here, where containerd shows the sentence.
    Config::load(None)?;
    if let Some(listener) = listen(&socket)? {
        let environment = [
            (TTRPC_ADDRESS, ttrpc.map(OsString::from)),
            (CONFIG_PATH, config.map(OsString::from)),
        ];
        let spawned = spawn_server(args, &socket, listener, environment, debug, began);
        if let Err(error) = spawned.and_then(|()| write_address(&address)) {
            let _ = fs::remove_file(&socket);
            return Err(error);
        }
    } else {
        write_address(&address)?;
    }
    Ok(encoded)
}

/// The pod of the bundle's container, when that is another's. A sandbox made through the Sandbox API
/// has a bundle without a spec.
fn sandbox_of_bundle(bundle: &Path) -> Result<Option<String>> {
    let bytes = match spec::read(&bundle.join("config.json")) {
        Ok(bytes) => bytes,
        Err(error) if error.kind == Kind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(match Spec::parse(&bytes)?.role()? {
        Role::Member(sandbox) => Some(sandbox),
        Role::Single | Role::Sandbox => None,
    })
}

/// The socket of the pod of this id, as containerd's own shims name theirs.
#[must_use]
pub fn socket_path(dir: &Path, args: &Args, id: &str) -> PathBuf {
    let name = Path::new(&args.address).join(&args.namespace).join(id);
    let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(hex)
}

/// Binds the socket; `None` when a server is alive on it already.
fn listen(socket: &Path) -> Result<Option<UnixListener>> {
    let failed = |error: io::Error| {
        Error::io(
            format_args!("cannot listen on {}", socket.display()),
            &error,
        )
    };
    if let Some(dir) = socket.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(failed)?;
    }
    // containerd alone talks to a shim. This process has one thread, so nobody else minds the umask.
    let before = rustix::process::umask(Mode::from_raw_mode(0o077));
    let bound = bind(socket);
    rustix::process::umask(before);
    bound
}

fn bind(socket: &Path) -> Result<Option<UnixListener>> {
    let failed = |error: io::Error| {
        Error::io(
            format_args!("cannot listen on {}", socket.display()),
            &error,
        )
    };
    match UnixListener::bind(socket) {
        Ok(listener) => return Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) => return Err(failed(error)),
    }
    if UnixStream::connect(socket).is_ok() {
        return Ok(None);
    }
    fs::remove_file(socket).map_err(failed)?;
    UnixListener::bind(socket).map(Some).map_err(failed)
}

fn spawn_server(
    args: &Args,
    socket: &Path,
    listener: UnixListener,
    environment: [(&str, Option<OsString>); 2],
    debug: bool,
    began: SystemTime,
) -> Result<()> {
    let failed = |error: io::Error| Error::io("cannot start the shim's server", &error);
    let since = began
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command
        .args(["-namespace", &args.namespace, "-id", &args.id])
        .args(["-address", &args.address])
        .arg("-socket")
        .arg(socket)
        .env(STARTED_AT, since.as_nanos().to_string())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(server_stderr());
    if debug {
        command.arg("-debug");
    }
    if let Some(soft) = limits::soft_files() {
        command.env(limits::SOFT_FILES, soft.to_string());
    }
    for (name, value) in environment {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    // The server outlives us and becomes init's child; we must not wait for it.
    command.spawn().map(drop).map_err(failed)
}

/// A panic of the server should be read somewhere: the bundle's log.
fn server_stderr() -> Stdio {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log")
        .map_or_else(|_| Stdio::null(), Stdio::from)
}

fn write_address(address: &str) -> Result<()> {
    let new = ".address.new";
    File::create(new)
        .and_then(|mut file| io::Write::write_all(&mut file, address.as_bytes()))
        .and_then(|()| fs::rename(new, ADDRESS_FILE))
        .map_err(|error| Error::io("cannot write the bundle's address file", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_by_daemon_namespace_and_id() {
        let args = Args {
            namespace: "default".into(),
            address: "/run/containerd/containerd.sock".into(),
            ..Args::default()
        };
        let dir = Path::new(SOCKET_DIR);
        let path = socket_path(dir, &args, "c1");
        assert_eq!(path, socket_path(dir, &args, "c1"));
        assert_ne!(path, socket_path(dir, &args, "c2"));
        assert_eq!(path.as_os_str().len(), SOCKET_DIR.len() + 1 + 64);
    }

    #[test]
    fn a_bundle_tells_whose_pod_its_container_is_in() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(sandbox_of_bundle(bundle.path()).unwrap(), None);
        for (kind, expected) in [("container", Some("s".to_owned())), ("sandbox", None)] {
            let spec = format!(
                r#"{{"annotations":{{"io.kubernetes.cri.container-type":"{kind}",
                "io.kubernetes.cri.sandbox-id":"s"}}}}"#
            );
            fs::write(bundle.path().join("config.json"), spec).unwrap();
            assert_eq!(
                sandbox_of_bundle(bundle.path()).unwrap(),
                expected,
                "{kind}"
            );
        }
    }

    #[test]
    fn a_live_socket_is_kept_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deep/s");
        let first = listen(&socket).unwrap().unwrap();
        assert!(listen(&socket).unwrap().is_none());
        drop(first);
        assert!(listen(&socket).unwrap().is_some());
    }
}
