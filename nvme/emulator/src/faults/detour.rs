//! The path of a command while there are rules or a latency model: judged, held back, executed, completed, falsified.
//!
//! Invariants: called with the submission queue's lock held, as the straight path in `controller` is; a command that no rule
//! meets ends exactly as it would there.
//!
//! Excludes: what rules say (`book`), what happens to data (`diversion`).

use nvme_spec::{CompletionEntry, NamespaceId, NvmOpcode, Status, StatusCode, SubmissionEntry};

use super::book::{Fate, Forgery, Verdict, Wait};
use super::deferred::{Deferred, WaitingCommand};
use super::diversion::Diversion;
use super::{CidFault, blocks_of};
use crate::controller::{Core, Lane, Outcome, completion_entry};
use crate::locks::lock;
use crate::queue::{Overrun, PhaseTag, SubmissionQueue};
use crate::store::SECTOR;

/// Dword 12 of reads and writes: force unit access.
const FUA: u32 = 1 << 30;

impl Core {
    /// Takes a command that was fetched.
    #[cold]
    pub(crate) fn detour(
        &self,
        lane: &mut Lane<'_>,
        queue: &mut SubmissionQueue,
        entry: SubmissionEntry,
        aborted: bool,
    ) {
        let verdict = if aborted {
            Verdict { fate: Fate::Abort, ..Verdict::default() }
        } else if self.faults.commands_armed() {
            self.faults.judge(lane.qid, &entry)
        } else {
            Verdict::default()
        };
        match verdict.wait {
            Wait::No => self.run_judged(lane, queue, entry, verdict),
            Wait::For(time) => {
                let due = self.now_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
                queue.deferred.at(due, Deferred::Execute(Box::new(WaitingCommand { entry, verdict })));
            }
            Wait::Release { rule, releases, abort } => {
                queue.deferred.hold(rule, releases, abort, WaitingCommand { entry, verdict });
            }
        }
    }

    /// Does what has become due, as far as there is room for completions; returns how much that was.
    #[cold]
    pub(crate) fn run_deferred(&self, lane: &mut Lane<'_>, queue: &mut SubmissionQueue) -> u32 {
        let mut done = 0;
        queue.deferred.let_go(|rule, releases| self.faults.may_go(rule, releases));
        let now = self.now_ns();
        while queue.unposted.is_none() && self.is_ready() {
            match queue.deferred.pop_due(now) {
                Some(Deferred::Execute(waiting)) => {
                    queue.view.refresh();
                    self.run_judged(lane, queue, waiting.entry, waiting.verdict);
                }
                Some(Deferred::Post(entry, forgery)) => self.post(lane, queue, entry, forgery),
                None => break,
            }
            done += 1;
        }
        lane.slot.set_due_ns(queue.deferred.next_due_ns());
        done
    }

    fn run_judged(
        &self,
        lane: &mut Lane<'_>,
        queue: &mut SubmissionQueue,
        entry: SubmissionEntry,
        mut verdict: Verdict,
    ) {
        let result = match verdict.fate {
            Fate::Vanish => return,
            Fate::Fatal => return self.fail("a fault rule says so"),
            Fate::Remove => return self.vanish(),
            Fate::Skip => Ok(Outcome::Done(0)),
            Fate::Refuse(status) => {
                lock(&self.admin).log_error(lane.qid, &entry, status);
                return self.complete_late(lane, queue, &entry, (0, status), &verdict);
            }
            Fate::Abort => Err(StatusCode::ABORT_REQUESTED),
            Fate::Execute => self.execute_spoiled(lane, queue, entry, &mut verdict),
        };
        let mut done = match result {
            Ok(Outcome::Held) => return,
            Ok(Outcome::Done(dw0)) => (dw0, Status::SUCCESS),
            Err(code) => (0, self.command_failed(lane.qid, &entry, code)),
        };
        if let Some(status) = verdict.status_after
            && done.1.is_success()
        {
            lock(&self.admin).log_error(lane.qid, &entry, status);
            done = (0, status);
        }
        if !verdict.lose_completion {
            self.complete_late(lane, queue, &entry, done, &verdict);
        }
    }

    /// Executes a command as the verdict alters it.
    fn execute_spoiled(
        &self,
        lane: &Lane<'_>,
        queue: &mut SubmissionQueue,
        mut entry: SubmissionEntry,
        verdict: &mut Verdict,
    ) -> Result<Outcome, StatusCode> {
        if let Some(delta) = verdict.lba_delta
            && blocks_of(lane.qid, &entry).is_some()
        {
            let slba = entry.read_write().slba.wrapping_add_signed(delta);
            entry.cdw10.set(slba as u32);
            entry.cdw11.set((slba >> 32) as u32);
        }
        if verdict.ignore_fua && lane.qid != 0 && entry.opcode == NvmOpcode::WRITE.0 {
            entry.cdw12.set(entry.cdw12.get() & !FUA);
        }
        if verdict.keep_old {
            self.keep_old(lane.qid, &entry);
        }
        if !verdict.stale.is_empty() {
            let block = self.namespace(entry.namespace_id())?.bytes_of(1) as usize;
            for (index, contents) in verdict.stale.drain(..) {
                verdict.data.patch(index as usize * block, contents);
            }
        }
        if let Some(sectors) = verdict.torn_sectors
            && lane.qid != 0
            && entry.opcode == NvmOpcode::WRITE.0
        {
            self.tear(&entry, sectors, verdict)?;
        }
        if !verdict.data.is_empty() {
            let faults = std::mem::take(&mut verdict.data);
            queue.diversion = Some(Box::new(Diversion::new(&self.dma, faults)));
        }
        let result = self.execute(lane.qid, lane.slot, queue, &entry);
        if let Some(diversion) = queue.diversion.take()
            && result.is_ok()
        {
            diversion.finish(&mut queue.view);
        }
        result
    }

