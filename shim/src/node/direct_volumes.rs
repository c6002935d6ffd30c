//! The node's direct volumes: those that a storage driver hands over as block devices instead of mounting them, by Kata
//! Containers' convention. What is known of one is written down under the path at which kubelet expects it, and nobody on the
//! node mounts it.
//!
//! Trusted: the node's root, whose directory it is. Blocking code.

pub mod mount_info;

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};

use crate::error::{Error, Kind, Result};
use mount_info::DirectVolume;

/// Where they are written down: a directory each, named by its path in URL-safe base64, with padding (Kata's Go library) or
/// without (its Rust one).
const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";
/// Most bytes of one.
const LONGEST: u64 = 64 << 10;
/// Most bytes of a name in a directory, NAME_MAX.
const LONGEST_NAME: usize = 255;

/// All that are written down on a node.
#[derive(Debug)]
pub struct DirectVolumes {
    root: PathBuf,
}

impl DirectVolumes {
    /// This node's.
    #[must_use]
    pub fn of_node() -> Self {
        Self::at(Path::new(ROOT))
    }

    /// Those in another directory.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Whether there may be any: most nodes have none.
    #[must_use]
    pub fn any(&self) -> bool {
        self.root.exists()
    }

    /// The file of the one at a path, if there is one.
    #[must_use]
    pub fn file(&self, path: &Path) -> Option<PathBuf> {
        let mut files = self.directories(path).map(|directory| directory.join(FILE));
        files.find(|file| file.exists())
    }

    /// What the file of the one at a path says.
    ///
    /// # Errors
    /// One sentence with the file: what is wrong with it, and the fix.
    pub fn read(&self, path: &Path, file: &Path) -> std::result::Result<DirectVolume, String> {
        let read = text(file).and_then(|text| DirectVolume::parse(path, &text));
        read.map_err(|why| format!("{}: {why}", file.display()))
    }

    /// Writes one down as it is given, if it can be had, in place of what was there; its file.
    ///
    /// # Errors
    /// `InvalidArgument` with the reason.
    pub fn add(&self, path: &Path, mount_info: &str) -> Result<PathBuf> {
        let refused = |why: String| {
            Error::invalid(format!(
                "{} cannot be a direct volume: {why}",
                path.display()
            ))
        };
        let name = name(path).map_err(refused)?;
        if u64::try_from(mount_info.len()).is_ok_and(|length| length > LONGEST) {
            return Err(refused(format!("it is longer than {LONGEST} bytes")));
        }
        let volume = DirectVolume::parse(path, mount_info.as_bytes()).map_err(refused)?;
        let kind = fs::metadata(&volume.device).map_err(|error| refused(error.to_string()))?;
        let is_image = kind.is_file() && kind.len() > 0;
        if !is_image && !kind.file_type().is_block_device() {
            return Err(refused(format!(
                "its device {} is neither a block device nor a file with something in it",
                volume.device.display()
            )));
        }
        let directory = self.root.join(name);
        let file = directory.join(FILE);
        let written = self.write(&directory, &file, mount_info);
        written.map_err(|error| Error::io(format_args!("{}", file.display()), &error))?;
        // The other spelling of the name would come back when this one is removed.
        for other in self.directories(path).filter(|other| *other != directory) {
            forget(&other)?;
        }
        Ok(file)
    }

    /// Whoever reads the file meanwhile finds all of it or none.
    fn write(&self, directory: &Path, file: &Path, text: &str) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        // No path's name begins so, and beside the file others would take it for a sandbox's.
        let fresh = self.root.join(format!(".{}", std::process::id()));
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&fresh, file));
        written.inspect_err(|_| drop(fs::remove_file(&fresh)))
    }

    /// Forgets the one at a path, with all that is beside its file; whether there was one.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, path: &Path) -> Result<bool> {
        let mut was_there = false;
        for directory in self.directories(path) {
            was_there |= forget(&directory)?;
        }
        Ok(was_there)
    }

    /// The paths and files of all, by path.
    ///
    /// # Errors
    /// What the system says.
    pub fn all(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(format_args!("{}", self.root.display()), &error)),
        };
        let mut all: Vec<(PathBuf, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let file = entry.path().join(FILE);
                let path = path_of(entry.file_name().as_bytes())?;
                file.exists().then_some((path, file))
            })
            .collect();
        all.sort();
        all.dedup_by(|one, other| one.0 == other.0);
        Ok(all)
    }

    fn directories(&self, path: &Path) -> impl Iterator<Item = PathBuf> {
        let path = path.as_os_str().as_bytes();
        let names = [URL_SAFE.encode(path), URL_SAFE_NO_PAD.encode(path)];
        names.into_iter().map(|name| self.root.join(name))
    }
}

/// Removes a directory; whether it was there.
fn forget(directory: &Path) -> Result<bool> {
    match fs::remove_dir_all(directory) {
        Ok(()) => Ok(true),
        // Of a name that is too long there is none.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ENAMETOOLONG) =>
        {
            Ok(false)
        }
        Err(error) => Err(Error::io(format_args!("{}", directory.display()), &error)),
    }
}

/// A volume's path as kubelet names it: no bind mount's source has another slash at its end, or a way back.
///
/// # Errors
/// `InvalidArgument` for what no volume can be at.
pub fn volume_path(given: &str) -> Result<PathBuf> {
    let path: PathBuf = Path::new(given).components().collect();
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || path.file_name().is_none() || !path.components().all(plain) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{given:?} is no volume's path: give the target path of NodePublishVolume, from / on and without .."
            ),
        ));
    }
    Ok(path)
}

