//! Queues: creation and deletion with every status, phase, fullness, arbitration, interrupts.

use std::os::fd::AsFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nvme_emulator::{ControllerConfig, EmulatorError, Mode, VectorMask};
use nvme_spec::command::QueueInterrupt;
use nvme_spec::feature::FeatureId;
use nvme_spec::registers::{self, Doorbell};
use nvme_spec::{QueueId, StatusCode, SubmissionEntry};

use crate::initiator::{Buffer, Host, NS1, Pair, cc, memory_config, threaded};

const POLLED: QueueInterrupt = QueueInterrupt::Disabled;

fn create_cq(qid: u16, entries_z: u16, iova: u64) -> SubmissionEntry {
    let mut entry = SubmissionEntry::create_io_cq(QueueId::new(qid), entries_z, POLLED);
    entry.prp1.set(iova);
    entry
}

fn create_sq(qid: u16, entries_z: u16, cqid: u16, iova: u64) -> SubmissionEntry {
    let mut entry = SubmissionEntry::create_io_sq(QueueId::new(qid), entries_z, QueueId::new(cqid));
    entry.prp1.set(iova);
    entry
}

#[test]
fn completion_queue_creation_checks_everything() {
    let config = ControllerConfig { io_queues: 4, mqes_z: 63, ..memory_config(1 << 20, 512) };
    let mut host = Host::new(config);
    let page = host.map(4096);
    let iova = page.iova();
    for qid in [0, 5, 0xffff] {
        assert_eq!(host.admin.status(create_cq(qid, 7, iova)), StatusCode::INVALID_QUEUE_ID);
    }
    for entries_z in [0, 64, 0xffff] {
        assert_eq!(host.admin.status(create_cq(1, entries_z, iova)), StatusCode::INVALID_QUEUE_SIZE);
    }
    assert_eq!(host.admin.status(create_cq(1, 7, iova + 64)), StatusCode::PRP_OFFSET_INVALID);
    assert_eq!(host.admin.status(create_cq(1, 7, iova + 4096)), StatusCode::DATA_TRANSFER_ERROR);
    let mut scattered = create_cq(1, 7, iova);
    scattered.cdw11.set(0);
    assert_eq!(host.admin.status(scattered), StatusCode::INVALID_FIELD);
    let mut vector = SubmissionEntry::create_io_cq(QueueId::new(1), 7, QueueInterrupt::Vector(5));
    vector.prp1.set(iova);
    assert_eq!(host.admin.status(vector), StatusCode::INVALID_INTERRUPT_VECTOR);
    host.admin.ok(create_cq(1, 63, iova));
    assert_eq!(host.admin.status(create_cq(1, 7, iova)), StatusCode::INVALID_QUEUE_ID);
}

#[test]
fn submission_queue_creation_checks_everything() {
    let config = ControllerConfig { io_queues: 4, mqes_z: 63, ..memory_config(1 << 20, 512) };
    let mut host = Host::new(config);
    let (page, cq) = (host.map(4096), host.map(4096));
    let iova = page.iova();
    assert_eq!(host.admin.status(create_sq(1, 7, 1, iova)), StatusCode::COMPLETION_QUEUE_INVALID);
    host.admin.ok(create_cq(1, 7, cq.iova()));
    for qid in [0, 5, 0xffff] {
        assert_eq!(host.admin.status(create_sq(qid, 7, 1, iova)), StatusCode::INVALID_QUEUE_ID);
    }
    for cqid in [0, 5] {
        assert_eq!(host.admin.status(create_sq(1, 7, cqid, iova)), StatusCode::INVALID_QUEUE_ID);
    }
    assert_eq!(host.admin.status(create_sq(1, 7, 2, iova)), StatusCode::COMPLETION_QUEUE_INVALID);
    for entries_z in [0, 64] {
        assert_eq!(host.admin.status(create_sq(1, entries_z, 1, iova)), StatusCode::INVALID_QUEUE_SIZE);
    }
    assert_eq!(host.admin.status(create_sq(1, 7, 1, iova + 64)), StatusCode::PRP_OFFSET_INVALID);
    let mut scattered = create_sq(1, 7, 1, iova);
    scattered.cdw11.set(1 << 16);
    assert_eq!(host.admin.status(scattered), StatusCode::INVALID_FIELD);
    host.admin.ok(create_sq(1, 63, 1, iova));
    assert_eq!(host.admin.status(create_sq(1, 7, 1, iova)), StatusCode::INVALID_QUEUE_ID);
}

#[test]
fn entry_sizes_must_be_set_before_queues_are_created() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let (sq, cq) = (host.map(4096), host.map(4096));
    host.ctrl.write32(registers::CC, cc().with_iocqes(0).into());
    assert_eq!(host.admin.status(create_cq(1, 7, cq.iova())), StatusCode::INVALID_QUEUE_SIZE);
    host.ctrl.write32(registers::CC, cc().with_iosqes(0).into());
    host.admin.ok(create_cq(1, 7, cq.iova()));
    assert_eq!(host.admin.status(create_sq(1, 7, 1, sq.iova())), StatusCode::INVALID_QUEUE_SIZE);
}

