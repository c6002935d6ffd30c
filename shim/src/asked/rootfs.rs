//! A root file system that containerd hands over as block devices and images, not mounted: what the blockfile, devmapper
//! and erofs snapshotters of containerd send with Create.
//!
//! containerd writes places of earlier mounts as templates (`{{ mount 0 }}/upper`, `{{ overlay 1 3 }}`), its mount
//! manager's language. Nothing is looked up here. Trusts containerd in meaning, not in form.

mod layer;

use std::path::PathBuf;

pub use self::layer::{IdMap, Sidecar};
use self::layer::{absolute, ranges, sidecar};
use crate::error::{Error, Result};

/// File systems of the guest's kernel that lie on a disk.
const ON_DISKS: [&str; 7] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "erofs", "squashfs"];
/// And those that nobody writes to.
const READ_ONLY: [&str; 2] = ["erofs", "squashfs"];
/// What containerd puts before a type for those who do this themselves.
const PREFIXES: [&str; 2] = ["format/", "mkdir/"];
/// A directory to be made: `path:mode`.
const MAKE: &str = "X-containerd.mkdir.path=";
/// Nothing that begins so is passed over.
const VERITY: &str = "X-containerd.dmverity";
/// Files and devices of one root file system: what one message of descriptors carries, and some.
const MAX_IMAGES: usize = 250;

/// A mount as containerd writes it.
#[derive(Debug, Clone)]
pub struct Mount {
    /// Type.
    pub kind: String,
    /// Source.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// A root file system on disks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order; the last is the root.
    pub mounts: Vec<Planned>,
    /// The directory of the node that holds what is written, if that is not on a disk.
    pub shared: Option<PathBuf>,
}

/// One of its mounts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// File system type, "overlay" or "bind".
    pub kind: String,
    /// What a file system is on, and what of its data lies elsewhere.
    pub images: Vec<PathBuf>,
    /// Of a file system: nothing is written to it.
    pub readonly: bool,
    /// For the guest's mount.
    pub options: Vec<String>,
    /// Of an overlay, the uppermost first; of a bind mount its source.
    pub lower: Vec<Place>,
    /// Of an overlay, with its work directory.
    pub upper: Option<(Place, Place)>,
    /// To be made before, with their permissions.
    pub directories: Vec<(Place, u32)>,
    /// A user namespace's map through which owners are seen, of an overlay or a bind mount those of its lower layers.
    pub map: Option<IdMap>,
    /// Of a file system on one image: where it is said what its blocks are checked against.
    pub verity: Option<Sidecar>,
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// In this mount, by index; none: in [`Plan::shared`].
    pub mount: Option<usize>,
    /// Below it, of plain names.
    pub path: String,
}

impl Plan {
    /// What to do with the mounts; `None` if none of them is on a disk, so that they can be made on the node.
    ///
    /// # Errors
    /// `InvalidArgument` that names the mount, and the fix.
    pub fn of(mounts: &[Mount]) -> Result<Option<Self>> {
        let base = |mount: &Mount| bare(&mount.kind).to_owned();
        if !mounts
            .iter()
            .any(|mount| ON_DISKS.contains(&base(mount).as_str()))
        {
            return Ok(None);
        }
        let mut plan = Self::default();
        for (index, mount) in mounts.iter().enumerate() {
            let kind = base(mount);
            let planned = plan.one(index, &kind, mount).map_err(|reason| {
                Error::invalid(format!("{kind} of the root file system: {reason}"))
            })?;
            plan.mounts.push(planned);
        }
        let images = plan
            .mounts
            .iter()
            .map(|mount| mount.images.len())
            .sum::<usize>();
        if images > MAX_IMAGES {
            return Err(Error::invalid(format!(
                "the root file system has {images} layers, of which a VM can have {MAX_IMAGES}: rebuild the image with fewer"
            )));
        }
        Ok(Some(plan))
    }

