//! What a user would pick instead of brig-vmm: QEMU's microvm with the same kernel and initramfs,
//! and a vsock device of vhost, over which the same agent dials out.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};

use brig_tests::node::process::readable;

/// The host port that the agent dials.
const AGENT_PORT: u32 = 1024;
const CID: u32 = 3;
/// Any host context.
const ANY: u32 = u32::MAX;

/// A listener for the agent's dial, over vhost-vsock.
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on the agent's port.
    pub fn open() -> Result<Self> {
        // Not loaded by default; the node's kernel has it as a module.
        let _ = Command::new("modprobe").arg("vhost_vsock").status();
        let socket = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        use std::os::fd::AsRawFd;
        bind(socket.as_raw_fd(), &VsockAddr::new(ANY, AGENT_PORT))?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(Self(socket))
    }

    fn accept(&self, within: Duration) -> Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        ensure!(
            readable(&self.0, within)?,
            "the agent did not dial out of QEMU"
        );
        let fd = accept(self.0.as_fd().as_raw_fd())?;
        // SAFETY: accept has just given us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// A running QEMU whose agent is ready.
pub struct Qemu {
    child: Child,
    agent: OwnedFd,
    /// From exec to the agent's dial.
    pub ready: Duration,
}

/// The initramfs with padding: QEMU puts it over its own tables unless its size is just over a page.
pub fn padded_initramfs(from: &Path) -> Result<PathBuf> {
    let mut data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    data.resize(data.len().next_multiple_of(4096) + 4, 0);
    let path = PathBuf::from("/run/brig-bench-initramfs.cpio");
    fs::write(&path, data)?;
    Ok(path)
}

/// The command that boots it with an initramfs and 256 MiB.
pub fn command(kernel: &Path, initramfs: &Path, cmdline: &str) -> Command {
    let mut command = machine(kernel, cmdline, 256);
    command.arg("-initrd").arg(initramfs);
    command
}

/// The command of a guest of `mib` MiB, whose root is on a disk.
pub fn machine(kernel: &Path, cmdline: &str, mib: u32) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,pic=off,pit=off,rtc=off,acpi=on,pcie=on,accel=kvm",
        ])
        .args(["-cpu", "host", "-smp", "1", "-m", &mib.to_string()])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", cmdline])
        .args(["-device", &format!("vhost-vsock-pci,guest-cid={CID}")])
        .args(["-device", "virtio-rng-pci"])
        .args(["-device", "virtio-balloon-pci,free-page-reporting=on"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

impl Qemu {
    /// Boots and waits for the agent.
    pub fn boot(listener: &Listener, mut command: Command, within: Duration) -> Result<Self> {
        let started = Instant::now();
        let mut child = command.spawn().context("cannot start QEMU")?;
        match listener.accept(within) {
            Ok(agent) => Ok(Self {
                child,
                agent,
                ready: started.elapsed(),
            }),
            Err(error) => {
                let _ = child.kill();
                let mut said = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    let _ = io::Read::read_to_string(&mut stderr, &mut said);
                }
                let _ = child.wait();
                bail!("{error:#}; QEMU said: {}", said.trim())
            }
        }
    }

    /// The stream to what dialled.
    pub fn stream(&self) -> Result<File> {
        Ok(self.agent.try_clone()?.into())
    }

    /// Its process id.
    pub fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
