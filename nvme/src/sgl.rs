//! Scatter gather lists (NVMe 1.4 §4.4): arithmetic only, the caller stores the descriptors.
//!
//! Invariants:
//! - one contiguous piece of data is one data block descriptor in the command, and needs no memory;
//! - more pieces fill segments one behind the other in the list's memory; the last descriptor of each but the last
//!   segment leads to the next one, and a segment never crosses [`SEGMENT_BYTES`];
//! - no descriptor has a length of zero.
//!
//! Excludes: bit buckets, keyed and transport descriptors, metadata.

use nvme_spec::SglDescriptor;
use nvme_spec::identify::{SglSupport, Sgls};
use nvme_spec::sgl::SGL_DESCRIPTOR_BYTES;
use thiserror::Error;

/// Bytes of a full segment: a page, since some controllers fetch no more at once.
pub(crate) const SEGMENT_BYTES: usize = 4096;
const PER_SEGMENT: usize = SEGMENT_BYTES / SGL_DESCRIPTOR_BYTES;

/// How a queue's commands point to their data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPointers {
    /// PRPs where the command holds them; an SGL in place of a PRP list where the controller takes SGLs.
    Automatic,
    /// PRPs, with a list where there are more than two.
    Prp,
    /// SGLs. The queue cannot be created if the controller takes none.
    Sgl,
}

/// [`DataPointers`] with what the controller offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pointing {
    Prp,
    SglForLists(SglAlignment),
    Sgl(SglAlignment),
}

impl Pointing {
    /// `None` if SGLs are asked for and the controller takes none.
    pub(crate) fn choose(wanted: DataPointers, sgls: Sgls) -> Option<Self> {
        match (wanted, SglAlignment::offered(sgls)) {
            (DataPointers::Prp, _) | (DataPointers::Automatic, None) => Some(Self::Prp),
            (DataPointers::Automatic, Some(alignment)) => Some(Self::SglForLists(alignment)),
            (DataPointers::Sgl, offered) => offered.map(Self::Sgl),
        }
    }
}

/// A contiguous piece of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Address for the device of the first byte.
    pub(crate) iova: u64,
    pub(crate) bytes: u32,
}

/// Preallocated memory for one command's segments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentMemory {
    /// Address of the first segment, a multiple of [`SEGMENT_BYTES`].
    pub(crate) iova: u64,
    /// Bytes.
    pub(crate) bytes: usize,
}

/// Alignment that a controller wants of data block addresses and lengths (SGLS bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SglAlignment {
    Byte,
    Dword,
}

impl SglAlignment {
    /// What the controller offers; `None` if it takes no SGLs, or says what the specification does not know.
    pub(crate) fn offered(sgls: Sgls) -> Option<Self> {
        match SglSupport(sgls.support()) {
            SglSupport::BYTE => Some(Self::Byte),
            SglSupport::DWORD => Some(Self::Dword),
            _ => None,
        }
    }

    fn mask(self) -> u64 {
        match self {
            Self::Byte => 0,
            Self::Dword => 3,
        }
    }
}

/// Why data cannot be described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum SglError {
    #[error("{bytes} bytes at {iova:#x} are not dword aligned")]
    Misaligned { iova: u64, bytes: u32 },
    #[error("{bytes} bytes at {iova:#x} are empty or wrap around the address space")]
    BadLength { iova: u64, bytes: u32 },
    #[error("{pieces} pieces do not fit {bytes} bytes of segments")]
    ListTooShort { pieces: usize, bytes: usize },
    #[error("there is no data")]
    Empty,
}

/// Bytes of segments that `pieces` pieces need.
pub(crate) const fn list_bytes(pieces: usize) -> usize {
    if pieces <= 1 {
        return 0;
    }
    (pieces + links(pieces)) * SGL_DESCRIPTOR_BYTES
}

/// Descriptors that lead from segment to segment. A full last segment needs none.
const fn links(pieces: usize) -> usize {
    // Each segment but the last holds one piece less than descriptors.
    (pieces - 1).div_ceil(PER_SEGMENT - 1).saturating_sub(1)
}

