//! What is drawn for an operation: a small world, so that operations meet.

use brig_tests::sequence::Sequence;

/// Draws by a seed.
pub struct Draw(Sequence);

const PATHS: [&str; 12] = [
    "a", "b", "c", "d", "d", "d/a", "d/b", "d/e", "d/e/a", "d/e/b", "l", "none/a",
];
const OFFSETS: [u64; 8] = [0, 0, 1, 100, 4095, 4096, 20_000, 131_072];
const LENGTHS: [usize; 6] = [1, 10, 100, 4096, 5000, 70_000];
const MODES: [u32; 9] = [
    0o644, 0o600, 0o666, 0o777, 0o755, 0o640, 0o2770, 0o4755, 0o1777,
];
const IDS: [u32; 4] = [0, 1000, 1001, 2000];

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(Sequence::new(seed))
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound)
    }

    /// One of them; they must not be none.
    pub fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    pub fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap_or(0)
    }

    pub fn slot(&mut self) -> usize {
        *self.of(&[0, 1, 2, 3])
    }

    pub fn path(&mut self) -> &'static str {
        self.of::<&'static str>(&PATHS)
    }

    pub fn offset(&mut self) -> u64 {
        *self.of(&OFFSETS)
    }

    pub fn length(&mut self) -> usize {
        *self.of(&LENGTHS)
    }

    pub fn mode(&mut self) -> u32 {
        *self.of(&MODES)
    }

    pub fn id(&mut self) -> u32 {
        *self.of(&IDS)
    }

    /// Not root.
    pub fn user(&mut self) -> u32 {
        *self.of(&IDS[1..])
    }

    /// An ACL as linux/posix_acl_xattr.h has it, and as text.
    pub fn acl(&mut self) -> (Vec<u8>, String) {
        const UNNAMED: u32 = u32::MAX;
        let mut entries = vec![(1u16, UNNAMED)];
        for id in [1000, 1001] {
            if self.below(2) == 0 {
                entries.push((2, id));
            }
        }
        entries.push((4, UNNAMED));
        if self.below(2) == 0 {
            entries.push((8, 2000));
        }
        // One entry for somebody wants a mask; now and then there is none, which is no ACL.
        if entries.len() == 2 || self.below(12) > 0 {
            entries.push((16, UNNAMED));
        }
        entries.push((32, UNNAMED));
        let mut value = 2u32.to_le_bytes().to_vec();
        let mut text = String::new();
        for (tag, id) in entries {
            let permissions = *self.of(&[0u16, 4, 5, 6, 7]);
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
            text.push_str(&format!("{tag}.{}.{permissions},", id.cast_signed()));
        }
        (value, text)
    }
}
