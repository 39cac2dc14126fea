//! Submission queues: the tail that the host rings, fetching, fused pairs, marks for abortion.
//!
//! Invariants and *Memory ordering*: see `queue`.
//!
//! Excludes: what commands mean, posting (`completion`).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use nvme_spec::{CompletionEntry, SQE_BYTES, StatusCode, SubmissionEntry};
use zerocopy::{FromZeros, IntoBytes};

use super::{DoorbellCheck, RingShape};
use crate::config::{FusedOperations, SglSupport};
use crate::data_pointer::DataPath;
use crate::dma::{DmaSpace, DmaView, SegmentList, Unmapped};
use crate::faults::deferred::{DeferredList, NEVER_NS};
use crate::faults::diversion::Diversion;
use crate::gate::WriterFlag;
use crate::io::{FUSE_FIRST, FUSE_SECOND};
use crate::namespaces::{NamespaceList, NamespaceTable, NamespaceView};
use crate::shadow::{Arming, ShadowDoorbell};

/// Commands that one queue may have marked for abortion before they are fetched.
pub(crate) const MAX_MARKED_ABORTS: usize = 64;

/// A tail that no queue has.
const NO_TAIL: u32 = u32::MAX;

/// A submission queue's place in the controller; the queue itself comes and goes.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct SubmissionSlot {
    /// Entries; 0 while there is no queue. Published last at creation.
    entries: AtomicU32,
    tail: AtomicU32,
    /// Where the controller is, for completions that are posted from elsewhere.
    head: AtomicU32,
    cqid: AtomicU16,
    /// The completion queue was full: there is nothing to do before it is kicked.
    blocked: AtomicBool,
    /// Its completion queue got room, or something that was held may go.
    kicked: AtomicBool,
    /// When something that waits is due, in the controller's nanoseconds, plus one; 0 if nothing waits.
    due: AtomicU64,
    /// Tail at which the queue ends with the first half of a fused pair: there is nothing to do until it moves.
    half_pair_at: AtomicU32,
    /// The tail is kept in memory (`shadow`); what is written to the register only says that it moved.
    shadowed: AtomicBool,
    pub(crate) queue: Mutex<Option<SubmissionQueue>>,
    pub(crate) stats: QueueStats,
    /// Its commands are changing a store.
    pub(crate) writing: WriterFlag,
}

/// Counters of one queue. Written by whoever holds the queue, except `doorbells`.
#[derive(Debug, Default)]
pub(crate) struct QueueStats {
    pub(crate) doorbells: AtomicU64,
    pub(crate) commands: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) sectors_read: AtomicU64,
    pub(crate) sectors_written: AtomicU64,
}

