//! The superblock rings: finding the newest superblock, writing the next.
//!
//! Owns: [`read_newest`] and [`write()`], and what may be wrong with the rings ([`SuperblockError`],
//! [`SuperblockWarning`]). The block itself is [`crate::format::superblock`]'s.
//!
//! Which copy counts: of all sixteen slots, the valid one with the highest generation, in either ring. A slot is
//! valid only where its generation belongs.
//!
//! | newest generation g | its twin | the slots of g + 1 | result |
//! |---|---|---|---|
//! | found | the same | older or empty | g |
//! | found | damaged, or older | older or empty | g, with [`SuperblockWarning::TwinDamaged`] or [`SuperblockWarning::TwinOutdated`] |
//! | found | any | damaged, one or both | g, with [`SuperblockWarning::NewerUnreadable`] |
//! | none, but traces of a volume | – | – | [`SuperblockError::AllDamaged`] |
//! | none | – | – | [`SuperblockError::NotPollux`] |
//!
//! *Legal crash outcomes*: a write goes to the first ring and, once that is durable, to the second, each by a write
//! that bypasses the device's cache. A power cut leaves g + 1 in no ring (the state before), in one or in both (the
//! state after). A torn g + 1 looks like a damaged one: that is why the third row is a warning, and why g − 1's
//! state, that g's checkpoint replaced, must survive until g + 1 is durable.
//!
//! Excludes: what the superblock points to.

use reactor::block::Durability;

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::group::{RESERVED_BLOCKS, is_bitmap_slot};
use crate::format::superblock::{DecodeError, FORMAT_VERSION, RING_SLOTS, RING_STARTS};
pub use crate::format::superblock::{LogArea, ShardRecord, Superblock};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation};

/// Why no superblock can be used. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Nothing on the device says Pollux.
    #[error("{device} holds no Pollux volume; `pollux mkfs` makes one")]
    NotPollux {
        /// Name of the device.
        device: String,
    },
    /// There was a volume, but all copies of its superblock are damaged.
    #[error("{device}: every copy of the superblock is damaged; the first, at block {block}: {first}")]
    AllDamaged {
        /// Name of the device.
        device: String,
        /// Where the first damaged copy lies.
        block: BlockNr,
        /// What is wrong with it.
        first: String,
    },
    /// Made by a newer version of Pollux.
    #[error(
        "{device}: the volume has format version {version}, this program knows {FORMAT_VERSION}; use a newer one"
    )]
    NewerVersion {
        /// Name of the device.
        device: String,
        /// Its version.
        version: u32,
    },
    /// Uses features that this program does not know.
    #[error("{device}: the volume uses unknown features {features:#x}; use a newer version of this program")]
    UnknownFeatures {
        /// Name of the device.
        device: String,
        /// The unknown ones.
        features: u64,
    },
    /// The device is shorter than the volume on it: it shrank, or the image was cut.
    #[error(
        "{device} has {device_bytes} bytes, the volume on it {volume_bytes}: the device was shrunk or the image cut"
    )]
    DeviceTooShort {
        /// Name of the device.
        device: String,
        /// Bytes of the device.
        device_bytes: u64,
        /// Bytes of the volume.
        volume_bytes: u64,
    },
    /// The device could not be read or written.
    #[error("{0}")]
    Io(FsError),
}

impl From<SuperblockError> for FsError {
    fn from(error: SuperblockError) -> Self {
        match error {
            SuperblockError::Io(error) => error,
            other => Self::Damaged { what: other.to_string(), block: None, inode: None },
        }
    }
}

/// What was wrong with the rings although a superblock was found, or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockWarning {
    /// One copy of the superblock used is damaged; the other was used.
    #[error(
        "superblock generation {generation}: the copy at block {block} is damaged ({damage}); its twin was used"
    )]
    TwinDamaged {
        /// Generation used.
        generation: Generation,
        /// Where the damaged copy lies.
        block: BlockNr,
        /// What is wrong with it.
        damage: String,
    },
    /// One copy of the superblock used was never written: power failed between the two writes.
    #[error(
        "superblock generation {generation}: the copy at block {block} was not written; its twin was used"
    )]
    TwinOutdated {
        /// Generation used.
        generation: Generation,
        /// Where the missing copy belongs.
        block: BlockNr,
    },
    /// The generation after the one used is damaged, or its write was cut off.
    #[error(
        "superblock generation {newer} is damaged or was not completely written (block {block}: {damage}); \
         generation {used} was used"
    )]
    NewerUnreadable {
        /// Generation used.
        used: Generation,
        /// The one that should have been.
        newer: Generation,
        /// Where its first damaged copy lies.
        block: BlockNr,
        /// What is wrong with it.
        damage: String,
    },
    /// An older copy is damaged, of which nothing is needed now.
    #[error("an old copy of the superblock at block {block} is damaged ({damage})")]
    OldDamaged {
        /// Where it lies.
        block: BlockNr,
        /// What is wrong with it.
        damage: String,
    },
    /// One of the two writes failed; the other is durable.
    #[error("superblock generation {generation}: the copy at block {block} could not be written ({error})")]
    TwinNotWritten {
        /// Generation written.
        generation: Generation,
        /// Where the missing copy belongs.
        block: BlockNr,
        /// Why.
        error: String,
    },
}

