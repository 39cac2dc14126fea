//! Where everything of a volume lies on its device.
//!
//! Owns: [`Map`], found by reading an image as `docs/on-disk-format.md` says: superblock, current bitmap slots, all tree nodes
//! with their parents, the entries of the log.
//!
//! Excludes: damaged images. A map is made of volumes that were just made.

use fs_core::format::group::{self, SLOTS_PER_GROUP};
use fs_core::format::log::decode as decode_entry;
use fs_core::format::node::{Expected, KeyBounds, NODE_SIZE, NodeImage, check, zeroed_image};
use fs_core::format::superblock::{RING_SLOTS, RING_STARTS, Superblock};
use fs_core::types::{BLOCK_SIZE, BlockNr, ShardId};
use reactor::sim::DiskImage;

/// A tree node.
#[derive(Clone, Debug)]
pub struct Node {
    /// All that its parent says of it.
    pub expected: Expected,
    /// Its bytes.
    pub image: Box<NodeImage>,
    /// Place of its parent among the nodes, and its own place in the parent; `None` for a root.
    pub parent: Option<(usize, usize)>,
}

/// The bitmap slot of a group that counts.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The group.
    pub group: u64,
    /// First block.
    pub start: BlockNr,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// An entry of the intent log.
#[derive(Clone, Debug)]
pub struct LogEntry {
    /// First block.
    pub start: BlockNr,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct Map {
    /// The newest superblock.
    pub superblock: Superblock,
    /// Its block.
    pub block: Box<[u8; BLOCK_SIZE as usize]>,
    /// Nodes, each behind its parent.
    pub nodes: Vec<Node>,
    /// A slot for each group.
    pub slots: Vec<Slot>,
    /// The log, from its start.
    pub log: Vec<LogEntry>,
}

impl Map {
    /// The map of a sound volume.
    ///
    /// # Panics
    /// If it is not.
    pub fn of(image: &DiskImage) -> Self {
        let rings = RING_STARTS.iter().flat_map(|start| start.get()..start.get() + RING_SLOTS);
        let superblock = rings
            .filter_map(|block| Superblock::decode(&read(image, BlockNr::new(block), 1)).ok())
            .max_by_key(|superblock| superblock.generation)
            .expect("a volume has a superblock");
        let mut map = Self {
            block: superblock.encode(),
            superblock,
            nodes: Vec::new(),
            slots: Vec::new(),
            log: Vec::new(),
        };
        map.find_nodes(image);
        map.find_slots(image);
        map.find_log(image);
        map
    }

    /// Shards of the volume.
    pub fn shards(&self) -> u8 {
        self.superblock.shard_count()
    }

    fn find_nodes(&mut self, image: &DiskImage) {
        for (number, record) in self.superblock.shards.iter().enumerate() {
            let shard = ShardId::new(number as u8).expect("a volume has no more");
            let identity = self.superblock.tree_identity(shard);
            let root =
                Expected { identity, ptr: record.tree.ptr, level: record.tree.level, bounds: KeyBounds::ALL };
            let mut waiting = vec![(root, None)];
            while let Some((expected, parent)) = waiting.pop() {
                let mut node = zeroed_image();
                node.copy_from_slice(&read(image, expected.ptr.address, (NODE_SIZE as u64) / BLOCK_SIZE));
                let own = self.nodes.len();
                let checked = check(&node, &expected).expect("a sound node");
                let children = checked.children().enumerate();
                waiting.extend(children.map(|(place, child)| (child, Some((own, place)))));
                self.nodes.push(Node { expected, image: node, parent });
            }
        }
    }

    fn find_slots(&mut self, image: &DiskImage) {
        let (layout, identity) = (self.superblock.layout, self.superblock.identity());
        for number in 0..layout.groups() {
            let slots = (0..SLOTS_PER_GROUP).filter_map(|slot| {
                let start = layout.slot_start(number, slot);
                let bytes = read(image, start, layout.slot_blocks().get());
                let contents = group::decode(&layout, identity, number, &bytes).ok()?;
                (contents.epoch <= self.superblock.epoch)
                    .then_some((contents.epoch, Slot { group: number, start, bytes }))
            });
            let (_, current) = slots.max_by_key(|(epoch, _)| *epoch).expect("each group has a slot");
            self.slots.push(current);
        }
    }

    fn find_log(&mut self, image: &DiskImage) {
        let Some(area) = self.superblock.log else { return };
        let bytes = read(image, area.head(), u64::from(area.blocks));
        let volume = self.superblock.identity().volume;
        let mut at = 0;
        while let Ok(entry) = decode_entry(&bytes[at..], volume) {
            let own = (entry.place.generation, entry.place.incarnation)
                == (self.superblock.generation, self.superblock.incarnation);
            if !own || entry.place.sequence != self.log.len() as u64 + 1 {
                return;
            }
            let length = entry.blocks as usize * BLOCK_SIZE as usize;
            let start = BlockNr::new(area.head().get() + at as u64 / BLOCK_SIZE);
            self.log.push(LogEntry { start, bytes: bytes[at..at + length].to_vec() });
            at += length;
        }
    }
}

/// Blocks of an image.
pub fn read(image: &DiskImage, start: BlockNr, blocks: u64) -> Vec<u8> {
    let mut bytes = vec![0; (blocks * BLOCK_SIZE) as usize];
    image.read(start.get() * BLOCK_SIZE, &mut bytes);
    bytes
}
