//! A controller that follows a script of misdeeds, behind the driver's own [`Transport`] and [`Timing`].
//!
//! It works as a controller does until the script says otherwise: it answers late, twice, never, with any status, for other
//! commands and queues; posts entries of any contents and phase; reads as removed or fatal; changes its mind about what it
//! is. After the script it is honest, so that every run has an end.
//!
//! Invariants that it checks:
//! - memory that an enabled controller was given is there for as long as it may use it: an access to what was released fails
//!   the run, unless the driver had seen all ones, or had revoked DMA;
//! - queues begin a memory page, tails lie within their queue;
//! - the driver's register accesses and pauses are bounded.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme::transport::{Listen, Timing, Transport, TransportError};
use nvme_spec::identify::Cns;
use nvme_spec::registers::{
    self, Aqa, Cap, Cc, Csts, DOORBELL_BASE, Doorbell, Version, doorbell_at, doorbell_offset, shst,
};
use nvme_spec::{AdminOpcode, CQE_BYTES, CompletionEntry, QueueId, SQE_BYTES, Status, SubmissionEntry};
use reactor::clock::Instant;
use reactor::dma::DmaRegion;
use zerocopy::{FromBytes, IntoBytes};

use super::identity::{Answers, Kind};
use super::memory::{Memory, Unmapped};
use crate::script::Script;

/// Register accesses and pauses of one run.
const STEP_LIMIT: u64 = 4_000_000;
/// A pause takes this much longer than asked: thirty seconds of waiting cost few looks.
const PAUSE_STRETCH: u32 = 64;
/// Commands that a queue holds back at most.
const HELD_LIMIT: usize = 4096;
/// Status codes that mean something to the driver, beside random ones.
const STATUSES: [u16; 8] = [0x0007, 0x0004, 0x0285, 0x0281, 0x4002, 0x2804, 0x000a, 0x0082];

struct HostileQueue {
    sq: u64,
    cq: u64,
    sq_entries: u32,
    cq_entries: u32,
    sq_head: u32,
    cq_tail: u32,
    phase: bool,
    held: Vec<SubmissionEntry>,
}

struct State {
    script: Script,
    answers: Answers,
    memory: Memory,
    cap: Cap,
    version: u32,
    cc: Cc,
    csts: Csts,
    aqa: Aqa,
    asq: u64,
    acq: u64,
    queues: BTreeMap<u16, HostileQueue>,
    completion_queues: BTreeMap<u16, (u64, u32)>,
    events: Vec<u16>,
    shadow: Option<(u64, u64)>,
    now: Instant,
    steps: u64,
    allocations_left: u32,
    function_resets: u8,
    can_revoke: bool,
    /// Does not follow CC.EN until a function reset.
    stuck: bool,
    /// Reads as all ones for as many reads.
    absent_reads: u32,
    gone: bool,
    /// Nothing is owed to the controller any more: the driver saw it gone, or revoked its DMA.
    excused: bool,
}

/// The controller and its clock.
pub(super) struct Hostile {
    state: Mutex<State>,
    bar_bytes: u64,
    vectors: u16,
    dstrd: u8,
}

