//! Faults of the recovery from a fault: whatever goes wrong with the abort, the deletion of the queue, the reset or the
//! new queue.

use nvme_emulator::{CidFault, Effect, FaultRule, HeldAbort, Times, When};
use nvme_spec::identify::Cns;
use nvme_spec::{AdminOpcode, Status, StatusCode};

use crate::bench::{Bench, Means, World, bring_up, device, queue_options, way_to};
use crate::case::{Command, Expect, IO_COMMANDS, Load, Moment, Place, Row, admin, run};

fn effects() -> Vec<Effect> {
    let refused = |code| Effect::Status { status: Status::from_code(code), when: When::BeforeExecution };
    vec![
        Effect::Drop,
        Effect::LoseCompletion,
        Effect::StalePhase,
        Effect::Hold { abort: HeldAbort::Ignored },
        refused(StatusCode::INVALID_FIELD),
        refused(StatusCode::ABORT_LIMIT_EXCEEDED),
        Effect::FatalStatus,
        Effect::Remove,
        Effect::CompletionCid(CidFault::OutOfRange),
        Effect::Duplicate,
        Effect::CompletionSqId(1),
    ]
}

/// Each stage goes wrong once, and each goes wrong for ever.
#[test]
fn a_fault_of_a_recovery_is_recovered_from_or_the_end() {
    let stages = [
        AdminOpcode::ABORT,
        AdminOpcode::DELETE_IO_SQ,
        AdminOpcode::DELETE_IO_CQ,
        AdminOpcode::CREATE_IO_CQ,
        AdminOpcode::CREATE_IO_SQ,
        AdminOpcode::IDENTIFY,
        AdminOpcode::SET_FEATURES,
    ];
    let mut cases = 0;
    for (stage, effect) in stages.into_iter().flat_map(|stage| effects().into_iter().map(move |e| (stage, e)))
    {
        for times in [Times::Once, Times::Forever] {
            // Lost: abort and deletion. Fatal: reset.
            for first in [Effect::Drop, Effect::FatalStatus] {
                for command in IO_COMMANDS {
                    for moment in [Moment::Running, Moment::ShuttingDownLate, Moment::Dropping(25)] {
                        let mut row = Row::new(first.clone(), Expect::Bounded, Expect::Bounded);
                        row.besides = vec![FaultRule::new(admin(stage), effect.clone()).times(times)];
                        let (world, during) = (World::Inline, AdminOpcode::IDENTIFY);
                        run(&row, Place { world, command, load: Load::FullQueue, moment, during });
                        cases += 1;
                    }
                }
            }
        }
    }
    println!("faults of a recovery: {cases} cases");
}

/// With the abort or the deletion lost there is still the reset, and nobody above notices.
#[test]
fn what_an_abort_or_a_deletion_does_not_cure_a_reset_does() {
    let mut cases = 0;
    for stage in [AdminOpcode::ABORT, AdminOpcode::DELETE_IO_SQ, AdminOpcode::DELETE_IO_CQ] {
        for effect in [Effect::Drop, Effect::LoseCompletion, Effect::StalePhase, Effect::FatalStatus] {
            for command in IO_COMMANDS {
                for world in [World::Inline, World::Stepped] {
                    let mut row = Row::new(Effect::Drop, Expect::Recovers, Expect::Recovers);
                    row.besides = vec![FaultRule::new(admin(stage), effect.clone())];
                    let (load, moment, during) = (Load::FullQueue, Moment::Running, AdminOpcode::IDENTIFY);
                    run(&row, Place { world, command, load, moment, during });
                    cases += 1;
                }
            }
        }
    }
    println!("stages skipped: {cases} cases");
}

/// Every byte of the Identify data that a bring-up looks at, as all zeroes, all ones, and one bit off: it is used or
/// refused; what is used can be written to and read, or says why not.
#[test]
fn hostile_identify_data_is_used_or_refused() {
    let structures = [(Cns::CONTROLLER, 0..560), (Cns::NAMESPACE, 0..200), (Cns::ACTIVE_NAMESPACES, 0..24)];
    let (mut cases, mut used) = (0, 0);
    for (cns, offsets) in structures {
        for offset in offsets {
            for bytes in [vec![0], vec![0xff], vec![0x80], vec![1], vec![0xff; 8], vec![0; 8]] {
                let device = device(World::Inline);
                let patch = Effect::PatchData { offset, bytes };
                let rule = FaultRule::new(admin(AdminOpcode::IDENTIFY).selecting(cns.0), patch.clone());
                device.faults().add(rule.times(Times::Forever));
                let (clock, way) = way_to(&device, World::Inline, Means::default());
                let Ok(controller) = bring_up(World::Inline, &clock, &way) else {
                    assert_eq!(way.regions_alive(), 0, "{cns:?} {patch:?}");
                    cases += 1;
                    continue;
                };
                if let Ok(queue) = controller.create_queue(&queue_options(World::Inline)) {
                    let name = format!("{cns:?} {patch:?}");
                    try_out(Bench { world: World::Inline, clock, way, controller, queue, device }, &name);
                    used += 1;
                }
                cases += 1;
            }
        }
    }
    println!("hostile identify data: {cases} cases, {used} used");
    assert!(used > 0 && used < cases);
}

