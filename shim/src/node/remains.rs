//! What is kept of pods that failed, for `brig dump` after they are gone: the last few, in a directory of root's beside the
//! state directory, and how often each class of failure has been met since the node has booted. Beside it, because
//! nothing is left in the state directory when the last pod has gone.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

/// Comes after the state directory's name.
const SUFFIX: &str = ".ended";
/// The most pods that are remembered.
pub const KEPT: usize = 16;
/// The most bytes of one.
const MAX_BYTES: usize = 256 << 10;
const COUNTS: &str = "counts";

/// The directory.
#[derive(Debug, Clone)]
pub struct Remains {
    dir: PathBuf,
}

impl Remains {
    /// Of the pods that have their state below `base`.
    #[must_use]
    pub fn beside(base: &Path) -> Self {
        let mut dir = base.as_os_str().to_owned();
        dir.push(SUFFIX);
        Self { dir: dir.into() }
    }

    /// Keeps an account of a pod that failed with an error of the class `code`, drops the oldest ones, and counts.
    ///
    /// # Errors
    /// What the host says; `InvalidInput` for one that is too long.
    pub fn keep(&self, at: SystemTime, code: &str, account: &Value) -> io::Result<()> {
        let bytes = serde_json::to_vec(account)?;
        if bytes.len() > MAX_BYTES {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let _lock = self.lock()?;
        let nanos = at
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO)
            .as_nanos();
        // By their names they are in order of time.
        self.replace(&format!("{nanos:020}.json"), &bytes)?;
        let files = self.files();
        for old in &files[..files.len().saturating_sub(KEPT)] {
            fs::remove_file(old)?;
        }
        let mut counts = self.counts();
        *counts.entry(code.to_owned()).or_default() += 1;
        self.replace(COUNTS, &serde_json::to_vec(&counts)?)
    }

    /// The accounts, the newest first; one that is damaged is left out.
    #[must_use]
    pub fn all(&self) -> Vec<Value> {
        let files = self.files().into_iter().rev();
        files
            .filter_map(|file| serde_json::from_slice(&fs::read(file).ok()?).ok())
            .collect()
    }

    /// How many pods have failed, by class.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let bytes = fs::read(self.dir.join(COUNTS)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Forgets all.
    ///
    /// # Errors
    /// What the host says.
    pub fn remove(&self) -> io::Result<()> {
        crate::error::ignore_missing(fs::remove_dir_all(&self.dir))
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        let mut files: Vec<PathBuf> = paths
            .filter(|path| path.extension().is_some_and(|end| end == "json"))
            .collect();
        files.sort_unstable();
        files
    }

    /// One shim at a time.
    fn lock(&self) -> io::Result<File> {
        let dir = File::open(&self.dir)?;
        flock(&dir, FlockOperation::LockExclusive)?;
        Ok(dir)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.dir.join(format!("{name}.new"));
        fs::write(&new, bytes)?;
        fs::rename(&new, self.dir.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_last_failures_are_kept_and_all_are_counted() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        assert!(remains.all().is_empty() && remains.counts().is_empty());
        remains.remove().unwrap();
        let at = |n: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        for n in 0..20 {
            let code = if n < 15 { "unavailable" } else { "internal" };
            remains.keep(at(n), code, &json!({ "id": n })).unwrap();
        }
        let all = remains.all();
        assert_eq!(all.len(), KEPT);
        assert_eq!(
            (&all[0]["id"], &all[KEPT - 1]["id"]),
            (&json!(19), &json!(4))
        );
        assert_eq!(
            remains.counts(),
            BTreeMap::from([("internal".into(), 5), ("unavailable".into(), 15)])
        );
        let mode = fs::metadata(base.path().join("brig.ended"))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o700);
        let long = json!("x".repeat(MAX_BYTES));
        assert!(remains.keep(at(30), "internal", &long).is_err());
        remains.remove().unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_is_damaged_hides_no_other() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        remains
            .keep(SystemTime::UNIX_EPOCH, "internal", &json!(1))
            .unwrap();
        fs::write(base.path().join("brig.ended").join("9.json"), "{").unwrap();
        assert_eq!(remains.all(), [json!(1)]);
    }
}