#[test]
fn deletion_keeps_the_order_of_submission_before_completion() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(2, 8);
    io.ok(SubmissionEntry::flush(NS1));
    let delete_cq = |qid| SubmissionEntry::delete_io_cq(QueueId::new(qid));
    let delete_sq = |qid| SubmissionEntry::delete_io_sq(QueueId::new(qid));
    assert_eq!(host.admin.status(delete_cq(2)), StatusCode::INVALID_QUEUE_DELETION);
    for qid in [0, 1, 999] {
        assert_eq!(host.admin.status(delete_sq(qid)), StatusCode::INVALID_QUEUE_ID);
        assert_eq!(host.admin.status(delete_cq(qid)), StatusCode::INVALID_QUEUE_ID);
    }
    host.admin.ok(delete_sq(2));
    assert_eq!(host.admin.status(delete_sq(2)), StatusCode::INVALID_QUEUE_ID);
    host.admin.ok(delete_cq(2));
    // The identifiers are free again, and the new queue starts at its beginning.
    let mut again = host.io_pair(2, 4);
    for _ in 0..9 {
        again.ok(SubmissionEntry::flush(NS1));
    }
}

#[test]
fn phase_flips_at_every_wrap_and_the_head_is_reported() {
    for (sq, cq) in [(2, 2), (3, 7), (7, 3), (64, 5)] {
        let mut host = Host::new(memory_config(1 << 20, 512));
        let mut io = host.io_pair_with(1, sq, cq, POLLED);
        for _ in 0..4 * sq.max(cq) {
            let done = io.run(SubmissionEntry::flush(NS1));
            assert!(done.status().is_success());
            assert_eq!(u32::from(done.sq_head.get()), io.tail);
        }
    }
}

#[test]
fn full_submission_queue_is_served_to_the_last_entry() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(1)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 8);
        for _ in 0..20 {
            let cids: Vec<_> = (0..7).map(|_| io.push(SubmissionEntry::flush(NS1))).collect();
            io.ring();
            for cid in cids {
                assert_eq!(io.wait().cid.get(), cid);
            }
        }
    }
}

#[test]
fn full_completion_queue_holds_commands_back_until_there_is_room() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(1)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair_with(1, 32, 4, POLLED);
        let cids: Vec<_> = (0..31).map(|_| io.push(SubmissionEntry::flush(NS1))).collect();
        io.ring();
        if mode == Mode::Stepped {
            assert!(host.ctrl.step() > 0);
            assert_eq!(host.ctrl.step(), 0, "blocked");
        }
        if mode == Mode::Inline {
            // Three entries fit; one more command was executed and waits for its slot.
            assert_eq!(host.ctrl.counters().queues[1].commands, 4);
            for _ in 0..3 {
                assert!(io.peek().is_some());
            }
            assert!(io.peek().is_none());
            (io.head, io.phase) = (0, true);
        }
        for cid in cids {
            assert_eq!(io.wait().cid.get(), cid, "{mode:?}");
        }
        assert_eq!(host.ctrl.counters().queues[1].commands, 31);
    }
}

#[test]
fn submission_queues_can_share_a_completion_queue() {
    for mode in [Mode::Inline, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let mut first = host.io_pair_with(1, 16, 4, POLLED);
        let mut second = Pair::new(&host.ctrl, 2, 1, 16, 4);
        host.admin.ok(create_sq(2, 15, 1, second.sq.iova()));
        for _ in 0..50 {
            for _ in 0..10 {
                first.push(SubmissionEntry::flush(NS1));
                second.push(SubmissionEntry::flush(NS1));
            }
            first.ring();
            second.ring();
            let mut seen = [0; 3];
            for _ in 0..20 {
                seen[usize::from(first.wait().sq_id.get())] += 1;
            }
            assert_eq!(seen, [0, 10, 10]);
        }
    }
}

#[test]
fn arbitration_takes_a_burst_from_each_queue_in_turn() {
    let mut host = Host::new(ControllerConfig { mode: Mode::Stepped, ..memory_config(1 << 20, 512) });
    host.admin.ok(SubmissionEntry::set_features(FeatureId::ARBITRATION, 1)); // bursts of 2
    let mut queues = [host.io_pair(1, 16), host.io_pair(2, 16), host.io_pair(3, 16)];
    for (queue, count) in queues.iter_mut().zip([5, 1, 3]) {
        for _ in 0..count {
            queue.push(SubmissionEntry::flush(NS1));
        }
        queue.ring();
    }
    for expected in [[2, 1, 2], [4, 1, 3], [5, 1, 3]] {
        host.ctrl.step();
        let done = host.ctrl.counters().queues;
        assert_eq!([1, 2, 3].map(|q: usize| done[q].commands), expected);
    }
    assert_eq!(host.ctrl.step(), 0);
}

