//! Which of a pod's bind mounts are direct volumes, those that a storage driver has handed over as block devices instead of
//! mounting them, and which part of one each shows.
//!
//! Trusted: the node's root, who says which there are. Blocking code.

use std::fs;
use std::path::{Path, PathBuf};

use super::classify::sub_path;
use super::mountinfo::MountTable;
use crate::asked::spec::BindMount;
use crate::error::{Error, Result};
use crate::guest::vm::shown;
use crate::node::direct_volumes::DirectVolumes;
use crate::node::direct_volumes::mount_info::DirectVolume;

/// Kubelet's plugin whose volumes drivers make.
const CSI: &str = "kubernetes.io~csi";

/// The direct volume that a mount shows, and which part of it, relative to its top; none if it shows something else.
///
/// # Errors
/// `InvalidArgument` for one that cannot be had, or if they are not `allowed`.
pub(super) fn find(
    bind: &BindMount,
    table: &MountTable,
    allowed: bool,
) -> Result<Option<(DirectVolume, PathBuf)>> {
    find_in(&DirectVolumes::of_node(), bind, table, allowed)
}

fn find_in(
    volumes: &DirectVolumes,
    bind: &BindMount,
    table: &MountTable,
    allowed: bool,
) -> Result<Option<(DirectVolume, PathBuf)>> {
    if !volumes.any() {
        return Ok(None);
    }
    let refused = |path: &Path, why: &str| {
        Error::invalid(format!(
            "mount on {}: {} is a direct volume: {why}",
            bind.destination,
            shown(path)
        ))
    };
    let Some((path, file, inside)) =
        place(volumes, bind, table).map_err(|(path, why)| refused(&path, &why))?
    else {
        return Ok(None);
    };
    if !allowed {
        return Err(refused(
            &path,
            "a storage driver hands it over as a block device, which this handler does not take: set direct_volumes = \
             true in its configuration",
        ));
    }
    let volume = volumes.read(&path, &file);
    let volume = volume.map_err(|why| refused(&path, &why))?;
    Ok(Some((volume, inside)))
}

/// A direct volume's path, its file, and the way from its top; an error is a path and why it cannot be used.
type Place = std::result::Result<Option<(PathBuf, PathBuf, PathBuf)>, (PathBuf, String)>;

fn place(volumes: &DirectVolumes, bind: &BindMount, table: &MountTable) -> Place {
    for path in bind.source.ancestors() {
        if let Some(file) = volumes.file(path) {
            let inside = bind.source.strip_prefix(path).unwrap_or(Path::new(""));
            return Ok(Some((path.to_owned(), file, inside.to_owned())));
        }
    }
    // Kubelet binds a part of the directory on the node, in which the volume is not mounted.
    let Some((pod, name)) = sub_path(&bind.source) else {
        return Ok(None);
    };
    let path = pod.join("volumes").join(CSI).join(name).join("mount");
    let Some(file) = volumes.file(&path) else {
        return Ok(None);
    };
    let inside = || {
        let (volume, whole) = table.place(&fs::canonicalize(&path).ok()?)?;
        let (mounted, part) = table.place(&fs::canonicalize(&bind.source).ok()?)?;
        let same = volume.device == mounted.device;
        Some(part.strip_prefix(whole).ok().filter(|_| same)?.to_owned())
    };
    match inside() {
        Some(inside) => Ok(Some((path, file, inside))),
        None => {
            let why = format!("which part of it {} is cannot be told", shown(&bind.source));
            Err((path, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    struct Node {
        dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("device"), "x").unwrap();
            Self { dir }
        }

        fn volumes(&self) -> DirectVolumes {
            DirectVolumes::at(&self.dir.path().join("direct-volumes"))
        }

        fn add(&self, path: &Path) -> PathBuf {
            let device = self.dir.path().join("device");
            let text = format!(r#"{{"device":"{}","fstype":"ext4"}}"#, device.display());
            self.volumes().add(path, &text).unwrap()
        }

        fn find(&self, source: &Path) -> Result<Option<(DirectVolume, PathBuf)>> {
            self.find_in(source, &MountTable::default(), true)
        }

        fn find_in(
            &self,
            source: &Path,
            table: &MountTable,
            allowed: bool,
        ) -> Result<Option<(DirectVolume, PathBuf)>> {
            let bind = BindMount {
                destination: "/data".into(),
                ..BindMount::plain(source)
            };
            find_in(&self.volumes(), &bind, table, allowed)
        }
    }

    #[test]
    fn a_volume_is_found_by_its_path_and_by_those_below_it() {
        let node = Node::new();
        let path = Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount");
        assert_eq!(node.find(path).unwrap(), None, "no directory at all");
        node.add(path);
        let (volume, inside) = node.find(path).unwrap().unwrap();
        assert_eq!((volume.path.as_path(), inside.as_os_str().len()), (path, 0));
        assert_eq!(volume.file_system, "ext4");
        let (_, inside) = node.find(&path.join("a/b")).unwrap().unwrap();
        assert_eq!(inside, Path::new("a/b"));
        let above = Path::new("/var/lib/kubelet/pods/u");
        assert_eq!(node.find(above).unwrap(), None);
    }

    #[test]
    fn one_that_cannot_be_had_or_is_not_allowed_is_refused_by_its_path_and_the_mounts() {
        let node = Node::new();
        let path = Path::new("/v");
        let file = node.add(path);
        let error = node
            .find_in(path, &MountTable::default(), false)
            .unwrap_err();
        assert!(error.message.contains("direct_volumes = true"), "{error}");
        fs::write(&file, "{").unwrap();
        let error = node.find(path).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        let file = file.display().to_string();
        for part in ["/data", "/v is a direct volume", &file, "not what"] {
            assert!(error.message.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_sub_path_is_a_part_of_the_volume_and_not_of_the_nodes_directory() {
        let node = Node::new();
        let pod = fs::canonicalize(node.dir.path()).unwrap().join("pods/u");
        let volume = pod.join("volumes/kubernetes.io~csi/pv/mount");
        let bound = pod.join("volume-subpaths/pv/main/0");
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::create_dir_all(&bound).unwrap();
        node.add(&volume);
        let table = |root: &str| {
            let table = format!(
                "1 0 8:1 / / rw - ext4 x rw\n2 1 8:1 {root} {} rw - ext4 x rw\n",
                bound.display()
            );
            MountTable::parse(table.as_bytes())
        };
        let found = table(&volume.join("a/b").display().to_string());
        let (found, inside) = node.find_in(&bound, &found, true).unwrap().unwrap();
        assert_eq!((found.path, inside), (volume, "a/b".into()));
        let error = node
            .find_in(&bound, &table("/elsewhere"), true)
            .unwrap_err();
        assert!(error.message.contains("cannot be told"), "{error}");
    }
}
