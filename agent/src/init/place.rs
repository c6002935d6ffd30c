//! Where a path of a container leads: walked name by name inside the root, with links that dangle.
//!
//! As the runtimes that users know do it, what is missing counts as a directory that could be made: so a link
//! of the image to nothing still names a place. The image, and other containers that change a volume
//! meanwhile, are hostile: the walk goes down from the root by one plain name at a time and up only along
//! its own steps, so that it cannot leave the root whatever they do.
use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
};

use rustix::{
    fs::{FileType, Mode, OFlags, fstat, openat, readlinkat},
    io::Errno,
};

use super::failure::{Context as _, Failure, error_text};

/// More links than this are a circle, as with other runtimes (the kernel's own limit is 40).
const MAX_LINKS: usize = 255;
/// Longest part of a message that a hostile image chooses, characters.
const MAX_SHOWN: usize = 200;

/// What becomes of a link at the end of the path.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// It is followed, as those on the way are.
    Followed,
    /// It is what the path names.
    Itself,
}

/// A link that was followed.
#[derive(Clone, Debug)]
pub struct Link {
    at: OsString,
    target: OsString,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", shown(&self.at), shown(&self.target))
    }
}

/// Where a path leads.
#[derive(Debug)]
pub struct Place {
    /// The last thing on the way that is there: the place itself when nothing is missing.
    pub found: OwnedFd,
    /// What is missing below it; empty when the place is there.
    pub missing: Vec<OsString>,
    /// The path without links.
    pub path: OsString,
    /// The link that was followed last.
    pub link: Option<Link>,
    /// That link leads to nothing.
    pub dangling: bool,
}

impl Place {
    /// What the place is, if it is there.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn kind(&self) -> rustix::io::Result<Option<FileType>> {
        if !self.missing.is_empty() {
            return Ok(None);
        }
        let mode = fstat(&self.found)?.st_mode;
        Ok(Some(FileType::from_raw_mode(mode)))
    }

    /// For a sentence about the path: the link that leads elsewhere, and where to.
    pub fn why(&self) -> String {
        match &self.link {
            Some(link) => format!(" (the image's link {link} leads to {})", shown(&self.path)),
            None => String::new(),
        }
    }
}

/// Text of an image for a sentence: bounded, and without control characters.
pub fn shown(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    let mut short: String = text.chars().take(MAX_SHOWN).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short.escape_debug().to_string()
}

/// A name that is still to be walked.
struct Name {
    name: OsString,
    /// It comes from a link's target and not from the path.
    of_link: bool,
}

fn names(path: &OsStr, of_link: bool) -> impl DoubleEndedIterator<Item = Name> {
    path.as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(move |name| Name {
            name: OsStr::from_bytes(name).to_owned(),
            of_link,
        })
}

/// One walk.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    /// What was found, from the root down.
    steps: Vec<(OsString, OwnedFd)>,
    missing: Vec<OsString>,
    links: usize,
    link: Option<Link>,
    dangling: bool,
}

impl Walk<'_> {
    fn here(&self) -> BorrowedFd<'_> {
        self.steps.last().map_or(self.root, |(_, fd)| fd.as_fd())
    }

    fn path(&self) -> OsString {
        let mut path = Vec::new();
        let found = self.steps.iter().map(|(name, _)| name);
        for name in found.chain(&self.missing) {
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
        }
        if path.is_empty() {
            path.push(b'/');
        }
        OsString::from_vec(path)
    }

    fn up(&mut self) {
        if self.missing.pop().is_none() {
            self.steps.pop();
        }
    }

    /// The names that a link at `name` adds to the way.
    fn follow(&mut self, name: &OsStr, fd: &OwnedFd) -> rustix::io::Result<OsString> {
        let target = readlinkat(fd, "", Vec::new())?;
        let target = OsString::from_vec(target.into_bytes());
        let mut at = self.path().into_vec();
        if at != b"/" {
            at.push(b'/');
        }
        at.extend_from_slice(name.as_bytes());
        self.links += 1;
        self.link = Some(Link {
            at: OsString::from_vec(at),
            target: target.clone(),
        });
        if target.as_bytes().starts_with(b"/") {
            self.steps.clear();
        }
        Ok(target)
    }
}

