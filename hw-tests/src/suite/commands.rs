//! What a device can do besides reading and writing. What it cannot is refused by the driver, before the device sees it.

use anyhow::{Result, anyhow, ensure};
use nvme::{NvmRequest, QueuePair};
use reactor::block::{BlockDevice, IoError, Lba, OpTag, RejectReason, Request};

use super::device::{Device, block_bytes, drain, execute, filled, flush, pattern, range, read, same, write};
use super::{Case, Subject, Verdict};

const SUITE: &str = "commands";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "zeroes_are_written_where_asked", run: zeroes },
    Case { suite: SUITE, name: "deallocated_blocks_hold_old_data_or_zeroes", run: deallocate },
    Case { suite: SUITE, name: "compare_tells_equal_from_different", run: compare },
    Case {
        suite: SUITE,
        name: "compare_and_write_writes_over_what_was_expected_only",
        run: compare_and_write,
    },
    Case { suite: SUITE, name: "verify_reads_without_a_transfer", run: verify },
    Case { suite: SUITE, name: "a_copy_arrives_in_order", run: copy },
    Case { suite: SUITE, name: "flushes_among_writes_all_come_back", run: flushes },
];

/// Submits one request to an idle queue and waits for it. A rejection is its result, too.
fn execute_nvm(queue: &mut QueuePair, request: NvmRequest) -> Result<(), IoError> {
    if let Err(rejected) = queue.submit_nvm(OpTag(1), request) {
        return Err(match rejected.reason {
            RejectReason::Error(error) => error,
            full @ RejectReason::QueueFull => {
                IoError::Command { detail: format!("an idle queue says {full:?}") }
            }
        });
    }
    let detail = || "no answer".to_owned();
    drain(queue).pop().map_or_else(|| Err(IoError::Command { detail: detail() }), |done| done.result)
}

/// What a device lacks must not reach it.
fn refused_before_the_device(queue: &mut QueuePair, request: NvmRequest, what: &str) -> Result<Verdict> {
    let before = queue.counters().read().commands;
    let refused = execute_nvm(queue, request);
    ensure!(matches!(refused, Err(IoError::Unsupported { .. })), "{what} without the ability: {refused:?}");
    let sent = queue.counters().read().commands - before;
    ensure!(sent == 0, "{what} is not offered, and {sent} commands were sent");
    Verdict::skipped(format!("the device has no {what} (refused before it)"))
}

