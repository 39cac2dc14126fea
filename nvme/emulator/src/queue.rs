//! Submission and completion queues as the controller holds them.
//!
//! Owns: ring positions, the phase tag, fetching and posting of entries, the doorbells' values and their checks.
//!
//! Invariants:
//! - a submission slot's `queue` is used by one thread at a time (its lock); different queues never share a lock but that
//!   of a completion queue they both complete to;
//! - both halves of a fused pair are fetched before the first is handed out;
//! - an entry is posted only where the host has freed a slot (head doorbell), so no unread completion is overwritten;
//! - locks are taken in the order: submission queue 0, submission queue n, completion queue, the controller's own.
//!
//! Memory ordering:
//! - a doorbell value is stored with release and loaded with acquire order: what the host wrote before ringing is seen;
//! - the dword with the phase tag is stored last, with release order; the host's partner is its acquire load of it;
//! - `stalled` and the head doorbell form a store-load pair on both sides, each with a sequentially consistent fence in
//!   between: either the poster sees the freed slot or the doorbell write sees that someone is stalled.
//!
//! Excludes: what commands mean; how a shadow doorbell is read and its event index written (`shadow`).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use nvme_spec::completion::PHASE_DWORD_OFFSET;
use nvme_spec::{CQE_BYTES, CompletionEntry, SQE_BYTES, StatusCode, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::{FromZeros, IntoBytes};

use crate::config::{FusedOperations, SglSupport};
use crate::data_pointer::DataPath;
use crate::dma::{DmaDirection, DmaSpace, DmaView, SegmentList, Unmapped};
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

/// Where and how large a ring is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingShape {
    pub(crate) iova: u64,
    /// Entries, at least 2.
    pub(crate) entries: u32,
}

impl RingShape {
    fn next(self, index: u32) -> u32 {
        if index + 1 == self.entries { 0 } else { index + 1 }
    }

    /// Steps forward from `from` to `to`.
    fn distance(self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.entries - from }
    }
}

/// What a doorbell write was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DoorbellCheck {
    Accepted,
    /// There is no such queue.
    NoQueue,
    /// The value is outside the ring, or frees entries that were never posted.
    BadValue,
}

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

/// A completion queue's place in the controller.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct CompletionSlot {
    entries: AtomicU32,
    /// What the host has freed up to.
    head: AtomicU32,
    /// What has been posted up to; stored before the entry becomes visible.
    tail: AtomicU32,
    /// A submission queue waits for room.
    stalled: AtomicBool,
    /// The head is kept in memory (`shadow`).
    shadowed: AtomicBool,
    pub(crate) queue: Mutex<Option<CompletionQueue>>,
    pub(crate) doorbells: AtomicU64,
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    ring: RingShape,
    tail: u32,
    phase: bool,
    /// Interrupt vector, if interrupts are enabled.
    pub(crate) vector: Option<u16>,
    view: DmaView,
    /// Where the host keeps the head, if not in the register.
    pub(crate) shadow: Option<ShadowDoorbell>,
}

/// The phase tag that an entry is posted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PhaseTag {
    /// That of this round.
    Right,
    /// That of the round before.
    Stale,
}

/// Whether entries that the host has not freed may be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overrun {
    Never,
    Allowed,
}

/// How posting went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Posted {
    /// The host can see the entry; this vector may be told.
    Yes(Option<u16>),
    /// No room now.
    Full,
    /// There is no queue.
    Gone,
    /// The queue's memory is not mapped.
    Unmapped,
}

impl CompletionQueue {
    pub(crate) fn new(ring: RingShape, vector: Option<u16>, dma: &DmaSpace) -> Self {
        Self { ring, tail: 0, phase: true, vector, view: dma.view(), shadow: None }
    }

    fn store(&mut self, entry: &CompletionEntry) -> Result<(), Unmapped> {
        self.view.refresh();
        let iova = self.ring.iova + u64::from(self.tail) * CQE_BYTES as u64;
        let place = self.view.resolve(iova, CQE_BYTES as u64, DmaDirection::ToHost)?;
        let slice = self.view.slice(place, CQE_BYTES);
        let (first, last) = entry.as_bytes().split_at(PHASE_DWORD_OFFSET);
        slice.write_slice(first, 0).map_err(|_| Unmapped)?;
        let last = u32::from_ne_bytes(last.try_into().expect("the phase dword ends the entry"));
        // Release: partner of the host's acquire load of the phase tag.
        slice.store(last, PHASE_DWORD_OFFSET, Ordering::Release).map_err(|_| Unmapped)
    }
}

