//! A volume built by hand, item by item, and every kind of damage planted in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use reactor::WallTime;
use reactor::block::Durability;
use reactor::sim::{DiskImage, SimDisk, SimDiskOptions, SimOptions, Simulator};
use reactor::{Lba, LbaCount, LbaRange};

use super::*;
use crate::alloc::{self, Allocator, Priority, Reservation, SpaceCounter};
use crate::disk::tests::with_disk;
use crate::format::extent::{PHYSICAL, backref_key, extent_key, run_key, set_aside_of};
use crate::format::group::VolumeLayout;
use crate::format::items::{
    EntryTarget, InodeRecord, Intent, Xattr, hash_key, inode_key, intent_key, sequence_key, symlink_key,
    xattr_key,
};
use crate::format::node::ItemKind;
use crate::format::superblock::ShardRecord;
use crate::namespace::directory::name_hash;
use crate::request::FileKind;
use crate::tree::{NodeSpace, Tree};
use crate::types::{Epoch, Generation};

const SHARDS: u8 = 2;
const BLOCKS: u64 = 16_384;
const EPOCH: Epoch = Epoch::new(5);
const SEED: [u8; 16] = [9; 16];

type Items = BTreeMap<Key, Vec<u8>>;

struct Space {
    allocator: Allocator,
    reservation: Reservation,
}

impl NodeSpace for Space {
    fn allocate_node(&mut self) -> BlockNr {
        self.allocator.allocate_node(&mut self.reservation)
    }

    fn free_node(&mut self, address: BlockNr) {
        self.allocator.discard_node(address);
    }
}

/// A volume being built.
struct Builder {
    superblock: Superblock,
    space: Vec<Space>,
    items: Vec<Items>,
    records: BTreeMap<InodeNr, InodeRecord>,
    data: Vec<(BlockNr, Vec<u8>)>,
    next: Vec<u64>,
}

impl Builder {
    fn new() -> Self {
        let layout = VolumeLayout::plan(BlockCount::new(BLOCKS), SHARDS).unwrap();
        let mut superblock = crate::format::superblock::tests::example();
        superblock.layout = layout;
        superblock.epoch = EPOCH;
        superblock.generation = Generation::new(5);
        superblock.hash_seed = SEED;
        superblock.group_digest = 0;
        superblock.shards = vec![ShardRecord::BLANK; usize::from(SHARDS)];
        let space = (0..SHARDS).filter_map(ShardId::new).map(|shard| {
            let groups =
                (0..layout.groups()).filter(|group| group % u64::from(SHARDS) == u64::from(shard.get()));
            let groups = groups.map(|group| alloc::fresh(&layout, group, shard)).collect();
            let counter = SpaceCounter::new();
            let identity = superblock.identity();
            let allocator =
                Allocator::new(shard, layout, identity, Arc::clone(&counter), Epoch::new(0), groups);
            let reservation = counter.reserve(500, 300, Priority::Reserve).unwrap();
            Space { allocator, reservation }
        });
        let mut builder = Self {
            space: space.collect(),
            superblock,
            items: vec![Items::new(); usize::from(SHARDS)],
            records: BTreeMap::new(),
            data: Vec::new(),
            next: vec![1; usize::from(SHARDS)],
        };
        let root = builder.inode(0, FileKind::Directory);
        assert_eq!(root, InodeNr::ROOT);
        builder.record(root).parent = root;
        builder
    }

    fn inode(&mut self, shard: u8, kind: FileKind) -> InodeNr {
        let sequence = &mut self.next[usize::from(shard)];
        let inode = InodeNr::from_parts(ShardId::new(shard).unwrap(), *sequence).unwrap();
        *sequence += 1;
        let mut record = InodeRecord::new(kind, 0o644, 1, 2, WallTime::EPOCH);
        if kind != FileKind::Directory {
            record.links = 0;
        }
        self.records.insert(inode, record);
        inode
    }

    fn record(&mut self, inode: InodeNr) -> &mut InodeRecord {
        self.records.get_mut(&inode).unwrap()
    }

    fn items_of(&mut self, inode: InodeNr) -> &mut Items {
        &mut self.items[inode.shard().index()]
    }

    fn link(&mut self, directory: InodeNr, name: &str, inode: InodeNr) -> u64 {
        let kind = self.record(inode).kind;
        let record = self.record(directory);
        let sequence = record.next_sequence;
        record.next_sequence += 1;
        record.entries += 1;
        record.size += name.len() as u64;
        if kind == FileKind::Directory {
            record.links += 1;
            self.record(inode).parent = directory;
        } else {
            self.record(inode).links += 1;
        }
        let target = EntryTarget { inode, kind };
        let name: Box<[u8]> = name.as_bytes().into();
        let hash = hash_key(directory, name_hash(&SEED, &name));
        let by_hash = HashEntry { sequence, target, name: name.clone() };
        let items = self.items_of(directory);
        items.insert(hash, HashEntry::encode_chain(&[by_hash]));
        items.insert(sequence_key(directory, sequence), SequenceEntry { target, name }.encode());
        sequence
    }