fn zeroes(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let blocks = (1 << 20) / block as u64;
    let data = pattern(1, 0, blocks as usize * block, block);
    for (start, count) in [(1, 1), (7, 9), (3, blocks - 5)] {
        write(&mut queue, 0, &data)?;
        let mut expected = data.clone();
        expected[start as usize * block..][..count as usize * block].fill(0);
        execute(&mut queue, Request::WriteZeroes(range(start, count)))
            .map_err(|error| anyhow!("zeroes over {count} blocks at {start}: {error}"))?;
        same(&read(&mut queue, 0, data.len())?, &expected, &format!("{count} zeroed blocks at {start}"))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn deallocate(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let data = pattern(1, 0, 64 * block, block);
    write(&mut queue, 0, &data)?;
    execute(&mut queue, Request::Deallocate(range(8, 32))).map_err(|error| anyhow!("deallocate: {error}"))?;
    let found = read(&mut queue, 0, data.len())?;
    same(&found[..8 * block], &data[..8 * block], "before the range")?;
    same(&found[40 * block..], &data[40 * block..], "behind the range")?;
    for n in 8..40 {
        let (found, old) = (&found[n * block..][..block], &data[n * block..][..block]);
        let uniform = found.iter().all(|&byte| byte == found[0]) && matches!(found[0], 0 | 0xff);
        ensure!(found == old || uniform, "deallocated block {n} holds something new: {:02x?}", &found[..16]);
    }
    let again = read(&mut queue, 8, 32 * block)?;
    same(&again, &found[8 * block..40 * block], "deallocated blocks, read twice")?;
    write(&mut queue, 8, &data[8 * block..40 * block])?;
    same(&read(&mut queue, 0, data.len())?, &data, "written again")?;
    if !queue.geometry().deallocate {
        return Verdict::skipped("the device does not deallocate (the request did nothing)");
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn compare(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let (lba, data) = (Lba::new(10), pattern(5, 10, 64 << 10, block));
    let buffer = filled(&queue, &data)?;
    if !queue.nvm_abilities().compare {
        return refused_before_the_device(&mut queue, NvmRequest::Compare { lba, buffer }, "compare");
    }
    write(&mut queue, 10, &data)?;
    execute_nvm(&mut queue, NvmRequest::Compare { lba, buffer })
        .map_err(|error| anyhow!("equal: {error}"))?;
    for at in [0, data.len() / 2, data.len() - 1] {
        let mut other = data.clone();
        other[at] ^= 1;
        let buffer = filled(&queue, &other)?;
        let differs = execute_nvm(&mut queue, NvmRequest::Compare { lba, buffer });
        ensure!(matches!(differs, Err(IoError::Mismatch { .. })), "byte {at} differs: {differs:?}");
    }
    same(&read(&mut queue, 10, data.len())?, &data, "after comparisons")?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn compare_and_write(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let most = queue.nvm_abilities().compare_and_write as usize;
    let (lba, bytes) = (Lba::new(4), most.clamp(1, 4) * block);
    let (old, new) = (pattern(1, 4, bytes, block), pattern(2, 4, bytes, block));
    let pair = |queue: &QueuePair, expected: &[u8], then: &[u8]| -> Result<NvmRequest> {
        let buffer = filled(queue, &[expected, then].concat())?;
        Ok(NvmRequest::CompareAndWrite { lba, buffer })
    };
    let request = pair(&queue, &old, &new)?;
    if most == 0 {
        return refused_before_the_device(&mut queue, request, "compare-and-write");
    }
    write(&mut queue, 4, &old)?;
    execute_nvm(&mut queue, request).map_err(|error| anyhow!("as expected: {error}"))?;
    same(&read(&mut queue, 4, bytes)?, &new, "written over what was expected")?;
    let request = pair(&queue, &old, &old)?;
    let differs = execute_nvm(&mut queue, request);
    ensure!(differs == Err(IoError::Mismatch { lba: 4 }), "something else was there: {differs:?}");
    same(&read(&mut queue, 4, bytes)?, &new, "not what was expected, so not written")?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn verify(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    if !queue.nvm_abilities().verify {
        return refused_before_the_device(&mut queue, NvmRequest::Verify(range(0, 8)), "verify");
    }
    let count = queue.geometry().lba_count.get();
    let before = queue.counters().read().bytes_read;
    for (start, blocks) in [(0, 1), (5, 1000), (count - 8, 8)] {
        execute_nvm(&mut queue, NvmRequest::Verify(range(start, blocks)))
            .map_err(|error| anyhow!("{blocks} blocks at {start}: {error}"))?;
    }
    ensure!(queue.counters().read().bytes_read == before, "a verify transferred data");
    let beyond = execute_nvm(&mut queue, NvmRequest::Verify(range(count - 1, 2)));
    ensure!(matches!(beyond, Err(IoError::InvalidRange { .. })), "beyond the end: {beyond:?}");
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn copy(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let request = || NvmRequest::Copy {
        sources: vec![range(40, 24), range(3, 1), range(0, 3)],
        destination: Lba::new(500),
    };
    if queue.nvm_abilities().copy.is_none() {
        return refused_before_the_device(&mut queue, request(), "copy");
    }
    let data = pattern(6, 0, 64 * block, block);
    write(&mut queue, 0, &data)?;
    let beside = pattern(7, 528, block, block);
    write(&mut queue, 528, &beside)?;
    execute_nvm(&mut queue, request()).map_err(|error| anyhow!("copy: {error}"))?;
    let expected = [&data[40 * block..], &data[3 * block..4 * block], &data[..3 * block]].concat();
    same(&read(&mut queue, 500, 28 * block)?, &expected, "the copy")?;
    same(&read(&mut queue, 528, block)?, &beside, "behind the copy")?;
    same(&read(&mut queue, 0, data.len())?, &data, "the sources")?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn flushes(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let mut sent = 0;
    for n in 0..48u64 {
        let request = if n % 4 == 3 {
            Request::Flush
        } else {
            let buffer = filled(&queue, &pattern(n, n, block, block))?;
            let durability = reactor::block::Durability::Cached;
            Request::Write { lba: Lba::new(n), buffer, durability }
        };
        queue.submit(OpTag(n), request).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
        sent += 1;
    }
    let mut tags = std::collections::BTreeSet::new();
    for done in drain(&mut queue) {
        done.result.map_err(|error| anyhow!("request {}: {error}", done.tag.0))?;
        ensure!(tags.insert(done.tag.0), "request {} was answered twice", done.tag.0);
    }
    ensure!(tags.len() == sent, "{sent} requests, {} answers", tags.len());
    let before = queue.counters().read().commands;
    flush(&mut queue)?;
    let commands = queue.counters().read().commands - before;
    let cached = queue.geometry().volatile_write_cache;
    ensure!(commands > 0 || !cached, "the device has a volatile cache and was sent no flush");
    for n in (0..48u64).filter(|n| n % 4 != 3) {
        same(&read(&mut queue, n, block)?, &pattern(n, n, block, block), &format!("block {n}"))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}