impl Hostile {
    pub(super) fn new(mut script: Script) -> Self {
        let plain = script.byte() < 128;
        let mut cap = Cap::new().with_mqes_z(63).with_css(Cap::CSS_NVM).with_mpsmax(4);
        let (mut version, mut bar_bytes, mut vectors) = (Version::V1_4.into(), 0x4000, 0);
        if !plain {
            cap.set_mqes_z(script.pick(&[63, 1, 2, 7, 1023, u16::MAX, 0]));
            cap.set_dstrd(script.pick(&[0, 1, 4, 9, 15]));
            cap.set_mpsmin(script.pick(&[0, 0, 1, 4, 5]));
            cap.set_to(script.byte());
            version = script.pick(&[version, Version::V2_0.into(), 0x0001_0200, u32::MAX, 0]);
            bar_bytes = script.pick(&[bar_bytes, 0x1000, 0x1010, 0x2000, 1 << 20, 0]);
            vectors = script.pick(&[0, 1, 2, 64]);
            if script.byte() > 240 {
                cap = Cap::from(script.long());
            }
        }
        let limits = script.byte();
        let state = State {
            answers: Answers::new(&mut script),
            script,
            memory: Memory::default(),
            cap,
            version,
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: Aqa::new(),
            asq: 0,
            acq: 0,
            queues: BTreeMap::new(),
            completion_queues: BTreeMap::new(),
            events: Vec::new(),
            shadow: None,
            now: Instant::ZERO,
            steps: 0,
            allocations_left: if limits & 0xe0 == 0xe0 { u32::from(limits & 0x1f) } else { u32::MAX },
            function_resets: limits & 3,
            can_revoke: limits & 4 != 0,
            stuck: false,
            absent_reads: 0,
            gone: false,
            excused: false,
        };
        Self { state: Mutex::new(state), bar_bytes, vectors, dstrd: cap.dstrd() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The script's next byte, for whoever drives the driver.
    pub(super) fn byte(&self) -> u8 {
        self.state().script.byte()
    }

    pub(super) fn script_is_over(&self) -> bool {
        self.state().script.is_over()
    }

    /// Lets time pass, and the controller work.
    pub(super) fn work(&self, time: Duration) {
        let mut state = self.state();
        state.now = state.now + time;
        state.work();
    }

    pub(super) fn regions_alive(&self) -> usize {
        self.state().memory.alive()
    }

    /// Whether the driver can know that the controller uses no memory: it is disabled.
    pub(super) fn is_disabled(&self) -> bool {
        let state = self.state();
        !state.cc.en() && !state.csts.rdy()
    }
}

impl State {
    fn step(&mut self) {
        self.steps += 1;
        assert!(self.steps < STEP_LIMIT, "the driver goes round in circles");
    }

    /// What a 32-bit register reads as, if the device is not there now.
    fn absence(&mut self) -> bool {
        if self.absent_reads > 0 {
            self.absent_reads -= 1;
            self.excused = true;
            return true;
        }
        self.excused |= self.gone;
        self.gone
    }

    fn owed<T>(&self, outcome: Result<T, Unmapped>, what: &str, iova: u64) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(Unmapped) if self.excused || std::thread::panicking() => None,
            Err(Unmapped) => panic!("{what} at {iova:#x} was released or never mapped"),
        }
    }

    fn forget(&mut self) {
        self.queues.clear();
        self.completion_queues.clear();
        self.events.clear();
        self.shadow = None;
    }

    fn check_page(&self, iova: u64) {
        assert_eq!(iova % (4096 << self.cc.mps()), 0, "a queue at {iova:#x} does not begin a page");
    }

    fn configure(&mut self, cc: Cc) {
        let was = std::mem::replace(&mut self.cc, cc);
        if cc.en() && !was.en() {
            assert!(!self.csts.rdy() || self.stuck || self.excused, "enabled before RDY was 0");
            self.check_page(self.asq);
            self.check_page(self.acq);
            let (sq, cq) = (u32::from(self.aqa.asqs_z()) + 1, u32::from(self.aqa.acqs_z()) + 1);
            self.add_queue(0, (self.asq, sq), (self.acq, cq));
            self.excused = false;
            match self.script.byte() {
                250..=251 => {}
                252..=253 => self.csts = Csts::new().with_cfs(true),
                254 => self.gone = true,
                255 => self.absent_reads = 3,
                _ => self.csts = Csts::new().with_rdy(true),
            }
        }
        if !cc.en() && was.en() {
            self.stuck |= self.script.byte() > 250;
            if !self.stuck {
                self.csts = Csts::new();
                self.forget();
            }
        }
        if cc.en() && cc.shn() != 0 && self.script.byte() < 248 {
            self.csts = self.csts.with_shst(shst::COMPLETE);
        }
    }

    fn add_queue(&mut self, id: u16, sq: (u64, u32), cq: (u64, u32)) {
        let queue = HostileQueue {
            sq: sq.0,
            cq: cq.0,
            sq_entries: sq.1,
            cq_entries: cq.1,
            sq_head: 0,
            cq_tail: 0,
            phase: true,
            held: Vec::new(),
        };
        self.queues.insert(id, queue);
    }

    fn is_dead(&self) -> bool {
        self.gone || !self.cc.en() && !self.stuck || self.csts.cfs()
    }

