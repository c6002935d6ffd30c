//! Which modules a driver bundle wants loaded, and with what parameters: modules-load.d(5) and the `options` of modprobe.d(5).
use std::{
    collections::{BTreeSet, HashMap},
    ffi::CString,
    fs,
    path::Path,
};

/// The modules that are loaded after a device's driver, in the order of the files' names and of their lines.
pub fn modules(root: &Path) -> Vec<String> {
    lines(&root.join("etc/modules-load.d"))
        .into_iter()
        .filter(|line| !line.starts_with(';'))
        .collect()
}

/// Parameters by the module's name, as the kernel takes them.
pub fn parameters(root: &Path) -> HashMap<String, CString> {
    let mut found: HashMap<String, String> = HashMap::new();
    for line in lines(&root.join("etc/modprobe.d")) {
        let mut words = line.split_whitespace();
        let (Some("options"), Some(module)) = (words.next(), words.next()) else {
            continue;
        };
        let parameters = found.entry(module.replace('-', "_")).or_default();
        for word in words {
            if !parameters.is_empty() {
                parameters.push(' ');
            }
            parameters.push_str(word);
        }
    }
    found
        .into_iter()
        // Lines of text have no NUL in the kernel's eyes either.
        .filter_map(|(module, parameters)| Some((module, CString::new(parameters).ok()?)))
        .collect()
}

/// Those of a directory's `.conf` files that say something.
fn lines(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let files: BTreeSet<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "conf"))
        .collect();
    let mut all = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap_or_default();
        let said = text.lines().map(str::trim);
        all.extend(
            said.filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_in_the_order_of_the_files_with_the_parameters_of_all_of_them() {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("etc/modules-load.d/20-b.conf", "second\n; no\n"),
            (
                "etc/modules-load.d/10-a.conf",
                "# no\n\n first \nfirst-and-half\n",
            ),
            ("etc/modules-load.d/readme", "never\n"),
            (
                "etc/modprobe.d/a.conf",
                "options gpu-core a=1  b=2\nblacklist other\noptions\n",
            ),
            ("etc/modprobe.d/b.conf", "options gpu_core c=3\n"),
        ] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        assert_eq!(modules(root.path()), ["first", "first-and-half", "second"]);
        let parameters = parameters(root.path());
        assert_eq!(parameters.len(), 1);
        assert_eq!(parameters["gpu_core"].as_c_str(), c"a=1 b=2 c=3");
        assert!(modules(&root.path().join("none")).is_empty());
    }
}
