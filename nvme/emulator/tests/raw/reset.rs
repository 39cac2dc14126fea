//! The register handshake: enabling, refusing, resetting in the middle, shutting down.

use nvme_emulator::{ControllerConfig, CutPolicy, EmulatedController, Mode, WriteCache};
use nvme_spec::SubmissionEntry;
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::feature::{FeatureId, FeatureSelect};
use nvme_spec::registers::{self, Aqa, Cap, Cc, Shutdown, shst};

use crate::initiator::{Buffer, Host, NS1, Pair, cc, memory_config, pattern, threaded};

#[test]
fn registers_read_as_configured_and_as_written() {
    let config = ControllerConfig { mqes_z: 255, dstrd: 2, to: 7, ..memory_config(1 << 20, 512) };
    let ctrl = EmulatedController::new(config).unwrap();
    let cap = Cap::from(ctrl.read64(registers::CAP));
    assert_eq!((cap.mqes_z(), cap.dstrd(), cap.to(), cap.cqr()), (255, 2, 7, true));
    assert_eq!((cap.css(), cap.mpsmin(), cap.mpsmax()), (Cap::CSS_NVM, 0, 4));
    assert_eq!(u64::from(ctrl.read32(registers::CAP + 4)), u64::from(cap) >> 32);
    assert_eq!(ctrl.read32(registers::VS), 0x1_0400);
    ctrl.write32(registers::AQA, u32::MAX);
    assert_eq!(ctrl.read32(registers::AQA), 0x0fff_0fff);
    ctrl.write64(registers::ASQ, 0x1234_5678_9abc_dfff);
    assert_eq!(ctrl.read64(registers::ASQ), 0x1234_5678_9abc_d000);
    ctrl.write32(registers::ACQ + 4, 7);
    ctrl.write32(registers::ACQ, 0x5000);
    assert_eq!(ctrl.read64(registers::ACQ), 0x7_0000_5000);
    ctrl.write64(registers::CAP, u64::MAX);
    ctrl.write32(registers::CSTS, u32::MAX);
    assert_eq!((ctrl.read64(registers::CAP), ctrl.read32(registers::CSTS)), (cap.into(), 0));
    assert_eq!(ctrl.read64(registers::CMBLOC), 0);
    assert_eq!((ctrl.read32(3), ctrl.read32(0x2000), ctrl.read32(u64::MAX - 3)), (0, 0, 0));
}

#[test]
fn bad_settings_end_in_fatal_status_and_a_reset_recovers() {
    let ctrl = EmulatedController::new(memory_config(1 << 20, 512)).unwrap();
    let admin = Pair::new(&ctrl, 0, 0, 32, 32);
    let good = Aqa::new().with_asqs_z(31).with_acqs_z(31);
    let attempt = |aqa: Aqa, asq: u64, acq: u64, cc: Cc| {
        ctrl.write32(registers::AQA, aqa.into());
        ctrl.write64(registers::ASQ, asq);
        ctrl.write64(registers::ACQ, acq);
        ctrl.write32(registers::CC, cc.into());
        let csts = registers::Csts::from(ctrl.read32(registers::CSTS));
        ctrl.write32(registers::CC, 0);
        assert_eq!(ctrl.read32(registers::CSTS), 0, "a reset clears everything");
        (csts.rdy(), csts.cfs())
    };
    let (sq, cq) = (admin.sq.iova(), admin.cq.iova());
    for _ in 0..2 {
        assert_eq!(attempt(good, sq, cq, cc()), (true, false));
        for bad in [good.with_asqs_z(0), good.with_acqs_z(0), good.with_asqs_z(4095)] {
            assert_eq!(attempt(bad, sq, cq, cc()), (false, true), "{bad:?}");
        }
        assert_eq!(attempt(good, 0, cq, cc()), (false, true));
        assert_eq!(attempt(good, sq, cq + 4096, cc()), (false, true));
        for bad in [cc().with_css(6), cc().with_css(7), cc().with_ams(1), cc().with_mps(5)] {
            assert_eq!(attempt(good, sq, cq, bad), (false, true), "{bad:?}");
        }
    }
}

#[test]
fn commands_before_enabling_are_not_executed() {
    let ctrl = EmulatedController::new(memory_config(1 << 20, 512)).unwrap();
    let mut admin = Pair::new(&ctrl, 0, 0, 32, 32);
    admin.push(SubmissionEntry::flush(NS1));
    admin.ring();
    assert_eq!(ctrl.counters().queues[0].commands, 0);
}

#[test]
fn reset_forgets_queues_commands_and_features_but_not_data() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 8);
        let data = pattern(1, 512);
        let source = Buffer::filled(&host, &data);
        io.ok(source.attach(SubmissionEntry::write(NS1, 3, 0, ForceUnitAccess::No)));
        host.admin.ok(SubmissionEntry::set_features(FeatureId::WRITE_ATOMICITY_NORMAL, 1));
        host.admin.push(SubmissionEntry::async_event_request());
        host.admin.ring();
        host.ctrl.write32(registers::CC, cc().with_en(false).into());
        host.wait_csts(|csts| !csts.rdy());
        io.push(SubmissionEntry::flush(NS1));
        io.ring();
        let mut host = Host::enabled(host.ctrl);
        let get = SubmissionEntry::get_features(FeatureId::WRITE_ATOMICITY_NORMAL, FeatureSelect::CURRENT);
        assert_eq!(host.admin.ok(get), 0);
        io.ring(); // the old queue is gone
        let mut io = host.io_pair(1, 8);
        let target = Buffer::new(&host, 512);
        io.ok(target.attach(SubmissionEntry::read(NS1, 3, 0)));
        assert!(target.bytes() == data);
    }
}

