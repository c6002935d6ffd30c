//! How a template is made, and by whom: a process that lives for that alone, in a cgroup of its own, so that the memory of the template is no
//! pod's. The first pod of a kind has it started when its own guest is ready; a second one finds the lock taken.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use slog::{Logger, info, warn};

use super::{Machine, Templates};
use crate::node::cgroup::Cgroup;

/// The cgroup of those who make templates.
pub const CGROUP: &str = "/brig-templates";
/// How long it may take to remove it.
const REMOVAL: Duration = Duration::from_secs(2);
/// The longest reason that is kept, in characters.
const MAX_REASON: usize = 512;

/// What a template is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Its kind, which must still be that of the files when it is made.
    pub key: String,
    /// The guest's vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// brig-vmm.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// Of the guest.
    pub machine: Machine,
    /// On a KVM that emulates, too.
    pub allow_slow_kvm: bool,
    /// Descriptors that the VMM may have.
    pub max_files: u64,
    /// What the boot may take in milliseconds.
    pub boot_ms: u64,
    /// Where the pods of this node have their state.
    pub state_dir: PathBuf,
}

impl Recipe {
    /// Whether it was for the same machine and files of the same names, which are others now.
    #[must_use]
    pub fn is_older_than(&self, now: &Self) -> bool {
        let files = |recipe: &Self| {
            (
                recipe.machine,
                recipe.kernel.clone(),
                recipe.initramfs.clone(),
                recipe.vmm.clone(),
            )
        };
        files(self) == files(now) && self.key != now.key
    }

    /// Has the template made by a process of this program, unless somebody is at it, and waits for that. Blocks. What goes wrong is logged, and
    /// not tried again.
    pub fn have_made(&self, logger: &Logger) {
        match self.make_by_other() {
            Ok(true) => info!(logger, "a template was made"; "template" => &self.key),
            Ok(false) => {}
            Err(Failure { reason, is_final }) => {
                warn!(logger, "no template was made, pods go on booting"; "template" => &self.key,
                    "reason" => &reason);
                if is_final {
                    let _ = Templates::beside(&self.state_dir).refuse(&self.key, &reason);
                }
            }
        }
    }

    fn make_by_other(&self) -> Result<bool, Failure> {
        let templates = Templates::beside(&self.state_dir);
        let said = |error: std::io::Error| Failure {
            reason: error.to_string(),
            is_final: false,
        };
        let Some(lock) = templates.lock().map_err(said)? else {
            return Ok(false);
        };
        if !templates.lacks(&self.key) {
            return Ok(false);
        }
        let recipe = serde_json::to_string(self).map_err(std::io::Error::other);
        let recipe = recipe.map_err(said)?;
        let made = Command::new("/proc/self/exe")
            .args(["build-template", &recipe])
            // It has the lock for as long as it lives, whatever becomes of this process.
            .stdin(Stdio::from(lock))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .current_dir(Path::new("/"))
            .process_group(0)
            .output();
        let made = made.map_err(said)?;
        remove_cgroup();
        if made.status.success() {
            return Ok(true);
        }
        let said = String::from_utf8_lossy(&made.stderr);
        let mut reason: String = said.trim().chars().take(MAX_REASON).collect();
        if reason.is_empty() {
            reason = format!("its process ended with {}", made.status);
        }
        Err(Failure {
            reason,
            // One that was killed may have been in the way for the moment.
            is_final: made.status.code().is_some(),
        })
    }
}

/// Why there is no template.
struct Failure {
    reason: String,
    /// It would fail again.
    is_final: bool,
}

/// What a process that was killed has left.
fn remove_cgroup() {
    if let Ok(cgroup) = Cgroup::create(CGROUP) {
        let _ = cgroup.kill_and_remove(REMOVAL);
    }
}
