//! The rules in force, and what they say about a command.
//!
//! Owns: [`FaultBook`] (all rules of a controller), [`Verdict`] (what they make of one command).
//!
//! Invariants: `commands_armed` is true whenever a rule could act on a command or must see it go by; likewise
//! `registers_armed`. The book's lock is a leaf: nothing is executed or posted, and no other lock taken, under it.
//!
//! Memory ordering: `commands_armed` and `registers_armed` are relaxed. The doorbell orders: it is rung (a release) after
//! `add` returned, and the flag is looked at after the fetch that acquires the tail.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme_spec::{NvmOpcode, Status, SubmissionEntry};

use super::diversion::DataFaults;
use super::registers::ActiveRegisterFault;
use super::{
    CidFault, Effect, FaultRule, HeldAbort, MAX_STALE_BLOCKS, RegisterFault, Times, When, blocks_of,
};
use crate::locks::lock;

/// Names a rule of one controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId(u64);

/// Former contents of blocks, by namespace and block.
type OldBlocks = HashMap<(u32, u64), Box<[u8]>>;

#[derive(Debug)]
struct ActiveRule {
    id: RuleId,
    rule: FaultRule,
    /// Commands that fitted so far.
    seen: u64,
    fired: u64,
    /// Goes up with each release; commands held before it go.
    releases: u64,
    old: OldBlocks,
}

impl ActiveRule {
    fn is_spent(&self) -> bool {
        match self.rule.times {
            Times::Once => self.fired >= 1,
            Times::N(times) => self.fired >= times,
            Times::Forever => false,
        }
    }

    fn is_stale_read(&self) -> bool {
        self.rule.effect == Effect::StaleRead
    }

    /// Counts a command that may fit; whether the rule acts on it.
    fn acts_on(&mut self, qid: u16, entry: &SubmissionEntry) -> bool {
        if self.is_spent() || !self.rule.on.matches(qid, entry) {
            return false;
        }
        self.seen += 1;
        let acts = self.seen > self.rule.skip;
        self.fired += u64::from(acts);
        acts
    }
}

#[derive(Debug, Default)]
struct Rules {
    next_id: u64,
    commands: Vec<ActiveRule>,
    registers: Vec<ActiveRegisterFault>,
}

impl Rules {
    fn new_id(&mut self) -> RuleId {
        self.next_id += 1;
        RuleId(self.next_id)
    }
}

/// All rules of a controller.
#[derive(Debug, Default)]
pub(crate) struct FaultBook {
    commands_armed: AtomicBool,
    registers_armed: AtomicBool,
    rules: Mutex<Rules>,
}

/// What becomes of a command as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is executed.
    #[default]
    Execute,
    /// Completes with success, with nothing done.
    Skip,
    /// Completes with this status, with nothing done.
    Refuse(Status),
    /// Completes as aborted.
    Abort,
    /// Never completes.
    Vanish,
    /// The controller fails.
    Fatal,
    /// The device is removed.
    Remove,
}

/// What a command waits for first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Wait {
    #[default]
    No,
    For(Duration),
    Release {
        rule: RuleId,
        releases: u64,
        abort: HeldAbort,
    },
}

/// How a completion is falsified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forgery {
    pub(super) cid: Option<CidFault>,
    pub(super) sq_id: Option<u16>,
    pub(super) sq_head: Option<u16>,
    pub(super) stale_phase: bool,
    pub(super) duplicate: bool,
    pub(super) extra: u32,
}

/// What the rules make of a command.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(super) fate: Fate,
    pub(super) wait: Wait,
    pub(super) data: DataFaults,
    pub(super) lba_delta: Option<i64>,
    pub(super) torn_sectors: Option<u64>,
    pub(super) ignore_fua: bool,
    pub(super) status_after: Option<Status>,
    pub(super) lose_completion: bool,
    pub(super) forgery: Option<Forgery>,
    /// Old contents must be kept of what this command overwrites.
    pub(super) keep_old: bool,
    /// Blocks to return in place of the stored ones: index in the command's range, contents.
    pub(super) stale: Vec<(u64, Box<[u8]>)>,
}

impl Verdict {
    fn decide(&mut self, fate: Fate) {
        if self.fate == Fate::Execute {
            self.fate = fate;
        }
    }

    fn wait(&mut self, wait: Wait) {
        if self.wait == Wait::No {
            self.wait = wait;
        }
    }