impl CompletionSlot {
    pub(crate) fn exists(&self) -> bool {
        self.entries.load(Ordering::Acquire) != 0
    }

    pub(crate) fn install(&self, place: &mut Option<CompletionQueue>, queue: CompletionQueue) {
        self.head.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Relaxed);
        self.stalled.store(false, Ordering::Relaxed);
        self.shadowed.store(queue.shadow.is_some(), Ordering::Relaxed);
        let entries = queue.ring.entries;
        *place = Some(queue);
        // Release: who sees the queue exist sees its zeroed positions.
        self.entries.store(entries, Ordering::Release);
    }

    pub(crate) fn remove(&self, place: &mut Option<CompletionQueue>) {
        self.entries.store(0, Ordering::Release);
        *place = None;
    }

    /// Notes a new head. The flag says whether a submission queue was waiting for it.
    #[inline]
    pub(crate) fn ring_doorbell(&self, head: u32) -> (DoorbellCheck, bool) {
        self.doorbells.fetch_add(1, Ordering::Relaxed);
        let entries = self.entries.load(Ordering::Acquire);
        if entries == 0 {
            return (DoorbellCheck::NoQueue, false);
        }
        let ring = RingShape { iova: 0, entries };
        let old = self.head.load(Ordering::Relaxed);
        // The tail is stored before an entry becomes visible, so a host that saw the entry does not exceed it.
        let posted = ring.distance(old, self.tail.load(Ordering::Acquire));
        // A register write may be older than the shadow; then it says only that there is news.
        let shadowed = self.shadowed.load(Ordering::Acquire);
        if head >= entries || (!shadowed && ring.distance(old, head) > posted) {
            return (DoorbellCheck::BadValue, false);
        }
        if !shadowed {
            self.head.store(head, Ordering::Release);
        }
        // See the module's *Memory ordering*.
        fence(Ordering::SeqCst);
        let stalled = self.stalled.load(Ordering::Relaxed) && self.stalled.swap(false, Ordering::AcqRel);
        (DoorbellCheck::Accepted, stalled)
    }

    pub(crate) fn head(&self) -> u32 {
        self.head.load(Ordering::Acquire)
    }

    /// Has a queue keep its head in memory. The caller holds `queue`'s lock and passes what it guards.
    pub(crate) fn set_shadow(&self, queue: &mut CompletionQueue, shadow: ShadowDoorbell) {
        queue.shadow = Some(shadow);
        self.shadowed.store(true, Ordering::Release);
    }

    /// Looks for a new head in memory, having asked for a register write should there be one later.
    fn poll_shadow(&self, queue: &mut CompletionQueue) -> Result<(), Unmapped> {
        let Some(shadow) = queue.shadow else { return Ok(()) };
        queue.view.refresh();
        let old = self.head();
        shadow.ask(&mut queue.view, old)?;
        let head = shadow.read(&mut queue.view)?;
        let posted = queue.ring.distance(old, queue.tail);
        if head < queue.ring.entries && queue.ring.distance(old, head) <= posted {
            self.head.store(head, Ordering::Release);
        }
        Ok(())
    }

    /// Posts an entry with the phase tag of its slot, if there is room.
    #[inline]
    pub(crate) fn post(&self, entry: CompletionEntry) -> Posted {
        self.post_as(entry, PhaseTag::Right, Overrun::Never)
    }

    /// Posts an entry. Anything but the right tag and no overrun is a fault on purpose.
    #[inline]
    pub(crate) fn post_as(&self, mut entry: CompletionEntry, tag: PhaseTag, overrun: Overrun) -> Posted {
        let mut guard = crate::locks::lock(&self.queue);
        let Some(queue) = guard.as_mut() else { return Posted::Gone };
        let next = queue.ring.next(queue.tail);
        if next == self.head.load(Ordering::Acquire) && overrun == Overrun::Never {
            self.stalled.store(true, Ordering::Relaxed);
            // See the module's *Memory ordering*.
            fence(Ordering::SeqCst);
            if self.poll_shadow(queue).is_err() {
                return Posted::Unmapped;
            }
            if next == self.head.load(Ordering::Acquire) {
                return Posted::Full;
            }
        }
        entry.set_status(entry.status(), queue.phase == (tag == PhaseTag::Right));
        self.tail.store(next, Ordering::Release);
        if queue.store(&entry).is_err() {
            return Posted::Unmapped;
        }
        queue.tail = next;
        if next == 0 {
            queue.phase = !queue.phase;
        }
        Posted::Yes(queue.vector)
    }
}
