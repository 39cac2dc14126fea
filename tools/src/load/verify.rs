//! Data that tells where it belongs, and the check that it is what was written.
//!
//! Owns: [`Verifier`]: the contents of every block during one run, which of a queue's places were written, and [`Wrong`].
//!
//! Invariants:
//! - what a block holds depends on its number and on the run's key alone: whoever writes it when, it holds the same. So queues
//!   need not know of each other, and reads and writes of one place may overlap;
//! - a place is looked at only after a write of it by the same queue had succeeded before the read was submitted;
//! - runs have different keys: what an earlier run left behind does not pass for this one's.
//!
//! Excludes: when places are read back (`worker`).

use std::fmt;

use reactor::DmaBuffer;

/// Wrong data, named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The first block that is wrong.
    pub lba: u64,
    /// Offset in it of the first eight bytes that are.
    pub offset: usize,
    /// What they should be.
    pub expected: u64,
    /// What they are.
    pub found: u64,
    /// The block that these contents belong to, if they are another one's of this run.
    pub belongs_to: Option<u64>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lba, offset, expected, found, belongs_to } = self;
        match belongs_to {
            Some(other) => write!(f, "block {lba} holds the data of block {other}"),
            None => write!(
                f,
                "block {lba} holds {found:#018x} at byte {offset}, where {expected:#018x} was written"
            ),
        }
    }
}

/// Contents of blocks, and the places that a queue has written.
pub(super) struct Verifier {
    key: u64,
    block_bytes: usize,
    /// A bit for each place.
    written: Vec<u64>,
    scratch: Vec<u8>,
}

