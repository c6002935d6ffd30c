//! Resource limits of processes, as a container of the node has them that names none: it inherits those of containerd's child
//! that starts it, and so does this process.

use brig_agent_protocol::agent::ResourceLimit;
use rustix::process::{Resource, getrlimit};

/// All but that of core dumps: a guest writes one beside the program, whatever handler the node has for them, and its kernel's
/// own soft limit is none.
const LIMITS: [(&str, Resource); 15] = [
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_STACK", Resource::Stack),
];

/// This process's.
#[must_use]
pub fn own() -> Vec<ResourceLimit> {
    let limit = |(name, resource): &(&str, Resource)| {
        let limit = getrlimit(*resource);
        ResourceLimit {
            type_: (*name).to_owned(),
            soft: limit.current.unwrap_or(u64::MAX),
            hard: limit.maximum.unwrap_or(u64::MAX),
            ..ResourceLimit::default()
        }
    };
    LIMITS.iter().map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_that_the_kernel_tells_of_this_process() {
        let told = std::fs::read_to_string("/proc/self/limits").unwrap();
        let own = own();
        for (kind, name) in [
            ("RLIMIT_NOFILE", "Max open files"),
            ("RLIMIT_NPROC", "Max processes"),
            ("RLIMIT_STACK", "Max stack size"),
        ] {
            let line = told
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            let number = |text: &str| text.parse().unwrap_or(u64::MAX);
            let mut numbers = line.split_whitespace().map(number);
            let limit = own.iter().find(|limit| limit.type_ == kind).unwrap();
            assert_eq!(
                (Some(limit.soft), Some(limit.hard)),
                (numbers.next(), numbers.next()),
                "{kind}"
            );
        }
    }
}
