//! Which answer to `start` a containerd accepts.
//!
//! | containerd | standard input of `start` | answer it accepts |
//! |---|---|---|
//! | 1.6 | Any(options) or nothing | bare address |
//! | 1.7 | the same | bare address, JSON of version 2 or less |
//! | 2.0 to 2.2 | the same | bare address, JSON of version 3 or less |
//! | 2.3 and later | BootstrapParams | protobuf, JSON, bare address |
//!
//! A bare address works everywhere and means version 2, whose Task service Brig serves too. It is enough for
//! the Sandbox API and for `io_type = "streaming"`: both go by the address alone. So only a containerd that
//! sent BootstrapParams is answered in kind, with version 3.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use super::root_mounts;

/// What `start` read from its standard input.
#[derive(Debug, PartialEq)]
pub enum Input {
    /// containerd 2.3 and later.
    Params(Box<BootstrapParams>),
    /// Any earlier one: runtime options, or nothing.
    Legacy,
}

/// Tells the generations apart: an older daemon's Any may happen to parse as BootstrapParams, but
/// then id and namespace are not those of the command line.
#[must_use]
pub fn classify(stdin: &[u8], namespace: &str, id: &str) -> Input {
    match BootstrapParams::parse_from_bytes(stdin) {
        Ok(params) if params.instance_id == id && params.namespace == namespace => {
            Input::Params(Box::new(params))
        }
        _ => Input::Legacy,
    }
}

/// The bytes to print for a server at this address.
///
/// # Errors
/// None in practice: protobuf cannot encode.
pub fn encode(input: &Input, address: &str) -> Result<Vec<u8>, protobuf::Error> {
    match input {
        Input::Legacy => Ok(address.as_bytes().to_vec()),
        Input::Params(_) => {
            let mut result = BootstrapResult {
                version: containerd_shim_protos::TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            root_mounts::claim(&mut result)?;
            result.write_to_bytes()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::well_known_types::any::Any;

    const ADDRESS: &str = "unix:///run/containerd/s/abc";

    fn params(id: &str, namespace: &str) -> Vec<u8> {
        BootstrapParams {
            instance_id: id.into(),
            namespace: namespace.into(),
            containerd_version: "2.3.2".into(),
            ..BootstrapParams::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    #[test]
    fn each_containerd_gets_an_answer_it_accepts() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1, 2, 3],
            ..Any::default()
        }
        .write_to_bytes()
        .unwrap();
        // (containerd, standard input, protobuf expected)
        for (containerd, stdin, protobuf) in [
            ("1.6", Vec::new(), false),
            ("1.6 with options", options.clone(), false),
            ("1.7", Vec::new(), false),
            ("2.0", options, false),
            ("2.1", Vec::new(), false),
            ("2.2 with garbage", vec![0xff; 9], false),
            ("2.3", params("c1", "default"), true),
            ("2.4", params("c1", "default"), true),
            (
                "params of another container",
                params("c2", "default"),
                false,
            ),
            ("params of another namespace", params("c1", "k8s.io"), false),
        ] {
            let input = classify(&stdin, "default", "c1");
            let answer = encode(&input, ADDRESS).unwrap();
            if protobuf {
                let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
                assert_eq!(result.version, 3, "{containerd}");
                assert_eq!(result.protocol, "ttrpc", "{containerd}");
                assert_eq!(result.address, ADDRESS, "{containerd}");
            } else {
                assert_eq!(answer, ADDRESS.as_bytes(), "{containerd}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_standard_input_is_classified(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = classify(&bytes, "default", "c1");
        }
    }
}
