//! The intent log: what makes an fsync cheaper than a checkpoint.
//!
//! Owns: [`LogWriter`], the end at which the coordinator appends; [`read_log`], what a mount finds; [`Found`]. The wire
//! form is [`crate::format::log`]'s.
//!
//! One log serves all shards: the coordinator gathers what each changed in an epoch and writes it as one entry. So the
//! entry is the seal of its epoch on every shard, and an fsync costs one durable write however many shards have
//! changed. (A log for each shard would need a write for each, seals that name the participants, and a rule for those
//! of which one was lost.)
//!
//! Invariants:
//! - an entry is written only when the one before it is durable, and after a flush that covers the data that it names;
//! - a segment is overwritten only when a superblock is durable that uses it: the one before uses the other;
//! - the log holds every epoch between its superblock's and the last durable one, or the superblock would be newer: an
//!   epoch that does not fit is made durable by a checkpoint.
//!
//! # Legal crash outcomes
//! The entry being written is there or not (its checksum covers all of it). An entry that is valid behind one that is
//! not cannot come from a crash: the one before was durable. That is damage, and the volume is mounted read-only.
//!
//! Excludes: gathering records and replaying them (`crate::shard::log`), when to write (the coordinator's).

use reactor::block::Durability;

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::log::{Entry, EntryError, Place, Section, decode, encode, entry_bytes};
use crate::format::superblock::{LogArea, Superblock};
use crate::planted::{Bug, is_planted};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, ShardId};

const BLOCK_BYTES: usize = BLOCK_SIZE as usize;

/// The end of a log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogWriter {
    area: LogArea,
    /// What the next entry has to say of itself.
    place: Place,
    /// Blocks in use.
    used: u32,
}

impl LogWriter {
    /// The empty log that continues `superblock`'s state, if it has one.
    pub(crate) fn of(superblock: &Superblock) -> Option<Self> {
        let place = first_place(superblock);
        superblock.log.map(|area| Self { area, place, used: 0 })
    }

    /// Whether nothing was written yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether so much was written that a checkpoint should come before it is all.
    pub(crate) fn is_half_full(&self) -> bool {
        self.used >= self.area.blocks / 2
    }

    /// Whether an entry with such sections fits.
    pub(crate) fn has_room(&self, sections: &[Section]) -> bool {
        let blocks = entry_bytes(sections).div_ceil(BLOCK_BYTES);
        blocks <= (self.area.blocks - self.used) as usize
    }

    /// Appends the entry of `epoch`, durably, in one write. There is room for it.
    ///
    /// # Errors
    /// The device's: whether the entry is on the medium is unknown, so nothing may follow it.
    pub(crate) async fn append(
        &mut self,
        disk: &VolumeDisk,
        epoch: Epoch,
        sections: &[Section],
    ) -> Result<(), FsError> {
        assert!(self.has_room(sections), "whoever appends has looked");
        let (bytes, crc) = encode(&self.place, epoch, sections);
        let start = BlockNr::new(self.area.head().get() + u64::from(self.used));
        disk.write(start, &bytes, Durability::Durable).await?;
        self.used += (bytes.len() / BLOCK_BYTES) as u32;
        self.place.sequence += 1;
        self.place.predecessor = crc;
        Ok(())
    }
}

/// What a log holds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// The entries, from the first on.
    pub(crate) entries: Vec<Entry>,
    /// Why what follows them cannot be used, if that is not the log's ordinary end.
    pub(crate) damage: Option<String>,
}

impl Found {
    /// The last epoch that the log makes durable.
    pub(crate) fn last_epoch(&self) -> Option<Epoch> {
        self.entries.last().map(|entry| entry.epoch)
    }

    /// What `shard` changed, from the first epoch on.
    pub(crate) fn sections_of(&self, shard: ShardId) -> Vec<Section> {
        let sections = self.entries.iter().flat_map(|entry| &entry.sections);
        sections.filter(|section| section.shard == shard).cloned().collect()
    }
}

