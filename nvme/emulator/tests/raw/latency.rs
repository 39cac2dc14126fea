//! The latency model: commands complete when their time has come, and not one after the other.

use std::time::{Duration, Instant};

use nvme_emulator::{ControllerConfig, EmulatedController, LatencyModel, Mode};
use nvme_spec::SubmissionEntry;
use nvme_spec::registers;

use crate::initiator::{Buffer, Host, NS1, memory_config, threaded};

const MS: Duration = Duration::from_millis(1);

fn config(mode: Mode, latency: LatencyModel) -> ControllerConfig {
    ControllerConfig { mode, latency: Some(latency), ..memory_config(1 << 20, 512) }
}

#[test]
fn stepped_controller_completes_when_virtual_time_has_come() {
    let model = LatencyModel { read: 2 * MS, flush: 5 * MS, ..LatencyModel::default() };
    let mut host = Host::new(config(Mode::Stepped, model));
    let mut io = host.io_pair(1, 16);
    let target = Buffer::new(&host, 512);
    let slow = io.push(SubmissionEntry::flush(NS1));
    let reads = [0, 1].map(|lba| io.push(target.attach(SubmissionEntry::read(NS1, lba, 0))));
    io.ring();
    host.ctrl.step();
    assert_eq!(io.peek(), None);
    host.ctrl.advance(2 * MS);
    host.ctrl.step();
    assert_eq!([io.wait().cid.get(), io.wait().cid.get()], reads, "both at once, before the flush");
    assert_eq!(io.peek(), None);
    host.ctrl.advance(3 * MS);
    host.ctrl.step();
    assert_eq!(io.wait().cid.get(), slow);
}

#[test]
fn limited_rate_spaces_completions() {
    let model = LatencyModel::uniform(MS).limited_to(1000);
    let mut host = Host::new(config(Mode::Stepped, model));
    let mut io = host.io_pair(1, 16);
    for _ in 0..4 {
        io.push(SubmissionEntry::flush(NS1));
    }
    io.ring();
    host.ctrl.step();
    for expected in 0..5 {
        let mut arrived = 0;
        while io.peek().is_some() {
            arrived += 1;
        }
        assert_eq!(arrived, usize::from(expected > 0), "after {expected} ms");
        host.ctrl.advance(MS);
        host.ctrl.step();
    }
}

#[test]
fn threads_complete_many_commands_within_one_latency() {
    // Long enough that a queue served one command after the other would take 1.5 s.
    let mut host = Host::new(config(threaded(1), LatencyModel::uniform(50 * MS)));
    let mut io = host.io_pair(1, 64);
    let start = Instant::now();
    let cids: Vec<u16> = (0..30).map(|_| io.push(SubmissionEntry::flush(NS1))).collect();
    io.ring();
    let first = io.wait();
    assert!(start.elapsed() >= 50 * MS);
    assert_eq!(first.cid.get(), cids[0]);
    for cid in &cids[1..] {
        assert_eq!(io.wait().cid.get(), *cid);
    }
}

#[test]
fn full_completion_queue_holds_late_completions_back() {
    let mut host = Host::new(config(Mode::Stepped, LatencyModel::uniform(MS)));
    let mut io = host.io_pair_with(1, 16, 4, nvme_spec::command::QueueInterrupt::Disabled);
    let cids: Vec<u16> = (0..10).map(|_| io.push(SubmissionEntry::flush(NS1))).collect();
    io.ring();
    host.ctrl.step();
    host.ctrl.advance(MS);
    for cid in cids {
        assert_eq!(io.wait().cid.get(), cid);
    }
}

#[test]
fn reset_forgets_what_was_under_way() {
    let mut host = Host::new(config(Mode::Stepped, LatencyModel::uniform(MS)));
    let mut io = host.io_pair(1, 16);
    io.push(SubmissionEntry::flush(NS1));
    io.ring();
    host.ctrl.step();
    host.ctrl.write32(registers::CC, 0);
    host.ctrl.advance(MS);
    host.ctrl.step();
    assert_eq!(io.peek(), None);
}

#[test]
fn inline_controller_refuses_a_latency() {
    let error = EmulatedController::new(config(Mode::Inline, LatencyModel::uniform(MS))).unwrap_err();
    assert!(error.to_string().contains("latency model needs threads or steps"), "{error}");
    let zero = LatencyModel { iops_limit: Some(0), ..LatencyModel::default() };
    assert!(EmulatedController::new(config(Mode::Stepped, zero)).is_err());
}
