//! What the node's CDI files (Container Device Interface) say of a name, for names that nobody else has looked up: those that
//! kubelet has assigned, and annotations under a containerd without CDI.
//!
//! The files are the node's: its device plugins and DRA drivers write them. Of two directories the later one counts; a name
//! that two files of one directory have is nobody's. Blocking.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use yaml_rust2::parser::{Event, Parser};
use yaml_rust2::{Yaml, YamlLoader};

/// What an annotation for it begins with.
pub const ANNOTATION: &str = "cdi.k8s.io/";
/// A file larger than this in bytes is not read.
const MAX_FILE: u64 = 4 << 20;
/// A document deeper than this is not understood.
const MAX_DEPTH: usize = 32;

/// Where the files are.
#[derive(Debug, Clone)]
pub struct Names {
    directories: Vec<PathBuf>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            directories: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
        }
    }
}

/// What a container gets by a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits {
    /// Nodes of the node's /dev.
    pub nodes: Vec<PathBuf>,
    /// Variables of the device, `NAME=value`.
    pub env: Vec<String>,
    /// Those that its file has for all its devices: they come before the devices' own, once.
    pub common_env: Vec<String>,
    /// The file.
    pub file: PathBuf,
    /// What else there is, by CDI's words: of the node, so of no use in a guest.
    pub others: Vec<&'static str>,
}

/// Why a name means nothing here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CdiError {
    /// It is no name.
    #[error("{0:?} is no CDI name, which is vendor/class=device")]
    NoName(String),
    /// No file has it.
    #[error("no file of {directories} has CDI device {name}{unread}")]
    Unknown {
        /// The name.
        name: String,
        /// Where it was looked for.
        directories: String,
        /// Files that could not be understood.
        unread: String,
    },
    /// Several have.
    #[error("CDI device {name} is in {first} and in {second}")]
    Twice {
        /// The name.
        name: String,
        /// A file.
        first: String,
        /// Another one of the same directory.
        second: String,
    },
}

impl Names {
    /// Those of other directories, the last one first to count.
    #[cfg(test)]
    pub(crate) fn of(directories: &[&Path]) -> Self {
        Self {
            directories: directories.iter().map(|path| (*path).to_owned()).collect(),
        }
    }

    /// What a name means.
    ///
    /// # Errors
    /// [`CdiError`].
    pub fn look_up(&self, name: &str) -> Result<Edits, CdiError> {
        let (kind, device) = name
            .split_once('=')
            .filter(|(kind, device)| kind.contains('/') && !device.is_empty())
            .ok_or_else(|| CdiError::NoName(name.to_owned()))?;
        let mut unread = Vec::new();
        for directory in self.directories.iter().rev() {
            let mut found: Option<(PathBuf, Edits)> = None;
            for path in files(directory) {
                let document = match read(&path) {
                    Ok(document) => document,
                    Err(why) => {
                        unread.push(format!("{}: {why}", path.display()));
                        continue;
                    }
                };
                let Some(edits) = edits(&document, kind, device) else {
                    continue;
                };
                if let Some((first, _)) = &found {
                    return Err(CdiError::Twice {
                        name: name.to_owned(),
                        first: first.display().to_string(),
                        second: path.display().to_string(),
                    });
                }
                found = Some((path, edits));
            }
            if let Some((file, edits)) = found {
                return Ok(Edits { file, ..edits });
            }
        }
        let directories = self
            .directories
            .iter()
            .map(|path| path.display().to_string());
        Err(CdiError::Unknown {
            name: name.to_owned(),
            directories: directories.collect::<Vec<_>>().join(", "),
            unread: match unread.as_slice() {
                [] => String::new(),
                unread => format!(" ({} cannot be read)", unread.join("; ")),
            },
        })
    }
}

/// The names that annotations ask for, each once, in the order of the annotations' keys.
pub fn asked<'a>(annotations: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<String> {
    let values = annotations.filter(|(key, _)| key.starts_with(ANNOTATION));
    let names = values.flat_map(|(_, value)| value.split(','));
    let names = names.map(str::trim).filter(|name| !name.is_empty());
    let mut asked: Vec<String> = Vec::new();
    for name in names {
        if !asked.iter().any(|other| other == name) {
            asked.push(name.to_owned());
        }
    }
    asked
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut paths: Vec<_> = paths
        .filter(|path| {
            let kind = path.extension().and_then(|kind| kind.to_str());
            matches!(kind, Some("json" | "yaml" | "yml"))
        })
        .collect();
    paths.sort();
    paths
}