    fn apply(&mut self, active: &ActiveRule, qid: u16, entry: &SubmissionEntry) {
        let forgery = |verdict: &mut Self, change: &dyn Fn(&mut Forgery)| {
            change(verdict.forgery.get_or_insert_default());
        };
        match &active.rule.effect {
            Effect::Drop => self.decide(Fate::Vanish),
            Effect::LoseCompletion => self.lose_completion = true,
            Effect::Hold { abort } => {
                self.wait(Wait::Release { rule: active.id, releases: active.releases, abort: *abort });
            }
            Effect::Delay(time) => self.wait(Wait::For(*time)),
            Effect::Status { status, when: When::BeforeExecution } => self.decide(Fate::Refuse(*status)),
            Effect::Status { status, when: When::AfterExecution } => {
                self.status_after.get_or_insert(*status);
            }
            Effect::CompletionCid(cid) => forgery(self, &|f| f.cid = f.cid.or(Some(*cid))),
            Effect::CompletionSqId(id) => forgery(self, &|f| f.sq_id = f.sq_id.or(Some(*id))),
            Effect::CompletionSqHead(head) => forgery(self, &|f| f.sq_head = f.sq_head.or(Some(*head))),
            Effect::StalePhase => forgery(self, &|f| f.stale_phase = true),
            Effect::Duplicate => forgery(self, &|f| f.duplicate = true),
            Effect::Extra(n) => forgery(self, &|f| f.extra += n),
            Effect::LoseWrite => self.decide(Fate::Skip),
            Effect::TearWrite { sectors } => {
                self.torn_sectors.get_or_insert(*sectors);
            }
            Effect::MisdirectWrite { lba_delta } => {
                self.lba_delta.get_or_insert(*lba_delta);
            }
            Effect::StaleRead => self.read_stale(active, qid, entry),
            Effect::LyingFlush if entry.opcode == NvmOpcode::FLUSH.0 && qid != 0 => self.decide(Fate::Skip),
            Effect::LyingFlush => self.ignore_fua = true,
            Effect::FatalStatus => self.decide(Fate::Fatal),
            Effect::Remove => self.decide(Fate::Remove),
            Effect::ShortTransfer { .. }
            | Effect::NoTransfer
            | Effect::MisplacedTransfer { .. }
            | Effect::OutsideMapping
            | Effect::CorruptData { .. }
            | Effect::PatchData { .. } => self.data.add(&active.rule.effect),
        }
    }

    fn read_stale(&mut self, active: &ActiveRule, qid: u16, entry: &SubmissionEntry) {
        if entry.opcode != NvmOpcode::READ.0 {
            return;
        }
        for lba in blocks_of(qid, entry).into_iter().flatten() {
            if let Some(old) = active.old.get(&(entry.nsid.get(), lba)) {
                self.stale.push((lba - entry.read_write().slba, old.clone()));
            }
        }
    }
}

