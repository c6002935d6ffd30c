//! Programs of one system call, made without a compiler: a static executable whose exit status is the call's errno, 0
//! if it succeeded.

/// How the program calls the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// A 32-bit program, by `int 0x80`.
    I386,
    /// A 64-bit program.
    X86_64,
    /// A 64-bit program that marks its calls as x32's.
    X32,
}

/// The executable that makes the call `number` with two arguments.
pub fn program(abi: Abi, number: u32, arguments: [u32; 2]) -> Vec<u8> {
    if abi == Abi::I386 {
        let mut code = Vec::new();
        // mov eax, number; mov ebx, first; mov ecx, second; int 0x80
        for (op, value) in [(0xb8, number), (0xbb, arguments[0]), (0xb9, arguments[1])] {
            code.push(op);
            code.extend(value.to_le_bytes());
        }
        code.extend([0xcd, 0x80]);
        // neg eax; mov ebx, eax; mov eax, 1 (exit); int 0x80
        code.extend([0xf7, 0xd8, 0x89, 0xc3, 0xb8, 1, 0, 0, 0, 0xcd, 0x80]);
        return narrow(&code);
    }
    let marked = if abi == Abi::X32 { 0x4000_0000 } else { 0 };
    let mut code = Vec::new();
    // mov eax, number; mov edi, first; mov esi, second; syscall
    for (op, value) in [
        (0xb8, number | marked),
        (0xbf, arguments[0]),
        (0xbe, arguments[1]),
    ] {
        code.push(op);
        code.extend(value.to_le_bytes());
    }
    code.extend([0x0f, 0x05]);
    // neg eax; mov edi, eax; mov eax, 60 (exit); syscall
    code.extend([0xf7, 0xd8, 0x89, 0xc7, 0xb8, 60, 0, 0, 0, 0x0f, 0x05]);
    wide(&code)
}

/// Identification and what both classes have the same: type, machine, version.
fn begin(class: u8, machine: u16) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file
}

fn narrow(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let mut file = begin(1, 3);
    // Entry, program headers, section headers, flags.
    for word in [BASE + HEADERS, 52, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = HEADERS.saturating_add(u32::try_from(code.len()).unwrap_or_default());
    // One segment: load all of the file, readable and executable.
    for word in [1, 0, BASE, BASE, length, length, 5, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

fn wide(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut file = begin(2, 62);
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = HEADERS.saturating_add(u64::try_from(code.len()).unwrap_or_default());
    for word in [1_u32, 5] {
        file.extend(word.to_le_bytes());
    }
    for word in [0, BASE, BASE, length, length, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn a_program_ends_with_the_errno_of_its_call() {
        let directory = tempfile::tempdir().unwrap();
        // close: of a descriptor that is not open; of one that is.
        for (n, (abi, close, status)) in [
            (Abi::X86_64, 3, nix::libc::EBADF),
            (Abi::I386, 6, nix::libc::EBADF),
        ]
        .into_iter()
        .enumerate()
        {
            for (descriptor, status) in [(1000, status), (0, 0)] {
                let path = directory.path().join(format!("{n}-{descriptor}"));
                std::fs::write(&path, program(abi, close, [descriptor, 0])).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
                let got = Command::new(&path).status().unwrap();
                assert_eq!(got.code(), Some(status), "{abi:?}");
            }
        }
    }
}
