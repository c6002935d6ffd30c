//! Why a VM ended, as one sentence for the event, the error and the log.

use std::time::SystemTime;

use brig_hypervisor::control::exit;
use brig_hypervisor::launch::VmmExit;

use crate::error::Error;

/// Console lines that are quoted when none of them is the panic's own.
const QUOTED_LINES: usize = 3;
/// The longest quotation in characters, of the console or of the VMM's last words.
const QUOTED_CHARS: usize = 400;

/// The end of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// One sentence.
    pub reason: String,
    /// The host killed it for memory.
    pub oom: bool,
    /// Somebody killed it: that, or this process, or an operator.
    pub killed: bool,
    /// When it was noticed.
    pub at: SystemTime,
}

impl Death {
    /// Composes the sentence from how the process ended and from its last words.
    #[must_use]
    pub fn new(
        ended: Option<VmmExit>,
        oom: bool,
        console: &[String],
        last_error: Option<&str>,
        at: SystemTime,
    ) -> Self {
        let said = last_error
            .map(|line| format!(": {}", shortened(line)))
            .unwrap_or_default();
        let reason = match ended {
            _ if oom => {
                "the node killed the VM for memory (out of memory in the pod's cgroup); give the pod \
                 a larger memory limit"
                    .to_owned()
            }
            Some(VmmExit::Code(exit::POWER_OFF)) => "the guest powered off".to_owned(),
            Some(VmmExit::Code(exit::REBOOT)) => "the guest rebooted without being asked to".to_owned(),
            Some(VmmExit::Code(exit::PANIC)) => {
                format!("the guest kernel panicked: {}", quote(console))
            }
            Some(VmmExit::Code(exit::INTERNAL)) => format!("the VMM failed{said}"),
            Some(VmmExit::Code(exit::GUEST_FAULT)) => {
                format!("the guest broke a rule of the machine and was ended{said}")
            }
            Some(VmmExit::Code(exit::STOPPED)) => "the VM was stopped".to_owned(),
            Some(VmmExit::Code(exit::JAIL)) => format!("the VMM could not close its jail{said}"),
            Some(VmmExit::Code(code)) => format!("the VMM exited with status {code}{said}"),
            Some(VmmExit::Signal(libc::SIGSYS)) => {
                format!("the VMM was killed for a forbidden system call (SIGSYS){said}")
            }
            Some(VmmExit::Signal(libc::SIGBUS)) => {
                format!(
                    "the VMM was killed for memory that the node could not read (SIGBUS): a fault of its hardware, or, with \
                     image_layers = \"memory\", a layer of an image that has become shorter or cannot be read any more{said}"
                )
            }
            Some(VmmExit::Signal(signal)) => format!("the VMM was killed by signal {signal}{said}"),
            None => "the VMM ended in an unknown way".to_owned(),
        };
        let killed = oom || matches!(ended, Some(VmmExit::Signal(libc::SIGKILL | libc::SIGTERM)));
        Self {
            reason,
            oom,
            killed,
            at,
        }
    }

    /// The end of a VM that nobody saw.
    #[must_use]
    pub fn unknown() -> Self {
        Self::new(None, false, &[], None, SystemTime::now())
    }

    /// What a request gets that the end overtook.
    #[must_use]
    pub fn error(&self) -> Error {
        Error::unavailable(format!("the VM has ended: {}", self.reason))
    }
}

fn quote(console: &[String]) -> String {
    if console.is_empty() {
        return "its console said nothing".to_owned();
    }
    // The panic's own line says it; what follows is a stack, which the log has.
    let own = console.iter().rfind(|line| line.contains("Kernel panic"));
    let quoted = match own {
        Some(line) => line.clone(),
        None => console[console.len().saturating_sub(QUOTED_LINES)..].join(" | "),
    };
    shortened(without_time(&quoted))
}

fn shortened(text: &str) -> String {
    text.chars().take(QUOTED_CHARS).collect()
}

/// Takes the kernel's time stamp away from the beginning of a line.
fn without_time(line: &str) -> &str {
    match line.split_once("] ") {
        Some((time, rest)) if time.starts_with('[') => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(ended: VmmExit, console: &[&str], said: Option<&str>) -> String {
        let console: Vec<String> = console.iter().map(|&line| line.to_owned()).collect();
        Death::new(Some(ended), false, &console, said, SystemTime::now()).reason
    }

    #[test]
    fn each_end_has_its_own_sentence() {
        let code = VmmExit::Code;
        for (ended, expected) in [
            (code(exit::POWER_OFF), "powered off"),
            (code(exit::REBOOT), "rebooted"),
            (code(exit::PANIC), "panicked"),
            (code(exit::INTERNAL), "failed"),
            (code(exit::GUEST_FAULT), "broke a rule"),
            (code(exit::STOPPED), "stopped"),
            (code(exit::JAIL), "jail"),
            (code(77), "status 77"),
            (VmmExit::Signal(libc::SIGSYS), "forbidden system call"),
            (VmmExit::Signal(libc::SIGBUS), "layer of an image"),
            (VmmExit::Signal(libc::SIGKILL), "signal 9"),
        ] {
            let reason = reason(ended, &[], None);
            assert!(reason.contains(expected), "{ended:?}: {reason}");
        }
    }

    #[test]
    fn a_panic_quotes_its_own_line_and_nothing_else() {
        let console = [
            "boot",
            "[    0.58] Kernel panic - not syncing: no init",
            "CPU: 0",
        ];
        let reason = reason(VmmExit::Code(exit::PANIC), &console, None);
        assert!(
            reason.ends_with("panicked: Kernel panic - not syncing: no init"),
            "{reason}"
        );
        let long = vec!["x".repeat(5000)];
        let death = Death::new(
            Some(VmmExit::Code(exit::PANIC)),
            false,
            &long,
            None,
            SystemTime::now(),
        );
        assert!(death.reason.len() < 2 * QUOTED_CHARS);
    }

    #[test]
    fn memory_comes_first_and_the_vmms_last_words_are_told() {
        let killed = Some(VmmExit::Signal(libc::SIGKILL));
        let death = Death::new(killed, true, &[], None, SystemTime::now());
        assert!(death.reason.contains("memory") && death.oom);
        let said = reason(VmmExit::Code(exit::INTERNAL), &[], Some("KVM_RUN: EFAULT"));
        assert!(said.ends_with(": KVM_RUN: EFAULT"), "{said}");
    }

    #[test]
    fn the_vmms_last_words_are_cut() {
        let words = "é".repeat(60_000);
        for code in [exit::INTERNAL, exit::GUEST_FAULT, exit::JAIL, 77] {
            let reason = reason(VmmExit::Code(code), &[], Some(&words));
            assert!(reason.chars().count() < QUOTED_CHARS + 100, "{code}");
        }
    }
}
