//! Every bit of every metadata block, inverted: superblocks, bitmaps, log, nodes.
//!
//! Two steps. The decoders are asked about every single bit: each has to refuse it, or to say the same as before. What a
//! refusal means for the volume is tried with bits of each block, all of them or a sample.

use super::super::client::Rng;
use super::super::crash::from_environment;
use super::*;
use crate::disk::VolumeDisk;
use crate::format::node::{NODE_BLOCKS, NODE_SIZE, check};
use crate::format::superblock::{RING_SLOTS, RING_STARTS, Superblock};
use crate::format::{group, log as entries};
use crate::log::read_log;
use crate::superblock::read_newest;
use crate::tree::Walk;
use crate::types::{BlockCount, BlockNr, ShardId};

/// Bits of each block with which the whole volume is tried, unless `POLLUX_SWEEP_BITS` says otherwise.
const BITS: usize = 4;

/// Bits of a block.
const ALL_BITS: usize = BLOCK_SIZE as usize * 8;

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Superblock,
    Bitmap,
    Log,
    LastEntry,
    Node,
}

/// A place of metadata.
struct Place {
    part: Part,
    start: BlockNr,
    bytes: Vec<u8>,
    decode: Decoder,
}

/// Asks the decoder of a place about its bytes. The answer is a text, so that different kinds can be compared.
type Decoder = Box<dyn Fn(&[u8]) -> Result<String, String>>;

/// An answer as a text.
fn told<T: std::fmt::Debug, E: std::fmt::Display>(answer: Result<T, E>) -> Result<String, String> {
    answer.map(|value| format!("{value:?}")).map_err(|error| error.to_string())
}

async fn place(disk: &VolumeDisk, part: Part, start: BlockNr, blocks: u64, decode: Decoder) -> Place {
    let bytes = disk.read(start, BlockCount::new(blocks)).await.unwrap();
    Place { part, start, bytes, decode }
}

/// All metadata of the volume.
async fn places(disk: &VolumeDisk) -> Vec<Place> {
    let (superblock, _) = read_newest(disk).await.unwrap();
    let mut places = Vec::new();
    for ring in RING_STARTS {
        for index in 0..RING_SLOTS {
            let start = BlockNr::new(ring.get() + index);
            let decode = Box::new(|bytes: &[u8]| told(Superblock::decode(bytes)));
            places.push(place(disk, Part::Superblock, start, 1, decode).await);
        }
    }
    let (layout, identity) = (superblock.layout, superblock.identity());
    for number in 0..layout.groups() {
        for slot in 0..group::SLOTS_PER_GROUP {
            let decode = Box::new(move |bytes: &[u8]| told(group::decode(&layout, identity, number, bytes)));
            let start = layout.slot_start(number, slot);
            places.push(place(disk, Part::Bitmap, start, layout.slot_blocks().get(), decode).await);
        }
    }
    places.extend(log_places(disk, &superblock).await);
    for shard in (0..superblock.shard_count()).filter_map(ShardId::new) {
        let root = superblock.shard(shard).unwrap().tree;
        assert!(root.level > 0, "the tree of shard {shard} has inner nodes");
        let mut walk = Walk::new(superblock.tree_identity(shard), root);
        while let Some(expected) = walk.next_node() {
            let decode = Box::new(move |bytes: &[u8]| {
                let image: &[u8; NODE_SIZE] = bytes.try_into().expect("a node's bytes");
                told(check(image, &expected).map(|node| node.count()))
            });
            let place = place(disk, Part::Node, expected.ptr.address, NODE_BLOCKS, decode).await;
            walk.supply(place.bytes.as_slice().try_into().unwrap()).unwrap();
            places.push(place);
        }
    }
    places
}

/// The entries of the log in use, the block behind them, and the other segment's first block.
async fn log_places(disk: &VolumeDisk, superblock: &Superblock) -> Vec<Place> {
    let area = superblock.log.expect("volumes have a log");
    let volume = superblock.identity().volume;
    let decode = || -> Decoder { Box::new(move |bytes: &[u8]| told(entries::decode(bytes, volume))) };
    let log = read_log(disk, superblock).await;
    let (mut places, mut start) = (Vec::new(), area.head().get());
    for (index, entry) in log.entries.iter().enumerate() {
        let part = if index + 1 == log.entries.len() { Part::LastEntry } else { Part::Log };
        let blocks = u64::from(entry.blocks);
        places.push(place(disk, part, BlockNr::new(start), blocks, decode()).await);
        start += blocks;
    }
    for behind in [start, area.switched().head().get()] {
        places.push(place(disk, Part::Log, BlockNr::new(behind), 1, decode()).await);
    }
    places
}

fn swept_places(swept: &Swept) -> Vec<Place> {
    let disk = swept.shape.disk(swept.image.clone());
    crate::disk::tests::with_disk(&disk, async |disk| places(&disk).await)
}

