//! Fault rules: which commands go wrong, when, and how.
//!
//! Owns: the language of rules ([`FaultRule`], [`CommandMatch`], [`Effect`], [`RegisterFault`]) and the handle that tests
//! use ([`FaultPlan`]). In submodules: the rules in force (`book`), commands that wait (`deferred`), what happens to a
//! command's data (`diversion`), the path of a command that a rule met (`detour`).
//!
//! Invariants:
//! - while there is no rule the I/O path pays one relaxed load for each command, and register reads one each;
//! - rules are looked at in the order they were added; all that match a command apply to it, and of two that contradict
//!   each other the older wins;
//! - a command that a rule keeps waiting vanishes in a reset, as any other.
//!
//! Excludes: power cuts (`power_cut`), time that every command takes (`latency`).

pub(crate) mod book;
pub(crate) mod deferred;
mod detour;
pub(crate) mod diversion;
mod registers;

use std::ops::Range;
use std::time::Duration;

use nvme_spec::{AdminOpcode, NvmOpcode, Status, SubmissionEntry};

use crate::controller::Core;
pub use book::RuleId;
pub use registers::{AllOnesRegister, ReadyDelay, RegisterFault};

/// Which submission queues a rule is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueMatch {
    /// All.
    #[default]
    Any,
    /// The admin queue.
    Admin,
    /// The I/O queues.
    Io,
    /// This one.
    Id(u16),
}

/// Which commands a rule is for: those that fit every field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandMatch {
    /// The queue.
    pub queue: QueueMatch,
    /// The opcode; name a kind of queue with it, as admin and I/O opcodes overlap.
    pub opcode: Option<u8>,
    /// The namespace identifier.
    pub nsid: Option<u32>,
    /// The command carries a range of blocks that overlaps this one: read, write, write uncorrectable, compare, write
    /// zeroes and verify on an I/O queue. Ranges within data (deallocate, copy) are not looked at.
    pub lbas: Option<Range<u64>>,
    /// Low byte of dword 10: CNS of an Identify, the page of a Get Log Page, the feature of Get and Set Features.
    pub selector: Option<u8>,
}

impl CommandMatch {
    /// Every command.
    pub fn any() -> Self {
        Self::default()
    }

    /// Admin commands of this opcode.
    pub fn admin(opcode: AdminOpcode) -> Self {
        Self { queue: QueueMatch::Admin, opcode: Some(opcode.0), ..Self::default() }
    }

    /// I/O commands of this opcode.
    pub fn io(opcode: NvmOpcode) -> Self {
        Self { queue: QueueMatch::Io, opcode: Some(opcode.0), ..Self::default() }
    }

    /// Only on this queue.
    #[must_use]
    pub fn on_queue(mut self, queue: QueueMatch) -> Self {
        self.queue = queue;
        self
    }

    /// Only with this namespace identifier.
    #[must_use]
    pub fn on_namespace(mut self, nsid: u32) -> Self {
        self.nsid = Some(nsid);
        self
    }

    /// Only if blocks of this range are concerned.
    #[must_use]
    pub fn on_lbas(mut self, lbas: Range<u64>) -> Self {
        self.lbas = Some(lbas);
        self
    }

    /// Only with this low byte of dword 10.
    #[must_use]
    pub fn selecting(mut self, selector: u8) -> Self {
        self.selector = Some(selector);
        self
    }

    fn matches(&self, qid: u16, entry: &SubmissionEntry) -> bool {
        let queue = match self.queue {
            QueueMatch::Any => true,
            QueueMatch::Admin => qid == 0,
            QueueMatch::Io => qid != 0,
            QueueMatch::Id(id) => qid == id,
        };
        let lbas = self.lbas.as_ref().is_none_or(|wanted| {
            blocks_of(qid, entry).is_some_and(|has| has.start < wanted.end && wanted.start < has.end)
        });
        queue
            && lbas
            && self.opcode.is_none_or(|opcode| opcode == entry.opcode)
            && self.nsid.is_none_or(|nsid| nsid == entry.nsid.get())
            && self.selector.is_none_or(|selector| selector == entry.cdw10.get() as u8)
    }
}

/// The blocks that a command names in its own dwords.
fn blocks_of(qid: u16, entry: &SubmissionEntry) -> Option<Range<u64>> {
    let has_range = matches!(
        NvmOpcode(entry.opcode),
        NvmOpcode::READ
            | NvmOpcode::WRITE
            | NvmOpcode::WRITE_UNCORRECTABLE
            | NvmOpcode::COMPARE
            | NvmOpcode::WRITE_ZEROES
            | NvmOpcode::VERIFY
    );
    (qid != 0 && has_range).then(|| {
        let command = entry.read_write();
        command.slba..command.slba.saturating_add(u64::from(command.dw12.blocks_z()) + 1)
    })
}

/// How often a rule acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Times {
    /// On one command.
    #[default]
    Once,
    /// On so many.
    N(u64),
    /// On all.
    Forever,
}

/// Before or after the command did what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It has no effect.
    BeforeExecution,
    /// It has its effect, and is then said to have failed.
    AfterExecution,
}

/// What an Abort of a held command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldAbort {
    /// The command completes as aborted.
    Obeyed,
    /// "Not aborted": the command stays held.
    Ignored,
}

/// Which command identifier a forged completion carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CidFault {
    /// 0xFFFF, beyond the slots of any driver.
    OutOfRange,
    /// One that no waiting or held command of the queue has.
    NotInFlight,
    /// That of the queue's last completion before this one.
    Stale,
    /// This one.
    Exact(u16),
}

