//! Rows of every status: each type, every code that the specification has and some that it has not, with and without DNR,
//! with every retry delay, once and for ever, with and without an effect.

use std::time::Duration;

use nvme::transport::Timing;
use nvme_emulator::{Effect, FaultRule, Times, When};
use nvme_spec::{AdminOpcode, Status, StatusCode, StatusType};
use reactor::block::{BlockDevice, Lba, OpTag, Request};

use crate::bench::{BLOCK, Bench, Means, World, bring_up, device, queue_options, way_to};
use crate::case::{COMMANDS, Command, Error, Expect, LOADS, Load, MOMENTS, Moment, Place, Row, admin, run};

/// Every code of every type that has a name, and one without of each type.
fn codes() -> Vec<StatusCode> {
    let all = (0..8).flat_map(|kind| (0..=255).map(move |code| (StatusType(kind), code)));
    let mut found: Vec<StatusCode> = all
        .map(|(kind, code)| StatusCode::from_parts(kind, code))
        .filter(|code| code.name().is_some() && *code != StatusCode::SUCCESS)
        .collect();
    found.extend((0..8).map(|kind| StatusCode::from_parts(StatusType(kind), 0xbe)));
    found
}

fn error_of(code: StatusCode) -> Error {
    match code.status_type() {
        StatusType::MEDIA if code != StatusCode::COMPARE_FAILURE => Error::Medium,
        _ => Error::Command,
    }
}

/// What says that the command was not begun: only then is a flush sent again, for the next one would succeed whatever the
/// failed one has lost.
const NOT_BEGUN: [StatusCode; 4] = [
    StatusCode::NAMESPACE_NOT_READY,
    StatusCode::COMMAND_INTERRUPTED,
    StatusCode::ABORTED_SQ_DELETION,
    StatusCode::ABORT_REQUESTED,
];

fn row(status: Status, when: When, times: Times, command: Command) -> Row {
    // A comparison that failed is an answer, even where nothing was compared.
    let code = status.code();
    let fails = status.dnr()
        || times == Times::Forever
        || code == StatusCode::COMPARE_FAILURE
        || command == Command::Flush && !NOT_BEGUN.contains(&code);
    let io = if fails { Expect::Fails(error_of(status.code())) } else { Expect::Recovers };
    let mut row = Row::new(Effect::Status { status, when }, io, Expect::Fails(Error::Status));
    row.times = times;
    row
}

#[test]
fn every_status_is_an_error_or_repeated() {
    let mut cases = 0;
    for code in codes() {
        for status in [Status::from_code(code), Status::from_code(code).with_dnr(true).with_more(true)] {
            for command in COMMANDS {
                for load in [Load::DepthOne, Load::PhaseWrap] {
                    let (world, during) = (World::Inline, AdminOpcode::IDENTIFY);
                    let place = Place { world, command, load, moment: Moment::Running, during };
                    run(&row(status, When::BeforeExecution, Times::Once, command), place);
                    cases += 1;
                }
            }
        }
    }
    println!("every status: {cases} cases");
}

/// One of each type, at every moment.
#[test]
fn statuses_of_every_type_hold_at_every_moment() {
    let codes = [
        StatusCode::NAMESPACE_NOT_READY,
        StatusCode::ABORTED_SQ_DELETION,
        StatusCode::CONFLICTING_ATTRIBUTES,
        StatusCode::WRITE_FAULT,
        StatusCode::COMPARE_FAILURE,
        StatusCode::ANA_TRANSITION,
        StatusCode::from_parts(StatusType::VENDOR, 3),
    ];
    let mut cases = 0;
    for (code, dnr) in codes.into_iter().flat_map(|code| [(code, false), (code, true)]) {
        let status = Status::from_code(code).with_dnr(dnr);
        for when in [When::BeforeExecution, When::AfterExecution] {
            for command in COMMANDS {
                for (load, moment) in LOADS.into_iter().flat_map(|load| MOMENTS.map(|moment| (load, moment)))
                {
                    let place =
                        Place { world: World::Inline, command, load, moment, during: AdminOpcode::IDENTIFY };
                    run(&row(status, when, Times::Once, command), place);
                    cases += 1;
                }
            }
        }
    }
    println!("statuses by moment: {cases} cases");
}

