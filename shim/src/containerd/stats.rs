//! The agent's figures as containerd's metrics, in the form that the node's cgroups have. The agent is
//! not trusted: figures are only passed on, lists are bounded.

mod bounded;

use brig_agent_protocol::agent::StatsResponse;
use brig_agent_protocol::agent::stats_response::{Pressure, pressure::Line};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::error::{Error, Result};
use bounded::{devices, page_sizes};

/// The type containerd knows the metrics of cgroup v2 by.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";
/// Encodes the figures of one container.
///
/// # Errors
/// None in practice: protobuf cannot encode.
pub fn encode(stats: StatsResponse) -> Result<Any> {
    let value = metrics(stats).write_to_bytes();
    Ok(Any {
        type_url: TYPE.to_owned(),
        value: value.map_err(|e| Error::internal(e.to_string()))?,
        ..Any::default()
    })
}

fn metrics(stats: StatsResponse) -> Metrics {
    let cpu = stats.cpu.unwrap_or_default();
    let memory = stats.memory.unwrap_or_default();
    let usage = devices(&stats.io).map(|io| IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..IOEntry::default()
    });
    let io = IOStat {
        usage: usage.collect(),
        psi: pressure(stats.io_pressure),
        ..IOStat::default()
    };
    let hugetlb = page_sizes(stats.hugetlb).map(|page| HugeTlbStat {
        current: page.usage,
        max: page.limit,
        pagesize: page.page_size,
        ..HugeTlbStat::default()
    });
    let line = |name: &str| memory.stat.get(name).copied().unwrap_or(0);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            psi: pressure(cpu.pressure),
            ..CPUStat::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: line("anon"),
            file: line("file"),
            kernel_stack: line("kernel_stack"),
            slab: line("slab"),
            sock: line("sock"),
            shmem: line("shmem"),
            file_mapped: line("file_mapped"),
            file_dirty: line("file_dirty"),
            file_writeback: line("file_writeback"),
            anon_thp: line("anon_thp"),
            inactive_anon: line("inactive_anon"),
            active_anon: line("active_anon"),
            inactive_file: line("inactive_file"),
            active_file: line("active_file"),
            unevictable: line("unevictable"),
            slab_reclaimable: line("slab_reclaimable"),
            slab_unreclaimable: line("slab_unreclaimable"),
            pgfault: line("pgfault"),
            pgmajfault: line("pgmajfault"),
            workingset_refault: line("workingset_refault_anon")
                .saturating_add(line("workingset_refault_file")),
            workingset_activate: line("workingset_activate_anon")
                .saturating_add(line("workingset_activate_file")),
            workingset_nodereclaim: line("workingset_nodereclaim"),
            pgrefill: line("pgrefill"),
            pgscan: line("pgscan"),
            pgsteal: line("pgsteal"),
            pgactivate: line("pgactivate"),
            pgdeactivate: line("pgdeactivate"),
            pglazyfree: line("pglazyfree"),
            pglazyfreed: line("pglazyfreed"),
            thp_fault_alloc: line("thp_fault_alloc"),
            thp_collapse_alloc: line("thp_collapse_alloc"),
            usage: memory.usage,
            usage_limit: memory.limit,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            max_usage: memory.max_usage,
            psi: pressure(memory.pressure),
            ..MemoryStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: memory.events_low,
            high: memory.events_high,
            max: memory.events_max,
            oom: memory.events_oom,
            oom_kill: memory.events_oom_kill,
            ..MemoryEvents::default()
        }),
        io: MessageField::some(io),
        hugetlb: hugetlb.collect(),
        ..Metrics::default()
    }
}

/// None of a guest that says nothing of it, as of a kernel that does not measure it.
fn pressure(told: MessageField<Pressure>) -> MessageField<PSIStats> {
    let line = |line: MessageField<Line>| {
        let line = line.into_option()?;
        Some(PSIData {
            avg10: percent(line.avg10),
            avg60: percent(line.avg60),
            avg300: percent(line.avg300),
            total: line.total,
            ..PSIData::default()
        })
    };
    let told = told.into_option().map(|told| PSIStats {
        some: line(told.some).into(),
        full: line(told.full).into(),
        ..PSIStats::default()
    });
    told.into()
}

/// What is no number cannot be written as JSON, which kubelet does with it.
fn percent(told: f64) -> f64 {
    if told.is_finite() {
        told.clamp(0.0, 100.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::agent::stats_response::{HugeTlb, Memory};

    #[test]
    fn figures_arrive_under_containerds_names() {
        let mut memory = Memory {
            usage: 7,
            events_oom_kill: 2,
            ..Memory::default()
        };
        memory.stat.insert("inactive_file".into(), 5);
        let waited = Line {
            avg10: 1.5,
            avg60: f64::NAN,
            avg300: 1e300,
            total: 123,
            ..Line::default()
        };
        memory.pressure = MessageField::some(Pressure {
            some: MessageField::some(waited),
            ..Pressure::default()
        });
        memory
            .stat
            .insert("workingset_refault_anon".into(), u64::MAX);
        memory.stat.insert("workingset_refault_file".into(), 1);
        let any = encode(StatsResponse {
            memory: MessageField::some(memory),
            pids_current: 3,
            hugetlb: vec![
                HugeTlb {
                    page_size: "2MB".into(),
                    usage: 9,
                    ..HugeTlb::default()
                },
                HugeTlb {
                    page_size: "x".repeat(1000),
                    ..HugeTlb::default()
                },
            ],
            ..StatsResponse::default()
        })
        .unwrap();
        assert_eq!(any.type_url, TYPE);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.pids.current, 3);
        assert_eq!((metrics.memory.usage, metrics.memory.inactive_file), (7, 5));
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
        assert_eq!(metrics.memory_events.oom_kill, 2);
        let some = &metrics.memory.psi.some;
        assert_eq!((some.avg10, some.avg60, some.avg300), (1.5, 0.0, 100.0));
        assert_eq!(some.total, 123);
        assert!(metrics.memory.psi.full.is_none() && metrics.cpu.psi.is_none());
        assert_eq!((metrics.hugetlb.len(), metrics.hugetlb[0].current), (1, 9));
    }
}
