//! What a container finds of its kernel: programs it runs, system calls it answers, and limits.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use brig_tests::node::check::{equal, that};
use k8s_cri::v1::security_profile::ProfileType;

use crate::node::Directory;
use crate::pod::profile;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[
    case(
        "resources",
        "a 32-bit program runs without a seccomp profile",
        i386,
    ),
    case(
        "resources",
        "limits of the whole kernel are the node's",
        limits,
    ),
    case(
        "resources",
        "a pod that may make NAT rules tracks as many connections as the node",
        connections,
    ),
];

/// A static i386 executable that ends with this status.
fn program(status: u8) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    // mov eax, 1 (exit); mov ebx, status; int 0x80
    let code = [0xb8, 1, 0, 0, 0, 0xbb, status, 0, 0, 0, 0xcd, 0x80];
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2_u16, 3] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    // Version, entry, program headers, section headers, flags.
    for word in [1, BASE + HEADERS, 52, 0, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let length = HEADERS + 12;
    // One segment: load all of the file, readable and executable.
    for word in [1, 0, BASE, BASE, length, length, 5, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&code);
    file
}

fn i386(suite: &mut Suite) -> Result<()> {
    let directory = Directory::new("i386")?;
    let path = directory.path.join("program");
    std::fs::write(&path, program(42))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    let pod = suite.run("i386")?;
    // Brig's filters know no calls of i386 (docs/guest-kernel.md).
    let container = pod
        .container("main", SLEEP)
        .mount(&directory.path, "/programs")
        .security(|security| security.seccomp = Some(profile(ProfileType::Unconfined)))
        .start()?;
    let status = container.exec(&["/programs/program"])?.code;
    equal("its exit status", 42, status)
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
