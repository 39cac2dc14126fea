//! Reads and writes: every size and place, and nothing beside them.

use anyhow::{Result, anyhow, bail, ensure};
use nvme::QueuePair;
use reactor::block::{BlockDevice, Durability, IoError, Lba, OpTag, Request};

use super::device::{
    Device, block_bytes, contents, empty, execute, filled, flush, pattern, range, read, same, write, write_as,
};
use super::{Case, Subject, Verdict};

const SUITE: &str = "io";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "every_size_arrives_and_its_neighbours_stay", run: every_size },
    Case { suite: SUITE, name: "every_alignment_arrives", run: every_alignment },
    Case { suite: SUITE, name: "each_block_holds_its_own_data", run: each_block },
    Case { suite: SUITE, name: "first_and_last_block_are_there", run: first_and_last },
    Case { suite: SUITE, name: "beyond_the_end_is_refused_and_named", run: beyond_the_end },
    Case {
        suite: SUITE,
        name: "a_namespace_that_is_not_there_cannot_be_used",
        run: missing_namespace_is_refused,
    },
    Case { suite: SUITE, name: "an_empty_request_succeeds", run: empty_request },
    Case { suite: SUITE, name: "durable_writes_are_read_back", run: durable_writes },
];

/// Blocks on both sides of what is written that must not change.
const EDGE: u64 = 2;

/// Writes `bytes` at `lba` between two known edges, and looks at all three.
fn framed(queue: &mut QueuePair, lba: u64, bytes: usize, seed: u64) -> Result<()> {
    let block = block_bytes(queue);
    let blocks = (bytes / block) as u64;
    let edge_bytes = EDGE as usize * block;
    for at in [lba - EDGE, lba + blocks] {
        write(queue, at, &pattern(!seed, at, edge_bytes, block))?;
    }
    let data = pattern(seed, lba, bytes, block);
    write(queue, lba, &data)?;
    let what = format!("{bytes} bytes at block {lba}");
    same(&read(queue, lba, bytes)?, &data, &what)?;
    for at in [lba - EDGE, lba + blocks] {
        let found = read(queue, at, edge_bytes)?;
        same(&found, &pattern(!seed, at, edge_bytes, block), &format!("beside {what}"))?;
    }
    Ok(())
}

