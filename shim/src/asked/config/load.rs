//! A configuration from its files: the main one, then its drop-ins in the order of their names.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Config, File, Origin, keys};
use crate::error::{Error, Result};

/// The default file; drop-ins are `*.toml` in the directory of the same name ending in `.d`.
pub const DEFAULT_PATH: &str = "/etc/brig/config.toml";

impl Config {
    /// Reads the configuration: `path` if the handler names one (it must exist), else the default
    /// file if there is one; then its drop-ins in the order of their names.
    ///
    /// # Errors
    /// `InvalidArgument` that names the file and the key.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let mut config = Self::installed();
        let files = files(path)?;
        config.apply_all(&files)?;
        if path.is_some_and(|path| path != Path::new(DEFAULT_PATH)) {
            config.take_of_node(&files)?;
        }
        Ok(config)
    }

    /// Where the node's pods have their directories. A configuration that cannot be read must not keep a dead pod's remains in
    /// place, so it counts as one that does not say.
    #[must_use]
    pub fn state_dir() -> PathBuf {
        Self::load(None).map_or_else(|_| Self::installed().state_dir, |config| config.state_dir)
    }

    /// What is one for all pods of the node, in which handlers' files do not have a say.
    fn take_of_node(&mut self, files: &[(PathBuf, String)]) -> Result<()> {
        let of_node = Self::state_dir();
        let says = |text: &str| keys_of(text).iter().any(|key| key == "state_dir");
        let file = files.iter().rev().find(|(_, text)| says(text));
        if let Some((path, _)) = file.filter(|_| self.state_dir != of_node) {
            return Err(Error::invalid(format!(
                "configuration {}: state_dir is one for all pods of the node, {} by now; it is set in {DEFAULT_PATH} or its drop-ins",
                path.display(),
                of_node.display()
            )));
        }
        self.state_dir = of_node;
        Ok(())
    }

    /// Applies the text of a file, of which nothing counts if a part is refused.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn apply(&mut self, path: &Path, text: &str) -> Result<()> {
        let mut whole = self.clone();
        whole.apply_all(&[(path.to_owned(), text.to_owned())])?;
        *self = whole;
        Ok(())
    }

    /// Applies files in their order. Only together they have to fit.
    fn apply_all(&mut self, files: &[(PathBuf, String)]) -> Result<()> {
        let invalid = |path: &Path, what: String| {
            Error::invalid(format!("configuration {}: {what}", path.display()))
        };
        for (path, text) in files {
            let file: File =
                toml::from_str(text).map_err(|error| invalid(path, explain(text, &error)))?;
            self.merge(file, &|what| invalid(path, what))?;
            for key in keys_of(text) {
                self.origins.insert(key, Origin::File(path.clone()));
            }
        }
        // The last of those that have a say.
        let depend = |text: &str| {
            let keys = keys_of(text);
            keys.iter()
                .any(|key| key == "memory" || key == "max_memory")
        };
        let mut last = files.iter().rev().filter(|(_, text)| depend(text));
        let path = last
            .next()
            .map_or(Path::new(DEFAULT_PATH), |(path, _)| path);
        self.agrees(&|what| invalid(path, what))
    }
}

/// The texts of the main file and its drop-ins, in the order in which they apply.
fn files(path: Option<&Path>) -> Result<Vec<(PathBuf, String)>> {
    let main = path.unwrap_or(Path::new(DEFAULT_PATH));
    let mut texts = Vec::new();
    for (index, file) in std::iter::once(main.to_owned())
        .chain(drop_ins(main))
        .enumerate()
    {
        match fs::read_to_string(&file) {
            Ok(text) => texts.push((file, text)),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && path.is_none() && index == 0 => {}
            Err(error) => {
                return Err(Error::invalid(format!(
                    "configuration {} cannot be read: {error}",
                    file.display()
                )));
            }
        }
    }
    Ok(texts)
}

/// The keys that a file sets; none of a text that is no TOML.
fn keys_of(text: &str) -> Vec<String> {
    let table: toml::Table = toml::from_str(text).unwrap_or_default();
    table.keys().cloned().collect()
}

/// Why a file cannot be read, in one line: a key that does not exist comes first, with the nearest that does.
fn explain(text: &str, error: &toml::de::Error) -> String {
    let known = |key: &String| keys::KEYS.iter().any(|known| known.name == *key);
    let Some(key) = keys_of(text).into_iter().find(|key| !known(key)) else {
        return in_one_line(text, error);
    };
    let hint = match keys::nearest(&key) {
        Some(nearest) => format!("did you mean {nearest:?}?"),
        None => "`brig config default` lists the keys".to_owned(),
    };
    format!("unknown key {key:?}; {hint}")
}

