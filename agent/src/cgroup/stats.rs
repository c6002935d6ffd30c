//! Fills the statistics reply from cgroup v2 files. A file that a kernel lacks reads as zeros.
use std::{collections::HashMap, fs, path::Path};

use brig_agent_protocol::MAX_DEVICES;
use brig_agent_protocol::agent::{StatsResponse, stats_response};

/// Reads the statistics of the cgroup directory `path`.
pub fn read(path: &Path) -> StatsResponse {
    let text = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let number = |file: &str| limit(&text(file));
    let cpu = flat(&text("cpu.stat"));
    let get = |map: &HashMap<String, u64>, key: &str| map.get(key).copied().unwrap_or_default();
    let events = flat(&text("memory.events"));
    StatsResponse {
        cpu: Some(stats_response::Cpu {
            usage_usec: get(&cpu, "usage_usec"),
            user_usec: get(&cpu, "user_usec"),
            system_usec: get(&cpu, "system_usec"),
            nr_periods: get(&cpu, "nr_periods"),
            nr_throttled: get(&cpu, "nr_throttled"),
            throttled_usec: get(&cpu, "throttled_usec"),
            pressure: pressure(&text("cpu.pressure")).into(),
            ..Default::default()
        })
        .into(),
        memory: Some(stats_response::Memory {
            usage: number("memory.current"),
            limit: number("memory.max"),
            max_usage: number("memory.peak"),
            swap_usage: number("memory.swap.current"),
            // A kernel without swap limits none.
            swap_limit: fs::read_to_string(path.join("memory.swap.max"))
                .map_or(u64::MAX, |text| limit(&text)),
            stat: flat(&text("memory.stat")),
            events_low: get(&events, "low"),
            events_high: get(&events, "high"),
            events_max: get(&events, "max"),
            events_oom: get(&events, "oom"),
            events_oom_kill: get(&events, "oom_kill"),
            pressure: pressure(&text("memory.pressure")).into(),
            ..Default::default()
        })
        .into(),
        pids_current: number("pids.current"),
        pids_limit: number("pids.max"),
        io: text("io.stat")
            .lines()
            .filter_map(io_line)
            .take(MAX_DEVICES)
            .collect(),
        hugetlb: hugetlb(path),
        io_pressure: pressure(&text("io.pressure")).into(),
        ..Default::default()
    }
}

/// A file of pressure; none of a kernel that does not measure it.
fn pressure(text: &str) -> Option<stats_response::Pressure> {
    let line = |kind: &str| text.lines().find_map(|line| pressure_line(line, kind));
    Some(stats_response::Pressure {
        some: Some(line("some")?).into(),
        // A kernel before 5.13 has none for processors.
        full: line("full").into(),
        ..Default::default()
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn pressure_line(line: &str, kind: &str) -> Option<stats_response::pressure::Line> {
    let mut words = line.split_whitespace();
    if words.next() != Some(kind) {
        return None;
    }
    let mut read = stats_response::pressure::Line::default();
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let share = || value.parse().unwrap_or_default();
        match key {
            "avg10" => read.avg10 = share(),
            "avg60" => read.avg60 = share(),
            "avg300" => read.avg300 = share(),
            "total" => read.total = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    Some(read)
}

/// One entry for each size of huge page that the kernel knows.
fn hugetlb(path: &Path) -> Vec<stats_response::HugeTlb> {
    let files = fs::read_dir(path).into_iter().flatten().flatten();
    let mut sizes: Vec<String> = files
        .filter_map(|file| {
            let name = file.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // Not the reservations.
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    let read = |size: &str, what: &str| {
        fs::read_to_string(path.join(format!("hugetlb.{size}.{what}"))).unwrap_or_default()
    };
    let entry = |size: String| stats_response::HugeTlb {
        usage: limit(&read(&size, "current")),
        limit: limit(&read(&size, "max")),
        events_max: flat(&read(&size, "events"))
            .get("max")
            .copied()
            .unwrap_or_default(),
        page_size: size,
        ..Default::default()
    };
    sizes.into_iter().map(entry).collect()
}

/// How often the kernel killed a process of the cgroup for memory.
pub fn oom_kills(path: &Path) -> u64 {
    let text = fs::read_to_string(path.join("memory.events")).unwrap_or_default();
    flat(&text).get("oom_kill").copied().unwrap_or_default()
}

/// A single number; `max` is the largest there is, as containerd's v2 metrics have it.
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or_default(),
    }
}

/// A "flat keyed" file: one `key value` a line.
fn flat(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A line of io.stat: `8:0 rbytes=1 wbytes=2 …`.
fn io_line(line: &str) -> Option<stats_response::Io> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut io = stats_response::Io {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        let value = value.parse().unwrap_or_default();
        match key {
            "rbytes" => io.rbytes = value,
            "wbytes" => io.wbytes = value,
            "rios" => io.rios = value,
            "wios" => io.wios = value,
            _ => {}
        }
    }
    Some(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_a_cgroup_reaches_the_reply() {
        let dir = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_periods 4\nnr_throttled 2\nthrottled_usec 9\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.stat", "anon 100\nfile 200\n");
        put("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n");
        put("pids.current", "5\n");
        put(
            "io.stat",
            "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:0 \n",
        );
        put(
            "memory.pressure",
            "some avg10=1.50 avg60=0.25 avg300=0.10 total=123\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=45\n",
        );
        put(
            "cpu.pressure",
            "some avg10=2.00 avg60=0.00 avg300=0.00 total=7\n",
        );
        put("hugetlb.2MB.current", "2097152\n");
        put("hugetlb.2MB.rsvd.current", "7\n");
        put("hugetlb.2MB.max", "max\n");
        put("hugetlb.2MB.events", "max 3\n");
        let stats = read(dir.path());
        let [huge] = stats.hugetlb.as_slice() else {
            panic!("{:?}", stats.hugetlb);
        };
        assert_eq!(
            (
                huge.page_size.as_str(),
                huge.usage,
                huge.limit,
                huge.events_max
            ),
            ("2MB", 2 << 20, u64::MAX, 3)
        );
        assert_eq!(stats.cpu.usage_usec, 10);
        assert_eq!(stats.cpu.throttled_usec, 9);
        assert_eq!(stats.memory.usage, 4096);
        assert_eq!(stats.memory.limit, u64::MAX);
        assert_eq!(stats.memory.swap_limit, u64::MAX);
        assert_eq!(stats.memory.stat["file"], 200);
        assert_eq!(stats.memory.events_oom_kill, 4);
        assert_eq!(stats.pids_current, 5);
        assert_eq!(
            (stats.io[0].major, stats.io[0].wios, stats.io.len()),
            (254, 4, 2)
        );
        assert_eq!(oom_kills(dir.path()), 4);
        let pressure = &stats.memory.pressure;
        assert_eq!((pressure.some.avg10, pressure.some.total), (1.5, 123));
        assert_eq!((pressure.full.avg10, pressure.full.total), (0.5, 45));
        assert_eq!(stats.cpu.pressure.some.total, 7);
        assert!(stats.cpu.pressure.full.is_none());
        assert!(stats.io_pressure.is_none());
    }
}
