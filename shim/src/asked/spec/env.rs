//! Variables that a container has besides those of its specification.

use serde_json::Value;

use crate::error::{Error, Result};

/// The specification with these variables, `NAME=value` each, in the place of those of their names.
///
/// # Errors
/// `InvalidArgument` for a specification that is none.
pub fn with_env(spec: &[u8], env: &[String]) -> Result<Vec<u8>> {
    let invalid = |what: &str| Error::invalid(format!("config.json is not an OCI spec: {what}"));
    let mut spec: Value =
        serde_json::from_slice(spec).map_err(|error| invalid(&error.to_string()))?;
    let process = spec.get_mut("process").and_then(Value::as_object_mut);
    let process = process.ok_or_else(|| invalid("it has no process"))?;
    let list = process.entry("env").or_insert(Value::Null);
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    let list = list
        .as_array_mut()
        .ok_or_else(|| invalid("process.env is no list"))?;
    for variable in env {
        let name = variable.split('=').next().unwrap_or_default();
        let is_same = |old: &Value| {
            let old = old.as_str().and_then(|old| old.split('=').next());
            old == Some(name)
        };
        list.retain(|old| !is_same(old));
        list.push(variable.as_str().into());
    }
    serde_json::to_vec(&spec).map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_come_in_the_place_of_those_of_their_names_and_the_rest_stays() {
        let spec = br#"{"process":{"args":["a"],"env":["A=1","B=2","AB=3"]},"new":{"x":[1.5]}}"#;
        let env = ["A=9".to_owned(), "C=4".to_owned()];
        let said: Value = serde_json::from_slice(&with_env(spec, &env).unwrap()).unwrap();
        assert_eq!(
            said["process"]["env"],
            serde_json::json!(["B=2", "AB=3", "A=9", "C=4"])
        );
        assert_eq!(said["new"]["x"][0], 1.5);
        let said: Value =
            serde_json::from_slice(&with_env(br#"{"process":{}}"#, &env).unwrap()).unwrap();
        assert_eq!(said["process"]["env"][0], "A=9");
        for none in ["{}", "[]", r#"{"process":{"env":3}}"#] {
            assert!(with_env(none.as_bytes(), &env).is_err(), "{none}");
        }
    }
}
