//! The intent log on disk: what epochs changed since the last checkpoint.
//!
//! Owns: the wire form of an *entry*, all that one epoch changed on all shards: [`encode`] and [`decode`], and of the
//! records in it: [`RecordWriter`], [`records`].
//!
//! An entry is whole blocks: a header, then a section for each shard with changes, then zeroes. Its checksum covers
//! all of them, so an entry counts entirely or not at all, and with it the epoch on every shard. It counts at one
//! place in one log only: it repeats the superblock's generation and incarnation, its number, and the checksum of the
//! entry before it.
//!
//! Invariants: what decodes holds records that decode, each shard at most once. Whether the blocks in them can be what
//! they say is the reader's matter.
//!
//! Excludes: reading, writing, and choosing entries (`crate::log`).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::node::{Key, MAX_VALUE, RawKey};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, ShardId};

/// Blocks of a segment at most.
pub const MAX_SEGMENT_BLOCKS: u32 = 256;

const MAGIC: [u8; 8] = *b"PLXINTNT";

const PUT: u8 = 1;
const DELETE: u8 = 2;
const USED: u8 = 3;
const FREED: u8 = 4;

/// Bytes of an entry before its first section.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();

/// Bytes of a section before its records.
pub const SECTION_BYTES: usize = size_of::<RawSection>();

/// Where an entry has to stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first eight bytes of the volume's UUID.
    pub volume: u64,
    /// Generation of the superblock whose state the log continues.
    pub generation: Generation,
    /// Its incarnation.
    pub incarnation: u64,
    /// Number of the entry, from 1.
    pub sequence: u64,
    /// Checksum of the entry before it; 0 for the first.
    pub predecessor: u32,
}

/// What a shard changed in an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The shard.
    pub shard: ShardId,
    /// Sequence number of its next new inode, as of the end of the epoch.
    pub next_inode: u64,
    /// Its inodes, as of the end of the epoch.
    pub inodes: u64,
    /// The changes, encoded, in the order in which they were made.
    pub records: Vec<u8>,
}

/// A checked entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub place: Place,
    /// The epoch.
    pub epoch: Epoch,
    /// Its checksum, which the next entry repeats.
    pub crc: u32,
    /// Blocks it takes.
    pub blocks: u32,
    /// Of each shard with changes.
    pub sections: Vec<Section>,
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// The item has this value now.
    Put(Key, &'a [u8]),
    /// There is no such item any more.
    Delete(Key),
    /// Data blocks are in use.
    Used(BlockNr, BlockCount),
    /// Data blocks are not in use any more.
    Freed(BlockNr, BlockCount),
}

