//! The flags of files that `lsattr` and `chattr` show, and the project's number beside them: the only
//! ioctl(2) that a guest may ask of the host's files.
//!
//! The host's kernel decides as for a user namespace's root: immutable and append-only need a capability that the VMM
//! has nowhere, and a project's number stays what it is, because a node may bill by it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::errno;

/// `FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS`, `FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR` of linux/fs.h, with the bytes
/// that each reads or writes.
pub(super) const COMMANDS: [(u32, usize); 4] = [
    (0x8008_6601, 4),
    (0x4008_6602, 4),
    (0x801c_581f, 28),
    (0x401c_5820, 28),
];

/// What the kernel can at most write.
const LONGEST: usize = 32;

/// # Errors
/// `ENOTTY` for any other command, `EINVAL` for an argument of another length; what the host says.
pub(super) fn call(file: impl AsFd, command: u32, argument: &mut [u8]) -> io::Result<()> {
    let known = COMMANDS.iter().find(|(number, _)| *number == command);
    let (_, length) = known.ok_or_else(|| errno(libc::ENOTTY))?;
    if argument.len() != *length {
        return Err(errno(libc::EINVAL));
    }
    let mut buffer = [0u64; LONGEST / 8];
    // SAFETY: any bytes may be written over numbers, and these are as many as there are.
    let bytes: &mut [u8; LONGEST] = unsafe { &mut *buffer.as_mut_ptr().cast() };
    bytes[..*length].copy_from_slice(argument);
    let file = file.as_fd().as_raw_fd();
    // SAFETY: each of these commands reads or writes at most 28 bytes at an aligned address, which are there.
    let called = unsafe { libc::ioctl(file, libc::Ioctl::from(command), bytes.as_mut_ptr()) };
    nix::errno::Errno::result(called)?;
    argument.copy_from_slice(&bytes[..*length]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_command_reaches_the_host() {
        let file = std::fs::File::open("/dev/null").unwrap();
        for command in [0x5401, 0x8004_6601, 0xae80, u32::MAX] {
            let refused = call(&file, command, &mut [0; 4]).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY), "{command:x}");
        }
        for (command, length) in COMMANDS {
            for wrong in [0, length - 1, length + 1, 4096] {
                let refused = call(&file, command, &mut vec![0; wrong]).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
            }
        }
    }
}
