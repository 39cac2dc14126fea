//! Drained writes: from the delalloc queues to the inodes' pending lists, and from there into pages.
//!
//! Owns: the drain, the order of application, and the slow way of a write that found no room.
//!
//! Invariants:
//! - draining is synchronous and takes no lock: a long lock holder delays the application of writes to its inode,
//!   never the queue, the reads (which look at the pending list), or other inodes;
//! - writes to an inode are applied in the order in which they were drained, whoever applies them: the task made for
//!   it, or whoever holds the inode lock and needs them applied. A ticket tells whether the write that one waited
//!   for a lock to apply is still the next.

use std::rc::Rc;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::InodeRecord;
use crate::locks::{LockOrder, Mode};
use crate::namespace::inode::load;
use crate::request::{FileKind, KillPrivileges, WriteSource};
use crate::shard::{Inode, Shard};
use crate::types::{FileOffset, InodeNr};

use super::file::{bytes_of, pages_of};
use super::queue::{MAX_WRITE, Obstacle, WriteEntry, WriteParts};

/// Who applies writes, as far as the mmap lock is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MmapLock {
    /// The caller holds it exclusively.
    Held,
    /// The caller does not hold it: writes through mappings take it.
    Free,
}

/// The record of `inode`, which must be a regular file.
///
/// # Errors
/// [`FsError::NotFound`], [`FsError::IsDirectory`], [`FsError::Invalid`].
pub(super) fn load_regular(batch: &Batch<'_>, inode: InodeNr) -> Plan<InodeRecord> {
    let record = load(batch, inode)?;
    match record.kind {
        FileKind::Regular => Ok(record),
        FileKind::Directory => Err(FsError::IsDirectory.into()),
        _ => Err(FsError::Invalid.into()),
    }
}

impl Shard {
    /// Takes every write that was accepted before now to its inode.
    pub(crate) fn drain(self: &Rc<Self>) {
        let entries = {
            let mut state = self.data.drain.borrow_mut();
            if self.data.shared.is_drained(&state) {
                return;
            }
            self.data.shared.drain(&mut state)
        };
        for entry in entries {
            self.enqueue(entry);
        }
    }

    /// Makes a write visible, and applies it if nothing stands in the way.
    fn enqueue(self: &Rc<Self>, entry: WriteEntry) {
        let inode = self.inode(entry.inode);
        let now = self.ctx.wall();
        inode.data.borrow_mut().push_pending(entry, now);
        if !inode.data.borrow().applying {
            while self.try_apply_front(&inode) {}
            self.apply_in_a_task(&inode);
        }
        let nr = inode.nr;
        drop(inode);
        self.release_inode(nr);
    }

    /// Applies the next pending write if no lock has to be waited for.
    fn try_apply_front(&self, inode: &Rc<Inode>) -> bool {
        let (ticket, pages) = {
            let data = inode.data.borrow();
            let Some(front) = data.front() else { return false };
            if !data.is_regular || front.entry.source == WriteSource::Mapping {
                return false;
            }
            (front.ticket, pages_of(&front.range()))
        };
        let Some(_inode_lock) = inode.lock.try_lock(Mode::Exclusive) else { return false };
        let Some(_range) = inode.ranges.try_lock(bytes_of(&pages), Mode::Exclusive) else { return false };
        self.apply_one(inode, ticket, u64::MAX)
    }

    fn apply_one(&self, inode: &Rc<Inode>, ticket: u64, size_limit: u64) -> bool {
        let mut data = self.data_of(inode);
        let applied = data.apply_front(ticket, size_limit);
        if applied {
            self.data.list_dirty(inode.nr, &mut data);
            drop(data);
            self.data.wake_write_back();
        }
        applied
    }

    /// Leaves the pending writes to a task, unless there are none or they have one.
    fn apply_in_a_task(self: &Rc<Self>, inode: &Rc<Inode>) {
        {
            let mut data = inode.data.borrow_mut();
            if data.front().is_none() || data.applying {
                return;
            }
            data.applying = true;
        }
        let (shard, owner) = (Rc::clone(self), Rc::clone(inode));
        let task = async move {
            shard.apply_until_empty(&owner).await;
            owner.data.borrow_mut().applying = false;
            let nr = owner.nr;
            drop(owner);
            shard.release_inode(nr);
        };
        if let Err(error) = self.ctx.spawn(task) {
            // The writes stay pending and visible; the next write or flush of the inode tries again.
            inode.data.borrow_mut().applying = false;
            tracing::warn!(inode = %inode.nr, %error, "writes are not applied yet");
        }
    }