#[test]
fn reset_with_commands_under_way_never_touches_memory_afterwards() {
    for round in 0..30 {
        let config = ControllerConfig { mode: threaded(2), ..memory_config(16 << 20, 4096) };
        let mut host = Host::new(config);
        let mut pairs = [host.io_pair(1, 64), host.io_pair(2, 64)];
        let targets: Vec<_> = (0..2).map(|_| Buffer::new(&host, 64 << 10)).collect();
        for (pair, target) in pairs.iter_mut().zip(&targets) {
            for _ in 0..63 {
                pair.push(target.attach(SubmissionEntry::read(NS1, 0, 15)));
            }
            pair.ring();
        }
        for _ in 0..round * 50 {
            std::hint::spin_loop();
        }
        host.ctrl.write32(registers::CC, 0);
        host.wait_csts(|csts| !csts.rdy());
        // From here on the buffers are ours alone.
        let commands = host.ctrl.counters().queues[1].commands;
        drop(targets);
        drop(pairs);
        let mut host = Host::enabled(host.ctrl);
        host.io_pair(2, 8).ok(SubmissionEntry::flush(NS1));
        assert_eq!(host.ctrl.counters().queues[1].commands, commands);
        assert_eq!(host.ctrl.memory().fault_count(), 0);
    }
}

#[test]
fn quick_reset_that_the_thread_could_miss_is_carried_out() {
    let config = ControllerConfig { mode: threaded(1), ..memory_config(1 << 20, 512) };
    let mut host = Host::new(config);
    host.io_pair(1, 8);
    for _ in 0..20 {
        host.admin = Pair::new(&host.ctrl, 0, 0, 32, 32);
        host.ctrl.write32(registers::CC, 0);
        host.ctrl.write64(registers::ASQ, host.admin.sq.iova());
        host.ctrl.write64(registers::ACQ, host.admin.cq.iova());
        host.ctrl.write32(registers::CC, cc().into());
        // Ready is also what it was before: the new queue proves that the reset took place. Doorbells to the old state
        // are lost, so ring until the answer comes.
        host.admin.push(SubmissionEntry::set_features(FeatureId::ARBITRATION, 7));
        let done = loop {
            host.admin.ring();
            if let Some(done) = host.admin.peek() {
                break done;
            }
            std::thread::yield_now();
        };
        assert!(done.status().is_success());
        host.admin.free();
    }
}

#[test]
fn shutdown_makes_data_durable_and_is_left_by_a_reset() {
    for mode in [Mode::Inline, threaded(1)] {
        for notice in [Shutdown::Normal, Shutdown::Abrupt] {
            let config =
                ControllerConfig { mode, write_cache: WriteCache::MODELLED, ..memory_config(1 << 20, 512) };
            let mut host = Host::new(config);
            let mut io = host.io_pair(1, 8);
            let data = pattern(1, 512);
            let source = Buffer::filled(&host, &data);
            io.ok(source.attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
            assert_eq!(host.ctrl.unflushed_writes(), 1);
            host.ctrl.write32(registers::CC, cc().with_shn(notice as u8).into());
            host.wait_csts(|csts| csts.shst() == shst::COMPLETE);
            assert!(host.csts().rdy());
            let commands = host.ctrl.counters().queues[1].commands;
            io.push(SubmissionEntry::flush(NS1));
            io.ring();
            assert_eq!(host.ctrl.counters().queues[1].commands, commands, "nothing runs after a shutdown");
            assert_eq!(host.ctrl.power_cut(CutPolicy::DropAll).unflushed(), 0);
            let mut host = Host::enabled(host.ctrl);
            assert_eq!(host.csts().shst(), shst::NORMAL);
            let mut io = host.io_pair(1, 8);
            let target = Buffer::new(&host, 512);
            io.ok(target.attach(SubmissionEntry::read(NS1, 0, 0)));
            assert!(target.bytes() == data);
        }
    }
}

#[test]
fn shutdown_of_a_disabled_controller_completes() {
    let ctrl = EmulatedController::new(memory_config(1 << 20, 512)).unwrap();
    ctrl.write32(registers::CC, Cc::new().with_shn(Shutdown::Normal as u8).into());
    assert_eq!(registers::Csts::from(ctrl.read32(registers::CSTS)).shst(), shst::COMPLETE);
    Host::enabled(ctrl);
}

#[test]
fn revoked_memory_is_out_of_reach() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 8);
    io.ok(SubmissionEntry::flush(NS1));
    host.ctrl.memory().revoke();
    io.push(SubmissionEntry::flush(NS1));
    io.ring();
    assert!(io.peek().is_none());
    assert!(host.csts().cfs());
}
