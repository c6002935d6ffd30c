//! Brig's runtime handlers in containerd's configuration: put there and taken away again, without touching anything
//! else of a file that is the operator's.
//!
//! containerd 2 merges the files that its `imports` name, so there the handlers are a file of their own, of the version
//! that the operator's has: containerd does not start with an imported file of a higher one. From 2.2 on its default
//! configuration, and so every one made from it, imports `conf.d` already. containerd 1 lets an imported file replace the
//! whole section of the CRI plugin, with the operator's registries and networks in it, so there they are a marked block at
//! the end of the operator's file. Versions 3 and 4 (containerd 2.3) call the CRI plugin's section the same; what 4 moves
//! are the sockets. What is written is parsed before it takes a place, and the file as it was is kept beside it until the
//! handlers are taken away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use brig_shim::error::{Error, Result};
use toml::{Table, Value};

use crate::configured::{disabled, section};

/// Where containerd's configuration is.
pub const CONTAINERD: &str = "/etc/containerd/config.toml";
/// Where handlers have their own configuration.
pub const HANDLERS: &str = "/etc/brig";
const FILE: &str = "brig.toml";
const BACKUP: &str = "before-brig";
const BEGIN: &str = "# BEGIN brig: taken away by 'brig containerd remove'\n";
const END: &str = "# END brig\n";

/// One handler: its name, and the configuration that it names, if it does.
struct Handler {
    name: &'static str,
    /// Below [`HANDLERS`], with what is in it when it is made.
    configuration: Option<(&'static str, &'static str)>,
}

const ALL: [Handler; 3] = [
    Handler {
        name: "brig",
        configuration: None,
    },
    Handler {
        name: "brig-debug",
        configuration: Some((
            "debug.toml",
            "# Of pods with runtimeClassName: brig-debug. 'brig config default' explains every key.\n\
             debug = true\ndebug_console = true\nlog_level = \"debug\"\n",
        )),
    },
    Handler {
        name: "brig-gpu",
        configuration: Some((
            "gpu.toml",
            "# Of pods with runtimeClassName: brig-gpu, which are given PCI devices (docs/devices.md): a VM that has one\n\
             # takes up all of its memory on the node. 'brig config default' explains every key.\n",
        )),
    },
];

/// containerd's configuration of one node.
pub struct Containerd {
    file: PathBuf,
    /// Where handlers have theirs.
    handlers: PathBuf,
    /// It is where containerd looks when it is not told, so that it may be made.
    is_usual: bool,
    /// Imported files are merged.
    merges: bool,
}

/// What has been done.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// Files that were written or removed; nothing, if all was as it should be.
    pub changed: Vec<PathBuf>,
}

