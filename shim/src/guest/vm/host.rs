//! The real node: checks what a VM needs, opens it, and starts the jailed VMM.
//!
//! The VMM opens nothing itself. Everything that can be wrong with the node is told here as one
//! sentence with its fix. Blocking code.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use brig_agent_protocol::SHARE_TAG;
use brig_hypervisor::control::VmConfig;
use brig_hypervisor::launch::{LaunchError, LaunchOptions, VmmProcess, launch, open_sealed};
use brig_hypervisor::share::{Share, ShareError};
use nix::fcntl::OFlag;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use tokio::sync::oneshot;

use super::given::Given;
use super::{GuestOrigin, Host, Launched, Plan, shown};
use crate::asked::config::Config;
use crate::asked::spec::Network;
use crate::error::{Error, Result};
use crate::node::cgroup::Cgroup;
use crate::node::network::{self, PodNetwork, Wanted};
use crate::node::templates::{Files, Kind, Machine, Recipe, Templates};
use crate::node::vfio;

/// The node this process runs on.
#[derive(Debug)]
pub struct Node;

impl Host for Node {
    fn launch(&self, plan: &Plan, executed: oneshot::Sender<()>) -> Result<Launched> {
        let config = &plan.config;
        let kvm = open_kvm(&config.kvm)?;
        if !config.allow_slow_kvm {
            brig_hypervisor::kvm::verdict()
                .map_err(|error| Error::unavailable(error.to_string()))?;
        }
        let kernel = open_kernel(&config.kernel)?;
        let initramfs = open_initramfs(&config.initramfs)?;
        let (origin, template) = origin(plan, kernel.as_fd(), initramfs.as_fd());
        let netns = open_netns(&plan.network)?;
        let failed = |error: io::Error| Error::io("cannot prepare the VM", &error);
        let (agent, vmm_agent) = UnixStream::pair().map_err(failed)?;
        let (stderr, vmm_stderr) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let cgroup = plan.cgroup.as_ref();
        let opened = cgroup.map(Cgroup::open).transpose().map_err(failed)?;
        let mut process = launch(LaunchOptions {
            vmm: config.vmm.clone(),
            netns: Some(netns),
            cgroup: opened.flatten(),
            stderr: vmm_stderr,
            max_files: config.max_files,
        })
        .map_err(|error| not_launched(&error))?;
        let _ = executed.send(());
        set_oom_score(&process, plan.oom_score_adj);
        // While the VMM builds its jail.
        let mut network = match &plan.network {
            Network::New => PodNetwork::default(),
            Network::Path(path) => network::set_up(path, Wanted::of(config))?,
        };
        let share = match Share::new(&mut process, config.file_systems.clone()) {
            Ok(share) => share,
            Err(ShareError::Jail(error)) => return Err(not_launched(&error)),
            Err(error) => return Err(Error::unavailable(error.to_string())),
        };
        let control = process
            .take_control()
            .ok_or_else(|| Error::internal("the VMM has no control socket"))?;
        let guest_network = network.guest();
        let kept = network.keep();
        let netns_path = match &plan.network {
            Network::Path(path) => path.clone(),
            Network::New => format!("/proc/{}/ns/net", process.pid()).into(),
        };
        let mut fds = vec![kvm, kernel, initramfs, vmm_agent.into()];
        let nets = network.devices(&mut fds);
        let mut given = Given::open(&config.devices, &plan.assigned, plan.memory, cgroup)?;
        let devices = match &mut given {
            Some(given) => given.describe(&mut fds)?,
            None => Vec::new(),
        };
        // What a pod has beyond the template's machine comes when its containers do.
        let (memory_bytes, max_memory_bytes, max_vcpus) = match &origin {
            GuestOrigin::Template(recipe) => {
                let machine = recipe.machine;
                (machine.memory, machine.max_memory, machine.most_cpus)
            }
            _ => (plan.memory, plan.max_memory, config.max_vcpus),
        };
        let template = template.map(|file| {
            fds.push(file);
            fds.len() - 1
        });
        let machine = VmConfig {
            vcpus: config.vcpus,
            max_vcpus,
            memory_bytes,
            max_memory_bytes,
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            cmdline: String::new(),
            template,
            capture: None,
            agent: 3,
            nets,
            disks: Vec::new(),
            share_tag: Some(SHARE_TAG.to_owned()),
            debug_console: config.debug_console,
            debugger: config.debug,
            allow_slow_kvm: config.allow_slow_kvm,
            passthrough: vfio::Node::new().has_devices(),
            vhost: config.vhost_net,
            devices,
        };
        Ok(Launched {
            process: Box::new(process),
            control,
            agent,
            stderr,
            mounts: Arc::new(share),
            origin,
            machine: (machine, fds),
            network: guest_network,
            kept,
            netns: Some(netns_path),
            given,
        })
    }

    fn make_cgroup(&self, path: &str) -> Result<Option<Cgroup>> {
        Ok(Some(Cgroup::create(path)?))
    }
}

