//! Root file systems on a block device, through a real containerd: its snapshotters blockfile and devmapper.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use brig_suite::case::not_here;
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::ctr::{Container, Ctr, Run};
use brig_tests::node::{clock, containerd, process};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::hostile_agent::shim_of;
use super::root_disks::{DIRECTORY, loops, mounts, run};
use crate::suite::{Case, Suite, brig, patience};

pub const CASES: &[Case] = &[
    brig(
        "disks",
        "blockfile: the root file system is a disk of the guest, as under runc, and free after any death",
        |suite| snapshotter(suite, &Blockfile),
    ),
    brig(
        "disks",
        "devmapper: the root file system is a disk of the guest, as under runc, and free after any death",
        |suite| snapshotter(suite, &Devmapper),
    ),
];

/// An image of a shell and its programs.
pub const BUSYBOX: &str = "docker.io/brig/busybox:test";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
const OWN_CONFIG: &str = "/run/brig-node/config.toml";
/// What systemd gives containerd besides.
const OWN_UNIT: &str = "/run/systemd/system/containerd.service.d/brig-e2e.conf";
pub const PROBE: &str = "/probe";
const MIB: u64 = 1 << 20;
/// MiB that a container writes.
const FILLED: u64 = 8;

/// A snapshotter of containerd that gives block devices or images.
pub trait Snapshotter {
    fn name(&self) -> &'static str;
    /// Makes what it needs; the lines of containerd's configuration.
    fn prepare(&self, directory: &Path) -> Result<String>;
    /// What of the node still uses a snapshot, for the message.
    fn in_use(&self) -> Result<String>;
    fn remove(&self);
}

pub struct Blockfile;

impl Snapshotter for Blockfile {
    fn name(&self) -> &'static str {
        "blockfile"
    }

    fn prepare(&self, directory: &Path) -> Result<String> {
        let scratch = directory.join("scratch");
        File::create(&scratch)?.set_len(64 << 20)?;
        run("mkfs.ext4", &["-q", "-F", &scratch.display().to_string()])?;
        Ok(format!(
            "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n  root_path = \"{0}/blockfile\"\n  \
             scratch_file = \"{0}/scratch\"\n  fs_type = \"ext4\"\n  mount_options = []\n",
            directory.display()
        ))
    }

    fn in_use(&self) -> Result<String> {
        Ok(loops()?
            .lines()
            .filter(|line| line.contains(DIRECTORY))
            .collect())
    }

    fn remove(&self) {}
}

struct Devmapper;

impl Snapshotter for Devmapper {
    fn name(&self) -> &'static str {
        "devmapper"
    }

    fn prepare(&self, directory: &Path) -> Result<String> {
        run("modprobe", &["dm_thin_pool"])?;
        let attach = |name: &str, bytes| -> Result<String> {
            let path = directory.join(name);
            File::create(&path)?.set_len(bytes)?;
            let device = run(
                "losetup",
                &["--find", "--show", &path.display().to_string()],
            )?;
            Ok(device.trim().to_owned())
        };
        let (metadata, data) = (attach("metadata", 16 << 20)?, attach("data", 256 << 20)?);
        let table = format!(
            "0 {} thin-pool {metadata} {data} 128 32768",
            (256 << 20) / 512
        );
        run("dmsetup", &["create", "brig-e2e-pool", "--table", &table])?;
        Ok(format!(
            "[plugins.\"io.containerd.snapshotter.v1.devmapper\"]\n  root_path = \"{}/devmapper\"\n  \
             pool_name = \"brig-e2e-pool\"\n  base_image_size = \"64MB\"\n",
            directory.display()
        ))
    }

    fn in_use(&self) -> Result<String> {
        let columns = ["info", "-c", "--noheadings", "-o", "name,open"];
        let all = run("dmsetup", &columns)?;
        let used = |line: &&str| line.contains("-snap-") && !line.ends_with(":0");
        Ok(all.lines().filter(used).collect())
    }

    fn remove(&self) {
        let names = run("dmsetup", &["info", "-c", "--noheadings", "-o", "name"]);
        let names = names.unwrap_or_default();
        let (pool, thin): (Vec<_>, Vec<_>) = names
            .lines()
            .filter(|name| name.contains("brig-e2e-pool"))
            .partition(|name| *name == "brig-e2e-pool");
        for name in thin.into_iter().chain(pool) {
            let _ = run("dmsetup", &["remove", "--retry", name]);
        }
        for file in ["metadata", "data"] {
            let path = format!("{DIRECTORY}/{file}");
            if let Ok(device) = run(
                "losetup",
                &["--noheadings", "--output", "NAME", "--associated", &path],
            ) {
                let _ = run("losetup", &["--detach", device.trim()]);
            }
        }
    }
}

/// containerd with another snapshotter, until the end of its scope.
pub struct Configured<'a>(&'a dyn Snapshotter, Option<String>);

