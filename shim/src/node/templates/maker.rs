//! Who makes a template: a process that lives for that alone, in a cgroup of its own, so that the memory of the template is no
//! pod's. The first pod of a kind has it started when its own guest is ready; a second one finds the lock taken.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use slog::{Logger, info, warn};

use super::Templates;
use super::recipe::Recipe;
use crate::error::Result;
use crate::node::cgroup::Cgroup;
use crate::node::limits;

/// The cgroup of those who make templates.
const CGROUP: &str = "/brig-templates";
/// How long it may take to remove it.
const REMOVAL: Duration = Duration::from_secs(2);
/// The longest reason that is kept, in characters.
const MAX_REASON: usize = 512;

/// Has the template made by a process of this program, unless somebody is at it, and waits for that. Blocks. What goes wrong is logged; the
/// process remembers it, as a pod may be over before.
pub fn have_made(recipe: &Recipe, logger: &Logger) {
    match make_by_other(recipe) {
        Ok(true) => info!(logger, "a template was made"; "template" => &recipe.key),
        Ok(false) => {}
        Err(reason) => {
            warn!(logger, "no template was made, pods go on booting"; "template" => &recipe.key,
                "reason" => &reason);
        }
    }
}

/// The reason otherwise.
fn make_by_other(recipe: &Recipe) -> std::result::Result<bool, String> {
    let templates = Templates::beside(&recipe.state_dir);
    let said = |error: std::io::Error| error.to_string();
    let Some(lock) = templates.lock().map_err(said)? else {
        return Ok(false);
    };
    if !templates.lacks(&recipe.key) {
        return Ok(false);
    }
    let told = serde_json::to_string(recipe).map_err(std::io::Error::other);
    let told = told.map_err(said)?;
    // Until what it may have left is gone: the next one would be taken for that.
    let _held = lock.try_clone().map_err(said)?;
    let mut maker = Command::new("/proc/self/exe");
    maker
        .args(["build-template", &told])
        // It has the lock for as long as it lives, whatever becomes of this process.
        .stdin(Stdio::from(lock))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir(Path::new("/"))
        .process_group(0);
    limits::give_back_files(&mut maker);
    let made = maker.output().map_err(said)?;
    remove_cgroup();
    if made.status.success() {
        return Ok(true);
    }
    let said = String::from_utf8_lossy(&made.stderr);
    let mut reason: String = said.trim().chars().take(MAX_REASON).collect();
    if reason.is_empty() {
        reason = format!("its process ended with {}", made.status);
    }
    Err(reason)
}

/// An empty cgroup for who has the lock.
///
/// # Errors
/// What the host says.
pub fn own_cgroup() -> Result<Cgroup> {
    remove_cgroup();
    Cgroup::create(CGROUP)
}

/// Ends what makers that were killed have left, and removes their cgroup. To be called by who has the lock, or when nobody can have it.
pub fn remove_cgroup() {
    if let Ok(cgroup) = Cgroup::create(CGROUP) {
        let _ = cgroup.kill_and_remove(REMOVAL);
    }
}
