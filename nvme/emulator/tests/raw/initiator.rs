//! A small initiator of the tests' own, straight from the specification: it shares nothing with the driver but the
//! wire types, so that an error of the driver and one of the controller cannot cancel out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nvme_emulator::{
    ControllerConfig, EmulatedController, MappedRegion, Mode, NamespaceConfig, ThreadOptions,
};
use nvme_spec::command::QueueInterrupt;
use nvme_spec::completion::{PHASE_DWORD_BIT, PHASE_DWORD_OFFSET};
use nvme_spec::registers::{self, Aqa, Cc, Csts, Doorbell, doorbell_offset};
use nvme_spec::{CQE_BYTES, CompletionEntry, NamespaceId, QueueId, SQE_BYTES, StatusCode, SubmissionEntry};
use vm_memory::{Bytes, VolatileSlice};
use zerocopy::{FromBytes, IntoBytes};

/// How long anything may take before a test fails: a limit, never a measure.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const NS1: NamespaceId = NamespaceId::new(1);
pub(crate) const PAGE: u64 = 4096;

/// One queue pair.
pub(crate) struct Pair {
    ctrl: Arc<EmulatedController>,
    pub(crate) sqid: u16,
    pub(crate) cqid: u16,
    pub(crate) sq: Arc<MappedRegion>,
    pub(crate) cq: Arc<MappedRegion>,
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) tail: u32,
    pub(crate) head: u32,
    pub(crate) phase: bool,
    next_cid: u16,
}

pub(crate) fn pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE as usize)
}

impl Pair {
    pub(crate) fn new(
        ctrl: &Arc<EmulatedController>,
        sqid: u16,
        cqid: u16,
        sq_entries: u32,
        cq_entries: u32,
    ) -> Self {
        let map = |bytes| ctrl.memory().map(pages(bytes)).unwrap();
        Self {
            ctrl: Arc::clone(ctrl),
            sqid,
            cqid,
            sq: map(sq_entries as usize * SQE_BYTES),
            cq: map(cq_entries as usize * CQE_BYTES),
            sq_entries,
            cq_entries,
            tail: 0,
            head: 0,
            phase: true,
            next_cid: 0x100,
        }
    }

    /// Puts a command into the ring without ringing; returns its identifier.
    pub(crate) fn push(&mut self, mut entry: SubmissionEntry) -> u16 {
        self.next_cid = self.next_cid.wrapping_add(1);
        entry.cid.set(self.next_cid);
        self.push_raw(&entry);
        self.next_cid
    }

    pub(crate) fn push_raw(&mut self, entry: &SubmissionEntry) {
        self.sq.slice().write_slice(entry.as_bytes(), self.tail as usize * SQE_BYTES).unwrap();
        self.tail = (self.tail + 1) % self.sq_entries;
    }

    pub(crate) fn ring(&self) {
        self.doorbell(Doorbell::SubmissionTail, self.sqid, self.tail);
    }

    pub(crate) fn doorbell(&self, which: Doorbell, qid: u16, value: u32) {
        let offset = doorbell_offset(self.ctrl.config().dstrd, QueueId::new(qid), which);
        self.ctrl.doorbell(offset, value);
    }

    /// Takes the next completion if there is one, without freeing its slot.
    pub(crate) fn peek(&mut self) -> Option<CompletionEntry> {
        let at = self.head as usize * CQE_BYTES;
        let slice = self.cq.slice();
        let dword: u32 = slice.load(at + PHASE_DWORD_OFFSET, Ordering::Acquire).unwrap();
        if (dword & PHASE_DWORD_BIT != 0) != self.phase {
            return None;
        }
        let mut bytes = [0; CQE_BYTES];
        slice.read_slice(&mut bytes, at).unwrap();
        self.head = (self.head + 1) % self.cq_entries;
        if self.head == 0 {
            self.phase = !self.phase;
        }
        Some(CompletionEntry::read_from_bytes(&bytes).unwrap())
    }

    pub(crate) fn free(&self) {
        self.doorbell(Doorbell::CompletionHead, self.cqid, self.head);
    }

    /// Waits for the next completion and frees its slot.
    pub(crate) fn wait(&mut self) -> CompletionEntry {
        let start = Instant::now();
        loop {
            if let Some(entry) = self.peek() {
                self.free();
                return entry;
            }
            assert!(start.elapsed() < DEADLINE, "no completion on queue {}", self.sqid);
            match self.ctrl.config().mode {
                Mode::Inline => panic!("no completion on queue {} after an inline doorbell", self.sqid),
                // A step may execute nothing and yet post what had waited for room; the deadline bounds the rest.
                Mode::Stepped => {
                    self.ctrl.step();
                }
                Mode::Threaded(_) => std::thread::yield_now(),
            }
        }
    }

    /// Runs one command to its completion.
    pub(crate) fn run(&mut self, entry: SubmissionEntry) -> CompletionEntry {
        let cid = self.push(entry);
        self.ring();
        let done = self.wait();
        assert_eq!((done.cid.get(), done.sq_id.get()), (cid, self.sqid));
        done
    }

    /// Runs one command and returns its status code.
    pub(crate) fn status(&mut self, entry: SubmissionEntry) -> StatusCode {
        self.run(entry).status().code()
    }

    #[track_caller]
    pub(crate) fn ok(&mut self, entry: SubmissionEntry) -> u32 {
        let done = self.run(entry);
        assert!(done.status().is_success(), "{}", done.status());
        done.dw0.get()
    }
}

/// A controller with its admin queue.
pub(crate) struct Host {
    pub(crate) ctrl: Arc<EmulatedController>,
    pub(crate) admin: Pair,
}

