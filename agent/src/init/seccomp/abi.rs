//! The three ways in which a program of this machine calls the kernel, and what a name of a profile is in each.
//!
//! As libseccomp has it: a name that an ABI lacks is skipped there; what i386 does through `socketcall` and `ipc` is
//! judged there by the first argument, which says what is meant.

use crate::init::syscalls;

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` of linux/audit.h, which seccomp programs are given.
pub const AUDIT_X86_64: u32 = 0xc000_003e;
/// See [`AUDIT_X86_64`].
pub const AUDIT_I386: u32 = 0x4000_0003;
/// Marks the numbers of x32 programs, which are of x86_64 otherwise.
pub const X32_BIT: u32 = 0x4000_0000;

/// What libseccomp knows, and no program of this machine is: naming them changes nothing.
const ELSEWHERE: [&str; 20] = [
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
];

/// What `socketcall` does, by its first argument (linux/net.h).
const SOCKETCALL: [(&str, u32); 20] = [
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];

/// What `ipc` does, by its first argument (linux/ipc.h).
const IPC: [(&str, u32); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// How a program calls the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// 64-bit programs.
    X86_64,
    /// 32-bit programs.
    I386,
    /// Programs with 64-bit registers and 32-bit pointers.
    X32,
}

/// A call that a name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// As seccomp programs see it.
    pub number: u32,
    /// What the first argument has to be for it to be that call.
    pub selector: Option<u32>,
}

impl Abi {
    /// The ABIs of `linux.seccomp.architectures`; x86_64 is always one.
    ///
    /// # Errors
    /// A sentence that names what is no architecture.
    pub fn named(names: &[String]) -> Result<Vec<Self>, String> {
        let mut abis = vec![Self::X86_64];
        for name in names {
            let abi = match name.as_str() {
                "SCMP_ARCH_X86_64" => Self::X86_64,
                "SCMP_ARCH_X86" => Self::I386,
                "SCMP_ARCH_X32" => Self::X32,
                other if ELSEWHERE.contains(&other) => continue,
                other => {
                    return Err(format!(
                        "linux.seccomp.architectures: {other:?} is not known; this machine's are \
                         SCMP_ARCH_X86_64, SCMP_ARCH_X86 and SCMP_ARCH_X32"
                    ));
                }
            };
            if !abis.contains(&abi) {
                abis.push(abi);
            }
        }
        Ok(abis)
    }

    /// Whether arguments have 32 bits.
    pub fn is_narrow(self) -> bool {
        self != Self::X86_64
    }

    /// The calls that `name` means in this ABI: none if it has it not, two where there are two ways to it.
    pub fn calls(self, name: &str) -> impl Iterator<Item = Call> {
        let numbers = syscalls::numbers(name);
        let direct = numbers.and_then(|numbers| match self {
            Self::X86_64 => numbers.x86_64.map(u32::from),
            Self::I386 => numbers.i386.map(u32::from),
            Self::X32 => numbers.x32.map(|number| u32::from(number) | X32_BIT),
        });
        let direct = direct.map(|number| Call {
            number,
            selector: None,
        });
        let selected = (self == Self::I386).then(|| multiplexed(name)).flatten();
        direct.into_iter().chain(selected)
    }
}

fn multiplexed(name: &str) -> Option<Call> {
    let of = |table: &[(&str, u32)], through: &str| {
        let (_, selector) = table.iter().find(|(known, _)| *known == name)?;
        let number = syscalls::numbers(through)?.i386?;
        Some(Call {
            number: number.into(),
            selector: Some(*selector),
        })
    };
    of(&SOCKETCALL, "socketcall").or_else(|| of(&IPC, "ipc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(abi: Abi, name: &str) -> Vec<(u32, Option<u32>)> {
        let calls = abi.calls(name);
        calls.map(|call| (call.number, call.selector)).collect()
    }

    #[test]
    fn a_name_is_looked_up_in_each_abi() {
        assert_eq!(calls(Abi::X86_64, "ioctl"), [(16, None)]);
        assert_eq!(calls(Abi::I386, "ioctl"), [(54, None)]);
        assert_eq!(calls(Abi::X32, "ioctl"), [(X32_BIT + 514, None)]);
        assert_eq!(calls(Abi::X86_64, "fstat64"), []);
        assert_eq!(calls(Abi::I386, "fstat64"), [(197, None)]);
        assert_eq!(calls(Abi::X32, "_sysctl"), []);
    }

    #[test]
    fn sockets_and_ipc_of_i386_have_two_ways_or_one() {
        assert_eq!(calls(Abi::I386, "socket"), [(359, None), (102, Some(1))]);
        assert_eq!(calls(Abi::I386, "accept"), [(102, Some(5))]);
        assert_eq!(calls(Abi::I386, "semop"), [(117, Some(1))]);
        assert_eq!(calls(Abi::I386, "shmget"), [(395, None), (117, Some(23))]);
        assert_eq!(calls(Abi::I386, "socketcall"), [(102, None)]);
        assert_eq!(calls(Abi::X86_64, "accept"), [(43, None)]);
    }

    #[test]
    fn architectures_are_those_of_the_machine_and_x86_64_is_always_there() {
        let named = |names: &[&str]| {
            Abi::named(
                &names
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(named(&[]).unwrap(), [Abi::X86_64]);
        assert_eq!(
            named(&["SCMP_ARCH_X86", "SCMP_ARCH_AARCH64", "SCMP_ARCH_X86"]).unwrap(),
            [Abi::X86_64, Abi::I386]
        );
        assert!(
            named(&["SCMP_ARCH_X86_32"])
                .unwrap_err()
                .contains("SCMP_ARCH_X86_32")
        );
    }
}
