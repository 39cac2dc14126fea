//! The driver against the embedded controller: both modes, both block sizes, whole stack below the reactor.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

mod requests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nvme::spec_string::{DeviceSpec, Target};
use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{Controller, ControllerOptions, Interrupts, OpenOptions, QueueOptions, QueuePair};
use nvme_emulator::{
    ControllerConfig, CutPolicy, EmulatedController, Mode, NamespaceConfig, SUPPORTED_ONCS, ThreadOptions,
    WriteCache,
};
use nvme_spec::identify::Oncs;
use proptest::prelude::*;
use reactor::block::{
    BlockDevice, Durability, IoError, Lba, LbaCount, LbaRange, OpTag, RejectReason, Request,
};
use requests::{drain, execute, pattern, read, read_asleep, write};

struct Stack {
    emulator: Arc<EmulatedController>,
    controller: Arc<Controller>,
    queue: QueuePair,
}

const MODES: [fn() -> Mode; 2] = [|| Mode::Inline, || Mode::Threaded(ThreadOptions::default())];

fn config(mode: Mode, lba: u32) -> ControllerConfig {
    let namespace = NamespaceConfig::memory(64 << 20).with_lba_size(lba);
    ControllerConfig { mode, ..ControllerConfig::with_namespace(namespace) }
}

fn stack(config: ControllerConfig, options: &QueueOptions) -> Stack {
    let emulator = EmulatedController::new(config).unwrap();
    let transport = Arc::new(EmbeddedTransport::new(Arc::clone(&emulator), "emu:test"));
    let timing = Arc::new(SystemTiming::default());
    let controller = Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap();
    let queue = controller.create_queue(options).unwrap();
    Stack { emulator, controller, queue }
}

fn small_pool() -> QueueOptions {
    QueueOptions { pool_bytes: 16 << 20, ..QueueOptions::default() }
}

#[test]
fn transfers_of_every_size_arrive_in_every_mode_and_block_size() {
    for mode in MODES {
        for lba in [512, 4096] {
            for mdts in [0, 1, 5] {
                let mut config = config(mode(), lba);
                config.mdts = mdts;
                let mut stack = stack(config, &small_pool());
                let unit = lba as usize;
                for bytes in [unit, 3 * unit, 8192, 12288, 128 << 10, (1 << 20) + 4096, (2 << 20) - unit] {
                    let bytes = bytes.next_multiple_of(unit);
                    let data = pattern(bytes as u64, bytes);
                    write(&mut stack.queue, 7, &data);
                    assert!(
                        read(&mut stack.queue, 7, bytes) == data,
                        "{bytes} bytes, lba {lba}, mdts {mdts}"
                    );
                }
                assert_eq!(stack.emulator.memory().fault_count(), 0);
            }
        }
    }
}

#[test]
fn the_largest_buffer_goes_out_as_one_command() {
    let mut config = config(Mode::Inline, 4096);
    config.mdts = 0;
    // Its list fills a page but for one entry; `zeroes_by_writing…` chains lists.
    let options = QueueOptions { max_transfer: 8 << 20, ..small_pool() };
    let mut stack = stack(config, &options);
    let data = pattern(1, 2 << 20);
    write(&mut stack.queue, 0, &data);
    assert_eq!(stack.queue.counters().read().commands, 1);
    assert!(read(&mut stack.queue, 0, 2 << 20) == data);
    let range = LbaRange { start: Lba::new(0), count: LbaCount::new(4096) };
    assert_eq!(execute(&mut stack.queue, Request::WriteZeroes(range)).result, Ok(()));
    assert!(read(&mut stack.queue, 0, 2 << 20).iter().all(|&byte| byte == 0));
}

