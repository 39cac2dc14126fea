//! The table with a thread each for controller, keeper and queue, in real time that runs faster; and what takes more than
//! one thread: sleeping owners, two queues in trouble at once, shutdowns, removals and new queues in the middle of it.
//!
//! Time decides nothing here: what is waited for has generous bounds, and what is expected holds however late it comes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nvme::fault::Fault;
use nvme::{Controller, ControllerEvent, Life, QueuePair};
use nvme_emulator::{
    CidFault, Effect, EmulatedController, FaultRule, HeldAbort, QueueMatch, RegisterFault, Times,
};
use nvme_spec::AdminOpcode;
use reactor::block::{BlockDevice, Completion, Lba, OpTag, Request};

use crate::bench::{BLOCK, Bench, Means, World, queue_options};
use crate::case::{Command, End, Error, Expect, IO_COMMANDS, Load, Moment, Place, Row, admin, run};

/// Cases at once: they mostly sleep.
const AT_ONCE: usize = 8;

#[test]
fn the_table_holds_with_threads() {
    use Expect::{Ends, Recovers};
    let reset = Expect::Fails(Error::Reset);
    let protocol = Ends(End::Protocol);
    let rows = [
        Row::new(Effect::Delay(Duration::from_millis(100)), Recovers, Recovers),
        Row::new(Effect::Drop, Recovers, reset),
        Row::new(Effect::LoseCompletion, Recovers, reset),
        Row::new(Effect::Hold { abort: HeldAbort::Obeyed }, Recovers, reset),
        Row::new(Effect::Hold { abort: HeldAbort::Ignored }, Recovers, reset),
        Row::new(Effect::StalePhase, Recovers, reset),
        Row::new(Effect::CompletionCid(CidFault::OutOfRange), protocol, protocol),
        Row::new(Effect::Duplicate, protocol, protocol),
        Row::new(Effect::FatalStatus, Recovers, reset),
        Row::new(Effect::Remove, Ends(End::Removed), Ends(End::Removed)),
        Row::new(Effect::NoTransfer, Expect::Unnoticed, Expect::Unnoticed),
    ];
    let moments = [Moment::Running, Moment::Resetting, Moment::ShuttingDownLate, Moment::Dropping(3)];
    let mut cases = Vec::new();
    for row in &rows {
        for command in IO_COMMANDS {
            for moment in moments {
                let (world, during) = (World::Threads, AdminOpcode::IDENTIFY);
                cases.push((row, Place { world, command, load: Load::FullQueue, moment, during }));
            }
        }
        for moment in [Moment::Running, Moment::Dropping(3)] {
            let (world, during) = (World::Threads, AdminOpcode::IDENTIFY);
            cases
                .push((row, Place { world, command: Command::Admin, load: Load::FullQueue, moment, during }));
        }
    }
    println!("with threads: {} cases", cases.len());
    let cases = Mutex::new(cases);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = cases.lock().unwrap().pop();
                    let Some((row, place)) = next else { return };
                    run(row, place);
                }
            });
        }
    });
}

/// Wakes that anything here may take: an owner that is woken without end is as good as polling.
const WAKES: u32 = 2_000;

/// Submits reads of `lbas` and sleeps until they are all back.
fn read_asleep(queue: &mut QueuePair, lbas: &[u64]) -> Vec<Completion> {
    submit_reads(queue, lbas);
    sleep_until(queue, lbas.len())
}

/// Submits reads of `lbas` and tells the controller.
fn submit_reads(queue: &mut QueuePair, lbas: &[u64]) {
    for &lba in lbas {
        let buffer = queue.pool().try_alloc(BLOCK).unwrap();
        queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
    }
    queue.ring();
}

/// Sleeps until `count` commands are back.
fn sleep_until(queue: &mut QueuePair, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    let mut wakes = 0;
    while done.len() < count {
        if !queue.arm_interrupt() {
            let mut fds = [PollFd::new(queue.interrupt().unwrap(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)).unwrap(), 1, "never woken");
        }
        queue.process_completions(8, &mut |completion| done.push(completion));
        queue.ring();
        wakes += 1;
        assert!(wakes < WAKES, "woken all the time");
    }
    done
}

