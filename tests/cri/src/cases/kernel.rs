//! What a container finds of its kernel: programs it runs, system calls it answers, and limits.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use brig_fixtures::elf::{self, Abi};
use brig_tests::node::check::{equal, that};
use k8s_cri::v1::{Int64Value, SecurityProfile, security_profile::ProfileType};
use nix::libc;

use crate::node::{self, Directory};
use crate::pod::profile;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "a 32-bit program runs without a seccomp profile",
        unconfined,
    ),
    case(
        "security",
        "seccomp RuntimeDefault holds for 32-bit and x32 programs, which run",
        filtered,
    ),
    case(
        "security",
        "seccomp of x86_64 alone ends programs of other ABIs",
        one_architecture,
    ),
    case(
        "resources",
        "limits of the whole kernel are the node's",
        limits,
    ),
    case(
        "resources",
        "limits of a process that names none are containerd's, for any user, and so many processes can be started",
        of_processes,
    ),
    case(
        "resources",
        "a pod that may make NAT rules tracks as many connections as the node",
        connections,
    ),
];

/// A call, how it is made, and the status its program must end with.
type Expected = (&'static str, Abi, u32, [u32; 2], i32);

/// `CLONE_NEWUSER`: needs no capability, so only a filter refuses it.
const NEW_USER: u32 = 0x1000_0000;
/// A shell's status for SIGSYS.
const KILLED: i32 = 128 + libc::SIGSYS;

fn ends_as_expected(
    suite: &mut Suite,
    name: &str,
    seccomp: SecurityProfile,
    expected: &[Expected],
) -> Result<()> {
    let directory = Directory::new(name)?;
    for (name, abi, number, arguments, _) in expected {
        let path = directory.path.join(name);
        std::fs::write(&path, elf::program(*abi, *number, *arguments))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container(name, SLEEP)
        .mount(&directory.path, "/programs")
        .security(|security| security.seccomp = Some(seccomp))
        .start()?;
    for (name, .., status) in expected {
        // By a shell, so that a signal has a status.
        let script = format!("/programs/{name} 2>/dev/null; echo $?");
        let got = container.sh(&script)?;
        equal(name, status.to_string().as_str(), got.trim())?;
    }
    Ok(())
}

fn unconfined(suite: &mut Suite) -> Result<()> {
    let none = profile(ProfileType::Unconfined);
    let expected: [Expected; 3] = [
        ("exit", Abi::I386, 1, [42, 0], 42),
        ("unshare", Abi::I386, 310, [NEW_USER, 0], 0),
        // The kernels of node and guest have no x32.
        ("getpid-x32", Abi::X32, 39, [0, 0], libc::ENOSYS),
    ];
    ends_as_expected(suite, "i386-unconfined", none, &expected)
}

fn filtered(suite: &mut Suite) -> Result<()> {
    let default = profile(ProfileType::RuntimeDefault);
    let expected: [Expected; 9] = [
        ("exit", Abi::I386, 1, [42, 0], 42),
        ("close", Abi::I386, 6, [1000, 0], libc::EBADF),
        ("unshare", Abi::I386, 310, [NEW_USER, 0], libc::EPERM),
        // Nobody's call.
        ("from-the-future", Abi::I386, 1000, [0, 0], libc::ENOSYS),
        // accept, which i386 has no other way: let through, to arguments that are nowhere.
        ("accept", Abi::I386, 102, [5, 0], libc::EFAULT),
        ("ipc", Abi::I386, 117, [21, 1000], libc::EINVAL),
        ("unshare-64", Abi::X86_64, 272, [NEW_USER, 0], libc::EPERM),
        ("getpid-x32", Abi::X32, 39, [0, 0], libc::ENOSYS),
        ("unshare-x32", Abi::X32, 272, [NEW_USER, 0], libc::EPERM),
    ];
    ends_as_expected(suite, "i386-default", default, &expected)
}

fn one_architecture(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("seccomp-x86-64")?;
    let rule = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
    let file = directory.file("profile.json", rule)?;
    let seccomp = SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: file.display().to_string(),
    };
    let expected: [Expected; 4] = [
        ("mkdir", Abi::X86_64, 83, [0, 0], libc::EOPNOTSUPP),
        ("close", Abi::X86_64, 3, [1000, 0], libc::EBADF),
        ("close-i386", Abi::I386, 6, [1000, 0], KILLED),
        ("close-x32", Abi::X32, 3, [1000, 0], KILLED),
    ];
    ends_as_expected(suite, "x86-64-alone", seccomp, &expected)
}

const LIMITS: &str = "fs/aio-max-nr fs/file-max fs/inotify/max_user_instances fs/inotify/max_user_watches fs/nr_open \
     fs/pipe-max-size fs/protected_hardlinks fs/protected_symlinks kernel/keys/maxkeys kernel/keys/root_maxbytes \
     kernel/keys/root_maxkeys kernel/pid_max kernel/threads-max user/max_user_namespaces user/max_net_namespaces \
     vm/max_map_count";

fn limits(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for name in LIMITS.split_whitespace() {
        let node = std::fs::read_to_string(format!("/proc/sys/{name}")).context(name)?;
        let here = shared.container.sh(&format!("cat /proc/sys/{name}"))?;
        equal(name, node.trim(), here.trim())?;
    }
    Ok(())
}

fn connections(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("connections")?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| {
            let own = security.capabilities.get_or_insert_default();
            own.add_capabilities = vec!["NET_ADMIN".to_owned()];
        })
        .start()?;
    let number = |name: &str| -> Result<u64> {
        let text = container.sh(&format!("cat /proc/sys/net/netfilter/{name}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{name}: {text}"))
    };
    let most = number("nf_conntrack_max")?;
    that(&format!("{most} connections are a node's"), most >= 65_536)?;
    // The kernel drops connections once a chain has some dozen of them.
    let buckets = number("nf_conntrack_buckets")?;
    that(
        &format!("{buckets} buckets for {most}"),
        buckets * 8 >= most,
    )
}

/// Lines of `/proc/PID/limits`, but that of core dumps, whose soft limit is a guest's own, and without the soft limit of files, which a
/// program in Go raises for itself alone.
fn told(limits: &str) -> Vec<String> {
    let lines = limits.lines().filter(|line| !line.starts_with("Max core"));
    let words = lines.map(|line| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if line.starts_with("Max open files") {
            words.remove(3);
        }
        words.join(" ")
    });
    words.collect()
}

fn of_processes(suite: &mut Suite) -> Result<()> {
    // More than the guest's kernel would let a user have in the memory that it boots with.
    const MANY: usize = 1000;
    let containerd = node::run(
        "systemctl",
        &["show", "-p", "MainPID", "--value", "containerd"],
    )?;
    let on_node = std::fs::read_to_string(format!("/proc/{}/limits", containerd.trim()))?;
    let pod = suite.run("limits")?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .resources(|resources| resources.memory_limit_in_bytes = 640 << 20)
        .start()?;
    equal(
        "limits",
        told(&on_node),
        told(&container.sh("cat /proc/self/limits")?),
    )?;
    let script = format!(
        "i=0; while [ $i -lt {MANY} ]; do sleep 600 & i=$((i + 1)); done; ps | grep -c 'sleep 600'; killall sleep"
    );
    let running: usize = container.sh(&script)?.trim().parse()?;
    that(
        &format!("{running} processes of one user run"),
        running >= MANY,
    )
}
