//! Block devices of the node that a VM has as disks. One disk for each, however many containers of the pod have it: they
//! see what the others write, as on a node.
//!
//! The VMM alone holds the device, so it is free when the disk is unplugged, and when the VMM has died.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use brig_agent_protocol::agent::FoundDevice;
use brig_agent_protocol::agent_ttrpc::AgentClient;
use brig_hypervisor::control::{DeviceConfig, DiskConfig, DiskPiece, RequestBody};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use slog::{Logger, info, warn};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use ttrpc::context;

use super::Vm;
use super::books::{Device, Of};
use super::control::Control;
use super::held_disks::{Disk, Disks, GivenRoot, Held, Root, Volume, Watch};
use super::shown::Shown;
use crate::error::{Error, Kind, Result};
use crate::node::disk::{self, Numbers};
use crate::node::watched::watched;

/// The multicast group of the kernel's own events.
const KERNEL_EVENTS: u32 = 1;
/// Longest event (lib/kobject_uevent.c, UEVENT_BUFFER_SIZE and the header).
const MAX_EVENT: usize = 4096;

impl Vm {
    /// Gives a block device of the node to the guest, for the container `owner`.
    ///
    /// # Errors
    /// One sentence: the node's, the VMM's or the guest's. Nothing is left of it then.
    pub async fn give_disk(
        &self,
        numbers: Numbers,
        write: bool,
        owner: &str,
        logger: &Logger,
    ) -> Result<Disk> {
        let mut disks = self.disks.lock().await;
        if let Some(held) = disks.find(numbers, write) {
            held.owners.insert(owner.to_owned());
            let disk = held.disk.clone();
            // The node's kernel tells nobody that a partition has grown.
            if disk::is_partition(numbers) {
                let function = disk.function;
                let _ = self
                    .control
                    .request(RequestBody::Resize { function }, Vec::new())
                    .await;
            }
            return Ok(disk);
        }
        if let Some(why) = self.books.under_way(&Of::Disk(numbers)) {
            return Err(Error::state(why));
        }
        let disk = self.plug_device(&mut disks, numbers, write, logger).await?;
        let (major, minor) = numbers;
        info!(logger, "a block device of the node was given to the pod"; "device" => format!("{major}:{minor}"),
            "writable" => write, "container" => owner, "function" => disk.function);
        let held = Held {
            disk: disk.clone(),
            owners: BTreeSet::from([owner.to_owned()]),
        };
        disks.held.insert((numbers, write), held);
        Ok(disk)
    }

    async fn plug_device(
        &self,
        disks: &mut Disks,
        numbers: Numbers,
        write: bool,
        logger: &Logger,
    ) -> Result<Disk> {
        let opened = tokio::task::spawn_blocking(move || disk::open(numbers, write));
        let opened = opened.await??;
        let (major, minor) = numbers;
        let config = DiskConfig {
            pieces: vec![DiskPiece::whole(0)],
            readonly: opened.readonly,
            serial: format!("{major}:{minor}"),
            block_size: opened.block_size,
        };
        let of = Of::Disk(numbers);
        let plugged = self.plug_growing(disks, of, config, opened.file, logger);
        let (function, found) = plugged.await.map_err(|error| {
            let what = format!("block device {major}:{minor} of the node");
            Error::new(
                error.kind,
                format!("{what} was not given to the pod: {}", error.message),
            )
        })?;
        // Its partitions come after it.
        let node = found.nodes.into_iter().find(|node| node.block);
        Ok(Disk {
            function,
            name: node.map(|node| node.name).unwrap_or_default(),
        })
    }

    /// Plugs a disk whose size is followed from before the VMM looks at it, so that no growth is missed.
    pub(super) async fn plug_growing(
        &self,
        disks: &mut Disks,
        of: Of,
        config: DiskConfig,
        file: OwnedFd,
        logger: &Logger,
    ) -> Result<(u8, FoundDevice)> {
        if disks.watch.is_none() {
            disks.watch = self.watch_disks(logger);
        }
        let plugged = self
            .plug_and_find(Device::of(of), DeviceConfig::Disk(config), vec![file])
            .await;
        if plugged.is_err() {
            disks.rest();
        }
        plugged
    }

