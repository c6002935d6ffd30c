//! The handler's driver bundle: an operator's image with what a device of the node needs in a guest and Brig does not bring,
//! which is kernel modules, firmware, user-space libraries and CDI files that say which container gets what of it.
//!
//! Nothing looks for it before a device of the node is plugged in. docs/driver-bundles.md is its format, which uses the names
//! that a distribution has for each (`lib/modules`, `lib/firmware`, `etc/modprobe.d`, `etc/modules-load.d`, `etc/cdi`).
//!
//! Trusted as the guest's kernel is: it is the operator's, read-only, and its modules are signed with the kernel's key. A
//! sentence names what of it cannot be understood.
pub mod cdi;
mod settings;

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use brig_agent_protocol::BUNDLE_PATH;
use nix::mount::MsFlags;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::{detached::clone_mount, image::Image, modules};

use cdi::{Edits, File, Function};

/// The image. Containers execute what is bound from it.
const IMAGE: Image = Image {
    name: BUNDLE_PATH,
    at: "/run/brig/bundle",
    flags: MsFlags::empty(),
};
/// Where the kernel reads of a further place for firmware, once the loader is there.
const FIRMWARE_PATH: &str = "/sys/module/firmware_class/parameters/path";

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

    /// What a container has besides that was given `given` of the functions `all`.
    ///
    /// # Errors
    /// See [`cdi::edits`].
    pub fn edits(
        &self,
        given: &[u32],
        all: &[Function],
    ) -> std::result::Result<Vec<Edits>, String> {
        cdi::edits(&self.files, given, all)
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