impl Containerd {
    /// That in `file`, of the containerd that this node has.
    #[must_use]
    pub fn new(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            handlers: PathBuf::from(HANDLERS),
            is_usual: file == Path::new(CONTAINERD),
            merges: installed_major().is_some_and(|major| major >= 2),
        }
    }

    /// The handlers for the version of the configuration that is there.
    ///
    /// # Errors
    /// `InvalidArgument` for a file that containerd would not read, or of a version without CRI.
    pub fn print(&self) -> Result<String> {
        let (version, _) = read(&self.text()?, &self.file)?;
        Ok(self.tables(version.unwrap_or(2)))
    }

    /// Puts the handlers there. Repeatable.
    ///
    /// # Errors
    /// `InvalidArgument` for a file that containerd would not read, or that has a handler of these names already;
    /// what the file system says.
    pub fn add(&self) -> Result<Done> {
        if !self.is_usual && !self.file.exists() {
            return Err(Error::not_found(format!(
                "{} is not there: --config is the file that containerd was started with",
                self.file.display()
            )));
        }
        let whole = self.text()?;
        let without = stripped(&whole);
        let (said, table) = read(&without, &self.file)?;
        let merges = self.merges || said.is_some_and(|version| version >= 3);
        let version = said.unwrap_or(2);
        if let Some(plugin) = disabled(&table) {
            return Err(Error::state(format!(
                "{} has {plugin} in disabled_plugins, so containerd serves no Kubernetes and would not read the handlers: \
                 take it out, and say this again",
                self.file.display()
            )));
        }
        if let Some(handler) = ALL
            .iter()
            .find(|handler| has(&table, version, handler.name))
        {
            return Err(Error::already_exists(format!(
                "{} has a runtime handler {} already, which is its operator's: take it away, and say this again",
                self.file.display(),
                handler.name
            )));
        }
        let mut changed = Vec::new();
        for handler in &ALL {
            if let Some((name, text)) = handler.configuration {
                let path = self.handlers.join(name);
                if !path.exists() {
                    write(&path, text)?;
                    changed.push(path);
                }
            }
        }
        let tables = self.tables(version);
        let imported = merges.then(|| self.imported(&table)).flatten();
        let covered = imported.is_some();
        let imported = imported
            .or_else(|| (merges && !table.contains_key("imports")).then(|| self.own_directory()));
        // A file that sets nothing has no version either.
        let head = said.map_or_else(|| format!("version = {version}\n"), |_| String::new());
        let (new, drop_in) = match imported {
            Some(dir) => {
                let text =
                    format!("# Made by 'brig containerd add'.\nversion = {version}\n\n{tables}");
                let line = format!("imports = [\"{}/*.toml\"]\n", dir.display());
                // Before the first table, where keys of the whole belong.
                let new = match covered {
                    true => without.clone(),
                    false => format!("{BEGIN}{head}{line}{END}{without}"),
                };
                (new, Some((dir.join(FILE), text)))
            }
            None => {
                let gap = if without.is_empty() || without.ends_with('\n') {
                    ""
                } else {
                    "\n"
                };
                (format!("{without}{gap}{BEGIN}{head}{tables}{END}"), None)
            }
        };
        if let Err(error) = read(&new, &self.file) {
            return Err(Error::invalid(format!(
                "with Brig's handlers in it, {error}"
            )));
        }
        if let Some((path, text)) = drop_in
            && fs::read_to_string(&path).ok().as_deref() != Some(text.as_str())
        {
            write(&path, &text)?;
            changed.push(path);
        }
        if new != whole {
            if whole == without && self.file.exists() {
                write(&self.backup(), &without)?;
            }
            write(&self.file, &new)?;
            changed.push(self.file.clone());
        }
        Ok(Done { changed })
    }

    /// Takes them away again. Repeatable; what an operator has changed stays.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> Result<Done> {
        let mut changed = Vec::new();
        let mut gone = |path: PathBuf| -> Result<()> {
            match fs::remove_file(&path) {
                Ok(()) => changed.push(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, &error)),
            }
            Ok(())
        };
        let whole = self.text()?;
        let table: Table = toml::from_str(&whole).unwrap_or_default();
        let places = self
            .imported(&table)
            .into_iter()
            .chain([self.own_directory()]);
        for dir in places {
            gone(dir.join(FILE))?;
            // If it was made for this alone.
            let _ = fs::remove_dir(&dir);
        }
        for handler in &ALL {
            if let Some((name, text)) = handler.configuration {
                let path = self.handlers.join(name);
                if fs::read_to_string(&path).ok().as_deref() == Some(text) {
                    gone(path)?;
                }
            }
        }
        let _ = fs::remove_dir(&self.handlers);
        let without = stripped(&whole);
        if without != whole {
            let backup = fs::read_to_string(self.backup()).ok();
            if backup.is_none() && without.is_empty() {
                // There was none before.
                gone(self.file.clone())?;
                if let Some(dir) = self.file.parent() {
                    let _ = fs::remove_dir(dir);
                }
            } else {
                // A last line that had no end is the one thing that the block may have changed.
                let original = backup.filter(|backup| backup.trim_end() == without.trim_end());
                write(&self.file, original.as_deref().unwrap_or(&without))?;
                changed.push(self.file.clone());
            }
        }
        let _ = fs::remove_file(self.backup());
        Ok(Done { changed })
    }

    fn text(&self) -> Result<String> {
        match fs::read_to_string(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|error| failed(&self.file, &error)),
        }
    }

    fn backup(&self) -> PathBuf {
        self.file.with_extension(format!("toml.{BACKUP}"))
    }

    /// Where a file of ours is imported from if nothing else is.
    fn own_directory(&self) -> PathBuf {
        self.file.with_file_name("conf.d")
    }

    /// A directory of which all `*.toml` are imported already.
    fn imported(&self, table: &Table) -> Option<PathBuf> {
        let imports = table.get("imports")?.as_array()?.iter();
        let mut imports = imports.filter_map(Value::as_str);
        let dir = imports.find_map(|pattern| pattern.strip_suffix("/*.toml"))?;
        let above = self.file.parent().unwrap_or(Path::new("/"));
        (!dir.contains('*')).then(|| above.join(dir))
    }

    fn tables(&self, version: u64) -> String {
        let section = section(version);
        let mut text = String::new();
        for handler in &ALL {
            let name = handler.name;
            let table = format!("plugins.\"{section}\".containerd.runtimes.{name}");
            text.push_str(&format!(
                "[{table}]\n  runtime_type = \"io.containerd.brig.v2\"\n  privileged_without_host_devices = true\n  \
                 pod_annotations = [\"io.brig.*\"]\n"
            ));
            if let Some((file, _)) = handler.configuration {
                let path = self.handlers.join(file);
                text.push_str(&format!(
                    "[{table}.options]\n  ConfigPath = \"{}\"\n",
                    path.display()
                ));
            }
        }
        text
    }
}

