//! Retries, aborts, queue deletion, resets and events, on virtual time, against a controller that the test directs.

use super::*;
use crate::controller::ControllerOptions;
use crate::event::ControllerEvent;
use crate::transport::Timing;
use crate::transport::fake::{Fake, Script};
use nvme_spec::NamespaceId;
use nvme_spec::log::AsyncEvent;
use nvme_spec::{AdminOpcode, NvmOpcode};
use reactor::block::Lba;

const BLOCK: usize = 4096;

struct Bench {
    fake: Arc<Fake>,
    queue: QueuePair,
}

impl Bench {
    fn new(script: Script) -> Self {
        let fake = Fake::new(script);
        let (transport, timing) = (Arc::clone(&fake), Arc::clone(&fake.timing));
        let options = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
        let controller = Controller::bring_up(transport, timing, &options).unwrap();
        let queue = controller
            .create_queue(&QueueOptions { depth: 8, pool_bytes: 4 << 20, ..QueueOptions::default() })
            .unwrap();
        Self { fake, queue }
    }

    fn read(&mut self, tag: u64, lba: u64) {
        let buffer = self.queue.pool().try_alloc(BLOCK).unwrap();
        self.queue.submit(OpTag(tag), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
        self.queue.ring();
    }

    fn poll(&mut self) -> Vec<Completion> {
        let mut found = Vec::new();
        self.queue.process_completions(1000, &mut |completion| found.push(completion));
        self.queue.ring();
        found
    }

    /// Polls for `duration` of virtual time, in steps of 10 ms; `act` may complete commands in between.
    fn poll_for(&mut self, duration: Duration, mut act: impl FnMut(&Fake)) -> Vec<Completion> {
        let end = self.fake.timing.now() + duration;
        let mut found = Vec::new();
        while self.fake.timing.now() < end {
            // What a sleeping reactor would do: the watchdog looks at the clock each time.
            self.queue.arm_interrupt();
            found.extend(self.poll());
            act(&self.fake);
            self.fake.timing.advance(Duration::from_millis(10));
        }
        found
    }

    fn commands(&self) -> Vec<nvme_spec::SubmissionEntry> {
        self.fake.pending(1)
    }

    fn controller(&self) -> &Arc<Controller> {
        self.queue.controller()
    }

    /// Nothing is leaked: every operation, slot and buffer is free again.
    fn assert_idle(&self) {
        assert_eq!(self.queue.in_flight(), 0);
        assert_eq!(self.queue.queue.slots().in_flight(), 0);
        assert_eq!(self.queue.pool().available(), self.queue.pool().capacity());
        assert!(self.queue.backlog.is_empty() && self.queue.delayed.is_empty() && self.queue.done.is_empty());
    }
}

const LONG: Duration = Duration::from_secs(45);

fn complete_all(fake: &Fake) {
    if fake.has_queue(1) {
        fake.complete_all(1);
    }
}

fn count(fake: &Fake, opcode: AdminOpcode) -> usize {
    fake.admin_opcodes().iter().filter(|&&sent| sent == opcode).count()
}

#[test]
fn a_status_that_allows_it_is_retried_and_dnr_is_honoured() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 0);
    let busy = Status::from_code(StatusCode::NAMESPACE_NOT_READY);
    for _ in 0..MAX_RETRIES {
        let commands = bench.commands();
        assert_eq!(commands.len(), 1);
        bench.fake.complete(1, commands[0].command_id(), busy);
        assert!(bench.poll().is_empty());
    }
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
    assert_eq!(bench.queue.counters().read().retried, u64::from(MAX_RETRIES));

    bench.read(2, 0);
    let command = bench.commands()[0];
    bench.fake.complete(1, command.command_id(), busy.with_dnr(true));
    assert!(matches!(bench.poll()[0].result, Err(IoError::Command { .. })));

    bench.read(3, 0);
    for _ in 0..=MAX_RETRIES {
        let command = bench.commands()[0];
        bench.fake.complete(1, command.command_id(), busy);
        assert!(bench.queue.in_flight() == 1);
        let done = bench.poll();
        if let Some(done) = done.first() {
            assert!(matches!(done.result, Err(IoError::Command { .. })));
        }
    }
    bench.assert_idle();
}

