//! What a mount of a container shows of the node: two mounts that show the same are one file system in the guest, by
//! whatever path and mount of the node each is reached, and what is a part of another's can be taken from that one.
//!
//! Trusted: the mount table, but for the paths in it. Where something lies in a volume is its containers' to change at any
//! moment, so a part is looked for anew ([`leads`]), and the agent follows no link on the way.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use brig_hypervisor::share::{FileId, IdMap};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fstat, openat2};

use super::mountinfo::{MountTable, Mounted};
use super::snapshot::identity_of;
use crate::asked::spec::{BindMount, Propagation};

/// A file system as a mount of the node shows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileSystem {
    device: (u32, u32),
    kind: String,
    source: OsString,
    readonly: bool,
}

impl FileSystem {
    fn of(mounted: &Mounted) -> Self {
        Self {
            device: mounted.device,
            kind: mounted.kind.clone(),
            source: mounted.source.clone(),
            readonly: mounted.readonly,
        }
    }
}

/// What is mounted below: where, and what of a file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Below {
    way: PathBuf,
    root: PathBuf,
    file_system: FileSystem,
}

/// What makes two mounts of a pod the same. Mounts made on the node in between make a difference, because
/// a bind mount shows what there was when its container was created.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) identity: FileId,
    pub(super) directory: bool,
    file_system: Option<FileSystem>,
    /// Where in its file system it lies; none of what was removed there.
    place: Option<PathBuf>,
    /// Parents first.
    below: Vec<Below>,
    /// Later mounts of the node are seen, and those of the pod's other containers. What the node mounts later it mounts by
    /// paths, so here this one counts.
    pub(super) follows: Option<PathBuf>,
    /// Where read-only cannot be taken back: mounts below, or a read-only source.
    readonly: Option<bool>,
    /// Read-only does not hold for the mounts below.
    pub(super) writable_below: bool,
    /// How owners are seen, in a pod with a user namespace.
    pub(super) id_map: Option<IdMap>,
    /// Nobody but the pod writes there.
    pub(super) own: bool,
    /// Something in it may never answer.
    pub(super) remote: bool,
}

impl Key {
    /// Of a source without links. Blocking.
    pub(super) fn of(
        bind: &BindMount,
        source: &Path,
        identity: FileId,
        table: &MountTable,
    ) -> Self {
        let mut seen = table.seen_from(source);
        let remote = seen
            .iter()
            .take(if bind.recursive { seen.len() } else { 1 })
            .any(|mounted| mounted.is_remote());
        let follows = bind.propagation != Propagation::Private && bind.recursive;
        // Those below come and go for all who follow.
        if !bind.recursive || follows {
            seen.truncate(1);
        }
        let plain = !follows && seen.len() == 1 && seen.iter().all(|mounted| !mounted.readonly);
        let mut below: Vec<Below> = seen
            .iter()
            .skip(1)
            .map(|mounted| Below {
                way: way(source, &mounted.point),
                root: mounted.root.clone(),
                file_system: FileSystem::of(mounted),
            })
            .collect();
        // The table is in the order in which they were made; of those at one place the last covers the others.
        below.sort_by(|one, other| one.way.cmp(&other.way));
        Self {
            directory: source.is_dir(),
            identity,
            file_system: seen.first().map(|mounted| FileSystem::of(mounted)),
            place: table.place(source).map(|(_, place)| place),
            follows: follows.then(|| source.to_owned()),
            readonly: (!plain).then_some(bind.readonly),
            writable_below: bind.readonly && !bind.readonly_below && !below.is_empty(),
            below,
            id_map: bind.id_map.clone(),
            own: false,
            remote,
        }
    }

    /// Of a directory of the pod's own, all of it, whatever of it is mounted and how.
    pub(super) fn of_own(identity: FileId, volume: &Mounted, place: PathBuf) -> Self {
        Self {
            identity,
            directory: true,
            file_system: Some(FileSystem::of(volume)),
            place: Some(place),
            below: Vec::new(),
            follows: None,
            readonly: None,
            writable_below: false,
            id_map: None,
            own: true,
            remote: false,
        }
    }

    /// It shows mounts below its top.
    pub(super) fn is_recursive(&self) -> bool {
        !self.below.is_empty()
    }

    /// How deep in its file system it lies.
    pub(super) fn depth(&self) -> usize {
        self.place
            .as_ref()
            .map_or(0, |place| place.components().count())
    }

