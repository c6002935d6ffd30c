//! `brig direct-volume` on the command line: what `kata-ctl direct-volume` and `kata-runtime direct-volume` take, in either's
//! manner, and a volume without JSON.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser as Word;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::output::Output;

/// What can be done about direct volumes.
#[derive(Debug, Subcommand)]
pub enum DirectVolumeCommand {
    /// Hand a volume's device over: pods of a handler with direct_volumes = true mount it in their guest
    Add {
        #[command(flatten)]
        volume: VolumePath,
        #[command(flatten)]
        mount_info: MountInfo,
        #[command(flatten)]
        output: Output,
    },
    /// Forget a volume, if no pod has it mounted. One that is not there is no error
    Remove {
        #[command(flatten)]
        volume: VolumePath,
        #[command(flatten)]
        output: Output,
    },
    /// Those of this node, and the pods that have them mounted
    List {
        #[command(flatten)]
        output: Output,
    },
    /// How full a volume is, by the guest that has it mounted; as JSON in the form of CSI's NodeGetVolumeStats
    Stats {
        #[command(flatten)]
        volume: VolumePath,
        #[command(flatten)]
        output: Output,
    },
    /// Let a volume's file system have all of its device, now, after the device has grown
    Resize {
        #[command(flatten)]
        volume: VolumePath,
        #[command(flatten)]
        size: Size,
        #[command(flatten)]
        output: Output,
    },
}

/// A volume, by either argument.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct VolumePath {
    /// Where kubelet has it: the target path of NodePublishVolume
    #[arg(value_name = "VOLUME_PATH", value_parser = Word::new())]
    positional: Option<String>,
    /// The same
    #[arg(long = "volume-path", value_name = "VOLUME_PATH", value_parser = Word::new())]
    named: Option<String>,
}

impl VolumePath {
    /// As it was given.
    #[must_use]
    pub fn given(&self) -> &str {
        let given = self.positional.as_deref().or(self.named.as_deref());
        given.unwrap_or_default()
    }
}

/// What is on the device, in one of three ways.
#[derive(Debug, Args)]
pub struct MountInfo {
    /// As Kata's drivers write it: {"volume-type":"block","device":"/dev/sdf","fstype":"ext4","metadata":{},"options":[]}
    #[arg(value_name = "MOUNT_INFO", required_unless_present_any = ["info", "device"], conflicts_with_all = ["info", "device"])]
    positional_info: Option<String>,
    /// The same
    #[arg(
        id = "info",
        long = "mount-info",
        value_name = "MOUNT_INFO",
        conflicts_with = "device"
    )]
    named_info: Option<String>,
    /// Its block device, or an image in a file
    #[arg(id = "device", long, value_name = "DEVICE", requires = "fstype")]
    device: Option<PathBuf>,
    /// The file system that is on it
    #[arg(id = "fstype", long, value_name = "TYPE", requires = "device")]
    fstype: Option<String>,
    /// Mount options, as in fstab
    #[arg(
        short,
        long,
        value_name = "OPTION",
        value_delimiter = ',',
        requires = "device"
    )]
    options: Vec<String>,
    /// The group that it is given to
    #[arg(long, value_name = "GID", requires = "device")]
    fs_group: Option<u32>,
    /// When it is given to the group
    #[arg(long, value_name = "POLICY", requires = "fs_group")]
    fs_group_change_policy: Option<ChangePolicy>,
}

/// As of a pod's security context.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "verbatim")]
enum ChangePolicy {
    /// Each time
    Always,
    /// Unless its top is the group's already
    OnRootMismatch,
}

impl MountInfo {
    /// What is written down.
    #[must_use]
    pub fn text(&self) -> String {
        if let Some(given) = self.positional_info.as_ref().or(self.named_info.as_ref()) {
            return given.clone();
        }
        let mut metadata = Map::new();
        if let Some(group) = self.fs_group {
            metadata.insert("fsGroup".to_owned(), group.to_string().into());
        }
        if let Some(policy) = self.fs_group_change_policy {
            let policy = match policy {
                ChangePolicy::Always => "Always",
                ChangePolicy::OnRootMismatch => "OnRootMismatch",
            };
            metadata.insert("fsGroupChangePolicy".to_owned(), policy.into());
        }
        let device = self.device.as_ref();
        json!({
            "volume-type": "block",
            "device": device.map(|device| device.display().to_string()),
            "fstype": self.fstype,
            "metadata": Value::Object(metadata),
            "options": self.options,
        })
        .to_string()
    }
}

/// A number of bytes, by either argument.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct Size {
    /// The fewest bytes that the device has by now; without it whatever it has
    #[arg(value_name = "BYTES")]
    positional_size: Option<u64>,
    /// The same
    #[arg(long = "size", value_name = "BYTES")]
    named_size: Option<u64>,
}

impl Size {
    /// As it was given, or 0.
    #[must_use]
    pub fn least(&self) -> u64 {
        self.positional_size.or(self.named_size).unwrap_or(0)
    }
}
