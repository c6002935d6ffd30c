//! Devices of the node that a VM has, by IOMMU group. One address space for all of them: the guest's memory is pinned once.
//!
//! What comes back is only descriptors: the VMM's go with the device or with its process, ours here. One that somebody
//! takes from vfio-pci on the node while a pod has it is taken from the guest, which its containers see as a device that
//! was unplugged.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};

use brig_agent_protocol::BUNDLE_PATH;
use brig_hypervisor::control::{DeviceConfig, DeviceWord, VfioConfig};
use brig_hypervisor::share::Attributes;
use slog::{Logger, info, warn};
use tokio::sync::mpsc;

use super::Vm;
use super::books::{Device, Of};
use super::given::{Given, describe, no_space, room_for};
use super::groups::{Groups, Held, Holder};
use crate::error::{Error, Result};
use crate::node::vfio::open::Space;
use crate::node::vfio::{Node, Way};

/// Does what the node says of devices that the VM has.
pub(super) async fn heed(
    vm: Weak<Vm>,
    mut words: mpsc::Receiver<(u8, DeviceWord)>,
    logger: Logger,
) {
    while let Some((function, word)) = words.recv().await {
        let Some(vm) = vm.upgrade() else { return };
        let why = match word {
            DeviceWord::Wanted => "it is being taken from vfio-pci, or removed, on the node",
            DeviceWord::Failed => "it has reported an error that it does not recover from",
        };
        vm.withdraw(function, why, &logger).await;
    }
}

impl Vm {
    /// Notes what the VM has from its start.
    pub(super) async fn hold(&self, given: Given, functions: &[u8]) {
        let mut passthrough = self.passthrough.lock().await;
        *passthrough = given.hold(functions, &self.books);
        self.let_go_at_the_end(&mut passthrough.watched);
    }

    /// Has all groups let go when the VM has ended, once.
    fn let_go_at_the_end(&self, watched: &mut bool) {
        if std::mem::replace(watched, true) {
            return;
        }
        let (mut death, held) = (self.death.clone(), Arc::clone(&self.passthrough));
        let books = self.books.clone();
        tokio::spawn(async move {
            let _ = death.wait_for(Option::is_some).await;
            books.close();
            let mut held = held.lock().await;
            held.groups.clear();
            held.space = None;
        });
    }

    /// Takes one device from the guest, whoever uses it there.
    async fn withdraw(&self, function: u8, why: &str, logger: &Logger) {
        let mut passthrough = self.passthrough.lock().await;
        let mut groups = passthrough.groups.iter_mut();
        let Some((number, held)) = groups.find(|(_, held)| held.functions.contains(&function))
        else {
            return;
        };
        let number = *number;
        held.functions.retain(|other| *other != function);
        warn!(logger, "a device of the node is taken from the pod"; "group" => number,
            "holder" => %held.holder, "reason" => why);
        let last = held.functions.is_empty();
        self.take_functions(&[function], logger).await;
        if last {
            passthrough.groups.remove(&number);
            if passthrough.groups.is_empty() {
                passthrough.space = None;
            }
        }
    }

    /// The functions of the devices that all containers of the pod have, with their drivers.
    ///
    /// # Errors
    /// The guest's: that no driver takes one, with its name.
    pub async fn devices_of_pod(&self, bundle: Option<&Path>) -> Result<Vec<u8>> {
        let mut passthrough = self.passthrough.lock().await;
        let groups = passthrough.groups.values();
        let mine = groups.filter(|held| held.holder == Holder::Pod);
        if mine.clone().all(|held| held.found) {
            return Ok(mine.flat_map(|held| held.functions.clone()).collect());
        }
        self.share_bundle(bundle, &mut passthrough.has_bundle)
            .await?;
        let mut functions = Vec::new();
        for held in passthrough.groups.values_mut() {
            if held.holder != Holder::Pod {
                continue;
            }
            for function in &held.functions {
                if !held.found {
                    self.find(*function).await?;
                }
                functions.push(*function);
            }
            held.found = true;
        }
        Ok(functions)
    }

