//! The handlers that containerd's configuration has for Brig, whoever has written it: their names, and the file of Brig's
//! that each names. What cannot be read is not there: containerd says what is wrong with its own files.

use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// What a handler's `runtime_type` begins with.
const TYPE: &str = "io.containerd.brig.";

/// A handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// What a RuntimeClass calls it.
    pub name: String,
    /// Its configuration of Brig's, if it has one of its own.
    pub file: Option<PathBuf>,
}

/// The file that a containerd was started with, by its command line.
#[must_use]
pub fn file_of(command: &[String]) -> Option<PathBuf> {
    let mut words = command.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-c" | "--config" => return words.next().map(PathBuf::from),
            _ => {}
        }
        if let Some(file) = word.strip_prefix("--config=") {
            return Some(file.into());
        }
    }
    None
}

/// Those of a file and of what it imports, by name; a later one replaces an earlier one.
#[must_use]
pub fn handlers(file: &Path) -> Vec<Configured> {
    let mut found = Vec::<Configured>::new();
    let own = read(file);
    let imported = imports(file, &own);
    let imported = imported.into_iter().map(|file| read(&file));
    for table in std::iter::once(own).chain(imported) {
        for handler in of_table(&table) {
            found.retain(|other| other.name != handler.name);
            found.push(handler);
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

fn read(file: &Path) -> Table {
    let text = fs::read_to_string(file).unwrap_or_default();
    toml::from_str(&text).unwrap_or_default()
}

/// The files that the `imports` of one name.
fn imports(file: &Path, table: &Table) -> Vec<PathBuf> {
    let patterns = table.get("imports").and_then(Value::as_array);
    let patterns = patterns.into_iter().flatten().filter_map(Value::as_str);
    let above = file.parent().unwrap_or(Path::new("/"));
    let mut files = Vec::new();
    for pattern in patterns {
        let path = above.join(pattern);
        let (Some(dir), Some(last)) = (path.parent(), path.file_name()) else {
            continue;
        };
        // A star in the last part is what containerd's own documents have.
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

fn of_table(table: &Table) -> Vec<Configured> {
    let plugins = table.get("plugins").and_then(Value::as_table);
    let plugins = plugins.into_iter().flat_map(Table::values);
    let runtimes = plugins.filter_map(|plugin| {
        let runtimes = plugin.get("containerd")?.get("runtimes")?;
        runtimes.as_table()
    });
    let handlers = runtimes.flatten().filter_map(|(name, runtime)| {
        let kind = runtime.get("runtime_type")?.as_str()?;
        if !kind.starts_with(TYPE) {
            return None;
        }
        let options = runtime.get("options");
        let file = options.and_then(|options| options.get("ConfigPath")?.as_str());
        Some(Configured {
            name: name.clone(),
            file: file.filter(|file| !file.is_empty()).map(PathBuf::from),
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
    }

    #[test]
    fn handlers_are_those_of_brigs_type_in_the_file_and_in_what_it_imports() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        let runtime = |name: &str, rest: &str| {
            format!(
                "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{name}]\n{rest}\n"
            )
        };
        let brig = "runtime_type = \"io.containerd.brig.v2\"";
        let named = |file: &str| format!("{brig}\noptions = {{ ConfigPath = \"{file}\" }}");
        let text = [
            "version = 3\nimports = [\"conf.d/*.toml\", \"/nonexistent/x.toml\"]\n".to_owned(),
            runtime("runc", "runtime_type = \"io.containerd.runc.v2\""),
            runtime("brig", brig),
            runtime("gpu", &named("/old.toml")),
        ];
        fs::write(&main, text.concat()).unwrap();
        let imported = dir.path().join("conf.d");
        fs::create_dir(&imported).unwrap();
        fs::write(imported.join("a.toml"), runtime("gpu", &named("/new.toml"))).unwrap();
        fs::write(imported.join("b.toml"), "not = = toml").unwrap();
        fs::write(imported.join("c.txt"), runtime("none", brig)).unwrap();
        let configured = |name: &str, file: Option<&str>| Configured {
            name: name.to_owned(),
            file: file.map(PathBuf::from),
        };
        let expected = [
            configured("brig", None),
            configured("gpu", Some("/new.toml")),
        ];
        assert_eq!(handlers(&main), expected);
        assert!(handlers(&dir.path().join("none")).is_empty());
    }
}
