//! What containerd leaves to the shim of a root file system's mounts: transforms and types that its mount manager would make on the
//! node, and a guest makes for itself.
//!
//! | containerd | asks |
//! |---|---|
//! | 2.2, 2.3 | an annotation of `-info`: `TRANSFORM/*` and types, with commas |
//! | 2.4 and later | `containerd.types.MountCapabilities`, an extension of BootstrapResult; without one the annotation, with a warning |

use containerd_shim_protos::bootstrap_api::{BootstrapResult, Extension};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedOutputStream, Message as _};

/// The annotation's name.
pub const ANNOTATION: &str = "containerd.io/runtime-allow-mounts";
/// `{{ mount 0 }}` in a place, and directories to be made first. A claim holds for the end of a chain only, so both are claimed.
const TRANSFORMS: [&str; 2] = ["format", "mkdir"];
/// Base types.
const TYPES: [&str; 1] = ["erofs"];
/// `containerd.types.MountCapabilities`.
const CAPABILITIES: &str = "containerd.types.MountCapabilities";
/// `BootstrapResult.extensions`, which the crate of the messages does not know yet.
const EXTENSIONS: u32 = 6;

/// The annotation's value.
#[must_use]
pub fn annotation() -> String {
    let transforms = TRANSFORMS.iter().map(|name| format!("{name}/*"));
    let types = TYPES.iter().map(ToString::to_string);
    transforms.chain(types).collect::<Vec<_>>().join(",")
}

/// Says the same in an answer to `start`. A containerd that does not know it passes over it.
///
/// # Errors
/// None in practice: protobuf cannot encode.
pub fn claim(result: &mut BootstrapResult) -> protobuf::Result<()> {
    let mut value = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut value);
    for name in TYPES {
        stream.write_string(1, name)?;
    }
    for name in TRANSFORMS {
        stream.write_string(2, name)?;
    }
    stream.flush()?;
    drop(stream);
    let capabilities = Any {
        type_url: CAPABILITIES.to_owned(),
        value,
        ..Any::default()
    };
    let extension = Extension {
        value: Some(capabilities).into(),
        ..Extension::default()
    };
    let fields = result.special_fields.mut_unknown_fields();
    fields.add_length_delimited(EXTENSIONS, extension.write_to_bytes()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::UnknownValueRef;

    #[test]
    fn both_ways_say_the_same() {
        assert_eq!(annotation(), "format/*,mkdir/*,erofs");
        let mut result = BootstrapResult::default();
        claim(&mut result).unwrap();
        let result = BootstrapResult::parse_from_bytes(&result.write_to_bytes().unwrap()).unwrap();
        let Some(UnknownValueRef::LengthDelimited(bytes)) =
            result.special_fields.unknown_fields().get(6)
        else {
            panic!("no extension");
        };
        let value = Extension::parse_from_bytes(bytes).unwrap().value.unwrap();
        assert_eq!(value.type_url, "containerd.types.MountCapabilities");
        assert_eq!(value.value, b"\x0a\x05erofs\x12\x06format\x12\x05mkdir");
    }
}
