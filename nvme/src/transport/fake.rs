//! A controller for tests that does what it is told, above all what no controller should.
//!
//! It runs the register handshake and the admin commands that bring-up needs, each of which can be spoilt by a [`Script`].
//! I/O commands are only collected: the test completes them, or forges completions.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use nvme_spec::identify::{
    Cns, CommandSet, IdentifyController, IdentifyControllerNvm, IdentifyNamespace, NamespaceIdType,
    NamespaceList, Oncs,
};
use nvme_spec::log::AsyncEvent;
use nvme_spec::registers::{self, Aqa, Cap, Cc, Csts, Doorbell, doorbell_at, shst};
use nvme_spec::{AdminOpcode, CommandId, CompletionEntry, Status, StatusCode, SubmissionEntry};
use reactor::clock::Instant;
use reactor::dma::{DmaRegion, HeapRegion};
use vm_memory::Bytes;
use zerocopy::{FromZeros, IntoBytes};

use crate::transport::{Listen, Timing, Transport, TransportError};

/// Time that passes only when somebody pauses.
#[derive(Default)]
pub(crate) struct FakeTiming(AtomicU64);

impl FakeTiming {
    pub(crate) fn advance(&self, duration: Duration) {
        self.0.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Timing for FakeTiming {
    fn now(&self) -> Instant {
        Instant::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn pause(&self, duration: Duration) {
        self.advance(duration);
    }
}

/// How the controller misbehaves.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) cap: Cap,
    pub(crate) cap_bits: Option<u64>,
    pub(crate) version: registers::Version,
    pub(crate) bar_bytes: u64,
    /// CSTS.RDY follows CC.EN=1.
    pub(crate) becomes_ready: bool,
    /// CSTS.RDY follows CC.EN=0.
    pub(crate) stops: bool,
    /// CSTS.CFS is raised by CC.EN=1.
    pub(crate) fatal_on_enable: bool,
    /// CSTS reads as all ones once CC.EN was set.
    pub(crate) vanishes_on_enable: bool,
    /// CSTS reads as all ones.
    pub(crate) removed: bool,
    pub(crate) fatal: bool,
    /// Admin commands that are never completed.
    pub(crate) swallow: Vec<AdminOpcode>,
    /// Admin commands that are refused.
    pub(crate) refuse: Vec<AdminOpcode>,
    /// Identify data that is refused.
    pub(crate) refuse_cns: Vec<Cns>,
    pub(crate) controller: Box<IdentifyController>,
    pub(crate) namespace: Box<IdentifyNamespace>,
    /// Identify Controller of the NVM command set (2.0).
    pub(crate) limits: Box<IdentifyControllerNvm>,
    pub(crate) namespace_ids: Vec<u32>,
    /// I/O command sets of namespaces, for those that are not of the NVM command set. Those have no Identify Namespace data.
    pub(crate) command_sets: BTreeMap<u32, CommandSet>,
    /// Completion dword 0 of Set Features, Number of Queues.
    pub(crate) granted: u32,
    pub(crate) can_revoke: bool,
    pub(crate) vectors: u16,
    /// An abort of a pending command works.
    pub(crate) aborts: bool,
    /// The Changed Namespace List log page.
    pub(crate) changed: Vec<u32>,
    /// Function resets that work; each also undoes `stops: false`, `fatal` and `becomes_ready: false`.
    pub(crate) function_resets: u32,
}

impl Default for Script {
    fn default() -> Self {
        let mut controller = Box::new(IdentifyController::new_zeroed());
        (controller.sqes, controller.cqes, controller.mdts, controller.vwc) = (0x66, 0x44, 5, 1);
        controller.nn.set(4);
        controller.oncs.set((Oncs::DATASET_MANAGEMENT | Oncs::WRITE_ZEROES).bits());
        let mut namespace = Box::new(IdentifyNamespace::new_zeroed());
        namespace.nsze.set(1 << 20);
        namespace.ncap.set(1 << 20);
        namespace.lbaf[0].lbads = 12;
        Self {
            cap: Cap::new().with_mqes_z(63).with_css(Cap::CSS_NVM),
            cap_bits: None,
            version: registers::Version::V1_4,
            bar_bytes: 0x2000,
            becomes_ready: true,
            stops: true,
            fatal_on_enable: false,
            vanishes_on_enable: false,
            removed: false,
            fatal: false,
            swallow: Vec::new(),
            refuse: Vec::new(),
            refuse_cns: Vec::new(),
            controller,
            namespace,
            limits: Box::new(IdentifyControllerNvm::new_zeroed()),
            namespace_ids: vec![1],
            command_sets: BTreeMap::new(),
            granted: 3 | 3 << 16,
            can_revoke: false,
            vectors: 0,
            aborts: false,
            changed: Vec::new(),
            function_resets: 0,
        }
    }
}

#[derive(Debug)]
struct FakeQueue {
    sq: u64,
    cq: u64,
    sq_entries: u32,
    cq_entries: u32,
    sq_head: u32,
    cq_tail: u32,
    phase: bool,
    pending: Vec<SubmissionEntry>,
}

#[derive(Default)]
struct State {
    cc: Cc,
    csts: Csts,
    aqa: Aqa,
    asq: u64,
    acq: u64,
    regions: Vec<(u64, usize, Weak<HeapRegion>)>,
    queues: BTreeMap<u16, FakeQueue>,
    /// Every doorbell write: queue, which, value.
    doorbells: Vec<(u16, Doorbell, u32)>,
    /// Writes to CC.
    configurations: Vec<Cc>,
    created_cqs: BTreeMap<u16, (u64, u32)>,
    /// Event requests held.
    event_requests: Vec<u16>,
    /// Every admin command, but for event requests.
    admin_commands: Vec<SubmissionEntry>,
}

pub(crate) struct Fake {
    script: Mutex<Script>,
    state: Mutex<State>,
    pub(crate) timing: Arc<FakeTiming>,
}

impl Fake {
    pub(crate) fn new(script: Script) -> Arc<Self> {
        Arc::new(Self { script: Mutex::new(script), state: Mutex::default(), timing: Arc::default() })
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Leaves the controller as a previous owner might have.
    pub(crate) fn leave_enabled(&self, ready: bool) {
        let mut state = self.state();
        state.cc = Cc::new().with_en(true);
        state.csts = Csts::new().with_rdy(ready);
    }

    pub(crate) fn configurations(&self) -> Vec<Cc> {
        self.state().configurations.clone()
    }

    pub(crate) fn doorbells(&self, queue: u16) -> Vec<(Doorbell, u32)> {
        let state = self.state();
        state
            .doorbells
            .iter()
            .filter(|(id, ..)| *id == queue)
            .map(|&(_, which, value)| (which, value))
            .collect()
    }

    /// Commands that a queue's doorbell announced and nobody completed.
    pub(crate) fn pending(&self, queue: u16) -> Vec<SubmissionEntry> {
        self.state().queues[&queue].pending.clone()
    }

    pub(crate) fn has_queue(&self, queue: u16) -> bool {
        self.state().queues.contains_key(&queue)
    }

    pub(crate) fn cq_entries(&self, queue: u16) -> u32 {
        self.state().queues[&queue].cq_entries
    }

    pub(crate) fn regions_alive(&self) -> usize {
        self.state().regions.iter().filter(|(.., region)| region.strong_count() > 0).count()
    }

    /// The head that an honest controller reports now.
    pub(crate) fn sq_head(&self, queue: u16) -> u16 {
        self.state().queues[&queue].sq_head as u16
    }

    /// Completes a pending command.
    pub(crate) fn complete(&self, queue: u16, cid: CommandId, status: Status) {
        self.state().complete(queue, cid, status);
    }

    /// Completes a held event request.
    pub(crate) fn raise(&self, event: AsyncEvent) {
        let mut state = self.state();
        let cid = state.event_requests.remove(0);
        let mut completion = entry(0, cid, state.queues[&0].sq_head as u16);
        completion.dw0.set(event.into());
        state.post(0, completion, Status::SUCCESS);
    }

    pub(crate) fn event_requests(&self) -> usize {
        self.state().event_requests.len()
    }

    /// Opcodes of the admin commands so far, without event requests.
    pub(crate) fn admin_opcodes(&self) -> Vec<AdminOpcode> {
        self.state().admin_commands.iter().map(|command| AdminOpcode(command.opcode)).collect()
    }

    /// Log pages asked for.
    pub(crate) fn log_pages_read(&self) -> Vec<nvme_spec::command::GetLogPage> {
        let state = self.state();
        let opcode = AdminOpcode::GET_LOG_PAGE.0;
        let read = state.admin_commands.iter().filter(|command| command.opcode == opcode);
        read.map(SubmissionEntry::log_page).collect()
    }

    pub(crate) fn complete_all(&self, queue: u16) {
        for entry in self.pending(queue) {
            self.complete(queue, entry.command_id(), Status::SUCCESS);
        }
    }

    /// Posts a completion with whatever is in it, at the right place and with the right phase.
    pub(crate) fn forge(&self, queue: u16, forged: CompletionEntry) {
        self.state().post(queue, forged, Status::SUCCESS);
    }

    /// Writes an entry with the phase of the last lap where the next completion is expected.
    pub(crate) fn write_stale_phase(&self, queue: u16, mut stale: CompletionEntry) {
        let state = self.state();
        let found = &state.queues[&queue];
        stale.set_status(Status::SUCCESS, !found.phase);
        state.write(found.cq + u64::from(found.cq_tail) * 16, stale.as_bytes());
    }

    /// Reads device memory.
    pub(crate) fn read(&self, iova: u64, bytes: usize) -> Vec<u8> {
        self.state().read(iova, bytes)
    }

    fn ring(&self, id: u16, tail: u32) {
        let script = self.script().clone();
        let mut state = self.state();
        let state = &mut *state;
        loop {
            let Some(queue) = state.queues.get(&id).filter(|queue| queue.sq_head != tail) else { return };
            assert!(tail < queue.sq_entries, "tail {tail} beyond the queue");
            let at = queue.sq + u64::from(queue.sq_head) * 64;
            let mut command = SubmissionEntry::default();
            command.as_mut_bytes().copy_from_slice(&state.read(at, 64));
            let queue = state.queues.get_mut(&id).unwrap();
            queue.sq_head = (queue.sq_head + 1) % queue.sq_entries;
            let head = queue.sq_head as u16;
            if id != 0 {
                queue.pending.push(command);
            } else if command.opcode == AdminOpcode::ASYNC_EVENT_REQUEST.0 {
                state.event_requests.push(command.cid.get());
            } else if !script.swallow.contains(&AdminOpcode(command.opcode)) {
                state.admin_commands.push(command);
                let (status, dw0) = state.admin(&script, &command);
                let mut completion = entry(0, command.cid.get(), head);
                completion.dw0.set(dw0);
                state.post(0, completion, status);
            }
        }
    }
}

pub(crate) fn entry(queue: u16, cid: u16, sq_head: u16) -> CompletionEntry {
    let mut entry = CompletionEntry::default();
    entry.sq_id.set(queue);
    entry.cid.set(cid);
    entry.sq_head.set(sq_head);
    entry
}

impl State {
    fn forget(&mut self) {
        self.queues.clear();
        self.created_cqs.clear();
        self.event_requests.clear();
    }

    fn complete(&mut self, queue: u16, cid: CommandId, status: Status) {
        let found = self.queues.get_mut(&queue).unwrap();
        let index = found.pending.iter().position(|entry| entry.command_id() == cid).unwrap();
        found.pending.remove(index);
        let head = found.sq_head as u16;
        self.post(queue, entry(queue, cid.get(), head), status);
    }

    fn region(&self, iova: u64, bytes: usize) -> (Arc<HeapRegion>, usize) {
        let (start, _, region) = self
            .regions
            .iter()
            .find(|(start, length, _)| iova >= *start && iova + bytes as u64 <= start + *length as u64)
            .unwrap_or_else(|| panic!("access to {iova:#x}, which was never mapped"));
        let region = region.upgrade().unwrap_or_else(|| panic!("access to {iova:#x} after its release"));
        (region, (iova - start) as usize)
    }

    fn read(&self, iova: u64, bytes: usize) -> Vec<u8> {
        let (region, offset) = self.region(iova, bytes);
        let mut data = vec![0; bytes];
        region.slice().read_slice(&mut data, offset).unwrap();
        data
    }

    fn write(&self, iova: u64, data: &[u8]) {
        let (region, offset) = self.region(iova, data.len());
        region.slice().write_slice(data, offset).unwrap();
    }

    fn post(&mut self, id: u16, mut completion: CompletionEntry, status: Status) {
        let queue = self.queues.get_mut(&id).unwrap();
        completion.set_status(status, queue.phase);
        let at = queue.cq + u64::from(queue.cq_tail) * 16;
        queue.cq_tail += 1;
        if queue.cq_tail == queue.cq_entries {
            queue.cq_tail = 0;
            queue.phase = !queue.phase;
        }
        self.write(at, completion.as_bytes());
    }

    fn add_queue(&mut self, id: u16, sq: (u64, u32), cq: (u64, u32)) {
        let queue = FakeQueue {
            sq: sq.0,
            cq: cq.0,
            sq_entries: sq.1,
            cq_entries: cq.1,
            sq_head: 0,
            cq_tail: 0,
            phase: true,
            pending: Vec::new(),
        };
        self.queues.insert(id, queue);
    }

    /// Queues begin a memory page (§3.1.9, §5.3).
    fn check_alignment(&self, address: u64) {
        assert_eq!(address % (4096 << self.cc.mps()), 0, "{address:#x} does not begin a page");
    }

    fn admin(&mut self, script: &Script, command: &SubmissionEntry) -> (Status, u32) {
        let opcode = AdminOpcode(command.opcode);
        if script.refuse.contains(&opcode) {
            return (Status::from_code(StatusCode::INTERNAL_ERROR).with_dnr(true), 0);
        }
        let id = command.create_queue().qid();
        let entries = u32::from(command.create_queue().qsize_z()) + 1;
        match opcode {
            AdminOpcode::IDENTIFY => {
                if script.refuse_cns.contains(&command.identify_cns()) {
                    return (Status::from_code(StatusCode::INVALID_FIELD).with_dnr(true), 0);
                }
                let data = match command.identify_cns() {
                    Cns::CONTROLLER => script.controller.as_bytes().to_vec(),
                    Cns::NAMESPACE if script.command_sets.contains_key(&command.nsid.get()) => {
                        return (Status::from_code(StatusCode::INVALID_FIELD).with_dnr(true), 0);
                    }
                    Cns::NAMESPACE => script.namespace.as_bytes().to_vec(),
                    Cns::NAMESPACE_DESCRIPTORS => {
                        assert!(script.cap.css() & Cap::CSS_SEVERAL != 0, "it was not to be asked");
                        let set = script.command_sets.get(&command.nsid.get()).map_or(0, |set| set.0);
                        vec![NamespaceIdType::CSI.0, 1, 0, 0, set]
                    }
                    Cns::ACTIVE_NAMESPACES => {
                        let mut list = NamespaceList::new_zeroed();
                        let after = command.nsid.get();
                        let ids = script.namespace_ids.iter().filter(|&&id| id > after);
                        list.ids.iter_mut().zip(ids).for_each(|(slot, &id)| slot.set(id));
                        list.as_bytes().to_vec()
                    }
                    Cns::CONTROLLER_COMMAND_SET => script.limits.as_bytes().to_vec(),
                    other => panic!("unexpected {other}"),
                };
                self.write(command.prp1.get(), &data);
            }
            AdminOpcode::FORMAT_NVM => {}
            AdminOpcode::SET_FEATURES => return (Status::SUCCESS, script.granted),
            AdminOpcode::CREATE_IO_CQ => {
                self.check_alignment(command.prp1.get());
                self.created_cqs.insert(id, (command.prp1.get(), entries));
            }
            AdminOpcode::CREATE_IO_SQ => {
                self.check_alignment(command.prp1.get());
                let cq = self.created_cqs[&command.create_sq().cqid()];
                self.add_queue(id, (command.prp1.get(), entries), cq);
            }
            AdminOpcode::DELETE_IO_SQ => {
                self.queues.remove(&id).unwrap();
            }
            AdminOpcode::ABORT => {
                let (queue, cid) = command.abort_target();
                let pending = self.queues.get(&queue.get()).map(|found| found.pending.clone());
                let found = pending.unwrap_or_default().into_iter().any(|entry| entry.command_id() == cid);
                if !found || !script.aborts {
                    return (Status::SUCCESS, 1);
                }
                self.complete(queue.get(), cid, Status::from_code(StatusCode::ABORT_REQUESTED));
            }
            AdminOpcode::GET_LOG_PAGE => {
                let bytes = (command.log_page().dwords_z as usize + 1) * 4;
                let mut data: Vec<u8> = script.changed.iter().flat_map(|id| id.to_le_bytes()).collect();
                data.resize(bytes, 0);
                self.write(command.prp1.get(), &data);
            }
            AdminOpcode::DELETE_IO_CQ => {
                self.created_cqs.remove(&id).unwrap();
            }
            other => panic!("unexpected {other}"),
        }
        (Status::SUCCESS, 0)
    }

    fn configure(&mut self, script: &Script, cc: Cc) {
        self.configurations.push(cc);
        let was = std::mem::replace(&mut self.cc, cc);
        if cc.en() && !was.en() {
            assert!(!self.csts.rdy(), "enabled before RDY was 0");
            self.check_alignment(self.asq);
            self.check_alignment(self.acq);
            self.add_queue(
                0,
                (self.asq, u32::from(self.aqa.asqs_z()) + 1),
                (self.acq, u32::from(self.aqa.acqs_z()) + 1),
            );
            self.csts = Csts::new().with_rdy(script.becomes_ready).with_cfs(script.fatal_on_enable);
        }
        if !cc.en() && was.en() && script.stops {
            self.csts = Csts::new();
            self.forget();
        }
        if cc.en() && cc.shn() != 0 {
            self.csts = self.csts.with_shst(shst::COMPLETE);
        }
    }
}

impl Transport for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn bar_bytes(&self) -> u64 {
        self.script().bar_bytes
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let script = self.script().clone();
        let state = self.state();
        if script.removed || script.vanishes_on_enable && state.cc.en() {
            return Ok(u32::MAX);
        }
        Ok(match offset {
            registers::VS => script.version.into(),
            registers::CC => state.cc.into(),
            registers::CSTS => state.csts.with_cfs(state.csts.cfs() || script.fatal).into(),
            other => panic!("unexpected read of {other:#x}"),
        })
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        assert_eq!(offset, registers::CAP);
        let script = self.script();
        Ok(script.cap_bits.unwrap_or(script.cap.into()))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        let script = self.script().clone();
        let mut state = self.state();
        match offset {
            registers::CC => state.configure(&script, Cc::from(value)),
            registers::AQA => state.aqa = Aqa::from(value),
            other => panic!("unexpected write of {other:#x}"),
        }
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        let mut state = self.state();
        match offset {
            registers::ASQ => state.asq = value,
            registers::ACQ => state.acq = value,
            other => panic!("unexpected write of {other:#x}"),
        }
        Ok(())
    }

    fn doorbell(&self, offset: u64, value: u32) {
        let dstrd = self.script().cap.dstrd();
        let (queue, which) = doorbell_at(dstrd, offset).expect("a doorbell");
        self.state().doorbells.push((queue.get(), which, value));
        if which == Doorbell::SubmissionTail {
            self.ring(queue.get(), value);
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let region = HeapRegion::new(bytes)
            .map_err(|error| TransportError::Memory { bytes, reason: error.to_string() })?;
        let length = region.slice().len();
        self.state().regions.push((region.iova(), length, Arc::downgrade(&region)));
        Ok(region)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.script().vectors
    }

    fn connect_interrupt(&self, _: u16, _: BorrowedFd<'_>) -> Result<(), TransportError> {
        Ok(())
    }

    fn listen(&self, _: u16, _: Listen) {}

    fn reset_function(&self) -> Result<(), TransportError> {
        let mut script = self.script();
        if script.function_resets == 0 {
            return Err(TransportError::Unsupported("reset the function"));
        }
        script.function_resets -= 1;
        (script.stops, script.becomes_ready, script.fatal) = (true, true, false);
        let mut state = self.state();
        (state.cc, state.csts) = (Cc::new(), Csts::new());
        state.forget();
        Ok(())
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        if self.script().can_revoke { Ok(()) } else { Err(TransportError::Unsupported("revoke DMA")) }
    }
}
