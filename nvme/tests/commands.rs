//! The driver's admin commands against the embedded controller.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::sync::Arc;

use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{CommandError, Controller, ControllerOptions, Feature, NamespaceUid, Persistence};
use nvme_emulator::{ControllerConfig, EmulatedController, Mode, NamespaceConfig};
use nvme_spec::NamespaceId;
use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, FeatureId, FeatureSelect, TemperatureSelect, ThresholdSelect,
    VolatileWriteCache,
};
use nvme_spec::identify::{Cns, NamespaceList};
use zerocopy::FromBytes;

fn controller() -> Arc<Controller> {
    let config = ControllerConfig {
        mode: Mode::Inline,
        ..ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20))
    };
    let emulator = EmulatedController::new(config).unwrap();
    let transport = Arc::new(EmbeddedTransport::new(emulator, "emu:test"));
    Controller::bring_up(transport, Arc::new(SystemTiming::default()), &ControllerOptions::default()).unwrap()
}

#[test]
fn features_that_are_set_are_read_back() {
    let controller = controller();
    let (sensor, over) = (TemperatureSelect::COMPOSITE, ThresholdSelect::OVER);
    controller.set_temperature_threshold(sensor, over, 350).unwrap();
    assert_eq!(controller.temperature_threshold(sensor, over).unwrap(), 350);

    assert!(controller.write_cache().unwrap().wce());
    controller.set_write_cache(VolatileWriteCache::new()).unwrap();
    assert!(!controller.write_cache().unwrap().wce());
    let feature = Feature::of_controller(FeatureId::VOLATILE_WRITE_CACHE);
    assert_eq!(controller.get_feature(feature, FeatureSelect::DEFAULT).unwrap(), 1);

    let arbitration = Arbitration::new().with_ab(3);
    controller.set_arbitration(arbitration).unwrap();
    assert_eq!(controller.arbitration().unwrap().ab(), 3);

    let events = AsyncEventConfiguration::new().with_smart(2);
    controller.set_event_configuration(events).unwrap();
    assert_eq!(controller.event_configuration().unwrap(), events);
}

#[test]
fn refusals_are_errors_and_the_controller_goes_on() {
    let controller = controller();
    let unknown = Feature::of_controller(FeatureId(0xc0));
    let refused = controller.get_feature(unknown, FeatureSelect::CURRENT).unwrap_err();
    assert!(matches!(refused, CommandError::Admin(_)), "{refused}");
    assert!(controller.set_feature(unknown, Persistence::UntilReset, &[]).is_err());
    assert!(controller.identify(Cns(0xee), NamespaceId::NONE).is_err());
    assert!(controller.namespace_uids(NamespaceId::new(7)).is_err());
    controller.smart_log().unwrap();
}

#[test]
fn logs_and_identify_data_are_read() {
    let controller = controller();
    controller.error_log().unwrap();
    let firmware = controller.firmware_log().unwrap();
    assert_eq!(firmware.active_slot(), 1);
    assert_eq!(controller.changed_namespaces().unwrap().iter().count(), 0);

    let list = controller.identify(Cns::ACTIVE_NAMESPACES, NamespaceId::NONE).unwrap();
    let list = NamespaceList::read_from_bytes(&list[..]).unwrap();
    assert_eq!((list.ids[0].get(), list.ids[1].get()), (1, 0));
    let uids = controller.namespace_uids(NamespaceId::new(1)).unwrap();
    let raw = &controller.namespaces()[0].raw;
    assert!(
        uids.contains(&NamespaceUid::Nguid(raw.nguid)) || uids.contains(&NamespaceUid::Eui64(raw.eui64)),
        "{uids:?}"
    );
}

#[test]
fn an_error_that_a_command_met_is_in_the_error_log() {
    let controller = controller();
    let before = controller.error_log().unwrap().len();
    assert!(controller.identify(Cns(0xee), NamespaceId::NONE).is_err());
    let entries = controller.error_log().unwrap();
    assert_eq!(entries.len(), before + 1);
    assert!(!entries[0].status().is_success());
    assert_eq!(entries[0].queue_id().get(), 0);
}

mod requests {
    //! Compare, compare-and-write, verify, copy and format against the embedded controller.

    use super::*;
    use nvme::{DataPointers, FormatOptions, NvmRequest, QueueOptions, QueuePair};
    use nvme_emulator::{FusedOperations, SglSupport, ThreadOptions};
    use nvme_spec::identify::Oncs;
    use reactor::block::{
        BlockDevice, Completion, Durability, IoError, Lba, LbaCount, LbaRange, OpTag, Request,
    };

