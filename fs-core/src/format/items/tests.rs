//! Items: what is written is read back, and what makes no sense is refused.

use super::*;

fn record() -> InodeRecord {
    let time = |seconds| WallTime::new(seconds, 999_999_999).unwrap();
    let mut record = InodeRecord::new(FileKind::Directory, 0o2775, 1000, 1001, time(-1));
    record.modified = time(1 << 40);
    record.parent = InodeNr::ROOT;
    record.entries = 7;
    record.size = 70;
    record.next_sequence = 11;
    record.xattr_names = 12;
    record
}

fn entry(name: &[u8], sequence: u64) -> HashEntry {
    let target = EntryTarget { inode: InodeNr::new(sequence * 64), kind: FileKind::Regular };
    HashEntry { sequence, target, name: name.into() }
}

#[test]
fn inode_record_survives_encoding() {
    for kind in [
        FileKind::Regular,
        FileKind::Directory,
        FileKind::Symlink,
        FileKind::BlockDevice,
        FileKind::CharDevice,
        FileKind::Fifo,
        FileKind::Socket,
    ] {
        let record = InodeRecord { kind, ..record() };
        assert_eq!(InodeRecord::decode(&record.encode()), Ok(record));
    }
}

#[test]
fn inode_record_has_the_layout_of_version_1() {
    let stored = record().encode();
    assert_eq!(stored[0..4], 0o042_775_u32.to_le_bytes());
    assert_eq!(stored[4..8], 1000_u32.to_le_bytes());
    assert_eq!(stored[48..56], (-1_i64).to_le_bytes());
    assert_eq!(stored[96..104], InodeNr::ROOT.get().to_le_bytes());
    assert_eq!(stored[120..136], [0; 16]);
}

#[test]
fn damaged_inode_records_are_told() {
    let stored = record().encode();
    assert_eq!(InodeRecord::decode(&stored[1..]), Err(ItemError::Length));
    let mut unknown_kind = stored.clone();
    unknown_kind[1] = 0xf0;
    assert_eq!(InodeRecord::decode(&unknown_kind), Err(ItemError::FileKind));
    let mut late = stored.clone();
    late[56..60].copy_from_slice(&1_000_000_000_u32.to_le_bytes());
    assert_eq!(InodeRecord::decode(&late), Err(ItemError::Time));
    let most = crate::MAX_FILE_SIZE;
    for (size, blocks, entries) in [(most + 1, 0, 0), (0, most, 0), (0, 0, most), (0, u64::MAX, 0)] {
        let impossible = InodeRecord { size, blocks, entries, ..record() };
        assert_eq!(InodeRecord::decode(&impossible.encode()), Err(ItemError::Number), "{impossible:?}");
    }
    let mut reserved = stored;
    reserved[135] = 1;
    assert_eq!(InodeRecord::decode(&reserved), Err(ItemError::Reserved));
}

#[test]
fn entries_survive_encoding() {
    let chain = vec![entry(b"a", 3), entry(&[0xff; 255], 4)];
    assert_eq!(HashEntry::decode_chain(&HashEntry::encode_chain(&chain)), Ok(chain));
    let by_sequence = SequenceEntry {
        target: EntryTarget { inode: InodeNr::new(65), kind: FileKind::Socket },
        name: b"socket"[..].into(),
    };
    assert_eq!(SequenceEntry::decode(&by_sequence.encode()), Ok(by_sequence));
}

#[test]
fn impossible_names_are_told() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0"] {
        let stored = HashEntry::encode_chain(&[entry(name, 3)]);
        assert_eq!(HashEntry::decode_chain(&stored), Err(ItemError::Name), "{name:?}");
        let target = EntryTarget { inode: InodeNr::ROOT, kind: FileKind::Fifo };
        let stored = SequenceEntry { target, name: name.into() }.encode();
        assert_eq!(SequenceEntry::decode(&stored), Err(ItemError::Name), "{name:?}");
    }
    let twice = HashEntry::encode_chain(&[entry(b"a", 3), entry(b"a", 4)]);
    assert_eq!(HashEntry::decode_chain(&twice), Err(ItemError::Chain));
    assert_eq!(HashEntry::decode_chain(&[]), Err(ItemError::Chain));
}

#[test]
fn attributes_survive_encoding() {
    let chain = vec![
        Xattr { name: b"user.a"[..].into(), value: vec![7; MAX_XATTR_VALUE].into() },
        Xattr { name: b"user.b"[..].into(), value: Box::default() },
    ];
    assert_eq!(Xattr::decode_chain(&Xattr::encode_chain(&chain)), Ok(chain));
}

#[test]
fn intents_survive_encoding() {
    let clone = |start, end| Intent::Clone { start, end };
    for intent in [
        Intent::Orphan,
        Intent::Truncate(0),
        Intent::Truncate(u64::MAX),
        clone(0, 0),
        clone(4096, 1 << 40),
        Intent::DropReplaced,
    ] {
        assert_eq!(Intent::decode(&intent.encode()), Ok(intent));
    }
    for impossible in [clone(4096, 0), clone(1, 4096), clone(0, 4095), clone(0, 1 << 63)] {
        assert_eq!(Intent::decode(&impossible.encode()), Err(ItemError::Intent));
    }
    assert_eq!(Intent::decode(&[0; 24]), Err(ItemError::Intent));
    assert_eq!(Intent::decode(&[1; 24]), Err(ItemError::Reserved));
    assert_eq!(Intent::decode(&[1; 16]), Err(ItemError::Length));
}

/// Every prefix and every changed byte of every item: an answer or an error, never a panic.
#[test]
fn foreign_bytes_never_panic() {
    let items = [
        record().encode(),
        HashEntry::encode_chain(&[entry(b"name", 3), entry(b"other", 4)]),
        SequenceEntry { target: entry(b"x", 3).target, name: b"x"[..].into() }.encode(),
        Xattr::encode_chain(&[Xattr { name: b"user.a"[..].into(), value: b"value"[..].into() }]),
        Intent::Truncate(5).encode(),
    ];
    let decode = |bytes: &[u8]| {
        // Only that these return matters.
        let _any = InodeRecord::decode(bytes);
        let _any = HashEntry::decode_chain(bytes);
        let _any = SequenceEntry::decode(bytes);
        let _any = Xattr::decode_chain(bytes);
        let _any = Intent::decode(bytes);
    };
    for item in items {
        for length in 0..=item.len() {
            decode(&item[..length]);
        }
        for position in 0..item.len() {
            for byte in 0..=255 {
                let mut changed = item.clone();
                changed[position] = byte;
                decode(&changed);
            }
        }
    }
}