    fn make(&mut self, directory: InodeNr, name: &str, shard: u8, kind: FileKind) -> InodeNr {
        let inode = self.inode(shard, kind);
        self.link(directory, name, inode);
        inode
    }

    /// Allocates a run without references and returns it.
    fn run(&mut self, shard: ShardId, blocks: u64, kind: ExtentKind) -> Extent {
        let space = &mut self.space[shard.index()];
        let (start, count) = space.allocator.allocate_data(BlockCount::new(blocks), &mut space.reservation);
        assert_eq!(count.get(), blocks);
        space.allocator.commit_data(start, count);
        let bytes: Vec<u8> = (0..blocks * BLOCK_SIZE).map(|byte| (byte / 7 + start.get()) as u8).collect();
        let checksums = match kind {
            ExtentKind::Data => bytes.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect(),
            ExtentKind::Preallocated => Vec::new(),
        };
        let run =
            Run { blocks: count, lender: None, references: 1, generation: Generation::new(3), checksums };
        if kind == ExtentKind::Data {
            self.data.push((start, bytes));
        }
        self.items[shard.index()].insert(run_key(start), run.encode());
        Extent { kind, start, blocks: count, generation: run.generation }
    }

    fn refer(&mut self, inode: InodeNr, offset: u64, extent: &Extent) {
        let items = self.items_of(inode);
        items.insert(extent_key(inode, offset), extent.encode());
        let backref = Backref { blocks: extent.blocks };
        items.insert(backref_key(extent.start, inode, offset), backref.encode());
        let record = self.record(inode);
        record.blocks += extent.blocks.get();
        if extent.kind == ExtentKind::Data {
            record.size = record.size.max(offset + extent.blocks.get() * BLOCK_SIZE - 100);
        }
    }

    fn extent(&mut self, inode: InodeNr, offset: u64, blocks: u64, kind: ExtentKind) -> Extent {
        let extent = self.run(inode.shard(), blocks, kind);
        self.refer(inode, offset, &extent);
        extent
    }

    fn write(self) -> SimDisk {
        self.write_edited(|_| {}, |_| {})
    }

    /// Writes the volume; `edit` changes items after everything was counted, `superblock` the superblock.
    fn write_edited(
        mut self,
        edit: impl FnOnce(&mut Vec<Items>),
        edit_superblock: impl FnOnce(&mut Superblock),
    ) -> SimDisk {
        let records = std::mem::take(&mut self.records);
        let mut inodes = vec![0; usize::from(SHARDS)];
        for (inode, record) in &records {
            inodes[inode.shard().index()] += 1;
            self.items_of(*inode).insert(inode_key(*inode), record.encode());
        }
        edit(&mut self.items);
        let disk = SimDisk::new(SimDiskOptions { blocks: BLOCKS, ..SimDiskOptions::default() });
        let mut superblock = self.superblock;
        let mut writes = self.data;
        for (index, space) in self.space.iter_mut().enumerate() {
            let shard = ShardId::new(index as u8).unwrap();
            let mut tree = Tree::empty(superblock.tree_identity(shard), EPOCH, space);
            for (key, value) in &self.items[index] {
                tree.insert(*key, value, EPOCH, space).unwrap();
            }
            let frozen = tree.freeze();
            writes
                .extend(frozen.dirty_nodes().map(|node| node.seal()).map(|(at, image)| (at, image.to_vec())));
            let groups = space.allocator.freeze(EPOCH);
            superblock.group_digest = superblock.group_digest.wrapping_add(groups.digest_delta);
            writes.extend(groups.images.into_iter().map(|image| (image.block, image.bytes)));
            let (next_inode, inodes) = (self.next[index], inodes[index]);
            superblock.shards[index] = ShardRecord { tree: frozen.root(), next_inode, inodes };
        }
        edit_superblock(&mut superblock);
        with_disk(&disk, async |disk| {
            for (start, bytes) in writes {
                disk.write(start, &bytes, Durability::Cached).await.unwrap();
            }
            disk.flush().await.unwrap();
            superblock::write(&disk, &superblock).await.unwrap();
        });
        disk
    }
}

