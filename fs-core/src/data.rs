//! The data path: what becomes of file contents between a front end and the device.
//!
//! | module | holds |
//! |---|---|
//! | [`queue`] | how writes of any thread reach the shard: delalloc queues, dirty budget |
//! | [`mod@file`], [`page`], [`range_set`] | contents of a file in memory |
//! | [`apply`] | drained writes → pages |
//! | [`read`] | pages, extents and the device → bytes |
//! | [`ordered`] | dirty pages → ordered extents → file extents |
//! | [`write_back`] | which pages are written when; fsync |
//! | [`size`] | truncation, deletion |
//! | [`space`] | preallocation, holes, seeking them |
//! | [`clone`] | files that share blocks |
//! | [`copy`] | ranges that are copied where they cannot be shared |
//! | [`extent_map`] | the plans on extents, runs and back-references |
//! | [`evict`] | the memory limit |
//!
//! # A write
//! A thread takes budget and space, copies the bytes into pages and pushes an entry (accepted: visible to every later
//! request). The shard drains its queues before it runs a request; a drained entry is *pending* on its inode, and
//! applied at once if the inode's locks are free, else by a task, in order. Applying makes pages dirty. Write-back
//! turns neighbouring dirty pages into ordered extents of up to 256 pages.
//!
//! # Locks
//! As in `crate::locks`: inode lock, mmap lock, range lock. A read takes only a shared range; write-back only an
//! exclusive range, until the ordered extent exists and again for its insertion; application the inode lock (writes
//! through mappings: the mmap lock, shared) and the exclusive range; whatever removes or adds extents otherwise all of
//! them. **Nobody waits for an ordered extent with a range lock in hand**, nor for budget or DMA memory with any lock.
//!
//! # Errors
//! A page that could not be written stays dirty, and every later write-back tries again. The failure is noted on the
//! inode and reported by the next `fsync` or close; and as long as the data is not on the device, by every `fsync`.
//!
//! # Legal crash outcomes
//! Those of [`ordered`] for blocks, of [`size`] for sizes. Nothing that was only accepted is promised to survive.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::Arc;

use serde::Serialize;

use crate::locks::{Guard, LockClass, LockOrder, WholeLock};
use crate::shard::signal::Signal;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, InodeNr};

mod apply;
mod clone;
mod copy;
mod direct;
mod evict;
pub(crate) mod extent_map;
mod file;
mod io;
mod lending;
pub(crate) mod listing;
mod ordered;
mod page;
mod queue;
mod range_set;
pub(crate) mod read;
mod shift;
mod size;
mod space;
mod unshare;
mod write_back;

#[cfg(test)]
mod tests;

pub(crate) use self::file::FileData;
pub(crate) use self::lending::{LendingCall, LendingChange, LendingReply};
pub use self::queue::MAX_WRITE;
pub(crate) use self::queue::{DelallocShared, WriteParts};

use self::queue::DrainState;

/// Tree nodes promised to an accepted write, for the extent that its pages become. Insertions that need more, because
/// the file is fragmented, draw on the reserve.
pub(crate) const NODES_PER_WRITE: u64 = 4;

/// Ordered extents of a shard at once: 32 MiB of DMA memory at most.
const MAX_ORDERED: u32 = 32;

/// The data path's state on a shard.
pub(crate) struct DataState {
    shared: Arc<DelallocShared>,
    drain: RefCell<DrainState>,
    memory_limit: u64,
    cached_pages: Cell<u64>,
    eviction: RefCell<evict::Hand>,
    /// Files with dirty pages, in the order in which they got them.
    dirty_files: RefCell<VecDeque<InodeNr>>,
    ordered: Cell<u32>,
    ordered_pages: Cell<u64>,
    /// How many wait for the space that accepted writes have reserved and will not need.
    space_wanted: Cell<u32>,
    ordered_freed: Signal,
    insertion: WholeLock<InsertionClass>,
    lending: lending::Lending,
    /// An ordered extent has ended, well or not.
    progress: Signal,
    stopped: Cell<bool>,
    write_errors: Cell<u64>,
    figures: Figures,
}

/// Counters since mount.
#[derive(Default)]
struct Figures {
    pages_written: Cell<u64>,
    extents_written: Cell<u64>,
    pages_read: Cell<u64>,
    page_hits: Cell<u64>,
    evicted: Cell<u64>,
    damaged: Cell<u64>,
}

