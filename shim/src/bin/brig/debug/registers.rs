//! A CPU's registers as gdb wants them (its "Standard Target Features", section "i386 Features"), and as a core file
//! does (`elf_prstatus` of `linux/elfcore.h`). Those of the FPU are not told: the guest's kernel does not use them.

use brig_hypervisor::control;
use gdbstub::arch;

/// x86-64 with the registers that are told.
#[derive(Debug)]
pub struct Architecture;

/// The registers of one CPU.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Registers(pub control::Registers);

/// Bytes of what is not told: eight registers of ten bytes, eight of four.
const FPU: usize = 8 * 10 + 8 * 4;

const DESCRIPTION: &str = r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">
<target version="1.0"><architecture>i386:x86-64</architecture><osabi>none</osabi>
<feature name="org.gnu.gdb.i386.core">
<flags id="i386_eflags" size="4">
<field name="CF" start="0" end="0"/><field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/>
<field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>
<field name="RF" start="16" end="16"/><field name="AC" start="18" end="18"/>
</flags>
<reg name="rax" bitsize="64" type="int64"/><reg name="rbx" bitsize="64" type="int64"/>
<reg name="rcx" bitsize="64" type="int64"/><reg name="rdx" bitsize="64" type="int64"/>
<reg name="rsi" bitsize="64" type="int64"/><reg name="rdi" bitsize="64" type="int64"/>
<reg name="rbp" bitsize="64" type="data_ptr"/><reg name="rsp" bitsize="64" type="data_ptr"/>
<reg name="r8" bitsize="64" type="int64"/><reg name="r9" bitsize="64" type="int64"/>
<reg name="r10" bitsize="64" type="int64"/><reg name="r11" bitsize="64" type="int64"/>
<reg name="r12" bitsize="64" type="int64"/><reg name="r13" bitsize="64" type="int64"/>
<reg name="r14" bitsize="64" type="int64"/><reg name="r15" bitsize="64" type="int64"/>
<reg name="rip" bitsize="64" type="code_ptr"/><reg name="eflags" bitsize="32" type="i386_eflags"/>
<reg name="cs" bitsize="32" type="int32"/><reg name="ss" bitsize="32" type="int32"/>
<reg name="ds" bitsize="32" type="int32"/><reg name="es" bitsize="32" type="int32"/>
<reg name="fs" bitsize="32" type="int32"/><reg name="gs" bitsize="32" type="int32"/>
<reg name="st0" bitsize="80" type="i387_ext"/><reg name="st1" bitsize="80" type="i387_ext"/>
<reg name="st2" bitsize="80" type="i387_ext"/><reg name="st3" bitsize="80" type="i387_ext"/>
<reg name="st4" bitsize="80" type="i387_ext"/><reg name="st5" bitsize="80" type="i387_ext"/>
<reg name="st6" bitsize="80" type="i387_ext"/><reg name="st7" bitsize="80" type="i387_ext"/>
<reg name="fctrl" bitsize="32" type="int" group="float"/><reg name="fstat" bitsize="32" type="int" group="float"/>
<reg name="ftag" bitsize="32" type="int" group="float"/><reg name="fiseg" bitsize="32" type="int" group="float"/>
<reg name="fioff" bitsize="32" type="int" group="float"/><reg name="foseg" bitsize="32" type="int" group="float"/>
<reg name="fooff" bitsize="32" type="int" group="float"/><reg name="fop" bitsize="32" type="int" group="float"/>
</feature>
<feature name="org.gnu.gdb.i386.segments">
<reg name="fs_base" bitsize="64" type="int64"/><reg name="gs_base" bitsize="64" type="int64"/>
</feature>
<feature name="brig.control">
<reg name="cr0" bitsize="64" type="int64"/><reg name="cr3" bitsize="64" type="int64"/>
<reg name="cr4" bitsize="64" type="int64"/>
</feature></target>"#;

impl arch::Arch for Architecture {
    type Usize = u64;
    type Registers = Registers;
    type RegId = ();
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(DESCRIPTION)
    }
}

impl arch::Registers for Registers {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.0.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        let r = &self.0;
        let mut write = |bytes: &[u8]| bytes.iter().for_each(|byte| write_byte(Some(*byte)));
        for value in [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15, r.rip,
        ] {
            write(&value.to_le_bytes());
        }
        // The upper half is reserved.
        write(&r.rflags.to_le_bytes()[..4]);
        for selector in [r.cs, r.ss, r.ds, r.es, r.fs, r.gs] {
            write(&u32::from(selector).to_le_bytes());
        }
        (0..FPU).for_each(|_| write_byte(None));
        for value in [r.fs_base, r.gs_base, r.cr0, r.cr3, r.cr4] {
            value
                .to_le_bytes()
                .iter()
                .for_each(|byte| write_byte(Some(*byte)));
        }
    }

    /// Registers are not written.
    fn gdb_deserialize(&mut self, _: &[u8]) -> Result<(), ()> {
        Err(())
    }
}

/// Bytes of `elf_prstatus`.
pub const PRSTATUS: usize = 336;
/// Where it has the thread's id, and where the registers begin (`user_regs_struct`).
const PRSTATUS_ID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;

/// `elf_prstatus` of a CPU, which is a thread with the number after its own: zero would be none.
#[must_use]
pub fn prstatus(cpu: usize, r: &control::Registers) -> [u8; PRSTATUS] {
    let mut bytes = [0; PRSTATUS];
    let id = u32::try_from(cpu + 1).unwrap_or(u32::MAX);
    bytes[PRSTATUS_ID..PRSTATUS_ID + 4].copy_from_slice(&id.to_le_bytes());
    // orig_rax is that of no system call.
    let registers = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        u64::MAX,
        r.rip,
        r.cs.into(),
        r.rflags,
        r.rsp,
        r.ss.into(),
        r.fs_base,
        r.gs_base,
        r.ds.into(),
        r.es.into(),
        r.fs.into(),
        r.gs.into(),
    ];
    for (at, value) in (PRSTATUS_REGISTERS..).step_by(8).zip(registers) {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use gdbstub::arch::Registers as _;

    #[test]
    fn registers_are_as_many_bytes_as_the_description_has() {
        let registers = Registers(control::Registers {
            rip: 0x1122,
            cr4: 0x33,
            ..control::Registers::default()
        });
        let mut bytes = Vec::new();
        registers.gdb_serialize(|byte| bytes.push(byte));
        let described: usize = DESCRIPTION
            .split("bitsize=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().parse::<usize>().unwrap() / 8)
            .sum();
        assert_eq!(bytes.len(), described);
        assert_eq!(bytes[16 * 8..16 * 8 + 2], [Some(0x22), Some(0x11)]);
        assert_eq!(bytes[described - 8], Some(0x33));
        assert_eq!(bytes.iter().filter(|byte| byte.is_none()).count(), FPU);
    }
}