/// What a rule does to a command. All effects on data apply to commands that succeed; those marked *read* act on what
/// the controller returns (reads, identify data, log pages), those marked *write* on what it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Lost on the way in: not executed, never completes, cannot be aborted.
    Drop,
    /// Lost on the way out: executed, never completes.
    LoseCompletion,
    /// Neither executed nor completed before [`FaultPlan::release`], or before the rule is removed.
    Hold {
        /// What an Abort does to it.
        abort: HeldAbort,
    },
    /// Neither executed nor completed before so much time has passed, without holding up others: real time with
    /// threads, otherwise that of [`advance`](crate::EmulatedController::advance). An Abort finds it.
    Delay(Duration),
    /// Completes with this status.
    Status {
        /// Code, DNR, CRD, More.
        status: Status,
        /// Whether it has an effect all the same.
        when: When,
    },
    /// The completion names another command.
    CompletionCid(CidFault),
    /// The completion names this submission queue.
    CompletionSqId(u16),
    /// The completion carries this submission queue head.
    CompletionSqHead(u16),
    /// The completion takes its slot with the phase tag of the round before, so that it is not seen.
    StalePhase,
    /// The completion is posted twice.
    Duplicate,
    /// The completion is posted so many more times, whether or not there is room.
    Extra(u32),
    /// Only the first so many bytes are transferred; *write*: zeroes take the place of the rest.
    ShortTransfer {
        /// Bytes transferred.
        bytes: usize,
    },
    /// Nothing is transferred; *write*: zeroes are stored.
    NoTransfer,
    /// All pieces of the data are looked for so far away. What is not mapped there is a DMA fault, and transfers nothing.
    MisplacedTransfer {
        /// Bytes to add to each device address.
        iova_delta: i64,
    },
    /// The transfer goes where nothing is mapped: a DMA fault is recorded and the command succeeds, as controllers
    /// that do not hear of the fault have it. *Write*: zeroes are stored.
    OutsideMapping,
    /// One bit is flipped, *read* on its way to the host, *write* before it is stored.
    CorruptData {
        /// Byte of the data.
        byte: usize,
        /// Bit of the byte, 0 to 7.
        bit: u8,
    },
    /// Bytes of the data are replaced: hostile identify data, log pages and contents.
    PatchData {
        /// First byte of the data to replace; what lies beyond its end is left out.
        offset: usize,
        /// What to put there.
        bytes: Vec<u8>,
    },
    /// Succeeds and does nothing: a lost write, a deallocate or write zeroes ignored.
    LoseWrite,
    /// A write that stores its first sectors only, and succeeds.
    TearWrite {
        /// Sectors of 512 bytes that are stored.
        sectors: u64,
    },
    /// The command works so many blocks away (a misdirected write, or read).
    MisdirectWrite {
        /// Blocks to add to the starting LBA; it wraps.
        lba_delta: i64,
    },
    /// *Read*: blocks written (or zeroed) since the rule was added read as they were before their last write. At most
    /// [`MAX_STALE_BLOCKS`] are remembered.
    StaleRead,
    /// A flush succeeds and makes nothing durable; FUA of a write is ignored.
    LyingFlush,
    /// CSTS.CFS is set in place of the command's execution, and nothing more is executed before a reset.
    FatalStatus,
    /// Surprise removal in place of the command's execution.
    Remove,
}

/// Blocks whose former contents one [`Effect::StaleRead`] remembers.
pub const MAX_STALE_BLOCKS: usize = 16_384;

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// The commands it is for.
    pub on: CommandMatch,
    /// Commands that fit and are left alone first.
    pub skip: u64,
    /// How often it acts after that.
    pub times: Times,
    /// What it does.
    pub effect: Effect,
}

impl FaultRule {
    /// Acts on the first command that fits.
    pub fn new(on: CommandMatch, effect: Effect) -> Self {
        Self { on, skip: 0, times: Times::Once, effect }
    }

    /// Leaves the first `commands` that fit alone.
    #[must_use]
    pub fn skip(mut self, commands: u64) -> Self {
        self.skip = commands;
        self
    }

    /// Acts so often.
    #[must_use]
    pub fn times(mut self, times: Times) -> Self {
        self.times = times;
        self
    }
}

/// The rules of one controller. They survive resets, power cuts and removal.
#[derive(Clone, Copy)]
pub struct FaultPlan<'a> {
    core: &'a Core,
}

impl<'a> FaultPlan<'a> {
    pub(crate) fn new(core: &'a Core) -> Self {
        Self { core }
    }

    /// Adds a rule, behind those there are. It holds for every command fetched from now on.
    pub fn add(&self, rule: FaultRule) -> RuleId {
        self.core.faults.add(rule)
    }

    /// Adds a fault of the registers.
    pub fn add_register(&self, fault: RegisterFault) -> RuleId {
        self.core.faults.add_register(fault, self.core.now_ns())
    }

    /// Ends a rule. Commands that it held are released; a reset that it prevented takes place.
    pub fn remove(&self, id: RuleId) {
        self.core.faults.remove(id);
        self.core.wake_all();
        self.core.rethink_cc();
    }

    /// Ends all rules, as [`remove`](Self::remove) does each.
    pub fn clear(&self) {
        self.core.faults.clear();
        self.core.wake_all();
        self.core.rethink_cc();
    }

    /// Lets the commands go that the rule holds now: they are executed and complete. Later ones are held again if the
    /// rule still acts.
    pub fn release(&self, id: RuleId) {
        self.core.faults.release(id);
        self.core.wake_all();
    }

    /// How often a rule has acted; 0 if there is none.
    pub fn fired(&self, id: RuleId) -> u64 {
        self.core.faults.fired(id)
    }
}
