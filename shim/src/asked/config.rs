//! Configuration: `/etc/brig/config.toml` or the file a runtime handler names, with its drop-ins.
//!
//! Written by node operators, who are trusted; it is still checked whole, because a wrong value
//! should be a sentence at start and not a guest that hangs. Every key has a default, so that no
//! file is needed at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brig_hypervisor::share::FileSystems;
use serde::Deserialize;

use crate::error::{Error, Result};

mod annotations;
pub mod keys;
mod load;
mod logging;
mod origin;
mod units;
mod wish;

pub use load::DEFAULT_PATH;
pub use logging::{LogFormat, LogLevel};
pub use origin::{Origin, Origins};
pub use units::MIB;
pub use wish::Wish;

/// The least guest memory in bytes: below it the kernel and the agent do not fit.
pub const MIN_MEMORY: u64 = 64 * MIB;
/// The most files that a guest may know: a GiB of numbers, more than a node has.
const MOST_FILES: u64 = 1 << 30;
/// The longest [`Config::shutdown_grace`] in seconds.
const MAX_GRACE: u32 = 600;
/// More than any node has, in bytes.
const MAX_MEMORY: u64 = 1 << 44;
/// The most devices of a handler's list: each brings its group, and all come to the VMM in one message.
const MAX_GIVEN: usize = 16;
/// The most guest CPUs.
pub const MAX_VCPUS: u8 = 64;

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The guest's vmlinux.
    pub kernel: PathBuf,
    /// The image of its modules; one that is not there is none.
    pub modules: PathBuf,
    /// The image of drivers and libraries for devices of the node.
    pub driver_bundle: Option<PathBuf>,
    /// Devices of the node that each pod has.
    pub devices: Vec<Wish>,
    /// kubelet's socket, to be asked for devices of a pod before its VM starts.
    pub pod_resources: Option<PathBuf>,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// The brig-vmm binary.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// CPUs of a VM.
    pub vcpus: u8,
    /// As many as it may have later; no more than [`Self::vcpus`]: none is added.
    pub max_vcpus: u8,
    /// Memory of a VM in bytes.
    pub memory: u64,
    /// How far it may grow later, in bytes; the node's memory is a bound besides.
    pub max_memory: u64,
    /// Pods go on from a captured guest instead of booting, where they can.
    pub template: bool,
    /// What an idle guest keeps of files that nobody uses.
    pub idle_files: IdleFiles,
    /// As what a guest has the layers of an image, where their snapshotter hands over files.
    pub image_layers: ImageLayers,
    /// Log the guest's early kernel messages too.
    pub debug_console: bool,
    /// The node's root may look into the guest (`brig exec`, `brig console`).
    pub debug: bool,
    /// How much the pods' shims log.
    pub log_level: LogLevel,
    /// What a line of their log looks like.
    pub log_format: LogFormat,
    /// Their log goes to the node's journal too.
    pub journald: bool,
    /// Start on a `/dev/kvm` that only emulates.
    pub allow_slow_kvm: bool,
    /// Multiplies every time-out: 1 on hardware, more under emulation.
    pub time_scale: f64,
    /// What a pod's processes have between SIGTERM and SIGKILL when the shim is told to end, as it is when the
    /// node shuts down.
    pub shutdown_grace: Duration,
    /// Where the shim keeps what `delete` needs. Read from the default file alone, because `delete`
    /// is not told the handler's.
    pub state_dir: PathBuf,
    /// Descriptors the VMM may hold (one per inode its guest knows).
    pub max_files: u64,
    /// File systems whose directories and files a pod may be given.
    pub file_systems: FileSystems,
    /// Volumes that a storage driver hands over as block devices are mounted in the guest.
    pub direct_volumes: bool,
    /// What becomes of a pod whose packet filter its guest cannot have.
    pub netfilter: Netfilter,
    /// The node's vhost-net moves the frames of interfaces, where the node has it.
    pub vhost_net: bool,
    /// Keys that a pod may set for itself, as annotations.
    pub pod_annotations: Vec<Key>,
    /// Where the keys have their values from whose values are not the defaults.
    pub origins: Origins,
}

/// What becomes of a pod whose network namespace has packet filter rules that its guest cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Netfilter {
    /// It is refused.
    #[default]
    Require,
    /// It starts without them, and that is logged.
    Warn,
    /// Rules are not looked at.
    Ignore,
}

/// What becomes of the memory in which an idle guest's kernel keeps what was read of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdleFiles {
    /// It stays, until the guest needs it.
    #[default]
    Keep,
    /// It goes back to the node.
    Return,
}

impl IdleFiles {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Return => "return",
        }
    }
}

/// As what a guest has the layers of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageLayers {
    /// A disk: what is read of them is in the guest's memory.
    #[default]
    Disk,
    /// Memory: what is read of them is the node's, one copy for all pods.
    Memory,
}

