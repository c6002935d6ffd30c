//! `linux.seccomp` as a stack of filters.
//!
//! seccompiler knows one action for what matches and one for what does not, so a profile becomes a
//! stack: the first program lets through what any rule names and answers the default to the rest;
//! each further program carries one other action. The kernel takes the strictest answer of all
//! (seccomp(2)), and among errno values that of the program installed last.
use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{
    agent::Agent,
    failure::Failure,
    filter::{Filters, refuse_newer},
    syscalls,
};
use crate::spec::{Seccomp, Syscall, SyscallArg};

const FLAG_LOG: libc::c_ulong = 1 << 1;
const FLAG_SPEC_ALLOW: libc::c_ulong = 1 << 2;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Refuses a profile that cannot be enforced.
///
/// # Errors
/// A sentence naming the field.
pub fn check(profile: &Seccomp) -> Result<(), String> {
    build(profile).map(drop)
}

/// The filters of `profile`.
pub fn compile(agent: &Agent, profile: &Seccomp) -> Result<Filters, Failure> {
    let (filters, unknown) = build(profile).map_err(Failure::from)?;
    if !unknown.is_empty() {
        // Names of other architectures are ordinary in profiles: one line for all.
        agent.warn(format!(
            "linux.seccomp: {} unknown system calls were left out",
            unknown.len()
        ));
    }
    Ok(filters)
}

fn build(profile: &Seccomp) -> Result<(Filters, Vec<String>), String> {
    if !profile.listener_path.is_empty() || !profile.listener_metadata.is_empty() {
        return Err("linux.seccomp.listenerPath (user notification) is not supported".into());
    }
    let flags = flags(&profile.flags)?;
    let default = action(
        &profile.default_action,
        profile.default_errno_ret,
        "defaultAction",
    )?;
    let mut named = Rules::new();
    let mut by_action: Vec<(SeccompAction, Rules)> = Vec::new();
    let mut unknown = Vec::new();
    for syscall in &profile.syscalls {
        let verdict = action(&syscall.action, syscall.errno_ret, "syscalls.action")?;
        let rules = rules_of(syscall)?;
        for name in &syscall.names {
            let Some(number) = syscalls::number(name) else {
                unknown.push(name.clone());
                continue;
            };
            // What repeats the default adds nothing.
            if verdict == default {
                continue;
            }
            add(&mut named, number, &rules);
            if verdict != SeccompAction::Allow {
                let index = by_action
                    .iter()
                    .position(|(a, _)| *a == verdict)
                    .unwrap_or_else(|| {
                        by_action.push((verdict.clone(), Rules::new()));
                        by_action.len() - 1
                    });
                if let Some((_, entry)) = by_action.get_mut(index) {
                    add(entry, number, &rules);
                }
            }
        }
    }
    // A program that refuses seccomp itself lets no further one in: it comes last.
    let last_words = |rules: &Rules| rules.contains_key(&libc::SYS_seccomp);
    let mut programs = Vec::new();
    let mut last = Vec::new();
    if default != SeccompAction::Allow {
        let refuses_seccomp = !last_words(&named);
        let newest = named
            .keys()
            .next_back()
            .and_then(|n| u32::try_from(*n).ok());
        let mut main = program(named, default.clone(), SeccompAction::Allow)?;
        if let (SeccompAction::Errno(_), Some(newest)) = (&default, newest) {
            main = refuse_newer(main, newest, libc::ENOSYS.unsigned_abs());
        }
        if refuses_seccomp {
            last.push(main)
        } else {
            programs.push(main)
        }
    }
    for (verdict, rules) in by_action {
        let list = if last_words(&rules) {
            &mut last
        } else {
            &mut programs
        };
        list.push(program(rules, SeccompAction::Allow, verdict)?);
    }
    if last.len() > 1 {
        return Err("linux.seccomp: two actions for the system call seccomp".into());
    }
    programs.extend(last);
    Ok((Filters { programs, flags }, unknown))
}

