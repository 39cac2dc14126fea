//! [`dump`] of the volume that the check's tests build.

use reactor::sim::{SimDisk, SimOptions, Simulator};

use super::*;
use crate::fsck::tests::sample_volume;

fn lines(disk: &SimDisk, selection: Selection) -> (Vec<String>, DumpSummary) {
    let simulator = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    let mut text = Vec::new();
    let summary =
        simulator.block_on(0, async |ctx| dump(&ctx, &selection, &mut text).await).unwrap().unwrap();
    (String::from_utf8(text).unwrap().lines().map(str::to_owned).collect(), summary)
}

/// First blocks of all tree nodes.
pub(super) fn nodes(disk: &SimDisk) -> Vec<u64> {
    let (text, _) = lines(disk, Selection { part: Part::Nodes, ..Selection::default() });
    text.iter().map(|line| line.split(' ').nth(3).unwrap().parse().unwrap()).collect()
}

fn items(kind: &str) -> Selection {
    Selection { part: Part::Items, kind: Some(kind_named(kind).unwrap()), ..Selection::default() }
}

#[test]
fn every_part_is_shown() {
    let (disk, _) = sample_volume();
    let (text, summary) = lines(&disk, Selection::default());
    assert!(text.iter().any(|line| line.starts_with("label") && line.contains("Zwilling")), "{text:?}");
    assert!(text.iter().any(|line| line.starts_with("shard 1: root ")));
    assert_eq!(summary, DumpSummary { shown: 1, damaged: 0 });
    let (text, _) = lines(&disk, Selection { part: Part::Groups, ..Selection::default() });
    assert_eq!(text.len(), 32);
    let one = Selection { part: Part::Groups, shard: ShardId::new(1), ..Selection::default() };
    assert_eq!(lines(&disk, one).0.len(), 16);
    let (text, _) = lines(&disk, Selection { part: Part::Nodes, ..Selection::default() });
    assert!(
        text.iter().any(|line| line.contains("level 1")) && text.iter().any(|line| line.contains("level 0"))
    );
}

#[test]
fn items_of_every_kind_are_shown_in_words() {
    let (disk, _) = sample_volume();
    for (kind, words) in [
        ("intent", "Orphan"),
        ("inode", "directory 0644"),
        ("symlink", "-> \"../f\""),
        ("xattr", "\"user.colour\" = \"green\""),
        ("dir-hash", "\"second name of f\" -> inode"),
        ("dir-seq", "\"second name of f\" -> inode"),
        ("extent", "Preallocated"),
        ("run", "references 2"),
        ("backref", "inode"),
    ] {
        let (text, summary) = lines(&disk, items(kind));
        assert!(text.iter().any(|line| line.contains(words)), "{kind}: {text:?}");
        assert!(text.iter().all(|line| line.split(": ").nth(1).is_some_and(|rest| rest.starts_with(kind))));
        assert_eq!((summary.shown, summary.damaged), (text.len() as u64, 0));
    }
    let all = lines(&disk, Selection { part: Part::Items, ..Selection::default() }).1.shown;
    let sum: u64 = kind_names().map(|kind| lines(&disk, items(kind)).1.shown).sum();
    assert_eq!(all, sum);
}

#[test]
fn selection_of_an_inode_finds_what_it_has_and_what_refers_to_it() {
    let (disk, f) = sample_volume();
    let selection = Selection { part: Part::Items, inode: Some(f), ..Selection::default() };
    let (text, _) = lines(&disk, selection);
    let of_kind =
        |kind: &str| text.iter().filter(|line| line.starts_with(&format!("shard 0: {kind} "))).count();
    assert_eq!((of_kind("inode"), of_kind("xattr"), of_kind("extent"), of_kind("backref")), (1, 1, 3, 3));
    assert_eq!(text.len(), 8);
}

#[test]
fn damage_is_shown_and_does_not_end_the_dump() {
    let (disk, _) = sample_volume();
    let node_line = lines(&disk, Selection { part: Part::Nodes, ..Selection::default() }).0;
    let leaf = node_line.iter().find(|line| line.contains("level 0")).unwrap();
    let address: u64 = leaf.split(' ').nth(3).unwrap().parse().unwrap();
    disk.flip_bit(address * 4096 + 9000, 5);
    let (text, summary) = lines(&disk, Selection { part: Part::Items, ..Selection::default() });
    assert_eq!(summary.damaged, 1);
    assert!(summary.shown > 100);
    assert_eq!(text.iter().filter(|line| line.starts_with("! ")).count(), 1);
}

#[test]
fn names_cannot_disturb_a_terminal() {
    let key = crate::format::items::symlink_key(InodeNr::new(64));
    assert_eq!(items::describe(&key, b"a\x1b[2J\n\"").unwrap(), r#"64 -> "a\x1b[2J\n\"""#);
}