    fn one(
        &mut self,
        index: usize,
        kind: &str,
        mount: &Mount,
    ) -> std::result::Result<Planned, String> {
        let mut planned = Planned {
            kind: kind.to_owned(),
            ..Planned::default()
        };
        let (mut upper, mut work) = (None, None);
        let mut map = IdMap::default();
        for option in mount.options.iter().flat_map(|option| split(option)) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match key {
                "X-containerd.dmverity" => planned.verity = sidecar(value, &mount.source)?,
                _ if option.starts_with(VERITY) => {
                    return Err(format!(
                        "{option:?} of dm-verity is not known: a layer that it would have checked is not read"
                    ));
                }
                "uidmap" => map.users = ranges(option, value)?,
                "gidmap" => map.groups = ranges(option, value)?,
                "subvol" | "subvolid" => {
                    return Err("a subvolume of a file system of the node cannot be given to a VM: use the overlayfs, \
                                blockfile, devmapper or erofs snapshotter"
                        .to_owned());
                }
                "lowerdir" => planned.lower = self.places(index, value)?,
                "upperdir" => upper = Some(self.written(index, value)?),
                "workdir" => work = Some(self.written(index, value)?),
                "device" if kind == "erofs" => planned.images.push(absolute(value)?),
                _ if option.starts_with(MAKE) => {
                    let (path, mode) = value.split_once(':').unwrap_or((value, "0755"));
                    let mode = mode.split(':').next().unwrap_or_default();
                    let mode = u32::from_str_radix(mode, 8)
                        .map_err(|_| format!("{option:?} names no permissions"))?;
                    planned.directories.push((self.written(index, path)?, mode));
                }
                "loop" | "bind" | "rbind" => {}
                // Words for who mounts on the node (mount(8)).
                _ if key.starts_with("X-") || key.starts_with("x-") => {}
                _ => planned.options.push(option.to_owned()),
            }
        }
        match (map.users.is_empty(), map.groups.is_empty()) {
            (true, true) => {}
            (false, false) => planned.map = Some(map),
            _ => return Err("uidmap and gidmap come together".to_owned()),
        }
        match kind {
            "overlay" => {
                planned.upper = match (upper, work) {
                    (Some(upper), Some(work)) => Some((upper, work)),
                    (None, None) => None,
                    _ => return Err("an upper directory needs a work directory".to_owned()),
                };
                if planned.lower.is_empty() {
                    return Err("it has no lower directory".to_owned());
                }
            }
            "bind" => planned.lower = vec![self.written(index, &mount.source)?],
            _ if ON_DISKS.contains(&kind) => {
                planned.images.insert(0, absolute(&mount.source)?);
                let last = planned
                    .options
                    .iter()
                    .rev()
                    .find(|option| *option == "ro" || *option == "rw");
                planned.readonly =
                    READ_ONLY.contains(&kind) || last.is_some_and(|option| option == "ro");
            }
            _ => {
                return Err("a VM has ext4, xfs, erofs and overlay of it; is it made by a mount handler that containerd \
                            was not asked to leave out?"
                    .to_owned());
            }
        }
        if planned.verity.is_some() && (planned.images.len() != 1 || !planned.readonly) {
            return Err("dm-verity checks single layers that are read alone: set the snapshotter's dmverity_mode to \"off\"".to_owned());
        }
        if planned.map.is_some() {
            self.check_mapped(&planned.lower)?;
        }
        Ok(planned)
    }

    /// What is mapped for a user namespace is a mount, and one of a file system that the guest has for itself.
    fn check_mapped(&self, lower: &[Place]) -> std::result::Result<(), String> {
        let is_layer = |place: &Place| {
            let mount = place.mount.and_then(|index| self.mounts.get(index));
            place.path.is_empty() && mount.is_some_and(|mount| !mount.images.is_empty())
        };
        if lower.iter().all(is_layer) {
            Ok(())
        } else {
            Err("only whole layers on disks have their owners mapped for a user namespace (hostUsers: false): use the \
                 overlayfs snapshotter for this pod"
                .to_owned())
        }
    }

    /// A place in an earlier mount, or one of the node, whose directory is shared.
    fn written(&mut self, index: usize, text: &str) -> std::result::Result<Place, String> {
        if text.starts_with("{{") {
            let mut places = self.places(index, text)?;
            return match places.pop() {
                Some(place) if places.is_empty() => Ok(place),
                _ => Err(format!("{text:?} names several places")),
            };
        }
        let path = absolute(text)?;
        let (Some(parent), Some(name)) =
            (path.parent(), path.file_name().and_then(|it| it.to_str()))
        else {
            return Err(format!("{text:?} is no directory for a container"));
        };
        match &self.shared {
            Some(shared) if shared != parent => {
                return Err(format!(
                    "what is written lies in two directories of the node, {} and {}",
                    shared.display(),
                    parent.display()
                ));
            }
            _ => self.shared = Some(parent.to_owned()),
        }
        Ok(Place {
            mount: None,
            path: name.to_owned(),
        })
    }

    /// Places of earlier mounts, separated by colons.
    fn places(&self, index: usize, text: &str) -> std::result::Result<Vec<Place>, String> {
        let mut places = Vec::new();
        for one in text.split(':') {
            let wrong = || format!("{one:?} is no place in an earlier mount");
            let (template, path) = one
                .strip_prefix("{{")
                .and_then(|rest| rest.split_once("}}"))
                .ok_or_else(wrong)?;
            let number = |word: &str| word.parse().ok().filter(|number: &usize| *number < index);
            let words: Vec<&str> = template.split_whitespace().collect();
            let path = path.trim_matches('/');
            if path.split('/').any(|name| name == "..") {
                return Err(wrong());
            }
            let mut add = |mount: usize| {
                places.push(Place {
                    mount: Some(mount),
                    path: path.to_owned(),
                });
            };
            match words[..] {
                ["mount", word] => add(number(word).ok_or_else(wrong)?),
                ["overlay", first, last] if path.is_empty() => {
                    let (first, last) = (
                        number(first).ok_or_else(wrong)?,
                        number(last).ok_or_else(wrong)?,
                    );
                    if first <= last {
                        (first..=last).for_each(&mut add);
                    } else {
                        (last..=first).rev().for_each(&mut add);
                    }
                }
                _ => return Err(wrong()),
            }
        }
        Ok(places)
    }
}

