//! Configuration: `/etc/brig/config.toml` or the file a runtime handler names, with its drop-ins.
//!
//! Written by node operators, who are trusted; it is still checked whole, because a wrong value
//! should be a sentence at start and not a guest that hangs. Every key has a default, so that no
//! file is needed at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brig_hypervisor::share::FileSystems;
use serde::{Deserialize, Deserializer};

use crate::error::{Error, Result};

mod annotations;

/// The default file; drop-ins are `*.toml` in the directory of the same name ending in `.d`.
pub const DEFAULT_PATH: &str = "/etc/brig/config.toml";
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// The least guest memory in bytes: below it the kernel and the agent do not fit.
pub const MIN_MEMORY: u64 = 64 * MIB;
/// The longest [`Config::shutdown_grace`] in seconds.
const MAX_GRACE: u32 = 600;
/// The most guest CPUs.
pub const MAX_VCPUS: u8 = 64;

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The guest's vmlinux.
    pub kernel: PathBuf,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// The brig-vmm binary.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// CPUs of a VM.
    pub vcpus: u8,
    /// Memory of a VM in bytes.
    pub memory: u64,
    /// Log the guest's early kernel messages too.
    pub debug_console: bool,
    /// Start on a `/dev/kvm` that only emulates.
    pub allow_slow_kvm: bool,
    /// Multiplies every time-out: 1 on hardware, more under emulation.
    pub time_scale: f64,
    /// Seconds that a pod's processes have between SIGTERM and SIGKILL when the shim is told to end, as it
    /// is when the node shuts down.
    pub shutdown_grace: u32,
    /// Where the shim keeps what `delete` needs. Read from the default file alone, because `delete`
    /// is not told the handler's.
    pub state_dir: PathBuf,
    /// Descriptors the VMM may hold (one per inode its guest knows).
    pub max_files: u64,
    /// File systems whose directories and files a pod may be given.
    pub file_systems: FileSystems,
    /// What becomes of a pod whose packet filter its guest cannot have.
    pub netfilter: Netfilter,
    /// Keys that a pod may set for itself, as annotations.
    pub pod_annotations: Vec<Key>,
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

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    vmm: Option<PathBuf>,
    kvm: Option<PathBuf>,
    vcpus: Option<u8>,
    #[serde(default, deserialize_with = "size")]
    memory: Option<u64>,
    debug_console: Option<bool>,
    allow_slow_kvm: Option<bool>,
    time_scale: Option<f64>,
    shutdown_grace: Option<u32>,
    state_dir: Option<PathBuf>,
    max_files: Option<u64>,
    file_systems: Option<Vec<String>>,
    netfilter: Option<Netfilter>,
    pod_annotations: Option<Vec<Key>>,
}

/// A size: a number of MiB, or text with a unit such as `"256MiB"` or `"1GiB"`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Mib(u64),
        Text(String),
    }
    let bytes = match Size::deserialize(deserializer)? {
        Size::Mib(mib) => mib.checked_mul(MIB),
        Size::Text(text) => parse_size(&text),
    };
    bytes.map(Some).ok_or_else(|| {
        serde::de::Error::custom("a size is a number of MiB or text such as \"256MiB\" or \"1GiB\"")
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..split].parse().ok()?;
    let unit = match text[split..].trim() {
        "M" | "MiB" => MIB,
        "G" | "GiB" => 1024 * MIB,
        "K" | "KiB" => 1024,
        _ => return None,
    };
    number.checked_mul(unit)
}

impl Config {
    /// Reads the configuration: `path` if the handler names one (it must exist), else the default
    /// file if there is one; then its drop-ins in the order of their names.
    ///
    /// # Errors
    /// `InvalidArgument` that names the file and the key.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let mut config = Self::defaults(&binary_dir());
        let (main, must_exist) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match fs::read_to_string(main) {
            Ok(text) => config.apply(main, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {}
            Err(error) => {
                return Err(Error::invalid(format!(
                    "configuration {} cannot be read: {error}",
                    main.display()
                )));
            }
        }
        for drop_in in drop_ins(main) {
            let text = fs::read_to_string(&drop_in).map_err(|error| {
                Error::invalid(format!(
                    "configuration {} cannot be read: {error}",
                    drop_in.display()
                ))
            })?;
            config.apply(&drop_in, &text)?;
        }
        Ok(config)
    }

