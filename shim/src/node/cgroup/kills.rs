//! Whether the node's kernel has killed something of a pod for memory.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Cgroup, ROOT};

/// How often the kernel had killed something for memory, in a pod's cgroup and below each one above it.
///
/// A kill is counted in the cgroup that memory is counted in, and in all above. That is the pod's own until somebody takes the memory
/// controller from it, as systemd does when the limits of the pod's slice change; then `memory.events` is not there any more, and the nearest
/// cgroup above that has one tells of the pod. (Not by its `memory.events.local`: while the pod's cgroup has the io controller the
/// kernel goes on to count its memory apart, unseen.)
#[derive(Debug, Clone, Default)]
pub struct Kills(Vec<(PathBuf, u64)>);

impl Cgroup {
    /// As often as until now. Blocking, of files of the kernel's memory.
    #[must_use]
    pub fn kills(&self) -> Kills {
        self.kills_below(Path::new(ROOT))
    }

    fn kills_below(&self, root: &Path) -> Kills {
        let places = self.dirs().iter().flat_map(|dir| dir.ancestors());
        let below = places.take_while(|place| *place != root);
        Kills(
            below
                // One that does not count yet begins with none.
                .map(|place| (place.to_owned(), counted(place).unwrap_or(0)))
                .collect(),
        )
    }
}

impl Kills {
    /// Whether there was one since: the kernel counts it before it kills. Blocking, as [`Cgroup::kills`].
    #[must_use]
    pub fn is_more(&self) -> bool {
        let now = self.0.iter().find_map(|(place, before)| {
            let now = counted(place)?;
            // A cgroup that was without the controller meanwhile counts anew.
            Some(now > 0 && now != *before)
        });
        now.unwrap_or(false)
    }
}

/// Below this directory, if it counts memory.
fn counted(place: &Path) -> Option<u64> {
    let events = fs::read_to_string(place.join("memory.events")).ok()?;
    let line = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(place: &Path, kills: u64) {
        let text = format!("low 0\nmax 5\noom 3\noom_kill {kills}\noom_group_kill 0\n");
        fs::write(place.join("memory.events"), text).unwrap();
    }

    #[test]
    fn a_kill_is_found_where_memory_is_counted() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods.slice/pod1.slice");
        let own = pod.join("sandbox.scope");
        fs::create_dir_all(&own).unwrap();
        let cgroup = Cgroup {
            dirs: vec![own.clone()],
            parents: Vec::new(),
            home: None,
        };
        let at_first = || cgroup.kills_below(root.path());
        assert!(!at_first().is_more());
        for (place, kills) in [(pod.parent().unwrap(), 7), (&pod, 2), (&own, 1)] {
            events(place, kills);
        }
        // Another pod's is not this one's.
        let before = at_first();
        events(pod.parent().unwrap(), 8);
        assert!(!before.is_more());
        events(&own, 2);
        assert!(before.is_more());

        let before = at_first();
        fs::remove_file(own.join("memory.events")).unwrap();
        assert!(!before.is_more());
        events(&pod, 3);
        assert!(before.is_more());
        // It has the controller again, and counts from the beginning.
        events(&own, 0);
        assert!(!before.is_more());
        events(&own, 1);
        assert!(before.is_more());
        // One that had none at first.
        fs::remove_file(own.join("memory.events")).unwrap();
        let before = at_first();
        events(&own, 1);
        assert!(before.is_more());
    }
}
