//! Stops the CPUs of a VM for a debugger, tells what is in their registers, and lets them go on, each to its next
//! instruction or all to a breakpoint. For VMs that were started with [`crate::control::VmConfig::debugger`] alone.
//!
//! A CPU that is to stop is interrupted by a signal until it says that it stands. It has completed its last exit then,
//! so that its registers are those of a whole instruction. Guest memory is not looked at here: who debugs reads it from
//! outside. Breakpoints are those of the CPU, so nothing is written to it either. Trusts the shim, which asks.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use crate::control::{MAX_BREAKPOINTS, Registers, Stopped};
use crate::notice::{Notice, Notifier};

/// Between two signals to a CPU that does not stand yet: one that comes just before the CPU enters the guest is lost.
const AGAIN: Duration = Duration::from_millis(2);
/// The longest that the CPUs may take to stand. They are in the guest, or answer an exit.
const LIMIT: Duration = if cfg!(test) {
    Duration::from_millis(500)
} else {
    Duration::from_secs(10)
};
/// Bits of DR7: always set, and of a breakpoint that every task meets.
const DR7_FIXED: u64 = 1 << 10;
const DR7_GLOBAL: u64 = 2;

/// What the CPUs and the main thread share.
struct Shared {
    /// Whoever is about to enter the guest stops.
    wanted: AtomicBool,
}

/// How a CPU goes on.
struct Go {
    step: bool,
    breakpoints: Vec<u64>,
}

/// A CPU that stands.
struct Standing {
    cpu: u8,
    registers: Registers,
}

/// A CPU's end.
pub struct Debugged {
    cpu: u8,
    shared: Arc<Shared>,
    standing: Sender<Standing>,
    go: Receiver<Go>,
    notifier: Notifier,
}

impl Debugged {
    /// Whether the CPU is to stop before it enters the guest again.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.shared.wanted.load(Ordering::Acquire)
    }

    /// Keeps the CPU here, which has completed its last exit, until it may go on. `met`: it has stopped by itself, at a
    /// breakpoint or after its step, and all others are to.
    ///
    /// # Errors
    /// What KVM says; that the main thread is gone.
    pub fn stand(&self, vcpu: &VcpuFd, met: bool) -> io::Result<()> {
        let standing = Standing {
            cpu: self.cpu,
            registers: registers(vcpu)?,
        };
        let gone = |_| io::Error::other("the debugger is gone");
        self.standing.send(standing).map_err(|_| gone(()))?;
        if met {
            self.notifier.send(Notice::Met(self.cpu));
        }
        let go = self.go.recv().map_err(|_| gone(()))?;
        vcpu.set_guest_debug(&go.as_kvm_has_it())?;
        // The guest's watchdogs learn that it stood still. It fails if the guest does not use KVM's clock.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

impl Go {
    fn as_kvm_has_it(&self) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug::default();
        if self.step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        for (number, address) in self.breakpoints.iter().take(MAX_BREAKPOINTS).enumerate() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[number] = *address;
            // Length and kind are zero: an instruction.
            debug.arch.debugreg[7] |= DR7_FIXED | DR7_GLOBAL << (2 * number);
        }
        debug
    }
}

fn registers(vcpu: &VcpuFd) -> io::Result<Registers> {
    let general = vcpu.get_regs()?;
    let special = vcpu.get_sregs()?;
    Ok(Registers {
        rax: general.rax,
        rbx: general.rbx,
        rcx: general.rcx,
        rdx: general.rdx,
        rsi: general.rsi,
        rdi: general.rdi,
        rbp: general.rbp,
        rsp: general.rsp,
        r8: general.r8,
        r9: general.r9,
        r10: general.r10,
        r11: general.r11,
        r12: general.r12,
        r13: general.r13,
        r14: general.r14,
        r15: general.r15,
        rip: general.rip,
        rflags: general.rflags,
        cs: special.cs.selector,
        ss: special.ss.selector,
        ds: special.ds.selector,
        es: special.es.selector,
        fs: special.fs.selector,
        gs: special.gs.selector,
        fs_base: special.fs.base,
        gs_base: special.gs.base,
        cr0: special.cr0,
        cr3: special.cr3,
        cr4: special.cr4,
    })
}

