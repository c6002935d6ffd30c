//! Devices that come to a running VM and go: one mechanism, whatever the device. The VMM puts it on the guest's
//! bus, and the agent looks for it there; it leaves the other way round.
//!
//! Interfaces come late where `ctr run --cni` and its like set the network up after Create, in the
//! network namespace of the pid that Create returned. What is there at Start that was not at the VM's
//! launch is plugged into the running VM.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use brig_agent_protocol::agent::{AddNetworkRequest, DeviceRef, FindDeviceRequest, FoundDevice};
use brig_hypervisor::control::DeviceConfig;
use slog::{Logger, info};
use tokio::sync::oneshot;
use tokio::time::timeout;
use ttrpc::context;

use super::books::{Device, Number, Of};
use super::control::{ANSWER_LIMIT, ControlError};
use super::late::Interface;
use super::{Timeouts, Vm};
use crate::asked::config::MIB;
use crate::error::Result;

/// A device that has come, and how whoever waited for it says that it is theirs now.
type Come = (u8, oneshot::Sender<()>);

impl Vm {
    /// Puts a device on the guest's bus; the number of its function. The guest has not looked for it yet. One that comes
    /// when nobody waits any more goes again.
    ///
    /// # Errors
    /// What the VMM says, with the numbers if something has run out.
    pub(super) async fn plug(
        &self,
        of: Device,
        device: DeviceConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<u8> {
        let (what, limit) = patience(&device, &self.timeouts, self.memory());
        let number = self.books.coming(of);
        let (told, heard) = oneshot::channel();
        let control = self.control.clone();
        let plugged = async move { control.plug(device, fds).await };
        tokio::spawn(self.see_to_plug(number, plugged, told));
        match wait(heard, what, limit).await {
            Ok((function, mine)) => {
                // Who sees to it waits for this.
                let _ = mine.send(());
                Ok(function)
            }
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Enters into the books what becomes of a plug, for however long that takes.
    fn see_to_plug(
        &self,
        number: Number,
        plugged: impl Future<Output = std::result::Result<u8, ControlError>> + Send + 'static,
        told: oneshot::Sender<std::result::Result<Come, ControlError>>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (books, vm, mut death) = (self.books.clone(), self.me.clone(), self.death.clone());
        async move {
            let function = match plugged.await {
                Ok(function) => function,
                Err(error) => {
                    let refused = matches!(error, ControlError::Refused(_));
                    let _ = told.send(Err(error));
                    if !refused {
                        // Its process may have it until that is at its end.
                        let _ = death.wait_for(Option::is_some).await;
                    }
                    books.gone(number);
                    return;
                }
            };
            books.there(number, function);
            let (mine, taken) = oneshot::channel();
            if told.send(Ok((function, mine))).is_ok() && taken.await.is_ok() {
                return;
            }
            if let Some(vm) = vm.upgrade() {
                // What it says is in the books.
                let _ = vm.unplug(function).await;
            }
        }
    }

    /// As [`Self::plug`], and waits until a driver of the guest has the device; what it found. A device that no
    /// driver takes is unplugged again.
    ///
    /// # Errors
    /// The VMM's or the agent's: that no driver takes the device, with its name.
    pub(super) async fn plug_and_find(
        &self,
        of: Device,
        device: DeviceConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(u8, FoundDevice)> {
        let function = self.plug(of, device, fds).await?;
        match self.find(function).await {
            Ok(found) => Ok((function, found)),
            Err(error) => {
                // The first error is the one to be told.
                let _ = self.unplug(function).await;
                Err(error)
            }
        }
    }

    /// Waits until a driver of the guest has the device of a function; what it found.
    ///
    /// # Errors
    /// The agent's: that no driver takes the device, with its name.
    pub async fn find(&self, function: u8) -> Result<FoundDevice> {
        let wait = self.timeouts.boot;
        let request = FindDeviceRequest {
            function: function.into(),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..FindDeviceRequest::default()
        };
        let _looks = self.bus.read().await;
        let answer = self
            .agent
            .find_device(context::Context::default(), &request);
        self.call_within(wait * 2, "FindDevice", answer).await
    }

    /// Takes a plugged device from the guest and from the VMM; when it returns, the VMM holds nothing of it. A
    /// guest that does not let go of it loses it all the same. Waits for who has the guest look for a device.
    ///
    /// # Errors
    /// The VMM's: nothing is plugged there.
    pub async fn unplug(&self, function: u8) -> Result<()> {
        let request = DeviceRef {
            function: function.into(),
            ..DeviceRef::default()
        };
        let changes = Arc::clone(&self.bus).write_owned().await;
        let answer = self
            .agent
            .remove_device(context::Context::default(), &request);
        let _ = self.call("RemoveDevice", answer).await;
        let number = self.books.leaving(function);
        let (told, heard) = oneshot::channel();
        let (control, books) = (self.control.clone(), self.books.clone());
        tokio::spawn(async move {
            // As long as the VMM is at it, whoever waits.
            let _changes = changes;
            let answer = control.unplug(function).await;
            // What it refuses to take away is not there.
            if let (Ok(()) | Err(ControlError::Refused(_)), Some(number)) = (&answer, number) {
                books.gone(number);
            }
            let _ = told.send(answer);
        });
        // All memory that was pinned for it is let go of again.
        let limit = ANSWER_LIMIT + self.timeouts.pinning(self.memory());
        match wait(heard, "give the device back".to_owned(), limit).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Gives the guest the interfaces, and the packet filter, that its network namespace has got since the launch.
    ///
    /// # Errors
    /// What the node, the VMM or the agent says. The pod is then without them and should not start.
    pub async fn plug_networks(&self, logger: &Logger) -> Result<()> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let (mut found, guest) = late.find().await?;
        guest.log(logger);
        if found.interfaces.is_empty() && guest.filter.objects.is_empty() {
            return Ok(());
        }
        let count = found.interfaces.len();
        let kept = found.keep();
        self.keep_open(kept.multicast);
        for interface in found.interfaces {
            let mut fds = Vec::new();
            let device = interface.device(&mut fds);
            let plugged = Interface::of(&device);
            let of = Device::of(Of::Network);
            self.plug(of, DeviceConfig::Net(device), fds).await?;
            late.plugged(plugged);
        }
        late.numbered(kept.interfaces);
        let policy = late.wanted.netfilter;
        let request = AddNetworkRequest {
            interfaces: guest.interfaces,
            routes: guest.routes,
            neighbours: guest.neighbours,
            inherited: guest.sysctls,
            netfilter: guest.filter.request(policy).into(),
            ..AddNetworkRequest::default()
        };
        let looks = self.bus.read().await;
        let answer = self
            .agent
            .add_network(context::Context::default(), &request);
        let answer = self
            .call_within(self.timeouts.setup, "AddNetwork", answer)
            .await?;
        drop(looks);
        guest
            .filter
            .accept(&answer.netfilter_refused, policy, logger)?;
        if let Some(given) = guest.filter.given() {
            late.filtered(given);
            late.loaded(answer.netfilter_generation);
        }
        info!(logger, "the network's later parts were given to the running VM"; "interfaces" => count,
            "netfilter" => guest.filter.objects.len());
        Ok(())
    }
}

/// What the VMM does to plug a device into a VM of so much memory, and how long that is waited for.
pub(super) fn patience(
    device: &DeviceConfig,
    timeouts: &Timeouts,
    memory: u64,
) -> (String, Duration) {
    match device {
        DeviceConfig::Vfio(_) => {
            let what = format!(
                "plug the device, for which it pins all {} MiB of the VM's memory,",
                memory.div_ceil(MIB)
            );
            (what, ANSWER_LIMIT + timeouts.pinning(memory))
        }
        _ => ("plug the device".to_owned(), ANSWER_LIMIT),
    }
}

/// Waits for what the VMM answers, so long; it goes on with what it was asked to do.
pub(super) async fn wait<T>(
    heard: oneshot::Receiver<std::result::Result<T, ControlError>>,
    what: String,
    limit: Duration,
) -> std::result::Result<T, ControlError> {
    match timeout(limit, heard).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(ControlError::Ended),
        Err(_) => Err(ControlError::Silent { what, limit }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use slog::{Discard, o};
    use tokio::sync::mpsc;

    use crate::asked::config::Config;
    use crate::asked::spec::Network;
    use crate::guest::fakes::{Behaviour, FakeHost};
    use crate::guest::vm::Plan;
    use crate::guest::vm::boot::{Boot, Sandbox};

    #[tokio::test]
    async fn the_guest_looks_at_no_bus_from_which_a_device_is_being_taken() {
        let host = FakeHost::new(Behaviour {
            slow_bus: Duration::from_millis(100),
            ..Behaviour::default()
        });
        let record = host.record.clone();
        let (news, _hears) = mpsc::channel(64);
        let logger = slog::Logger::root(Discard, o!());
        let config = Config::defaults(Path::new("/nonexistent"));
        let plan = Plan::of(config, Network::New);
        let boot = Boot::start(host, plan, Sandbox::default(), news, logger);
        let vm = boot.ready().await.unwrap();
        let leaves = tokio::spawn({
            let vm = Arc::clone(&vm);
            async move { vm.unplug(0x21).await }
        });
        record.until("remove 0x21").await;
        // Two look at once, and neither before the VMM has taken the device.
        let (one, two) = tokio::join!(vm.find(0x22), vm.find(0x23));
        one.unwrap();
        two.unwrap();
        leaves.await.unwrap().unwrap();
        for find in ["find 0x22", "find 0x23"] {
            assert!(record.in_order("unplug 0x21", find));
        }
        assert!(record.in_order("find 0x23", "found 0x22"));
        // Nor is one taken while the guest looks.
        let looks = tokio::spawn({
            let vm = Arc::clone(&vm);
            async move { vm.find(0x24).await }
        });
        record.until("find 0x24").await;
        vm.unplug(0x22).await.unwrap();
        looks.await.unwrap().unwrap();
        assert!(record.in_order("found 0x24", "remove 0x22"));
    }
}
