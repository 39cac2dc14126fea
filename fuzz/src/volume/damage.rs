//! Changes of a volume that a script tells, with every checksum made right that stands above the change.
//!
//! Owns: [`damaged`]. What can be changed, and what is made right after it:
//!
//! | change | then |
//! |---|---|
//! | bytes of a tree node, of an item's value; items taken out, doubled, under another key | its parent's checksum, and so on up to the superblock |
//! | bytes of a bitmap slot, blocks marked and unmarked | its checksum, the count of free blocks, the digest in the superblock |
//! | bytes of a log entry; an entry more, with records made of existing items; entries less | its checksum, the chain of entries |
//! | bytes of the superblock; the newest one gone | its checksum, its place in the rings |
//! | bytes of any block | nothing |
//!
//! So a change is seen by the code that takes meaning from what was changed, and not by the first checksum.

use std::collections::BTreeMap;

use fs_core::format::group::contribution;
use fs_core::format::log::{Place, RecordWriter, Section, decode as decode_entry, encode as encode_entry};
use fs_core::format::node::{
    BlockPtr, CheckedNode, ENTRY_SIZE, Expected, HEADER_SIZE, Header, ItemKind, Key, LEAF_CAPACITY,
    MAX_VALUE, NodeImage, SLOT_SIZE, check, encode_leaf,
};
use fs_core::format::superblock::slots_of;
use fs_core::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, ShardId};
use reactor::sim::DiskImage;

use super::images::Base;
use super::map::{Map, read};
use crate::edit::{change, seal};
use crate::script::Script;

/// Changes of one volume at most.
const CHANGES: u8 = 8;
/// Where superblocks, bitmap slots and log entries have their checksum.
const CRC_AT: usize = 8;
/// Where a superblock has its generation, its digest of the groups, its records of shards.
const GENERATION_AT: usize = 16;
const DIGEST_AT: usize = 176;
const RECORDS_AT: usize = 512;
const RECORD_BYTES: usize = 48;
/// Where a record has the root's checksum.
const ROOT_CRC_AT: usize = 16;
/// Where an entry of an inner node has its child's checksum.
const CHILD_CRC_AT: usize = 28;
/// Where a slot of a leaf has place and length of its value.
const VALUE_AT: usize = 28;
/// Where a node counts its items.
const COUNT_AT: usize = 32;
/// Where a bitmap slot has its count of free blocks, its epoch, its bitmap.
const FREE_AT: usize = 12;
const EPOCH_AT: usize = 32;
const BITMAP_AT: usize = 64;
/// Where a log entry repeats the checksum of the one before.
const PREDECESSOR_AT: usize = 56;

/// The volume as it is after the changes that the script tells.
pub fn damaged(base: &Base, script: &mut Script) -> DiskImage {
    let mut damage = Damage::new(base);
    for _ in 0..=script.byte() % CHANGES {
        if script.is_over() {
            break;
        }
        damage.change(script);
    }
    damage.made_right()
}

struct Damage<'a> {
    map: &'a Map,
    image: DiskImage,
    /// The superblock's bytes.
    block: Box<[u8; BLOCK_SIZE as usize]>,
    /// Nodes that were changed, by their place in the map.
    nodes: BTreeMap<usize, Box<NodeImage>>,
    /// Bitmap slots that were changed.
    slots: BTreeMap<usize, Vec<u8>>,
    log: Vec<Vec<u8>>,
    /// Copies of the superblock that are left out, one bit for each ring.
    lost_copies: u8,
}

impl<'a> Damage<'a> {
    fn new(base: &'a Base) -> Self {
        let map = &base.map;
        Self {
            map,
            image: base.image.clone(),
            block: map.block.clone(),
            nodes: BTreeMap::new(),
            slots: BTreeMap::new(),
            log: map.log.iter().map(|entry| entry.bytes.clone()).collect(),
            lost_copies: 0,
        }
    }

    fn change(&mut self, script: &mut Script) {
        match script.byte() % 16 {
            0..4 => self.value(script),
            4..6 => self.items(script),
            6 => {
                let node = usize::from(script.byte()) % self.map.nodes.len();
                change(script, &mut self.node(node)[..]);
            }
            7 => {
                let fields = script.pick(&[RECORDS_AT, RECORDS_AT + 2 * RECORD_BYTES, BLOCK_SIZE as usize]);
                change(script, &mut self.block[..fields]);
            }
            8 => self.slot_bytes(script),
            9 => self.bits(script),
            10 => {
                if !self.log.is_empty() {
                    let entry = usize::from(script.byte()) % self.log.len();
                    change(script, &mut self.log[entry]);
                }
            }
            11..14 => self.entry(script),
            14 => match script.byte() % 4 {
                0 => drop(self.log.pop()),
                1 => self.log.clear(),
                which => self.lost_copies |= which,
            },
            _ => self.any_block(script),
        }
    }