    async fn apply_until_empty(self: &Rc<Self>, inode: &Rc<Inode>) {
        loop {
            let source = match inode.data.borrow().front() {
                Some(front) => front.entry.source,
                None => return,
            };
            let mut order = LockOrder::new();
            // A write through a mapping takes the mmap lock only, below.
            let _inode_lock = match source {
                WriteSource::Call => Some(inode.lock.exclusive(&mut order).await),
                WriteSource::Mapping => None,
            };
            if let Err(error) = self.apply_front(inode, &order, MmapLock::Free).await {
                self.refuse_pending(inode, error);
            }
        }
    }

    /// The inode cannot take the writes: they were accepted, so their failure is told by `fsync`.
    fn refuse_pending(&self, inode: &Rc<Inode>, error: FsError) {
        tracing::warn!(inode = %inode.nr, %error, "accepted writes are lost: the inode cannot take them");
        let mut data = self.data_of(inode);
        data.discard_pending();
        data.size_set();
        data.note_error(error);
        let version = data.unsynced.version;
        data.synced(version);
        self.data.note_write_error();
    }

    /// Applies every pending write. The caller holds the inode lock exclusively, and `order` says so.
    ///
    /// # Errors
    /// What stood against reading the inode's record.
    pub(super) async fn apply_pending(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        order: &LockOrder,
        mmap: MmapLock,
    ) -> Result<(), FsError> {
        // Writes that arrive meanwhile belong to who comes after: without this bound a busy writer could hold the
        // caller here for ever.
        let Some(last) = inode.data.borrow().pending().last().map(|pending| pending.ticket) else {
            return Ok(());
        };
        while inode.data.borrow().front().is_some_and(|front| front.ticket <= last) {
            self.apply_front(inode, order, mmap).await?;
        }
        Ok(())
    }

    /// Applies the next pending write, if there still is one when the locks are taken.
    async fn apply_front(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        order: &LockOrder,
        mmap: MmapLock,
    ) -> Result<(), FsError> {
        let (ticket, pages, source) = {
            let data = inode.data.borrow();
            let Some(front) = data.front() else { return Ok(()) };
            (front.ticket, pages_of(&front.range()), front.entry.source)
        };
        let mut order = order.clone();
        let _mmap_lock = match (source, mmap) {
            (WriteSource::Mapping, MmapLock::Free) => Some(inode.mmap_lock.shared(&mut order).await),
            _ => None,
        };
        let _range = inode.ranges.exclusive(bytes_of(&pages), &mut order).await;
        let mut size_limit = u64::MAX;
        if source == WriteSource::Mapping || !inode.data.borrow().is_regular {
            let stored = self.view(|batch| load_regular(batch, inode.nr)).await?.size;
            let mut data = inode.data.borrow_mut();
            data.is_regular = true;
            if source == WriteSource::Mapping {
                size_limit = data.size(stored);
            }
        }
        self.apply_one(inode, ticket, size_limit);
        Ok(())
    }

    /// A write that found no room on its short way: waits for budget and space, and takes its place behind
    /// everything that was accepted before.
    ///
    /// # Errors
    /// [`FsError::NoSpace`], [`FsError::FileTooLarge`], the failure of a write-back that was to make room, what the
    /// inode is.
    pub(crate) async fn write_slow(
        self: &Rc<Self>,
        inode: InodeNr,
        offset: FileOffset,
        data: Box<[u8]>,
        source: WriteSource,
        kill_privileges: KillPrivileges,
    ) -> Result<u32, FsError> {
        let parts = WriteParts { inode, offset, data: &data, source, kill_privileges };
        parts.check()?;
        if u32::try_from(data.len()).is_err() {
            return Err(FsError::Invalid);
        }
        self.view(|batch| load_regular(batch, parts.inode)).await?;
        let mut written = 0;
        for piece in data.chunks(MAX_WRITE) {
            let offset = parts.offset.checked_add(u64::from(written)).ok_or(FsError::FileTooLarge)?;
            let outcome = self.write_piece(WriteParts { offset, data: piece, ..parts }).await;
            match outcome {
                Ok(()) => written += piece.len() as u32,
                Err(_) if written > 0 => break, // a short write, as POSIX has it; the next one gets the error
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    async fn write_piece(self: &Rc<Self>, parts: WriteParts<'_>) -> Result<(), FsError> {
        let (charge, space) = loop {
            self.volume.check_writable()?;
            match parts.try_reserve(self.data.shared.budget(), &self.counter) {
                Ok(reserved) => break reserved,
                Err(Obstacle::Length) => return Err(FsError::Invalid),
                // Only to wait: budget and space are taken together, so that nobody holds the one for the other.
                Err(Obstacle::Budget) => drop(self.wait_for_budget(parts.page_count()).await?),
                Err(Obstacle::Space) => break self.find_space(&parts).await?,
            }
        };
        self.drain(); // whatever was accepted meanwhile is older
        self.enqueue(parts.into_entry(charge, space));
        self.data.wake_write_back();
        Ok(())
    }
}