/// Why bytes are not an entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Never written, something else, or of another volume.
    #[error("no entry of this volume's log")]
    NotAnEntry,
    /// Torn or damaged.
    #[error("checksum is {computed:08x}, the entry says {stored:08x}")]
    Checksum {
        /// Checksum stored.
        stored: u32,
        /// Checksum of the contents.
        computed: u32,
    },
    /// The checksum holds, but the contents make no sense.
    #[error("{0}")]
    Nonsense(&'static str),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    crc: U32,
    /// Bytes of header and sections.
    length: U32,
    volume: U64,
    generation: U64,
    incarnation: U64,
    sequence: U64,
    epoch: U64,
    predecessor: U32,
    sections: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSection {
    shard: u8,
    reserved: [u8; 3],
    /// Bytes of the records.
    length: U32,
    next_inode: U64,
    inodes: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPut {
    key: RawKey,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawBlocks {
    start: U64,
    count: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == 64);
    assert!(std::mem::offset_of!(RawHeader, crc) == 8);
    assert!(size_of::<RawSection>() == 24);
    assert!(size_of::<RawPut>() == 32);
    assert!(size_of::<RawBlocks>() == 12);
};

/// Records being gathered, with a limit.
#[derive(Debug, Default)]
pub struct RecordWriter {
    bytes: Vec<u8>,
}

impl RecordWriter {
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Notes a change of an item.
    pub fn item(&mut self, key: &Key, value: Option<&[u8]>) {
        let key = RawKey::new(key);
        match value {
            Some(value) => {
                let length = u32::try_from(value.len()).expect("no value is longer than MAX_VALUE");
                self.bytes.push(PUT);
                self.bytes.extend_from_slice(RawPut { key, length: length.into() }.as_bytes());
                self.bytes.extend_from_slice(value);
            }
            None => {
                self.bytes.push(DELETE);
                self.bytes.extend_from_slice(key.as_bytes());
            }
        }
    }

    /// Notes data blocks that are in use from now on.
    pub fn used(&mut self, start: BlockNr, count: BlockCount) {
        self.blocks(USED, start, count);
    }

    /// Notes data blocks that are not in use any more.
    pub fn freed(&mut self, start: BlockNr, count: BlockCount) {
        self.blocks(FREED, start, count);
    }

    fn blocks(&mut self, code: u8, start: BlockNr, count: BlockCount) {
        let count = u32::try_from(count.get()).expect("a group has fewer than 2³² blocks");
        self.bytes.push(code);
        let raw = RawBlocks { start: start.get().into(), count: count.into() };
        self.bytes.extend_from_slice(raw.as_bytes());
    }

    /// The records; the writer is empty after that.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Goes over encoded records; ends after the first that makes no sense.
pub fn records(mut bytes: &[u8]) -> impl Iterator<Item = Result<Record<'_>, EntryError>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        match next_record(bytes) {
            Ok((record, rest)) => {
                bytes = rest;
                Some(Ok(record))
            }
            Err(error) => {
                bytes = &[];
                Some(Err(error))
            }
        }
    })
}

fn next_record(bytes: &[u8]) -> Result<(Record<'_>, &[u8]), EntryError> {
    let short = |_| EntryError::Nonsense("a record is cut off");
    let (code, rest) = bytes.split_first().ok_or(EntryError::Nonsense("a record is cut off"))?;
    match *code {
        PUT => {
            let (raw, rest) = RawPut::read_from_prefix(rest).map_err(|_| short(()))?;
            let length = raw.length.get() as usize;
            if length > MAX_VALUE {
                return Err(EntryError::Nonsense("a value is longer than an item's can be"));
            }
            let (value, rest) = rest.split_at_checked(length).ok_or_else(|| short(()))?;
            Ok((Record::Put(checked_key(&raw.key)?, value), rest))
        }
        DELETE => {
            let (raw, rest) = RawKey::read_from_prefix(rest).map_err(|_| short(()))?;
            Ok((Record::Delete(checked_key(&raw)?), rest))
        }
        USED | FREED => {
            let (raw, rest) = RawBlocks::read_from_prefix(rest).map_err(|_| short(()))?;
            let (start, count) = (BlockNr::new(raw.start.get()), BlockCount::new(u64::from(raw.count.get())));
            if count.get() == 0 || start.checked_add(count).is_none() {
                return Err(EntryError::Nonsense("impossible blocks"));
            }
            let record = if *code == USED { Record::Used(start, count) } else { Record::Freed(start, count) };
            Ok((record, rest))
        }
        _ => Err(EntryError::Nonsense("unknown kind of record")),
    }
}

fn checked_key(raw: &RawKey) -> Result<Key, EntryError> {
    let key = raw.get();
    let plain = RawKey::new(&key).as_bytes() == raw.as_bytes();
    plain.then_some(key).ok_or(EntryError::Nonsense("reserved bytes of a key are in use"))
}

/// Bytes of an entry with such sections, before it is filled up to whole blocks.
pub fn entry_bytes(sections: &[Section]) -> usize {
    HEADER_BYTES + sections.iter().map(|section| SECTION_BYTES + section.records.len()).sum::<usize>()
}

