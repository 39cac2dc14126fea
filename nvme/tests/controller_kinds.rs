//! The driver against controllers that differ in what they offer: shadow doorbells, SGLs or none, large memory pages.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{Controller, ControllerOptions, QueueOptions, QueuePair};
use nvme_emulator::{
    ControllerConfig, EmulatedController, Mode, NamespaceConfig, SglSupport, ShadowDoorbells, ThreadOptions,
};
use reactor::block::{BlockDevice, Durability, Lba, OpTag, Request};

/// How long anything may take before a test fails: a limit, never a measure.
const DEADLINE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;

fn modes() -> [Mode; 3] {
    let sleepy = Mode::Threaded(ThreadOptions { workers: 1, spin: Duration::ZERO });
    [Mode::Inline, Mode::Threaded(ThreadOptions::default()), sleepy]
}

fn config(mode: Mode) -> ControllerConfig {
    let namespace = NamespaceConfig::memory(BLOCKS * BLOCK as u64);
    ControllerConfig { mode, ..ControllerConfig::with_namespace(namespace) }
}

fn queue(config: ControllerConfig, depth: u16) -> (Arc<EmulatedController>, QueuePair) {
    let emulator = EmulatedController::new(config).unwrap();
    let transport = Arc::new(EmbeddedTransport::new(Arc::clone(&emulator), "emu:test"));
    let timing = Arc::new(SystemTiming::default());
    let controller = Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap();
    let options = QueueOptions { depth, pool_bytes: 16 << 20, ..QueueOptions::default() };
    (emulator, controller.create_queue(&options).unwrap())
}

/// Runs requests until none is in flight, and hands out what came back.
fn drain(queue: &mut QueuePair, mut sink: impl FnMut(reactor::block::Completion)) {
    queue.ring();
    let start = Instant::now();
    while queue.in_flight() > 0 {
        queue.process_completions(8, &mut sink);
        queue.ring();
        assert!(start.elapsed() < DEADLINE, "the device hangs");
    }
}

fn block_of(lba: u64, round: u64) -> Vec<u8> {
    let word = (lba << 32 | round).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_le_bytes().repeat(BLOCK / 8)
}

/// Writes and reads back in batches of changing size, up to `most` requests.
fn exercise(queue: &mut QueuePair, most: u64) {
    for round in 0..100 {
        let lbas = (0..1 + round % most).map(|i| (round * 7 + i) % BLOCKS);
        for lba in lbas.clone() {
            let mut buffer = queue.pool().try_alloc(BLOCK).unwrap();
            buffer.write_at(0, &block_of(lba, round));
            let request = Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Cached };
            queue.submit(OpTag(lba), request).unwrap();
        }
        drain(queue, |done| assert_eq!(done.result, Ok(())));
        for lba in lbas {
            let buffer = queue.pool().try_alloc(BLOCK).unwrap();
            queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
        }
        drain(queue, |done| {
            assert_eq!(done.result, Ok(()));
            let mut bytes = vec![0; BLOCK];
            done.buffer.unwrap().read_at(0, &mut bytes);
            assert!(bytes == block_of(done.tag.0, round));
        });
    }
}

#[test]
fn shadow_doorbells_work_in_every_mode_and_depth() {
    for mode in modes() {
        for depth in [2, 4, 32] {
            let shadow_doorbells = ShadowDoorbells::Offered;
            let (emulator, mut queue) = queue(ControllerConfig { shadow_doorbells, ..config(mode) }, depth);
            exercise(&mut queue, u64::from(depth) - 1);
            assert_eq!(emulator.memory().fault_count(), 0);
        }
    }
}

#[test]
fn every_page_size_and_kind_of_data_pointer_carries_small_and_large_transfers() {
    for (mpsmin, sgls) in (0..=4).flat_map(|mpsmin| {
        [SglSupport::Absent, SglSupport::Byte, SglSupport::Dword].map(|sgls| (mpsmin, sgls))
    }) {
        let (emulator, mut queue) = queue(ControllerConfig { mpsmin, sgls, ..config(Mode::Inline) }, 32);
        exercise(&mut queue, 31);
        let data: Vec<u8> = (0..BLOCKS).flat_map(|lba| block_of(lba, 12_345)).collect();
        let mut buffer = queue.pool().try_alloc(data.len()).unwrap();
        buffer.write_at(0, &data);
        let request = Request::Write { lba: Lba::new(0), buffer, durability: Durability::Durable };
        queue.submit(OpTag(1), request).unwrap();
        drain(&mut queue, |done| assert_eq!(done.result, Ok(())));
        let buffer = queue.pool().try_alloc(data.len()).unwrap();
        queue.submit(OpTag(2), Request::Read { lba: Lba::new(0), buffer }).unwrap();
        drain(&mut queue, |done| {
            assert_eq!(done.result, Ok(()));
            let mut bytes = vec![0; data.len()];
            done.buffer.unwrap().read_at(0, &mut bytes);
            assert!(bytes == data, "mpsmin {mpsmin}, {sgls:?}");
        });
        assert_eq!(emulator.memory().fault_count(), 0);
    }
}
