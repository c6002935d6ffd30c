//! The attacks, each followed by a check that the device can be brought up again.

mod bars;
mod platform;
mod rings;
mod transport;
mod vsock;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::dma::Page;
use crate::pci::Function;
use crate::virtio::WRITE;

/// Virtio device ids (virtio 1.3 §5).
pub const RNG: u16 = 4;
/// Socket device.
pub const VSOCK: u16 = 19;
/// File system.
pub const FS: u16 = 26;

/// One attack. An error means that it could not be tried.
pub struct Attack {
    /// What is done.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&mut [Function]) -> Result<()>,
}

/// All of them: those that a VMM might not survive come last.
pub const ALL: &[Attack] = &[
    Attack {
        name: "none: an honest driver is served",
        run: vsock::honest,
    },
    Attack {
        name: "queue size and addresses changed after DRIVER_OK",
        run: transport::change_active_queue,
    },
    Attack {
        name: "queues that do not exist",
        run: transport::absent_queues,
    },
    Attack {
        name: "queue sizes that are zero, odd or huge",
        run: transport::bad_sizes,
    },
    Attack {
        name: "queue addresses outside RAM",
        run: transport::addresses_outside,
    },
    Attack {
        name: "features that were not offered",
        run: transport::bad_features,
    },
    Attack {
        name: "status bits in any order",
        run: transport::status_storm,
    },
    Attack {
        name: "accesses of every size at every offset",
        run: transport::odd_accesses,
    },
    Attack {
        name: "notifications of queues that do not exist",
        run: transport::stray_kicks,
    },
    Attack {
        name: "resets during traffic",
        run: transport::resets_in_traffic,
    },
    Attack {
        name: "MSI-X vectors and table entries of any value",
        run: transport::msix,
    },
    Attack {
        name: "descriptor loops",
        run: rings::loops,
    },
    Attack {
        name: "lengths that wrap",
        run: rings::lengths,
    },
    Attack {
        name: "buffers outside RAM and in BARs",
        run: rings::buffers_outside,
    },
    Attack {
        name: "descriptor indexes out of range",
        run: rings::indexes,
    },
    Attack {
        name: "a ring position far ahead",
        run: rings::position,
    },
    Attack {
        name: "indirect tables that are wrong",
        run: rings::indirect,
    },
    Attack {
        name: "buffers of the wrong direction and without length",
        run: rings::directions,
    },
    Attack {
        name: "rings that overlap their own buffers",
        run: rings::self_reference,
    },
    Attack {
        name: "vsock packets of foreign CIDs",
        run: vsock::foreign_cids,
    },
    Attack {
        name: "vsock operations and types that do not exist",
        run: vsock::bogus_operations,
    },
    Attack {
        name: "vsock lengths that lie",
        run: vsock::lengths,
    },
    Attack {
        name: "vsock connections to every port",
        run: vsock::connections,
    },
    Attack {
        name: "vsock data beyond the credit",
        run: vsock::credit,
    },
    Attack {
        name: "vsock answers to nothing",
        run: vsock::strays,
    },
    Attack {
        name: "file requests that are garbage",
        run: rings::file_requests,
    },
    Attack {
        name: "BARs moved onto RAM, to 0 and onto each other",
        run: bars::moved,
    },
    Attack {
        name: "decoding switched off under a live queue",
        run: bars::decode_off,
    },
    Attack {
        name: "configuration space written everywhere",
        run: bars::config_fuzz,
    },
    Attack {
        name: "ports that nothing answers",
        run: platform::ports,
    },
];

/// The first function of a kind.
pub fn of_kind(functions: &[Function], kind: u16) -> Result<&Function> {
    functions
        .iter()
        .find(|function| function.kind == kind)
        .with_context(|| format!("no device of kind {kind}"))
}

/// The device still works, or works again after a reset: the rng gives bytes; others come up.
pub fn healthy(function: &Function) -> Result<()> {
    function.enable();
    let rings = function.start()?;
    if function.kind == RNG {
        let buffer = Page::new()?;
        let ring = rings.first().context("rng has no queue")?;
        ring.descriptor(0, buffer.address, 64, WRITE, 0);
        ring.offer(0);
        function.kick(0);
        ensure!(
            ring.wait_used(1, Duration::from_secs(20)),
            "the rng no longer answers"
        );
    }
    function.reset()
}

/// Runs something against each function, then checks it.
pub fn each(functions: &[Function], mut attack: impl FnMut(&Function) -> Result<()>) -> Result<()> {
    for function in functions {
        attack(function).with_context(|| format!("device {}", function.kind))?;
        healthy(function).with_context(|| format!("device {} did not come back", function.kind))?;
    }
    Ok(())
}
