//! What a container sees of itself: identity, privileges, limits, mounts, cgroup, kernel.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::Result;
use brig_tests::pattern::hex;
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Map, Value, json};

use crate::files;

/// Files and directories that the default spec masks.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
];

/// What the default spec makes read-only.
const READONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const LIMITS: &[(&str, Resource)] = &[
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("stack", Resource::RLIMIT_STACK),
];

/// Everything, as one object.
pub fn all() -> Value {
    let status = status();
    let field = |name: &str| status.get(name).cloned().unwrap_or_default();
    let ids = |name: &str| -> Vec<u64> {
        field(name)
            .split_whitespace()
            .filter_map(|id| id.parse().ok())
            .collect()
    };
    let limits: Map<String, Value> = LIMITS
        .iter()
        .filter_map(|(name, resource)| {
            let (soft, hard) = getrlimit(*resource).ok()?;
            Some(((*name).to_owned(), json!([soft, hard])))
        })
        .collect();
    let mut env: Vec<String> = std::env::vars_os()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .collect();
    env.sort();
    json!({
        "pid": std::process::id(),
        "uids": ids("Uid"),
        "gids": ids("Gid"),
        "groups": ids("Groups"),
        "umask": field("Umask"),
        "caps": {
            "inheritable": field("CapInh"),
            "permitted": field("CapPrm"),
            "effective": field("CapEff"),
            "bounding": field("CapBnd"),
            "ambient": field("CapAmb"),
        },
        "no_new_privs": field("NoNewPrivs") == "1",
        "seccomp": field("Seccomp").parse::<u8>().unwrap_or(0),
        "oom_score_adj": trimmed("/proc/self/oom_score_adj"),
        "rlimits": limits,
        "cwd": std::env::current_dir().map(|path| path.display().to_string()).unwrap_or_default(),
        "args0": std::env::args().next(),
        "env": env,
        "hostname": nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        "kernel": trimmed("/proc/sys/kernel/osrelease"),
        "boot_id": trimmed("/proc/sys/kernel/random/boot_id"),
        "cmdline": trimmed("/proc/cmdline"),
        "mounts": mounts(),
        "root_write": files::attempt_write("/.brig-probe"),
        "masked": MASKED.iter().map(|path| ((*path).to_owned(), visible(path))).collect::<Map<_, _>>(),
        "readonly": READONLY.iter().map(|path| ((*path).to_owned(), json!(mount_is_readonly(path)))).collect::<Map<_, _>>(),
        "cgroup": cgroup(),
        "cpus": cpus(),
        "cpus_online": trimmed("/sys/devices/system/cpu/online"),
        "memory_kib": memory_kib(),
        "devices": devices(),
        "namespaces": namespaces(),
        "processes": processes(),
        "seccomp_effects": seccomp_effects(),
    })
}

/// A fresh random number and the kernel's boot id.
pub fn random() -> Result<Value> {
    let mut bytes = [0u8; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(json!({
        "random": hex(&bytes),
        "boot_id": trimmed("/proc/sys/kernel/random/boot_id"),
        "hwrng": trimmed("/sys/class/misc/hw_random/rng_current"),
    }))
}

fn status() -> BTreeMap<String, String> {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn trimmed(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

fn mounts() -> Vec<Value> {
    // proc(5): id parent dev root target options optional... - type source super-options
    trimmed("/proc/self/mountinfo")
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            Some(json!({
                "target": left.get(4)?,
                "options": left.get(5)?.split(',').collect::<Vec<_>>(),
                "propagation": left.get(6..).unwrap_or_default(),
                "type": right.first()?,
                "super": right.get(2)?.split(',').collect::<Vec<_>>(),
            }))
        })
        .collect()
}

/// "absent", "empty" or "visible": what a masked path must not be is visible.
fn visible(path: &str) -> Value {
    let state = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => "absent",
        Err(_) => "refused",
        Ok(meta) if meta.is_dir() => match fs::read_dir(path) {
            Ok(entries) => {
                if entries.count() == 0 {
                    "empty"
                } else {
                    "visible"
                }
            }
            Err(_) => "refused",
        },
        Ok(_) => {
            let mut byte = [0u8; 1];
            match fs::File::open(path).and_then(|mut file| file.read(&mut byte)) {
                Ok(0) => "empty",
                Ok(_) => "visible",
                Err(_) => "refused",
            }
        }
    };
    json!(state)
}

/// Whether the mount that holds `path` is read-only; None where the path does not exist.
fn mount_is_readonly(path: &str) -> Option<bool> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    Some(stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
}

fn cgroup() -> Value {
    let own = trimmed("/proc/self/cgroup");
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    let full = format!("/sys/fs/cgroup{path}");
    let dir = if Path::new(&full).join("cgroup.procs").exists() {
        full
    } else {
        "/sys/fs/cgroup".to_owned()
    };
    let value = |name: &str| trimmed(Path::new(&dir).join(name));
    json!({
        "path": path,
        "memory.max": value("memory.max"),
        "memory.current": value("memory.current"),
        "cpu.max": value("cpu.max"),
        "cpu.weight": value("cpu.weight"),
        "pids.max": value("pids.max"),
        "cpuset.cpus": value("cpuset.cpus"),
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(0, std::num::NonZero::get)
}

fn memory_kib() -> u64 {
    trimmed("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

fn devices() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir("/dev")
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}

fn namespaces() -> Map<String, Value> {
    ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"]
        .iter()
        .filter_map(|name| {
            let link = fs::read_link(format!("/proc/self/ns/{name}")).ok()?;
            Some(((*name).to_owned(), json!(link.to_string_lossy())))
        })
        .collect()
}

/// Processes visible in the container's /proc.
fn processes() -> usize {
    fs::read_dir("/proc")
        .map(|entries| {
            entries
                .flatten()
                .filter(|entry| {
                    entry
                        .file_name()
                        .to_string_lossy()
                        .bytes()
                        .all(|byte| byte.is_ascii_digit())
                })
                .count()
        })
        .unwrap_or(0)
}

/// What calls that the test profiles restrict return.
fn seccomp_effects() -> Value {
    let result = |returned: libc::c_long| -> String {
        if returned < 0 {
            files::errno_name(&std::io::Error::last_os_error())
        } else {
            "ok".to_owned()
        }
    };
    // SAFETY: no pointers are passed; each call either fails or has no effect on this process.
    unsafe {
        json!({
            "unshare_user": result(libc::syscall(libc::SYS_unshare, 0)),
            "personality": result(libc::syscall(libc::SYS_personality, 0xffff_ffffu64)),
            "keyctl": result(libc::syscall(libc::SYS_keyctl, 0, -1, 0)),
            "getppid": result(libc::syscall(libc::SYS_getppid)),
        })
    }
}