#[test]
fn decoders_refuse_every_inverted_bit() {
    let mut bits: BTreeMap<Part, u64> = BTreeMap::new();
    for place in swept_places(&Swept::new()) {
        let Place { part, start, mut bytes, decode } = place;
        let before = decode(&bytes);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let after = decode(&bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(after.is_err(), "{part:?} at block {start}, bit {bit}: {after:?}, before {before:?}");
        }
        *bits.entry(part).or_default() += bytes.len() as u64 * 8;
    }
    println!("bits refused: {bits:?}");
    assert_eq!(bits.len(), 5, "metadata of each kind: {bits:?}");
}

/// The bits of a block that are tried: all, or some of its beginning and some of all of it.
fn tried(rng: &mut Rng, asked: usize) -> Vec<usize> {
    if asked >= ALL_BITS {
        return (0..ALL_BITS).collect();
    }
    let bit = |number: usize| rng.below(if number.is_multiple_of(2) { 64 * 8 } else { ALL_BITS as u64 });
    (0..asked).map(bit).map(|bit| bit as usize).collect()
}

/// Tries the whole volume with bits of the places that `chosen` says.
fn sweep(swept: &Swept, chosen: impl Fn(Part) -> bool) -> BTreeMap<(Part, Outcome), u64> {
    let undamaged =
        examine(&swept.shape, &swept.shape.disk(swept.image.clone()), Times::Compared, &swept.legal());
    assert_eq!(undamaged, Ok(Outcome::Harmless), "nothing is wrong yet");
    let asked = from_environment("POLLUX_SWEEP_BITS", BITS);
    let mut rng = Rng::new(from_environment("POLLUX_FIRST_SEED", 1) as u64);
    let mut outcomes = BTreeMap::new();
    for place in swept_places(swept).into_iter().filter(|place| chosen(place.part)) {
        for block in 0..place.bytes.len() as u64 / BLOCK_SIZE {
            for bit in tried(&mut rng, asked) {
                let number = place.start.get() + block;
                let what = format!("{:?}, block {number}, bit {bit} inverted", place.part);
                let _note = Note(what.clone());
                let disk = swept.shape.disk(swept.image.clone());
                disk.flip_bit(number * BLOCK_SIZE + bit as u64 / 8, (bit % 8) as u8);
                let mut legal = swept.legal();
                if place.part == Part::LastEntry {
                    let last = swept.trees.len() - 1;
                    legal.tail = &swept.trees[last - 1..last];
                }
                let outcome = examine(&swept.shape, &disk, Times::Compared, &legal)
                    .unwrap_or_else(|why| panic!("{what}: {why}"));
                *outcomes.entry((place.part, outcome)).or_default() += 1;
            }
        }
    }
    println!("{outcomes:?}");
    outcomes
}

fn seen(outcomes: &BTreeMap<(Part, Outcome), u64>) -> Vec<(Part, Outcome)> {
    outcomes.keys().copied().collect()
}

#[test]
fn wrong_bits_in_superblocks_change_nothing() {
    let outcomes = sweep(&Swept::new(), |part| part == Part::Superblock);
    assert_eq!(seen(&outcomes), [(Part::Superblock, Outcome::Harmless)]);
}

#[test]
fn wrong_bits_in_bitmaps_are_found_before_anything_is_written() {
    let outcomes = sweep(&Swept::new(), |part| part == Part::Bitmap);
    let expected = [(Part::Bitmap, Outcome::Harmless), (Part::Bitmap, Outcome::Refused)];
    assert_eq!(seen(&outcomes), expected, "old slots, and those in use");
}

#[test]
fn wrong_bits_in_the_log_make_it_read_only_or_end_it() {
    let outcomes = sweep(&Swept::new(), |part| matches!(part, Part::Log | Part::LastEntry));
    let expected = [
        (Part::Log, Outcome::Harmless),
        (Part::Log, Outcome::ReadOnly),
        (Part::LastEntry, Outcome::TailLost),
    ];
    assert_eq!(seen(&outcomes), expected);
}

#[test]
fn wrong_bits_in_nodes_are_errors() {
    let outcomes = sweep(&Swept::unmounted(), |part| part == Part::Node);
    let expected = [(Part::Node, Outcome::Errors), (Part::Node, Outcome::Refused)];
    assert_eq!(seen(&outcomes), expected, "leaves, and roots");
}

#[test]
fn volume_whose_log_needs_a_wrong_node_is_not_mounted() {
    let outcomes = sweep(&Swept::new(), |part| part == Part::Node);
    assert_eq!(
        seen(&outcomes),
        [(Part::Node, Outcome::Refused)],
        "the log changes something in each of these few nodes"
    );
}
