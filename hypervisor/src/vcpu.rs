//! A CPU thread: runs the guest and answers its exits.
//!
//! Every port, address and value comes from the guest. What nothing answers reads as all ones.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use brig_agent_protocol::{BOOT_MARK_PORT, BootMark};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch::x86_64::{acpi, layout};
use crate::console::Console;
use crate::control::exit;
use crate::debugger::Debugged;
use crate::exits::{ExitCounters, Reason, UnknownPorts};
use crate::notice::{Ended, Notice, Notifier};
use crate::pci::bus::Bus;
use crate::sync::lock;
use crate::template::point::CapturePoint;

/// What all CPUs share.
pub struct Machine {
    /// ECAM and BARs.
    pub bus: Arc<Bus>,
    /// The debug console.
    pub console: Mutex<Console>,
    /// To the main thread.
    pub notifier: Notifier,
    /// Ports that nothing answers.
    pub unknown_ports: UnknownPorts,
    /// Which of the two boot marks were seen.
    pub marks: [AtomicBool; 2],
    /// The guest is booted to be captured.
    pub capture: Option<CapturePoint>,
}

impl Machine {
    /// A machine around a bus.
    #[must_use]
    pub fn new(bus: Arc<Bus>, notifier: Notifier) -> Self {
        Self {
            bus,
            console: Mutex::default(),
            notifier,
            unknown_ports: UnknownPorts::default(),
            marks: Default::default(),
            capture: None,
        }
    }

    /// Where to be captured, if that is what the guest's write to a port means.
    fn capture_point(&self, port: u16, data: &[u8]) -> Option<&CapturePoint> {
        let said = port == BOOT_MARK_PORT && data == [BootMark::Still as u8];
        self.capture.as_ref().filter(|_| said)
    }

    /// A write to an I/O port; an end is returned if it ends the VM.
    pub fn port_write(&self, port: u16, data: &[u8], exits: &ExitCounters) -> Option<Ended> {
        let first = data.first().copied().unwrap_or(0);
        match port {
            BOOT_MARK_PORT => {
                exits.count(Reason::OutBootMark);
                self.boot_mark(first);
            }
            port if layout::CONSOLE_PORTS.contains(&port) => {
                exits.count(Reason::OutConsole);
                self.console_write(port - layout::CONSOLE_PORTS.start, data);
            }
            layout::SLEEP_CONTROL_PORT => {
                exits.count(Reason::OutAcpi);
                if acpi::is_power_off(first) {
                    return Some(ended(exit::POWER_OFF, "the guest powered off"));
                }
            }
            layout::SLEEP_STATUS_PORT => exits.count(Reason::OutAcpi),
            layout::RESET_PORT => {
                exits.count(Reason::OutAcpi);
                return Some(self.reset());
            }
            _ => {
                exits.count(Reason::OutUnknown);
                self.unknown_ports.count(true, port);
            }
        }
        None
    }

