//! Write-back: which dirty pages are written when, and who waits for it.
//!
//! Owns: flushing of ranges, files and the shard; the background task; how writers wait for budget and space; what
//! `fsync` and close report.
//!
//! | who | writes | waits for |
//! |---|---|---|
//! | fsync, truncation, preallocation | the file's range | its ordered extents |
//! | commit interval, sync, unmount | every file | their ordered extents |
//! | the background task | the files that became dirty first, from half the budget down to a quarter | a free place for an ordered extent |
//! | close after a truncation to zero | the file | nothing |
//!
//! Neighbouring dirty pages are written together however they became dirty. A dirty page that is still being written
//! in an older state is waited for, without a lock.
//!
//! Invariant: a flush looks at each page once, from the first to the last, so it ends however fast somebody writes.

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use crate::alloc::{Priority, Reservation};
use crate::error::FsError;
use crate::locks::LockOrder;
use crate::planted::{Bug, is_planted};
use crate::request::SyncScope;
use crate::shard::{Inode, Shard};
use crate::types::InodeNr;

use super::DataState;
use super::NODES_PER_WRITE;
use super::apply::MmapLock;
use super::file::{FileData, NextWriteBack, bytes_of, pages_of};
use super::queue::{Charge, WriteParts};
use super::space::is_preallocated;

/// After a failure the background task rests: whatever failed will hardly be better at once.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row of any file's write-back after which a writer that waits for budget gives up.
const MAX_FAILURES: u32 = 4;

/// Files whose ordered extents a flush of the shard waits for before it starts more.
const FLUSH_WINDOW: usize = 256;

/// Who waits for space looks this often, and so many times without seeing anything done.
const LOOK_AFTER: Duration = Duration::from_millis(1);
const STILL_LOOKS: u32 = 50;

/// Somebody who waits for the space that accepted writes hold, until dropped.
struct SpaceWanted<'a>(&'a DataState);

impl<'a> SpaceWanted<'a> {
    fn by(data: &'a DataState) -> Self {
        data.space_wanted.set(data.space_wanted.get() + 1);
        data.shared.wake_background();
        data.progress.notify();
        Self(data)
    }
}

impl Drop for SpaceWanted<'_> {
    fn drop(&mut self) {
        self.0.space_wanted.set(self.0.space_wanted.get() - 1);
        self.0.progress.notify();
    }
}

/// The whole of a file, in bytes.
pub(super) const WHOLE_FILE: Range<u64> = 0..crate::MAX_FILE_SIZE;

impl DataState {
    /// Puts a file with dirty pages on the list of the background task.
    pub(super) fn list_dirty(&self, inode: InodeNr, data: &mut FileData) {
        if !data.listed && data.dirty_count() > 0 {
            data.listed = true;
            self.dirty_files.borrow_mut().push_back(inode);
        }
    }

    /// Lets the background task look whether there is something to do.
    pub(super) fn wake_write_back(&self) {
        if self.above_background_limit() {
            self.shared.wake_background();
            self.progress.notify();
        }
    }

    fn above_background_limit(&self) -> bool {
        self.shared.budget().used() > self.background_limit()
    }

    /// Dirty pages above which the background task writes: none while somebody waits for their space.
    fn background_limit(&self) -> u64 {
        if self.space_wanted.get() > 0 { 0 } else { self.shared.budget().background_limit() }
    }

    /// Dirty pages that are not on their way to the device yet, pending ones included.
    fn idle_dirty(&self) -> u64 {
        self.shared.budget().used().saturating_sub(self.ordered_pages.get())
    }
}

impl Shard {
    /// Starts the background task; it ends with [`stop_data`](Self::stop_data).
    pub(crate) async fn write_back_in_background(self: Rc<Self>) {
        while !self.data.stopped.get() {
            self.drain();
            let failures = self.data.write_errors.get();
            let goal = self.data.background_limit() / 2;
            while self.data.idle_dirty() > goal
                && self.data.write_errors.get() == failures
                && !self.data.stopped.get()
                && self.write_back_next_file().await
            {}
            if self.data.write_errors.get() != failures {
                self.ctx.sleep(RETRY_AFTER).await;
            } else if self.data.above_background_limit() {
                // What is dirty is on its way, or waits for a lock.
                self.data.progress.wait().await;
            } else {
                self.data.shared.background_work().await;
            }
        }
    }

    /// Starts write-back of the file that has been dirty for longest; `false` if there is none. Failures are noted.
    async fn write_back_next_file(self: &Rc<Self>) -> bool {
        let Some(nr) = self.data.dirty_files.borrow_mut().pop_front() else { return false };
        let inode = self.inode(nr);
        inode.data.borrow_mut().listed = false;
        let started = self.start_write_back(&inode, &WHOLE_FILE).await;
        let mut data = inode.data.borrow_mut();
        self.data.list_dirty(nr, &mut data);
        drop(data);
        drop(inode);
        self.release_inode(nr);
        if let Err(error) = started {
            tracing::debug!(inode = %nr, %error, "write-back in the background failed");
        }
        true
    }