    /// Fetches what lies before `tail`.
    fn fetch(&mut self, id: u16, tail: u32) {
        if self.is_dead() {
            return;
        }
        let Some(queue) = self.queues.get(&id) else { return };
        if tail >= queue.sq_entries {
            assert!(self.excused, "tail {tail} of queue {id} of {} entries", queue.sq_entries);
            return;
        }
        while let Some(queue) = self.queues.get_mut(&id)
            && queue.sq_head != tail
            && queue.held.len() < HELD_LIMIT
        {
            let at = queue.sq + u64::from(queue.sq_head) * SQE_BYTES as u64;
            queue.sq_head = (queue.sq_head + 1) % queue.sq_entries;
            let mut bytes = [0; SQE_BYTES];
            let outcome = self.memory.read(at, &mut bytes);
            if self.owed(outcome, "a submission queue entry", at).is_none() {
                return;
            }
            let command = SubmissionEntry::read_from_bytes(&bytes).expect("an entry has this size");
            let queue = self.queues.get_mut(&id).expect("it was there a moment ago");
            if id == 0 && command.opcode == AdminOpcode::ASYNC_EVENT_REQUEST.0 {
                self.events.push(command.cid.get());
                self.events.truncate(16);
            } else {
                queue.held.push(command);
            }
        }
    }

    /// Does something with what it holds: once honestly or as the script says, all of it once that is over.
    fn work(&mut self) {
        self.look_at_shadow();
        let ids: Vec<u16> = self.queues.keys().copied().collect();
        for id in ids {
            let mut turns = 0;
            while !self.is_dead()
                && turns < HELD_LIMIT
                && self.queues.get(&id).is_some_and(|queue| !queue.held.is_empty())
            {
                turns += 1;
                match self.script.byte() {
                    200..=207 => break, // later
                    action => self.act(id, action),
                }
            }
        }
        if self.script.byte() > 230 && !self.is_dead() {
            self.mischief();
        }
    }

