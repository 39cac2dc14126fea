//! The usual request's way: a read or write of a whole buffer that goes out at once, as one command whose data needs no
//! list, and comes back with success.
//!
//! Owns: [`Simple`], what such a request must be like; its submission; the loop that takes completions.
//!
//! Invariants:
//! - what is not usual is handed to the general way (`submit_any`, `command_completed`) before anything was changed;
//! - a buffer is in its operation before the doorbell is written that makes the device use it.
//!
//! Each instruction here is paid for by every request (docs/benchmarks.md): look at the count after a change.

use super::*;

/// What a request must be like to go out as one command without a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Simple {
    pub(super) lba_shift: u8,
    /// Bytes of a block less one.
    lba_mask: usize,
    /// 0 if no request is simple.
    pub(super) max_bytes: usize,
    /// `max_bytes` while nobody waits who must not be overtaken.
    pub(super) usual_max_bytes: usize,
    lba_count: u64,
}

impl Simple {
    pub(super) fn new(namespace: &Namespace, max_transfer: usize, list_free_bytes: usize) -> Self {
        // Where commands should not cross boundaries, each is looked at.
        let max_bytes = if namespace.optimal_boundary == 0 { max_transfer.min(list_free_bytes) } else { 0 };
        Self {
            lba_shift: namespace.lba_shift,
            lba_mask: namespace.lba_size() as usize - 1,
            max_bytes,
            usual_max_bytes: max_bytes,
            lba_count: namespace.blocks,
        }
    }
}

impl QueuePair {
    /// Sends a request that is simple, if it may go out now. Gives the buffer back otherwise.
    #[inline(always)]
    pub(super) fn submit_simple(
        &mut self,
        tag: OpTag,
        kind: Kind,
        lba: u64,
        buffer: DmaBuffer,
    ) -> Result<(), DmaBuffer> {
        let (simple, bytes) = (&self.simple, buffer.len());
        let blocks = (bytes >> simple.lba_shift) as u64;
        let fits = bytes & simple.lba_mask == 0
            && bytes <= simple.max_bytes
            && lba < simple.lba_count
            && blocks <= simple.lba_count - lba;
        if !fits || !self.may_send() {
            return Err(buffer);
        }
        let Some(index) = self.ops.peek_free() else { return Err(buffer) };
        let entry = self.builder.build_simple(kind, lba, blocks, &buffer);
        if self.queue.try_push(entry, index).is_none() {
            return Err(buffer);
        }
        self.ops.take_simple(tag, kind, lba, buffer);
        if self.latencies.is_some() {
            self.ops.get(index).started = self.shared.link.timing.now();
        }
        let counters = &*self.counters;
        add(&counters.requests, 1);
        add(&counters.commands, 1);
        Ok(())
    }

    /// Takes completions until there is none, or `budget` requests were handed out; tells the device, if it must know. Returns
    /// the number handed out.
    #[inline(always)]
    pub(super) fn take_completions(
        &mut self,
        budget: usize,
        sink: &mut dyn FnMut(Completion),
    ) -> Result<usize, Broken> {
        let mut delivered = 0;
        while delivered < budget {
            let taken = match self.queue.take() {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(error) => return Err(Broken { delivered, error }),
            };
            let owner = taken.command.owner;
            if taken.status.is_success()
                && let Some(op) = self.ops.release_simple(owner)
            {
                let bytes = op.buffer.as_ref().map_or(0, DmaBuffer::len) as u64;
                let counters = &*self.counters;
                add(
                    if op.kind == Kind::Read { &counters.bytes_read } else { &counters.bytes_written },
                    bytes,
                );
                add(&counters.completed, 1);
                if let Some(latencies) = &self.latencies {
                    record_latency(latencies, &self.shared, op.kind, op.started);
                }
                sink(Completion { tag: op.tag, result: Ok(()), buffer: op.buffer.take() });
                delivered += 1;
            } else if let Some(index) = self.command_completed(taken.command.slot, owner, taken.status) {
                self.hand_out(index, sink);
                delivered += 1;
            }
        }
        if self.queue.ring_completions() {
            add(&self.counters.doorbells, 1);
        }
        Ok(delivered)
    }
}

/// The controller broke the protocol, after so many requests were handed out.
pub(super) struct Broken {
    pub(super) delivered: usize,
    pub(super) error: Box<ProtocolError>,
}