    /// Has the background task write everything, and waits until `found` is, or nothing is left, or what is left waits for somebody
    /// else (for whoever called this, perhaps, so this does not wait for ever). An accepted write holds more space than it will need, since
    /// nobody knows before how many nodes it changes.
    pub(crate) async fn write_back_for_space<T>(&self, mut found: impl FnMut() -> Option<T>) -> Option<T> {
        let data = &self.data;
        let _wanted = SpaceWanted::by(data);
        let (mut left, mut still) = (data.shared.budget().used(), 0);
        while left > 0 && still < STILL_LOOKS && !data.stopped.get() {
            self.ctx.sleep(LOOK_AFTER).await;
            if let Some(found) = found() {
                return Some(found);
            }
            let now = data.shared.budget().used();
            still = if now < left || data.ordered_pages.get() > 0 { 0 } else { still + 1 };
            left = now;
        }
        None
    }

    /// Ends the background task.
    pub(crate) fn stop_data(&self) {
        self.data.stopped.set(true);
        self.data.shared.wake_background();
        self.data.progress.notify();
        self.stop_lending();
    }

    /// Makes ordered extents of the dirty pages of `range`, those that exist now and as each is reached.
    async fn start_write_back(self: &Rc<Self>, inode: &Rc<Inode>, range: &Range<u64>) -> Result<(), FsError> {
        let pages = pages_of(range);
        let mut from = pages.start;
        loop {
            let next = inode.data.borrow().next_write_back(from, pages.end);
            match next {
                NextWriteBack::Nothing => return Ok(()),
                NextWriteBack::Run(run) => from = self.write_run(inode, run).await?,
                NextWriteBack::Ordered(page) => {
                    self.wait_for_ordered(inode, &(page..page + 1)).await;
                    from = page;
                }
            }
        }
    }

    /// Waits for the ordered extents that touch `pages` now. The caller holds no range lock.
    async fn wait_for_ordered(&self, inode: &Rc<Inode>, pages: &Range<u64>) {
        let (extents, ended) = {
            let data = inode.data.borrow();
            let touched = data
                .ordered
                .iter()
                .filter(|extent| extent.pages().start < pages.end && pages.start < extent.pages().end);
            (touched.map(Rc::clone).collect::<Vec<_>>(), Rc::clone(&data.ordered_ended))
        };
        for extent in extents {
            while !extent.has_ended() {
                ended.wait().await;
            }
        }
    }

    /// Writes the dirty pages of `range` and waits until they are file extents. The caller holds no range lock.
    ///
    /// # Errors
    /// The first failure; what could not be written is still dirty.
    pub(super) async fn flush_range(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<(), FsError> {
        let failures = inode.data.borrow().error_sequence();
        let started = self.start_write_back(inode, range).await;
        self.wait_for_ordered(inode, &pages_of(range)).await;
        started.and(inode.data.borrow().error_since(failures))
    }

    /// Writes everything that was accepted for `range` of the inode before now, and waits for it.
    ///
    /// # Errors
    /// What could not be written. It is still dirty, and also reported by the next `fsync`.
    pub(crate) async fn flush_inode(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: Range<u64>,
    ) -> Result<(), FsError> {
        self.drain();
        if inode.data.borrow().front().is_some() {
            let mut order = LockOrder::new();
            let _lock = inode.lock.exclusive(&mut order).await;
            self.apply_pending(inode, &order, MmapLock::Free).await?;
        }
        self.flush_range(inode, &range).await
    }

    /// As [`flush_inode`](Self::flush_inode), for the whole of an inode of this shard.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn flush_here(self: &Rc<Self>, nr: InodeNr) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let flushed = self.flush_inode(&inode, WHOLE_FILE).await;
        drop(inode);
        self.release_inode(nr);
        flushed
    }

    /// Writes everything that was accepted before now.
    ///
    /// # Errors
    /// The first failure, after everything was tried.
    pub(crate) async fn flush_all(self: &Rc<Self>) -> Result<(), FsError> {
        self.drain();
        let mut outcome = Ok(());
        let mut window: Vec<(Rc<Inode>, u64)> = Vec::new();
        for inode in self.inodes_in_use() {
            let untouched = {
                let data = inode.data.borrow();
                data.front().is_none() && data.dirty_count() == 0 && data.ordered.is_empty()
            };
            if untouched {
                continue;
            }
            let failures = inode.data.borrow().error_sequence();
            outcome = outcome.and(self.start_flush(&inode).await);
            window.push((inode, failures));
            if window.len() >= FLUSH_WINDOW {
                outcome = outcome.and(self.end_flushes(&mut window).await);
            }
        }
        outcome.and(self.end_flushes(&mut window).await)
    }