    const BLOCK: usize = 512;

    fn stacks() -> Vec<QueuePair> {
        let mut queues = Vec::new();
        for sgls in [SglSupport::Absent, SglSupport::Byte] {
            for mode in [Mode::Inline, Mode::Threaded(ThreadOptions::default())] {
                let namespace = NamespaceConfig::memory(16 << 20).with_lba_size(BLOCK as u32);
                let config = ControllerConfig {
                    mode,
                    sgls,
                    oncs: Oncs::COMPARE | Oncs::VERIFY | Oncs::COPY,
                    fused: FusedOperations::CompareAndWrite,
                    ..ControllerConfig::with_namespace(namespace)
                };
                let transport = EmbeddedTransport::new(EmulatedController::new(config).unwrap(), "emu:test");
                let timing = Arc::new(SystemTiming::default());
                let controller =
                    Controller::bring_up(Arc::new(transport), timing, &ControllerOptions::default()).unwrap();
                let data_pointers = match sgls {
                    SglSupport::Absent => DataPointers::Automatic,
                    _ => DataPointers::Sgl,
                };
                let options = QueueOptions { data_pointers, pool_bytes: 4 << 20, ..QueueOptions::default() };
                queues.push(controller.create_queue(&options).unwrap());
            }
        }
        queues
    }

    fn drain(queue: &mut QueuePair) -> Completion {
        queue.ring();
        let mut done = Vec::new();
        while queue.in_flight() > 0 {
            queue.process_completions(64, &mut |completion| done.push(completion));
            queue.ring();
        }
        done.pop().unwrap()
    }

    fn filled(queue: &QueuePair, bytes: &[u8], blocks: usize) -> reactor::dma::DmaBuffer {
        let mut buffer = queue.pool().try_alloc(bytes.len() * blocks * BLOCK).unwrap();
        for (n, &byte) in bytes.iter().enumerate() {
            buffer.fill(n * blocks * BLOCK, blocks * BLOCK, byte);
        }
        buffer
    }

