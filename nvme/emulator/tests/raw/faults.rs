//! Fault rules that act on commands as a whole and on their completions, as the host sees them.

use std::time::Duration;

use nvme_emulator::{
    CidFault, CommandMatch, ControllerConfig, Effect, FaultRule, HeldAbort, Mode, QueueMatch, Times, When,
};
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::feature::{FeatureId, FeatureSelect};
use nvme_spec::registers;
use nvme_spec::{AdminOpcode, CommandId, NvmOpcode, QueueId, Status, StatusCode, SubmissionEntry};

use crate::initiator::{Buffer, Host, NS1, Pair, memory_config, threaded};

pub(crate) fn host() -> (Host, Pair) {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let io = host.io_pair(1, 16);
    (host, io)
}

fn flush() -> SubmissionEntry {
    SubmissionEntry::flush(NS1)
}

fn on_flush(effect: Effect) -> FaultRule {
    FaultRule::new(CommandMatch::io(NvmOpcode::FLUSH), effect)
}

fn failing(code: StatusCode) -> Effect {
    Effect::Status { status: Status::from_code(code), when: When::BeforeExecution }
}

#[test]
fn rule_acts_on_the_commands_that_fit_every_field_and_no_others() {
    let (mut host, mut io) = host();
    let mut other = host.io_pair(2, 16);
    let target = Buffer::new(&host, 4096);
    let read = |slba, blocks_z| target.attach(SubmissionEntry::read(NS1, slba, blocks_z));
    let plan = host.ctrl.faults();
    let on = CommandMatch::io(NvmOpcode::READ).on_queue(QueueMatch::Id(1)).on_namespace(1).on_lbas(8..10);
    let rule = FaultRule::new(on, failing(StatusCode::UNRECOVERED_READ_ERROR)).times(Times::Forever);
    let id = plan.add(rule);
    for (slba, blocks_z, hit) in [(0, 7, false), (0, 8, true), (9, 0, true), (10, 0, false), (7, 0, false)] {
        let expected = if hit { StatusCode::UNRECOVERED_READ_ERROR } else { StatusCode::SUCCESS };
        assert_eq!(io.status(read(slba, blocks_z)), expected, "{slba} {blocks_z}");
    }
    other.ok(read(9, 0));
    io.ok(target.attach(SubmissionEntry::write(NS1, 9, 0, ForceUnitAccess::No)));
    assert_eq!(plan.fired(id), 2);
    plan.remove(id);
    io.ok(read(9, 0));
    assert_eq!(plan.fired(id), 0);
}

#[test]
fn selector_tells_admin_commands_of_one_opcode_apart() {
    let (mut host, _io) = host();
    let on = CommandMatch::admin(AdminOpcode::GET_FEATURES).selecting(FeatureId::ARBITRATION.0);
    let id = host.ctrl.faults().add(FaultRule::new(on, failing(StatusCode::INTERNAL_ERROR)));
    let get = |feature| SubmissionEntry::get_features(feature, FeatureSelect::CURRENT);
    host.admin.ok(get(FeatureId::NUMBER_OF_QUEUES));
    assert_eq!(host.admin.status(get(FeatureId::ARBITRATION)), StatusCode::INTERNAL_ERROR);
    host.admin.ok(get(FeatureId::ARBITRATION));
    assert_eq!(host.ctrl.faults().fired(id), 1);
}

#[test]
fn skip_and_times_choose_the_nth_commands() {
    let (host, mut io) = host();
    let rule = on_flush(failing(StatusCode::WRITE_FAULT)).skip(2).times(Times::N(2));
    let id = host.ctrl.faults().add(rule);
    let failed: Vec<bool> = (0..6).map(|_| io.status(flush()) == StatusCode::WRITE_FAULT).collect();
    assert_eq!(failed, [false, false, true, true, false, false]);
    assert_eq!(host.ctrl.faults().fired(id), 2);
}