    /// Has a write store the old contents again beyond its first `sectors` sectors. The command keeps its length: its PRPs
    /// would mean something else with another one.
    fn tear(&self, entry: &SubmissionEntry, sectors: u64, verdict: &mut Verdict) -> Result<(), StatusCode> {
        let namespace = self.namespace(entry.namespace_id())?;
        let command = entry.read_write();
        let whole = namespace.range(command.slba, u64::from(command.dw12.blocks_z()) + 1)?;
        let keep = sectors.saturating_mul(SECTOR);
        if keep < whole.len {
            self.check_mdts(whole.len)?;
            let mut old = vec![0; (whole.len - keep) as usize];
            namespace.peek(whole.offset + keep, &mut old)?;
            verdict.data.patch(keep as usize, old.into());
        }
        Ok(())
    }

    /// Remembers the contents of the blocks that a command is about to overwrite, for stale reads.
    fn keep_old(&self, qid: u16, entry: &SubmissionEntry) {
        let nsid = entry.nsid.get();
        let Ok(namespace) = self.namespace(NamespaceId::new(nsid)) else { return };
        for lba in blocks_of(qid, entry).into_iter().flatten() {
            let Ok(range) = namespace.range(lba, 1) else { return };
            let mut old = vec![0; range.len as usize];
            if namespace.peek(range.offset, &mut old).is_ok() {
                self.faults.keep_old(nsid, lba, &old);
            }
        }
    }

    /// Completes a command now, or when the latency model says.
    fn complete_late(
        &self,
        lane: &mut Lane<'_>,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
        (dw0, status): (u32, Status),
        verdict: &Verdict,
    ) {
        let done = completion_entry(lane.qid, queue.head(), entry.cid.get(), dw0, status);
        match self.latency.due_ns(lane.qid, NvmOpcode(entry.opcode), || self.now_ns()) {
            Some(due) => queue.deferred.at(due, Deferred::Post(done, verdict.forgery)),
            None => self.post(lane, queue, done, verdict.forgery),
        }
    }

    /// Posts a completion, falsified if there is a forgery. What finds no room is posted later.
    fn post(
        &self,
        lane: &mut Lane<'_>,
        queue: &mut SubmissionQueue,
        mut entry: CompletionEntry,
        forgery: Option<Forgery>,
    ) {
        entry.sq_head.set(queue.head() as u16);
        let Some(forgery) = forgery else { return self.complete(lane, queue, entry) };
        if let Some(fault) = forgery.cid {
            entry.cid.set(forged_cid(fault, lane, queue, entry.cid.get()));
        }
        if let Some(id) = forgery.sq_id {
            entry.sq_id.set(id);
        }
        if let Some(head) = forgery.sq_head {
            entry.sq_head.set(head);
        }
        if forgery.stale_phase {
            let posted = lane.completion.post_as(entry, PhaseTag::Stale, Overrun::Never);
            self.note_posted(lane, queue, entry, posted);
        } else {
            self.complete(lane, queue, entry);
        }
        if forgery.duplicate {
            if queue.unposted.is_none() {
                self.complete(lane, queue, entry);
            } else {
                queue.deferred.at(0, Deferred::Post(entry, None));
            }
        }
        for _ in 0..forgery.extra {
            let posted = lane.completion.post_as(entry, PhaseTag::Right, Overrun::Allowed);
            self.note_posted(lane, queue, entry, posted);
        }
    }

    /// Has every queue looked at, for what was held there.
    pub(crate) fn wake_all(&self) {
        for (qid, slot) in (0..).zip(&self.submission) {
            if slot.exists() {
                slot.kick();
                self.notify(qid);
            }
        }
    }
}

fn forged_cid(fault: CidFault, lane: &Lane<'_>, queue: &mut SubmissionQueue, own: u16) -> u16 {
    match fault {
        CidFault::OutOfRange => u16::MAX,
        CidFault::Exact(cid) => cid,
        CidFault::Stale => queue.last_cid.unwrap_or(own.wrapping_sub(1)),
        CidFault::NotInFlight => {
            let mut cid = own.wrapping_add(1);
            // Ends: a queue holds fewer commands than there are identifiers.
            while cid != own && (queue.deferred.contains(cid) || queue.is_waiting(lane.slot, cid)) {
                cid = cid.wrapping_add(1);
            }
            cid
        }
    }
}
