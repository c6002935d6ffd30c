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

use std::fs::{self, Metadata, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use brig_shim::error::{Error, Result};
use toml::{Table, Value};

use crate::configured::{self, disabled, section};

/// Where containerd's configuration is.
pub const CONTAINERD: &str = "/etc/containerd/config.toml";
/// Where handlers have their own configuration.
pub const HANDLERS: &str = "/etc/brig";
const FILE: &str = "brig.toml";
/// How a file of that name begins if it is ours and not the operator's.
const OURS: &str = "# Made by 'brig containerd add'.\n";
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
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// containerd's files that were written or removed; nothing, if all was as it should be.
    pub changed: Vec<PathBuf>,
    /// Those of handlers, which containerd does not read.
    pub handlers: Vec<PathBuf>,
    /// What of ours stays, as the operator's: a directory whose files are imported by the line that `add` has written, and
    /// that others have come to rely on.
    pub kept: Option<PathBuf>,
}

impl Done {
    /// A sentence about what stays; nothing if nothing does.
    #[must_use]
    pub fn left(&self) -> String {
        let said = self.kept.as_ref().map(|dir| {
            format!(
                "left: the line that imports {}, as others have files there\n",
                dir.display()
            )
        });
        said.unwrap_or_default()
    }
}

impl Containerd {
    /// That in `file`; `merges` says whether all containerds that read it merge the files that it imports.
    #[must_use]
    pub fn new(file: &Path, merges: bool) -> Self {
        Self {
            file: file.to_owned(),
            handlers: PathBuf::from(HANDLERS),
            is_usual: file == Path::new(CONTAINERD),
            merges,
        }
    }

