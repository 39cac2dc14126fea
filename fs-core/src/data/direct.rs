//! Direct writes: from the caller's bytes to the device, past the page cache and the delalloc queue.
//!
//! Owns: [`Shard::write_direct`] (a write with `O_DIRECT`). Direct reads are in [`super::read`].
//!
//! | step | holds | what |
//! |---|---|---|
//! | 1 | nothing | space is reserved, the bytes are copied to DMA memory and their checksums computed |
//! | 2 | inode lock S; X if the write ends behind the file, or anything queued or dirty lies in its range | X: that is applied and written back first; then down to S if the file does not grow |
//! | 3 | and range X | looked at again, for writes through mappings; the device writes to blocks that nothing refers to |
//! | 4 | the same | one or more transactions insert the extent, with size and times; pages of the range are dropped |
//!
//! So direct writes within a file go side by side, and readers see a block as it was before or after, never its write.
//! The owned copy is what is checked: a program that changes its buffer meanwhile cannot make checksum and block differ.
//!
//! What is not of whole blocks goes the way of other writes, and is written back before it is answered.
//!
//! # Legal crash outcomes
//! Those of write-back: each block old or new. Preallocated blocks are written in their place, and read as zeroes until the
//! transaction that gives them checksums.

use std::ops::Range;
use std::rc::Rc;

use reactor::DmaBuffer;
use reactor::block::Durability;

use crate::alloc::{Priority, Reservation};
use crate::error::FsError;
use crate::locks::{InodeGuard, LockOrder, RangeGuard};
use crate::namespace::inode::{store, without_privileges};
use crate::request::{KillPrivileges, WriteSource};
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, FileOffset, Generation, InodeNr};

use super::apply::{MmapLock, load_regular};
use super::file::{bytes_of, pages_of};
use super::ordered::{INSERTION_ITEMS, NewData, Place, Target, find_target};
use super::page::PAGE_SIZE;
use super::queue::WriteParts;
use super::space::is_preallocated;

/// Times that what was written through a mapping meanwhile is written back, before the write goes the way of others.
const SETTLE_ROUNDS: u32 = 8;

/// Whole blocks to be written.
struct Piece {
    pages: Range<u64>,
    space: Reservation,
    buffer: DmaBuffer,
    checksums: Vec<u32>,
    kill_privileges: KillPrivileges,
}

impl Shard {
    /// Writes `data` and answers when the device has it. A short write has met an error behind what it has written.
    ///
    /// # Errors
    /// [`FsError::FileTooLarge`], [`FsError::NoSpace`], what the inode is, failures of the device.
    pub(crate) async fn write_direct(
        self: &Rc<Self>,
        nr: InodeNr,
        offset: FileOffset,
        data: Box<[u8]>,
        kill_privileges: KillPrivileges,
    ) -> Result<u32, FsError> {
        let source = WriteSource::Call;
        WriteParts { inode: nr, offset, data: &data, source, kill_privileges }.check()?;
        let length = u32::try_from(data.len()).map_err(|_| FsError::Invalid)?;
        self.view(|batch| load_regular(batch, nr)).await?;
        let (start, whole) = (offset.get(), PAGE_SIZE as u32);
        let inode = self.inode(nr);
        let outcome = if start.is_multiple_of(BLOCK_SIZE) && length.is_multiple_of(whole) {
            self.write_blocks(&inode, start, &data, kill_privileges).await
        } else {
            self.write_through(&inode, start, data, kill_privileges).await
        };
        drop(inode);
        self.release_inode(nr);
        outcome
    }

    /// Writes through the page cache and writes that back.
    async fn write_through(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        start: u64,
        data: Box<[u8]>,
        kill_privileges: KillPrivileges,
    ) -> Result<u32, FsError> {
        let offset = FileOffset::new(start);
        let written = self.write_slow(inode.nr, offset, data, WriteSource::Call, kill_privileges).await?;
        self.flush_inode(inode, start..start + u64::from(written)).await?;
        Ok(written)
    }