/// The main thread's end.
pub struct Debugger {
    shared: Arc<Shared>,
    notifier: Notifier,
    sender: Sender<Standing>,
    receiver: Receiver<Standing>,
    cpus: Vec<(Sender<Go>, Option<JoinHandle<()>>)>,
    /// CPUs that stand, and what is in them.
    standing: BTreeMap<u8, Registers>,
    /// Which of them stopped by itself.
    met: Option<u8>,
}

impl Debugger {
    /// To be called before the filters are in force.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(notifier: Notifier) -> io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing)?;
        let (sender, receiver) = channel();
        Ok(Self {
            shared: Arc::new(Shared {
                wanted: AtomicBool::new(false),
            }),
            notifier,
            sender,
            receiver,
            cpus: Vec::new(),
            standing: BTreeMap::new(),
            met: None,
        })
    }

    /// The end of the next CPU, whose thread is to be given to [`Self::started`].
    pub fn next_cpu(&mut self) -> Debugged {
        let (sender, go) = channel();
        // No more than 64.
        let cpu = u8::try_from(self.cpus.len()).unwrap_or(u8::MAX);
        self.cpus.push((sender, None));
        Debugged {
            cpu,
            shared: Arc::clone(&self.shared),
            standing: self.sender.clone(),
            go,
            notifier: self.notifier.clone(),
        }
    }

    /// The thread of the CPU that was taken last.
    pub fn started(&mut self, thread: JoinHandle<()>) {
        if let Some((_, place)) = self.cpus.last_mut() {
            *place = Some(thread);
        }
    }

    /// Stops all CPUs; what is in them.
    ///
    /// # Errors
    /// If one does not stop. The others go on then.
    pub fn stop(&mut self) -> io::Result<Stopped> {
        self.shared.wanted.store(true, Ordering::Release);
        let since = Instant::now();
        while self.standing.len() < self.cpus.len() {
            match self.receiver.recv_timeout(AGAIN) {
                Ok(one) => drop(self.standing.insert(one.cpu, one.registers)),
                Err(RecvTimeoutError::Timeout) if since.elapsed() > LIMIT => {
                    self.release(None, false, &[]);
                    return Err(io::Error::other("a CPU does not stop"));
                }
                Err(_) => self.interrupt(),
            }
        }
        Ok(Stopped {
            cpu: self.met,
            cpus: self.standing.values().cloned().collect(),
        })
    }

    fn interrupt(&self) {
        for (cpu, (_, thread)) in (0u8..).zip(&self.cpus) {
            if let Some(thread) = thread
                .as_ref()
                .filter(|_| !self.standing.contains_key(&cpu))
            {
                // A thread that has ended has said so.
                let _ = thread.kill(SIGRTMIN());
            }
        }
    }

    /// A CPU has stopped by itself: the others are to, unless it has been let go meanwhile.
    ///
    /// # Errors
    /// As those of [`Self::stop`].
    pub fn met(&mut self, cpu: u8) -> io::Result<()> {
        while let Ok(one) = self.receiver.try_recv() {
            self.standing.insert(one.cpu, one.registers);
        }
        if !self.standing.contains_key(&cpu) {
            return Ok(());
        }
        self.met = Some(cpu);
        self.stop().map(drop)
    }

    /// What is in the CPUs, if all of them stand.
    #[must_use]
    pub fn stopped(&self) -> Option<Stopped> {
        (!self.cpus.is_empty() && self.standing.len() == self.cpus.len()).then(|| Stopped {
            cpu: self.met,
            cpus: self.standing.values().cloned().collect(),
        })
    }

    /// Lets the CPUs go on, to a breakpoint, if there is one: all, or one, while the others stay where they are; with
    /// `step` by one instruction.
    ///
    /// # Errors
    /// As those of [`Self::stop`], for CPUs that run: they may be on their way to a breakpoint of before.
    pub fn go(&mut self, only: Option<u8>, step: bool, breakpoints: &[u64]) -> io::Result<()> {
        self.stop()?;
        self.release(only, step, breakpoints);
        Ok(())
    }

    fn release(&mut self, only: Option<u8>, step: bool, breakpoints: &[u64]) {
        self.met = None;
        self.shared.wanted.store(false, Ordering::Release);
        for (cpu, (go, _)) in (0u8..).zip(&self.cpus) {
            if only.is_none_or(|one| one == cpu) && self.standing.remove(&cpu).is_some() {
                // A CPU that is gone has said so.
                let breakpoints = breakpoints.to_vec();
                let _ = go.send(Go { step, breakpoints });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::Clock;

    fn debugger() -> (Debugger, Receiver<Notice>) {
        let (notifier, notices, _) = Notifier::new(Clock::start()).unwrap();
        let debugger = Debugger::new(notifier);
        (debugger.unwrap(), notices)
    }

    /// A CPU that does nothing else than to stop when it is to; tells how it goes on.
    fn cpu(debugger: &mut Debugger, goes: &Sender<(u8, bool, Vec<u64>)>) {
        let debugged = debugger.next_cpu();
        let goes = goes.clone();
        debugger.started(std::thread::spawn(move || {
            loop {
                while !debugged.is_wanted() {
                    std::thread::park_timeout(Duration::from_millis(1));
                }
                let registers = Registers {
                    rip: 0x1000 + u64::from(debugged.cpu),
                    ..Registers::default()
                };
                let standing = Standing {
                    cpu: debugged.cpu,
                    registers,
                };
                if debugged.standing.send(standing).is_err() {
                    return;
                }
                let Ok(go) = debugged.go.recv() else { return };
                goes.send((debugged.cpu, go.step, go.breakpoints)).unwrap();
                // Until all have heard of it.
                std::thread::sleep(Duration::from_millis(20));
            }
        }));
    }

    #[test]
    fn all_cpus_stop_and_one_makes_a_step_while_the_others_stand() {
        let (mut debugger, _notices) = debugger();
        let (goes, went) = channel();
        cpu(&mut debugger, &goes);
        cpu(&mut debugger, &goes);
        assert!(debugger.stopped().is_none());
        let stopped = debugger.stop().unwrap();
        let at: Vec<_> = stopped.cpus.iter().map(|cpu| cpu.rip).collect();
        assert_eq!(at, [0x1000, 0x1001]);
        debugger.go(Some(1), true, &[7]).unwrap();
        assert_eq!(went.recv().unwrap(), (1, true, vec![7]));
        assert!(debugger.stopped().is_none());
        // It has made its step.
        debugger.shared.wanted.store(true, Ordering::Release);
        while debugger.stopped().is_none() {
            debugger.met(1).unwrap();
        }
        assert_eq!(debugger.stopped().unwrap().cpu, Some(1));
        debugger.go(None, false, &[]).unwrap();
        let mut both = [went.recv().unwrap(), went.recv().unwrap()];
        both.sort();
        assert_eq!(both, [(0, false, vec![]), (1, false, vec![])]);
        // Heard of late: it has been let go.
        debugger.met(1).unwrap();
        assert!(debugger.stopped().is_none());
    }

    #[test]
    fn a_cpu_that_does_not_stop_is_an_error_and_the_others_go_on() {
        let (mut debugger, _notices) = debugger();
        let (goes, went) = channel();
        cpu(&mut debugger, &goes);
        let _deaf = debugger.next_cpu();
        debugger.started(std::thread::spawn(|| {
            std::thread::sleep(2 * LIMIT);
        }));
        assert!(debugger.stop().is_err());
        assert_eq!(went.recv().unwrap(), (0, false, vec![]));
    }

    #[test]
    fn breakpoints_and_steps_are_as_kvm_has_them() {
        let go = |step, breakpoints: &[u64]| {
            let breakpoints = breakpoints.to_vec();
            Go { step, breakpoints }.as_kvm_has_it()
        };
        assert_eq!(go(false, &[]).control, 0);
        assert_eq!(go(true, &[]).control, 3);
        let two = go(false, &[0x10, 0x20]);
        assert_eq!(two.control, 0x2_0001);
        assert_eq!(two.arch.debugreg[..2], [0x10, 0x20]);
        assert_eq!(two.arch.debugreg[7], 0x40a);
        assert_eq!(go(false, &[1; 9]).arch.debugreg[7], 0x4aa);
    }
}
