//! Seeded randomness, passed to whoever needs it: one stream per reactor, repeatable from the seed.
//!
//! Invariants: the same seed and stream give the same numbers on every platform. Excludes: cryptography; nothing
//! secret may be made from these numbers.

use std::cell::RefCell;

use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

/// A pseudo-random stream (xoshiro256++, Blackman and Vigna 2018).
#[derive(Debug)]
pub struct Random(RefCell<Xoshiro256PlusPlus>);

impl Random {
    /// Stream number `stream` of `seed`; streams of one seed are independent for all practical purposes.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(RefCell::new(Xoshiro256PlusPlus::seed_from_u64(mix(seed, stream))))
    }

    /// The next 64 bits.
    pub fn next(&self) -> u64 {
        self.0.borrow_mut().next_u64()
    }

    /// A number below `bound`, by multiply-shift (bias below `bound / 2^64`).
    ///
    /// # Panics
    /// If `bound` is zero.
    pub fn below(&self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below zero");
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// An index of a collection of `len` elements.
    ///
    /// # Panics
    /// If `len` is zero.
    pub fn index(&self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}

/// Folds `value` into `state`: a step of SplitMix64 (Steele, Lea, Flood 2014), used for seeds and trace hashes.
pub(crate) fn mix(state: u64, value: u64) -> u64 {
    let mut z = state.rotate_left(17) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_and_stream_repeat_and_others_differ() {
        let numbers = |seed, stream| {
            let random = Random::new(seed, stream);
            (0..8).map(|_| random.next()).collect::<Vec<_>>()
        };
        assert_eq!(numbers(1, 2), numbers(1, 2));
        assert_ne!(numbers(1, 2), numbers(1, 3));
        assert_ne!(numbers(1, 2), numbers(2, 2));
        assert_ne!(numbers(1, 2), numbers(2, 1));
    }

    #[test]
    fn below_reaches_every_value_and_nothing_else() {
        let random = Random::new(7, 0);
        let mut seen = [false; 5];
        for _ in 0..1000 {
            seen[random.index(5)] = true;
        }
        assert_eq!(seen, [true; 5]);
    }
}
