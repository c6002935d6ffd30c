//! What tells one containerd from another for a shim: how `start` is asked and which answers are understood.
//!
//! After containerd's sources, of each release's `core/runtime/v2` (`runtime/v2` in 1.x).

use anyhow::{Context, Result, bail};
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use protobuf::Message as _;
use serde_json::{Value, json};

/// A release of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    /// Takes a bare address alone.
    V1_6,
    /// Takes JSON of version 2 too, and fails on 3.
    V1_7,
    /// Takes JSON of version 3 too.
    V2_1,
    /// As 2.1, and `binary-v2` logs.
    V2_2,
    /// Sends BootstrapParams, takes BootstrapResult.
    V2_3,
    /// As 2.3; Shutdown follows each Delete, a failed one fails the Delete.
    V2_4,
}

/// Where a shim serves, as its answer to `start` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// 2: a `start` and a `delete` for each container. 3: none for containers of a sandbox.
    pub version: i64,
    /// "ttrpc" or "grpc".
    pub protocol: String,
    /// "unix:///path".
    pub address: String,
}

impl Generation {
    /// All, oldest first.
    pub const ALL: [Self; 6] = [
        Self::V1_6,
        Self::V1_7,
        Self::V2_1,
        Self::V2_2,
        Self::V2_3,
        Self::V2_4,
    ];

    /// Its release.
    #[must_use]
    pub fn release(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6.39",
            Self::V1_7 => "1.7.28",
            Self::V2_1 => "2.1.9",
            Self::V2_2 => "2.2.7",
            Self::V2_3 => "2.3.3",
            Self::V2_4 => "2.4.0",
        }
    }

    /// Whether `start` reads BootstrapParams.
    #[must_use]
    pub fn sends_params(self) -> bool {
        self >= Self::V2_3
    }

    /// Reads what `start` printed to stdout and stderr together, as this release does.
    ///
    /// # Errors
    /// If this release would refuse it.
    pub fn read_answer(self, printed: &[u8]) -> Result<Endpoint> {
        if self.sends_params()
            && let Ok(result) = BootstrapResult::parse_from_bytes(printed)
        {
            return Ok(Endpoint {
                version: result.version.into(),
                protocol: result.protocol,
                address: result.address,
            });
        }
        let text = std::str::from_utf8(printed)
            .with_context(|| format!("{self:?} cannot read the answer {printed:?}"))?
            .trim();
        let newest = match self {
            Self::V1_6 => return Ok(Endpoint::bare(text)),
            Self::V1_7 => 2,
            _ => 3,
        };
        let endpoint = serde_json::from_str(text)
            .ok()
            .and_then(|value| Endpoint::of_json(&value))
            .filter(|endpoint| endpoint.version >= 2)
            .unwrap_or_else(|| Endpoint::bare(text));
        if endpoint.version > newest {
            bail!("{self:?}: unsupported shim version {}", endpoint.version);
        }
        Ok(endpoint)
    }
}

impl Endpoint {
    fn bare(text: &str) -> Self {
        Self {
            version: 2,
            protocol: "ttrpc".to_owned(),
            address: text.to_owned(),
        }
    }

    fn of_json(value: &Value) -> Option<Self> {
        Some(Self {
            version: value["version"].as_i64()?,
            protocol: value["protocol"].as_str()?.to_owned(),
            address: value["address"].as_str()?.to_owned(),
        })
    }

    /// As containerd keeps it in the bundle.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({ "version": self.version, "protocol": self.protocol, "address": self.address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: &str = "unix:///run/containerd/s/abc";

    fn json_of(version: i64) -> Vec<u8> {
        let endpoint = Endpoint {
            version,
            ..Endpoint::bare(ADDRESS)
        };
        endpoint.json().to_string().into_bytes()
    }

    #[test]
    fn every_release_reads_a_bare_address() {
        for generation in Generation::ALL {
            let endpoint = generation.read_answer(ADDRESS.as_bytes()).unwrap();
            assert_eq!(endpoint, Endpoint::bare(ADDRESS), "{generation:?}");
        }
    }

    #[test]
    fn json_is_an_address_to_the_oldest_and_version_3_an_error_to_the_next() {
        let old = Generation::V1_6.read_answer(&json_of(2)).unwrap();
        assert!(old.address.starts_with('{'));
        assert!(Generation::V1_7.read_answer(&json_of(2)).is_ok());
        assert!(Generation::V1_7.read_answer(&json_of(3)).is_err());
        assert_eq!(
            Generation::V2_2.read_answer(&json_of(3)).unwrap().version,
            3
        );
    }

    #[test]
    fn protobuf_is_for_the_newest_alone_and_spoilt_by_what_else_is_printed() {
        let result = BootstrapResult {
            version: 3,
            address: ADDRESS.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        let bytes = result.write_to_bytes().unwrap();
        let endpoint = Generation::V2_4.read_answer(&bytes).unwrap();
        assert_eq!((endpoint.version, endpoint.address.as_str()), (3, ADDRESS));
        let spoilt = [&bytes[..], b"a warning\n"].concat();
        let endpoint = Generation::V2_4.read_answer(&spoilt).unwrap();
        assert_ne!(endpoint.address, ADDRESS);
        let endpoint = Generation::V2_2.read_answer(&bytes).unwrap();
        assert_ne!(endpoint.address, ADDRESS);
    }
}
