//! What is asked of the node's kernel for a device, so that the order of it can be tried against a stand-in.

use std::fmt::Debug;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use brig_hypervisor::launch::open_sealed;
use nix::errno::Errno;
use nix::fcntl::OFlag;

/// `linux/vfio.h`: `_IO(';', 100 + n)`.
pub(super) const GET_API_VERSION: libc::Ioctl = 0x3b64;
pub(super) const CHECK_EXTENSION: libc::Ioctl = 0x3b65;
pub(super) const SET_IOMMU: libc::Ioctl = 0x3b66;
pub(super) const GROUP_SET_CONTAINER: libc::Ioctl = 0x3b68;
pub(super) const GROUP_GET_DEVICE_FD: libc::Ioctl = 0x3b6a;
pub(super) const BIND_IOMMUFD: libc::Ioctl = 0x3b76;
pub(super) const ATTACH_IOMMUFD_PT: libc::Ioctl = 0x3b77;
/// `linux/iommufd.h`: `_IO(';', 0x80 + n)`.
pub(super) const IOAS_ALLOC: libc::Ioctl = 0x3b81;
pub(super) const OPTION: libc::Ioctl = 0x3b87;

/// The kernel's calls.
pub(super) trait Calls: Debug + Send + Sync {
    /// Opens a node of /dev for reading and writing.
    fn open(&self, path: &Path) -> io::Result<OwnedFd>;
    /// The same for a process that is to have nothing but the device by it.
    fn open_sealed(&self, path: &Path) -> io::Result<OwnedFd>;
    /// Makes a request with a number.
    fn number(
        &self,
        fd: &OwnedFd,
        request: libc::Ioctl,
        number: libc::c_ulong,
    ) -> nix::Result<libc::c_int>;
    /// Makes a request with a structure that begins with its length, which is the slice's.
    fn structure(&self, fd: &OwnedFd, request: libc::Ioctl, bytes: &mut [u8]) -> nix::Result<()>;
    /// Puts a group into a container.
    fn set_container(&self, group: &OwnedFd, container: &OwnedFd) -> nix::Result<()>;
    /// A device of a group, by a text that ends with a zero.
    fn device(&self, group: &OwnedFd, name: &std::ffi::CStr) -> nix::Result<OwnedFd>;
}

/// Those of this node.
#[derive(Debug)]
pub(super) struct Kernel;

fn request(
    fd: &OwnedFd,
    request: libc::Ioctl,
    argument: libc::c_ulong,
) -> nix::Result<libc::c_int> {
    // SAFETY: the requests made here take a number, or the address of what the caller keeps meanwhile, as long as the
    // kernel expects it.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })
}

impl Calls for Kernel {
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(fs::File::options()
            .read(true)
            .write(true)
            .open(path)?
            .into())
    }

    fn open_sealed(&self, path: &Path) -> io::Result<OwnedFd> {
        open_sealed(path, OFlag::O_RDWR)
    }

    fn number(
        &self,
        fd: &OwnedFd,
        name: libc::Ioctl,
        number: libc::c_ulong,
    ) -> nix::Result<libc::c_int> {
        request(fd, name, number)
    }

    fn structure(&self, fd: &OwnedFd, name: libc::Ioctl, bytes: &mut [u8]) -> nix::Result<()> {
        request(
            fd,
            name,
            bytes.as_mut_ptr().expose_provenance() as libc::c_ulong,
        )
        .map(drop)
    }

    fn set_container(&self, group: &OwnedFd, container: &OwnedFd) -> nix::Result<()> {
        // The kernel reads an int.
        let raw = container.as_raw_fd();
        request(
            group,
            GROUP_SET_CONTAINER,
            (&raw const raw).expose_provenance() as libc::c_ulong,
        )
        .map(drop)
    }

    fn device(&self, group: &OwnedFd, name: &std::ffi::CStr) -> nix::Result<OwnedFd> {
        let fd = request(
            group,
            GROUP_GET_DEVICE_FD,
            name.as_ptr().expose_provenance() as libc::c_ulong,
        )?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