#[test]
fn status_comes_with_its_flags_before_or_after_execution() {
    let (host, mut io) = host();
    let status = Status::from_code(StatusCode::WRITE_FAULT).with_dnr(true).with_crd(3);
    let source = Buffer::filled(&host, &[7; 512]);
    let target = Buffer::new(&host, 512);
    let plan = host.ctrl.faults();
    for (slba, when, stored) in [(1, When::BeforeExecution, 0), (2, When::AfterExecution, 7)] {
        plan.add(FaultRule::new(CommandMatch::io(NvmOpcode::WRITE), Effect::Status { status, when }));
        let done = io.run(source.attach(SubmissionEntry::write(NS1, slba, 0, ForceUnitAccess::No)));
        assert_eq!(done.status(), status);
        io.ok(target.attach(SubmissionEntry::read(NS1, slba, 0)));
        assert_eq!(target.bytes(), vec![stored; 512], "{when:?}");
    }
}

#[test]
fn dropped_command_never_completes_and_cannot_be_aborted() {
    let (mut host, mut io) = host();
    host.ctrl.faults().add(on_flush(Effect::Drop));
    let cid = io.push(flush());
    io.ring();
    assert_eq!(io.peek(), None);
    let abort = SubmissionEntry::abort(QueueId::new(1), CommandId::new(cid));
    assert_eq!(host.admin.ok(abort), 1);
    assert_eq!(io.peek(), None);
    io.ok(flush());
}

#[test]
fn lost_completion_leaves_the_effect() {
    let (host, mut io) = host();
    host.ctrl.faults().add(FaultRule::new(CommandMatch::io(NvmOpcode::WRITE), Effect::LoseCompletion));
    let source = Buffer::filled(&host, &[9; 512]);
    io.push(source.attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
    io.ring();
    assert_eq!(io.peek(), None);
    let target = Buffer::new(&host, 512);
    io.ok(target.attach(SubmissionEntry::read(NS1, 0, 0)));
    assert_eq!(target.bytes(), [9; 512]);
}

#[test]
fn held_command_is_executed_when_released_and_others_overtake_it() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 16);
        let plan = host.ctrl.faults();
        let hold = Effect::Hold { abort: HeldAbort::Obeyed };
        let id = plan.add(FaultRule::new(CommandMatch::io(NvmOpcode::READ), hold));
        let target = Buffer::new(&host, 512);
        let read = io.push(target.attach(SubmissionEntry::read(NS1, 0, 0)));
        io.ring();
        let source = Buffer::filled(&host, &[5; 512]);
        io.ok(source.attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
        assert_eq!(target.bytes(), [0; 512], "{mode:?}: read before its release");
        plan.release(id);
        assert_eq!(io.wait().cid.get(), read);
        assert_eq!(target.bytes(), [5; 512], "{mode:?}: executed late, so it reads what was written since");
    }
}

#[test]
fn removing_a_rule_releases_what_it_holds() {
    let (host, mut io) = host();
    let plan = host.ctrl.faults();
    let hold = || on_flush(Effect::Hold { abort: HeldAbort::Ignored });
    let id = plan.add(hold());
    let first = io.push(flush());
    io.ring();
    plan.remove(id);
    assert_eq!(io.wait().cid.get(), first);
    plan.add(hold());
    let second = io.push(flush());
    io.ring();
    plan.clear();
    assert_eq!(io.wait().cid.get(), second);
}

#[test]
fn abort_of_a_held_command_is_obeyed_or_ignored_as_the_rule_says() {
    for (reply, dw0) in [(HeldAbort::Obeyed, 0), (HeldAbort::Ignored, 1)] {
        for mode in [Mode::Inline, Mode::Stepped, threaded(2)] {
            let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
            let mut io = host.io_pair(1, 16);
            let id = host.ctrl.faults().add(on_flush(Effect::Hold { abort: reply }));
            let cid = io.push(flush());
            io.ring();
            while host.ctrl.faults().fired(id) == 0 {
                host.ctrl.step();
                std::thread::yield_now();
            }
            let abort = SubmissionEntry::abort(QueueId::new(1), CommandId::new(cid));
            assert_eq!(host.admin.ok(abort), dw0, "{mode:?} {reply:?}");
            if reply == HeldAbort::Obeyed {
                let done = io.wait();
                assert_eq!((done.cid.get(), done.status().code()), (cid, StatusCode::ABORT_REQUESTED));
            }
            host.ctrl.faults().release(id);
            match reply {
                HeldAbort::Obeyed => io.ok(flush()), // and nothing else arrives before it
                HeldAbort::Ignored => u32::from(io.wait().cid.get() != cid),
            };
            assert_eq!(io.peek(), None);
        }
    }
}

