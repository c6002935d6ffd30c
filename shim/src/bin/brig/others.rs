//! The installations of Brig on this node, of which there may be several: from source, of the package, in another prefix.
//!
//! They share what names none of them: handlers in containerd's configuration, `/etc/brig`, and what is kept in `/run`. That
//! goes with the last one. An installation is one whose shim containerd would find, or whose shim runs. Trusts the node's
//! files and processes, which are root's.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use brig_shim::node::daemon::Daemon;

use crate::installed;

/// What makes an installation one to containerd.
const SHIM: &str = "containerd-shim-brig-v2";
/// Where services of a node look for programs, and so a containerd that does not run yet.
const USUAL: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];

/// The directories of all installations, those that containerd finds first.
#[must_use]
pub fn all() -> Vec<PathBuf> {
    let usual = USUAL.map(PathBuf::from);
    found(Path::new("/proc"), &usual)
}

/// Those that this program is not of.
#[must_use]
pub fn others() -> Vec<PathBuf> {
    let program = std::env::current_exe().and_then(fs::canonicalize);
    beside(&program.unwrap_or_default(), all())
}

fn beside(program: &Path, mut all: Vec<PathBuf>) -> Vec<PathBuf> {
    let own = installed::place(program);
    all.retain(|place| !place.starts_with(&own));
    all
}

fn found(proc: &Path, usual: &[PathBuf]) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for containerd in Daemon::named(proc, "containerd") {
        let path = containerd.variable("PATH").unwrap_or_default();
        dirs.extend(std::env::split_paths(&path).filter(|dir| dir.is_absolute()));
        let program = containerd.program();
        dirs.extend(
            program
                .as_deref()
                .and_then(Path::parent)
                .map(Path::to_owned),
        );
    }
    dirs.extend_from_slice(usual);
    let shims = dirs.iter().map(|dir| fs::canonicalize(dir.join(SHIM)));
    let mut places: Vec<PathBuf> = Vec::new();
    for shim in shims.flatten().chain(running(proc)) {
        let place = installed::place(&shim);
        // A version that runs and is removed is no installation of its own.
        if !places.iter().any(|known| place.starts_with(known)) {
            places.push(place);
        }
    }
    places
}

/// The programs of the shims that run, also where these have been replaced.
fn running(proc: &Path) -> BTreeSet<PathBuf> {
    let processes = fs::read_dir(proc).into_iter().flatten().flatten();
    let programs = processes.filter_map(|process| {
        let program = fs::read_link(process.path().join("exe")).ok()?;
        let name = program.as_os_str().as_bytes();
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        Some(PathBuf::from(OsStr::from_bytes(name)))
    });
    programs.filter(|program| program.ends_with(SHIM)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Node(tempfile::TempDir);

    impl Node {
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// A version of an installation, with a link to its shim.
        fn install(&self, prefix: &str, version: &str, links: &str) {
            let dir = self.path(prefix).join(version);
            fs::create_dir_all(dir.join("bin")).unwrap();
            fs::write(dir.join("bin").join(SHIM), "").unwrap();
            installed::mark(&dir);
            fs::create_dir_all(self.path(links)).unwrap();
            let link = self.path(links).join(SHIM);
            let _ = fs::remove_file(&link);
            symlink(dir.join("bin").join(SHIM), link).unwrap();
        }

        fn process(&self, pid: &str, program: &str) -> PathBuf {
            let place = self.path("proc").join(pid);
            fs::create_dir_all(&place).unwrap();
            symlink(self.path(program), place.join("exe")).unwrap();
            place
        }

        fn found(&self) -> Vec<PathBuf> {
            found(&self.path("proc"), &[self.path("local"), self.path("usr")])
        }
    }

    #[test]
    fn what_containerd_finds_or_what_runs_is_an_installation() {
        let node = Node(tempfile::tempdir().unwrap());
        assert_eq!(node.found(), Vec::<PathBuf>::new());
        node.install("opt/brig", "1-a", "local");
        node.install("opt/brig", "2-b", "local");
        assert_eq!(node.found(), [node.path("opt/brig")]);
        // A link that leads nowhere is what one has left.
        symlink("/nonexistent", node.path("usr")).unwrap();
        assert_eq!(node.found().len(), 1);
        fs::remove_file(node.path("usr")).unwrap();
        node.install("srv/brig", "1-a", "usr");
        assert_eq!(node.found(), [node.path("opt/brig"), node.path("srv/brig")]);
        // One that only containerd's own PATH has.
        node.install("own", "1-a", "special");
        let containerd = node.process("7", "somewhere/containerd");
        fs::write(containerd.join("comm"), "containerd\n").unwrap();
        let path = format!("PATH={}\0", node.path("special").display());
        fs::write(containerd.join("environ"), path).unwrap();
        assert_eq!(node.found()[0], node.path("own"));
        // A removed version of one that is there, and one that only runs.
        node.process("8", "opt/brig/0-z/bin/containerd-shim-brig-v2 (deleted)");
        assert_eq!(node.found().len(), 3);
        node.process("9", "host/bin/containerd-shim-brig-v2");
        assert_eq!(node.found()[3], node.path("host/bin"));
    }

    #[test]
    fn the_others_are_those_that_a_program_is_not_of() {
        let node = Node(tempfile::tempdir().unwrap());
        node.install("opt/brig", "1-a", "local");
        node.install("srv/brig", "1-a", "usr");
        let program = node.path("opt/brig/1-a/bin/brig");
        assert_eq!(beside(&program, node.found()), [node.path("srv/brig")]);
        let packaged = Path::new("/usr/lib/brig/1/bin/brig");
        let all = vec![PathBuf::from("/usr/lib/brig"), node.path("opt/brig")];
        assert_eq!(beside(packaged, all), [node.path("opt/brig")]);
    }
}