/// Options of an entry. A template has no commas, and those of a map are its own.
fn split(option: &str) -> Vec<&str> {
    if ["uidmap=", "gidmap="]
        .iter()
        .any(|key| option.starts_with(key))
    {
        return vec![option];
    }
    option
        .split(',')
        .filter(|option| !option.is_empty())
        .collect()
}

/// A type without what it asks of who mounts it.
fn bare(kind: &str) -> &str {
    let mut kind = kind;
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| kind.strip_prefix(prefix)) {
        kind = rest;
    }
    kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use brig_hypervisor::share::IdRange;
    use proptest::prelude::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            kind: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn plan(mounts: &[Mount]) -> Plan {
        Plan::of(mounts).unwrap().unwrap()
    }

    fn refused(mounts: &[Mount]) -> String {
        Plan::of(mounts).unwrap_err().message
    }

    fn place(mount: Option<usize>, path: &str) -> Place {
        Place {
            mount,
            path: path.to_owned(),
        }
    }

    #[test]
    fn what_can_be_mounted_on_the_node_is_no_business_of_disks() {
        for mounts in [
            vec![],
            vec![mount("overlay", "overlay", &["lowerdir=/a:/b"])],
            vec![mount("bind", "/a", &["rbind", "rw"])],
        ] {
            assert_eq!(Plan::of(&mounts).unwrap(), None);
        }
    }

    #[test]
    fn blockfile_and_devmapper_are_one_disk() {
        let blockfile = plan(&[mount(
            "ext4",
            "/var/lib/c/blocks/3",
            &["loop", "rw,noatime"],
        )]);
        let [root] = &blockfile.mounts[..] else {
            panic!("{blockfile:?}")
        };
        assert_eq!((root.kind.as_str(), root.readonly), ("ext4", false));
        assert_eq!(root.images, [Path::new("/var/lib/c/blocks/3")]);
        assert_eq!(root.options, ["rw", "noatime"]);
        let view = plan(&[mount("xfs", "/dev/mapper/pool-snap-7", &["nouuid", "ro"])]);
        assert!(view.mounts[0].readonly);
        assert_eq!(view.mounts[0].options, ["nouuid", "ro"]);
        assert_eq!(view.shared, None);
    }

    #[test]
    fn erofs_layers_and_a_writable_disk_are_an_overlay_made_in_the_guest() {
        let got = plan(&[
            mount("ext4", "/s/9/rwlayer.img", &["rw", "loop"]),
            mount("erofs", "/s/3/layer.erofs", &["ro", "loop"]),
            mount(
                "erofs",
                "/s/2/fsmeta.erofs",
                &["ro", "loop", "device=/s/1/a", "device=/s/2/b"],
            ),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0700:0:0",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                    "index=off",
                ],
            ),
        ]);
        assert_eq!(got.mounts[2].images.len(), 3);
        assert!(!got.mounts[0].readonly && got.mounts[1].readonly);
        let root = &got.mounts[3];
        assert_eq!(root.kind, "overlay");
        assert_eq!(root.lower, [place(Some(1), ""), place(Some(2), "")]);
        let upper = (place(Some(0), "upper"), place(Some(0), "work"));
        assert_eq!(root.upper, Some(upper.clone()));
        assert_eq!(root.directories, [(upper.0, 0o755), (upper.1, 0o700)]);
        assert_eq!(root.options, ["index=off"]);
        assert_eq!(got.shared, None);
    }

    #[test]
    fn what_is_written_to_a_directory_of_the_node_is_shared() {
        let erofs = mount("erofs", "/s/3/layer.erofs", &["ro", "loop"]);
        let overlay = |work| {
            let options = [work, "upperdir=/s/9/fs", "lowerdir={{ mount 0 }}"];
            mount("format/overlay", "overlay", &options)
        };
        let got = plan(&[erofs.clone(), overlay("workdir=/s/9/work")]);
        assert_eq!(got.shared.as_deref(), Some(Path::new("/s/9")));
        let upper = (place(None, "fs"), place(None, "work"));
        assert_eq!(got.mounts[1].upper, Some(upper));
        assert!(refused(&[erofs, overlay("workdir=/t/work")]).contains("two directories"));
    }

    #[test]
    fn what_a_layer_is_checked_against_lies_beside_it_or_where_it_is_said() {
        let sidecar = |option: &str| {
            let mut plan = plan(&[mount("erofs", "/s/3/l", &["ro", "loop", option])]);
            plan.mounts.remove(0).verity
        };
        let found = |path: &str, required| {
            Some(Sidecar {
                path: path.into(),
                required,
            })
        };
        assert_eq!(sidecar("X-containerd.dmverity=/s/x"), found("/s/x", true));
        assert_eq!(
            sidecar("X-containerd.dmverity=on"),
            found("/s/3/l.dmverity", true)
        );
        assert_eq!(
            sidecar("X-containerd.dmverity=auto"),
            found("/s/3/l.dmverity", false)
        );
        assert_eq!(sidecar("X-containerd.dmverity=off"), None);
    }

    #[test]
    fn the_layers_of_a_user_namespace_are_seen_through_its_map() {
        let options = [
            "lowerdir={{ overlay 0 1 }}",
            "uidmap=0:65536:1000,1000:5:1",
            "gidmap=0:70000:65536",
        ];
        let layer = mount("erofs", "/l", &["ro"]);
        let plan = plan(&[layer.clone(), layer, mount("format/overlay", "o", &options)]);
        let range = |stored, seen, length| IdRange {
            stored,
            seen,
            length,
        };
        let map = IdMap {
            users: vec![range(0, 65536, 1000), range(1000, 5, 1)],
            groups: vec![range(0, 70000, 65536)],
        };
        assert_eq!(plan.mounts[2].map, Some(map));
        assert_eq!(plan.mounts[0].map, None);
        assert_eq!(plan.mounts[2].options, Vec::<String>::new());
    }

    #[test]
    fn one_writable_layer_alone_is_bound() {
        let got = plan(&[
            mount("ext4", "/s/1/rwlayer.img", &["rw", "loop"]),
            mount(
                "format/mkdir/bind",
                "{{ mount 0 }}/upper",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "rw",
                    "rbind",
                ],
            ),
        ]);
        assert_eq!(got.mounts[1].lower, [place(Some(0), "upper")]);
        assert_eq!(got.mounts[1].options, ["rw"]);
    }

    #[test]
    fn a_range_goes_either_way_and_never_to_a_later_mount() {
        let erofs = || mount("erofs", "/l", &["ro"]);
        let overlay = |lower: &str| mount("overlay", "overlay", &[&format!("lowerdir={lower}")]);
        let of = |lower| Plan::of(&[erofs(), erofs(), erofs(), overlay(lower)]);
        let numbers = |lower| -> Vec<_> {
            let plan = of(lower).unwrap().unwrap();
            plan.mounts[3]
                .lower
                .iter()
                .map(|place| place.mount.unwrap())
                .collect()
        };
        assert_eq!(numbers("{{ overlay 0 2 }}"), [0, 1, 2]);
        assert_eq!(numbers("{{overlay 2 0}}"), [2, 1, 0]);
        assert_eq!(numbers("{{ mount 2 }}:{{ mount 0 }}"), [2, 0]);
        for wrong in [
            "{{ mount 3 }}",
            "{{ mount -1 }}",
            "{{ overlay 0 9 }}",
            "{{ overlay 0 1 }}/x",
            "{{ mount 0 }}/../x",
            "{{ mount 0",
            "{{ other 0 }}",
            "/host",
            "",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_guest_cannot_have_is_refused_with_the_fix() {
        let verity = "X-containerd.dmverity=/s/3/layer.erofs.dmverity";
        assert!(refused(&[mount("ext4", "/l", &["rw", verity])]).contains("dmverity_mode"));
        let merged = ["ro", verity, "device=/m"];
        assert!(refused(&[mount("erofs", "/l", &merged)]).contains("dmverity_mode"));
        let other = "X-containerd.dmverity.roothash=12";
        assert!(refused(&[mount("erofs", "/l", &["ro", other])]).contains("not known"));
        let relative = "X-containerd.dmverity=sidecar";
        assert!(refused(&[mount("erofs", "/l", &["ro", relative])]).contains("absolute"));
        let mapped = |options: &[&str]| {
            refused(&[
                mount("erofs", "/l", &["ro"]),
                mount("overlay", "o", options),
            ])
        };
        let (lower, users, groups) = ("lowerdir={{ mount 0 }}", "uidmap=0:9:9", "gidmap=0:9:9");
        assert!(mapped(&[lower, users]).contains("together"));
        assert!(mapped(&["lowerdir={{ mount 0 }}/a", users, groups]).contains("hostUsers"));
        for wrong in [
            "uidmap=",
            "uidmap=0:1",
            "uidmap=0:1:2:3",
            "uidmap=0:1:-2",
            "uidmap=0:1:2,",
        ] {
            assert!(
                mapped(&[lower, wrong, groups]).contains("no map of ids"),
                "{wrong}"
            );
        }
        assert!(refused(&[mount("btrfs", "/dev/sda1", &["subvolid=5"])]).contains("snapshotter"));
        assert!(
            refused(&[mount("erofs", "/l", &[]), mount("mkfs/ext4", "/m", &[])]).contains("mkfs")
        );
        assert!(refused(&[mount("ext4", "l", &[])]).contains("absolute"));
        let many = vec![mount("erofs", "/l", &["ro"]); 251];
        assert!(refused(&many).contains("251 layers"));
    }

    proptest! {
        #[test]
        fn any_words_are_a_plan_or_a_refusal(
            mounts in prop::collection::vec(
                ("(format/)?(mkdir/)?(ext4|erofs|overlay|bind|x)", "(/a|\\{\\{ mount [0-9] \\}\\}/?[a.]*|.{0,8})",
                 prop::collection::vec("(ro|loop|lowerdir=|upperdir=|workdir=|device=)?(\\{\\{ (mount|overlay) [0-9 ]{0,4}\\}\\}|/.{0,5})?", 0..4)),
                0..5)
        ) {
            let mounts: Vec<Mount> = mounts.into_iter().map(|(kind, source, options)| Mount { kind, source, options }).collect();
            if let Ok(Some(plan)) = Plan::of(&mounts) {
                for (index, mount) in plan.mounts.iter().enumerate() {
                    let places = mount.lower.iter().chain(mount.directories.iter().map(|(place, _)| place));
                    for place in places.chain(mount.upper.iter().flat_map(|(a, b)| [a, b])) {
                        prop_assert!(place.mount.is_none_or(|earlier| earlier < index));
                        prop_assert!(!place.path.split('/').any(|name| name == ".."));
                    }
                }
            }
        }
    }
}
