//! The device allow-list of a container as a small BPF program on its cgroup.
//!
//! cgroup v2 has no device files: the kernel asks a BPF_PROG_TYPE_CGROUP_DEVICE program for every
//! open and mknod of a device node. The program is built from the OCI rules, last match first.
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use crate::{
    error::{Error, Result},
    spec::DeviceRule,
};

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 1 << 1;
const F_REPLACE: u32 = 1 << 2;

/// `BPF_DEVCG_…` of linux/bpf.h.
const DEV_BLOCK: i32 = 1;
const DEV_CHAR: i32 = 2;
const ACC_MKNOD: i32 = 1;
const ACC_READ: i32 = 2;
const ACC_WRITE: i32 = 4;
const ACC_ALL: i32 = ACC_MKNOD | ACC_READ | ACC_WRITE;

/// One eBPF instruction (linux/bpf.h, struct bpf_insn).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Insn {
    code: u8,
    /// Source register in the high four bits, destination in the low.
    regs: u8,
    off: i16,
    imm: i32,
}

const LDX_W: u8 = 0x61;
const AND_K: u8 = 0x54;
const RSH_K: u8 = 0x74;
const MOV_X: u8 = 0xbc;
const MOV_K: u8 = 0xb4;
const JNE_K: u8 = 0x55;
const JEQ_K: u8 = 0x15;
const EXIT: u8 = 0x95;

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn {
        code,
        regs: src << 4 | dst,
        off,
        imm,
    }
}

/// One rule in the kernel's terms. `None` matches everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    access: i32,
    major: Option<i32>,
    minor: Option<i32>,
}

/// What every container may use, after its own rules (as runc does): making nodes, the devices that
/// [`crate::init`] puts into /dev, and tunnels.
fn defaults() -> Vec<Rule> {
    let rule = |kind, access, major, minor| Rule {
        allow: true,
        kind: Some(kind),
        access,
        major,
        minor,
    };
    let char_dev = |major, minor| rule(DEV_CHAR, ACC_ALL, Some(major), minor);
    vec![
        rule(DEV_CHAR, ACC_MKNOD, None, None),
        rule(DEV_BLOCK, ACC_MKNOD, None, None),
        char_dev(1, Some(3)), // null
        char_dev(1, Some(5)), // zero
        char_dev(1, Some(7)), // full
        char_dev(1, Some(8)), // random
        char_dev(1, Some(9)), // urandom
        char_dev(5, Some(0)), // tty
        char_dev(5, Some(2)), // ptmx
        char_dev(136, None),  // pts/*
        // As with runc: what VPNs use is not always asked for by a rule.
        char_dev(10, Some(200)), // net/tun
    ]
}

fn rules(spec: &[DeviceRule]) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for rule in spec {
        let bad = |what: &str| Error::InvalidArgument(format!("linux.resources.devices: {what}"));
        let kind = match rule.kind.as_str() {
            "" | "a" => None,
            "c" | "u" => Some(DEV_CHAR),
            "b" => Some(DEV_BLOCK),
            other => return Err(bad(&format!("type {other:?} is none of a, b, c, u"))),
        };
        let mut access = 0;
        for letter in rule.access.chars() {
            access |= match letter {
                'r' => ACC_READ,
                'w' => ACC_WRITE,
                'm' => ACC_MKNOD,
                other => return Err(bad(&format!("access {other:?} is none of r, w, m"))),
            };
        }
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n)
                .map(Some)
                .map_err(|_| bad(&format!("number {n} is out of range"))),
        };
        rules.push(Rule {
            allow: rule.allow,
            kind,
            access: if access == 0 { ACC_ALL } else { access },
            major: number(rule.major)?,
            minor: number(rule.minor)?,
        });
    }
    rules.extend(defaults());
    Ok(rules)
}

