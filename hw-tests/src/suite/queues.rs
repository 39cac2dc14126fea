//! Queues: full, many, on several threads, asleep, and given up with commands in flight.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nvme::{Interrupts, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Lba, OpTag, RejectReason, Request};

use super::device::{
    Device, block_bytes, contents, drain, empty, flush, pattern, queue_options, read, same, write,
};
use super::{Case, Subject, Verdict};

const SUITE: &str = "queues";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "a_full_queue_refuses_and_keeps_requests_apart", run: full_queue },
    Case { suite: SUITE, name: "smallest_queue_works", run: smallest_queue },
    Case { suite: SUITE, name: "threads_with_queues_do_not_disturb_each_other", run: threads },
    Case { suite: SUITE, name: "a_sleeping_owner_is_woken", run: woken },
    Case { suite: SUITE, name: "sleeping_and_polling_take_turns", run: turns },
    Case { suite: SUITE, name: "a_queue_closed_with_commands_in_flight_harms_nobody", run: closed_in_flight },
    Case { suite: SUITE, name: "a_shutdown_with_commands_in_flight_answers_them", run: shut_down_in_flight },
];

/// How long an interrupt may take before it counts as lost: longer than any device needs.
const LOST: Duration = Duration::from_secs(20);

fn full_queue(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue_with(&QueueOptions { depth: 13, ..queue_options() })?;
    let block = block_bytes(&queue);
    let depth = u64::from(queue.geometry().queue_depth);
    ensure!(depth <= 13, "{depth} requests at once, asked for 13");
    for lba in 0..32 {
        write(&mut queue, lba, &pattern(2, lba, block, block))?;
    }
    let (mut next, mut done, mut refused) = (0u64, 0u64, 0);
    // Many times around the rings.
    while done < 40 * depth {
        loop {
            let (lba, buffer) = (next * 7 % 32, empty(&queue, block)?);
            match queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }) {
                Ok(()) => next += 1,
                Err(rejected) => {
                    ensure!(rejected.reason == RejectReason::QueueFull, "{:?}", rejected.reason);
                    refused += 1;
                    break;
                }
            }
        }
        ensure!(queue.in_flight() as u64 <= depth, "{} requests in flight", queue.in_flight());
        queue.ring();
        let mut finished = Vec::new();
        queue.process_completions(5, &mut |completion| finished.push(completion));
        for completion in finished {
            let lba = completion.tag.0;
            completion.result.map_err(|error| anyhow!("block {lba}: {error}"))?;
            let found = contents(&completion.buffer.context("a read without its buffer")?);
            same(&found, &pattern(2, lba, block, block), &format!("block {lba}"))?;
            done += 1;
        }
    }
    ensure!(refused > 0, "a queue of {depth} was never full");
    let rest = drain(&mut queue).len() as u64;
    ensure!(done + rest == next, "{next} requests, {} answers", done + rest);
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn smallest_queue(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue_with(&QueueOptions { depth: 1, ..queue_options() })?;
    let block = block_bytes(&queue);
    for lba in 0..20 {
        let data = pattern(lba, lba, 2 * block, block);
        write(&mut queue, lba, &data)?;
        same(&read(&mut queue, lba, 2 * block)?, &data, &format!("block {lba}"))?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn threads(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let count = u64::from(device.controller.max_queues().min(4));
    if count < 2 {
        return Verdict::skipped("the controller has one I/O queue");
    }
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|id| {
                scope.spawn({
                    let device = &device;
                    move || own_blocks(device, id)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("it panicked"))))
            .collect()
    });
    for (id, result) in results.into_iter().enumerate() {
        result.with_context(|| format!("thread {id} of {count}"))?;
    }
    device.close()?;
    Ok(Verdict::Passed)
}

fn own_blocks(device: &Device, id: u64) -> Result<()> {
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    for round in 0..60u64 {
        let lba = 1000 * id + round % 10 * 8;
        let data = pattern(id << 32 | round, lba, 8 * block, block);
        write(&mut queue, lba, &data)?;
        same(&read(&mut queue, lba, 8 * block)?, &data, &format!("round {round}"))?;
    }
    flush(&mut queue)
}

