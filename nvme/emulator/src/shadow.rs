//! Shadow doorbells (§5.7, §7.13): tails and heads that the host keeps in memory, and event indices by which the controller
//! asks for a register write all the same.
//!
//! | mode | the controller looks at a queue's shadow tail | asks for a register write |
//! |---|---|---|
//! | `Inline` | in each write to the queue's doorbell, until the queue is empty | whenever the queue is empty |
//! | `Stepped` | in `step()` | whenever a step finds the queue empty |
//! | `Threaded` | all the time while the thread is awake | before the thread sleeps |
//!
//! A shadow head is looked at when the completion queue seems full; a write is asked for when it is.
//!
//! Invariants: for I/O queues only; a reset forgets the buffers. While a queue has shadows, the values written to its
//! doorbell registers are checked and then ignored: a register write on its way may be older than the shadow.
//!
//! Memory ordering: the host stores a shadow, then a full barrier, then loads the event index. The controller stores the
//! event index, then a full barrier, then loads the shadow once more. One of them sees the other's store: either the
//! controller finds the new value, or the host writes the register.

use std::sync::atomic::{Ordering, fence};

use nvme_spec::registers::{DOORBELL_BASE, Doorbell, doorbell_offset};
use nvme_spec::{QueueId, StatusCode, SubmissionEntry};
use vm_memory::Bytes;

use crate::config::Mode;
use crate::controller::{Core, Outcome};
use crate::dma::{DmaDirection, DmaView, Unmapped};
use crate::locks::lock;

/// Bytes of a shadow doorbell or event index.
const VALUE: u64 = 4;

/// The two buffers, a memory page each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShadowBuffers {
    values: u64,
    events: u64,
    page: u64,
}

/// When a queue's owner asks to be told of new entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arming {
    /// Whenever it finds the queue empty.
    WhenEmpty,
    /// Before its thread sleeps.
    BeforeSleep,
}

/// One doorbell in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShadowDoorbell {
    value: u64,
    event: u64,
    pub(crate) arming: Arming,
}

impl ShadowBuffers {
    /// The doorbell of a queue, if the buffers reach that far.
    pub(crate) fn doorbell(self, qid: u16, which: Doorbell, of: &Core) -> Option<ShadowDoorbell> {
        let offset = doorbell_offset(of.config.dstrd, QueueId::new(qid), which) - DOORBELL_BASE;
        let arming = match of.config.mode {
            Mode::Inline | Mode::Stepped => Arming::WhenEmpty,
            Mode::Threaded(_) => Arming::BeforeSleep,
        };
        let doorbell = ShadowDoorbell { value: self.values + offset, event: self.events + offset, arming };
        (offset + VALUE <= self.page).then_some(doorbell)
    }
}

impl ShadowDoorbell {
    /// What the host stored last.
    pub(crate) fn read(self, view: &mut DmaView) -> Result<u32, Unmapped> {
        let place = view.resolve(self.value, VALUE, DmaDirection::FromHost)?;
        // Acquire: the entries that the value announces are seen.
        let value: u32 =
            view.slice(place, VALUE as usize).load(0, Ordering::Acquire).map_err(|_| Unmapped)?;
        Ok(u32::from_le(value))
    }

    /// Asks for a register write once the host leaves `index` behind. The caller reads the shadow once more.
    pub(crate) fn ask(self, view: &mut DmaView, index: u32) -> Result<(), Unmapped> {
        put(view, self.event, index)?;
        // See the module's *Memory ordering*.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// For a queue that existed before the buffers did: begins where the queue is.
    fn begin_at(self, view: &mut DmaView, value: u32) -> Result<(), Unmapped> {
        put(view, self.value, value)?;
        self.ask(view, value)
    }
}

fn put(view: &mut DmaView, iova: u64, value: u32) -> Result<(), Unmapped> {
    let place = view.resolve(iova, VALUE, DmaDirection::ToHost)?;
    view.slice(place, VALUE as usize).store(value.to_le(), 0, Ordering::Release).map_err(|_| Unmapped)
}

impl Core {
    /// Doorbell Buffer Config (§5.7).
    pub(crate) fn configure_doorbell_buffers(
        &self,
        page_shift: u32,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let (values, events) = (entry.prp1.get(), entry.prp2.get());
        let page = 1 << page_shift;
        if values % page != 0 || events % page != 0 || values == events {
            return Err(StatusCode::INVALID_FIELD);
        }
        let mut view = self.dma.view();
        view.resolve(values, page, DmaDirection::FromHost)?;
        view.resolve(events, page, DmaDirection::ToHost)?;
        let buffers = ShadowBuffers { values, events, page };
        lock(&self.admin).shadow = Some(buffers);
        for (qid, slot) in (1..).zip(&self.completion[1..]) {
            if let Some(queue) = lock(&slot.queue).as_mut()
                && let Some(doorbell) = buffers.doorbell(qid, Doorbell::CompletionHead, self)
            {
                doorbell.begin_at(&mut view, slot.head())?;
                slot.set_shadow(queue, doorbell);
            }
        }
        for (qid, slot) in (1..).zip(&self.submission[1..]) {
            if let Some(queue) = lock(&slot.queue).as_mut()
                && let Some(doorbell) = buffers.doorbell(qid, Doorbell::SubmissionTail, self)
            {
                doorbell.begin_at(&mut view, slot.tail())?;
                slot.set_shadow(queue, doorbell);
            }
        }
        Ok(Outcome::Done(0))
    }

    /// The shadow of a queue that is being created, which begins at 0.
    pub(crate) fn new_shadow(&self, qid: u16, which: Doorbell) -> Result<Option<ShadowDoorbell>, StatusCode> {
        let Some(buffers) = lock(&self.admin).shadow else { return Ok(None) };
        let doorbell = buffers.doorbell(qid, which, self);
        if let Some(doorbell) = doorbell {
            doorbell.ask(&mut self.dma.view(), 0)?;
        }
        Ok(doorbell)
    }

    /// Asks for register writes for these queues; what came in the meantime is work. Called by a thread that is about to
    /// sleep.
    pub(crate) fn arm_shadows(&self, first: usize, step: usize) {
        if !self.is_ready() {
            return;
        }
        for slot in self.submission.iter().skip(first).step_by(step).filter(|slot| slot.is_shadowed()) {
            if let Some(queue) = lock(&slot.queue).as_mut()
                && queue.arm(slot).is_err()
            {
                self.fail("a shadow doorbell's memory is not mapped");
            }
        }
    }
}