    /// The handlers for the version of the configuration that is there, and what its tables say as JSON.
    ///
    /// # Errors
    /// `InvalidArgument` for a file that containerd would not read, or of a version without CRI.
    pub fn print(&self) -> Result<(String, serde_json::Value)> {
        let (version, _) = read(&self.text()?, &self.file)?;
        let tables = self.tables(version.unwrap_or(2));
        let said = toml::from_str(&tables)
            .map_err(|error| Error::internal(format!("the handlers are no TOML: {error}")))?;
        Ok((tables, said))
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
        self.refuse_others(&table, version, merges)?;
        let tables = self.tables(version);
        let imported = merges.then(|| self.imported(&table)).flatten();
        let covered = imported.is_some();
        let imported = imported
            .or_else(|| (merges && !table.contains_key("imports")).then(|| self.own_directory()));
        // A file that sets nothing has no version either.
        let head = said.map_or_else(|| format!("version = {version}\n"), |_| String::new());
        let (new, drop_in) = match imported {
            Some(dir) => {
                let text = format!("{OURS}version = {version}\n\n{tables}");
                let line = imports(&dir);
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
        if let Some((path, _)) = &drop_in
            && path.exists()
            && !is_ours(path)
        {
            return Err(Error::already_exists(format!(
                "{} is not made by 'brig containerd add': give it another name, and say this again",
                path.display()
            )));
        }
        let mut done = Done::default();
        for handler in &ALL {
            if let Some((name, text)) = handler.configuration {
                let path = self.handlers.join(name);
                if !path.exists() {
                    write(&path, text, None)?;
                    done.handlers.push(path);
                }
            }
        }
        if let Some((path, text)) = drop_in
            && fs::read_to_string(&path).ok().as_deref() != Some(text.as_str())
        {
            write(&path, &text, None)?;
            done.changed.push(path);
        }
        if new != whole {
            if whole == without
                && let Ok(metadata) = fs::metadata(&self.file)
            {
                write(&self.backup(), &without, Some(&metadata))?;
            }
            write(&self.file, &new, None)?;
            done.changed.push(self.file.clone());
        }
        Ok(done)
    }

    /// Takes them away again. Repeatable; what an operator has changed stays.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> Result<Done> {
        let mut done = Done::default();
        let gone = |path: PathBuf, removed: &mut Vec<PathBuf>| -> Result<()> {
            match fs::remove_file(&path) {
                Ok(()) => removed.push(path),
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
            if is_ours(&dir.join(FILE)) {
                gone(dir.join(FILE), &mut done.changed)?;
                // If it was made for this alone.
                let _ = fs::remove_dir(&dir);
            }
        }
        for handler in &ALL {
            if let Some((name, text)) = handler.configuration {
                let path = self.handlers.join(name);
                if fs::read_to_string(&path).ok().as_deref() == Some(text) {
                    gone(path, &mut done.handlers)?;
                }
            }
        }
        let _ = fs::remove_dir(&self.handlers);
        let mut without = stripped(&whole);
        let conf_d = self.own_directory();
        if let Some(unmarked) = unmarked_imports(&whole, &conf_d).filter(|_| has_files(&conf_d)) {
            without = unmarked;
            done.kept = Some(conf_d);
        }
        if without != whole {
            let backup = fs::read_to_string(self.backup()).ok();
            if backup.is_none() && without.is_empty() {
                // There was none before.
                gone(self.file.clone(), &mut done.changed)?;
                if let Some(dir) = self.file.parent() {
                    let _ = fs::remove_dir(dir);
                }
            } else {
                // A last line that had no end is the one thing that the block may have changed.
                let original = backup.filter(|backup| backup.trim_end() == without.trim_end());
                write(&self.file, original.as_deref().unwrap_or(&without), None)?;
                done.changed.push(self.file.clone());
            }
        }
        let _ = fs::remove_file(self.backup());
        Ok(done)
    }

    /// Refuses what its operator has of these handlers, here or in a file that is imported, and an imported file that
    /// would take the place of ours.
    fn refuse_others(&self, table: &Table, version: u64, merges: bool) -> Result<()> {
        let named = |table: &Table, version: u64, file: &Path| {
            let handler = ALL
                .iter()
                .find(|handler| has(table, version, handler.name))?;
            Some(Error::already_exists(format!(
                "{} has a runtime handler {} already, which is its operator's: take it away, and say this again",
                file.display(),
                handler.name
            )))
        };
        if let Some(error) = named(table, version, &self.file) {
            return Err(error);
        }
        let files = configured::read(&self.file, None).files;
        for file in files.iter().filter(|file| **file != self.file) {
            let text = fs::read_to_string(file).unwrap_or_default();
            if is_ours(file) {
                continue;
            }
            let imported: Table = toml::from_str(&text).unwrap_or_default();
            let said = imported.get("version").and_then(Value::as_integer);
            let version = said
                .and_then(|version| u64::try_from(version).ok())
                .unwrap_or(version);
            if let Some(error) = named(&imported, version, file) {
                return Err(error);
            }
            let plugins = imported.get("plugins");
            if !merges && plugins.is_some_and(|plugins| plugins.get(section(version)).is_some()) {
                return Err(Error::state(format!(
                    "{} has plugins.\"{}\", and containerd 1 does not look into that of {} then: put there what 'brig containerd print' says",
                    file.display(),
                    section(version),
                    self.file.display()
                )));
            }
        }
        Ok(())
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

/// With the block that imports this directory, but without its marks, if there is one.
fn unmarked_imports(text: &str, dir: &Path) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (block, after) = rest.split_once(END)?;
    let line = imports(dir);
    let imports = block.lines().any(|said| said == line.trim_end());
    imports.then(|| format!("{before}{block}{after}"))
}

fn imports(dir: &Path) -> String {
    format!("imports = [\"{}/*.toml\"]\n", dir.display())
}

/// Whether a directory has files that a containerd imports from there.
fn has_files(dir: &Path) -> bool {
    let mut entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.any(|entry| entry.path().extension().is_some_and(|end| end == "toml"))
}

/// Whether a file is what `add` has made.
fn is_ours(file: &Path) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.starts_with(OURS))
}

/// Beside its place and then renamed: containerd never reads half a file. Mode and owner are those of the file that was
/// there, or of another that it is `like`: there are passwords of registries in some.
fn write(path: &Path, text: &str, like: Option<&Metadata>) -> Result<()> {
    // Where a link leads: a file of the operator's may be one.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let new = place.with_extension("brig-new");
    let written = || {
        if let Some(dir) = place.parent() {
            fs::create_dir_all(dir)?;
        }
        let there = fs::metadata(&place).ok();
        let _ = fs::remove_file(&new);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        match like.or(there.as_ref()) {
            Some(like) => {
                fchown(&file, Some(like.uid()), Some(like.gid()))?;
                file.set_permissions(like.permissions())?;
            }
            None => file.set_permissions(Permissions::from_mode(0o644))?,
        }
        file.sync_all()?;
        fs::rename(&new, &place)
    };
    written().map_err(|error| {
        let _ = fs::remove_file(&new);
        failed(path, &error)
    })
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::io(format_args!("cannot change {}", path.display()), error)
}

#[cfg(test)]
mod tests;