    async fn write_blocks(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        start: u64,
        data: &[u8],
        kill_privileges: KillPrivileges,
    ) -> Result<u32, FsError> {
        let mut written = 0;
        while written < data.len() {
            let rest = &data[written..];
            let rest = &rest[..rest.len().min(self.transfer_blocks() as usize * PAGE_SIZE)];
            match self.write_piece_direct(inode, start + written as u64, rest, kill_privileges).await {
                Ok(bytes) => written += bytes,
                Err(_) if written > 0 => break, // the next write gets the error
                Err(error) => return Err(error),
            }
        }
        Ok(written as u32)
    }

    /// Writes the beginning of `data`, at least a block of it; returns the bytes.
    async fn write_piece_direct(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        start: u64,
        data: &[u8],
        kill_privileges: KillPrivileges,
    ) -> Result<usize, FsError> {
        self.volume.check_writable()?;
        let range = start..start + data.len() as u64;
        let space = self.direct_space(inode, &range).await?;
        let mut buffer = self.dma_buffer(data.len() as u64 / BLOCK_SIZE).await?;
        buffer.write_at(0, data);
        let checksums = data.chunks_exact(PAGE_SIZE).map(crc32c::crc32c).collect();
        let piece = Piece { pages: pages_of(&range), space, buffer, checksums, kill_privileges };
        let Some((lock, guard)) = self.lock_for_direct(inode, &range).await? else {
            drop(piece);
            let written = self.write_through(inode, start, data.into(), kill_privileges).await?;
            return Ok(written as usize);
        };
        let end = self.put_on_device(inode, piece).await?;
        drop((guard, lock));
        Ok((end - start) as usize)
    }

