//! The VMM process: jailed from its first instruction, told what to do over its control socket.
//!
//! Its only input is descriptor 3. It faces the guest and is assumed breakable.

use std::os::fd::{FromRawFd, OwnedFd};

use brig_hypervisor::control::{CONTROL_FD, exit, mark};
use brig_hypervisor::notice::{self, Clock};
use brig_hypervisor::{jail, log, server};
use slog::error;

fn main() {
    let clock = Clock::start();
    let mut marks = vec![(mark::VMM_MAIN, clock.micros())];
    let log = log::logger();
    match jail::enter() {
        Ok(landlock) => slog::debug!(log, "jailed"; "landlock" => ?landlock),
        Err(error) => {
            error!(log, "the jail could not be closed"; "error" => %error);
            std::process::exit(exit::JAIL);
        }
    }
    marks.push((mark::JAILED, clock.micros()));
    notice::presize_descriptor_table();
    // SAFETY: the launcher put the control socket at this number for us alone.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    std::process::exit(server::serve(control, clock, marks, log));
}
