//! What a shard holds of a file in memory: cached pages, writes not applied yet, ordered extents, errors.
//!
//! Owns: [`FileData`], the volatile half of a file's contents. Synchronous and without I/O; who calls what under
//! which lock is the business of the other modules of `crate::data`.
//!
//! Invariants:
//! - `dirty` holds exactly the indices of the dirty pages; `space` promises at most a block, and `charge` exactly a
//!   page of the dirty budget, for each of them; an ordered extent carries those of its pages itself;
//! - the ordered extents' page ranges do not overlap, and their pages are exactly the ordered ones;
//! - `pending` is in the order in which the writes were drained.
//!
//! # Size and times
//! The inode record's size is the one on the device. What programs see is the larger of it and `visible_size`: the
//! end of the furthest write that has been accepted and is not on the device. Likewise the times of such writes, and
//! the fall of set-uid bits that they caused, wait in `unsynced` for the next transaction on the inode's record.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use reactor::WallTime;

use crate::alloc::Reservation;
use crate::error::FsError;
use crate::format::items::InodeRecord;
use crate::namespace::without_privileges;
use crate::planted::{Bug, is_planted};
use crate::request::{Attributes, KillPrivileges, WriteSource};
use crate::shard::signal::Signal;
use crate::types::BLOCK_SIZE;

use super::NODES_PER_WRITE;
use super::ordered::OrderedExtent;
use super::page::{PAGE_SIZE, Page, PageBytes};
use super::queue::{Charge, WriteEntry};
use super::range_set::RangeSet;

/// Pages of one ordered extent at most.
const RUN_PAGES: u64 = crate::format::extent::MAX_RUN_BLOCKS;

/// A write that waits to be applied.
#[derive(Debug)]
pub(crate) struct PendingWrite {
    /// Tells it from the other pending writes of the file.
    pub(crate) ticket: u64,
    /// The write.
    pub(crate) entry: WriteEntry,
}

impl PendingWrite {
    /// Its bytes in the file.
    pub(crate) fn range(&self) -> Range<u64> {
        self.entry.offset..self.entry.offset + self.entry.length
    }
}

/// Effects of writes on the inode's record that no transaction has stored yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unsynced {
    /// Raised by every change, so that who has stored an older state does not clear a newer one.
    pub(crate) version: u64,
    /// Time of the last write.
    pub(crate) modified: Option<WallTime>,
    /// Whether set-uid and set-gid bits fall.
    pub(crate) kill_privileges: bool,
}

impl Unsynced {
    /// Carries the effects over to a record.
    pub(crate) fn fold_into(&self, record: &mut InodeRecord) {
        if let Some(modified) = self.modified {
            record.modified = modified;
            record.changed = record.changed.max(modified);
        }
        if self.kill_privileges {
            record.permissions = without_privileges(record.permissions);
        }
    }

    fn is_empty(&self) -> bool {
        self.modified.is_none() && !self.kill_privileges
    }
}

/// Failures of write-back, until somebody was told.
#[derive(Debug, Default)]
struct WriteErrors {
    last: Option<FsError>,
    /// Counts failures.
    sequence: u64,
    /// The failure that was last reported.
    reported: u64,
}

/// The contents of a file in memory.
#[derive(Debug, Default)]
pub(crate) struct FileData {
    pages: BTreeMap<u64, Page>,
    dirty: RangeSet,
    dirty_count: u64,
    pending: VecDeque<PendingWrite>,
    next_ticket: u64,
    pub(super) ordered: Vec<Rc<OrderedExtent>>,
    /// An ordered extent has ended.
    pub(super) ordered_ended: Rc<Signal>,
    space: Option<Reservation>,
    charge: Option<Charge>,
    visible_size: Option<u64>,
    pub(crate) unsynced: Unsynced,
    errors: WriteErrors,
    /// The inode was found to be a regular file.
    pub(super) is_regular: bool,
    /// A task is applying pending writes.
    pub(super) applying: bool,
    /// The file is in the shard's list of files with dirty pages.
    pub(super) listed: bool,
    /// The file was truncated to zero since its last write-back: closing it starts one.
    pub(super) truncated_to_zero: bool,
}

