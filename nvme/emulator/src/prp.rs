//! Walking Physical Region Pages (§4.3): from a command's data pointer to pieces of mapped memory.
//!
//! Invariants: the list that is filled has exactly the bytes asked for, or the walk fails with the status the
//! specification names; nothing is transferred by a failed walk. Each entry is read once.
//!
//! Excludes: SGLs (`sgl`), the transfer.

use nvme_spec::StatusCode;

use crate::dma::{DmaDirection, DmaView, SegmentList, Unmapped};

/// Bytes of a PRP entry.
const ENTRY: u64 = 8;
/// Entries of a list read at a time.
const BATCH: usize = 64;

impl From<Unmapped> for StatusCode {
    fn from(_: Unmapped) -> Self {
        Self::DATA_TRANSFER_ERROR
    }
}

/// What a command's data pointer is to be resolved with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrpPointer {
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
    /// Bytes of a memory page as a power of two: 12 + CC.MPS.
    pub(crate) page_shift: u32,
}

/// Resolves `len` bytes into `list`, which is cleared first.
#[inline]
pub(crate) fn walk(
    pointer: PrpPointer,
    len: u64,
    direction: DmaDirection,
    view: &mut DmaView,
    list: &mut SegmentList,
) -> Result<(), StatusCode> {
    list.clear();
    let page = 1u64 << pointer.page_shift;
    let offset = pointer.prp1 & (page - 1);
    if offset & 3 != 0 {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    let first = (page - offset).min(len);
    list.push(view.resolve(pointer.prp1, first, direction)?, first as usize);
    let rest = len - first;
    if rest == 0 {
        return Ok(());
    }
    if rest <= page {
        return push_page(pointer.prp2, rest, page, direction, view, list);
    }
    walk_list(pointer.prp2, rest, page, direction, view, list)
}

fn push_page(
    entry: u64,
    len: u64,
    page: u64,
    direction: DmaDirection,
    view: &mut DmaView,
    list: &mut SegmentList,
) -> Result<(), StatusCode> {
    if entry & (page - 1) != 0 {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    list.push(view.resolve(entry, len, direction)?, len as usize);
    Ok(())
}

/// Walks a chain of lists. The first may begin anywhere in its page, later ones at the start of theirs; the last slot
/// of a page is the next list's address exactly if more than one entry is still needed there.
fn walk_list(
    mut at: u64,
    mut rest: u64,
    page: u64,
    direction: DmaDirection,
    view: &mut DmaView,
    list: &mut SegmentList,
) -> Result<(), StatusCode> {
    if at & (ENTRY - 1) != 0 {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    let mut bytes = [0u8; BATCH * ENTRY as usize];
    // Ends: each round consumes data, or follows a chain to a page whose first slot is then a data entry.
    while rest > 0 {
        let slots = (page - (at & (page - 1))) / ENTRY;
        let needed = rest.div_ceil(page);
        let chained = needed > slots;
        let mut data_slots = if chained { slots - 1 } else { needed };
        while data_slots > 0 {
            let batch = data_slots.min(BATCH as u64);
            let raw = &mut bytes[..(batch * ENTRY) as usize];
            view.read(at, raw)?;
            for entry in raw.chunks_exact(ENTRY as usize) {
                let len = rest.min(page);
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight"));
                push_page(entry, len, page, direction, view, list)?;
                rest -= len;
            }
            at += batch * ENTRY;
            data_slots -= batch;
        }
        if chained {
            let mut next = [0u8; ENTRY as usize];
            view.read(at, &mut next)?;
            at = u64::from_le_bytes(next);
            if at & (page - 1) != 0 {
                return Err(StatusCode::PRP_OFFSET_INVALID);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
