//! Names that go: removed, or given to another file.
//!
//! NFS's client (and AFS's) does not remove a file that somebody on this node holds: it renames it to `.nfs…`, and removes
//! that once nobody does. An `O_PATH` descriptor counts as much as an open file, and the server has one of each file that
//! the guest knows, which knows a file that it removes. So of what is not open in the guest the server holds nothing while
//! a name of it goes: else the directory would not be empty that is removed next. What is open stays held until it is
//! closed, as it would be under runc. A directory need not be let go: those are not renamed.
//!
//! If the file has other names, or the removal fails, it has its number still, and is found again by the next look-up,
//! which the guest's kernel makes when it hears `ESTALE`.

use std::ffi::CStr;
use std::io;

use rustix::fs::{AtFlags, RenameFlags, renameat_with, unlinkat};

use super::Tree;
use super::nodes::Node;

impl Tree {
    pub(in super::super) fn unlink(&self, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.nodes.get(parent)?;
        self.letting_go(&parent, name, || {
            Ok(unlinkat(&parent.file, name, AtFlags::empty())?)
        })
    }

    pub(in super::super) fn rmdir(&self, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.nodes.get(parent)?;
        Ok(unlinkat(&parent.file, name, AtFlags::REMOVEDIR)?)
    }

    pub(in super::super) fn rename(
        &self,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (old, new) = (self.nodes.get(old_parent)?, self.nodes.get(new_parent)?);
        let flags = RenameFlags::from_bits_retain(flags);
        let rename = || {
            Ok(renameat_with(
                &old.file, old_name, &new.file, new_name, flags,
            )?)
        };
        if flags.intersects(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE) {
            return rename();
        }
        self.letting_go(&new, new_name, rename)
    }

    /// Has `remove` take a name away, while nothing is held of what it names.
    fn letting_go(
        &self,
        parent: &Node,
        name: &CStr,
        remove: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let let_go = self.lets_go(parent, name);
        let removed = remove();
        // It is there as before, and the guest may have something that names it and is not looked up again.
        if removed.is_err()
            && let_go
            && let Ok((node, _)) = self.find(parent, name)
        {
            self.nodes.forget(node.number, 1);
        }
        removed
    }

    /// Lets go of what a name means; whether there was anything. What is wrong with the name the removal will say.
    fn lets_go(&self, parent: &Node, name: &CStr) -> bool {
        // Where the guest opens nothing, nobody here knows what it has open.
        if !self.is_remote() || self.files.is_some() {
            return false;
        }
        let file = Self::look_up(parent, name);
        let Ok((identity, _)) = file.and_then(|file| self.identify(&file)) else {
            return false;
        };
        identity.beyond.is_some()
            && self
                .nodes
                .let_go(&identity, |number| self.opens.has(number))
    }
}

#[cfg(test)]
mod tests {
    use super::super::open::Open;
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use fuse_backend_rs::abi::fuse_abi::ROOT_ID;

    fn tree(top: &Path) -> Tree {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let descriptors = openat(CWD, "/proc/self/fd", flags, Mode::empty()).unwrap();
        let tree = Tree::new(top, Arc::new(descriptors), false, false, Duration::ZERO).unwrap();
        tree.pretend_remote();
        tree
    }

    #[test]
    fn a_file_that_is_being_opened_while_its_name_goes_is_held_again() {
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(top.path().join("file"), "content").unwrap();
        let tree = tree(top.path());
        let number = tree.lookup(ROOT_ID, c"file").unwrap().inode;
        // One thread has begun to open it, and another one removes it.
        let node = tree.nodes.get(number).unwrap();
        let file = tree.reopen(&node, OFlags::RDONLY).unwrap();
        tree.unlink(ROOT_ID, c"file").unwrap();
        let stale = tree.getattr(number).unwrap_err();
        assert_eq!(stale.raw_os_error(), Some(libc::ESTALE));
        let handle = tree.hold_open(&node, Open::new(file, number, OFlags::RDONLY));
        drop(node);
        assert_eq!(tree.getattr(number).unwrap().0.st_nlink, 0);
        tree.release(number, handle).unwrap();
        tree.forget(number, 1);
        assert!(!tree.has(number));
    }

    #[test]
    fn names_that_come_and_go_while_files_are_opened_fail_nobody_who_has_one_open() {
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = top.path().join("file");
        let tree = tree(top.path());
        let ends = std::time::Instant::now() + Duration::from_millis(300);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while std::time::Instant::now() < ends {
                    fs::write(&path, "content").unwrap();
                    let _ = tree.unlink(ROOT_ID, c"file");
                }
            });
            for _ in 0..2 {
                threads.spawn(|| {
                    while std::time::Instant::now() < ends {
                        let Ok(found) = tree.lookup(ROOT_ID, c"file") else {
                            continue;
                        };
                        if let Ok((handle, _)) = tree.open(found.inode, 0, false) {
                            for _ in 0..10 {
                                tree.getattr(found.inode).unwrap();
                            }
                            tree.release(found.inode, handle).unwrap();
                        }
                        tree.forget(found.inode, 1);
                    }
                });
            }
        });
        assert_eq!(tree.nodes.count(), 1);
    }
}