/// QEMU's controller, made to fail one flush, reported the next as done: what the first had lost went unnoticed.
#[test]
fn a_flush_that_failed_is_not_hidden_by_one_that_succeeds() {
    let mut bench = Bench::new(Script::default());
    for status in [StatusCode::WRITE_FAULT, StatusCode::INTERNAL_ERROR] {
        bench.queue.submit(OpTag(1), Request::Flush).unwrap();
        bench.queue.ring();
        let command = bench.commands()[0];
        bench.fake.complete(1, command.command_id(), Status::from_code(status));
        let done = bench.poll();
        assert!(done[0].result.is_err(), "{status:?}");
    }
    bench.queue.submit(OpTag(2), Request::Flush).unwrap();
    bench.queue.ring();
    let command = bench.commands()[0];
    bench.fake.complete(1, command.command_id(), Status::from_code(StatusCode::NAMESPACE_NOT_READY));
    assert!(bench.poll().is_empty(), "a flush that was not begun is sent again");
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
    bench.assert_idle();
}

#[test]
fn a_retry_waits_for_as_long_as_the_controller_asks() {
    let mut script = Script::default();
    script.controller.crdt[1].set(3);
    let mut bench = Bench::new(script);
    assert_eq!(count(&bench.fake, AdminOpcode::SET_FEATURES), 3, "queues, retry delays, events");
    bench.read(1, 7);
    let command = bench.commands()[0];
    let later = Status::from_code(StatusCode::COMMAND_INTERRUPTED).with_crd(2);
    bench.fake.complete(1, command.command_id(), later);
    assert!(bench.poll_for(Duration::from_millis(280), |_| ()).is_empty());
    assert!(bench.commands().is_empty());
    assert_eq!(bench.queue.in_flight(), 1);
    bench.poll_for(Duration::from_millis(40), |_| ());
    assert_eq!(bench.commands()[0].read_write().slba, 7);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
    drop(bench.poll());
    bench.assert_idle();
}

/// Found by fuzzing: CRDT1 of 26,624 left a read without an answer for three quarters of an hour.
#[test]
fn a_retry_does_not_wait_for_hours() {
    let mut script = Script::default();
    script.controller.crdt[0].set(u16::MAX);
    let mut bench = Bench::new(script);
    bench.read(1, 7);
    let command = bench.commands()[0];
    bench.fake.complete(
        1,
        command.command_id(),
        Status::from_code(StatusCode::COMMAND_INTERRUPTED).with_crd(1),
    );
    bench.poll_for(MAX_RETRY_DELAY + Duration::from_millis(40), |_| ());
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
}

#[test]
fn a_split_request_is_retried_whole_and_completes_once() {
    let mut bench = Bench::new(Script::default());
    let buffer = bench.queue.pool().try_alloc(512 << 10).unwrap();
    let request = Request::Write { lba: Lba::new(0), buffer, durability: Durability::Cached };
    bench.queue.submit(OpTag(1), request).unwrap();
    bench.queue.ring();
    let commands = bench.commands();
    assert_eq!(commands.len(), 4);
    bench.fake.complete(1, commands[2].command_id(), Status::from_code(StatusCode::COMMAND_INTERRUPTED));
    assert!(bench.poll().is_empty());
    assert_eq!(bench.commands().len(), 3, "the others are awaited first");
    bench.fake.complete_all(1);
    assert!(bench.poll().is_empty());
    assert_eq!(bench.commands().iter().map(|c| c.read_write().slba).collect::<Vec<_>>(), [0, 32, 64, 96]);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 1);
    bench.assert_idle();
}

#[test]
fn an_overdue_command_is_aborted_and_sent_again_and_others_go_on() {
    let mut bench = Bench::new(Script { aborts: true, ..Script::default() });
    bench.read(1, 100);
    let lost = bench.commands()[0].command_id();
    let mut tag = 10;
    let mut found = Vec::new();
    while count(&bench.fake, AdminOpcode::ABORT) == 0 {
        bench.read(tag, 5);
        tag += 1;
        let other = bench.commands()[1].command_id();
        bench.fake.complete(1, other, Status::SUCCESS);
        found.extend(bench.poll_for(Duration::from_millis(500), |_| ()));
        assert!(tag < 200, "never aborted");
    }
    found.extend(bench.poll());
    assert!(found.iter().all(|done| done.result == Ok(()) && done.tag.0 >= 10));
    let again = bench.commands();
    assert_eq!(again[0].read_write().slba, 100);
    assert_ne!(again[0].command_id(), lost, "under another identifier");
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].tag, OpTag(1));
    assert_eq!(bench.controller().resets(), 0);
    assert_eq!(count(&bench.fake, AdminOpcode::DELETE_IO_SQ), 0);
    drop(found);
    bench.assert_idle();
}