    /// The values of an installation whose shim lies in `dir`: files beside it, as in a build tree,
    /// or in `../share/brig`.
    #[must_use]
    pub fn defaults(dir: &Path) -> Self {
        let find = |name: &str| {
            let beside = dir.join(name);
            if beside.exists() {
                return beside;
            }
            let prefix = dir.parent().unwrap_or(dir);
            let sub = if name == "brig-vmm" {
                "libexec/brig"
            } else {
                "share/brig"
            };
            prefix.join(sub).join(name)
        };
        Self {
            kernel: find("vmlinux"),
            initramfs: find("brig-initramfs.cpio"),
            vmm: find("brig-vmm"),
            kvm: PathBuf::from("/dev/kvm"),
            vcpus: 1,
            memory: 256 * MIB,
            debug_console: false,
            allow_slow_kvm: false,
            time_scale: 1.0,
            shutdown_grace: 10,
            state_dir: PathBuf::from("/run/brig"),
            max_files: 524_288,
            file_systems: FileSystems::default(),
            netfilter: Netfilter::Require,
            pod_annotations: Vec::new(),
        }
    }

    pub(crate) fn apply(&mut self, path: &Path, text: &str) -> Result<()> {
        let invalid =
            |what: String| Error::invalid(format!("configuration {}: {what}", path.display()));
        let file: File = toml::from_str(text)
            .map_err(|error| invalid(error.to_string().trim_end().replace('\n', " ")))?;
        self.merge(file, &invalid)
    }

