//! User namespaces: the translation of ids, and the step into one.
//!
//! A container is set up by the guest's root and enters its user namespace last. Only the
//! network, ipc and pid namespaces then belong to the guest's root; its mounts belong to the
//! container, as copies it cannot take apart (user_namespaces(7), "locked" mounts).
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, openat};

use super::failure::{Context as _, Failure, Result};
use crate::{
    detached,
    id_map::check_map,
    spec::{IdMapping, Linux},
};

/// How the ids of a container map to the guest's; empty is the identity.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

/// Refuses a user namespace without a map, and a map without the namespace.
///
/// # Errors
/// A sentence naming the field.
pub fn check(linux: &Linux) -> std::result::Result<(), String> {
    let wanted = linux.namespaces.iter().any(|ns| ns.kind == "user");
    for (field, map) in [
        ("uidMappings", &linux.uid_mappings),
        ("gidMappings", &linux.gid_mappings),
    ] {
        if wanted && map.is_empty() {
            return Err(format!(
                "linux.{field} is empty: the user namespace would have no ids"
            ));
        }
        if !wanted && !map.is_empty() {
            return Err(format!("linux.{field} needs a user namespace"));
        }
        check_map(&format!("linux.{field}"), map)?;
    }
    Ok(())
}

fn translate(map: &[IdMapping], id: u32) -> Option<u32> {
    if map.is_empty() {
        return Some(id);
    }
    map.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id)?;
        (offset < m.size).then(|| m.host_id.checked_add(offset))?
    })
}

/// The text of a `uid_map`.
pub fn map_file(map: &[IdMapping]) -> String {
    map.iter()
        .map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size))
        .collect()
}

impl Ids {
    /// The maps given.
    pub fn new(uids: &[IdMapping], gids: &[IdMapping]) -> Self {
        Self {
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        }
    }

    /// Whether ids differ inside and outside at all.
    pub fn is_identity(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// The guest's id of a container's user.
    pub fn uid(&self, id: u32) -> Result<u32> {
        translate(&self.uids, id)
            .ok_or_else(|| Failure(format!("user {id} is not in linux.uidMappings")))
    }

    /// The guest's id of a container's group.
    pub fn gid(&self, id: u32) -> Result<u32> {
        translate(&self.gids, id)
            .ok_or_else(|| Failure(format!("group {id} is not in linux.gidMappings")))
    }

    /// The guest's ids of the container's root: who owns what is made for the container.
    pub fn root(&self) -> Result<(u32, u32)> {
        Ok((self.uid(0)?, self.gid(0)?))
    }
}

/// The two ends of the agreement between the helper, which stays outside and may write maps, and
/// the process that enters the namespace.
pub struct Entry {
    inside: UnixStream,
    outside: UnixStream,
}

impl Entry {
    /// Before the fork.
    pub fn new() -> Result<Self> {
        let (inside, outside) = UnixStream::pair().during("user namespace")?;
        Ok(Self { inside, outside })
    }

    /// In the parent: waits until the child `pid` is inside, and writes its maps.
    pub fn write_maps(self, pid: i32, ids: &Ids) -> Result<()> {
        let Self {
            inside,
            mut outside,
        } = self;
        drop(inside);
        let mut word = [0];
        // The child's early end is its own to report.
        if outside.read_exact(&mut word).is_err() {
            return Ok(());
        }
        // Its own: the guest's /proc may be out of sight by now.
        let procfs = detached::procfs().during("proc for id maps")?;
        let write = |name: &str, map: &[IdMapping]| {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(&procfs, format!("{pid}/{name}"), flags, Mode::empty())?;
            fs::File::from(file).write_all(map_file(map).as_bytes())
        };
        write("uid_map", &ids.uids).during("linux.uidMappings")?;
        write("gid_map", &ids.gids).during("linux.gidMappings")?;
        outside.write_all(&word).during("user namespace")
    }

    /// In the child: enters the namespace and takes the container's mounts along.
    pub fn enter(self) -> Result<()> {
        let Self {
            mut inside,
            outside,
        } = self;
        drop(outside);
        unshare(CloneFlags::CLONE_NEWUSER).during("new user namespace")?;
        inside.write_all(&[0]).during("user namespace")?;
        let mut word = [0];
        if inside.read_exact(&mut word).is_err() {
            return Err(Failure("the user namespace got no id maps".into()));
        }
        unshare(CloneFlags::CLONE_NEWNS).during("mounts in the user namespace")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            size,
        }
    }

    #[test]
    fn ids_translate_by_the_first_range_that_holds_them() {
        let ids = Ids::new(&[mapping(0, 100_000, 1000), mapping(1000, 5000, 1)], &[]);
        assert_eq!(ids.uid(0).unwrap(), 100_000);
        assert_eq!(ids.uid(999).unwrap(), 100_999);
        assert_eq!(ids.uid(1000).unwrap(), 5000);
        assert!(ids.uid(1001).unwrap_err().to_string().contains("1001"));
        assert_eq!(Ids::default().root().unwrap(), (0, 0));
    }

    /// user_namespaces(7): the first id inside, the first outside, how many.
    #[test]
    fn a_map_file_names_the_containers_id_first() {
        let map = [mapping(0, 100_000, 1000), mapping(1000, 5000, 1)];
        assert_eq!(map_file(&map), "0 100000 1000\n1000 5000 1\n");
    }

    #[test]
    fn a_map_and_its_namespace_come_together() {
        let linux = |value: serde_json::Value| check(&serde_json::from_value(value).unwrap());
        let map = serde_json::json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let user = serde_json::json!([{"type": "user"}]);
        assert!(
            linux(serde_json::json!({"namespaces": user}))
                .unwrap_err()
                .contains("uidMappings")
        );
        assert!(
            linux(serde_json::json!({"uidMappings": map}))
                .unwrap_err()
                .contains("uidMappings")
        );
        assert!(
            linux(serde_json::json!({"namespaces": user, "uidMappings": map, "gidMappings": map}))
                .is_ok()
        );
    }

    proptest! {
        #[test]
        fn no_map_overflows(container_id: u32, host_id: u32, size: u32, id: u32) {
            let ids = Ids::new(&[mapping(container_id, host_id, size)], &[]);
            if let Ok(outside) = ids.uid(id) {
                prop_assert_eq!(outside - host_id, id - container_id);
            }
        }
    }
}