/// The program: the context is { access << 16 | type, major, minor } (struct bpf_cgroup_dev_ctx).
fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut code = vec![
        insn(LDX_W, 2, 1, 0, 0),
        insn(AND_K, 2, 0, 0, 0xffff),
        insn(LDX_W, 3, 1, 0, 0),
        insn(RSH_K, 3, 0, 0, 16),
        insn(LDX_W, 4, 1, 4, 0),
        insn(LDX_W, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // (jump opcode, register, value): taken when the rule does not match.
        let mut tests = Vec::new();
        if let Some(kind) = rule.kind {
            tests.push((JNE_K, 2, kind));
        }
        let mut body = Vec::new();
        if rule.access != ACC_ALL {
            body.push(insn(MOV_X, 1, 3, 0, 0));
            if rule.allow {
                // All that is asked for must be in the rule.
                body.push(insn(AND_K, 1, 0, 0, !rule.access & ACC_ALL));
                tests.push((JNE_K, 1, 0));
            } else {
                // Any part of what is asked for may be in the rule.
                body.push(insn(AND_K, 1, 0, 0, rule.access));
                tests.push((JEQ_K, 1, 0));
            }
        }
        if let Some(major) = rule.major {
            tests.push((JNE_K, 4, major));
        }
        if let Some(minor) = rule.minor {
            tests.push((JNE_K, 5, minor));
        }
        // Each test jumps over the tests after it and the two instructions of the verdict.
        let count = tests.len();
        for (n, (op, register, value)) in tests.into_iter().enumerate() {
            let skip = i16::try_from(count - n + 1).unwrap_or(i16::MAX);
            body.push(insn(op, register, 0, skip, value));
        }
        code.extend(body);
        code.push(insn(MOV_K, 0, 0, 0, i32::from(rule.allow)));
        code.push(insn(EXIT, 0, 0, 0, 0));
        if count == 0 {
            // It matches everything: the verifier refuses code that cannot be reached.
            return code;
        }
    }
    code.push(insn(MOV_K, 0, 0, 0, 0));
    code.push(insn(EXIT, 0, 0, 0, 0));
    code
}

/// Builds the program of these rules, if they are any: each jump lands inside, and it ends in a verdict.
#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::unwrap_used, reason = "a broken assumption is a finding")]
pub fn build(spec: &[DeviceRule]) {
    let Ok(rules) = rules(spec) else {
        return;
    };
    let code = program(&rules);
    assert_eq!(code.last().unwrap().code, EXIT);
    for (at, insn) in code.iter().enumerate() {
        if matches!(insn.code, JNE_K | JEQ_K) {
            let to = at + 1 + usize::try_from(insn.off).unwrap();
            assert!(to < code.len(), "a jump from {at} to {to}");
        }
    }
}

/// The first part of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The first part of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// # Safety
/// `attr` must be the layout that `command` expects, and the memory it points to must be live.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: the caller vouches for `attr`; its size is passed and the kernel keeps no pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Loads the program for `spec` and attaches it to the cgroup, in place of `old` if given.
///
/// # Errors
/// `InvalidArgument` for a rule without meaning, `Internal` when the kernel refuses the program.
pub fn attach(cgroup: &Path, spec: &[DeviceRule], old: Option<&OwnedFd>) -> Result<OwnedFd> {
    let code = program(&rules(spec)?);
    load_and_attach(cgroup, &code, old).map_err(|e| Error::io("device rules of the cgroup", e))
}

/// Times that a program is loaded at most.
const LOADS: usize = 10;

/// The verifier gives up with EAGAIN when a signal waits for its thread, such as a child's end. Once the call has
/// returned that has been handled.
fn uninterrupted<T>(mut load: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..LOADS {
        match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
    }
    load()
}

