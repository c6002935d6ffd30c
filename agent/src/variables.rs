//! Variables of an environment, `NAME=value` each; of several of one name the last counts.

/// The name of a variable.
fn name(entry: &str) -> &str {
    entry.split('=').next().unwrap_or_default()
}

/// The variable that counts of those which have the name of `entry`.
pub fn like<'a>(env: &'a [String], entry: &str) -> Option<&'a str> {
    let same = env.iter().rfind(|other| name(other) == name(entry));
    same.map(String::as_str)
}

/// Puts a variable in the place of those of its name.
pub fn set(env: &mut Vec<String>, entry: &str) {
    env.retain(|other| name(other) != name(entry));
    env.push(entry.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_comes_in_the_place_of_those_of_its_name() {
        let mut env: Vec<String> = ["A=1", "AB=2", "A=3"].map(str::to_owned).to_vec();
        assert_eq!(like(&env, "A=9"), Some("A=3"));
        assert_eq!(like(&env, "B="), None);
        set(&mut env, "A=9");
        assert_eq!(env, ["AB=2", "A=9"]);
    }
}
