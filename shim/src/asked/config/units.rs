//! Values with units: sizes in bytes and times.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// What a size may look like, for a sentence.
pub(super) const SIZES: &str = "a size is a number of MiB or text such as \"256MiB\" or \"1GiB\"";
/// What a time may look like, for a sentence.
pub(super) const TIMES: &str =
    "a time is a number of seconds or text such as \"500ms\", \"10s\" or \"2m\"";

/// A number in front of its unit.
fn split(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit())?;
    Some((text[..end].parse().ok()?, text[end..].trim()))
}

/// Bytes of a size with its unit.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let unit = match unit {
        "K" | "KiB" => 1024,
        "M" | "MiB" => MIB,
        "G" | "GiB" => 1024 * MIB,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// A time with its unit.
fn parse_time(text: &str) -> Option<Duration> {
    let (number, unit) = split(text)?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}

/// A size as it is written in a configuration.
pub(super) fn show_size(bytes: u64) -> String {
    let units = [(1024 * MIB, "GiB"), (MIB, "MiB"), (1024, "KiB")];
    let whole = units.iter().find(|(unit, _)| bytes.is_multiple_of(*unit));
    whole.map_or_else(
        || format!("{bytes} bytes"),
        |(unit, name)| format!("{}{name}", bytes / unit),
    )
}

/// A time as it is written in a configuration.
pub(super) fn show_time(time: Duration) -> String {
    match time.as_millis() {
        whole if whole.is_multiple_of(1000) => format!("{}s", whole / 1000),
        milliseconds => format!("{milliseconds}ms"),
    }
}

/// A number, or text with a unit.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
    Other(de::IgnoredAny),
}

fn read<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    number: impl Fn(u64) -> Option<T>,
    text: impl Fn(&str) -> Option<T>,
    expected: impl fmt::Display,
) -> Result<Option<T>, D::Error> {
    let value = match Written::deserialize(deserializer)? {
        Written::Number(value) => number(value),
        Written::Text(value) => text(&value),
        Written::Other(_) => None,
    };
    value.map(Some).ok_or_else(|| de::Error::custom(expected))
}

/// Reads a size in bytes; a bare number is of MiB.
pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    read(deserializer, |mib| mib.checked_mul(MIB), parse_size, SIZES)
}

/// Reads a time; a bare number is of seconds.
pub(super) fn time<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    let seconds = |number| Some(Duration::from_secs(number));
    read(deserializer, seconds, parse_time, TIMES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_read_as_the_same() {
        for bytes in [64 * MIB, 3 * 1024 * MIB, 1024, 5 * 1024] {
            assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }
        for time in [0, 10, 500, 1000, 90_000].map(Duration::from_millis) {
            assert_eq!(parse_time(&show_time(time)), Some(time));
        }
    }

    #[test]
    fn what_has_no_unit_or_a_strange_one_is_none() {
        for text in [
            "",
            "5",
            "MiB",
            "5TB",
            "-1MiB",
            "1.5GiB",
            "99999999999999999999GiB",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
        for text in ["", "5", "s", "5h", "-1s", "18446744073709551615m"] {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }
}
