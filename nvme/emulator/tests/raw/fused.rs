//! Fused compare-and-write: pairs, halves of pairs, and other writers in between.

use std::thread;

use nvme_emulator::{CommandMatch, ControllerConfig, Effect, FaultRule, HeldAbort, Mode};
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::registers;
use nvme_spec::{CommandId, NvmOpcode, QueueId, StatusCode, SubmissionEntry};
use vm_memory::Bytes;

use crate::initiator::{Buffer, Host, NS1, Pair, memory_config, pattern, threaded};

fn first(slba: u64, blocks: u16) -> SubmissionEntry {
    let read = SubmissionEntry::read(NS1, slba, blocks - 1);
    let mut entry = SubmissionEntry { opcode: NvmOpcode::COMPARE.0, ..read };
    entry.flags.set_fuse(1);
    entry
}

fn second(slba: u64, blocks: u16) -> SubmissionEntry {
    let mut entry = SubmissionEntry::write(NS1, slba, blocks - 1, ForceUnitAccess::No);
    entry.flags.set_fuse(2);
    entry
}

/// Pushes both halves, rings once, and returns both statuses.
fn run_pair(io: &mut Pair, halves: [SubmissionEntry; 2]) -> [StatusCode; 2] {
    let cids = halves.map(|entry| io.push(entry));
    io.ring();
    cids.map(|cid| {
        let done = io.wait();
        assert_eq!(done.cid.get(), cid, "completions come in the order of the pair");
        done.status().code()
    })
}

fn content(host: &Host, io: &mut Pair) -> Vec<u8> {
    let target = Buffer::new(host, 512);
    io.ok(target.attach(SubmissionEntry::read(NS1, 0, 0)));
    target.bytes()
}

const OK: StatusCode = StatusCode::SUCCESS;

#[test]
fn pair_writes_if_the_blocks_are_as_expected() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 4);
        let (zeroes, new, other) = (vec![0; 512], pattern(1, 512), pattern(2, 512));
        let [old, buffer, wrong] = [&zeroes, &new, &other].map(|data| Buffer::filled(&host, data));
        assert_eq!(run_pair(&mut io, [old.attach(first(0, 1)), buffer.attach(second(0, 1))]), [OK; 2]);
        assert!(content(&host, &mut io) == new);
        // The ring wraps between the halves in some of these.
        for _ in 0..5 {
            let statuses = run_pair(&mut io, [wrong.attach(first(0, 1)), old.attach(second(0, 1))]);
            assert_eq!(statuses, [StatusCode::COMPARE_FAILURE, StatusCode::ABORTED_FAILED_FUSED]);
            assert!(content(&host, &mut io) == new);
        }
    }
}

#[test]
fn pair_split_by_the_tail_waits_for_its_second_half() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(1)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 8);
        let mut other = host.io_pair(2, 8);
        let buffer = Buffer::new(&host, 512);
        io.push(buffer.attach(first(0, 1)));
        io.ring();
        for _ in 0..3 {
            other.ok(SubmissionEntry::flush(NS1));
            assert!(io.peek().is_none());
        }
        io.push(buffer.attach(second(0, 1)));
        io.ring();
        assert_eq!([io.wait(), io.wait()].map(|done| done.status().code()), [OK; 2]);
    }
}

#[test]
fn halves_without_a_partner_are_aborted_and_others_go_on() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let buffer = Buffer::new(&host, 512);
    let (a, b) = (buffer.attach(first(0, 1)), buffer.attach(second(0, 1)));
    assert_eq!(io.status(b), StatusCode::ABORTED_MISSING_FUSED);
    for entry in [a, SubmissionEntry::flush(NS1), a, a, b, b] {
        io.push(entry);
    }
    io.ring();
    let missing = StatusCode::ABORTED_MISSING_FUSED;
    for expected in [missing, OK, missing, OK, OK, missing] {
        assert_eq!(io.wait().status().code(), expected);
    }
}

#[test]
fn pairs_that_are_no_compare_and_write_of_one_range_are_refused() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 8);
    let buffer = Buffer::new(&host, 4096);
    let (field, failed) = (StatusCode::INVALID_FIELD, StatusCode::ABORTED_FAILED_FUSED);
    let attach = |entry| buffer.attach(entry);
    assert_eq!(run_pair(&mut io, [attach(first(0, 1)), attach(second(1, 1))]), [field; 2]);
    assert_eq!(run_pair(&mut io, [attach(first(0, 1)), attach(second(0, 2))]), [field; 2]);
    let mut read = attach(second(0, 1));
    read.opcode = NvmOpcode::READ.0;
    assert_eq!(run_pair(&mut io, [attach(first(0, 1)), read]), [field, failed]);
    let exceeded = StatusCode::ATOMIC_WRITE_UNIT_EXCEEDED;
    assert_eq!(run_pair(&mut io, [attach(first(0, 257)), attach(second(0, 257))]), [exceeded, failed]);
    let range = StatusCode::LBA_OUT_OF_RANGE;
    assert_eq!(run_pair(&mut io, [attach(first(9999, 1)), attach(second(9999, 1))]), [range, failed]);
    // The compare succeeds, the write's data cannot be read.
    let statuses = run_pair(&mut io, [attach(first(0, 1)), second(0, 1)]);
    assert_eq!(statuses, [OK, StatusCode::DATA_TRANSFER_ERROR]);
}