impl FileData {
    /// Whether nothing would be lost with this.
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty()
            && self.pending.is_empty()
            && self.ordered.is_empty()
            && !self.applying
            && self.unsynced.is_empty()
            && self.errors.sequence == self.errors.reported
    }

    /// Pages in memory.
    pub(super) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Pages with changes that no ordered extent covers.
    pub(super) fn dirty_count(&self) -> u64 {
        self.dirty_count
    }

    // ---- pending writes ----

    /// Notes a drained write: from now on it is visible.
    pub(super) fn push_pending(&mut self, entry: WriteEntry, now: WallTime) {
        if entry.length == 0 {
            return;
        }
        if entry.source == WriteSource::Call {
            let end = entry.offset + entry.length;
            self.visible_size = Some(self.visible_size.map_or(end, |size| size.max(end)));
        }
        self.unsynced.version += 1;
        self.unsynced.modified = Some(now);
        self.unsynced.kill_privileges |= entry.kill_privileges == KillPrivileges::Drop;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.pending.push_back(PendingWrite { ticket, entry });
    }

    /// The write to be applied next.
    pub(super) fn front(&self) -> Option<&PendingWrite> {
        self.pending.front()
    }

    /// Pending writes, in order.
    pub(super) fn pending(&self) -> impl Iterator<Item = &PendingWrite> {
        self.pending.iter()
    }

    /// Forgets every pending write.
    pub(super) fn discard_pending(&mut self) {
        self.pending.clear();
    }

    /// Applies the write to be applied next, if it is `ticket`, up to `size_limit`, and returns whether it was.
    pub(super) fn apply_front(&mut self, ticket: u64, size_limit: u64) -> bool {
        if self.pending.front().is_none_or(|pending| pending.ticket != ticket) {
            return false;
        }
        let Some(pending) = self.pending.pop_front() else { return false };
        let WriteEntry { offset, length, pages, space, charge, .. } = pending.entry;
        let end = (offset + length).min(size_limit);
        let (mut space, mut charge) = (space, charge);
        let mut gained = 0;
        for (index, source) in (offset / BLOCK_SIZE..).zip(pages) {
            let range = within_page(index, offset..end);
            if !range.is_empty() {
                gained += u64::from(self.write_page(index, &range, source));
            }
        }
        if gained > 0 {
            // A write into preallocated blocks has none of its own.
            let blocks = gained.min(space.data_blocks());
            let kept = space.split(blocks, space.nodes()).expect("no more is taken off than there is");
            self.keep(kept, charge.split(gained));
        }
        true
    }

    /// Copies the parts of pending writes that lie in the file's bytes from `offset` on over `destination`.
    pub(super) fn overlay_pending(&self, offset: u64, destination: &mut [u8]) {
        let window = offset..offset + destination.len() as u64;
        for pending in &self.pending {
            let range = pending.range();
            let (from, to) = (range.start.max(window.start), range.end.min(window.end));
            let mut at = from;
            while at < to {
                let index = at / BLOCK_SIZE;
                let piece_end = to.min((index + 1) * BLOCK_SIZE);
                let page = &pending.entry.pages[(index - range.start / BLOCK_SIZE) as usize];
                let within = (at % BLOCK_SIZE) as usize;
                let piece = &page[within..within + (piece_end - at) as usize];
                destination[(at - offset) as usize..(piece_end - offset) as usize].copy_from_slice(piece);
                at = piece_end;
            }
        }
    }

    /// The pages of `runs` that no single pending write covers wholly: what the device holds of the others is not
    /// wanted, and may be damaged. Pending writes of a range stay pending while the caller holds it.
    pub(super) fn without_pending(&self, runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
        if self.pending.is_empty() || runs.is_empty() {
            return runs;
        }
        let mut wanted = RangeSet::default();
        runs.into_iter().for_each(|run| wanted.insert(run));
        for pending in &self.pending {
            let range = pending.range();
            let whole = range.start.div_ceil(BLOCK_SIZE)..range.end / BLOCK_SIZE;
            if !whole.is_empty() {
                wanted.remove(whole);
            }
        }
        wanted.runs().collect()
    }

    // ---- pages ----

    /// Writes `range` of a page and returns whether that made it dirty.
    fn write_page(&mut self, index: u64, range: &Range<usize>, source: Box<PageBytes>) -> bool {
        let page = match self.pages.entry(index) {
            std::collections::btree_map::Entry::Vacant(place) => place.insert(Page::partial(source, range)),
            std::collections::btree_map::Entry::Occupied(place) => {
                let page = place.into_mut();
                page.write(range, source);
                page
            }
        };
        page.referenced = true;
        self.mark_dirty(index)
    }

    /// Marks a page that is in memory as dirty; `false` if it was.
    fn mark_dirty(&mut self, index: u64) -> bool {
        let page = self.pages.get_mut(&index).expect("only pages in memory become dirty");
        if page.dirty || (page.ordered && is_planted(Bug::RewriteDuringWriteBackLost)) {
            return false;
        }
        page.dirty = true;
        self.dirty.insert(index..index + 1);
        self.dirty_count += 1;
        true
    }

    /// Zeroes `range` of a page that is in memory and makes it dirty; `true` if it was not before, in which case the
    /// caller owes the page its space and charge.
    pub(super) fn zero_in_page(&mut self, index: u64, range: &Range<usize>) -> bool {
        self.pages.get_mut(&index).expect("the page is in memory").zero(range);
        self.mark_dirty(index)
    }

    /// The page, if it is in memory.
    pub(super) fn page(&mut self, index: u64) -> Option<&mut Page> {
        self.pages.get_mut(&index)
    }

    /// Puts a page read from the device into the cache, or fills the gaps of the one that is there. Returns the bytes
    /// as the file has them.
    pub(super) fn fill_page(&mut self, index: u64, device: &PageBytes) -> &mut Page {
        let page = self.pages.entry(index).or_insert_with(|| Page::whole(super::page::page_from(device)));
        page.fill(device);
        page.referenced = true;
        page
    }

    /// Drops a page if it is clean; whether it is gone.
    pub(super) fn evict(&mut self, index: u64) -> bool {
        let Some(page) = self.pages.get(&index) else { return true };
        if page.dirty || page.ordered {
            return false;
        }
        self.pages.remove(&index);
        true
    }

    /// Drops the pages of `range`, dirty or not, with what they hold. None of them may be ordered.
    pub(super) fn drop_pages(&mut self, range: Range<u64>) {
        while let Some((&index, _)) = self.pages.range(range.clone()).next() {
            let page = self.pages.remove(&index).expect("it was there just now");
            assert!(!page.ordered, "ordered extents are awaited before pages are dropped");
            if page.dirty {
                self.clean(index..index + 1);
            }
        }
    }

    /// Takes dirty pages out of the dirty set and gives back their space and charge.
    fn clean(&mut self, range: Range<u64>) {
        let blocks = range.end - range.start;
        drop(self.take_dirty(range, blocks));
        self.trim_nodes();
    }

    /// Takes `range`, all dirty, out of the dirty set; returns what the pages hold, with `blocks` promised blocks.
    fn take_dirty(&mut self, range: Range<u64>, blocks: u64) -> (Option<Reservation>, Option<Charge>) {
        let count = range.end - range.start;
        self.dirty.remove(range);
        self.dirty_count -= count;
        let space = self.space.as_mut().and_then(|space| {
            // After failures there may be fewer blocks promised than pages dirty.
            let blocks = blocks.min(space.data_blocks());
            space.split(blocks, NODES_PER_WRITE.min(space.nodes()))
        });
        let charge = self.charge.as_mut().map(|charge| charge.split(count));
        (space, charge)
    }

    /// Keeps space and charge of pages that have become dirty.
    fn keep(&mut self, space: Reservation, charge: Charge) {
        self.keep_space(space);
        self.keep_charge(charge);
        self.trim_nodes();
    }

    /// Keeps the charge of pages that have become dirty.
    pub(super) fn keep_charge(&mut self, charge: Charge) {
        match &mut self.charge {
            Some(mine) => mine.merge(charge),
            None => self.charge = Some(charge),
        }
    }

    /// Keeps more space for dirty pages.
    pub(super) fn keep_space(&mut self, space: Reservation) {
        match &mut self.space {
            Some(mine) => mine.merge(space),
            None => self.space = Some(space),
        }
    }

    /// Gives back nodes that the dirty pages cannot need: neighbours become one extent.
    fn trim_nodes(&mut self) {
        let extents = self.dirty.run_count() as u64 + self.dirty_count / RUN_PAGES;
        if let Some(space) = &mut self.space {
            let excess = space.nodes().saturating_sub(extents * NODES_PER_WRITE);
            drop(space.split(0, excess));
        }
    }

    // ---- write-back ----

    /// The first run of pages at or after `from` and before `to` that write-back could take: dirty, not ordered, at
    /// most the length of an extent. `None` with the first such page that is still ordered in `blocked`, if any.
    pub(super) fn next_write_back(&self, from: u64, to: u64) -> NextWriteBack {
        let Some(run) = self.dirty.next_run(from).filter(|run| run.start < to) else {
            return NextWriteBack::Nothing;
        };
        let limit = run.end.min(to).min(run.start + RUN_PAGES);
        let ready = self.pages.range(run.start..limit).take_while(|(_, page)| !page.ordered).count() as u64;
        if ready == 0 {
            NextWriteBack::Ordered(run.start)
        } else {
            NextWriteBack::Run(run.start..run.start + ready)
        }
    }

    /// Pages of `range` that have gaps.
    pub(super) fn partial_pages(&self, range: Range<u64>) -> Vec<u64> {
        self.pages.range(range).filter(|(_, page)| !page.is_whole()).map(|(&index, _)| index).collect()
    }

    /// Blocks promised to the dirty pages.
    pub(super) fn promised_blocks(&self) -> u64 {
        self.space.as_ref().map_or(0, Reservation::data_blocks)
    }

    /// What is promised to the dirty pages, to allocate from.
    pub(super) fn space_mut(&mut self) -> Option<&mut Reservation> {
        self.space.as_mut()
    }

    /// Hands the dirty pages of `range` over to an ordered extent: they are no longer dirty, but ordered. Of their
    /// promised blocks, `unused` have not become blocks and are handed over too.
    pub(super) fn order(&mut self, range: Range<u64>, unused: u64) -> (Option<Reservation>, Option<Charge>) {
        for (_, page) in self.pages.range_mut(range.clone()) {
            assert!(page.dirty && !page.ordered && page.is_whole(), "write-back takes dirty whole pages");
            (page.dirty, page.ordered) = (false, true);
        }
        self.take_dirty(range, unused)
    }

    /// The pages of `range` are on the device.
    pub(super) fn end_ordered_clean(&mut self, range: Range<u64>) {
        for (_, page) in self.pages.range_mut(range) {
            page.ordered = false;
        }
    }

    /// The pages of `range` could not be written: those that were not changed meanwhile are dirty again, and keep
    /// their part of `charge`.
    pub(super) fn end_ordered_failed(&mut self, range: Range<u64>, mut charge: Charge) {
        let mut again = 0;
        for index in range {
            let page = self.pages.get_mut(&index).expect("ordered pages stay in memory");
            page.ordered = false;
            again += u64::from(self.mark_dirty(index));
        }
        self.keep_charge(charge.split(again));
    }

    /// Pages of `range` in memory, in order.
    pub(super) fn pages_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Page)> {
        self.pages.range(range).map(|(&index, page)| (index, page))
    }

    /// As [`pages_in`](Self::pages_in), to change.
    pub(super) fn pages_in_mut(&mut self, range: Range<u64>) -> impl Iterator<Item = (u64, &mut Page)> {
        self.pages.range_mut(range).map(|(&index, page)| (index, page))
    }

    /// Whether an ordered extent touches the pages of `range`.
    pub(super) fn has_ordered(&self, range: &Range<u64>) -> bool {
        self.ordered.iter().any(|extent| extent.pages().start < range.end && range.start < extent.pages().end)
    }

    /// Whether an ordered extent touches these bytes.
    pub(crate) fn has_ordered_in(&self, bytes: &Range<u64>) -> bool {
        self.has_ordered(&pages_of(bytes))
    }

    /// Runs of dirty pages from `from` on, ordered ones not included.
    pub(super) fn next_dirty(&self, from: u64) -> Option<Range<u64>> {
        self.dirty.next_run(from)
    }

    // ---- size, times, errors ----

    /// The size that programs see, where the record says `stored`.
    pub(crate) fn size(&self, stored: u64) -> u64 {
        self.visible_size.map_or(stored, |visible| visible.max(stored))
    }

    /// The size to store once everything before `end` is on the device.
    pub(super) fn size_on_device(&self, stored: u64, end: u64) -> u64 {
        stored.max(self.visible_size.map_or(0, |visible| visible.min(end)))
    }

    /// A transaction has stored `stored` as the size.
    pub(super) fn size_stored(&mut self, stored: u64) {
        if self.visible_size.is_some_and(|visible| visible <= stored) {
            self.visible_size = None;
        }
    }

    /// A transaction has set the size: only writes that are still pending may go beyond it.
    pub(super) fn size_set(&mut self) {
        let calls = self.pending.iter().filter(|pending| pending.entry.source == WriteSource::Call);
        self.visible_size = calls.map(|pending| pending.range().end).max();
    }

    /// A transaction has stored the effects as of `version`.
    pub(crate) fn synced(&mut self, version: u64) {
        if self.unsynced.version == version {
            self.unsynced = Unsynced { version, ..Unsynced::default() };
        }
    }

    /// Shows in `attributes`, which come from the record, what is not in the record yet.
    pub(crate) fn overlay(&self, attributes: &mut Attributes) {
        attributes.size = self.size(attributes.size);
        if let Some(modified) = self.unsynced.modified {
            attributes.modified = modified;
            attributes.changed = attributes.changed.max(modified);
        }
        if self.unsynced.kill_privileges {
            attributes.permissions = without_privileges(attributes.permissions);
        }
        let in_flight: u64 =
            self.ordered.iter().map(|extent| extent.pages().end - extent.pages().start).sum();
        let pending: u64 = self.pending.iter().map(|pending| pending.entry.pages.len() as u64).sum();
        attributes.sectors += (self.dirty_count + in_flight + pending) * (BLOCK_SIZE / 512);
    }

    /// Notes that write-back failed.
    pub(super) fn note_error(&mut self, error: FsError) {
        self.errors.sequence += 1;
        self.errors.last = Some(error);
    }

    /// Failures so far.
    pub(super) fn error_sequence(&self) -> u64 {
        self.errors.sequence
    }

    /// The last failure, if there was one after `sequence`.
    pub(super) fn error_since(&self, sequence: u64) -> Result<(), FsError> {
        match &self.errors.last {
            Some(error) if self.errors.sequence > sequence => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Reports a failure that nobody was told of.
    pub(super) fn report_error(&mut self) -> Result<(), FsError> {
        let outcome = self.error_since(self.errors.reported);
        self.errors.reported = self.errors.sequence;
        outcome
    }
}

/// What write-back could do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NextWriteBack {
    /// No dirty page is left.
    Nothing,
    /// Write these.
    Run(Range<u64>),
    /// This dirty page is still being written in an older state.
    Ordered(u64),
}

/// The part of page `index` that lies in the file's bytes `range`.
pub(super) fn within_page(index: u64, range: Range<u64>) -> Range<usize> {
    let base = index * BLOCK_SIZE;
    let start = range.start.saturating_sub(base).min(BLOCK_SIZE) as usize;
    let end = range.end.saturating_sub(base).min(PAGE_SIZE as u64) as usize;
    start..end
}

/// The pages that the bytes of `range` touch.
pub(super) fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
}

/// The bytes of the pages of `range`.
pub(super) fn bytes_of(range: &Range<u64>) -> Range<u64> {
    range.start * BLOCK_SIZE..range.end * BLOCK_SIZE
}
