//! The CDI files of a driver bundle (Container Device Interface 0.3 to 1.0, as JSON), and which of their edits a container gets
//! for the functions it was given.
//!
//! On a node a container names a CDI device; here it has a PCI function already, so it is the file that says which functions it
//! is for: its annotation `io.brig.modalias` is a pattern for their aliases, as in modules.alias. The first such function of
//! the guest is the file's device `0`, the next `1`; a file with a device `all` alone gives that for each.
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use brig_agent_protocol::identity;
use serde::Deserialize;
use serde_json::Value;

use crate::modules;

/// The annotation of a file that says what it is for.
const FOR: &str = "io.brig.modalias";
/// The device of a file that has no other for a function.
const ALL: &str = "all";
/// Longest file in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// A function of the guest.
#[derive(Debug, Clone)]
pub struct Function {
    /// Its number on bus 0.
    pub number: u32,
    /// What the kernel says it is.
    pub modalias: String,
}

/// One file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct File {
    #[serde(skip)]
    name: PathBuf,
    kind: String,
    annotations: BTreeMap<String, String>,
    devices: Vec<Device>,
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Device {
    name: String,
    container_edits: Edits,
}

/// What a container is given.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Edits {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Nodes of /dev.
    pub device_nodes: Vec<Node>,
    /// Files and directories of the bundle, or file systems.
    pub mounts: Vec<Mount>,
    /// Further groups of its first process.
    pub additional_gids: Vec<u32>,
    hooks: Vec<Hook>,
    intel_rdt: Option<Value>,
    net_devices: Vec<Value>,
}

/// A node of /dev.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Node {
    /// Where, in the container.
    pub path: String,
    /// Where, in the guest; as in the container if it is missing.
    pub host_path: Option<String>,
    /// `c` or `b`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of its number.
    pub major: Option<u32>,
    /// Of its number.
    pub minor: Option<u32>,
    /// Permissions.
    pub file_mode: Option<u32>,
    /// What the container may do with it: of `rwm`.
    pub permissions: String,
    /// Owner.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
}

/// A mount.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Where, in the bundle.
    pub host_path: String,
    /// Where, in the container.
    pub container_path: String,
    /// As mount(8) has them.
    pub options: Vec<String>,
    /// A file system; empty or `bind`: what is at `host_path`.
    #[serde(rename = "type")]
    pub kind: String,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hook {
    hook_name: String,
    path: String,
}

impl File {
    /// Whether it is for such a device.
    pub fn is_for(&self, modalias: &str) -> bool {
        self.annotations
            .get(FOR)
            .is_some_and(|pattern| modules::matches(pattern.as_bytes(), modalias.as_bytes()))
    }

    fn device(&self, index: usize) -> Option<&Device> {
        let named = |name: &str| self.devices.iter().find(|device| device.name == name);
        named(&index.to_string()).or_else(|| named(ALL))
    }

    fn check(&self) -> Result<(), String> {
        if !self.annotations.contains_key(FOR) {
            return Err(format!(
                "it has no annotation {FOR}, which says what devices it is for"
            ));
        }
        let edits = self.devices.iter().map(|device| &device.container_edits);
        for edits in edits.chain([&self.container_edits]) {
            edits.check()?;
        }
        Ok(())
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        if let Some(hook) = self.hooks.first() {
            return Err(format!(
                "its hook {} ({}) cannot be run in a guest: give the container a variable or a mount instead",
                hook.hook_name, hook.path
            ));
        }
        if self.intel_rdt.is_some() || !self.net_devices.is_empty() {
            return Err("intelRdt and netDevices mean nothing in a guest".into());
        }
        if let Some(entry) = self.env.iter().find(|entry| !entry.contains('=')) {
            return Err(format!("its variable {entry:?} is not NAME=value"));
        }
        for gid in &self.additional_gids {
            identity::check("additionalGids", *gid)?;
        }
        for node in &self.device_nodes {
            for (field, id) in [("uid", node.uid), ("gid", node.gid)] {
                let id = id.unwrap_or(0);
                identity::check(&format!("deviceNodes {}: {field}", node.path), id)?;
            }
        }
        let places = self.mounts.iter().map(|mount| &mount.container_path);
        let nodes = self.device_nodes.iter().map(|node| &node.path);
        match places.chain(nodes).find(|path| !path.starts_with('/')) {
            Some(path) => Err(format!("its path {path:?} is not absolute")),
            None => Ok(()),
        }
    }
}

/// Those of a bundle, by name.
///
/// # Errors
/// Names the first that is not one.
pub fn read(root: &Path) -> Result<Vec<File>, String> {
    let Ok(entries) = fs::read_dir(root.join("etc/cdi")) else {
        return Ok(Vec::new());
    };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.into_iter().map(|name| one(root, name)).collect()
}

fn one(root: &Path, name: PathBuf) -> Result<File, String> {
    let shown = name.strip_prefix(root).unwrap_or(&name).display();
    let is_json = name.extension().is_some_and(|end| end == "json");
    let parsed = if is_json {
        let length = fs::metadata(&name).map(|meta| meta.len());
        length
            .map_err(|error| error.to_string())
            .and_then(|length| {
                if length > MAX_SIZE {
                    return Err(format!("{length} bytes are too many"));
                }
                let text = fs::read(&name).map_err(|error| error.to_string())?;
                parse(&text)
            })
    } else {
        Err("CDI files of a bundle are JSON, and so named".into())
    };
    let file = parsed.map_err(|error| format!("{shown}: {error}"))?;
    Ok(File { name, ..file })
}

