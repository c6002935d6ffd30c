//! One stream of a process, as the host has it.

use std::os::fd::OwnedFd;

use tokio::task::JoinHandle;

use super::streaming;

/// Where one stream goes on the host.
#[derive(Debug)]
pub(super) struct End {
    /// For the VMM.
    pub(super) given: OwnedFd,
    /// The opposite end, where there is one.
    pub(super) kept: Kept,
}

/// What the shim keeps of a stream.
#[derive(Debug)]
pub(super) enum Kept {
    /// Of a device or a logger.
    Nothing,
    /// Of a file: what ends when everything has been written to it.
    Copied(JoinHandle<()>),
    /// Of a FIFO.
    Opposite { _end: OwnedFd },
    /// Of containerd's stream of standard input: its pump.
    Input(streaming::Input),
    /// Of its stream of an output: its pump, and what ends when all has been delivered.
    Output(streaming::Output, JoinHandle<()>),
}
