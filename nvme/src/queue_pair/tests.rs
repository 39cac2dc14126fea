//! Queue pairs against a controller whose completions the test writes. Recovery is off: the first fault is the last.

use super::*;
use crate::controller::{ControllerOptions, Recovery};
use crate::queue::ProtocolError;
use crate::transport::Timing;
use crate::transport::fake::{Fake, Script, entry};
use nvme_spec::identify::Oncs;
use nvme_spec::registers::Doorbell;
use nvme_spec::{AdminOpcode, CompletionEntry, NvmOpcode};
use reactor::block::Lba;

mod data_pointers;
mod hostile;
mod nvm;

const BLOCK: usize = 4096;

struct Bench {
    fake: Arc<Fake>,
    queue: QueuePair,
}

impl Bench {
    fn new(script: Script, options: &QueueOptions) -> Self {
        let fake = Fake::new(script);
        let queue = Self::second(&fake, None, options);
        Self { fake, queue }
    }

    fn second(fake: &Arc<Fake>, controller: Option<&Arc<Controller>>, options: &QueueOptions) -> QueuePair {
        let controller = controller.cloned().unwrap_or_else(|| {
            let (transport, timing) = (Arc::clone(fake), Arc::clone(&fake.timing));
            let options = ControllerOptions {
                keeper: Keeper::Polled,
                recovery: Recovery::Off,
                ..ControllerOptions::default()
            };
            Controller::bring_up(transport, timing, &options).unwrap()
        });
        controller.create_queue(options).unwrap()
    }

    fn small() -> Self {
        Self::new(Script::default(), &options(8))
    }

    fn buffer(&self, bytes: usize) -> DmaBuffer {
        self.queue.pool().try_alloc(bytes).unwrap()
    }

