//! containerd's configuration as containerd reads it: the file that it was started with and all that this imports, of
//! versions 2 to 4, and what it has of Brig's handlers, whoever has written them.
//!
//! containerd 1 puts a plugin's section of an imported file in the place of that section; from 2.0 on sections are merged.
//! What is wrong with a file is kept beside what could be read: the running containerd may have read it before it was so.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

/// The runtime's name, up to its version.
const TYPE: &str = "io.containerd.brig.";
/// What its program is called in a handler that names it by its path.
const PROGRAM: &str = "containerd-shim-brig-";
/// The CRI plugin's section in files of version 2, and in those of 3 and 4.
const SECTIONS: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
/// What of CRI can be turned off, the first as version 1 calls it.
const PARTS: [&str; 4] = [
    "cri",
    SECTIONS[0],
    SECTIONS[1],
    "io.containerd.cri.v1.images",
];
/// Where containerd listens when it is not told.
const SOCKET: &str = "/run/containerd/containerd.sock";
/// Files that are read, at most: more are no configuration of a node.
const MAX_FILES: usize = 256;

/// A handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// What a RuntimeClass calls it.
    pub name: String,
    /// Its configuration of Brig's, if it has one of its own.
    pub file: Option<PathBuf>,
    /// The runtime by its name, or by the path of its program.
    pub runtime: String,
    /// The shim's program, where the handler says it beside the name.
    pub program: Option<PathBuf>,
}

/// A configuration of containerd's.
#[derive(Debug, Default)]
pub struct Configuration {
    /// Its files, the one that containerd was started with first.
    pub files: Vec<PathBuf>,
    /// Brig's handlers by name.
    pub handlers: Vec<Configured>,
    /// What containerd cannot read, or reads otherwise than it was meant: a sentence each, and what to do.
    pub faults: Vec<(String, String)>,
    /// A part of CRI that it turns off, and in which file.
    pub disabled: Option<(String, PathBuf)>,
    /// Where containerd listens.
    pub socket: PathBuf,
}

/// The value of an option of a command line, in either of its forms.
#[must_use]
pub fn option<'a>(command: &'a [String], names: [&str; 2]) -> Option<&'a str> {
    let mut words = command.iter();
    while let Some(word) = words.next() {
        if names.contains(&word.as_str()) {
            return words.next().map(String::as_str);
        }
        let of = |name: &&str| word.strip_prefix(*name)?.strip_prefix('=');
        if let Some(value) = names.iter().find_map(of) {
            return Some(value);
        }
    }
    None
}

/// The file that a containerd was started with, by its command line.
#[must_use]
pub fn file_of(command: &[String]) -> Option<PathBuf> {
    option(command, ["-c", "--config"]).map(PathBuf::from)
}

/// That of a file, as a containerd of this `major` version reads it, or one that is not known.
#[must_use]
pub fn read(file: &Path, major: Option<u32>) -> Configuration {
    let mut read = Configuration {
        socket: PathBuf::from(SOCKET),
        ..Configuration::default()
    };
    let mut whole = Table::new();
    let mut pending = vec![file.to_owned()];
    let mut seen = BTreeSet::new();
    let mut main = None;
    while !pending.is_empty() && read.files.len() < MAX_FILES {
        let path = pending.remove(0);
        if !seen.insert(path.clone()) {
            continue;
        }
        let Some(mut table) = one(&path, main.is_none(), &mut read.faults) else {
            main.get_or_insert(0);
            continue;
        };
        let said = table.get("version").and_then(Value::as_integer);
        let version = said.unwrap_or(main.unwrap_or(1));
        let first = *main.get_or_insert(version);
        read.files.push(path.clone());
        if version > first {
            let sentence = format!(
                "{} is of version {version}, and {} imports it, which is of version {first}: containerd will not start again \
                 with it",
                path.display(),
                file.display()
            );
            let fix = format!("write it in version {first}");
            read.faults.push((sentence, fix));
        }
        if let Some((wrong, right)) = unread_section(version, major)
            && let Some(plugins) = table.get_mut("plugins").and_then(Value::as_table_mut)
            && let Some(plugin) = plugins.remove(wrong)
        {
            read.faults.extend(handlers_of(&plugin).first().map(|handler| {
                let sentence = format!(
                    "{} has handler {} in plugins.\"{wrong}\", which containerd does not read in a file of version {version}",
                    path.display(),
                    handler.name
                );
                (sentence, format!("move it to plugins.\"{right}\""))
            }));
        }
        if read.disabled.is_none() {
            read.disabled = disabled(&table).map(|part| (part.to_owned(), path.clone()));
        }
        pending.extend(imports(&path, &table));
        let merges = major.map_or(first >= 3, |major| major >= 2);
        merge(&mut whole, table, merges);
    }
    if let Some(socket) = socket(&whole) {
        read.socket = socket;
    }
    read.handlers = of_table(&whole);
    read.handlers
        .sort_by(|one, other| one.name.cmp(&other.name));
    read
}

