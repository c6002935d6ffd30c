//! What is written down of a direct volume: `mountInfo.json`, as both of Kata Containers' libraries have it.
//!
//! Trusted: the node's root, who writes it. Blocking code.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

/// What the types are called that are a block device with a file system.
const BLOCK: [&str; 3] = ["block", "directvol", ""];
/// What Kata's guests do with a volume and this one does not.
const UNKNOWN_TO_US: [&str; 3] = ["encryptionKey", "createFilesystem", "create_filesystem"];

/// A volume on a device that nobody has mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DirectVolume {
    /// The path that it stands for.
    pub path: PathBuf,
    /// Its block device, or an image in a file.
    pub device: PathBuf,
    /// What is on it.
    pub file_system: String,
    /// As in fstab.
    pub options: Vec<String>,
    /// It is to be given to this group.
    pub group: Option<Group>,
}

/// `fsGroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group {
    /// Its number.
    pub gid: u32,
    /// What has its top as it should be is left as it is.
    pub unless_root: bool,
}

/// Both of Kata's libraries have names of their own for the same.
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

impl Info {
    /// Kata's Go library takes any case of the keys, and writes what it was given.
    fn read(text: &[u8]) -> serde_json::Result<Self> {
        let fields: Map<String, Value> = serde_json::from_slice(text)?;
        let fields = fields.into_iter();
        let fields = fields.map(|(key, value)| (key.to_ascii_lowercase(), value));
        serde_json::from_value(Value::Object(fields.collect()))
    }
}

impl DirectVolume {
    /// The volume at `path` of which `text` is written down. Its device is there.
    ///
    /// # Errors
    /// One sentence without the path: what is wrong, and the fix.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, String> {
        let info = Info::read(text)
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
            Some(text) => Some(Group::parse(
                text,
                metadata.get("fsGroupChangePolicy").map(String::as_str),
            )?),
        };
        Ok(Self {
            path: path.to_owned(),
            device: present(&info.device)?,
            file_system: info.file_system,
            options: info.options.unwrap_or_default(),
            group,
        })
    }

    /// Nothing is to be written to the device.
    #[must_use]
    pub fn readonly(&self) -> bool {
        let words = self.options.iter().flat_map(|option| option.split(','));
        let mut last_first = words.rev();
        last_first.find(|word| matches!(*word, "ro" | "rw")) == Some("ro")
    }
}

impl Group {
    fn parse(gid: &str, policy: Option<&str>) -> Result<Self, String> {
        // The largest number means "none" to Linux.
        let number = gid.parse().ok().filter(|number| *number != u32::MAX);
        let gid =
            number.ok_or_else(|| format!("metadata fsGroup: {gid:?} is no group's number"))?;
        let unless_root = match policy {
            Some("OnRootMismatch") => true,
            None | Some("" | "Always") => false,
            Some(other) => {
                return Err(format!(
                    "metadata fsGroupChangePolicy: {other:?} is neither \"Always\" nor \"OnRootMismatch\""
                ));
            }
        };
        Ok(Self { gid, unless_root })
    }
}

/// The device, if it is there. Links as udev makes them are followed once and for all.
fn present(device: &Path) -> Result<PathBuf, String> {
    fs::canonicalize(device).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!(
            "its device {} is missing on this node: attach it before the pod is started",
            device.display()
        ),
        _ => format!("its device {}: {error}", device.display()),
    })
}

/// Whether a volume's device, which `has` so many bytes, has `least` at least.
///
/// # Errors
/// One sentence without the volume, and the fix.
pub fn is_large_enough(device: &Path, has: u64, least: u64) -> Result<(), String> {
    if has >= least {
        return Ok(());
    }
    Err(format!(
        "its device {} has {has} bytes, fewer than {least}: let the device grow first",
        device.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<DirectVolume, String> {
        DirectVolume::parse(Path::new("/v"), text.as_bytes())
    }

    #[test]
    fn what_both_libraries_of_katas_write_is_read() {
        let volume = parsed(
            r#"{"volume-type":"block","device":"/dev/null","fstype":"ext4",
                "metadata":{"fsGroup":"2000","fsGroupChangePolicy":"OnRootMismatch","other":"x"},"options":["noatime","ro"]}"#,
        );
        let volume = volume.unwrap();
        assert_eq!(volume.device, Path::new("/dev/null"));
        assert_eq!(volume.file_system, "ext4");
        assert!(volume.readonly());
        assert_eq!(
            volume.group,
            Some(Group {
                gid: 2000,
                unless_root: true
            })
        );
        let volume = parsed(
            r#"{"volume_type":"directvol","device":"/dev/null","fs_type":"xfs","metadata":{},"options":[]}"#,
        );
        let volume = volume.unwrap();
        assert_eq!((volume.file_system.as_str(), volume.group), ("xfs", None));
        assert!(!volume.readonly());
    }

    /// The example of Kata's own documentation has one in capitals.
    #[test]
    fn keys_are_of_any_case_as_in_katas_go_library() {
        let volume = parsed(r#"{"Device":"/dev/null","FsType":"ext4","OPTIONS":["ro"]}"#).unwrap();
        assert_eq!(volume.file_system, "ext4");
        assert!(volume.readonly());
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_the_reason() {
        let ext4 = r#""device":"/dev/null","fstype":"ext4""#;
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
            (r#"{"device":"/dev/null"}"#.to_owned(), "no file system"),
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
                format!(r#"{{{ext4},"metadata":{{"fsGroup":"4294967295"}}}}"#),
                "fsGroup",
            ),
            (
                format!(r#"{{{ext4},"metadata":{{"fsGroup":"1","fsGroupChangePolicy":"x"}}}}"#),
                "fsGroupChangePolicy",
            ),
        ] {
            let error = parsed(&text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_written_there_is_taken_for_more_than_it_is(text in "[\\[\\]{}:,\"a-z0-9 ]{0,60}") {
            if let Ok(volume) = parsed(&text) {
                prop_assert!(volume.device.is_absolute() && !volume.file_system.is_empty());
            }
        }
    }
}