    fn read(&mut self, tag: u64, lba: u64, bytes: usize) {
        let buffer = self.buffer(bytes);
        self.queue.submit(OpTag(tag), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
    }

    fn poll(&mut self) -> Vec<Completion> {
        let mut found = Vec::new();
        let n = self.queue.process_completions(1000, &mut |completion| found.push(completion));
        assert_eq!(n, found.len());
        found
    }

    /// Polls until everything in flight has come back, letting time pass. Bounded by the virtual clock.
    fn poll_to_the_end(&mut self) -> Vec<Completion> {
        let mut found = Vec::new();
        for _ in 0..10_000 {
            found.extend(self.poll());
            if self.queue.in_flight() == 0 {
                return found;
            }
            self.fake.timing.advance(Duration::from_millis(10));
        }
        panic!("{} requests never came back", self.queue.in_flight());
    }

    fn commands(&self) -> Vec<nvme_spec::SubmissionEntry> {
        self.fake.pending(1)
    }
}

fn options(depth: u16) -> QueueOptions {
    QueueOptions { depth, pool_bytes: 4 << 20, ..QueueOptions::default() }
}

fn lba_and_blocks(command: &nvme_spec::SubmissionEntry) -> (u64, u64) {
    let view = command.read_write();
    (view.slba, u64::from(view.dw12.blocks_z()) + 1)
}

#[test]
fn one_doorbell_for_each_batch_and_few_for_completions() {
    let mut bench = Bench::small();
    for tag in 0..5 {
        bench.read(tag, tag * 10, BLOCK);
    }
    assert!(bench.fake.doorbells(1).is_empty(), "nothing is rung before ring()");
    bench.queue.ring();
    bench.queue.ring();
    assert_eq!(bench.fake.doorbells(1), [(Doorbell::SubmissionTail, 5)]);
    bench.fake.complete_all(1);
    let done = bench.poll();
    assert_eq!(done.iter().map(|done| done.tag.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert!(done.iter().all(|done| done.result == Ok(()) && done.buffer.is_some()));
    drop(done);
    assert_eq!(bench.fake.doorbells(1).len(), 1, "there is room for more completions than for commands");
    assert!(!bench.queue.arm_interrupt());
    assert_eq!(bench.fake.doorbells(1)[1..], [(Doorbell::CompletionHead, 5)], "told before sleeping");
    assert!(bench.poll().is_empty());
    assert!(!bench.queue.arm_interrupt());
    assert_eq!(bench.fake.doorbells(1).len(), 2, "an empty round rings nothing");
    let counts = bench.queue.counters().read();
    assert_eq!((counts.requests, counts.completed, counts.errors, counts.commands), (5, 5, 0, 5));
    assert_eq!((counts.bytes_read, counts.doorbells), (5 * 4096, 2));
}

#[test]
fn the_device_always_has_room_for_every_completion_that_may_come() {
    for (depth, mqes_z) in [(8, 63), (8, 8), (8, 9), (63, 63), (40, 63), (1, 1)] {
        let mut script = Script::default();
        script.cap.set_mqes_z(mqes_z);
        let mut bench = Bench::new(script, &options(depth));
        let entries = u64::from(bench.fake.cq_entries(1));
        let (mut taken, mut told) = (0u64, 0u64);
        for round in 0..200u64 {
            let count = round % u64::from(depth) + 1;
            for tag in 0..count {
                bench.read(tag, tag, BLOCK);
            }
            bench.queue.ring();
            let rung =
                bench.fake.doorbells(1).into_iter().rev().find(|bell| bell.0 == Doorbell::CompletionHead);
            if let Some((_, head)) = rung {
                // The latest place before `taken` that has this index.
                told = taken - (taken + entries - u64::from(head)) % entries;
            }
            let full = taken - told + bench.queue.in_flight() as u64;
            assert!(
                full < entries || mqes_z + 1 == bench.queue.geometry().queue_depth + 1,
                "{depth} {mqes_z}: {full}"
            );
            bench.fake.complete_all(1);
            taken += bench.poll().len() as u64;
        }
        assert_eq!(taken, (0..200).map(|round| round % u64::from(depth) + 1).sum::<u64>());
    }
}

#[test]
fn runs_end_with_a_cache_line_and_nothing_waits_for_what_does_not_come() {
    let mut script = Script::default();
    script.cap.set_mqes_z(255);
    let mut bench = Bench::new(script, &QueueOptions { taking: Taking::InRuns, ..options(100) });
    let read_until_full = |bench: &mut Bench, next: &mut u64| {
        while bench.queue.in_flight() < 100 {
            bench.read(*next, *next % 100, BLOCK);
            *next += 1;
        }
        bench.queue.ring();
    };
    let (mut next, mut expected, mut lengths) = (0, 0, Vec::new());
    for round in 0..300u64 {
        read_until_full(&mut bench, &mut next);
        for command in bench.commands().iter().take(round as usize % 40) {
            bench.fake.complete(1, command.command_id(), Status::SUCCESS);
        }
        let done = bench.poll();
        for (at, completion) in done.iter().enumerate() {
            assert_eq!(completion.tag.0, expected + at as u64, "in the device's order");
        }
        expected += done.len() as u64;
        lengths.push(done.len());
    }
    assert_eq!(lengths[1..4], [1, 2, 3], "fewer than a run are handed out, too");
    assert!(lengths.iter().all(|length| *length <= RUN as usize));
    // Behind a full run the next one begins with a line, unless the ring ended: its entries are no multiple of a line's.
    assert!(lengths.iter().filter(|length| **length == RUN as usize).count() > 100);
    bench.fake.complete_all(1);
    let mut rest = 0;
    while bench.queue.in_flight() >= RUNS_FROM {
        rest += bench.poll().len();
    }
    assert!(bench.poll().len() > RUN as usize, "few commands in flight: no runs");
    assert!(rest > 0 && bench.queue.in_flight() == 0);
}

#[test]
fn completions_in_any_order_over_many_laps() {
    let mut bench = Bench::small();
    let mut outstanding = std::collections::BTreeSet::new();
    for round in 0..500u64 {
        while outstanding.len() < 8 {
            let tag = round * 100 + outstanding.len() as u64;
            bench.read(tag, round % 1000, BLOCK);
            outstanding.insert(tag);
        }
        let buffer = bench.buffer(BLOCK);
        let full = bench.queue.submit(OpTag(0), Request::Read { lba: Lba::new(0), buffer }).unwrap_err();
        assert_eq!(full.reason, RejectReason::QueueFull);
        bench.queue.ring();
        let commands = bench.commands();
        for command in commands.iter().rev().step_by(1 + round as usize % 3) {
            bench.fake.complete(1, command.command_id(), Status::SUCCESS);
        }
        for done in bench.poll() {
            assert_eq!(done.result, Ok(()));
            assert!(outstanding.remove(&done.tag.0), "completed twice");
        }
    }
}

#[test]
fn large_requests_are_split_at_the_limits_and_complete_once() {
    let mut script = Script::default();
    script.namespace.noiob.set(24);
    let mut bench = Bench::new(script, &options(4));
    // MDTS is 32 blocks; the boundary every 24 blocks comes first.
    bench.read(7, 20, 100 * BLOCK);
    bench.queue.ring();
    assert_eq!(bench.commands().len(), 4, "as many as there are slots");
    let mut covered = Vec::new();
    let mut done = Vec::new();
    while bench.queue.in_flight() > 0 {
        let command = bench.commands()[0];
        covered.push(lba_and_blocks(&command));
        bench.fake.complete(1, command.command_id(), Status::SUCCESS);
        done.extend(bench.poll());
    }
    assert_eq!(covered, [(20, 4), (24, 24), (48, 24), (72, 24), (96, 24)]);
    assert_eq!((done.len(), done[0].tag), (1, OpTag(7)));
    assert_eq!(done[0].buffer.as_ref().unwrap().len(), 100 * BLOCK);
}

#[test]
fn a_backlog_is_served_in_order_and_starves_nobody() {
    let mut bench = Bench::new(Script::default(), &options(2));
    bench.read(0, 0, 100 * BLOCK);
    bench.read(1, 1000, BLOCK);
    bench.queue.ring();
    let mut order = Vec::new();
    while bench.queue.in_flight() > 0 {
        bench.fake.complete_all(1);
        order.extend(bench.poll().into_iter().map(|done| done.tag.0));
    }
    order.sort_unstable();
    assert_eq!(order, [0, 1]);
}

#[test]
fn the_first_error_of_a_split_request_stops_the_rest_and_is_reported_with_its_block() {
    let mut bench = Bench::new(Script::default(), &options(2));
    bench.read(0, 0, 200 * BLOCK);
    bench.queue.ring();
    let commands = bench.commands();
    let bad = Status::from_code(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true);
    bench.fake.complete(1, commands[1].command_id(), bad);
    assert!(bench.poll().is_empty(), "the other command may still write to the buffer");
    assert_eq!(bench.commands().len(), 1, "nothing more is sent");
    bench.fake.complete(1, commands[0].command_id(), Status::from_code(StatusCode::INTERNAL_ERROR));
    let done = bench.poll();
    let Err(IoError::Medium { lba: 32, detail }) = &done[0].result else { panic!("{:?}", done[0].result) };
    assert!(detail.starts_with("Read at block 32 on queue 1: unrecovered read error"), "{detail}");
    assert!(done[0].buffer.is_some());
    assert_eq!(bench.queue.in_flight(), 0);
    bench.read(1, 0, BLOCK);
}

#[test]
fn prps_describe_the_whole_buffer() {
    let mut bench = Bench::small();
    let buffer = bench.buffer(5 * BLOCK);
    let iova = buffer.iova();
    let request = Request::Write { lba: Lba::new(3), buffer, durability: Durability::Durable };
    bench.queue.submit(OpTag(0), request).unwrap();
    bench.queue.ring();
    let command = bench.commands()[0];
    assert!(command.read_write().dw12.fua());
    assert_eq!(command.prp1.get(), iova);
    let list = bench.fake.read(command.prp2.get(), 4 * 8);
    let entries: Vec<u64> =
        list.chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())).collect();
    assert_eq!(entries, (1..5).map(|page| iova + page * 4096).collect::<Vec<_>>());
}

#[test]
fn requests_outside_the_device_come_back_with_their_buffer() {
    let mut bench = Bench::small();
    for (lba, bytes) in [(1 << 20, BLOCK), ((1 << 20) - 1, 2 * BLOCK), (u64::MAX, BLOCK), (0, 512)] {
        let buffer = bench.buffer(bytes);
        let rejected =
            bench.queue.submit(OpTag(0), Request::Read { lba: Lba::new(lba), buffer }).unwrap_err();
        assert!(matches!(rejected.reason, RejectReason::Error(IoError::InvalidRange { .. })), "{lba}");
        assert!(matches!(rejected.request, Request::Read { .. }));
    }
    let range = LbaRange { start: Lba::new(1), count: LbaCount::new(u64::MAX) };
    for request in [Request::WriteZeroes(range), Request::Deallocate(range)] {
        assert!(bench.queue.submit(OpTag(0), request).is_err());
    }
    assert_eq!(bench.queue.in_flight(), 0);
}

fn forged(forge: impl FnOnce(&Bench, nvme_spec::SubmissionEntry) -> CompletionEntry) -> ProtocolError {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.read(1, 8, BLOCK);
    bench.queue.ring();
    let forged = forge(&bench, bench.commands()[0]);
    bench.fake.forge(1, forged);
    assert!(bench.poll().is_empty(), "nothing comes back while the controller may write to it");
    assert_eq!(bench.queue.controller().life(), Life::Stopping);
    let Some(Fault::Protocol { queue, error }) = bench.queue.controller().fault().cloned() else {
        panic!("no protocol fault")
    };
    assert_eq!(queue.get(), 1);
    let done = bench.poll_to_the_end();
    assert_eq!(bench.queue.controller().life(), Life::Quiet);
    assert_eq!(done.len(), 2);
    for done in done {
        assert!(matches!(&done.result, Err(IoError::DeviceFailed { detail }) if detail.contains("queue 1")));
        assert!(done.buffer.is_some());
    }
    let buffer = bench.buffer(BLOCK);
    let late = bench.queue.submit(OpTag(9), Request::Read { lba: Lba::new(0), buffer }).unwrap_err();
    assert!(matches!(late.reason, RejectReason::Error(IoError::DeviceFailed { .. })));
    error
}

#[test]
fn completion_with_unknown_or_out_of_range_cid_fails_controller() {
    let error = forged(|_, _| entry(1, 0x8007, 1));
    assert_eq!(error, ProtocolError::CidNotInFlight { cid: 0x8007 });
    let mut bench = Bench::new(Script::default(), &options(5));
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    bench.fake.forge(1, entry(1, 7, 1));
    bench.poll();
    assert!(matches!(
        bench.queue.controller().fault(),
        Some(Fault::Protocol { error: ProtocolError::CidOutOfRange { cid: 7 }, .. })
    ));
}

#[test]
fn completion_with_stale_cid_fails_controller() {
    let error = forged(|_, command| entry(1, command.cid.get().wrapping_add(16), 2));
    assert!(matches!(error, ProtocolError::CidStale { .. }));
}

#[test]
fn completion_for_another_queue_fails_controller() {
    let error = forged(|_, command| entry(2, command.cid.get(), 2));
    assert_eq!(error, ProtocolError::ForeignQueue { sq_id: 2 });
}

#[test]
fn completion_with_impossible_sq_head_fails_controller() {
    for head in [0, 3, 8, 9, u16::MAX] {
        let error = forged(|_, command| entry(1, command.cid.get(), head));
        assert!(matches!(error, ProtocolError::BadSqHead { sq_head, .. } if sq_head == head));
    }
}

#[test]
fn a_command_completed_twice_fails_controller() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    let cid = bench.commands()[0].command_id();
    bench.fake.complete(1, cid, Status::SUCCESS);
    bench.fake.forge(1, entry(1, cid.get(), bench.fake.sq_head(1)));
    assert_eq!(bench.poll().len(), 1, "the first completion counts");
    assert!(matches!(
        bench.queue.controller().fault(),
        Some(Fault::Protocol { error: ProtocolError::CidNotInFlight { .. }, .. })
    ));
}