    /// Plugs a disk that a root file system is on, unless the guest has one of the same files.
    pub(super) async fn hold_root(
        &self,
        files: Option<&[(u64, u64)]>,
        device: DeviceConfig,
        fds: Vec<OwnedFd>,
        owner: &str,
    ) -> Result<GivenRoot> {
        let mut disks = self.disks.lock().await;
        let mut roots = disks.roots.iter_mut();
        if let Some(root) = roots.find(|root| files.is_some() && root.files.as_deref() == files) {
            root.owners.insert(owner.to_owned());
            return Ok(root.given);
        }
        let memory = matches!(device, DeviceConfig::Pmem(_));
        let plugged = self.plug_and_find(Device::of(Of::Root), device, fds).await;
        let (function, _) = plugged.map_err(|error| {
            let message = format!("a disk of the root file system: {}", error.message);
            Error::new(error.kind, message)
        })?;
        let given = GivenRoot { function, memory };
        disks.roots.push(Root {
            files: files.map(<[_]>::to_vec),
            given,
            owners: BTreeSet::from([owner.to_owned()]),
        });
        Ok(given)
    }

    /// Takes the disks of a container back that no other has. With the VM they are back by themselves.
    pub async fn take_disks(&self, owner: &str, logger: &Logger) {
        let mut disks = self.disks.lock().await;
        let mut free = Vec::new();
        disks.held.retain(|_, held| {
            let was_one = held.owners.remove(owner);
            if was_one && held.owners.is_empty() {
                free.push(held.disk.function);
            }
            !held.owners.is_empty()
        });
        disks.rest();
        disks.roots.retain_mut(|root| {
            if root.owners.remove(owner) && root.owners.is_empty() {
                free.push(root.given.function);
            }
            !root.owners.is_empty()
        });
        if self.death().is_some() {
            return;
        }
        for function in free {
            if let Err(error) = self.unplug(function).await {
                warn!(logger, "a block device of the node stays with the VM"; "function" => function,
                    "error" => error.message);
            }
        }
    }

    /// Begins to follow the devices' sizes. Without it the disks keep theirs.
    fn watch_disks(&self, logger: &Logger) -> Option<Watch> {
        match events() {
            Ok(events) => {
                let follower = Follower {
                    disks: Arc::downgrade(&self.disks),
                    control: self.control.clone(),
                    agent: self.agent.clone(),
                    patience: self.timeouts.setup,
                    logger: logger.clone(),
                };
                Some(Watch(tokio::spawn(follower.follow(events))))
            }
            Err(error) => {
                warn!(logger, "a disk that grows is not seen to grow"; "error" => %error);
                None
            }
        }
    }
}

fn events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        flags,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    watched(socket, Interest::READABLE)
}

/// Who follows the devices' sizes. It knows the disks only while it asks for them, so that they end with their VM.
struct Follower {
    disks: Weak<Shown<Disks>>,
    control: Control,
    agent: AgentClient,
    /// What the agent has to let a file system grow.
    patience: Duration,
    logger: Logger,
}

impl Follower {
    /// Tells the VMM of each device of the node that has changed, and the agent of each volume on one.
    async fn follow(self, events: AsyncFd<OwnedFd>) {
        let mut event = vec![0; MAX_EVENT];
        loop {
            let received = events.async_io(Interest::READABLE, |socket| {
                Ok(recv(socket.as_raw_fd(), &mut event, MsgFlags::empty())?)
            });
            let numbers = match received.await {
                Ok(length) => match disk::changed(event.get(..length).unwrap_or_default()) {
                    Some(numbers) => Some(numbers),
                    None => continue,
                },
                // Too many at once: any may have changed.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => None,
                Err(_) => return,
            };
            let Some(disks) = self.disks.upgrade() else {
                return;
            };
            let (functions, volumes) = {
                let disks = disks.lock().await;
                let functions: Vec<u8> = disks.of(numbers).collect();
                let volumes: Vec<Volume> = disks.volumes_of(numbers).cloned().collect();
                (functions, volumes)
            };
            drop(disks);
            for function in functions {
                // One that has gone meanwhile has no size to be told.
                let body = RequestBody::Resize { function };
                let _ = self.control.request(body, Vec::new()).await;
            }
            for volume in volumes {
                self.grow(&volume).await;
            }
        }
    }

    async fn grow(&self, volume: &Volume) {
        let Some(request) = volume.growth() else {
            return;
        };
        let context = context::Context::default();
        let answer = self.agent.update_volume(context, &request);
        let answer = timeout(self.patience, answer).await;
        let why = match answer.map(|answer| answer.map_err(Error::from_agent)) {
            Ok(Ok(_)) => return,
            // It is being mounted, and who does that looks again.
            Ok(Err(error)) if error.kind == Kind::NotFound => return,
            Ok(Err(error)) => error.message,
            Err(_) => "the guest's agent did not answer".to_owned(),
        };
        warn!(self.logger, "a volume did not grow with its disk"; "volume" => &volume.id, "error" => why);
    }
}