/// Describes `pieces`, of which there are `count`; `store(index, descriptor)` puts a descriptor at the `index`th 16 bytes
/// of `list`. Returns the descriptor for the command itself.
pub(crate) fn build(
    count: usize,
    pieces: impl Iterator<Item = Piece>,
    alignment: SglAlignment,
    list: SegmentMemory,
    mut store: impl FnMut(usize, SglDescriptor),
) -> Result<SglDescriptor, SglError> {
    if count == 0 {
        return Err(SglError::Empty);
    }
    if list_bytes(count) > list.bytes {
        return Err(SglError::ListTooShort { pieces: count, bytes: list.bytes });
    }
    let total = if count == 1 { 1 } else { count + links(count) };
    let mut at = 0;
    let mut single = None;
    for piece in pieces.take(count) {
        let descriptor = check(piece, alignment)?;
        if count == 1 {
            single = Some(descriptor);
            break;
        }
        let last_of_segment = at % PER_SEGMENT == PER_SEGMENT - 1;
        if last_of_segment && at + 1 < total {
            store(at, segment(at + 1, total, list.iova));
            at += 1;
        }
        store(at, descriptor);
        at += 1;
    }
    Ok(single.unwrap_or_else(|| segment(0, total, list.iova)))
}

/// The descriptor of the segment that begins with the `first`th of `total` descriptors.
fn segment(first: usize, total: usize, list_iova: u64) -> SglDescriptor {
    let left = total - first;
    let address = list_iova + (first * SGL_DESCRIPTOR_BYTES) as u64;
    let bytes = |descriptors: usize| (descriptors * SGL_DESCRIPTOR_BYTES) as u32;
    if left <= PER_SEGMENT {
        SglDescriptor::last_segment(address, bytes(left))
    } else {
        SglDescriptor::segment(address, bytes(PER_SEGMENT))
    }
}

