//! Compare, fused pairs, verify and copy, seen from the controller.

use super::*;
use nvme_spec::SubmissionEntry;
use nvme_spec::identify::Fuses;
use nvme_spec::nvm::{CopyRange, Fuse};
use nvme_spec::registers::Version;
use reactor::block::LbaRange;
use zerocopy::FromBytes;

/// A controller that can do everything; compare-and-write of up to 4 blocks; copies of 2 ranges of 8 blocks, 12 altogether.
fn able() -> Script {
    let mut script = Script::default();
    let oncs = Oncs::COMPARE | Oncs::VERIFY | Oncs::COPY | Oncs::WRITE_ZEROES;
    script.controller.oncs.set(oncs.bits());
    script.controller.fuses.set(Fuses::COMPARE_AND_WRITE.bits());
    script.controller.acwu_z.set(3);
    script.namespace.mssrl.set(8);
    script.namespace.mcl.set(12);
    script.namespace.msrc_z = 1;
    script
}

fn range(lba: u64, blocks: u64) -> LbaRange {
    LbaRange { start: Lba::new(lba), count: LbaCount::new(blocks) }
}

impl Bench {
    /// With a controller that is reset when it fails.
    fn recovering(depth: u16) -> Self {
        let fake = Fake::new(able());
        let (transport, timing) = (Arc::clone(&fake), Arc::clone(&fake.timing));
        let polled = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
        let controller = Controller::bring_up(transport, timing, &polled).unwrap();
        let queue = controller.create_queue(&options(depth)).unwrap();
        Self { fake, queue }
    }

    fn submit(&mut self, tag: u64, request: NvmRequest) -> Result<(), RejectReason> {
        self.queue.submit_nvm(OpTag(tag), request).map_err(|rejected| rejected.reason)
    }

    fn swap(&mut self, tag: u64, lba: u64, blocks: usize) -> Result<(), RejectReason> {
        let buffer = self.buffer(2 * blocks * BLOCK);
        self.submit(tag, NvmRequest::CompareAndWrite { lba: Lba::new(lba), buffer })
    }

    fn unsupported(&mut self, request: NvmRequest) -> &'static str {
        match self.submit(9, request) {
            Err(RejectReason::Error(IoError::Unsupported { what })) => what,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, command: &SubmissionEntry, status: Status) {
        self.fake.complete(1, command.command_id(), status);
    }
}

fn failed(code: StatusCode) -> Status {
    Status::from_code(code).with_dnr(true)
}

#[test]
fn a_comparison_that_fails_is_told_apart() {
    let mut bench = Bench::new(able(), &options(8));
    let buffer = bench.buffer(BLOCK);
    bench.submit(1, NvmRequest::Compare { lba: Lba::new(7), buffer }).unwrap();
    bench.queue.ring();
    let command = bench.commands()[0];
    assert_eq!((command.opcode, lba_and_blocks(&command)), (NvmOpcode::COMPARE.0, (7, 1)));
    // Even a controller that says it may be tried again is believed.
    bench.answer(&command, Status::from_code(StatusCode::COMPARE_FAILURE));
    let done = bench.poll();
    assert_eq!(done[0].result, Err(IoError::Mismatch { lba: 7 }));
    assert!(done[0].buffer.is_some());
    assert_eq!(bench.queue.counters().read().bytes_written, 0);
}

#[test]
fn a_fused_pair_is_two_neighbours_under_one_doorbell() {
    let mut bench = Bench::new(able(), &options(8));
    bench.swap(1, 40, 2).unwrap();
    bench.queue.ring();
    let commands = bench.commands();
    let [compare, write] = commands[..] else { panic!("{commands:?}") };
    assert_eq!((compare.opcode, compare.fuse()), (NvmOpcode::COMPARE.0, Fuse::FIRST));
    assert_eq!((write.opcode, write.fuse()), (NvmOpcode::WRITE.0, Fuse::SECOND));
    assert_eq!((lba_and_blocks(&compare), lba_and_blocks(&write)), ((40, 2), (40, 2)));
    assert_eq!(write.prp1.get(), compare.prp1.get() + 2 * BLOCK as u64);
    assert_eq!(bench.fake.doorbells(1).len(), 1);
    bench.answer(&write, Status::SUCCESS);
    assert!(bench.poll().is_empty(), "half a pair is not done");
    bench.answer(&compare, Status::SUCCESS);
    let done = bench.poll();
    assert_eq!((done.len(), &done[0].result), (1, &Ok(())));
    assert_eq!(bench.queue.counters().read().bytes_written, 2 * BLOCK as u64);
}

