//! Requests to a controller whose Identify data is noise: every one of them comes back, or is refused.

use super::*;
use nvme_spec::IDENTIFY_BYTES;
use nvme_spec::identify::{IdentifyController, IdentifyControllerNvm, IdentifyNamespace, Oacs};
use nvme_spec::registers::Version;
use proptest::prelude::*;
use reactor::block::LbaRange;
use zerocopy::FromBytes;

fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), IDENTIFY_BYTES)
}

/// Noise, but for what would end it before the first request.
fn script(controller: &[u8], limits: &[u8], namespace: &[u8], lbads: u8, blocks: u64) -> Script {
    let mut script = Script { version: Version::V2_0, ..Script::default() };
    let mut raw = IdentifyController::read_from_bytes(controller).unwrap();
    (raw.sqes, raw.cqes, raw.cntrltype) = (0x66, 0x44, 1);
    raw.nn.set(1);
    // The scripted controller has no shadow doorbells.
    raw.oacs.set((raw.oacs() - Oacs::DOORBELL_BUFFER).bits());
    script.controller = Box::new(raw);
    script.limits = Box::new(IdentifyControllerNvm::read_from_bytes(limits).unwrap());
    let mut raw = IdentifyNamespace::read_from_bytes(namespace).unwrap();
    (raw.nlbaf_z, raw.flbas, raw.dps) = (0, 0, 0);
    (raw.lbaf[0].lbads, raw.lbaf[0].ms) = (lbads, 0.into());
    raw.nsze.set(blocks);
    raw.ncap.set(blocks);
    script.namespace = Box::new(raw);
    script
}

fn requests(bench: &Bench, block: usize) -> (Vec<Request>, Vec<NvmRequest>) {
    let lba = Lba::new(3);
    let range = |start, count| LbaRange { start: Lba::new(start), count: LbaCount::new(count) };
    let buffer = |blocks: usize| bench.buffer(blocks * block);
    let general = vec![
        Request::Read { lba, buffer: buffer(1) },
        Request::Read { lba, buffer: buffer(5) },
        Request::Write { lba, buffer: buffer(5), durability: Durability::Durable },
        Request::Flush,
        Request::WriteZeroes(range(0, 40)),
        Request::Deallocate(range(0, 40)),
    ];
    let nvm = vec![
        NvmRequest::Compare { lba, buffer: buffer(5) },
        NvmRequest::CompareAndWrite { lba, buffer: buffer(2) },
        NvmRequest::Verify(range(0, 40)),
        NvmRequest::Copy { sources: vec![range(0, 9), range(20, 1)], destination: Lba::new(30) },
    ];
    (general, nvm)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_request_comes_back_whatever_the_controller_says_of_itself(
        controller in noise(), limits in noise(), namespace in noise(), lbads in 9u8..=16, blocks in 40u64..1 << 47,
    ) {
        let fake = Fake::new(script(&controller, &limits, &namespace, lbads, blocks));
        let options = QueueOptions { pool_bytes: 4 << 20, ..options(4) };
        let (transport, timing) = (Arc::clone(&fake), Arc::clone(&fake.timing));
        let polled = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
        let controller = Controller::bring_up(transport, timing, &polled).unwrap();
        let queue = match controller.create_queue(&options) {
            Ok(queue) => queue,
            // MDTS is less than a block.
            Err(QueueError::Namespace { .. }) => return Ok(()),
            Err(error) => panic!("{error}"),
        };
        let mut bench = Bench { fake, queue };
        let (general, nvm) = requests(&bench, 1 << lbads);
        let mut waiting = 0;
        let mut finish = |bench: &mut Bench| {
            for _ in 0..2000 {
                bench.queue.ring();
                bench.fake.complete_all(1);
                waiting += bench.poll().iter().filter(|done| done.result.is_ok()).count();
                if bench.queue.in_flight() == 0 {
                    return;
                }
            }
            panic!("{} requests never came back", bench.queue.in_flight());
        };
        let mut accepted = 0;
        for request in general {
            accepted += usize::from(bench.queue.submit(OpTag(1), request).is_ok());
            finish(&mut bench);
        }
        prop_assert_eq!(accepted, 6);
        for request in nvm {
            match bench.queue.submit_nvm(OpTag(2), request) {
                Ok(()) => accepted += 1,
                Err(rejected) => {
                    let reason = RejectReason::Error(IoError::Unsupported { what: "" });
                    let same = std::mem::discriminant(&rejected.reason) == std::mem::discriminant(&reason);
                    prop_assert!(same, "{:?}", rejected.reason);
                }
            }
            finish(&mut bench);
        }
        prop_assert_eq!(waiting, accepted);
    }
}
