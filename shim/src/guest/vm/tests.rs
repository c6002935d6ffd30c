//! What the shim does while the VMM does not answer: it takes as long as it takes, or nobody waits for it any more.

use std::io::Read as _;
use std::sync::Barrier;

use brig_hypervisor::control::{DeviceConfig, VfioConfig};
use rustix::pipe::PipeFlags;
use tokio::sync::mpsc;

use super::books::{Device, Of};
use super::boot::{Boot, Sandbox};
use super::*;
use crate::asked::config::Config;
use crate::asked::spec::Network;
use crate::guest::fakes::{Behaviour, FakeHost, Record};
use crate::node::vfio::open::Group;

const NAME: &str = "0000:3b:00.0";
const GIB: u64 = 1 << 30;

async fn boot(behaviour: Behaviour, memory: u64) -> (Result<Arc<Vm>>, Record) {
    let host = FakeHost::new(behaviour);
    let record = host.record.clone();
    (started(host, memory).await, record)
}

async fn started(host: Arc<FakeHost>, memory: u64) -> Result<Arc<Vm>> {
    let config = Config {
        time_scale: 0.1,
        memory,
        ..Config::defaults(Path::new("/nonexistent"))
    };
    let plan = Plan::of(config, Network::New);
    let (news, mut told) = mpsc::channel(64);
    tokio::spawn(async move { while told.recv().await.is_some() {} });
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let boot = Boot::start(host, plan, Sandbox::default(), news, logger);
    boot.ready().await
}

/// A group, and what is at its end when nobody holds it any more.
fn group() -> (Arc<Group>, std::fs::File) {
    let (end, held) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    (Arc::new(Group::new(Some(held), Vec::new())), end.into())
}

async fn let_go(mut end: std::fs::File) {
    let read = tokio::task::spawn_blocking(move || end.read(&mut [0]));
    assert_eq!(read.await.unwrap().unwrap(), 0);
}

fn entry(group: &Arc<Group>) -> Device {
    Device {
        of: Of::Group(7),
        _held: Some(Arc::clone(group)),
    }
}

fn device() -> (DeviceConfig, Vec<OwnedFd>) {
    let config = VfioConfig {
        device: 0,
        space: None,
        name: NAME.to_owned(),
    };
    let null = std::fs::File::open("/dev/null").unwrap();
    (DeviceConfig::Vfio(config), vec![null.into()])
}

#[tokio::test]
async fn a_device_that_comes_when_nobody_waits_any_more_goes_again_and_is_nobodys_until_then() {
    let answered = Arc::new(Barrier::new(2));
    let behaviour = Behaviour {
        slow_plug: Some(Arc::clone(&answered)),
        ..Behaviour::default()
    };
    let (vm, record) = boot(behaviour, GIB).await;
    let vm = vm.unwrap();
    let (group, end) = group();
    let (config, fds) = device();
    let asked = format!("plug {NAME}");
    tokio::select! {
        biased;
        _ = vm.plug(entry(&group), config, fds) => panic!("nothing was answered"),
        () = record.until(&asked) => {}
    }
    drop(group);
    // Another container of the pod does not get it, and an operator is told without waiting.
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let way = crate::node::vfio::Way::Groups;
    let refused = vm.give_group((7, way), "c", None, &logger).await;
    let message = refused.unwrap_err().message;
    assert!(
        message.contains("plug IOMMU group 7 and has not answered"),
        "{message}"
    );
    assert_eq!(vm.unsettled(), [message]);
    tokio::task::spawn_blocking(move || answered.wait())
        .await
        .unwrap();
    record.until("unplug 0x21").await;
    // No other pod has had it before.
    let_go(end).await;
    assert!(vm.unsettled().is_empty());
    vm.kill();
}

#[tokio::test]
async fn a_device_that_somebody_has_stays_until_it_is_given_back() {
    let (vm, record) = boot(Behaviour::default(), GIB).await;
    let vm = vm.unwrap();
    let (group, end) = group();
    let (config, fds) = device();
    let function = vm.plug(entry(&group), config, fds).await.unwrap();
    drop(group);
    assert!(vm.unsettled().is_empty() && !record.has("unplug 0x21"));
    vm.unplug(function).await.unwrap();
    let_go(end).await;
    vm.kill();
}

#[tokio::test]
async fn what_the_vmm_has_not_answered_is_let_go_of_with_its_process() {
    let behaviour = Behaviour {
        slow_plug: Some(Arc::new(Barrier::new(2))),
        ..Behaviour::default()
    };
    let host = FakeHost::new(behaviour);
    let vm = started(host.clone(), GIB).await.unwrap();
    let (group, end) = group();
    let (config, fds) = device();
    let plug = vm.plug(entry(&group), config, fds);
    let asked = format!("plug {NAME}");
    let (plugged, ()) = tokio::join!(plug, async {
        host.record.until(&asked).await;
        drop(group);
        // With its process goes the socket.
        host.crash("");
    });
    assert_eq!(plugged.unwrap_err().kind, Kind::Unavailable);
    let_go(end).await;
}

#[tokio::test]
async fn a_machine_whose_memory_is_pinned_has_more_time_to_be_built() {
    // A boot has two seconds here, and a GiB a tenth of one.
    let behaviour = Behaviour {
        slow_start: Duration::from_millis(2500),
        has_devices: true,
        ..Behaviour::default()
    };
    let (vm, _) = boot(behaviour.clone(), 256 * GIB).await;
    vm.unwrap().kill();
    let (vm, _) = boot(behaviour, 4 * GIB).await;
    let error = vm.unwrap_err();
    assert_eq!(error.kind, Kind::DeadlineExceeded);
    let said = "build the machine, for whose devices of the node it pins all 4096 MiB of the memory, within 2 s";
    assert!(error.message.contains(said), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_plug_that_pins_memory_says_so_when_it_takes_too_long() {
    let (told, heard) = oneshot::channel();
    let config = Config::defaults(Path::new("/nonexistent"));
    let (config, timeouts) = (device().0, Timeouts::of(&config));
    let (what, limit) = plug::patience(&config, &timeouts, 70 * GIB);
    assert_eq!(limit, control::ANSWER_LIMIT + Duration::from_secs(70));
    let silent = plug::wait::<()>(heard, what, limit).await.unwrap_err();
    assert_eq!(
        silent.to_string(),
        "the VMM did not plug the device, for which it pins all 71680 MiB of the VM's memory, within 190 s"
    );
    drop(told);
}
