//! Physical region page entries and lists (NVMe 1.4 §4.3): arithmetic only, the caller stores the entries.
//!
//! Invariants:
//! - only the first entry has an offset into its page;
//! - a list fills whole pages, the last entry of each but the last page being the address of the next;
//! - one or two pages of data need no list.

use thiserror::Error;

use crate::planted::{Bug, is_planted};

/// Bytes of a PRP entry.
const ENTRY_BYTES: usize = 8;

/// The data that a command's PRPs describe.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DataPages {
    /// Contiguous device addresses.
    Contiguous {
        /// First byte.
        iova: u64,
    },
    /// One page, over and over: a source of equal bytes.
    Repeated {
        /// The page's address, a multiple of the page size.
        page_iova: u64,
    },
}

/// Preallocated memory for one command's list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListMemory {
    /// Address of the first entry: of a page, or, if less than a page, so that the list lies within one.
    pub(crate) iova: u64,
    /// Bytes: a part of a page, or whole pages.
    pub(crate) bytes: usize,
}

/// The two entries of a submission queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prps {
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
}

/// Why data cannot be described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum PrpError {
    #[error("address {iova:#x} is not dword aligned")]
    Misaligned { iova: u64 },
    #[error("{entries} PRP entries do not fit the list's {bytes} bytes")]
    ListTooShort { entries: usize, bytes: usize },
    #[error("{bytes} bytes at {iova:#x} are empty or wrap around the address space")]
    BadLength { iova: u64, bytes: usize },
}

/// Bytes of list that any transfer of up to `max_bytes` needs, wherever in a page it starts: whole pages, or, where less
/// than a page does, a power of two, so that lists of that size one behind the other cross no page.
pub(crate) const fn list_bytes(max_bytes: usize, page_size: usize) -> usize {
    // An unaligned start adds a page; the first entry sits in the command.
    let bytes = bytes_for_entries(max_bytes.div_ceil(page_size), page_size);
    if bytes < page_size { bytes.next_power_of_two() } else { bytes.next_multiple_of(page_size) }
}

/// Bytes of `entries` list entries with the chain entries between their pages.
const fn bytes_for_entries(entries: usize, page_size: usize) -> usize {
    if entries == 0 {
        return 0;
    }
    let per_page = page_size / ENTRY_BYTES;
    // Each page but the last holds one entry less. A full last page needs no chain.
    let chains = (entries - 1).div_ceil(per_page - 1).saturating_sub(1);
    (entries + chains) * ENTRY_BYTES
}

/// Whether the two entries of a command describe the data without a list.
pub(crate) const fn fits_command(iova: u64, bytes: usize, page_size: usize) -> bool {
    (iova as usize & (page_size - 1)) + bytes <= 2 * page_size
}

