//! `docs/on-disk-format.md` against the golden image: the tables have no gaps, and where they say that a field lies, the
//! image has it.

use std::collections::BTreeMap;

use super::*;
use crate::disk::VolumeDisk;
use crate::log::read_log;
use crate::superblock::{Superblock, read_newest};
use crate::types::{BlockCount, BlockNr, ShardId};

/// Offset and length of each field of a table, by name.
type Table = BTreeMap<String, (usize, usize)>;

/// The tables of byte offsets below the heading `section`, in their order. Rows without a name are reserved bytes.
fn tables(section: &str) -> Vec<Table> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/on-disk-format.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().skip_while(|line| *line != section).skip(1);
    let body = lines.by_ref().take_while(|line| !line.starts_with('#'));
    let (mut tables, mut table, mut end) = (Vec::new(), None::<Table>, 0);
    for line in body.chain([""]) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        match (&mut table, cells.as_slice()) {
            (None, ["at", "bytes", ..]) => (table, end) = (Some(Table::new()), 0),
            (Some(_), [rule, ..]) if rule.starts_with("---") => {}
            (Some(open), [at, bytes, name, ..]) if line.starts_with('|') => {
                let (Ok(at), Some(bytes)) = (at.parse::<usize>(), product(bytes)) else { continue };
                assert_eq!(at, end, "{section}: `{name}` does not follow the row before");
                end = at + bytes;
                open.insert((*name).to_owned(), (at, bytes));
            }
            _ => tables.extend(table.take()),
        }
    }
    assert!(!tables.is_empty(), "{section} has no table of bytes");
    tables
}

/// A number of bytes, or one such as `64 × 48`.
fn product(text: &str) -> Option<usize> {
    text.split('×').map(|factor| factor.trim().parse::<usize>().ok()).product()
}

fn field(table: &Table, bytes: &[u8], name: &str) -> u64 {
    let (at, length) = *table.get(name).unwrap_or_else(|| panic!("{name} is not documented: {table:?}"));
    let mut value = [0; 8];
    value[..length].copy_from_slice(&bytes[at..at + length]);
    u64::from_le_bytes(value)
}

struct Read {
    superblock: Superblock,
    raw: Vec<u8>,
    /// The first entry of the log, the first shard's root, the first slot of group 1.
    log: Vec<u8>,
    root: Vec<u8>,
    slot: Vec<u8>,
    log_crc: u32,
}

fn read_all() -> Read {
    let read = async |ctx: Context| {
        let disk = VolumeDisk::new(ctx.disk().clone()).unwrap();
        let superblock = read_newest(&disk).await.unwrap().0;
        let at = |block: BlockNr, count| {
            let disk = disk.clone();
            async move { disk.read(block, BlockCount::new(count)).await.unwrap() }
        };
        let raw = at(superblock.slots()[0], 1).await;
        let log = at(superblock.log.unwrap().head(), 4).await;
        let root = at(superblock.shard(ShardId::FIRST).unwrap().tree.ptr.address, 4).await;
        let slot = at(superblock.layout.group_start(1), 1).await;
        let log_crc = read_log(&disk, &superblock).await.entries[0].crc;
        Read { superblock, raw, log, root, slot, log_crc }
    };
    shape().simulator(&golden(), 4).block_on(0, read).unwrap()
}

#[test]
fn superblock_lies_where_the_documentation_says() {
    let Read { superblock, raw, .. } = read_all();
    let tables = tables("## Superblock");
    let (table, record) = (&tables[0], &tables[1]);
    assert_eq!(table["label"], (64, 64));
    assert_eq!(raw[table["magic"].0..][..8], *b"POLLUXFS");
    let (hash_seed, _) = table["hash_seed"];
    assert_eq!(raw[hash_seed..hash_seed + 16], superblock.hash_seed);
    let (uuid, _) = table["uuid"];
    assert_eq!(raw[uuid..uuid + 16], *superblock.uuid.as_bytes());
    let log = superblock.log.unwrap();
    let mut blank = raw.clone();
    let (crc, _) = table["crc"];
    blank[crc..crc + 4].fill(0);
    for (name, value) in [
        ("crc", u64::from(crc32c::crc32c(&blank))),
        ("version", 1),
        ("generation", superblock.generation.get()),
        ("compatible", superblock.compatible),
        ("read_only_compatible", superblock.read_only_compatible),
        ("incompatible", 0),
        ("epoch", superblock.epoch.get()),
        ("incarnation", superblock.incarnation),
        ("blocks", superblock.layout.blocks().get()),
        ("group_shift", u64::from(superblock.layout.group_shift())),
        ("shards", 2),
        ("group_digest", superblock.group_digest),
        ("log_segment_0", log.segments[0].get()),
        ("log_segment_1", log.segments[1].get()),
        ("log_blocks", u64::from(log.blocks)),
        ("log_current", u64::from(log.current)),
    ] {
        // Two rows are called shards: the number of them, and their records.
        if name != "shards" {
            assert_eq!(field(table, &raw, name), value, "{name}");
        }
    }
    let (records, length) = table["shards"];
    assert_eq!(length, 64 * 48);
    let second = &raw[records + 48..records + 96];
    let shard = superblock.shards[1];
    for (name, value) in [
        ("block", shard.tree.ptr.address.get()),
        ("epoch", shard.tree.ptr.epoch.get()),
        ("crc", u64::from(shard.tree.ptr.crc)),
        ("level", u64::from(shard.tree.level)),
        ("next_inode", shard.next_inode),
        ("inodes", shard.inodes),
    ] {
        assert_eq!(field(record, second, name), value, "{name} of a shard");
    }
}

#[test]
fn log_entry_slot_and_node_lie_where_the_documentation_says() {
    let Read { superblock, log, root, slot, log_crc, .. } = read_all();
    let volume = superblock.identity().volume;
    let entry = &tables("## Intent log")[0];
    assert_eq!(log[entry["magic"].0..][..8], *b"PLXINTNT");
    for (name, value) in [
        ("crc", u64::from(log_crc)),
        ("volume", volume),
        ("generation", superblock.generation.get()),
        ("incarnation", superblock.incarnation),
        ("sequence", 1),
        ("predecessor", 0),
    ] {
        assert_eq!(field(entry, &log, name), value, "{name} of a log entry");
    }
    let bitmap = &tables("## Bitmap slots")[0];
    assert_eq!(slot[bitmap["magic"].0..][..8], *b"PLXGROUP");
    assert_eq!((field(bitmap, &slot, "volume"), field(bitmap, &slot, "group")), (volume, 1));
    let header = &tables("### Header (64 bytes)")[0];
    assert_eq!(root[header["magic"].0..][..4], *b"PlxN");
    let tree = superblock.shards[0].tree;
    for (name, value) in [
        ("version", 1),
        ("level", u64::from(tree.level)),
        ("shard", 0),
        ("volume", volume),
        ("address", tree.ptr.address.get()),
        ("epoch", tree.ptr.epoch.get()),
    ] {
        assert_eq!(field(header, &root, name), value, "{name} of a node");
    }
}

#[test]
fn tables_of_items_have_no_gaps_and_their_lengths() {
    for (section, bytes) in [
        ("### Inode (136 bytes)", 136),
        ("### Extent (24 bytes)", 24),
        ("### Back-reference (8 bytes)", 8),
        ("### Return (16 bytes)", 16),
        ("### Run (16 bytes, then CRC32C of each block, 4 bytes each; none if preallocated)", 16),
        ("## Keys", 28),
    ] {
        let end = tables(section)[0].values().map(|(at, length)| at + length).max();
        assert_eq!(end, Some(bytes), "{section}");
    }
}