    fn node(&mut self, node: usize) -> &mut NodeImage {
        let map = self.map;
        self.nodes.entry(node).or_insert_with(|| map.nodes[node].image.clone())
    }

    /// A leaf that the script chooses.
    fn leaf(&self, script: &mut Script) -> usize {
        let leaves: Vec<usize> =
            (0..self.map.nodes.len()).filter(|node| self.map.nodes[*node].expected.level == 0).collect();
        leaves[usize::from(script.byte()) % leaves.len()]
    }

    /// Changes an item's value; its length stays.
    fn value(&mut self, script: &mut Script) {
        let leaf = self.leaf(script);
        let image = self.node(leaf);
        let word = |image: &NodeImage, at: usize| usize::from(u16::from_le_bytes([image[at], image[at + 1]]));
        let count = word(image, COUNT_AT).min((image.len() - HEADER_SIZE) / SLOT_SIZE);
        if count == 0 {
            return;
        }
        let slot = HEADER_SIZE + usize::from(script.word()) % count * SLOT_SIZE;
        let (start, length) = (word(image, slot + VALUE_AT), word(image, slot + VALUE_AT + 2));
        if let Some(value) = image.get_mut(start..start + length) {
            change(script, value);
        }
    }

    /// Changes which items a leaf has, within what it may hold.
    fn items(&mut self, script: &mut Script) {
        let leaf = self.leaf(script);
        let expected = self.map.nodes[leaf].expected;
        let image = self.node(leaf);
        let Some(mut items) = items_of(image, &expected) else { return };
        let Some(chosen) = nth_key(&items, script.word()) else { return };
        let other = nth_key(&items, script.word()).unwrap_or(chosen);
        let key = changed_key(chosen, other, script);
        match script.byte() % 4 {
            0 => drop(items.remove(&chosen)),
            1 => drop(items.insert(key, items[&chosen].clone())),
            2 => {
                if let Some(value) = items.remove(&chosen) {
                    items.insert(key, value);
                }
            }
            _ => {
                let mut value = items[&chosen].clone();
                let length = value.len() as u64 + 2 * u64::from(script.byte()) / 3;
                value.resize((length as usize).saturating_sub(60).min(MAX_VALUE), script.byte());
                items.insert(chosen, value);
            }
        }
        let bytes: usize = items.values().map(|value| SLOT_SIZE + value.len()).sum();
        if bytes > LEAF_CAPACITY || items.keys().any(|key| !expected.bounds.contains(key)) {
            return;
        }
        let BlockPtr { address, epoch, .. } = expected.ptr;
        let header = Header { identity: expected.identity, address, epoch };
        *image = *encode_leaf(&header, items.iter().map(|(key, value)| (*key, &value[..])));
    }

    fn slot_bytes(&mut self, script: &mut Script) {
        let slot = usize::from(script.byte()) % self.map.slots.len();
        change(script, self.slot(slot));
    }

    fn slot(&mut self, slot: usize) -> &mut [u8] {
        let map = self.map;
        self.slots.entry(slot).or_insert_with(|| map.slots[slot].bytes.clone())
    }

    /// Marks blocks of a group as used, or as free; the count is right.
    fn bits(&mut self, script: &mut Script) {
        let slot = usize::from(script.byte()) % self.map.slots.len();
        let (first, count, mask) = (usize::from(script.word()), script.byte() % 16, script.pick(&[0xff, 0]));
        let bytes = self.map.superblock.layout.bitmap_bits() / 8;
        let bitmap = &mut self.slot(slot)[BITMAP_AT..][..bytes];
        for bit in first..=first + usize::from(count) {
            let byte = &mut bitmap[bit / 8 % bytes];
            *byte = *byte & !(1 << (bit % 8)) | mask & 1 << (bit % 8);
        }
        let used: u32 = bitmap.iter().map(|byte| byte.count_ones()).sum();
        let free = (bytes * 8) as u32 - used;
        self.slot(slot)[FREE_AT..FREE_AT + 4].copy_from_slice(&free.to_le_bytes());
    }