/// Waits for one answer, asleep.
fn sleep_for_one(queue: &mut QueuePair) -> Result<()> {
    let mut done = 0;
    while done == 0 {
        if !queue.arm_interrupt() {
            let descriptor = queue.interrupt().context("no descriptor to sleep on")?;
            let mut descriptors = [PollFd::new(descriptor, PollFlags::POLLIN)];
            let woken = poll(&mut descriptors, PollTimeout::try_from(LOST)?)?;
            ensure!(woken == 1, "no interrupt in {LOST:?}");
        }
        let mut result = Ok(());
        done = queue.process_completions(1, &mut |completion| result = completion.result);
        result?;
    }
    Ok(())
}

fn submit_read(queue: &mut QueuePair, lba: u64) -> Result<()> {
    let block = block_bytes(queue);
    let buffer = empty(queue, block)?;
    let request = Request::Read { lba: Lba::new(lba), buffer };
    queue.submit(OpTag(lba), request).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
    queue.ring();
    Ok(())
}

fn woken(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    if queue.interrupt().is_none() {
        return Verdict::skipped("queues of this device can only be polled");
    }
    for lba in 0..60 {
        submit_read(&mut queue, lba)?;
        sleep_for_one(&mut queue)?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn turns(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let polled = device.queue_with(&QueueOptions { interrupts: Interrupts::Disabled, ..queue_options() })?;
    ensure!(polled.interrupt().is_none(), "a queue without interrupts has a descriptor");
    drop(polled);
    let mut queue = device.queue()?;
    if queue.interrupt().is_none() {
        return Verdict::skipped("queues of this device can only be polled");
    }
    for round in 0..10u64 {
        for lba in 0..5 {
            submit_read(&mut queue, round * 5 + lba)?;
            let answers = drain(&mut queue).len();
            ensure!(answers == 1, "{answers} answers to one request");
        }
        for lba in 0..5 {
            submit_read(&mut queue, round * 5 + lba)?;
            sleep_for_one(&mut queue)?;
        }
        // Several answers, one wake-up at least.
        for lba in 0..8 {
            submit_read(&mut queue, lba)?;
        }
        for _ in 0..8 {
            sleep_for_one(&mut queue)?;
        }
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn closed_in_flight(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut witness = (device.controller.max_queues() > 1).then(|| device.queue()).transpose()?;
    for _ in 0..10 {
        let mut queue = device.queue()?;
        let block = block_bytes(&queue);
        for lba in 0..24 {
            let buffer = empty(&queue, 16 * block)?;
            let request = Request::Read { lba: Lba::new(lba), buffer };
            queue.submit(OpTag(lba), request).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
        }
        queue.ring();
        drop(queue);
        if let Some(witness) = &mut witness {
            read(witness, 0, block)?;
        }
    }
    drop(witness);
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let data = pattern(3, 0, block, block);
    write(&mut queue, 0, &data)?;
    same(&read(&mut queue, 0, block)?, &data, "after ten closed queues")?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn shut_down_in_flight(subject: &Subject) -> Result<Verdict> {
    let kept = {
        let device = Device::open(subject)?;
        let mut queue = device.queue()?;
        let block = block_bytes(&queue);
        let kept = pattern(4, 0, 16 * block, block);
        write(&mut queue, 0, &kept)?;
        flush(&mut queue)?;
        for n in 0..24 {
            let buffer = empty(&queue, 16 * block)?;
            let request = Request::Read { lba: Lba::new(n), buffer };
            queue.submit(OpTag(n), request).map_err(|rejected| anyhow!("{:?}", rejected.reason))?;
        }
        queue.ring();
        device.controller.shutdown().context("shutdown with commands in flight")?;
        let answers = drain(&mut queue);
        ensure!(answers.len() == 24, "24 requests, {} answers", answers.len());
        ensure!(answers.iter().all(|done| done.buffer.is_some()), "a buffer was not given back");
        kept
    };
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    if subject.outlives_processes() {
        same(&read(&mut queue, 0, kept.len())?, &kept, "flushed before the shutdown")?;
    }
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}