/// Adds rules for one system call; an empty list is "whatever the arguments", which then stays so.
fn add(rules: &mut Rules, number: i64, more: &[SeccompRule]) {
    match rules.get_mut(&number) {
        None => {
            rules.insert(number, more.to_vec());
        }
        Some(present) if present.is_empty() || more.is_empty() => present.clear(),
        Some(present) => present.extend_from_slice(more),
    }
}

fn program(
    rules: Rules,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch =
        TargetArch::try_from(std::env::consts::ARCH).map_err(|e| format!("linux.seccomp: {e}"))?;
    SeccompFilter::new(rules, mismatch, matched, arch)
        .and_then(BpfProgram::try_from)
        .map_err(|e| format!("linux.seccomp: {e}"))
}

fn flags(names: &[String]) -> Result<libc::c_ulong, String> {
    let mut flags = 0;
    for name in names {
        flags |= match name.as_str() {
            // The process has one thread when the filter is installed.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
            other => return Err(format!("linux.seccomp.flags: {other} is not supported")),
        };
    }
    Ok(flags)
}

fn action(name: &str, errno: Option<u32>, field: &str) -> Result<SeccompAction, String> {
    let errno_or = |default: i32| errno.unwrap_or_else(|| default.unsigned_abs());
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(errno_or(libc::EPERM)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_LOG" => SeccompAction::Log,
        "SCMP_ACT_TRACE" => SeccompAction::Trace(errno_or(libc::EPERM)),
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        other => return Err(format!("linux.seccomp.{field}: {other:?} is not supported")),
    })
}

/// The argument conditions of a rule: all must hold, but conditions on the same argument are
/// alternatives (as in runc, since libseccomp 2.2 cannot join them).
fn rules_of(syscall: &Syscall) -> Result<Vec<SeccompRule>, String> {
    if syscall.args.is_empty() {
        return Ok(Vec::new());
    }
    let conditions: Vec<(u8, SeccompCondition)> = syscall
        .args
        .iter()
        .map(|arg| Ok((arg.index, condition(arg)?)))
        .collect::<Result<_, String>>()?;
    let repeated = conditions.iter().enumerate().any(|(n, (index, _))| {
        conditions
            .iter()
            .skip(n + 1)
            .any(|(other, _)| other == index)
    });
    let rule = |conditions| {
        SeccompRule::new(conditions).map_err(|e| format!("linux.seccomp.syscalls.args: {e}"))
    };
    if repeated {
        conditions
            .into_iter()
            .map(|(_, condition)| rule(vec![condition]))
            .collect()
    } else {
        Ok(vec![rule(
            conditions
                .into_iter()
                .map(|(_, condition)| condition)
                .collect(),
        )?])
    }
}