    fn write(queue: &mut QueuePair, lba: u64, bytes: &[u8], blocks: usize) {
        let buffer = filled(queue, bytes, blocks);
        let request = Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Cached };
        queue.submit(OpTag(1), request).unwrap();
        assert_eq!(drain(queue).result, Ok(()));
    }

    /// The first byte of each block.
    fn read(queue: &mut QueuePair, lba: u64, blocks: usize) -> Vec<u8> {
        let buffer = queue.pool().try_alloc(blocks * BLOCK).unwrap();
        queue.submit(OpTag(1), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
        let done = drain(queue);
        assert_eq!(done.result, Ok(()));
        let mut data = vec![0; blocks * BLOCK];
        done.buffer.unwrap().read_at(0, &mut data);
        data.into_iter().step_by(BLOCK).collect()
    }

    fn execute(queue: &mut QueuePair, request: NvmRequest) -> Result<(), IoError> {
        queue.submit_nvm(OpTag(1), request).unwrap();
        drain(queue).result
    }

    fn range(lba: u64, blocks: u64) -> LbaRange {
        LbaRange { start: Lba::new(lba), count: LbaCount::new(blocks) }
    }

    #[test]
    fn comparisons_tell_equal_from_different() {
        for mut queue in stacks() {
            write(&mut queue, 10, &[7], 300);
            let lba = Lba::new(10);
            let buffer = filled(&queue, &[7], 300);
            assert_eq!(execute(&mut queue, NvmRequest::Compare { lba, buffer }), Ok(()));
            let mut buffer = filled(&queue, &[7], 300);
            buffer.fill(299 * BLOCK + 511, 1, 8);
            let differs = execute(&mut queue, NvmRequest::Compare { lba, buffer });
            assert!(matches!(differs, Err(IoError::Mismatch { .. })), "{differs:?}");
        }
    }

    #[test]
    fn compare_and_write_writes_only_over_what_was_expected() {
        for mut queue in stacks() {
            write(&mut queue, 4, &[1], 2);
            let lba = Lba::new(4);
            let buffer = filled(&queue, &[1, 2], 2);
            assert_eq!(execute(&mut queue, NvmRequest::CompareAndWrite { lba, buffer }), Ok(()));
            assert_eq!(read(&mut queue, 4, 3), [2, 2, 0]);
            let buffer = filled(&queue, &[1, 3], 2);
            let differs = execute(&mut queue, NvmRequest::CompareAndWrite { lba, buffer });
            assert_eq!(differs, Err(IoError::Mismatch { lba: 4 }));
            assert_eq!(read(&mut queue, 4, 3), [2, 2, 0]);
        }
    }

    #[test]
    fn pairs_among_other_requests_all_come_back() {
        for mut queue in stacks() {
            let mut waiting = 0;
            for round in 0..2000u64 {
                let submitted = if round % 3 == 0 {
                    let buffer = filled(&queue, &[0, 0], 1);
                    queue
                        .submit_nvm(OpTag(round), NvmRequest::CompareAndWrite { lba: Lba::new(0), buffer })
                        .is_ok()
                } else {
                    let buffer = filled(&queue, &[9], 8);
                    queue.submit(OpTag(round), Request::Read { lba: Lba::new(8), buffer }).is_ok()
                };
                waiting += u32::from(submitted);
                if round % 7 == 0 {
                    queue.ring();
                    queue.process_completions(5, &mut |done| {
                        assert_eq!(done.result, Ok(()));
                        waiting -= 1;
                    });
                }
            }
            while queue.in_flight() > 0 {
                queue.ring();
                queue.process_completions(64, &mut |done| {
                    assert_eq!(done.result, Ok(()));
                    waiting -= 1;
                });
            }
            assert_eq!(waiting, 0);
        }
    }

    #[test]
    fn copies_of_any_length_arrive_in_order() {
        for mut queue in stacks() {
            write(&mut queue, 0, &[1, 2, 3, 4], 700);
            let sources = vec![range(1400, 1400), range(699, 2), range(0, 700)];
            assert_eq!(
                execute(&mut queue, NvmRequest::Copy { sources, destination: Lba::new(5000) }),
                Ok(())
            );
            let found = read(&mut queue, 5000, 2103);
            let expected: Vec<u8> = [vec![3; 700], vec![4; 700], vec![1, 2], vec![1; 700], vec![0]].concat();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_range_is_verified() {
        for mut queue in stacks() {
            assert_eq!(execute(&mut queue, NvmRequest::Verify(range(0, 32 << 10))), Ok(()));
            let beyond = queue.submit_nvm(OpTag(1), NvmRequest::Verify(range(1, 32 << 10))).unwrap_err();
            assert!(format!("{:?}", beyond.reason).contains("InvalidRange"));
        }
    }

    #[test]
    fn controllers_with_large_memory_pages_are_driven() {
        for mpsmin in 1..=4 {
            let namespace = NamespaceConfig::memory(16 << 20).with_lba_size(BLOCK as u32);
            let config = ControllerConfig {
                mode: Mode::Inline,
                mpsmin,
                mpsmax: 4,
                oncs: Oncs::COMPARE,
                ..ControllerConfig::with_namespace(namespace)
            };
            let emulator = EmulatedController::new(config).unwrap();
            let transport = Arc::new(EmbeddedTransport::new(Arc::clone(&emulator), "emu:test"));
            let timing = Arc::new(SystemTiming::default());
            let controller = Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap();
            let mut queue = controller
                .create_queue(&QueueOptions { pool_bytes: 4 << 20, ..QueueOptions::default() })
                .unwrap();
            write(&mut queue, 3, &[1, 2, 3], 1000);
            let zeroes = Request::WriteZeroes(range(1000, 500));
            queue.submit(OpTag(1), zeroes).unwrap();
            assert_eq!(drain(&mut queue).result, Ok(()));
            let found = read(&mut queue, 0, 3004);
            let expected =
                [vec![0; 3], vec![1; 997], vec![0; 500], vec![2; 503], vec![3; 1000], vec![0]].concat();
            assert_eq!(found, expected);
            assert_eq!(emulator.memory().fault_count(), 0);
        }
    }

    #[test]
    fn a_format_empties_the_namespace_and_changes_its_blocks() {
        let mut queue = stacks().remove(1);
        write(&mut queue, 0, &[1], 8);
        let controller = Arc::clone(queue.controller());
        let nsid = NamespaceId::new(1);
        let to_4096 = FormatOptions { lba_format: 3, ..FormatOptions::default() };
        assert!(controller.format_nvm(nsid, &to_4096).is_err(), "a queue is open");
        drop(queue);
        controller.format_nvm(nsid, &to_4096).unwrap();
        let namespace = controller.namespace(nsid).unwrap();
        assert_eq!((namespace.lba_size(), namespace.blocks), (4096, 4096));
        let mut queue = controller
            .create_queue(&QueueOptions { pool_bytes: 1 << 20, ..QueueOptions::default() })
            .unwrap();
        assert_eq!(read(&mut queue, 0, 8), [0; 8]);
    }
}