#[test]
fn a_command_that_is_overdue_again_and_again_is_a_timeout() {
    let mut bench = Bench::new(Script { aborts: true, ..Script::default() });
    bench.read(1, 0);
    let done = bench.poll_for(LONG * 2, |_| ());
    assert_eq!(done[0].result, Err(IoError::Timeout));
    assert_eq!(count(&bench.fake, AdminOpcode::ABORT), usize::from(MAX_TIMEOUTS) + 1);
    assert_eq!(bench.controller().life(), Life::Running);
    drop(done);
    bench.assert_idle();
}

#[test]
fn an_abort_that_does_not_help_costs_the_queue_and_nothing_else() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 3);
    bench.read(2, 4);
    assert!(bench.poll_for(LONG, |_| ()).is_empty());
    assert_eq!(count(&bench.fake, AdminOpcode::ABORT), 1);
    assert_eq!(count(&bench.fake, AdminOpcode::DELETE_IO_SQ), 1);
    assert_eq!(count(&bench.fake, AdminOpcode::CREATE_IO_SQ), 2);
    assert_eq!(bench.controller().resets(), 0);
    assert_eq!(bench.commands().iter().map(|c| c.read_write().slba).collect::<Vec<_>>(), [3, 4]);
    bench.fake.complete_all(1);
    assert!(bench.poll().iter().all(|done| done.result == Ok(())));
    bench.read(3, 9);
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 1, "the queue works as before");
    bench.assert_idle();
}

#[test]
fn what_completed_before_the_queue_was_deleted_is_not_repeated() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 3);
    bench.read(2, 4);
    let second = bench.commands()[1].command_id();
    let mut completed = false;
    let done = bench.poll_for(LONG, |fake| {
        if !completed && count(fake, AdminOpcode::ABORT) == 1 {
            completed = true;
            fake.complete(1, second, Status::SUCCESS);
        }
    });
    assert_eq!((done.len(), done[0].tag), (1, OpTag(2)), "{done:?}");
    assert_eq!(bench.commands().len(), 1);
}

#[test]
fn a_queue_that_cannot_be_deleted_costs_a_reset() {
    for spoil in [
        (|script: &mut Script| script.refuse = vec![AdminOpcode::DELETE_IO_SQ]) as fn(&mut Script),
        |script| script.swallow = vec![AdminOpcode::DELETE_IO_SQ],
        |script| script.swallow = vec![AdminOpcode::ABORT],
        |script| script.fatal = true,
    ] {
        let mut bench = Bench::new(Script { function_resets: 1, ..Script::default() });
        bench.read(1, 3);
        spoil(&mut bench.fake.script());
        let fatal = bench.fake.script().fatal;
        assert!(
            bench
                .poll_for(LONG, |fake| {
                    // A fatal status goes away with the reset.
                    if fatal && fake.configurations().iter().filter(|cc| !cc.en()).count() > 1 {
                        fake.script().fatal = false;
                    }
                })
                .is_empty()
        );
        assert_eq!((bench.controller().resets(), bench.controller().life()), (1, Life::Running));
        assert_eq!(bench.commands()[0].read_write().slba, 3);
        let events = bench.controller().take_events();
        assert!(matches!(events[..], [ControllerEvent::Reset { .. }]), "{events:?}");
        bench.fake.complete_all(1);
        assert_eq!(bench.poll()[0].result, Ok(()));
        bench.assert_idle();
    }
}

#[test]
fn requests_submitted_during_a_reset_wait_and_then_go_out() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 1);
    bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
    bench.read(2, 2);
    let full = (3..20).find(|&tag| {
        let buffer = bench.queue.pool().try_alloc(BLOCK).unwrap();
        let request = Request::Read { lba: Lba::new(tag), buffer };
        match bench.queue.submit(OpTag(tag), request) {
            Ok(()) => false,
            Err(Rejected { reason: RejectReason::QueueFull, .. }) => true,
            Err(rejected) => panic!("{rejected:?}"),
        }
    });
    assert_eq!(full, Some(9), "as many as the queue is deep");
    assert!(bench.commands().len() == 1, "nothing goes out meanwhile");
    let done = bench.poll_for(Duration::from_millis(100), complete_all);
    assert_eq!(done.len(), 8);
    assert!(done.iter().all(|done| done.result == Ok(())));
    drop(done);
    bench.assert_idle();
}

