//! Fields of protobuf messages read from the wire, for messages that are not among the generated ones.
//!
//! The bytes are containerd's or kubelet's and bounded by who reads them; the strings in them are the users'.

use std::collections::BTreeMap;

use protobuf::{CodedInputStream, rt::WireType};

/// `runtime.v1.NamespaceMode`.
pub(crate) mod namespace_mode {
    pub(crate) const POD: u64 = 0;
    pub(crate) const CONTAINER: u64 = 1;
    pub(crate) const NODE: u64 = 2;
    pub(crate) const TARGET: u64 = 3;
}

/// A field's value, of the wire types that these messages use.
pub(crate) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls `each` for every field; those of other wire types are left out.
pub(crate) fn each_field(
    bytes: &[u8],
    mut each: impl FnMut(u32, Value<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let number = tag >> 3;
        match tag & 7 {
            0 => each(number, Value::Number(input.read_uint64()?))?,
            2 => each(number, Value::Bytes(&input.read_bytes()?))?,
            1 => input.skip_field(WireType::Fixed64)?,
            3 => input.skip_field(WireType::StartGroup)?,
            4 => input.skip_field(WireType::EndGroup)?,
            _ => input.skip_field(WireType::Fixed32)?,
        }
    }
    Ok(())
}

/// Puts an entry of a map of strings into `map`.
pub(crate) fn insert(map: &mut BTreeMap<String, String>, entry: &[u8]) -> protobuf::Result<()> {
    let (mut key, mut value) = (String::new(), String::new());
    each_field(entry, |number, field| {
        match (number, field) {
            (1, Value::Bytes(bytes)) => key = text(bytes)?,
            (2, Value::Bytes(bytes)) => value = text(bytes)?,
            _ => {}
        }
        Ok(())
    })?;
    map.insert(key, value);
    Ok(())
}

/// A `string` field.
pub(crate) fn text(bytes: &[u8]) -> protobuf::Result<String> {
    String::from_utf8(bytes.to_vec())
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error).into())
}

/// An `int64` field; negative ones mean that there is no limit.
pub(crate) fn positive(value: u64) -> u64 {
    if i64::try_from(value).is_ok() {
        value
    } else {
        0
    }
}

/// `google.protobuf`-like wrapper of an `int64`: field 1, 0 when it is left out.
pub(crate) fn wrapped(bytes: &[u8]) -> protobuf::Result<i64> {
    let mut wrapped = 0;
    each_field(bytes, |number, value| {
        if let (1, Value::Number(value)) = (number, value) {
            wrapped = value.cast_signed();
        }
        Ok(())
    })?;
    Ok(wrapped)
}

/// Adds what a `repeated int64` field brings, packed or not.
pub(crate) fn push_numbers(list: &mut Vec<i64>, value: &Value<'_>) -> protobuf::Result<()> {
    match value {
        Value::Number(value) => list.push(value.cast_signed()),
        Value::Bytes(packed) => {
            let mut input = CodedInputStream::from_bytes(packed);
            while !input.eof()? {
                list.push(input.read_int64()?);
            }
        }
    }
    Ok(())
}