impl<'a> Configured<'a> {
    pub fn with(snapshotter: &'a dyn Snapshotter) -> Result<Self> {
        let directory = Path::new(DIRECTORY);
        let _ = fs::remove_dir_all(directory);
        fs::create_dir_all(directory)?;
        let before = fs::read_to_string(OWN_CONFIG).ok();
        let configured = Self(snapshotter, before.clone());
        let lines = snapshotter.prepare(directory)?;
        let config = match before {
            Some(config) => config,
            None => fs::read_to_string(DEFAULT_CONFIG)?,
        };
        let enabled = config.replace("  \"io.containerd.snapshotter.v1.devmapper\",\n", "");
        fs::write(OWN_CONFIG, format!("{enabled}\n{lines}"))?;
        let unit = Path::new(OWN_UNIT);
        fs::create_dir_all(unit.parent().context("no directory")?)?;
        fs::write(unit, "[Service]\nEnvironment=DM_DISABLE_UDEV=1\n")?;
        run("systemctl", &["daemon-reload"])?;
        containerd::restart()?;
        Ok(configured)
    }
}

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        let restored = match &self.1 {
            Some(config) => fs::write(OWN_CONFIG, config),
            None => fs::remove_file(OWN_CONFIG),
        };
        let _ = fs::remove_file(OWN_UNIT);
        let _ = run("systemctl", &["daemon-reload"]);
        let restarted = containerd::restart();
        if restored.is_err() || restarted.is_err() {
            eprintln!(
                "brig-e2e: containerd's configuration is not restored: {restored:?} {restarted:?}"
            );
        }
        self.0.remove();
        let _ = fs::remove_dir_all(DIRECTORY);
    }
}

fn snapshotter(suite: &mut Suite, snapshotter: &dyn Snapshotter) -> Result<()> {
    if suite.containerd.starts_with("1.6") {
        return not_here("containerd has the blockfile snapshotter since 1.7");
    }
    suite.forget_shared();
    let configured = Configured::with(snapshotter)?;
    suite.reconnect_events();
    suite.import(BUSYBOX, "/host/assets/images/busybox.tar")?;
    let outcome = on(suite, snapshotter);
    forget_snapshots(&suite.ctr, snapshotter.name())?;
    drop(configured);
    suite.reconnect_events();
    outcome
}

fn on(suite: &Suite, snapshotter: &dyn Snapshotter) -> Result<()> {
    let name = snapshotter.name();
    let ctr = suite.ctr.clone();
    let probe = format!("type=bind,src=/host/bin/brig-probe,dst={PROBE},options=rbind:ro");
    let sleeper = || {
        Run::new(name, BUSYBOX, &["sleep", "100000"])
            .with("--snapshotter", name)
            .with("--mount", &probe)
    };

    // The first unpacks the image, for which containerd mounts on the node; and it is what to compare with.
    let runc = Ctr {
        runtime: "io.containerd.runc.v2".to_owned(),
        ..ctr.clone()
    };
    let under_runc = runc.start(&sleeper())?;
    let counted_under_runc = counted(&runc, &under_runc, name)?;
    under_runc.exec(&["rm", "/filled"])?.success()?;
    let reference = worked_in(&runc, under_runc, name)?;
    let before = mounts()?;
    let container = ctr.start(&sleeper())?;
    let added: Vec<_> = mounts()?.difference(&before).cloned().collect();
    equal("mounts of the node", Vec::<String>::new(), added)?;
    that("the snapshot is in use", !snapshotter.in_use()?.is_empty())?;
    let script = "grep ' / ' /proc/mounts; echo kept > /kept && sync /kept && rm /kept";
    let said = container.exec(&["sh", "-c", script])?.success()?.text();
    contains("the root", "/dev/vd", &said)?;
    contains("the root", " / ext4 rw", &said)?;
    let counted = counted(&ctr, &container, name)?;
    let differ = counted.abs_diff(counted_under_runc);
    that(
        &format!("the snapshotter counts {counted_under_runc} bytes under runc and {counted} here"),
        differ <= MIB,
    )?;
    let guests = run("brig", &["inspect", "--json", &container.id])?;
    let guests: serde_json::Value = serde_json::from_str(&guests)?;
    let root = &guests["fileSystems"][0];
    equal("a root on a disk", Some("ext4"), root["type"].as_str())?;
    let used = root["usedBytes"].as_u64().unwrap_or(0);
    that(
        &format!("the guest tells what is used of it: {root}"),
        (FILLED * MIB..64 * MIB).contains(&used),
    )?;
    container.exec(&["rm", "/filled"])?.success()?;
    let worked = worked_in(&ctr, container, name)?;
    let differ = reference
        .iter()
        .zip(&worked)
        .find(|(one, other)| one != other);
    equal(
        "what was done and what is left, under runc and here",
        None,
        differ,
    )?;
    equal("lines", reference.len(), worked.len())?;

    let readonly = ctr.start(&sleeper().flag("--read-only"))?;
    let refused = readonly.exec(&["touch", "/new"])?;
    contains("writing to it", "Read-only file system", &refused.stderr)?;
    drop(readonly);

    let container = ctr.start(&sleeper())?;
    let script = "echo kept > /kept && sync /kept";
    container.exec(&["sh", "-c", script])?.success()?;
    kill(
        Pid::from_raw(super::devices::vmm_of(suite, &container.id)?),
        Signal::SIGKILL,
    )?;
    free(snapshotter).context("the VMM was killed")?;
    // The container is started anew on what it has written.
    restart(&ctr, &container)?;
    let kept = container.exec(&["cat", "/kept"])?.success()?.text();
    equal("what was synced before the death", "kept", kept.trim())?;
    kill(
        Pid::from_raw(shim_of(suite, &container.id)?),
        Signal::SIGKILL,
    )?;
    free(snapshotter).context("the shim was killed")?;
    restart(&ctr, &container)?;
    let id = container.id.clone();
    drop(container);
    let left = ctr.ok(&["snapshots", "--snapshotter", name, "ls"])?;
    that("the snapshot was removed", !left.contains(&id))?;
    equal("in use at the end", "", snapshotter.in_use()?.as_str())
}

