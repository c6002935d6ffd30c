//! Volumes that a storage driver has handed over as block devices instead of mounting them: Kata Containers' convention of
//! direct volumes. The driver writes down, under the path at which kubelet expects the volume, which device it is and what is
//! on it; nobody on the node mounts that.
//!
//! Trusted: the node's root, whose directory it is. Blocking code.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde::Deserialize;

use super::classify::sub_path;
use super::mountinfo::MountTable;
use crate::asked::spec::BindMount;
use crate::error::{Error, Result};
use crate::guest::vm::shown;

/// Where drivers write: one directory a volume, named by its path in URL-safe base64, with padding (Kata's Go library) or
/// without (its Rust one).
const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";
/// Most bytes of one.
const LONGEST: u64 = 64 << 10;
/// What the types are called that are a block device with a file system.
const BLOCK: [&str; 3] = ["block", "directvol", ""];
/// What Kata's guests do with a volume and this one does not.
const UNKNOWN_TO_US: [&str; 3] = ["encryptionKey", "createFilesystem", "create_filesystem"];
/// Kubelet's plugin whose volumes drivers make.
const CSI: &str = "kubernetes.io~csi";

/// A volume on a device that nobody has mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct DirectVolume {
    /// The path that it stands for.
    pub(super) path: PathBuf,
    /// Its block device, or an image in a file.
    pub(super) device: PathBuf,
    /// What is on it.
    pub(super) file_system: String,
    /// As in fstab.
    pub(super) options: Vec<String>,
    /// It is to be given to this group.
    pub(super) group: Option<Group>,
}

/// `fsGroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Group {
    pub(super) gid: u32,
    /// What has its top as it should be is left as it is.
    pub(super) unless_root: bool,
}

impl DirectVolume {
    /// Nothing is to be written to the device.
    pub(super) fn readonly(&self) -> bool {
        let words = self.options.iter().flat_map(|option| option.split(','));
        let mut last_first = words.rev();
        last_first.find(|word| matches!(*word, "ro" | "rw")) == Some("ro")
    }
}

/// What a driver has written. Both of Kata's libraries have names of their own for the same.
#[derive(Deserialize)]
struct Info {
    #[serde(default, rename = "volume-type", alias = "volume_type")]
    kind: String,
    device: PathBuf,
    #[serde(default, rename = "fstype", alias = "fs_type")]
    file_system: String,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(default)]
    options: Option<Vec<String>>,
}

/// The direct volume that a mount shows, and which part of it, relative to its top; none if it shows something else.
///
/// # Errors
/// `InvalidArgument` for one that cannot be had, or if they are not `allowed`.
pub(super) fn find(
    bind: &BindMount,
    table: &MountTable,
    allowed: bool,
) -> Result<Option<(DirectVolume, PathBuf)>> {
    find_in(Path::new(ROOT), bind, table, allowed)
}

