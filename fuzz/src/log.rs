//! Entries of the intent log.
//!
//! An input is a row of records, of which an entry is made; places of it are changed, and its checksum is made right. Or it is
//! the entry, or the records.
//!
//! Checks: an honest entry decodes to what it was made of; what decodes encodes to the same bytes again.

use fs_core::format::log::{
    Entry, HEADER_BYTES, Place, Record, RecordWriter, Section, decode, encode, entry_bytes, records,
};
use fs_core::format::node::{ItemKind, Key, MAX_VALUE};
use fs_core::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, ShardId};

use crate::edit::{change, seal};
use crate::script::Script;

/// Where an entry has its checksum.
const CRC_AT: usize = 8;
/// The volume that the entries are of.
const VOLUME: u64 = 0x0bad_cafe;
/// Records of a section.
const RECORDS: u8 = 12;
/// Changes of one input.
const CHANGES: usize = 32;

/// Makes an entry, changes it, and looks at what can be made of it.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data.to_vec());
    match script.byte() % 4 {
        0 | 1 => changed_entry(&mut script),
        2 => judge_records(&script.bytes(data.len())),
        _ => {
            let mut bytes = script.bytes(data.len());
            judge(&bytes);
            bytes.resize(BLOCK_SIZE as usize, 0);
            if bytes.len() >= HEADER_BYTES {
                seal(&mut bytes, CRC_AT);
            }
            judge(&bytes);
        }
    }
}

fn changed_entry(script: &mut Script) {
    let place = Place {
        volume: VOLUME,
        generation: Generation::new(3),
        incarnation: 5,
        sequence: script.long(),
        predecessor: u32::from(script.word()),
    };
    let epoch = Epoch::new(script.long());
    let sections: Vec<Section> = (0..script.byte() % 4).map(|number| section(script, number)).collect();
    let (mut bytes, crc) = encode(&place, epoch, &sections);
    let blocks = (bytes.len() / BLOCK_SIZE as usize) as u32;
    let honest = Entry { place, epoch, crc, blocks, sections };
    assert_eq!(decode(&bytes, VOLUME).as_ref(), Ok(&honest), "an honest entry is decoded to something else");
    let end = entry_bytes(&honest.sections);
    for _ in 0..CHANGES {
        if script.is_over() {
            break;
        }
        // Behind the sections there are zeroes, up to a whole block.
        let part = script.pick(&[HEADER_BYTES, end, end, bytes.len()]);
        change(script, &mut bytes[..part]);
    }
    seal(&mut bytes, CRC_AT);
    judge(&bytes);
}

/// What a shard may have changed.
fn section(script: &mut Script, number: u8) -> Section {
    let mut writer = RecordWriter::default();
    for _ in 0..script.byte() % RECORDS {
        let kind = script.byte();
        let key =
            Key::new(script.long(), ItemKind::new(script.byte()), script.long(), u64::from(script.byte()));
        match kind % 5 {
            0 => writer.item(&key, Some(&vec![script.byte(); usize::from(script.word()) % (MAX_VALUE + 1)])),
            1 => {
                let length = usize::from(script.byte());
                writer.item(&key, Some(&script.bytes(length)));
            }
            2 => writer.item(&key, None),
            3 => writer.used(BlockNr::new(key.object >> 1), BlockCount::new(1 + u64::from(script.word()))),
            _ => writer.freed(BlockNr::new(key.object >> 1), BlockCount::new(1 + u64::from(script.word()))),
        }
    }
    let shard = ShardId::new(number * 7).expect("a small number is a shard's");
    Section { shard, next_inode: script.long(), inodes: script.long(), records: writer.take() }
}

/// Decodes bytes, and holds what comes of it against them.
fn judge(bytes: &[u8]) {
    let Ok(entry) = decode(bytes, VOLUME) else { return };
    for section in &entry.sections {
        assert!(
            records(&section.records).all(|record| record.is_ok()),
            "a section that was checked: {section:?}"
        );
        judge_records(&section.records);
    }
    let (again, crc) = encode(&entry.place, entry.epoch, &entry.sections);
    assert_eq!(crc, entry.crc, "the checksum of {entry:?}");
    assert!(bytes[..again.len()] == again[..], "an entry is encoded to other bytes: {entry:?}");
    assert_eq!(again.len(), entry.blocks as usize * BLOCK_SIZE as usize);
}

/// What can be made of records, written again, is the same.
fn judge_records(bytes: &[u8]) {
    let mut writer = RecordWriter::default();
    let mut whole = true;
    for record in records(bytes) {
        match record {
            Ok(Record::Put(key, value)) => writer.item(&key, Some(value)),
            Ok(Record::Delete(key)) => writer.item(&key, None),
            Ok(Record::Used(start, count)) => writer.used(start, count),
            Ok(Record::Freed(start, count)) => writer.freed(start, count),
            Err(_) => whole = false,
        }
    }
    let again = writer.take();
    assert!(bytes.starts_with(&again), "records are written to other bytes");
    assert!(!whole || again.len() == bytes.len(), "records were lost");
}
