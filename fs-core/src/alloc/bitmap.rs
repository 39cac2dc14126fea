//! Bit arithmetic over words of 64 blocks: 16 clusters of four.
//!
//! Owns: [`Bitmap`] and the search for free clusters and for free blocks in broken clusters. A set bit is a block
//! that is not to be had.
//!
//! Excludes: what the bits stand for, counts, policy.

use crate::format::group::CLUSTER_BLOCKS;

/// Blocks of a cluster, as a number of bits.
pub(super) const CLUSTER_BITS: usize = CLUSTER_BLOCKS as usize;

/// Bits of a word.
pub(super) const WORD_BITS: usize = u64::BITS as usize;

/// The lowest bit of each of a word's clusters.
const CLUSTER_BASES: u64 = 0x1111_1111_1111_1111;

/// One bit for each block of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    words: Box<[u64]>,
}

/// Consecutive bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitRun {
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Bitmap {
    pub(super) fn from_words(words: Box<[u64]>) -> Self {
        Self { words }
    }

    pub(super) fn zeroes(bits: usize) -> Self {
        Self { words: vec![0; bits / WORD_BITS].into_boxed_slice() }
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn word_count(&self) -> usize {
        self.words.len()
    }

    pub(super) fn bits(&self) -> usize {
        self.words.len() * WORD_BITS
    }

    pub(super) fn get(&self, bit: usize) -> bool {
        self.words[bit / WORD_BITS] >> (bit % WORD_BITS) & 1 == 1
    }

    pub(super) fn set(&mut self, run: BitRun) {
        for_each_word(run, |word, mask| self.words[word] |= mask);
    }

    pub(super) fn clear(&mut self, run: BitRun) {
        for_each_word(run, |word, mask| self.words[word] &= !mask);
    }

    /// Whether every bit of the run is set.
    pub(super) fn all_set(&self, run: BitRun) -> bool {
        let mut all = true;
        for_each_word(run, |word, mask| all &= self.words[word] & mask == mask);
        all
    }

    /// Whether every bit of the run is clear.
    pub(super) fn all_clear(&self, run: BitRun) -> bool {
        let mut all = true;
        for_each_word(run, |word, mask| all &= self.words[word] & mask == 0);
        all
    }

    pub(super) fn count_clear(&self) -> usize {
        self.words.iter().map(|word| word.count_zeros() as usize).sum()
    }

    /// Clusters of which all blocks are clear.
    pub(super) fn count_clear_clusters(&self) -> usize {
        self.words.iter().map(|word| clear_clusters(*word).count_ones() as usize).sum()
    }

    /// Clusters that overlap `run` and are clear.
    pub(super) fn clear_clusters_in(&self, run: BitRun) -> usize {
        let first = run.start / CLUSTER_BITS;
        let last = (run.start + run.len).div_ceil(CLUSTER_BITS);
        let clusters = BitRun { start: first * CLUSTER_BITS, len: (last - first) * CLUSTER_BITS };
        let mut count = 0;
        for_each_word(clusters, |word, mask| {
            count += (clear_clusters(self.words[word]) & mask).count_ones() as usize;
        });
        count
    }

    /// Runs of set bits.
    pub(super) fn set_runs(&self) -> Vec<BitRun> {
        let mut runs: Vec<BitRun> = Vec::new();
        for (index, word) in self.words.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let from = left.trailing_zeros() as usize;
                let len = (!(left >> from)).trailing_zeros() as usize;
                let start = index * WORD_BITS + from;
                match runs.last_mut() {
                    Some(last) if last.start + last.len == start => last.len += len,
                    _ => runs.push(BitRun { start, len }),
                }
                left &= !mask(from, len);
            }
        }
        runs
    }

    /// The first run of at least `wanted` clear clusters that begins in `words`, else the longest run found there.
    /// The result is in bits, cut to `wanted` clusters.
    pub(super) fn find_clusters(&self, words: std::ops::Range<usize>, wanted: usize) -> Option<BitRun> {
        let mut best = BitRun { start: 0, len: 0 };
        let mut run = BitRun { start: 0, len: 0 };
        let mut index = words.start;
        // A run that began inside the range may go on behind it.
        while index < self.words.len() && (index < words.end || run.len > 0) {
            let clear = clear_clusters(self.words[index]);
            for cluster in 0..WORD_BITS / CLUSTER_BITS {
                let bit = cluster * CLUSTER_BITS;
                if clear >> bit & 1 == 1 {
                    if run.len == 0 {
                        run.start = index * WORD_BITS + bit;
                    }
                    run.len += CLUSTER_BITS;
                    if run.len >= wanted * CLUSTER_BITS {
                        return Some(run);
                    }
                } else {
                    if run.len > best.len {
                        best = run;
                    }
                    run.len = 0;
                    if clear >> bit == 0 || index >= words.end {
                        break;
                    }
                }
            }
            index += 1;
        }
        if run.len > best.len {
            best = run;
        }
        (best.len > 0).then_some(best)
    }

    /// Free blocks in a broken cluster: the first piece of at least `wanted` blocks (at most 3 exist in one) that
    /// begins in `words`, else the longest found there. Extended over following broken clusters up to `wanted`.
    pub(super) fn find_broken(&self, words: std::ops::Range<usize>, wanted: usize) -> Option<BitRun> {
        let enough = wanted.min(CLUSTER_BITS - 1);
        let mut best = BitRun { start: 0, len: 0 };
        for index in words.start..words.end.min(self.words.len()) {
            let mut broken = broken_clusters(self.words[index]);
            while broken != 0 {
                let bit = broken.trailing_zeros() as usize;
                broken &= broken - 1;
                let piece = longest_clear(self.words[index] >> bit & 0xf);
                if piece.len > best.len {
                    best = BitRun { start: index * WORD_BITS + bit + piece.start, len: piece.len };
                }
                if best.len >= enough {
                    return Some(self.extend(best, wanted));
                }
            }
        }
        (best.len > 0).then(|| self.extend(best, wanted))
    }

    /// Makes `run` as long as `wanted` while the next block is clear and its cluster is broken already.
    fn extend(&self, mut run: BitRun, wanted: usize) -> BitRun {
        run.len = run.len.min(wanted);
        while run.len < wanted {
            let next = run.start + run.len;
            if next >= self.bits() || self.get(next) {
                break;
            }
            let base = next % WORD_BITS / CLUSTER_BITS * CLUSTER_BITS;
            if broken_clusters(self.words[next / WORD_BITS]) >> base & 1 == 0 {
                break;
            }
            run.len += 1;
        }
        run
    }
}