fn every_size(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let most = queue.geometry().preferred_transfer as usize;
    // Around each border that changes how data is described or split: page, two pages, list, largest command.
    let borders = [block, 4096, 8192, 12 << 10, 64 << 10, 128 << 10, most, 2 * most, 1 << 20];
    let mut sizes: Vec<usize> = borders
        .iter()
        .flat_map(|&border| [border.saturating_sub(block), border, border + block])
        .filter(|&bytes| bytes > 0 && bytes <= (1 << 20) + block)
        .map(|bytes| bytes.next_multiple_of(block))
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    for (n, &bytes) in sizes.iter().enumerate() {
        framed(&mut queue, EDGE + 5, bytes, n as u64)?;
    }
    let largest = sizes.last().copied().unwrap_or(0);
    let before = queue.counters().read().commands;
    read(&mut queue, 0, largest)?;
    let commands = queue.counters().read().commands - before;
    let least = largest.div_ceil(most) as u64;
    ensure!(commands >= least, "{largest} bytes in {commands} commands of at most {most}");
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn every_alignment(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    // Buffers come from the pool at whatever offset is free: odd ones are held back to move the next.
    let mut offsets = std::collections::BTreeSet::new();
    for step in 1..=8u64 {
        let _held: Vec<_> = (0..step).map(|_| empty(&queue, block)).collect::<Result<_>>()?;
        let probe = empty(&queue, 3 * block)?;
        offsets.insert(probe.iova() % 4096);
        drop(probe);
        framed(&mut queue, EDGE + step, 3 * block, step)?;
        framed(&mut queue, EDGE + 31 + step, (16 << 10) + block, step)?;
    }
    drop(queue);
    device.close()?;
    if offsets.is_empty() {
        bail!("no buffer was allocated");
    }
    Ok(Verdict::Passed)
}

fn each_block(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let bytes = (256 << 10).max(8 * block);
    let blocks = (bytes / block) as u64;
    let stride = queue.geometry().lba_count.get() / 5;
    ensure!(stride > blocks, "the device is too small: {} blocks", queue.geometry().lba_count);
    // All places first: an address that lost its upper bits would have overwritten another.
    for place in 0..5 {
        write(&mut queue, place * stride, &pattern(place, place * stride, bytes, block))?;
    }
    flush(&mut queue)?;
    for place in 0..5 {
        let lba = place * stride;
        same(&read(&mut queue, lba, bytes)?, &pattern(place, lba, bytes, block), &format!("block {lba}"))?;
    }
    // One by one, what went out in one piece.
    for n in [0, 1, blocks / 2, blocks - 1] {
        let lba = stride + n;
        same(&read(&mut queue, lba, block)?, &pattern(1, lba, block, block), &format!("block {lba} alone"))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn first_and_last(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let last = queue.geometry().lba_count.get() - 1;
    let places = [(0, 1), (last, 1), (0, 8), (last - 7, 8)];
    for (n, (lba, blocks)) in places.into_iter().enumerate() {
        let data = pattern(n as u64, lba, blocks * block, block);
        write(&mut queue, lba, &data)?;
        same(&read(&mut queue, lba, data.len())?, &data, &format!("{blocks} blocks at {lba}"))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn beyond_the_end(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let count = queue.geometry().lba_count.get();
    for (lba, blocks) in [(count, 1), (count - 1, 2), (count - 3, 4), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let bytes = blocks * block;
        let expected =
            IoError::InvalidRange { lba, bytes: bytes as u64, lba_size: queue.geometry().lba_size };
        let buffer = empty(&queue, bytes)?;
        let read = execute(&mut queue, Request::Read { lba: Lba::new(lba), buffer });
        ensure!(read.as_ref().err() == Some(&expected), "read of {blocks} blocks at {lba}: {read:?}");
        let buffer = empty(&queue, bytes)?;
        let durability = Durability::Cached;
        let write = execute(&mut queue, Request::Write { lba: Lba::new(lba), buffer, durability });
        ensure!(write.as_ref().err() == Some(&expected), "write of {blocks} blocks at {lba}: {write:?}");
        for request in
            [Request::WriteZeroes(range(lba, blocks as u64)), Request::Deallocate(range(lba, blocks as u64))]
        {
            let shown = format!("{request:?}");
            let refused = execute(&mut queue, request);
            ensure!(matches!(refused, Err(IoError::InvalidRange { .. })), "{shown}: {refused:?}");
        }
    }
    // Buffers are multiples of 512 bytes: a part of a block only fits where blocks are larger.
    if block > 512 {
        let buffer = empty(&queue, block + 512)?;
        let refused = execute(&mut queue, Request::Read { lba: Lba::new(0), buffer });
        ensure!(matches!(refused, Err(IoError::InvalidRange { .. })), "a part of a block: {refused:?}");
    }
    read(&mut queue, count - 1, block)?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn missing_namespace_is_refused(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let missing = missing_namespace(&device);
    let refused = device.controller.namespace(missing);
    ensure!(refused.is_err(), "namespace {missing} is not in the list and was found");
    let data = device.controller.identify(nvme_spec::identify::Cns::NAMESPACE, missing);
    if let Ok(data) = data {
        ensure!(data.iter().all(|&byte| byte == 0), "namespace {missing} is inactive and has identify data");
    }
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    read(&mut queue, 0, block)?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn missing_namespace(device: &Device) -> nvme_spec::NamespaceId {
    let used: Vec<u32> = device.controller.namespaces().iter().map(|entry| entry.nsid.get()).collect();
    let free = (1..=u32::MAX - 2).find(|id| !used.contains(id)).unwrap_or(1);
    nvme_spec::NamespaceId::new(free)
}

fn empty_request(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let before = queue.counters().read().commands;
    for request in [Request::WriteZeroes(range(1, 0)), Request::Deallocate(range(1, 0))] {
        let shown = format!("{request:?}");
        execute(&mut queue, request).map_err(|error| anyhow!("{shown}: {error}"))?;
    }
    let sent = queue.counters().read().commands - before;
    ensure!(sent == 0, "{sent} commands for nothing");
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn durable_writes(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    for (n, bytes) in [block, 8192, 128 << 10].into_iter().enumerate() {
        let data = pattern(70 + n as u64, 11, bytes, block);
        write_as(&mut queue, 11, &data, Durability::Durable)?;
        same(&read(&mut queue, 11, bytes)?, &data, "a durable write")?;
    }
    // Many of both kinds at once, with a flush among them.
    for n in 0..32u64 {
        let data = pattern(n, 100 + n, block, block);
        let buffer = filled(&queue, &data)?;
        let durability = if n % 2 == 0 { Durability::Cached } else { Durability::Durable };
        let request = Request::Write { lba: Lba::new(100 + n), buffer, durability };
        queue.submit(OpTag(n), request).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
        if n == 16 {
            queue.submit(OpTag(99), Request::Flush).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
        }
    }
    for done in super::device::drain(&mut queue) {
        done.result.map_err(|error| anyhow!("request {}: {error}", done.tag.0))?;
    }
    flush(&mut queue)?;
    for n in 0..32u64 {
        let buffer = empty(&queue, block)?;
        let done = execute(&mut queue, Request::Read { lba: Lba::new(100 + n), buffer })?;
        let found = contents(&done.buffer.ok_or_else(|| anyhow!("no buffer"))?);
        same(&found, &pattern(n, 100 + n, block, block), &format!("block {}", 100 + n))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}
