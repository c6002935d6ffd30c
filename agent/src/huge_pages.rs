//! Huge pages of the guest, for pods with `hugepages-2Mi` limits: as many as the limits of its containers
//! amount to are taken out of the guest's memory before a container starts, so that it is refused instead
//! of failing later. Huge pages of the node have no part in this.
//!
//! A container's own limit is held by its cgroup. Trusted: the host, who says the limits.
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use crate::{
    error::{Error, Result},
    spec::Resources,
    sync::lock,
};

/// Bytes of one page. Others need memory set aside at boot, or are not of this architecture.
pub const PAGE: u64 = 2 << 20;
/// What the limits of this size are called.
const NAME: &str = "2MB";
/// A larger limit is none.
const UNLIMITED: u64 = 1 << 62;
/// What a guest keeps of its memory for all else, in bytes.
const KEPT: u64 = 96 << 20;
/// Where the kernel counts them.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Asks the kernel's pool for this many pages; the answer is how many there are.
type Resize = fn(&Path, u64) -> io::Result<u64>;

/// The guest's huge pages.
pub struct HugePages {
    /// None on a machine that is not the agent's.
    pool: Option<PathBuf>,
    resize: Resize,
    /// How many the containers may use.
    reserved: Mutex<u64>,
}

/// A container's pages, given back at its end.
pub struct Reservation {
    of: Arc<HugePages>,
    pages: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (of, pages) = (Arc::clone(&self.of), self.pages);
        // The kernel may be busy with another container's.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || of.give_back(pages))),
            Err(_) => of.give_back(pages),
        }
    }
}

impl HugePages {
    /// The guest's; none are taken from a machine that the agent does not own.
    #[must_use]
    pub fn new(owns_machine: bool) -> Self {
        Self {
            pool: owns_machine.then(|| PathBuf::from(POOL)),
            resize,
            reserved: Mutex::default(),
        }
    }

    /// Takes what a container's limits ask for, if they do. Blocking: the kernel may have to make room.
    ///
    /// # Errors
    /// `InvalidArgument` for pages of another size, `ResourceExhausted` when the guest has not as many.
    pub fn reserve(self: &Arc<Self>, resources: &Resources) -> Result<Option<Reservation>> {
        let pages = pages_of(resources)?;
        let Some(pool) = self.pool.as_ref().filter(|_| pages > 0) else {
            return Ok(None);
        };
        let mut reserved = lock(&self.reserved);
        let wanted = reserved.saturating_add(pages);
        // Not even tried beyond that: it would leave nothing to anybody for a while.
        let most = spare()?;
        let got = match wanted <= most {
            true => (self.resize)(pool, wanted),
            false => Ok(most),
        };
        match got {
            Ok(got) if got >= wanted => {
                *reserved = wanted;
                let of = Arc::clone(self);
                return Ok(Some(Reservation { of, pages }));
            }
            _ => drop((self.resize)(pool, *reserved)),
        }
        let got = got.map_err(|error| Error::io("reserving huge pages", error))?;
        Err(Error::ResourceExhausted(format!(
            "hugepages-2Mi: the pod's containers may use {wanted} pages of 2 MiB, but its VM has room for \
             {got} only; give the pod more memory (the handler's `memory`, or the annotation io.brig.memory)"
        )))
    }

    fn give_back(&self, pages: u64) {
        let mut reserved = lock(&self.reserved);
        *reserved = reserved.saturating_sub(pages);
        if let Some(pool) = &self.pool {
            // Pages in use stay until they are free.
            let _ = (self.resize)(pool, *reserved);
        }
    }

    /// Lets a volume of huge pages have what the guest can spare beyond what is reserved: containerd may be
    /// configured not to tell the limits.
    ///
    /// # Errors
    /// `Internal` when the kernel refuses.
    pub fn allow_more(&self) -> Result<()> {
        let Some(pool) = &self.pool else {
            return Ok(());
        };
        fs::write(pool.join("nr_overcommit_hugepages"), spare()?.to_string())
            .map_err(|error| Error::io("allowing huge pages", error))
    }
}

/// How many pages the guest could have at most.
fn spare() -> Result<u64> {
    let memory = nix::sys::sysinfo::sysinfo();
    let memory = memory.map_err(|error| Error::io("the guest's memory", error))?;
    Ok(memory.ram_total().saturating_sub(KEPT) / PAGE)
}

/// Pages that the limits allow.
fn pages_of(resources: &Resources) -> Result<u64> {
    let mut pages = 0;
    for limit in resources.hugepage_limits.iter().filter(|l| l.limit > 0) {
        if limit.limit >= UNLIMITED {
            continue;
        }
        if limit.page_size != NAME {
            return Err(Error::InvalidArgument(format!(
                "hugepageLimits: pages of {} are not supported in a Brig guest; ask for 2 MiB ones",
                limit.page_size
            )));
        }
        pages = limit.limit.div_ceil(PAGE);
    }
    Ok(pages)
}

fn resize(pool: &Path, pages: u64) -> io::Result<u64> {
    let file = pool.join("nr_hugepages");
    fs::write(&file, pages.to_string())?;
    let text = fs::read_to_string(&file)?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(value: serde_json::Value) -> Resources {
        serde_json::from_value(json!({"hugepageLimits": value})).unwrap()
    }

    fn two_mib(limit: u64) -> Resources {
        limits(json!([{"pageSize": "2MB", "limit": limit}, {"pageSize": "1GB", "limit": 0}]))
    }

    fn pool(resize: Resize) -> (tempfile::TempDir, Arc<HugePages>) {
        let dir = tempfile::tempdir().unwrap();
        let pages = HugePages {
            pool: Some(dir.path().to_owned()),
            resize,
            reserved: Mutex::default(),
        };
        (dir, Arc::new(pages))
    }

    #[test]
    fn the_guest_has_as_many_as_its_containers_may_use() {
        let (dir, pages) = pool(resize);
        let count = || fs::read_to_string(dir.path().join("nr_hugepages")).unwrap();
        assert!(pages.reserve(&Resources::default()).unwrap().is_none());
        assert!(pages.reserve(&two_mib(u64::MAX)).unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "untouched");
        let first = pages.reserve(&two_mib(4 << 20)).unwrap();
        let second = pages.reserve(&two_mib((2 << 20) + 1)).unwrap();
        assert_eq!(count(), "4");
        drop(first);
        assert_eq!(count(), "2");
        drop(second);
        assert_eq!(count(), "0");
    }

    #[test]
    fn a_container_that_the_guest_has_no_pages_for_is_refused_and_keeps_none() {
        let (_dir, pages) = pool(|_, wanted| Ok(wanted.min(2)));
        let _first = pages.reserve(&two_mib(2 << 20)).unwrap();
        let Err(error) = pages.reserve(&two_mib(4 << 20)) else {
            panic!("there are not as many")
        };
        assert!(matches!(error, Error::ResourceExhausted(_)), "{error}");
        assert!(error.to_string().contains("3 pages"), "{error}");
        assert!(pages.reserve(&two_mib(2 << 20)).unwrap().is_some());
    }

    #[test]
    fn pages_of_another_size_are_refused_unless_none_are_asked_for() {
        let (_dir, pages) = pool(resize);
        for (limit, fine) in [(0, true), (1 << 30, false)] {
            let asked = limits(json!([{"pageSize": "1GB", "limit": limit}]));
            assert_eq!(pages.reserve(&asked).is_ok(), fine, "{limit}");
        }
    }
}