#[test]
fn reset_between_the_halves_forgets_the_first() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 8);
    let buffer = Buffer::new(&host, 512);
    io.push(buffer.attach(first(0, 1)));
    io.ring();
    host.ctrl.write32(registers::CC, 0);
    let mut host = Host::enabled(host.ctrl);
    let mut io = host.io_pair(1, 8);
    let buffer = Buffer::new(&host, 512);
    assert_eq!(io.status(buffer.attach(second(0, 1))), StatusCode::ABORTED_MISSING_FUSED);
    io.ok(SubmissionEntry::flush(NS1));
}

#[test]
fn abort_of_either_half_aborts_both() {
    for which in [0, 1] {
        let mut host = Host::new(ControllerConfig { mode: Mode::Stepped, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 8);
        let data = pattern(1, 512);
        let (old, new) = (Buffer::new(&host, 512), Buffer::filled(&host, &data));
        let cids = [old.attach(first(0, 1)), new.attach(second(0, 1))].map(|entry| io.push(entry));
        io.ring();
        let abort = SubmissionEntry::abort(QueueId::new(1), CommandId::new(cids[which]));
        host.admin.push(abort);
        host.admin.ring();
        host.ctrl.step();
        assert_eq!(host.admin.wait().dw0.get() & 1, 0);
        let statuses = [io.wait(), io.wait()].map(|done| done.status().code());
        let other = if which == 0 { StatusCode::ABORTED_FAILED_FUSED } else { StatusCode::ABORT_REQUESTED };
        assert_eq!(statuses[0], StatusCode::ABORT_REQUESTED);
        assert_eq!(statuses[1], other);
        assert!(content(&host, &mut io) == vec![0; 512]);
    }
}

/// A first half that is executed late must not take the second half of another pair for its own.
#[test]
fn pair_whose_first_half_is_held_back_writes_nothing() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 8);
    let (old, new) = (Buffer::new(&host, 512), Buffer::filled(&host, &pattern(1, 512)));
    let hold = Effect::Hold { abort: HeldAbort::Ignored };
    let rule = host.ctrl.faults().add(FaultRule::new(CommandMatch::io(NvmOpcode::COMPARE), hold));
    io.push(old.attach(first(0, 1)));
    io.push(new.attach(second(0, 1)));
    io.ring();
    assert_eq!(io.wait().status().code(), StatusCode::ABORTED_FAILED_FUSED);
    host.ctrl.faults().release(rule);
    assert_eq!(io.wait().status().code(), StatusCode::ABORTED_MISSING_FUSED);
    assert!(content(&host, &mut io) == vec![0; 512]);
    host.ctrl.faults().clear();
    assert_eq!(run_pair(&mut io, [old.attach(first(0, 1)), new.attach(second(0, 1))]), [OK; 2]);
}

/// Counters incremented by compare-and-write from two queues: no increment may be lost.
#[test]
fn pairs_of_several_queues_are_atomic() {
    for mode in [Mode::Inline, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let pairs = [host.io_pair(1, 8), host.io_pair(2, 8)];
        let mut reader = host.io_pair(3, 8);
        let host = &host;
        let rounds = 300u64;
        thread::scope(|scope| {
            for mut io in pairs {
                scope.spawn(move || {
                    let (old, new) = (Buffer::new(host, 512), Buffer::new(host, 512));
                    let mut done = 0;
                    while done < rounds {
                        io.ok(old.attach(SubmissionEntry::read(NS1, 0, 0)));
                        let count: u64 = old.region.slice().read_obj(0).unwrap();
                        new.region.slice().write_obj(count + 1, 0).unwrap();
                        let statuses = run_pair(&mut io, [old.attach(first(0, 1)), new.attach(second(0, 1))]);
                        done += u64::from(statuses == [OK; 2]);
                    }
                });
            }
        });
        let count = u64::from_le_bytes(content(host, &mut reader)[..8].try_into().unwrap());
        assert_eq!(count, 2 * rounds, "{mode:?}");
    }
}
