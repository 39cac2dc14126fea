//! Ring arithmetic of a queue pair, and nothing else: no memory, no doorbells.
//!
//! Owns: [`SubmissionRing`] (where the next entry goes, which tail the device was told) and [`CompletionRing`] (which
//! entry comes next, which phase it must have, which head the device was told).
//!
//! Invariants:
//! - indices stay below the number of entries, which need not be a power of two;
//! - a submission ring never holds more than `entries - 1` entries that the device was not told of: a tail that wrapped
//!   onto the last rung one would read as "nothing new";
//! - a phase flips exactly when the completion head wraps.
//!
//! Excludes: how many commands may be in flight. Whoever owns the command slots keeps that below `entries`, so an entry
//! that the device has not fetched is never overwritten.

/// Entries of the smallest legal queue (NVMe 1.4 §4.1.3).
pub(crate) const MIN_ENTRIES: u32 = 2;
/// Entries of the largest legal queue.
pub(crate) const MAX_ENTRIES: u32 = 1 << 16;

/// Where a submission queue entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// Index in the ring.
    pub(crate) index: u32,
    /// Entries pushed before this one since the ring was made, modulo 2^32.
    pub(crate) sequence: u32,
}

/// Producer's side of a submission queue.
#[derive(Clone, Debug)]
pub(crate) struct SubmissionRing {
    entries: u32,
    tail: u32,
    /// Entries pushed so far, modulo 2^32; `tail` is this modulo `entries`.
    pushed: u32,
    rung_tail: u32,
    rung: u32,
}

impl SubmissionRing {
    /// An empty ring. `entries` lies between [`MIN_ENTRIES`] and [`MAX_ENTRIES`].
    pub(crate) fn new(entries: u32) -> Self {
        assert!((MIN_ENTRIES..=MAX_ENTRIES).contains(&entries), "queue of {entries} entries");
        Self { entries, tail: 0, pushed: 0, rung_tail: 0, rung: 0 }
    }

    /// Entries that the ring was made with.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// [`Position::sequence`] of the entry that is pushed next.
    #[inline]
    pub(crate) fn next_sequence(&self) -> u32 {
        self.pushed
    }

    /// Whether the device must be told before another entry is pushed.
    #[cfg(test)]
    pub(crate) fn must_ring(&self) -> bool {
        self.pushed.wrapping_sub(self.rung) == self.entries - 1
    }

    /// Takes the place of the next entry.
    #[inline(always)]
    pub(crate) fn push(&mut self) -> Position {
        let position = Position { index: self.tail, sequence: self.pushed };
        let next = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
        assert!(next != self.rung_tail, "tail would wrap onto the last rung tail");
        self.tail = next;
        self.pushed = self.pushed.wrapping_add(1);
        position
    }

    /// The tail to write to the doorbell, if the device was not told of it yet.
    #[inline]
    pub(crate) fn ring(&mut self) -> Option<u32> {
        if self.rung == self.pushed {
            return None;
        }
        self.rung = self.pushed;
        self.rung_tail = self.tail;
        Some(self.tail)
    }

    /// Whether a completion of the entry `sequence` may report the head `sq_head`.
    ///
    /// The device has fetched that entry and none beyond the rung tail, so the head lies between the entry's successor
    /// and the rung tail. Heads may arrive out of order: a device may compose completions before it posts them.
    #[inline(always)]
    pub(crate) fn head_is_possible(&self, sequence: u32, sq_head: u32) -> bool {
        if sq_head >= self.entries {
            return false;
        }
        let unfetched = if self.rung_tail >= sq_head {
            self.rung_tail - sq_head
        } else {
            self.rung_tail + self.entries - sq_head
        };
        let rung_after = self.rung.wrapping_sub(sequence).wrapping_sub(1);
        unfetched <= rung_after
    }
}

/// Consumer's side of a completion queue.
#[derive(Clone, Debug)]
pub(crate) struct CompletionRing {
    entries: u32,
    head: u32,
    phase: bool,
    /// Entries stepped over that the device was not told of.
    unrung: u32,
}

impl CompletionRing {
    /// A ring over zeroed memory: the first pass has phase 1.
    pub(crate) fn new(entries: u32) -> Self {
        assert!((MIN_ENTRIES..=MAX_ENTRIES).contains(&entries), "queue of {entries} entries");
        Self { entries, head: 0, phase: true, unrung: 0 }
    }

