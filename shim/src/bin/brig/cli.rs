//! The command line of `brig`: the one source of its parsing, help, completion and man pages.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// What pods in Brig's VMs do on this node, what they cost, and what the node lacks.
#[derive(Debug, Parser)]
#[command(name = "brig", version, disable_help_subcommand = true)]
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
        #[command(flatten)]
        output: Output,
    },
    /// The pods of this node, their processes and what they hold of its memory
    #[command(visible_aliases = ["ls", "ps"])]
    List {
        #[command(flatten)]
        output: Output,
    },
    /// How a pod's start spent its time, and its VM exits by reason
    Timeline {
        #[command(flatten)]
        pod: Pod,
        #[command(flatten)]
        output: Output,
        /// Draw it into a file
        #[arg(long, value_name = "FILE", conflicts_with = "json")]
        svg: Option<PathBuf>,
        /// Beside that of another pod, step by step
        #[arg(long, value_name = "ID", conflicts_with_all = ["json", "svg"])]
        compare: Option<String>,
    },
    /// Boot marks and VM exits of a running pod, as JSON
    Counters {
        #[command(flatten)]
        pod: Pod,
    },
    /// What all pods use and how they started, in the OpenMetrics text format, once
    Metrics,
    /// The configuration: whether it is right, what is in force, what there is to set
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The installed versions, the one that new pods get, and how many pods run each
    Versions {
        #[command(flatten)]
        output: Output,
    },
    /// Give another installed version to the pods that start from now on
    Use {
        /// As 'brig versions' has it
        version: String,
    },
    /// Remove an installed version that no pod uses
    Remove {
        /// As 'brig versions' has it
        version: String,
    },
    /// Remove all of Brig from this node, if no pod runs
    Uninstall {
        /// Its configuration in /etc/brig too
        #[arg(long)]
        purge: bool,
        /// Where ./install put its links
        #[arg(long, value_name = "DIR", default_value = "/usr/local")]
        links: PathBuf,
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
    Version,
}

/// What can be asked of the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Whether a VM would start with it; says which file and key is wrong
    Check {
        #[command(flatten)]
        source: Source,
    },
    /// Every key with the value in force, and the file that has it from
    Show {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        output: Output,
    },
    /// A configuration file that sets nothing and explains every key
    Default,
    /// The JSON schema of a configuration file
    Schema,
    /// The reference in docs/configuration.md
    #[command(hide = true)]
    Reference,
}

/// Which configuration.
#[derive(Debug, Args)]
pub struct Source {
    /// The file that a runtime handler names with ConfigPath, instead of /etc/brig/config.toml
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// How to answer.
#[derive(Debug, Args)]
pub struct Output {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// A pod.
#[derive(Debug, Args)]
pub struct Pod {
    /// containerd's namespace, where the id is in several
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// The pod's id (that of its sandbox), or the beginning of it
    pub id: String,
}
