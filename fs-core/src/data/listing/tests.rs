//! [`rows`] without a volume. On a volume: `volume/tests/extents.rs`.

use super::*;
use crate::format::extent::Extent;
use crate::types::{BlockCount, BlockNr, Generation};

fn piece(offset: u64, start: u64, blocks: u64, kind: ExtentKind) -> Piece {
    let generation = Generation::new(1);
    let extent = Extent { start: BlockNr::new(start), blocks: BlockCount::new(blocks), generation, kind };
    Piece { mapped: Mapped { offset: offset * BLOCK_SIZE, extent }, sharing: Sharing::default() }
}

/// Offset and length in blocks, and a letter: data with its place, preallocated, hole, queued.
fn shown(list: &ExtentList) -> Vec<(u64, u64, String)> {
    let state = |state| match state {
        ExtentState::Data { physical, .. } => format!("d{}", physical / BLOCK_SIZE),
        ExtentState::Preallocated { physical, .. } => format!("p{}", physical / BLOCK_SIZE),
        ExtentState::Hole => "h".to_owned(),
        ExtentState::Queued => "q".to_owned(),
    };
    list.rows.iter().map(|row| (row.offset / BLOCK_SIZE, row.length / BLOCK_SIZE, state(row.state))).collect()
}

fn expect(list: &ExtentList, rows: &[(u64, u64, &str)]) {
    let expected: Vec<_> = rows.iter().map(|(at, length, what)| (*at, *length, (*what).to_owned())).collect();
    assert_eq!(shown(list), expected);
}

#[test]
fn rows_cover_the_file_with_its_holes_and_what_lies_behind_its_end() {
    let pieces = [piece(2, 100, 3, ExtentKind::Data), piece(9, 50, 4, ExtentKind::Preallocated)];
    let list = rows(0, u64::MAX, 7 * BLOCK_SIZE - 5, &pieces, |_| 0..0);
    expect(&list, &[(0, 2, "h"), (2, 3, "d100"), (5, 4, "h"), (9, 4, "p50")]);
    assert_eq!(list.next, None);
    let list = rows(0, u64::MAX, 20 * BLOCK_SIZE, &pieces[..1], |_| 0..0);
    expect(&list, &[(0, 2, "h"), (2, 3, "d100"), (5, 15, "h")]);
    expect(&rows(0, u64::MAX, 0, &[], |_| 0..0), &[]);
    let from_within = rows(3 * BLOCK_SIZE, u64::MAX, 5 * BLOCK_SIZE, &pieces[..1], |_| 0..0);
    expect(&from_within, &[(3, 2, "d101")]);
}

#[test]
fn what_waits_in_memory_hides_what_lies_beneath() {
    let pieces = [piece(0, 100, 4, ExtentKind::Data)];
    let memory = [1..2_u64, 6..8];
    let queued = |at: u64| {
        let next = memory.iter().find(|range| range.end * BLOCK_SIZE > at);
        next.map_or(u64::MAX..u64::MAX, |range| (range.start * BLOCK_SIZE).max(at)..range.end * BLOCK_SIZE)
    };
    let list = rows(0, u64::MAX, 8 * BLOCK_SIZE, &pieces, queued);
    expect(&list, &[(0, 1, "d100"), (1, 1, "q"), (2, 2, "d102"), (4, 2, "h"), (6, 2, "q")]);
}

#[test]
fn long_list_goes_on_where_it_was_cut() {
    let pieces: Vec<Piece> =
        (0..400).map(|number| piece(2 * number + 1, 7 * number, 1, ExtentKind::Data)).collect();
    let (mut from, mut seen, mut steps) = (0, 0, 0);
    loop {
        let list = rows(from, u64::MAX, 801 * BLOCK_SIZE, &pieces, |_| 0..0);
        assert!(list.rows.len() <= ROWS_PER_STEP);
        assert!(list.rows.iter().all(|row| {
            let follows = row.offset == from;
            from += row.length;
            follows
        }));
        (seen, steps) = (seen + list.rows.len(), steps + 1);
        let Some(next) = list.next else { break };
        assert_eq!(next, from);
    }
    assert_eq!((seen, steps), (801, 2));
}