fn condition(arg: &SyscallArg) -> Result<SeccompCondition, String> {
    let (op, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (SeccompCmpOp::Ne, arg.value),
        "SCMP_CMP_LT" => (SeccompCmpOp::Lt, arg.value),
        "SCMP_CMP_LE" => (SeccompCmpOp::Le, arg.value),
        "SCMP_CMP_EQ" => (SeccompCmpOp::Eq, arg.value),
        "SCMP_CMP_GE" => (SeccompCmpOp::Ge, arg.value),
        "SCMP_CMP_GT" => (SeccompCmpOp::Gt, arg.value),
        "SCMP_CMP_MASKED_EQ" => (SeccompCmpOp::MaskedEq(arg.value), arg.value_two),
        other => {
            return Err(format!(
                "linux.seccomp.syscalls.args.op: {other:?} is not known"
            ));
        }
    };
    SeccompCondition::new(arg.index, SeccompCmpArgLen::Qword, op, value)
        .map_err(|e| format!("linux.seccomp.syscalls.args: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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

    /// The kernel's choice among stacked programs: lowest action value as signed wins, and of equal
    /// ones the last installed.
    fn verdict(filters: &Filters, nr: i64, arg0: u64) -> u32 {
        const ARCH_X86_64: u32 = 0xc000_003e;
        let mut data = [0_u32; 16];
        data[0] = u32::try_from(nr).unwrap();
        data[1] = ARCH_X86_64;
        data[4] = u32::try_from(arg0 & 0xffff_ffff).unwrap();
        data[5] = u32::try_from(arg0 >> 32).unwrap();
        let mut best = libc::SECCOMP_RET_ALLOW;
        for program in filters.programs.iter().rev() {
            let got = run(program, &data);
            let key = |v: u32| (v & 0xffff_0000).cast_signed();
            if key(got) < key(best) {
                best = got;
            }
        }
        best
    }

    fn filters(value: serde_json::Value) -> Filters {
        build(&serde_json::from_value(value).unwrap()).unwrap().0
    }

    #[test]
    fn an_allow_list_with_several_errno_values_and_arguments() {
        let filters = filters(json!({
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
        let errno = |n| libc::SECCOMP_RET_ERRNO | n;
        assert_eq!(
            verdict(&filters, libc::SYS_read, 0),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(&filters, libc::SYS_mount, 0), errno(1));
        assert_eq!(
            verdict(&filters, libc::SYS_personality, 8),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            verdict(&filters, libc::SYS_personality, 0xffff_ffff),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(&filters, libc::SYS_personality, 9), errno(1));
        assert_eq!(
            verdict(&filters, libc::SYS_clone, 0x11),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(&filters, libc::SYS_clone, 0x1000_0000), errno(1));
        assert_eq!(verdict(&filters, libc::SYS_clone3, 0), errno(38));
        // Newer than the newest named: not there, rather than forbidden.
        assert_eq!(verdict(&filters, 462, 0), errno(38));
    }

    #[test]
    fn the_program_that_refuses_seccomp_itself_is_installed_last() {
        let named = json!([
            {"names": ["read", "mkdir"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["seccomp"], "action": "SCMP_ACT_ERRNO", "errnoRet": 14}
        ]);
        for syscalls in [named.clone(), json!([named[0], named[1]])] {
            let filters = filters(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": syscalls}));
            let (last, earlier) = filters.programs.split_last().unwrap();
            let judged = |program: &BpfProgram| {
                let one = Filters {
                    programs: vec![program.clone()],
                    flags: 0,
                };
                verdict(&one, libc::SYS_seccomp, 0)
            };
            assert_ne!(judged(last), libc::SECCOMP_RET_ALLOW);
            assert!(earlier.iter().all(|p| judged(p) == libc::SECCOMP_RET_ALLOW));
            assert_eq!(
                verdict(&filters, libc::SYS_rmdir, 0),
                libc::SECCOMP_RET_ERRNO | 13
            );
        }
    }

    #[test]
    fn a_deny_list_with_several_actions() {
        let filters = filters(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
                {"names": ["rmdir"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["sync"], "action": "SCMP_ACT_LOG"}
            ]
        }));
        assert_eq!(
            verdict(&filters, libc::SYS_read, 0),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            verdict(&filters, libc::SYS_mkdir, 0),
            libc::SECCOMP_RET_ERRNO | 13
        );
        assert_eq!(
            verdict(&filters, libc::SYS_rmdir, 0),
            libc::SECCOMP_RET_KILL_PROCESS
        );
        assert_eq!(verdict(&filters, libc::SYS_sync, 0), libc::SECCOMP_RET_LOG);
        assert_eq!(verdict(&filters, 462, 0), libc::SECCOMP_RET_ALLOW);
    }

    #[test]
    fn conditions_on_one_argument_are_alternatives() {
        let filters = filters(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5,
            "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]
        }));
        assert_eq!(
            verdict(&filters, libc::SYS_socket, 1),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            verdict(&filters, libc::SYS_socket, 2),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            verdict(&filters, libc::SYS_socket, 40),
            libc::SECCOMP_RET_ERRNO | 5
        );
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_by_name() {
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
                json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_X"}]}]}),
                "SCMP_CMP_X",
            ),
        ] {
            let refused = build(&serde_json::from_value(value).unwrap()).unwrap_err();
            assert!(refused.contains(word), "{refused}");
        }
    }
}