#[test]
fn doorbells_honour_the_stride() {
    for dstrd in [0, 1, 4, 10] {
        let mut host = Host::new(ControllerConfig { dstrd, io_queues: 2, ..memory_config(1 << 20, 512) });
        assert_eq!(host.ctrl.bar_bytes(), (0x1000 + (6 << (2 + dstrd)) as u64).next_multiple_of(4096));
        let mut io = host.io_pair(2, 8);
        for _ in 0..20 {
            io.ok(SubmissionEntry::flush(NS1));
        }
    }
}

#[test]
fn impossible_doorbell_values_are_ignored() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 8);
    io.ok(SubmissionEntry::flush(NS1));
    io.doorbell(Doorbell::SubmissionTail, 1, 8);
    io.doorbell(Doorbell::SubmissionTail, 1, u32::MAX);
    io.doorbell(Doorbell::CompletionHead, 1, 8);
    io.doorbell(Doorbell::CompletionHead, 1, 2); // never posted
    io.doorbell(Doorbell::CompletionHead, 7, 0);
    host.ctrl.write32(registers::DOORBELL_BASE + 2, 1);
    host.ctrl.write32(u64::MAX - 3, 1);
    assert_eq!(host.ctrl.counters().queues[1].commands, 1);
    for _ in 0..20 {
        io.ok(SubmissionEntry::flush(NS1));
    }
}

#[test]
fn interrupts_are_sent_for_queues_that_want_them_and_obey_both_masks() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let fd = || eventfd.as_fd().try_clone_to_owned().unwrap();
    host.ctrl.set_interrupt(2, fd()).unwrap();
    let told = || eventfd.read().ok();
    let mut polled = host.io_pair(1, 8);
    let mut io = host.io_pair_with(2, 8, 8, QueueInterrupt::Vector(2));
    polled.ok(SubmissionEntry::flush(NS1));
    assert_eq!(told(), None);
    for _ in 0..5 {
        io.push(SubmissionEntry::flush(NS1));
    }
    io.ring();
    assert_eq!(told(), Some(1), "one message for a batch");
    for _ in 0..5 {
        io.wait();
    }
    host.ctrl.mask_interrupt(2, VectorMask::Masked).unwrap();
    io.ok(SubmissionEntry::flush(NS1));
    assert_eq!(told(), None);
    host.ctrl.mask_interrupt(2, VectorMask::Unmasked).unwrap();
    assert_eq!(told(), Some(1), "kept as pending");
    host.ctrl.write32(registers::INTMS, 1 << 2);
    assert_eq!(host.ctrl.read32(registers::INTMC), 1 << 2);
    io.ok(SubmissionEntry::flush(NS1));
    assert_eq!(told(), None);
    host.ctrl.write32(registers::INTMC, 1 << 2);
    assert_eq!((told(), host.ctrl.read32(registers::INTMS)), (Some(1), 0));
    host.ctrl.clear_interrupt(2).unwrap();
    io.ok(SubmissionEntry::flush(NS1));
    assert_eq!(told(), None);
    let error = host.ctrl.set_interrupt(17, fd()).unwrap_err();
    assert!(matches!(error, EmulatorError::NoVector { vector: 17, count: 17 }));
}

#[test]
fn queue_whose_memory_goes_away_is_fatal_to_the_controller_only() {
    for which in [0, 1] {
        let mut host = Host::new(memory_config(1 << 20, 512));
        let mut io = host.io_pair(1, 8);
        let buffer = Buffer::new(&host, 512);
        let read = buffer.attach(SubmissionEntry::read(NS1, 0, 0));
        io.ok(read);
        let spare = host.map(4096);
        let gone = std::mem::replace(if which == 0 { &mut io.sq } else { &mut io.cq }, spare);
        drop(gone);
        io.push(read);
        io.ring();
        assert!(host.csts().cfs(), "CFS after unmapping a queue");
        assert!(host.ctrl.memory().fault_count() > 0);
        host.ctrl.write32(registers::CC, 0);
        assert!(!host.csts().cfs() && !host.csts().rdy());
        let mut host = Host::enabled(host.ctrl);
        host.io_pair(1, 8).ok(SubmissionEntry::flush(NS1));
    }
}

#[test]
fn counters_tell_doorbells_from_commands() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let before = host.ctrl.counters();
    for _ in 0..10 {
        io.push(SubmissionEntry::flush(NS1));
    }
    io.ring();
    while io.peek().is_some() {}
    io.free();
    let after = host.ctrl.counters();
    assert_eq!(after.queues[1].commands - before.queues[1].commands, 10);
    assert_eq!(after.queues[1].submission_doorbells, 1);
    assert_eq!(after.queues[1].completion_doorbells, 1);
    assert_eq!(
        (after.register_reads, after.register_writes),
        (before.register_reads, before.register_writes)
    );
}