    /// A read of an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8], exits: &ExitCounters) {
        data.fill(0xff);
        match port {
            port if layout::CONSOLE_PORTS.contains(&port) => {
                exits.count(Reason::InConsole);
                data.fill(lock(&self.console).read(port - layout::CONSOLE_PORTS.start));
            }
            layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT => {
                exits.count(Reason::InAcpi);
                data.fill(0);
            }
            _ => {
                exits.count(Reason::InUnknown);
                self.unknown_ports.count(false, port);
            }
        }
    }

    /// A read of an address that is not RAM.
    pub fn memory_read(&self, address: u64, data: &mut [u8], exits: &ExitCounters) {
        if layout::ECAM.contains(&address) {
            exits.count(Reason::EcamRead);
            self.bus.ecam_read(address - layout::ECAM.start, data);
        } else if self.bus.memory_read(address, data) {
            exits.count(Reason::BarRead);
        } else {
            exits.count(Reason::MmioReadUnknown);
        }
    }

    /// A write to an address that is not RAM.
    pub fn memory_write(&self, address: u64, data: &[u8], exits: &ExitCounters) {
        if layout::ECAM.contains(&address) {
            exits.count(Reason::EcamWrite);
            self.bus.ecam_write(address - layout::ECAM.start, data);
        } else if self.bus.memory_write(address, data) {
            exits.count(Reason::BarWrite);
        } else {
            exits.count(Reason::MmioWriteUnknown);
        }
    }

    /// A triple fault or a write to the reset register: after a panic, that is its last act.
    fn reset(&self) -> Ended {
        let mut console = lock(&self.console);
        self.flush(&mut console);
        match console.panic() {
            Some(panic) => ended(exit::PANIC, format!("the guest's kernel panicked: {panic}")),
            None => ended(exit::REBOOT, "the guest rebooted"),
        }
    }

    /// The end of a CPU's run, whatever its reason: an unfinished line may say more about it.
    fn last_line(&self) {
        self.flush(&mut lock(&self.console));
    }

    fn flush(&self, console: &mut Console) {
        if let Some(line) = console.flush() {
            self.notifier.send(Notice::Console(line));
        }
    }

    /// Only the two known marks, each once: a guest cannot flood the shim with them.
    fn boot_mark(&self, mark: u8) {
        let index = match mark {
            mark if mark == BootMark::Init as u8 => 0,
            mark if mark == BootMark::AgentReady as u8 => 1,
            _ => return,
        };
        if !self.marks[index].swap(true, Ordering::Relaxed) {
            self.notifier.send(Notice::Mark {
                mark,
                micros: self.notifier.micros(),
            });
        }
    }

    fn console_write(&self, register: u16, data: &[u8]) {
        let mut console = lock(&self.console);
        for byte in data {
            if let Some(line) = console.write(register, *byte) {
                self.notifier.send(Notice::Console(line));
            }
        }
    }
}

fn ended(code: i32, reason: impl Into<String>) -> Ended {
    Ended {
        code,
        reason: reason.into(),
    }
}

/// Runs a CPU until the VM ends.
pub fn run(
    vcpu: &mut VcpuFd,
    machine: &Arc<Machine>,
    exits: &ExitCounters,
    debugged: Option<&Debugged>,
) -> Ended {
    let ended = run_until_end(vcpu, machine, exits, debugged);
    machine.last_line();
    ended
}

fn run_until_end(
    vcpu: &mut VcpuFd,
    machine: &Machine,
    exits: &ExitCounters,
    debugged: Option<&Debugged>,
) -> Ended {
    loop {
        // Its last exit is completed then, and no more.
        let stop = debugged.filter(|debugged| debugged.is_wanted());
        if debugged.is_some() {
            vcpu.set_kvm_immediate_exit(u8::from(stop.is_some()));
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(point) = machine.capture_point(port, data) {
                    exits.count(Reason::OutBootMark);
                    return point.hold(vcpu, &machine.notifier);
                }
                if let Some(ended) = machine.port_write(port, data, exits) {
                    return ended;
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => machine.port_read(port, data, exits),
            Ok(VcpuExit::MmioRead(address, data)) => machine.memory_read(address, data, exits),
            Ok(VcpuExit::MmioWrite(address, data)) => machine.memory_write(address, data, exits),
            Ok(VcpuExit::Hlt) => exits.count(Reason::Halt),
            Ok(VcpuExit::Intr) => exits.count(Reason::Interrupted),
            Ok(VcpuExit::Debug(_)) => {
                exits.count(Reason::Debug);
                if let Some(debugged) = debugged
                    && let Err(error) = debugged.stand(vcpu, true)
                {
                    return not_debugged(&error);
                }
            }
            Ok(VcpuExit::Shutdown) => {
                exits.count(Reason::Shutdown);
                return machine.reset();
            }
            Ok(VcpuExit::InternalError) => {
                exits.count(Reason::InternalError);
                return internal_error(vcpu);
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return ended(
                    exit::GUEST_FAULT,
                    format!("the CPU refused to enter the guest (hardware reason {reason:#x})"),
                );
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return ended(
                    exit::GUEST_FAULT,
                    format!("the guest touched memory that cannot be given at {gpa:#x}"),
                );
            }
            Ok(other) => {
                exits.count(Reason::Other);
                return ended(
                    exit::GUEST_FAULT,
                    format!("the guest caused an exit that is not handled: {other:?}"),
                );
            }
            Err(error) => {
                let source = io::Error::from(error);
                match source.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => {
                        exits.count(Reason::Interrupted);
                        if let Some(debugged) = stop
                            && let Err(error) = debugged.stand(vcpu, false)
                        {
                            return not_debugged(&error);
                        }
                    }
                    Some(libc::EFAULT) => {
                        return ended(
                            exit::INTERNAL,
                            "the node could not give the guest a page of its memory, or of a file that is part of it: KVM_RUN \
                             failed with EFAULT",
                        );
                    }
                    _ => {
                        return ended(exit::INTERNAL, format!("KVM_RUN failed: {source}"));
                    }
                }
            }
        }
    }
}