/// One slot, as read.
struct Slot {
    ring: usize,
    index: u64,
    contents: Contents,
}

enum Contents {
    Valid(Box<Superblock>),
    /// All zeroes: never written.
    Empty,
    /// Something that is no superblock: foreign, or badly damaged.
    Foreign,
    /// Of a newer format.
    Newer(Generation, SuperblockError),
    /// Was a superblock, or could not be read.
    Damaged(String),
}

impl Slot {
    fn block(&self) -> BlockNr {
        BlockNr::new(RING_STARTS[self.ring].get() + self.index)
    }

    fn generation(&self) -> Option<Generation> {
        match &self.contents {
            Contents::Valid(superblock) => Some(superblock.generation),
            Contents::Newer(generation, _) => Some(*generation),
            Contents::Empty | Contents::Foreign | Contents::Damaged(_) => None,
        }
    }
}

/// Finds the newest superblock, and what is wrong with the rings.
///
/// # Errors
/// [`SuperblockError`]. Nothing is written in any case.
pub async fn read_newest(disk: &VolumeDisk) -> Result<(Superblock, Vec<SuperblockWarning>), SuperblockError> {
    let slots = read_slots(disk).await?;
    let newest = slots.iter().filter(|slot| slot.generation().is_some()).max_by_key(|slot| slot.generation());
    let superblock = match newest.map(|slot| &slot.contents) {
        Some(Contents::Valid(superblock)) => (**superblock).clone(),
        Some(Contents::Newer(_, error)) => return Err(error.clone()),
        _ => return Err(nothing_found(disk, &slots).await),
    };
    let volume_blocks = superblock.layout.blocks();
    if volume_blocks > disk.blocks() {
        return Err(SuperblockError::DeviceTooShort {
            device: disk.name().to_owned(),
            device_bytes: disk.blocks().get() * BLOCK_SIZE,
            volume_bytes: volume_blocks.get() * BLOCK_SIZE,
        });
    }
    let warnings = find_damage(&slots, superblock.generation);
    Ok((superblock, warnings))
}

/// Writes `superblock` to its slot in both rings, each durably. Everything it names must be durable before.
/// Returns a warning if only one copy was written.
///
/// # Errors
/// [`SuperblockError::Io`] if neither was: whether one is on the medium is unknown, so nothing may be written to the
/// volume until it is mounted again.
pub async fn write(
    disk: &VolumeDisk,
    superblock: &Superblock,
) -> Result<Option<SuperblockWarning>, SuperblockError> {
    let image = superblock.encode();
    let mut failure = None;
    let mut written = 0;
    for block in superblock.slots() {
        match disk.write(block, &*image, Durability::Durable).await {
            Ok(()) => written += 1,
            Err(error) => failure = Some((block, error)),
        }
    }
    match failure {
        None => Ok(None),
        Some((_, error)) if written == 0 => Err(SuperblockError::Io(error)),
        Some((block, error)) => Ok(Some(SuperblockWarning::TwinNotWritten {
            generation: superblock.generation,
            block,
            error: error.to_string(),
        })),
    }
}