    async fn start_flush(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        if inode.data.borrow().front().is_some() {
            let mut order = LockOrder::new();
            let _lock = inode.lock.exclusive(&mut order).await;
            self.apply_pending(inode, &order, MmapLock::Free).await?;
        }
        self.start_write_back(inode, &WHOLE_FILE).await
    }

    async fn end_flushes(self: &Rc<Self>, window: &mut Vec<(Rc<Inode>, u64)>) -> Result<(), FsError> {
        let mut outcome = Ok(());
        for (inode, failures) in window.drain(..) {
            self.wait_for_ordered(&inode, &pages_of(&WHOLE_FILE)).await;
            outcome = outcome.and(inode.data.borrow().error_since(failures));
            let nr = inode.nr;
            drop(inode);
            self.release_inode(nr);
        }
        outcome
    }

    /// `fsync`: everything accepted before now is durable when this returns.
    ///
    /// # Errors
    /// What could not be written, or could not earlier and was not reported yet.
    pub(crate) async fn sync_inode(self: &Rc<Self>, nr: InodeNr, scope: SyncScope) -> Result<(), FsError> {
        if scope == SyncScope::Volume {
            return self.volume.sync_volume().await;
        }
        let inode = self.inode(nr);
        let flushed = self.flush_inode(&inode, WHOLE_FILE).await;
        let reported = inode.data.borrow_mut().report_error();
        drop(inode);
        self.release_inode(nr);
        flushed.and(reported)?;
        if is_planted(Bug::SyncWithoutCheckpoint) {
            return Ok(());
        }
        self.volume.commit_now().await
    }

    /// A handle was closed.
    ///
    /// # Errors
    /// What could not be written and was not reported yet.
    pub(crate) async fn handle_closed(self: &Rc<Self>, nr: InodeNr) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let truncated = std::mem::take(&mut inode.data.borrow_mut().truncated_to_zero);
        let reported = inode.data.borrow_mut().report_error();
        if truncated {
            let (shard, owner) = (Rc::clone(self), Rc::clone(&inode));
            let task = async move {
                if let Err(error) = shard.start_flush(&owner).await {
                    tracing::debug!(inode = %owner.nr, %error, "write-back at close failed; noted on the inode");
                }
                let nr = owner.nr;
                drop(owner);
                shard.release_inode(nr);
            };
            if let Err(error) = self.ctx.spawn(task) {
                tracing::debug!(inode = %nr, %error, "write-back at close is left to the commit interval");
            }
        }
        drop(inode);
        self.release_inode(nr);
        reported
    }

    /// Takes `pages` of the dirty budget, after write-back has made room. The caller holds no lock.
    ///
    /// # Errors
    /// [`FsError::Io`] if write-back fails again and again: the budget may never come back.
    pub(super) async fn wait_for_budget(&self, pages: u64) -> Result<Charge, FsError> {
        let mut failures = 0;
        loop {
            self.volume.check_writable()?;
            if let Some(charge) = self.data.shared.budget().charge(pages) {
                return Ok(charge);
            }
            let before = self.data.write_errors.get();
            self.data.shared.wake_background();
            self.data.progress.wait().await;
            failures = if self.data.write_errors.get() > before { failures + 1 } else { 0 };
            if failures >= MAX_FAILURES {
                return Err(FsError::Io("data written earlier cannot be written to the device".to_owned()));
            }
        }
    }

    /// Finds budget and space for a write that was refused for lack of space: first what other accepted writes have
    /// reserved and will not need, then what closing epochs makes free.
    ///
    /// # Errors
    /// [`FsError::NoSpace`].
    pub(super) async fn find_space(
        self: &Rc<Self>,
        parts: &WriteParts<'_>,
    ) -> Result<(Charge, Reservation), FsError> {
        // A failure here is reported to whoever wrote that data; it does not make this write fail.
        let _noted = self.flush_all().await;
        let pages = parts.page_count();
        let space = match self.reserve(pages, NODES_PER_WRITE, Priority::Normal).await {
            Err(FsError::NoSpace) => self.space_of_preallocation(parts).await?,
            other => other?,
        };
        Ok((self.wait_for_budget(pages).await?, space))
    }

    /// What a write into preallocated blocks needs on a full volume: no blocks, and the nodes come from the reserve,
    /// because the space for the data was taken long ago.
    async fn space_of_preallocation(&self, parts: &WriteParts<'_>) -> Result<Reservation, FsError> {
        let start = parts.offset.get();
        let blocks = bytes_of(&pages_of(&(start..start + parts.data.len() as u64)));
        if !self.view(|batch| is_preallocated(batch, parts.inode, &blocks)).await? {
            return Err(FsError::NoSpace);
        }
        self.reserve(0, NODES_PER_WRITE, Priority::Reserve).await
    }
}
