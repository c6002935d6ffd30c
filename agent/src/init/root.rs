//! The container's root: preparing it, resolving paths inside it, and entering it.
//!
//! An image is hostile: every path is resolved by openat2(RESOLVE_IN_ROOT) without magic links, so
//! that no symlink in it leads outside.
use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::{Component, Path},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, openat, openat2},
    io::Errno,
};

use super::{
    failure::{Context as _, Failure, Result, error_text},
    idmap::Ids,
    mapped, options,
};
use crate::{
    control::Create,
    detached::{attach_at, clone_from_share, empty_directory},
    mount_attr,
};

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
    pub fn prepare(create: &Create, ids: &Ids) -> Result<Self> {
        make_private()?;
        let tree = clone_from_share(&create.share, &create.rootfs, true)
            .during(format_args!("{} in the share", create.rootfs))?;
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
    /// Those of openat2(2).
    pub fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.open_with(path, flags, ResolveFlags::empty())
    }

    fn open_with(
        &self,
        path: &str,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | resolve;
        loop {
            // EAGAIN: a rename raced with the resolution of "..".
            match openat2(
                &self.dir,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            ) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Opens `path` for mounting on it (O_PATH), and makes what is missing of it. The flag tells
    /// whether it was there.
    pub fn open_or_make(&self, path: &str, missing: Missing) -> Result<(OwnedFd, bool)> {
        match self.open(path, OFlags::PATH) {
            Ok(fd) => return Ok((fd, true)),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error).during(path),
        }
        let names = plain_names(path)?;
        let Some((last, parents)) = names.split_last() else {
            return Err(Failure(format!("{path}: names the root itself")));
        };
        let parent = self.make_dirs(parents, path)?;
        let fd = match missing {
            Missing::Directory => self.make_dir(&parent, last).during(path)?,
            Missing::File => {
                let flags = OFlags::CREATE
                    | OFlags::NOFOLLOW
                    | OFlags::RDONLY
                    | OFlags::CLOEXEC
                    | OFlags::NONBLOCK;
                let make = || openat(&parent, *last, flags, Mode::from_raw_mode(0o644));
                let file = self.make(make).during(path)?;
                self.own(&parent, last).during(path)?;
                file
            }
        };
        Ok((fd, false))
    }

    /// Opens the directory that holds the last name of `path`, making what is missing; returns it
    /// with that name.
    pub fn open_parent<'a>(&self, path: &'a str) -> Result<(OwnedFd, &'a str)> {
        let names = plain_names(path)?;
        let Some((last, parents)) = names.split_last() else {
            return Err(Failure(format!("{path}: names the root itself")));
        };
        Ok((self.make_dirs(parents, path)?, last))
    }

    /// Walks as far as directories exist (through symlinks, in the root) and makes the rest.
    fn make_dirs(&self, names: &[&str], whole: &str) -> Result<OwnedFd> {
        let mut here = self
            .open("/", OFlags::PATH | OFlags::DIRECTORY)
            .during(whole)?;
        for (n, name) in names.iter().enumerate() {
            // From the root each time: a symlink on the way is resolved as the container would.
            let prefix = names.get(..=n).unwrap_or_default().join("/");
            here = match self.open(&prefix, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => self.make_dir(&here, name).during(whole)?,
                Err(error) => return Err(error).during(whole),
            };
        }
        Ok(here)
    }

    fn make_dir(&self, parent: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
        match self.make(|| mkdirat(parent, name, Mode::from_raw_mode(0o755))) {
            Ok(()) => self.own(parent, name)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        openat(
            parent,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
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
    pub fn own(&self, parent: &OwnedFd, name: &str) -> rustix::io::Result<()> {
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

    /// Like [`Root::open_or_make`] for a directory, but refuses a symlink on the way: where the
    /// image chose the place, a later path would not lead where it seems to.
    pub fn open_real_dir(&self, path: &str) -> Result<OwnedFd> {
        self.open_or_make(path, Missing::Directory)?;
        self.open_with(
            path,
            OFlags::PATH | OFlags::DIRECTORY,
            ResolveFlags::NO_SYMLINKS,
        )
        .map_err(|error| match error {
            Errno::LOOP => Failure(format!(
                "{path}: the image has a symlink there; this mount needs an ordinary directory"
            )),
            error => Failure(format!("{path}: {}", error_text(&error.into()))),
        })
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

/// The names of an absolute path, without "." and with ".." taken lexically.
fn plain_names(path: &str) -> Result<Vec<&str>> {
    let mut names = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => names.push(name.to_str().unwrap_or_default()),
            Component::ParentDir => {
                names.pop();
            }
            _ => {}
        }
    }
    Ok(names)
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
    fn missing_parents_are_made_and_dots_are_lexical() {
        let image = tempfile::tempdir().unwrap();
        let root = root(image.path());
        assert!(
            !root
                .open_or_make("/a/b/../c/file", Missing::File)
                .unwrap()
                .1
        );
        assert!(image.path().join("a/c/file").is_file());
        assert!(root.open_or_make("/a/c/file", Missing::File).unwrap().1);
    }

    #[test]
    fn a_real_directory_is_required_where_asked() {
        let image = tempfile::tempdir().unwrap();
        fs::create_dir(image.path().join("etc")).unwrap();
        symlink("etc", image.path().join("proc")).unwrap();
        let failure = root(image.path()).open_real_dir("/proc").unwrap_err();
        assert!(failure.to_string().contains("symlink"), "{failure}");
    }
}