#[test]
fn an_entry_of_the_last_lap_is_not_taken() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    let cid = bench.commands()[0].cid.get();
    bench.fake.write_stale_phase(1, entry(1, cid, 1));
    assert!(bench.poll().is_empty());
    assert!(bench.queue.controller().fault().is_none());
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 1);
}

#[test]
fn an_overdue_command_is_a_timeout_and_fails_the_others() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    assert!(!bench.queue.arm_interrupt());
    bench.fake.timing.advance(Duration::from_secs(2));
    assert!(!bench.queue.arm_interrupt(), "the watchdog has seen it");
    bench.fake.timing.advance(Duration::from_secs(20));
    bench.read(1, 8, BLOCK);
    bench.queue.ring();
    assert!(!bench.queue.arm_interrupt());
    bench.fake.timing.advance(Duration::from_secs(11));
    assert!(bench.queue.arm_interrupt(), "the first is overdue, the second is not");
    let Some(Fault::CommandTimeout { timeout_ms: 30_000, opcode: 2, .. }) = bench.queue.controller().fault()
    else {
        panic!("{:?}", bench.queue.controller().fault())
    };
    let mut done = bench.poll_to_the_end();
    done.sort_by_key(|done| done.tag.0);
    assert_eq!(done[0].result, Err(IoError::Timeout));
    assert!(matches!(done[1].result, Err(IoError::DeviceFailed { .. })));
}

