//! Why a VM was not started, and what the shim is told of it.

use std::io;

use crate::arch::x86_64::boot::BootError;
use crate::control::{ErrorKind, ErrorReply};
use crate::kernel::KernelError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::pci::bus::BusFull;
use crate::pci::window::WindowFull;
use crate::template::TemplateError;
use crate::virtio::pci::TransportError;

/// Why a VM was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Invalid(String),
    /// It does not fit what the machine is or has.
    #[error("{0}")]
    State(String),
    /// Something has run out; the numbers say what.
    #[error("{0}")]
    Limit(String),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or the initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Boot information.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A virtio function.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The bus is full.
    #[error(transparent)]
    Bus(#[from] BusFull),
    /// There is no place for a BAR.
    #[error(transparent)]
    Window(#[from] WindowFull),
    /// A device could not be made.
    #[error("{device}: {reason}")]
    Device {
        /// Its name.
        device: &'static str,
        /// Why.
        reason: String,
    },
    /// A guest could not be captured, or its clone not be made.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A thread could not be started.
    #[error("starting the {name} thread: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl StartError {
    /// The error as the shim gets it, after what came of it.
    #[must_use]
    pub fn reply(&self, outcome: &str) -> ErrorReply {
        let kind = match self {
            Self::Invalid(_)
            | Self::Boot(_)
            | Self::Kernel(KernelError::Format(_) | KernelError::Load(_)) => ErrorKind::Invalid,
            Self::State(_) => ErrorKind::State,
            Self::Kernel(KernelError::NoRoom { .. })
            | Self::Bus(_)
            | Self::Window(_)
            | Self::Limit(_) => ErrorKind::Limit,
            Self::Kvm(_)
            | Self::Memory(_)
            | Self::Kernel(_)
            | Self::Template(_)
            | Self::Thread { .. } => ErrorKind::Host,
            Self::Device { .. } => ErrorKind::Host,
            Self::Transport(_) => ErrorKind::Internal,
        };
        ErrorReply {
            kind,
            message: format!("{outcome}: {self}"),
        }
    }
}
