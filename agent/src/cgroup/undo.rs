//! What a change of limits has overwritten: one that is refused half-way leaves none of itself.
use std::{fs, path::Path};

use super::{cpuset, file::set};

/// What files of a cgroup had, in the order in which they were written.
#[derive(Debug, Default)]
pub struct Undo(Vec<(String, String)>);

impl Undo {
    /// Notes what is to be written to a file of the cgroup directory `path` to undo this `value`. One that cannot be read
    /// does something once, and has nothing to go back to.
    pub fn note(&mut self, path: &Path, file: &str, value: &str) {
        if file == "cpu.idle" {
            // It takes the weight with it.
            self.note(path, "cpu.weight", "");
        }
        let Ok(had) = fs::read_to_string(path.join(file)) else {
            return;
        };
        if let Some(back) = back(file, &had, value) {
            self.0.push((file.to_owned(), back));
        }
    }

    /// Writes all of it back, the last first. The answer names what does not take it, in sentences.
    pub fn all(self, path: &Path) -> Vec<String> {
        let back = self.0.into_iter().rev();
        let failed = back.filter_map(|(file, value)| {
            let written = match value.as_str() {
                "\n" if cpuset::has_list(&file) => cpuset::clear(path, &file),
                _ => set(&path.join(&file), &value),
            };
            let error = written.err()?;
            Some(format!("{file} = {value:?}: {error}"))
        });
        failed.collect()
    }
}

/// The write that brings back what a file `had` before `value` was written to it.
fn back(file: &str, had: &str, value: &str) -> Option<String> {
    let key = value.split_whitespace().next().unwrap_or_default();
    let line_of = |key: &str| had.lines().find(|line| line.split(' ').next() == Some(key));
    // A line for each device: only that of this one was written.
    if key.contains(':') || file == "rdma.max" {
        let unset = match file {
            "io.max" => "rbps=max wbps=max riops=max wiops=max",
            "rdma.max" => "hca_handle=max hca_object=max",
            "io.weight" | "io.bfq.weight" => "default",
            _ => return line_of(key).map(str::to_owned),
        };
        let line = line_of(key).map(str::to_owned);
        return Some(line.unwrap_or_else(|| format!("{key} {unset}")));
    }
    if let Some(default) = line_of("default") {
        return Some(default.to_owned());
    }
    Some(match had.trim_end() {
        // A list of nothing.
        "" => "\n".to_owned(),
        had => had.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_file_is_written_back_as_the_kernel_takes_it() {
        let io = "8:0 rbps=1024 wbps=max riops=max wiops=7\n";
        let none = "rbps=max wbps=max riops=max wiops=max";
        for (file, had, value, expected) in [
            ("memory.max", "max\n", "4096", "max"),
            ("cpu.max", "max 100000\n", "5 100000", "max 100000"),
            ("cpuset.cpus", "\n", "0-1", "\n"),
            ("io.max", io, "8:0 rbps=1", io.trim_end()),
            ("io.max", io, "8:16 rbps=1", &format!("8:16 {none}")),
            ("io.weight", "default 100\n8:0 7\n", "50", "default 100"),
            ("io.bfq.weight", "default 100\n8:0 7\n", "8:0 9", "8:0 7"),
            ("io.bfq.weight", "default 100\n", "8:0 9", "8:0 default"),
            (
                "rdma.max",
                "mlx hca_handle=2 hca_object=max\n",
                "mlx hca_handle=1 hca_object=1",
                "mlx hca_handle=2 hca_object=max",
            ),
        ] {
            assert_eq!(back(file, had, value).as_deref(), Some(expected), "{file}");
        }
        assert_eq!(back("io.latency", "", "8:0 target=5"), None);
    }
}
