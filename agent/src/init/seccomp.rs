//! `linux.seccomp` as one filter, as runc and libseccomp have it.
//!
//! A name means a call in each ABI that the profile's `architectures` name; calls of other ABIs end the thread. Of rules
//! without arguments for one call the first counts, and none with arguments beside it; of rules with arguments that hold
//! at once, the strictest.
mod abi;
mod program;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::{agent::Agent, failure::Failure, filter::Filter, syscalls};
use crate::spec::{Seccomp, Syscall, SyscallArg};
use abi::{Abi, Call};
use program::{Answer, Answers, Judged, Verdict};

const FLAG_LOG: libc::c_ulong = 1 << 1;
const FLAG_SPEC_ALLOW: libc::c_ulong = 1 << 2;

/// Refuses a profile that cannot be enforced.
///
/// # Errors
/// A sentence naming the field.
pub fn check(profile: &Seccomp) -> Result<(), String> {
    build(profile).map(drop)
}

/// The filter of `profile`.
pub fn compile(agent: &Agent, profile: &Seccomp) -> Result<Filter, Failure> {
    let (filter, unknown) = build(profile).map_err(Failure::from)?;
    if !unknown.is_empty() {
        // Names of other architectures are ordinary in profiles: one line for all.
        agent.warn(format!(
            "linux.seccomp: {} unknown system calls were left out",
            unknown.len()
        ));
    }
    Ok(filter)
}

fn build(profile: &Seccomp) -> Result<(Filter, Vec<String>), String> {
    if !profile.listener_path.is_empty() || !profile.listener_metadata.is_empty() {
        return Err("linux.seccomp.listenerPath (user notification) is not supported".into());
    }
    let flags = flags(&profile.flags)?;
    let default = action(
        &profile.default_action,
        profile.default_errno_ret,
        "defaultAction",
    )?;
    let mut abis: Vec<Judged> = Abi::named(&profile.architectures)?
        .into_iter()
        .map(|abi| Judged {
            abi,
            calls: BTreeMap::new(),
            newest: None,
        })
        .collect();
    let mut unknown = Vec::new();
    for syscall in &profile.syscalls {
        let verdict = action(&syscall.action, syscall.errno_ret, "syscalls.action")?;
        let alternatives = alternatives(syscall)?;
        for name in &syscall.names {
            if syscalls::numbers(name).is_none() {
                unknown.push(name.clone());
            }
            for judged in &mut abis {
                for call in judged.abi.calls(name) {
                    if call.selector.is_none() {
                        judged.newest = judged.newest.max(Some(call.number));
                    }
                    // What repeats the default adds nothing.
                    if verdict != default {
                        let rules = rules(&alternatives, call, judged.abi)?;
                        add(
                            &mut judged.calls,
                            call.number,
                            rules,
                            verdict.clone().into(),
                        );
                    }
                }
            }
        }
    }
    let answers = Answers {
        newer: if refuses(&default) {
            // A profile cannot name what did not exist when it was written; ENOSYS makes a C library fall back where
            // EPERM makes it fail.
            SeccompAction::Errno(libc::ENOSYS.unsigned_abs()).into()
        } else {
            default.clone().into()
        },
        default: default.into(),
        foreign: SeccompAction::KillThread.into(),
    };
    let program = program::whole(&abis, answers)?;
    Ok((Filter { program, flags }, unknown))
}

/// Whether a call that meets `action` does not happen. (A tracer may let it.)
fn refuses(action: &SeccompAction) -> bool {
    !matches!(
        action,
        SeccompAction::Allow | SeccompAction::Log | SeccompAction::Trace(_)
    )
}

/// Adds rules for one call; an empty list is "whatever the arguments".
fn add(calls: &mut BTreeMap<u32, Verdict>, number: u32, rules: Vec<SeccompRule>, answer: Answer) {
    let more = rules.into_iter().map(|rule| (rule, answer));
    match calls.get_mut(&number) {
        Some(Verdict::Always(_)) => {}
        Some(Verdict::ByRule(present)) if more.len() > 0 => {
            present.extend(more);
            present.sort_by_key(|(_, answer)| lenience(*answer));
        }
        _ => {
            let verdict = if more.len() > 0 {
                Verdict::ByRule(more.collect())
            } else {
                Verdict::Always(answer)
            };
            calls.insert(number, verdict);
        }
    }
}

/// The kernel's own order among the answers of several filters (seccomp(2)): the strictest is the least.
fn lenience(answer: Answer) -> i32 {
    (answer & libc::SECCOMP_RET_ACTION_FULL).cast_signed()
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

/// A comparison of one argument.
#[derive(Clone)]
struct Comparison {
    index: u8,
    op: SeccompCmpOp,
    value: u64,
}

impl Comparison {
    fn of(arg: &SyscallArg) -> Result<Self, String> {
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
        let index = arg.index;
        let comparison = Self { index, op, value };
        // An index beyond the last argument is refused whether or not any ABI has the call.
        comparison.condition(Abi::X86_64)?;
        Ok(comparison)
    }

    fn condition(&self, abi: Abi) -> Result<SeccompCondition, String> {
        let width = if abi.is_narrow() {
            SeccompCmpArgLen::Dword
        } else {
            SeccompCmpArgLen::Qword
        };
        SeccompCondition::new(self.index, width, self.op.clone(), self.value)
            .map_err(|e| format!("linux.seccomp.syscalls.args: {e}"))
    }
}

/// The argument conditions of a rule: all must hold, but conditions on the same argument are
/// alternatives (as in runc, since libseccomp 2.2 cannot join them). None: whatever the arguments.
fn alternatives(syscall: &Syscall) -> Result<Vec<Vec<Comparison>>, String> {
    if syscall.args.is_empty() {
        return Ok(Vec::new());
    }
    let comparisons: Vec<Comparison> = syscall
        .args
        .iter()
        .map(Comparison::of)
        .collect::<Result<_, String>>()?;
    let repeated = comparisons.iter().enumerate().any(|(n, one)| {
        let mut others = comparisons.iter().skip(n + 1);
        others.any(|other| other.index == one.index)
    });
    Ok(if repeated {
        comparisons.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![comparisons]
    })
}

/// The rules under which a call is meant. Where the first argument says what a call is, it is not what the profile
/// compares; the others are, as libseccomp has it.
fn rules(
    alternatives: &[Vec<Comparison>],
    call: Call,
    abi: Abi,
) -> Result<Vec<SeccompRule>, String> {
    let selector = call.selector.map(|selector| Comparison {
        index: 0,
        op: SeccompCmpOp::Eq,
        value: selector.into(),
    });
    let only_selected = [Vec::new()];
    let alternatives = if selector.is_some() && alternatives.is_empty() {
        &only_selected
    } else {
        alternatives
    };
    alternatives
        .iter()
        .map(|comparisons| {
            let compared = comparisons
                .iter()
                .filter(|comparison| selector.is_none() || comparison.index != 0);
            let conditions = selector.iter().chain(compared);
            let conditions = conditions
                .map(|comparison| comparison.condition(abi))
                .collect::<Result<_, _>>()?;
            SeccompRule::new(conditions).map_err(|e| format!("linux.seccomp.syscalls.args: {e}"))
        })
        .collect()
}
