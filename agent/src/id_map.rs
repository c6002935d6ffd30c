//! What a map of users and groups can be, wherever one is asked for.
use crate::spec::IdMapping;

/// The kernel's limit of lines in a map file.
const MAX_MAPPINGS: usize = 340;

/// Refuses a map that the kernel has no room for.
///
/// # Errors
/// A sentence naming the field.
pub fn check_length(field: &str, map: &[IdMapping]) -> std::result::Result<(), String> {
    if map.len() > MAX_MAPPINGS {
        return Err(format!("{field} has more than {MAX_MAPPINGS} entries"));
    }
    Ok(())
}

/// Refuses users that are mapped without groups, groups without users, and more than the kernel has room for.
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
    check_length(field, users)?;
    check_length(field, groups)
}
