//! Entries of the log as bytes: golden ones, hostile ones, and any at all.

use proptest::prelude::*;

use super::*;
use crate::format::node::ItemKind;

/// An entry of two shards.
pub(crate) fn example() -> (Place, Epoch, Vec<Section>) {
    let key = |object| Key { object, kind: ItemKind::new(0x10), offset: 7, minor: 9 };
    let mut writer = RecordWriter::default();
    writer.item(&key(5), Some(&[1, 2, 3]));
    writer.used(BlockNr::new(100), BlockCount::new(4));
    let first = writer.take();
    writer.item(&key(6), None);
    writer.freed(BlockNr::new(600), BlockCount::new(1));
    let section =
        |shard, records| Section { shard: ShardId::new(shard).unwrap(), next_inode: 40, inodes: 17, records };
    let place = Place {
        volume: 0x1122_3344,
        generation: Generation::new(9),
        incarnation: 0xdead_beef,
        sequence: 3,
        predecessor: 0x55aa,
    };
    (place, Epoch::new(12), vec![section(0, first), section(3, writer.take())])
}

fn fix_checksum(bytes: &mut [u8]) {
    bytes[8..12].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn entry_survives_the_round_trip() {
    let (place, epoch, sections) = example();
    let (mut bytes, crc) = encode(&place, epoch, &sections);
    assert_eq!(bytes.len(), 4096);
    bytes.extend([7; 4096]);
    let expected = Entry { place, epoch, crc, blocks: 1, sections: sections.clone() };
    assert_eq!(decode(&bytes, place.volume), Ok(expected));
    let first: Vec<_> = records(&sections[0].records).map(Result::unwrap).collect();
    assert!(matches!(first[..], [Record::Put(_, [1, 2, 3]), Record::Used(..)]), "{first:?}");
}

#[test]
fn golden_image_is_stable() {
    let (place, epoch, sections) = example();
    let (bytes, crc) = encode(&place, epoch, &sections);
    assert_eq!(&bytes[..8], b"PLXINTNT");
    assert_eq!(bytes[12..16], 203_u32.to_le_bytes());
    assert_eq!(bytes[48..56], 12_u64.to_le_bytes());
    assert_eq!(bytes[60], 2);
    assert_eq!(&bytes[64..72], [0, 0, 0, 0, 49, 0, 0, 0]);
    assert_eq!(bytes[88], 1, "a put");
    assert_eq!(crc, GOLDEN_CRC);
}

/// Changes only together with the format's version.
const GOLDEN_CRC: u32 = 274_196_532;

#[test]
fn what_is_not_the_volumes_is_told_from_damage() {
    let (place, epoch, sections) = example();
    let (mut bytes, _) = encode(&place, epoch, &sections);
    assert_eq!(decode(&bytes, 1), Err(EntryError::NotAnEntry));
    assert_eq!(decode(&[0; 4096], 0), Err(EntryError::NotAnEntry));
    assert_eq!(decode(&[], 0), Err(EntryError::NotAnEntry));
    bytes[200] ^= 1;
    assert!(matches!(decode(&bytes, place.volume), Err(EntryError::Checksum { .. })));
}

#[test]
fn every_field_is_checked() {
    let (place, epoch, sections) = example();
    let (good, _) = encode(&place, epoch, &sections);
    // Records of the first section: a put at 88, used blocks at 124; of the second: a deletion at 161.
    for (at, value, why) in [
        (12, 63, "impossible length"),
        (15, 255, "impossible length"),
        (12, 202, "a section is cut off"),
        (12, 204, "bytes behind the last section"),
        (61, 1, "reserved bytes are in use"),
        (4000, 1, "reserved bytes are in use"),
        (60, 1, "bytes behind the last section"),
        (60, 3, "a section is cut off"),
        (64, 64, "impossible shard"),
        (64, 3, "sections are not in the order of shards"),
        (66, 1, "sections are not in the order of shards"),
        (71, 1, "a section is cut off"),
        (68, 48, "a record is cut off"),
        (88, 9, "unknown kind of record"),
        (114, 1, "reserved bytes of a key are in use"),
        (120, 255, "a value is longer than an item's can be"),
        (133, 0, "impossible blocks"),
        (161, 7, "unknown kind of record"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        fix_checksum(&mut bytes);
        assert_eq!(decode(&bytes, place.volume), Err(EntryError::Nonsense(why)), "byte {at}");
    }
}

proptest! {
    #[test]
    fn any_changed_bit_is_noticed(bit in 0_usize..4096 * 8) {
        let (place, epoch, sections) = example();
        let (mut bytes, _) = encode(&place, epoch, &sections);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode(&bytes, place.volume).is_err());
    }

    #[test]
    fn forged_bytes_never_panic(edits in proptest::collection::vec((0_usize..300, any::<u8>()), 1..12)) {
        let (place, epoch, sections) = example();
        let (mut bytes, _) = encode(&place, epoch, &sections);
        for (at, value) in edits {
            bytes[at] = value;
        }
        fix_checksum(&mut bytes);
        if let Ok(entry) = decode(&bytes, place.volume) {
            for section in &entry.sections {
                prop_assert!(records(&section.records).all(|record| record.is_ok()));
            }
        }
    }
}