#[test]
fn a_status_without_end_is_repeated_a_few_times_only() {
    let mut cases = 0;
    for code in
        [StatusCode::COMMAND_INTERRUPTED, StatusCode::UNRECOVERED_READ_ERROR, StatusCode::ABORT_REQUESTED]
    {
        for command in COMMANDS {
            for world in [World::Inline, World::Stepped] {
                let (moment, during) = (Moment::Running, AdminOpcode::IDENTIFY);
                let place = Place { world, command, load: Load::DepthOne, moment, during };
                run(&row(Status::from_code(code), When::AfterExecution, Times::Forever, command), place);
                cases += 1;
            }
        }
    }
    println!("statuses for ever: {cases} cases");
}

/// Identify Controller, CRDT1 to CRDT3 (§5.15.2.2), in units of 100 ms.
const CRDT_OFFSET: usize = 128;

#[test]
fn a_command_is_repeated_no_sooner_than_the_controller_asks() {
    for crd in 0..4u8 {
        let device = device(World::Inline);
        let bytes = [1u8, 0, 5, 0, 20, 0].to_vec();
        device.faults().add(FaultRule::new(
            admin(AdminOpcode::IDENTIFY).selecting(1),
            Effect::PatchData { offset: CRDT_OFFSET, bytes },
        ));
        let mut bench = Bench::over(device, World::Inline, Means::default());
        let status = Status::from_code(StatusCode::NAMESPACE_NOT_READY).with_crd(crd);
        let effect = Effect::Status { status, when: When::BeforeExecution };
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), effect));
        let start = bench.clock.now();
        bench.read(0, BLOCK).unwrap();
        let taken = bench.clock.now().duration_since(start);
        let asked = Duration::from_millis([0, 100, 500, 2000][usize::from(crd)]);
        assert!(taken >= asked && taken <= asked + Duration::from_millis(300), "{crd}: {taken:?}");
    }
}

/// While one waits for its delay, the others go on.
#[test]
fn a_delayed_repetition_holds_nobody_up() {
    let device = device(World::Inline);
    let bytes = [100u8, 0].to_vec();
    device.faults().add(FaultRule::new(
        admin(AdminOpcode::IDENTIFY).selecting(1),
        Effect::PatchData { offset: CRDT_OFFSET, bytes },
    ));
    let (clock, way) = way_to(&device, World::Inline, Means::default());
    let controller = bring_up(World::Inline, &clock, &way).unwrap();
    let mut queue = controller.create_queue(&queue_options(World::Inline)).unwrap();
    let status = Status::from_code(StatusCode::NAMESPACE_NOT_READY).with_crd(1);
    let effect = Effect::Status { status, when: When::BeforeExecution };
    device.faults().add(FaultRule::new(Command::Read.matched().on_lbas(5..6), effect));
    let mut order = Vec::new();
    for tag in [5u64, 6, 7] {
        let buffer = queue.pool().try_alloc(BLOCK).unwrap();
        queue.submit(OpTag(tag), Request::Read { lba: Lba::new(tag), buffer }).unwrap();
    }
    queue.ring();
    for _ in 0..300 {
        queue.process_completions(8, &mut |completion| {
            assert_eq!(completion.result, Ok(()));
            order.push((completion.tag.0, clock.now()));
        });
        queue.ring();
        clock.pass(Duration::from_millis(50));
    }
    assert_eq!(order.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [6, 7, 5]);
    assert!(order[2].1.duration_since(order[1].1) >= Duration::from_secs(10));
}