/// Describes `bytes` of `data`; `store(index, entry)` puts an entry at the `index`th 8 bytes of `list`.
pub(crate) fn build(
    data: DataPages,
    bytes: usize,
    page_size: usize,
    list: ListMemory,
    mut store: impl FnMut(usize, u64),
) -> Result<Prps, PrpError> {
    let page = page_size as u64;
    let first = match data {
        DataPages::Contiguous { iova } => iova,
        DataPages::Repeated { page_iova } => page_iova,
    };
    if first % 4 != 0 {
        return Err(PrpError::Misaligned { iova: first });
    }
    if bytes == 0 || first.checked_add(bytes as u64).is_none() {
        return Err(PrpError::BadLength { iova: first, bytes });
    }
    let offset = (first & (page - 1)) as usize;
    let touched = (offset + bytes).div_ceil(page_size);
    let page_address = |index: usize| match data {
        DataPages::Contiguous { iova } => (iova & !(page - 1)) + index as u64 * page,
        DataPages::Repeated { page_iova } => page_iova,
    };
    match touched {
        1 => return Ok(Prps { prp1: first, prp2: 0 }),
        2 => {
            let second = if is_planted(Bug::SecondPageIsFirst) { 0 } else { 1 };
            return Ok(Prps { prp1: first, prp2: page_address(second) });
        }
        _ => {}
    }
    let entries = touched - 1;
    if bytes_for_entries(entries, page_size) > list.bytes {
        return Err(PrpError::ListTooShort { entries, bytes: list.bytes });
    }
    let per_page = page_size / ENTRY_BYTES;
    let mut at = 0;
    for index in 1..touched {
        let last_of_page = at % per_page == per_page - 1;
        if last_of_page && index + 1 < touched {
            store(at, list.iova + ((at + 1) * ENTRY_BYTES) as u64);
            at += 1;
        }
        store(at, page_address(if is_planted(Bug::PrpListOffByOne) { index - 1 } else { index }));
        at += 1;
    }
    Ok(Prps { prp1: first, prp2: list.iova })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LIST: u64 = 0x10_0000_0000;

    /// Walks the entries as a controller does (§4.3), independently of the builder.
    fn walk(prps: Prps, list: &BTreeMap<u64, u64>, bytes: usize, page: usize) -> Vec<(u64, usize)> {
        let mut segments = Vec::new();
        let mut left = bytes;
        let first = (page - (prps.prp1 as usize % page)).min(left);
        segments.push((prps.prp1, first));
        left -= first;
        if left == 0 {
            return segments;
        }
        if left <= page {
            assert_eq!(prps.prp2 % page as u64, 0);
            segments.push((prps.prp2, left));
            return segments;
        }
        let mut at = prps.prp2;
        while left > 0 {
            assert_eq!(at % 8, 0);
            let entry = list[&at];
            assert_eq!(entry % page as u64, 0);
            if at as usize % page == page - 8 && left > page {
                at = entry;
                continue;
            }
            let n = left.min(page);
            segments.push((entry, n));
            left -= n;
            at += 8;
        }
        segments
    }

    fn build_and_walk(data: DataPages, bytes: usize, page: usize) -> Vec<(u64, usize)> {
        let memory = ListMemory { iova: LIST, bytes: list_bytes(bytes, page) };
        let mut list = BTreeMap::new();
        let prps = build(data, bytes, page, memory, |index, entry| {
            assert!(index * 8 < memory.bytes, "entry outside the list");
            assert!(list.insert(LIST + index as u64 * 8, entry).is_none(), "entry stored twice");
        })
        .unwrap();
        walk(prps, &list, bytes, page)
    }

    #[test]
    fn up_to_two_pages_store_nothing() {
        let none = ListMemory { iova: 0, bytes: 0 };
        let one = build(DataPages::Contiguous { iova: 0x1000 }, 4096, 4096, none, |_, _| panic!());
        assert_eq!(one, Ok(Prps { prp1: 0x1000, prp2: 0 }));
        let two = build(DataPages::Contiguous { iova: 0x1e00 }, 4096, 4096, none, |_, _| panic!());
        assert_eq!(two, Ok(Prps { prp1: 0x1e00, prp2: 0x2000 }));
    }

    #[test]
    fn a_list_that_ends_with_its_page_is_not_chained() {
        let page = 4096;
        assert_eq!(bytes_for_entries(1, page), 8);
        assert_eq!(bytes_for_entries(512, page), page);
        assert_eq!(bytes_for_entries(513, page), page + 16);
        assert_eq!(bytes_for_entries(511 + 512, page), 2 * page);
        assert_eq!(bytes_for_entries(511 + 513, page), 2 * page + 16);
        for pages in [512, 513, 514, 1023, 1024, 1025, 5000] {
            let segments = build_and_walk(DataPages::Contiguous { iova: 0x8000 }, pages * page, page);
            assert_eq!(segments.len(), pages);
        }
    }

    #[test]
    fn short_lists_are_powers_of_two_and_so_cross_no_page() {
        let page = 65536;
        assert_eq!(list_bytes(1 << 20, page), 128);
        assert_eq!(list_bytes(65536, page), 8);
        assert_eq!(list_bytes(1 << 30, page), 3 * page);
        assert_eq!(list_bytes(1 << 20, 4096), 2048);
        assert_eq!(list_bytes(4 << 20, 4096), 3 * 4096);
    }

    #[test]
    fn two_pages_fit_a_command() {
        assert!(fits_command(0x1000, 8192, 4096));
        assert!(!fits_command(0x1200, 8192, 4096));
        assert!(fits_command(0x1e00, 4608, 4096));
        assert!(fits_command(0x1_3000, 0x1_d000, 0x1_0000));
    }

    #[test]
    fn what_cannot_be_described_is_refused() {
        let none = ListMemory { iova: 0, bytes: 0 };
        let at = |iova, bytes| build(DataPages::Contiguous { iova }, bytes, 4096, none, |_, _| {});
        assert_eq!(at(0x1002, 512), Err(PrpError::Misaligned { iova: 0x1002 }));
        assert_eq!(at(0x1000, 0), Err(PrpError::BadLength { iova: 0x1000, bytes: 0 }));
        assert!(matches!(at(u64::MAX - 4095, 8192), Err(PrpError::BadLength { .. })));
        assert_eq!(at(0x1000, 4096 * 3), Err(PrpError::ListTooShort { entries: 2, bytes: 0 }));
    }

    proptest! {
        #[test]
        fn a_controller_finds_exactly_the_data(
            page_shift in 12usize..17, iova_dwords in 0u64..1 << 20, bytes in 1usize..6 << 20,
        ) {
            let page = 1 << page_shift;
            let iova = 0x4000_0000 + iova_dwords * 4;
            let mut expect = iova;
            for (address, length) in build_and_walk(DataPages::Contiguous { iova }, bytes, page) {
                prop_assert_eq!(address, expect);
                expect += length as u64;
            }
            prop_assert_eq!(expect, iova + bytes as u64);
        }

        #[test]
        fn a_repeated_page_is_never_left(pages in 1usize..1500) {
            let segments = build_and_walk(DataPages::Repeated { page_iova: 0x7000 }, pages * 4096, 4096);
            prop_assert_eq!(segments.len(), pages);
            prop_assert!(segments.iter().all(|&(address, length)| address == 0x7000 && length == 4096));
        }
    }
}
