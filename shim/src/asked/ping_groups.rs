//! `net.ipv4.ping_group_range` of a pod with a user namespace: the one kernel parameter of a pod that names ids.
//!
//! runc writes it as the namespace's root, to whom the kernel's numbers are the namespace's own. The guest's network is its
//! root's, so what is written there are the numbers outside.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

const KEYS: [&str; 2] = ["net.ipv4.ping_group_range", "net/ipv4/ping_group_range"];

/// Says of the groups outside what the pod says of its own. `outside` knows a group of the pod's outside.
///
/// # Errors
/// `InvalidArgument` for a group that the namespace does not have.
pub(super) fn translate(
    sysctls: &mut BTreeMap<String, String>,
    outside: impl Fn(u32) -> Option<u32>,
) -> Result<()> {
    for key in KEYS {
        let Some(value) = sysctls.get_mut(key) else {
            continue;
        };
        let words: Vec<_> = value.split_ascii_whitespace().map(str::parse).collect();
        // What is no range is the kernel's to refuse, and one that is empty is for nobody.
        let &[Ok(first), Ok(last)] = words.as_slice() else {
            continue;
        };
        if first > last {
            continue;
        }
        let group = |id| {
            outside(id).ok_or_else(|| {
                Error::invalid(format!(
                    "sysctl {key} = {value:?}: group {id} is not mapped in the pod's user namespace: use one below its size"
                ))
            })
        };
        let translated = format!("{} {}", group(first)?, group(last)?);
        *value = translated;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn translated(key: &str, value: &str) -> Result<String> {
        let mut all = BTreeMap::from([
            (key.to_owned(), value.to_owned()),
            ("net.a".to_owned(), "1 2".to_owned()),
        ]);
        translate(&mut all, |id| (id < 65_536).then_some(id + 100_000))?;
        assert_eq!(all["net.a"], "1 2");
        Ok(all[key].clone())
    }

    #[test]
    fn groups_are_those_outside() {
        for key in KEYS {
            assert_eq!(translated(key, "0 1000").unwrap(), "100000 101000");
            assert_eq!(translated(key, "5\t5\n").unwrap(), "100005 100005");
        }
        for untouched in ["1 0", "x 1", "1", ""] {
            assert_eq!(translated(KEYS[0], untouched).unwrap(), untouched);
        }
        let error = translated(KEYS[0], "0 2147483647").unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.message.contains("group 2147483647"), "{error}");
    }
}
