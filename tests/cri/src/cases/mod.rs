//! The cases, grouped as the parts of a pod that Kubernetes relies on.

mod apps;
mod attach;
mod config_volumes;
mod forward;
mod life;
mod mounts;
mod network;
mod process;
mod resources;
mod sandbox;
mod security;
mod stats;
mod streams;
mod volumes;

use crate::suite::Case;

/// All cases, groups together.
pub fn all() -> Vec<Case> {
    [
        sandbox::CASES,
        process::CASES,
        network::CASES,
        streams::CASES,
        attach::CASES,
        forward::CASES,
        volumes::CASES,
        config_volumes::CASES,
        mounts::CASES,
        security::CASES,
        resources::CASES,
        stats::CASES,
        life::CASES,
        apps::CASES,
    ]
    .into_iter()
    .flatten()
    .map(|case| Case { ..*case })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn no_two_cases_have_one_name() {
        let all = super::all();
        let names: BTreeSet<_> = all.iter().map(|case| (case.group, case.name)).collect();
        assert_eq!(names.len(), all.len());
    }
}