fn try_out(mut bench: Bench, name: &str) {
    use reactor::block::BlockDevice;
    let geometry = bench.queue.geometry().clone();
    let bytes = (geometry.lba_size as usize * 2).max(8192);
    if bytes <= bench.queue.pool().capacity() / 4 {
        let data = vec![0x3c; bytes];
        // The controller believes in blocks of 4 KiB: what it makes of others is its affair.
        let written = bench.write(1, &data);
        let read = bench.read(1, bytes);
        if geometry.lba_size == 4096 && written.is_ok() {
            assert!(read.is_err() || read == Ok(data), "{name}");
        }
    }
    let Bench { way, controller, queue, .. } = bench;
    drop((queue, controller));
    assert_eq!(way.regions_alive(), 0, "{name}");
}

/// After a reset: another serial number, another namespace, fewer queues are an end with a reason, not a mix-up.
#[test]
fn a_controller_that_comes_back_as_another_is_not_used() {
    for (cns, offset, bytes, says) in [
        (Cns::CONTROLLER, 4, b"X".to_vec(), "calls itself"),
        (Cns::CONTROLLER, 24, b"X".to_vec(), "calls itself"),
        (Cns::NAMESPACE, 0, vec![5; 8], "namespace 1 has another size"),
        (Cns::NAMESPACE, 26, vec![0], "namespace 1 has another size"),
        (Cns::ACTIVE_NAMESPACES, 0, vec![0; 4], "namespace 1 has another size"),
    ] {
        let mut bench = Bench::new(World::Inline, Means::default());
        let patch = Effect::PatchData { offset, bytes };
        let rule = FaultRule::new(admin(AdminOpcode::IDENTIFY).selecting(cns.0), patch);
        bench.device.faults().add(rule.times(Times::Forever));
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), Effect::FatalStatus));
        let error = bench.read(0, 4096).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// Whoever makes a queue while the controller fails waits for the reset, as everybody else; but not for ever.
#[test]
fn a_queue_that_is_made_while_the_controller_fails_is_made_after_the_reset() {
    for opcode in [AdminOpcode::CREATE_IO_CQ, AdminOpcode::CREATE_IO_SQ] {
        for effect in [Effect::Drop, Effect::LoseCompletion, Effect::FatalStatus] {
            for times in [Times::Once, Times::N(2), Times::Forever] {
                let mut bench = Bench::new(World::Inline, Means::default());
                bench.device.faults().add(FaultRule::new(admin(opcode), effect.clone()).times(times));
                let made = bench.controller.create_queue(&queue_options(World::Inline));
                assert_eq!(made.is_ok(), times != Times::Forever, "{opcode:?} {effect:?} {times:?}");
                drop(made);
                bench.device.faults().clear();
                let result = bench.read(0, 4096).map(drop);
                assert_eq!(result, Ok(()), "{opcode:?} {effect:?} {times:?}");
                let free = bench.controller.create_queue(&queue_options(World::Inline));
                assert!(free.is_ok(), "the number of the queue is free again");
                drop(free);
                let Bench { way, controller, queue, .. } = bench;
                drop((queue, controller));
                assert_eq!(way.regions_alive(), 0);
            }
        }
    }
}

/// Memory of queues that went while the controller had failed comes back with the reset, not with the end.
#[test]
fn memory_kept_for_a_failed_controller_is_given_back_after_its_reset() {
    let mut bench = Bench::new(World::Inline, Means::default());
    bench.read(0, 4096).unwrap();
    let before = bench.way.regions_alive();
    for _ in 0..3 {
        let other = bench.controller.create_queue(&queue_options(World::Inline)).unwrap();
        bench.device.faults().add(FaultRule::new(admin(AdminOpcode::DELETE_IO_SQ), Effect::Drop));
        drop(other);
        bench.read(0, 4096).unwrap();
    }
    assert_eq!((bench.way.regions_alive(), bench.controller.resets()), (before, 3));
}

/// A command that completes at whatever stage of its abort, of the deletion of its queue, or of a reset.
#[test]
fn a_completion_may_race_with_every_stage() {
    let mut cases = 0;
    let lost = |opcode| vec![FaultRule::new(admin(opcode), Effect::Drop)];
    let besides = [Vec::new(), lost(AdminOpcode::ABORT), lost(AdminOpcode::DELETE_IO_SQ)];
    for late_ms in (600..1600).step_by(25) {
        for rules in &besides {
            for command in IO_COMMANDS {
                for world in [World::Inline, World::Stepped] {
                    let late = Effect::Delay(std::time::Duration::from_millis(late_ms));
                    let mut row = Row::new(late, Expect::Recovers, Expect::Recovers);
                    row.besides.clone_from(rules);
                    let (load, moment, during) = (Load::FullQueue, Moment::Running, AdminOpcode::IDENTIFY);
                    run(&row, Place { world, command, load, moment, during });
                    cases += 1;
                }
            }
        }
    }
    println!("races: {cases} cases");
}