/// Walks `path` below `root`.
///
/// # Errors
/// A sentence that names the link or file of the image that is in the way.
pub fn find(root: BorrowedFd<'_>, path: &str, last: Last) -> Result<Place, Failure> {
    let mut todo: VecDeque<Name> = names(OsStr::new(path), false).collect();
    let mut walk = Walk {
        root,
        steps: Vec::new(),
        missing: Vec::new(),
        links: 0,
        link: None,
        dangling: false,
    };
    while let Some(Name { name, of_link }) = todo.pop_front() {
        if name == ".." {
            walk.up();
            continue;
        }
        if !walk.missing.is_empty() {
            walk.missing.push(name);
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat(walk.here(), name.as_os_str(), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                walk.dangling = of_link;
                walk.missing.push(name);
                continue;
            }
            // What has names below it and is no directory is in the way itself.
            Err(error) => {
                if error != Errno::NOTDIR {
                    walk.missing.push(name);
                }
                return Err(in_the_way(path, &walk, error));
            }
        };
        let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let is_link = kind.map_err(|error| in_the_way(path, &walk, error))? == FileType::Symlink;
        if !is_link || last == Last::Itself && todo.is_empty() {
            walk.steps.push((name, fd));
            continue;
        }
        let target = walk
            .follow(&name, &fd)
            .map_err(|error| in_the_way(path, &walk, error))?;
        if walk.links > MAX_LINKS {
            return Err(in_the_way(path, &walk, Errno::LOOP));
        }
        for name in names(&target, true).rev() {
            todo.push_front(name);
        }
    }
    let resolved = walk.path();
    let found = match walk.steps.pop() {
        Some((_, fd)) => fd,
        None => rustix::io::fcntl_dupfd_cloexec(root, 0).during(path)?,
    };
    Ok(Place {
        path: resolved,
        found,
        dangling: walk.dangling && !walk.missing.is_empty(),
        missing: walk.missing,
        link: walk.link,
    })
}

