//! The check of volumes whose log nobody has replayed: what it sees is what the next mount finds, of honest logs, of
//! damaged ones and of logs that lie.

use reactor::block::Durability;
use reactor::sim::SimDisk;

use super::client::Rng;
use super::clone::{clone, pattern, sync_file, whole};
use super::world::Shape;
use super::*;
use crate::disk::tests::with_disk;
use crate::format::extent::extent_key;
use crate::format::items::{inode_key, symlink_key};
use crate::format::log::{Place, RecordWriter, Section, encode};
use crate::format::node::{ItemKind, Key};
use crate::fsck::{CheckReport, DataCheck, Finding, check_with};
use crate::log::read_log;
use crate::log::state::Replayed;
use crate::superblock::{Superblock, read_newest};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, ShardId};

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_secs(3600), ..MountOptions::default() };
    Shape { seed: 21, shards: 2, reactors: 1, blocks: 32 * 1024, mount }
}

fn checked(shape: &Shape, disk: &SimDisk) -> CheckReport {
    let writes = disk.write_count();
    let check = async |ctx: Context| check_with(&ctx, DataCheck::Verify, &mut |_| ()).await;
    let report = shape.simulator(disk, 5).block_on(0, check).unwrap().unwrap();
    assert_eq!(disk.write_count(), writes, "a check writes nothing");
    report
}

fn codes(report: &CheckReport) -> Vec<&'static str> {
    let mut codes: Vec<_> = report.findings.iter().map(Finding::code).collect();
    codes.sort_unstable();
    codes.dedup();
    codes
}

/// Fills a volume through the log: names in both shards, writes over writes, clones, removals, an orphan. After each
/// fsync `cut` gets the disk.
async fn busy(volume: &Volume, mut cut: impl FnMut(u64)) {
    let file = async |parent, name: &str| create(volume, parent, name, NewInode::Regular).await.inode;
    let first = file(Volume::ROOT, "first").await;
    write(volume, first, 0, &pattern(1, 0).repeat(20)).await;
    sync_file(volume, first).await;
    for round in 0..8_u64 {
        let name = format!("d{round}");
        let directory = create(volume, Volume::ROOT, &name, NewInode::Directory).await.inode;
        let child = file(directory, "child").await;
        write(volume, child, round * BLOCK_SIZE, &pattern(2, round)).await;
        write(volume, first, round * 2 * BLOCK_SIZE, &pattern(3, round)).await;
        sync_file(volume, child).await;
        cut(round * 4);
        let twin = file(directory, "twin").await;
        clone(volume, whole(first, twin)).await.unwrap();
        sync_file(volume, twin).await;
        cut(round * 4 + 1);
        if round > 4 {
            let name = b"child".as_slice().into();
            volume.call(Request::Unlink { parent: directory, name }).await.unwrap();
            sync_file(volume, first).await;
            cut(round * 4 + 2);
        }
    }
}

#[test]
fn check_sees_what_the_next_mount_finds() {
    let shape = shape();
    let disk = shape.formatted();
    let mut images = Vec::new();
    let run = async |_: &Context, volume: &Volume| {
        busy(volume, |_| images.push(disk.image_after_cut(&CutPolicy::DropAll))).await;
    };
    shape.mounted(&disk, 1, run).unwrap();
    let (mut replayed, mut compared) = (0, 0);
    for image in images {
        let disk = shape.disk(image);
        let before = checked(&shape, &disk);
        assert_eq!(before.findings, []);
        let unmount = async |_: &Context, volume: &Volume| volume.unmount().await.unwrap();
        let in_log = before.notes.iter().any(|note| note.contains("replayed in memory"));
        replayed += u32::from(in_log);
        shape.mounted(&disk, 2, unmount).unwrap();
        let after = checked(&shape, &disk);
        assert_eq!(after.findings, []);
        assert!(!after.notes.iter().any(|note| note.contains("replayed in memory")), "{:?}", after.notes);
        // A mount finishes what a crash interrupted; that comes after the replay.
        let figures = |report: &CheckReport| {
            let counts = report.counts;
            [counts.inodes, counts.entries, counts.extents, counts.runs, counts.data_blocks]
        };
        assert_eq!(before.counts.entries, after.counts.entries);
        if before.counts.intents == 0 {
            compared += 1;
            assert_eq!(figures(&before), figures(&after));
        }
    }
    assert!(compared > 5, "{compared} compared");
    assert!(replayed > 10, "{replayed} logs");
}