/// Whether a configuration has a handler of this name.
fn has(table: &Table, version: u64, handler: &str) -> bool {
    let path = [
        "plugins",
        section(version),
        "containerd",
        "runtimes",
        handler,
    ];
    let mut at = Some(table);
    for key in path {
        at = at
            .and_then(|table| table.get(key))
            .and_then(Value::as_table);
    }
    at.is_some()
}

/// Its version, if it says one, and the whole.
fn read(text: &str, file: &Path) -> Result<(Option<u64>, Table)> {
    let invalid = |what: String| Error::invalid(format!("{}: {what}", file.display()));
    let table: Table = toml::from_str(text).map_err(|error| {
        let line = error.to_string().trim_end().replace('\n', " ");
        invalid(format!("containerd cannot read it: {line}"))
    })?;
    let version = match table.get("version") {
        None if table.is_empty() => None,
        None => Some(1),
        Some(version) => version
            .as_integer()
            .and_then(|version| u64::try_from(version).ok()),
    };
    match version {
        Some(0 | 1) => Err(invalid(
            "it has no version, so containerd takes it for version 1: 'containerd config migrate' prints it as a newer \
             one, 'containerd config default' one that sets nothing"
                .to_owned(),
        )),
        Some(5..) => Err(invalid("its version is newer than Brig knows: 2, 3 and 4".to_owned())),
        known => Ok((known, table)),
    }
}

/// Without the marked blocks.
fn stripped(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::new();
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let Some((_, after)) = after.split_once(END) else {
            break;
        };
        kept.push_str(before);
        rest = after;
    }
    kept.push_str(rest);
    kept
}

/// The first number of what `containerd --version` says.
fn installed_major() -> Option<u32> {
    let output = Command::new("containerd").arg("--version").output().ok()?;
    major(&String::from_utf8_lossy(&output.stdout))
}

fn major(said: &str) -> Option<u32> {
    let words = said.split_whitespace();
    let mut versions = words.map(|word| word.trim_start_matches('v'));
    versions.find_map(|word| word.split_once('.')?.0.parse().ok())
}

