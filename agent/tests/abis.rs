//! seccomp profiles and programs of other ABIs than x86_64, as real processes of a container.
#![allow(clippy::unwrap_used)]
mod guest;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use brig_fixtures::elf::{self, Abi};
use guest::*;
use serde_json::json;

/// A static i386 executable that makes the call `number` and ends with its errno.
fn i386(path: &Path, number: u32, arguments: [u32; 2]) {
    fs::write(path, elf::program(Abi::I386, number, arguments)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn a_32_bit_program_is_judged_by_its_own_numbers() {
    let mut guest = Guest::start().await;
    let root = guest.rootfs("c1");
    i386(&root.join("bin/ends"), 1, [42, 0]);
    i386(&root.join("bin/closes"), 6, [1000, 0]);
    i386(&root.join("bin/sethostnames"), 74, [0, 0]);
    i386(&root.join("bin/accepts"), 102, [5, 0]);
    i386(&root.join("bin/listens"), 102, [4, 0]);
    let script = "for p in ends closes sethostnames accepts listens; do $p 2>/dev/null; echo -n \"$? \"; done";
    // x86_64's numbers of these mean other calls of i386, and are named too.
    let profile = |architectures| {
        json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures,
            "syscalls": [
                {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122},
                {"names": ["accept"], "action": "SCMP_ACT_ERRNO", "errnoRet": 123}
            ]
        })
    };
    let all = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    // 9: EBADF; 14: EFAULT, so it was let through; 159: SIGSYS.
    for (name, architectures, expected) in [
        ("c1", all, "42 9 122 123 14 "),
        ("c2", json!(["SCMP_ARCH_X86_64"]), "159 159 159 159 159 "),
        ("c3", json!([]), "159 159 159 159 159 "),
    ] {
        if name != "c1" {
            let other = guest.rootfs(name);
            for program in ["ends", "closes", "sethostnames", "accepts", "listens"] {
                let program = Path::new("bin").join(program);
                fs::copy(root.join(&program), other.join(&program)).unwrap();
            }
        }
        let mut filtered = spec(script);
        filtered["linux"]["seccomp"] = profile(architectures);
        let outcome = guest.whole(name, &filtered).await;
        assert_eq!(outcome.stdout, expected, "{name}: {}", outcome.stderr);
    }
    guest.stop().await;
}
