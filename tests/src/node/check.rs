//! Assertions that say what was expected and what was found.

use std::fmt::Debug;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

/// Fails unless `actual` is `expected`.
///
/// # Errors
/// Names both.
pub fn equal<E: Debug, A: Debug + PartialEq<E>>(what: &str, expected: E, actual: A) -> Result<()> {
    ensure!(
        actual == expected,
        "{what}: expected {expected:?}, got {actual:?}"
    );
    Ok(())
}

/// Fails unless the condition holds.
///
/// # Errors
/// Says `what` should have been.
pub fn that(what: &str, holds: bool) -> Result<()> {
    ensure!(holds, "{what}");
    Ok(())
}

/// Fails unless `text` contains `part`, in whatever case.
///
/// # Errors
/// Shows the text.
pub fn contains(what: &str, part: &str, text: &str) -> Result<()> {
    ensure!(
        text.to_lowercase().contains(&part.to_lowercase()),
        "{what}: expected something with '{part}', got '{}'",
        clip(text)
    );
    Ok(())
}

/// Fails unless `text` contains one of `parts`.
///
/// # Errors
/// Shows the text.
pub fn contains_one(what: &str, parts: &[&str], text: &str) -> Result<()> {
    let lower = text.to_lowercase();
    ensure!(
        parts
            .iter()
            .any(|part| lower.contains(&part.to_lowercase())),
        "{what}: expected something with one of {parts:?}, got '{}'",
        clip(text)
    );
    Ok(())
}

/// Fails unless the JSON at `pointer` is `expected`.
///
/// # Errors
/// Names the pointer and both values.
pub fn field(facts: &Value, pointer: &str, expected: impl Into<Value>) -> Result<()> {
    let expected = expected.into();
    match facts.pointer(pointer) {
        Some(actual) if *actual == expected => Ok(()),
        Some(actual) => bail!("{pointer}: expected {expected}, got {actual}"),
        None => bail!("{pointer}: expected {expected}, but it is missing"),
    }
}

/// At most 600 characters of a text, for a message.
#[must_use]
pub fn clip(text: &str) -> String {
    let text = text.trim();
    if text.chars().count() <= 600 {
        return text.to_owned();
    }
    let head: String = text.chars().take(600).collect();
    format!("{head}…")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_wrong_value_is_an_error_that_names_both() {
        let error = equal("exit status", 137, 0).unwrap_err().to_string();
        assert_eq!(error, "exit status: expected 137, got 0");
    }

    #[test]
    fn a_missing_field_is_not_taken_for_an_equal_one() {
        assert!(field(&json!({"a": 1}), "/b", Value::Null).is_err());
        assert!(field(&json!({"a": 1}), "/a", 1).is_ok());
    }
}
