//! The map of a bind mount's owners, for pods with a user namespace (runtime-spec config.md, "mounts":
//! `uidMappings`, `gidMappings` and the options `idmap` and `ridmap`).
//!
//! Trusted: containerd, who wrote it. The kernel checks the ranges when the map is used; what is no id is refused before.

use brig_hypervisor::share::{IdMap, IdRange};
use serde::Deserialize;

use super::identity::check_range;
use crate::error::{Error, Result};

/// A range of a map, as `linux.uidMappings` and `mounts[].uidMappings` have it. For a mount the
/// "container's" ids are the file system's, and the "host's" those that the mount shows.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Mapping {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

/// Whether the map has the container's root; an empty one is that of no user namespace, which has every id.
pub(super) fn has_root(map: &[Mapping]) -> bool {
    map.is_empty() || map.iter().any(|line| line.container == 0 && line.size > 0)
}

/// Refuses a map with a number that is no id.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(super) fn check(field: &str, map: Option<&[Mapping]>) -> Result<()> {
    for (index, line) in map.unwrap_or_default().iter().enumerate() {
        let sides = [("containerID", line.container), ("hostID", line.host)];
        for (side, first) in sides {
            check_range(&format!("{field}[{index}].{side}"), first, line.size)?;
        }
    }
    Ok(())
}

/// The id outside of one of the container's.
pub(super) fn outside(map: &[Mapping], id: u32) -> Option<u32> {
    map.iter().find_map(|line| {
        let offset = id.checked_sub(line.container)?;
        (offset < line.size).then(|| line.host.checked_add(offset))?
    })
}

fn ranges(map: &[Mapping]) -> Vec<IdRange> {
    let range = |mapping: &Mapping| IdRange {
        stored: mapping.container,
        seen: mapping.host,
        length: mapping.size,
    };
    map.iter().map(range).collect()
}

/// The map of a mount with these options, if it asks for one: its own, else its container's.
///
/// # Errors
/// `InvalidArgument` for half a map, or none where one is asked for.
pub(super) fn of_mount(
    destination: &str,
    options: &[String],
    (users, groups): (&[Mapping], &[Mapping]),
    (container_users, container_groups): (&[Mapping], &[Mapping]),
) -> Result<Option<IdMap>> {
    let has = |name: &str| options.iter().any(|option| option == name);
    let below = has("ridmap");
    match (users.is_empty(), groups.is_empty()) {
        (false, false) => Ok(Some(IdMap::new(&ranges(users), &ranges(groups), below))),
        (true, true) if !below && !has("idmap") => Ok(None),
        (true, true) if !container_users.is_empty() && !container_groups.is_empty() => {
            let (users, groups) = (ranges(container_users), ranges(container_groups));
            Ok(Some(IdMap::new(&users, &groups, below)))
        }
        (true, true) => Err(Error::invalid(format!(
            "mount on {destination}: idmap needs uidMappings and gidMappings, or a user namespace's"
        ))),
        _ => Err(Error::invalid(format!(
            "mount on {destination}: uidMappings and gidMappings come together"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: [Mapping; 1] = [Mapping {
        container: 0,
        host: 200_000,
        size: 65_536,
    }];

    fn asked(
        options: &[&str],
        own: (&[Mapping], &[Mapping]),
        container: &[Mapping],
    ) -> Result<Option<IdMap>> {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        of_mount("/v", &options, own, (container, container))
    }

    #[test]
    fn a_map_without_root_is_told() {
        let line = |container: u32, size: u32| Mapping {
            container,
            host: 1,
            size,
        };
        assert!(has_root(&[]) && has_root(&[line(5, 5), line(0, 1)]));
        assert!(!has_root(&[line(1, 65_536)]) && !has_root(&[line(0, 0)]));
    }

    #[test]
    fn a_mounts_own_map_counts_then_the_containers_if_it_is_asked_for() {
        let range = [IdRange {
            stored: 0,
            seen: 200_000,
            length: 65_536,
        }];
        let top = IdMap::new(&range, &range, false);
        let all = IdMap::new(&range, &range, true);
        for (options, own, container, expected) in [
            (&["rbind"][..], &[][..], &MAP[..], None),
            (&["rbind"], &MAP, &[], Some(&top)),
            (&["rbind", "idmap"], &MAP, &[], Some(&top)),
            (&["rbind", "ridmap"], &MAP, &[], Some(&all)),
            (&["idmap"], &[], &MAP, Some(&top)),
            (&["ridmap"], &[], &MAP, Some(&all)),
        ] {
            let got = asked(options, (own, own), container).unwrap();
            assert_eq!(got.as_ref(), expected, "{options:?}");
        }
    }

    #[test]
    fn half_a_map_and_none_are_refused_with_the_mount() {
        for (options, own) in [
            (&["idmap"][..], (&[][..], &[][..])),
            (&[], (&MAP[..], &[])),
            (&[], (&[], &MAP)),
        ] {
            let error = asked(options, own, &[]).unwrap_err();
            assert!(error.message.contains("/v"), "{error}");
        }
    }
}
