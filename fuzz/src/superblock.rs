//! Superblocks and bitmap slots: the fixed structures by which a volume is found and its space is known.
//!
//! An input changes places of a valid block, whose checksum is then made right; or it is the block.
//!
//! Checks: what decodes encodes to the same bytes again, so nothing that is stored goes unseen; and whatever follows from it by
//! arithmetic lies within the volume.

use std::sync::OnceLock;

use fs_core::format::group::{self, SlotIdentity, VolumeLayout};
use fs_core::format::superblock::{LogArea, ShardRecord, Superblock};
use fs_core::tree::{BlockPtr, TreeRoot};
use fs_core::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, ShardId};

use crate::edit::{change, seal};
use crate::script::Script;

/// Where a superblock and a bitmap slot have their checksum.
const CRC_AT: usize = 8;
/// Where a bitmap slot counts its free blocks.
const FREE_AT: usize = 12;
/// Bytes of a slot before its bitmap.
const SLOT_HEADER: usize = 64;
/// Blocks of the volumes that are described here.
const BLOCKS: u64 = 16 * 1024;
/// Changes of one input.
const CHANGES: usize = 32;

/// Changes a block, and looks at what can be made of it.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data.to_vec());
    match script.byte() % 4 {
        0 | 1 => {
            let mut block = *sample_block();
            changes(&mut script, &mut block);
            seal(&mut block, CRC_AT);
            judge_superblock(&block);
        }
        2 => slot(&mut script),
        _ => {
            let mut block = script.bytes(BLOCK_SIZE as usize);
            judge_superblock(&block);
            block.resize(BLOCK_SIZE as usize, 0);
            judge_superblock(&block);
        }
    }
}

fn changes(script: &mut Script, bytes: &mut [u8]) {
    for _ in 0..CHANGES {
        if script.is_over() {
            return;
        }
        // Most of a superblock are records of shards: the fields at its front get as many changes.
        let fields = script.pick(&[256, bytes.len()]);
        change(script, &mut bytes[..fields]);
    }
}

fn layout() -> VolumeLayout {
    VolumeLayout::plan(BlockCount::new(BLOCKS), 2).expect("room for two shards")
}

fn sample_block() -> &'static [u8; BLOCK_SIZE as usize] {
    static BLOCK: OnceLock<Box<[u8; BLOCK_SIZE as usize]>> = OnceLock::new();
    BLOCK.get_or_init(|| {
        let record = |block| ShardRecord {
            tree: TreeRoot {
                ptr: BlockPtr { address: BlockNr::new(block), epoch: Epoch::new(6), crc: 0xaaaa },
                level: 1,
            },
            next_inode: 40,
            inodes: 17,
        };
        let segments = [BlockNr::new(600), BlockNr::new(700)];
        let superblock = Superblock {
            compatible: 0,
            read_only_compatible: 0,
            uuid: uuid::Uuid::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
            label: "Zwilling".to_owned(),
            generation: Generation::new(9),
            epoch: Epoch::new(7),
            incarnation: 0xdead_beef,
            layout: layout(),
            hash_seed: [3; 16],
            group_digest: 0x55aa,
            log: Some(LogArea { segments, blocks: 16, current: 1 }),
            shards: vec![record(64), record(520)],
        };
        superblock.encode()
    })
}

/// Decodes a block, and holds what comes of it against the block.
fn judge_superblock(block: &[u8]) {
    let Ok(superblock) = Superblock::decode(block) else { return };
    // Features that are unknown here may have a meaning for bytes that have none for us.
    if superblock.compatible == 0 && superblock.read_only_compatible == 0 {
        assert!(*superblock.encode() == *block, "a superblock is encoded to other bytes: {superblock:?}");
    }
    let layout = superblock.layout;
    let blocks = layout.blocks().get();
    for shard in &superblock.shards {
        assert!(shard.tree.ptr.address.get() < blocks, "a tree outside of the volume: {shard:?}");
    }
    if let Some(log) = superblock.log {
        let end = log.head().get().checked_add(u64::from(log.blocks));
        assert!(end.is_some_and(|end| end <= blocks), "a log outside of the volume: {log:?}");
    }
    for group in [0, 1, layout.groups() / 2, layout.groups() - 1] {
        judge_group(&layout, group);
    }
    assert!(superblock.slots().iter().all(|slot| slot.get() < 1 << 13));
    let (identity, tree) = (superblock.identity(), superblock.tree_identity(ShardId::FIRST));
    assert_eq!((identity.shards, identity.volume), (superblock.shard_count(), tree.volume));
}

/// The places that follow from a layout.
fn judge_group(layout: &VolumeLayout, group: u64) {
    let (blocks, length) = (layout.blocks().get(), layout.group_blocks(group));
    let start = layout.group_start(group).get();
    assert!(length > 0 && start + length <= blocks, "group {group} of {layout:?}");
    let last = layout.slot_start(group, group::SLOTS_PER_GROUP - 1).get() + layout.slot_blocks().get();
    assert!(last < start + length, "the slots of group {group} leave no room: {layout:?}");
    for range in layout.overhead(group) {
        assert!(range.end <= layout.bitmap_bits(), "{range:?} of group {group}: {layout:?}");
    }
}

/// A bitmap slot, changed.
fn slot(script: &mut Script) {
    let layout = layout();
    let identity = SlotIdentity { volume: 77, shards: 2 };
    let number = u64::from(script.byte()) % layout.groups();
    let mut bitmap = vec![0_u64; layout.bitmap_bits() / 64];
    for bit in layout.overhead(number).into_iter().flatten() {
        bitmap[bit / 64] |= 1 << (bit % 64);
    }
    let (mut bytes, _) = group::encode(&layout, identity, number, Epoch::new(5), ShardId::FIRST, &bitmap);
    let count = script.byte().is_multiple_of(2);
    changes(script, &mut bytes);
    if count {
        let used = bytes[SLOT_HEADER..][..layout.bitmap_bits() / 8].iter().map(|byte| byte.count_ones());
        let free = layout.bitmap_bits() as u32 - used.sum::<u32>();
        bytes[FREE_AT..FREE_AT + 4].copy_from_slice(&free.to_le_bytes());
    }
    seal(&mut bytes, CRC_AT);
    let Ok(contents) = group::decode(&layout, identity, number, &bytes) else { return };
    let (again, contribution) =
        group::encode(&layout, identity, number, contents.epoch, contents.owner, &contents.bitmap);
    assert!(again == bytes, "a bitmap slot is encoded to other bytes");
    assert_eq!(contribution, contents.contribution);
}
