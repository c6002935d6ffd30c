//! CPUs that a debugger stops and looks at.

use serde::{Deserialize, Serialize};

/// The most breakpoints at a time: an x86 CPU has no more.
pub const MAX_BREAKPOINTS: usize = 4;

/// What a debugger wants of the CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DebugRequest {
    /// They are to stop.
    Stop,
    /// They are to go on.
    Go {
        /// This one alone; the others stay where they are.
        only: Option<u8>,
        /// By one instruction.
        step: bool,
        /// Addresses of instructions at which a CPU stops, and all others with it; at most [`MAX_BREAKPOINTS`].
        breakpoints: Vec<u64>,
    },
    /// Whether they have stopped.
    State,
}

/// CPUs that stand still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// The one that has met a breakpoint or made its step.
    pub cpu: Option<u8>,
    /// What is in each.
    pub cpus: Vec<Registers>,
}

/// Registers of a CPU (Intel SDM, volume 1, section 3.4).
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names that the architecture gives them")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: u16,
    pub ss: u16,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
}
