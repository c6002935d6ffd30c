//! brig-vmm without containerd: launched in its jail and driven over its control socket, with any
//! initramfs. For hostile guests and for measuring boots.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use brig_agent_protocol::OWN_DIRECTORY;
use brig_hypervisor::control::{
    self, Counters, DeviceConfig, DiskConfig, DiskPiece, Event, FromVmm, NetConfig,
    PIECE_ALIGNMENT, PmemConfig, ReplyBody, Request, RequestBody, VmConfig,
};
use brig_hypervisor::launch::{LaunchOptions, VmmExit, VmmProcess, launch};
use brig_hypervisor::share::{Attributes, FileSystems, Share};

use super::process::readable;

/// What to boot.
pub struct Boot {
    /// The brig-vmm binary.
    pub vmm: PathBuf,
    /// vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// RAM in bytes.
    pub memory: u64,
    /// As much as it may become; less than [`Self::memory`]: it never does.
    pub max_memory: u64,
    /// CPUs.
    pub vcpus: u8,
    /// Appended to the command line.
    pub cmdline: String,
    /// Console lines come as events.
    pub debug_console: bool,
    /// Serve an (empty) share.
    pub share: bool,
    /// A directory that is in the share as `vol`.
    pub volume: Option<PathBuf>,
    /// Where the VMM logs.
    pub log: PathBuf,
    /// A tap for a network interface.
    pub tap: Option<OwnedFd>,
    /// Raw disks, and whether each is read-only; their serials are "disk0", "disk1".
    pub disks: Vec<(PathBuf, bool)>,
    /// A file that [`Machine::plug_pmem`] is to give the guest as memory.
    pub memory_file: Option<PathBuf>,
    /// A template to go on from.
    pub template: Option<PathBuf>,
    /// What the guest is captured into.
    pub capture: Option<File>,
}

impl Boot {
    /// The installed guest with one CPU and 256 MiB.
    #[must_use]
    pub fn installed(log: &Path) -> Self {
        let bin = Path::new("/host/bin");
        Self {
            vmm: bin.join("brig-vmm"),
            kernel: bin.join("vmlinux"),
            initramfs: bin.join("brig-initramfs.cpio"),
            memory: 256 << 20,
            max_memory: 0,
            vcpus: 1,
            cmdline: String::new(),
            debug_console: false,
            share: true,
            volume: None,
            log: log.to_owned(),
            tap: None,
            disks: Vec::new(),
            memory_file: None,
            template: None,
            capture: None,
        }
    }
}

/// A running VMM.
pub struct Machine {
    process: VmmProcess,
    control: OwnedFd,
    agent: Option<UnixStream>,
    next_request: u64,
    /// When it was launched.
    pub started: Instant,
}

/// What a VMM says or does next.
pub enum Next {
    /// An event.
    Event(Event),
    /// It is gone.
    Ended(VmmExit),
}