#[test]
fn zeroes_by_writing_use_one_page_over_and_over() {
    for mode in MODES {
        let mut config = config(mode(), 512);
        config.oncs = SUPPORTED_ONCS.difference(Oncs::WRITE_ZEROES);
        config.mdts = 0;
        let options = QueueOptions { max_transfer: 8 << 20, ..small_pool() };
        let mut stack = stack(config, &options);
        let edge = pattern(3, 1024);
        write(&mut stack.queue, 10, &edge);
        write(&mut stack.queue, 10 + 16_384 * 2 - 2, &edge);
        let range = LbaRange { start: Lba::new(11), count: LbaCount::new(16_384 * 2 - 2) };
        assert_eq!(execute(&mut stack.queue, Request::WriteZeroes(range)).result, Ok(()));
        let commands = stack.queue.counters().read().commands;
        assert_eq!(commands, 4, "16 MiB less a block in two commands of chained lists");
        assert_eq!(read(&mut stack.queue, 10, 512), edge[..512]);
        assert!(read(&mut stack.queue, 11, 2 << 20).iter().all(|&byte| byte == 0));
        assert_eq!(read(&mut stack.queue, 10 + 16_384 * 2 - 1, 512), edge[512..]);
        assert_eq!(stack.emulator.memory().fault_count(), 0);
    }
}

#[test]
fn a_full_queue_over_many_laps_keeps_every_request_apart() {
    for mode in MODES {
        let options = QueueOptions { depth: 13, ..small_pool() };
        let mut stack = stack(config(mode(), 4096), &options);
        let queue = &mut stack.queue;
        for lba in 0..64 {
            write(queue, lba, &pattern(lba, 4096));
        }
        let (mut next, mut done, mut fulls) = (0u64, 0u64, 0);
        while done < 5000 {
            loop {
                let buffer = queue.pool().try_alloc(4096).unwrap();
                let lba = next * 31 % 64;
                match queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }) {
                    Ok(()) => next += 1,
                    Err(rejected) => {
                        assert_eq!(rejected.reason, RejectReason::QueueFull);
                        fulls += 1;
                        break;
                    }
                }
            }
            queue.ring();
            queue.process_completions(5, &mut |completion| {
                assert_eq!(completion.result, Ok(()));
                let mut data = vec![0; 4096];
                completion.buffer.unwrap().read_at(0, &mut data);
                assert!(data == pattern(completion.tag.0, 4096), "block {}", completion.tag.0);
                done += 1;
            });
        }
        assert!(fulls > 0);
        drain(queue);
    }
}

#[test]
fn a_sleeping_owner_is_woken_by_the_interrupt() {
    let mut stack = stack(config(MODES[1](), 4096), &small_pool());
    let queue = &mut stack.queue;
    read_asleep(queue, 200);
}

#[test]
fn two_threads_use_two_queues_at_once() {
    for mode in MODES {
        let stack = stack(config(mode(), 4096), &small_pool());
        std::thread::scope(|scope| {
            for thread in 0..2u64 {
                let controller = &stack.controller;
                scope.spawn(move || {
                    let mut queue = controller.create_queue(&small_pool()).unwrap();
                    for round in 0..300 {
                        let lba = thread * 1000 + round % 50;
                        let data = pattern(thread << 32 | round, 16 << 10);
                        write(&mut queue, lba * 4, &data);
                        assert!(read(&mut queue, lba * 4, 16 << 10) == data);
                    }
                });
            }
        });
        assert!(stack.controller.fault().is_none());
        assert_eq!(stack.emulator.memory().fault_count(), 0);
    }
}

#[test]
fn queues_come_and_go_with_commands_in_flight() {
    for mode in MODES {
        let stack = stack(config(mode(), 4096), &small_pool());
        for _ in 0..50 {
            let mut queue = stack.controller.create_queue(&small_pool()).unwrap();
            for lba in 0..32 {
                let buffer = queue.pool().try_alloc(64 << 10).unwrap();
                queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
            }
            queue.ring();
        }
        assert!(stack.controller.fault().is_none());
        assert_eq!(stack.emulator.memory().fault_count(), 0, "memory outlived the commands");
    }
}

