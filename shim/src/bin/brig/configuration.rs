//! `brig config`: the configuration as the operator meets it.

use std::path::Path;

use brig_shim::asked::config::keys::{self, KEYS};
use brig_shim::asked::config::{Config, DEFAULT_PATH};
use brig_shim::error::{Error, Result};
use serde_json::Value;

/// The prefix that the documentation shows.
const PREFIX: &str = "/opt/brig/bin";

/// Whether the configuration can be used; says which it is.
///
/// # Errors
/// As of [`usable`].
pub fn check(file: Option<&Path>) -> Result<String> {
    usable(file).map(|_| name(file))
}

/// The configuration, with which pods can start.
///
/// # Errors
/// `InvalidArgument` that names the file and the key, or a file it names that is not there.
pub fn usable(file: Option<&Path>) -> Result<Config> {
    let config = Config::load(file)?;
    for (key, path) in [
        ("kernel", &config.kernel),
        ("initramfs", &config.initramfs),
        ("vmm", &config.vmm),
    ] {
        if !path.is_file() {
            return Err(Error::not_found(format!(
                "{key}: {} is not there; install Brig or name another file",
                path.display()
            )));
        }
    }
    Ok(config)
}

/// Every key, its value in force, and where that is from.
///
/// # Errors
/// As of [`check`], but for files that are missing.
pub fn show(file: Option<&Path>, as_json: bool) -> Result<String> {
    let shown = keys::in_force(&Config::load(file)?);
    if as_json {
        return Ok(format!("{shown}\n"));
    }
    Ok(lines(&shown))
}

/// A line for each key of what [`keys::in_force`] tells.
#[must_use]
pub fn lines(in_force: &Value) -> String {
    let line = |key: &keys::KeyDoc| {
        let shown = &in_force[key.name];
        let from = shown["from"].as_str().unwrap_or("unknown");
        format!(
            "{:<16} = {:<40} # {from}\n",
            key.name,
            shown["value"].to_string()
        )
    };
    KEYS.iter().map(line).collect()
}

/// A documented file with the defaults of this installation; as JSON its keys with their values.
#[must_use]
pub fn default(as_json: bool) -> String {
    let defaults = Config::installed();
    if !as_json {
        return keys::documented(&defaults);
    }
    let keys = KEYS.iter();
    let keys = keys.map(|key| (key.name.to_owned(), key.value(&defaults)));
    format!("{}\n", Value::from(keys.collect::<serde_json::Map<_, _>>()))
}

/// The schema with the defaults of this installation.
#[must_use]
pub fn schema() -> String {
    format!("{:#}\n", keys::schema(&Config::installed()))
}

/// The reference for docs/configuration.md, with the defaults of the ordinary prefix.
#[must_use]
pub fn reference() -> String {
    let defaults = Config::defaults(Path::new(PREFIX));
    let mut text = String::from("| key | default | what it is | value |\n|---|---|---|---|\n");
    for key in KEYS {
        let (name, what, form) = (key.name, key.what, key.form());
        let default = key.value(&defaults);
        text.push_str(&format!("| `{name}` | `{default}` | {what} | {form} |\n"));
    }
    text
}

fn name(file: Option<&Path>) -> String {
    let file = file.unwrap_or(Path::new(DEFAULT_PATH));
    if file.exists() {
        format!("the configuration {}", file.display())
    } else {
        "the default configuration".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_in_the_documentation_is_that_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap();
        let reference = reference();
        assert!(
            page.contains(&reference),
            "docs/configuration.md should hold what `brig config reference` prints:\n{reference}"
        );
    }

    #[test]
    fn the_defaults_as_json_make_a_configuration() {
        let defaults: Value = serde_json::from_str(&default(true)).unwrap();
        assert_eq!(defaults.as_object().unwrap().len(), KEYS.len());
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("handler.toml");
        std::fs::write(&main, toml::to_string(&defaults).unwrap()).unwrap();
        let shown: Value = serde_json::from_str(&show(Some(&main), true).unwrap()).unwrap();
        for (key, value) in defaults.as_object().unwrap() {
            assert_eq!(&shown[key]["value"], value, "{key}");
        }
    }

    #[test]
    fn what_is_shown_names_the_file_of_each_value() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("handler.toml");
        std::fs::write(&main, "memory = \"1GiB\"\nshutdown_grace = \"500ms\"").unwrap();
        let shown: Value = serde_json::from_str(&show(Some(&main), true).unwrap()).unwrap();
        assert_eq!(shown["memory"]["value"], "1GiB");
        assert_eq!(shown["memory"]["from"], main.display().to_string());
        assert_eq!(shown["shutdown_grace"]["value"], "500ms");
        assert_eq!(shown["vcpus"]["from"], "default");
        let text = show(Some(&main), false).unwrap();
        assert_eq!(text.lines().count(), KEYS.len());
    }

    #[test]
    fn a_configuration_that_names_what_is_not_there_is_not_right() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("handler.toml");
        std::fs::write(&main, "kernel = \"/nonexistent/vmlinux\"").unwrap();
        let error = check(Some(&main)).unwrap_err();
        assert!(error.message.contains("/nonexistent/vmlinux"), "{error}");
        std::fs::write(&main, "kernal = 1").unwrap();
        let error = check(Some(&main)).unwrap_err();
        assert!(error.message.contains("did you mean \"kernel\""), "{error}");
    }
}