/// Odd, so that it has an inverse modulo 2^64.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Verifier {
    /// For requests of `bytes` bytes at `places` places.
    pub(super) fn new(key: u64, block_bytes: usize, bytes: usize, places: u64) -> Self {
        let words = usize::try_from(places.div_ceil(64)).unwrap_or(usize::MAX);
        Self { key, block_bytes, written: vec![0; words], scratch: vec![0; bytes] }
    }

    /// What the eight bytes at `offset` of a block hold.
    fn word(&self, lba: u64, offset: usize) -> u64 {
        // A product with an odd number, turned: different for each block at each offset.
        (lba ^ self.key).wrapping_mul(SPREAD).wrapping_add(offset as u64).rotate_left(offset as u32 / 8 % 64)
    }

    /// The block whose contents have this word at `offset`.
    fn block_with(&self, word: u64, offset: usize) -> u64 {
        /// `SPREAD` times this is 1 modulo 2^64.
        const INVERSE: u64 = inverse(SPREAD);
        let product = word.rotate_right(offset as u32 / 8 % 64).wrapping_sub(offset as u64);
        product.wrapping_mul(INVERSE) ^ self.key
    }

    /// Fills a buffer with what belongs to `lba` and the blocks behind it.
    pub(super) fn fill(&mut self, buffer: &mut DmaBuffer, lba: u64) {
        let mut scratch = std::mem::take(&mut self.scratch);
        for (lba, block) in (lba..).zip(scratch.chunks_mut(self.block_bytes)) {
            for (offset, word) in (0..).step_by(8).zip(block.chunks_exact_mut(8)) {
                word.copy_from_slice(&self.word(lba, offset).to_le_bytes());
            }
        }
        buffer.write_at(0, &scratch);
        self.scratch = scratch;
    }

    /// What is wrong with the data read from `lba` on, first.
    pub(super) fn check(&mut self, buffer: &DmaBuffer, lba: u64) -> Result<(), Wrong> {
        let mut scratch = std::mem::take(&mut self.scratch);
        buffer.read_at(0, &mut scratch);
        let wrong = self.first_wrong(&scratch, lba);
        self.scratch = scratch;
        wrong.map_or(Ok(()), Err)
    }

    fn first_wrong(&self, data: &[u8], lba: u64) -> Option<Wrong> {
        for (lba, block) in (lba..).zip(data.chunks(self.block_bytes)) {
            for (offset, word) in (0..).step_by(8).zip(block.chunks_exact(8)) {
                let found = u64::from_le_bytes(word.try_into().expect("chunks of eight bytes"));
                let expected = self.word(lba, offset);
                if found != expected {
                    return Some(self.describe(lba, block, offset, expected, found));
                }
            }
        }
        None
    }

    #[cold]
    fn describe(&self, lba: u64, block: &[u8], offset: usize, expected: u64, found: u64) -> Wrong {
        let other = self.block_with(found, offset);
        // The whole rest of it, so that chance has no part in this.
        let words = (offset..).step_by(8).zip(block[offset..].chunks_exact(8));
        let is_others = words.clone().count() > 1
            && words.into_iter().all(|(at, word)| word == self.word(other, at).to_le_bytes());
        Wrong { lba, offset, expected, found, belongs_to: is_others.then_some(other) }
    }

    /// Notes that a write of a place has succeeded.
    pub(super) fn note_written(&mut self, place: u64) {
        self.written[(place / 64) as usize] |= 1 << (place % 64);
    }

    /// Whether a place was written.
    pub(super) fn is_written(&self, place: u64) -> bool {
        self.written[(place / 64) as usize] >> (place % 64) & 1 == 1
    }

    /// The first place from `from` on that was written.
    pub(super) fn next_written(&self, from: u64) -> Option<u64> {
        let first = (from / 64) as usize;
        let masked = self.written.get(first)? >> (from % 64) << (from % 64);
        let rest = self.written.iter().copied().enumerate().skip(first + 1);
        let (index, word) = std::iter::once((first, masked)).chain(rest).find(|(_, word)| *word != 0)?;
        Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

/// What times `odd` is 1 modulo 2^64, by Newton's iteration: each step doubles the right bits.
const fn inverse(odd: u64) -> u64 {
    let mut found = odd;
    let mut step = 0;
    while step < 5 {
        found = found.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(found)));
        step += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::dma::{DmaPool, HeapRegion};

    const BLOCK: usize = 512;

    fn verifier(key: u64) -> Verifier {
        Verifier::new(key, BLOCK, 2 * BLOCK, 200)
    }

    fn buffer() -> DmaBuffer {
        DmaPool::new(HeapRegion::new(1 << 16).unwrap()).try_alloc(2 * BLOCK).unwrap()
    }

    #[test]
    fn what_was_filled_in_passes_there_and_nowhere_else() {
        let (mut verifier, mut buffer) = (verifier(7), buffer());
        verifier.fill(&mut buffer, 1000);
        assert_eq!(verifier.check(&buffer, 1000), Ok(()));
        for other in [999, 1001, 0, u64::MAX - 1] {
            let wrong = verifier.check(&buffer, other).unwrap_err();
            assert_eq!((wrong.lba, wrong.offset, wrong.belongs_to), (other, 0, Some(1000)), "{wrong}");
            assert!(wrong.to_string().ends_with("holds the data of block 1000"), "{wrong}");
        }
    }

    #[test]
    fn one_bit_anywhere_is_found_and_named() {
        let (mut verifier, mut buffer) = (verifier(7), buffer());
        verifier.fill(&mut buffer, 5);
        for at in 0..2 * BLOCK {
            let mut byte = [0];
            buffer.read_at(at, &mut byte);
            buffer.write_at(at, &[byte[0] ^ 1 << (at % 8)]);
            let wrong = verifier.check(&buffer, 5).unwrap_err();
            assert_eq!((wrong.lba, wrong.offset), (5 + (at / BLOCK) as u64, at % BLOCK / 8 * 8));
            assert!(wrong.to_string().contains("was written"), "{wrong}");
            buffer.write_at(at, &byte);
        }
        assert_eq!(verifier.check(&buffer, 5), Ok(()));
    }

    #[test]
    fn another_runs_data_does_not_pass() {
        let mut buffer = buffer();
        verifier(7).fill(&mut buffer, 5);
        let wrong = verifier(8).check(&buffer, 5).unwrap_err();
        assert_eq!(wrong.lba, 5);
        buffer.fill(0, 2 * BLOCK, 0);
        assert_eq!(verifier(8).check(&buffer, 5).unwrap_err().belongs_to, None, "zeroes are nobody's");
    }

    #[test]
    fn written_places_are_found_in_order() {
        let mut verifier = verifier(1);
        for place in [0, 1, 63, 64, 130, 199] {
            verifier.note_written(place);
        }
        assert!(verifier.is_written(63) && !verifier.is_written(65));
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(place) = verifier.next_written(from) {
            found.push(place);
            from = place + 1;
        }
        assert_eq!(found, [0, 1, 63, 64, 130, 199]);
        assert_eq!(verifier.next_written(1 << 40), None);
    }
}
