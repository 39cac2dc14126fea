//! Shadow doorbells, driven by a host that writes a register only where the event index asks for it.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use nvme_emulator::{ControllerConfig, MappedRegion, Mode, ShadowDoorbells, ThreadOptions};
use nvme_spec::identify::{Cns, IdentifyController, Oacs};
use nvme_spec::registers::{self, Doorbell};
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::FromBytes;

use crate::initiator::{Host, NS1, Pair, memory_config, threaded};

fn config(mode: Mode) -> ControllerConfig {
    ControllerConfig { mode, shadow_doorbells: ShadowDoorbells::Offered, ..memory_config(1 << 20, 512) }
}

fn modes() -> [Mode; 4] {
    let sleepy = Mode::Threaded(ThreadOptions { workers: 1, spin: Duration::ZERO });
    [Mode::Inline, Mode::Stepped, threaded(2), sleepy]
}

/// The two buffers.
#[derive(Clone)]
struct Buffers {
    values: Arc<MappedRegion>,
    events: Arc<MappedRegion>,
}

impl Buffers {
    fn configured(host: &mut Host) -> Self {
        let buffers = Self { values: host.map(4096), events: host.map(4096) };
        let (values, events) = (buffers.values.iova(), buffers.events.iova());
        host.admin.ok(SubmissionEntry::doorbell_buffer_config(values, events));
        buffers
    }

    fn event(&self, index: usize) -> u32 {
        self.events.slice().load(index * 4, Ordering::SeqCst).unwrap()
    }
}

/// A queue pair that honours the event index.
struct ShadowPair {
    pair: Pair,
    buffers: Buffers,
    rung: [u32; 2],
    /// Register writes.
    writes: u64,
}

impl ShadowPair {
    fn new(pair: Pair, buffers: &Buffers) -> Self {
        Self { pair, buffers: buffers.clone(), rung: [0; 2], writes: 0 }
    }

    fn publish(&mut self, which: Doorbell) {
        let (side, qid, value) = match which {
            Doorbell::SubmissionTail => (0, self.pair.sqid, self.pair.tail),
            Doorbell::CompletionHead => (1, self.pair.cqid, self.pair.head),
        };
        let index = 2 * usize::from(qid) + side;
        self.buffers.values.slice().store(value, index * 4, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event = self.buffers.event(index) as u16;
        let old = std::mem::replace(&mut self.rung[side], value) as u16;
        let new = value as u16;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.writes += 1;
            self.pair.doorbell(which, qid, value);
        }
    }

    /// Submits `count` flushes at once and waits for all of them.
    fn flushes(&mut self, host: &Host, count: usize) {
        let cids: Vec<_> = (0..count).map(|_| self.pair.push(SubmissionEntry::flush(NS1))).collect();
        self.publish(Doorbell::SubmissionTail);
        let start = std::time::Instant::now();
        for cid in cids {
            let done = loop {
                if let Some(done) = self.pair.peek() {
                    break done;
                }
                assert!(start.elapsed() < Duration::from_secs(60), "a doorbell was lost");
                match host.ctrl.config().mode {
                    Mode::Inline => panic!("a doorbell was lost"),
                    Mode::Stepped => {
                        host.ctrl.step();
                    }
                    Mode::Threaded(_) => std::thread::yield_now(),
                }
            };
            assert_eq!((done.cid.get(), done.status().code()), (cid, StatusCode::SUCCESS));
            self.publish(Doorbell::CompletionHead);
        }
    }
}

#[test]
fn command_is_offered_only_if_configured() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let command = SubmissionEntry::doorbell_buffer_config(0x1000, 0x2000);
    assert_eq!(host.admin.status(command), StatusCode::INVALID_OPCODE);
    let mut host = Host::new(config(Mode::Inline));
    let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    assert!(IdentifyController::read_from_bytes(&data).unwrap().oacs().contains(Oacs::DOORBELL_BUFFER));
}

#[test]
fn host_that_honours_the_event_index_never_hangs() {
    for mode in modes() {
        for (sq, cq) in [(2, 2), (3, 7), (16, 4), (64, 64)] {
            let mut host = Host::new(config(mode));
            let buffers = Buffers::configured(&mut host);
            let disabled = nvme_spec::command::QueueInterrupt::Disabled;
            let mut io = ShadowPair::new(host.io_pair_with(1, sq, cq, disabled), &buffers);
            for round in 0..200 {
                io.flushes(&host, 1 + round % (sq as usize - 1));
            }
            assert_eq!(host.ctrl.counters().queues[1].commands, host_commands(sq, 200));
            assert_eq!(host.ctrl.memory().fault_count(), 0, "{mode:?}");
        }
    }
}

fn host_commands(sq: u32, rounds: u64) -> u64 {
    (0..rounds).map(|round| 1 + round % u64::from(sq - 1)).sum()
}

