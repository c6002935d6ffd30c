//! The cases, grouped as the parts of a pod that Kubernetes relies on.

mod apps;
mod attach;
mod block;
mod block_errors;
mod block_queues;
mod cgroups;
mod checked;
mod clock;
pub mod config_volumes;
mod devices;
mod direct_volumes;
mod failures;
mod file_systems;
mod first_look;
mod forward;
mod handlers;
mod huge_pages;
mod idle;
mod image_paths;
mod kernel;
pub mod life;
mod many_volumes;
mod modules;
mod mounts;
mod network;
mod networks;
mod node_limits;
mod parts;
mod passthrough;
mod passthrough_addresses;
mod passthrough_assigned;
mod passthrough_back;
mod passthrough_checked;
mod passthrough_hostile;
mod passthrough_list;
mod passthrough_peers;
mod pod_limits;
mod process;
mod queue_pairs;
mod resize;
mod resources;
mod rules;
mod sandbox;
mod second_networks;
mod security;
mod shutdown;
mod stats;
mod streams;
mod template;
mod transfer_cost;
mod user_namespace;
mod vhost;
mod volumes;

use crate::suite::Case;

/// All cases, groups together.
pub fn all() -> Vec<Case> {
    [
        sandbox::CASES,
        handlers::CASES,
        template::CASES,
        checked::CASES,
        process::CASES,
        network::CASES,
        networks::CASES,
        second_networks::CASES,
        transfer_cost::CASES,
        vhost::CASES,
        queue_pairs::CASES,
        rules::CASES,
        streams::CASES,
        attach::CASES,
        forward::CASES,
        volumes::CASES,
        parts::CASES,
        config_volumes::CASES,
        many_volumes::CASES,
        first_look::CASES,
        direct_volumes::CASES,
        mounts::CASES,
        image_paths::CASES,
        devices::CASES,
        passthrough::CASES,
        passthrough_addresses::CASES,
        passthrough_assigned::CASES,
        passthrough_checked::CASES,
        passthrough_list::CASES,
        passthrough_back::CASES,
        passthrough_hostile::CASES,
        passthrough_peers::CASES,
        block::CASES,
        block_queues::CASES,
        block_errors::CASES,
        file_systems::CASES,
        security::CASES,
        user_namespace::CASES,
        resources::CASES,
        resize::CASES,
        pod_limits::CASES,
        node_limits::CASES,
        idle::CASES,
        cgroups::CASES,
        huge_pages::CASES,
        kernel::CASES,
        failures::CASES,
        modules::CASES,
        stats::CASES,
        life::CASES,
        clock::CASES,
        shutdown::CASES,
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

    /// The table of what a pod may ask for names its cases by how they begin.
    #[test]
    fn what_the_compatibility_table_names_is_a_case() {
        let table = include_str!("../../../../docs/compatibility.md");
        let all: Vec<String> = super::all()
            .iter()
            .map(|case| format!("{}/{}", case.group, case.name))
            .collect();
        let groups: BTreeSet<_> = super::all().iter().map(|case| case.group).collect();
        let mut named = 0;
        for group in groups {
            for (at, _) in table.match_indices(&format!("{group}/")) {
                // `tests/cri`, a path, is no case.
                if table[..at].ends_with(|before: char| before == '/' || before.is_alphanumeric()) {
                    continue;
                }
                let rest = &table[at..];
                let end = rest.find(['…', ',', '|', '(', ';', '\n']);
                let begin = rest[..end.unwrap_or(rest.len())].trim();
                assert!(
                    all.iter().any(|name| name.starts_with(begin)),
                    "no case begins with '{begin}'"
                );
                named += 1;
            }
        }
        assert!(named > 80, "only {named} cases are named");
    }
}
