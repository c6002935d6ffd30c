//! File systems of the node that somebody serves: NFS by the node's own kernel, and FUSE. Gone at the end of
//! their scope.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use brig_tests::node::{clock, process};

use crate::mounted::Mounted;
use crate::suite::not_here;

/// Runs a line of shell, which must succeed.
fn sh(line: &str) -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-ec", line]);
    process::run(command, clock::seconds(20))?
        .success()
        .with_context(|| line.to_owned())
        .map(drop)
}

/// Fails, as no failure of the case, unless the node has the program.
fn needs(program: &str) -> Result<()> {
    let found = Command::new("sh")
        .args(["-c", "command -v \"$0\" >/dev/null", program])
        .status()?;
    if found.success() {
        return Ok(());
    }
    not_here(format!("this node's image has no {program}"))
}

/// A directory of the node, exported by its kernel and mounted over NFS 4.2.
pub struct Nfs {
    mount: Option<Mounted>,
    mountd: Child,
}

impl Nfs {
    /// Exports `from` without squashing root, and mounts it on `to`.
    ///
    /// # Errors
    /// If the node has no NFS server, or it does not start.
    pub fn new(from: &Path, to: &Path) -> Result<Self> {
        needs("rpc.nfsd")?;
        // No client was there before this server: it waits for none longer than it must.
        sh("modprobe nfsd; modprobe nfsv4
            mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
            echo 10 > /proc/fs/nfsd/nfsv4leasetime
            echo 10 > /proc/fs/nfsd/nfsv4gracetime
            touch /var/lib/nfs/etab /var/lib/nfs/rmtab
            # Debian's server asks its own user database for groups: the fsGroup of a pod is in none.
            if [ -f /etc/nfs.conf ]; then sed -i 's/^manage-gids *=.*/manage-gids=n/' /etc/nfs.conf; fi")?;
        let mountd = Command::new("rpc.mountd")
            .args(["--foreground", "--no-nfs-version", "2"])
            .args(["--no-nfs-version", "3"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("rpc.mountd")?;
        let mut nfs = Self {
            mount: None,
            mountd,
        };
        sh(&format!(
            "rpc.nfsd -N 3 2
            exportfs -i -o rw,no_root_squash,no_subtree_check,fsid=0,insecure 127.0.0.1:{}
            mount -t nfs4 -o vers=4.2 127.0.0.1:/ {}",
            from.display(),
            to.display()
        ))?;
        nfs.mount = Some(Mounted::made(to));
        Ok(nfs)
    }

    /// Unmounts it now, and not lazily: a volume still in use is busy.
    ///
    /// # Errors
    /// If it is in use.
    pub fn unmount(mut self) -> Result<()> {
        self.mount.take().map_or(Ok(()), Mounted::unmount)
    }
}

impl Drop for Nfs {
    fn drop(&mut self) {
        drop(self.mount.take());
        let _ = sh("exportfs -au; rpc.nfsd 0");
        let _ = self.mountd.kill();
        let _ = self.mountd.wait();
    }
}

/// Mounts `from` a second time on `to`, through a program in user space.
///
/// # Errors
/// If the node has no bindfs, or it fails.
pub fn fuse(from: &Path, to: &Path) -> Result<Mounted> {
    needs("bindfs")?;
    // As drivers of volumes do: whoever the file's mode lets in, not root alone.
    sh(&format!(
        "bindfs -o allow_other {} {}",
        from.display(),
        to.display()
    ))?;
    Ok(Mounted::made(to))
}