#[test]
fn a_sleeping_owner_is_woken_for_every_transition() {
    let lost = |_: &Bench| vec![FaultRule::new(Command::Read.matched(), Effect::Drop)];
    let fatal = |_: &Bench| vec![FaultRule::new(Command::Read.matched(), Effect::FatalStatus)];
    let reset = |_: &Bench| {
        vec![
            FaultRule::new(Command::Read.matched(), Effect::Drop),
            FaultRule::new(admin(AdminOpcode::DELETE_IO_SQ), Effect::FatalStatus),
        ]
    };
    let held = |_: &Bench| {
        let hold = Effect::Hold { abort: HeldAbort::Obeyed };
        vec![FaultRule::new(Command::Read.matched(), hold)]
    };
    for rules in [lost, fatal, reset, held] {
        let mut bench = Bench::new(World::Threads, Means::default());
        for rule in rules(&bench) {
            bench.device.faults().add(rule);
        }
        let done = read_asleep(&mut bench.queue, &[1, 2, 3, 4]);
        assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
        drop(done);
        // And it sleeps and wakes as before.
        assert!(read_asleep(&mut bench.queue, &[9]).iter().all(|done| done.result == Ok(())));
    }
}

#[test]
fn a_sleeping_owner_is_woken_for_the_end() {
    for end in 0..3 {
        let mut bench = Bench::new(World::Threads, Means::default());
        let hold = Effect::Hold { abort: HeldAbort::Ignored };
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), hold).times(Times::Forever));
        let (controller, device) = (bench.controller.clone(), bench.device.clone());
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                match end {
                    0 => drop(controller.shutdown()),
                    1 => device.remove(),
                    _ => be_lied_to(&controller, &device),
                }
            });
            read_asleep(&mut bench.queue, &[1, 2])
        });
        assert!(done.iter().all(|done| done.result.is_err()), "{end}: {done:?}");
        drop(done);
        assert!(controller.life().is_final());
        assert_eq!(bench.queue.pool().available(), bench.queue.pool().capacity());
    }
}

/// Finds out, on a queue of its own, that the controller breaks the protocol.
fn be_lied_to(controller: &Arc<Controller>, device: &EmulatedController) {
    device.faults().add(FaultRule::new(Command::Flush.matched(), Effect::CompletionSqId(77)));
    let mut queue = controller.create_queue(&queue_options(World::Threads)).unwrap();
    queue.submit(OpTag(1), Request::Flush).unwrap();
    queue.ring();
    while controller.life() == Life::Running {
        queue.process_completions(8, &mut |_| ());
    }
}

/// Does reads, on one queue after another, until told to stop; each must succeed. Counts them.
fn read_until(controller: &Arc<Controller>, stop: &AtomicBool, count: &AtomicU64) {
    // Relaxed: a flag and a count that nothing hangs on.
    while !stop.load(Ordering::Relaxed) {
        let mut queue = controller.create_queue(&queue_options(World::Threads)).unwrap();
        for lba in 0..3 {
            let done = read_asleep(&mut queue, &[lba, 60 + lba]);
            assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn two_queues_in_trouble_at_once_both_recover() {
    for effect in [Effect::Drop, Effect::Hold { abort: HeldAbort::Ignored }, Effect::FatalStatus] {
        let Bench { controller, device, mut queue, way, .. } = Bench::new(World::Threads, Means::default());
        for id in [1, 2] {
            let on = Command::Read.matched().on_queue(QueueMatch::Id(id));
            device.faults().add(FaultRule::new(on, effect.clone()));
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut queue = controller.create_queue(&queue_options(World::Threads)).unwrap();
                let done = read_asleep(&mut queue, &[4, 5, 6]);
                assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
            });
            let done = read_asleep(&mut queue, &[1, 2, 3]);
            assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
        });
        assert_eq!(controller.life(), Life::Running);
        drop((queue, controller));
        assert_eq!(way.regions_alive(), 0);
    }
}

