//! Loads against embedded controllers: what is counted, what ends a load, and what it may write.

use super::*;
use crate::device;
use nvme::ControllerOptions;
use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme_emulator::{
    CommandMatch, ControllerConfig, Effect, EmulatedController, FaultRule, NamespaceConfig, Times,
};
use nvme_spec::NvmOpcode;

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
        verify: Verify::Off,
        precondition: Precondition::Nothing,
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

/// What the device did to data while a load that checks it ran.
fn verified(load: &Load, rule: Option<FaultRule>) -> DeviceFigures {
    let namespace = NamespaceConfig::memory(4 << 20).with_lba_size(4096);
    let emulator = EmulatedController::new(ControllerConfig::with_namespace(namespace)).unwrap();
    if let Some(rule) = rule {
        emulator.faults().add(rule);
    }
    let transport = Arc::new(EmbeddedTransport::new(emulator, "emu:verify"));
    let options = ControllerOptions::default();
    let controller = Controller::bring_up(transport, Arc::new(SystemTiming::default()), &options).unwrap();
    let measured = measure(std::slice::from_ref(&controller), &[0, 0], load).unwrap();
    controller.shutdown().unwrap();
    measured.total()
}

#[test]
fn data_is_read_back_and_right_while_nobody_spoils_it() {
    for (pattern, read_percent) in
        [(Pattern::Random, 0), (Pattern::Random, 70), (Pattern::Sequential, 0), (Pattern::Sequential, 30)]
    {
        for block_bytes in [4096, 16 << 10] {
            let load = Load { pattern, read_percent, block_bytes, verify: Verify::On, ..load() };
            let figures = verified(&load, None);
            assert!(figures.checked > 0, "{load:?}");
            assert_eq!((figures.wrong, figures.errors), (0, 0), "{load:?}: {:?}", figures.first_wrong);
            assert_eq!(figures.read.requests > 0, read_percent > 0, "reading back is not measured");
        }
    }
}

#[test]
fn wrong_data_is_found_with_its_block() {
    let write = CommandMatch::io(NvmOpcode::WRITE).on_lbas(16..17);
    let read = CommandMatch::io(NvmOpcode::READ).on_lbas(16..17);
    // So deep that the first round reaches the block, however short the time is.
    let load =
        Load { pattern: Pattern::Sequential, read_percent: 0, depth: 32, verify: Verify::On, ..load() };
    for (command, effect, says) in [
        (write.clone(), Effect::LoseWrite, "block 16 holds 0x0000000000000000 at byte 0"),
        (write.clone(), Effect::CorruptData { byte: 700, bit: 5 }, "block 16 holds"),
        (write.clone(), Effect::TearWrite { sectors: 3 }, "at byte 1536"),
        (read.clone(), Effect::CorruptData { byte: 700, bit: 5 }, "at byte 696"),
        (read.clone(), Effect::NoTransfer, "block 16 holds 0x0000000000000000"),
        (read, Effect::MisdirectWrite { lba_delta: 5 }, "block 16 holds the data of block 21"),
    ] {
        let rule = FaultRule::new(command, effect.clone()).times(Times::Forever);
        let figures = verified(&load, Some(rule));
        assert!(figures.wrong > 0 && figures.errors == 0, "{effect:?}");
        let wrong = figures.first_wrong.unwrap().to_string();
        assert!(wrong.contains(says), "{effect:?}: {wrong}");
    }
}

#[test]
fn a_preconditioned_device_was_written_everywhere() {
    for (block_bytes, cores) in [(4096, vec![0]), (4096, vec![0, 1, 0]), (48 << 10, vec![0, 1])] {
        let device = memory("");
        let load = Load {
            read_percent: 100,
            block_bytes,
            verify: Verify::On,
            precondition: Precondition::Written,
            ..load()
        };
        let total = measure(&[device], &cores, &load).unwrap().total();
        // Each place is read back once by whoever wrote it, and none by two.
        let places = (16 << 20) / block_bytes;
        assert!(total.checked >= places, "{} of {places} places", total.checked);
        assert_eq!((total.wrong, total.errors, total.write.requests), (0, 0, 0), "not part of the figures");
    }
}
