//! Completion queues: posting, the phase tag, the head that the host rings.
//!
//! Invariants and *Memory ordering*: see `queue`.
//!
//! Excludes: what is posted, and whom to tell (`controller`).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use nvme_spec::completion::PHASE_DWORD_OFFSET;
use nvme_spec::{CQE_BYTES, CompletionEntry};
use vm_memory::Bytes;
use zerocopy::IntoBytes;

use super::{DoorbellCheck, RingShape};
use crate::dma::{DmaDirection, DmaSpace, DmaView, Unmapped};
use crate::shadow::ShadowDoorbell;

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