/// Reads the log that continues `superblock`'s state. Nothing is written.
pub(crate) async fn read_log(disk: &VolumeDisk, superblock: &Superblock) -> Found {
    let Some(area) = superblock.log else { return Found::default() };
    match disk.read(area.head(), BlockCount::new(u64::from(area.blocks))).await {
        Ok(bytes) => find_entries(superblock, &bytes),
        Err(error) => Found {
            entries: Vec::new(),
            damage: Some(format!("the intent log at block {} cannot be read: {error}", area.head())),
        },
    }
}

fn first_place(superblock: &Superblock) -> Place {
    Place {
        volume: superblock.identity().volume,
        generation: superblock.generation,
        incarnation: superblock.incarnation,
        sequence: 1,
        predecessor: 0,
    }
}

fn find_entries(superblock: &Superblock, bytes: &[u8]) -> Found {
    let mut expected = first_place(superblock);
    let mut found = Found::default();
    let mut position = 0;
    let mut last = superblock.epoch;
    while position < bytes.len() {
        let entry = match decode(&bytes[position..], expected.volume) {
            Ok(entry) if fits(&entry, &expected) => entry,
            outcome => {
                found.damage = find_damage(superblock, bytes, position, &expected, &outcome);
                break;
            }
        };
        if let Some(what) = nonsense(superblock, &entry, last) {
            found.damage = Some(told(superblock, position, expected.sequence, what));
            break;
        }
        last = entry.epoch;
        position += entry.blocks as usize * BLOCK_BYTES;
        expected.sequence += 1;
        expected.predecessor = entry.crc;
        found.entries.push(entry);
    }
    found
}

/// Whether an entry stands where it should.
fn fits(entry: &Entry, expected: &Place) -> bool {
    if is_planted(Bug::StaleLogAccepted) {
        return entry.place.sequence == expected.sequence;
    }
    entry.place == *expected
}

/// What no writer has written, although the checksum is right.
fn nonsense(superblock: &Superblock, entry: &Entry, last: Epoch) -> Option<&'static str> {
    if entry.epoch <= last && !is_planted(Bug::StaleLogAccepted) {
        return Some("its epoch does not follow the one before");
    }
    if entry.epoch.next().is_none() {
        return Some("its epoch cannot be");
    }
    let shards = usize::from(superblock.shard_count());
    let foreign = entry.sections.iter().any(|section| section.shard.index() >= shards);
    foreign.then_some("it names a shard that the volume does not have")
}

/// The log ends at `position`. Ordinarily nothing of it follows.
fn find_damage(
    superblock: &Superblock,
    bytes: &[u8],
    position: usize,
    expected: &Place,
    outcome: &Result<Entry, EntryError>,
) -> Option<String> {
    let own = |entry: &Entry| {
        let place = entry.place;
        (place.generation, place.incarnation) == (expected.generation, expected.incarnation)
    };
    let behind = (position..bytes.len()).step_by(BLOCK_BYTES).any(|at| {
        decode(&bytes[at..], expected.volume)
            .is_ok_and(|entry| own(&entry) && entry.place.sequence > expected.sequence)
    });
    let what = match outcome {
        // Its checksum is right, and it is of this log and this number: no torn write looks like that.
        Ok(entry) if own(entry) && entry.place.sequence == expected.sequence => {
            "it does not follow the one before".to_owned()
        }
        _ if !behind => return None,
        Ok(_) => "another entry stands in its place".to_owned(),
        Err(error) => error.to_string(),
    };
    Some(told(superblock, position, expected.sequence, &what))
}

fn told(superblock: &Superblock, position: usize, sequence: u64, what: &str) -> String {
    let head = superblock.log.map_or(0, |area| area.head().get());
    let block = head + (position / BLOCK_BYTES) as u64;
    format!("the intent log is damaged: entry {sequence} at block {block}: {what}")
}

pub(crate) mod state;
#[cfg(test)]
mod tests;