pub(crate) const ADMIN_ENTRIES: u32 = 32;

pub(crate) fn memory_config(bytes: u64, lba_size: u32) -> ControllerConfig {
    ControllerConfig::with_namespace(NamespaceConfig::memory(bytes).with_lba_size(lba_size))
}

pub(crate) fn threaded(workers: u16) -> Mode {
    Mode::Threaded(ThreadOptions { workers, ..ThreadOptions::default() })
}

/// CC for the NVM command set and 4 KiB pages.
pub(crate) fn cc() -> Cc {
    Cc::new().with_en(true).with_iosqes(6).with_iocqes(4)
}

impl Host {
    pub(crate) fn new(config: ControllerConfig) -> Self {
        Self::enabled(EmulatedController::new(config).unwrap())
    }

    /// Enables the controller with a fresh admin queue.
    pub(crate) fn enabled(ctrl: Arc<EmulatedController>) -> Self {
        let admin = Pair::new(&ctrl, 0, 0, ADMIN_ENTRIES, ADMIN_ENTRIES);
        let aqa = Aqa::new().with_asqs_z(ADMIN_ENTRIES as u16 - 1).with_acqs_z(ADMIN_ENTRIES as u16 - 1);
        ctrl.write32(registers::AQA, aqa.into());
        ctrl.write64(registers::ASQ, admin.sq.iova());
        ctrl.write64(registers::ACQ, admin.cq.iova());
        ctrl.write32(registers::CC, cc().into());
        let host = Self { ctrl, admin };
        host.wait_csts(|csts| csts.rdy() || csts.cfs());
        assert!(!host.csts().cfs());
        host
    }

    pub(crate) fn csts(&self) -> Csts {
        self.ctrl.read32(registers::CSTS).into()
    }

    pub(crate) fn wait_csts(&self, until: impl Fn(Csts) -> bool) {
        let start = Instant::now();
        while !until(self.csts()) {
            assert!(start.elapsed() < DEADLINE, "CSTS stays {:?}", self.csts());
            std::thread::yield_now();
        }
    }

    /// Creates completion and submission queue `qid`.
    pub(crate) fn io_pair(&mut self, qid: u16, entries: u32) -> Pair {
        self.io_pair_with(qid, entries, entries, QueueInterrupt::Disabled)
    }

    pub(crate) fn io_pair_with(&mut self, qid: u16, sq: u32, cq: u32, interrupt: QueueInterrupt) -> Pair {
        let pair = Pair::new(&self.ctrl, qid, qid, sq, cq);
        let id = QueueId::new(qid);
        let mut create = SubmissionEntry::create_io_cq(id, cq as u16 - 1, interrupt);
        create.prp1.set(pair.cq.iova());
        self.admin.ok(create);
        let mut create = SubmissionEntry::create_io_sq(id, sq as u16 - 1, id);
        create.prp1.set(pair.sq.iova());
        self.admin.ok(create);
        pair
    }

    pub(crate) fn map(&self, bytes: usize) -> Arc<MappedRegion> {
        self.ctrl.memory().map(bytes).unwrap()
    }

    /// Runs an admin command with a page for its data, and returns the page.
    pub(crate) fn admin_data(&mut self, mut entry: SubmissionEntry) -> Vec<u8> {
        let page = self.map(PAGE as usize);
        entry.prp1.set(page.iova());
        self.admin.ok(entry);
        bytes(page.slice())
    }
}

/// A buffer of mapped memory, contiguous, with its PRP list behind it.
pub(crate) struct Buffer {
    pub(crate) region: Arc<MappedRegion>,
    pub(crate) len: usize,
}

impl Buffer {
    pub(crate) fn new(host: &Host, len: usize) -> Self {
        let list_pages = pages(len).div_ceil(PAGE as usize).div_ceil(511) + 1;
        let region = host.map(pages(len) + list_pages * PAGE as usize);
        Self { region, len }
    }

    pub(crate) fn filled(host: &Host, bytes: &[u8]) -> Self {
        let buffer = Self::new(host, bytes.len());
        buffer.region.slice().write_slice(bytes, 0).unwrap();
        buffer
    }

    /// Points `entry` at the buffer, building a chained list if it needs one.
    pub(crate) fn attach(&self, mut entry: SubmissionEntry) -> SubmissionEntry {
        let iova = self.region.iova();
        entry.prp1.set(iova);
        let count = (pages(self.len) as u64) / PAGE;
        if count == 2 {
            entry.prp2.set(iova + PAGE);
        } else if count > 2 {
            let list = iova + count * PAGE;
            entry.prp2.set(list);
            self.write_list(&(1..count).map(|i| iova + i * PAGE).collect::<Vec<_>>(), count * PAGE);
        }
        entry
    }

    fn write_list(&self, entries: &[u64], at: u64) {
        let mut page = at;
        let mut rest = entries;
        loop {
            let (now, later) = if rest.len() > 512 { rest.split_at(511) } else { (rest, &[][..]) };
            for (i, entry) in now.iter().enumerate() {
                self.region.slice().write_obj(*entry, page as usize + i * 8).unwrap();
            }
            if later.is_empty() {
                return;
            }
            let next = page + PAGE;
            self.region.slice().write_obj(self.region.iova() + next, page as usize + 511 * 8).unwrap();
            page = next;
            rest = later;
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.region.slice().read_slice(&mut bytes, 0).unwrap();
        bytes
    }
}

pub(crate) fn bytes(slice: VolatileSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; slice.len()];
    slice.copy_to(&mut bytes);
    bytes
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}