/// Queues are made and dropped, admin commands sent and resets provoked, all at once: whoever comes in between waits.
#[test]
fn resets_while_queues_come_and_go_disturb_nobody() {
    let bench = Bench::new(World::Threads, Means::default());
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let (controller, device) = (&bench.controller, &bench.device);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            read_until(controller, &stop, &count);
        });
        for round in 0..12 {
            let before = count.load(Ordering::Relaxed);
            let on =
                [AdminOpcode::GET_LOG_PAGE, AdminOpcode::CREATE_IO_SQ, AdminOpcode::DELETE_IO_SQ][round % 3];
            let rule = device.faults().add(FaultRule::new(admin(on), Effect::FatalStatus));
            // Each reset is survived before the next: a request takes a few of them only.
            while device.faults().fired(rule) == 0 || count.load(Ordering::Relaxed) < before + 4 {
                // Refused because of the reset, or answered before or after it.
                let _ = controller.smart_log();
                assert!(!controller.life().is_final(), "{:?}", controller.fault());
                if reader.is_finished() {
                    break;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(controller.resets() > 0);
}

#[test]
fn a_shutdown_in_the_middle_of_a_reset_is_the_end() {
    for pause_us in [0, 100, 1_000, 5_000, 20_000] {
        let mut bench = Bench::new(World::Threads, Means::default());
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), Effect::FatalStatus));
        let slow = RegisterFault::SlowReady(nvme_emulator::ReadyDelay::Time(Duration::from_millis(10)));
        bench.device.faults().add_register(slow);
        let controller = bench.controller.clone();
        // The reads are on their way before anybody may end the controller under them.
        submit_reads(&mut bench.queue, &[1, 2]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = controller.smart_log();
                std::thread::sleep(Duration::from_micros(pause_us));
                let _ = controller.shutdown();
            });
            let done = sleep_until(&mut bench.queue, 2);
            assert_eq!(done.len(), 2);
        });
        assert_eq!(controller.life(), Life::Quiet);
        assert_eq!(controller.fault(), Some(&Fault::ShutDown));
        let Bench { queue, controller: ours, way, .. } = bench;
        drop((queue, ours, controller));
        assert_eq!(way.regions_alive(), 0);
    }
}

#[test]
fn a_removal_in_the_middle_of_a_reset_is_the_end_and_what_is_put_back_works() {
    for pause_us in [0, 200, 2_000, 10_000] {
        let mut bench = Bench::new(World::Threads, Means::default());
        bench.write(5, &[7; BLOCK]).unwrap();
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), Effect::FatalStatus));
        let device = bench.device.clone();
        submit_reads(&mut bench.queue, &[1, 2]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(pause_us));
                device.remove();
            });
            let done = sleep_until(&mut bench.queue, 2);
            assert!(done.iter().all(|done| done.result.is_err()), "{done:?}");
        });
        assert_eq!(bench.controller.life(), Life::Quiet);
        let Bench { queue, controller, way, .. } = bench;
        drop((queue, controller));
        assert_eq!(way.regions_alive(), 0);
        device.reinsert();
        device.faults().clear();
        let mut again = Bench::over(device, World::Threads, Means::default());
        assert_eq!(again.read(5, BLOCK), Ok(vec![7; BLOCK]));
    }
}

#[test]
fn everything_can_be_dropped_at_any_stage_from_any_thread() {
    for pause_us in [0, 50, 500, 5_000, 50_000, 120_000] {
        let mut bench = Bench::new(World::Threads, Means::default());
        bench.device.faults().add(FaultRule::new(Command::Read.matched(), Effect::Drop));
        bench.device.faults().add(FaultRule::new(admin(AdminOpcode::ABORT), Effect::FatalStatus));
        for tag in 0..3 {
            let buffer = bench.queue.pool().try_alloc(BLOCK).unwrap();
            bench.queue.submit(OpTag(tag), Request::Read { lba: Lba::new(tag), buffer }).unwrap();
        }
        bench.queue.ring();
        let Bench { mut queue, controller, way, device, .. } = bench;
        let end = std::time::Instant::now() + Duration::from_micros(pause_us);
        while std::time::Instant::now() < end {
            queue.arm_interrupt();
            queue.process_completions(8, &mut |_| ());
            queue.ring();
        }
        let dropper = std::thread::spawn(move || drop(controller));
        drop(queue);
        dropper.join().unwrap();
        assert_eq!((way.regions_alive(), device.memory().fault_count()), (0, 0));
    }
}

/// Event requests are lost with a reset and sent again after it.
#[test]
fn events_are_heard_after_a_reset_as_before() {
    for world in [World::Inline, World::Threads] {
        let mut bench = Bench::new(world, Means::default());
        for round in 0..3 {
            bench.device.report_firmware_activation();
            let mut heard = false;
            for _ in 0..20_000 {
                heard |= bench.controller.take_events().contains(&ControllerEvent::FirmwareActivation);
                if heard {
                    break;
                }
                bench.round(&mut |_| ());
            }
            assert!(heard, "{world:?}, after {round} resets");
            bench.device.faults().add(FaultRule::new(Command::Read.matched(), Effect::FatalStatus));
            bench.read(0, BLOCK).unwrap();
            assert_eq!(bench.controller.resets(), round + 1);
        }
    }
}
