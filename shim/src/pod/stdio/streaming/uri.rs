//! The URI by which containerd names a stream of its `io_type = "streaming"`:
//! `ttrpc+unix:///run/containerd/s/HASH?streaming_id=ID`. Pure; what it reads is containerd's, and checked.

use super::super::percent::decode;
use crate::error::{Error, Result};

/// The scheme of these URIs.
pub const SCHEME: &str = "ttrpc+unix";
/// The longest stream id, in bytes: an id of containerd's (at most 76) and which stream it is.
pub const MAX_ID: usize = 256;

/// The stream's id.
///
/// # Errors
/// `InvalidArgument` where it is not such a URI.
pub fn stream_id(uri: &str) -> Result<String> {
    let wrong = |what: &str| {
        Error::invalid(format!(
            "the stdio URI {uri:?} {what}; expected {SCHEME}:///SOCKET?streaming_id=ID"
        ))
    };
    let (scheme, rest) = uri
        .split_once("://")
        .ok_or_else(|| wrong("has no scheme"))?;
    if scheme != SCHEME {
        return Err(wrong("has another scheme"));
    }
    let (path, query) = rest
        .split_once('?')
        .ok_or_else(|| wrong("has no streaming_id"))?;
    if !path.starts_with('/') {
        return Err(wrong("names no socket by its full path"));
    }
    let value = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("streaming_id="))
        .ok_or_else(|| wrong("has no streaming_id"))?;
    // As containerd decodes it before it sends it as the stream's id.
    let id =
        decode(value, true).ok_or_else(|| wrong("has a streaming_id that is not encoded right"))?;
    if id.is_empty() || id.len() > MAX_ID {
        return Err(wrong("has a streaming_id that is empty or too long"));
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use proptest::prelude::*;

    #[test]
    fn the_id_is_read_as_containerd_writes_it() {
        for (uri, id) in [
            (
                "ttrpc+unix:///run/containerd/s/ab?streaming_id=c1-stdout",
                "c1-stdout",
            ),
            ("ttrpc+unix:///s?other=1&streaming_id=a%2Db+c", "a-b c"),
        ] {
            assert_eq!(stream_id(uri).unwrap(), id);
        }
    }

    #[test]
    fn what_names_no_stream_is_refused_by_name() {
        for uri in [
            "",
            "/run/fifo",
            "grpc+vsock://3:1024?streaming_id=c",
            "ttrpc+unix:///run/s",
            "ttrpc+unix://run?streaming_id=c",
            "ttrpc+unix:///run/s?streaming_id=",
            "ttrpc+unix:///run/s?streaming_id=%4",
            "ttrpc+unix:///run/s?streaming_id=%ff",
            "ttrpc+unix:///run/s?id=c",
        ] {
            let error = stream_id(uri).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument, "{uri}");
        }
        let long = format!(
            "ttrpc+unix:///s?streaming_id={}",
            "x".repeat(MAX_ID.saturating_add(1))
        );
        assert!(stream_id(&long).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(uri in ".{0,200}") {
            let _ = stream_id(&uri);
        }

        #[test]
        fn any_query_gives_an_id_within_bounds(query in ".{0,600}") {
            if let Ok(id) = stream_id(&format!("ttrpc+unix:///s?{query}")) {
                prop_assert!(!id.is_empty() && id.len() <= MAX_ID);
            }
        }

        #[test]
        fn plain_ids_come_back(id in "[a-zA-Z0-9_.-]{1,76}") {
            let uri = format!("ttrpc+unix:///run/containerd/s/ab?streaming_id={id}-stdin");
            prop_assert_eq!(stream_id(&uri).unwrap(), format!("{id}-stdin"));
        }
    }
}
