//! The node as the suite needs it: containerd's version and configuration, and the images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use brig_tests::node::{clock, containerd, process};

use crate::client::Cri;

/// The node's configuration, and the place where a test puts its own.
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
const OWN_CONFIG: &str = "/run/brig-node/config.toml";
/// An image's name, and the file that it is imported from.
pub type Image = (&'static str, &'static str);

/// The sandbox image of this suite: runc needs one that stays, Brig runs none.
const PAUSE: Image = ("docker.io/brig/pause:test", "/host/bin/pause.tar");
/// A static busybox.
pub const BUSYBOX: Image = (
    "docker.io/brig/busybox:test",
    "/host/assets/images/busybox.tar",
);
/// The same, with links of all kinds where mounts go.
pub const LINKS: Image = ("docker.io/brig/links:test", "/host/assets/images/links.tar");
/// The suite's own probe, one static program.
pub const PROBE: Image = ("docker.io/brig/probe:test", "/host/bin/probe.tar");
/// Debian with nginx and Python.
pub const DEBIAN: Image = (
    "docker.io/brig/debian:test",
    "/host/assets/images/debian.tar",
);
/// What sets up networks, packet filters and file systems.
pub const TOOLS: Image = ("docker.io/brig/tools:test", "/host/assets/images/tools.tar");
/// Debian with PostgreSQL and Redis.
pub const APPS: Image = ("docker.io/brig/apps:test", "/host/assets/images/apps.tar");

/// Runs a program of the node, which must succeed; returns what it wrote.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    // The node has no udev: dmsetup makes the nodes itself.
    command.args(args).env("DM_DISABLE_UDEV", "1");
    let outcome = process::run(command, clock::seconds(60))?
        .success()
        .with_context(|| format!("{program} {}", args.join(" ")))?;
    Ok(outcome.text())
}

/// Switches containerd if asked to, gives it this suite's sandbox image, and imports images.
pub fn prepare(wanted_containerd: Option<&str>) -> Result<()> {
    // One that somebody has put there may have handlers of his own.
    let config = fs::read_to_string(OWN_CONFIG)
        .or_else(|_| fs::read_to_string(DEFAULT_CONFIG))
        .with_context(|| format!("{DEFAULT_CONFIG}: is this the disposable node?"))?;
    let lines: Vec<String> = config
        .lines()
        .map(
            |line| match line.trim_start().starts_with("sandbox_image") {
                true => format!("  sandbox_image = \"{}\"", PAUSE.0),
                false => line.to_owned(),
            },
        )
        .collect();
    let wanted = lines.join("\n") + "\n";
    ensure!(
        wanted.contains(PAUSE.0),
        "{DEFAULT_CONFIG} sets no sandbox_image"
    );
    let changed = fs::read_to_string(OWN_CONFIG).ok().as_ref() != Some(&wanted);
    if changed {
        fs::write(OWN_CONFIG, wanted)?;
    }
    // The shim's own time-outs are stretched as the suite's are.
    let brig = Path::new("/etc/brig/config.d");
    fs::create_dir_all(brig)?;
    let scale = format!("time_scale = {:.1}\n", clock::scale().clamp(0.1, 100.0));
    fs::write(brig.join("brig-cri-time.toml"), scale)?;
    if let Some(version) = wanted_containerd {
        containerd::switch(version)?;
    } else if changed {
        restart_containerd()?;
    }
    import(PAUSE)?;
    import(BUSYBOX)
}

/// Imports an image, unless containerd has it.
pub fn import(image: Image) -> Result<()> {
    let images = run("ctr", &["-n", "k8s.io", "image", "ls", "--quiet"])?;
    if !images.lines().any(|line| line == image.0) {
        let mut command = Command::new("ctr");
        command.args(["-n", "k8s.io", "image", "import", image.1]);
        process::run(command, clock::seconds(60))?
            .success()
            .with_context(|| format!("cannot import {}", image.1))?;
    }
    Ok(())
}

/// Restarts containerd under whatever runs; returns when it serves.
pub fn restart_containerd() -> Result<()> {
    run("systemctl", &["restart", "containerd"]).map(drop)
}