/// Lowest bits of the word's clusters that are wholly clear.
fn clear_clusters(word: u64) -> u64 {
    !(word | word >> 1 | word >> 2 | word >> 3) & CLUSTER_BASES
}

/// Lowest bits of the word's clusters that are partly clear.
fn broken_clusters(word: u64) -> u64 {
    let full = word & word >> 1 & word >> 2 & word >> 3 & CLUSTER_BASES;
    CLUSTER_BASES & !full & !clear_clusters(word)
}

/// The longest run of clear bits in a cluster's four bits.
fn longest_clear(nibble: u64) -> BitRun {
    let mut best = BitRun { start: 0, len: 0 };
    let mut len = 0;
    for bit in 0..CLUSTER_BITS {
        len = if nibble >> bit & 1 == 0 { len + 1 } else { 0 };
        if len > best.len {
            best = BitRun { start: bit + 1 - len, len };
        }
    }
    best
}

/// `len` ones from bit `from` on; `from + len` ≤ 64.
fn mask(from: usize, len: usize) -> u64 {
    if len == WORD_BITS { u64::MAX } else { ((1 << len) - 1) << from }
}

fn for_each_word(run: BitRun, mut act: impl FnMut(usize, u64)) {
    let (mut bit, end) = (run.start, run.start + run.len);
    while bit < end {
        let from = bit % WORD_BITS;
        let len = (WORD_BITS - from).min(end - bit);
        act(bit / WORD_BITS, mask(from, len));
        bit += len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![
            Just(0_u64),
            Just(u64::MAX),
            any::<u64>(),
            (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b),
            (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a | b),
            any::<u16>()
                .prop_map(|clusters| (0..16).map(|c| (u64::from(clusters >> c & 1) * 0xf) << (c * 4)).sum()),
        ];
        proptest::collection::vec(word, 8)
    }

    fn clear_run_at(bitmap: &Bitmap, start: usize) -> usize {
        (start..bitmap.bits()).take_while(|bit| !bitmap.get(*bit)).count()
    }

    proptest! {
        #[test]
        fn found_clusters_are_clear_and_the_best_there_is(words in words(), wanted in 1_usize..70) {
            let bitmap = Bitmap::from_words(words.into_boxed_slice());
            let clusters = |start| clear_run_at(&bitmap, start) / 4;
            let longest = (0..bitmap.bits()).step_by(4).map(clusters).max().unwrap();
            match bitmap.find_clusters(0..8, wanted) {
                None => prop_assert_eq!(longest, 0),
                Some(run) => {
                    prop_assert!(run.start % 4 == 0 && run.len % 4 == 0);
                    prop_assert!(bitmap.all_clear(run));
                    prop_assert_eq!(run.len / 4, longest.min(wanted));
                }
            }
        }

        #[test]
        fn found_pieces_lie_in_broken_clusters(words in words(), wanted in 1_usize..9) {
            let bitmap = Bitmap::from_words(words.into_boxed_slice());
            let broken = bitmap.count_clear() - 4 * bitmap.count_clear_clusters();
            match bitmap.find_broken(0..8, wanted) {
                None => prop_assert_eq!(broken, 0),
                Some(run) => {
                    prop_assert!(run.len >= 1 && run.len <= wanted);
                    prop_assert!(bitmap.all_clear(run));
                    prop_assert_eq!(bitmap.clear_clusters_in(run), 0);
                }
            }
        }

        #[test]
        fn runs_of_set_bits_are_exactly_the_set_bits(words in words()) {
            let bitmap = Bitmap::from_words(words.into_boxed_slice());
            let mut rebuilt = Bitmap::zeroes(bitmap.bits());
            let mut end = None;
            for run in bitmap.set_runs() {
                prop_assert!(end.is_none_or(|end| run.start > end));
                end = Some(run.start + run.len);
                rebuilt.set(run);
            }
            prop_assert_eq!(rebuilt, bitmap);
        }
    }

    #[test]
    fn search_of_a_part_follows_a_run_out_of_it_but_begins_inside() {
        let mut bitmap = Bitmap::zeroes(512);
        bitmap.set(BitRun { start: 0, len: 60 });
        bitmap.set(BitRun { start: 100, len: 412 });
        assert_eq!(bitmap.find_clusters(0..1, 30), Some(BitRun { start: 60, len: 40 }));
        bitmap.set(BitRun { start: 60, len: 4 });
        assert_eq!(bitmap.find_clusters(0..1, 1), None);
    }
}
