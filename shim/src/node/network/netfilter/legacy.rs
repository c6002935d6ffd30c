//! Tables of the legacy iptables, ip6tables and arptables in a network namespace. They are not taken; a namespace
//! with rules in them is told by name.
//!
//! A table is listed as soon as somebody has looked at it, and in older kernels once its module is loaded. So
//! one that is as the kernel makes it (no rules, every policy ACCEPT) does not count.

use std::ffi::c_void;
use std::fs;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, Protocol, SocketType, socket};

/// The most bytes of entries that are read to look at the policies.
const MAX_ENTRIES: usize = 64 << 10;
/// `NF_ACCEPT` as a standard target has it: `-NF_ACCEPT - 1`.
const ACCEPT: i32 = -2;
/// `struct xt_entry_target`, before the verdict.
const TARGET_HEADER: usize = 32;

/// One of the three kinds.
struct Kind {
    /// What the program is called.
    program: &'static str,
    /// Where the namespace lists its tables.
    names: &'static str,
    family: AddressFamily,
    level: i32,
    /// `*_SO_GET_INFO`; `*_SO_GET_ENTRIES` is the next.
    info: i32,
    /// Hooks of `struct *_getinfo`.
    hooks: usize,
    /// `sizeof(struct *_entry)`: where the target of an entry without matches is.
    entry: usize,
}

const KINDS: [Kind; 3] = [
    Kind {
        program: "iptables",
        names: "/proc/thread-self/net/ip_tables_names",
        family: AddressFamily::INET,
        level: libc::IPPROTO_IP,
        info: 64,
        hooks: 5,
        entry: 112,
    },
    Kind {
        program: "ip6tables",
        names: "/proc/thread-self/net/ip6_tables_names",
        family: AddressFamily::INET6,
        level: libc::IPPROTO_IPV6,
        info: 64,
        hooks: 5,
        entry: 168,
    },
    Kind {
        program: "arptables",
        names: "/proc/thread-self/net/arp_tables_names",
        family: AddressFamily::INET,
        level: libc::IPPROTO_IP,
        info: 96,
        hooks: 3,
        entry: 192,
    },
];

/// A sentence for each table with rules in the calling thread's network namespace.
pub fn tables() -> Vec<String> {
    let mut found = Vec::new();
    for kind in &KINDS {
        // A kernel without them has no such file.
        let names = fs::read_to_string(kind.names).unwrap_or_default();
        for table in names.lines().filter(|table| !table.is_empty()) {
            if !kind.is_empty(table) {
                found.push(format!(
                    "table {table} of the legacy {} holds rules, which only {}-nft or nft could hand on",
                    kind.program, kind.program
                ));
            }
        }
    }
    found
}

impl Kind {
    /// Whether it is certain that the table does nothing.
    fn is_empty(&self, table: &str) -> bool {
        self.look(table) == Some(true)
    }

    fn look(&self, table: &str) -> Option<bool> {
        // `struct ipt_getinfo`: name, valid_hooks, hook_entry[], underflow[], num_entries, size.
        let mut info = vec![0_u8; 32 + 4 * (1 + 2 * self.hooks + 2)];
        let name = table.as_bytes();
        info.get_mut(..name.len().min(31))?
            .copy_from_slice(&name[..name.len().min(31)]);
        self.ask(self.info, &mut info)?;
        let word = |bytes: &[u8], at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let hooks = word(&info, 32)?;
        let entries = word(&info, 36 + 8 * self.hooks)?;
        let size = usize::try_from(word(&info, 40 + 8 * self.hooks)?).ok()?;
        // One for each policy, and the one that ends the table.
        if entries != hooks.count_ones() + 1 || size > MAX_ENTRIES {
            return Some(false);
        }
        // `struct ipt_get_entries`: name, size, and the entries aligned to eight bytes.
        let mut all = vec![0_u8; 40 + size];
        all.get_mut(..32)?.copy_from_slice(info.get(..32)?);
        let length = u32::try_from(size).ok()?.to_ne_bytes();
        all.get_mut(32..36)?.copy_from_slice(&length);
        self.ask(self.info + 1, &mut all)?;
        let accepts = (0..self.hooks)
            .filter(|hook| hooks & (1 << hook) != 0)
            .map(|hook| {
                let policy = usize::try_from(word(&info, 36 + 4 * self.hooks + 4 * hook)?).ok()?;
                let verdict = word(&all, 40 + policy + self.entry + TARGET_HEADER)?;
                Some(verdict == ACCEPT.cast_unsigned())
            });
        accepts
            .collect::<Option<Vec<_>>>()
            .map(|all| all.into_iter().all(|accepts| accepts))
    }

    fn ask(&self, option: i32, buffer: &mut [u8]) -> Option<()> {
        let raw = Some(Protocol::from_raw(std::num::NonZero::new(255)?));
        let socket = socket(self.family, SocketType::RAW, raw).ok()?;
        let mut length = libc::socklen_t::try_from(buffer.len()).ok()?;
        // SAFETY: the buffer is writable for `length` bytes, which the kernel does not exceed.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                self.level,
                option,
                buffer.as_mut_ptr().cast::<c_void>(),
                &raw mut length,
            )
        };
        (outcome == 0).then_some(())
    }
}