fn in_the_way(path: &str, walk: &Walk<'_>, error: Errno) -> Failure {
    let reason = error_text(&error.into());
    let by = match &walk.link {
        Some(link) if error == Errno::LOOP => {
            return Failure(format!(
                "{path}: {reason}: the image's links go round in a circle at {link}"
            ));
        }
        Some(link) => format!(" (by the image's link {link})"),
        None => String::new(),
    };
    Failure(format!("{path}: {}{by}: {reason}", shown(&walk.path())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{
        fs::{self, File},
        os::unix::fs::symlink,
        path::{Path, PathBuf},
    };

    fn find_in(root: &Path, path: &str) -> Result<Place, Failure> {
        let root = File::open(root).unwrap();
        find(root.as_fd(), path, Last::Followed)
    }

    fn resolved(root: &Path, path: &str) -> (String, usize) {
        let place = find_in(root, path).unwrap();
        (place.path.into_string().unwrap(), place.missing.len())
    }

    #[test]
    fn a_link_to_nothing_names_a_place_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("etc")).unwrap();
        symlink("../run/systemd/stub", root.join("etc/resolv.conf")).unwrap();
        symlink("/nowhere/hosts", root.join("etc/hosts")).unwrap();
        symlink("../../../up", root.join("etc/out")).unwrap();
        symlink("etc", root.join("also")).unwrap();
        for (path, at, missing) in [
            ("/etc/resolv.conf", "/run/systemd/stub", 3),
            ("/etc/hosts", "/nowhere/hosts", 2),
            ("/etc/out/x", "/up/x", 2),
            ("/also/hosts", "/nowhere/hosts", 2),
            ("/also/./new/../other", "/etc/other", 1),
            ("/also/..", "/", 0),
            ("/../..", "/", 0),
            // Back from what is missing to what is there, and on through a link.
            ("/etc/hosts/../../also/x", "/etc/x", 1),
        ] {
            let wanted = (at.to_owned(), missing);
            assert_eq!(resolved(root, path), wanted, "{path}");
        }
        assert!(find_in(root, "/etc/hosts").unwrap().dangling);
        assert!(!find_in(root, "/also/new").unwrap().dangling);
        assert!(!find_in(root, "/also").unwrap().dangling);
    }

    #[test]
    fn the_link_or_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        symlink("b", root.join("a")).unwrap();
        symlink("/a", root.join("b")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        symlink("file", root.join("to-file")).unwrap();
        symlink("x\u{1b}[2J\n", root.join("odd")).unwrap();
        let text = |path: &str| find_in(root, path).unwrap_err().to_string();
        let circle = text("/a/below");
        assert!(circle.contains("circle at /"), "{circle}");
        assert!(circle.contains("too many levels"), "{circle}");
        assert_eq!(text("/file/x"), "/file/x: /file: not a directory");
        assert_eq!(
            text("/to-file/x"),
            "/to-file/x: /file (by the image's link /to-file -> file): not a directory"
        );
        let why = find_in(root, "/odd").unwrap().why();
        assert!(!why.contains(['\n', '\u{1b}']), "{why}");
    }

    #[test]
    fn a_link_at_the_end_can_be_the_place_itself() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("proc")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let place = find(root.as_fd(), "/proc/", Last::Itself).unwrap();
        assert_eq!(place.kind(), Ok(Some(FileType::Symlink)));
        let place = find(root.as_fd(), "/proc/x", Last::Itself).unwrap();
        assert_eq!(place.path, "/real/x");
    }

    /// What an image may have at one of a few names, so that they meet.
    #[derive(Clone, Debug)]
    enum Thing {
        Directory,
        File,
        Link(String),
    }

    fn path_of_few_names() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            4 => "[abc]",
            2 => Just("..".to_owned()),
            1 => Just(".".to_owned()),
        ];
        (any::<bool>(), prop::collection::vec(name, 1..6)).prop_map(|(absolute, names)| {
            let start = if absolute { "/" } else { "" };
            format!("{start}{}", names.join("/"))
        })
    }

    fn thing() -> impl Strategy<Value = Thing> {
        prop_oneof![
            2 => Just(Thing::Directory),
            1 => Just(Thing::File),
            3 => path_of_few_names().prop_map(Thing::Link),
        ]
    }

    /// Makes the things where their paths, taken by names alone, still lead to directories.
    fn image(root: &Path, things: &[(String, Thing)]) {
        for (path, thing) in things {
            let mut at = PathBuf::from(root);
            let plain = path.split('/').filter(|name| !name.contains('.'));
            at.extend(plain.filter(|name| !name.is_empty()));
            let fits = at
                .parent()
                .is_some_and(|parent| parent.is_dir() && parent.starts_with(root));
            let real = fits
                && fs::canonicalize(at.parent().unwrap())
                    .unwrap()
                    .starts_with(root);
            if !real {
                continue;
            }
            let _ = match thing {
                Thing::Directory => fs::create_dir(&at),
                Thing::File => fs::write(&at, ""),
                Thing::Link(target) => symlink(target, &at),
            };
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn the_walk_agrees_with_the_kernel_and_never_leaves_the_root(
            things in prop::collection::vec((path_of_few_names(), thing()), 0..12),
            path in path_of_few_names(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            // What a walk that left the root would find: the same names, one level up.
            for name in ["a", "b", "c"] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            let root = fs::canonicalize(dir.path()).unwrap().join("root");
            fs::create_dir(&root).unwrap();
            image(&root, &things);
            let root_fd = File::open(&root).unwrap();
            let kernel = rustix::fs::openat2(
                &root_fd,
                path.trim_end_matches('/'),
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                rustix::fs::ResolveFlags::IN_ROOT,
            );
            let ours = find(root_fd.as_fd(), &path, Last::Followed);
            if let Ok(place) = &ours {
                // The place that is there lies in the root, and under the name that is told.
                let at = fs::read_link(format!("/proc/self/fd/{}", {
                    use std::os::fd::AsRawFd as _;
                    place.found.as_raw_fd()
                })).unwrap();
                prop_assert!(at.starts_with(&root), "{at:?}");
                let mut told = PathBuf::from(&place.path);
                for _ in &place.missing {
                    told.pop();
                }
                let told = root.join(told.strip_prefix("/").unwrap());
                prop_assert_eq!(&at, &told);
                prop_assert!(place.missing.iter().all(|name| name != ".." && name != "."));
            }
            match (kernel, ours) {
                (Ok(kernel), Ok(place)) => {
                    prop_assert!(place.missing.is_empty());
                    let (theirs, ours) = (fstat(&kernel).unwrap(), fstat(&place.found).unwrap());
                    prop_assert_eq!((theirs.st_dev, theirs.st_ino), (ours.st_dev, ours.st_ino));
                }
                (Ok(_), Err(failure)) => prop_assert!(false, "{}", failure),
                // What is missing for the kernel may be a place for us, and it follows fewer links.
                (Err(_), _) => {}
            }
        }
    }
}