/// Adds to a counter that has one writer at a time: no locked instruction.
#[inline]
pub(crate) fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl SubmissionSlot {
    pub(crate) fn exists(&self) -> bool {
        self.entries.load(Ordering::Acquire) != 0
    }

    pub(crate) fn cqid(&self) -> u16 {
        self.cqid.load(Ordering::Relaxed)
    }

    pub(crate) fn tail(&self) -> u32 {
        self.tail.load(Ordering::Acquire)
    }

    pub(crate) fn head(&self) -> u32 {
        self.head.load(Ordering::Relaxed)
    }

    /// Whether there is something to do: entries to fetch, or a completion to post at last.
    pub(crate) fn has_work(&self) -> bool {
        self.exists()
            && (self.kicked.load(Ordering::Acquire)
                || (!self.blocked.load(Ordering::Acquire) && self.has_entries()))
    }

    /// Whether the tail is kept in memory.
    pub(crate) fn is_shadowed(&self) -> bool {
        self.shadowed.load(Ordering::Acquire)
    }

    /// Has a queue keep its tail in memory. The caller holds `queue`'s lock and passes what it guards.
    pub(crate) fn set_shadow(&self, queue: &mut SubmissionQueue, shadow: ShadowDoorbell) {
        queue.shadow = Some(shadow);
        self.shadowed.store(true, Ordering::Release);
    }

    fn has_entries(&self) -> bool {
        let tail = self.tail();
        tail != self.head() && tail != self.half_pair_at.load(Ordering::Relaxed)
    }

    fn set_half_pair_at(&self, tail: u32) {
        if self.half_pair_at.load(Ordering::Relaxed) != tail {
            self.half_pair_at.store(tail, Ordering::Relaxed);
        }
    }

    /// When the first of what waits is due, if it could be posted.
    pub(crate) fn due_ns(&self) -> Option<u64> {
        let due = self.due.load(Ordering::Acquire).checked_sub(1)?;
        (self.exists() && !self.blocked.load(Ordering::Acquire)).then_some(due)
    }

    /// Notes when the first of what waits is due. The caller holds `queue`'s lock.
    pub(crate) fn set_due_ns(&self, due_ns: u64) {
        self.due.store(if due_ns == NEVER_NS { 0 } else { due_ns + 1 }, Ordering::Release);
    }

    /// Says that the completion queue got room, or that something was released.
    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
    }

    /// Takes note of a kick before looking at the completion queue.
    pub(crate) fn take_kick(&self) {
        if self.kicked.load(Ordering::Relaxed) {
            self.kicked.store(false, Ordering::Relaxed);
            // The kick is taken before the completion queue is looked at: a later one is not lost.
            fence(Ordering::SeqCst);
        }
    }

    /// Notes whether the queue waits for room in its completion queue.
    pub(crate) fn set_blocked(&self, blocked: bool) {
        if self.blocked.load(Ordering::Relaxed) != blocked {
            self.blocked.store(blocked, Ordering::Release);
        }
    }

    /// Puts a queue in place. The caller holds `queue`'s lock and passes what it guards.
    pub(crate) fn install(&self, place: &mut Option<SubmissionQueue>, queue: SubmissionQueue) {
        self.tail.store(0, Ordering::Relaxed);
        self.head.store(0, Ordering::Relaxed);
        self.cqid.store(queue.cqid, Ordering::Relaxed);
        self.blocked.store(false, Ordering::Relaxed);
        self.kicked.store(false, Ordering::Relaxed);
        self.due.store(0, Ordering::Relaxed);
        self.half_pair_at.store(NO_TAIL, Ordering::Relaxed);
        self.shadowed.store(queue.shadow.is_some(), Ordering::Relaxed);
        let entries = queue.ring.entries;
        *place = Some(queue);
        // Release: who sees the queue exist sees its zeroed positions.
        self.entries.store(entries, Ordering::Release);
    }

    /// Takes the queue away. The caller holds `queue`'s lock.
    pub(crate) fn remove(&self, place: &mut Option<SubmissionQueue>) {
        self.entries.store(0, Ordering::Release);
        *place = None;
    }

    /// Notes a new tail.
    #[inline]
    pub(crate) fn ring_doorbell(&self, tail: u32) -> DoorbellCheck {
        self.stats.doorbells.fetch_add(1, Ordering::Relaxed);
        match self.entries.load(Ordering::Acquire) {
            0 => DoorbellCheck::NoQueue,
            entries if tail >= entries => DoorbellCheck::BadValue,
            _ => {
                if !self.is_shadowed() {
                    self.tail.store(tail, Ordering::Release);
                }
                DoorbellCheck::Accepted
            }
        }
    }
}

/// A submission queue.
#[derive(Debug)]
pub(crate) struct SubmissionQueue {
    ring: RingShape,
    cqid: u16,
    head: u32,
    /// Memory page of this enabling, as a power of two.
    pub(crate) page_shift: u32,
    pub(crate) view: DmaView,
    pub(crate) segments: SegmentList,
    /// A completion for which there was no room yet; nothing is fetched before it is posted.
    pub(crate) unposted: Option<CompletionEntry>,
    /// What is executed or posted later.
    pub(crate) deferred: DeferredList,
    /// Where the data of the command being executed goes instead, if a fault rule says so.
    pub(crate) diversion: Option<Box<Diversion>>,
    /// Command identifier of the last completion.
    pub(crate) last_cid: Option<u16>,
    /// Ring indices of waiting commands that are to be aborted when they are reached.
    aborts: Vec<u32>,
    pub(crate) namespaces: NamespaceView,
    /// Where the host keeps the tail, if not in the register.
    pub(crate) shadow: Option<ShadowDoorbell>,
    /// Which pairs are looked for.
    fused: FusedOperations,
    /// The second half of the pair whose first half was fetched last.
    pair: Option<FusedPair>,
    /// What became of the command that was fetched last, if it is the second half of a pair.
    second_result: Option<(u16, Result<(), StatusCode>)>,
}