#[test]
fn deallocated_blocks_read_as_zeroes_and_errors_name_the_status() {
    let mut stack = stack(config(Mode::Inline, 4096), &small_pool());
    write(&mut stack.queue, 0, &pattern(9, 64 << 10));
    let range = LbaRange { start: Lba::new(1), count: LbaCount::new(2) };
    assert_eq!(execute(&mut stack.queue, Request::Deallocate(range)).result, Ok(()));
    assert!(read(&mut stack.queue, 1, 8192).iter().all(|&byte| byte == 0));
    assert_eq!(read(&mut stack.queue, 3, 4096), pattern(9, 64 << 10)[3 * 4096..4 * 4096]);
    assert_eq!(execute(&mut stack.queue, Request::Flush).result, Ok(()));
}

#[test]
fn shutdown_fails_what_is_submitted_later() {
    let mut stack = stack(config(MODES[1](), 4096), &small_pool());
    stack.controller.shutdown().unwrap();
    let buffer = stack.queue.pool().try_alloc(4096).unwrap();
    let rejected = stack.queue.submit(OpTag(0), Request::Read { lba: Lba::new(0), buffer }).unwrap_err();
    let RejectReason::Error(IoError::DeviceFailed { detail }) = rejected.reason else { panic!() };
    assert_eq!(detail, "the controller was shut down");
}

#[test]
fn a_polled_queue_needs_no_descriptor() {
    let options = QueueOptions { interrupts: Interrupts::Disabled, ..small_pool() };
    let mut stack = stack(config(MODES[1](), 4096), &options);
    assert!(stack.queue.interrupt().is_none());
    write(&mut stack.queue, 0, &pattern(0, 4096));
}

#[test]
fn images_are_created_reopened_and_locked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let spec = |rest: &str| format!("emu:{}{rest}", path.display()).parse::<DeviceSpec>().unwrap();
    let open = |rest: &str| nvme::open(&spec(rest), OpenOptions::default());
    let missing = open("").map(|_| ()).unwrap_err().to_string();
    assert!(missing.contains("does not exist"), "{missing}");

    let data = pattern(77, 1 << 20);
    {
        let controller = open(",size=32MiB").unwrap();
        let mut queue = controller.create_queue(&small_pool()).unwrap();
        write(&mut queue, 100, &data);
        assert_eq!(execute(&mut queue, Request::Flush).result, Ok(()));
        let busy = open("").map(|_| ()).unwrap_err().to_string();
        assert!(busy.contains("in use"), "{busy}");
    }
    let controller = open(",mode=inline").unwrap();
    let mut queue = controller.create_queue(&small_pool()).unwrap();
    assert_eq!(queue.geometry().size_bytes(), 32 << 20);
    assert!(read(&mut queue, 100, 1 << 20) == data);
    drop((queue, controller));
    let other = open(",size=64MiB").map(|_| ()).unwrap_err().to_string();
    assert!(other.contains("33554432"), "{other}");
}

#[test]
fn a_pci_device_that_is_not_there_is_an_error_that_names_it() {
    let spec: DeviceSpec = "pci:ffff:ff:1f.7".parse().unwrap();
    assert!(matches!(spec.target, Target::Pci(_)));
    let error = nvme::open(&spec, OpenOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("ffff:ff:1f.7: there is no such PCI device"), "{error}");
}

