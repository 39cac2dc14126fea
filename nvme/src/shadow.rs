//! Shadow doorbells (NVMe 1.4 §5.7, Doorbell Buffer Config): a software controller reads tails and heads from memory, and
//! says in an event index when it wants a register write all the same.
//!
//! Owns: [`ShadowMemory`] (the two buffers that the controller is told of) and [`ShadowDoorbells`] (one queue's places in
//! them). The admin queue never uses them.
//!
//! *Memory ordering*: a value is stored, then a full barrier, then the event index is loaded. The controller stores its event
//! index, then a full barrier, then loads the value: so at least one side sees the other's store, and no wake-up is lost.

use std::sync::Arc;

use nvme_spec::registers::{DOORBELL_BASE, Doorbell, doorbell_offset};
use reactor::dma::{DmaCells, DmaRegion};

use crate::queue::QueueShape;
use crate::sync::{Ordering, publish_then_look};
use crate::transport::aligned::allocate;
use crate::transport::{Transport, TransportError};

/// The buffers, one memory page each.
pub(crate) struct ShadowMemory {
    values: Arc<dyn DmaRegion>,
    events: Arc<dyn DmaRegion>,
    bytes: usize,
}

impl ShadowMemory {
    pub(crate) fn new(transport: &dyn Transport, page_size: usize) -> Result<Self, TransportError> {
        let (values, events) =
            (allocate(transport, page_size, page_size)?, allocate(transport, page_size, page_size)?);
        Ok(Self { values, events, bytes: page_size })
    }

    /// Addresses of the shadow doorbell buffer and of the event index buffer.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        (self.values.iova(), self.events.iova())
    }

    /// I/O queue pairs whose doorbells have a place in the buffers.
    pub(crate) fn queues(&self, dstrd: u8) -> u16 {
        ((self.bytes >> (3 + dstrd)).saturating_sub(1)).min(usize::from(u16::MAX - 1)) as u16
    }

    /// The memory, to be kept while the device might still use it.
    pub(crate) fn memory(&self) -> [Arc<dyn DmaRegion>; 2] {
        [Arc::clone(&self.values), Arc::clone(&self.events)]
    }
}

/// One queue's two doorbells.
pub(crate) struct ShadowDoorbells {
    pub(crate) submission: ShadowDoorbell,
    pub(crate) completion: ShadowDoorbell,
}

/// One doorbell in memory. The buffers are as long as the queues that have a place in them need.
pub(crate) struct ShadowDoorbell {
    values: DmaCells,
    events: DmaCells,
    offset: usize,
    last: u32,
}

impl ShadowDoorbells {
    pub(crate) fn new(memory: &ShadowMemory, shape: QueueShape) -> Self {
        let doorbell = |which| ShadowDoorbell {
            values: DmaCells::new(Arc::clone(&memory.values)),
            events: DmaCells::new(Arc::clone(&memory.events)),
            offset: (doorbell_offset(shape.dstrd, shape.id, which) - DOORBELL_BASE) as usize,
            last: 0,
        };
        let mut doorbells = Self {
            submission: doorbell(Doorbell::SubmissionTail),
            completion: doorbell(Doorbell::CompletionHead),
        };
        // An earlier queue of this number left its last values here.
        doorbells.restart();
        doorbells
    }

    /// As after the controller's reset: both values 0.
    pub(crate) fn restart(&mut self) {
        for doorbell in [&mut self.submission, &mut self.completion] {
            doorbell.last = 0;
            store(&doorbell.values, doorbell.offset, 0);
            store(&doorbell.events, doorbell.offset, 0);
        }
    }
}

fn store(cells: &DmaCells, offset: usize, value: u32) {
    // Release: queue entries before the value that makes a polling controller read them.
    cells.store_32(offset, value, Ordering::Release);
}

impl ShadowDoorbell {
    /// Publishes a tail or head. Returns whether the register has to be written too.
    pub(crate) fn publish(&mut self, value: u32) -> bool {
        let event = publish_then_look(
            || store(&self.values, self.offset, value),
            || self.events.load_32(self.offset, Ordering::Relaxed),
        );
        let last = std::mem::replace(&mut self.last, value);
        event_passed(event, last, value)
    }
}

/// Whether going from `last` to `value` passed `event`: the controller wants to be told once `event` is left behind. Indices
/// wrap at the queue's size, so a lap counts as passing: one write too many does no harm, one too few hangs the queue.
pub(crate) fn event_passed(event: u32, last: u32, value: u32) -> bool {
    let (event, last, value) = (event as u16, last as u16, value as u16);
    value.wrapping_sub(event).wrapping_sub(1) < value.wrapping_sub(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::fake::{Fake, Script};
    use nvme_spec::QueueId;
    use nvme_spec::registers::Cap;

    #[test]
    fn a_controller_is_told_exactly_when_its_event_index_is_passed() {
        assert!(event_passed(0, 0, 1));
        assert!(!event_passed(5, 0, 5));
        assert!(event_passed(5, 5, 6));
        assert!(event_passed(5, 0, 9));
        assert!(!event_passed(5, 6, 9));
    }

    /// Found by fuzzing: a queue with the number of one that was deleted began with its tail and its event index. The controller
    /// would have fetched entries that nobody had written, and the driver have kept the first doorbell to itself.
    #[test]
    fn a_queue_begins_at_zero_where_another_of_its_number_was() {
        let fake = Fake::new(Script::default());
        let memory = ShadowMemory::new(&*fake, 4096).unwrap();
        let shape = QueueShape::for_depth(QueueId::new(1), 7, 64, Cap::new());
        let mut first = ShadowDoorbells::new(&memory, shape);
        assert!(first.submission.publish(3));
        store(&first.submission.events, first.submission.offset, 3);
        let mut second = ShadowDoorbells::new(&memory, shape);
        let tail = second.submission.values.load_32(second.submission.offset, Ordering::Relaxed);
        assert_eq!(tail, 0);
        assert!(second.submission.publish(1));
    }

    #[test]
    fn every_wrap_of_a_small_queue_is_told_if_the_event_index_is_the_last_value() {
        for entries in [2u32, 3, 7, 64] {
            let mut last = 0;
            for step in 1..=entries * 3 {
                let value = step % entries;
                assert!(event_passed(last, last, value), "{last} to {value} of {entries}");
                last = value;
            }
        }
    }
}
