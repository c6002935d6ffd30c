//! Users and groups by number, as both sides judge them.

/// The number that is nobody's: system calls take it for "leave it as it is" (setresuid(2), chown(2)), so that a process
/// which is to become it stays root, and a file that is to be its stays root's.
const NOBODYS: u32 = u32::MAX;

/// Refuses the number that is nobody's.
///
/// # Errors
/// A sentence naming the field.
pub fn check(field: &str, id: u32) -> Result<(), String> {
    if id == NOBODYS {
        return Err(format!(
            "{field} = {id} is no id, it means \"none\" to Linux: they go from 0 to {}",
            NOBODYS - 1
        ));
    }
    Ok(())
}

/// Refuses `size` numbers from `first` on where one of them is nobody's.
///
/// # Errors
/// A sentence naming the field.
pub fn check_range(field: &str, first: u32, size: u32) -> Result<(), String> {
    match first.checked_add(size) {
        Some(_) if size > 0 => Ok(()),
        Some(_) => Err(format!("{field} has a range of no ids")),
        None => Err(format!(
            "{field}: {size} ids from {first} on go beyond the last there is, {}",
            NOBODYS - 1
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_none_is_no_id_and_in_no_range() {
        assert_eq!(check("f", NOBODYS - 1), Ok(()));
        assert!(check("f", NOBODYS).unwrap_err().starts_with("f = "));
        assert_eq!(check_range("f", 0, NOBODYS), Ok(()));
        assert_eq!(check_range("f", NOBODYS - 1, 1), Ok(()));
        for (first, size) in [(0, 0), (NOBODYS, 1), (1, NOBODYS), (NOBODYS - 1, 2)] {
            let error = check_range("f", first, size).unwrap_err();
            assert!(error.starts_with('f'), "{error}");
        }
    }
}