fn parse(text: &[u8]) -> Result<File, String> {
    let file: File = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    file.check()?;
    Ok(file)
}

/// The edits for a container that was given `given` of the functions `all`: for each file the common ones once, before those
/// of the devices.
///
/// # Errors
/// Names a function for which a file has no device.
pub fn edits(files: &[File], given: &[u32], all: &[Function]) -> Result<Vec<Edits>, String> {
    let mut edits = Vec::new();
    for file in files {
        let mine = all
            .iter()
            .filter(|function| file.is_for(&function.modalias));
        let mut first = true;
        for (index, function) in mine.enumerate() {
            if !given.contains(&function.number) {
                continue;
            }
            let Some(device) = file.device(index) else {
                return Err(format!(
                    "the driver bundle's {} ({}) has neither a device {index:?} nor {ALL:?}, and the guest has that many",
                    file.name.file_name().unwrap_or_default().display(),
                    file.kind
                ));
            };
            if std::mem::take(&mut first) {
                edits.push(file.container_edits.clone());
            }
            if !edits.contains(&device.container_edits) {
                edits.push(device.container_edits.clone());
            }
        }
    }
    Ok(edits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn file(devices: &[&str]) -> File {
        let devices: Vec<_> = devices
            .iter()
            .map(
                |name| json!({"name": name, "containerEdits": {"env": [format!("DEVICE={name}")]}}),
            )
            .collect();
        let text = json!({
            "cdiVersion": "0.6.0",
            "kind": "example.com/gpu",
            "annotations": {"io.brig.modalias": "pci:v000010DEd*"},
            "devices": devices,
            "containerEdits": {"env": ["COMMON=1"]},
        });
        parse(text.to_string().as_bytes()).unwrap()
    }

    fn bus() -> Vec<Function> {
        [
            (8, "pci:v00001AF4d00001041sv"),
            (9, "pci:v000010DEd00002684sv"),
            (10, "pci:v000010DEd000022BAsv"),
        ]
        .map(|(number, modalias)| Function {
            number,
            modalias: modalias.into(),
        })
        .to_vec()
    }

    fn given(files: &[File], functions: &[u32]) -> Result<Vec<String>, String> {
        let edits = edits(files, functions, &bus())?;
        Ok(edits.into_iter().flat_map(|edits| edits.env).collect())
    }

    #[test]
    fn a_container_gets_the_device_that_its_function_is_among_those_of_the_guest() {
        let files = [file(&["0", "1"])];
        assert_eq!(given(&files, &[10]).unwrap(), ["COMMON=1", "DEVICE=1"]);
        assert_eq!(
            given(&files, &[9, 10]).unwrap(),
            ["COMMON=1", "DEVICE=0", "DEVICE=1"]
        );
        // Not for it.
        assert!(given(&files, &[8]).unwrap().is_empty());
        assert!(given(&files, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_file_with_one_device_for_all_gives_it_once() {
        let files = [file(&["all"])];
        assert_eq!(given(&files, &[9, 10]).unwrap(), ["COMMON=1", "DEVICE=all"]);
        let error = given(&[file(&["0"])], &[10]).unwrap_err();
        assert!(
            error.contains("\"1\"") || error.contains("device 1"),
            "{error}"
        );
    }

    #[test]
    fn what_means_nothing_in_a_guest_is_refused_by_name() {
        for (edits, expected) in [
            (
                json!({"hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}]}),
                "nvidia-cdi-hook",
            ),
            (json!({"intelRdt": {}}), "intelRdt"),
            (json!({"env": ["NAME"]}), "NAME=value"),
            (json!({"additionalGids": [u32::MAX]}), "additionalGids"),
            (
                json!({"deviceNodes": [{"path": "/dev/x", "gid": u32::MAX}]}),
                "/dev/x: gid",
            ),
            (
                json!({"mounts": [{"hostPath": "/a", "containerPath": "b"}]}),
                "\"b\"",
            ),
            (json!({"deviceNodes": [{"path": "dev/x"}]}), "dev/x"),
            (json!({"env": 1}), "invalid type"),
        ] {
            let text = json!({"annotations": {"io.brig.modalias": "*"}, "containerEdits": edits});
            let error = parse(text.to_string().as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(parse(b"{}").unwrap_err().contains("io.brig.modalias"));
        assert!(parse(b"kind: x").is_err());
    }

    #[test]
    fn the_files_of_a_bundle_are_read_in_order_and_one_that_is_none_is_named() {
        let root = tempfile::tempdir().unwrap();
        assert!(read(root.path()).unwrap().is_empty());
        let directory = root.path().join("etc/cdi");
        fs::create_dir_all(&directory).unwrap();
        for (name, kind) in [("b.json", "b.com/x"), ("a.json", "a.com/x")] {
            let text = json!({"kind": kind, "annotations": {"io.brig.modalias": "*"}});
            fs::write(directory.join(name), text.to_string()).unwrap();
        }
        let kinds: Vec<_> = read(root.path())
            .unwrap()
            .into_iter()
            .map(|file| file.kind)
            .collect();
        assert_eq!(kinds, ["a.com/x", "b.com/x"]);
        fs::write(directory.join("c.yaml"), "kind: x").unwrap();
        let error = read(root.path()).unwrap_err();
        assert!(error.starts_with("etc/cdi/c.yaml: "), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_file_or_an_error(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }
    }
}
