//! Bring-up: a controller can be taken into use, again and again, whatever the last user left behind.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nvme::{Interrupts, Life, QueueOptions};
use reactor::block::{BlockDevice, Lba, OpTag, Request};

use super::device::{Device, block_bytes, empty, flush, pattern, queue_options, read, same, write};
use super::{Case, Subject, Verdict};

const SUITE: &str = "bring-up";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "one_user_after_another", run: one_user_after_another },
    Case { suite: SUITE, name: "asked_for_queues_are_there", run: asked_for_queues_are_there },
    Case { suite: SUITE, name: "shutdown_completes_and_ends_the_queues", run: shutdown_completes },
    Case { suite: SUITE, name: "a_killed_process_leaves_a_usable_device", run: killed_process },
];

fn one_user_after_another(subject: &Subject) -> Result<Verdict> {
    let mut before: Option<Vec<u8>> = None;
    for round in 0..3u64 {
        let device = Device::open(subject)?;
        ensure!(device.controller.life() == Life::Running, "after bring-up: {:?}", device.controller.life());
        let mut queue = device.queue()?;
        let block = block_bytes(&queue);
        if let Some(expected) = before.take().filter(|_| subject.outlives_processes()) {
            same(&read(&mut queue, 3, 4 * block)?, &expected, "what the last user wrote")?;
        }
        let data = pattern(round, 3, 4 * block, block);
        write(&mut queue, 3, &data)?;
        flush(&mut queue)?;
        drop(queue);
        device.close().with_context(|| format!("round {round}"))?;
        before = Some(data);
    }
    Ok(Verdict::Passed)
}

fn asked_for_queues_are_there(subject: &Subject) -> Result<Verdict> {
    let most = Device::open(subject)?.controller.max_queues();
    ensure!(most > 0, "no I/O queue");
    for count in [1, most.min(4)] {
        let device = Device::open_with(subject, |spec| spec.queues = Some(count))?;
        let granted = device.controller.max_queues();
        ensure!(granted == count, "{granted} queues granted, asked for {count} of {most}");
        let options = QueueOptions { pool_bytes: 1 << 20, ..queue_options() };
        let mut queues: Vec<_> = (0..count).map(|_| device.queue_with(&options)).collect::<Result<_>>()?;
        ensure!(device.queue_with(&options).is_err(), "queue {} of {count} was created", count + 1);
        for queue in &mut queues {
            let block = block_bytes(queue);
            read(queue, 0, block)?;
        }
        let mut ids: Vec<u16> = queues.iter().map(|queue| queue.id().get()).collect();
        ids.sort_unstable();
        ids.dedup();
        ensure!(ids.len() == usize::from(count), "queue ids {ids:?}");
        // One that was closed makes room for another.
        queues.pop();
        queues.push(device.queue_with(&options)?);
        drop(queues);
        device.close()?;
    }
    Ok(Verdict::Passed)
}

fn shutdown_completes(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    write(&mut queue, 0, &pattern(1, 0, block, block))?;
    // Waits for CSTS.SHST to say that it is complete.
    device.controller.shutdown().context("shutdown notification")?;
    let buffer = empty(&queue, block)?;
    let rejected = queue.submit(OpTag(1), Request::Read { lba: Lba::new(0), buffer });
    ensure!(rejected.is_err(), "a request was accepted after the shutdown");
    device.controller.shutdown().context("a second shutdown")?;
    ensure!(device.controller.smart_log().is_err(), "an admin command was answered after the shutdown");
    Ok(Verdict::Passed)
}

fn killed_process(subject: &Subject) -> Result<Verdict> {
    if !subject.outlives_processes() {
        return Verdict::skipped("another process would have a device of its own");
    }
    let data = {
        let device = Device::open(subject)?;
        let mut queue = device.queue()?;
        let block = block_bytes(&queue);
        let data = pattern(9, 0, 8 * block, block);
        write(&mut queue, 0, &data)?;
        flush(&mut queue)?;
        drop(queue);
        device.close()?;
        data
    };
    let own = std::env::current_exe()?;
    for round in 0..2 {
        let mut child = Command::new(&own)
            .args(["--device", &subject.spec, "--busy"])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", own.display()))?;
        let mut line = String::new();
        let said = child.stdout.take().context("a pipe").map(BufReader::new)?.read_line(&mut line);
        child.kill()?;
        let status = child.wait()?;
        ensure!(said? > 0, "the other process ended with {status} before it had done anything");
        let device = Device::open(subject).with_context(|| format!("after kill -9, round {round}"))?;
        let mut queue = device.queue()?;
        same(&read(&mut queue, 0, data.len())?, &data, "flushed before another process was killed")?;
        drop(queue);
        device.close()?;
    }
    Ok(Verdict::Passed)
}

/// Reads and writes behind the first 64 blocks until killed. Says so once the first request has been answered.
pub(super) fn keep_busy(subject: &Subject) -> Result<()> {
    let device = Device::open(subject)?;
    let options = QueueOptions { interrupts: Interrupts::Disabled, ..queue_options() };
    let mut queue = device.queue_with(&options)?;
    let block = block_bytes(&queue);
    let (mut next, mut said) = (0u64, false);
    loop {
        while queue.in_flight() < 32 {
            let buffer = empty(&queue, 4 * block)?;
            let lba = Lba::new(64 + next % 64 * 4);
            let durability = reactor::block::Durability::Cached;
            let request = if next % 2 == 0 {
                Request::Write { lba, buffer, durability }
            } else {
                Request::Read { lba, buffer }
            };
            next += 1;
            if queue.submit(OpTag(next), request).is_err() {
                break;
            }
        }
        queue.ring();
        let mut failed = None;
        let done = queue.process_completions(64, &mut |completion| {
            failed = completion.result.err();
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        if done > 0 && !said {
            said = true;
            println!("busy");
            std::io::stdout().flush()?;
        }
    }
}
