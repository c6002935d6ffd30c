//! The container's root: preparing it, resolving paths inside it, and entering it.
//!
//! An image is hostile: every path is resolved by openat2(RESOLVE_IN_ROOT) without magic links, or name by
//! name (`place`) where something of it is missing, so that no symlink in it leads outside.
use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fstat, mkdirat, openat,
        openat2, readlinkat,
    },
    io::Errno,
};

use super::{
    failure::{Context as _, Failure, Result},
    idmap::Ids,
    mapped, options,
    place::{self, Last, Place},
    root_mounts,
};
use crate::{
    control::Create,
    detached::{attach_at, clone_from_share, empty_directory},
    mount_attr,
};

/// How often a resolution is tried that renames of another container race with.
const RACES: usize = 16;

/// A directory that paths are resolved in.
pub struct Root {
    dir: OwnedFd,
    /// Who owns what is made in it: the container's root, in the guest's ids.
    owner: (u32, u32),
}

/// What to make where a path leads to nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// A directory.
    Directory,
    /// An empty file, to mount on.
    File,
}

impl Root {
    /// In the child's new mount namespace: attaches the root file system at the agent's place for it.
    /// `disks` are those that it is on, if it is.
    pub fn prepare(create: &Create, ids: &Ids, disks: Vec<Option<OwnedFd>>) -> Result<Self> {
        make_private()?;
        let tree = if create.root.is_empty() {
            clone_from_share(&create.share, &create.rootfs, true)
                .during(format_args!("{} in the share", create.rootfs))?
        } else {
            root_mounts::assemble(create, disks)?
        };
        Self::attach(&tree, &create.root_mount, ids.root()?)
    }

    /// In a new mount namespace: a root with nothing in it.
    pub fn empty() -> Result<Self> {
        make_private()?;
        // Any directory will do: it goes with everything else.
        Self::attach(
            &empty_directory().during("empty directory")?,
            Path::new("/proc"),
            (0, 0),
        )
    }

