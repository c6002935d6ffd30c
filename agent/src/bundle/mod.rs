//! The handler's driver bundle: an operator's image with what a device of the node needs in a guest and Brig does not bring,
//! which is kernel modules, firmware, user-space libraries and CDI files that say which container gets what of it.
//!
//! Nothing looks for it before a device of the node is plugged in. docs/driver-bundles.md is its format, which uses the names
//! that a distribution has for each (`lib/modules`, `lib/firmware`, `etc/modprobe.d`, `etc/modules-load.d`, `etc/cdi`).
//!
//! Trusted as the guest's kernel is: it is the operator's, read-only, and its modules are signed with the kernel's key. A
//! sentence names what of it cannot be understood.
mod apply;
mod cdi;
mod numbers;
mod settings;

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use brig_agent_protocol::{BUNDLE_PATH, agent::GivenDevice};
use nix::mount::MsFlags;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::{
    control::MountSource,
    detached::clone_mount,
    error::{Error, Result},
    image::Image,
    modules,
    spec::Spec,
};

use cdi::{File, Function};

/// The image. Containers execute what is bound from it.
const IMAGE: Image = Image {
    name: BUNDLE_PATH,
    at: "/run/brig/bundle",
    flags: MsFlags::empty(),
};
/// Where the kernel reads of a further place for firmware, once the loader is there.
const FIRMWARE_PATH: &str = "/sys/module/firmware_class/parameters/path";
/// Functions of the guest's only bus.
const DEVICES: &str = "/sys/bus/pci/devices";

/// A bundle, mounted.
pub struct Bundle {
    root: &'static Path,
    files: Vec<File>,
}

impl Bundle {
    /// The handler's, if it has one. Blocks.
    ///
    /// # Errors
    /// One sentence that names what of it is wrong.
    pub fn open() -> std::result::Result<Option<Self>, String> {
        let root = match IMAGE.mounted() {
            Ok(root) => root,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("the driver bundle cannot be mounted: {error}")),
        };
        let files = cdi::read(root).map_err(|error| format!("the driver bundle: {error}"))?;
        Ok(Some(Self { root, files }))
    }

    /// Whether a CDI file is for the device, which then has nodes that the kernel may not know of.
    pub fn is_for(&self, modalias: &str) -> bool {
        self.files.iter().any(|file| file.is_for(modalias))
    }

    /// Loads the modules that drive a device, then those that the bundle wants besides; says whether any drives it. Blocks.
    ///
    /// # Errors
    /// What was not loaded.
    pub fn load_driver(&self, modalias: &str) -> std::result::Result<bool, String> {
        let library = self.root.join("lib");
        let firmware = library.join("firmware");
        if firmware.exists() {
            // In a kernel without the loader no driver asks for any.
            let _ = modules::load("firmware_class");
            let _ = fs::write(FIRMWARE_PATH, firmware.as_os_str().as_encoded_bytes());
        }
        let parameters = settings::parameters(self.root);
        let load = |name: &str| {
            modules::load_from(&library, name, &parameters).map_err(|failure| failure.to_string())
        };
        let found = load(modalias)?;
        if found && self.is_for(modalias) {
            for name in settings::modules(self.root) {
                if !load(&name)? {
                    return Err(format!(
                        "the driver bundle wants the module {name}, which neither it nor the kernel has"
                    ));
                }
            }
        }
        Ok(found)
    }
}

/// Adds to a specification what the bundle has for the devices that the container was given: variables, mounts, nodes and
/// groups. The answer is what those mounts show, by index into `spec.mounts`.
///
/// # Errors
/// `FailedPrecondition` naming what of the bundle cannot be had.
pub async fn apply(spec: &mut Spec, given: &[GivenDevice]) -> Result<Vec<(u32, MountSource)>> {
    let functions: Vec<u32> = given
        .iter()
        .flat_map(|device| device.functions.iter().copied())
        .collect();
    if functions.is_empty() {
        return Ok(Vec::new());
    }
    let edits = tokio::task::spawn_blocking(move || edits(&functions)).await;
    let edits = edits
        .map_err(|error| Error::Internal(error.to_string()))?
        .map_err(Error::FailedPrecondition)?;
    apply::apply(spec, &edits).map_err(Error::FailedPrecondition)
}

fn edits(functions: &[u32]) -> std::result::Result<Vec<cdi::Edits>, String> {
    let Some(bundle) = Bundle::open()? else {
        return Ok(Vec::new());
    };
    let all = present().map_err(|error| format!("the guest's PCI bus: {error}"))?;
    cdi::edits(&bundle.files, functions, &all)
}

/// A detached copy of what the bundle has at `path`, by whatever links of its own.
///
/// # Errors
/// Those of openat2(2) and open_tree(2).
pub fn clone(path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat(CWD, IMAGE.at, flags | OFlags::DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(&root, path, flags, Mode::empty(), resolve)?;
    clone_mount(found.as_fd(), recursive)
}

/// The functions of the bus, in their order.
fn present() -> io::Result<Vec<Function>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(crate::pci::number);
        let modalias = fs::read_to_string(entry.path().join("modalias"));
        // One that goes meanwhile is not there.
        if let (Some(number), Ok(modalias)) = (number, modalias) {
            all.push(Function {
                number,
                modalias: modalias.trim().to_owned(),
            });
        }
    }
    all.sort_unstable_by_key(|function| function.number);
    Ok(all)
}
