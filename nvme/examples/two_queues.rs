//! Two threads, two queues, one controller: a queue pair belongs to the thread that made it, and the two never meet.
//!
//! Each thread writes its half of the device, and then reads what the other has written.
//!
//! `cargo run --release --example two_queues -p nvme` (the device is in memory: nothing is overwritten)

use std::sync::{Arc, Barrier};
use std::thread;

use nvme::{Controller, DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Durability, Lba, OpTag, Request};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const REQUEST: usize = 64 << 10;

fn main() -> Result<()> {
    let spec: DeviceSpec = "emu:mem,size=64MiB,queues=2".parse()?;
    // `Controller` is `Send + Sync`: every thread has a handle, and makes a queue of its own.
    let controller = nvme::open(&spec, OpenOptions::default())?;
    let both_have_written = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2)
        .map(|half| {
            let (controller, barrier) = (controller.clone(), both_have_written.clone());
            thread::spawn(move || work(&controller, half, &barrier))
        })
        .collect();
    for thread in threads {
        println!("{}", thread.join().map_err(|_| "a thread panicked")??);
    }
    Ok(())
}

fn work(controller: &Arc<Controller>, half: u64, both_have_written: &Barrier) -> Result<String> {
    let written = write_half(controller, half);
    // Waited for in any case: the other thread must not wait for ever.
    both_have_written.wait();
    let mut queue = written?;
    let other = 1 - half;
    for place in places(&queue, other) {
        check(&mut queue, place, other as u8 + 1)?;
    }
    let counts = queue.counters().read();
    Ok(format!(
        "queue {}: wrote {} MiB, read {} MiB that the other wrote, {} commands",
        queue.id(),
        counts.bytes_written >> 20,
        counts.bytes_read >> 20,
        counts.commands
    ))
}

/// Makes this thread's queue, and fills half of the device through it.
fn write_half(controller: &Arc<Controller>, half: u64) -> Result<QueuePair> {
    let mut queue = controller.create_queue(&QueueOptions::default())?;
    for place in places(&queue, half) {
        write(&mut queue, place, half as u8 + 1)?;
    }
    Ok(queue)
}

/// First blocks of the requests that make up one half of the device.
fn places(queue: &QueuePair, half: u64) -> impl Iterator<Item = Lba> + use<> {
    let blocks = REQUEST as u64 / u64::from(queue.geometry().lba_size);
    let middle = queue.geometry().lba_count.get() / 2;
    (half * middle..(half + 1) * middle).step_by(blocks as usize).map(Lba::new)
}

fn write(queue: &mut QueuePair, lba: Lba, byte: u8) -> Result<()> {
    let mut buffer = queue.pool().try_alloc(REQUEST).ok_or("no buffer")?;
    buffer.fill(0, REQUEST, byte);
    execute(queue, Request::Write { lba, buffer, durability: Durability::Cached }).map(drop)
}

fn check(queue: &mut QueuePair, lba: Lba, byte: u8) -> Result<()> {
    let buffer = queue.pool().try_alloc(REQUEST).ok_or("no buffer")?;
    let buffer = execute(queue, Request::Read { lba, buffer })?;
    let mut data = vec![0; REQUEST];
    buffer.ok_or("no buffer")?.read_at(0, &mut data);
    if data.iter().any(|&found| found != byte) {
        return Err(format!("block {lba} does not hold what was written").into());
    }
    Ok(())
}

/// Sends one request and polls until it is done.
fn execute(queue: &mut QueuePair, request: Request) -> Result<Option<reactor::DmaBuffer>> {
    queue.submit(OpTag(0), request).map_err(|rejected| format!("rejected: {:?}", rejected.reason))?;
    queue.ring();
    let mut done = None;
    while done.is_none() {
        queue.process_completions(1, &mut |completion| done = Some(completion));
    }
    let done = done.ok_or("no completion")?;
    done.result?;
    Ok(done.buffer)
}