impl FaultBook {
    /// Whether commands must be shown to [`judge`](Self::judge).
    #[inline]
    pub(crate) fn commands_armed(&self) -> bool {
        self.commands_armed.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn registers_armed(&self) -> bool {
        self.registers_armed.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, rule: FaultRule) -> RuleId {
        let mut rules = lock(&self.rules);
        let id = rules.new_id();
        rules.commands.push(ActiveRule {
            id,
            rule,
            seen: 0,
            fired: 0,
            releases: 0,
            old: OldBlocks::default(),
        });
        self.commands_armed.store(true, Ordering::Relaxed);
        id
    }

    pub(super) fn add_register(&self, fault: RegisterFault, now_ns: u64) -> RuleId {
        let mut rules = lock(&self.rules);
        let id = rules.new_id();
        rules.registers.push(ActiveRegisterFault::new(id, fault, now_ns));
        self.registers_armed.store(true, Ordering::Relaxed);
        id
    }

    pub(super) fn remove(&self, id: RuleId) {
        let mut rules = lock(&self.rules);
        rules.commands.retain(|active| active.id != id);
        rules.registers.retain(|active| active.id != id);
        self.rearm(&rules);
    }

    pub(super) fn clear(&self) {
        let mut rules = lock(&self.rules);
        rules.commands.clear();
        rules.registers.clear();
        self.rearm(&rules);
    }

    fn rearm(&self, rules: &Rules) {
        let needed = |active: &ActiveRule| !active.is_spent();
        self.commands_armed.store(rules.commands.iter().any(needed), Ordering::Relaxed);
        self.registers_armed.store(!rules.registers.is_empty(), Ordering::Relaxed);
    }

    pub(super) fn release(&self, id: RuleId) {
        if let Some(active) = lock(&self.rules).commands.iter_mut().find(|active| active.id == id) {
            active.releases += 1;
        }
    }

    pub(super) fn fired(&self, id: RuleId) -> u64 {
        let rules = lock(&self.rules);
        let command = rules.commands.iter().find(|active| active.id == id).map(|active| active.fired);
        let register = || rules.registers.iter().find(|active| active.id == id).map(|active| active.fired);
        command.or_else(register).unwrap_or(0)
    }

    /// Whether a command held by `rule` after so many releases may go: there was another, or the rule is gone.
    pub(super) fn may_go(&self, rule: RuleId, releases: u64) -> bool {
        let rules = lock(&self.rules);
        rules.commands.iter().find(|active| active.id == rule).is_none_or(|active| active.releases > releases)
    }

    /// What the rules make of a command. Each call counts as one command.
    pub(super) fn judge(&self, qid: u16, entry: &SubmissionEntry) -> Verdict {
        let mut rules = lock(&self.rules);
        let mut verdict = Verdict::default();
        let overwrites =
            qid != 0 && matches!(NvmOpcode(entry.opcode), NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES);
        let mut spent = false;
        for active in &mut rules.commands {
            verdict.keep_old |= overwrites && active.is_stale_read() && !active.is_spent();
            if active.is_stale_read() && entry.opcode != NvmOpcode::READ.0 {
                continue; // only reads count
            }
            if active.acts_on(qid, entry) {
                verdict.apply(active, qid, entry);
                spent |= active.is_spent();
            }
        }
        if spent {
            self.rearm(&rules);
        }
        verdict
    }

    /// Remembers what a block holds that is about to be overwritten.
    pub(super) fn keep_old(&self, nsid: u32, lba: u64, contents: &[u8]) {
        for active in &mut lock(&self.rules).commands {
            let known = active.old.contains_key(&(nsid, lba));
            if active.is_stale_read() && (known || active.old.len() < MAX_STALE_BLOCKS) {
                active.old.insert((nsid, lba), contents.into());
            }
        }
    }

    /// What a read of the 32 bits at `offset` of BAR0, which would give `value`, gives.
    #[cold]
    pub(crate) fn distort(&self, offset: u64, value: u32, now_ns: u64) -> u32 {
        let mut rules = lock(&self.rules);
        rules.registers.iter_mut().fold(value, |value, active| active.distort(offset, value, now_ns))
    }

    /// Whether such a fault is in force; counts as acting.
    pub(crate) fn register_fault(&self, wanted: RegisterFault) -> bool {
        if !self.registers_armed() {
            return false;
        }
        let mut rules = lock(&self.rules);
        let found = rules.registers.iter_mut().find(|active| active.fault == wanted);
        found.map(|active| active.fired += 1).is_some()
    }

    /// The controller was enabled.
    pub(crate) fn enabled(&self, now_ns: u64) {
        if self.registers_armed() {
            lock(&self.rules).registers.iter_mut().for_each(|active| active.enabled(now_ns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::CommandMatch;
    use nvme_spec::NamespaceId;

    fn flush() -> SubmissionEntry {
        SubmissionEntry::flush(NamespaceId::new(1))
    }

    #[test]
    fn rules_that_can_act_no_more_cost_nothing() {
        let book = FaultBook::default();
        assert!(!book.commands_armed());
        let id = book.add(FaultRule::new(CommandMatch::any(), Effect::Drop).times(Times::N(2)));
        for _ in 0..2 {
            assert!(book.commands_armed());
            assert_eq!(book.judge(1, &flush()).fate, Fate::Vanish);
        }
        assert!(!book.commands_armed());
        assert_eq!(book.fired(id), 2);
        let register = book.add_register(RegisterFault::NeverReady, 0);
        assert!(book.registers_armed());
        book.remove(register);
        assert!(!book.registers_armed());
    }

    #[test]
    fn memory_of_stale_reads_is_bounded_and_blocks_in_it_stay_current() {
        let book = FaultBook::default();
        book.add(FaultRule::new(CommandMatch::any(), Effect::StaleRead).times(Times::Forever));
        for lba in 0..MAX_STALE_BLOCKS as u64 + 5 {
            book.keep_old(1, lba, &[1]);
        }
        book.keep_old(1, 3, &[2]);
        let read = |slba| book.judge(1, &SubmissionEntry::read(NamespaceId::new(1), slba, 0)).stale;
        assert_eq!(read(3), [(0, Box::from([2_u8]))]);
        assert!(read(MAX_STALE_BLOCKS as u64).is_empty());
    }

    #[test]
    fn held_command_may_go_after_a_release_that_came_after_it() {
        let book = FaultBook::default();
        let hold = Effect::Hold { abort: HeldAbort::Obeyed };
        let id = book.add(FaultRule::new(CommandMatch::any(), hold).times(Times::Forever));
        book.release(id);
        let Wait::Release { rule, releases, .. } = book.judge(1, &flush()).wait else { panic!() };
        assert!(!book.may_go(rule, releases), "that release was not for it");
        book.release(id);
        assert!(book.may_go(rule, releases));
    }
}