    fn attach(tree: &OwnedFd, at: &Path, owner: (u32, u32)) -> Result<Self> {
        attach_at(tree, at).during("root file system")?;
        let dir = openat(
            rustix::fs::CWD,
            at,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during("root file system")?;
        Ok(Self { dir, owner })
    }

    /// The root this process already lives in.
    pub fn current() -> Result<Self> {
        let dir = openat(
            rustix::fs::CWD,
            "/",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during("/")?;
        Ok(Self { dir, owner: (0, 0) })
    }

    /// Opens what `path` leads to.
    ///
    /// # Errors
    /// Those of openat2(2); `EAGAIN` when renames kept racing with the resolution of "..".
    pub fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let open = || {
            openat2(
                &self.dir,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            )
        };
        for _ in 1..RACES {
            match open() {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
        open()
    }

    /// Opens what `path` leads to (O_PATH); `None` if that is not there.
    pub fn existing(&self, path: &str) -> Result<Option<OwnedFd>> {
        match self.open(path, OFlags::PATH) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            // The kernel does not say which link it was.
            Err(_) => {
                let place = self.place(path, Last::Followed)?;
                Ok(place.missing.is_empty().then_some(place.found))
            }
        }
    }

    /// Where `path` leads, also if that is not there yet.
    pub fn place(&self, path: &str, last: Last) -> Result<Place> {
        place::find(self.dir.as_fd(), path, last)
    }

    /// Opens `path` for mounting on it (O_PATH), and makes what is missing of it. Refuses what is
    /// there and of the other kind.
    pub fn open_or_make(&self, path: &str, wanted: Missing) -> Result<OwnedFd> {
        // One call where everything is there, as it mostly is.
        if let Ok(fd) = self.open(path, OFlags::PATH) {
            let kind = FileType::from_raw_mode(fstat(&fd).during(path)?.st_mode);
            if (kind == FileType::Directory) == (wanted == Missing::Directory) {
                return Ok(fd);
            }
        }
        let place = self.place(path, Last::Followed)?;
        match (place.kind().during(path)?, wanted) {
            (None, _) => self.make_place(path, &place, wanted),
            (Some(FileType::Directory), Missing::File) => Err(Failure(format!(
                "{path}: is a directory, and a file is wanted there{}",
                place.why()
            ))),
            (Some(kind), Missing::Directory) if kind != FileType::Directory => {
                Err(Failure(format!(
                    "{path}: not a directory: it is a file, and a directory is wanted there{}",
                    place.why()
                )))
            }
            (Some(_), _) => Ok(place.found),
        }
    }

    /// Like [`Root::open_or_make`] for a directory that must be an ordinary one: a link of the image in its
    /// place is refused.
    pub fn open_real_dir(&self, path: &str) -> Result<OwnedFd> {
        let place = self.place(path, Last::Itself)?;
        let instead = match place.kind().during(path)? {
            None => return self.make_place(path, &place, Missing::Directory),
            Some(FileType::Directory) => return Ok(place.found),
            Some(FileType::Symlink) => {
                let target = readlinkat(&place.found, "", Vec::new()).during(path)?;
                format!(
                    "a symlink there (-> {})",
                    place::shown(OsStr::from_bytes(target.as_bytes()))
                )
            }
            Some(_) => "a file there".to_owned(),
        };
        Err(Failure(format!(
            "{path} must be mounted on an ordinary directory, and the image has {instead}{}",
            place.why()
        )))
    }

    /// The directory in which `place` is to be made, with what is missing on the way to it made, and the
    /// last name. `None` when the place is there.
    pub fn parent_of(&self, path: &str, place: &Place) -> Result<Option<(OwnedFd, OsString)>> {
        let Some((last, parents)) = place.missing.split_last() else {
            return Ok(None);
        };
        let mut here = place.found.try_clone().during(path)?;
        for name in parents {
            here = self
                .make_dir(&here, name)
                .during(format_args!("{path}{}", place.why()))?;
        }
        Ok(Some((here, last.clone())))
    }

    fn make_place(&self, path: &str, place: &Place, wanted: Missing) -> Result<OwnedFd> {
        let Some((parent, last)) = self.parent_of(path, place)? else {
            return Err(Failure(format!("{path}: is there already")));
        };
        let made = match wanted {
            Missing::Directory => self.make_dir(&parent, &last),
            Missing::File => self.make_file(&parent, &last),
        };
        made.during(format_args!("{path}{}", place.why()))
    }

    fn make_dir(&self, parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        match self.make(|| mkdirat(parent, name, Mode::from_raw_mode(0o755))) {
            Ok(()) => self.own(parent, name)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(parent, name, flags, Mode::empty())
    }

    fn make_file(&self, parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        match self.make(|| openat(parent, name, flags, mode)) {
            Ok(file) => self.own(parent, name).map(|()| file),
            // Another container was faster, on a volume of both.
            Err(Errno::EXIST) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat(parent, name, flags, Mode::empty())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes something, as the container's root where the guest's is nobody: on a mapped volume.
    fn make<T>(&self, make: impl Fn() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        match make() {
            Err(Errno::OVERFLOW) if self.owner != (0, 0) => mapped::as_owner(self.owner, make),
            other => other,
        }
    }

    /// Gives what was just made to the container's root.
    ///
    /// # Errors
    /// Those of chown(2).
    pub fn own(&self, parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
        if self.owner == (0, 0) {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    /// Makes this the root of the mount namespace and drops everything else.
    pub fn pivot(&self, propagation: &str) -> Result<()> {
        rustix::process::fchdir(&self.dir).during("root file system")?;
        // The old root ends up over the new one and is taken away from there: no directory of the
        // image is needed for it (pivot_root(2), "pivot_root(., .)").
        nix::unistd::pivot_root(".", ".").during("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).during("leaving the guest's root")?;
        nix::unistd::chdir("/").during("/")?;
        if !propagation.is_empty() {
            let change = options::propagation(propagation).ok_or_else(|| {
                Failure(format!(
                    "linux.rootfsPropagation {propagation:?} is not known"
                ))
            })?;
            let root = Self::current()?;
            let change_set = mount_attr::Change {
                propagation: change.flag,
                ..Default::default()
            };
            mount_attr::apply(root.dir.as_fd(), &change_set, change.recursive)
                .during("linux.rootfsPropagation")?;
        }
        Ok(())
    }
}

/// Nothing that is mounted from now on may reach the agent, and the other way round.
fn make_private() -> Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).during("making mounts private")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn root(dir: &Path) -> Root {
        Root {
            dir: fs::File::open(dir).unwrap().into(),
            owner: (0, 0),
        }
    }

    #[test]
    fn a_symlink_of_the_image_never_leads_outside() {
        let outside = tempfile::tempdir().unwrap();
        let image = tempfile::tempdir().unwrap();
        symlink(outside.path(), image.path().join("abs")).unwrap();
        symlink("../../../../../../../..", image.path().join("up")).unwrap();
        let root = root(image.path());
        // The absolute link is taken inside the root, where its target does not exist: making it
        // there must not touch the outside either.
        let _ = root.open_or_make("/abs/new", Missing::Directory);
        let _ = root.open_or_make("/up/made", Missing::Directory);
        assert!(fs::read_dir(outside.path()).unwrap().next().is_none());
        assert!(image.path().join("made").is_dir());
        assert!(!Path::new("/made").exists());
    }

    #[test]
    fn what_is_missing_is_made_where_links_lead() {
        let image = tempfile::tempdir().unwrap();
        let at = |path: &str| image.path().join(path);
        symlink("../run/stub", at("resolv.conf")).unwrap();
        symlink("/mnt/data", at("data")).unwrap();
        symlink("not/there", at("srv")).unwrap();
        let root = root(image.path());
        for (path, wanted, made) in [
            ("/a/b/../c/file", Missing::File, "a/c/file"),
            ("/resolv.conf", Missing::File, "run/stub"),
            ("/data", Missing::Directory, "mnt/data"),
            ("/srv/x/y", Missing::File, "not/there/x/y"),
        ] {
            root.open_or_make(path, wanted).unwrap();
            let kind = fs::symlink_metadata(at(made)).unwrap().file_type();
            assert_eq!(kind.is_dir(), wanted == Missing::Directory, "{path}");
            assert!(kind.is_dir() || kind.is_file(), "{path}");
            // It is there now.
            root.open_or_make(path, wanted).unwrap();
        }
        assert!(!at("a/b").exists());
    }

    #[test]
    fn a_file_for_a_directory_is_refused_with_the_link_that_leads_to_it() {
        let image = tempfile::tempdir().unwrap();
        fs::write(image.path().join("file"), "").unwrap();
        symlink("/file", image.path().join("data")).unwrap();
        symlink("data", image.path().join("data2")).unwrap();
        let root = root(image.path());
        let text = |path, wanted| root.open_or_make(path, wanted).unwrap_err().to_string();
        assert_eq!(
            text("/data2", Missing::Directory),
            "/data2: not a directory: it is a file, and a directory is wanted there \
             (the image's link /data -> /file leads to /file)"
        );
        assert_eq!(
            text("/", Missing::File),
            "/: is a directory, and a file is wanted there"
        );
        assert!(text("/data/x", Missing::File).contains("not a directory"));
    }

    #[test]
    fn an_ordinary_directory_is_required_where_asked() {
        let image = tempfile::tempdir().unwrap();
        let at = |path: &str| image.path().join(path);
        fs::create_dir(at("etc")).unwrap();
        symlink("etc", at("proc")).unwrap();
        fs::write(at("sys"), "").unwrap();
        symlink("not/there", at("srv")).unwrap();
        let root = root(image.path());
        for (path, instead) in [
            ("/proc", "a symlink there (-> etc)"),
            ("/sys", "a file there"),
        ] {
            let failure = root.open_real_dir(path).unwrap_err().to_string();
            assert!(failure.contains("ordinary directory"), "{failure}");
            assert!(failure.contains(instead), "{failure}");
        }
        root.open_real_dir("/srv/proc").unwrap();
        assert!(at("not/there/proc").is_dir());
    }
}
