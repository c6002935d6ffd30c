//! `hugepages-2Mi` and emptyDirs of them: kubelet mounts a hugetlbfs of the node, whose pages a VM cannot
//! have; its guest has its own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, contains_one, equal};
use k8s_cri::v1::{HugepageLimit, LinuxContainerResources};

use crate::mounted::Mounted;
use crate::node::{Configured, Directory, PROBE};
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "huge pages: a container has as many as its limit, in a volume",
        limited,
    ),
    case(
        "resources",
        "huge pages: an emptyDir has them where no limit is told",
        unlimited,
    ),
];

const MIB: u64 = 1 << 20;
const NODE_POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of the node, for runc alone.
struct NodePages;

impl NodePages {
    fn reserve(suite: &Suite, pages: u64) -> Result<Self> {
        let pages = if suite.is_brig() { 0 } else { pages };
        fs::write(NODE_POOL, pages.to_string())?;
        let got = fs::read_to_string(NODE_POOL)?;
        if got.trim() == pages.to_string() {
            Ok(Self)
        } else {
            not_here(format!("the node has room for {} huge pages", got.trim()))
        }
    }
}

impl Drop for NodePages {
    fn drop(&mut self) {
        let _ = fs::write(NODE_POOL, "0");
    }
}

fn limit(page_size: &str, limit: u64) -> impl FnOnce(&mut LinuxContainerResources) {
    let limit = HugepageLimit {
        page_size: page_size.to_owned(),
        limit,
    };
    move |resources| resources.hugepage_limits.push(limit)
}

/// As kubelet makes it.
fn volume(name: &str) -> Result<(Directory, Mounted)> {
    let volume = Directory::volume("kubernetes.io~empty-dir", name)?;
    let mounted = Mounted::hugetlbfs(&volume.path, "pagesize=2Mi")?;
    fs::set_permissions(
        &volume.path,
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )?;
    Ok((volume, mounted))
}

const PROBE_PATH: &str = "/bin/brig-probe";

fn limited(suite: &mut Suite) -> Result<()> {
    suite.image(PROBE)?;
    // containerd tells no limits by default.
    let line = |line: &str| match line.trim_start().starts_with("sandbox_image") {
        true => format!("{line}\n  disable_hugetlb_controller = false"),
        false => line.to_owned(),
    };
    suite.forget_shared();
    let _configured = Configured::lines(&suite.cri, line)?;
    let _pages = NodePages::reserve(suite, 4)?;
    let (volume, _mounted) = volume("huge")?;
    let pod = suite.run("huge-pages")?;
    let container = pod
        .container("main", &[PROBE_PATH, "sleep"])
        .image(PROBE.0)
        .mount(&volume.path, "/huge")
        .resources(limit("2MB", 4 * MIB))
        .start()?;
    let two = container.exec(&[PROBE_PATH, "huge", "/huge/two", "2"])?;
    equal("two pages", "touched 2", (two.text() + &two.stderr).trim())?;
    let third = container.exec(&[PROBE_PATH, "huge", "/huge/third", "1"])?;
    contains("a third", "Cannot allocate memory", &third.stderr)
        .or_else(|_| contains("a third", "ENOMEM", &third.stderr))?;
    let other = pod
        .container("other", SLEEP)
        .mount(&volume.path, "/h")
        .start()?;
    equal(
        "what another container sees of it",
        "hugetlbfs 4194304",
        other.sh("echo $(awk '$2 == \"/h\" { print $3 }' /proc/mounts) $(stat -c %s /h/two)")?,
    )?;
    if suite.is_brig() {
        let greedy = pod
            .container("greedy", SLEEP)
            .resources(limit("2MB", 64 << 30));
        refused("more than the VM has", greedy.start(), &["hugepages-2Mi"])?;
        let large = pod
            .container("large", SLEEP)
            .resources(limit("1GB", 1 << 30));
        refused("pages of 1 GiB", large.start(), &["1GB"])?;
    }
    equal(
        "the limit",
        (4 * MIB).to_string(),
        limit_in_cgroup(&container)?,
    )
}

fn limit_in_cgroup(container: &crate::container::Container) -> Result<String> {
    let file = "/sys/fs/cgroup/hugetlb.2MB.max";
    let read = container.exec(&[PROBE_PATH, "read", file])?;
    Ok(read.text())
}

fn unlimited(suite: &mut Suite) -> Result<()> {
    suite.image(PROBE)?;
    let _pages = NodePages::reserve(suite, 4)?;
    let (volume, _mounted) = volume("huge-unlimited")?;
    let inside = volume.path.join("sub");
    fs::create_dir(&inside).context("a directory on hugetlbfs")?;
    let shared = suite.shared()?;
    let mount = |name: &str, what: &Path| {
        shared
            .pod
            .container(name, &[PROBE_PATH, "sleep"])
            .image(PROBE.0)
            .mount(what, "/huge")
            .start()
    };
    let container = mount("huge", &volume.path)?;
    let three = container.exec(&[PROBE_PATH, "huge", "/huge/three", "3"])?;
    equal(
        "three pages",
        "touched 3",
        (three.text() + &three.stderr).trim(),
    )?;
    // As kubelet binds a subPath.
    let below = mount("huge-below", &inside)?;
    let one = below.exec(&[PROBE_PATH, "huge", "/huge/one", "1"])?;
    equal("one below", "touched 1", (one.text() + &one.stderr).trim())?;
    let listed = container.exec(&[PROBE_PATH, "list", "/huge/sub"])?.text();
    contains_one("the directory of the volume", &["one"], &listed)
}
