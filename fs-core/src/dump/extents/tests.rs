//! [`extents`] of the volume that the check's tests build. With a log, and beside a mount: `volume/tests/extents.rs`.

use reactor::sim::{SimDisk, SimOptions, Simulator};

use super::*;
use crate::fsck::tests::{sample_volume, volume_with_many_extents};
use crate::request::ExtentState;

fn listed(disk: &SimDisk, path: &str) -> Result<Vec<ExtentRow>, ExtentsError> {
    let writes = disk.write_count();
    let simulator = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    let mut rows = Vec::new();
    let take = async |ctx: Context| {
        let mut take = |row| {
            rows.push(row);
            Ok(())
        };
        extents(&ctx, path.as_bytes(), &mut take).await
    };
    let outcome = simulator.block_on(0, take).unwrap();
    assert_eq!(disk.write_count(), writes, "nothing is written");
    outcome.map(|()| rows)
}

/// Offset and length in blocks, a letter for the state, and whether it is shared.
fn shown(disk: &SimDisk, path: &str) -> Vec<(u64, u64, char, bool)> {
    let letter = |state| match state {
        ExtentState::Data { sharing, .. } => ('d', sharing.shared),
        ExtentState::Preallocated { sharing, .. } => ('p', sharing.shared),
        ExtentState::Hole => ('h', false),
        ExtentState::Queued => ('q', false),
    };
    let rows = listed(disk, path).unwrap().into_iter();
    rows.map(|row| (row.offset / 4096, row.length / 4096, letter(row.state)))
        .map(|(offset, length, (letter, shared))| (offset, length, letter, shared))
        .collect()
}

#[test]
fn every_kind_of_piece_is_listed() {
    let (disk, _) = sample_volume();
    let file = [
        (0, 3, 'd', false),
        (3, 13, 'h', false),
        (16, 2, 'd', false),
        (18, 238, 'h', false),
        (256, 8, 'p', false),
    ];
    assert_eq!(shown(&disk, "/f"), file);
    assert_eq!(shown(&disk, "a//./b/../second name of f"), file, "by another way and name");
    assert_eq!(shown(&disk, "/a/b/g"), [(0, 6, 'd', true)], "its middle belongs to another file");
    assert_eq!(shown(&disk, "/a/b/h"), [(0, 2, 'h', false), (2, 3, 'd', true)]);
    assert_eq!(shown(&disk, "/a/file number 1"), [(0, 1, 'd', false)]);
}

#[test]
fn path_that_leads_to_no_regular_file_is_told() {
    let (disk, _) = sample_volume();
    for (path, words) in [
        ("/a/nothing", "\"/a/nothing\" does not exist"),
        ("/f/x", "\"/f\" is a regular file, and should be a directory"),
        ("/", "\"/\" is a directory, and should be a regular file"),
        ("/a/link", "\"/a/link\" is a symbolic link to \"../f\", and should be a regular file"),
        ("/a/b/pipe", "is a special file"),
    ] {
        let error = listed(&disk, path).unwrap_err().to_string();
        assert!(error.contains(words), "{path}: {error}");
    }
}

#[test]
fn file_with_more_extents_than_are_read_at_once_is_listed_whole() {
    let count = EXTENTS_PER_BATCH as u64 * 2 + 7;
    let disk = volume_with_many_extents(count);
    let rows = listed(&disk, "/many").unwrap();
    // Every second block is a hole.
    assert_eq!(rows.len() as u64, 2 * count - 1);
    let mut end = 0;
    for row in &rows {
        assert_eq!((row.offset, row.length), (end, 4096));
        end += row.length;
        match row.state {
            ExtentState::Data { sharing, .. } => assert!(sharing.shared && !sharing.lent),
            other => assert_eq!((other, row.offset / 4096 % 2), (ExtentState::Hole, 1)),
        }
    }
}

#[test]
fn damaged_node_ends_the_list_with_its_place() {
    let (disk, _) = sample_volume();
    let nodes = crate::dump::tests::nodes(&disk);
    for address in nodes {
        disk.flip_bit(address * 4096 + 9000, 5);
    }
    let error = listed(&disk, "/f").unwrap_err();
    assert!(matches!(error, ExtentsError::Stored(StoredError::Node { .. })), "{error}");
    assert!(error.to_string().contains("node at block"), "{error}");
}