/// The blocks of an entry, and its checksum.
///
/// # Panics
/// If there are more sections than shards, or an entry of 4 GiB.
pub fn encode(place: &Place, epoch: Epoch, sections: &[Section]) -> (Vec<u8>, u32) {
    let length = entry_bytes(sections);
    let mut bytes = Vec::with_capacity(length.next_multiple_of(BLOCK_SIZE as usize));
    let mut header = RawHeader {
        magic: MAGIC,
        crc: U32::ZERO,
        length: u32::try_from(length).expect("an entry is no longer than a segment").into(),
        volume: place.volume.into(),
        generation: place.generation.get().into(),
        incarnation: place.incarnation.into(),
        sequence: place.sequence.into(),
        epoch: epoch.get().into(),
        predecessor: place.predecessor.into(),
        sections: u8::try_from(sections.len()).expect("a section for each shard at most"),
        reserved: [0; 3],
    };
    bytes.extend_from_slice(header.as_bytes());
    for section in sections {
        let raw = RawSection {
            shard: section.shard.get(),
            reserved: [0; 3],
            length: u32::try_from(section.records.len()).expect("a section is shorter than its entry").into(),
            next_inode: section.next_inode.into(),
            inodes: section.inodes.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&section.records);
    }
    bytes.resize(length.next_multiple_of(BLOCK_SIZE as usize), 0);
    let crc = crc32c::crc32c(&bytes);
    header.crc = crc.into();
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    (bytes, crc)
}

/// The entry at the start of `bytes`, which may go on behind it.
///
/// # Errors
/// [`EntryError`].
pub fn decode(bytes: &[u8], volume: u64) -> Result<Entry, EntryError> {
    let (header, _) = RawHeader::read_from_prefix(bytes).map_err(|_| EntryError::NotAnEntry)?;
    if header.magic != MAGIC || header.volume.get() != volume {
        return Err(EntryError::NotAnEntry);
    }
    let length = header.length.get() as usize;
    let blocks = length.div_ceil(BLOCK_SIZE as usize);
    let whole = bytes.get(..blocks * BLOCK_SIZE as usize).filter(|_| length >= HEADER_BYTES);
    let whole = whole.ok_or(EntryError::Nonsense("impossible length"))?;
    let stored = header.crc.get();
    let blank = RawHeader { crc: U32::ZERO, ..header };
    let computed = crc32c::crc32c_append(crc32c::crc32c(blank.as_bytes()), &whole[HEADER_BYTES..]);
    if stored != computed {
        return Err(EntryError::Checksum { stored, computed });
    }
    if header.reserved != [0; 3] || whole[length..].iter().any(|byte| *byte != 0) {
        return Err(EntryError::Nonsense("reserved bytes are in use"));
    }
    Ok(Entry {
        place: Place {
            volume,
            generation: Generation::new(header.generation.get()),
            incarnation: header.incarnation.get(),
            sequence: header.sequence.get(),
            predecessor: header.predecessor.get(),
        },
        epoch: Epoch::new(header.epoch.get()),
        crc: stored,
        blocks: blocks as u32,
        sections: decode_sections(&whole[HEADER_BYTES..length], header.sections)?,
    })
}

fn decode_sections(mut bytes: &[u8], count: u8) -> Result<Vec<Section>, EntryError> {
    let mut sections: Vec<Section> = Vec::new();
    for _ in 0..count {
        let (raw, rest) =
            RawSection::read_from_prefix(bytes).map_err(|_| EntryError::Nonsense("a section is cut off"))?;
        let (own, rest) = rest
            .split_at_checked(raw.length.get() as usize)
            .ok_or(EntryError::Nonsense("a section is cut off"))?;
        bytes = rest;
        let shard = ShardId::new(raw.shard).ok_or(EntryError::Nonsense("impossible shard"))?;
        if raw.reserved != [0; 3] || sections.iter().any(|section| section.shard >= shard) {
            return Err(EntryError::Nonsense("sections are not in the order of shards"));
        }
        for record in records(own) {
            record?;
        }
        let (next_inode, inodes) = (raw.next_inode.get(), raw.inodes.get());
        sections.push(Section { shard, next_inode, inodes, records: own.to_vec() });
    }
    if !bytes.is_empty() {
        return Err(EntryError::Nonsense("bytes behind the last section"));
    }
    Ok(sections)
}

#[cfg(test)]
pub(crate) mod tests;