#[test]
fn held_admin_command_can_be_aborted_too() {
    let (mut host, _io) = host();
    let on = CommandMatch::admin(AdminOpcode::IDENTIFY);
    host.ctrl.faults().add(FaultRule::new(on, Effect::Hold { abort: HeldAbort::Obeyed }));
    let page = host.map(4096);
    let mut identify = SubmissionEntry::identify(nvme_spec::identify::Cns::CONTROLLER, NS1);
    identify.prp1.set(page.iova());
    let cid = host.admin.push(identify);
    host.admin.ring();
    let abort = host.admin.push(SubmissionEntry::abort(QueueId::ADMIN, CommandId::new(cid)));
    host.admin.ring();
    let both = [host.admin.wait(), host.admin.wait()];
    let of = |cid| both.iter().find(|done| done.cid.get() == cid).unwrap();
    assert_eq!((of(abort).dw0.get(), of(cid).status().code()), (0, StatusCode::ABORT_REQUESTED));
}

#[test]
fn held_and_delayed_commands_vanish_in_a_reset() {
    let (mut host, mut io) = host();
    let plan = host.ctrl.faults();
    let id = plan.add(on_flush(Effect::Hold { abort: HeldAbort::Obeyed }));
    plan.add(on_flush(Effect::Delay(Duration::from_secs(1))).skip(1));
    io.push(flush());
    io.push(flush());
    io.ring();
    host.ctrl.write32(registers::CC, 0);
    host = Host::enabled(host.ctrl);
    host.ctrl.faults().release(id);
    host.ctrl.advance(Duration::from_secs(2));
    assert_eq!(io.peek(), None);
    let mut io = host.io_pair(1, 16);
    assert_eq!(io.peek(), None);
    io.ok(flush());
}

#[test]
fn delayed_command_waits_for_virtual_time_and_not_for_others() {
    for mode in [Mode::Inline, Mode::Stepped] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 16);
        host.ctrl.faults().add(on_flush(Effect::Delay(Duration::from_millis(10))));
        let late = io.push(flush());
        let next = io.push(flush());
        io.ring();
        assert_eq!(io.wait().cid.get(), next, "{mode:?}");
        host.ctrl.advance(Duration::from_millis(9));
        host.ctrl.step();
        assert_eq!(io.peek(), None);
        host.ctrl.advance(Duration::from_millis(1));
        host.ctrl.step();
        assert_eq!(io.wait().cid.get(), late);
    }
}

#[test]
fn delayed_command_completes_by_itself_with_threads() {
    let mut host = Host::new(ControllerConfig { mode: threaded(1), ..memory_config(1 << 20, 512) });
    let mut io = host.io_pair(1, 16);
    host.ctrl.faults().add(on_flush(Effect::Delay(Duration::from_millis(30))));
    let start = std::time::Instant::now();
    let late = io.push(flush());
    let next = io.push(flush());
    io.ring();
    assert_eq!([io.wait().cid.get(), io.wait().cid.get()], [next, late]);
    assert!(start.elapsed() >= Duration::from_millis(30));
}

#[test]
fn completion_carries_what_was_forged() {
    let (host, mut io) = host();
    let plan = host.ctrl.faults();
    let before = io.run(flush()).cid.get();
    plan.add(on_flush(Effect::CompletionCid(CidFault::Stale)));
    io.push(flush());
    io.ring();
    assert_eq!(io.wait().cid.get(), before);

    plan.add(on_flush(Effect::CompletionCid(CidFault::OutOfRange)));
    plan.add(on_flush(Effect::CompletionSqId(77)));
    plan.add(on_flush(Effect::CompletionSqHead(0x4242)));
    io.push(flush());
    io.ring();
    let done = io.wait();
    assert_eq!((done.cid.get(), done.sq_id.get(), done.sq_head.get()), (0xffff, 77, 0x4242));

    plan.add(on_flush(Effect::CompletionCid(CidFault::Exact(3))));
    io.push(flush());
    io.ring();
    assert_eq!(io.wait().cid.get(), 3);
    io.ok(flush());
}