#[test]
fn overdue_commands_are_found_by_polling_alone() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    let begin = bench.fake.timing.now();
    let mut polls = 0u64;
    while bench.queue.controller().fault().is_none() {
        assert!(bench.poll().is_empty());
        bench.fake.timing.advance(Duration::from_millis(1));
        polls += 1;
        assert!(polls < 100_000, "never found");
    }
    let taken = bench.fake.timing.now().duration_since(begin);
    assert!(taken >= Duration::from_secs(30) && taken <= Duration::from_secs(36), "{taken:?}");
}

#[test]
fn removal_and_fatal_status_are_named() {
    for (spoil, expected) in [
        ((|script: &mut Script| script.removed = true) as fn(&mut Script), Fault::Removed),
        (|script| script.fatal = true, Fault::FatalStatus { csts: 3 }),
    ] {
        let mut bench = Bench::small();
        bench.read(0, 0, BLOCK);
        bench.queue.ring();
        spoil(&mut bench.fake.script());
        for _ in 0..3 {
            bench.queue.arm_interrupt();
            bench.fake.timing.advance(Duration::from_secs(31));
        }
        assert_eq!(bench.queue.controller().fault(), Some(&expected));
        assert_eq!(bench.poll_to_the_end().len(), 1);
    }
}

#[test]
fn memory_of_a_controller_that_will_not_stop_is_never_reused() {
    let mut bench = Bench::small();
    let mut buffer = bench.buffer(BLOCK);
    buffer.write_at(0, b"pollux");
    let iova = buffer.iova();
    let request = Request::Write { lba: Lba::new(0), buffer, durability: Durability::Cached };
    bench.queue.submit(OpTag(0), request).unwrap();
    bench.queue.ring();
    bench.fake.script().stops = false;
    bench.fake.forge(1, entry(1, 0xfff0, 1));
    let available = bench.queue.pool().available();
    let done = bench.poll_to_the_end();
    assert_eq!(bench.queue.controller().life(), Life::Abandoned);
    assert!(matches!(done[0].result, Err(IoError::DeviceFailed { .. })));
    let back = done[0].buffer.as_ref().unwrap();
    let mut text = [0; 6];
    back.read_at(0, &mut text);
    assert_eq!((&text, back.len()), (b"pollux", BLOCK), "the caller has its data back");
    assert_ne!(back.iova(), iova, "in other memory");
    drop(done);
    assert_eq!(bench.queue.pool().available(), available, "the page does not return to the pool");
    let Bench { fake, queue } = bench;
    drop(queue);
    assert_eq!(&fake.read(iova, 6), b"pollux", "and is still mapped after everything was dropped");
}

