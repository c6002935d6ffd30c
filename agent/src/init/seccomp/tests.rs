//! Programs are run as the kernel runs them, and compared with what the profile says.

use proptest::prelude::*;
use seccompiler::BpfProgram;
use serde_json::{Value, json};

use super::abi::{AUDIT_I386, AUDIT_X86_64, X32_BIT};
use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_THREAD;
const AUDIT_AARCH64: u32 = 0xc000_00b7;

fn errno(number: u32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number
}

/// Runs classic BPF as the kernel would on seccomp_data: what seccomp programs use of it.
fn run(program: &BpfProgram, data: &[u32; 16]) -> u32 {
    let (mut a, mut pc) = (0_u32, 0_usize);
    loop {
        let op = &program[pc];
        pc += 1;
        let jump = |taken: bool| usize::from(if taken { op.jt } else { op.jf });
        match op.code {
            0x20 => a = data[usize::try_from(op.k).unwrap() / 4],
            0x05 => pc += usize::try_from(op.k).unwrap(),
            0x15 => pc += jump(a == op.k),
            0x25 => pc += jump(a > op.k),
            0x35 => pc += jump(a >= op.k),
            0x54 => a &= op.k,
            0x06 => return op.k,
            other => panic!("opcode {other:#x}"),
        }
    }
}

fn asked(filter: &Filter, arch: u32, nr: u32, args: &[u64]) -> u32 {
    let mut data = [0_u32; 16];
    (data[0], data[1]) = (nr, arch);
    for (n, arg) in args.iter().enumerate() {
        data[4 + 2 * n] = u32::try_from(arg & 0xffff_ffff).unwrap();
        data[5 + 2 * n] = u32::try_from(arg >> 32).unwrap();
    }
    run(&filter.program, &data)
}

fn verdict(filter: &Filter, nr: i64, arg0: u64) -> u32 {
    asked(filter, AUDIT_X86_64, u32::try_from(nr).unwrap(), &[arg0])
}

fn filter(value: Value) -> Filter {
    build(&serde_json::from_value(value).unwrap()).unwrap().0
}

#[test]
fn an_allow_list_with_several_errno_values_and_arguments() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["read", "write", "from_the_future"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0xffff_ffff_u32, "op": "SCMP_CMP_EQ"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 2_114_060_288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        ]
    }));
    for (nr, arg0, expected) in [
        (libc::SYS_read, 0, ALLOW),
        (libc::SYS_mount, 0, errno(1)),
        (libc::SYS_personality, 8, ALLOW),
        (libc::SYS_personality, 0xffff_ffff, ALLOW),
        (libc::SYS_personality, 9, errno(1)),
        (libc::SYS_clone, 0x11, ALLOW),
        (libc::SYS_clone, 0x1000_0000, errno(1)),
        (libc::SYS_clone3, 0, errno(38)),
        // Newer than the newest named: not there, rather than forbidden.
        (462, 0, errno(38)),
    ] {
        assert_eq!(verdict(&filter, nr, arg0), expected, "{nr} {arg0:x}");
    }
}

#[test]
fn a_deny_list_with_several_actions_seccomp_itself_among_them() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["seccomp"], "action": "SCMP_ACT_ERRNO", "errnoRet": 14},
            {"names": ["rmdir"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["sync"], "action": "SCMP_ACT_LOG"}
        ]
    }));
    assert_eq!(verdict(&filter, libc::SYS_read, 0), ALLOW);
    assert_eq!(verdict(&filter, libc::SYS_mkdir, 0), errno(13));
    assert_eq!(verdict(&filter, libc::SYS_seccomp, 0), errno(14));
    let killed = libc::SECCOMP_RET_KILL_PROCESS;
    assert_eq!(verdict(&filter, libc::SYS_rmdir, 0), killed);
    assert_eq!(verdict(&filter, libc::SYS_sync, 0), libc::SECCOMP_RET_LOG);
    assert_eq!(verdict(&filter, 462, 0), ALLOW);
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5,
        "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]
    }));
    assert_eq!(verdict(&filter, libc::SYS_socket, 1), ALLOW);
    assert_eq!(verdict(&filter, libc::SYS_socket, 2), ALLOW);
    assert_eq!(verdict(&filter, libc::SYS_socket, 40), errno(5));
}