fn check(piece: Piece, alignment: SglAlignment) -> Result<SglDescriptor, SglError> {
    let Piece { iova, bytes } = piece;
    if bytes == 0 || iova.checked_add(u64::from(bytes)).is_none() {
        return Err(SglError::BadLength { iova, bytes });
    }
    if (iova | u64::from(bytes)) & alignment.mask() != 0 {
        return Err(SglError::Misaligned { iova, bytes });
    }
    Ok(SglDescriptor::data_block(iova, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::sgl::SglType;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LIST: u64 = 0x20_0000_0000;

    /// Walks the descriptors as a controller does (§4.4), independently of the builder.
    fn walk(first: SglDescriptor, list: &BTreeMap<u64, SglDescriptor>) -> Vec<(u64, u32)> {
        let mut found = Vec::new();
        let mut next = Some(first);
        while let Some(descriptor) = next.take() {
            let (address, length) = (descriptor.address.get(), descriptor.length.get());
            match descriptor.kind() {
                SglType::DATA_BLOCK => found.push((address, length)),
                kind @ (SglType::SEGMENT | SglType::LAST_SEGMENT) => {
                    assert!(length > 0 && length % 16 == 0 && address % 8 == 0);
                    assert_eq!(address / 4096, (address + u64::from(length) - 1) / 4096, "crosses a page");
                    let count = u64::from(length) / 16;
                    for n in 0..count {
                        let inner = list[&(address + 16 * n)];
                        if inner.kind() == SglType::DATA_BLOCK {
                            found.push((inner.address.get(), inner.length.get()));
                        } else {
                            assert_eq!(kind, SglType::SEGMENT, "the last segment leads nowhere");
                            assert_eq!(n, count - 1, "only the last descriptor leads on");
                            next = Some(inner);
                        }
                    }
                    assert_eq!(kind == SglType::SEGMENT, next.is_some());
                }
                other => panic!("{other}"),
            }
        }
        found
    }

    fn build_and_walk(pieces: &[Piece]) -> Vec<(u64, u32)> {
        let memory = SegmentMemory { iova: LIST, bytes: list_bytes(pieces.len()) };
        let mut list = BTreeMap::new();
        let pieces = (pieces.len(), pieces.iter().copied());
        let first = build(pieces.0, pieces.1, SglAlignment::Dword, memory, |index, descriptor| {
            assert!((index + 1) * 16 <= memory.bytes, "descriptor outside the list");
            assert!(list.insert(LIST + index as u64 * 16, descriptor).is_none(), "stored twice");
        });
        assert_eq!(list.len() * 16, memory.bytes, "all memory asked for is used");
        walk(first.unwrap(), &list)
    }

    fn pieces(count: usize) -> Vec<Piece> {
        (0..count).map(|n| Piece { iova: 0x1000 + n as u64 * 0x3000, bytes: 512 + 4 * n as u32 }).collect()
    }

    #[test]
    fn one_piece_sits_in_the_command() {
        let none = SegmentMemory { iova: 0, bytes: 0 };
        let piece = Piece { iova: 0x1200, bytes: 1 << 20 };
        let built = build(1, [piece].into_iter(), SglAlignment::Dword, none, |_, _| panic!());
        assert_eq!(built, Ok(SglDescriptor::data_block(0x1200, 1 << 20)));
    }

    #[test]
    fn segments_chain_exactly_where_a_page_is_full() {
        for count in [2, 255, 256, 257, 510, 511, 512, 513, 766, 767, 768, 3000] {
            let pieces = pieces(count);
            let expected: Vec<_> = pieces.iter().map(|piece| (piece.iova, piece.bytes)).collect();
            assert_eq!(build_and_walk(&pieces), expected, "{count} pieces");
        }
        assert_eq!(list_bytes(256), 4096);
        assert_eq!(list_bytes(257), 4096 + 2 * 16);
        assert_eq!(list_bytes(511), 8192);
    }

    #[test]
    fn what_cannot_be_described_is_refused() {
        let list = SegmentMemory { iova: LIST, bytes: 64 };
        let one = |iova, bytes, alignment| {
            build(1, [Piece { iova, bytes }].into_iter(), alignment, list, |_, _| {}).map(|_| ())
        };
        assert_eq!(
            one(0x1001, 512, SglAlignment::Dword),
            Err(SglError::Misaligned { iova: 0x1001, bytes: 512 })
        );
        assert_eq!(
            one(0x1000, 510, SglAlignment::Dword),
            Err(SglError::Misaligned { iova: 0x1000, bytes: 510 })
        );
        assert_eq!(one(0x1001, 511, SglAlignment::Byte), Ok(()));
        assert_eq!(one(0, 0, SglAlignment::Byte), Err(SglError::BadLength { iova: 0, bytes: 0 }));
        assert!(matches!(one(u64::MAX - 3, 4, SglAlignment::Byte), Err(SglError::BadLength { .. })));
        let many = build(5, pieces(5).into_iter(), SglAlignment::Dword, list, |_, _| {});
        assert_eq!(many, Err(SglError::ListTooShort { pieces: 5, bytes: 64 }));
        let empty = build(0, std::iter::empty(), SglAlignment::Dword, list, |_, _| {});
        assert_eq!(empty, Err(SglError::Empty));
    }

    #[test]
    fn nonsense_in_sgls_is_no_support() {
        let offered = |bits: u32| SglAlignment::offered(Sgls::from(bits));
        assert_eq!(offered(0), None);
        assert_eq!(offered(1), Some(SglAlignment::Byte));
        assert_eq!(offered(2), Some(SglAlignment::Dword));
        assert_eq!(offered(u32::MAX), None);
    }

    proptest! {
        #[test]
        fn a_controller_finds_exactly_the_pieces(
            pieces in prop::collection::vec((0u64..1 << 40, 1u32..1 << 20), 1..1200),
        ) {
            let pieces: Vec<Piece> =
                pieces.iter().map(|&(dwords, n)| Piece { iova: dwords * 4, bytes: n * 4 }).collect();
            let expected: Vec<_> = pieces.iter().map(|piece| (piece.iova, piece.bytes)).collect();
            prop_assert_eq!(build_and_walk(&pieces), expected);
        }
    }
}
