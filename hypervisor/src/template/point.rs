//! Where a guest is captured: its agent says so at a port, and the CPU stays in that exit.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};

use super::cpu::CpuState;
use crate::control::exit;
use crate::notice::{Ended, Notice, Notifier};
use crate::sync::lock;

/// What the CPU's thread needs there.
pub struct CapturePoint {
    vm: Arc<VmFd>,
    cpuid: CpuId,
    msrs: Vec<u32>,
    /// Says that nothing interrupts the CPU any more.
    alone: Mutex<Receiver<()>>,
}

impl CapturePoint {
    /// For the CPU of `vm` that says it is `cpuid`; and how to say that it is alone.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, cpuid: CpuId, msrs: Vec<u32>) -> (Self, Sender<()>) {
        let (sender, alone) = channel();
        let point = Self {
            vm,
            cpuid,
            msrs,
            alone: Mutex::new(alone),
        };
        (point, sender)
    }

    /// Keeps the CPU here, which is in the exit of a port write: completes that, has the devices taken away ([`Notice::Still`]) and tells what
    /// the CPU is ([`Notice::Captured`]). Returns only if that fails.
    pub fn hold(&self, vcpu: &mut VcpuFd, notifier: &Notifier) -> Ended {
        // The instruction pointer moves when the exit is completed, which is the beginning of the next run.
        vcpu.set_kvm_immediate_exit(1);
        let completed = vcpu.run().map(|exit| format!("{exit:?}"));
        match completed {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return failed(format!("the CPU did not stop: {other:?}")),
        }
        notifier.send(Notice::Still);
        if lock(&self.alone).recv().is_err() {
            return failed("the devices cannot be taken away".to_owned());
        }
        match CpuState::read(vcpu, &self.vm, &self.cpuid, &self.msrs) {
            Ok(state) => notifier.send(Notice::Captured(Box::new(state))),
            Err(error) => return failed(error.to_string()),
        }
        loop {
            std::thread::park();
        }
    }
}

fn failed(reason: String) -> Ended {
    Ended {
        code: exit::INTERNAL,
        reason: format!("the guest cannot be captured: {reason}"),
    }
}