#[test]
fn a_controller_that_does_not_come_back_fails_everything_with_the_cause() {
    for (spoil, says) in [
        ((|script: &mut Script| script.becomes_ready = false) as fn(&mut Script), "CSTS.RDY=1"),
        (|script| script.fatal_on_enable = true, "fatal controller status"),
        (|script| script.swallow = vec![AdminOpcode::IDENTIFY], "opcode 0x06"),
        (|script| script.controller.sn = *b"another             ", "calls itself"),
        (|script| script.granted = 0, "grants 1 I/O queues"),
        (|script| script.namespace.nsze.set(5), "another size"),
        (|script| script.refuse = vec![AdminOpcode::CREATE_IO_CQ], "cannot be created again"),
    ] {
        let mut bench = Bench::new(Script::default());
        bench.read(1, 1);
        spoil(&mut bench.fake.script());
        bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
        let done = bench.poll_for(LONG, |_| ());
        let text = match &done[0].result {
            Err(IoError::DeviceFailed { detail }) => detail.clone(),
            other => panic!("{other:?}"),
        };
        assert!(text.contains(says), "{text}");
        assert_eq!(bench.controller().life(), Life::Quiet, "{text}");
        drop(done);
        assert_eq!(bench.queue.pool().available(), bench.queue.pool().capacity());
        let Bench { fake, queue } = bench;
        drop(queue);
        assert_eq!(fake.regions_alive(), 0, "{text}");
    }
}

#[test]
fn a_function_reset_helps_where_disabling_does_not() {
    let mut bench = Bench::new(Script { function_resets: 1, ..Script::default() });
    bench.read(1, 1);
    bench.fake.script().stops = false;
    bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
    let done = bench.poll_for(LONG, complete_all);
    assert_eq!(done[0].result, Ok(()));
    assert_eq!((bench.controller().resets(), bench.controller().life()), (1, Life::Running));
}

#[test]
fn a_controller_that_neither_stops_nor_can_be_cut_off_keeps_its_memory() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 1);
    let iova = bench.commands()[0].prp1.get();
    bench.fake.script().stops = false;
    bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
    let done = bench.poll_for(LONG, |_| ());
    assert!(matches!(done[0].result, Err(IoError::DeviceFailed { .. })));
    assert_eq!(bench.controller().life(), Life::Abandoned);
    drop(done);
    let Bench { fake, queue } = bench;
    drop(queue);
    fake.read(iova, BLOCK);
}

#[test]
fn a_request_caught_in_reset_after_reset_fails_in_the_end() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 1);
    let mut done = Vec::new();
    let mut resets = 0;
    while done.is_empty() {
        bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
        done = bench.poll_for(Duration::from_millis(100), |_| ());
        resets += 1;
        assert!(resets < 20, "for ever");
    }
    assert_eq!(resets, u32::from(MAX_RESETS) + 1);
    assert!(matches!(done[0].result, Err(IoError::DeviceFailed { .. })));
    assert_eq!(bench.controller().life(), Life::Running);
    drop(done);
    bench.assert_idle();
}

#[test]
fn a_device_that_reads_as_all_ones_for_a_moment_is_reset_not_lost() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 1);
    bench.fake.script().removed = true;
    let fault = bench.controller().shared().link.check_status().unwrap_err();
    assert_eq!(fault, Fault::Removed);
    bench.fake.script().removed = false;
    bench.controller().shared().fail(Fault::FatalStatus { csts: 1 });
    let done = bench.poll_for(Duration::from_secs(1), complete_all);
    assert_eq!(done[0].result, Ok(()));
}

#[test]
fn events_are_read_noted_and_armed_again() {
    let mut script = Script::default();
    script.controller.aerl_z = 7;
    let bench = Bench::new(script);
    assert_eq!(bench.fake.event_requests(), usize::from(crate::admin::MAX_EVENT_REQUESTS));
    bench.fake.script().namespace_ids = vec![1, 3];
    bench.fake.script().changed = vec![3];
    let notice = AsyncEvent::new().with_event_type(2).with_information(0).with_log_page(4);
    bench.fake.raise(notice);
    bench.fake.raise(AsyncEvent::new().with_event_type(1).with_information(1).with_log_page(2));
    let events = bench.controller().take_events();
    let changed = Some(vec![NamespaceId::new(3)]);
    assert_eq!(events[0], ControllerEvent::NamespacesChanged { changed });
    assert!(matches!(events[1], ControllerEvent::Health { information: 1, .. }), "{events:?}");
    assert_eq!(bench.controller().namespaces().len(), 2);
    assert_eq!(bench.fake.event_requests(), usize::from(crate::admin::MAX_EVENT_REQUESTS));
    bench.fake.script().changed = vec![u32::MAX];
    bench.fake.raise(notice);
    assert_eq!(bench.controller().take_events(), [ControllerEvent::NamespacesChanged { changed: None }]);
}