/// What containerd's default profile does with sockets, and what it leaves out.
fn of_all_architectures() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["read", "fstat64", "ioctl", "accept", "semop"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]
    })
}

#[test]
fn each_architecture_has_its_own_numbers() {
    let filter = filter(of_all_architectures());
    for (arch, nr, expected) in [
        (AUDIT_X86_64, 0, ALLOW),
        (AUDIT_X86_64, 3, errno(1)),
        (AUDIT_I386, 3, ALLOW),
        // x86_64's read: restart_syscall of i386, which is not named.
        (AUDIT_I386, 0, errno(1)),
        (AUDIT_I386, 197, ALLOW),
        (AUDIT_I386, 54, ALLOW),
        // i386's mount.
        (AUDIT_I386, 21, errno(1)),
        (AUDIT_X86_64, X32_BIT, ALLOW),
        (AUDIT_X86_64, X32_BIT | 514, ALLOW),
        (AUDIT_X86_64, X32_BIT | 16, errno(1)),
        (AUDIT_X86_64, X32_BIT | 165, errno(1)),
        // Newer than what is named, for each by its own newest.
        (AUDIT_X86_64, 200, errno(38)),
        (AUDIT_I386, 370, errno(38)),
        (AUDIT_X86_64, X32_BIT | 515, errno(38)),
        // No machine of these.
        (AUDIT_AARCH64, 0, KILL),
    ] {
        let got = asked(&filter, arch, nr, &[]);
        assert_eq!(got, expected, "{arch:x} {nr:x}: {got:x}");
    }
}

#[test]
fn sockets_of_i386_are_judged_by_what_socketcall_means() {
    let filter = filter(of_all_architectures());
    for (nr, args, expected) in [
        // socket directly, by its family; through socketcall it lies in memory.
        (359, [2, 0], ALLOW),
        (359, [40, 0], errno(1)),
        (102, [1, 0xffff_d000], ALLOW),
        (102, [5, 0], ALLOW),
        (102, [2, 0], errno(1)),
        (117, [1, 0], ALLOW),
        (117, [2, 0], errno(1)),
    ] {
        assert_eq!(
            asked(&filter, AUDIT_I386, nr, &args),
            expected,
            "{nr} {args:?}"
        );
    }
}

#[test]
fn only_the_lower_half_of_an_argument_counts_where_registers_have_32_bits() {
    let filter = filter(of_all_architectures());
    let high = 1 << 40 | 8;
    assert_eq!(verdict(&filter, libc::SYS_personality, high), errno(1));
    assert_eq!(asked(&filter, AUDIT_I386, 136, &[high]), ALLOW);
    assert_eq!(asked(&filter, AUDIT_X86_64, X32_BIT | 135, &[high]), ALLOW);
    assert_eq!(asked(&filter, AUDIT_I386, 136, &[9]), errno(1));
}