impl ImageLayers {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Memory => "memory",
        }
    }
}

/// Keys that may be left to pods: none of them reaches outside the pod's own VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// [`Config::vcpus`].
    Vcpus,
    /// [`Config::memory`].
    Memory,
    /// [`Config::debug_console`].
    DebugConsole,
    /// [`Config::max_files`].
    MaxFiles,
}

impl Netfilter {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::Warn => "warn",
            Self::Ignore => "ignore",
        }
    }
}

impl Key {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::DebugConsole => "debug_console",
            Self::MaxFiles => "max_files",
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
    driver_bundle: Option<PathBuf>,
    devices: Option<Vec<String>>,
    pod_resources: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    vmm: Option<PathBuf>,
    kvm: Option<PathBuf>,
    vcpus: Option<u8>,
    max_vcpus: Option<u8>,
    #[serde(default, deserialize_with = "units::size")]
    memory: Option<u64>,
    #[serde(default, deserialize_with = "units::size")]
    max_memory: Option<u64>,
    template: Option<bool>,
    idle_files: Option<IdleFiles>,
    image_layers: Option<ImageLayers>,
    debug_console: Option<bool>,
    debug: Option<bool>,
    log_level: Option<LogLevel>,
    log_format: Option<LogFormat>,
    journald: Option<bool>,
    allow_slow_kvm: Option<bool>,
    time_scale: Option<f64>,
    #[serde(default, deserialize_with = "units::time")]
    shutdown_grace: Option<Duration>,
    state_dir: Option<PathBuf>,
    max_files: Option<u64>,
    file_systems: Option<Vec<String>>,
    direct_volumes: Option<bool>,
    netfilter: Option<Netfilter>,
    vhost_net: Option<bool>,
    pod_annotations: Option<Vec<Key>>,
}

impl Config {
    /// The values of this program's installation.
    #[must_use]
    pub fn installed() -> Self {
        Self::defaults(&binary_dir())
    }

    /// The values of an installation whose shim lies in `dir`: the VMM beside it, and the guest's files too, as in a build
    /// tree, or in `../share/brig`.
    #[must_use]
    pub fn defaults(dir: &Path) -> Self {
        let find = |name: &str| {
            let beside = dir.join(name);
            if beside.exists() {
                return beside;
            }
            let prefix = dir.parent().unwrap_or(dir);
            prefix.join("share/brig").join(name)
        };
        Self {
            kernel: find("vmlinux"),
            modules: find("modules.erofs"),
            driver_bundle: None,
            devices: Vec::new(),
            pod_resources: None,
            initramfs: find("brig-initramfs.cpio"),
            vmm: dir.join("brig-vmm"),
            kvm: PathBuf::from("/dev/kvm"),
            vcpus: 1,
            max_vcpus: 1,
            memory: 256 * MIB,
            max_memory: MAX_MEMORY,
            template: false,
            idle_files: IdleFiles::Keep,
            image_layers: ImageLayers::Disk,
            debug_console: false,
            debug: false,
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            journald: false,
            allow_slow_kvm: false,
            time_scale: 1.0,
            shutdown_grace: Duration::from_secs(10),
            state_dir: PathBuf::from("/run/brig"),
            max_files: 524_288,
            file_systems: FileSystems::default(),
            direct_volumes: false,
            netfilter: Netfilter::Require,
            vhost_net: false,
            pod_annotations: Vec::new(),
            origins: Origins::new(),
        }
    }

