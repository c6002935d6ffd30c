//! What the cgroup above a pod's own lets the pod use. It is kubelet's, who makes it before the pod, raises it before a limit
//! of a container and lowers it after one; containerd tells a shim nothing of it.

use std::fs;
use std::path::Path;

use super::{ROOT, relative_path};

/// Limits of a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Of memory, in bytes.
    pub memory: Option<u64>,
    /// Thousandths of CPUs.
    pub cpu_millis: Option<u64>,
}

/// What the parent of this `cgroupsPath` may use. Blocking.
#[must_use]
pub fn bounds_of_parent(cgroups_path: &str) -> Bounds {
    bounds_below(Path::new(ROOT), cgroups_path)
}

/// Processes and threads that the parent of this `cgroupsPath` may have; `None` without a limit. Blocking.
#[must_use]
pub fn pids_of_parent(cgroups_path: &str) -> Option<u64> {
    pids_below(Path::new(ROOT), cgroups_path)
}

/// Bytes of 2 MiB huge pages that the parent of this `cgroupsPath` may use. None without a limit. Blocking.
#[must_use]
pub fn huge_pages_of_parent(cgroups_path: &str) -> Option<u64> {
    huge_pages_below(Path::new(ROOT), cgroups_path)
}

fn bounds_below(root: &Path, cgroups_path: &str) -> Bounds {
    let read = |file| read_of_parent(root, cgroups_path, file);
    Bounds {
        memory: read("memory.max").and_then(|text| text.trim().parse().ok()),
        cpu_millis: read("cpu.max").and_then(|text| millis(&text)),
    }
}

/// Of `QUOTA PERIOD`; a quota that is no number is no limit.
fn millis(text: &str) -> Option<u64> {
    let mut words = text.split_ascii_whitespace().map(str::parse::<u64>);
    let (quota, period) = (words.next()?.ok()?, words.next()?.ok()?);
    quota.saturating_mul(1000).checked_div(period)
}

fn pids_below(root: &Path, cgroups_path: &str) -> Option<u64> {
    let limit = read_of_parent(root, cgroups_path, "pids.max")?;
    limit.trim().parse().ok()
}

fn huge_pages_below(root: &Path, cgroups_path: &str) -> Option<u64> {
    let limit = read_of_parent(root, cgroups_path, "hugetlb.2MB.max")?;
    limit.trim().parse().ok()
}

/// A file of the parent.
fn read_of_parent(root: &Path, cgroups_path: &str, file: &str) -> Option<String> {
    let path = relative_path(cgroups_path).ok()?;
    fs::read_to_string(root.join(path.parent()?).join(file)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/kubepods/pod1/sandbox";

    /// Of a node with cgroup v2.
    fn node() -> (tempfile::TempDir, std::path::PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod1");
        fs::create_dir_all(&pod).unwrap();
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        (root, pod)
    }

    #[test]
    fn a_pods_huge_pages_are_those_of_kubelets_cgroup() {
        let (root, pod) = node();
        let told = || huge_pages_below(root.path(), POD);
        assert_eq!(told(), None);
        for (text, expected) in [("4194304\n", Some(4 << 20)), ("max\n", None)] {
            fs::write(pod.join("hugetlb.2MB.max"), text).unwrap();
            assert_eq!(told(), expected);
        }
        assert_eq!(huge_pages_below(root.path(), "/../etc"), None);
    }

    #[test]
    fn a_pod_may_use_what_kubelets_cgroup_may() {
        let (root, pod) = node();
        let told = || bounds_below(root.path(), POD);
        assert_eq!(told(), Bounds::default());
        // Its own cgroup is the shim's.
        fs::create_dir(pod.join("sandbox")).unwrap();
        fs::write(pod.join("sandbox/memory.max"), "7\n").unwrap();
        fs::write(pod.join("memory.max"), "max\n").unwrap();
        fs::write(pod.join("cpu.max"), "max 100000\n").unwrap();
        assert_eq!(told(), Bounds::default());
        fs::write(pod.join("memory.max"), "4194304\n").unwrap();
        fs::write(pod.join("cpu.max"), "225000 100000\n").unwrap();
        let bounds = Bounds {
            memory: Some(4 << 20),
            cpu_millis: Some(2250),
        };
        assert_eq!(told(), bounds);
        assert_eq!(pids_below(root.path(), POD), None);
        fs::write(pod.join("pids.max"), "max\n").unwrap();
        assert_eq!(pids_below(root.path(), POD), None);
        fs::write(pod.join("pids.max"), "64\n").unwrap();
        assert_eq!(pids_below(root.path(), POD), Some(64));
    }
}