    /// Blocks for the whole range and nodes for one transaction; into preallocated blocks, only the nodes.
    async fn direct_space(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<Reservation, FsError> {
        let blocks = (range.end - range.start) / BLOCK_SIZE;
        let nodes = self.nodes_for(INSERTION_ITEMS);
        if let Some(space) = self.counter.reserve(blocks, nodes, Priority::Normal) {
            return Ok(space);
        }
        // What other accepted writes have reserved and will not need is given back when they are written.
        let _noted = self.flush_all().await;
        match self.reserve(blocks, nodes, Priority::Normal).await {
            Err(FsError::NoSpace) => {}
            other => return other,
        }
        if !self.view(|batch| is_preallocated(batch, inode.nr, range)).await? {
            return Err(FsError::NoSpace);
        }
        self.reserve(0, nodes, Priority::Reserve).await
    }

    /// Takes the locks of steps 2 and 3 at a moment at which the extents of `range` say all that was written there. `None`
    /// if that moment does not come.
    async fn lock_for_direct(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<Option<(InodeGuard, RangeGuard)>, FsError> {
        let mut order = LockOrder::new();
        let mut lock = inode.lock.shared(&mut order).await;
        if inode.is_written_to(range) || range.end > self.visible_size(inode.nr).await? {
            drop(lock);
            order = LockOrder::new();
            lock = inode.lock.exclusive(&mut order).await;
            self.drain();
            self.apply_pending(inode, &order, MmapLock::Free).await?;
            self.flush_range(inode, range).await?;
            if range.end <= self.visible_size(inode.nr).await? {
                lock.downgrade();
            }
        }
        for _ in 0..SETTLE_ROUNDS {
            let guard = inode.ranges.exclusive(range.clone(), &mut order.clone()).await;
            if inode.is_settled(range) {
                return Ok(Some((lock, guard)));
            }
            drop(guard);
            self.flush_range(inode, range).await?;
        }
        Ok(None)
    }

    /// Steps 3 and 4 for as much of the piece as can lie together; returns where that ends, in bytes.
    async fn put_on_device(&self, inode: &Rc<Inode>, piece: Piece) -> Result<u64, FsError> {
        let Piece { pages, mut space, mut buffer, checksums, kill_privileges } = piece;
        let target = self.view(|batch| find_target(batch, inode.nr, &pages)).await?;
        let data = self.place(&pages, target, checksums, &mut space)?;
        buffer.shorten((data.pages.end - data.pages.start) as usize * PAGE_SIZE);
        let (written, buffer) =
            self.ctx.disk().write(self.lba_of(data.start), buffer, Durability::Cached).await;
        drop(buffer);
        self.volume.note_data_written();
        let inserted = match written {
            Ok(()) => self.insert_direct(inode, &data, space, kill_privileges).await,
            Err(error) => Err((data.pages.start, error.into())),
        };
        let reached = match inserted {
            Ok(()) => data.pages.end,
            Err((reached, error)) => {
                if data.place == Place::Fresh {
                    self.give_back_blocks(data.block_of(reached), data.pages.end - reached);
                }
                if reached == data.pages.start {
                    return Err(error);
                }
                reached
            }
        };
        self.data_of(inode).drop_pages(data.pages.start..reached);
        self.data.count_written(reached - data.pages.start);
        Ok(reached * BLOCK_SIZE)
    }

    /// Finds blocks for the first pages.
    fn place(
        &self,
        pages: &Range<u64>,
        target: Target,
        mut checksums: Vec<u32>,
        space: &mut Reservation,
    ) -> Result<NewData, FsError> {
        let wanted = target.pages.min(pages.end - pages.start);
        let (place, start, generation, blocks) = match target.preallocated {
            Some((start, generation)) => (Place::Preallocated, start, generation, wanted),
            None => {
                let wanted = wanted.min(space.data_blocks());
                if wanted == 0 {
                    return Err(FsError::NoSpace); // what was preallocated is not any more
                }
                let (start, count) = self.alloc.borrow_mut().allocate_data(BlockCount::new(wanted), space);
                let generation = Generation::new(self.epochs.current().get());
                (Place::Fresh, start, generation, count.get())
            }
        };
        checksums.truncate(blocks as usize);
        Ok(NewData { pages: pages.start..pages.start + blocks, place, start, generation, checksums })
    }

    /// Inserts data that the device has, in as many transactions as its range needs. A failure says what is inserted.
    async fn insert_direct(
        &self,
        inode: &Rc<Inode>,
        data: &NewData,
        space: Reservation,
        kill_privileges: KillPrivileges,
    ) -> Result<(), (u64, FsError)> {
        let mut reached = data.pages.start;
        let mut own = Some(space);
        while reached < data.pages.end {
            let space = self.insertion_space(own.take()).await;
            let (mut space, turn) = space.map_err(|error| (reached, error))?;
            let inserted = self.transact_with(&mut space, |batch| {
                let mut record = load_regular(batch, inode.nr)?;
                let up_to = data.insert(batch, inode.nr, &mut record, reached)?;
                let memory = inode.data.borrow();
                let end = bytes_of(&(reached..up_to)).end;
                record.size = memory.size_on_device(record.size, end).max(end);
                memory.unsynced.fold_into(&mut record);
                record.modified = batch.now();
                record.changed = batch.now();
                if kill_privileges == KillPrivileges::Drop {
                    record.permissions = without_privileges(record.permissions);
                }
                store(batch, inode.nr, &record);
                Ok((up_to, record.size, memory.unsynced.version))
            });
            let (up_to, size, version) = inserted.await.map_err(|error| (reached, error))?;
            drop((space, turn));
            let mut memory = inode.data.borrow_mut();
            memory.size_stored(size);
            memory.synced(version);
            reached = up_to;
        }
        Ok(())
    }
}

impl Inode {
    /// Whether anything written to `range` is not in the extents yet.
    fn is_written_to(&self, range: &Range<u64>) -> bool {
        let pending = {
            let data = self.data.borrow();
            data.pending().any(|write| {
                let write = write.range();
                write.start < range.end && range.start < write.end
            })
        };
        pending || !self.is_settled(range)
    }
}