/// By how many bytes what the snapshotter counts (`ephemeral-storage`) grows when a container writes `/filled`.
fn counted(ctr: &Ctr, container: &Container, snapshotter: &str) -> Result<u64> {
    let count = || -> Result<u64> {
        let usage = [
            "snapshots",
            "--snapshotter",
            snapshotter,
            "usage",
            "-b",
            &container.id,
        ];
        let table = ctr.ok(&usage)?;
        let line = table.lines().last().context("no line")?;
        let size = line.split_whitespace().nth(1).context("no size")?;
        size.parse().with_context(|| line.to_owned())
    };
    let before = count()?;
    let script =
        format!("dd if=/dev/urandom of=/filled bs=1M count={FILLED} 2> /dev/null && sync /filled");
    container.exec(&["sh", "-c", &script])?.success()?;
    Ok(count()?.saturating_sub(before))
}

/// Does what changes owners, modes, attributes and contents, ends the container, and tells what came of each and what its
/// snapshot has then, for whoever commits it.
fn worked_in(ctr: &Ctr, container: Container, snapshotter: &str) -> Result<Vec<String>> {
    let done = container.exec(&[PROBE, "operations", "7", "300", "/work"])?;
    let mut lines: Vec<String> = done.success()?.text().lines().map(str::to_owned).collect();
    let script = "echo x > /own && chown 1:2 /own && chmod 4755 /own && mknod /pipe p && ln -s own /link && rm -r /etc/*";
    container.exec(&["sh", "-c", script])?.success()?;
    ctr.call(&["task", "delete", "--force", &container.id])?
        .success()?;
    let directory = Path::new(DIRECTORY).join("committed");
    fs::create_dir_all(&directory)?;
    let at = directory.display().to_string();
    let flags = [
        "snapshots",
        "--snapshotter",
        snapshotter,
        "mounts",
        &at,
        &container.id,
    ];
    // Without options it ends in "-o".
    let command = ctr.ok(&flags)?;
    let command = command.trim();
    run("sh", &["-c", command.strip_suffix("-o").unwrap_or(command)])?;
    let listing = format!(
        "cd {at} && find . -path ./lost+found -prune -o -printf '%P %y %m %U %G %l %n\\n' | sort && getfattr -R -h -d -m - . | sort"
    );
    let listed = run("sh", &["-c", &listing]);
    umount2(directory.as_path(), MntFlags::empty())?;
    lines.extend(listed?.lines().map(str::to_owned));
    Ok(lines)
}

/// Waits until nothing of the node holds a snapshot.
fn free(snapshotter: &dyn Snapshotter) -> Result<()> {
    let end = Instant::now() + patience();
    loop {
        let used = snapshotter.in_use()?;
        if used.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "still in use: {used}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn restart(ctr: &Ctr, container: &Container) -> Result<()> {
    ctr.call(&["task", "delete", "--force", &container.id])?;
    let mut again = ctr.command(&["task", "start", "--detach", &container.id]);
    again.stdin(std::process::Stdio::null());
    process::run(again, clock::seconds(12))?
        .success()
        .context("started again")?;
    Ok(())
}

/// The snapshotter goes, and containerd must not look for what it had.
pub fn forget_snapshots(ctr: &Ctr, snapshotter: &str) -> Result<()> {
    for _ in 0..20 {
        let all = ctr.ok(&["snapshots", "--snapshotter", snapshotter, "ls"])?;
        let keys: Vec<_> = all
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        if keys.is_empty() {
            return Ok(());
        }
        // One that others stand on is refused, until they have gone.
        for key in keys {
            ctr.call(&["snapshots", "--snapshotter", snapshotter, "rm", key])?;
        }
    }
    Err(anyhow::anyhow!("{snapshotter} keeps snapshots"))
}