/// A volume with a few files, of which all but the first lie in the log; the names tell the inodes.
struct Logged {
    shape: Shape,
    disk: SimDisk,
    /// File of the log with 4 blocks of data.
    file: InodeNr,
    superblock: Superblock,
}

fn logged() -> Logged {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let mut last = None;
        for name in ["zero", "one", "two", "three"] {
            let file = create(volume, Volume::ROOT, name, NewInode::Regular).await.inode;
            write(volume, file, 0, &pattern(name.len() as u8, 1).repeat(4)).await;
            sync_file(volume, file).await;
            last = Some(file);
        }
        last.unwrap()
    };
    let file = shape.mounted(&disk, 1, run).unwrap();
    let disk = shape.disk(disk.image_after_cut(&CutPolicy::DropAll));
    let superblock = with_disk(&disk, async |disk| read_newest(&disk).await.unwrap().0);
    Logged { shape, disk, file, superblock }
}

impl Logged {
    /// Appends an entry with right checksums whose records, of shard 0, are somebody's invention.
    fn lie(&self, records: impl FnOnce(&mut RecordWriter), counters: impl FnOnce(&mut Section)) {
        let mut writer = RecordWriter::default();
        records(&mut writer);
        let records = writer.take();
        with_disk(&self.disk, async |disk| {
            let log = read_log(&disk, &self.superblock).await;
            assert_eq!(log.damage, None);
            let last = log.entries.last().unwrap();
            let used: u32 = log.entries.iter().map(|entry| entry.blocks).sum();
            let shard = ShardId::FIRST;
            let replayed = Replayed::new(&self.superblock, &log).unwrap();
            let (next_inode, inodes) = replayed.counters(&self.superblock, shard);
            let mut section = Section { shard, next_inode, inodes, records };
            counters(&mut section);
            let place = Place { sequence: last.place.sequence + 1, predecessor: last.crc, ..last.place };
            let (bytes, _) = encode(&place, Epoch::new(last.epoch.get() + 1), &[section]);
            let at = BlockNr::new(self.superblock.log.unwrap().head().get() + u64::from(used));
            disk.write(at, &bytes, Durability::Durable).await.unwrap();
        });
    }

    fn expect(&self, expected: &[&str], words: &str) {
        let report = checked(&self.shape, &self.disk);
        let text = format!("{:#?}", report.findings);
        assert_eq!(codes(&report), expected, "{text}");
        let said = expected.is_empty() || report.findings.iter().any(|it| it.to_string().contains(words));
        assert!(said, "nothing says {words:?}: {text}");
    }

    /// First block of the file's data, which only the log knows.
    fn data(&self) -> BlockNr {
        with_disk(&self.disk, async |disk| {
            let log = read_log(&disk, &self.superblock).await;
            Replayed::new(&self.superblock, &log).unwrap().used().last().unwrap().1
        })
    }
}

#[test]
fn volume_with_a_log_is_clean_and_told_with_its_files() {
    let logged = logged();
    let report = checked(&logged.shape, &logged.disk);
    assert_eq!(report.findings, []);
    assert_eq!((report.counts.inodes, report.counts.entries, report.counts.data_blocks), (5, 4, 16));
    assert!(report.notes.iter().any(|note| note.contains("3 entries")), "{:?}", report.notes);
}

#[test]
fn data_that_only_the_log_names_is_compared_with_its_checksums() {
    let logged = logged();
    logged.disk.flip_bit(logged.data().get() * BLOCK_SIZE + 77, 2);
    logged.expect(&["DataChecksum"], &format!("block {}", logged.data()));
}

#[test]
fn damaged_entry_in_the_middle_is_told_and_what_comes_before_is_checked() {
    let logged = logged();
    let head = logged.superblock.log.unwrap().head().get();
    logged.disk.flip_bit((head + 1) * BLOCK_SIZE + 200, 3);
    logged.expect(&["Log"], &format!("entry 2 at block {}", head + 1));
    let report = checked(&logged.shape, &logged.disk);
    assert_eq!((report.counts.inodes, report.counts.data_blocks), (3, 8), "root, zero and one");
}

