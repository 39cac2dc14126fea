//! Writes a block, reads it back, and flushes, on a queue pair that this thread polls.
//!
//! `cargo run -p nvme --example read_write` (the device is in memory: nothing is overwritten)

use std::error::Error;

use nvme::{DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Completion, Durability, Lba, OpTag, Request};

/// Sends one request and polls until it is done.
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

    let text = b"poll-mode, user-space, extents";
    let mut buffer = queue.pool().try_alloc(4096).ok_or("no buffer")?;
    buffer.write_at(0, text);
    let lba = Lba::new(42);
    execute(&mut queue, Request::Write { lba, buffer, durability: Durability::Cached })?.result?;

    let buffer = queue.pool().try_alloc(4096).ok_or("no buffer")?;
    let done = execute(&mut queue, Request::Read { lba, buffer })?;
    done.result?;
    let mut back = vec![0; text.len()];
    done.buffer.ok_or("no buffer")?.read_at(0, &mut back);
    println!("block {lba}: {}", String::from_utf8_lossy(&back));

    execute(&mut queue, Request::Flush)?.result?;
    println!("{:?}", queue.counters().read());
    Ok(())
}
