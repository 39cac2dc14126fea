//! Rows about registers: a controller that fails, and then does not become ready, does not stop, or is gone; at bring-up,
//! during a reset, and at shutdown.

use std::time::Duration;

use nvme::Life;
use nvme_emulator::{AllOnesRegister, Effect, EmulatedController, FaultRule, ReadyDelay, RegisterFault};
use nvme_spec::AdminOpcode;

use crate::bench::{Bench, Means, World, bring_up, device, way_to};
use crate::case::{COMMANDS, End, Error, Expect, IO_COMMANDS, LOADS, Moment, Place, Row, admin, run};

/// A fatal status, and then trouble with the registers.
fn after_fatal(register: RegisterFault, means: Means, io: Expect, on_admin: Expect) -> Row {
    let mut row = Row::new(Effect::FatalStatus, io, on_admin);
    row.registers = vec![register];
    row.means = means;
    row
}

fn table(name: &str, rows: &[Row]) {
    let mut cases = 0;
    let moments = [Moment::Running, Moment::ShuttingDown, Moment::ShuttingDownLate, Moment::Dropping(30)];
    for row in rows {
        for command in COMMANDS {
            for (load, moment) in LOADS.into_iter().flat_map(|load| moments.map(|moment| (load, moment))) {
                let place =
                    Place { world: World::Inline, command, load, moment, during: AdminOpcode::IDENTIFY };
                run(row, place);
                cases += 1;
            }
        }
    }
    println!("{name}: {cases} cases");
}

const RESET: Expect = Expect::Fails(Error::Reset);
const FAILED: Expect = Expect::Ends(End::ResetFailed);

#[test]
fn a_controller_that_does_not_become_ready_again_ends() {
    table(
        "not ready",
        &[
            after_fatal(RegisterFault::NeverReady, Means::FunctionReset, FAILED, FAILED),
            after_fatal(RegisterFault::NeverReady, Means::Revocation, FAILED, FAILED),
            after_fatal(RegisterFault::FatalOnEnable, Means::FunctionReset, FAILED, FAILED),
        ],
    );
}

#[test]
fn a_controller_that_is_slow_to_become_ready_is_waited_for() {
    let slow =
        |delay| after_fatal(RegisterFault::SlowReady(delay), Means::FunctionReset, Expect::Recovers, RESET);
    let delays = [ReadyDelay::Reads(5), ReadyDelay::Reads(40), ReadyDelay::Time(Duration::from_secs(3))];
    table("slow to become ready", &delays.map(slow));
}

#[test]
fn a_controller_that_does_not_stop_is_reset_as_a_function_or_cut_off() {
    table(
        "does not stop",
        &[
            after_fatal(RegisterFault::NeverStops, Means::FunctionReset, Expect::Recovers, RESET),
            after_fatal(RegisterFault::NeverStops, Means::Revocation, FAILED, FAILED),
        ],
    );
}

/// Its memory is never used again; that of the caller's buffers neither, whose contents come back in a copy.
#[test]
fn a_controller_that_neither_stops_nor_can_be_cut_off_is_abandoned() {
    let row = || {
        // Held back, so that it is still to come when everybody has their buffers back.
        let hold = Effect::Hold { abort: nvme_emulator::HeldAbort::Ignored };
        let mut row = Row::new(hold, Expect::Ends(End::ResetFailed), Expect::Ends(End::ResetFailed));
        row.besides = vec![FaultRule::new(admin(AdminOpcode::DELETE_IO_SQ), Effect::Drop)];
        row.registers = vec![RegisterFault::NeverStops];
        row.means = Means::None;
        row
    };
    let mut cases = 0;
    for command in IO_COMMANDS {
        for load in LOADS {
            let (world, during) = (World::Inline, AdminOpcode::IDENTIFY);
            run(&row(), Place { world, command, load, moment: Moment::Running, during });
            cases += 1;
        }
    }
    println!("abandoned: {cases} cases");
}