impl Machine {
    /// Launches the VMM and starts its CPUs.
    ///
    /// # Errors
    /// What the launch or the VMM says.
    pub fn start(boot: &Boot) -> Result<Self> {
        let open = |path: &Path| {
            File::open(path).with_context(|| format!("cannot open {}", path.display()))
        };
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let kernel = open(&boot.kernel)?;
        let initramfs = open(&boot.initramfs)?;
        let (ours, theirs) = UnixStream::pair()?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(&boot.log)
            .with_context(|| format!("cannot open {}", boot.log.display()))?;
        let started = Instant::now();
        let mut process = launch(LaunchOptions {
            vmm: boot.vmm.clone(),
            netns: None,
            cgroup: None,
            stderr: log.into(),
            max_files: 4096,
        })?;
        process.wait_jailed()?;
        if let Some(volume) = &boot.volume {
            let share = Share::new(&mut process, FileSystems::default())?;
            // By the device of what is shared, and by that of what is the pod's own.
            for place in ["vol".to_owned(), format!("{OWN_DIRECTORY}/vol")] {
                share.attach_dir(volume, &place, Attributes::default())?;
            }
        }
        let control = process.take_control().context("no control socket")?;
        let mut machine = Self {
            process,
            control,
            agent: Some(ours),
            next_request: 1,
            started,
        };
        let mut fds = vec![
            kvm.as_fd(),
            kernel.as_fd(),
            initramfs.as_fd(),
            theirs.as_fd(),
        ];
        let mut nets = Vec::new();
        if let Some(tap) = &boot.tap {
            nets.push(NetConfig {
                taps: vec![fds.len()],
                vhosts: Vec::new(),
                mac: [0x02, 0, 0, 0, 0, 1],
                mtu: 1500,
            });
            fds.push(tap.as_fd());
        }
        let files = boot
            .disks
            .iter()
            .map(|(path, readonly)| {
                File::options()
                    .read(true)
                    .write(!readonly)
                    .open(path)
                    .with_context(|| format!("cannot open {}", path.display()))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut disks = Vec::new();
        for (number, (file, (_, readonly))) in files.iter().zip(&boot.disks).enumerate() {
            disks.push(DiskConfig {
                pieces: vec![DiskPiece::whole(fds.len())],
                readonly: *readonly,
                serial: format!("disk{number}"),
                block_size: 512,
            });
            fds.push(file.as_fd());
        }
        let template = boot.template.as_deref().map(open).transpose()?;
        let template_at = template.as_ref().map(|file| {
            fds.push(file.as_fd());
            fds.len() - 1
        });
        let capture_at = boot.capture.as_ref().map(|file| {
            fds.push(file.as_fd());
            fds.len() - 1
        });
        let config = VmConfig {
            vcpus: boot.vcpus,
            max_vcpus: 0,
            memory_bytes: boot.memory,
            max_memory_bytes: boot.max_memory,
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            cmdline: boot.cmdline.clone(),
            template: template_at,
            capture: capture_at,
            agent: 3,
            nets,
            disks,
            share_tag: boot.share.then(|| "brig".to_owned()),
            debug_console: boot.debug_console,
            debugger: false,
            allow_slow_kvm: false,
            passthrough: false,
            vhost: false,
            devices: Vec::new(),
        };
        let id = machine.number();
        control::send(
            machine.control.as_fd(),
            &Request {
                id,
                body: RequestBody::Start(Box::new(config)),
            },
            &fds,
        )?;
        match machine.reply(id, super::clock::seconds(6))? {
            ReplyBody::Started { refused: None, .. } => Ok(machine),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn number(&mut self) -> u64 {
        let number = self.next_request;
        self.next_request += 1;
        number
    }

    fn receive(&mut self, within: Duration) -> Result<Option<FromVmm>> {
        if !readable(&self.control, within)? {
            bail!("the VMM said nothing for {} s", within.as_secs());
        }
        match control::receive::<FromVmm>(self.control.as_fd()) {
            Ok(message) => Ok(message.map(|(message, _)| message)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn reply(&mut self, id: u64, within: Duration) -> Result<ReplyBody> {
        let end = Instant::now() + within;
        loop {
            match self.receive(end.saturating_duration_since(Instant::now()))? {
                Some(FromVmm::Reply(reply)) if reply.id == id => {
                    return reply.result.map_err(Into::into);
                }
                Some(_) => {}
                None => bail!("the VMM ended: {:?}", self.process.wait()?),
            }
        }
    }

    /// Waits for the next event or the end.
    ///
    /// # Errors
    /// If nothing happens in time.
    pub fn next(&mut self, within: Duration) -> Result<Next> {
        loop {
            match self.receive(within)? {
                Some(FromVmm::Event(event)) => return Ok(Next::Event(event)),
                Some(FromVmm::Reply(_)) => {}
                None => return Ok(Next::Ended(self.process.wait()?)),
            }
        }
    }

    /// Waits for the agent's stream; returns the microseconds since the VMM's exec.
    ///
    /// # Errors
    /// If it does not come in time, or the VMM ends.
    pub fn agent_connected(&mut self, within: Duration) -> Result<u64> {
        let end = Instant::now() + within;
        loop {
            match self.next(end.saturating_duration_since(Instant::now()))? {
                Next::Event(Event::AgentConnected { micros }) => return Ok(micros),
                Next::Event(_) => {}
                Next::Ended(exit) => bail!("the VMM ended before the agent came: {exit:?}"),
            }
        }
    }

    /// Waits for a console line with `text`; returns what follows it.
    ///
    /// # Errors
    /// If it does not come in time, or the VMM ends; with the lines that came.
    pub fn console(&mut self, text: &str, within: Duration) -> Result<String> {
        let end = Instant::now() + within;
        let mut seen = Vec::new();
        loop {
            match self.next(end.saturating_duration_since(Instant::now())) {
                Ok(Next::Event(Event::Console { line })) => {
                    if let Some((_, rest)) = line.split_once(text) {
                        return Ok(rest.trim().to_owned());
                    }
                    seen.push(line);
                }
                Ok(Next::Event(_)) => {}
                Ok(Next::Ended(exit)) => {
                    bail!("the VMM ended with {exit:?} before it said '{text}', after {seen:?}")
                }
                Err(error) => {
                    return Err(error.context(format!("no console line '{text}', but {seen:?}")));
                }
            }
        }
    }

    /// Boot marks and exit counters.
    ///
    /// # Errors
    /// If the VMM does not answer.
    pub fn counters(&mut self) -> Result<Counters> {
        match self.ask(RequestBody::Counters, &[])? {
            ReplyBody::Counters(counters) => Ok(counters),
            other => bail!("no counters in the reply but {other:?}"),
        }
    }

    /// Says how much memory the guest is to have; the function of the device for it.
    ///
    /// # Errors
    /// What the VMM says.
    pub fn resize_memory(&mut self, bytes: u64) -> Result<Option<u8>> {
        match self.ask(RequestBody::Memory { bytes }, &[])? {
            ReplyBody::Memory { function, .. } => Ok(function),
            other => bail!("no memory in the reply but {other:?}"),
        }
    }

    /// Puts a disk on the guest's bus; its function.
    ///
    /// # Errors
    /// What the VMM says.
    pub fn plug_disk(&mut self, path: &Path, readonly: bool, serial: &str) -> Result<u8> {
        let file = File::options().read(true).write(!readonly).open(path)?;
        let disk = DiskConfig {
            pieces: vec![DiskPiece::whole(0)],
            readonly,
            serial: serial.to_owned(),
            block_size: 512,
        };
        let body = RequestBody::Plug(DeviceConfig::Disk(disk));
        match self.ask(body, &[file.as_fd()])? {
            ReplyBody::Plugged { function } => Ok(function),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// Gives the guest a file as memory, to be read; the function of its device.
    ///
    /// # Errors
    /// What the VMM says.
    pub fn plug_pmem(&mut self, path: &Path) -> Result<u8> {
        let file = File::open(path)?;
        let length = file.metadata()?.len().next_multiple_of(PIECE_ALIGNMENT);
        let piece = DiskPiece {
            file: 0,
            length: Some(length),
        };
        let pieces = vec![piece];
        let body = RequestBody::Plug(DeviceConfig::Pmem(PmemConfig { pieces }));
        match self.ask(body, &[file.as_fd()])? {
            ReplyBody::Plugged { function } => Ok(function),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// Takes what was plugged away, whatever the guest does with it.
    ///
    /// # Errors
    /// What the VMM says.
    pub fn unplug(&mut self, function: u8) -> Result<()> {
        self.ask(RequestBody::Unplug { function }, &[]).map(drop)
    }

    fn ask(&mut self, body: RequestBody, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<ReplyBody> {
        let id = self.number();
        control::send(self.control.as_fd(), &Request { id, body }, fds)?;
        self.reply(id, super::clock::seconds(6))
    }

    /// The agent's stream, which whoever takes it serves from now on.
    ///
    /// # Errors
    /// If it was taken before.
    pub fn take_agent(&mut self) -> Result<UnixStream> {
        self.agent
            .take()
            .context("the agent's stream was taken before")
    }
}