#[test]
fn revoking_dma_is_as_good_as_stopping() {
    let mut bench = Bench::new(Script { can_revoke: true, ..Script::default() }, &options(8));
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    bench.fake.script().stops = false;
    bench.fake.forge(1, entry(1, 0xfff0, 1));
    let done = bench.poll_to_the_end();
    assert_eq!(bench.queue.controller().life(), Life::Quiet);
    drop(done);
    assert_eq!(bench.queue.pool().available(), bench.queue.pool().capacity());
}

#[test]
fn flush_without_a_cache_and_deallocate_without_support_are_free() {
    let mut script = Script::default();
    script.controller.vwc = 0;
    script.controller.oncs.set(0);
    let mut bench = Bench::new(script, &options(8));
    let range = LbaRange { start: Lba::new(0), count: LbaCount::new(100) };
    bench.queue.submit(OpTag(0), Request::Flush).unwrap();
    bench.queue.submit(OpTag(1), Request::Deallocate(range)).unwrap();
    let none = LbaRange { start: Lba::new(0), count: LbaCount::new(0) };
    bench.queue.submit(OpTag(2), Request::WriteZeroes(none)).unwrap();
    bench.queue.ring();
    assert!(bench.queue.arm_interrupt(), "completions wait");
    assert_eq!(bench.poll().iter().filter(|done| done.result == Ok(())).count(), 3);
    assert!(bench.fake.doorbells(1).is_empty());

    bench.queue.submit(OpTag(3), Request::WriteZeroes(range)).unwrap();
    bench.queue.ring();
    let commands = bench.commands();
    assert!(commands.iter().all(|command| command.opcode == NvmOpcode::WRITE.0));
    assert_eq!(commands.iter().map(|command| lba_and_blocks(command).1).sum::<u64>(), 100);
    let zeroes = bench.fake.read(commands[0].prp1.get(), 4096);
    assert!(zeroes.iter().all(|&byte| byte == 0));
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 1);
}