#[test]
fn a_full_queue_wraps_its_rings_and_survives_a_reset_at_any_point() {
    for lap in 0..20 {
        let mut bench = Bench::new(Script::default());
        for tag in 0..lap {
            bench.read(tag, tag);
            bench.fake.complete_all(1);
            assert_eq!(bench.poll().len(), 1);
        }
        for tag in 100..108 {
            bench.read(tag, tag);
        }
        bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
        let mut done = bench.poll_for(Duration::from_millis(100), complete_all);
        done.sort_by_key(|done| done.tag.0);
        assert_eq!(done.iter().map(|done| done.tag.0).collect::<Vec<_>>(), (100..108).collect::<Vec<_>>());
        assert!(done.iter().all(|done| done.result == Ok(())));
        drop(done);
        bench.assert_idle();
    }
}

#[test]
fn a_queue_dropped_in_the_middle_of_a_recovery_leaves_nothing_behind() {
    for polls in 0..6 {
        let mut bench = Bench::new(Script::default());
        let controller = Arc::clone(bench.controller());
        bench.read(1, 1);
        controller.shared().fail(Fault::FatalStatus { csts: 3 });
        for _ in 0..polls {
            bench.poll();
        }
        let Bench { fake, queue } = bench;
        drop(queue);
        assert!(!fake.has_queue(1), "after {polls} polls");
        let queue = controller.create_queue(&QueueOptions {
            depth: 8,
            pool_bytes: 1 << 20,
            ..QueueOptions::default()
        });
        assert_eq!(queue.unwrap().id().get(), 1, "its number is free again");
        drop(controller);
        assert_eq!(fake.regions_alive(), 0);
    }
}

#[test]
fn a_flush_and_a_durable_write_are_repeated_too() {
    let mut bench = Bench::new(Script::default());
    let buffer = bench.queue.pool().try_alloc(BLOCK).unwrap();
    let write = Request::Write { lba: Lba::new(8), buffer, durability: Durability::Durable };
    bench.queue.submit(OpTag(1), write).unwrap();
    bench.queue.submit(OpTag(2), Request::Flush).unwrap();
    bench
        .queue
        .submit(OpTag(3), Request::WriteZeroes(LbaRange { start: Lba::new(9), count: LbaCount::new(4) }))
        .unwrap();
    bench.queue.ring();
    bench.controller().shared().fail(Fault::FatalStatus { csts: 3 });
    bench.poll_for(Duration::from_millis(50), |_| ());
    let opcodes: Vec<_> = bench.commands().iter().map(|command| NvmOpcode(command.opcode)).collect();
    assert_eq!(opcodes, [NvmOpcode::WRITE, NvmOpcode::FLUSH, NvmOpcode::WRITE_ZEROES]);
    assert!(bench.commands()[0].read_write().dw12.fua());
    bench.fake.complete_all(1);
    assert_eq!(bench.poll().len(), 3);
    bench.assert_idle();
}

#[test]
fn removal_and_fatal_status_are_noticed_long_before_the_timeout() {
    for removed in [true, false] {
        let mut bench = Bench::new(Script { function_resets: 1, ..Script::default() });
        bench.read(1, 1);
        bench.fake.script().removed = removed;
        bench.fake.script().fatal = !removed;
        let done = bench.poll_for(Duration::from_secs(6), |fake| {
            if count(fake, AdminOpcode::CREATE_IO_SQ) == 2 {
                complete_all(fake);
            }
        });
        assert_eq!(done.len(), 1, "the command is given 30 s");
        assert_eq!(done[0].result.is_err(), removed);
        assert_eq!(bench.controller().resets(), u32::from(!removed));
    }
}

#[test]
fn a_slow_command_of_a_healthy_controller_is_left_alone() {
    let mut bench = Bench::new(Script::default());
    bench.read(1, 1);
    assert!(bench.poll_for(Duration::from_secs(25), |_| ()).is_empty());
    assert_eq!((count(&bench.fake, AdminOpcode::ABORT), bench.controller().resets()), (0, 0));
    bench.fake.complete_all(1);
    assert_eq!(bench.poll()[0].result, Ok(()));
}