    /// Appends an entry to the log: what a daemon of evil intent could have committed.
    fn entry(&mut self, script: &mut Script) {
        let Some(area) = self.map.superblock.log else { return };
        let superblock = &self.map.superblock;
        let last = self.log.last().and_then(|entry| decode_entry(entry, superblock.identity().volume).ok());
        let place = Place {
            volume: superblock.identity().volume,
            generation: superblock.generation,
            incarnation: superblock.incarnation,
            sequence: self.log.len() as u64 + 1,
            predecessor: 0,
        };
        let epoch = last.map_or(superblock.epoch, |entry| entry.epoch).get();
        let shard = ShardId::new(script.byte() % self.map.shards()).expect("a shard of the volume");
        let mut writer = RecordWriter::default();
        for _ in 0..=script.byte() % 4 {
            self.record(script, shard, &mut writer);
        }
        let record = superblock.shards[shard.index()];
        let (inodes, next_inode) = match script.byte() % 4 {
            0 => (script.long(), script.long()),
            more => (record.inodes, record.next_inode + u64::from(more)),
        };
        let section = Section { shard, next_inode, inodes, records: writer.take() };
        let (bytes, _) = encode_entry(&place, Epoch::new(epoch.wrapping_add(1)), &[section]);
        let used: usize = self.log.iter().map(Vec::len).sum();
        if used + bytes.len() <= area.blocks as usize * BLOCK_SIZE as usize {
            self.log.push(bytes);
        }
    }

    fn record(&self, script: &mut Script, shard: ShardId, writer: &mut RecordWriter) {
        let blocks = |script: &mut Script| {
            let start = u64::from(script.word()) % self.map.superblock.layout.blocks().get();
            (BlockNr::new(start), BlockCount::new(1 + u64::from(script.byte() % 32)))
        };
        let leaf = self.leaf(script);
        let node = &self.map.nodes[leaf];
        let items = items_of(&node.image, &node.expected).unwrap_or_default();
        let (first, second) = (script.word(), script.word());
        let keys = nth_key(&items, first).zip(nth_key(&items, second));
        match (script.byte() % 8, keys) {
            (0, _) => {
                let (start, count) = blocks(script);
                writer.used(start, count);
            }
            (1, _) => {
                let (start, count) = blocks(script);
                writer.freed(start, count);
            }
            (2, Some((key, _))) => writer.item(&key, None),
            (3, Some((key, other))) => {
                writer.item(&changed_key(key, other, script), items.get(&key).map(|value| &value[..]));
            }
            (_, Some((key, _))) => {
                let mut value = items[&key].clone();
                for _ in 0..=script.byte() % 3 {
                    change(script, &mut value);
                }
                writer.item(&key, Some(&value));
            }
            (_, None) => writer
                .item(&Key::new(script.long(), ItemKind::new(script.byte()), shard.get().into(), 0), None),
        }
    }

    fn any_block(&mut self, script: &mut Script) {
        let blocks = self.image.len() / BLOCK_SIZE;
        let start = u64::from(script.word()) % blocks;
        let mut bytes = read(&self.image, BlockNr::new(start), 1);
        change(script, &mut bytes);
        self.image.write(start * BLOCK_SIZE, &bytes);
    }

    /// The device, with every checksum above a change made right.
    fn made_right(mut self) -> DiskImage {
        self.store_nodes();
        self.store_slots();
        self.store_log();
        for block in self.map.superblock.slots() {
            self.image.zero(block.get() * BLOCK_SIZE, BLOCK_SIZE);
        }
        let generation = Generation::new(long(&self.block[..], GENERATION_AT));
        seal(&mut self.block[..], CRC_AT);
        for (ring, block) in slots_of(generation).into_iter().enumerate() {
            if self.lost_copies >> ring & 1 == 0 {
                self.image.write(block.get() * BLOCK_SIZE, &self.block[..]);
            }
        }
        self.image
    }

    fn store_nodes(&mut self) {
        // A node comes behind its parent, so parents see the checksums of all their children.
        for place in (0..self.map.nodes.len()).rev() {
            let Some(image) = self.nodes.remove(&place) else { continue };
            let node = &self.map.nodes[place];
            let crc = crc32c::crc32c(&image[..]).to_le_bytes();
            self.image.write(node.expected.ptr.address.get() * BLOCK_SIZE, &image[..]);
            match node.parent {
                Some((parent, own)) => {
                    let at = HEADER_SIZE + own * ENTRY_SIZE + CHILD_CRC_AT;
                    self.node(parent)[at..at + 4].copy_from_slice(&crc);
                }
                None => {
                    let record = RECORDS_AT + node.expected.identity.shard.index() * RECORD_BYTES;
                    self.block[record + ROOT_CRC_AT..][..4].copy_from_slice(&crc);
                }
            }
        }
    }

