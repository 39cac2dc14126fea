//! Removal of the device, and faults of registers and handshake.

use std::time::Duration;

use nvme_emulator::{
    AllOnesRegister, CommandMatch, ControllerConfig, Effect, EmulatedController, FaultRule, Mode, ReadyDelay,
    RegisterFault,
};
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::registers::{self, Csts, Shutdown, shst};
use nvme_spec::{NvmOpcode, SubmissionEntry};

use crate::initiator::{Buffer, Host, NS1, cc, memory_config, pattern, threaded};

const MODES: [Mode; 2] = [Mode::Inline, Mode::Stepped];

fn config(mode: Mode) -> ControllerConfig {
    ControllerConfig { mode, ..memory_config(1 << 20, 512) }
}

#[test]
fn removed_device_reads_as_all_ones_and_answers_nothing() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(2)] {
        let mut host = Host::new(config(mode));
        let mut io = host.io_pair(1, 16);
        host.ctrl.remove();
        assert!(host.ctrl.is_removed());
        for register in [registers::CAP, registers::VS, registers::CC, registers::CSTS] {
            assert_eq!(host.ctrl.read32(register), u32::MAX);
        }
        assert_eq!(host.ctrl.read64(registers::CAP), u64::MAX);
        host.ctrl.write32(registers::CC, cc().into());
        host.ctrl.write32(registers::CSTS, 0);
        let target = Buffer::filled(&host, &[0xee; 512]);
        io.push(target.attach(SubmissionEntry::read(NS1, 0, 0)));
        io.ring();
        host.ctrl.step();
        assert_eq!(io.peek(), None);
        assert_eq!(target.bytes(), [0xee; 512]);
        assert_eq!(host.ctrl.read32(registers::CSTS), u32::MAX);
    }
}

#[test]
fn reinserted_device_is_as_after_power_on_and_has_its_data() {
    for mode in [Mode::Inline, threaded(1)] {
        let mut host = Host::new(config(mode));
        let data = pattern(1, 512);
        let source = Buffer::filled(&host, &data);
        let mut io = host.io_pair(1, 16);
        io.ok(source.attach(SubmissionEntry::write(NS1, 3, 0, ForceUnitAccess::No)));
        host.ctrl.remove();
        host.ctrl.reinsert();
        assert!(!host.ctrl.is_removed());
        assert_eq!((u32::from(host.csts()), host.ctrl.read32(registers::CC)), (0, 0));
        let mut host = Host::enabled(host.ctrl);
        let mut io = host.io_pair(1, 16);
        let target = Buffer::new(&host, 512);
        io.ok(target.attach(SubmissionEntry::read(NS1, 3, 0)));
        assert!(target.bytes() == data);
    }
}

/// A thread in the middle of a transfer must be done with the host's memory before `remove` returns.
#[test]
fn no_memory_is_touched_after_removal_has_returned() {
    for round in 0..50u8 {
        let mut host = Host::new(ControllerConfig { mode: threaded(2), ..memory_config(8 << 20, 512) });
        let mut io = host.io_pair(1, 64);
        let target = Buffer::new(&host, 512 << 10);
        for _ in 0..40 {
            io.push(target.attach(SubmissionEntry::read(NS1, 0, 1023)));
        }
        io.ring();
        for _ in 0..u32::from(round) * 200 {
            std::hint::spin_loop();
        }
        host.ctrl.remove();
        // Not a single store of the controller may follow: neither data nor completions.
        target.region.slice().copy_from(&vec![0xaa_u8; target.region.len()]);
        io.cq.slice().copy_from(&vec![0xaa_u8; io.cq.len()]);
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert!(crate::initiator::bytes(target.region.slice()).iter().all(|b| *b == 0xaa));
        assert!(crate::initiator::bytes(io.cq.slice()).iter().all(|b| *b == 0xaa));
    }
}

#[test]
fn rule_removes_the_device_in_the_middle_of_a_batch() {
    let mut host = Host::new(config(Mode::Inline));
    let mut io = host.io_pair(1, 16);
    let on = CommandMatch::io(NvmOpcode::FLUSH);
    host.ctrl.faults().add(FaultRule::new(on, Effect::Remove).skip(2));
    let first = io.push(SubmissionEntry::flush(NS1));
    for _ in 0..4 {
        io.push(SubmissionEntry::flush(NS1));
    }
    io.ring();
    assert_eq!(io.peek().unwrap().cid.get(), first);
    assert!(io.peek().is_some());
    assert_eq!(io.peek(), None);
    assert!(host.ctrl.is_removed());
    host.ctrl.reinsert();
    Host::enabled(host.ctrl).io_pair(1, 16).ok(SubmissionEntry::flush(NS1));
}

