//! What tells a file from all others.
//!
//! A local file system gives a number to no other file as long as a descriptor of the first one is open. A server has
//! never heard of a descriptor that is open here: when another client removes the file, its number is the next one's. The
//! file handle is not, because the server made it to be kept; NFS's is its own, and others' have at least a generation.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use rustix::fs::{FileType, Statx, StatxFlags};

use super::stat;

/// The longest that there is: `MAX_HANDLE_SZ`.
const LONGEST: usize = 128;

/// Tells a file from all others, as long as a descriptor of it is open or [`Self::beyond`] is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
    /// The same file below two mounts is two: one may be read-only.
    pub(super) mount: u64,
    /// What two files of one number differ in; where a server or a process gives the numbers.
    pub(super) beyond: Option<Arc<Beyond>>,
}

/// What is known of a file beside its number.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Beyond {
    /// `S_IFMT` of its mode.
    kind: u32,
    /// Of its birth, the seconds and nanoseconds: SMB's files have nothing else. It is not asked for, because a FUSE server
    /// would have to answer a request for it each time.
    born: Option<(i64, u32)>,
    handle: Option<Handle>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

impl Beyond {
    /// One system call, which asks no server.
    ///
    /// # Errors
    /// What the host says, unless it is that there are no handles.
    pub(super) fn of(file: impl AsFd, seen: &Statx) -> io::Result<Self> {
        let born = (seen.stx_mask & StatxFlags::BTIME.bits() != 0)
            .then_some((seen.stx_btime.tv_sec, seen.stx_btime.tv_nsec));
        Ok(Self {
            kind: FileType::as_raw_mode(stat::kind(seen)),
            born,
            handle: handle(file)?,
        })
    }
}

/// `struct file_handle` of linux/fs.h.
#[repr(C)]
struct Told {
    bytes: u32,
    kind: i32,
    handle: [u8; LONGEST],
}

/// A file's handle, if its file system makes any.
fn handle(file: impl AsFd) -> io::Result<Option<Handle>> {
    let empty = libc::AT_EMPTY_PATH;
    let told = match ask(&file, empty | libc::AT_HANDLE_FID) {
        // Before Linux 6.5 all handles were to be opened some day.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => ask(&file, empty),
        told => told,
    };
    match told {
        Ok(told) => {
            let bytes = usize::try_from(told.bytes).ok();
            let bytes = bytes.and_then(|bytes| told.handle.get(..bytes));
            Ok(bytes.map(|bytes| Handle {
                kind: told.kind,
                bytes: bytes.into(),
            }))
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EOVERFLOW | libc::ENOSYS) => Ok(None),
            _ => Err(error),
        },
    }
}

fn ask(file: impl AsFd, flags: i32) -> io::Result<Told> {
    let mut told = Told {
        bytes: u32::try_from(LONGEST).unwrap_or_default(),
        kind: 0,
        handle: [0; LONGEST],
    };
    let mut mount: libc::c_int = 0;
    // SAFETY: the kernel reads an empty name, and writes an int and at most as many bytes of a handle as `told` says that it
    // has, behind the two numbers that it begins with as the kernel's struct does.
    let asked = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut told,
            &raw mut mount,
            flags,
        )
    };
    nix::errno::Errno::result(asked)?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    fn of(path: &Path) -> Beyond {
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let file: OwnedFd = openat(CWD, path, flags, Mode::empty()).unwrap();
        let seen = stat::look(&file, StatxFlags::empty()).unwrap();
        Beyond::of(&file, &seen).unwrap()
    }

    #[test]
    fn a_file_is_the_same_whichever_descriptor_is_asked_and_no_other_is() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("one"), "").unwrap();
        fs::write(at("two"), "").unwrap();
        std::os::unix::fs::symlink("one", at("link")).unwrap();
        fs::hard_link(at("one"), at("other name")).unwrap();
        assert!(of(&at("one")).handle.is_some());
        assert_eq!(of(&at("one")), of(&at("other name")));
        assert_ne!(of(&at("one")), of(&at("two")));
        assert_ne!(of(&at("one")), of(&at("link")));
        let before = of(&at("one"));
        fs::rename(at("one"), at("moved")).unwrap();
        fs::write(at("moved"), "more").unwrap();
        assert_eq!(of(&at("moved")), before);
    }

    #[test]
    fn files_of_a_file_system_that_opens_none_by_its_handle_are_told_apart_too() {
        let directory = of(Path::new("/proc/self/fd"));
        let file = of(Path::new("/proc/version"));
        assert_ne!(directory, file);
        assert_eq!(file, of(Path::new("/proc/version")));
    }
}