#[test]
fn register_writes_are_few_where_the_controller_looks_by_itself() {
    let spinning = Mode::Threaded(ThreadOptions { workers: 1, spin: Duration::from_secs(3600) });
    let mut host = Host::new(config(spinning));
    let buffers = Buffers::configured(&mut host);
    let mut io = ShadowPair::new(host.io_pair(1, 64), &buffers);
    for _ in 0..640 {
        io.flushes(&host, 7);
    }
    // An event index that is never renewed is passed once a lap: 70 laps of each ring.
    assert!(io.writes <= 2 * (70 + 1), "{}", io.writes);
    let counters = host.ctrl.counters().queues[1];
    assert_eq!(counters.submission_doorbells + counters.completion_doorbells, io.writes);
}

#[test]
fn event_index_is_the_tail_once_the_queue_is_empty() {
    let mut host = Host::new(config(Mode::Inline));
    let buffers = Buffers::configured(&mut host);
    let mut io = ShadowPair::new(host.io_pair(3, 16), &buffers);
    io.flushes(&host, 5);
    assert_eq!(buffers.event(6), 5);
    io.flushes(&host, 9);
    assert_eq!(buffers.event(6), 14);
}

#[test]
fn register_write_that_is_older_than_the_shadow_is_not_believed() {
    let mut host = Host::new(config(Mode::Stepped));
    let buffers = Buffers::configured(&mut host);
    let mut io = ShadowPair::new(host.io_pair(1, 16), &buffers);
    io.flushes(&host, 7);
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    host.ctrl.step();
    // Writes of 3 that were on their way all the time.
    io.pair.doorbell(Doorbell::SubmissionTail, 1, 3);
    io.pair.doorbell(Doorbell::CompletionHead, 1, 3);
    assert_eq!(host.ctrl.step(), 0);
    assert!(host.admin.peek().is_none(), "no invalid doorbell is reported");
    io.flushes(&host, 3);
    assert_eq!(host.ctrl.counters().queues[1].commands, 10);
}

#[test]
fn queues_that_exist_when_the_buffers_come_go_on_where_they_are() {
    for mode in modes() {
        let mut host = Host::new(config(mode));
        let mut pair = host.io_pair(1, 8);
        for _ in 0..5 {
            pair.ok(SubmissionEntry::flush(NS1));
        }
        let buffers = Buffers::configured(&mut host);
        let mut io = ShadowPair::new(pair, &buffers);
        io.rung = [5, 5];
        for _ in 0..50 {
            io.flushes(&host, 3);
        }
    }
}

#[test]
fn admin_queue_keeps_its_registers_and_a_reset_forgets_the_buffers() {
    for mode in modes() {
        let mut host = Host::new(config(mode));
        let buffers = Buffers::configured(&mut host);
        ShadowPair::new(host.io_pair(1, 8), &buffers).flushes(&host, 3);
        host.admin.ok(SubmissionEntry::identify(Cns::ACTIVE_NAMESPACES, NamespaceId::NONE).with_page(&host));
        host.ctrl.write32(registers::CC, 0);
        host.wait_csts(|csts| !csts.rdy());
        let mut host = Host::enabled(host.ctrl);
        drop(buffers);
        let mut io = host.io_pair(1, 8);
        for _ in 0..20 {
            io.ok(SubmissionEntry::flush(NS1));
        }
        assert_eq!(host.ctrl.memory().fault_count(), 0);
    }
}

trait WithPage {
    fn with_page(self, host: &Host) -> Self;
}

impl WithPage for SubmissionEntry {
    /// With a page for its data that stays mapped.
    fn with_page(mut self, host: &Host) -> Self {
        let page = host.map(4096);
        self.prp1.set(page.iova());
        std::mem::forget(page);
        self
    }
}

#[test]
fn buffers_that_cannot_be_are_refused_and_values_that_cannot_be_are_ignored() {
    let mut host = Host::new(config(Mode::Stepped));
    let region = host.map(8192);
    let iova = region.iova();
    let configure = |values, events| SubmissionEntry::doorbell_buffer_config(values, events);
    for (values, events, status) in [
        (iova + 4, iova + 4096, StatusCode::INVALID_FIELD),
        (iova, iova + 4096 + 512, StatusCode::INVALID_FIELD),
        (iova, iova, StatusCode::INVALID_FIELD),
        (iova, iova + 8192, StatusCode::DATA_TRANSFER_ERROR),
    ] {
        assert_eq!(host.admin.status(configure(values, events)), status);
    }
    let buffers = Buffers::configured(&mut host);
    let mut io = ShadowPair::new(host.io_pair(1, 8), &buffers);
    for bad in [8, u32::MAX] {
        buffers.values.slice().store(bad, 8, Ordering::SeqCst).unwrap();
        assert_eq!(host.ctrl.step(), 0);
    }
    buffers.values.slice().store(0u32, 8, Ordering::SeqCst).unwrap();
    io.flushes(&host, 3);
}

#[test]
fn buffers_that_go_away_are_fatal_to_the_controller_only() {
    let mut host = Host::new(config(Mode::Inline));
    let buffers = Buffers::configured(&mut host);
    let io = host.io_pair(1, 8);
    drop(buffers);
    io.doorbell(Doorbell::SubmissionTail, 1, 1);
    assert!(host.csts().cfs());
}