#[derive(Clone, Debug)]
enum Step {
    Write { lba: u64, blocks: u64, seed: u64 },
    Zero { lba: u64, blocks: u64 },
    Deallocate { lba: u64, blocks: u64 },
    Flush,
    Drain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0u64..200, 1u64..120);
    let step = prop_oneof![
        4 => (range(), any::<u32>()).prop_map(|((lba, blocks), seed)| Step::Write { lba, blocks, seed: seed.into() }),
        1 => range().prop_map(|(lba, blocks)| Step::Zero { lba, blocks }),
        1 => range().prop_map(|(lba, blocks)| Step::Deallocate { lba, blocks }),
        1 => Just(Step::Flush),
        2 => Just(Step::Drain),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Requests that do not overlap while in flight leave the device as a map of blocks says.
    #[test]
    fn the_device_equals_a_model(steps in steps(), threaded in any::<bool>(), depth in 1u16..20, mdts in 0u8..4) {
        let mut config = config(MODES[usize::from(threaded)](), 512);
        config.mdts = mdts;
        let mut stack = stack(config, &QueueOptions { depth, ..small_pool() });
        let queue = &mut stack.queue;
        let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut busy: Vec<(u64, u64)> = Vec::new();
        for step in steps {
            let range = match &step {
                Step::Write { lba, blocks, .. } | Step::Zero { lba, blocks } | Step::Deallocate { lba, blocks } => {
                    Some((*lba, lba + blocks))
                }
                Step::Flush | Step::Drain => None,
            };
            let overlaps = range.is_some_and(|(start, end)| busy.iter().any(|&(a, b)| start < b && a < end));
            if overlaps || matches!(step, Step::Drain) || queue.in_flight() == usize::from(depth) {
                for done in drain(queue) {
                    prop_assert_eq!(done.result, Ok(()));
                }
                busy.clear();
            }
            busy.extend(range);
            let lbas = |lba: u64, blocks: u64| LbaRange { start: Lba::new(lba), count: LbaCount::new(blocks) };
            let request = match step {
                Step::Write { lba, blocks, seed } => {
                    let data = pattern(seed, blocks as usize * 512);
                    let mut buffer = queue.pool().try_alloc(data.len()).unwrap();
                    buffer.write_at(0, &data);
                    model.extend(data.chunks(512).enumerate().map(|(i, block)| (lba + i as u64, block.to_vec())));
                    Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Durable }
                }
                Step::Zero { lba, blocks } => {
                    (lba..lba + blocks).for_each(|block| drop(model.remove(&block)));
                    Request::WriteZeroes(lbas(lba, blocks))
                }
                Step::Deallocate { lba, blocks } => {
                    (lba..lba + blocks).for_each(|block| drop(model.remove(&block)));
                    Request::Deallocate(lbas(lba, blocks))
                }
                Step::Flush => Request::Flush,
                Step::Drain => continue,
            };
            prop_assert!(queue.submit(OpTag(0), request).is_ok());
        }
        drain(queue);
        for lba in 0..320 {
            let expected = model.get(&lba).cloned().unwrap_or_else(|| vec![0; 512]);
            prop_assert_eq!(read(queue, lba, 512), expected);
        }
        prop_assert_eq!(stack.emulator.memory().fault_count(), 0);
    }
}

/// What was written durably, or written and flushed, is there after the power failed, and nothing else: requests of one command
/// and of many.
#[test]
fn what_was_durable_or_flushed_survives_a_power_cut() {
    const LOST: u64 = 4096;
    // Bytes and first block; they differ, so that each has a pattern of its own.
    let flushed = [(4096, 0), (256 << 10, 100)];
    let durable = [(8192, 200), (512 << 10, 300)];
    let write_cache = WriteCache::Modelled { capacity: 16 << 20 };
    // Soon found out: the next command meets a controller that has forgotten everything, and is sent again after a reset.
    let options = QueueOptions { command_timeout: Duration::from_millis(200), ..small_pool() };
    let mut stack = stack(ControllerConfig { write_cache, ..config(Mode::Inline, 4096) }, &options);
    for (bytes, lba) in flushed {
        write(&mut stack.queue, lba, &pattern(lba, bytes));
    }
    assert_eq!(execute(&mut stack.queue, Request::Flush).result, Ok(()));
    for (bytes, lba) in durable {
        let mut buffer = stack.queue.pool().try_alloc(bytes).unwrap();
        buffer.write_at(0, &pattern(lba, bytes));
        let request = Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Durable };
        assert_eq!(execute(&mut stack.queue, request).result, Ok(()));
    }
    write(&mut stack.queue, LOST, &pattern(9, 4096));
    stack.emulator.power_cut(CutPolicy::DropAll);
    for (bytes, lba) in flushed.into_iter().chain(durable) {
        assert!(read(&mut stack.queue, lba, bytes) == pattern(lba, bytes), "{bytes} bytes at block {lba}");
    }
    assert!(read(&mut stack.queue, LOST, 4096).iter().all(|&byte| byte == 0), "the cut dropped nothing");
}