#[test]
fn controller_that_never_gets_ready_does_once_the_rule_is_gone() {
    for mode in MODES {
        let ctrl = EmulatedController::new(config(mode)).unwrap();
        let id = ctrl.faults().add_register(RegisterFault::NeverReady);
        ctrl.write32(registers::AQA, 0x1f_001f);
        let queues = ctrl.memory().map(8192).unwrap();
        ctrl.write64(registers::ASQ, queues.iova());
        ctrl.write64(registers::ACQ, queues.iova() + 4096);
        ctrl.write32(registers::CC, cc().into());
        assert_eq!(ctrl.read32(registers::CSTS), 0);
        assert_eq!(ctrl.faults().fired(id), 1);
        ctrl.faults().remove(id);
        assert!(Csts::from(ctrl.read32(registers::CSTS)).rdy());
    }
}

#[test]
fn controller_that_never_stops_goes_on_executing_until_a_function_reset() {
    let mut host = Host::new(config(Mode::Inline));
    let mut io = host.io_pair(1, 16);
    let id = host.ctrl.faults().add_register(RegisterFault::NeverStops);
    host.ctrl.write32(registers::CC, 0);
    assert!(host.csts().rdy());
    io.ok(SubmissionEntry::flush(NS1));
    host.ctrl.reset_function();
    assert_eq!(u32::from(host.csts()), 0);
    let mut host = Host::enabled(host.ctrl);
    host.io_pair(1, 16).ok(SubmissionEntry::flush(NS1));
    // And the end of the rule lets a disable through that waits.
    host.ctrl.write32(registers::CC, 0);
    assert!(host.csts().rdy());
    host.ctrl.faults().remove(id);
    assert!(!host.csts().rdy());
}

#[test]
fn ready_shows_late_by_reads_or_by_time() {
    let host = Host::new(config(Mode::Inline));
    let again = || {
        host.ctrl.write32(registers::CC, 0);
        host.ctrl.write32(registers::CC, cc().into());
    };
    let id = host.ctrl.faults().add_register(RegisterFault::SlowReady(ReadyDelay::Reads(3)));
    for _ in 0..2 {
        again();
        let seen: Vec<bool> = (0..5).map(|_| host.csts().rdy()).collect();
        assert_eq!(seen, [false, false, false, true, true]);
    }
    host.ctrl.faults().remove(id);
    let slow = ReadyDelay::Time(Duration::from_secs(2));
    host.ctrl.faults().add_register(RegisterFault::SlowReady(slow));
    again();
    host.ctrl.advance(Duration::from_millis(1999));
    assert!(!host.csts().rdy());
    host.ctrl.advance(Duration::from_millis(1));
    assert!(host.csts().rdy());
}

#[test]
fn enabling_can_end_in_a_fatal_status() {
    let host = Host::new(config(Mode::Inline));
    let id = host.ctrl.faults().add_register(RegisterFault::FatalOnEnable);
    host.ctrl.write32(registers::CC, 0);
    host.ctrl.write32(registers::CC, cc().into());
    assert!(host.csts().cfs() && !host.csts().rdy());
    host.ctrl.faults().remove(id);
    host.ctrl.write32(registers::CC, 0);
    host.ctrl.write32(registers::CC, cc().into());
    assert!(host.csts().rdy() && !host.csts().cfs());
}

#[test]
fn registers_read_as_the_rules_say() {
    let host = Host::new(config(Mode::Inline));
    let plan = host.ctrl.faults();
    let truth = host.ctrl.read64(registers::CAP);
    let id = plan.add_register(RegisterFault::CapPatched(0x0123_4567_89ab_cdef));
    assert_eq!(host.ctrl.read64(registers::CAP), 0x0123_4567_89ab_cdef);
    assert_eq!(host.ctrl.read32(registers::CAP + 4), 0x0123_4567);
    plan.remove(id);
    assert_eq!(host.ctrl.read64(registers::CAP), truth);
    let all_ones = |register, reads| RegisterFault::AllOnes { register, reads };
    plan.add_register(all_ones(AllOnesRegister::Csts, Some(1)));
    assert_eq!(host.ctrl.read32(registers::CSTS), u32::MAX);
    assert!(host.csts().rdy() && !host.csts().cfs());
    plan.add_register(all_ones(AllOnesRegister::Cap, None));
    for _ in 0..3 {
        assert_eq!(host.ctrl.read64(registers::CAP), u64::MAX);
    }
    plan.clear();
    assert_eq!(host.ctrl.read64(registers::CAP), truth);
}

#[test]
fn shutdown_can_go_on_for_ever() {
    let mut host = Host::new(config(Mode::Inline));
    let mut io = host.io_pair(1, 16);
    let id = host.ctrl.faults().add_register(RegisterFault::ShutdownNeverCompletes);
    host.ctrl.write32(registers::CC, cc().with_shn(Shutdown::Normal as u8).into());
    assert_eq!(host.csts().shst(), shst::OCCURRING);
    io.push(SubmissionEntry::flush(NS1));
    io.ring();
    assert_eq!(io.peek(), None);
    host.ctrl.faults().remove(id);
    assert_eq!(host.csts().shst(), shst::COMPLETE);
}