    fn store_slots(&mut self) {
        let mut digest = long(&self.block[..], DIGEST_AT);
        for (place, mut bytes) in std::mem::take(&mut self.slots) {
            let slot = &self.map.slots[place];
            let crc = seal(&mut bytes, CRC_AT);
            let part = |bytes: &[u8], crc| contribution(slot.group, Epoch::new(long(bytes, EPOCH_AT)), crc);
            let old = u32::from_le_bytes(slot.bytes[CRC_AT..CRC_AT + 4].try_into().expect("four bytes"));
            digest = digest.wrapping_sub(part(&slot.bytes, old)).wrapping_add(part(&bytes, crc));
            self.image.write(slot.start.get() * BLOCK_SIZE, &bytes);
        }
        self.block[DIGEST_AT..DIGEST_AT + 8].copy_from_slice(&digest.to_le_bytes());
    }

    fn store_log(&mut self) {
        let Some(area) = self.map.superblock.log else { return };
        self.image.zero(area.head().get() * BLOCK_SIZE, u64::from(area.blocks) * BLOCK_SIZE);
        let (mut at, mut predecessor) = (area.head().get() * BLOCK_SIZE, 0_u32);
        for entry in &mut self.log {
            entry[PREDECESSOR_AT..PREDECESSOR_AT + 4].copy_from_slice(&predecessor.to_le_bytes());
            predecessor = seal(entry, CRC_AT);
            self.image.write(at, entry);
            at += entry.len() as u64;
        }
    }
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The items of a leaf, unless an earlier change has made it none.
fn items_of(image: &NodeImage, expected: &Expected) -> Option<BTreeMap<Key, Vec<u8>>> {
    let ptr = BlockPtr { crc: crc32c::crc32c(image), ..expected.ptr };
    let checked: CheckedNode<'_> = check(image, &Expected { ptr, ..*expected }).ok()?;
    Some(checked.items().map(|(key, value)| (key, value.to_vec())).collect())
}

fn nth_key(items: &BTreeMap<Key, Vec<u8>>, number: u16) -> Option<Key> {
    let number = usize::from(number).checked_rem(items.len())?;
    items.keys().nth(number).copied()
}

/// A key with one part changed, perhaps to that of another.
fn changed_key(key: Key, other: Key, script: &mut Script) -> Key {
    let mut part = |old: u64| {
        let mut bytes = old.to_le_bytes();
        change(script, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    match part(0) % 8 {
        0 => Key { object: part(key.object), ..key },
        1 => Key { offset: part(key.offset), ..key },
        2 => Key { minor: part(key.minor), ..key },
        3 => Key { kind: ItemKind::new(part(key.kind.get().into()) as u8), ..key },
        4 => Key { object: other.object, ..key },
        5 => Key { offset: other.offset, ..key },
        6 => Key { kind: other.kind, ..key },
        _ => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::bases;

    #[test]
    fn volume_without_changes_is_what_it_was() {
        for base in bases() {
            let image = damaged(base, &mut Script::new(Vec::new()));
            let again = Map::of(&image);
            assert_eq!(again.superblock, base.map.superblock);
            assert_eq!(again.log.len(), base.map.log.len());
        }
    }

    #[test]
    fn changed_value_is_seen_behind_sound_checksums() {
        // One change, of the second kind: the first leaf's first value, a number of eight bytes grows by one.
        let script = [0, 1, 0, 0, 0, 0, 0, 0, 0];
        for base in bases() {
            let image = damaged(base, &mut Script::new(script.to_vec()));
            let again = Map::of(&image);
            assert_ne!(again.superblock.shards, base.map.superblock.shards, "the root's checksum is another");
            let items = |map: &Map| -> Vec<(Key, Vec<u8>)> {
                map.nodes.iter().filter_map(|node| items_of(&node.image, &node.expected)).flatten().collect()
            };
            let (before, after) = (items(&base.map), items(&again));
            let differ = before.iter().zip(&after).filter(|(before, after)| before != after).count();
            assert_eq!((before.len(), differ), (after.len(), 1));
        }
    }
}
