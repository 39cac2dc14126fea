//! Lists of any shape, built as a host would and checked byte by byte.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::dma::{DmaSpace, MappedRegion, Payload};

/// Bytes of the arena: data in the first half, lists in the second.
const ARENA: usize = 4 << 20;

/// One piece of a transfer: bytes, the gap before it in memory, and whether it is dropped.
type Piece = (u32, u64, bool);

fn raw(identifier: u8, address: u64, len: u32) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[15] = identifier;
    raw
}

/// Writes the descriptors as a chain of segments of the given lengths, the last of which takes the rest; returns the
/// descriptor for the command.
fn chain(memory: &MappedRegion, data: &[[u8; 16]], segments: &[usize]) -> [u8; 16] {
    let mut groups = Vec::new();
    let mut rest = data;
    for len in segments {
        let (now, later) = rest.split_at((*len).min(rest.len()));
        groups.push(now.to_vec());
        rest = later;
    }
    groups.push(rest.to_vec());
    let mut at = ARENA;
    let mut next: Option<[u8; 16]> = None;
    // From the last to the first, as each names the one after it.
    for group in groups.into_iter().rev().filter(|group| !group.is_empty()) {
        let last = next.is_none();
        let list: Vec<_> = group.into_iter().chain(next).collect();
        at -= list.len() * 16;
        for (i, raw) in list.iter().enumerate() {
            memory.slice().write_slice(raw, at + i * 16).unwrap();
        }
        let identifier = if last { 0x30 } else { 0x20 };
        next = Some(raw(identifier, memory.iova() + at as u64, list.len() as u32 * 16));
    }
    next.unwrap()
}

fn command(first: [u8; 16]) -> SubmissionEntry {
    let mut entry = SubmissionEntry::default();
    entry.flags.set_psdt(1);
    entry.as_mut_bytes()[SGL1].copy_from_slice(&first);
    entry
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = (prop_oneof![Just(0u32), 1..5000u32], 0..64u64, prop::bool::weighted(0.2));
    prop::collection::vec(piece, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn lists_of_any_shape_put_every_byte_in_its_place(
        pieces in pieces(),
        segments in prop::collection::vec(1..40usize, 0..6),
    ) {
        let space = DmaSpace::new();
        let memory = space.map(ARENA).unwrap();
        let mut at = 0;
        let mut descriptors = Vec::new();
        let mut expected = Vec::new();
        for (len, gap, dropped) in &pieces {
            at += gap;
            if *dropped {
                descriptors.push(raw(0x10, 0xdead, *len));
            } else {
                descriptors.push(raw(0x00, memory.iova() + at, *len));
            }
            expected.push((at as usize, *len as usize, *dropped));
            at += u64::from(*len);
        }
        let total: usize = expected.iter().map(|(_, len, _)| len).sum();
        let entry = command(chain(&memory, &descriptors, &segments));
        let (mut view, mut list) = (space.view(), SegmentList::default());
        let mut resolve = |len: usize, list: &mut SegmentList| {
            walk(&entry, SglSupport::Byte, len as u64, DmaDirection::ToHost, &mut view, list)
        };
        prop_assert_eq!(resolve(total + 1, &mut list), Err(StatusCode::DATA_SGL_LENGTH_INVALID));
        if total > 0 {
            prop_assert_eq!(resolve(total - 1, &mut list), Err(StatusCode::DATA_SGL_LENGTH_INVALID));
        }
        prop_assert_eq!(resolve(total, &mut list), Ok(()));
        let data: Vec<u8> = (0..total).map(|i| (i % 251) as u8 + 1).collect();
        Payload::new(&view, &list).cursor().put(&data);
        let mut arena = vec![0; at as usize];
        memory.slice().read_slice(&mut arena, 0).unwrap();
        let mut from = 0;
        let mut touched = vec![false; at as usize];
        for (place, len, dropped) in expected {
            if !dropped {
                prop_assert_eq!(&arena[place..place + len], &data[from..from + len]);
                touched[place..place + len].fill(true);
            }
            from += len;
        }
        prop_assert!(arena.iter().zip(touched).all(|(byte, touched)| touched || *byte == 0));
        prop_assert_eq!(space.fault_count(), 0);
    }

    #[test]
    fn descriptors_of_random_bytes_end_in_a_status(bytes in prop::collection::vec(any::<u8>(), 16 * 32)) {
        let space = DmaSpace::new();
        let memory = space.map(4096).unwrap();
        memory.slice().write_slice(&bytes, 0).unwrap();
        let (mut view, mut list) = (space.view(), SegmentList::default());
        for identifier in [bytes[0], 0x20, 0x30] {
            let entry = command(raw(identifier, memory.iova(), 16 * 32));
            for direction in [DmaDirection::ToHost, DmaDirection::FromHost] {
                let done = walk(&entry, SglSupport::Byte, 4096, direction, &mut view, &mut list);
                prop_assert!(done.is_err() || list.bytes() == 4096);
            }
        }
    }
}
