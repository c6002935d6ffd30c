//! A tap queue: the descriptor that the shim made, set up for virtio headers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::header::{HEADER, feature};

mod requests {
    //! `linux/if_tun.h`.
    nix::ioctl_write_ptr!(set_header_size, b'T', 216, libc::c_int);
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_write_ptr_bad!(
        set_queue,
        nix::request_code_write!(b'T', 217, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;
const TUN_F_USO4: u64 = 0x20;
const TUN_F_USO6: u64 = 0x40;
const TUN_F_USO: u64 = TUN_F_USO4 | TUN_F_USO6;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There has to be one tap for each queue pair, 1 to this many.
    #[error("{0} tap descriptors are not between 1 and {1}")]
    Taps(usize, usize),
    /// One vhost-net for each tap.
    #[error("{0} descriptors of vhost-net for {1} taps")]
    Vhosts(usize, usize),
    /// A tap refuses to be set up.
    #[error("cannot {what} of a tap: {source}")]
    Tap {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// One tap queue.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    is_tap: bool,
    cuts_datagrams: bool,
}

impl Tap {
    /// Makes it non-blocking and sets the header's size; offloads stay off until the driver has
    /// said which it takes.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let mut tap = Self {
            fd,
            is_tap: true,
            cuts_datagrams: false,
        };
        tap.set_nonblocking()?;
        // 12.
        let size = libc::c_int::try_from(HEADER).unwrap_or(12);
        // SAFETY: the request reads one int, which lives during the call.
        unsafe { requests::set_header_size(tap.fd.as_raw_fd(), &raw const size) }
            .map_err(|error| failed("set the header size", error))?;
        // Linux 6.2; before, they are refused.
        tap.cuts_datagrams = tap.ask_for(TUN_F_CSUM | TUN_F_USO).is_ok();
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Something that keeps packets apart as a tap does, but knows no requests.
    #[cfg(any(test, feature = "fuzzing"))]
    #[allow(clippy::unwrap_used, reason = "of tests alone")]
    pub fn fake(fd: OwnedFd) -> Self {
        let tap = Self {
            fd,
            is_tap: false,
            cuts_datagrams: true,
        };
        tap.set_nonblocking().unwrap();
        tap
    }

    fn set_nonblocking(&self) -> Result<(), NetError> {
        let flags =
            fcntl(&self.fd, FcntlArg::F_GETFL).map_err(|error| failed("get the flags", error))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&self.fd, FcntlArg::F_SETFL(flags))
            .map(drop)
            .map_err(|error| failed("set the flags", error))
    }

    /// Whether large UDP datagrams pass it, to be cut by whoever comes next, or to be taken whole.
    pub fn cuts_datagrams(&self) -> bool {
        self.cuts_datagrams
    }

    /// Lets the host send what a driver with these virtio features takes.
    pub fn set_offloads(&self, features: u64) -> Result<(), NetError> {
        if !self.is_tap {
            return Ok(());
        }
        let mut offloads = 0;
        for (guest, host) in [
            (feature::GUEST_CSUM, TUN_F_CSUM),
            (feature::GUEST_TSO4, TUN_F_TSO4),
            (feature::GUEST_TSO6, TUN_F_TSO6),
            (feature::GUEST_ECN, TUN_F_TSO_ECN),
        ] {
            if features & guest != 0 {
                offloads |= host;
            }
        }
        if offloads & TUN_F_CSUM == 0 {
            // Segments need partial checksums.
            offloads = 0;
        }
        if offloads & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
            offloads &= TUN_F_CSUM;
        }
        // The host takes both or none.
        let both = feature::GUEST_USO4 | feature::GUEST_USO6;
        if features & both == both && offloads & TUN_F_CSUM != 0 {
            offloads |= TUN_F_USO;
        }
        self.ask_for(offloads)
            .map_err(|error| failed("set the offloads", error))
    }

    /// Whether this queue of several gets frames. One that does not loses those that it has.
    pub fn set_in_use(&self, in_use: bool) -> Result<(), NetError> {
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: an ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if in_use {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        // SAFETY: the request reads one ifreq, which lives during the call.
        match unsafe { requests::set_queue(self.fd.as_raw_fd(), &raw const request) } {
            // It is as it is wanted.
            Ok(_) | Err(nix::Error::EINVAL) => Ok(()),
            Err(error) => Err(failed("set the use of a queue", error)),
        }
    }

    fn ask_for(&self, offloads: u64) -> nix::Result<()> {
        // SAFETY: the request takes a plain number.
        unsafe { requests::set_offload(self.fd.as_raw_fd(), offloads) }.map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failed(what: &'static str, error: nix::Error) -> NetError {
    NetError::Tap {
        what,
        source: error.into(),
    }
}
