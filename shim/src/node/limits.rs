//! Resource limits of processes, as a container of the node has them that names none: it inherits those of containerd's child
//! that starts it, and so does this process. The server raises one for itself, which neither a guest nor a child of it is to notice.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use brig_agent_protocol::agent::ResourceLimit;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The environment variable that tells the server which soft limit of open files `start` had.
pub const SOFT_FILES: &str = "BRIG_SOFT_NOFILE";
/// The descriptors that a server may need: each of a VM's streams has up to two here, and the same again is for everything else.
/// containerd's own unit has left it with 1024 since containerd 2.0.
const FILES: u64 = 4096;

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

/// This process's, as it was started with them.
#[must_use]
pub fn own() -> Vec<ResourceLimit> {
    let given = given_soft_files();
    let limit = |(name, resource): &(&str, Resource)| {
        let limit = getrlimit(*resource);
        let given = given.filter(|_| *resource == Resource::Nofile);
        ResourceLimit {
            type_: (*name).to_owned(),
            soft: given.or(limit.current).unwrap_or(u64::MAX),
            hard: limit.maximum.unwrap_or(u64::MAX),
            ..ResourceLimit::default()
        }
    };
    LIMITS.iter().map(limit).collect()
}

/// The soft limit of open files that this process has, unless it has none; for [`SOFT_FILES`].
#[must_use]
pub fn soft_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// What `start` had, which a guest and children of the server are to have.
fn given_soft_files() -> Option<u64> {
    std::env::var(SOFT_FILES).ok()?.parse().ok()
}

/// Raises the soft limit of open files to what a server may need. One that was not told what to give back stays as it is.
///
/// # Errors
/// What the kernel says.
pub fn raise_files() -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if given_soft_files().is_some()
        && let Some(raised) = raised(current, maximum)
    {
        let current = Some(raised);
        setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    }
    Ok(())
}

/// What a soft limit is to be raised to, if at all.
fn raised(soft: Option<u64>, hard: Option<u64>) -> Option<u64> {
    let most = FILES.min(hard.unwrap_or(u64::MAX));
    soft.filter(|soft| *soft < most).map(|_| most)
}

/// Gives a child the soft limit of open files that the server was started with: a program that counts in it closes
/// each descriptor below it, or allocates for each.
pub fn give_back_files(command: &mut Command) {
    if let Some(soft) = given_soft_files() {
        start_with(command, soft);
    }
}

fn start_with(command: &mut Command, soft: u64) {
    let current = Some(soft);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let set = move || Ok(setrlimit(Resource::Nofile, Rlimit { current, maximum })?);
    // SAFETY: the closure makes one bare system call and allocates nothing.
    unsafe { command.pre_exec(set) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_what_streams_need_and_never_lowered_or_above_the_hard_one() {
        let streams = u64::try_from(brig_hypervisor::virtio::vsock::MAX_STREAMS).unwrap();
        assert!(FILES >= 4 * streams);
        for (soft, hard, expected) in [
            (Some(1024), Some(524_288), Some(FILES)),
            (Some(1024), Some(2048), Some(2048)),
            (Some(1024), None, Some(FILES)),
            (Some(1024), Some(1024), None),
            (Some(1_048_576), Some(1_048_576), None),
            (None, None, None),
        ] {
            assert_eq!(raised(soft, hard), expected, "{soft:?} of {hard:?}");
        }
    }

    #[test]
    fn a_child_has_the_limit_that_it_is_given() {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn; ulimit -Hn"]);
        start_with(&mut command, 77);
        let told = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let hard = getrlimit(Resource::Nofile).maximum;
        let hard = hard.map_or("unlimited".to_owned(), |hard| hard.to_string());
        assert_eq!(told, format!("77\n{hard}\n"));
    }

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
