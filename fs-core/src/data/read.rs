//! Reads: from the page cache, the pending list and the device.
//!
//! Owns: [`Shard::read`], and the filling of pages that others need whole.
//!
//! A direct read ([`Caching::Direct`]) is one that leaves no pages behind. It takes what is in memory as it is: that is
//! newer than the device, or the same.
//!
//! A read holds the shared range lock from before it looks at anything until it has its bytes, so extents do not
//! change under it, blocks it is reading are not freed, and writes of its range are not applied. They are *pending*
//! meanwhile: the read lays them over its result in its last step, which is synchronous with looking at the size.
//!
//! Invariants:
//! - every block read is verified against its run's checksum, and the run against the extent's generation, before a
//!   byte of it is used;
//! - the inode lock is never taken: a long holder, such as a truncation or (later) a clone, does not delay reads.

use std::ops::Range;
use std::rc::Rc;

use crate::error::FsError;
use crate::locks::LockOrder;
use crate::planted::{Bug, is_planted};
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, FileOffset, InodeNr};

use super::add;
use super::apply::load_regular;
use super::extent_map::{DataSegment, data_segments};
use super::file::{bytes_of, pages_of, within_page};
use super::page::{PAGE_SIZE, PageBytes};
use crate::MAX_FILE_SIZE;

/// Whether what is read stays in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caching {
    /// It does, until its memory is wanted.
    Cached,
    /// It does not, as with `O_DIRECT`.
    Direct,
}

/// Pages that one read keeps in flight from the device: 4 MiB.
const READ_WINDOW_PAGES: u64 = 1024;

impl Shard {
    /// Reads up to `length` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// [`FsError::Damaged`] if a block is not what was written there, [`FsError::Io`]; what the inode is.
    pub(crate) async fn read(
        self: &Rc<Self>,
        nr: InodeNr,
        offset: FileOffset,
        length: u32,
        caching: Caching,
    ) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(nr);
        let bytes = self.read_inode(&inode, offset.get(), u64::from(length), caching).await;
        drop(inode);
        self.relieve_page_memory();
        self.release_inode(nr);
        bytes
    }

    async fn read_inode(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        offset: u64,
        length: u64,
        caching: Caching,
    ) -> Result<Vec<u8>, FsError> {
        let end = offset.saturating_add(length).min(MAX_FILE_SIZE);
        let lock = bytes_of(&pages_of(&(offset.min(end)..end)));
        let lock = inode.ranges.shared(lock, &mut LockOrder::new()).await;
        let _range = (!is_planted(Bug::ReadUnlocked)).then_some(lock);
        let stored = self.view(|batch| load_regular(batch, inode.nr)).await?.size;
        let end = end.min(inode.data.borrow().size(stored));
        if offset >= end {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; usize::try_from(end - offset).map_err(|_| FsError::Invalid)?];
        let pages = pages_of(&(offset..end));
        let mut window = pages.start..pages.start;
        while window.end < pages.end {
            window = window.end..pages.end.min(window.end + READ_WINDOW_PAGES);
            self.read_window(inode, &window, offset..end, caching, &mut bytes).await?;
        }
        inode.data.borrow().overlay_pending(offset, &mut bytes);
        Ok(bytes)
    }

    /// Copies the pages of `window` to where they belong in `bytes`, which are the file's bytes `range`. Holes are
    /// zero already.
    async fn read_window(
        &self,
        inode: &Rc<Inode>,
        window: &Range<u64>,
        range: Range<u64>,
        caching: Caching,
        bytes: &mut [u8],
    ) -> Result<(), FsError> {
        let mut copy = |index: u64, page: &PageBytes| {
            let within = within_page(index, range.clone());
            let at = (index * BLOCK_SIZE + within.start as u64 - range.start) as usize;
            bytes[at..at + within.len()].copy_from_slice(&page[within]);
        };
        let missing = {
            let mut data = inode.data.borrow_mut();
            let mut next = window.start;
            let mut missing: Vec<Range<u64>> = Vec::new();
            for (index, page) in data.pages_in_mut(window.clone()) {
                if page.is_whole() {
                    page.referenced = true;
                    copy(index, page.bytes());
                    if next < index {
                        missing.push(next..index);
                    }
                    next = index + 1;
                }
            }
            if next < window.end {
                missing.push(next..window.end);
            }
            data.without_pending(missing)
        };
        let missed: u64 = missing.iter().map(|run| run.end - run.start).sum();
        add(&self.data.figures.page_hits, window.end - window.start - missed);
        if missing.is_empty() {
            return Ok(());
        }
        let segments = self.segments_of(inode.nr, &missing).await?;
        self.read_segments(inode.nr, &segments, |index, device| {
            let mut data = self.data_of(inode);
            if caching == Caching::Direct && data.page(index).is_none() {
                return copy(index, device);
            }
            copy(index, data.fill_page(index, device).bytes());
            self.data.queue_for_eviction(inode.nr, &mut data, index..index + 1);
        })
        .await?;
        // Pages with gaps that lie over no data have holes behind the gaps.
        let mut data = inode.data.borrow_mut();
        for run in missing {
            for (index, page) in data.pages_in_mut(run) {
                page.fill(&[0; PAGE_SIZE]);
                copy(index, page.bytes());
            }
        }
        Ok(())
    }

    /// Where the data of `pages` lies.
    async fn segments_of(&self, inode: InodeNr, pages: &[Range<u64>]) -> Result<Vec<DataSegment>, FsError> {
        self.view(|batch| {
            let mut segments = Vec::new();
            for run in pages {
                segments.extend(data_segments(batch, inode, bytes_of(run))?);
            }
            Ok(segments)
        })
        .await
    }

    /// Fills the gaps of pages, which are in memory, from the device. The caller holds their range, exclusively or
    /// shared.
    pub(super) async fn fill_pages(&self, inode: &Rc<Inode>, pages: &[u64]) -> Result<(), FsError> {
        if pages.is_empty() {
            return Ok(());
        }
        let runs: Vec<Range<u64>> = pages.iter().map(|&page| page..page + 1).collect();
        let segments = self.segments_of(inode.nr, &runs).await?;
        self.read_segments(inode.nr, &segments, |index, device| {
            self.data_of(inode).fill_page(index, device);
        })
        .await?;
        let mut data = inode.data.borrow_mut();
        for &index in pages {
            if let Some(page) = data.page(index) {
                page.fill(&[0; PAGE_SIZE]); // over a hole
            }
        }
        Ok(())
    }

    /// Brings a page into memory if the file has anything there; `false` if it is a hole. The caller holds its range
    /// exclusively.
    pub(super) async fn load_page(&self, inode: &Rc<Inode>, index: u64) -> Result<bool, FsError> {
        if inode.data.borrow_mut().page(index).is_some_and(|page| page.is_whole()) {
            return Ok(true);
        }
        let segments = self.segments_of(inode.nr, std::slice::from_ref(&(index..index + 1))).await?;
        if inode.data.borrow_mut().page(index).is_none() && segments.is_empty() {
            return Ok(false);
        }
        self.read_segments(inode.nr, &segments, |index, device| {
            let mut data = self.data_of(inode);
            data.fill_page(index, device);
            self.data.queue_for_eviction(inode.nr, &mut data, index..index + 1);
        })
        .await?;
        if let Some(page) = inode.data.borrow_mut().page(index) {
            page.fill(&[0; PAGE_SIZE]);
        }
        Ok(true)
    }
}
