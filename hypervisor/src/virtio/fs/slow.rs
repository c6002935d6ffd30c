//! Which requests may take long, and go to helpers: what waits for a disk by its nature, everything on a mount whose
//! file system has its answers from elsewhere, the first look at such a mount too, and everything on a mount that keeps a
//! helper waiting.
//!
//! A READ of what is not in memory is found out by trying ([`super::read`]).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::InHeader;

use super::queues::Job;
use super::served::Served;
use crate::virtio::helpers::{Helpers, Limits};

/// Helpers of a file server, and of one lane: when four volumes hang altogether, what else may take long waits too, and
/// the device's thread goes on.
pub(super) const HELPERS: Limits = Limits {
    threads: 48,
    of_lane: 4,
};
/// A mount is slow once a request on it has taken this long.
const IMPATIENCE: Duration = Duration::from_millis(50);
/// FSYNC, FSYNCDIR, SYNCFS.
const SYNCS: [u32; 3] = [20, 30, 50];
/// READ, WRITE, FLUSH, FALLOCATE.
const CONTENTS: [u32; 4] = [15, 16, 25, 43];
/// FORGET, INIT, INTERRUPT, DESTROY, BATCH_FORGET: they ask the host for nothing, or are about the session.
const AT_ONCE: [u32; 5] = [2, 26, 36, 38, 42];

/// A mount has a lane for each: who looks at names does not wait for who reads, nor both for who syncs.
#[derive(Clone, Copy)]
enum Kind {
    Names,
    Contents,
    Syncs,
}

const KINDS: [Kind; 3] = [Kind::Names, Kind::Contents, Kind::Syncs];

/// The lane of a request.
pub(super) fn lane_of(header: &InHeader) -> u32 {
    let kind = match header.opcode {
        opcode if SYNCS.contains(&opcode) => Kind::Syncs,
        opcode if CONTENTS.contains(&opcode) => Kind::Contents,
        _ => Kind::Names,
    };
    lane(Served::mount_of(header.nodeid), kind)
}

fn lane(mount: u32, kind: Kind) -> u32 {
    mount << 2 | kind as u32
}

/// What the device's thread knows of slow mounts.
#[derive(Default)]
pub(super) struct Slow {
    /// Those that were found slow, until all that was handed over of them is done: who comes in between would
    /// wait for those before.
    mounts: BTreeSet<u32>,
}

impl Slow {
    /// The lane of a request that is to be handed over.
    pub(super) fn lane(
        &mut self,
        header: &InHeader,
        served: &Served,
        helpers: &Helpers<Job>,
    ) -> Option<u32> {
        if SYNCS.contains(&header.opcode) {
            return Some(lane_of(header));
        }
        if AT_ONCE.contains(&header.opcode) {
            return None;
        }
        let slow = served.is_remote(header.nodeid) || self.keeps_waiting(header, helpers);
        slow.then(|| lane_of(header))
    }

    fn keeps_waiting(&mut self, header: &InHeader, helpers: &Helpers<Job>) -> bool {
        if helpers.is_idle() {
            self.mounts.clear();
            return false;
        }
        let mount = Served::mount_of(header.nodeid);
        let lanes = KINDS.map(|kind| helpers.lane(lane(mount, kind)));
        if lanes.iter().all(|lane| lane.jobs == 0) {
            self.mounts.remove(&mount);
            return false;
        }
        let is_old = |since: Instant| since.elapsed() > IMPATIENCE;
        if lanes.iter().any(|lane| lane.since.is_some_and(is_old)) {
            self.mounts.insert(mount);
        }
        self.mounts.contains(&mount)
    }
}
