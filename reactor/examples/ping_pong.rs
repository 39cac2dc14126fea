//! Two reactors exchange messages, and one of them stores the last answer on a disk in memory.
//!
//! Run with `cargo run -p reactor --example ping_pong`.

use std::sync::Arc;

use reactor::sim::{SimDisk, SimDiskOptions};
use reactor::{
    Context, CoreId, Durability, Lba, OneshotSender, Options, ReactorConfig, Runtime, SystemClock, mailbox,
    oneshot,
};

const ROUNDS: u64 = 10_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cores: Vec<CoreId> = CoreId::available().into_iter().cycle().take(2).collect();
    let clock = Arc::new(SystemClock::new());
    let options = Options { cores, config: ReactorConfig::default(), clock, seed: 1 };
    let runtime = Runtime::start(options, |id| {
        // The device is made on the reactor's own thread: devices never move between threads.
        Ok::<_, std::io::Error>(Some(SimDisk::new(SimDiskOptions::default()).queue(id)))
    })?;

    let (requests, mut inbox) = mailbox::<(u64, OneshotSender<u64>)>(8, &runtime.handles()[1]);
    runtime.handles()[1].spawn_with(move |ctx: Context| {
        let server = async move {
            while let Some((number, reply)) = inbox.recv().await {
                // The asker may have gone away; then nobody wants the answer.
                let _ = reply.send(number + 1);
            }
        };
        if let Err(error) = ctx.spawn(server) {
            eprintln!("{}: {error}", ctx.reactor());
        }
    })?;

    let (done, result) = oneshot();
    runtime.handles()[0].spawn_with(move |ctx: Context| {
        let own = ctx.clone();
        let client = async move {
            let _ = done.send(play(&own, &requests).await.map_err(|error| error.to_string()));
        };
        if let Err(error) = ctx.spawn(client) {
            eprintln!("{}: {error}", ctx.reactor());
        }
    })?;

    println!("answer on disk: {}", result.recv_blocking()??);
    for handle in runtime.handles() {
        println!("{}: {:?}", handle.id(), handle.stats());
    }
    runtime.stop()?;
    Ok(())
}

async fn play(
    ctx: &Context,
    requests: &reactor::Sender<(u64, OneshotSender<u64>)>,
) -> Result<u64, Box<dyn std::error::Error>> {
    let mut number = 0;
    for _ in 0..ROUNDS {
        let (reply, answer) = oneshot();
        requests.send((number, reply)).await.map_err(|_| "the server has gone")?;
        number = answer.await?;
    }
    let disk = ctx.disk();
    let mut buffer = disk.pool().alloc(4096).await?;
    buffer.write_at(0, &number.to_le_bytes());
    let (result, buffer) = disk.write(Lba::new(0), buffer, Durability::Durable).await;
    result?;
    let (result, buffer) = disk.read(Lba::new(0), buffer).await;
    result?;
    let mut bytes = [0; 8];
    buffer.read_at(0, &mut bytes);
    Ok(u64::from_le_bytes(bytes))
}
