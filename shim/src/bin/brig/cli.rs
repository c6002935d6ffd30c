//! The command line of `brig`: the one source of its parsing, help, completion and man pages.

pub mod direct_volume;
mod output;

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser as Word;
use clap::{Args, Parser, Subcommand};

use direct_volume::DirectVolumeCommand;
pub use output::Output;

/// What pods in Brig's VMs do on this node, what they cost, and what the node lacks.
#[derive(Debug, Parser)]
#[command(
    name = "brig",
    version,
    disable_help_subcommand = true,
    after_help = "Exit status: 0; 1 if 'brig check' has found that this node lacks something; 2 for what could not be done, with the reason on standard error."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// What a VM needs of this node, and what is missing
    Check {
        /// The configuration of a runtime handler instead of the default one
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// What KVM costs here too: makes VMs, and starts one up to its agent
        #[arg(long)]
        bench: bool,
        #[command(flatten)]
        output: Output,
    },
    /// The pods of this node, their processes and what they hold of its memory
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        output: Output,
    },
    /// The pods of this node with what they really use: memory as the node and as the guest counts it, CPU, devices
    Ps {
        #[command(flatten)]
        output: Output,
    },
    /// The same, again and again, the busiest first; once where there is no terminal
    Top {
        /// Once, as 'brig ps'
        #[arg(long)]
        once: bool,
        /// Seconds between two looks, each of which wakes every guest
        #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u16).range(1..))]
        interval: u16,
        #[command(flatten)]
        output: Output,
    },
    /// All of one pod: configuration in force and where each value is from, containers, mounts, network, devices, versions
    Inspect {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        output: Output,
    },
    /// The log of a pod's shim, with what its VMM, agent and guest kernel said
    Logs {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        how: Lines,
    },
    /// What the guest's console said (for handlers with debug = true)
    Console {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        how: Lines,
    },
    /// Change how much a living pod's shim logs
    Level {
        #[command(flatten)]
        pod: Pod,
        /// What is logged, and what is worse
        #[arg(value_parser = ["error", "warning", "info", "debug"])]
        level: String,
        #[command(flatten)]
        output: Output,
    },
    /// The log of the guest's kernel
    Dmesg {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        output: Output,
    },
    /// Look into the guest, outside its containers (for handlers with debug = true)
    ///
    /// The guest has no shell and no program but its agent, which knows: cat FILE..., ls [DIRECTORY], ps, mounts, ip,
    /// free, dmesg.
    Exec {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        output: Output,
        /// What to look at, after --
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// A support bundle of a pod without secrets: also of one that failed and is gone
    Dump {
        #[command(flatten)]
        pod: Pod,
        /// Where to; - is standard output
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Say what was written as JSON
        #[arg(long)]
        json: bool,
    },
    /// How a pod's start spent its time, and its VM exits by reason
    Timeline {
        /// containerd's namespace, where the id is in several
        #[arg(short, long, value_name = "NAME", value_parser = Word::new())]
        namespace: Option<String>,
        /// As for 'brig inspect'
        #[arg(required_unless_present = "follow", value_parser = Word::new())]
        id: Option<String>,
        /// Wait for the next pod that starts, and show its start once it has a container that runs
        #[arg(short, long, conflicts_with_all = ["id", "compare"])]
        follow: bool,
        #[command(flatten)]
        output: Output,
        /// Draw it into a file; - is standard output
        #[arg(long, value_name = "FILE", conflicts_with = "json")]
        svg: Option<PathBuf>,
        /// Beside that of another pod, step by step
        #[arg(long, value_name = "ID", conflicts_with = "svg", value_parser = Word::new())]
        compare: Option<String>,
    },
    /// The guest's kernel under gdb (for handlers with debug = true)
    ///
    /// The guest stands still when gdb comes, runs when it continues, and goes on when it leaves. CPUs are threads;
    /// registers and memory are read, not written; up to four breakpoints, and steps.
    Debug {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        how: DebugHow,
        #[command(flatten)]
        output: Output,
    },
    /// Boot marks and VM exits of a running pod, as JSON
    Counters {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        output: Output,
    },
    /// What all pods use and how they started, in the OpenMetrics text format: once, or for each scrape
    Metrics {
        /// Serve them to Prometheus at http://ADDRESS/metrics instead, or on the socket that systemd gives
        #[arg(long, value_name = "ADDRESS", num_args = 0..=1, conflicts_with = "json")]
        listen: Option<Option<String>>,
        #[command(flatten)]
        output: Output,
    },
    /// The configuration: whether it is right, what is in force, what there is to set
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The captured guests from which pods of a handler with template = true go on
    #[command(subcommand)]
    Template(TemplateCommand),
    /// The volumes whose devices a storage driver hands over instead of mounting them (Kata's direct volumes)
    #[command(subcommand)]
    DirectVolume(DirectVolumeCommand),
    /// The runtime handlers brig, brig-debug and brig-gpu in containerd's configuration
    #[command(subcommand)]
    Containerd(ContainerdCommand),
    /// The installed versions, the one that new pods get, and how many pods run each
    Versions {
        #[command(flatten)]
        output: Output,
    },
    /// Give another installed version to the pods that start from now on
    Use {
        /// As 'brig versions' has it
        #[arg(value_parser = Word::new())]
        version: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove an installed version that no pod uses
    Remove {
        /// As 'brig versions' has it
        #[arg(value_parser = Word::new())]
        version: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove all of Brig from this node, if no pod runs
    Uninstall {
        /// Its configuration in /etc/brig too
        #[arg(long)]
        purge: bool,
        /// Where ./install put its links
        #[arg(long, value_name = "DIR", default_value = "/usr/local")]
        links: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// A script that completes brig's command line, for a shell to read
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// brig's man pages
    Man {
        /// Where to write them
        #[arg(value_name = "DIR")]
        into: PathBuf,
    },
    /// Brig's version
    Version {
        #[command(flatten)]
        output: Output,
    },
}

/// What can be asked of the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Whether a VM would start with it; says which file and key is wrong
    Check {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        output: Output,
    },
    /// Every key with the value in force, and the file that has it from
    Show {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        output: Output,
    },
    /// A configuration file that sets nothing and explains every key; as JSON every key with its default
    Default {
        #[command(flatten)]
        output: Output,
    },
    /// The JSON schema of a configuration file
    Schema {
        #[command(flatten)]
        output: Output,
    },
    /// The reference in docs/configuration.md
    #[command(hide = true)]
    Reference,
}

/// What can be done about templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Those of this node, and the kinds of which none can be made
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Make that of a configuration now, instead of when its first pod has started
    Build {
        /// The configuration of a runtime handler instead of the default one
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// Drop one, or all: the next pod boots. Pods that go on from it keep what they have
    Drop {
        /// The beginning of what 'brig template list' calls it
        #[arg(value_name = "TEMPLATE", value_parser = Word::new())]
        key: Option<String>,
        #[command(flatten)]
        output: Output,
    },
}

/// What can be done about containerd's configuration.
#[derive(Debug, Subcommand)]
pub enum ContainerdCommand {
    /// Put the handlers there: in a file of their own where containerd merges those it imports (from 2.0 on), else in a
    /// marked block of its configuration. Says whether containerd must be restarted
    Add {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// Take them away again; the file is as it was before
    Remove {
        #[command(flatten)]
        place: Place,
        /// Not while another installation of Brig is on this node, whose handlers they are too
        #[arg(long)]
        unless_others: bool,
        #[command(flatten)]
        output: Output,
    },
    /// The handlers as they are written for the version that the configuration has
    Print {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
}

/// Where containerd's configuration is.
#[derive(Debug, Args)]
pub struct Place {
    /// containerd's configuration
    #[arg(long, value_name = "FILE", default_value = crate::handlers::CONTAINERD)]
    pub config: PathBuf,
}

/// Which configuration.
#[derive(Debug, Args)]
pub struct Source {
    /// The file that a runtime handler names with ConfigPath, instead of /etc/brig/config.toml
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// What instead of gdb.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct DebugHow {
    /// Write its memory and registers to a core file, which must not be there yet. It has whatever the pod's programs
    /// had in memory, secrets too
    #[arg(long, value_name = "FILE")]
    pub dump_memory: Option<PathBuf>,
    /// Say where the symbols of its kernel are, for gdb
    #[arg(long)]
    pub symbols: bool,
    /// Speak gdb's protocol on standard input and output, for its 'target remote | ssh NODE brig debug ID --gdb'
    #[arg(long)]
    pub gdb: bool,
}

/// Which lines.
#[derive(Debug, Args)]
pub struct Lines {
    /// And those that come, until the pod ends
    #[arg(short, long)]
    pub follow: bool,
    #[command(flatten)]
    pub output: Output,
}

/// A pod.
#[derive(Debug, Args)]
pub struct Pod {
    /// containerd's namespace, where the id is in several
    #[arg(short, long, value_name = "NAME", value_parser = Word::new())]
    pub namespace: Option<String>,
    /// The beginning of its id or of that of one of its containers, or its name in Kubernetes (web-0 or shop/web-0)
    #[arg(value_parser = Word::new())]
    pub id: String,
}