    fn act(&mut self, id: u16, action: u8) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let index = if action < 100 { 0 } else { usize::from(action) % queue.held.len() };
        let command = queue.held.remove(index);
        let head = queue.sq_head as u16;
        let mut entry = CompletionEntry::default();
        entry.sq_id.set(id);
        entry.cid.set(command.cid.get());
        entry.sq_head.set(head);
        let mut status = Status::SUCCESS;
        // Whoever answers for what it did not do is owed nothing for it.
        self.excused |= id == 0 && (216..=247).contains(&action);
        match action {
            208..=215 => return, // never
            216..=225 => {
                let code = if self.script.byte() & 1 == 0 {
                    self.script.pick(&STATUSES)
                } else {
                    self.script.word()
                };
                status = Status::from(code & 0x7fff);
            }
            226..=230 => {
                // Lies: says that it is done.
            }
            231..=234 => entry.sq_head.set(self.script.word()),
            235..=238 => entry.cid.set(self.script.word()),
            239..=240 => entry.sq_id.set(self.script.word()),
            241..=243 => {
                self.post(id, entry, status); // twice
            }
            244..=246 => {
                let junk = self.script.bytes(CQE_BYTES);
                entry.as_mut_bytes()[..junk.len()].copy_from_slice(&junk);
            }
            _ if id == 0 => {
                let (honest, dw0) = self.admin(&command);
                status = honest;
                entry.dw0.set(dw0);
            }
            _ => self.touch_data(&command),
        }
        if action == 247 {
            entry.dw0.set(self.script.word().into());
        }
        self.post(id, entry, status);
    }

    /// The first page of a command's data has to be mapped while the command is in flight.
    fn touch_data(&mut self, command: &SubmissionEntry) {
        let carries_data = command.opcode & 3 != 0 && command.opcode != 0x08 && command.opcode != 0x0c;
        if carries_data && command.prp1.get() != 0 {
            let at = command.prp1.get();
            let mut byte = [0];
            let outcome = self.memory.read(at, &mut byte);
            self.owed(outcome, "data of a command", at);
        }
    }

    fn post(&mut self, id: u16, mut entry: CompletionEntry, status: Status) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        entry.set_status(status, queue.phase);
        let at = queue.cq + u64::from(queue.cq_tail) * CQE_BYTES as u64;
        queue.cq_tail += 1;
        if queue.cq_tail >= queue.cq_entries {
            queue.cq_tail = 0;
            queue.phase = !queue.phase;
        }
        let outcome = self.memory.write(at, entry.as_bytes());
        self.owed(outcome, "a completion queue entry", at);
    }

    /// Something that nobody asked for.
    fn mischief(&mut self) {
        match self.script.byte() % 10 {
            0..=3 => {
                let dw0 = u32::from(self.script.word()) | u32::from(self.script.byte()) << 16;
                if !self.events.is_empty() {
                    let mut entry = CompletionEntry::default();
                    entry.cid.set(self.events.remove(0));
                    entry.sq_head.set(self.queues.get(&0).map_or(0, |queue| queue.sq_head as u16));
                    entry.dw0.set(dw0 & 0x00ff_ff07);
                    self.post(0, entry, Status::SUCCESS);
                }
            }
            4 => self.csts.set_cfs(true),
            5 => self.gone = true,
            6 => self.absent_reads = u32::from(self.script.byte()),
            7 => {
                // Any bytes anywhere in a completion queue.
                let (id, place) = (u16::from(self.script.byte() % 3), self.script.word());
                self.excused |= id == 0;
                let junk = self.script.bytes(CQE_BYTES);
                if let Some(queue) = self.queues.get(&id) {
                    let at = queue.cq + u64::from(u32::from(place) % queue.cq_entries) * CQE_BYTES as u64;
                    let outcome = self.memory.write(at, &junk);
                    self.owed(outcome, "a completion queue", at);
                }
            }
            8 => {
                if let Some((_, events)) = self.shadow {
                    let at = events + u64::from(self.script.byte()) * 4;
                    let junk = self.script.bytes(4);
                    let outcome = self.memory.write(at, &junk);
                    self.owed(outcome, "the event index buffer", at);
                }
            }
            _ => {
                let entry = CompletionEntry::read_from_bytes(&{
                    let mut bytes = [0; CQE_BYTES];
                    let junk = self.script.bytes(CQE_BYTES);
                    bytes[..junk.len()].copy_from_slice(&junk);
                    bytes
                })
                .expect("an entry has this size");
                let id = u16::from(self.script.byte() % 3);
                self.excused |= id == 0;
                let status = Status::from(self.script.word() & 0x7fff);
                self.post(id, entry, status);
            }
        }
    }

    /// A controller with shadow doorbells looks at them of its own accord.
    fn look_at_shadow(&mut self) {
        let Some((values, _)) = self.shadow.filter(|_| !self.is_dead()) else { return };
        let ids: Vec<u16> = self.queues.keys().copied().filter(|&id| id != 0).collect();
        for id in ids {
            let offset = doorbell_offset(self.cap.dstrd(), QueueId::new(id), Doorbell::SubmissionTail);
            let at = values + offset - DOORBELL_BASE;
            let mut value = [0; 4];
            let outcome = self.memory.read(at, &mut value);
            if self.owed(outcome, "a shadow doorbell", at).is_some() {
                self.fetch(id, u32::from_le_bytes(value));
            }
        }
    }

    fn admin(&mut self, command: &SubmissionEntry) -> (Status, u32) {
        let refused = (Status::from(0x4002), 0);
        let id = command.create_queue().qid();
        let entries = u32::from(command.create_queue().qsize_z()) + 1;
        match AdminOpcode(command.opcode) {
            AdminOpcode::IDENTIFY => {
                let kind = match command.identify_cns() {
                    Cns::CONTROLLER => Kind::Controller,
                    Cns::NAMESPACE => Kind::Namespace,
                    Cns::ACTIVE_NAMESPACES => Kind::NamespaceList,
                    Cns::NAMESPACE_DESCRIPTORS => Kind::Descriptors,
                    Cns::CONTROLLER_COMMAND_SET => Kind::CommandSet,
                    _ => return refused,
                };
                self.give(kind, command, usize::MAX);
            }
            AdminOpcode::GET_LOG_PAGE => {
                let bytes = (command.log_page().dwords_z as usize).saturating_mul(4).saturating_add(4);
                self.give(Kind::LogPage, command, bytes);
            }
            AdminOpcode::GET_FEATURES => {
                self.give(Kind::Feature, command, usize::MAX);
                return (Status::SUCCESS, self.script.word().into());
            }
            AdminOpcode::SET_FEATURES => {
                let granted = self.script.byte();
                return (
                    Status::SUCCESS,
                    if granted > 240 { self.script.long() as u32 } else { 3 | 3 << 16 },
                );
            }
            AdminOpcode::CREATE_IO_CQ => {
                self.check_page(command.prp1.get());
                self.completion_queues.insert(id, (command.prp1.get(), entries));
            }
            AdminOpcode::CREATE_IO_SQ => {
                self.check_page(command.prp1.get());
                let Some(&cq) = self.completion_queues.get(&command.create_sq().cqid()) else {
                    return refused;
                };
                self.add_queue(id, (command.prp1.get(), entries), cq);
            }
            AdminOpcode::DELETE_IO_SQ => {
                self.queues.remove(&id);
            }
            AdminOpcode::DELETE_IO_CQ => {
                self.completion_queues.remove(&id);
            }
            AdminOpcode::DOORBELL_BUFFER_CONFIG => {
                self.shadow = Some((command.prp1.get(), command.prp2.get()));
            }
            AdminOpcode::ABORT => return (Status::SUCCESS, self.abort(command)),
            AdminOpcode::FORMAT_NVM => {}
            _ => return refused,
        }
        (Status::SUCCESS, 0)
    }

    fn abort(&mut self, command: &SubmissionEntry) -> u32 {
        let (queue, cid) = command.abort_target();
        let Some(found) = self.queues.get_mut(&queue.get()).filter(|_| queue != QueueId::ADMIN) else {
            return 1;
        };
        let Some(index) = found.held.iter().position(|held| held.command_id() == cid) else { return 1 };
        found.held.remove(index);
        let mut entry = CompletionEntry::default();
        entry.sq_id.set(queue.get());
        entry.cid.set(cid.get());
        entry.sq_head.set(found.sq_head as u16);
        self.post(queue.get(), entry, Status::from(0x0007));
        0
    }

    fn give(&mut self, kind: Kind, command: &SubmissionEntry, bytes: usize) {
        let data = self.answers.read(kind, command.nsid.get());
        let at = command.prp1.get();
        let outcome = self.memory.write(at, &data[..bytes.min(data.len())]);
        self.owed(outcome, "data of an admin command", at);
    }
}

