//! Who a benchmark's commands run in: a container of a pod under runc or Brig, or a guest of QEMU.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_tests::node::clock;
use brig_tests::node::daemon::Daemon;
use brig_tests::node::daemon::generation::Generation;
use brig_tests::node::daemon::pod::{Container, Netns, Pod};
use brig_tests::node::kvm::Counts;
use brig_tests::node::{calls::Calls, memory};
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::boot::{QEMU_CMDLINE, installed};
use crate::ground::{Ground, text};
use crate::kinds::{self, Who};
use crate::qemu::{self, Listener, Qemu};
use crate::runner::Runner;

/// MiB of each guest.
pub const MEMORY: u32 = 512;
/// The first of the disks that are memory.
const RAM_MAJOR: u32 = 1;

/// A daemon whose shims are `who`'s; Brig's have this configuration beside the guest's size.
pub fn daemon(who: Who, name: &str, configuration: &str) -> Result<Daemon> {
    let runtime = match who {
        Who::Runc => "io.containerd.runc.v2",
        _ => "io.containerd.brig.v2",
    };
    let mut daemon = Daemon::new(Generation::V1_7, runtime, &format!("bench-{name}"))?;
    if who == Who::Brig {
        let path = format!("/run/brig-bench-{name}.toml");
        let size = format!("memory = {MEMORY}\ntime_scale = {:.1}\n", clock::scale());
        std::fs::write(&path, size + configuration)?;
        let length = u8::try_from(path.len()).context("a long path")?;
        // Of runtimeoptions.v1.Options, the second field.
        let value = [&[0x12, length], path.as_bytes()].concat();
        daemon.options = Some(Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value,
            ..Any::default()
        });
    }
    Ok(daemon)
}

/// A pod with one container, in which the runner answers.
pub struct InPod<'a> {
    pod: Pod<'a>,
    container: Container<'a>,
    daemon: &'a Daemon,
    /// From `start` of the shim to the runner's first answer.
    pub started: Duration,
    _made: kinds::Container,
}

/// A guest of QEMU, and a file server that it may have.
pub struct InGuest {
    qemu: Qemu,
    server: Option<Server>,
    _made: Option<kinds::Guest>,
}

/// One of them.
pub enum Place<'a> {
    /// Under runc or Brig.
    Pod(Box<InPod<'a>>),
    /// Under QEMU.
    Guest(InGuest),
}

/// Who runs commands.
pub struct Subject<'a> {
    /// By whom.
    pub who: Who,
    /// Where commands go.
    pub runner: Runner,
    place: Place<'a>,
}