    /// The way in this to what `part` shows, if this should show all of that there and nothing else, as the mount table has
    /// it: see [`leads`].
    pub(super) fn way_to(&self, part: &Self) -> Option<String> {
        let stays = |key: &Self| !key.own && key.follows.is_none();
        let one = self.file_system.is_some()
            && self.file_system == part.file_system
            && self.id_map == part.id_map;
        if !self.directory || !stays(self) || !stays(part) || !one || part.is_recursive() {
            return None;
        }
        let way = part.place.as_ref()?.strip_prefix(self.place.as_ref()?);
        let way = way.ok().filter(|way| !way.as_os_str().is_empty())?;
        // What is mounted on the way, or there, hides it or is not the part's.
        let other = |below: &Below| way.starts_with(&below.way) || below.way.starts_with(way);
        if self.below.iter().any(other) {
            return None;
        }
        way.to_str().map(str::to_owned)
    }
}

fn way(source: &Path, point: &Path) -> PathBuf {
    point.strip_prefix(source).unwrap_or(point).to_owned()
}

/// Whether the way leads from `top`, which must be the directory of that identity, to a file or directory of `part`'s,
/// without links and on one mount. The mount table alone does not tell: two directories of an NFS server can both be
/// the top of one file system, and a container may have renamed what lies on the way. Blocking.
pub(super) fn leads(top: &Path, identity: FileId, way: &str, part: FileId) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let plain = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let below = plain | ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
    let is = |found: &_, wanted| fstat(found).is_ok_and(|stat| identity_of(&stat) == wanted);
    let top = openat2(CWD, top, flags, Mode::empty(), plain).ok();
    let Some(top) = top.filter(|top| is(top, identity)) else {
        return false;
    };
    openat2(&top, way, flags, Mode::empty(), below).is_ok_and(|found| is(&found, part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn bind(readonly: bool) -> BindMount {
        BindMount {
            readonly,
            ..BindMount::plain(Path::new(""))
        }
    }

    fn key_of(bind: &BindMount, source: &str, inode: u64, table: &str) -> Key {
        let identity = FileId { device: 1, inode };
        let table = MountTable::parse(table.as_bytes());
        let mut key = Key::of(bind, Path::new(source), identity, &table);
        // None of them is on this node.
        key.directory = true;
        key
    }

    fn key(source: &str, inode: u64, table: &str) -> Key {
        key_of(&bind(false), source, inode, table)
    }

    const VOLUME: &str = "1 0 8:1 / / rw - ext4 root rw\n\
        2 1 0:30 / /pods/u/volumes/csi/data/mount rw - nfs4 s:/x rw\n\
        3 1 0:30 /app /pods/u/volume-subpaths/data/main/0 rw - nfs4 s:/x rw\n\
        4 1 0:30 /app /pods/u/volume-subpaths/data/side/2 rw - nfs4 s:/x rw\n\
        5 1 0:30 /app /pods/u/volume-subpaths/data/reader/0 ro - nfs4 s:/x rw\n\
        6 1 0:30 /app//deleted /pods/u/volume-subpaths/data/gone/0 rw - nfs4 s:/x rw\n";
    const WHOLE: &str = "/pods/u/volumes/csi/data/mount";

    fn sub_path(container: &str) -> String {
        format!("/pods/u/volume-subpaths/data/{container}")
    }

    #[test]
    fn one_directory_is_one_by_whatever_mount_it_is_reached() {
        let main = key(&sub_path("main/0"), 7, VOLUME);
        assert_eq!(main, key(&sub_path("side/2"), 7, VOLUME));
        assert_eq!(main, key(&format!("{WHOLE}/app"), 7, VOLUME));
        assert_ne!(main, key(&sub_path("main/0"), 8, VOLUME));
        assert_ne!(main, key(&sub_path("reader/0"), 7, VOLUME));
        let mut follows = bind(false);
        follows.propagation = Propagation::HostToContainer;
        let follower = |path| key_of(&follows, &sub_path(path), 7, VOLUME);
        assert_eq!(follower("main/0"), follower("main/0"));
        assert_ne!(follower("main/0"), follower("side/2"));
        assert_ne!(follower("main/0"), main);
        // Without mounts below it makes no difference whether they were asked for.
        let mut flat = bind(false);
        flat.recursive = false;
        assert_eq!(key_of(&flat, &sub_path("main/0"), 7, VOLUME), main);
    }

    #[test]
    fn a_mount_below_that_was_replaced_makes_a_difference_though_it_has_the_same_number() {
        let table = |below: &str| format!("1 0 8:1 / / rw - ext4 x rw\n7 1 {below}\n");
        let first = key("/srv", 2, &table("0:30 / /srv/disk rw - nfs4 s:/a rw"));
        for other in [
            "0:31 / /srv/disk rw - nfs4 s:/a rw",
            "0:30 /in /srv/disk rw - nfs4 s:/a rw",
            "0:30 / /srv/other rw - nfs4 s:/a rw",
            "0:30 / /srv/disk ro - nfs4 s:/a rw",
            "0:30 / /srv/disk rw - nfs4 s:/b rw",
        ] {
            assert_ne!(first, key("/srv", 2, &table(other)), "{other}");
        }
        let again = table("0:30 / /srv/disk rw - nfs4 s:/a rw").replace("7 1", "9 1");
        assert_eq!(first, key("/srv", 2, &again));
    }

    #[test]
    fn a_part_is_found_where_the_whole_shows_it() {
        let whole = key(WHOLE, 2, VOLUME);
        let part = |path: &str| whole.way_to(&key(path, 7, VOLUME));
        assert_eq!(part(&sub_path("main/0")).as_deref(), Some("app"));
        assert_eq!(part(&format!("{WHOLE}/a/b")).as_deref(), Some("a/b"));
        assert_eq!(part(WHOLE), None, "it is no part");
        assert_eq!(part(&sub_path("reader/0")), None, "the node's mount is ro");
        assert_eq!(part(&sub_path("gone/0")), None);
        assert_eq!(part("/pods/u"), None);
        let main = key(&sub_path("main/0"), 7, VOLUME);
        assert_eq!(main.way_to(&whole), None);
        let deeper = key(&format!("{WHOLE}/app/x"), 9, VOLUME);
        assert_eq!(main.way_to(&deeper).as_deref(), Some("x"));
    }

    #[test]
    fn what_is_mounted_in_or_around_a_part_and_who_follows_keep_it_apart() {
        let table = "1 0 8:1 / / rw - ext4 x rw\n2 1 8:2 / /srv/a/disk rw - ext4 y rw\n";
        let whole = key("/srv", 2, table);
        let part = |path: &str| whole.way_to(&key(path, 7, table));
        assert_eq!(part("/srv/b").as_deref(), Some("b"));
        assert_eq!(part("/srv/ab").as_deref(), Some("ab"));
        assert_eq!(part("/srv/a/b").as_deref(), Some("a/b"));
        for apart in ["/srv/a", "/srv/a/disk", "/srv/a/disk/x"] {
            assert_eq!(part(apart), None, "{apart}");
        }
        let mut flat = bind(false);
        flat.recursive = false;
        let below = key_of(&flat, "/srv/a", 7, table);
        assert_eq!(whole.way_to(&below), None);
        let mut follows = bind(false);
        follows.propagation = Propagation::HostToContainer;
        let follower = key_of(&follows, "/srv/b", 7, table);
        assert_eq!(whole.way_to(&follower), None);
        let around = key_of(&follows, "/srv", 2, table);
        assert_eq!(around.way_to(&key("/srv/b", 7, table)), None);
        let mut file = whole.clone();
        file.directory = false;
        assert_eq!(file.way_to(&key("/srv/b", 7, table)), None);
    }

    #[test]
    fn a_way_is_believed_only_if_it_leads_there_without_links() {
        let dir = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(base.join("v/a/b")).unwrap();
        fs::create_dir(base.join("other")).unwrap();
        fs::write(base.join("v/a/file"), "x").unwrap();
        symlink("a", base.join("v/link")).unwrap();
        symlink(base.join("other"), base.join("v/out")).unwrap();
        let of = |path: &str| super::super::snapshot::identity(&base.join(path)).unwrap();
        let top = base.join("v");
        let to = |way: &str, part| leads(&top, of("v"), way, part);
        assert!(to("a/b", of("v/a/b")) && to("a/file", of("v/a/file")));
        assert!(!to("a/b", of("v/a")), "something else is there");
        assert!(!to("link/b", of("v/a/b")) && !to("out", of("other")));
        assert!(!to("../other", of("other")) && !to("gone", of("other")));
        assert!(!leads(&top, of("other"), "a/b", of("v/a/b")));
        assert!(!leads(&base.join("none"), of("v"), "a/b", of("v/a/b")));
    }
}