/// The volume that damage is planted in, with the places worth damaging.
struct Sample {
    builder: Builder,
    /// Directory of shard 1 in the root.
    a: InodeNr,
    /// Directory of shard 0 in `a`.
    b: InodeNr,
    /// File of shard 0 with data at 0 (3 blocks), a hole, data at 64 KiB (2 blocks), preallocated blocks behind its
    /// end, attributes, and a second name in `a`.
    f: InodeNr,
    f_extent: Extent,
    f_second: Extent,
    symlink: InodeNr,
    orphan: InodeNr,
}

fn sample() -> Sample {
    let mut builder = Builder::new();
    let root = InodeNr::ROOT;
    let a = builder.make(root, "a", 1, FileKind::Directory);
    let b = builder.make(a, "b", 0, FileKind::Directory);
    let f = builder.make(root, "f", 0, FileKind::Regular);
    builder.link(a, "second name of f", f);
    let f_extent = builder.extent(f, 0, 3, ExtentKind::Data);
    let f_second = builder.extent(f, 65_536, 2, ExtentKind::Data);
    builder.extent(f, 1 << 20, 8, ExtentKind::Preallocated);
    let attribute = Xattr { name: (*b"user.colour").into(), value: (*b"green").into() };
    let key = xattr_key(f, name_hash(&SEED, &attribute.name));
    builder.items_of(f).insert(key, Xattr::encode_chain(&[attribute]));
    builder.record(f).xattr_names = 12;
    // Two files that share a run, one of them only its middle: three runs, as the parts differ in references.
    let (g, h) = (builder.make(b, "g", 0, FileKind::Regular), builder.make(b, "h", 0, FileKind::Regular));
    let whole = builder.run(g.shard(), 6, ExtentKind::Data);
    let run = Run::decode(&builder.items[0][&run_key(whole.start)]).unwrap();
    for (from, to, references) in [(0, 2, 1), (2, 5, 2), (5, 6, 1)] {
        let start = BlockNr::new(whole.start.get() + from);
        let part = Run { references, ..run.part(from, to) };
        builder.items[0].insert(run_key(start), part.encode());
    }
    builder.refer(g, 0, &whole);
    let middle = Extent { start: BlockNr::new(whole.start.get() + 2), blocks: BlockCount::new(3), ..whole };
    builder.refer(h, 8192, &middle);
    let symlink = builder.make(a, "link", 1, FileKind::Symlink);
    builder.items_of(symlink).insert(symlink_key(symlink), b"../f".to_vec());
    builder.record(symlink).size = 4;
    builder.make(b, "pipe", 0, FileKind::Fifo);
    let orphan = builder.inode(1, FileKind::Regular);
    builder.extent(orphan, 0, 4, ExtentKind::Data);
    builder.record(orphan).size = 0;
    builder.items_of(orphan).insert(intent_key(orphan, Intent::Orphan), Intent::Orphan.encode());
    // Enough files for trees of two levels.
    for number in 0..200 {
        let shard = (number % 2) as u8;
        let directory = if shard == 0 { b } else { a };
        let file = builder.make(directory, &format!("file number {number}"), shard, FileKind::Regular);
        builder.extent(file, 0, 1, ExtentKind::Data);
    }
    Sample { builder, a, b, f, f_extent, f_second, symlink, orphan }
}

/// Checks the volume on the reactor's device, data included, and names what is wrong with it.
pub(crate) async fn assert_clean(ctx: &Context) {
    let report = check_with(ctx, DataCheck::Verify, &mut |_| {}).await.unwrap();
    let findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    assert!(report.is_clean(), "fsck: {findings:#?}");
}

/// The sample volume, and the file in it that has a bit of everything.
pub(crate) fn sample_volume() -> (SimDisk, InodeNr) {
    let sample = sample();
    (sample.builder.write(), sample.f)
}

/// A volume whose file `/many` has `count` extents, one in two blocks; all of them share one block.
pub(crate) fn volume_with_many_extents(count: u64) -> SimDisk {
    let mut builder = Builder::new();
    let many = builder.make(InodeNr::ROOT, "many", 0, FileKind::Regular);
    let extent = builder.run(many.shard(), 1, ExtentKind::Data);
    for number in 0..count {
        builder.refer(many, number * 2 * BLOCK_SIZE, &extent);
    }
    let references = u32::try_from(count).unwrap();
    builder
        .write_edited(|items| change_run(items, 0, extent.start, |run| run.references = references), |_| {})
}

fn run_check(disk: &SimDisk, data: DataCheck) -> Result<CheckReport, CheckError> {
    let before = disk.write_count();
    let simulator = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    let report = simulator.block_on(0, async |ctx| check_with(&ctx, data, &mut |_| {}).await).unwrap();
    assert_eq!(disk.write_count(), before, "a check writes nothing");
    report
}

