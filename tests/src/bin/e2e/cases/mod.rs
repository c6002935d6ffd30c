//! All cases, by group.

mod attach;
mod crash;
mod daemon;
mod daemon_faults;
mod daemon_logs;
mod daemon_pods;
mod daemon_restart;
mod daemon_streams;
mod devices;
mod durability;
mod errors;
mod events;
mod exec;
mod exit;
mod files;
mod hooks;
mod hostile;
mod hostile_agent;
mod images;
mod install;
mod leaks;
mod mapped_layers;
mod mounts;
mod network;
mod node_io;
mod operator;
mod operator_debug;
mod operator_look;
mod operator_sent;
mod passthrough;
mod passthrough_clone;
mod plug;
mod resources;
mod root_disks;
mod root_snapshotters;
mod security;
mod signals;
mod slow_volumes;
mod stdio;
mod template;
mod template_pods;
mod terminal;
mod verity_layers;

use crate::suite::Case;

/// In the order they run: what everything else needs comes first.
const GROUPS: &[&[Case]] = &[
    exit::CASES,
    stdio::CASES,
    template::CASES,
    template_pods::CASES,
    exec::CASES,
    terminal::CASES,
    signals::CASES,
    attach::CASES,
    security::CASES,
    resources::CASES,
    node_io::CASES,
    mounts::CASES,
    files::CASES,
    slow_volumes::CASES,
    network::CASES,
    hooks::CASES,
    events::CASES,
    images::CASES,
    install::CASES,
    operator::CASES,
    operator_debug::CASES,
    operator_look::CASES,
    operator_sent::CASES,
    devices::CASES,
    plug::CASES,
    passthrough::CASES,
    passthrough_clone::CASES,
    daemon::CASES,
    daemon_pods::CASES,
    daemon_restart::CASES,
    daemon_faults::CASES,
    daemon_logs::CASES,
    daemon_streams::CASES,
    root_disks::CASES,
    verity_layers::CASES,
    mapped_layers::CASES,
    root_snapshotters::CASES,
    durability::CASES,
    errors::CASES,
    hostile::CASES,
    hostile_agent::CASES,
    leaks::CASES,
    crash::CASES,
];

/// Every case.
pub fn all() -> Vec<&'static Case> {
    GROUPS.iter().flat_map(|group| group.iter()).collect()
}

/// Which of `of` parts, from 0, a case belongs to: whole groups, so that pods stay shared.
pub fn shard_of(case: &Case, of: usize) -> usize {
    // Those that take longest go where both parts take about as long.
    match case.group {
        "leaks" | "errors" | "hostile" | "disks" => 0,
        "crash" | "files" | "template" => 1 % of,
        group => {
            GROUPS
                .iter()
                .position(|cases| cases.first().is_some_and(|first| first.group == group))
                .unwrap_or(0)
                % of
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = all().iter().map(|case| (case.group, case.name)).collect();
        assert_eq!(names.len(), all().len());
    }

    #[test]
    fn every_case_is_in_exactly_one_part() {
        for case in all() {
            assert_eq!(shard_of(case, 1), 0);
            assert!(shard_of(case, 2) < 2);
        }
    }
}
