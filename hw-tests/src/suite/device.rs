//! What the cases do to a device: open it, move data, wait.
//!
//! Owns: [`Device`] (a controller and one queue), [`pattern`] (data that says which block it belongs to) and the checks on it.
//!
//! Invariant: a device that is dropped was shut down, so that the next case finds it at rest.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nvme::{Controller, DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Completion, Durability, IoError, Lba, LbaCount, LbaRange, OpTag, Request};
use reactor::dma::DmaBuffer;

use super::Subject;

/// Bytes of a queue's buffers: enough for every case, little enough for a limit on locked memory.
const POOL_BYTES: usize = 4 << 20;

/// A controller under test.
pub(super) struct Device {
    pub(super) controller: Arc<Controller>,
}

impl Device {
    /// Brings the controller up.
    pub(super) fn open(subject: &Subject) -> Result<Self> {
        Self::open_with(subject, |_| ())
    }

    /// As [`Self::open`], with another spec.
    pub(super) fn open_with(subject: &Subject, change: impl FnOnce(&mut DeviceSpec)) -> Result<Self> {
        let mut spec: DeviceSpec = subject.spec.parse()?;
        change(&mut spec);
        let controller =
            nvme::open(&spec, OpenOptions::default()).with_context(|| format!("opening {spec}"))?;
        Ok(Self { controller })
    }

    /// A queue pair for cases.
    pub(super) fn queue(&self) -> Result<QueuePair> {
        self.queue_with(&queue_options())
    }

    /// A queue pair.
    pub(super) fn queue_with(&self, options: &QueueOptions) -> Result<QueuePair> {
        self.controller.create_queue(options).context("creating a queue pair")
    }

    /// Ends the controller's work; insists that it was not at fault.
    pub(super) fn close(self) -> Result<()> {
        if let Some(fault) = self.controller.fault() {
            bail!("the controller was given up: {fault}");
        }
        self.controller.shutdown().context("shutting the controller down")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Does nothing after `close`; of a case that has failed, the first error counts.
        let _secondary = self.controller.shutdown();
    }
}

/// Options of a queue for cases.
pub(super) fn queue_options() -> QueueOptions {
    QueueOptions { pool_bytes: POOL_BYTES, ..QueueOptions::default() }
}

/// Bytes of a block.
pub(super) fn block_bytes(queue: &QueuePair) -> usize {
    queue.geometry().lba_size as usize
}

/// `count` blocks from `start` on.
pub(super) fn range(start: u64, count: u64) -> LbaRange {
    LbaRange { start: Lba::new(start), count: LbaCount::new(count) }
}

/// `bytes` of data for the blocks from `lba` on: each eight bytes follow from the block, their place in it and `seed`.
pub(super) fn pattern(seed: u64, lba: u64, bytes: usize, block: usize) -> Vec<u8> {
    let words = (bytes / 8) as u64;
    let per_block = (block / 8) as u64;
    (0..words)
        .flat_map(|word| {
            let place = (lba + word / per_block) << 16 | (word % per_block);
            let mixed = (place ^ seed.rotate_left(41)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed ^ mixed >> 29).to_le_bytes()
        })
        .collect()
}

/// A buffer of the queue's pool with `data`.
pub(super) fn filled(queue: &QueuePair, data: &[u8]) -> Result<DmaBuffer> {
    let mut buffer = empty(queue, data.len())?;
    buffer.write_at(0, data);
    Ok(buffer)
}

/// A buffer of the queue's pool, overwritten with what no pattern holds for long.
pub(super) fn empty(queue: &QueuePair, bytes: usize) -> Result<DmaBuffer> {
    let mut buffer =
        queue.pool().try_alloc(bytes).with_context(|| format!("no buffer of {bytes} bytes left"))?;
    buffer.fill(0, bytes, 0xa5);
    Ok(buffer)
}

/// The buffer's bytes.
pub(super) fn contents(buffer: &DmaBuffer) -> Vec<u8> {
    let mut data = vec![0; buffer.len()];
    buffer.read_at(0, &mut data);
    data
}

/// Waits until the queue has answered everything; each request is answered in bounded time (`command_timeout`).
pub(super) fn drain(queue: &mut QueuePair) -> Vec<Completion> {
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.ring();
        queue.process_completions(64, &mut |completion| done.push(completion));
    }
    done
}

/// Submits one request to an idle queue and waits for it. A rejection is its result, too.
pub(super) fn execute(queue: &mut QueuePair, request: Request) -> Result<Completion, IoError> {
    if let Err(rejected) = queue.submit(OpTag(1), request) {
        return Err(match rejected.reason {
            reactor::block::RejectReason::Error(error) => error,
            full => IoError::Command { detail: format!("an idle queue says {full:?}") },
        });
    }
    only(drain(queue))
}

fn only(mut done: Vec<Completion>) -> Result<Completion, IoError> {
    match (done.pop(), done.len()) {
        (Some(completion), 0) => completion.result.clone().map(|()| completion),
        (_, others) => Err(IoError::Command { detail: format!("{others} answers besides the one due") }),
    }
}

/// Writes `data` from `lba` on.
pub(super) fn write(queue: &mut QueuePair, lba: u64, data: &[u8]) -> Result<()> {
    write_as(queue, lba, data, Durability::Cached)
}

/// Writes `data` from `lba` on.
pub(super) fn write_as(queue: &mut QueuePair, lba: u64, data: &[u8], durability: Durability) -> Result<()> {
    let buffer = filled(queue, data)?;
    let length = data.len();
    execute(queue, Request::Write { lba: Lba::new(lba), buffer, durability })
        .map(|_| ())
        .map_err(|error| anyhow!("writing {length} bytes at block {lba}: {error}"))
}

/// Reads `bytes` from `lba` on.
pub(super) fn read(queue: &mut QueuePair, lba: u64, bytes: usize) -> Result<Vec<u8>> {
    let buffer = empty(queue, bytes)?;
    let done = execute(queue, Request::Read { lba: Lba::new(lba), buffer })
        .map_err(|error| anyhow!("reading {bytes} bytes at block {lba}: {error}"))?;
    Ok(contents(&done.buffer.context("a read came back without its buffer")?))
}

/// Flushes.
pub(super) fn flush(queue: &mut QueuePair) -> Result<()> {
    execute(queue, Request::Flush).map(|_| ()).map_err(|error| anyhow!("flush: {error}"))
}

/// Insists that `found` is `expected`, and says where they part.
pub(super) fn same(found: &[u8], expected: &[u8], what: &str) -> Result<()> {
    ensure!(found.len() == expected.len(), "{what}: {} bytes instead of {}", found.len(), expected.len());
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => bail!(
            "{what}: byte {at} of {} is {:#04x} instead of {:#04x}",
            found.len(),
            found[at],
            expected[at]
        ),
    }
}
