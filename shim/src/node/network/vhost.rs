//! vhost-net: the node's kernel moves the frames of a queue pair, for which it wants a descriptor each.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use brig_hypervisor::launch::open_sealed;
use brig_hypervisor::virtio::net::VHOST_FEATURES;
use nix::fcntl::OFlag;

mod requests {
    // `linux/vhost.h`: VHOST_GET_FEATURES.
    nix::ioctl_read!(get_features, 0xaf, 0x00, u64);
}

const VHOST_NET: &str = "/dev/vhost-net";

/// One descriptor for each of so many pairs, to be given to a VMM.
///
/// # Errors
/// Why the node has none, in one sentence with the fix.
pub fn open(pairs: usize) -> Result<Vec<OwnedFd>, String> {
    (0..pairs).map(|_| open_one(Path::new(VHOST_NET))).collect()
}

fn open_one(path: &Path) -> Result<OwnedFd, String> {
    let shown = path.display();
    let fd = open_sealed(path, OFlag::O_RDWR).map_err(|error| {
        format!("{shown}: {error}; load the node's module vhost_net, or set vhost_net = false in Brig's configuration")
    })?;
    let mut features = 0;
    // SAFETY: the request writes one number, which lives during the call.
    unsafe { requests::get_features(fd.as_raw_fd(), &raw mut features) }
        .map_err(|error| format!("{shown} does not tell its features: {error}"))?;
    if features & VHOST_FEATURES != VHOST_FEATURES {
        return Err(format!(
            "{shown} has the features {features:#x}, and {VHOST_FEATURES:#x} are needed"
        ));
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vhost_net_is_refused_with_the_way_out() {
        let error = open_one(Path::new("/nonexistent/vhost-net")).unwrap_err();
        assert!(error.contains("/nonexistent/vhost-net"), "{error}");
        if !brig_fixtures::needs::root() {
            return;
        }
        assert!(
            open_one(Path::new("/nonexistent"))
                .unwrap_err()
                .contains("vhost_net = false")
        );
        let error = open_one(Path::new("/dev/null")).unwrap_err();
        assert!(error.contains("does not tell its features"), "{error}");
    }
}
