//! Telling a transport that a queue begins.
//!
//! A transport that keeps doorbell values in memory (as vfio-user's mapped page does) has to forget a queue's old values
//! when a new queue takes its number: both sides count from 0 again.
//!
//! Invariant: the watch is called after the queue exists and before the host can know that it does, so that every value
//! the host writes for the new queue comes later.

use std::sync::{Arc, Mutex};

use nvme_spec::QueueId;
use nvme_spec::registers::{Doorbell, doorbell_offset};

use crate::controller::Core;
use crate::locks::lock;

/// What is called. It must not call the controller.
pub(crate) trait QueueWatch: Send + Sync {
    /// A queue whose doorbell is at `offset` of BAR0 begins at 0.
    fn queue_began(&self, offset: u64);
}

/// The place for at most one watch.
#[derive(Default)]
pub(crate) struct WatchSlot(Mutex<Option<Arc<dyn QueueWatch>>>);

impl WatchSlot {
    pub(crate) fn set(&self, watch: Option<Arc<dyn QueueWatch>>) {
        *lock(&self.0) = watch;
    }
}

impl Core {
    /// Queue `qid` of the kind that has `which` doorbell was installed.
    pub(crate) fn queue_began(&self, qid: u16, which: Doorbell) {
        if let Some(watch) = lock(&self.queue_watch.0).as_ref() {
            watch.queue_began(doorbell_offset(self.config.dstrd, QueueId::new(qid), which));
        }
    }
}
