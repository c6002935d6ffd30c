//! Makes a template: boots a guest in a VMM of its own, has it captured, lets a first clone go on from it, and keeps the file. Runs in a process that lives for this alone, or in
//! `brig template build`. Blocking code.
//!
//! The VMM writes into memory that has no name and belongs to nobody but it and this process; what is kept is a copy.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use brig_agent_protocol::{CAPTURE, SHARE_TAG};
use brig_hypervisor::control::{
    self, ErrorKind, Event, FromVmm, ReplyBody, Request, RequestBody, VmConfig, exit,
};
use brig_hypervisor::launch::{LaunchOptions, VmmExit, VmmProcess, launch, open_sealed};
use brig_hypervisor::template::Template;
use nix::fcntl::OFlag;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};

use super::host::{not_launched, open_initramfs, open_kernel, open_kvm, open_netns, set_oom_score};
use crate::asked::spec::Network;
use crate::error::{Error, Result};
use crate::node::cgroup::Cgroup;
use crate::node::templates::maker::own_cgroup;
use crate::node::templates::{Files, Kind, Recipe, Templates};

/// How soon the node's memory should do without this process when it runs short.
const OOM_SCORE: i32 = 1000;

/// The process of a pod's that makes a template: `recipe` is JSON, and whoever started it has given it the lock as its standard input.
///
/// # Errors
/// Why there is none.
pub fn main(recipe: &str) -> Result<()> {
    let recipe: Recipe = serde_json::from_str(recipe)
        .map_err(|error| Error::invalid(format!("the recipe: {error}")))?;
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE.to_string());
    // It was born into its pod's cgroup, which the pod's end removes at any moment.
    let own = own_cgroup()?.without_return();
    make(&recipe, &own).map_err(|unmade| {
        let templates = Templates::beside(&recipe.state_dir);
        let _ = templates.refuse(&recipe.key, &unmade.error.message, unmade.later);
        unmade.error
    })
}

/// No template was made.
#[derive(Debug)]
pub struct Unmade {
    /// Why.
    pub error: Error,
    /// It was in the node's way, or that in its: it may be tried again. Else it is what the guest or KVM says, and will say again.
    later: bool,
}

impl From<Error> for Unmade {
    /// Of the host.
    fn from(error: Error) -> Self {
        Self { error, later: true }
    }
}

impl Unmade {
    fn for_good(message: String) -> Self {
        Self {
            error: Error::unavailable(message),
            later: false,
        }
    }

    /// By a VMM that has ended, with what it said last.
    fn by(ended: VmmExit, what: &str, said: Said) -> Self {
        let killed = matches!(ended, VmmExit::Signal(libc::SIGKILL | libc::SIGTERM));
        let reason = said.reason.as_deref().unwrap_or("its VMM said nothing");
        Self {
            error: Error::unavailable(format!("{what}: {reason} ({ended:?})")),
            later: killed || said.by_node,
        }
    }
}

/// Makes a template in `own`, the cgroup of templates. To be called by who has the lock.
///
/// # Errors
/// Why there is none.
pub fn make(recipe: &Recipe, own: &Cgroup) -> std::result::Result<(), Unmade> {
    own.join()
        .map_err(|error| Error::io("cannot enter the cgroup of templates", &error))?;
    let made = captured(recipe, own).and_then(|file| {
        rehearse(recipe, own, &file)?;
        let kept = Templates::beside(&recipe.state_dir).keep(recipe, file);
        Ok(kept.map_err(|error| Error::io("cannot keep the template", &error))?)
    });
    // The pages of the file stay on the account of the cgroup above.
    let _ = own.leave_and_remove();
    made
}

/// What the VMM has captured.
fn captured(recipe: &Recipe, own: &Cgroup) -> std::result::Result<File, Unmade> {
    let file = memfd_create("brig-capture", MemfdFlags::CLOEXEC);
    let file = File::from(file.map_err(|errno| failed(errno.into()))?);
    let mut vmm = Vmm::start(recipe, own, &file, VmFile::Capture)?;
    let said = vmm.follow(recipe, |_| false)?;
    match vmm.process.wait().map_err(failed)? {
        VmmExit::Code(exit::CAPTURED) => Ok(file),
        other => Err(Unmade::by(other, "the guest was not captured", said)),
    }
}

/// Lets one clone run until its agent calls: no pod is the first to find that they cannot, and what it has touched by then is what each of them
/// will, which is added to the file.
fn rehearse(recipe: &Recipe, own: &Cgroup, file: &File) -> std::result::Result<(), Unmade> {
    let mut vmm = Vmm::start(recipe, own, file, VmFile::Template)?;
    let mut called = false;
    let said = vmm.follow(recipe, |event| {
        called = matches!(event, Event::AgentConnected { .. });
        called
    })?;
    let what = "the guest did not go on from its template";
    if let Some(refused) = said.refused {
        return Err(Unmade::for_good(format!("{what}: {refused}")));
    }
    if !called {
        let ended = vmm.process.wait().map_err(failed)?;
        return Err(Unmade::by(ended, what, said));
    }
    let copy = file.try_clone().map_err(failed)?;
    let template = Template::open(copy).map_err(|error| Error::internal(error.to_string()))?;
    let recorded = template.record(vmm.process.pid());
    Ok(recorded.map_err(failed)?)
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot prepare the VM", &error)
}

