//! Loads against embedded controllers: what is counted, what ends a load, and what it may write.

use super::*;
use crate::device;

fn load() -> Load {
    Load {
        pattern: Pattern::Random,
        read_percent: 50,
        block_bytes: 4096,
        depth: 8,
        runtime: Duration::from_millis(30),
        warmup: Duration::ZERO,
        latency: Latency::Record,
        seed: 1,
    }
}

fn memory(more: &str) -> Arc<Controller> {
    device::open(&device::parse(&format!("emu:mem,size=16MiB{more}")).unwrap()).unwrap()
}

fn measure(devices: &[Arc<Controller>], cores: &[usize], load: &Load) -> Result<Measured, LoadError> {
    RunningLoad::start(devices, cores, load)?.finish()
}

#[test]
fn every_device_gets_its_share_from_every_core() {
    let devices = [memory(""), memory(",lba=512")];
    let measured = measure(&devices, &[0, 1], &load()).unwrap();
    assert_eq!(measured.devices.len(), 2);
    for device in &measured.devices {
        assert!(device.read.requests > 0 && device.write.requests > 0, "{}", device.device);
        assert_eq!(device.read.latency.len(), device.read.requests);
        assert_eq!(device.write.latency.len(), device.write.requests);
        assert_eq!(device.errors, 0, "{:?}", device.first_error);
    }
    let total = measured.total().both();
    let sum: u64 = measured.devices.iter().map(|device| device.both().requests).sum();
    assert_eq!(total.requests, sum);
    assert!(measured.elapsed >= load().runtime);
}

#[test]
fn latencies_are_left_out_if_they_are_not_wanted() {
    let load = Load { latency: Latency::Ignore, ..load() };
    let measured = measure(&[memory("")], &[0], &load).unwrap();
    let both = measured.total().both();
    assert!(both.requests > 0 && both.iops > 0.0);
    assert!(both.latency.is_empty());
}

/// More requests than the queue has entries wait for their turn.
#[test]
fn depth_beyond_the_queue_is_no_error() {
    let load = Load { depth: 4096, ..load() };
    let measured = measure(&[memory("")], &[0], &load).unwrap();
    assert!(measured.total().both().requests > 0);
    assert_eq!(measured.total().errors, 0);
}

#[test]
fn load_that_is_ended_early_reports_what_there_is() {
    let load = Load { runtime: Duration::from_secs(3600), ..load() };
    let running = RunningLoad::start(&[memory("")], &[0], &load).unwrap();
    while running.requests() == 0 {
        std::thread::yield_now();
    }
    running.end_early();
    let measured = running.finish().unwrap();
    assert!(measured.total().both().requests > 0);
    assert!(measured.elapsed < load.runtime);
}

/// A controller that is shut down under the load fails every request; the threads must not go on for the whole time.
#[test]
fn failed_device_ends_the_load() {
    let load = Load { runtime: Duration::from_secs(3600), ..load() };
    let device = memory("");
    let running = RunningLoad::start(std::slice::from_ref(&device), &[0, 1], &load).unwrap();
    device.shutdown().unwrap();
    let measured = running.finish().unwrap();
    let total = measured.total();
    assert!(total.errors > 0);
    assert!(total.first_error.is_some());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let refused = |devices: &[Arc<Controller>], load: &Load| measure(devices, &[0], load).err().unwrap();
    let odd = Load { block_bytes: 512, ..load() };
    assert!(matches!(refused(&[memory("")], &odd), LoadError::Unaligned { request: 512, block: 4096, .. }));
    let large = Load { block_bytes: 32 << 20, depth: 1, ..load() };
    assert!(matches!(refused(&[memory("")], &large), LoadError::TooSmall { .. }));
    let few = memory(",queues=1");
    let error = measure(&[memory(""), few], &[0, 1], &load()).err().unwrap();
    assert!(matches!(error, LoadError::Queue { error: QueueError::NoQueueLeft { .. }, .. }), "{error}");
}