fn not_debugged(error: &io::Error) -> Ended {
    ended(
        exit::INTERNAL,
        format!("the CPU cannot be debugged: {error}"),
    )
}

/// KVM gave up on the guest, mostly an instruction it cannot emulate.
fn internal_error(vcpu: &mut VcpuFd) -> Ended {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, whose union member this is.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    let what = match suberror {
        1 => "an instruction KVM cannot emulate",
        2 | 3 => "a fault while another was being delivered",
        _ => "an internal error of KVM",
    };
    ended(
        exit::GUEST_FAULT,
        format!("the guest met {what} at {rip:#x} (suberror {suberror})"),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::notice::Clock;

    fn machine() -> (Machine, std::sync::mpsc::Receiver<Notice>) {
        let (notifier, notices, _) = Notifier::new(Clock::start()).unwrap();
        (
            Machine::new(Arc::new(Bus::new(vec![layout::MMIO32])), notifier),
            notices,
        )
    }

    fn print(machine: &Machine, text: &str) {
        for byte in text.bytes() {
            machine.port_write(0x3f8, &[byte], &ExitCounters::default());
        }
    }

    #[test]
    fn power_off_reset_and_panic_end_with_their_own_codes() {
        let exits = ExitCounters::default();
        let (machine, _notices) = machine();
        assert_eq!(machine.port_write(0x600, &[0x14], &exits), None);
        let code = |ended: Option<Ended>| ended.map(|ended| ended.code);
        assert_eq!(
            code(machine.port_write(0x600, &[0x34], &exits)),
            Some(exit::POWER_OFF)
        );
        assert_eq!(
            code(machine.port_write(0x602, &[1], &exits)),
            Some(exit::REBOOT)
        );
        print(&machine, "Kernel panic - not syncing: oh\n");
        let ended = machine.reset();
        assert_eq!(ended.code, exit::PANIC);
        assert!(ended.reason.contains("oh"));
    }

    #[test]
    fn each_known_boot_mark_is_reported_once_and_others_never() {
        let exits = ExitCounters::default();
        let (machine, notices) = machine();
        for mark in [0xb1, 0xb1, 0x00, 0xb2, 0xff, 0xb2] {
            machine.port_write(BOOT_MARK_PORT, &[mark], &exits);
        }
        let marks: Vec<u8> = notices
            .try_iter()
            .filter_map(|notice| match notice {
                Notice::Mark { mark, .. } => Some(mark),
                _ => None,
            })
            .collect();
        assert_eq!(marks, [0xb1, 0xb2]);
    }

    #[test]
    fn what_nothing_answers_reads_as_all_ones_and_is_counted() {
        let exits = ExitCounters::default();
        let (machine, _notices) = machine();
        let mut data = [0u8; 4];
        machine.port_read(0x70, &mut data, &exits);
        assert_eq!(data, [0xff; 4]);
        machine.memory_read(0xd000_0000, &mut data, &exits);
        assert_eq!(data, [0xff; 4]);
        machine.port_read(0x3fd, &mut data[..1], &exits);
        assert_eq!(data[0], 0x60);
        let mut totals = BTreeMap::new();
        exits.add_to(&mut totals);
        machine.unknown_ports.add_to(&mut totals);
        assert_eq!(totals["io_in:port 0x0070"], 1);
        assert_eq!(totals["mmio_read:unknown"], 1);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            port: u16, address: u64, data in prop::collection::vec(any::<u8>(), 1..9)
        ) {
            let exits = ExitCounters::default();
            let (machine, _notices) = machine();
            let mut buffer = data.clone();
            machine.port_write(port, &data, &exits);
            machine.port_read(port, &mut buffer, &exits);
            machine.memory_write(address, &data, &exits);
            machine.memory_read(address, &mut buffer, &exits);
        }
    }
}
