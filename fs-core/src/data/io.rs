//! The data path's access to the device: DMA memory, and verified reads of blocks.
//!
//! Owns: the conversion of blocks to logical blocks, the length of transfers, and the check of every block that was
//! read. DMA memory is only ever copied from and to; checksums are computed on the copy, which the device cannot
//! change any more.
//!
//! Excludes: tree nodes, bitmaps and superblocks (`crate::disk`).

use futures_util::future::join_all;
use reactor::DmaBuffer;
use reactor::block::Lba;

use crate::error::FsError;
use crate::format::extent::MAX_RUN_BLOCKS;
use crate::planted::{Bug, is_planted};
use crate::shard::Shard;
use crate::types::{BLOCK_SIZE, BlockNr, InodeNr};

use super::extent_map::DataSegment;
use super::page::{PAGE_SIZE, PageBytes, zeroed_page};
use super::{add, block_after};

/// The part of the DMA pool that one transfer may take, as a divisor: a small pool still keeps several in flight.
const POOL_SHARE: u64 = 8;

impl Shard {
    /// Blocks of one transfer at most.
    pub(super) fn transfer_blocks(&self) -> u64 {
        let pool = self.ctx.disk().pool().capacity() as u64 / BLOCK_SIZE;
        (pool / POOL_SHARE).clamp(1, MAX_RUN_BLOCKS)
    }

    /// DMA memory for `blocks` blocks, after others that wait for some. To be awaited with no lock in hand but a
    /// shared range.
    pub(super) async fn dma_buffer(&self, blocks: u64) -> Result<DmaBuffer, FsError> {
        let bytes = blocks as usize * PAGE_SIZE;
        self.ctx.disk().pool().alloc(bytes).await.map_err(|error| FsError::Io(error.to_string()))
    }

    /// The logical block at which `block` begins.
    pub(super) fn lba_of(&self, block: BlockNr) -> Lba {
        let lba_size = u64::from(self.ctx.disk().geometry().lba_size);
        Lba::new(block.get() * (BLOCK_SIZE / lba_size))
    }

    /// Reads the blocks of `segments` and gives each, verified, to `sink` with the index of its page.
    ///
    /// # Errors
    /// The first failure, after everything was tried: [`FsError::Damaged`] for a block that is not what was written.
    pub(super) async fn read_segments(
        &self,
        inode: InodeNr,
        segments: &[DataSegment],
        mut sink: impl FnMut(u64, &PageBytes),
    ) -> Result<(), FsError> {
        let step = self.transfer_blocks();
        let mut reads = Vec::new();
        for segment in segments {
            let blocks = segment.checksums.len() as u64;
            for first in (0..blocks).step_by(step as usize) {
                let count = step.min(blocks - first);
                reads.push(async move {
                    let buffer = self.read_blocks(block_after(segment.start, first), count).await?;
                    Ok((segment, first, buffer))
                });
            }
        }
        let mut outcome = Ok(());
        let mut page = zeroed_page();
        for read in join_all(reads).await {
            let (segment, first, buffer) = match read {
                Ok(read) => read,
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    continue;
                }
            };
            for at in 0..(buffer.len() / PAGE_SIZE) as u64 {
                buffer.read_at(at as usize * PAGE_SIZE, &mut page[..]);
                let block = first + at;
                let matches = crc32c::crc32c(&page[..]) == segment.checksums[block as usize];
                if matches || is_planted(Bug::ChecksumIgnored) {
                    sink(segment.offset / BLOCK_SIZE + block, &page);
                } else {
                    let damage = self.damaged_block(inode, block_after(segment.start, block));
                    outcome = outcome.and(Err(damage));
                }
            }
        }
        outcome
    }

    async fn read_blocks(&self, start: BlockNr, blocks: u64) -> Result<DmaBuffer, FsError> {
        let buffer = self.dma_buffer(blocks).await?;
        let (read, buffer) = self.ctx.disk().read(self.lba_of(start), buffer).await;
        read?;
        add(&self.data.figures.pages_read, blocks);
        Ok(buffer)
    }

    fn damaged_block(&self, inode: InodeNr, block: BlockNr) -> FsError {
        add(&self.data.figures.damaged, 1);
        let what = "a data block does not match its checksum".to_owned();
        self.volume.note_damage(self.id, &format!("{what}: block {block}, inode {inode}"));
        FsError::Damaged { what, block: Some(block), inode: Some(inode) }
    }
}
