//! A pod's figures: the sums of its containers'. The agent is not trusted: sums saturate, lists are bounded.

use std::collections::BTreeMap;

use brig_agent_protocol::agent::StatsResponse;
use brig_agent_protocol::agent::stats_response::Io;

/// Block devices that are told of.
const MAX_DEVICES: usize = 256;
/// Lines of memory.stat that are added up; the kernel has some sixty.
const MAX_LINES: usize = 256;

/// Adds up the figures of a pod's containers. No limit (`u64::MAX`) of one is none of the pod.
#[must_use]
pub fn sum(containers: impl IntoIterator<Item = StatsResponse>) -> StatsResponse {
    let mut total = StatsResponse::default();
    let mut devices = BTreeMap::new();
    for figures in containers {
        let cpu = figures.cpu.unwrap_or_default();
        let all = total.cpu.mut_or_insert_default();
        for (sum, part) in [
            (&mut all.usage_usec, cpu.usage_usec),
            (&mut all.user_usec, cpu.user_usec),
            (&mut all.system_usec, cpu.system_usec),
            (&mut all.nr_periods, cpu.nr_periods),
            (&mut all.nr_throttled, cpu.nr_throttled),
            (&mut all.throttled_usec, cpu.throttled_usec),
            (&mut total.pids_current, figures.pids_current),
            (&mut total.pids_limit, figures.pids_limit),
        ] {
            *sum = sum.saturating_add(part);
        }
        let memory = figures.memory.unwrap_or_default();
        let all = total.memory.mut_or_insert_default();
        for (sum, part) in [
            (&mut all.usage, memory.usage),
            (&mut all.limit, memory.limit),
            (&mut all.max_usage, memory.max_usage),
            (&mut all.swap_usage, memory.swap_usage),
            (&mut all.swap_limit, memory.swap_limit),
            (&mut all.events_low, memory.events_low),
            (&mut all.events_high, memory.events_high),
            (&mut all.events_max, memory.events_max),
            (&mut all.events_oom, memory.events_oom),
            (&mut all.events_oom_kill, memory.events_oom_kill),
        ] {
            *sum = sum.saturating_add(part);
        }
        for (name, part) in memory.stat.into_iter().take(MAX_LINES) {
            let sum = all.stat.entry(name).or_default();
            *sum = sum.saturating_add(part);
        }
        for io in figures.io.into_iter().take(MAX_DEVICES) {
            add_device(&mut devices, &io);
        }
    }
    total.io = devices.into_values().collect();
    total
}

fn add_device(devices: &mut BTreeMap<(u64, u64), Io>, io: &Io) {
    let key = (io.major, io.minor);
    if !devices.contains_key(&key) && devices.len() >= MAX_DEVICES {
        return;
    }
    let all = devices.entry(key).or_insert_with(|| Io {
        major: io.major,
        minor: io.minor,
        ..Io::default()
    });
    for (sum, part) in [
        (&mut all.rbytes, io.rbytes),
        (&mut all.wbytes, io.wbytes),
        (&mut all.rios, io.rios),
        (&mut all.wios, io.wios),
    ] {
        *sum = sum.saturating_add(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::agent::stats_response::{Cpu, Memory};
    use protobuf::MessageField;

    fn container(usage: u64, limit: u64) -> StatsResponse {
        let mut memory = Memory {
            usage,
            limit,
            ..Memory::default()
        };
        memory.stat.insert("anon".into(), usage);
        StatsResponse {
            cpu: MessageField::some(Cpu {
                usage_usec: 10,
                ..Cpu::default()
            }),
            memory: MessageField::some(memory),
            pids_current: 2,
            io: vec![Io {
                major: 254,
                rbytes: 5,
                ..Io::default()
            }],
            ..StatsResponse::default()
        }
    }

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let total = sum([container(100, 1000), container(7, u64::MAX)]);
        assert_eq!((total.cpu.usage_usec, total.pids_current), (20, 4));
        assert_eq!((total.memory.usage, total.memory.limit), (107, u64::MAX));
        assert_eq!(total.memory.stat["anon"], 107);
        assert_eq!((total.io.len(), total.io[0].rbytes), (1, 10));
        assert_eq!(sum([]).memory.usage, 0);
    }
}
