//! The kinds of threads of a VMM. Each has a list of system calls of its own ([`super::allow`]).

/// Kinds of threads; each has its own list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The control loop, which also starts the threads of devices that are plugged later.
    Main,
    /// The same in a VM that may be given devices of the node.
    MainWithDevices,
    /// The same in a VM that may be given more CPUs, whose threads it starts.
    MainWithCpus,
    /// The same in a VM that may be given both.
    MainWithBoth,
    /// The same in a VM whose CPUs may be stopped for a debugger, whatever it may be given.
    MainWithDebugger,
    /// A CPU of the guest.
    Vcpu,
    /// That of a guest that is to be captured.
    CapturedVcpu,
    /// That of a guest that may be debugged.
    DebuggedVcpu,
    /// Queues of vsock, net, rng, balloon, console.
    Worker,
    /// The same in a VM whose interfaces may be served by the node's vhost-net: the thread that they are on.
    VhostWorker,
    /// A disk's queue, and what of it takes its time.
    Disk,
    /// The file server's thread, and what of it takes its time.
    Fs,
    /// The thread of a device of the node.
    Vfio,
}

impl ThreadKind {
    /// The control loop of a VM that may be given devices of the node, or CPUs, or may be debugged.
    #[must_use]
    pub fn main(devices: bool, cpus: bool, debugger: bool) -> Self {
        match (devices, cpus) {
            _ if debugger => Self::MainWithDebugger,
            (false, false) => Self::Main,
            (true, false) => Self::MainWithDevices,
            (false, true) => Self::MainWithCpus,
            (true, true) => Self::MainWithBoth,
        }
    }

    /// Whether it is a control loop.
    #[must_use]
    pub fn is_main(self) -> bool {
        self.gives_devices() || self.gives_cpus() || self == Self::Main
    }

    /// Whether it starts threads that do a part of its work: they inherit its list.
    #[must_use]
    pub fn has_helpers(self) -> bool {
        matches!(self, Self::Disk | Self::Fs)
    }

    /// Whether it starts threads of devices of the node.
    #[must_use]
    pub fn gives_devices(self) -> bool {
        matches!(
            self,
            Self::MainWithDevices | Self::MainWithBoth | Self::MainWithDebugger
        )
    }

    /// Whether it starts threads of CPUs.
    #[must_use]
    pub fn gives_cpus(self) -> bool {
        matches!(
            self,
            Self::MainWithCpus | Self::MainWithBoth | Self::MainWithDebugger
        )
    }
}

/// All of them.
#[cfg(any(test, feature = "jail-probe"))]
pub(super) const KINDS: [ThreadKind; 13] = [
    ThreadKind::Main,
    ThreadKind::MainWithDevices,
    ThreadKind::MainWithCpus,
    ThreadKind::MainWithBoth,
    ThreadKind::MainWithDebugger,
    ThreadKind::Vfio,
    ThreadKind::Vcpu,
    ThreadKind::CapturedVcpu,
    ThreadKind::DebuggedVcpu,
    ThreadKind::Worker,
    ThreadKind::VhostWorker,
    ThreadKind::Disk,
    ThreadKind::Fs,
];
