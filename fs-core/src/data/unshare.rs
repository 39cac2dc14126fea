//! Blocks of its own for a file that shares them.
//!
//! Owns: [`Shard::unshare`] (`fallocate(2)` with FALLOC_FL_UNSHARE_RANGE, whose allocation of holes is [`super::space`]'s).
//!
//! What is shared is read, verified, written to other blocks, and the file's extents are turned to those; contents, size and times
//! stay. Inode, mmap and range locks are held exclusively, so that what was read still is what is there.
//!
//! # Legal crash outcomes
//! Each block shared or not.

use std::ops::Range;
use std::rc::Rc;

use reactor::block::Durability;

use crate::alloc::Priority;
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::ExtentKind;
use crate::locks::LockOrder;
use crate::namespace::inode::store;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, Generation, InodeNr};

use super::apply::{MmapLock, load_regular};
use super::extent_map::{is_shared, next_extent};
use super::file::{bytes_of, pages_of};
use super::ordered::{INSERTION_ITEMS, NewData, Place};
use super::page::PAGE_SIZE;

/// Extents that a search looks at before it lets others run.
const EXTENTS_PER_VIEW: u32 = 256;

impl Shard {
    /// Gives a file blocks of its own where it shares those of `range`.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] (a part may be done), what the inode is, data that does not match its checksum, failures of the device.
    pub(super) async fn unshare(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<(), FsError> {
        let whole = bytes_of(&pages_of(range));
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        self.apply_pending(inode, &order, MmapLock::Held).await?;
        let _range = self.lock_flushed(inode, &whole, &order).await?;
        let mut from = whole.start;
        while from < whole.end {
            let (shared, looked) = self.view(|batch| next_shared(batch, inode.nr, from..whole.end)).await?;
            from = match shared {
                Some(piece) => self.copy_out(inode.nr, piece).await?,
                None => looked,
            };
            self.ctx.yield_now().await;
        }
        Ok(())
    }

    /// Copies the beginning of a shared piece to blocks of its own. Returns where the rest begins.
    async fn copy_out(&self, inode: InodeNr, piece: Range<u64>) -> Result<u64, FsError> {
        let wanted = ((piece.end - piece.start) / BLOCK_SIZE).min(self.transfer_blocks());
        let mut space = self.reserve(wanted, self.nodes_for(INSERTION_ITEMS), Priority::Normal).await?;
        let mut buffer = self.dma_buffer(wanted).await?;
        let bytes = self.bytes_on_device(inode, &(piece.start..piece.start + wanted * BLOCK_SIZE)).await?;
        let (start, count) = self.alloc.borrow_mut().allocate_data(BlockCount::new(wanted), &mut space);
        let generation = Generation::new(self.epochs.current().get());
        let bytes = &bytes[..(count.get() * BLOCK_SIZE) as usize];
        buffer.shorten(bytes.len());
        buffer.write_at(0, bytes);
        let (written, _buffer) = self.ctx.disk().write(self.lba_of(start), buffer, Durability::Cached).await;
        self.volume.note_data_written();
        let first = piece.start / BLOCK_SIZE;
        let pages = first..first + count.get();
        let checksums = bytes.chunks_exact(PAGE_SIZE).map(crc32c::crc32c).collect();
        let data = NewData { pages: pages.clone(), place: Place::Fresh, start, generation, checksums };
        let mut reached = pages.start;
        let mut outcome = written.map_err(FsError::from);
        let mut space = Some(space);
        while outcome.is_ok() && reached < pages.end {
            let turn = self.insertion_space(space.take()).await;
            let inserted = match turn {
                Ok((mut space, turn)) => {
                    let plan = |batch: &mut Batch<'_>| {
                        let mut record = load_regular(batch, inode)?;
                        let up_to = data.insert(batch, inode, &mut record, reached)?;
                        store(batch, inode, &record);
                        Ok(up_to)
                    };
                    let inserted = self.transact_with(&mut space, plan).await;
                    drop((space, turn));
                    inserted
                }
                Err(error) => Err(error),
            };
            match inserted {
                Ok(up_to) => reached = up_to,
                Err(error) => outcome = Err(error),
            }
        }
        if reached < pages.end {
            self.give_back_blocks(data.block_of(reached), pages.end - reached);
        }
        outcome.map(|()| pages.end * BLOCK_SIZE)
    }
}

/// The first piece of `range` that lies in an extent of data which shares blocks, and how far the search came.
fn next_shared(batch: &Batch<'_>, inode: InodeNr, range: Range<u64>) -> Plan<(Option<Range<u64>>, u64)> {
    let mut from = range.start;
    for _ in 0..EXTENTS_PER_VIEW {
        let mapped = next_extent(batch, inode, from)?.filter(|mapped| mapped.offset < range.end);
        let Some(mapped) = mapped else { return Ok((None, range.end)) };
        if mapped.extent.kind == ExtentKind::Data && is_shared(batch, inode, &mapped)? {
            let piece = mapped.offset.max(from)..mapped.end().min(range.end);
            return Ok((Some(piece), from));
        }
        from = mapped.end();
    }
    Ok((None, from.min(range.end)))
}
