//! Command slots: which commands of a queue are in flight, found from a completion's command identifier by indexing.
//!
//! A command identifier is `generation << index_bits | index`. The generation changes each time a slot is reused, so
//! that a late or forged completion of an earlier command does not pass for the present one.
//!
//! Invariants:
//! - a slot is free or in flight; a free slot has no identifier, and no command ever carries 0xffff, which means "none" in the
//!   error log (NVMe 1.4 §5.14.1.1);
//! - taking and releasing allocate nothing.
//!
//! Excludes: what a command was for. `owner` is the caller's.

use nvme_spec::CommandId;

use crate::planted::{Bug, is_planted};

/// Most commands in flight on one queue: leaves three bits of every identifier to the generation.
pub(crate) const MAX_SLOTS: u16 = 1 << 12;

/// In place of the identifier of a free slot: none that a device can name.
const FREE: u32 = u32::MAX;
/// The identifier that is left out.
#[cfg(test)]
const RESERVED: u16 = u16::MAX;
/// End of the list of free slots.
const NONE: u16 = u16::MAX;

/// What a completion is checked against.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Identifier of the command in flight, or [`FREE`].
    cid: u32,
    /// Of the next command here: the same index, the next generation.
    next: u16,
    /// The caller's; of a free slot, the next free one or [`NONE`].
    owner: u16,
    sequence: u32,
}

/// A slot taken out of service by its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    /// The slot's index.
    pub(crate) slot: u16,
    /// What was given to [`CommandSlots::take`].
    pub(crate) owner: u16,
    /// Place in the order of submission.
    pub(crate) sequence: u32,
}

/// Why a command identifier does not name a command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadCid {
    /// Its index is beyond the last slot.
    OutOfRange,
    /// Nothing is in flight in its slot.
    NotInFlight,
    /// Its slot is in use by a later command.
    Stale,
}

/// The slots of one queue.
#[derive(Debug)]
pub(crate) struct CommandSlots {
    slots: Box<[Slot]>,
    /// The slot that is taken next, or [`NONE`].
    free: u16,
    /// The bits of an identifier that are the index.
    index_mask: u16,
}

impl CommandSlots {
    /// `count` free slots, between 1 and [`MAX_SLOTS`].
    pub(crate) fn new(count: u16) -> Self {
        assert!((1..=MAX_SLOTS).contains(&count), "{count} command slots");
        // An index is never all ones, so no identifier is 0xffff whatever its generation.
        let index_bits = u32::from(count + 1).next_power_of_two().trailing_zeros();
        let slot = |index| {
            let owner = if index + 1 == count { NONE } else { index + 1 };
            Slot { cid: FREE, next: index, owner, sequence: 0 }
        };
        Self { slots: (0..count).map(slot).collect(), free: 0, index_mask: ((1u32 << index_bits) - 1) as u16 }
    }

    #[inline]
    pub(crate) fn has_free(&self) -> bool {
        self.free != NONE
    }

    /// Whether two slots are free.
    pub(crate) fn has_free_pair(&self) -> bool {
        self.slots.get(usize::from(self.free)).is_some_and(|slot| slot.owner != NONE)
    }

    /// Commands in flight; counts them.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| slot.cid != FREE).count()
    }

    /// The slot that [`take`](Self::take) would give.
    #[inline]
    pub(crate) fn peek_free(&self) -> Option<u16> {
        Some(self.free).filter(|&slot| slot != NONE)
    }

    /// Takes a free slot for a command that goes out as the `sequence`th of its queue.
    #[inline(always)]
    pub(crate) fn take(&mut self, owner: u16, sequence: u32) -> Option<(u16, CommandId)> {
        let slot = self.free;
        // The end of the list is beyond the last slot.
        let taken = self.slots.get_mut(usize::from(slot))?;
        self.free = taken.owner;
        let cid = taken.next;
        // The generation wraps, the index stays.
        let next = cid.wrapping_add(self.index_mask + 1);
        *taken = Slot { cid: u32::from(cid), next, owner, sequence };
        Some((slot, CommandId::new(cid)))
    }

    /// The command in flight under this identifier.
    #[inline(always)]
    pub(crate) fn find(&self, cid: CommandId) -> Result<Command, BadCid> {
        let slot = cid.get() & self.index_mask;
        let found = self.slots.get(usize::from(slot)).ok_or(BadCid::OutOfRange)?;
        if found.cid != u32::from(cid.get()) && !is_planted(Bug::CidUnchecked) {
            return Err(if found.cid == FREE { BadCid::NotInFlight } else { BadCid::Stale });
        }
        Ok(Command { slot, owner: found.owner, sequence: found.sequence })
    }

    /// Frees a slot that is in flight.
    #[inline]
    pub(crate) fn release(&mut self, slot: u16) {
        let found = &mut self.slots[usize::from(slot)];
        assert!(found.cid != FREE, "slot {slot} released twice");
        (found.cid, found.owner) = (FREE, self.free);
        self.free = slot;
    }

    /// Frees everything: the device was reset.
    pub(crate) fn release_all(&mut self) {
        for slot in 0..self.slots.len() as u16 {
            if self.slots[usize::from(slot)].cid != FREE {
                self.release(slot);
            }
        }
    }

    /// Every command in flight, with its identifier.
    pub(crate) fn commands(&self) -> impl Iterator<Item = (CommandId, Command)> + '_ {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.cid != FREE).map(|(index, slot)| {
            let command = Command { slot: index as u16, owner: slot.owner, sequence: slot.sequence };
            (CommandId::new(slot.cid as u16), command)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_slot_has_another_identifier() {
        let mut slots = CommandSlots::new(3);
        let (slot, first) = slots.take(7, 0).unwrap();
        assert_eq!(slots.find(first), Ok(Command { slot, owner: 7, sequence: 0 }));
        slots.release(slot);
        assert_eq!(slots.find(first), Err(BadCid::NotInFlight));
        let (again, second) = slots.take(8, 1).unwrap();
        assert_eq!(again, slot);
        assert_eq!(slots.find(first), Err(BadCid::Stale));
        assert!(slots.find(second).is_ok());
        assert_eq!(slots.find(CommandId::new(3)), Err(BadCid::OutOfRange));
    }

    #[test]
    fn no_identifier_is_ever_the_reserved_one_and_generations_last() {
        for count in [1, 2, 255, 256, 4096] {
            let mut slots = CommandSlots::new(count);
            for round in 0..70_000u32 / u32::from(count) + 20 {
                let taken: Vec<_> = (0..count).map(|_| slots.take(0, round).unwrap()).collect();
                assert!(slots.take(0, 0).is_none());
                for (slot, cid) in taken {
                    assert_ne!(cid.get(), RESERVED);
                    assert_eq!(slots.find(cid).unwrap().slot, slot);
                    slots.release(slot);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_our_own_error() {
        let mut slots = CommandSlots::new(1);
        let (slot, _) = slots.take(0, 0).unwrap();
        slots.release(slot);
        slots.release(slot);
    }
}