    /// Takes over what `file` sets, of which nothing counts if a part is refused. What keys say of one another is for
    /// [`Self::agrees`], when all files have been read.
    fn merge(&mut self, file: File, invalid: &dyn Fn(String) -> Error) -> Result<()> {
        let mut whole = self.clone();
        let set = |value: Option<PathBuf>, to: &mut PathBuf| {
            if let Some(value) = value {
                *to = value;
            }
        };
        set(file.kernel, &mut whole.kernel);
        set(file.modules, &mut whole.modules);
        set(file.initramfs, &mut whole.initramfs);
        set(file.vmm, &mut whole.vmm);
        set(file.kvm, &mut whole.kvm);
        set(file.state_dir, &mut whole.state_dir);
        if let Some(path) = file.driver_bundle {
            whole.driver_bundle = Some(path).filter(|path| !path.as_os_str().is_empty());
        }
        if let Some(path) = file.pod_resources {
            whole.pod_resources = Some(path).filter(|path| !path.as_os_str().is_empty());
        }
        if let Some(names) = file.devices {
            let wishes: std::result::Result<Vec<Wish>, String> =
                names.iter().map(|name| name.parse()).collect();
            whole.devices = wishes.map_err(|error| invalid(format!("devices: {error}")))?;
            if whole.devices.len() > MAX_GIVEN {
                return Err(invalid(format!(
                    "devices: {} were named, but a pod can have at most {MAX_GIVEN}",
                    whole.devices.len()
                )));
            }
        }
        whole.vcpus = file.vcpus.unwrap_or(whole.vcpus);
        whole.max_vcpus = file.max_vcpus.unwrap_or(whole.max_vcpus);
        whole.memory = file.memory.unwrap_or(whole.memory);
        whole.max_memory = file.max_memory.unwrap_or(whole.max_memory);
        whole.template = file.template.unwrap_or(whole.template);
        whole.idle_files = file.idle_files.unwrap_or(whole.idle_files);
        whole.image_layers = file.image_layers.unwrap_or(whole.image_layers);
        whole.debug_console = file.debug_console.unwrap_or(whole.debug_console);
        whole.debug = file.debug.unwrap_or(whole.debug);
        whole.log_level = file.log_level.unwrap_or(whole.log_level);
        whole.log_format = file.log_format.unwrap_or(whole.log_format);
        whole.journald = file.journald.unwrap_or(whole.journald);
        whole.allow_slow_kvm = file.allow_slow_kvm.unwrap_or(whole.allow_slow_kvm);
        whole.time_scale = file.time_scale.unwrap_or(whole.time_scale);
        whole.shutdown_grace = file.shutdown_grace.unwrap_or(whole.shutdown_grace);
        whole.max_files = file.max_files.unwrap_or(whole.max_files);
        whole.direct_volumes = file.direct_volumes.unwrap_or(whole.direct_volumes);
        whole.netfilter = file.netfilter.unwrap_or(whole.netfilter);
        whole.vhost_net = file.vhost_net.unwrap_or(whole.vhost_net);
        if let Some(keys) = file.pod_annotations {
            whole.pod_annotations = keys;
        }
        if let Some(names) = file.file_systems {
            whole.file_systems = FileSystems::and(&names)
                .map_err(|error| invalid(format!("file_systems: {error}")))?;
        }
        for (key, value) in [
            ("kernel", &whole.kernel),
            ("modules", &whole.modules),
            ("initramfs", &whole.initramfs),
            ("vmm", &whole.vmm),
            ("kvm", &whole.kvm),
            ("state_dir", &whole.state_dir),
        ] {
            if !value.is_absolute() {
                return Err(invalid(format!("{key} must be an absolute path")));
            }
        }
        for (key, value) in [
            ("driver_bundle", &whole.driver_bundle),
            ("pod_resources", &whole.pod_resources),
        ] {
            if value.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(invalid(format!("{key} must be an absolute path")));
            }
        }
        for (key, value) in [("vcpus", whole.vcpus), ("max_vcpus", whole.max_vcpus)] {
            if value == 0 || value > MAX_VCPUS {
                return Err(invalid(format!(
                    "{key} is {value}, but must be 1 to {MAX_VCPUS}"
                )));
            }
        }
        if whole.memory < MIN_MEMORY {
            return Err(invalid(format!(
                "memory is {} MiB, but a guest needs at least {} MiB",
                whole.memory / MIB,
                MIN_MEMORY / MIB
            )));
        }
        if !(whole.time_scale >= 0.1 && whole.time_scale <= 100.0) {
            return Err(invalid("time_scale must be 0.1 to 100".to_owned()));
        }
        if whole.shutdown_grace > Duration::from_secs(MAX_GRACE.into()) {
            return Err(invalid(format!(
                "shutdown_grace is {}, but must be at most {MAX_GRACE}s",
                units::show_time(whole.shutdown_grace)
            )));
        }
        if !(8192..=MOST_FILES).contains(&whole.max_files) {
            return Err(invalid(format!(
                "max_files is {}, but must be 8192 (vsock streams alone may need 2050) to {MOST_FILES}",
                whole.max_files
            )));
        }
        *self = whole;
        Ok(())
    }

    /// Whether keys that depend on one another fit together.
    fn agrees(&self, invalid: &dyn Fn(String) -> Error) -> Result<()> {
        if self.max_memory < self.memory {
            return Err(invalid(format!(
                "max_memory is {} MiB, less than memory, {} MiB: a VM that is not to grow has the same for both",
                self.max_memory / MIB,
                self.memory / MIB
            )));
        }
        Ok(())
    }

    /// A time-out of so many seconds on hardware.
    #[must_use]
    pub fn timeout(&self, seconds: u32) -> Duration {
        self.scaled(Duration::from_secs(seconds.into()))
    }

    /// A time on hardware, stretched for this machine.
    #[must_use]
    pub fn scaled(&self, time: Duration) -> Duration {
        time.mul_f64(self.time_scale)
    }
}

/// The directory of the running binary, symbolic links resolved.
fn binary_dir() -> PathBuf {
    std::env::current_exe()
        .and_then(fs::canonicalize)
        .ok()
        .and_then(|path| Some(path.parent()?.to_owned()))
        .unwrap_or_else(|| PathBuf::from("/usr/bin"))
}
