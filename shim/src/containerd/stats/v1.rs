//! The same figures as a node with cgroup v1 has them: nanoseconds, totals of the hierarchy, and block
//! I/O by operation.

use brig_agent_protocol::agent::StatsResponse;
use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, Throttle,
};
use protobuf::MessageField;

use super::bounded::{devices, page_sizes};

/// What the type is called.
pub const TYPE: &str = "io.containerd.cgroups.v1.Metrics";
/// How v1 writes "no limit": the largest count of whole pages.
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// The figures in this form.
pub fn metrics(stats: StatsResponse) -> Metrics {
    let cpu = stats.cpu.unwrap_or_default();
    let io = blkio(&stats.io);
    let hugetlb = page_sizes(stats.hugetlb).map(|page| HugetlbStat {
        usage: page.usage,
        max: page.usage,
        failcnt: page.events_max,
        pagesize: page.page_size,
        ..HugetlbStat::default()
    });
    let memory = stats.memory.unwrap_or_default();
    let oom = MemoryOomControl {
        oom_kill: memory.events_oom_kill,
        ..MemoryOomControl::default()
    };
    Metrics {
        hugetlb: hugetlb.collect(),
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            // v1 has no number for it.
            limit: match stats.pids_limit {
                u64::MAX => 0,
                limit => limit,
            },
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total: nanoseconds(cpu.usage_usec),
                kernel: nanoseconds(cpu.system_usec),
                user: nanoseconds(cpu.user_usec),
                ..CPUUsage::default()
            }),
            throttling: MessageField::some(Throttle {
                periods: cpu.nr_periods,
                throttled_periods: cpu.nr_throttled,
                throttled_time: nanoseconds(cpu.throttled_usec),
                ..Throttle::default()
            }),
            ..CPUStat::default()
        }),
        memory: MessageField::some(memory_stat(&memory)),
        blkio: MessageField::some(io),
        memory_oom_control: MessageField::some(oom),
        ..Metrics::default()
    }
}

fn nanoseconds(microseconds: u64) -> u64 {
    microseconds.saturating_mul(1000)
}

fn limit(bytes: u64) -> u64 {
    bytes.min(UNLIMITED)
}

fn memory_stat(memory: &brig_agent_protocol::agent::stats_response::Memory) -> MemoryStat {
    let line = |name: &str| memory.stat.get(name).copied().unwrap_or(0);
    let with_swap = |memory: u64, swap: u64| limit(memory.saturating_add(swap));
    MemoryStat {
        cache: line("file"),
        rss: line("anon"),
        rss_huge: line("anon_thp"),
        mapped_file: line("file_mapped"),
        dirty: line("file_dirty"),
        writeback: line("file_writeback"),
        pg_fault: line("pgfault"),
        pg_maj_fault: line("pgmajfault"),
        inactive_anon: line("inactive_anon"),
        active_anon: line("active_anon"),
        inactive_file: line("inactive_file"),
        active_file: line("active_file"),
        unevictable: line("unevictable"),
        hierarchical_memory_limit: limit(memory.limit),
        hierarchical_swap_limit: with_swap(memory.limit, memory.swap_limit),
        total_cache: line("file"),
        total_rss: line("anon"),
        total_rss_huge: line("anon_thp"),
        total_mapped_file: line("file_mapped"),
        total_dirty: line("file_dirty"),
        total_writeback: line("file_writeback"),
        total_pg_fault: line("pgfault"),
        total_pg_maj_fault: line("pgmajfault"),
        total_inactive_anon: line("inactive_anon"),
        total_active_anon: line("active_anon"),
        total_inactive_file: line("inactive_file"),
        total_active_file: line("active_file"),
        total_unevictable: line("unevictable"),
        usage: MessageField::some(MemoryEntry {
            limit: limit(memory.limit),
            usage: memory.usage,
            max: memory.max_usage,
            failcnt: memory.events_max,
            ..MemoryEntry::default()
        }),
        // v1 counts memory and swap together.
        swap: MessageField::some(MemoryEntry {
            limit: with_swap(memory.limit, memory.swap_limit),
            usage: with_swap(memory.usage, memory.swap_usage),
            max: with_swap(memory.max_usage, memory.swap_usage),
            ..MemoryEntry::default()
        }),
        kernel: MessageField::some(MemoryEntry {
            limit: UNLIMITED,
            usage: line("kernel"),
            ..MemoryEntry::default()
        }),
        ..MemoryStat::default()
    }
}

fn blkio(io: &[brig_agent_protocol::agent::stats_response::Io]) -> BlkIOStat {
    let mut stat = BlkIOStat::default();
    for device in devices(io) {
        let entry = |op: &str, value| BlkIOEntry {
            op: op.to_owned(),
            major: device.major,
            minor: device.minor,
            value,
            ..BlkIOEntry::default()
        };
        stat.io_service_bytes_recursive
            .extend([entry("Read", device.rbytes), entry("Write", device.wbytes)]);
        stat.io_serviced_recursive
            .extend([entry("Read", device.rios), entry("Write", device.wios)]);
    }
    stat
}

#[cfg(test)]
mod tests {
    use super::*;
    use brig_agent_protocol::agent::stats_response::{Cpu, Io, Memory};

    #[test]
    fn figures_have_the_units_and_limits_of_v1() {
        let mut memory = Memory {
            usage: 4096,
            limit: u64::MAX,
            swap_limit: u64::MAX,
            events_oom_kill: 2,
            ..Memory::default()
        };
        memory.stat.insert("inactive_file".into(), 5);
        memory.stat.insert("anon".into(), 7);
        let metrics = metrics(StatsResponse {
            cpu: MessageField::some(Cpu {
                usage_usec: 3,
                throttled_usec: u64::MAX,
                ..Cpu::default()
            }),
            memory: MessageField::some(memory),
            pids_limit: u64::MAX,
            io: vec![Io {
                major: 254,
                wbytes: 9,
                rios: 1,
                ..Io::default()
            }],
            ..StatsResponse::default()
        });
        assert_eq!(metrics.cpu.usage.total, 3000);
        assert_eq!(metrics.cpu.throttling.throttled_time, u64::MAX);
        assert_eq!(metrics.memory.usage.limit, UNLIMITED);
        assert_eq!(metrics.memory.swap.limit, UNLIMITED);
        assert_eq!(
            (metrics.memory.total_inactive_file, metrics.memory.total_rss),
            (5, 7)
        );
        assert_eq!(metrics.memory_oom_control.oom_kill, 2);
        assert_eq!(metrics.pids.limit, 0);
        let written = &metrics.blkio.io_service_bytes_recursive[1];
        assert_eq!((written.op.as_str(), written.value), ("Write", 9));
        assert_eq!(metrics.blkio.io_serviced_recursive[0].value, 1);
    }
}
