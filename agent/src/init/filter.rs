//! Installing a seccomp program. seccompiler has a loader of its own, which forces
//! no_new_privs, and a container may rely on not having it (setuid programs).
use std::io;

use seccompiler::BpfProgram;

use super::failure::{Context as _, Result};

const SET_MODE_FILTER: libc::c_uint = 1;

/// A program and how it is to be installed.
#[derive(Debug)]
pub struct Filter {
    /// What the kernel runs at each system call.
    pub program: BpfProgram,
    /// seccomp(2) flags.
    pub flags: libc::c_ulong,
}

impl Filter {
    /// Installs the program on this thread.
    pub fn install(&self) -> Result<()> {
        let len = u16::try_from(self.program.len())
            .map_err(io::Error::other)
            .during("linux.seccomp")?;
        let fprog = libc::sock_fprog {
            len,
            filter: self.program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
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
            return Err(io::Error::last_os_error()).during("linux.seccomp: installing the filter");
        }
        Ok(())
    }
}