/// What a VMM has said until it ended, or until that was enough.
#[derive(Debug, Default)]
struct Said {
    /// Why it ended.
    reason: Option<String>,
    /// That is what the node lacks.
    by_node: bool,
    /// Why it takes no template: it boots then, which is no rehearsal.
    refused: Option<String>,
}

/// What a VMM does with the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum VmFile {
    Capture,
    Template,
}

/// A VMM of the maker's own. It ends with this.
struct Vmm {
    process: VmmProcess,
    control: OwnedFd,
    /// Nobody answers the agent.
    _agent: UnixStream,
}

impl Vmm {
    fn start(recipe: &Recipe, own: &Cgroup, file: &File, what: VmFile) -> Result<Self> {
        let kvm = open_kvm(&recipe.kvm)?;
        let kernel = open_kernel(&recipe.kernel)?;
        let initramfs = open_initramfs(&recipe.initramfs)?;
        let files = Files {
            kernel: kernel.as_fd(),
            initramfs: initramfs.as_fd(),
            vmm: &recipe.vmm,
        };
        if Kind::of(&files, &recipe.machine).map_err(failed)?.key() != recipe.key {
            return Err(Error::state(
                "the guest's kernel, its initramfs, the VMM or the CPU's microcode has just changed",
            ));
        }
        let (agent, vmm_agent) = UnixStream::pair().map_err(failed)?;
        let log = open_sealed(Path::new("/dev/null"), OFlag::O_RDWR).map_err(failed)?;
        let cgroup = own.open().map_err(failed)?;
        let mut process = launch(LaunchOptions {
            vmm: recipe.vmm.clone(),
            netns: Some(open_netns(&Network::New)?),
            cgroup,
            stderr: log,
            max_files: recipe.max_files,
        })
        .map_err(|error| not_launched(&error))?;
        set_oom_score(&process, OOM_SCORE);
        process
            .wait_jailed()
            .map_err(|error| not_launched(&error))?;
        let control = process
            .take_control()
            .ok_or_else(|| Error::internal("the VMM has no control socket"))?;
        let copy = file.try_clone().map_err(failed)?;
        let fds = [kvm, kernel, initramfs, vmm_agent.into(), copy.into()];
        let request = Request {
            id: 1,
            body: RequestBody::Start(Box::new(machine(recipe, what))),
        };
        let sent: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
        control::send(control.as_fd(), &request, &sent).map_err(failed)?;
        Ok(Self {
            process,
            control,
            _agent: agent,
        })
    }

    /// Listens until it ends, or says what is waited for.
    fn follow(&mut self, recipe: &Recipe, mut enough: impl FnMut(&Event) -> bool) -> Result<Said> {
        let within = Duration::from_millis(recipe.boot_ms);
        let end = Instant::now() + within;
        let mut said = Said::default();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => {
                    return Err(Error::unavailable(format!(
                        "the guest did not come to rest within {} s",
                        within.as_secs()
                    )));
                }
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(Error::io("the VMM's control socket", &errno.into())),
            }
            match control::receive_from_vmm(self.control.as_fd()) {
                Ok(Some(FromVmm::Event(event))) if enough(&event) => return Ok(said),
                Ok(Some(FromVmm::Event(Event::Ended { reason, .. }))) => said.reason = Some(reason),
                Ok(Some(FromVmm::Reply(reply))) => match reply.result {
                    Ok(ReplyBody::Started { refused, .. }) if refused.is_some() => {
                        said.refused = refused;
                        return Ok(said);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        said.by_node = matches!(error.kind, ErrorKind::Host | ErrorKind::Limit);
                        said.reason = Some(error.message);
                    }
                },
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Ok(said),
            }
        }
    }
}

fn machine(recipe: &Recipe, what: VmFile) -> VmConfig {
    let machine = recipe.machine;
    let at = |wanted| (what == wanted).then_some(4);
    let mut cmdline = format!("{CAPTURE}=1");
    if machine.most_cpus > 1 {
        // Else the kernel patches itself for one CPU, and each clone that gets more would patch all of it back.
        cmdline.push_str(" noreplace-smp");
    }
    VmConfig {
        vcpus: 1,
        max_vcpus: machine.most_cpus,
        memory_bytes: machine.memory,
        max_memory_bytes: machine.max_memory,
        kvm: 0,
        kernel: 1,
        initramfs: 2,
        cmdline,
        template: at(VmFile::Template),
        capture: at(VmFile::Capture),
        agent: 3,
        nets: Vec::new(),
        disks: Vec::new(),
        share_tag: Some(SHARE_TAG.to_owned()),
        debug_console: false,
        debugger: false,
        allow_slow_kvm: recipe.allow_slow_kvm,
        passthrough: false,
        vhost: false,
        devices: Vec::new(),
    }
}
