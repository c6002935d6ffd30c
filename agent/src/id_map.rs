//! What a map of users and groups can be, wherever one is asked for.
use brig_agent_protocol::identity;

use crate::spec::IdMapping;

/// The kernel's limit of lines in a map file.
const MAX_MAPPINGS: usize = 340;

/// Refuses a map that the kernel has no room for, and one with a number that is no id.
///
/// # Errors
/// A sentence naming the field.
pub fn check_map(field: &str, map: &[IdMapping]) -> std::result::Result<(), String> {
    if map.len() > MAX_MAPPINGS {
        return Err(format!("{field} has more than {MAX_MAPPINGS} entries"));
    }
    for (index, line) in map.iter().enumerate() {
        for (side, first) in [("containerID", line.container_id), ("hostID", line.host_id)] {
            identity::check_range(&format!("{field}[{index}].{side}"), first, line.size)?;
        }
    }
    Ok(())
}

/// Refuses users that are mapped without groups, groups without users, and what is no map.
///
/// # Errors
/// A sentence naming the field.
pub fn check_pair(
    field: &str,
    users: &[IdMapping],
    groups: &[IdMapping],
) -> std::result::Result<(), String> {
    if users.is_empty() != groups.is_empty() {
        return Err(format!(
            "{field}: uidMappings and gidMappings come together"
        ));
    }
    check_map(&format!("{field}: uidMappings"), users)?;
    check_map(&format!("{field}: gidMappings"), groups)
}