fn load_and_attach(cgroup: &Path, code: &[Insn], old: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let address = |pointer: *const u8| u64::try_from(pointer.addr()).map_err(io::Error::other);
    let load = LoadAttr {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).map_err(io::Error::other)?,
        insns: address(code.as_ptr().cast())?,
        license: address(c"Apache-2.0".as_ptr().cast())?,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: LoadAttr is a prefix of bpf_attr for PROG_LOAD; `code` and the licence outlive the call.
    let raw = uninterrupted(|| unsafe { bpf(PROG_LOAD, &load) })?;
    let raw = i32::try_from(raw).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us alone (always close-on-exec).
    let program = unsafe { OwnedFd::from_raw_fd(raw) };
    let cgroup = File::open(cgroup)?;
    let number = |fd: i32| u32::try_from(fd).map_err(io::Error::other);
    let attach = AttachAttr {
        target_fd: number(cgroup.as_raw_fd())?,
        attach_bpf_fd: number(program.as_raw_fd())?,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: F_ALLOW_MULTI | if old.is_some() { F_REPLACE } else { 0 },
        replace_bpf_fd: old.map_or(Ok(0), |fd| number(fd.as_raw_fd()))?,
    };
    // SAFETY: AttachAttr is a prefix of bpf_attr for PROG_ATTACH and holds no pointers.
    unsafe { bpf(PROG_ATTACH, &attach) }?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would: what device programs use of eBPF.
    fn run(code: &[Insn], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0_i32; 11];
        let mut pc = 0;
        loop {
            let i = code[pc];
            pc += 1;
            let (dst, src) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
            let skip = usize::try_from(i.off).unwrap_or(0);
            match i.code {
                LDX_W => r[dst] = context[skip / 4],
                AND_K => r[dst] &= i.imm,
                RSH_K => r[dst] >>= i.imm,
                MOV_X => r[dst] = r[src],
                MOV_K => r[dst] = i.imm,
                JNE_K => pc += if r[dst] != i.imm { skip } else { 0 },
                JEQ_K => pc += if r[dst] == i.imm { skip } else { 0 },
                EXIT => return r[0] == 1,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn built(value: serde_json::Value) -> Vec<Insn> {
        program(&rules(&serde_json::from_value::<Vec<DeviceRule>>(value).unwrap()).unwrap())
    }

    #[test]
    fn deny_all_leaves_the_default_devices_and_mknod() {
        let code = built(serde_json::json!([{"allow": false, "access": "rwm"}]));
        assert!(run(&code, DEV_CHAR, ACC_READ | ACC_WRITE, 1, 3));
        assert!(run(&code, DEV_CHAR, ACC_READ, 136, 9));
        assert!(run(&code, DEV_CHAR, ACC_READ | ACC_WRITE, 10, 200));
        assert!(run(&code, DEV_BLOCK, ACC_MKNOD, 8, 0));
        assert!(!run(&code, DEV_BLOCK, ACC_READ, 8, 0));
        assert!(!run(&code, DEV_CHAR, ACC_READ, 1, 1));
        assert!(!run(&code, DEV_CHAR, ACC_READ, 10, 258));
    }

    #[test]
    fn the_last_matching_rule_wins() {
        let code = built(serde_json::json!([
            {"allow": true, "type": "a", "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "access": "w"},
            {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rw"}
        ]));
        assert!(run(&code, DEV_CHAR, ACC_ALL, 10, 200));
        assert!(run(&code, DEV_BLOCK, ACC_READ, 8, 0));
        assert!(!run(&code, DEV_BLOCK, ACC_WRITE, 8, 0));
        assert!(!run(&code, DEV_BLOCK, ACC_READ | ACC_WRITE, 8, 0));
        assert!(run(&code, DEV_BLOCK, ACC_READ | ACC_WRITE, 8, 1));
    }

    #[test]
    fn an_allow_rule_needs_every_access_asked_for() {
        let code = built(
            serde_json::json!([{"allow": true, "type": "c", "major": 226, "minor": 128, "access": "r"}]),
        );
        assert!(run(&code, DEV_CHAR, ACC_READ, 226, 128));
        assert!(!run(&code, DEV_CHAR, ACC_READ | ACC_WRITE, 226, 128));
        assert!(!run(&code, DEV_CHAR, ACC_READ, 226, 129));
    }

    #[test]
    fn rules_without_meaning_are_refused() {
        for rule in [
            serde_json::json!({"allow": true, "type": "x"}),
            serde_json::json!({"allow": true, "access": "q"}),
            serde_json::json!({"allow": true, "major": 1_i64 << 40}),
        ] {
            let rule: DeviceRule = serde_json::from_value(rule).unwrap();
            assert!(rules(&[rule]).is_err());
        }
    }

    #[test]
    fn a_load_that_a_signal_interrupts_is_repeated_but_not_for_ever() {
        for (interrupted, calls, loaded) in [(0, 1, true), (3, 4, true), (99, LOADS, false)] {
            let mut called = 0;
            let result = uninterrupted(|| {
                called += 1;
                if called <= interrupted {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            assert_eq!((called, result.is_ok()), (calls, loaded));
        }
    }
}
