//! Where results go. It is made and tried before the work begins, so that hours of it are not lost at their end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// A directory in which files can be made.
pub struct Place(PathBuf);

impl Place {
    /// Makes the directory unless it is there, and tries it with a file.
    ///
    /// # Errors
    /// If it cannot be made, is no directory, or takes no file; the sentence names it.
    pub fn prepare(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| {
            format!(
                "cannot make the directory of results {}",
                directory.display()
            )
        })?;
        let trial = directory.join(format!(".trial-{}", std::process::id()));
        fs::write(&trial, b"x")
            .and_then(|()| fs::remove_file(&trial))
            .with_context(|| format!("results cannot be written to {}", directory.display()))?;
        Ok(Self(directory.to_owned()))
    }

    /// A file's path there.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a report; a file of that name is replaced as a whole.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, name: &str, report: &Value) -> Result<()> {
        let (file, new) = (self.file(name), self.file(&format!(".{name}.new")));
        fs::write(&new, serde_json::to_vec_pretty(report)?)
            .and_then(|()| fs::rename(&new, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_directory_that_is_not_there_is_made_and_nothing_else_left_in_it() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::prepare(&root.path().join("a/b")).unwrap();
        place.write("bench.json", &json!({"rounds": 1})).unwrap();
        place.write("bench.json", &json!({"rounds": 2})).unwrap();
        let names: Vec<_> = fs::read_dir(root.path().join("a/b"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["bench.json"]);
        let text = fs::read(place.file("bench.json")).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&text).unwrap(),
            json!({"rounds": 2})
        );
    }

    #[test]
    fn a_place_where_nothing_can_be_written_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        // procfs takes no file, not even root's.
        for directory in [file.as_path(), &file.join("below"), Path::new("/proc")] {
            let error = Place::prepare(directory).err().unwrap();
            let text = format!("{error:#}");
            assert!(text.contains(directory.to_str().unwrap()), "{text}");
        }
    }
}