/// The rest of a fused pair whose first half was fetched.
#[derive(Debug)]
struct FusedPair {
    first_cid: u16,
    second: SubmissionEntry,
    result: Result<(), StatusCode>,
}

impl SubmissionQueue {
    pub(crate) fn new(
        fused: FusedOperations,
        ring: RingShape,
        cqid: u16,
        page_shift: u32,
        dma: &DmaSpace,
    ) -> Self {
        Self {
            ring,
            cqid,
            head: 0,
            page_shift,
            view: dma.view(),
            segments: SegmentList::default(),
            unposted: None,
            deferred: DeferredList::default(),
            diversion: None,
            last_cid: None,
            aborts: Vec::new(),
            namespaces: NamespaceView::default(),
            shadow: None,
            fused,
            pair: None,
            second_result: None,
        }
    }

    /// Fetches the next entry if there is one before `tail`, and moves the head past it. The flag says whether the
    /// command was marked for abortion.
    #[inline]
    pub(crate) fn fetch(
        &mut self,
        slot: &SubmissionSlot,
    ) -> Result<Option<(SubmissionEntry, bool)>, Unmapped> {
        if !self.is_submitted(slot, self.head)? {
            return Ok(None);
        }
        self.view.refresh();
        self.second_result = None;
        let (entry, mut aborted) = match self.pair.take() {
            Some(pair) => {
                self.second_result = Some((pair.second.cid.get(), pair.result));
                (pair.second, false)
            }
            None => (self.entry_at(self.head)?, false),
        };
        if entry.flags.fuse() == FUSE_FIRST && self.fused == FusedOperations::CompareAndWrite {
            match self.fetch_second(slot, entry.cid.get())? {
                Some(second_aborted) => aborted = second_aborted,
                None => return Ok(None),
            }
        }
        aborted |= !self.aborts.is_empty() && self.take_abort();
        self.head = self.ring.next(self.head);
        slot.head.store(self.head, Ordering::Relaxed);
        Ok(Some((entry, aborted)))
    }

    /// Whether there is an entry at `index`, which is the tail or before it.
    #[inline]
    fn is_submitted(&mut self, slot: &SubmissionSlot, index: u32) -> Result<bool, Unmapped> {
        if index != slot.tail() {
            return Ok(true);
        }
        match self.shadow {
            None => Ok(false),
            Some(shadow) => self.poll_shadow(slot, shadow),
        }
    }

    /// Looks for a new tail in memory; true if there is one.
    fn poll_shadow(&mut self, slot: &SubmissionSlot, shadow: ShadowDoorbell) -> Result<bool, Unmapped> {
        let moved = self.take_shadow(slot, shadow)?;
        if moved || shadow.arming == Arming::BeforeSleep { Ok(moved) } else { self.arm(slot) }
    }

    /// Asks for a register write once there are new entries; true if there are some already.
    pub(crate) fn arm(&mut self, slot: &SubmissionSlot) -> Result<bool, Unmapped> {
        let Some(shadow) = self.shadow else { return Ok(false) };
        self.view.refresh();
        shadow.ask(&mut self.view, slot.tail())?;
        self.take_shadow(slot, shadow)
    }

    fn take_shadow(&mut self, slot: &SubmissionSlot, shadow: ShadowDoorbell) -> Result<bool, Unmapped> {
        self.view.refresh();
        let (old, tail) = (slot.tail(), shadow.read(&mut self.view)?);
        if tail == old || tail >= self.ring.entries {
            return Ok(false); // a value that cannot be is no news
        }
        slot.tail.store(tail, Ordering::Release);
        Ok(true)
    }

