//! Installing seccomp programs. seccompiler compiles them, but its own loader forces
//! no_new_privs, which a container may rely on not having (setuid programs).
use std::io;

use seccompiler::{BpfProgram, sock_filter};

use super::failure::{Context as _, Result};

const SET_MODE_FILTER: libc::c_uint = 1;

/// Programs in the order of installation, and `SECCOMP_FILTER_FLAG_…` for each.
#[derive(Debug, Default)]
pub struct Filters {
    /// The kernel runs all of them; the strictest verdict counts, of equal ones the last installed.
    pub programs: Vec<BpfProgram>,
    /// seccomp(2) flags.
    pub flags: libc::c_ulong,
}

impl Filters {
    /// Installs every program on this thread.
    pub fn install(&self) -> Result<()> {
        for program in &self.programs {
            let len = u16::try_from(program.len())
                .map_err(io::Error::other)
                .during("linux.seccomp")?;
            let fprog = libc::sock_fprog {
                len,
                filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
            };
            // SAFETY: `fprog` and the instructions it points to live through the call, which copies
            // them; seccompiler's sock_filter has the kernel's layout (repr(C): u16, u8, u8, u32).
            let result = unsafe {
                libc::syscall(
                    libc::SYS_seccomp,
                    SET_MODE_FILTER,
                    self.flags,
                    &raw const fprog,
                )
            };
            if result != 0 {
                return Err(io::Error::last_os_error())
                    .during("linux.seccomp: installing the filter");
            }
        }
        Ok(())
    }
}

/// Puts a check before `program` that answers `errno` to system calls newer than `newest`. A profile
/// cannot name what did not exist when it was written; ENOSYS makes a C library fall back where
/// EPERM makes it fail.
pub fn refuse_newer(program: BpfProgram, newest: u32, errno: u32) -> BpfProgram {
    const LD_W_ABS: u16 = 0x20;
    const JMP_JGT_K: u16 = 0x25;
    const RET_K: u16 = 0x06;
    const X32_BIT: u32 = 0x4000_0000;
    let op = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut whole = vec![
        op(LD_W_ABS, 0, 0, 0),
        // x32 numbers are for the program itself to judge. Jumps are relative, so it moves as it is.
        op(JMP_JGT_K, 2, 0, X32_BIT - 1),
        op(JMP_JGT_K, 0, 1, newest),
        op(RET_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
    ];
    whole.extend(program);
    whole
}
