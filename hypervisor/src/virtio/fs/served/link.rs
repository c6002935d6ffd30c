//! Hard links without `CAP_DAC_READ_SEARCH`.
//!
//! The library links by `linkat(AT_EMPTY_PATH)`, which wants that capability in the node's own user
//! namespace (and only since Linux 6.10 another way). The VMM has it nowhere, so the link is made through
//! `/proc/self/fd`, which wants none. The library lends a descriptor of an inode to one kind of caller
//! only: a DAX mapper. [`Borrower`] is one that maps nothing.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::FsCacheReqHandler;

use super::errno;

/// Keeps a copy of the descriptor it is lent.
struct Borrower(Option<OwnedFd>);

impl FsCacheReqHandler for Borrower {
    fn map(
        &mut self,
        _offset: u64,
        _mapped: u64,
        _length: u64,
        _flags: u64,
        fd: RawFd,
    ) -> io::Result<()> {
        // SAFETY: the library keeps the descriptor open during this call.
        let lent = unsafe { BorrowedFd::borrow_raw(fd) };
        self.0 = Some(lent.try_clone_to_owned()?);
        Ok(())
    }

    fn unmap(&mut self, _requests: Vec<RemovemappingOne>) -> io::Result<()> {
        Err(errno(libc::ENOSYS))
    }
}

/// A read-only descriptor; `EBADF` for an inode that is neither a file nor a directory.
fn descriptor(fs: &PassthroughFs, inode: u64) -> io::Result<OwnedFd> {
    let mut borrower = Borrower(None);
    fs.setupmapping(&Context::default(), inode, 0, 0, 0, 0, 0, &mut borrower)?;
    borrower.0.ok_or_else(|| errno(libc::EBADF))
}

/// Gives `inode` another name in the directory `parent`.
pub(super) fn link(
    fs: &PassthroughFs,
    context: &Context,
    inode: u64,
    parent: u64,
    name: &CStr,
) -> io::Result<Entry> {
    match descriptor(fs, inode) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => {
            link_special(fs, context, inode, parent, name)
        }
        Err(error) => Err(error),
        Ok(file) => {
            let source = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .map_err(io::Error::other)?;
            link_to(fs, &source, libc::AT_SYMLINK_FOLLOW, parent, name)?;
            fs.lookup(context, parent, name)
        }
    }
}

/// A symbolic link, FIFO or socket, which cannot be opened: by the path it has now. The guest may
/// exchange it meanwhile, so the result is compared.
fn link_special(
    fs: &PassthroughFs,
    context: &Context,
    inode: u64,
    parent: u64,
    name: &CStr,
) -> io::Result<Entry> {
    let path = fs.readlinkat_proc_file(inode)?;
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    link_to(fs, &path, 0, parent, name)?;
    let entry = fs.lookup(context, parent, name)?;
    if entry.inode == inode {
        return Ok(entry);
    }
    fs.forget(context, entry.inode, 1);
    fs.unlink(context, parent, name)?;
    Err(errno(libc::ENOENT))
}

fn link_to(
    fs: &PassthroughFs,
    source: &CStr,
    flags: libc::c_int,
    parent: u64,
    name: &CStr,
) -> io::Result<()> {
    let directory = descriptor(fs, parent)?;
    // SAFETY: both names are C strings that outlive the call; the result is checked.
    let result = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            source.as_ptr(),
            directory.as_raw_fd(),
            name.as_ptr(),
            flags,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