#[test]
fn items_that_a_log_invents_are_found() {
    let file = logged().file;
    let lie = |records: &dyn Fn(&mut RecordWriter), expected: &[&str], words: &str| {
        let logged = logged();
        assert_eq!(logged.file, file);
        logged.lie(|writer| records(writer), |_| ());
        logged.expect(expected, words);
    };
    lie(&|_| (), &[], "");
    let unknown = Key::new(file.get(), ItemKind::new(0x77), 0, 0);
    lie(&|log| log.item(&unknown, Some(b"x")), &["UnknownItem"], "of no known kind");
    lie(&|log| log.item(&inode_key(file), Some(b"short")), &["Item"], "wrong length");
    lie(&|log| log.item(&symlink_key(file), Some(b"there")), &["WrongItem"], "has item");
    lie(&|log| log.item(&extent_key(file, 0), None), &["InodeBlocks", "NoExtent"], "");
}

#[test]
fn blocks_that_a_log_cannot_use_or_free_are_found() {
    let data = logged().data();
    let four = BlockCount::new(4);
    let blocks = logged().superblock.layout.blocks().get();
    let lie = |records: &dyn Fn(&mut RecordWriter), expected: &[&str], words: &str| {
        let logged = logged();
        logged.lie(|writer| records(writer), |_| ());
        logged.expect(expected, words);
    };
    lie(&|log| log.used(data, four), &["Log"], "uses blocks that are not free");
    let free = BlockNr::new(data.get() + 64);
    lie(&|log| log.freed(free, four), &["Log"], "frees blocks that are not in use");
    lie(&|log| log.freed(data, four), &["NotMarked"], "is used, and marked as free");
    lie(&|log| log.used(free, four), &["Leaked"], "nobody uses it");
    lie(&|log| log.used(BlockNr::new(blocks - 2), four), &["Log"], "does not lie in one group of shard 0");
    lie(&|log| log.freed(BlockNr::new(u64::MAX / 2), four), &["Log"], "does not lie in one group");
    lie(&|log| log.used(free, BlockCount::new(u64::from(u32::MAX))), &["Log"], "does not lie in one group");
    lie(&|log| log.used(BlockNr::new(0), four), &["Log"], "uses blocks that are not free");
}

#[test]
fn log_full_of_lies_about_blocks_is_not_followed() {
    let logged = logged();
    let (data, many) = (logged.data(), BlockCount::new(4));
    logged.lie(|log| (0..200).for_each(|_| log.used(data, many)), |_| ());
    let report = checked(&logged.shape, &logged.disk);
    assert_eq!((codes(&report), report.total_findings), (vec!["Log"], 1));
}

#[test]
fn counters_that_a_log_invents_are_found() {
    let one = logged();
    one.lie(|_| (), |section| section.inodes += 1);
    one.expect(&["InodeCount"], "");
    let other = logged();
    other.lie(|_| (), |section| section.next_inode = 2);
    other.expect(&["NextInode"], "");
}

#[test]
fn log_of_any_records_does_no_harm() {
    let original = logged();
    let image = original.disk.image();
    let area = original.superblock.log.unwrap();
    let found = with_disk(&original.disk, async |disk| read_log(&disk, &original.superblock).await);
    let mut noticed = 0;
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let mut sections: Vec<Section> = found.entries[0].sections.clone();
        for _ in 0..=rng.below(3) {
            let which = rng.below(sections.len() as u64) as usize;
            let records = &mut sections[which].records;
            let at = rng.below(records.len() as u64) as usize;
            records[at] ^= 1 << rng.below(8);
        }
        let disk = original.shape.disk(image.clone());
        let first = &found.entries[0];
        let (bytes, _) = encode(&first.place, first.epoch, &sections);
        with_disk(&disk, async |disk| disk.write(area.head(), &bytes, Durability::Durable).await.unwrap());
        noticed += u32::from(!checked(&original.shape, &disk).is_clean());
    }
    assert_eq!(noticed, 150, "a changed record is never the truth");
}