    /// Gives a group's devices to the guest, for the container `owner`, by `way` if the VM has none yet; their functions. `bundle` is the image of drivers that
    /// the handler has for them.
    ///
    /// # Errors
    /// One sentence: the node's, the VMM's or the guest's. Nothing is left of it then.
    pub async fn give_group(
        &self,
        (number, way): (u32, Way),
        owner: &str,
        bundle: Option<&Path>,
        logger: &Logger,
    ) -> Result<Vec<u8>> {
        let mut passthrough = self.passthrough.lock().await;
        match passthrough.groups.get(&number).map(|held| &held.holder) {
            // It has them without asking.
            Some(Holder::Pod) => return Ok(Vec::new()),
            Some(Holder::Nobody) => {
                return self.claim(&mut passthrough, number, owner, bundle).await;
            }
            Some(holder) => {
                return Err(Error::state(format!(
                    "IOMMU group {number} is with {holder} already"
                )));
            }
            None => {}
        }
        // Of devices that were given up the VMM may still have some.
        let of = Of::Group(number);
        if let Some(why) = self.books.under_way(&of) {
            return Err(Error::state(why));
        }
        let (memory, cgroup) = (self.memory(), self.cgroup.clone());
        let room = tokio::task::spawn_blocking(move || room_for(memory, cgroup.as_ref()));
        room.await??;
        self.share_bundle(bundle, &mut passthrough.has_bundle)
            .await?;
        let shared = passthrough.space.as_ref().map(Space::try_clone);
        let shared = shared.transpose().map_err(|error| no_space(&error))?;
        let first = shared.is_none();
        let opened = tokio::task::spawn_blocking(move || {
            let node = Node::new();
            let space = match shared {
                Some(space) => space,
                None => node.space(node.way(way))?,
            };
            let group = node.open(number, &space, first)?;
            Ok::<_, Error>((space, group))
        });
        let (space, mut group) = opened.await??;
        let devices = std::mem::take(&mut group.devices);
        let group = Arc::new(group);
        // Whatever becomes of it here, the VMM may have it from now on.
        self.let_go_at_the_end(&mut passthrough.watched);
        let (mut functions, mut addresses) = (Vec::new(), Vec::new());
        for (name, device) in devices {
            let entry = Device {
                of: of.clone(),
                _held: Some(Arc::clone(&group)),
            };
            // Those of the group before it brought the address space along.
            let with = (first && functions.is_empty()).then(|| space.try_clone());
            let plugged = match with.transpose() {
                Ok(with) => self.give_device(entry, name.clone(), device, with).await,
                Err(error) => Err(no_space(&error)),
            };
            match plugged {
                Ok(function) => {
                    functions.push(function);
                    addresses.push(group.moved(name, function));
                }
                Err(error) => {
                    self.take_functions(&functions, logger).await;
                    return Err(error);
                }
            }
        }
        info!(logger, "devices of the node were given to the pod"; "group" => number, "container" => owner,
            "functions" => functions.len());
        if first {
            passthrough.space = Some(space);
        }
        let held = Held {
            _group: group,
            functions: functions.clone(),
            addresses,
            holder: Holder::Container(owner.to_owned()),
            stays: false,
            found: true,
        };
        passthrough.groups.insert(number, held);
        Ok(functions)
    }

    /// Gives a group that the VM has from its start to the container that it is for.
    async fn claim(
        &self,
        passthrough: &mut Groups,
        number: u32,
        owner: &str,
        bundle: Option<&Path>,
    ) -> Result<Vec<u8>> {
        self.share_bundle(bundle, &mut passthrough.has_bundle)
            .await?;
        let Some(held) = passthrough.groups.get_mut(&number) else {
            return Ok(Vec::new());
        };
        if !held.found {
            for function in &held.functions {
                self.find(*function).await?;
            }
            held.found = true;
        }
        held.holder = Holder::Container(owner.to_owned());
        Ok(held.functions.clone())
    }

    /// Puts it where the guest finds it, once: one mount of the VMM's namespace, which stays as long as the VM.
    async fn share_bundle(&self, bundle: Option<&Path>, is_there: &mut bool) -> Result<()> {
        let Some(bundle) = bundle.filter(|_| !*is_there) else {
            return Ok(());
        };
        let (how, image) = (
            Attributes {
                readonly: true,
                ..Attributes::default()
            },
            bundle.to_owned(),
        );
        let attached = self.with_mounts(move |mounts| mounts.attach(BUNDLE_PATH, &image, how));
        attached.await.map_err(|error| {
            let message = format!(
                "the driver bundle {} (driver_bundle of Brig's configuration): {}",
                bundle.display(),
                error.message
            );
            Error::new(error.kind, message)
        })?;
        *is_there = true;
        Ok(())
    }

    async fn give_device(
        &self,
        entry: Device,
        name: String,
        device: OwnedFd,
        space: Option<Space>,
    ) -> Result<u8> {
        let mut fds = vec![device];
        let config = VfioConfig {
            device: 0,
            space: space.map(|space| describe(space, &mut fds)),
            name: name.clone(),
        };
        let config = DeviceConfig::Vfio(config);
        match self.plug_and_find(entry, config, fds).await {
            Ok((function, _)) => Ok(function),
            Err(error) => {
                let message = format!("device {name} was not given to the pod: {}", error.message);
                Err(Error::new(error.kind, message))
            }
        }
    }

    async fn take_functions(&self, functions: &[u8], logger: &Logger) {
        for function in functions {
            if let Err(error) = self.unplug(*function).await {
                warn!(logger, "a device of the node stays with the VM"; "function" => function, "error" => error.message);
            }
        }
    }

    /// Takes the groups of a container back. With the VM they are back by themselves.
    pub async fn take_groups(&self, owner: &str, logger: &Logger) {
        let mut passthrough = self.passthrough.lock().await;
        let numbers: Vec<u32> = passthrough
            .groups
            .iter()
            .filter(|(_, held)| held.holder == Holder::Container(owner.to_owned()))
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            // What the VM was started with is for the container's successor.
            if let Some(held) = passthrough
                .groups
                .get_mut(&number)
                .filter(|held| held.stays)
            {
                held.holder = Holder::Nobody;
                continue;
            }
            let Some(held) = passthrough.groups.remove(&number) else {
                continue;
            };
            if self.death().is_none() {
                self.take_functions(&held.functions, logger).await;
            }
        }
        if passthrough.groups.is_empty() {
            passthrough.space = None;
        }
    }
}
