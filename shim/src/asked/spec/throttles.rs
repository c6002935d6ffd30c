//! Limits of what a container reads from and writes to block devices of the node (runtime-spec config-linux.md,
//! "blockIO").
//!
//! Trusted: containerd, who wrote it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Of which of a device's operations, a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Throttled {
    /// Bytes that are read.
    ReadBytes,
    /// Bytes that are written.
    WrittenBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

/// A device's number and what of it is limited, to how much a second; 0 is without a limit.
pub type Throttles = BTreeMap<((u32, u32), Throttled), u64>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct BlockIo {
    throttle_read_bps_device: Option<Vec<Throttle>>,
    throttle_write_bps_device: Option<Vec<Throttle>>,
    #[serde(rename = "throttleReadIOPSDevice")]
    throttle_read_iops_device: Option<Vec<Throttle>>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    throttle_write_iops_device: Option<Vec<Throttle>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Throttle {
    major: i64,
    minor: i64,
    rate: u64,
}

impl BlockIo {
    /// All of them; of one that is named twice the last counts.
    pub(super) fn throttles(&self) -> Result<Throttles> {
        let mut all = Throttles::new();
        for (what, devices) in [
            (Throttled::ReadBytes, &self.throttle_read_bps_device),
            (Throttled::WrittenBytes, &self.throttle_write_bps_device),
            (Throttled::Reads, &self.throttle_read_iops_device),
            (Throttled::Writes, &self.throttle_write_iops_device),
        ] {
            for Throttle { major, minor, rate } in devices.iter().flatten() {
                let (Ok(one), Ok(other)) = (u32::try_from(*major), u32::try_from(*minor)) else {
                    return Err(Error::invalid(format!(
                        "linux.resources.blockIO: {major}:{minor} is no device's number"
                    )));
                };
                all.insert(((one, other), what), *rate);
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttles(text: &str) -> Result<Throttles> {
        serde_json::from_str::<BlockIo>(text).unwrap().throttles()
    }

    #[test]
    fn each_list_limits_something_else() {
        let all = throttles(
            r#"{"weight": 10, "weightDevice": null,
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}, {"major": 8, "minor": 0, "rate": 2}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 3}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 16, "rate": 4}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}]}"#,
        );
        let wanted = [
            (((8, 0), Throttled::ReadBytes), 2),
            (((8, 0), Throttled::WrittenBytes), 3),
            (((8, 16), Throttled::Reads), 4),
            (((8, 16), Throttled::Writes), 0),
        ];
        assert_eq!(all.unwrap(), Throttles::from(wanted));
        assert!(throttles("{}").unwrap().is_empty());
        let error = throttles(r#"{"throttleReadBpsDevice": [{"major": -1, "minor": 0}]}"#);
        assert!(error.unwrap_err().message.contains("-1:0"));
    }
}