fn find_in(
    root: &Path,
    bind: &BindMount,
    table: &MountTable,
    allowed: bool,
) -> Result<Option<(DirectVolume, PathBuf)>> {
    // Most nodes have none.
    if !root.exists() {
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
        place(root, bind, table).map_err(|(path, why)| refused(&path, &why))?
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
    let read = read(&file).and_then(|text| volume(&path, &text));
    let volume = read.map_err(|why| refused(&path, &format!("{}: {why}", file.display())))?;
    Ok(Some((volume, inside)))
}

/// A direct volume's path, its file, and the way from its top; an error is a path and why it cannot be used.
type Place = std::result::Result<Option<(PathBuf, PathBuf, PathBuf)>, (PathBuf, String)>;

fn place(root: &Path, bind: &BindMount, table: &MountTable) -> Place {
    for path in bind.source.ancestors() {
        if let Some(file) = file_of(root, path) {
            let inside = bind.source.strip_prefix(path).unwrap_or(Path::new(""));
            return Ok(Some((path.to_owned(), file, inside.to_owned())));
        }
    }
    // Kubelet binds a part of the directory on the node, in which the volume is not mounted.
    let Some((pod, name)) = sub_path(&bind.source) else {
        return Ok(None);
    };
    let path = pod.join("volumes").join(CSI).join(name).join("mount");
    let Some(file) = file_of(root, &path) else {
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

fn file_of(root: &Path, path: &Path) -> Option<PathBuf> {
    let path = path.as_os_str().as_bytes();
    let names = [URL_SAFE.encode(path), URL_SAFE_NO_PAD.encode(path)];
    let mut files = names.iter().map(|name| root.join(name).join(FILE));
    files.find(|file| file.exists())
}

fn read(file: &Path) -> std::result::Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        fs::File::open(file)?
            .take(LONGEST + 1)
            .read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|error| error.to_string())?;
    if u64::try_from(text.len()).is_ok_and(|length| length > LONGEST) {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    Ok(text)
}

fn volume(path: &Path, text: &[u8]) -> std::result::Result<DirectVolume, String> {
    let info: Info = serde_json::from_slice(text)
        .map_err(|error| format!("it is not what a storage driver writes there: {error}"))?;
    if !BLOCK.contains(&info.kind.as_str()) {
        return Err(format!(
            "a volume of type {:?} cannot be had: there are {:?} and {:?}",
            info.kind, BLOCK[0], BLOCK[1]
        ));
    }
    if !info.device.is_absolute() {
        return Err(format!("its device {:?} is no absolute path", info.device));
    }
    if info.file_system.is_empty() {
        return Err("it names no file system (fstype)".to_owned());
    }
    let metadata = info.metadata.unwrap_or_default();
    if let Some(key) = UNKNOWN_TO_US
        .iter()
        .find(|key| metadata.contains_key(**key))
    {
        return Err(format!(
            "metadata {key}: the guest neither makes nor encrypts file systems: let the driver do that"
        ));
    }
    let group = match metadata.get("fsGroup") {
        None => None,
        Some(text) => {
            let gid = text
                .parse()
                .map_err(|_| format!("metadata fsGroup: {text:?} is no group's number"))?;
            let unless_root = match metadata.get("fsGroupChangePolicy").map(String::as_str) {
                Some("OnRootMismatch") => true,
                None | Some("" | "Always") => false,
                Some(other) => {
                    return Err(format!(
                        "metadata fsGroupChangePolicy: {other:?} is neither \"Always\" nor \"OnRootMismatch\""
                    ));
                }
            };
            Some(Group { gid, unless_root })
        }
    };
    let device = present(&info.device)?.into_owned();
    Ok(DirectVolume {
        path: path.to_owned(),
        device,
        file_system: info.file_system,
        options: info.options.unwrap_or_default(),
        group,
    })
}

/// The device, if it is there. Links as udev makes them are followed once and for all.
fn present(device: &Path) -> std::result::Result<Cow<'_, Path>, String> {
    match fs::canonicalize(device) {
        Ok(found) => Ok(Cow::Owned(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "its device {} is missing on this node: attach it before the pod is started",
            device.display()
        )),
        Err(error) => Err(format!("its device {}: {error}", device.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::spec::Propagation;
    use crate::error::Kind;
    use proptest::prelude::*;

    struct Node {
        dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("device"), "x").unwrap();
            Self { dir }
        }

        fn root(&self) -> PathBuf {
            self.dir.path().join("direct-volumes")
        }

        fn device(&self) -> String {
            let device = fs::canonicalize(self.dir.path().join("device")).unwrap();
            device.display().to_string()
        }

        fn add(&self, path: &Path, text: &str) {
            let name = URL_SAFE.encode(path.as_os_str().as_bytes());
            fs::create_dir_all(self.root().join(&name)).unwrap();
            fs::write(self.root().join(name).join(FILE), text).unwrap();
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
                index: 0,
                source: source.to_owned(),
                destination: "/data".into(),
                readonly: false,
                readonly_below: false,
                recursive: true,
                propagation: Propagation::Private,
                id_map: None,
            };
            find_in(&self.root(), &bind, table, allowed)
        }
    }

    #[test]
    fn what_both_libraries_of_katas_write_is_read() {
        let node = Node::new();
        let device = node.device();
        let path = Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount");
        assert_eq!(node.find(path).unwrap(), None, "no directory at all");
        node.add(
            path,
            &format!(
                r#"{{"volume-type":"block","device":"{device}","fstype":"ext4",
                     "metadata":{{"fsGroup":"2000","fsGroupChangePolicy":"OnRootMismatch","other":"x"}},"options":["noatime","ro"]}}"#
            ),
        );
        let (volume, inside) = node.find(path).unwrap().unwrap();
        assert_eq!((volume.path.as_path(), inside.as_os_str().len()), (path, 0));
        assert_eq!(volume.device, Path::new(&device));
        assert_eq!(volume.file_system, "ext4");
        assert!(volume.readonly());
        assert_eq!(
            volume.group,
            Some(Group {
                gid: 2000,
                unless_root: true
            })
        );
        let (_, inside) = node.find(&path.join("a/b")).unwrap().unwrap();
        assert_eq!(inside, Path::new("a/b"));
        assert_eq!(
            node.find(Path::new("/var/lib/kubelet/pods/u")).unwrap(),
            None
        );
        // The other library's spelling, and its name of the directory.
        let other = Path::new("/kubelet/kata-direct-vol-002/directvol002");
        let name = URL_SAFE_NO_PAD.encode(other.as_os_str().as_bytes());
        assert_ne!(
            name,
            URL_SAFE.encode(other.as_os_str().as_bytes()),
            "it would be padded"
        );
        fs::create_dir_all(node.root().join(&name)).unwrap();
        let text = format!(
            r#"{{"volume_type":"directvol","device":"{device}","fs_type":"xfs","metadata":{{}},"options":[]}}"#
        );
        fs::write(node.root().join(&name).join(FILE), text).unwrap();
        let (volume, _) = node.find(other).unwrap().unwrap();
        assert_eq!((volume.file_system.as_str(), volume.group), ("xfs", None));
        assert!(!volume.readonly());
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_the_reason() {
        let node = Node::new();
        let device = node.device();
        let path = Path::new("/v");
        let with = |text: &str| {
            node.add(path, &text.replace("DEVICE", &device));
            node.find(path).unwrap_err()
        };
        let ext4 = r#""device":"DEVICE","fstype":"ext4""#;
        for (text, reason) in [
            ("{".to_owned(), "not what a storage driver writes"),
            ("[]".to_owned(), "not what a storage driver writes"),
            (r#"{"fstype":"ext4"}"#.to_owned(), "device"),
            (
                r#"{"device":"dev/x","fstype":"ext4"}"#.to_owned(),
                "no absolute path",
            ),
            (
                r#"{"device":"/nonexistent","fstype":"ext4"}"#.to_owned(),
                "missing on this node",
            ),
            (r#"{"device":"DEVICE"}"#.to_owned(), "no file system"),
            (format!(r#"{{{ext4},"volume-type":"spdkvol"}}"#), "spdkvol"),
            (
                format!(r#"{{{ext4},"metadata":{{"encryptionKey":"k"}}}}"#),
                "encryptionKey",
            ),
            (
                format!(r#"{{{ext4},"metadata":{{"fsGroup":"-1"}}}}"#),
                "fsGroup",
            ),
            (
                format!(r#"{{{ext4},"metadata":{{"fsGroup":"1","fsGroupChangePolicy":"x"}}}}"#),
                "fsGroupChangePolicy",
            ),
            (format!("{}{}", "{", " ".repeat(1 << 17)), "longer than"),
        ] {
            let error = with(&text);
            assert_eq!(error.kind, Kind::InvalidArgument, "{text}");
            for part in [reason, "/data", "/v is a direct volume"] {
                assert!(error.message.contains(part), "{part}: {error}");
            }
        }
        let error = node
            .find_in(path, &MountTable::default(), false)
            .unwrap_err();
        assert!(error.message.contains("direct_volumes = true"), "{error}");
    }

    #[test]
    fn a_sub_path_is_a_part_of_the_volume_and_not_of_the_nodes_directory() {
        let node = Node::new();
        let pod = fs::canonicalize(node.dir.path()).unwrap().join("pods/u");
        let volume = pod.join("volumes/kubernetes.io~csi/pv/mount");
        let bound = pod.join("volume-subpaths/pv/main/0");
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::create_dir_all(&bound).unwrap();
        node.add(
            &volume,
            &format!(r#"{{"device":"{}","fstype":"ext4"}}"#, node.device()),
        );
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

    proptest! {
        #[test]
        fn nothing_that_is_written_there_is_taken_for_more_than_it_is(text in "[\\[\\]{}:,\"a-z0-9 ]{0,60}") {
            if let Ok(volume) = volume(Path::new("/v"), text.as_bytes()) {
                prop_assert!(volume.device.is_absolute() && !volume.file_system.is_empty());
            }
        }
    }
}
