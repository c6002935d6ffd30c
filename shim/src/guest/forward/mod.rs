//! Port-forward (DESIGN section 8): connections inside the pod's network namespace to its localhost are
//! answered by the servers in the guest.
//!
//! containerd forwards a port by dialling localhost in the pod's namespace, but there is nobody: the pod's
//! processes are in the VM. So a BPF program of the type `sk_lookup`, attached to that namespace, gives every
//! TCP connection to 127.0.0.1 or ::1 to a listener of ours, whatever its port. Nothing is rewritten, thus the
//! accepted socket's own address is the one that was dialled. The agent connects to the same port in the
//! guest, and the VMM copies between that connection and the accepted socket, which it is handed: no byte
//! passes through the shim.
//!
//! Nothing can be left behind: the program is attached by a link that goes with this process, and so do the
//! listeners. Not reachable from outside: the kernel drops packets to a loopback address that do not come
//! from the namespace itself, and the peer is checked.
//!
//! Trusted: whoever may enter the pod's namespace, which is the node's root. The agent's answers are bounded
//! in time, the connections in number.

mod bpf;
mod error;
mod listen;
mod program;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use brig_agent_protocol::agent::ConnectPortRequest;
use slog::{Logger, debug, warn};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use ttrpc::context;

use crate::error::Result;
use crate::guest::vm::Vm;
use crate::node::network::Namespace;
pub use error::ForwardError;

/// Connections of a pod that are forwarded at a time; more are reset.
const MAX_CONNECTIONS: usize = 128;
/// How long to wait after the node could not accept a connection, e.g. for want of descriptors.
const RECOVERY: Duration = Duration::from_millis(200);

/// Whether this node's kernel can do it; nothing is attached.
///
/// # Errors
/// [`ForwardError::Kernel`].
pub fn check() -> std::result::Result<(), ForwardError> {
    program::load(&[]).map(drop)
}

/// A pod's localhost on the host side, taken over as long as this lives.
#[derive(Debug)]
pub struct Localhost {
    listeners: Vec<std::net::TcpListener>,
    _link: OwnedFd,
}

impl Localhost {
    /// Takes over localhost of the namespace at `path`. Blocking.
    ///
    /// # Errors
    /// [`ForwardError`]; nothing is left changed.
    pub fn take_over(path: &Path) -> std::result::Result<Self, ForwardError> {
        let namespace = Namespace::open(path)?;
        let listeners = namespace.run(|| Ok(listen::listeners()))?;
        let listeners = listeners.map_err(ForwardError::Listen)?;
        let link = program::attach(&namespace, &listeners)?;
        Ok(Self {
            listeners: listeners.into_iter().map(|(_, socket)| socket).collect(),
            _link: link,
        })
    }

    /// Forwards what is dialled until the VM has ended. The VM's agent must be ready.
    pub async fn serve(self, vm: Arc<Vm>, logger: Logger) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut serving = tokio::task::JoinSet::new();
        for listener in self.listeners {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let (vm, slots) = (Arc::downgrade(&vm), Arc::clone(&slots));
                    serving.spawn(accept(listener, vm, slots, logger.clone()));
                }
                Err(error) => warn!(logger, "ports are not forwarded"; "error" => %error),
            }
        }
        // The listeners end with this, and so does the link.
        vm.ended().await;
    }
}

async fn accept(listener: TcpListener, vm: Weak<Vm>, slots: Arc<Semaphore>, logger: Logger) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(logger, "cannot accept a connection to forward"; "error" => %error);
                tokio::time::sleep(RECOVERY).await;
                continue;
            }
        };
        let Some(vm) = vm.upgrade() else { return };
        if !peer.ip().is_loopback() {
            reset(&stream);
            continue;
        }
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            warn!(logger, "a connection to forward is refused"; "limit" => MAX_CONNECTIONS);
            reset(&stream);
            continue;
        };
        let logger = logger.clone();
        tokio::spawn(async move {
            let port = stream.local_addr().map_or(0, |address| address.port());
            match forward(&vm, port, stream).await {
                Ok(()) => debug!(logger, "a forwarded connection has ended"; "port" => port),
                Err(error) => {
                    debug!(logger, "a port is not forwarded"; "port" => port, "error" => error.message);
                }
            }
            drop(slot);
        });
    }
}

/// Joins an accepted connection to the guest's port; returns at its end.
async fn forward(vm: &Vm, port: u16, stream: TcpStream) -> Result<()> {
    let number = vm.stream_number();
    let result = join(vm, number, port, &stream).await;
    let ended = match result {
        Ok(ended) => ended,
        Err(error) => {
            reset(&stream);
            return Err(error);
        }
    };
    // The VMM alone has it now: its close is the connection's.
    drop(stream);
    let _ = ended.await;
    Ok(())
}

async fn join(
    vm: &Vm,
    number: u64,
    port: u16,
    stream: &TcpStream,
) -> Result<crate::guest::vm::control::StreamEnd> {
    use std::os::fd::AsFd as _;
    let request = ConnectPortRequest {
        port: port.into(),
        stream: number,
        ..ConnectPortRequest::default()
    };
    let answer = vm
        .agent()
        .connect_port(context::Context::default(), &request);
    vm.call("ConnectPort", answer).await?;
    let copy = || {
        stream.as_fd().try_clone_to_owned().map_err(|error| {
            crate::error::Error::io("cannot hand a forwarded connection to the VMM", &error)
        })
    };
    vm.open_numbered(number, Some(copy()?), Some(copy()?)).await
}

/// The client is to see a reset, as from a port on which nobody listens, and no orderly end.
fn reset(stream: &TcpStream) {
    // It fails on a connection that has gone already.
    let _ = stream.set_zero_linger();
}