/// One file; containerd does without the one that it is started with, if that is not there, but not without an imported one.
fn one(path: &Path, is_main: bool, faults: &mut Vec<(String, String)>) -> Option<Table> {
    let text = match fs::read_to_string(path) {
        Err(error) if is_main && error.kind() == io::ErrorKind::NotFound => return None,
        text => text.map_err(|error| error.to_string()),
    };
    let table = text.and_then(|text| {
        let table = toml::from_str::<Table>(&text);
        table.map_err(|error| error.to_string().trim_end().replace('\n', " "))
    });
    match table {
        Ok(table) => Some(table),
        Err(error) => {
            let sentence = format!(
                "{} cannot be read, and containerd will not start again with it: {error}",
                path.display()
            );
            faults.push((
                sentence,
                "mend that file, or take it out of imports".to_owned(),
            ));
            None
        }
    }
}

/// The CRI plugin's section that has the handlers.
#[must_use]
pub fn section(version: u64) -> &'static str {
    if version >= 3 {
        SECTIONS[1]
    } else {
        SECTIONS[0]
    }
}

/// The section that containerd does not look into for a file of this version, and the one that it does.
fn unread_section(version: i64, major: Option<u32>) -> Option<(&'static str, &'static str)> {
    match version {
        3.. => Some((SECTIONS[0], SECTIONS[1])),
        // containerd 2 knows the new section in an old file too.
        _ if major == Some(1) => Some((SECTIONS[1], SECTIONS[0])),
        _ => None,
    }
}

/// A part of the CRI plugin that a configuration turns off.
#[must_use]
pub fn disabled(table: &Table) -> Option<&str> {
    let plugins = table.get("disabled_plugins")?.as_array()?.iter();
    let mut plugins = plugins.filter_map(Value::as_str);
    plugins.find(|plugin| PARTS.contains(plugin))
}

fn socket(table: &Table) -> Option<PathBuf> {
    let own = table.get("grpc");
    // Version 4 has it among the plugins.
    let plugins = table.get("plugins");
    let plugin = plugins.and_then(|plugins| plugins.get("io.containerd.server.v1.grpc"));
    let mut found = [plugin, own].into_iter().flatten();
    let address = found.find_map(|server| server.get("address")?.as_str());
    address
        .filter(|address| !address.is_empty())
        .map(PathBuf::from)
}

/// Puts an imported file into what was read before it.
fn merge(whole: &mut Table, new: Table, merges: bool) {
    for (key, value) in new {
        match (whole.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) if key == "plugins" && !merges => {
                old.extend(new);
            }
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new, true),
            (_, value) => {
                whole.insert(key, value);
            }
        }
    }
}

/// The files that the `imports` of one name: plain paths, and patterns whose last part has a star, which is what
/// containerd's own documents have.
fn imports(file: &Path, table: &Table) -> Vec<PathBuf> {
    let patterns = table.get("imports").and_then(Value::as_array);
    let patterns = patterns.into_iter().flatten().filter_map(Value::as_str);
    let above = file.parent().unwrap_or(Path::new("/"));
    let mut files = Vec::new();
    for pattern in patterns {
        let path = plain(&above.join(pattern));
        let (Some(dir), Some(last)) = (path.parent(), path.file_name()) else {
            continue;
        };
        let last = last.to_string_lossy();
        let Some((start, end)) = last.split_once('*') else {
            files.push(path.clone());
            continue;
        };
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names
            .filter(|name| {
                name.len() >= start.len() + end.len()
                    && name.starts_with(start)
                    && name.ends_with(end)
            })
            .collect();
        names.sort();
        files.extend(names.into_iter().map(|name| dir.join(name)));
    }
    files
}

