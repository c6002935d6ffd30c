//! Bundles as containerd makes them, the containers' root file systems, and their output.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::api::Mount;
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use super::generation::Endpoint;

/// Where a container stands.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// The sandbox container of a pod whose network is this namespace.
    Pause {
        /// Its path.
        netns: &'a Path,
    },
    /// A container of a pod.
    Member {
        /// The pod.
        sandbox: &'a str,
        /// Of the pod's sandbox: whose namespaces it joins.
        pid: u32,
    },
}

/// The spec that CRI makes for a container, as far as a shim acts on it.
#[must_use]
pub fn spec(id: &str, args: &[&str], place: Place<'_>) -> Value {
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
    let (kind, sandbox) = match place {
        Place::Pause { netns } => {
            namespaces.push(json!({"type": "ipc"}));
            namespaces.push(json!({"type": "uts"}));
            namespaces.push(json!({"type": "network", "path": netns}));
            ("sandbox", id)
        }
        Place::Member { sandbox, pid } => {
            for (kind, file) in [("ipc", "ipc"), ("uts", "uts"), ("network", "net")] {
                let path = format!("/proc/{pid}/ns/{file}");
                namespaces.push(json!({"type": kind, "path": path}));
            }
            ("container", sandbox)
        }
    };
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "daemon",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "annotations": {
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": sandbox,
            "io.kubernetes.cri.sandbox-name": "daemon",
            "io.kubernetes.cri.sandbox-namespace": "default",
        },
        "linux": {
            "cgroupsPath": format!("{}/{id}", super::CGROUP_PARENT),
            "namespaces": namespaces,
        },
    })
}

/// A bundle: the directory in which a shim's binary runs.
pub struct Bundle {
    /// The container, or the sandbox.
    pub id: String,
    /// The directory.
    pub path: PathBuf,
    work: PathBuf,
    log: File,
}

impl Bundle {
    /// Makes it below containerd's state and root directories. Only a sandbox of the Sandbox API has no spec.
    ///
    /// # Errors
    /// If something of it exists.
    pub fn make(state: &Path, root: &Path, id: &str, spec: Option<&Value>) -> Result<Self> {
        let (path, work) = (state.join(id), root.join(id));
        fs::create_dir_all(&work)?;
        fs::create_dir_all(path.join("rootfs"))?;
        symlink(&work, path.join("work"))?;
        if let Some(spec) = spec {
            fs::write(path.join("config.json"), spec.to_string())?;
        }
        // containerd reads the shim's log from a FIFO that it holds open.
        let log = path.join("log");
        nix::unistd::mkfifo(&log, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let log = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(log)?;
        Ok(Self {
            id: id.to_owned(),
            path,
            work,
            log,
        })
    }

    /// What containerd keeps of an answer to `start`, for its own restart.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self, endpoint: &Endpoint) -> Result<()> {
        fs::write(
            self.path.join("bootstrap.json"),
            endpoint.json().to_string(),
        )
        .context("bootstrap.json")
    }

    /// What [`Self::keep`] wrote.
    ///
    /// # Errors
    /// If there is nothing.
    pub fn kept(&self) -> Result<Endpoint> {
        let text = fs::read(self.path.join("bootstrap.json")).context("bootstrap.json")?;
        super::generation::Generation::V2_2.read_answer(&text)
    }

    /// A root file system over the image, as containerd's overlay snapshotter gives it.
    ///
    /// # Errors
    /// If its directories cannot be made.
    pub fn rootfs(&self, image: &Path) -> Result<Vec<Mount>> {
        let (upper, work) = (self.work.join("fs"), self.work.join("work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        Ok(vec![Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", image.display()),
            ],
            ..Mount::default()
        }])
    }

    /// What the shim has logged since the last call, at most what a pipe holds.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = (&self.log).read(&mut buffer) {
            text.extend_from_slice(&buffer[..read]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// A FIFO that containerd reads to its end.
pub struct Output {
    /// What the shim is told.
    pub path: PathBuf,
    text: Receiver<String>,
}

impl Output {
    /// Makes the FIFO and begins to read.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn at(path: PathBuf) -> Result<Self> {
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let (sender, text) = channel();
        let opened = path.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // Opens when somebody writes, as containerd's reader does.
            if let Ok(mut fifo) = File::open(opened) {
                let _ = fifo.read_to_end(&mut bytes);
            }
            let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        });
        Ok(Self { path, text })
    }

    /// Everything up to its end.
    ///
    /// # Errors
    /// If that does not come in time.
    pub fn all(&self, within: Duration) -> Result<String> {
        self.text
            .recv_timeout(within)
            .with_context(|| format!("{} has no end of file", self.path.display()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // Lets the reader go if nobody ever wrote.
        let _ = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.path);
        let _ = fs::remove_file(&self.path);
    }
}
