//! One seccomp program out of what each ABI answers: the ABI first, then the number by halving the range.
//!
//! A profile names hundreds of calls, but in few stretches with one answer, so the program is short and a call meets about
//! eight comparisons of it.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompRule, sock_filter};

use super::abi::{AUDIT_I386, AUDIT_X86_64, Abi, X32_BIT};

/// Instructions that the kernel takes (linux/bpf_common.h, `BPF_MAXINSNS`).
const LONGEST: usize = 4096;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` has the call's number and the ABI.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// What a call is answered: a `SECCOMP_RET_…` value.
pub type Answer = u32;

/// How a call of one number is judged.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// Whatever the arguments.
    Always(Answer),
    /// By the first rule that holds, or by the default.
    ByRule(Vec<(SeccompRule, Answer)>),
}

/// What one ABI's calls are answered.
#[derive(Debug)]
pub struct Judged {
    pub abi: Abi,
    pub calls: BTreeMap<u32, Verdict>,
    /// The last call that the profile knows; later ones are answered apart.
    pub newest: Option<u32>,
}

/// Answers that are not of one call.
#[derive(Debug, Clone, Copy)]
pub struct Answers {
    /// To a call that the profile does not judge.
    pub default: Answer,
    /// To a call newer than the newest that it knows.
    pub newer: Answer,
    /// To a call of an ABI that it does not name.
    pub foreign: Answer,
}

fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn returning(answer: Answer) -> BpfProgram {
    vec![op(RETURN, 0, 0, answer)]
}

/// The calls from a number on, up to the next one's, and the instructions that answer them.
struct Stretch {
    from: u32,
    answer: BpfProgram,
}

/// Stretches in order of their numbers.
#[derive(Default)]
struct Stretches(Vec<Stretch>);

impl Stretches {
    /// Answers calls from `from` on; without effect if that is what precedes it.
    fn push(&mut self, from: u32, answer: BpfProgram) {
        if self.0.last().is_none_or(|last| last.answer != answer) {
            self.0.push(Stretch { from, answer });
        }
    }

    fn add(&mut self, judged: &Judged, first: u32, answers: Answers) {
        let mut next = first;
        for (number, verdict) in &judged.calls {
            if *number > next {
                self.push(next, returning(answers.default));
            }
            self.push(*number, answer(verdict, answers.default));
            next = number.saturating_add(1);
        }
        match judged.newest {
            // Calls that are told apart by an argument do not count: they may lie beyond.
            Some(newest) if newest.saturating_add(1) >= next => {
                if newest >= next {
                    self.push(next, returning(answers.default));
                }
                self.push(newest.saturating_add(1), returning(answers.newer));
            }
            _ => self.push(next, returning(answers.default)),
        }
    }
}

fn answer(verdict: &Verdict, default: Answer) -> BpfProgram {
    match verdict {
        Verdict::Always(answer) => returning(*answer),
        Verdict::ByRule(rules) => {
            let mut program = BpfProgram::new();
            for (rule, answer) in rules {
                // A rule that does not hold goes on after the one instruction that follows it.
                program.extend(BpfProgram::from(rule.clone()));
                program.push(op(RETURN, 0, 0, *answer));
            }
            program.push(op(RETURN, 0, 0, default));
            program
        }
    }
}

/// Finds the stretch of the number that is loaded.
fn tree(stretches: &[Stretch]) -> Result<BpfProgram, String> {
    if let [only] = stretches {
        return Ok(only.answer.clone());
    }
    let (lower, upper) = stretches.split_at(stretches.len() / 2);
    let Some(middle) = upper.first() else {
        return Ok(BpfProgram::new());
    };
    let (lower, upper) = (tree(lower)?, tree(upper)?);
    let mut program = match u8::try_from(lower.len()) {
        Ok(length) => vec![op(JUMP_AT_LEAST, length, 0, middle.from)],
        Err(_) => vec![op(JUMP_AT_LEAST, 0, 1, middle.from), jump(lower.len())?],
    };
    program.extend(lower);
    program.extend(upper);
    Ok(program)
}

fn jump(length: usize) -> Result<sock_filter, String> {
    let length = u32::try_from(length).map_err(|_| too_long(length))?;
    Ok(op(JUMP, 0, 0, length))
}

fn too_long(length: usize) -> String {
    format!(
        "linux.seccomp: the profile makes {length} instructions, the kernel takes {LONGEST}; it needs fewer rules with arguments"
    )
}

/// The program of all ABIs.
///
/// # Errors
/// A sentence, if the kernel would not take it.
pub fn whole(abis: &[Judged], answers: Answers) -> Result<BpfProgram, String> {
    let of = |abi| abis.iter().find(|judged| judged.abi == abi);
    let section = |stretches: Stretches| -> Result<BpfProgram, String> {
        let mut program = vec![op(LOAD, 0, 0, NUMBER)];
        program.extend(tree(&stretches.0)?);
        Ok(program)
    };
    let mut wide = Stretches::default();
    if let Some(judged) = of(Abi::X86_64) {
        wide.add(judged, 0, answers);
    }
    match of(Abi::X32) {
        Some(judged) => wide.add(judged, X32_BIT, answers),
        None => {
            wide.push(X32_BIT, returning(answers.foreign));
            // No call: a tracer has the kernel skip one.
            wide.push(u32::MAX, returning(answers.default));
        }
    }
    let wide = section(wide)?;
    let narrow = match of(Abi::I386) {
        Some(judged) => {
            let mut narrow = Stretches::default();
            narrow.add(judged, 0, answers);
            section(narrow)?
        }
        None => returning(answers.foreign),
    };
    let mut program = vec![
        op(LOAD, 0, 0, ARCHITECTURE),
        op(JUMP_EQUAL, 0, 1, AUDIT_X86_64),
        jump(narrow.len().saturating_add(2))?,
        op(JUMP_EQUAL, 1, 0, AUDIT_I386),
        op(RETURN, 0, 0, answers.foreign),
    ];
    program.extend(narrow);
    program.extend(wide);
    if program.len() > LONGEST {
        return Err(too_long(program.len()));
    }
    Ok(program)
}
