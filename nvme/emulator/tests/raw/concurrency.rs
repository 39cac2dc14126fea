//! Several host threads at once, each with queues of its own, on every mode that allows it.

use std::thread;

use nvme_emulator::{ControllerConfig, Mode};
use nvme_spec::command::{ForceUnitAccess, QueueInterrupt};
use nvme_spec::{NamespaceId, SubmissionEntry};

use crate::initiator::{Buffer, Host, NS1, memory_config, pattern, threaded};

/// Blocks that each thread has to itself.
const SHARE: u64 = 64;
/// Commands that each thread runs.
const ROUNDS: u64 = 400;

#[test]
fn two_threads_with_a_queue_each_do_not_disturb_each_other() {
    for mode in [Mode::Inline, threaded(1), threaded(2)] {
        let config = ControllerConfig { mode, ..memory_config(16 << 20, 4096) };
        let mut host = Host::new(config);
        let pairs = [host.io_pair(1, 16), host.io_pair(2, 16)];
        let host = &host;
        thread::scope(|scope| {
            for (index, mut io) in (0u64..).zip(pairs) {
                scope.spawn(move || {
                    let base = index * SHARE;
                    for round in 0..ROUNDS {
                        let slba = base + round % SHARE;
                        let data = pattern(index << 32 | round, 4096);
                        let source = Buffer::filled(host, &data);
                        let target = Buffer::new(host, 4096);
                        let write = SubmissionEntry::write(NS1, slba, 0, ForceUnitAccess::No);
                        io.ok(source.attach(write));
                        io.ok(target.attach(SubmissionEntry::read(NS1, slba, 0)));
                        assert!(target.bytes() == data, "{mode:?}, thread {index}, round {round}");
                    }
                });
            }
        });
        let counters = host.ctrl.counters();
        for queue in [1, 2] {
            assert_eq!(counters.queues[queue].reads, ROUNDS);
            assert_eq!(counters.queues[queue].writes, ROUNDS);
        }
        assert_eq!(counters.dma_faults, 0);
    }
}

#[test]
fn queues_come_and_go_while_another_is_busy() {
    for mode in [Mode::Inline, threaded(2)] {
        let config = ControllerConfig { mode, ..memory_config(16 << 20, 4096) };
        let mut host = Host::new(config);
        let mut busy = host.io_pair(1, 16);
        let target = Buffer::new(&host, 4096);
        thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..2000 {
                    busy.ok(target.attach(SubmissionEntry::read(NS1, 0, 0)));
                }
            });
            for _ in 0..100 {
                let mut io = host.io_pair(2, 4);
                io.ok(SubmissionEntry::flush(NamespaceId::BROADCAST));
                let id = nvme_spec::QueueId::new(2);
                host.admin.ok(SubmissionEntry::delete_io_sq(id));
                host.admin.ok(SubmissionEntry::delete_io_cq(id));
            }
        });
        assert_eq!(host.ctrl.counters().queues[1].reads, 2000);
        assert_eq!(host.ctrl.memory().fault_count(), 0);
    }
}

#[test]
fn sleeping_controller_is_woken_by_a_doorbell_and_wakes_by_interrupt() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;
    let options = nvme_emulator::ThreadOptions { workers: 1, spin: std::time::Duration::ZERO };
    let config = ControllerConfig { mode: Mode::Threaded(options), ..memory_config(1 << 20, 512) };
    let mut host = Host::new(config);
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    host.ctrl.set_interrupt(1, eventfd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut io = host.io_pair_with(1, 8, 8, QueueInterrupt::Vector(1));
    // With no spinning at all, each round is a sleep and a wake-up on both sides: a lost one hangs the test.
    for _ in 0..3000 {
        io.push(SubmissionEntry::flush(NS1));
        io.ring();
        let mut fds = [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)).unwrap(), 1, "no interrupt");
        eventfd.read().unwrap();
        assert!(io.peek().expect("an interrupt follows its entry").status().is_success());
        io.free();
    }
}

#[test]
fn deep_queues_from_two_threads_complete_everything_once() {
    for mode in [Mode::Inline, threaded(2)] {
        let config = ControllerConfig { mode, ..memory_config(16 << 20, 512) };
        let mut host = Host::new(config);
        // Completion queues smaller than submission queues: both sides stall again and again.
        let pairs: Vec<_> = (1..=2).map(|q| host.io_pair_with(q, 64, 8, QueueInterrupt::Disabled)).collect();
        let target = Buffer::new(&host, 512);
        let target = &target;
        thread::scope(|scope| {
            for mut io in pairs {
                scope.spawn(move || {
                    for _ in 0..100 {
                        let mut cids: Vec<_> = (0..63)
                            .map(|_| io.push(target.attach(SubmissionEntry::read(NS1, 0, 0))))
                            .collect();
                        io.ring();
                        cids.reverse();
                        while let Some(cid) = cids.pop() {
                            assert_eq!(io.wait().cid.get(), cid);
                        }
                    }
                });
            }
        });
        for queue in [1, 2] {
            assert_eq!(host.ctrl.counters().queues[queue].commands, 6300);
        }
    }
}