#[test]
fn an_architecture_that_is_not_named_ends_the_thread() {
    for architectures in [
        json!([]),
        json!(["SCMP_ARCH_X86_64"]),
        json!(["SCMP_ARCH_AARCH64"]),
    ] {
        let mut profile = of_all_architectures();
        profile["architectures"] = architectures;
        let filter = filter(profile);
        assert_eq!(verdict(&filter, libc::SYS_read, 0), ALLOW);
        assert_eq!(asked(&filter, AUDIT_I386, 3, &[]), KILL);
        assert_eq!(asked(&filter, AUDIT_X86_64, X32_BIT, &[]), KILL);
        assert_eq!(asked(&filter, AUDIT_X86_64, 0xffff_fffe, &[]), KILL);
        // A tracer has the kernel skip a call.
        assert_eq!(asked(&filter, AUDIT_X86_64, u32::MAX, &[]), errno(1));
    }
    // One of them alone is beside x86_64.
    let mut profile = of_all_architectures();
    profile["architectures"] = json!(["SCMP_ARCH_X86"]);
    let filter = filter(profile);
    assert_eq!(verdict(&filter, libc::SYS_read, 0), ALLOW);
    assert_eq!(asked(&filter, AUDIT_I386, 3, &[]), ALLOW);
    assert_eq!(asked(&filter, AUDIT_X86_64, X32_BIT, &[]), KILL);
}

#[test]
fn a_default_that_lets_calls_happen_does_so_with_newer_ones() {
    for (default, newer) in [
        ("SCMP_ACT_ALLOW", ALLOW),
        ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
        ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 1),
        ("SCMP_ACT_KILL", errno(38)),
        ("SCMP_ACT_TRAP", errno(38)),
    ] {
        let filter = filter(json!({
            "defaultAction": default,
            "syscalls": [{"names": ["read", "mkdir"], "action": "SCMP_ACT_ERRNO"}]
        }));
        assert_eq!(verdict(&filter, 84, 0), newer, "{default}");
    }
    // What knows no call at all knows no newest.
    let filter = filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}));
    assert_eq!(verdict(&filter, libc::SYS_read, 0), errno(1));
    assert_eq!(verdict(&filter, 462, 0), errno(1));
}

#[test]
fn of_rules_for_one_call_the_first_without_arguments_counts() {
    let conditional = json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 20,
        "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]});
    let refused = json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 21});
    let killed = json!({"names": ["mkdir"], "action": "SCMP_ACT_KILL"});
    for (syscalls, expected) in [
        (json!([conditional, refused, killed]), errno(21)),
        (json!([killed, conditional, refused]), KILL),
        (json!([conditional]), errno(20)),
    ] {
        let filter = filter(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls}));
        assert_eq!(verdict(&filter, libc::SYS_mkdir, 1), expected, "{syscalls}");
    }
}

#[test]
fn of_rules_that_hold_at_once_the_strictest_counts() {
    let rule = |action, value, op| json!({"names": ["mkdir"], "action": action, "args": [{"index": 0, "value": value, "op": op}]});
    let filter = filter(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        rule("SCMP_ACT_LOG", 1, "SCMP_CMP_GE"),
        rule("SCMP_ACT_ERRNO", 2, "SCMP_CMP_GE"),
        rule("SCMP_ACT_KILL_PROCESS", 4, "SCMP_CMP_GE"),
        rule("SCMP_ACT_TRAP", 3, "SCMP_CMP_GE")
    ]}));
    for (arg, expected) in [
        (0, ALLOW),
        (1, libc::SECCOMP_RET_LOG),
        (2, errno(1)),
        (3, libc::SECCOMP_RET_TRAP),
        (4, libc::SECCOMP_RET_KILL_PROCESS),
    ] {
        assert_eq!(verdict(&filter, libc::SYS_mkdir, arg), expected, "{arg}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_by_name() {
    let args = |index, op| {
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": index, "value": 1, "op": op}]}]})
    };
    for (value, word) in [
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "SCMP_ACT_NOTIFY",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
            "listenerPath",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
            "WAIT_KILLABLE",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_VAX"]}),
            "SCMP_ARCH_VAX",
        ),
        (args(0, "SCMP_CMP_X"), "SCMP_CMP_X"),
        (args(6, "SCMP_CMP_EQ"), "syscalls.args"),
    ] {
        let refused = build(&serde_json::from_value(value).unwrap()).unwrap_err();
        assert!(refused.contains(word), "{refused}");
    }
}