    /// Entries that the ring was made with.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Index of the next entry.
    #[inline]
    pub(crate) fn head(&self) -> u32 {
        self.head
    }

    /// The phase tag that the next entry has once the device has written it.
    #[inline]
    pub(crate) fn phase(&self) -> bool {
        self.phase
    }

    /// Steps over the entry at the head.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.unrung += 1;
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
    }

    /// The head to write to the doorbell, if more than `slack` entries were stepped over that the device was not told of.
    #[inline]
    pub(crate) fn ring_beyond(&mut self, slack: u32) -> Option<u32> {
        if self.unrung <= slack {
            return None;
        }
        self.unrung = 0;
        Some(self.head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn phase_flips_at_every_wrap() {
        let mut ring = CompletionRing::new(3);
        let seen: Vec<_> = (0..7)
            .map(|_| {
                let at = (ring.head(), ring.phase());
                ring.advance();
                at
            })
            .collect();
        assert_eq!(seen, [(0, true), (1, true), (2, true), (0, false), (1, false), (2, false), (0, true)]);
        assert_eq!(ring.ring_beyond(0), Some(1));
        assert_eq!(ring.ring_beyond(0), None);
    }

    #[test]
    fn a_full_lap_without_a_doorbell_asks_for_one() {
        let mut ring = SubmissionRing::new(4);
        for _ in 0..3 {
            assert!(!ring.must_ring());
            ring.push();
        }
        assert!(ring.must_ring());
        assert_eq!(ring.ring(), Some(3));
        assert!(!ring.must_ring());
        assert_eq!(ring.push().index, 3);
        assert_eq!(ring.ring(), Some(0));
    }

    /// Was checked in debug builds only.
    #[test]
    #[should_panic(expected = "tail would wrap onto the last rung tail")]
    fn a_push_beyond_a_full_lap_without_a_doorbell_is_refused() {
        let mut ring = SubmissionRing::new(4);
        for _ in 0..4 {
            ring.push();
        }
    }

    #[test]
    fn heads_beyond_the_rung_tail_or_before_the_entry_are_impossible() {
        let mut ring = SubmissionRing::new(8);
        let first = ring.push();
        let second = ring.push();
        ring.ring();
        ring.push(); // not rung: the device cannot have fetched it
        assert!(!ring.head_is_possible(first.sequence, 0));
        assert!(ring.head_is_possible(first.sequence, 1));
        assert!(ring.head_is_possible(first.sequence, 2));
        assert!(!ring.head_is_possible(second.sequence, 1));
        assert!(!ring.head_is_possible(first.sequence, 3));
        assert!(!ring.head_is_possible(first.sequence, 8));
        assert!(!ring.head_is_possible(first.sequence, u32::MAX));
    }

    proptest! {
        /// A model device with unbounded indices: everything it can honestly report is accepted, everything else is not.
        #[test]
        fn head_check_is_exact(entries in 2u32..40, steps in proptest::collection::vec((0u8..3, any::<u16>()), 1..300)) {
            let mut ring = SubmissionRing::new(entries);
            let (mut pushed, mut rung, mut fetched, mut done) = (0u64, 0u64, 0u64, 0u64);
            for (step, random) in steps {
                match step {
                    0 if pushed - done < u64::from(entries) - 1 && !ring.must_ring() => {
                        let position = ring.push();
                        prop_assert_eq!(u64::from(position.index), pushed % u64::from(entries));
                        prop_assert_eq!(u64::from(position.sequence), pushed);
                        pushed += 1;
                    }
                    1 => {
                        let tail = ring.ring();
                        prop_assert_eq!(tail.is_some(), rung != pushed);
                        rung = pushed;
                        fetched = (fetched + u64::from(random) % 4).min(rung);
                    }
                    _ if done < fetched => {
                        let legal: Vec<u32> = (done + 1..=rung).map(|h| (h % u64::from(entries)) as u32).collect();
                        for head in 0..entries + 2 {
                            prop_assert_eq!(ring.head_is_possible(done as u32, head), legal.contains(&head));
                        }
                        done += 1;
                    }
                    _ => {}
                }
            }
        }
    }
}