/// Where it is and what is wrong with it, without the picture that the parser draws.
fn in_one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim_end().replace('\n', " ");
    let before = error.span().and_then(|span| text.get(..span.start));
    let Some(before) = before else {
        return message;
    };
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    match line.split_once('=') {
        Some((key, _)) => format!("line {number}, {}: {message}", key.trim()),
        None => format!("line {number}: {message}"),
    }
}

fn drop_ins(main: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(main.with_extension("d")) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            // A hidden one is an editor's, of a file that is being changed.
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".toml") && !name.starts_with('.')
        })
        .collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::config::MIB;
    use crate::error::Kind;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    fn applied(text: &str) -> Result<Config> {
        let mut config = Config::defaults(Path::new("/opt/brig/bin"));
        config.apply(Path::new("/etc/brig/config.toml"), text)?;
        Ok(config)
    }

    #[test]
    fn an_empty_file_leaves_the_defaults_of_the_prefix() {
        let config = applied("").unwrap();
        assert_eq!(config, Config::defaults(Path::new("/opt/brig/bin")));
        assert_eq!(config.kernel, Path::new("/opt/brig/share/brig/vmlinux"));
        assert_eq!(
            config.modules,
            Path::new("/opt/brig/share/brig/modules.erofs")
        );
        assert_eq!(config.vmm, Path::new("/opt/brig/bin/brig-vmm"));
    }

    #[test]
    fn files_beside_the_binary_come_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinux"), "").unwrap();
        let config = Config::defaults(dir.path());
        assert_eq!(config.kernel, dir.path().join("vmlinux"));
    }

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        assert_eq!(applied("memory = 128").unwrap().memory, 128 * MIB);
        assert_eq!(applied("memory = \"128MiB\"").unwrap().memory, 128 * MIB);
        assert_eq!(applied("memory = \"2GiB\"").unwrap().memory, 2048 * MIB);
    }

    #[test]
    fn a_handlers_file_does_not_say_where_the_nodes_pods_are() {
        let dir = tempfile::tempdir().unwrap();
        let handler = dir.path().join("debug.toml");
        let set = |place: &Path| {
            fs::write(&handler, format!("state_dir = {place:?}")).unwrap();
            Config::load(Some(&handler))
        };
        let refused = set(Path::new("/run/elsewhere")).unwrap_err();
        assert!(
            refused.message.contains("debug.toml: state_dir is one"),
            "{refused}"
        );
        assert!(set(&Config::state_dir()).is_ok());
    }

    #[test]
    fn each_wrong_value_is_refused_by_a_sentence_that_names_it() {
        for (text, expected) in [
            (
                "memory = 16",
                "memory is 16 MiB, but a guest needs at least 64 MiB",
            ),
            ("memory = \"lots\"", "a size is a number of MiB"),
            (
                "memory = \"99999999999999999999GiB\"",
                "a size is a number of MiB",
            ),
            ("vcpus = 0", "vcpus is 0"),
            ("vcpus = 65", "vcpus is 65"),
            ("time_scale = 0.0", "time_scale must be"),
            ("time_scale = nan", "time_scale must be"),
            ("kernel = \"vmlinux\"", "kernel must be an absolute path"),
            ("shutdown_grace = 601", "shutdown_grace is 601s"),
            ("shutdown_grace = -1", "shutdown_grace"),
            (
                "kernal = \"/x\"",
                "unknown key \"kernal\"; did you mean \"kernel\"?",
            ),
            (
                "colour = 1",
                "unknown key \"colour\"; `brig config default`",
            ),
            ("shutdown_grace = \"soon\"", "a time is a number of seconds"),
            ("shutdown_grace = 1.5", "a time is a number of seconds"),
            ("max_files = 3", "max_files is 3, but must be 8192"),
            ("max_files = 1073741825", "to 1073741824"),
            ("netfilter = \"some\"", "expected one of"),
            ("pod_annotations = [\"kernel\"]", "kernel"),
            (
                "file_systems = [\"pxfs\", \"proc\"]",
                "file_systems: \"proc\" is a file system of the node's kernel",
            ),
            ("file_systems = [\"/proc\"]", "no file system's name"),
            ("= =", "configuration /etc/brig/config.toml"),
        ] {
            let error = applied(text).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument, "{text}");
            assert!(error.message.contains(expected), "{text}: {error}");
            assert!(!error.message.contains('\n'), "{text}");
        }
    }

    #[test]
    fn a_list_of_devices_is_read_and_bounded() {
        let config = applied("devices = [\"3b:00.0\", \"10de:2330\", \"10de:2330\"]").unwrap();
        let shown: Vec<_> = config.devices.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["0000:3b:00.0", "10de:2330", "10de:2330"]);
        assert!(applied("devices = []").unwrap().devices.is_empty());
        let error = applied("devices = [\"gpu0\"]").unwrap_err().message;
        assert!(
            error.contains("devices: \"gpu0\" names no PCI device"),
            "{error}"
        );
        let many = format!("devices = [{}]", "\"10de:2330\", ".repeat(17));
        let error = applied(&many).unwrap_err().message;
        assert!(
            error.contains("17 were named") && error.contains("at most 16"),
            "{error}"
        );
    }

    #[test]
    fn drop_ins_apply_in_the_order_of_their_names_over_the_handlers_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("gpu.toml");
        fs::write(&main, "vcpus = 2\nmemory = 128").unwrap();
        let drop_dir = dir.path().join("gpu.d");
        fs::create_dir(&drop_dir).unwrap();
        fs::write(drop_dir.join("20.toml"), "vcpus = 4").unwrap();
        fs::write(drop_dir.join("10.toml"), "vcpus = 3\ntime_scale = 5.0").unwrap();
        fs::write(drop_dir.join("30.bak"), "vcpus = 9").unwrap();
        // An editor's, which leads nowhere.
        symlink("root@node.1234", drop_dir.join(".#20.toml")).unwrap();
        let config = Config::load(Some(&main)).unwrap();
        assert_eq!((config.vcpus, config.memory), (4, 128 * MIB));
        assert_eq!(config.timeout(2), Duration::from_secs(10));
    }

    #[test]
    fn keys_have_to_fit_together_when_all_files_have_been_read() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("gpu.toml");
        let drop_dir = dir.path().join("gpu.d");
        fs::create_dir(&drop_dir).unwrap();
        fs::write(&main, "vcpus = 2").unwrap();
        // Less than the default of the other.
        fs::write(drop_dir.join("10.toml"), "max_memory = \"128MiB\"").unwrap();
        fs::write(drop_dir.join("20.toml"), "memory = \"128MiB\"").unwrap();
        fs::write(drop_dir.join("30.toml"), "vcpus = 3").unwrap();
        let config = Config::load(Some(&main)).unwrap();
        assert_eq!((config.memory, config.max_memory), (128 * MIB, 128 * MIB));
        fs::write(drop_dir.join("20.toml"), "memory = \"129MiB\"").unwrap();
        let error = Config::load(Some(&main)).unwrap_err().message;
        assert!(
            error.contains("20.toml: max_memory is 128 MiB, less than memory, 129 MiB"),
            "{error}"
        );
    }

    #[test]
    fn each_key_is_known_by_the_file_the_documentation_and_the_schema() {
        let defaults = Config::defaults(Path::new("/opt/brig/bin"));
        let documented = keys::documented(&defaults);
        // Every line of the documented file can be switched on, and is then the default.
        let all: String = documented
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(set) if !set.starts_with(' ') => format!("{set}\n"),
                _ => String::new(),
            })
            .collect();
        let mut config = defaults.clone();
        config.apply(Path::new("all.toml"), &all).unwrap();
        assert_eq!(config.origins.len(), keys::KEYS.len());
        config.origins.clear();
        assert_eq!(config, defaults);
        assert_eq!(keys_of(&all).len(), keys::KEYS.len(), "{all}");
        let error = toml::from_str::<File>("no_such_key = 1").unwrap_err();
        let fields = error.to_string().matches('`').count() / 2 - 1;
        assert_eq!(fields, keys::KEYS.len(), "{error}");
        let schema = keys::schema(&defaults);
        assert_eq!(schema["properties"].as_object().unwrap().len(), fields);
        assert_eq!(schema["properties"]["memory"]["default"], "256MiB");
    }

    #[test]
    fn the_origin_of_a_value_is_the_last_file_that_sets_it() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("h.toml");
        fs::write(&main, "vcpus = 2\nmemory = 128").unwrap();
        fs::create_dir(dir.path().join("h.d")).unwrap();
        let drop_in = dir.path().join("h.d/a.toml");
        fs::write(&drop_in, "vcpus = 4").unwrap();
        let origins = Config::load(Some(&main)).unwrap().origins;
        assert_eq!(origins.get("vcpus"), Some(&Origin::File(drop_in)));
        assert_eq!(origins.get("memory"), Some(&Origin::File(main)));
        assert_eq!(origins.get("kernel"), None);
    }

    #[test]
    fn a_handler_that_names_a_missing_file_is_told_so() {
        let error = Config::load(Some(Path::new("/nonexistent/brig.toml"))).unwrap_err();
        assert!(error.message.contains("/nonexistent/brig.toml"), "{error}");
    }
}