#[test]
fn a_pair_is_never_announced_in_halves_wherever_the_ring_stands() {
    let mut bench = Bench::new(able(), &options(4));
    for round in 0..200u64 {
        // Reads before it, not rung, so that the pair meets every fill of the ring, full ones included.
        for tag in 0..round % 3 {
            bench.read(tag, 0, BLOCK);
        }
        if round % 5 == 0 {
            bench.queue.ring();
        }
        bench.swap(99, 0, 1).unwrap();
        let before = bench.commands();
        bench.queue.ring();
        let after = bench.commands();
        let half =
            |commands: &[SubmissionEntry]| commands.iter().filter(|c| c.fuse() != Fuse::NORMAL).count();
        assert!(matches!((half(&before), half(&after)), (0, 2)), "round {round}");
        let first = after.iter().position(|command| command.fuse() == Fuse::FIRST).unwrap();
        assert_eq!(after[first + 1].fuse(), Fuse::SECOND);
        bench.fake.complete_all(1);
        bench.poll();
        assert_eq!(bench.queue.in_flight(), 0);
    }
}

#[test]
fn a_pair_that_waits_for_two_slots_is_overtaken_by_nobody() {
    let mut bench = Bench::new(able(), &options(4));
    for tag in 0..3 {
        bench.read(tag, 0, BLOCK);
    }
    bench.swap(50, 8, 1).unwrap();
    bench.queue.ring();
    assert_eq!(bench.commands().len(), 3, "one slot is free, the pair needs two");
    // Requests come in as fast as others complete: they would take every slot that becomes free.
    for tag in 4..40 {
        let oldest = bench.commands()[0];
        bench.answer(&oldest, Status::SUCCESS);
        let done = bench.poll();
        bench.queue.ring();
        if bench.commands().iter().any(|command| command.fuse() == Fuse::FIRST) {
            assert!(tag <= 6, "the pair waited too long");
            bench.fake.complete_all(1);
            while bench.queue.in_flight() > 0 {
                bench.poll();
                bench.fake.complete_all(1);
            }
            return;
        }
        for _ in done {
            bench.read(tag, 0, BLOCK);
        }
        bench.queue.ring();
    }
    panic!("the pair starved");
}

#[test]
fn a_failed_pair_says_why_in_whatever_order_its_halves_complete() {
    let medium = failed(StatusCode::UNRECOVERED_READ_ERROR);
    let compare_failed = failed(StatusCode::COMPARE_FAILURE);
    let other = failed(StatusCode::ABORTED_FAILED_FUSED);
    for compare_first in [true, false] {
        for (status, is_mismatch) in [(compare_failed, true), (medium, false)] {
            let mut bench = Bench::new(able(), &options(4));
            bench.swap(1, 5, 1).unwrap();
            bench.queue.ring();
            let commands = bench.commands();
            if compare_first {
                bench.answer(&commands[0], status);
                bench.answer(&commands[1], other);
            } else {
                bench.answer(&commands[1], other);
                bench.answer(&commands[0], status);
            }
            let result = bench.poll().pop().unwrap().result;
            match is_mismatch {
                true => assert_eq!(result, Err(IoError::Mismatch { lba: 5 })),
                false => assert!(matches!(result, Err(IoError::Medium { lba: 5, .. })), "{result:?}"),
            }
        }
    }
}

