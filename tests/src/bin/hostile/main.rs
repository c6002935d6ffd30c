//! `brig-hostile-guest`: an init that attacks the VMM through its devices, booted in the place of
//! Brig's agent.
//!
//! It unbinds the kernel's drivers, maps the BARs and drives the virtio devices raw, with physical
//! addresses from pagemap. What it does is reported line by line on the debug console, so that the
//! driver on the node knows which attack a dead VMM died of. Static; runs as PID 1.
//!
//! With a file [`agent::FILE`] it is an agent that breaks the rules instead.

mod agent;
mod attacks;
mod dma;
mod pci;
mod port;
mod virtio;

use std::cell::Cell;
use std::fs;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

fn main() {
    if let Err(error) = run() {
        port::say(&format!("hostile: failed: {error:#}"));
    }
    // PID 1 must not end: that would be a panic, which is an attack of its own.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    loop {
        nix::unistd::pause();
    }
}

fn run() -> Result<()> {
    port::open()?;
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys")] {
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount {target}"))?;
    }
    if let Ok(attack) = fs::read_to_string(agent::FILE) {
        return agent::run(&attack);
    }
    let first = first_attack();
    let functions = pci::find()?;
    port::say(&format!(
        "hostile: devices {:?}",
        functions.iter().map(|f| f.kind).collect::<Vec<_>>()
    ));
    for function in &functions {
        function.unbind();
    }
    let guest = attacks::Guest {
        functions,
        count: Cell::new(0),
    };
    for (number, attack) in attacks::ALL.iter().enumerate().skip(first) {
        port::say(&format!("hostile: begin {number} {}", attack.name));
        guest.count.set(0);
        let result = (attack.run)(&guest);
        let count = guest.count.get();
        match result {
            Ok(()) => port::say(&format!("hostile: end {number} {count} {}", attack.name)),
            Err(error) => port::say(&format!(
                "hostile: lost {number} {count} {}: {error:#}",
                attack.name
            )),
        }
    }
    port::say("hostile: all done");
    Ok(())
}

/// Where to go on: the driver boots again after an attack that ended the VMM.
fn first_attack() -> usize {
    fs::read_to_string("/proc/cmdline")
        .unwrap_or_default()
        .split_whitespace()
        .find_map(|word| word.strip_prefix("brig.hostile="))
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}