    /// Takes over what `file` sets and checks the whole, of which nothing counts if a part is refused.
    fn merge(&mut self, file: File, invalid: &dyn Fn(String) -> Error) -> Result<()> {
        let mut whole = self.clone();
        let set = |value: Option<PathBuf>, to: &mut PathBuf| {
            if let Some(value) = value {
                *to = value;
            }
        };
        set(file.kernel, &mut whole.kernel);
        set(file.initramfs, &mut whole.initramfs);
        set(file.vmm, &mut whole.vmm);
        set(file.kvm, &mut whole.kvm);
        set(file.state_dir, &mut whole.state_dir);
        whole.vcpus = file.vcpus.unwrap_or(whole.vcpus);
        whole.memory = file.memory.unwrap_or(whole.memory);
        whole.debug_console = file.debug_console.unwrap_or(whole.debug_console);
        whole.allow_slow_kvm = file.allow_slow_kvm.unwrap_or(whole.allow_slow_kvm);
        whole.time_scale = file.time_scale.unwrap_or(whole.time_scale);
        whole.shutdown_grace = file.shutdown_grace.unwrap_or(whole.shutdown_grace);
        whole.max_files = file.max_files.unwrap_or(whole.max_files);
        whole.netfilter = file.netfilter.unwrap_or(whole.netfilter);
        if let Some(keys) = file.pod_annotations {
            whole.pod_annotations = keys;
        }
        if let Some(names) = file.file_systems {
            whole.file_systems = FileSystems::and(&names)
                .map_err(|error| invalid(format!("file_systems: {error}")))?;
        }
        for (key, value) in [
            ("kernel", &whole.kernel),
            ("initramfs", &whole.initramfs),
            ("vmm", &whole.vmm),
            ("kvm", &whole.kvm),
            ("state_dir", &whole.state_dir),
        ] {
            if !value.is_absolute() {
                return Err(invalid(format!("{key} must be an absolute path")));
            }
        }
        if whole.vcpus == 0 || whole.vcpus > MAX_VCPUS {
            return Err(invalid(format!(
                "vcpus is {}, but must be 1 to {MAX_VCPUS}",
                whole.vcpus
            )));
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
        if whole.shutdown_grace > MAX_GRACE {
            return Err(invalid(format!(
                "shutdown_grace is {} s, but must be at most {MAX_GRACE}",
                whole.shutdown_grace
            )));
        }
        if whole.max_files < 8192 {
            return Err(invalid(
                "max_files must be at least 8192 (vsock streams alone may need 2050)".to_owned(),
            ));
        }
        *self = whole;
        Ok(())
    }

    /// A time-out of so many seconds on hardware.
    #[must_use]
    pub fn timeout(&self, seconds: u32) -> Duration {
        Duration::from_secs_f64(f64::from(seconds) * self.time_scale)
    }
}

fn drop_ins(main: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(main.with_extension("d")) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    paths.sort();
    paths
}

/// The directory of the running binary, symbolic links resolved.
fn binary_dir() -> PathBuf {
    std::env::current_exe()
        .and_then(fs::canonicalize)
        .ok()
        .and_then(|path| Some(path.parent()?.to_owned()))
        .unwrap_or_else(|| PathBuf::from("/usr/bin"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn applied(text: &str) -> Result<Config> {
        let mut config = Config::defaults(Path::new("/opt/brig/bin"));
        config.apply(Path::new("/etc/brig/config.toml"), text)?;
        Ok(config)
    }

    #[test]
    fn an_empty_file_leaves_the_defaults_of_the_prefix() {
        let config = applied("").unwrap();
        assert_eq!(config, Config::defaults(Path::new("/opt/brig/bin")));
        assert_eq!(config.kernel, Path::new("/opt/brig/share/brig/vmlinux"));
        assert_eq!(config.vmm, Path::new("/opt/brig/libexec/brig/brig-vmm"));
    }

    #[test]
    fn files_beside_the_binary_come_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinux"), "").unwrap();
        let config = Config::defaults(dir.path());
        assert_eq!(config.kernel, dir.path().join("vmlinux"));
    }

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        assert_eq!(applied("memory = 128").unwrap().memory, 128 * MIB);
        assert_eq!(applied("memory = \"128MiB\"").unwrap().memory, 128 * MIB);
        assert_eq!(applied("memory = \"2GiB\"").unwrap().memory, 2048 * MIB);
    }

    #[test]
    fn each_wrong_value_is_refused_by_a_sentence_that_names_it() {
        for (text, expected) in [
            (
                "memory = 16",
                "memory is 16 MiB, but a guest needs at least 64 MiB",
            ),
            ("memory = \"lots\"", "a size is a number of MiB"),
            (
                "memory = \"99999999999999999999GiB\"",
                "a size is a number of MiB",
            ),
            ("vcpus = 0", "vcpus is 0"),
            ("vcpus = 65", "vcpus is 65"),
            ("time_scale = 0.0", "time_scale must be"),
            ("time_scale = nan", "time_scale must be"),
            ("kernel = \"vmlinux\"", "kernel must be an absolute path"),
            ("shutdown_grace = 601", "shutdown_grace is 601 s"),
            ("shutdown_grace = -1", "shutdown_grace"),
            ("kernal = \"/x\"", "kernal"),
            ("max_files = 3", "max_files"),
            ("netfilter = \"some\"", "expected one of"),
            ("pod_annotations = [\"kernel\"]", "kernel"),
            (
                "file_systems = [\"pxfs\", \"proc\"]",
                "file_systems: \"proc\" is a file system of the node's kernel",
            ),
            ("file_systems = [\"/proc\"]", "no file system's name"),
            ("= =", "configuration /etc/brig/config.toml"),
        ] {
            let error = applied(text).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument, "{text}");
            assert!(error.message.contains(expected), "{text}: {error}");
            assert!(!error.message.contains('\n'), "{text}");
        }
    }

    #[test]
    fn drop_ins_apply_in_the_order_of_their_names_over_the_handlers_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("gpu.toml");
        fs::write(&main, "vcpus = 2\nmemory = 128").unwrap();
        let drop_dir = dir.path().join("gpu.d");
        fs::create_dir(&drop_dir).unwrap();
        fs::write(drop_dir.join("20.toml"), "vcpus = 4").unwrap();
        fs::write(drop_dir.join("10.toml"), "vcpus = 3\ntime_scale = 5.0").unwrap();
        fs::write(drop_dir.join("30.bak"), "vcpus = 9").unwrap();
        let config = Config::load(Some(&main)).unwrap();
        assert_eq!((config.vcpus, config.memory), (4, 128 * MIB));
        assert_eq!(config.timeout(2), Duration::from_secs(10));
    }

    #[test]
    fn a_handler_that_names_a_missing_file_is_told_so() {
        let error = Config::load(Some(Path::new("/nonexistent/brig.toml"))).unwrap_err();
        assert!(error.message.contains("/nonexistent/brig.toml"), "{error}");
    }
}
