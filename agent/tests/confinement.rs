//! What a container's processes may do: capabilities, limits, no_new_privs and seccomp.
mod guest;

use brig_agent_protocol::agent::*;
use guest::*;
use serde_json::json;

#[tokio::test]
async fn capabilities_limits_and_no_new_privileges() {
    let mut guest = Guest::start().await;
    let status = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
    let got = fields(
        &output(&mut guest, status, |spec| {
            spec["process"]["capabilities"] = json!({
                "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_FROM_THE_FUTURE"], "effective": ["CAP_KILL"],
                "permitted": ["CAP_CHOWN", "CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
            });
            spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        })
        .await,
    );
    // Executed as an ordinary user, what is ambient is what stays.
    assert_eq!(got["CapBnd"], "0000000000000021");
    assert_eq!(
        (got["CapInh"].as_str(), got["CapAmb"].as_str()),
        ("0000000000000020", "0000000000000020")
    );
    assert_eq!(
        (got["CapPrm"].as_str(), got["CapEff"].as_str()),
        ("0000000000000020", "0000000000000020")
    );
    assert_eq!(
        (got["NoNewPrivs"].as_str(), got["Seccomp"].as_str()),
        ("1", "0")
    );
    let got = fields(
        &output(&mut guest, status, |spec| {
            spec["process"]["noNewPrivileges"] = false.into();
            spec["process"]
                .as_object_mut()
                .unwrap()
                .remove("capabilities");
        })
        .await,
    );
    assert_eq!(
        (
            got["CapBnd"].as_str(),
            got["CapEff"].as_str(),
            got["NoNewPrivs"].as_str()
        ),
        ("0000000000000000", "0000000000000000", "0")
    );
    let script = "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj";
    let got = output(&mut guest, script, |spec| {
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
        ]);
        spec["process"]["oomScoreAdj"] = 500.into();
    })
    .await;
    assert_eq!(got, "100\n200\n0\n500\n");
    guest.stop().await;
}

#[tokio::test]
async fn seccomp_does_not_force_no_new_privileges() {
    let mut guest = Guest::start().await;
    let script = "grep -E '^(NoNew|Seccomp:)' /proc/self/status; mkdir /tmp/d 2>&1";
    let got = output(&mut guest, script, |spec| {
        spec["process"]["noNewPrivileges"] = false.into();
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122}]
        });
    })
    .await;
    assert!(
        got.contains("NoNewPrivs:\t0") && got.contains("Seccomp:\t2"),
        "{got}"
    );
    // 122 is EDQUOT: the profile's own errno.
    assert!(
        got.contains("Disk quota exceeded") || got.contains("Quota exceeded"),
        "{got}"
    );
    guest.stop().await;
}

#[tokio::test]
async fn seccomp_holds_for_init_and_exec_with_several_actions() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let mut filtered = spec("sleep 1000");
    filtered["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
            {"names": ["sync", "syncfs"], "action": "SCMP_ACT_KILL_PROCESS"}
        ]
    });
    guest
        .create("c1", &filtered, Stdio::default())
        .await
        .unwrap();
    guest.run("c1", "").await.unwrap();
    let outcome = guest
        .exec(
            "c1",
            "e1",
            &shell("mkdir /tmp/x; rmdir /tmp; sync; echo $?"),
        )
        .await;
    assert!(
        outcome.stderr.contains("Permission denied"),
        "{}",
        outcome.stderr
    );
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{}",
        outcome.stderr
    );
    assert_eq!(outcome.stdout, "159\n");
    guest.stop().await;
}

#[tokio::test]
async fn the_default_profile_of_containerd_lets_a_shell_run() {
    let mut guest = Guest::start().await;
    let names: Vec<String> = [
        "access",
        "arch_prctl",
        "brk",
        "capget",
        "capset",
        "chdir",
        "chmod",
        "clone",
        "close",
        "dup",
        "dup2",
        "dup3",
        "execve",
        "exit",
        "exit_group",
        "faccessat",
        "faccessat2",
        "fchmod",
        "fcntl",
        "fork",
        "fstat",
        "fstatfs",
        "futex",
        "getcwd",
        "getdents64",
        "getegid",
        "geteuid",
        "getgid",
        "getpgrp",
        "getpid",
        "getppid",
        "getrandom",
        "gettid",
        "getuid",
        "ioctl",
        "kill",
        "lseek",
        "lstat",
        "mmap",
        "mprotect",
        "munmap",
        "newfstatat",
        "open",
        "openat",
        "pipe",
        "pipe2",
        "poll",
        "prctl",
        "pread64",
        "prlimit64",
        "read",
        "readlink",
        "rseq",
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "rt_sigsuspend",
        "sendfile",
        "set_robust_list",
        "set_tid_address",
        "setpgid",
        "setsid",
        "stat",
        "statx",
        "umask",
        "uname",
        "vfork",
        "wait4",
        "waitpid",
        "write",
        "writev",
    ]
    .map(String::from)
    .to_vec();
    for no_new_privileges in [true, false] {
        let got = output(&mut guest, "uname -s; mount -t tmpfs x /tmp 2>&1; cat /etc/passwd | wc -l", |spec| {
            spec["process"]["noNewPrivileges"] = no_new_privileges.into();
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    {"names": names, "action": "SCMP_ACT_ALLOW"},
                    {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
                ]
            });
        })
        .await;
        assert!(
            got.starts_with("Linux\n") && got.contains("permission denied") && got.ends_with("2\n"),
            "{got}"
        );
    }
    guest.stop().await;
}
