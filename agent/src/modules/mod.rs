//! Kernel modules on demand: the agent's binary as the kernel's `/sbin/modprobe`.
//!
//! The kernel starts it for each name that something has asked for (`request_module`), in the agent's root and with no
//! container around it, and waits for its end. It mounts the image of modules from the share when it is the first that needs
//! it, and loads what answers to the name. Nothing of it exists before, and PID 1 has no part in it: a call of PID 1 into the
//! kernel may itself wait for a module.
//!
//! Trusted: the image, which is the host's and read-only, and whose modules are signed with the kernel's key. Not trusted:
//! the name, part of which a container may have chosen. Whether it may ask at all, the kernel has decided.
mod index;
mod pattern;

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use brig_agent_protocol::MODULES_PATH;
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::MsFlags,
};

use crate::{image::Image, log::to_kernel, places::SHARE};

use index::Index;
pub use pattern::matches;

/// Where the kernel looks for it (CONFIG_MODPROBE_PATH).
pub const MODPROBE: &str = "/sbin/modprobe";
/// The image, mounted once something needs it.
const IMAGE: Image = Image {
    name: MODULES_PATH,
    at: "/run/brig/modules",
    flags: MsFlags::MS_NOEXEC,
};
/// Exists once it was said that there is no image.
const TOLD: &str = "/run/brig/modules.told";
/// What a load may take before the kernel's caller gets its error: SIGALRM then ends this process. Of the guest's clock, in
/// seconds; the largest module takes a fraction of one.
const PATIENCE: u32 = 60;

/// Why nothing was loaded.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The guest's own system failed.
    #[error("{step}: {source}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// There are no modules to load.
    #[error("this pod has no kernel modules: {0}")]
    NoImage(String),
    /// The kernel did not take one.
    #[error("module {module}: {source}")]
    Load {
        /// Its file below the directory of modules.
        module: String,
        /// What the kernel said.
        source: Errno,
    },
}

/// The program, as the kernel calls it: `modprobe -q -- NAME`.
pub fn main(arguments: &[&str]) -> ExitCode {
    let name = match arguments {
        ["-q", "--", name] | [name] => *name,
        _ => return ExitCode::from(2),
    };
    nix::unistd::alarm::set(PATIENCE);
    match load(name) {
        Ok(true) => ExitCode::SUCCESS,
        // Nobody answers to the name: the kernel asks for many that may not exist.
        Ok(false) => ExitCode::FAILURE,
        Err(Failure::NoImage(reason)) => {
            if fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(TOLD)
                .is_ok()
            {
                complain(&Failure::NoImage(reason));
            }
            ExitCode::FAILURE
        }
        Err(failure) => {
            complain(&failure);
            ExitCode::FAILURE
        }
    }
}

/// The directory that holds one for the running kernel, as `/lib/modules` does, where the guest's share is `share`. `None`: it
/// has no modules.
pub fn directory(share: &Path) -> Option<PathBuf> {
    // Not in a component test, whose kernel is the machine's.
    (share == Path::new(SHARE))
        .then(mounted)?
        .ok()
        .map(|_| IMAGE.at.into())
}

/// Loads everything that answers to `name`; says whether anything does. Blocks, as long as the modules take to begin.
///
/// # Errors
/// Why one of them was not loaded; the others may be.
pub fn load(name: &str) -> Result<bool, Failure> {
    let modules = mounted()?;
    insert_all(&index(&modules)?, name, |file| {
        (modules.join(file), CString::default())
    })
}

/// The same where `bundle`, a directory as `/lib`, has modules for the running kernel of its own: they, and of those they need the
/// kernel's. `parameters` has a module's, by its name. A bundle for other kernels has none.
///
/// # Errors
/// See [`load`].
pub fn load_from(
    bundle: &Path,
    name: &str,
    parameters: &HashMap<String, CString>,
) -> Result<bool, Failure> {
    let own = bundle.join("modules").join(release()?);
    if !own.exists() {
        return load(name);
    }
    let kernels = mounted();
    insert_all(&index(&own)?, name, |file| {
        let path = own.join(file);
        let path = match &kernels {
            Ok(kernels) if !path.exists() => kernels.join(file),
            _ => path,
        };
        let parameters = parameters.get(&index::name_of(file));
        (path, parameters.cloned().unwrap_or_default())
    })
}

fn index(modules: &Path) -> Result<Index, Failure> {
    Index::read(modules).map_err(|source| Failure::Io {
        step: "the index of the modules",
        source,
    })
}

/// `found` says where a file of the index is, and the parameters of what it holds.
fn insert_all(
    index: &Index,
    name: &str,
    found: impl Fn(&str) -> (PathBuf, CString),
) -> Result<bool, Failure> {
    let Some(order) = index.resolve(name) else {
        return Ok(false);
    };
    // Of several that answer to an alias, one that finds no device here does not keep the others from theirs.
    let mut failed = None;
    for module in order {
        let (path, parameters) = found(&module);
        match insert(&path, &parameters) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(source) => failed = Some(Failure::Load { module, source }),
        }
    }
    failed.map_or(Ok(true), Err)
}

fn insert(path: &Path, parameters: &CStr) -> Result<(), Errno> {
    let file = fs::File::open(path)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    finit_module(file, parameters, ModuleInitFlags::empty())
}

/// The directory of the running kernel's modules.
fn mounted() -> Result<PathBuf, Failure> {
    let release = release()?;
    let image = IMAGE.mounted().map_err(|error| {
        Failure::NoImage(match error.kind() {
            io::ErrorKind::NotFound => {
                "the node has no image of them (`modules` of Brig's configuration)".into()
            }
            _ => format!("their image cannot be mounted: {error}"),
        })
    })?;
    let modules = image.join(&release);
    if modules.exists() {
        Ok(modules)
    } else {
        Err(Failure::NoImage(format!(
            "their image holds none for {release}"
        )))
    }
}

/// The running kernel's release.
fn release() -> Result<String, Failure> {
    let names = nix::sys::utsname::uname().map_err(|errno| Failure::Io {
        step: "uname",
        source: errno.into(),
    })?;
    Ok(names.release().to_string_lossy().into_owned())
}

/// Into the kernel's log: this process has no other.
fn complain(what: &Failure) {
    let _ = to_kernel(4, &what.to_string());
}
