//! PRP entries and lists, well formed and not.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::dma::{DmaSpace, Payload};

/// Pages of the arena that lists and data are scattered over.
const ARENA_PAGES: u64 = 2048;

/// Builds a transfer as a host would: `len` bytes from `offset` in a first page, later pages scattered, the list
/// beginning `list_slot` entries into its page. Returns the pointer and the addresses of the data in order.
fn build(
    arena: u64,
    memory: &crate::dma::MappedRegion,
    shape: (u32, u64, u64, u64),
    scatter: u64,
) -> (PrpPointer, Vec<(u64, u64)>) {
    let (page_shift, offset, len, list_slot) = shape;
    let page = 1u64 << page_shift;
    let count = (ARENA_PAGES << 12) >> page_shift;
    // An odd multiplier visits every page of the power-of-two arena once.
    let mut taken = 0;
    let mut next_page = || {
        taken += 1;
        assert!(taken <= count, "arena too small for the case");
        arena + ((taken * (2 * scatter + 1)) & (count - 1)) * page
    };
    let first = next_page();
    let mut pieces = vec![(first + offset, len.min(page - offset))];
    let mut rest = len - pieces[0].1;
    let mut pages = Vec::new();
    while rest > 0 {
        let at = next_page();
        pages.push(at);
        pieces.push((at, rest.min(page)));
        rest -= rest.min(page);
    }
    let prp2 = match pages.len() {
        0 => 0,
        1 => pages[0],
        _ => {
            let list = next_page() + list_slot * 8;
            let mut at = list;
            for (i, entry) in pages.iter().enumerate() {
                let last_slot = (at + 8) & (page - 1) == 0;
                if last_slot && i + 1 < pages.len() {
                    let chained = next_page();
                    memory.slice().write_obj(chained, (at - arena) as usize).unwrap();
                    at = chained;
                }
                memory.slice().write_obj(*entry, (at - arena) as usize).unwrap();
                at += 8;
            }
            list
        }
    };
    (PrpPointer { prp1: pieces[0].0, prp2, page_shift }, pieces)
}

fn shape() -> impl Strategy<Value = (u32, u64, u64, u64)> {
    (12u32..=14).prop_flat_map(|shift| {
        let page = 1u64 << shift;
        let len = prop_oneof![1..3 * page, 1..300 * page].prop_map(|len| len.next_multiple_of(4));
        let slot = prop_oneof![Just(0), Just(page / 8 - 1), 0..page / 8];
        (Just(shift), (0..page / 4).prop_map(|dword| dword * 4), len, slot)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn walk_yields_the_bytes_the_host_laid_out(shape in shape(), scatter in 0u64..512) {
        let space = DmaSpace::new();
        let memory = space.map((ARENA_PAGES << 12) as usize).unwrap();
        let (pointer, pieces) = build(memory.iova(), &memory, shape, scatter);
        let mut view = space.view();
        let mut list = SegmentList::default();
        prop_assert_eq!(walk(pointer, shape.2, DmaDirection::ToHost, &mut view, &mut list), Ok(()));
        let bytes: Vec<u8> = (0..shape.2).map(|i| (i % 251) as u8).collect();
        let payload = Payload::new(&view, &list);
        prop_assert_eq!(payload.len() as u64, shape.2);
        payload.cursor().put(&bytes);
        let mut found = Vec::new();
        for (at, len) in pieces {
            let mut piece = vec![0; len as usize];
            memory.slice().read_slice(&mut piece, (at - memory.iova()) as usize).unwrap();
            found.extend(piece);
        }
        prop_assert!(found == bytes);
        prop_assert_eq!(space.fault_count(), 0);
    }

    #[test]
    fn arbitrary_pointers_and_lists_never_escape_the_mapping(
        prp1 in any::<u64>(), prp2 in any::<u64>(), len in 1u64..1 << 22, words in prop::collection::vec(any::<u64>(), 512)
    ) {
        let space = DmaSpace::new();
        let memory = space.map(4 * 4096).unwrap();
        let inside = |word: u64| if word & 1 == 0 { memory.iova() + (word >> 1) % (4 * 4096) } else { word };
        for (i, word) in words.into_iter().enumerate() {
            memory.slice().write_obj(inside(word) & !0xfff, i * 8).unwrap();
        }
        let pointer = PrpPointer { prp1: inside(prp1), prp2: inside(prp2), page_shift: 12 };
        let mut view = space.view();
        let mut list = SegmentList::default();
        match walk(pointer, len, DmaDirection::FromHost, &mut view, &mut list) {
            Ok(()) => prop_assert_eq!(Payload::new(&view, &list).len() as u64, len),
            Err(code) => {
                prop_assert!(matches!(code, StatusCode::PRP_OFFSET_INVALID | StatusCode::DATA_TRANSFER_ERROR));
            }
        }
    }
}
