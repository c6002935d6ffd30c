//! The agent as PID 1 of the guest: the machine around it, before any container.
//!
//! The host is trusted here and nothing else exists yet. A failure ends the guest with a sentence in
//! the kernel's log, which the VMM passes on.
use std::{
    fs,
    io::{self, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use brig_agent_protocol::{AGENT_PORT, BootMark, CAPTURE, HOST_CID};
use nix::{
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::{
    boot_mark::boot_mark,
    launch,
    log::{LogRing, to_kernel},
    modules, network,
    places::{Places, SHARE},
    quiet, serve, streams, template,
};

/// Everything from the first instruction to power-off.
pub fn main() -> ExitCode {
    let clone = std::env::var_os(template::CLONE).is_some();
    if !clone {
        boot_mark(BootMark::Init);
    }
    std::panic::set_hook(Box::new(|panic| complain(&panic.to_string())));
    if let Err(error) = boot(clone) {
        complain(&error.to_string());
    }
    power_off();
    // Power-off does not return; if the kernel cannot, its panic at the end of init ends the VM.
    ExitCode::FAILURE
}

/// What went wrong, with the step it went wrong in.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
struct BootError {
    step: &'static str,
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, BootError> {
        self.map_err(|source| BootError {
            step,
            source: source.into(),
        })
    }
}

fn boot(clone: bool) -> Result<(), BootError> {
    if !clone {
        leave_initramfs()?;
        mount_kernel_file_systems()?;
        quiet::still_timers();
        if std::env::var_os(CAPTURE).is_some() {
            template::stand_still().step("going on as a clone")?;
        }
    }
    let binary = launch::open_binary("/init").step("the agent's binary")?;
    // The agent outlives every container's hunger for memory.
    fs::write("/proc/self/oom_score_adj", "-1000").step("oom_score_adj")?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .step("undumpable")?;
    raise_descriptor_limit().step("descriptor limit")?;
    let places = Places {
        run: PathBuf::from("/run/brig"),
        share: PathBuf::from(SHARE),
        cgroup_root: PathBuf::from("/sys/fs/cgroup"),
        cgroup_base: PathBuf::from("/sys/fs/cgroup/brig"),
        owns_machine: true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .step("runtime")?;
    runtime.block_on(run(places, binary, clone))
}

async fn run(places: Places, binary: OwnedFd, clone: bool) -> Result<(), BootError> {
    network::loopback_up()
        .map_err(io::Error::other)
        .step("loopback")?;
    let log = LogRing::new(false);
    let parts = serve::Parts::new(places, binary, log.clone()).step("agent")?;
    // Listening before dialling: once the host sees the agent it may open streams.
    let listener = streams::listen_vsock().step("vsock")?;
    tokio::spawn(
        parts
            .streams
            .clone()
            .serve_vsock(listener, log, parts.logger.clone()),
    );
    let host = VsockStream::connect(VsockAddr::new(HOST_CID, AGENT_PORT))
        .await
        .step("dialling the host")?;
    // No process of a clone may reach a port where the node's CPU is emulated: QEMU does not know the task register that a saved CPU has. The
    // host sees the connection itself.
    if !clone {
        boot_mark(BootMark::AgentReady);
    }
    serve::serve(parts, host).await.step("serving")
}

/// A root that can be pivoted from: a fresh tmpfs over the initramfs, which cannot.
fn leave_initramfs() -> Result<(), BootError> {
    fs::create_dir_all("/newroot").step("new root")?;
    mount(
        Some("root"),
        "/newroot",
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755,size=16m"),
    )
    .step("new root")?;
    // The binary stays where it is, in the initramfs; the new root shows it, read-only.
    fs::write("/newroot/init", "").step("new root")?;
    let tree = open_tree(
        rustix::fs::CWD,
        "/init",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .step("the agent's binary")?;
    let readonly = crate::mount_attr::Change {
        set: libc::MOUNT_ATTR_RDONLY,
        ..Default::default()
    };
    crate::mount_attr::apply(tree.as_fd(), &readonly, false).step("the agent's binary")?;
    move_mount(
        &tree,
        "",
        rustix::fs::CWD,
        "/newroot/init",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .step("the agent's binary")?;
    drop(tree);
    // The kernel's helpers share this root.
    let modprobe = Path::new("/newroot").join(modules::MODPROBE.trim_start_matches('/'));
    fs::create_dir_all("/newroot/sbin").step("new root")?;
    std::os::unix::fs::symlink("/init", modprobe).step("new root")?;
    std::env::set_current_dir("/newroot").step("new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).step("new root")?;
    nix::unistd::chroot(".").step("new root")?;
    std::env::set_current_dir("/").step("new root")
}

fn mount_kernel_file_systems() -> Result<(), BootError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounts: [(&'static str, &str, MsFlags, Option<&str>); 6] = [
        ("/proc", "proc", quiet, None),
        ("/sys", "sysfs", quiet, None),
        ("/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=755")),
        (
            "/dev/pts",
            "devpts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("mode=620,ptmxmode=666"),
        ),
        // A container that can write its cgroup files may divide its share, not enlarge it.
        (
            "/sys/fs/cgroup",
            "cgroup2",
            quiet,
            Some("nsdelegate,memory_recursiveprot"),
        ),
        (
            "/run",
            "tmpfs",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=755"),
        ),
    ];
    for (at, kind, flags, data) in mounts {
        // /sys/fs/cgroup exists in sysfs; the others on file systems that take directories.
        if !Path::new(at).exists() {
            fs::create_dir_all(at).step(at)?;
        }
        mount(Some(kind), at, Some(kind), flags, data).step(at)?;
    }
    Ok(())
}

fn raise_descriptor_limit() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let many = Some(65_536);
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: many,
            maximum: many,
        },
    )?)
}

/// The last words: into the kernel's log at the level that reaches every console.
fn complain(text: &str) {
    if to_kernel(0, text).is_err() {
        let _ = writeln!(io::stderr(), "brig-agent: {text}");
    }
}

fn power_off() {
    // SAFETY: sync takes nothing and cannot fail.
    unsafe { libc::sync() };
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    complain(&format!("power-off: {error}"));
}