fn read(path: &Path) -> Result<Value, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let read = file.take(MAX_FILE + 1).read_to_string(&mut text);
    read.map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("it has more than {} MiB", MAX_FILE >> 20));
    }
    parse(&text, path.extension().is_some_and(|kind| kind == "json"))
}

/// A file's text, of JSON or YAML.
pub(crate) fn parse(text: &str, is_json: bool) -> Result<Value, String> {
    if is_json {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    plain(text)?;
    let documents = YamlLoader::load_from_str(text).map_err(|error| error.to_string())?;
    match documents.as_slice() {
        [document] => json(document, MAX_DEPTH).ok_or_else(too_deep),
        _ => Err(format!("it has {} documents", documents.len())),
    }
}

fn too_deep() -> String {
    "it is nested too deeply".to_owned()
}

/// Refuses what would make a document larger than its file, or deeper than a stack, before it is made: no program that
/// writes CDI files writes such.
fn plain(text: &str) -> Result<(), String> {
    let mut parser = Parser::new_from_str(text);
    let mut depth = 0;
    loop {
        let (event, _) = parser.next_token().map_err(|error| error.to_string())?;
        match event {
            Event::StreamEnd => return Ok(()),
            Event::Alias(_) => {
                return Err("it has an alias (*), which is not understood".to_owned());
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => depth += 1,
            Event::SequenceEnd | Event::MappingEnd => depth -= 1,
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
    }
}

/// As JSON has it. What CDI has no use for is null.
fn json(yaml: &Yaml, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    Some(match yaml {
        Yaml::String(text) | Yaml::Real(text) => text.as_str().into(),
        Yaml::Integer(number) => (*number).into(),
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Array(list) => {
            let list: Option<Vec<_>> = list.iter().map(|entry| json(entry, depth)).collect();
            list?.into()
        }
        Yaml::Hash(map) => {
            let mut object = serde_json::Map::new();
            for (key, value) in map {
                if let Some(key) = key.as_str() {
                    object.insert(key.to_owned(), json(value, depth)?);
                }
            }
            object.into()
        }
        _ => Value::Null,
    })
}

/// What a file has for a device.
pub(crate) fn edits(document: &Value, kind: &str, device: &str) -> Option<Edits> {
    let text = |value: &Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    if text(document, "kind")? != kind {
        return None;
    }
    let mut devices = document.get("devices")?.as_array()?.iter();
    let found = devices.find(|entry| text(entry, "name").as_deref() == Some(device))?;
    let mut edits = Edits::default();
    for (is_common, part) in [(true, document), (false, found)] {
        let Some(part) = part.get("containerEdits") else {
            continue;
        };
        let list = |key: &str| {
            part.get(key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
        };
        let nodes = list("deviceNodes").filter_map(|node| {
            // The node's place on the host, where that is another one.
            text(node, "hostPath")
                .filter(|path| !path.is_empty())
                .or_else(|| text(node, "path"))
        });
        edits.nodes.extend(nodes.map(PathBuf::from));
        let env = if is_common {
            &mut edits.common_env
        } else {
            &mut edits.env
        };
        env.extend(list("env").filter_map(Value::as_str).map(str::to_owned));
        let others = ["mounts", "hooks"]
            .into_iter()
            .filter(|key| list(key).next().is_some());
        edits.others.extend(others);
    }
    Some(edits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn write(directory: &Path, name: &str, text: &str) {
        fs::create_dir_all(directory).unwrap();
        fs::write(directory.join(name), text).unwrap();
    }

    const YAML: &str = "
cdiVersion: 0.5.0
kind: vendor.com/gpu
containerEdits:
  env: [ALL=1]
devices:
- name: '0'
  containerEdits:
    env:
    - ONE=1
    deviceNodes:
    - path: /dev/vfio/12
    - {path: /dev/renamed, hostPath: /dev/vfio/devices/vfio3, permissions: rw}
    mounts:
    - {hostPath: /usr/lib/x.so, containerPath: /usr/lib/x.so}
- name: plain
";

    #[test]
    fn a_name_means_its_own_edits_and_those_of_all_devices_in_either_format() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "gpu.yaml", YAML);
        let other = json!({"kind": "vendor.com/nic", "devices": [
            {"name": "a", "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/9"}]}}]});
        write(root.path(), "nic.json", &other.to_string());
        write(root.path(), "readme.txt", "none");
        let names = Names::of(&[root.path()]);
        let expected = Edits {
            nodes: vec!["/dev/vfio/12".into(), "/dev/vfio/devices/vfio3".into()],
            env: vec!["ONE=1".to_owned()],
            common_env: vec!["ALL=1".to_owned()],
            file: root.path().join("gpu.yaml"),
            others: vec!["mounts"],
        };
        assert_eq!(names.look_up("vendor.com/gpu=0"), Ok(expected));
        let plain = names.look_up("vendor.com/gpu=plain").unwrap();
        assert_eq!(
            (plain.nodes.len(), plain.env, plain.common_env),
            (0, vec![], vec!["ALL=1".to_owned()])
        );
        assert_eq!(
            names.look_up("vendor.com/nic=a").unwrap().nodes,
            [Path::new("/dev/vfio/9")]
        );
    }

    #[test]
    fn the_later_directory_counts_and_two_files_of_one_do_not() {
        let root = tempfile::tempdir().unwrap();
        let file = |node: &str| {
            json!({"kind": "v.com/c", "devices": [{"name": "d", "containerEdits": {"deviceNodes": [{"path": node}]}}]})
                .to_string()
        };
        let (first, second) = (root.path().join("first"), root.path().join("second"));
        write(&first, "a.json", &file("/dev/1"));
        let names = Names::of(&[&first, &second]);
        assert_eq!(
            names.look_up("v.com/c=d").unwrap().nodes,
            [Path::new("/dev/1")]
        );
        write(&second, "a.json", &file("/dev/2"));
        assert_eq!(
            names.look_up("v.com/c=d").unwrap().nodes,
            [Path::new("/dev/2")]
        );
        write(&second, "b.json", &file("/dev/3"));
        let twice = names.look_up("v.com/c=d").unwrap_err().to_string();
        assert!(
            twice.contains("a.json") && twice.contains("b.json"),
            "{twice}"
        );
    }

    #[test]
    fn a_name_that_is_not_there_is_told_with_where_and_what_could_not_be_read() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "bad.yaml", "a: [");
        write(root.path(), "two.yaml", "a: 1\n---\nb: 2\n");
        let names = Names::of(&[root.path()]);
        let said = names.look_up("v.com/c=d").unwrap_err().to_string();
        for words in ["v.com/c=d", "bad.yaml", "two.yaml: it has 2 documents"] {
            assert!(said.contains(words), "{said}");
        }
        for name in ["gpu", "v.com=d", "v.com/c="] {
            assert_eq!(names.look_up(name), Err(CdiError::NoName(name.to_owned())));
        }
    }

    #[test]
    fn a_document_that_would_be_larger_than_its_file_or_deeper_than_a_stack_is_refused_before_it_is_made()
     {
        let mut bomb = "a0: &a0 [x]\n".to_owned();
        for level in 1..40 {
            let before = level - 1;
            bomb += &format!("a{level}: &a{level} [*a{before}, *a{before}]\n");
        }
        assert!(parse(&bomb, false).unwrap_err().contains("alias"));
        for text in [
            "- ".repeat(1 << 20),
            "[".repeat(1 << 20),
            format!("{}x", "a:\n".repeat(1 << 16)),
        ] {
            parse(&text, false).unwrap_err();
        }
        parse(&"[".repeat(1 << 20), true).unwrap_err();
        let deep = |levels: usize| format!("{}x{}", "[".repeat(levels), "]".repeat(levels));
        assert!(
            parse(&deep(MAX_DEPTH + 1), false)
                .unwrap_err()
                .contains("nested too deeply")
        );
        parse(&deep(MAX_DEPTH - 1), false).unwrap();
    }

    #[test]
    fn annotations_name_devices_by_their_prefix() {
        let annotations = [
            ("cdi.k8s.io/plugin_gpu", "v.com/c=a, v.com/c=b"),
            ("other", "v.com/c=z"),
            ("cdi.k8s.io/x", "v.com/c=d,v.com/c=a,"),
        ];
        assert_eq!(
            asked(annotations.into_iter()),
            ["v.com/c=a", "v.com/c=b", "v.com/c=d"]
        );
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_refused(text in "[-a-z:{}\\[\\]\"' \n0-9&*!|>]{0,200}") {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), "a.yaml", &text);
            write(root.path(), "b.json", &text);
            let _ = Names::of(&[root.path()]).look_up("v.com/c=d");
        }
    }
}
