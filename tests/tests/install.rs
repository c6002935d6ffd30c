//! `./install` of stand-in files into directories that are thrown away: it has its own directory, and touches nothing in
//! another's. What it installs is shown to run by the suite's `install` cases.

// Helpers are no #[test] to clippy, and may fail a test in the same way.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const FILES: [&str; 8] = [
    "containerd-shim-brig-v2",
    "brig-vmm",
    "vmlinux",
    "vmlinux.debug",
    "vmlinux.debug-gdb.py",
    "modules.erofs",
    "modules.alias",
    "brig-initramfs.cpio",
];
/// What `./install` asks of `brig`.
const BRIG: &str = "#!/bin/sh\ncase $1 in\nversion) echo brig 1.0 ;;\nman) mkdir -p \"$2\" && echo >\"$2/brig.1\" ;;\n\
                    completion) echo complete ;;\nesac\n";

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let node = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        node.build("1");
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What there is to install.
    fn build(&self, contents: &str) {
        let from = self.path("from");
        fs::create_dir_all(&from).unwrap();
        for file in FILES {
            fs::write(from.join(file), contents).unwrap();
        }
        fs::write(from.join("brig"), BRIG).unwrap();
        fs::set_permissions(from.join("brig"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn file(&self, name: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "theirs").unwrap();
    }

    fn install(&self, prefix: &str) -> Output {
        self.run(&self.path("links"), Path::new(prefix))
    }

    fn run(&self, links: &Path, prefix: &Path) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../install");
        // Made by whom lets nobody read what is made.
        let mut command = Command::new("sh");
        command.args(["-c", "umask 077; exec \"$@\"", "sh"]);
        command.arg(script).arg("--from").arg(self.path("from"));
        command.arg("--links").arg(links).arg(prefix);
        command.output().unwrap()
    }

    fn installed(&self) -> PathBuf {
        let prefix = self.path("opt");
        let output = self.install(prefix.to_str().unwrap());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        prefix
    }

    /// Refused with these words, and all that was there still is.
    fn refused(&self, links: &Path, prefix: &Path, words: &str) {
        let before = names(self.dir.path());
        let output = self.run(links, prefix);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{}: {said}", prefix.display());
        assert!(said.contains(words), "{}: {said}", prefix.display());
        assert_eq!(names(self.dir.path()), before, "{}", prefix.display());
    }
}

/// All paths below a directory, with where links lead.
fn names(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let link = fs::read_link(&path).unwrap_or_default();
        names.push(format!("{} {}", path.display(), link.display()));
        if path.is_dir() && !path.is_symlink() {
            names.extend(self::names(&path));
        }
    }
    names.sort();
    names
}

/// The versions in a prefix.
fn versions(prefix: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(prefix).unwrap();
    let entries = entries.map(|entry| entry.unwrap().path());
    entries
        .filter(|path| !path.is_symlink() && path.join(".brig-version").exists())
        .collect()
}

#[test]
fn a_directory_of_others_is_refused_and_left_as_it_is() {
    let node = Node::new();
    let links = node.path("links");
    node.file("local/bin/theirs");
    node.file("local/share/theirs");
    let local = node.path("local");
    node.refused(&links, &local, "bin/theirs is there");
    // And where links go, or what holds that.
    node.refused(&local, &local, "where links to it go");
    node.refused(&local, node.dir.path(), "where links to it go");
    node.refused(&local, &local.join("bin"), "where links to it go");
    let doubled = format!("{}//", local.display());
    node.refused(&local, Path::new(&doubled), "where links to it go");
    symlink(&local, node.path("named")).unwrap();
    node.refused(&local, &node.path("named"), "where links to it go");
    for root in ["/", "//", "/.", "/usr/..", "relative"] {
        node.refused(
            &links,
            Path::new(root),
            "is not an absolute path other than /",
        );
    }
    node.refused(&links, &node.path("from/vmlinux"), "is no directory");
    // One that only looks like an installation.
    node.file("other/bin/containerd-shim-brig-v2");
    node.file("other/bin/theirs");
    node.refused(&links, &node.path("other"), "other/bin/theirs is there");
    symlink(node.path("other"), node.path("alias")).unwrap();
    node.refused(&links, &node.path("alias"), "bin/theirs is there");
    node.file("files/.1.0-01234567.new/theirs");
    symlink(node.path("files"), node.path("alias2")).unwrap();
    node.refused(&links, &node.path("files"), ".1.0-01234567.new is there");
    node.refused(&links, &node.path("alias2"), ".1.0-01234567.new is there");
    fs::create_dir(node.path("unreal")).unwrap();
    symlink("1.0-01234567", node.path("unreal/current")).unwrap();
    node.file("unreal/1.0-01234567/theirs");
    node.refused(&links, &node.path("unreal"), "unreal/1.0-01234567 is there");
}

