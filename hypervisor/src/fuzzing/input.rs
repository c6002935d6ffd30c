//! A target's bytes as numbers and choices. Past the end everything is zero, so that any prefix of an
//! input means something and the fuzzer can cut it.

/// What is left of the bytes.
pub struct Input<'d> {
    bytes: &'d [u8],
}

impl<'d> Input<'d> {
    /// All of them.
    pub fn new(bytes: &'d [u8]) -> Self {
        Self { bytes }
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Up to `count` bytes.
    pub fn take(&mut self, count: usize) -> &'d [u8] {
        let (front, rest) = self.bytes.split_at(count.min(self.bytes.len()));
        self.bytes = rest;
        front
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let front = self.take(N);
        let mut array = [0; N];
        array[..front.len()].copy_from_slice(front);
        array
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A bit.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// A number below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}