#[test]
fn identifier_that_is_not_in_flight_is_none_of_the_commands_under_way() {
    let (host, mut io) = host();
    let plan = host.ctrl.faults();
    plan.add(on_flush(Effect::CompletionCid(CidFault::NotInFlight)));
    let target = Buffer::new(&host, 512);
    plan.add(FaultRule::new(CommandMatch::io(NvmOpcode::READ), Effect::Hold { abort: HeldAbort::Obeyed }));
    let read = target.attach(SubmissionEntry::read(NS1, 0, 0));
    let commands = [io.push(read), io.push(flush()), io.push(flush())];
    io.ring();
    assert!(!commands.contains(&io.wait().cid.get()));
}

#[test]
fn stale_phase_hides_a_completion_in_its_slot() {
    let (host, mut io) = host();
    host.ctrl.faults().add(on_flush(Effect::StalePhase));
    let hidden = io.push(flush());
    let shown = io.push(flush());
    io.ring();
    assert_eq!(io.peek(), None);
    io.head = 1; // past the slot that looks old
    assert_eq!(io.peek().unwrap().cid.get(), shown);
    assert_ne!(hidden, shown);
}

#[test]
fn duplicate_completion_arrives_twice() {
    let (host, mut io) = host();
    host.ctrl.faults().add(on_flush(Effect::Duplicate));
    let cid = io.push(flush());
    io.ring();
    assert_eq!([io.wait().cid.get(), io.wait().cid.get()], [cid, cid]);
    assert_eq!(io.peek(), None);
}

#[test]
fn extra_completions_overrun_the_queue() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 4);
    host.ctrl.faults().add(on_flush(Effect::Extra(5)));
    io.push(flush());
    io.ring();
    // Four slots, six completions: the first two were overwritten by the fifth and sixth, of the next phase.
    assert_eq!(io.peek(), None, "the host's first slot has the phase of the second round already");
    io.head = 2;
    assert!(io.peek().is_some() && io.peek().is_some() && io.peek().is_some() && io.peek().is_some());
}

#[test]
fn fatal_rule_sets_cfs_and_a_reset_recovers() {
    let (host, mut io) = host();
    host.ctrl.faults().add(on_flush(Effect::FatalStatus));
    io.push(flush());
    io.ring();
    assert!(host.csts().cfs());
    assert_eq!(io.peek(), None);
    host.ctrl.write32(registers::CC, 0);
    let mut host = Host::enabled(host.ctrl);
    host.io_pair(1, 16).ok(flush());
}

#[test]
fn rules_that_fit_the_same_command_add_up_and_the_older_wins() {
    let (host, mut io) = host();
    let plan = host.ctrl.faults();
    plan.add(on_flush(failing(StatusCode::WRITE_FAULT)));
    plan.add(on_flush(failing(StatusCode::INTERNAL_ERROR)));
    plan.add(on_flush(Effect::Duplicate));
    io.push(flush());
    io.ring();
    for _ in 0..2 {
        assert_eq!(io.wait().status().code(), StatusCode::WRITE_FAULT);
    }
    assert_eq!(io.peek(), None);
}

#[test]
fn duplicate_that_finds_no_room_is_posted_later() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair_with(1, 16, 2, nvme_spec::command::QueueInterrupt::Disabled);
    host.ctrl.faults().add(on_flush(Effect::Duplicate).times(Times::N(3)));
    let cids: Vec<u16> = (0..3).map(|_| io.push(flush())).collect();
    io.ring();
    for cid in cids {
        assert_eq!([io.wait().cid.get(), io.wait().cid.get()], [cid, cid]);
    }
    assert_eq!(io.peek(), None);
}