#[test]
fn a_program_of_others_is_not_replaced_by_a_link() {
    let node = Node::new();
    node.file("links/bin/brig");
    let refused = node.install(node.path("opt").to_str().unwrap());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("is no link of Brig's"), "{said}");
    assert!(!node.path("opt").exists());
    let kept = fs::read_to_string(node.path("links/bin/brig")).unwrap();
    assert_eq!(kept, "theirs");
}

#[test]
fn versions_lie_side_by_side_and_what_others_keep_there_stays() {
    let node = Node::new();
    let prefix = node.installed();
    let before = names(node.dir.path());
    node.installed();
    assert_eq!(names(node.dir.path()), before, "the same version again");
    node.file("opt/notes/theirs");
    node.build("2");
    node.installed();
    assert_eq!(versions(&prefix).len(), 2);
    assert!(prefix.join("notes/theirs").exists());
    let current = fs::canonicalize(node.path("links/bin/containerd-shim-brig-v2")).unwrap();
    assert_eq!(fs::read_to_string(current).unwrap(), "2");
}

#[test]
fn what_was_installed_without_versions_goes_by_name() {
    let node = Node::new();
    for file in [
        "bin/containerd-shim-brig-v2",
        "bin/brig",
        "bin/brig-vmm",
        "share/brig/vmlinux",
        "share/man/man1/brig-list.1",
    ] {
        node.file(&format!("opt/{file}"));
    }
    let prefix = node.installed();
    assert!(prefix.join("bin").is_symlink() && prefix.join("share").is_symlink());
    assert_eq!(
        fs::read_to_string(prefix.join("bin/brig-vmm")).unwrap(),
        "1"
    );
}

#[test]
fn a_version_from_before_the_mark_gets_it() {
    let node = Node::new();
    let prefix = node.installed();
    fs::remove_file(versions(&prefix)[0].join(".brig-version")).unwrap();
    node.build("2");
    node.installed();
    assert_eq!(versions(&prefix).len(), 2);
}

#[test]
fn an_installation_that_did_not_end_leaves_nothing_to_the_next() {
    let node = Node::new();
    let prefix = node.path("opt");
    let dead = prefix.join(".0.9-01234567.new");
    node.file("opt/.0.9-01234567.new/bin/brig");
    fs::write(dead.join(".brig-version"), "0.9-01234567\n").unwrap();
    fs::create_dir(prefix.join(".0.8-01234567.new")).unwrap();
    node.installed();
    assert!(!dead.exists() && !prefix.join(".0.8-01234567.new").exists());
    // One that fails takes its own along.
    node.build("2");
    fs::remove_file(node.path("from/modules.alias")).unwrap();
    let before = names(&prefix);
    assert!(!node.install(prefix.to_str().unwrap()).status.success());
    assert_eq!(names(&prefix), before);
}

#[test]
fn everybody_may_read_what_root_installs() {
    let node = Node::new();
    let prefix = node.installed();
    // With the exporter's units, for those who want it.
    for unit in ["brig-metrics.socket", "brig-metrics.service"] {
        assert!(prefix.join("share/brig/systemd").join(unit).is_file());
    }
    let mut pending = vec![prefix, node.path("links")];
    while let Some(path) = pending.pop() {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        let wanted = if path.is_dir() { 0o755 } else { 0o444 };
        assert_eq!(mode & wanted, wanted, "{}", path.display());
        if path.is_dir() && !path.is_symlink() {
            pending.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
}
