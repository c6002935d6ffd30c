//! The hooks of a container that run on the node, as its `config.json` has them (runtime-spec, config.md,
//! "POSIX-platform Hooks").

use std::path::PathBuf;

use serde::Deserialize;

/// The hooks of a container, by stage.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// Before the container's process, the oldest of them.
    pub prestart: Vec<Hook>,
    /// When its namespaces exist.
    pub create_runtime: Vec<Hook>,
    /// After its process was started.
    pub poststart: Vec<Hook>,
    /// After it was deleted.
    pub poststop: Vec<Hook>,
}

/// One hook.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// The program, an absolute path.
    pub path: PathBuf,
    /// Its arguments, its name the first.
    pub args: Vec<String>,
    /// Its environment, whole.
    pub env: Vec<String>,
    /// How long it may take, in seconds.
    pub timeout: Option<u32>,
}
