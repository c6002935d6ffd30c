//! The program: TCP to 127.0.0.1 or ::1 goes to the listener of that family; everything else is looked up
//! as if the program were not there. bpf(2), the kernel's Documentation/bpf/prog_sk_lookup.rst.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::ForwardError;
use super::bpf::{self, Instruction, Reg};
use super::listen::Family;
use crate::node::network::Namespace;

/// Offsets into `struct bpf_sk_lookup`.
mod lookup {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_IP4: i16 = 40;
    pub const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];
}

/// `enum bpf_func_id`.
mod helper {
    pub const MAP_LOOKUP_ELEM: i32 = 1;
    pub const SK_RELEASE: i32 = 86;
    pub const SK_ASSIGN: i32 = 124;
}

const TCP: i32 = libc::IPPROTO_TCP;
const INET: i32 = libc::AF_INET;
const INET6: i32 = libc::AF_INET6;
/// `SK_PASS`: the lookup goes on, with the socket that was assigned if one was.
const PASS: i32 = 1;

impl Family {
    const fn key(self) -> u32 {
        match self {
            Self::V4 => 0,
            Self::V6 => 1,
        }
    }
}

/// Loads the program for these listeners and attaches it to the namespace; the link is what keeps it there.
///
/// # Errors
/// [`ForwardError::Kernel`].
pub fn attach(
    namespace: &Namespace,
    listeners: &[(Family, TcpListener)],
) -> Result<OwnedFd, ForwardError> {
    let program = load(listeners)?;
    bpf::attach(program.as_fd(), namespace.as_fd()).map_err(failed(
        "attach a BPF program to the pod's network namespace",
    ))
}

/// Loads the program for these listeners; it does nothing yet.
///
/// # Errors
/// [`ForwardError::Kernel`].
pub fn load(listeners: &[(Family, TcpListener)]) -> Result<OwnedFd, ForwardError> {
    let map = bpf::socket_map(2).map_err(failed("make a BPF socket map"))?;
    for (family, listener) in listeners {
        bpf::put_socket(map.as_fd(), family.key(), listener.as_fd())
            .map_err(failed("put a listener into a BPF socket map"))?;
    }
    bpf::load(&instructions(map.as_fd())).map_err(failed("load a BPF program"))
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> ForwardError {
    move |source| ForwardError::Kernel { step, source }
}

fn instructions(map: BorrowedFd<'_>) -> Vec<Instruction> {
    use Instruction as I;
    let loopback = |family: Family| -> Vec<(i16, i32)> {
        // As the words lie in memory, in network byte order.
        let word = |bytes: [u8; 4]| i32::from_ne_bytes(bytes);
        match family {
            Family::V4 => vec![(lookup::LOCAL_IP4, word([127, 0, 0, 1]))],
            Family::V6 => {
                let [a, b, c, d] = lookup::LOCAL_IP6;
                vec![(a, 0), (b, 0), (c, 0), (d, word([0, 0, 0, 1]))]
            }
        }
    };
    let mut program = Assembler::default();
    program.push(I::copy(Reg::R6, Reg::R1));
    program.push(I::load(Reg::R2, Reg::R6, lookup::PROTOCOL));
    program.pass_unless(Reg::R2, TCP);
    program.push(I::load(Reg::R2, Reg::R6, lookup::FAMILY));
    let to_v6 = program.jump_unless(Reg::R2, INET);
    program.match_address(&loopback(Family::V4));
    program.push(I::store(Reg::R10, KEY, Family::V4.key().cast_signed()));
    let to_assign = program.jump();
    program.land(to_v6);
    program.pass_unless(Reg::R2, INET6);
    program.match_address(&loopback(Family::V6));
    program.push(I::store(Reg::R10, KEY, Family::V6.key().cast_signed()));
    program.land(to_assign);
    program.push(I::copy(Reg::R2, Reg::R10));
    program.push(I::add(Reg::R2, KEY.into()));
    for half in I::load_map(Reg::R1, map) {
        program.push(half);
    }
    program.push(I::call(helper::MAP_LOOKUP_ELEM));
    program.pass_if(Reg::R0, 0);
    program.push(I::copy(Reg::R7, Reg::R0));
    program.push(I::copy(Reg::R1, Reg::R6));
    program.push(I::copy(Reg::R2, Reg::R0));
    program.push(I::set(Reg::R3, 0));
    program.push(I::call(helper::SK_ASSIGN));
    program.push(I::copy(Reg::R1, Reg::R7));
    program.push(I::call(helper::SK_RELEASE));
    program.finish()
}

/// Where on the stack the map's key is.
const KEY: i16 = -4;

/// Instructions with jumps forward, resolved when the place is known.
#[derive(Default)]
struct Assembler {
    instructions: Vec<Instruction>,
    /// Jumps to the end.
    passes: Vec<usize>,
}

impl Assembler {
    fn push(&mut self, instruction: Instruction) {
        self.instructions.push(instruction);
    }

    fn jump(&mut self) -> usize {
        self.push(Instruction::jump());
        self.instructions.len() - 1
    }

    fn jump_unless(&mut self, register: Reg, value: i32) -> usize {
        self.push(Instruction::jump_unless(register, value));
        self.instructions.len() - 1
    }

    fn pass_unless(&mut self, register: Reg, value: i32) {
        let jump = self.jump_unless(register, value);
        self.passes.push(jump);
    }

    fn pass_if(&mut self, register: Reg, value: i32) {
        self.push(Instruction::jump_if(register, value));
        self.passes.push(self.instructions.len() - 1);
    }

    /// Passes unless each word of the context has the value. R3 is used.
    fn match_address(&mut self, words: &[(i16, i32)]) {
        for (offset, value) in words {
            self.push(Instruction::load(Reg::R3, Reg::R6, *offset));
            self.pass_unless(Reg::R3, *value);
        }
    }

    /// Lets a jump end here.
    fn land(&mut self, jump: usize) {
        let distance = self.instructions.len() - jump - 1;
        // A program has a few dozen instructions.
        let distance = i16::try_from(distance).unwrap_or(0);
        self.instructions[jump].jumps_over(distance);
    }

    fn finish(mut self) -> Vec<Instruction> {
        for jump in std::mem::take(&mut self.passes) {
            self.land(jump);
        }
        self.push(Instruction::set(Reg::R0, PASS));
        self.push(Instruction::exit());
        self.instructions
    }
}