impl Transport for Hostile {
    fn name(&self) -> &str {
        "hostile"
    }

    fn bar_bytes(&self) -> u64 {
        self.bar_bytes
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let mut state = self.state();
        state.step();
        if state.absence() {
            return Ok(u32::MAX);
        }
        Ok(match offset {
            registers::VS => state.version,
            registers::CC => state.cc.into(),
            registers::CSTS => state.csts.into(),
            _ => 0,
        })
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        let mut state = self.state();
        state.step();
        match offset {
            _ if state.absence() => Ok(u64::MAX),
            registers::CAP => Ok(state.cap.into()),
            _ => Ok(0),
        }
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        let mut state = self.state();
        state.step();
        if state.gone {
            return Ok(());
        }
        match offset {
            registers::CC => state.configure(Cc::from(value)),
            registers::AQA => state.aqa = Aqa::from(value),
            _ => {}
        }
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        let mut state = self.state();
        state.step();
        match offset {
            registers::ASQ => state.asq = value,
            registers::ACQ => state.acq = value,
            _ => {}
        }
        Ok(())
    }

    fn doorbell(&self, offset: u64, value: u32) {
        let found = doorbell_at(self.dstrd, offset);
        assert!(offset + 4 <= self.bar_bytes, "a doorbell at {offset:#x} of {:#x}", self.bar_bytes);
        let mut state = self.state();
        state.step();
        if let Some((queue, Doorbell::SubmissionTail)) = found {
            state.fetch(queue.get(), value);
            if queue == QueueId::ADMIN {
                state.work();
            }
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let mut state = self.state();
        let none = || TransportError::Memory { bytes, reason: "the script has it so".to_owned() };
        state.allocations_left = state.allocations_left.checked_sub(1).ok_or_else(none)?;
        state.memory.allocate(bytes).ok_or_else(none)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.vectors
    }

    fn connect_interrupt(&self, _: u16, _: BorrowedFd<'_>) -> Result<(), TransportError> {
        Ok(())
    }

    fn listen(&self, _: u16, _: Listen) {}

    fn reset_function(&self) -> Result<(), TransportError> {
        let mut state = self.state();
        state.step();
        if state.function_resets == 0 {
            return Err(TransportError::Unsupported("reset the function"));
        }
        state.function_resets -= 1;
        state.stuck = false;
        (state.cc, state.csts) = (Cc::new(), Csts::new());
        state.forget();
        Ok(())
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        let mut state = self.state();
        if !state.can_revoke {
            return Err(TransportError::Unsupported("revoke DMA"));
        }
        state.excused = true;
        Ok(())
    }
}

impl Timing for Hostile {
    fn now(&self) -> Instant {
        self.state().now
    }

    fn pause(&self, duration: Duration) {
        let mut state = self.state();
        state.step();
        state.now = state.now + duration * PAUSE_STRETCH;
        state.work();
    }
}
