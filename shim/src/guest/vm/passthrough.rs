//! Devices of the node that a VM has, by IOMMU group. One container for all of them: the guest's memory is pinned once.
//!
//! What comes back is only descriptors: the VMM's go with the device or with its process, ours here.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use brig_agent_protocol::BUNDLE_PATH;
use brig_hypervisor::control::{DeviceConfig, VfioConfig};
use brig_hypervisor::share::Attributes;
use slog::{Logger, info, warn};

use super::Vm;
use super::groups::Held;
use crate::error::{Error, Result};
use crate::node::vfio::Node;

impl Vm {
    /// Gives a group's devices to the guest, for the container `owner`; their functions. `bundle` is the image of drivers that
    /// the handler has for them.
    ///
    /// # Errors
    /// One sentence: the node's, the VMM's or the guest's. Nothing is left of it then.
    pub async fn give_group(
        &self,
        number: u32,
        owner: &str,
        bundle: Option<&Path>,
        logger: &Logger,
    ) -> Result<Vec<u8>> {
        let mut passthrough = self.passthrough.lock().await;
        if let Some(held) = passthrough.groups.get(&number) {
            return Err(Error::state(format!(
                "IOMMU group {number} is with container {} of this pod already",
                held.owner
            )));
        }
        if let Some(bundle) = bundle
            && !passthrough.has_bundle
        {
            self.share_bundle(bundle).await?;
            passthrough.has_bundle = true;
        }
        let shared = passthrough.container.as_ref().map(OwnedFd::try_clone);
        let shared = shared
            .transpose()
            .map_err(|error| Error::io("the VFIO container", &error))?;
        let first = shared.is_none();
        let opened = tokio::task::spawn_blocking(move || {
            let node = Node::new();
            let container = match shared {
                Some(container) => container,
                None => node.container()?,
            };
            let group = node.open(number, &container, first)?;
            Ok::<_, Error>((container, group))
        });
        let opened = opened
            .await
            .map_err(|error| Error::internal(format!("a worker has ended: {error}")))?;
        let (container, mut group) = opened?;
        let mut functions = Vec::new();
        for (name, device) in std::mem::take(&mut group.devices) {
            // Those of the group before it brought the container along.
            let with = (first && functions.is_empty()).then(|| container.try_clone());
            let plugged = match with.transpose() {
                Ok(with) => self.give_device(name, device, with).await,
                Err(error) => Err(Error::io("the VFIO container", &error)),
            };
            match plugged {
                Ok(function) => functions.push(function),
                Err(error) => {
                    self.take_functions(&functions, logger).await;
                    return Err(error);
                }
            }
        }
        info!(logger, "devices of the node were given to the pod"; "group" => number, "container" => owner,
            "functions" => functions.len());
        if first {
            passthrough.container = Some(container);
        }
        if !std::mem::replace(&mut passthrough.watched, true) {
            let (mut death, held) = (self.death.clone(), Arc::clone(&self.passthrough));
            tokio::spawn(async move {
                let _ = death.wait_for(Option::is_some).await;
                let mut held = held.lock().await;
                held.groups.clear();
                held.container = None;
            });
        }
        let held = Held {
            _group: group,
            functions: functions.clone(),
            owner: owner.to_owned(),
        };
        passthrough.groups.insert(number, held);
        Ok(functions)
    }

    /// Puts it where the guest finds it: one mount of the VMM's namespace, which stays as long as the VM.
    async fn share_bundle(&self, bundle: &Path) -> Result<()> {
        let (how, image) = (
            Attributes {
                readonly: true,
                ..Attributes::default()
            },
            bundle.to_owned(),
        );
        let attached = self.with_mounts(move |mounts| mounts.attach(BUNDLE_PATH, &image, how));
        match attached.await {
            Ok(_) => Ok(()),
            Err(error) => {
                let message = format!(
                    "the driver bundle {} (driver_bundle of Brig's configuration): {}",
                    bundle.display(),
                    error.message
                );
                Err(Error::new(error.kind, message))
            }
        }
    }

    async fn give_device(
        &self,
        name: String,
        device: OwnedFd,
        container: Option<OwnedFd>,
    ) -> Result<u8> {
        let config = VfioConfig {
            device: 0,
            container: container.is_some().then_some(1),
            name: name.clone(),
        };
        let mut fds = vec![device];
        fds.extend(container);
        let plugged = self.plug_and_find(DeviceConfig::Vfio(config), fds).await;
        match plugged {
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
            .filter(|(_, held)| held.owner == owner)
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            let Some(held) = passthrough.groups.remove(&number) else {
                continue;
            };
            if self.death().is_none() {
                self.take_functions(&held.functions, logger).await;
            }
        }
        if passthrough.groups.is_empty() {
            passthrough.container = None;
        }
    }
}
