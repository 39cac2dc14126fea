//! Random reads of 4 KiB from one thread that keeps a queue full: the loop that a storage engine would write.
//!
//! `cargo run --release --example perf -p nvme -- emu:mem,size=1GiB 32 3` (device, requests in flight, seconds)

use std::error::Error;
use std::time::{Duration, Instant};

use nvme::{DeviceSpec, Interrupts, OpenOptions, QueueOptions};
use reactor::block::{BlockDevice, Lba, OpTag, Request};

const REQUEST: usize = 4096;
/// Rounds between two looks at the clock, which costs as much as a request.
const ROUNDS_PER_LOOK: u32 = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let spec: DeviceSpec = arguments.next().unwrap_or_else(|| "emu:mem,size=1GiB".to_owned()).parse()?;
    let depth: u16 = arguments.next().unwrap_or_else(|| "32".to_owned()).parse()?;
    let seconds: u64 = arguments.next().unwrap_or_else(|| "3".to_owned()).parse()?;

    let controller = nvme::open(&spec, OpenOptions::default())?;
    let options = QueueOptions { depth, interrupts: Interrupts::Disabled, ..QueueOptions::default() };
    let mut queue = controller.create_queue(&options)?;
    let lba_size = queue.geometry().lba_size as usize;
    if lba_size > REQUEST {
        return Err(format!("blocks of {lba_size} bytes are larger than a request").into());
    }
    let blocks = (REQUEST / lba_size) as u64;
    let places = queue.geometry().lba_count.get() / blocks;

    // One buffer for each request in flight; a completion brings it back, and it goes out again.
    let mut idle = Vec::new();
    for _ in 0..depth.min(queue.geometry().queue_depth) {
        idle.push(queue.pool().try_alloc(REQUEST).ok_or("no DMA memory left for buffers")?);
    }

    let mut random = 0x9e37_79b9_7f4a_7c15;
    let (mut done, mut failed) = (0_u64, None);
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    while failed.is_none() && Instant::now() < end {
        for _ in 0..ROUNDS_PER_LOOK {
            while let Some(buffer) = idle.pop() {
                let lba = Lba::new(below(places, &mut random) * blocks);
                queue
                    .submit(OpTag(0), Request::Read { lba, buffer })
                    .map_err(|rejected| format!("rejected: {:?}", rejected.reason))?;
            }
            // One doorbell for all of them.
            queue.ring();
            queue.process_completions(usize::from(depth), &mut |completion| {
                done += 1;
                if let Err(error) = completion.result {
                    failed = Some(error);
                }
                idle.extend(completion.buffer);
            });
        }
    }
    if let Some(error) = failed {
        return Err(error.into());
    }

    let taken = begun.elapsed().as_secs_f64();
    let counts = queue.counters().read();
    println!("{spec}: {done} reads of {REQUEST} bytes in {taken:.1} s, {depth} in flight");
    println!("  {:.0} IOPS, {:.0} MB/s", done as f64 / taken, (done * REQUEST as u64) as f64 / taken / 1e6);
    println!("  {:.3} doorbell writes a read", counts.doorbells as f64 / counts.commands.max(1) as f64);
    Ok(())
}

/// A number below `bound`: xorshift, then multiply and shift, as a division would be felt.
fn below(bound: u64, state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    ((u128::from(*state) * u128::from(bound)) >> 64) as u64
}
