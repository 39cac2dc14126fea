//! How a file lies on the device, piece by piece: what FIEMAP tells of other file systems.
//!
//! Owns: [`Shard::list_extents`], a bounded part of the list of a file on a mount, and [`rows`], which makes rows of
//! extents, holes between them, and what waits in memory. `crate::dump` uses it for volumes that are not mounted.
//!
//! Invariants: rows follow each other without gap or overlap, in whole blocks, up to the end of the file or of its last
//! extent; a step takes a bounded time and gives a bounded answer whatever the file looks like.
//!
//! Between two steps the file may change: the list is right for each step, as of its time.
//!
//! Excludes: counting alone (`space.rs`).

use std::ops::Range;
use std::rc::Rc;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::ExtentKind;
use crate::locks::LockOrder;
use crate::request::{ExtentList, ExtentRow, ExtentState, Sharing};
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, FileOffset, InodeNr};

use super::apply::load_regular;
use super::extent_map::{Mapped, next_extent, sharing};
use super::space::next_in_memory;

/// Extents that one step looks at.
const EXTENTS_PER_STEP: usize = 128;

/// Rows of one step at most.
pub const ROWS_PER_STEP: usize = 512;

/// An extent and with whom it shares its blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) mapped: Mapped,
    pub(crate) sharing: Sharing,
}

impl Shard {
    /// Lists a file from `offset` on.
    ///
    /// # Errors
    /// What the inode is; damage; failures of the device.
    pub(crate) async fn list_extents(
        self: &Rc<Self>,
        nr: InodeNr,
        offset: FileOffset,
    ) -> Result<ExtentList, FsError> {
        let inode = self.inode(nr);
        let listed = self.list_extents_of(&inode, offset.get()).await;
        drop(inode);
        self.release_inode(nr);
        listed
    }

    async fn list_extents_of(&self, inode: &Rc<Inode>, offset: u64) -> Result<ExtentList, FsError> {
        let from = offset - offset % BLOCK_SIZE;
        let _range = inode.ranges.shared(from..u64::MAX, &mut LockOrder::new()).await;
        let (size, pieces) = self.view(|batch| some_pieces(batch, inode.nr, from)).await?;
        let size = inode.data.borrow().size(size);
        let known = match pieces.last() {
            Some(last) if pieces.len() == EXTENTS_PER_STEP => last.mapped.end(),
            _ => u64::MAX,
        };
        Ok(rows(from, known, size, &pieces, |at| next_in_memory(inode, at)))
    }
}

/// The size on the device, and up to [`EXTENTS_PER_STEP`] extents from `from` on.
fn some_pieces(batch: &Batch<'_>, inode: InodeNr, from: u64) -> Plan<(u64, Vec<Piece>)> {
    let size = load_regular(batch, inode)?.size;
    let (mut pieces, mut at) = (Vec::new(), from);
    while pieces.len() < EXTENTS_PER_STEP {
        let Some(mapped) = next_extent(batch, inode, at)? else { break };
        at = mapped.end();
        pieces.push(Piece { sharing: sharing(batch, inode, &mapped)?, mapped });
    }
    Ok((size, pieces))
}

/// The rows from `from` on, of a file of `size` bytes. `pieces` are all its extents that end behind `from` and begin before
/// `known`; `queued` tells the first range in memory that ends behind an offset, from the offset on.
pub(crate) fn rows(
    from: u64,
    known: u64,
    size: u64,
    pieces: &[Piece],
    queued: impl Fn(u64) -> Range<u64>,
) -> ExtentList {
    let mut list = ExtentList::default();
    let mut pieces = pieces.iter().peekable();
    let whole_size = size.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE);
    let mut at = from;
    while at < known {
        while pieces.next_if(|piece| piece.mapped.end() <= at).is_some() {}
        let (piece, memory) = (pieces.peek(), queued(at));
        let nothing_left = piece.is_none() && memory.start >= memory.end;
        if nothing_left && at >= whole_size {
            return list;
        }
        if list.rows.len() == ROWS_PER_STEP {
            break;
        }
        let next_memory = if memory.start < memory.end { memory.start } else { u64::MAX };
        let (end, state) = match piece {
            _ if next_memory <= at => (memory.end, ExtentState::Queued),
            Some(piece) if piece.mapped.offset <= at => {
                (piece.mapped.end().min(next_memory), piece.state(at))
            }
            Some(piece) => (piece.mapped.offset.min(next_memory), ExtentState::Hole),
            None if next_memory < u64::MAX => (next_memory, ExtentState::Hole),
            None => (whole_size, ExtentState::Hole),
        };
        let end = end.min(known);
        list.rows.push(ExtentRow { offset: at, length: end - at, state });
        at = end;
    }
    list.next = Some(at);
    list
}

impl Piece {
    /// What the extent is from `at` on, an offset within it.
    fn state(&self, at: u64) -> ExtentState {
        let extent = &self.mapped.extent;
        let start = extent.start.get().saturating_mul(BLOCK_SIZE);
        let physical = start.saturating_add(at - self.mapped.offset);
        match extent.kind {
            ExtentKind::Data => ExtentState::Data { physical, sharing: self.sharing },
            ExtentKind::Preallocated => ExtentState::Preallocated { physical, sharing: self.sharing },
        }
    }
}

#[cfg(test)]
mod tests;