    /// Looks at the entry after the first half of a pair. `None` if it is still to come; else whether it is marked for
    /// abortion.
    #[cold]
    fn fetch_second(&mut self, slot: &SubmissionSlot, first_cid: u16) -> Result<Option<bool>, Unmapped> {
        let next = self.ring.next(self.head);
        if !self.is_submitted(slot, next)? {
            slot.set_half_pair_at(next);
            return Ok(None);
        }
        slot.set_half_pair_at(NO_TAIL);
        let second = self.entry_at(next)?;
        if second.flags.fuse() != FUSE_SECOND {
            return Ok(Some(false)); // it is no pair
        }
        self.pair = Some(FusedPair { first_cid, second, result: Err(StatusCode::ABORTED_FAILED_FUSED) });
        Ok(Some(self.aborts.contains(&next)))
    }

    /// The second half of the pair whose first half is `first_cid`, if that was fetched last. A first half that was held
    /// back meanwhile has none any more.
    pub(crate) fn fused_second(&self, first_cid: u16) -> Option<SubmissionEntry> {
        self.pair.as_ref().filter(|pair| pair.first_cid == first_cid).map(|pair| pair.second)
    }

    /// Notes what became of it.
    pub(crate) fn set_fused_result(&mut self, result: Result<(), StatusCode>) {
        if let Some(pair) = &mut self.pair {
            pair.result = result;
        }
    }

    /// What became of the second half `cid`, if that was fetched last.
    pub(crate) fn fused_result(&self, cid: u16) -> Option<Result<(), StatusCode>> {
        self.second_result.filter(|(second, _)| *second == cid).map(|(_, result)| result)
    }

    /// What executing a command takes: the namespaces as they are now, and the way to its data.
    #[inline]
    pub(crate) fn split(
        &mut self,
        table: &NamespaceTable,
        sgls: SglSupport,
    ) -> (&NamespaceList, DataPath<'_>) {
        let data = DataPath {
            view: &mut self.view,
            segments: &mut self.segments,
            page_shift: self.page_shift,
            sgls,
            diversion: &mut self.diversion,
        };
        (self.namespaces.refresh(table), data)
    }

    /// The way to an admin command's data: PRPs.
    pub(crate) fn data_path(&mut self) -> DataPath<'_> {
        DataPath {
            view: &mut self.view,
            segments: &mut self.segments,
            page_shift: self.page_shift,
            sgls: SglSupport::Absent,
            diversion: &mut self.diversion,
        }
    }

    fn entry_at(&mut self, index: u32) -> Result<SubmissionEntry, Unmapped> {
        let mut entry = SubmissionEntry::new_zeroed();
        let iova = self.ring.iova + u64::from(index) * SQE_BYTES as u64;
        self.view.read(iova, entry.as_mut_bytes())?;
        Ok(entry)
    }

    fn take_abort(&mut self) -> bool {
        let found = self.aborts.iter().position(|index| *index == self.head);
        found.map(|i| self.aborts.swap_remove(i)).is_some()
    }

    /// Whether a command of this identifier is in the ring and not fetched yet.
    pub(crate) fn is_waiting(&mut self, slot: &SubmissionSlot, cid: u16) -> bool {
        let tail = slot.tail();
        let mut index = self.head;
        while index != tail {
            if self.entry_at(index).is_ok_and(|entry| entry.cid.get() == cid) {
                return true;
            }
            index = self.ring.next(index);
        }
        false
    }

    /// Marks the waiting command `cid`; false if there is none, or too many are marked. What was fetched and waits inside
    /// the controller is aborted at the next look at the queue.
    pub(crate) fn mark_abort(&mut self, slot: &SubmissionSlot, cid: u16) -> bool {
        if !self.deferred.is_empty() && self.deferred.abort(cid) {
            slot.kick();
            return true;
        }
        let tail = slot.tail();
        self.view.refresh();
        // The second half of a pair whose first half was executed has been executed too.
        let mut index = if self.pair.is_some() { self.ring.next(self.head) } else { self.head };
        while index != tail && self.aborts.len() < MAX_MARKED_ABORTS {
            match self.entry_at(index) {
                Ok(entry) if entry.cid.get() == cid && !self.aborts.contains(&index) => {
                    self.aborts.push(index);
                    return true;
                }
                Ok(_) => index = self.ring.next(index),
                Err(Unmapped) => return false,
            }
        }
        false
    }

    pub(crate) fn head(&self) -> u32 {
        self.head
    }
}