/// What one thing cost the node's side.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cost {
    /// System calls of the VMM, and of a file server that is another process.
    pub calls: u64,
    /// Exits of the VM.
    pub exits: u64,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl<'a> Subject<'a> {
    /// A pod; `who` is its daemon's.
    pub fn pod(
        daemon: &'a Daemon,
        who: Who,
        id: &str,
        netns: Netns,
        made: kinds::Container,
    ) -> Result<Self> {
        let begin = Instant::now();
        let pod = Pod::by_pause_container_in(daemon, id, netns)?;
        let (mut runner, streams) = Runner::by_fifos(&pod.bundle.path)?;
        let change = |spec: &mut Value| {
            spec["process"]["env"] = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.extend(made.mounts.iter().cloned());
            }
            if let Some(minor) = made.device {
                spec["linux"]["devices"] = json!([{
                    "path": "/dev/volume", "type": "b", "major": RAM_MAJOR, "minor": minor, "fileMode": 0o660,
                }]);
                spec["linux"]["resources"] = json!({"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": RAM_MAJOR, "minor": minor, "access": "rwm"},
                ]});
            }
        };
        let args = ["/bin/brig-probe", "commands"];
        let container =
            pod.container_changed("main", &args, &streams, made.rootfs.clone(), change)?;
        container.start()?;
        runner
            .run(&["/bin/true"])
            .with_context(|| pod.bundle.log())?;
        Ok(Self {
            who,
            runner,
            place: Place::Pod(Box::new(InPod {
                started: begin.elapsed(),
                pod,
                container,
                daemon,
                _made: made,
            })),
        })
    }

    /// A guest of QEMU with these disks and directories.
    pub fn guest(listener: &Listener, ground: &Ground, made: kinds::Guest) -> Result<Self> {
        let server = match &made.served {
            Some(directory) => Some(serve(ground, directory)?),
            None => None,
        };
        let mut command = machine(made.root);
        for (number, disk) in made.disks.iter().enumerate() {
            let read_only = made.root == "erofs" && number == 0;
            command.arg("-drive").arg(format!(
                "if=none,id=disk{number},format=raw,file={}{}",
                disk.display(),
                if read_only { ",readonly=on" } else { "" }
            ));
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=disk{number}"));
        }
        if server.is_some() {
            let socket = text(&ground.tools().join("virtiofsd.sock"));
            command
                .arg("-object")
                .arg(format!(
                    "memory-backend-memfd,id=memory,size={MEMORY}M,share=on"
                ))
                .args(["-machine", "memory-backend=memory"])
                .arg("-chardev")
                .arg(format!("socket,id=files,path={socket}"))
                .args(["-device", "vhost-user-fs-pci,chardev=files,tag=shared"]);
        }
        let script = made.script;
        let qemu = Qemu::boot(listener, command, clock::seconds(10))?;
        let mut subject = Self::in_guest(qemu, server, Some(made))?;
        subject.runner.sh(script)?;
        Ok(subject)
    }

    /// A guest of QEMU that runs already.
    pub fn in_guest_alone(qemu: Qemu) -> Result<Self> {
        Self::in_guest(qemu, None, None)
    }

    fn in_guest(qemu: Qemu, server: Option<Server>, made: Option<kinds::Guest>) -> Result<Self> {
        Ok(Self {
            who: Who::Qemu,
            runner: Runner::on(qemu.stream()?)?,
            place: Place::Guest(InGuest {
                qemu,
                server,
                _made: made,
            }),
        })
    }

    /// How long its start took, if it is a pod.
    pub fn started(&self) -> Option<Duration> {
        match &self.place {
            Place::Pod(pod) => Some(pod.started),
            Place::Guest(_) => None,
        }
    }

    /// The process that has the VM, if there is one.
    pub fn vmm(&self) -> Result<Option<i32>> {
        Ok(match &self.place {
            Place::Pod(pod) if self.who == Who::Brig => Some(i32::try_from(pod.pod.pid)?),
            Place::Pod(_) => None,
            Place::Guest(guest) => Some(guest.qemu.pid()?),
        })
    }

    /// Exits of its VM until now.
    pub fn exits(&self) -> Result<Option<u64>> {
        Ok(self.vmm()?.map(|pid| Counts::of(pid).exits))
    }

    /// Runs a command and counts what that cost the node's side; nothing under runc.
    pub fn counted(&mut self, command: &[&str]) -> Result<Option<Cost>> {
        let Some(vmm) = self.vmm()? else {
            return Ok(None);
        };
        let mut processes = vec![vmm];
        if let Place::Guest(InGuest {
            server: Some(server),
            ..
        }) = &self.place
        {
            // It has a child that serves.
            processes.extend(memory::tree(i32::try_from(server.0.id())?));
        }
        let calls = Calls::of(&processes)?;
        let (before, exits) = (calls.count()?, Counts::of(vmm).exits);
        self.runner.run(command)?;
        Ok(Some(Cost {
            calls: calls.count()? - before,
            exits: Counts::of(vmm).exits - exits,
        }))
    }

    /// KiB of all processes that are there for the pod, guest memory included.
    pub fn share(&self) -> Result<u64> {
        let Place::Pod(pod) = &self.place else {
            return Ok(0);
        };
        let mut all = vec![
            i32::try_from(pod.pod.pid)?,
            i32::try_from(pod.container.pid)?,
        ];
        let ours: Vec<i32> = pod.daemon.servers();
        for server in ours {
            let line = std::fs::read_to_string(format!("/proc/{server}/cmdline"))?;
            if line.split('\0').any(|word| word == pod.pod.id) {
                all.push(server);
            }
        }
        all.sort_unstable();
        all.dedup();
        ensure!(all.len() >= 2, "no shim serves {}", pod.pod.id);
        let shares = all.into_iter().map(|pid| Ok(memory::of(pid, 0)?.total));
        shares.sum()
    }

    /// Ends it.
    pub fn end(self) -> Result<()> {
        let Place::Pod(pod) = self.place else {
            return Ok(());
        };
        let InPod { pod, container, .. } = *pod;
        container.connection.kill(&container.id, 9)?;
        container.connection.wait(&container.id)?;
        container.delete()?;
        pod.end()
    }
}

/// The command of a guest whose root is its first disk, and which runs what it is told.
pub fn machine(root: &str) -> Command {
    let write = if root == "erofs" { "ro" } else { "rw" };
    let cmdline = format!(
        "{QEMU_CMDLINE} root=/dev/vda rootfstype={root} {write} init=/init brig.probe=commands"
    );
    qemu::machine(&installed().kernel, &cmdline, MEMORY)
}

/// Debian's virtiofsd with its defaults, but without a sandbox: it is in a directory of its own.
fn serve(ground: &Ground, directory: &Path) -> Result<Server> {
    let place = ground.tools().join("volume");
    let _ = crate::ground::run("umount", &[&text(&place)]);
    crate::ground::run("mount", &["--bind", &text(directory), &text(&place)])?;
    let socket = ground.tools().join("virtiofsd.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = ground.tool("/usr/libexec/virtiofsd");
    command
        .args(["--socket-path=/virtiofsd.sock", "--shared-dir=/volume"])
        .arg("--sandbox=none")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let server = Server(command.spawn().context("virtiofsd")?);
    let end = Instant::now() + clock::seconds(5);
    while !socket.exists() {
        ensure!(Instant::now() < end, "virtiofsd makes no socket");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(server)
}