#[test]
fn a_profile_that_the_kernel_would_not_take_is_refused() {
    let rules: Vec<Value> = (0..2000)
        .map(|value| json!({"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]}))
        .collect();
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules});
    let refused = build(&serde_json::from_value(profile).unwrap()).unwrap_err();
    assert!(refused.contains("4096"), "{refused}");
}

/// Calls, rules and arguments at random; the expected answer is found rule by rule.
#[derive(Debug, Clone)]
struct Rule {
    name: &'static str,
    errno: u32,
    arg: Option<(u8, u64)>,
}

const NAMES: [&str; 10] = [
    "read", "write", "fstat64", "ioctl", "mount", "socket", "accept", "semop", "clone3", "time",
];

fn any_rule() -> impl Strategy<Value = Rule> {
    let arg = prop::option::of((0..2_u8, 0..3_u64));
    (prop::sample::select(&NAMES[..]), 2..5_u32, arg).prop_map(|(name, errno, arg)| Rule {
        name,
        errno,
        arg,
    })
}

fn expected(rules: &[Rule], abi: Abi, nr: u32, args: [u64; 2]) -> u32 {
    let mut unconditional = None;
    let mut conditional = None;
    let mut newest = None;
    for rule in rules {
        for call in abi.calls(rule.name) {
            if call.selector.is_none() {
                newest = newest.max(Some(call.number));
            }
            if call.number != nr {
                continue;
            }
            match (call.selector, rule.arg) {
                (None, None) => unconditional = unconditional.or(Some(rule.errno)),
                (selector, arg) => {
                    let selected = selector.is_none_or(|value| args[0] == u64::from(value));
                    let compared = arg.is_none_or(|(index, value)| {
                        selector.is_some() && index == 0 || args[usize::from(index)] == value
                    });
                    if selected && compared {
                        conditional = conditional.or(Some(rule.errno));
                    }
                }
            }
        }
    }
    match unconditional.or(conditional) {
        Some(number) => errno(number),
        None if newest.is_some_and(|newest| nr > newest) => {
            // Calls that an argument tells apart may lie beyond what is named; all up to them are older.
            let last = rules
                .iter()
                .flat_map(|rule| abi.calls(rule.name))
                .map(|call| call.number);
            if last
                .max()
                .is_some_and(|last| nr > last && Some(last) == newest)
            {
                errno(38)
            } else {
                errno(1)
            }
        }
        None => errno(1),
    }
}

proptest! {
    #[test]
    fn a_program_answers_as_its_rules_say(
        rules in prop::collection::vec(any_rule(), 0..12),
        abi in prop::sample::select(&[Abi::X86_64, Abi::I386, Abi::X32][..]),
        calls in prop::collection::vec((0..520_u32, [0..6_u64, 0..3_u64]), 1..200),
    ) {
        let syscalls: Vec<Value> = rules.iter().map(|rule| {
            let args: Vec<Value> = rule.arg.iter()
                .map(|(index, value)| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"})).collect();
            json!({"names": [rule.name], "action": "SCMP_ACT_ERRNO", "errnoRet": rule.errno, "args": args})
        }).collect();
        let filter = filter(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"], "syscalls": syscalls
        }));
        let (arch, bit) = match abi {
            Abi::X86_64 => (AUDIT_X86_64, 0),
            Abi::I386 => (AUDIT_I386, 0),
            Abi::X32 => (AUDIT_X86_64, X32_BIT),
        };
        let named = rules.iter().flat_map(|rule| abi.calls(rule.name)).map(|call| call.number);
        let named = named.flat_map(|number| (0..6).map(move |arg| (number & !X32_BIT, [arg, arg % 3])));
        for (nr, args) in calls.into_iter().chain(named) {
            let nr = nr | bit;
            let got = asked(&filter, arch, nr, &args);
            prop_assert_eq!(got, expected(&rules, abi, nr, args), "{:?} {} {:?}", abi, nr, args);
        }
    }
}
