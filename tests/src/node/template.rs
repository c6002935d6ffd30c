//! A guest that is captured without a shim, and what its clones are started with.

use std::fs::{self, File};
use std::io::{Seek as _, copy};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use brig_hypervisor::control::{Event, exit};
use brig_hypervisor::launch::VmmExit;
use brig_hypervisor::template::Template;
use rustix::fs::{MemfdFlags, memfd_create};

use super::clock;
use super::machine::{Boot, Machine, Next};

/// What has the agent stand still.
pub const CMDLINE: &str = "brig_capture=1";

/// Boots a guest that stands still by itself, and keeps it as a file in the directory; what a clone of it is started with. `look` sees the
/// VMM while the guest boots.
///
/// # Errors
/// If it does not come to that.
pub fn capture(
    mut boot: Boot,
    directory: &Path,
    look: impl FnOnce(&Machine) -> Result<()>,
) -> Result<(Boot, PathBuf)> {
    fs::create_dir_all(directory)?;
    let mut captured = File::from(memfd_create("brig-capture", MemfdFlags::CLOEXEC)?);
    boot.capture = Some(captured.try_clone()?);
    let mut machine = Machine::start(&boot)?;
    look(&machine)?;
    loop {
        match machine.next(clock::seconds(20))? {
            Next::Event(Event::Ended { code, reason }) => {
                ensure!(
                    code == exit::CAPTURED,
                    "the VMM ended with {code}: {reason}"
                );
            }
            Next::Event(_) => {}
            Next::Ended(end) => {
                ensure!(end == VmmExit::Code(exit::CAPTURED), "{end:?}");
                break;
            }
        }
    }
    let file = directory.join("template");
    captured.rewind()?;
    copy(&mut captured, &mut File::create(&file)?)?;
    boot.capture = None;
    boot.cmdline = String::new();
    boot.template = Some(file.clone());
    Ok((boot, file))
}

/// Adds to the file what a clone has touched of it so far.
///
/// # Errors
/// What the host says.
pub fn record(file: &Path, clone: &Machine) -> Result<()> {
    let file = File::options().read(true).write(true).open(file)?;
    Ok(Template::open(file)?.record(clone.pid())?)
}
