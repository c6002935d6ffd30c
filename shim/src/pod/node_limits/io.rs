//! Limits of the I/O on the node's own devices. A container's files lie on them, and its VMM reads and writes there for it.

use std::io;

use crate::asked::spec::{Throttled, Throttles};
use crate::error::{Error, Result};
use crate::node::cgroup::Cgroup;
use crate::node::disk::Numbers;

/// Has the cgroup, which has what is `applied`, have what is wanted. Blocking.
pub(super) fn apply(cgroup: &Cgroup, applied: &mut Throttles, wanted: &Throttles) -> Result<()> {
    let gone = applied.keys().filter(|what| !wanted.contains_key(*what));
    let gone: Vec<_> = gone.map(|what| (*what, 0)).collect();
    let new = wanted.iter().map(|(what, rate)| (*what, *rate));
    let new = new.filter(|(what, rate)| applied.get(what) != Some(rate));
    for (what, rate) in gone.into_iter().chain(new.collect::<Vec<_>>()) {
        limit(cgroup, what, rate).map_err(|error| refused(what.0, &error))?;
        match rate {
            0 => applied.remove(&what),
            rate => applied.insert(what, rate),
        };
    }
    Ok(())
}

/// Gives one to the kernel: a line of `io.max`. 0 takes it away.
fn limit(cgroup: &Cgroup, (numbers, what): (Numbers, Throttled), rate: u64) -> io::Result<()> {
    let key = match what {
        Throttled::ReadBytes => "rbps",
        Throttled::WrittenBytes => "wbps",
        Throttled::Reads => "riops",
        Throttled::Writes => "wiops",
    };
    let (major, minor) = numbers;
    let max = match rate {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    cgroup.write("io.max", &format!("{major}:{minor} {key}={max}"))
}

pub(super) fn refused((major, minor): Numbers, error: &io::Error) -> Error {
    let what = format!("linux.resources.blockIO: device {major}:{minor} of the node");
    match error.raw_os_error() {
        Some(libc::ENODEV) => Error::invalid(format!(
            "{what} cannot be limited: it is no whole disk that this node has"
        )),
        _ if error.kind() == io::ErrorKind::NotFound => Error::state(format!(
            "{what} cannot be limited: the pod's cgroup has no io controller (its parents' cgroup.subtree_control)"
        )),
        _ => Error::io(format_args!("{what} cannot be limited"), error),
    }
}
