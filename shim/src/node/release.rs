//! Which release of containerd serves a socket: it is asked there, because the program in some PATH may be another one.

use std::path::Path;
use std::time::Duration;

use super::grpc::{self, GrpcError};
use crate::asked::wire::{Value, each_field, text};

/// The method, which takes nothing.
const VERSION: &str = "/containerd.services.version.v1.Version/Version";
/// Bytes of an answer: two words.
const MAX_ANSWER: usize = 4096;

/// A release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// As containerd says it, without a `v` before it: `1.7.24~ds1`.
    pub name: String,
    /// Its first two numbers.
    pub number: (u32, u32),
}

impl Release {
    /// That of the containerd that serves `socket`.
    ///
    /// # Errors
    /// [`GrpcError`], also for what is no release.
    pub async fn of(socket: &Path, patience: Duration) -> Result<Self, GrpcError> {
        let answer = grpc::call(socket, VERSION, &[], MAX_ANSWER, patience).await?;
        let wrong = |error: String| GrpcError::Answer(error);
        let mut said = String::new();
        each_field(&answer, |number, value| {
            if let (1, Value::Bytes(bytes)) = (number, value) {
                said = text(bytes)?;
            }
            Ok(())
        })
        .map_err(|error| wrong(error.to_string()))?;
        Self::parse(&said).ok_or_else(|| wrong(format!("{said:?} is no release")))
    }

    fn parse(said: &str) -> Option<Self> {
        let name = said.trim().trim_start_matches('v');
        let mut numbers = name.splitn(3, '.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?;
        let end = minor.find(|letter: char| !letter.is_ascii_digit());
        let minor = minor.get(..end.unwrap_or(minor.len()))?.parse().ok()?;
        Some(Self {
            name: name.to_owned(),
            number: (major, minor),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::grpc::testing::server;
    use super::*;

    #[test]
    fn releases_are_read_as_packages_and_forks_name_them() {
        for (said, name, number) in [
            ("1.6.20~ds1", "1.6.20~ds1", (1, 6)),
            ("v2.1.4", "2.1.4", (2, 1)),
            ("v2.0.0-rc.1", "2.0.0-rc.1", (2, 0)),
            ("v1.7.27-k3s1", "1.7.27-k3s1", (1, 7)),
            ("2.4+unknown", "2.4+unknown", (2, 4)),
        ] {
            let release = Release::parse(said).unwrap();
            assert_eq!((release.name.as_str(), release.number), (name, number));
        }
        for said in ["", "unknown", "v2", "2.", "1.x"] {
            assert_eq!(Release::parse(said), None, "{said}");
        }
    }

    #[tokio::test]
    async fn containerd_says_it_on_its_socket() {
        let root = tempfile::tempdir().unwrap();
        let wait = Duration::from_secs(20);
        let socket = root.path().join("c.sock");
        let answer = b"\x0a\x06v2.1.4\x12\x03abc".to_vec();
        server(&socket, VERSION, Vec::new(), answer, "0");
        let release = Release::of(&socket, wait).await.unwrap();
        assert_eq!(release.number, (2, 1));
        let socket = root.path().join("other.sock");
        server(&socket, VERSION, Vec::new(), b"\x0a\x03dev".to_vec(), "0");
        let error = Release::of(&socket, wait).await.unwrap_err().to_string();
        assert!(error.contains("\"dev\" is no release"), "{error}");
    }
}
