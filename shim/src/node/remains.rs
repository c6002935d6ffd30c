//! What is kept of pods after they are gone, in a directory of root's beside the state directory: accounts of the last few
//! that failed, for `brig dump`, and files of counts since the node has booted. Beside it, because nothing is left in the
//! state directory when the last pod has gone.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Comes after the state directory's name.
const SUFFIX: &str = ".ended";
/// The most pods that are remembered.
pub const KEPT: usize = 16;
/// The most bytes of one.
const MAX_BYTES: usize = 256 << 10;
/// The file of how many pods have failed, by class.
const FAILURES: &str = "counts";

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
        self.rewrite(FAILURES, |counts: &mut BTreeMap<String, u64>| {
            let count = counts.entry(code.to_owned()).or_default();
            *count = count.saturating_add(1);
        })
    }

    /// The accounts, the newest first; one that is damaged is left out.
    #[must_use]
    pub fn all(&self) -> Vec<Value> {
        let files = self.files().into_iter().rev();
        files
            .filter_map(|file| serde_json::from_slice(&fs::read(file).ok()?).ok())
            .collect()
    }

    /// How many pods have failed, by class; `None` as of [`Remains::counted`].
    #[must_use]
    pub fn failures(&self) -> Option<BTreeMap<String, u64>> {
        self.counted(FAILURES)
    }

    /// What a file of counts says: nothing has been counted where there is no such file. `None` for one that cannot be
    /// read or is not of this form (damaged, or of another version): nobody knows then.
    #[must_use]
    pub fn counted<T: Default + DeserializeOwned>(&self, name: &str) -> Option<T> {
        match fs::read(self.dir.join(name)) {
            Ok(bytes) => serde_json::from_slice(&bytes).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(T::default()),
            Err(_) => None,
        }
    }

    /// Adds to a file of counts. One that [`Remains::counted`] does not know begins anew at nothing, as a counter may.
    ///
    /// # Errors
    /// What the host says.
    pub fn count<T>(&self, name: &str, add: impl FnOnce(&mut T)) -> io::Result<()>
    where
        T: Default + DeserializeOwned + Serialize,
    {
        let _lock = self.lock()?;
        self.rewrite(name, add)
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

    /// One shim at a time. Makes the directory.
    fn lock(&self) -> io::Result<File> {
        let dir = match File::open(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&self.dir)?;
                File::open(&self.dir)?
            }
            opened => opened?,
        };
        flock(&dir, FlockOperation::LockExclusive)?;
        Ok(dir)
    }

    fn rewrite<T>(&self, name: &str, add: impl FnOnce(&mut T)) -> io::Result<()>
    where
        T: Default + DeserializeOwned + Serialize,
    {
        let mut counts = self.counted(name).unwrap_or_default();
        add(&mut counts);
        self.replace(name, &serde_json::to_vec(&counts)?)
    }

    /// As a whole or not at all: who reads holds no lock, and who writes may be killed.
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
        assert!(remains.all().is_empty() && remains.failures().unwrap().is_empty());
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
            remains.failures().unwrap(),
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

    #[test]
    fn counts_that_nobody_can_read_are_none_and_begin_anew() {
        let base = tempfile::tempdir().unwrap();
        let remains = Remains::beside(&base.path().join("brig"));
        let more = |count: &mut u64| *count += 1;
        assert_eq!(remains.counted::<u64>("some"), Some(0));
        remains.count("some", more).unwrap();
        remains.count("some", more).unwrap();
        assert_eq!(remains.counted::<u64>("some"), Some(2));
        let file = base.path().join("brig.ended").join("some");
        for bad in ["", "{", "-1", "[1]", "1 2"] {
            fs::write(&file, bad).unwrap();
            assert_eq!(remains.counted::<u64>("some"), None, "{bad}");
        }
        remains.count("some", more).unwrap();
        assert_eq!(remains.counted::<u64>("some"), Some(1));
        fs::write(
            base.path().join("brig.ended").join(FAILURES),
            "{\"killed\":",
        )
        .unwrap();
        assert_eq!(remains.failures(), None);
        assert!(remains.all().is_empty(), "counts are no accounts");
    }
}