/// What the directory of the one at a path is called.
fn name(path: &Path) -> std::result::Result<String, String> {
    let name = URL_SAFE.encode(path.as_os_str().as_bytes());
    if name.len() > LONGEST_NAME {
        let longest = LONGEST_NAME / 4 * 3;
        return Err(format!(
            "its path has {} bytes, and by Kata's convention it cannot have more than {longest}",
            path.as_os_str().len()
        ));
    }
    Ok(name)
}

fn path_of(name: &[u8]) -> Option<PathBuf> {
    let name = name.strip_suffix(b"==").unwrap_or(name);
    let name = name.strip_suffix(b"=").unwrap_or(name);
    let path = URL_SAFE_NO_PAD.decode(name).ok()?;
    Some(std::ffi::OsString::from_vec(path).into())
}

fn text(file: &Path) -> std::result::Result<Vec<u8>, String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("image"), "x").unwrap();
            Self { dir }
        }

        fn volumes(&self) -> DirectVolumes {
            DirectVolumes::at(&self.dir.path().join("direct-volumes"))
        }

        fn info(&self) -> String {
            let image = self.dir.path().join("image");
            format!(r#"{{"device":"{}","fstype":"ext4"}}"#, image.display())
        }
    }

    #[test]
    fn what_is_written_down_is_found_listed_and_forgotten() {
        let node = Node::new();
        let volumes = node.volumes();
        assert!(!volumes.any());
        assert_eq!(volumes.all().unwrap(), []);
        let (one, other) = (Path::new("/pods/u/a/mount"), Path::new("/pods/u/b"));
        assert!(!volumes.remove(one).unwrap());
        for path in [other, one, one] {
            volumes.add(path, &node.info()).unwrap();
        }
        let file = volumes.file(one).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), node.info());
        assert_eq!(volumes.read(one, &file).unwrap().file_system, "ext4");
        // A sandbox's file of Kata's, and what is no path's.
        fs::write(file.with_file_name("sandbox"), "").unwrap();
        fs::create_dir(volumes.root.join("not base64")).unwrap();
        let all: Vec<PathBuf> = volumes
            .all()
            .unwrap()
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        assert_eq!(all, [one, other]);
        assert!(volumes.remove(one).unwrap());
        assert_eq!(volumes.file(one), None);
        assert!(volumes.file(other).is_some());
    }

    #[test]
    fn the_name_is_either_of_katas() {
        let node = Node::new();
        let volumes = node.volumes();
        let path = Path::new("/kubelet/kata-direct-vol-002/directvol002");
        let unpadded = URL_SAFE_NO_PAD.encode(path.as_os_str().as_bytes());
        assert_ne!(unpadded, name(path).unwrap(), "it would be padded");
        fs::create_dir_all(volumes.root.join(&unpadded)).unwrap();
        fs::write(volumes.root.join(&unpadded).join(FILE), node.info()).unwrap();
        assert!(volumes.file(path).is_some());
        assert_eq!(volumes.all().unwrap()[0].0, path);
        // Not beside the other.
        volumes.add(path, &node.info()).unwrap();
        assert_eq!(fs::read_dir(&volumes.root).unwrap().count(), 1);
        assert!(volumes.remove(path).unwrap());
        assert_eq!(fs::read_dir(&volumes.root).unwrap().count(), 0);
    }

    #[test]
    fn what_no_pod_could_have_is_not_written_down() {
        let node = Node::new();
        let volumes = node.volumes();
        let long = format!("/{}", "x".repeat(189));
        let empty = node.dir.path().join("empty");
        fs::write(&empty, "").unwrap();
        for (path, info, reason) in [
            (
                "/v",
                r#"{"device":"/dev/null","fstype":"ext4"}"#.to_owned(),
                "neither a block device",
            ),
            (
                "/v",
                format!(r#"{{"device":"{}","fstype":"ext4"}}"#, empty.display()),
                "something in it",
            ),
            ("/v", "{}".to_owned(), "not what a storage driver writes"),
            (
                "/v",
                format!("{}{}", "{", " ".repeat(1 << 17)),
                "longer than",
            ),
            (&long, node.info(), "190 bytes"),
        ] {
            let error = volumes.add(Path::new(path), &info).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
            assert!(error.message.contains(reason), "{reason}: {error}");
        }
        assert!(!volumes.any());
        assert!(!volumes.remove(Path::new(&long.repeat(2))).unwrap());
        let longest = &long[..189];
        volumes.add(Path::new(longest), &node.info()).unwrap();
    }

    #[test]
    fn a_file_that_is_too_long_is_refused_by_its_name() {
        let node = Node::new();
        let file = node.dir.path().join(FILE);
        fs::write(&file, " ".repeat(1 << 17)).unwrap();
        let error = node.volumes().read(Path::new("/v"), &file).unwrap_err();
        assert!(
            error.contains(FILE) && error.contains("longer than"),
            "{error}"
        );
    }

    #[test]
    fn a_path_is_as_kubelet_names_it() {
        for given in ["/a/b", "/a/b/", "//a/./b"] {
            assert_eq!(volume_path(given).unwrap(), Path::new("/a/b"), "{given}");
        }
        for given in ["", "/", "a/b", "/a/../b", "."] {
            let error = volume_path(given).unwrap_err();
            assert!(error.message.contains("NodePublishVolume"), "{error}");
        }
    }
}