/// Figures of a shard's data path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Memory of cached pages, in bytes.
    pub cached_bytes: u64,
    /// Data accepted and not on the device, in bytes.
    pub dirty_bytes: u64,
    /// Pieces of write-back in flight.
    pub ordered_extents: u32,
    /// Pages written since mount.
    pub pages_written: u64,
    /// Extents written since mount.
    pub extents_written: u64,
    /// Pages read from the device since mount.
    pub pages_read: u64,
    /// Pages found in memory by reads since mount.
    pub page_hits: u64,
    /// Pages evicted since mount.
    pub pages_evicted: u64,
    /// Failed pieces of write-back since mount.
    pub write_errors: u64,
    /// Data blocks that did not match their checksum since mount.
    pub damaged_blocks: u64,
}

/// The turn of an insertion to draw on the reserve. Ranks before the range lock, which its holder then takes.
enum InsertionClass {}

impl LockClass for InsertionClass {
    const RANK: u8 = 2;
    const NAME: &'static str = "turn of an insertion";
}

type InsertionTurn = Guard<InsertionClass>;

impl DataState {
    /// The state of a shard that has no data in memory. `memory_limit` is in bytes.
    pub(crate) fn new(shared: Arc<DelallocShared>, memory_limit: usize) -> Rc<Self> {
        Rc::new(Self {
            shared,
            drain: RefCell::default(),
            memory_limit: memory_limit as u64 / BLOCK_SIZE,
            cached_pages: Cell::new(0),
            eviction: RefCell::default(),
            dirty_files: RefCell::default(),
            ordered: Cell::new(0),
            ordered_pages: Cell::new(0),
            space_wanted: Cell::new(0),
            ordered_freed: Signal::default(),
            insertion: WholeLock::new(InodeNr::new(0)),
            lending: lending::Lending::default(),
            progress: Signal::default(),
            stopped: Cell::new(false),
            write_errors: Cell::new(0),
            figures: Figures::default(),
        })
    }

    /// Figures as of now.
    pub(crate) fn report(&self) -> DataReport {
        DataReport {
            cached_bytes: self.cached_pages.get() * BLOCK_SIZE,
            dirty_bytes: self.shared.dirty_bytes(),
            ordered_extents: self.ordered.get(),
            pages_written: self.figures.pages_written.get(),
            extents_written: self.figures.extents_written.get(),
            pages_read: self.figures.pages_read.get(),
            page_hits: self.figures.page_hits.get(),
            pages_evicted: self.figures.evicted.get(),
            write_errors: self.write_errors.get(),
            damaged_blocks: self.figures.damaged.get(),
        }
    }

    fn note_write_error(&self) {
        add(&self.write_errors, 1);
        self.progress.notify();
    }

    fn count_written(&self, pages: u64) {
        add(&self.figures.pages_written, pages);
        add(&self.figures.extents_written, 1);
    }

    /// Waits for one of the `limit` places for ordered extents.
    async fn ordered_slot(self: &Rc<Self>, limit: u32) -> OrderedSlot {
        while self.ordered.get() >= limit {
            self.ordered_freed.wait().await;
        }
        self.ordered.set(self.ordered.get() + 1);
        OrderedSlot { state: Rc::clone(self) }
    }

    async fn insertion_turn(&self) -> InsertionTurn {
        self.insertion.exclusive(&mut LockOrder::new()).await
    }
}

/// A place for an ordered extent.
struct OrderedSlot {
    state: Rc<DataState>,
}

impl Drop for OrderedSlot {
    fn drop(&mut self) {
        self.state.ordered.set(self.state.ordered.get() - 1);
        self.state.ordered_freed.notify();
    }
}

/// A file's contents, borrowed to be changed; keeps the shard's count of cached pages right.
struct DataGuard<'a> {
    data: RefMut<'a, FileData>,
    cached_pages: &'a Cell<u64>,
    before: u64,
}

impl Deref for DataGuard<'_> {
    type Target = FileData;

    fn deref(&self) -> &FileData {
        &self.data
    }
}

impl DerefMut for DataGuard<'_> {
    fn deref_mut(&mut self) -> &mut FileData {
        &mut self.data
    }
}

impl Drop for DataGuard<'_> {
    fn drop(&mut self) {
        self.cached_pages.set(self.cached_pages.get() + self.data.page_count() - self.before);
    }
}

impl Shard {
    /// Borrows a file's contents for a synchronous change.
    fn data_of<'a>(&'a self, inode: &'a Inode) -> DataGuard<'a> {
        let data = inode.data.borrow_mut();
        let before = data.page_count();
        DataGuard { data, cached_pages: &self.data.cached_pages, before }
    }
}

fn add(counter: &Cell<u64>, by: u64) {
    counter.set(counter.get() + by);
}

fn block_after(start: BlockNr, blocks: u64) -> BlockNr {
    start.checked_add(BlockCount::new(blocks)).expect("blocks in use lie on the device")
}