/// Kills containerd under whatever runs, and starts it again; returns when it serves.
pub fn kill_containerd(cri: &Cri) -> Result<()> {
    run(
        "systemctl",
        &["kill", "--kill-whom=main", "--signal=KILL", "containerd"],
    )?;
    // The unit is not restarted by itself, and until systemd has seen the end there is nothing to start.
    restart_and_reconnect(cri)
}

/// Another configuration of containerd, until the end of its scope.
pub struct Configured {
    cri: Rc<Cri>,
    before: String,
}

impl Configured {
    /// Restarts containerd with the lines of its configuration as `edit` makes them.
    pub fn lines(cri: &Rc<Cri>, edit: impl Fn(&str) -> String) -> Result<Self> {
        let before = fs::read_to_string(OWN_CONFIG).context(OWN_CONFIG)?;
        let configured = Self {
            cri: Rc::clone(cri),
            before,
        };
        let lines: Vec<String> = configured.before.lines().map(edit).collect();
        fs::write(OWN_CONFIG, lines.join("\n") + "\n")?;
        restart_and_reconnect(cri)?;
        Ok(configured)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        let restored = fs::write(OWN_CONFIG, &self.before)
            .context(OWN_CONFIG)
            .and_then(|()| restart_and_reconnect(&self.cri));
        if let Err(error) = restored {
            eprintln!("brig-cri: containerd's configuration is not restored: {error:#}");
        }
    }
}

/// Adds to containerd's configuration without telling it; what a [`Configured`] has changed is as before when that ends.
pub fn append_to_configuration(text: &str) -> Result<()> {
    let before = fs::read_to_string(OWN_CONFIG).context(OWN_CONFIG)?;
    fs::write(OWN_CONFIG, before + text).context(OWN_CONFIG)
}

/// containerd is not there; it comes back at the end of the scope at the latest.
pub struct WithoutContainerd {
    cri: Rc<Cri>,
}

impl WithoutContainerd {
    /// Stops containerd alone.
    pub fn stop(cri: &Rc<Cri>) -> Result<Self> {
        run("systemctl", &["stop", "containerd"])?;
        Ok(Self {
            cri: Rc::clone(cri),
        })
    }
}

impl Drop for WithoutContainerd {
    fn drop(&mut self) {
        let back = run("systemctl", &["start", "containerd"]).and_then(|_| self.cri.reconnect());
        if let Err(error) = back {
            eprintln!("brig-cri: containerd does not come back: {error:#}");
        }
    }
}

/// Restarts containerd and connects to the new one.
pub fn restart_and_reconnect(cri: &Cri) -> Result<()> {
    restart_containerd()?;
    cri.reconnect()
}

/// A directory on the node for one case, removed at the end of its scope.
pub struct Directory {
    /// Where it is.
    pub path: PathBuf,
}

impl Directory {
    /// Makes an empty one.
    pub fn new(name: &str) -> Result<Self> {
        let path = Path::new("/var/lib/brig-cri").join(format!("{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    /// A volume where kubelet has it, of a pod of its own: a runtime may tell its kind from the path.
    pub fn volume(kind: &str, name: &str) -> Result<Self> {
        let uid = format!("brig-cri-{name}-{}", std::process::id());
        let pod = Path::new("/var/lib/kubelet/pods").join(uid);
        let _ = fs::remove_dir_all(&pod);
        let path = pod.join("volumes").join(kind).join(name);
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    /// Where kubelet binds a subPath of this volume, for the container `main`.
    pub fn sub_path(&self) -> Result<PathBuf> {
        let name = self.path.file_name().context("a volume without a name")?;
        let pod = self.path.ancestors().nth(3).context("not kubelet's path")?;
        let path = pod.join("volume-subpaths").join(name).join("main");
        fs::create_dir_all(&path)?;
        Ok(path.join("0"))
    }

    /// Writes a file in it; returns where.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Makes a directory in it; returns where.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Kubelet's: the whole pod.
        let pod = self.path.ancestors().nth(3);
        let all = pod.filter(|pod| pod.starts_with("/var/lib/kubelet/pods/"));
        let _ = fs::remove_dir_all(all.unwrap_or(&self.path));
    }
}