#[test]
fn a_pair_is_never_sent_twice() {
    let mut bench = Bench::new(able(), &options(4));
    bench.swap(1, 5, 1).unwrap();
    bench.queue.ring();
    for command in bench.commands() {
        bench.answer(&command, Status::from_code(StatusCode::COMMAND_INTERRUPTED));
    }
    let done = bench.poll();
    assert!(matches!(done[0].result, Err(IoError::Command { .. })), "{:?}", done[0].result);
    bench.queue.ring();
    assert!(bench.commands().is_empty());
}

#[test]
fn pairs_that_cannot_be_one_are_refused() {
    let mut bench = Bench::new(able(), &options(4));
    assert_eq!(bench.queue.nvm_abilities().compare_and_write, 4);
    let buffer = bench.buffer(10 * BLOCK);
    bench.unsupported(NvmRequest::CompareAndWrite { lba: Lba::new(0), buffer });
    let buffer = bench.buffer(3 * BLOCK);
    let odd = bench.submit(1, NvmRequest::CompareAndWrite { lba: Lba::new(0), buffer });
    assert!(matches!(odd, Err(RejectReason::Error(IoError::InvalidRange { .. }))), "{odd:?}");
    let end = bench.queue.geometry().lba_count.get();
    let beyond = bench.swap(1, end - 1, 2);
    assert!(matches!(beyond, Err(RejectReason::Error(IoError::InvalidRange { .. }))), "{beyond:?}");

    let mut narrow = Bench::new(able(), &options(1));
    assert_eq!(narrow.queue.nvm_abilities().compare_and_write, 0, "a pair needs two slots");
    let buffer = narrow.buffer(2 * BLOCK);
    narrow.unsupported(NvmRequest::CompareAndWrite { lba: Lba::new(0), buffer });
}

#[test]
fn a_namespace_may_have_its_own_limit_for_pairs() {
    let mut script = able();
    script.namespace.nacwu_z.set(1);
    let limit =
        |script: &Script| Bench::new(script.clone(), &options(4)).queue.nvm_abilities().compare_and_write;
    assert_eq!(limit(&script), 4, "NSFEAT does not say that the field counts");
    script.namespace.nsfeat = 2;
    assert_eq!(limit(&script), 2);
    script.namespace.nacwu_z.set(0);
    assert_eq!(limit(&script), 4, "0 is as the controller");
    script.controller.acwu_z.set(u16::MAX);
    assert_eq!(limit(&script), 32, "MDTS");
}

#[test]
fn what_the_controller_lacks_is_unsupported_and_gives_the_buffer_back() {
    let mut bench = Bench::small();
    let buffer = bench.buffer(2 * BLOCK);
    let request = NvmRequest::Compare { lba: Lba::new(0), buffer };
    let rejected = bench.queue.submit_nvm(OpTag(1), request).unwrap_err();
    assert!(matches!(rejected.reason, RejectReason::Error(IoError::Unsupported { .. })));
    let NvmRequest::Compare { buffer, .. } = rejected.request else { panic!() };
    bench.unsupported(NvmRequest::CompareAndWrite { lba: Lba::new(0), buffer });
    bench.unsupported(NvmRequest::Verify(range(0, 1)));
    bench.unsupported(NvmRequest::Copy { sources: vec![range(0, 1)], destination: Lba::new(5) });
    // ONCS says Copy, the namespace's limits say that it cannot be.
    let mut script = able();
    script.namespace.mcl.set(0);
    let mut bench = Bench::new(script, &options(4));
    bench.unsupported(NvmRequest::Copy { sources: vec![range(0, 1)], destination: Lba::new(5) });
}

#[test]
fn an_oncs_that_lies_ends_in_an_error() {
    let mut bench = Bench::new(able(), &options(4));
    bench.submit(1, NvmRequest::Verify(range(0, 1))).unwrap();
    bench.queue.ring();
    // Not even DNR is set: it is tried again, but not for ever.
    let mut done = Vec::new();
    for _ in 0..20 {
        for command in bench.commands() {
            bench.answer(&command, Status::from_code(StatusCode::INVALID_OPCODE));
        }
        done.extend(bench.poll());
        bench.queue.ring();
    }
    assert!(matches!(done[..], [Completion { result: Err(IoError::Command { .. }), .. }]), "{done:?}");
}

