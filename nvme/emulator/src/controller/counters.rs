//! What happened so far, for tests and benchmarks.
//!
//! Invariant: counting costs no locked instruction where one thread at a time counts. Values are read one by one, not as of one
//! instant.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Core;
use crate::interrupt::Vector;

/// Counters since the controller was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Register reads.
    pub register_reads: u64,
    /// Register writes, doorbells not counted.
    pub register_writes: u64,
    /// Interrupt messages sent.
    pub interrupts: u64,
    /// Accesses outside the mappings.
    pub dma_faults: u64,
    /// One for each possible queue pair, the admin queue first.
    pub queues: Vec<QueueCounters>,
}

/// Counters of one queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Writes to the submission queue's doorbell.
    pub submission_doorbells: u64,
    /// Writes to the completion queue's doorbell.
    pub completion_doorbells: u64,
    /// Commands executed.
    pub commands: u64,
    /// Read commands that succeeded.
    pub reads: u64,
    /// Write commands that succeeded.
    pub writes: u64,
}

impl Core {
    pub(super) fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let pairs = self.submission.iter().zip(&self.completion);
        let queues = pairs.map(|(sq, cq)| QueueCounters {
            submission_doorbells: get(&sq.stats.doorbells),
            completion_doorbells: get(&cq.doorbells),
            commands: get(&sq.stats.commands),
            reads: get(&sq.stats.reads),
            writes: get(&sq.stats.writes),
        });
        Counters {
            register_reads: get(&self.registers.reads),
            register_writes: get(&self.registers.writes),
            interrupts: self.vectors.iter().map(Vector::sent).sum(),
            dma_faults: self.dma.fault_count(),
            queues: queues.collect(),
        }
    }
}