/// Beside its place and then renamed: containerd never reads half a file. A file that was there keeps its mode.
fn write(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let written = || {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        // Where a link leads: a file of the operator's may be one.
        let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        fs::write(&new, text)?;
        if let Ok(metadata) = fs::metadata(&place) {
            fs::set_permissions(&new, metadata.permissions())?;
        }
        fs::rename(&new, &place)
    };
    written().map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::io(format_args!("cannot change {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(text: Option<&str>, merges: bool) -> (Containerd, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("containerd/config.toml");
        if let Some(text) = text {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
        }
        let handlers = dir.path().join("brig");
        (
            Containerd {
                file,
                handlers,
                is_usual: true,
                merges,
            },
            dir,
        )
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            names.push(entry.path().display().to_string());
            names.extend(self::names(&entry.path()));
        }
        names.sort();
        names
    }

    /// All that a containerd which merges or does not would have of the handlers.
    fn handlers(node: &Containerd, version: u64) -> usize {
        let main: Table = toml::from_str(&node.text().unwrap()).unwrap();
        let imported = node.imported(&main).map(|dir| dir.join(FILE));
        let drop_in = imported.and_then(|file| fs::read_to_string(file).ok());
        let drop_in: Table = toml::from_str(&drop_in.unwrap_or_default()).unwrap();
        let here = |table: &Table| {
            let all = ALL.iter();
            all.filter(|handler| has(table, version, handler.name))
                .count()
        };
        here(&main) + here(&drop_in)
    }

    const V2: &str =
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/x\"";
    const V3: &str =
        "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"x\"\n";
    const V3_IMPORTS: &str = "version = 3\nimports = [\"extra/*.toml\"]\n";
    const V3_FIXED: &str = "version = 3\nimports = [\"/one.toml\"]\n";
    /// What `containerd config default` of 2.3 prints, shortened: it imports drop-ins, quotes with apostrophes, and has its
    /// sockets among the plugins.
    const V4: &str = "version = 4\nroot = '/var/lib/containerd'\nstate = '/run/containerd'\ntemp = ''\n\
        disabled_plugins = []\nrequired_plugins = []\noom_score = 0\nimports = ['/IMPORTED/*.toml']\n\n\
        [debug]\n  level = ''\n  format = ''\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    \
        snapshotter = 'overlayfs'\n\n  [plugins.'io.containerd.cri.v1.runtime']\n    enable_cdi = true\n\n    \
        [plugins.'io.containerd.cri.v1.runtime'.containerd]\n      default_runtime_name = 'runc'\n\n      \
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]\n        \
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n          \
        runtime_type = 'io.containerd.runc.v2'\n          sandboxer = 'podsandbox'\n\n  \
        [plugins.'io.containerd.server.v1.grpc']\n    address = '/run/containerd/containerd.sock'\n    uid = 0\n\n  \
        [plugins.'io.containerd.server.v1.ttrpc']\n    address = '/run/containerd/containerd.sock.ttrpc'\n";
    const V4_BARE: &str = "version = 4\n";
    const COMMENTS: &str = "# Nothing is set here.\n#version = 2";

    #[test]
    fn handlers_come_and_go_and_leave_every_kind_of_file_as_it_was() {
        for (text, merges, version) in [
            (Some(V2), false, 2),
            (Some(V2), true, 2),
            (Some(V3), true, 3),
            (Some(V3_IMPORTS), true, 3),
            (Some(V3_FIXED), true, 3),
            (Some(V4_BARE), true, 4),
            (Some(COMMENTS), false, 2),
            (Some(COMMENTS), true, 2),
            (Some(""), false, 2),
            (Some(""), true, 2),
            (None, false, 2),
            (None, true, 2),
        ] {
            let (node, dir) = node(text, merges);
            let before = names(dir.path());
            let done = node.add().unwrap();
            assert!(!done.changed.is_empty());
            assert_eq!(handlers(&node, version), 3, "{text:?}");
            assert_eq!(
                node.add().unwrap().changed,
                Vec::<PathBuf>::new(),
                "{text:?}"
            );
            node.remove().unwrap();
            assert_eq!(names(dir.path()), before, "{text:?}");
            assert_eq!(fs::read_to_string(&node.file).ok().as_deref(), text);
            assert_eq!(node.remove().unwrap().changed, Vec::<PathBuf>::new());
        }
    }

    #[test]
    fn the_operators_file_gets_no_more_than_an_imports_line_where_files_are_merged() {
        let (node, _dir) = node(Some(V3), true);
        node.add().unwrap();
        let text = node.text().unwrap();
        assert_eq!(text.matches("imports").count(), 1);
        assert!(text.ends_with(V3) && !text.contains("runtimes"), "{text}");
        let (node, _dir) = self::node(Some(V3_IMPORTS), true);
        node.add().unwrap();
        assert_eq!(node.text().unwrap(), V3_IMPORTS);
    }

    #[test]
    fn a_default_configuration_of_version_4_is_not_touched_and_its_drop_in_is_of_its_version() {
        // That this containerd merges is told by the version, whatever the one in PATH is.
        for merges in [true, false] {
            let (node, dir) = node(None, merges);
            let imported = dir.path().join("containerd/conf.d");
            let text = V4.replace("/IMPORTED", &imported.display().to_string());
            write(&node.file, &text).unwrap();
            let before = names(dir.path());
            node.add().unwrap();
            assert_eq!(node.text().unwrap(), text);
            assert!(!node.backup().exists());
            let drop_in: Table =
                toml::from_str(&fs::read_to_string(imported.join(FILE)).unwrap()).unwrap();
            assert_eq!(drop_in["version"], Value::Integer(4));
            let plugins = drop_in["plugins"].as_table().unwrap();
            assert_eq!(
                plugins.keys().collect::<Vec<_>>(),
                ["io.containerd.cri.v1.runtime"]
            );
            assert!(ALL.iter().all(|handler| has(&drop_in, 4, handler.name)));
            assert_eq!(node.print().unwrap().matches("runtimes.brig").count(), 5);
            node.remove().unwrap();
            assert_eq!(names(dir.path()), before);
            assert_eq!(node.text().unwrap(), text);
        }
    }

    #[test]
    fn handlers_of_another_version_of_brig_are_replaced() {
        for text in [Some(V2), Some(COMMENTS), None] {
            let (node, _dir) = node(text, false);
            node.add().unwrap();
            let older = node.text().unwrap().replace("io.brig.*", "io.older.*");
            fs::write(&node.file, &older).unwrap();
            assert_eq!(
                node.add().unwrap().changed,
                std::slice::from_ref(&node.file)
            );
            assert!(!node.text().unwrap().contains("io.older"));
            node.remove().unwrap();
            assert_eq!(fs::read_to_string(&node.file).ok().as_deref(), text);
        }
    }

    #[test]
    fn what_the_operator_changes_meanwhile_stays() {
        let (node, _dir) = node(Some(V2), false);
        node.add().unwrap();
        let changed = node.text().unwrap().replace("/x", "/y");
        fs::write(&node.file, format!("{changed}# mine\n")).unwrap();
        fs::write(node.handlers.join("debug.toml"), "debug = false\n").unwrap();
        node.remove().unwrap();
        assert_eq!(
            node.text().unwrap().trim_end(),
            format!("{}\n# mine", V2.replace("/x", "/y"))
        );
        assert!(node.handlers.join("debug.toml").exists());
        assert!(!node.handlers.join("gpu.toml").exists());
        assert!(!node.backup().exists());
    }

    #[test]
    fn a_file_that_cannot_have_them_is_left_alone_and_told() {
        for (text, expected) in [
            ("[plugins.cri]\nx = 1\n", "version 1"),
            ("version = 9\n", "newer than Brig knows"),
            (
                "version = 2\n[plugins]\n\"io.containerd.grpc.v1.cri\" = {}\n",
                "cannot read it",
            ),
            (
                "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.brig]\n",
                "already",
            ),
            ("version = = 2", "cannot read it"),
            (
                "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
                "take it out",
            ),
            (
                "version = 4\ndisabled_plugins = ['x', 'io.containerd.cri.v1.runtime']\n",
                "io.containerd.cri.v1.runtime in disabled_plugins",
            ),
        ] {
            let (node, dir) = node(Some(text), false);
            let error = node.add().unwrap_err();
            assert!(error.message.contains(expected), "{error}");
            assert_eq!(node.text().unwrap(), text);
            assert!(!dir.path().join("containerd/conf.d").exists());
        }
    }

    #[test]
    fn a_file_that_containerd_was_not_started_with_is_not_made() {
        let (usual, dir) = node(None, true);
        let node = Containerd {
            is_usual: false,
            ..usual
        };
        let error = node.add().unwrap_err();
        assert!(error.message.contains("is not there"), "{error}");
        assert_eq!(names(dir.path()), Vec::<String>::new());
        assert!(node.print().is_ok() && node.remove().unwrap().changed.is_empty());
    }

    #[test]
    fn a_version_is_read_as_containerd_says_it() {
        assert_eq!(
            major("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+b4"),
            Some(1)
        );
        assert_eq!(
            major("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7"),
            Some(2)
        );
        assert_eq!(major(""), None);
    }

    #[test]
    fn the_configurations_of_handlers_are_right() {
        for (name, text) in ALL.iter().filter_map(|handler| handler.configuration) {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join(name);
            fs::write(&file, text).unwrap();
            brig_shim::asked::config::Config::load(Some(&file)).unwrap();
        }
    }

    proptest! {
        #[test]
        fn any_text_without_marks_is_its_own_rest(text in "[a-z\\[\\]#\n= ]{0,80}") {
            prop_assert_eq!(stripped(&text), text.clone());
            let block = format!("{text}{BEGIN}x = 1\n{END}{text}");
            prop_assert_eq!(stripped(&block), format!("{text}{text}"));
        }
    }
}