#[test]
fn ranges_go_out_as_their_own_commands() {
    let mut bench = Bench::small();
    assert!(bench.queue.oncs.contains(Oncs::WRITE_ZEROES));
    let range = LbaRange { start: Lba::new(5), count: LbaCount::new(20_000) };
    bench.queue.submit(OpTag(0), Request::Deallocate(range)).unwrap();
    bench.queue.submit(OpTag(1), Request::WriteZeroes(range)).unwrap();
    bench.queue.submit(OpTag(2), Request::Flush).unwrap();
    bench.queue.ring();
    let commands = bench.commands();
    let opcodes: Vec<NvmOpcode> = commands.iter().map(|command| NvmOpcode(command.opcode)).collect();
    let (dsm, zeroes) = (NvmOpcode::DATASET_MANAGEMENT, NvmOpcode::WRITE_ZEROES);
    assert_eq!(opcodes, [dsm, zeroes, zeroes, zeroes, NvmOpcode::FLUSH]);
    assert!(commands[0].dsm().ad());
    let range = bench.fake.read(commands[0].prp1.get(), 16);
    assert_eq!(range[4..8], 20_000u32.to_le_bytes());
    assert_eq!(range[8..], 5u64.to_le_bytes());
    assert_eq!(commands[1..4].iter().map(|command| lba_and_blocks(command).1).sum::<u64>(), 20_000);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 3);
}

#[test]
fn a_fault_found_by_one_queue_wakes_the_others() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut bench = Bench::new(Script { vectors: 8, ..Script::default() }, &options(8));
    let controller = Arc::clone(bench.queue.controller());
    let mut other = Bench::second(&bench.fake, Some(&controller), &options(8));
    let buffer = other.pool().try_alloc(BLOCK).unwrap();
    other.submit(OpTag(5), Request::Read { lba: Lba::new(0), buffer }).unwrap();
    other.ring();
    assert!(!other.arm_interrupt());
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    bench.fake.forge(1, entry(1, 0xfff0, 1));
    bench.poll();
    let mut fds = [PollFd::new(other.interrupt().unwrap(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    let mut done = 0;
    other.process_completions(10, &mut |_| done += 1);
    assert_eq!(done, 1);
}

#[test]
fn dropping_a_queue_with_commands_in_flight_deletes_it_first() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    let Bench { fake, queue } = bench;
    let controller = Arc::clone(queue.controller());
    drop(queue);
    assert!(!fake.has_queue(1));
    drop(controller);
    assert_eq!(fake.regions_alive(), 0);
}

#[test]
fn memory_of_a_queue_that_cannot_be_deleted_outlives_it() {
    let mut bench = Bench::small();
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    let command = bench.commands()[0];
    let Bench { fake, queue } = bench;
    let controller = Arc::clone(queue.controller());
    fake.script().refuse = vec![AdminOpcode::DELETE_IO_SQ];
    drop(queue);
    fake.read(command.prp1.get(), BLOCK);
    fake.complete_all(1);
    drop(controller);
    assert_eq!(fake.regions_alive(), 0, "released once the controller is disabled");
}

#[test]
fn latencies_are_recorded_only_when_asked_for() {
    let mut bench = Bench::new(Script::default(), &options(8));
    assert!(bench.queue.latencies().is_none());
    let recording = QueueOptions { latency: LatencyRecording::On, ..options(8) };
    bench = Bench::new(Script::default(), &recording);
    bench.read(0, 0, BLOCK);
    bench.queue.ring();
    bench.fake.timing.advance(Duration::from_micros(100));
    bench.fake.complete_all(1);
    bench.poll();
    let latencies = bench.queue.latencies().unwrap();
    let read = latencies.class(crate::stats::LatencyClass::Read).snapshot();
    assert_eq!(read.count(), 1);
    assert!((100_000..104_000).contains(&read.quantile_ns(0.5)));
}