/// Reads all slots that lie on the device. A ring that cannot be read at once is read slot by slot.
async fn read_slots(disk: &VolumeDisk) -> Result<Vec<Slot>, SuperblockError> {
    let mut slots = Vec::new();
    let mut failure = None;
    for (ring, start) in RING_STARTS.into_iter().enumerate() {
        if start.get() + RING_SLOTS > disk.blocks().get() {
            continue;
        }
        let whole = disk.read(start, BlockCount::new(RING_SLOTS)).await;
        for index in 0..RING_SLOTS {
            let block = match &whole {
                Ok(bytes) => {
                    let offset = (index * BLOCK_SIZE) as usize;
                    Ok(bytes[offset..offset + BLOCK_SIZE as usize].to_vec())
                }
                Err(_) => disk.read(BlockNr::new(start.get() + index), BlockCount::new(1)).await,
            };
            let contents = match block {
                Ok(bytes) => examine(disk, index, &bytes),
                Err(error) => {
                    let damage = error.to_string();
                    failure = Some(error);
                    Contents::Damaged(damage)
                }
            };
            slots.push(Slot { ring, index, contents });
        }
    }
    match failure {
        // Not one slot could be read: that is the device, not the volume.
        Some(error) if slots.iter().all(|slot| matches!(slot.contents, Contents::Damaged(_))) => {
            Err(SuperblockError::Io(error))
        }
        _ => Ok(slots),
    }
}

fn examine(disk: &VolumeDisk, index: u64, bytes: &[u8]) -> Contents {
    let device = || disk.name().to_owned();
    match Superblock::decode(bytes) {
        Ok(superblock) if superblock.generation.get() % RING_SLOTS == index => {
            Contents::Valid(Box::new(superblock))
        }
        Ok(superblock) => {
            Contents::Damaged(format!("generation {} does not belong here", superblock.generation))
        }
        Err(DecodeError::Empty) => Contents::Empty,
        Err(DecodeError::NoMagic) => Contents::Foreign,
        Err(DecodeError::NewerVersion { version, generation }) => {
            Contents::Newer(generation, SuperblockError::NewerVersion { device: device(), version })
        }
        Err(DecodeError::Features { features, generation }) => {
            Contents::Newer(generation, SuperblockError::UnknownFeatures { device: device(), features })
        }
        Err(damage @ (DecodeError::Checksum { .. } | DecodeError::Nonsense { .. })) => {
            Contents::Damaged(damage.to_string())
        }
    }
}

/// Tells a volume without superblocks from a device without a volume: the former has a bitmap in its first slot.
async fn nothing_found(disk: &VolumeDisk, slots: &[Slot]) -> SuperblockError {
    let device = disk.name().to_owned();
    let damaged = |slot: &&Slot| matches!(slot.contents, Contents::Damaged(_));
    let first_bitmap = disk.read(BlockNr::new(RESERVED_BLOCKS), BlockCount::new(1)).await;
    let others_traces = first_bitmap.is_ok_and(|block| is_bitmap_slot(&block));
    let first = slots.iter().find(damaged).or_else(|| slots.first().filter(|_| others_traces));
    match first {
        None => SuperblockError::NotPollux { device },
        Some(slot) => SuperblockError::AllDamaged {
            device,
            block: slot.block(),
            first: slot.contents.damage().unwrap_or_else(|| "no superblock".to_owned()),
        },
    }
}

impl Contents {
    /// What is wrong with a slot that should hold a superblock, if anything is.
    fn damage(&self) -> Option<String> {
        match self {
            Self::Damaged(damage) => Some(damage.clone()),
            Self::Foreign => Some("no superblock".to_owned()),
            Self::Valid(_) | Self::Newer(..) | Self::Empty => None,
        }
    }
}

/// What is wrong with slots other than the one used, which is of generation `used`.
fn find_damage(slots: &[Slot], used: Generation) -> Vec<SuperblockWarning> {
    let newer = Generation::new(used.get().wrapping_add(1));
    let mut warnings = Vec::new();
    let mut newer_seen = false;
    for slot in slots {
        let block = slot.block();
        let own_place = slot.index == used.get() % RING_SLOTS;
        let next_place = slot.index == newer.get() % RING_SLOTS;
        match slot.contents.damage() {
            Some(damage) if own_place => {
                warnings.push(SuperblockWarning::TwinDamaged { generation: used, block, damage });
            }
            Some(damage) if next_place => {
                if !newer_seen {
                    warnings.push(SuperblockWarning::NewerUnreadable { used, newer, block, damage });
                }
                newer_seen = true;
            }
            Some(damage) => warnings.push(SuperblockWarning::OldDamaged { block, damage }),
            None if own_place && slot.generation() != Some(used) => {
                warnings.push(SuperblockWarning::TwinOutdated { generation: used, block });
            }
            None => {}
        }
    }
    warnings
}

#[cfg(test)]
mod tests;
