//! The options a runtime handler gives: `runtimeoptions.v1.Options`, of which `ConfigPath` counts.
//!
//! The message is not among the generated ones, so its one field of interest is read from the wire.

use std::path::PathBuf;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message, rt::WireType};

use super::reply::Input;
use crate::error::{Error, Result};

/// `config_path` of runtimeoptions.v1.Options.
const CONFIG_PATH_FIELD: u32 = 2;

/// The configuration file that the handler's options name, if any.
///
/// # Errors
/// `InvalidArgument` for options that are of this type but not readable.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options else {
        return Ok(None);
    };
    if options.type_url.rsplit('/').next() != Some("runtimeoptions.v1.Options") {
        return Ok(None);
    }
    let path = read_field(&options.value)
        .map_err(|error| Error::invalid(format!("the runtime handler's options: {error}")))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// The configuration file that the options given to `start` name, if any: they are an extension of
/// BootstrapParams, or before those all of standard input.
///
/// # Errors
/// As [`config_path`], and `InvalidArgument` for a standard input that is neither.
pub fn of_start(stdin: &[u8], input: &Input) -> Result<Option<PathBuf>> {
    match input {
        Input::Legacy => config_path(read_any(stdin)?.as_ref()),
        Input::Params(params) => {
            for extension in &params.extensions {
                if let Some(path) = config_path(extension.value.as_ref())? {
                    return Ok(Some(path));
                }
            }
            Ok(None)
        }
    }
}

/// The options on a standard input; none when it is empty.
///
/// # Errors
/// `InvalidArgument` for bytes that are no `google.protobuf.Any`.
pub fn read_any(stdin: &[u8]) -> Result<Option<Any>> {
    if stdin.is_empty() {
        return Ok(None);
    }
    Any::parse_from_bytes(stdin).map(Some).map_err(|error| {
        Error::invalid(format!(
            "standard input is neither BootstrapParams of this container nor runtime options: {error}"
        ))
    })
}

fn read_field(bytes: &[u8]) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let wire = match tag & 7 {
            0 => WireType::Varint,
            1 => WireType::Fixed64,
            2 => WireType::LengthDelimited,
            3 => WireType::StartGroup,
            4 => WireType::EndGroup,
            _ => WireType::Fixed32,
        };
        if tag >> 3 == CONFIG_PATH_FIELD && wire == WireType::LengthDelimited {
            found = Some(input.read_string()?);
        } else {
            input.skip_field(wire)?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(value: Vec<u8>) -> Any {
        Any {
            type_url: "types.containerd.io/runtimeoptions.v1.Options".into(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn the_path_is_found_among_the_other_fields() {
        let value = [&[0x0a, 1, b'x', 0x12, 5][..], b"/a/bc", &[0x1a, 2, 0, 1]].concat();
        assert_eq!(
            config_path(Some(&options(value))).unwrap(),
            Some("/a/bc".into())
        );
    }

    #[test]
    fn no_options_an_empty_path_and_other_types_mean_the_default() {
        assert_eq!(config_path(None).unwrap(), None);
        assert_eq!(config_path(Some(&options(vec![0x12, 0]))).unwrap(), None);
        let mut other = options(vec![0x12, 1, b'/']);
        other.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(config_path(Some(&other)).unwrap(), None);
    }

    #[test]
    fn the_path_is_found_in_what_each_generation_gives_to_start() {
        use containerd_shim_protos::bootstrap_api::{BootstrapParams, Extension};
        let any = options(b"\x12\x02/c".to_vec());
        let stdin = any.write_to_bytes().unwrap();
        let expected = Some(PathBuf::from("/c"));
        assert_eq!(of_start(&stdin, &Input::Legacy).unwrap(), expected);
        let extension = |value: Any| Extension {
            value: Some(value).into(),
            ..Extension::default()
        };
        let params = BootstrapParams {
            extensions: vec![extension(Any::default()), extension(any)],
            ..BootstrapParams::default()
        };
        let params = Input::Params(Box::new(params));
        assert_eq!(of_start(&[], &params).unwrap(), expected);
        assert_eq!(of_start(&[], &Input::Legacy).unwrap(), None);
    }

    #[test]
    fn what_no_containerd_sends_is_refused() {
        for garbage in [&b"\xff\xff"[..], b"{\"version\":3}", b"\x0a\x7fshort"] {
            let error = of_start(garbage, &Input::Legacy).unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::InvalidArgument);
            assert!(
                error.message.contains("standard input"),
                "{}",
                error.message
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = config_path(Some(&options(value.clone())));
            let _ = of_start(&value, &Input::Legacy);
        }
    }
}