/// Without `.` and `..`, by the words alone, as containerd has them: so it knows a file that it has read.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain
}

fn of_table(table: &Table) -> Vec<Configured> {
    let plugins = table.get("plugins").and_then(Value::as_table);
    let plugins = plugins.into_iter().flat_map(Table::values);
    let mut found: Vec<Configured> = Vec::new();
    for handler in plugins.flat_map(handlers_of) {
        found.retain(|other| other.name != handler.name);
        found.push(handler);
    }
    found
}

/// Those in a plugin's section.
fn handlers_of(plugin: &Value) -> Vec<Configured> {
    let runtimes = plugin.get("containerd").and_then(|own| own.get("runtimes"));
    let runtimes = runtimes.and_then(Value::as_table);
    let handlers = runtimes.into_iter().flatten().filter_map(|(name, own)| {
        let text = |key: &str| own.get(key).and_then(Value::as_str);
        let runtime = text("runtime_type").unwrap_or_default();
        let program = text("runtime_path").filter(|path| !path.is_empty());
        let is_shim = |path: &str| {
            let program = Path::new(path).file_name().unwrap_or_default();
            program.to_string_lossy().starts_with(PROGRAM)
        };
        if !runtime.starts_with(TYPE) && !is_shim(runtime) && !program.is_some_and(is_shim) {
            return None;
        }
        let options = own.get("options");
        let file = options.and_then(|options| options.get("ConfigPath")?.as_str());
        Some(Configured {
            name: name.clone(),
            file: file.filter(|file| !file.is_empty()).map(PathBuf::from),
            runtime: runtime.to_owned(),
            program: program.map(PathBuf::from),
        })
    });
    handlers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_containerd_says_by_its_command_line_where_its_file_is() {
        let file = |text: &str| file_of(&words(text));
        assert_eq!(file("/usr/bin/containerd"), None);
        for line in [
            "containerd -c /x.toml",
            "c --root /r --config /x.toml -l",
            "c --config=/x.toml",
        ] {
            assert_eq!(file(line), Some("/x.toml".into()), "{line}");
        }
        assert_eq!(file("containerd --config"), None);
        let line = words("containerd --address=/a.sock -c /x.toml");
        assert_eq!(option(&line, ["-a", "--address"]), Some("/a.sock"));
    }

    const BRIG: &str = "runtime_type = \"io.containerd.brig.v2\"";

    fn runtime(section: &str, name: &str, rest: &str) -> String {
        format!("[plugins.\"{section}\".containerd.runtimes.{name}]\n{rest}\n")
    }

    fn named(file: &str) -> String {
        format!("{BRIG}\noptions = {{ ConfigPath = \"{file}\" }}")
    }

    fn configured(name: &str, file: Option<&str>) -> Configured {
        Configured {
            name: name.to_owned(),
            file: file.map(PathBuf::from),
            runtime: "io.containerd.brig.v2".to_owned(),
            program: None,
        }
    }

    /// A file with these texts, the first the main one and the others its drop-ins.
    fn files(texts: &[&str]) -> (PathBuf, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        let imported = dir.path().join("conf.d");
        fs::create_dir(&imported).unwrap();
        for (number, text) in texts.iter().enumerate() {
            let file = match number {
                0 => main.clone(),
                number => imported.join(format!("{number}.toml")),
            };
            fs::write(file, text).unwrap();
        }
        (main, dir)
    }

    #[test]
    fn handlers_are_those_of_brigs_type_in_the_file_and_in_what_it_imports() {
        for version in [3, 4] {
            let runtime = |name: &str, rest: &str| runtime(SECTIONS[1], name, rest);
            let text = [
                format!("version = {version}\nimports = [\"conf.d/*.toml\"]\n"),
                runtime("runc", "runtime_type = \"io.containerd.runc.v2\""),
                runtime("brig", BRIG),
                runtime("gpu", &named("/old.toml")),
            ];
            let gpu = format!(
                "version = {version}\nimports = [\"more.toml\", \"../config.toml\"]\n{}",
                runtime("gpu", &named("/new.toml"))
            );
            let (main, dir) = files(&[&text.concat(), &gpu]);
            fs::write(
                dir.path().join("conf.d/c.txt"),
                runtime("none", "runtime_type = \"x\""),
            )
            .unwrap();
            let more = [
                runtime("path", "runtime_type = \"/opt/containerd-shim-brig-v2\""),
                runtime(
                    "other",
                    "runtime_type = \"x\"\nruntime_path = \"/opt/containerd-shim-brig-v2\"",
                ),
            ];
            fs::write(dir.path().join("conf.d/more.toml"), more.concat()).unwrap();
            // A pattern would find it as well.
            for major in [Some(2), None] {
                let found = read(&main, major);
                assert_eq!(found.faults, []);
                let names: Vec<_> = found.handlers.iter().map(|one| one.name.as_str()).collect();
                assert_eq!(names, ["brig", "gpu", "other", "path"]);
                assert_eq!(found.handlers[0], configured("brig", None));
                assert_eq!(found.handlers[1], configured("gpu", Some("/new.toml")));
                assert_eq!(found.files.len(), 3, "{:?}", found.files);
            }
        }
        let none = read(Path::new("/nonexistent/config.toml"), Some(2));
        assert!(none.handlers.is_empty() && none.faults.is_empty());
    }

    #[test]
    fn the_section_of_an_imported_file_takes_the_place_of_the_first_ones_only_in_containerd_1() {
        let main = format!(
            "version = 2\nimports = [\"conf.d/*.toml\"]\n{}",
            runtime(SECTIONS[0], "brig", BRIG)
        );
        let drop_in = format!("version = 2\n{}", runtime(SECTIONS[0], "gpu", BRIG));
        let (main, _dir) = files(&[&main, &drop_in]);
        let names = |major| -> Vec<String> {
            let handlers = read(&main, major).handlers.into_iter();
            handlers.map(|handler| handler.name).collect()
        };
        assert_eq!(names(Some(1)), ["gpu"]);
        assert_eq!(names(None), ["gpu"]);
        assert_eq!(names(Some(2)), ["brig", "gpu"]);
    }

    #[test]
    fn what_containerd_will_not_read_is_told_with_what_to_do() {
        let told = |texts: &[&str], major| {
            let (main, dir) = files(texts);
            let faults = read(&main, major).faults.into_iter();
            let faults: Vec<_> = faults.map(|(why, fix)| format!("{why}: {fix}")).collect();
            faults
                .join("\n")
                .replace(&dir.path().display().to_string(), "")
        };
        let imports = "version = 3\nimports = [\"conf.d/*.toml\"]\n";
        let wrong = told(&[imports, "not = = toml"], Some(2));
        assert!(
            wrong.starts_with("/conf.d/1.toml cannot be read"),
            "{wrong}"
        );
        let gone = told(
            &["version = 3\nimports = [\"/nonexistent/x.toml\"]\n"],
            Some(2),
        );
        assert!(
            gone.contains("/nonexistent/x.toml cannot be read"),
            "{gone}"
        );
        let newer = told(&[imports, "version = 4\n"], Some(2));
        assert!(newer.contains("write it in version 3"), "{newer}");
        assert_eq!(told(&[imports, "version = 2\n"], Some(2)), "");
        let old = format!("version = 3\n{}", runtime(SECTIONS[0], "brig", BRIG));
        assert!(
            told(&[&old], Some(2)).ends_with("move it to plugins.\"io.containerd.cri.v1.runtime\"")
        );
        assert!(read(&files(&[&old]).0, Some(2)).handlers.is_empty());
        let new = format!("version = 2\n{}", runtime(SECTIONS[1], "brig", BRIG));
        assert!(told(&[&new], Some(1)).contains("handler brig in plugins"));
        assert_eq!(told(&[&new], Some(2)), "");
        assert_eq!(told(&["version = = 2"], None).lines().count(), 1);
    }

    #[test]
    fn where_containerd_listens_and_that_it_serves_no_kubernetes_are_read() {
        let of = |text: &str| {
            let (main, _dir) = files(&[text]);
            read(&main, None)
        };
        assert_eq!(of("version = 2").socket, PathBuf::from(SOCKET));
        let grpc = of("version = 3\n[grpc]\naddress = \"/a.sock\"");
        assert_eq!(grpc.socket, PathBuf::from("/a.sock"));
        let plugin =
            of("version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = '/b.sock'");
        assert_eq!(plugin.socket, PathBuf::from("/b.sock"));
        assert!(plugin.disabled.is_none());
        // As a package of Docker's has it.
        let docker = of("disabled_plugins = [\"cri\"]");
        assert_eq!(docker.disabled.unwrap().0, "cri");
    }
}
