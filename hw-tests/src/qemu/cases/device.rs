//! What the cases do to a controller: open it, submit, wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nvme::{Controller, DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Completion, Durability, IoError, Lba, OpTag, Request};
use reactor::dma::DmaBuffer;

use crate::qemu::Machine;

/// Longer than the driver takes to give anything up, on the slowest machine.
pub(super) const BOUND: Duration = Duration::from_secs(120);

pub(super) fn open(machine: &Machine) -> Result<Arc<Controller>> {
    let spec: DeviceSpec = machine.spec().parse()?;
    nvme::open(&spec, OpenOptions::default()).with_context(|| format!("opening {spec}"))
}

pub(super) fn options() -> QueueOptions {
    QueueOptions { pool_bytes: 4 << 20, ..QueueOptions::default() }
}

pub(super) fn queue(controller: &Arc<Controller>) -> Result<QueuePair> {
    controller.create_queue(&options()).context("creating a queue pair")
}

/// A buffer of the queue's pool that holds `byte` all over.
pub(super) fn buffer(queue: &QueuePair, bytes: usize, byte: u8) -> Result<DmaBuffer> {
    let mut buffer = queue.pool().try_alloc(bytes).context("no buffer left")?;
    buffer.fill(0, bytes, byte);
    Ok(buffer)
}

pub(super) fn read(queue: &QueuePair, lba: u64, bytes: usize) -> Result<Request> {
    Ok(Request::Read { lba: Lba::new(lba), buffer: buffer(queue, bytes, 0xa5)? })
}

pub(super) fn write(queue: &QueuePair, lba: u64, bytes: usize, byte: u8) -> Result<Request> {
    let buffer = buffer(queue, bytes, byte)?;
    Ok(Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Cached })
}

pub(super) fn submit(queue: &mut QueuePair, tag: u64, request: Request) -> Result<(), IoError> {
    queue.submit(OpTag(tag), request).map_err(|rejected| match rejected.reason {
        reactor::block::RejectReason::Error(error) => error,
        full => IoError::Command { detail: format!("rejected: {full:?}") },
    })?;
    queue.ring();
    Ok(())
}

/// Waits until everything is answered, and insists that it is in bounded time.
pub(super) fn drain(queue: &mut QueuePair) -> Result<Vec<Completion>> {
    let mut done = Vec::new();
    let start = Instant::now();
    while queue.in_flight() > 0 {
        queue.ring();
        if queue.process_completions(64, &mut |completion| done.push(completion)) == 0 {
            ensure!(
                start.elapsed() < BOUND,
                "{} requests were not answered within {BOUND:?}",
                queue.in_flight()
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(done)
}

/// One request on an idle queue. The outer error is a failure of the case.
pub(super) fn execute(queue: &mut QueuePair, request: Request) -> Result<Result<Completion, IoError>> {
    if let Err(error) = submit(queue, 1, request) {
        return Ok(Err(error));
    }
    let mut done = drain(queue)?;
    ensure!(done.len() == 1, "{} answers to one request", done.len());
    let completion = done.remove(0);
    Ok(match completion.result.clone() {
        Ok(()) => Ok(completion),
        Err(error) => Err(error),
    })
}

/// Reads and insists on success, and on every byte being `byte`.
pub(super) fn reads_back(queue: &mut QueuePair, lba: u64, bytes: usize, byte: u8) -> Result<()> {
    let request = read(queue, lba, bytes)?;
    let done = execute(queue, request)?.with_context(|| format!("reading {bytes} bytes at block {lba}"))?;
    let buffer = done.buffer.context("a read came back without its buffer")?;
    let mut data = vec![0; bytes];
    buffer.read_at(0, &mut data);
    let wrong = data.iter().position(|&found| found != byte);
    ensure!(
        wrong.is_none(),
        "block {lba}: byte {} is {:#04x}, not {byte:#04x}",
        wrong.unwrap_or(0),
        data[wrong.unwrap_or(0)]
    );
    Ok(())
}

/// Writes and insists on success.
pub(super) fn writes(queue: &mut QueuePair, lba: u64, bytes: usize, byte: u8) -> Result<()> {
    let request = write(queue, lba, bytes, byte)?;
    execute(queue, request)?.with_context(|| format!("writing {bytes} bytes at block {lba}"))?;
    Ok(())
}
