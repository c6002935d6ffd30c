//! What an operator sets for all pods of one runtime handler.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;

use crate::node::{Configured, Directory};
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[case(
    "sandbox",
    "a handler's own configuration file counts, with its drop-ins; two CPUs have two queues",
    config_path,
)];

/// A handler `brig-own` beside the others, with a configuration file of its own, as long as this is there.
pub struct Own {
    _configured: Configured,
    _files: Directory,
    file: PathBuf,
}

impl Own {
    /// Its name.
    pub const HANDLER: &'static str = "brig-own";

    /// One whose file says `text`, with these drop-ins. The shared pod must not be in use.
    ///
    /// # Errors
    /// `n/a` for handlers that take no file.
    pub fn new(suite: &Suite, text: &str, drop_ins: &[(&str, &str)]) -> Result<Self> {
        match suite.handler.as_str() {
            "runc" => return not_here("runc has no configuration file"),
            "brig" => {}
            _ => {
                return not_here(
                    "containerd cannot give a handler with sandboxer = \"shim\" options",
                );
            }
        }
        const TABLE: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.brig";
        let files = Directory::new("handler")?;
        let scale = clock::scale().clamp(0.1, 100.0);
        let main = files.file("own.toml", &format!("{text}time_scale = {scale:.1}\n"))?;
        files.directory("own.d")?;
        for (name, text) in drop_ins {
            files.file(&format!("own.d/{name}"), text)?;
        }
        let handler = format!(
            "{TABLE}-own]\nruntime_type = \"io.containerd.brig.v2\"\n{TABLE}-own.options]\nConfigPath = \"{}\"\n",
            main.display()
        );
        let table = format!("{TABLE}]");
        let configured = Configured::lines(&suite.cri, |line| match line.trim() == table {
            true => format!("{handler}{line}"),
            false => line.to_owned(),
        })?;
        Ok(Self {
            _configured: configured,
            _files: files,
            file: main,
        })
    }

    /// Its file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Puts another text into its file, of which containerd need not know.
    ///
    /// # Errors
    /// The node's.
    pub fn write(&self, text: &str) -> Result<()> {
        fs::write(&self.file, text).context("the handler's file")
    }

    /// Takes its file away.
    ///
    /// # Errors
    /// The node's.
    pub fn remove(&self) -> Result<()> {
        fs::remove_file(&self.file).context("the handler's file")
    }
}

/// `ConfigPath` in the options of a handler, as for other runtimes of this kind.
fn config_path(suite: &mut Suite) -> Result<()> {
    let drop_ins = [("10-cpus.toml", "vcpus = 2\n")];
    let _own = Own::new(suite, "memory = \"192MiB\"\n", &drop_ins)?;
    let pod = PodSpec::new(Own::HANDLER, "own-configuration").run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    equal("CPUs, by the drop-in", "2", container.sh("nproc")?)?;
    // An interface has a queue for each of them, both ways.
    for kind in ["rx", "tx"] {
        let count = format!("ls -d /sys/class/net/eth0/queues/{kind}-* | wc -l");
        equal(&format!("{kind} queues"), "2", container.sh(&count)?)?;
    }
    let total: u64 = container
        .sh("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()
        .context("MemTotal")?;
    that(
        &format!("{total} KiB are of 192 MiB"),
        (100 << 10..192 << 10).contains(&total),
    )
}