#[test]
fn a_controller_that_vanishes_for_a_moment_is_reset_and_one_that_stays_away_is_removed() {
    let all_ones = |register, reads| RegisterFault::AllOnes { register, reads };
    let lost = |register, io, on_admin| {
        let mut row = Row::new(Effect::Drop, io, on_admin);
        // The abort goes the same way: somebody has to look at the registers.
        row.besides = vec![FaultRule::new(admin(AdminOpcode::ABORT), Effect::Drop)];
        row.registers = vec![register];
        row
    };
    let removed = Expect::Ends(End::Removed);
    table(
        "all ones",
        &[
            lost(all_ones(AllOnesRegister::Csts, Some(3)), Expect::Recovers, RESET),
            lost(all_ones(AllOnesRegister::Csts, None), removed, removed),
            lost(all_ones(AllOnesRegister::Cap, None), Expect::Recovers, RESET),
        ],
    );
}

fn fails_to_come_up(says: &str, spoil: impl Fn(&EmulatedController)) {
    for means in [Means::FunctionReset, Means::Revocation] {
        let device = device(World::Inline);
        spoil(&device);
        let (clock, way) = way_to(&device, World::Inline, means);
        let error = bring_up(World::Inline, &clock, &way).map(drop).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(way.regions_alive(), 0, "{error}");
        // What is wrong goes away: then it works.
        device.faults().clear();
        device.reinsert();
        drop(Bench::over(device, World::Inline, Means::default()));
    }
}

#[test]
fn a_controller_that_cannot_be_brought_up_is_an_error_that_names_the_register() {
    let register = |fault| {
        move |device: &EmulatedController| {
            device.faults().add_register(fault);
        }
    };
    let all_ones = |register| RegisterFault::AllOnes { register, reads: None };
    fails_to_come_up("CSTS.RDY=1", register(RegisterFault::NeverReady));
    fails_to_come_up("fatal controller status", register(RegisterFault::FatalOnEnable));
    fails_to_come_up("CAP reads as all ones", register(all_ones(AllOnesRegister::Cap)));
    fails_to_come_up("CSTS reads as all ones", register(all_ones(AllOnesRegister::Csts)));
    fails_to_come_up("CAP is 0x0", register(RegisterFault::CapPatched(0)));
    fails_to_come_up("all ones", EmulatedController::remove);
    for effect in
        [Effect::Drop, Effect::FatalStatus, Effect::Remove, Effect::StalePhase, Effect::CompletionSqId(7)]
    {
        for opcode in [AdminOpcode::IDENTIFY, AdminOpcode::SET_FEATURES] {
            fails_to_come_up("", |device| {
                device.faults().add(FaultRule::new(admin(opcode), effect.clone()));
            });
        }
    }
}

#[test]
fn any_capabilities_are_taken_or_refused() {
    let mut cases = 0;
    for bit in 0..64 {
        for (set, base) in [(true, 0), (false, 0), (true, u64::MAX)] {
            let device = device(World::Inline);
            let cap = device.read64(nvme_spec::registers::CAP);
            let cap = if base == u64::MAX {
                !cap ^ 1 << bit
            } else if set {
                cap | 1 << bit
            } else {
                cap & !(1 << bit)
            };
            device.faults().add_register(RegisterFault::CapPatched(cap));
            let (clock, way) = way_to(&device, World::Inline, Means::default());
            let up = bring_up(World::Inline, &clock, &way);
            if let Ok(controller) = up {
                drop(controller.create_queue(&crate::bench::queue_options(World::Inline)));
                drop(controller);
            }
            assert_eq!(way.regions_alive(), 0, "CAP {cap:#x}");
            cases += 1;
        }
    }
    println!("capabilities: {cases} cases");
}

#[test]
fn a_shutdown_that_never_completes_is_bounded_and_the_controller_disabled() {
    for means in [Means::FunctionReset, Means::Revocation] {
        for world in [World::Inline, World::Stepped] {
            let bench = Bench::new(world, means);
            bench.device.faults().add_register(RegisterFault::ShutdownNeverCompletes);
            let error = bench.controller.shutdown().unwrap_err().to_string();
            assert!(error.contains("CSTS.SHST=2"), "{error}");
            assert_eq!(bench.controller.life(), Life::Quiet);
            assert!(bench.controller.shutdown().is_ok(), "it was shut down before");
            let Bench { way, controller, queue, .. } = bench;
            drop((queue, controller));
            assert_eq!(way.regions_alive(), 0);
        }
    }
}
