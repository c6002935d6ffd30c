//! The node's CPUs and NUMA nodes that a pod's VM runs on: `cpuset.cpus` and `cpuset.mems` of its cgroup. Kubelet's static CPU
//! manager gives containers CPUs that are nobody else's, and takes those from all others: a VM that runs wherever it likes
//! runs there as well.

use std::io::ErrorKind;
use std::path::Path;

use super::container::Wanted;
use crate::asked::spec::NumberList;
use crate::error::{Error, Result};
use crate::node::cgroup::Cgroup;

const CPUS: &str = "cpuset.cpus";
const MEMS: &str = "cpuset.mems";
/// Where the kernel tells all that there can be.
const DEVICES: &str = "/sys/devices/system";

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Lists {
    cpus: Option<String>,
    mems: Option<String>,
}

impl Lists {
    /// Has the cgroup have what is wanted. Where there is nobody to want anything it stays as it is. Blocking.
    pub(super) fn apply(&mut self, cgroup: &Cgroup, wanted: &Wanted) -> Result<()> {
        self.apply_below(Path::new(DEVICES), cgroup, wanted)
    }

    pub(super) fn apply_below(
        &mut self,
        devices: &Path,
        cgroup: &Cgroup,
        wanted: &Wanted,
    ) -> Result<()> {
        if wanted.nobody {
            return Ok(());
        }
        for (file, wanted, written) in [
            (CPUS, &wanted.cpus, &mut self.cpus),
            (MEMS, &wanted.mems, &mut self.mems),
        ] {
            let list = match (wanted, &written) {
                (Some(list), _) => list.to_string(),
                (None, None) => continue,
                (None, Some(_)) => all(devices, file)?,
            };
            if written.as_ref() != Some(&list) {
                put(cgroup, file, &list)?;
                *written = Some(list);
            }
        }
        Ok(())
    }

    /// Writes it once more. Blocking.
    pub(super) fn write(&self, cgroup: &Cgroup) -> Result<()> {
        for (file, list) in [(CPUS, &self.cpus), (MEMS, &self.mems)] {
            if let Some(list) = list {
                put(cgroup, file, list)?;
            }
        }
        Ok(())
    }
}

/// All that there can be: the kernel does not let the list of a cgroup with processes be emptied again (`ENOSPC`).
fn all(devices: &Path, file: &str) -> Result<String> {
    let path = devices.join(match file {
        CPUS => "cpu/possible",
        _ => "node/possible",
    });
    let failed = |error| Error::io(path.display(), &error);
    match std::fs::read_to_string(&path) {
        Ok(list) => Ok(NumberList::parse(list.trim()).map_or(list, |list| list.to_string())),
        // A kernel without NUMA.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok("0".to_owned()),
        Err(error) => Err(failed(error)),
    }
}

fn put(cgroup: &Cgroup, file: &str, list: &str) -> Result<()> {
    let field = file.replace("cpuset.", "linux.resources.cpu.");
    cgroup.write(file, list).map_err(|error| match error.raw_os_error() {
        _ if error.kind() == ErrorKind::NotFound => Error::state(format!(
            "{field} = {list}: the pod's cgroup on the node has no cpuset controller (its parents' cgroup.subtree_control)"
        )),
        Some(libc::EINVAL | libc::ERANGE) => Error::invalid(format!(
            "{field}: the node does not have all of {list}, which the pod's containers ask for together"
        )),
        _ => Error::io(format_args!("{field} = {list} cannot be held on the node"), &error),
    })
}