#[test]
fn a_verify_is_cut_at_the_limits() {
    let cut = |script: Script| {
        let mut bench = Bench::new(script, &options(8));
        bench.submit(1, NvmRequest::Verify(range(100, 70))).unwrap();
        bench.queue.ring();
        let pieces: Vec<_> = bench.commands().iter().map(lba_and_blocks).collect();
        bench.fake.complete_all(1);
        assert_eq!(bench.poll()[0].result, Ok(()));
        pieces
    };
    let mut script = able();
    assert_eq!(cut(script.clone()), [(100, 32), (132, 32), (164, 6)], "before 2.0: as a transfer");
    script.version = Version::V2_0;
    assert_eq!(cut(script.clone()), [(100, 70)], "no VSL, no limit");
    script.limits.vsl = 6;
    assert_eq!(cut(script), [(100, 64), (164, 6)]);
}

#[test]
fn limits_of_2_0_cut_zeroes_and_deallocates() {
    let mut script = able();
    script.version = Version::V2_0;
    let oncs = script.controller.oncs() | Oncs::DATASET_MANAGEMENT;
    script.controller.oncs.set(oncs.bits());
    script.limits.wzsl = 3;
    script.limits.dmrsl.set(5);
    script.limits.dmsl.set(4);
    let mut bench = Bench::new(script, &options(8));
    bench.queue.submit(OpTag(1), Request::WriteZeroes(range(0, 20))).unwrap();
    bench.queue.ring();
    let pieces: Vec<_> = bench.commands().iter().map(lba_and_blocks).collect();
    assert_eq!(pieces, [(0, 8), (8, 8), (16, 4)]);
    bench.fake.complete_all(1);
    bench.poll();
    bench.queue.submit(OpTag(2), Request::Deallocate(range(0, 10))).unwrap();
    bench.queue.ring();
    assert_eq!(bench.commands().len(), 3);
}

#[test]
fn a_copy_is_cut_by_ranges_and_lengths() {
    let mut bench = Bench::new(able(), &options(8));
    let sources = vec![range(1000, 20), range(0, 0), range(2000, 3), range(3000, 1)];
    bench.submit(1, NvmRequest::Copy { sources, destination: Lba::new(500) }).unwrap();
    bench.queue.ring();
    let mut seen = Vec::new();
    for command in bench.commands() {
        assert_eq!(command.opcode, NvmOpcode::COPY.0);
        let view = command.copy_view();
        assert_eq!((view.dw12.format(), view.dw12.fua()), (0, false));
        let ranges = usize::from(view.dw12.ranges_z()) + 1;
        let bytes = bench.fake.read(command.prp1.get(), ranges * 32);
        let ranges: Vec<_> = bytes
            .chunks(32)
            .map(|chunk| CopyRange::read_from_bytes(chunk).unwrap())
            .map(|range| (range.slba.get(), u64::from(range.blocks_z.get()) + 1))
            .collect();
        seen.push((view.sdlba, ranges));
    }
    let expected =
        [(500, vec![(1000, 8), (1008, 4)]), (512, vec![(1012, 8), (2000, 3)]), (523, vec![(3000, 1)])];
    assert_eq!(seen, expected);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
}

#[test]
fn a_copy_that_is_repeated_begins_again() {
    let mut bench = Bench::new(able(), &options(8));
    let sources = vec![range(1000, 20)];
    bench.submit(1, NvmRequest::Copy { sources, destination: Lba::new(500) }).unwrap();
    bench.queue.ring();
    let first = bench.commands();
    assert_eq!(first.len(), 2);
    bench.answer(&first[0], Status::SUCCESS);
    bench.answer(&first[1], Status::from_code(StatusCode::INTERNAL_ERROR));
    assert!(bench.poll().is_empty());
    bench.queue.ring();
    let again = bench.commands();
    let destinations: Vec<_> = again.iter().map(|command| command.copy_view().sdlba).collect();
    assert_eq!(destinations, [500, 512]);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
}