/// Whether the guest goes on from a template, which is open then. One that cannot be had or known is no reason not to boot.
fn origin(
    plan: &Plan,
    kernel: BorrowedFd<'_>,
    initramfs: BorrowedFd<'_>,
) -> (GuestOrigin, Option<OwnedFd>) {
    let config = &plan.config;
    let Some(machine) = plan.template else {
        return (GuestOrigin::Boot, None);
    };
    let files = Files {
        kernel,
        initramfs,
        vmm: &config.vmm,
    };
    let Ok(kind) = Kind::of(&files, &machine) else {
        return (GuestOrigin::Boot, None);
    };
    let recipe = Box::new(recipe(config, machine, &kind));
    let templates = Templates::beside(&config.state_dir);
    match templates.open(kind.key()) {
        Ok(Some(file)) => (GuestOrigin::Template(recipe), Some(file)),
        Ok(None) if templates.lacks(kind.key()) => (GuestOrigin::BootFirst(recipe), None),
        Ok(None) | Err(_) => (GuestOrigin::Boot, None),
    }
}

/// How to make a handler's template.
#[must_use]
pub fn recipe(config: &Config, machine: Machine, kind: &Kind) -> Recipe {
    let boot = config.timeout(20);
    Recipe {
        key: kind.key().to_owned(),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        vmm: config.vmm.clone(),
        kvm: config.kvm.clone(),
        machine,
        allow_slow_kvm: config.allow_slow_kvm,
        max_files: config.max_files,
        boot_ms: u64::try_from(boot.as_millis()).unwrap_or(u64::MAX),
        state_dir: config.state_dir.clone(),
    }
}

/// Opens the initramfs.
///
/// # Errors
/// `Unavailable` names the path.
pub fn open_initramfs(path: &Path) -> Result<OwnedFd> {
    open_sealed(path, OFlag::O_RDONLY).map_err(|error| {
        Error::unavailable(format!(
            "initramfs {}: {error}; install it or name another path in Brig's configuration",
            shown(path)
        ))
    })
}

/// Opens the KVM device.
///
/// # Errors
/// `Unavailable`: this node cannot run VMs, and why.
pub fn open_kvm(path: &Path) -> Result<OwnedFd> {
    open_sealed(path, OFlag::O_RDWR).map_err(|error| {
        let fix = match error.kind() {
            io::ErrorKind::NotFound => {
                "this node has no KVM: enable virtualisation in its firmware (or nested virtualisation \
                 of its VM) and load kvm_intel or kvm_amd"
            }
            io::ErrorKind::PermissionDenied => "the shim must run as root",
            _ => "KVM is not usable on this node",
        };
        Error::unavailable(format!("cannot open {}: {error}; {fix}", shown(path)))
    })
}

/// Opens the guest kernel and checks that it is an ELF file.
///
/// # Errors
/// `Unavailable` names the path and what is wrong.
pub fn open_kernel(path: &Path) -> Result<OwnedFd> {
    let failed = |what: String| {
        Error::unavailable(format!(
            "guest kernel {}: {what}; install it or name another path in Brig's configuration",
            shown(path)
        ))
    };
    let sealed = open_sealed(path, OFlag::O_RDONLY).map_err(|error| failed(error.to_string()))?;
    let mut magic = [0; 4];
    let read = rustix::io::pread(&sealed, &mut magic, 0);
    if read != Ok(magic.len()) || magic != *b"\x7fELF" {
        return Err(failed("it is not an ELF vmlinux".to_owned()));
    }
    Ok(sealed)
}

/// The network namespace the VMM is to live in: the pod's, or a new one with nothing in it.
pub(super) fn open_netns(network: &Network) -> Result<OwnedFd> {
    match network {
        Network::Path(path) => File::open(path)
            .map(OwnedFd::from)
            .map_err(|error| Error::io(format_args!("network namespace {}", shown(path)), &error)),
        Network::New => {
            // unshare acts on the calling thread, so it gets one of its own.
            let made = std::thread::spawn(|| -> io::Result<OwnedFd> {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let path = "/proc/thread-self/ns/net";
                Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
            })
            .join()
            .map_err(|_| Error::internal("the namespace thread panicked"))?;
            made.map_err(|error| Error::io("cannot make a network namespace", &error))
        }
    }
}

/// The shim inherits containerd's protection from the OOM killer; a pod must not.
pub(super) fn set_oom_score(process: &VmmProcess, value: i32) {
    let path = format!("/proc/{}/oom_score_adj", process.pid());
    let _ = std::fs::write(path, value.to_string());
}

pub(super) fn not_launched(error: &LaunchError) -> Error {
    match error {
        LaunchError::Prepare(_) | LaunchError::Setup { .. } => Error::internal(error.to_string()),
        _ => Error::unavailable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn what_the_node_lacks_is_named_with_the_fix() {
        let error = open_kvm(Path::new("/nonexistent/kvm")).unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        assert!(error.message.contains("no KVM"), "{error}");
        let error = open_kernel(Path::new("/nonexistent/vmlinux")).unwrap_err();
        assert!(error.message.contains("/nonexistent/vmlinux"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        for contents in [&b"MZ bzImage"[..], b"\x7fE", b""] {
            let path = dir.path().join("vmlinux");
            std::fs::write(&path, contents).unwrap();
            let error = open_kernel(&path).unwrap_err();
            assert!(error.message.contains("not an ELF"), "{error}");
        }
    }

    #[test]
    fn a_missing_network_namespace_is_named() {
        let error = open_netns(&Network::Path("/run/netns/nope".into())).unwrap_err();
        assert_eq!(error.kind, Kind::NotFound);
        assert!(error.message.contains("/run/netns/nope"), "{error}");
    }
}