fn codes(disk: &SimDisk) -> BTreeSet<&'static str> {
    let report = run_check(disk, DataCheck::Verify).unwrap();
    assert_eq!(report.is_clean(), report.findings.is_empty());
    report.findings.iter().map(Finding::code).collect()
}

/// Plants damage among the items and expects exactly these kinds of findings.
fn plant(expected: &[&'static str], edit: impl FnOnce(&Sample, &mut Vec<Items>)) {
    let mut sample = sample();
    let builder = std::mem::replace(&mut sample.builder, Builder::new());
    let disk = builder.write_edited(|items| edit(&sample, items), |_| {});
    assert_eq!(codes(&disk), expected.iter().copied().collect());
}

/// Changes one value.
fn change(items: &mut [Items], inode: InodeNr, key: Key, edit: impl FnOnce(&mut Vec<u8>)) {
    edit(items[inode.shard().index()].get_mut(&key).expect("the item is there"));
}

fn change_record(items: &mut [Items], inode: InodeNr, edit: impl FnOnce(&mut InodeRecord)) {
    change(items, inode, inode_key(inode), |value| {
        let mut record = InodeRecord::decode(value).unwrap();
        edit(&mut record);
        *value = record.encode();
    });
}

fn change_run(items: &mut [Items], shard: usize, start: BlockNr, edit: impl FnOnce(&mut Run)) {
    let value = items[shard].get_mut(&run_key(start)).expect("the run is there");
    let mut run = Run::decode(value).unwrap();
    edit(&mut run);
    *value = run.encode();
}

#[test]
fn volume_without_damage_is_clean() {
    let disk = sample().builder.write();
    let report = run_check(&disk, DataCheck::Verify).unwrap();
    assert_eq!(report.findings, []);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let counts = report.counts;
    assert_eq!((counts.shards, counts.intents), (2, 1));
    assert_eq!((counts.inodes, counts.entries), (209, 208));
    assert_eq!((counts.runs, counts.extents), (207, 206));
    assert_eq!(counts.data_blocks, 3 + 2 + 6 + 4 + 200);
    assert!(counts.nodes > 4);
}

#[test]
fn new_volume_is_clean() {
    let disk = SimDisk::new(SimDiskOptions { blocks: BLOCKS, ..SimDiskOptions::default() });
    let options = crate::mkfs::FormatOptions {
        shards: 2,
        label: String::new(),
        force: crate::mkfs::Force::Refuse,
        owner: crate::mkfs::Owner::ROOT,
    };
    crate::mkfs::tests::format_on(&disk, &options).unwrap();
    assert!(codes(&disk).is_empty());
}

#[test]
fn progress_covers_the_passes_in_order() {
    let disk = sample().builder.write();
    let simulator = Simulator::new(SimOptions { disk: Some(disk), ..SimOptions::default() });
    let mut phases = Vec::new();
    let report =
        simulator.block_on(0, async |ctx| check(&ctx, &mut |progress| phases.push(progress.phase)).await);
    assert!(report.unwrap().unwrap().is_clean());
    phases.dedup();
    assert_eq!(phases, [Phase::Groups, Phase::Trees, Phase::Names, Phase::Space]);
}

#[test]
fn device_without_a_volume_cannot_be_checked() {
    let disk = SimDisk::new(SimDiskOptions::default());
    let error = run_check(&disk, DataCheck::Skip).unwrap_err();
    assert!(matches!(error, CheckError::Superblock(SuperblockError::NotPollux { .. })));
}

#[test]
fn superblock_without_its_twin_is_a_note() {
    let disk = sample().builder.write();
    disk.flip_bit((16 + 5) * 4096 + 300, 1);
    let report = run_check(&disk, DataCheck::Skip).unwrap();
    assert!(report.is_clean());
    assert_eq!(report.notes.len(), 1, "{:?}", report.notes);
}

#[test]
fn damaged_node_is_found_and_the_rest_is_still_checked() {
    let disk = sample().builder.write();
    let address = with_disk(&disk, async |disk| {
        let (superblock, _) = superblock::read_newest(&disk).await.unwrap();
        superblock.shards[0].tree.ptr.address.get()
    });
    disk.flip_bit(address * 4096 + 5000, 0);
    assert_eq!(codes(&disk), ["Node"].into());
    let report = run_check(&disk, DataCheck::Skip).unwrap();
    assert_eq!(report.notes.len(), 1, "says what was not compared");
    disk.flip_bit(address * 4096 + 5000, 0);
    disk.fail_reads(LbaRange { start: Lba::new(address), count: LbaCount::new(1) });
    assert_eq!(codes(&disk), ["NodeUnreadable"].into());
}

#[test]
fn damaged_bitmap_is_found() {
    let disk = sample().builder.write();
    disk.flip_bit(32 * 4096 + 90, 0);
    assert_eq!(codes(&disk), ["Bitmap"].into());
    disk.flip_bit(32 * 4096 + 90, 0);
    assert!(codes(&disk).is_empty());
    disk.fail_reads(LbaRange { start: Lba::new(32), count: LbaCount::new(3) });
    assert_eq!(codes(&disk), ["BitmapUnreadable"].into());
}

#[test]
fn bitmap_of_another_time_is_found_by_the_digest() {
    let disk = sample().builder.write_edited(|_| {}, |superblock| superblock.group_digest ^= 1);
    assert_eq!(codes(&disk), ["BitmapDigest"].into());
}

#[test]
fn leaked_blocks_are_found() {
    plant(&["Leaked"], |sample, items| {
        // A run goes with everything that refers to it.
        let f = sample.f;
        items[0].remove(&run_key(sample.f_extent.start));
        items[0].remove(&backref_key(sample.f_extent.start, f, 0));
        items[0].remove(&extent_key(f, 0));
        change_record(items, f, |record| record.blocks -= 3);
    });
}

#[test]
fn blocks_in_use_and_marked_as_free_are_found() {
    let mut sample = sample();
    let space = &mut sample.builder.space[0];
    space.allocator.free(sample.f_extent.start, BlockCount::new(2)).unwrap();
    assert_eq!(codes(&sample.builder.write()), ["NotMarked"].into());
}

#[test]
fn blocks_with_two_users_are_found() {
    let mut sample = sample();
    let (f, other) = (sample.f, sample.f_second);
    // The second extent's run moves over the first one's last block.
    let start = BlockNr::new(sample.f_extent.start.get() + 2);
    let disk = std::mem::replace(&mut sample.builder, Builder::new()).write_edited(
        |items| {
            let run = items[0].remove(&run_key(other.start)).unwrap();
            items[0].remove(&backref_key(other.start, f, 65_536));
            items[0].insert(run_key(start), run);
            let moved = Extent { start, ..other };
            items[0].insert(extent_key(f, 65_536), moved.encode());
            items[0].insert(backref_key(start, f, 65_536), Backref { blocks: other.blocks }.encode());
        },
        |_| {},
    );
    let found = codes(&disk);
    assert!(found.is_superset(&["UsedTwice", "RunOverlap", "Leaked"].into()), "{found:?}");
}

#[test]
fn blocks_outside_the_volume_or_over_its_structures_are_found() {
    for (start, kind) in [(BLOCKS - 1, "Misplaced"), (1 << 50, "Misplaced"), (33, "Misplaced")] {
        let mut sample = sample();
        let builder = std::mem::replace(&mut sample.builder, Builder::new());
        let run = Run {
            blocks: BlockCount::new(2),
            lender: None,
            references: 1,
            generation: Generation::new(1),
            checksums: vec![],
        };
        let disk = builder.write_edited(
            |items| {
                items[0].insert(run_key(BlockNr::new(start)), run.encode());
            },
            |_| {},
        );
        assert!(codes(&disk).contains(kind), "{start}");
    }
}

#[test]
fn run_in_a_group_of_another_shard_is_found() {
    let mut sample = sample();
    let builder = &mut sample.builder;
    let extent = builder.run(ShardId::new(1).unwrap(), 2, ExtentKind::Preallocated);
    let run = builder.items[1].remove(&run_key(extent.start)).unwrap();
    builder.items[0].insert(run_key(extent.start), run);
    builder.refer(sample.f, 2 << 20, &extent);
    assert_eq!(codes(&sample.builder.write()), ["ForeignGroup"].into());
}

#[test]
fn items_that_cannot_be_decoded_are_found() {
    plant(&["Item"], |sample, items| change(items, sample.f, inode_key(sample.f), |value| value.truncate(5)));
    plant(&["Item", "NoHashEntry"], |sample, items| {
        let key = hash_key(sample.a, name_hash(&SEED, b"link"));
        change(items, sample.a, key, |value| value.truncate(5));
    });
    plant(&["ExtentItem", "InodeBlocks", "NoExtent"], |sample, items| {
        change(items, sample.f, extent_key(sample.f, 0), |value| value[20] = 77);
    });
    plant(&["ExtentItem", "NoRun", "Leaked", "ExtentMismatch"], |sample, items| {
        change(items, sample.f, run_key(sample.f_extent.start), |value| value.truncate(17));
    });
}

#[test]
fn items_that_do_not_belong_are_found() {
    plant(&["UnknownItem"], |sample, items| {
        items[0].insert(Key::new(sample.f.get(), ItemKind::new(0x7f), 0, 0), vec![1]);
    });
    plant(&["UnknownItem"], |_, items| {
        items[1].insert(Key::new(0, ItemKind::new(0x33), 0, 0), vec![1]);
        items[1].insert(Key::new(PHYSICAL | 900, ItemKind::new(0x99), 0, 0), vec![1]);
    });
    plant(&["StrayItem"], |sample, items| {
        let record = items[0][&inode_key(sample.f)].clone();
        items[1].insert(inode_key(sample.f), record);
    });
    plant(&["StrayItem"], |sample, items| {
        items[0].insert(Key::new(sample.f.get(), crate::format::items::XATTR, 5, 1), vec![]);
        items[0].insert(Key::new(PHYSICAL | sample.f_extent.start.get(), RUN, 0, 1), vec![]);
    });
    plant(&["WrongItem"], |sample, items| {
        items[1].insert(symlink_key(sample.a), b"nowhere".to_vec());
    });
}

#[test]
fn missing_inode_is_found() {
    plant(&["NoInode", "InodeCount", "DanglingEntry"], |sample, items| {
        items[0].remove(&inode_key(sample.f));
    });
    plant(&["InodeCount", "NoRoot", "NoInode", "Unreachable"], |_, items| {
        items[0].remove(&inode_key(InodeNr::ROOT));
    });
}

#[test]
fn wrong_counts_of_an_inode_are_found() {
    plant(&["InodeBlocks"], |sample, items| change_record(items, sample.f, |record| record.blocks += 1));
    plant(&["AttributeNames"], |sample, items| {
        change_record(items, sample.f, |record| record.xattr_names = 3);
    });
    plant(&["ExtentBehindEnd"], |sample, items| {
        change_record(items, sample.f, |record| record.size = 65_536 + 4096);
    });
    plant(&["Item"], |sample, items| change_record(items, sample.f, |record| record.size = u64::MAX));
    plant(&["SymlinkTarget"], |sample, items| change_record(items, sample.symlink, |record| record.size = 5));
    plant(&["SymlinkTarget"], |sample, items| {
        items[1].remove(&symlink_key(sample.symlink));
    });
    plant(&["EntryCount"], |sample, items| change_record(items, sample.a, |record| record.entries += 1));
    plant(&["DirectorySize"], |sample, items| change_record(items, sample.a, |record| record.size += 1));
    plant(&["EntrySequence"], |sample, items| {
        change_record(items, sample.a, |record| record.next_sequence = 4);
    });
}

#[test]
fn interrupted_truncation_may_leave_extents_behind_the_end() {
    plant(&[], |sample, items| {
        change_record(items, sample.f, |record| record.size = 10);
        let intent = Intent::Truncate(10);
        items[0].insert(intent_key(sample.f, intent), intent.encode());
    });
}

/// Moves a file's second extent to where a clone sets it aside.
fn set_second_aside(sample: &Sample, items: &mut [Items]) {
    let aside = set_aside_of(sample.f);
    let extent = items[0].remove(&extent_key(sample.f, 65_536)).unwrap();
    let backref = items[0].remove(&backref_key(sample.f_second.start, sample.f, 65_536)).unwrap();
    items[0].insert(extent_key(aside, 65_536), extent);
    items[0].insert(backref_key(sample.f_second.start, aside, 65_536), backref);
    let blocks = sample.f_second.blocks.get();
    change_record(items, sample.f, |record| record.blocks -= blocks);
}

#[test]
fn interrupted_clone_may_set_extents_aside() {
    for intent in [Intent::Clone { start: 65_536, end: 1 << 20 }, Intent::DropReplaced] {
        plant(&[], |sample, items| {
            set_second_aside(sample, items);
            items[0].insert(intent_key(sample.f, intent), intent.encode());
        });
    }
    plant(&["SetAside"], |sample, items| set_second_aside(sample, items));
    plant(&["StrayItem", "SetAside"], |sample, items| {
        let record = items[0][&inode_key(sample.f)].clone();
        items[0].insert(inode_key(set_aside_of(sample.f)), record);
    });
}

#[test]
fn shard_counters_are_checked() {
    let disk = sample().builder.write_edited(|_| {}, |superblock| superblock.shards[1].next_inode = 7);
    assert_eq!(codes(&disk), ["NextInode"].into());
    let disk = sample().builder.write_edited(|_| {}, |superblock| superblock.shards[1].inodes = 7);
    assert_eq!(codes(&disk), ["InodeCount"].into());
}

#[test]
fn extents_that_overlap_are_found() {
    plant(&["ExtentOverlap"], |sample, items| {
        let extent = items[0].remove(&extent_key(sample.f, 65_536)).unwrap();
        let backref = items[0].remove(&backref_key(sample.f_second.start, sample.f, 65_536)).unwrap();
        items[0].insert(extent_key(sample.f, 8192), extent);
        items[0].insert(backref_key(sample.f_second.start, sample.f, 8192), backref);
    });
}

#[test]
fn wrong_reference_counts_are_found() {
    plant(&["RunReferences"], |sample, items| {
        change_run(items, 0, sample.f_extent.start, |run| run.references = 2);
    });
    // One of the three parts of the run that two files share.
    plant(&["RunReferences"], |_, items| {
        let shared = items[0].iter().find_map(|(key, value)| {
            let start = extent::physical_block(key).filter(|_| key.kind == RUN)?;
            (Run::decode(value).unwrap().references == 2).then_some(start)
        });
        change_run(items, 0, shared.unwrap(), |run| run.references = 1);
    });
}

#[test]
fn reference_without_its_counterpart_is_found() {
    plant(&["NoBackref", "RunReferences"], |sample, items| {
        items[0].remove(&backref_key(sample.f_extent.start, sample.f, 0));
    });
    plant(&["NoExtent", "InodeBlocks"], |sample, items| {
        items[0].remove(&extent_key(sample.f, 0));
    });
    plant(&["NoRun", "Leaked", "ExtentMismatch"], |sample, items| {
        items[0].remove(&run_key(sample.f_extent.start));
    });
    // The same number of each, but not of the same file.
    plant(&["NoBackref", "NoExtent"], |sample, items| {
        let backref = items[0].remove(&backref_key(sample.f_extent.start, sample.f, 0)).unwrap();
        items[0].insert(backref_key(sample.f_extent.start, sample.b, 0), backref);
    });
}

#[test]
fn generation_or_kind_that_differs_is_found() {
    plant(&["ExtentMismatch"], |sample, items| {
        change_run(items, 0, sample.f_extent.start, |run| run.generation = Generation::new(4));
    });
    plant(&["ExtentMismatch"], |sample, items| {
        change_run(items, 0, sample.f_extent.start, |run| run.checksums.clear());
    });
    plant(&["RunMixed", "ExtentMismatch"], |_, items| {
        let shared = items[0].iter().find_map(|(key, value)| {
            let start = extent::physical_block(key).filter(|_| key.kind == RUN)?;
            (Run::decode(value).unwrap().references == 2).then_some(start)
        });
        change_run(items, 0, shared.unwrap(), |run| run.generation = Generation::new(4));
    });
}

#[test]
fn damaged_data_is_found_when_asked_for() {
    let sample = sample();
    let start = sample.f_extent.start.get();
    let disk = sample.builder.write();
    disk.flip_bit((start + 1) * 4096 + 17, 2);
    assert!(run_check(&disk, DataCheck::Skip).unwrap().is_clean());
    let report = run_check(&disk, DataCheck::Verify).unwrap();
    let [Finding::DataChecksum { block, .. }] = report.findings[..] else { panic!("{:?}", report.findings) };
    assert_eq!(block.get(), start + 1);
    disk.fail_reads(LbaRange { start: Lba::new(start), count: LbaCount::new(1) });
    assert_eq!(codes(&disk), ["DataUnreadable"].into());
}

#[test]
fn entry_with_one_of_its_two_items_is_found() {
    plant(&["NoHashEntry"], |sample, items| {
        items[1].remove(&hash_key(sample.a, name_hash(&SEED, b"link")));
    });
    plant(&["NoSequenceEntry", "EntryCount", "DirectorySize", "Links"], |sample, items| {
        items[1].remove(&sequence_key(sample.a, 5));
    });
    // Both are there, with different names.
    plant(&["NoHashEntry", "NoSequenceEntry"], |sample, items| {
        change(items, sample.a, sequence_key(sample.a, 5), |value| *value.last_mut().unwrap() ^= 1);
    });
    plant(&["NameHash"], |sample, items| {
        let value = items[1].remove(&hash_key(sample.a, name_hash(&SEED, b"link"))).unwrap();
        items[1].insert(hash_key(sample.a, 77), value);
    });
}

#[test]
fn names_and_inodes_that_disagree_are_found() {
    plant(&["Links"], |sample, items| change_record(items, sample.f, |record| record.links = 3));
    plant(&["DirectoryLinks"], |sample, items| change_record(items, sample.a, |record| record.links = 9));
    plant(&["Parent"], |sample, items| {
        change_record(items, sample.b, |record| record.parent = InodeNr::ROOT);
    });
    plant(&["EntryKind", "SymlinkTarget", "WrongItem"], |sample, items| {
        change_record(items, sample.f, |record| record.kind = FileKind::Symlink);
    });
    plant(&["NoIntent", "Links"], |sample, items| change_record(items, sample.f, |record| record.links = 0));
    plant(&["NoIntent"], |sample, items| {
        items[1].remove(&intent_key(sample.orphan, Intent::Orphan));
    });
    plant(&["WrongIntent"], |sample, items| {
        items[0].insert(intent_key(sample.f, Intent::Orphan), Intent::Orphan.encode());
    });
    plant(&["WrongIntent"], |sample, items| {
        let intent = Intent::Truncate(0);
        items[1].insert(intent_key(sample.a, intent), intent.encode());
    });
    plant(&["IntentWithoutInode"], |_, items| {
        let nobody = InodeNr::from_parts(ShardId::new(1).unwrap(), 9999).unwrap();
        items[1].insert(intent_key(nobody, Intent::Orphan), Intent::Orphan.encode());
    });
    plant(&["StrayItem"], |sample, items| {
        items[1].insert(intent_key(sample.f, Intent::Orphan), Intent::Orphan.encode());
    });
}

#[test]
fn directories_that_are_not_a_tree_are_found() {
    // Two directories that hold each other, beside the tree.
    let mut cycle = sample();
    let (x, y) = (cycle.builder.inode(0, FileKind::Directory), cycle.builder.inode(1, FileKind::Directory));
    cycle.builder.link(x, "y", y);
    cycle.builder.link(y, "x", x);
    let report = run_check(&cycle.builder.write(), DataCheck::Skip).unwrap();
    let unreachable: BTreeSet<_> = report
        .findings
        .iter()
        .map(|finding| match finding {
            Finding::Unreachable { directory } => *directory,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(unreachable, [x, y].into());
    // A directory without a name.
    let mut lost = sample();
    lost.builder.inode(0, FileKind::Directory);
    assert_eq!(codes(&lost.builder.write()), ["Unreachable"].into());
    // A directory with two names.
    let mut twice = sample();
    let (a, b) = (twice.a, twice.b);
    twice.builder.link(InodeNr::ROOT, "b again", b);
    twice.builder.record(b).parent = a;
    let found = codes(&twice.builder.write());
    assert!(found.contains("DirectoryNames"), "{found:?}");
    // A name for the root.
    let mut root = sample();
    let b = root.b;
    root.builder.link(b, "top", InodeNr::ROOT);
    root.builder.record(InodeNr::ROOT).parent = InodeNr::ROOT;
    assert_eq!(codes(&root.builder.write()), ["DirectoryNames"].into());
}

#[test]
fn findings_are_limited_and_counted() {
    let mut findings = Findings::default();
    for inode in 0..MAX_FINDINGS as u64 + 10 {
        findings.add(Finding::NoIntent { inode: InodeNr::new(inode) });
    }
    assert_eq!((findings.list.len(), findings.total), (MAX_FINDINGS, MAX_FINDINGS as u64 + 10));
}

/// The blocks of the sample volume that hold something, and its image.
fn sample_image() -> (DiskImage, Vec<u64>) {
    let image = sample().builder.write().image();
    let mut block = [0; 4096];
    let used = (0..BLOCKS).filter(|number| {
        image.read(number * 4096, &mut block);
        block.iter().any(|byte| *byte != 0)
    });
    (image.clone(), used.collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn values_of_any_bytes_do_no_harm(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..200, any::<u8>()), 1..20),
        kinds in proptest::collection::vec((any::<u64>(), any::<u8>(), any::<u64>(), any::<u64>()), 0..10),
    ) {
        let disk = sample().builder.write_edited(
            |items| {
                for (index, offset, byte) in edits {
                    let shard = offset % 2;
                    let key = *index.get(&items[shard].keys().copied().collect::<Vec<_>>());
                    let value = items[shard].get_mut(&key).unwrap();
                    match value.get_mut(offset) {
                        Some(place) => *place = byte,
                        None => value.truncate(usize::from(byte) % (value.len() + 1)),
                    }
                }
                for (object, kind, offset, minor) in kinds {
                    items[1].insert(Key::new(object, ItemKind::new(kind), offset, minor), vec![kind; 30]);
                }
            },
            |_| {},
        );
        run_check(&disk, DataCheck::Verify).unwrap();
    }

    #[test]
    fn any_changed_bit_of_metadata_is_noticed(place in any::<prop::sample::Index>(), byte in 0_u64..4096, bit in 0_u8..8) {
        let (image, used) = sample_image();
        let block = *place.get(&used);
        let disk = SimDisk::from_image(SimDiskOptions { blocks: BLOCKS, ..SimDiskOptions::default() }, image);
        disk.flip_bit(block * 4096 + byte, bit);
        let report = run_check(&disk, DataCheck::Verify).unwrap();
        prop_assert!(!report.is_clean() || !report.notes.is_empty(), "block {block} byte {byte} bit {bit}");
    }
}