#[test]
fn copies_onto_themselves_and_beyond_the_end_are_refused() {
    let mut bench = Bench::new(able(), &options(8));
    let copy =
        |lba, blocks, to| NvmRequest::Copy { sources: vec![range(lba, blocks)], destination: Lba::new(to) };
    bench.unsupported(copy(0, 10, 5));
    let end = bench.queue.geometry().lba_count.get();
    for request in [copy(end - 1, 2, 0), copy(0, 2, end - 1), copy(u64::MAX, 2, 0), copy(0, u64::MAX, 7)] {
        let refused = bench.submit(1, request);
        assert!(matches!(refused, Err(RejectReason::Error(IoError::InvalidRange { .. }))), "{refused:?}");
    }
    bench.submit(2, NvmRequest::Copy { sources: Vec::new(), destination: Lba::new(0) }).unwrap();
    bench.submit(3, NvmRequest::Verify(range(5, 0))).unwrap();
    assert_eq!(bench.poll().len(), 2, "nothing to do is done at once");
}

#[test]
fn after_a_reset_copies_are_repeated_and_pairs_are_not() {
    let mut bench = Bench::recovering(8);
    bench.swap(1, 5, 1).unwrap();
    bench.submit(2, NvmRequest::Copy { sources: vec![range(1000, 20)], destination: Lba::new(500) }).unwrap();
    bench.submit(3, NvmRequest::Verify(range(0, 1))).unwrap();
    let buffer = bench.buffer(BLOCK);
    bench.submit(4, NvmRequest::Compare { lba: Lba::new(0), buffer }).unwrap();
    bench.queue.ring();
    // Half of the pair had completed, and half of the copy.
    let commands = bench.commands();
    bench.answer(&commands[0], Status::SUCCESS);
    bench.answer(&commands[2], Status::SUCCESS);
    bench.queue.shared.fail(Fault::FatalStatus { csts: 3 });
    let mut done = Vec::new();
    for _ in 0..100 {
        done.extend(bench.poll());
        bench.queue.ring();
        bench.fake.timing.advance(Duration::from_millis(10));
    }
    let [ref pair] = done[..] else { panic!("{done:?}") };
    assert_eq!((pair.tag, &pair.result), (OpTag(1), &Err(IoError::Timeout)), "its outcome is unknown");
    assert!(pair.buffer.is_some());
    let again: Vec<_> = bench.commands().iter().map(|command| NvmOpcode(command.opcode)).collect();
    assert_eq!(again, [NvmOpcode::COPY, NvmOpcode::COPY, NvmOpcode::VERIFY, NvmOpcode::COMPARE]);
    assert_eq!(bench.commands()[0].copy_view().sdlba, 500, "from its beginning");
    bench.fake.complete_all(1);
    let done = bench.poll();
    assert!(done.len() == 3 && done.iter().all(|done| done.result == Ok(())), "{done:?}");
    assert_eq!(bench.queue.in_flight(), 0);
}

#[test]
fn a_pair_that_waits_in_the_backlog_survives_a_reset() {
    let mut bench = Bench::recovering(4);
    for tag in 0..3 {
        bench.read(tag, 0, BLOCK);
    }
    bench.swap(50, 8, 1).unwrap();
    bench.queue.ring();
    bench.queue.shared.fail(Fault::FatalStatus { csts: 3 });
    let mut done = Vec::new();
    for _ in 0..100 {
        done.extend(bench.poll());
        bench.queue.ring();
        if bench.fake.has_queue(1) {
            bench.fake.complete_all(1);
        }
        bench.fake.timing.advance(Duration::from_millis(10));
    }
    assert!(
        done.len() == 4 && done.iter().all(|done| done.result == Ok(())),
        "it had never been sent: {done:?}"
    );
    assert_eq!(bench.queue.in_flight(), 0);
}
