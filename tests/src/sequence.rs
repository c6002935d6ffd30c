//! Numbers that look like chance and are the same for every reader of one seed (xorshift64*): what a test draws can be drawn
//! again.

/// An endless sequence of numbers.
#[derive(Debug, Clone)]
pub struct Sequence(u64);

impl Sequence {
    /// The sequence that a seed gives. Any number is one.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, or 0 if that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        // The upper half is the better one, and it fits.
        usize::try_from(self.draw() >> 32).unwrap_or(0) % bound.max(1)
    }

    /// Puts `items` in an order of the sequence's.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_sequence_and_another_seed_another() {
        let drawn = |seed| {
            let mut sequence = Sequence::new(seed);
            (0..50).map(|_| sequence.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(9));
        assert!(drawn(0).iter().any(|number| *number > 500));
    }

    #[test]
    fn what_is_shuffled_is_all_there_in_another_order() {
        let ordered: Vec<u32> = (0..100).collect();
        let mut shuffled = ordered.clone();
        Sequence::new(1).shuffle(&mut shuffled);
        assert_ne!(shuffled, ordered);
        shuffled.sort_unstable();
        assert_eq!(shuffled, ordered);
    }
}
