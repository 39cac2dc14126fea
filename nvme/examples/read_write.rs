//! Writes a block, makes it durable, and reads it back, on a queue pair that this thread polls.
//!
//! `cargo run --release --example read_write -p nvme` (the device is in memory: nothing is overwritten)

use std::error::Error;

use nvme::{DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Completion, Durability, Lba, OpTag, Request};

/// Sends one request and polls until it is done: the simplest way, and the slowest. See the example `perf` for how to
/// keep a queue full.
fn execute(queue: &mut QueuePair, request: Request) -> Result<Completion, Box<dyn Error>> {
    queue.submit(OpTag(0), request).map_err(|rejected| format!("rejected: {:?}", rejected.reason))?;
    queue.ring();
    let mut done = None;
    while done.is_none() {
        queue.process_completions(1, &mut |completion| done = Some(completion));
    }
    Ok(done.ok_or("no completion")?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let spec: DeviceSpec = "emu:mem,size=64MiB".parse()?;
    let controller = nvme::open(&spec, OpenOptions::default())?;
    let mut queue = controller.create_queue(&QueueOptions::default())?;

    // Buffers come from the queue's own pool: memory that the device can reach.
    let text = b"poll-mode, user-space, extents";
    let mut buffer = queue.pool().try_alloc(4096).ok_or("no buffer")?;
    buffer.write_at(0, text);

    // The buffer moves into the request, so that nobody can touch it while the device may.
    let lba = Lba::new(42);
    execute(&mut queue, Request::Write { lba, buffer, durability: Durability::Cached })?.result?;
    execute(&mut queue, Request::Flush)?.result?;

    // It comes back with the completion.
    let buffer = queue.pool().try_alloc(4096).ok_or("no buffer")?;
    let done = execute(&mut queue, Request::Read { lba, buffer })?;
    done.result?;
    let mut back = vec![0; text.len()];
    done.buffer.ok_or("no buffer")?.read_at(0, &mut back);
    println!("block {lba}: {}", String::from_utf8_lossy(&back));

    let counts = queue.counters().read();
    println!(
        "{} requests, {} commands, {} bytes read, {} written",
        counts.requests, counts.commands, counts.bytes_read, counts.bytes_written
    );
    Ok(())
}
