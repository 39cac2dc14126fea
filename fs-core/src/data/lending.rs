//! Lending between shards: what a clone asks of its source's shard, and how blocks go back to their owner.
//!
//! Owns: [`LendingChange`], the parts of transactions that lend, borrow and give back; [`LendingCall`], the questions of
//! a clone whose source lives on another shard; the locks that are held here for such clones; the task that gives back
//! what nobody uses any more.
//!
//! | transaction | on the owner of the blocks | on the borrower |
//! |---|---|---|
//! | a slice of a clone | [`LendingChange::Lend`] what the borrower has not | [`LendingChange::Borrow`] |
//! | giving back | [`LendingChange::TakeBack`] | [`LendingChange::EndReturns`] |
//! | relocation of what is lent (`lending/moving.rs`) | [`LendingChange::LendCopy`] | [`LendingChange::Receive`] |
//!
//! A borrower decides what it lacks, and what it gives back, under a lock of its own ([`Lending::turn`]): between the
//! decision and the commit nothing is lent to it and nothing taken back, so both sides go by the same facts. What else
//! happens to borrowed blocks meanwhile (the last reference goes, a clone within the shard adds one) only turns runs
//! into returns, and a clone takes a return for what it is: blocks that are there.
//!
//! Invariants:
//! - reads of borrowed blocks ask nobody: the borrower has their checksums, and the owner keeps the blocks until they
//!   have been given back;
//! - whoever waits here for another shard holds no lock of a class that the answer needs.
//!
//! # Legal crash outcomes
//! Both sides of each transaction or none. Returns that were not given back are taken up by the next mount.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use crate::alloc::Priority;
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::locks::{Guard, InodeClass, LockClass, LockOrder, MmapClass, RangeClass, WholeLock};
use crate::namespace::inode::store;
use crate::namespace::transaction::TransactionId;
use crate::planted::{Bug, is_planted};
use crate::shard::message::{PeerCall, PeerReply};
use crate::shard::relocate::lent::{MoveCall, MoveReply};
use crate::shard::signal::Signal;
use crate::shard::{Inode, Shard};
use crate::types::{Generation, InodeNr, ShardId};

use super::apply::{MmapLock, load_regular};
use super::extent_map::ItemBudget;
use super::extent_map::lend::{
    Blocks, CopyPiece, PARTS_AT_ONCE, Piece, borrow, end_return, first_returns, lend, lend_copy, pieces,
    receive, take_back,
};
use super::file::pages_of;

mod moving;

use self::moving::Moving;

/// Items of a part of a transaction that lends or borrows, at most; what is planned keeps well below, because runs may be
/// split by others until the commit.
const PART_ITEMS: u32 = 112;

/// Items at which taking back has enough.
const ENOUGH_ITEMS: u32 = 48;

/// Items that lending one piece changes: its run and what remains on both sides, the borrower's extent and its
/// back-reference, and room for a run that was split meanwhile.
const LEND_ITEMS: u32 = 7;

/// Pieces that are lent at once.
const PIECES_AT_ONCE: usize = PARTS_AT_ONCE;

const _: () = assert!(PARTS_AT_ONCE as u32 * LEND_ITEMS <= PART_ITEMS);

/// Returns that are given back at once.
const RETURNS_AT_ONCE: usize = 16;

/// The borrower's turn: see the module documentation. Comes after the range lock that a clone holds.
pub(super) enum LendingClass {}

impl LockClass for LendingClass {
    const RANK: u8 = 4;
    const NAME: &'static str = "turn to borrow";
}

const _: () = assert!(RangeClass::RANK < LendingClass::RANK, "a clone takes its turn with its ranges locked");

/// A shard's part in lending.
pub(crate) struct Lending {
    turn: WholeLock<LendingClass>,
    locked: RefCell<HashMap<TransactionId, LockedSource>>,
    /// What relocations of other shards hold here.
    moving: RefCell<HashMap<TransactionId, Moving>>,
    /// There may be returns.
    due: Cell<bool>,
    giving_back: Cell<bool>,
    wake: Signal,
    rested: Signal,
}

/// A file that a clone of another shard reads from. Fields are dropped in order.
struct LockedSource {
    mmap: Option<Guard<MmapClass>>,
    inode_lock: Guard<InodeClass>,
    inode: Rc<Inode>,
    order: LockOrder,
}

impl Default for Lending {
    fn default() -> Self {
        Self {
            turn: WholeLock::new(InodeNr::new(0)),
            locked: RefCell::default(),
            moving: RefCell::default(),
            due: Cell::new(false),
            giving_back: Cell::new(false),
            wake: Signal::default(),
            rested: Signal::default(),
        }
    }
}

/// One shard's part of a transaction that moves blocks between shards' accounts.
#[derive(Clone, Debug)]
pub(crate) enum LendingChange {
    /// The owner lends what an object of its has in some ranges.
    Lend {
        /// Shard that owns the blocks.
        owner: ShardId,
        /// Through which of its objects they are known: a file, or another borrower.
        via: InodeNr,
        /// Ranges of that object, whole blocks.
        ranges: Vec<Range<u64>>,
        /// Who borrows.
        borrower: ShardId,
    },
    /// A file gets extents of blocks that are another shard's.
    Borrow {
        /// File.
        target: InodeNr,
        /// Pieces, each with its file offset in the target.
        pieces: Vec<(u64, Piece)>,
    },
    /// The owner lends a copy of what it has lent.
    LendCopy {
        /// Shard that owns the blocks.
        owner: ShardId,
        /// Who borrows.
        borrower: ShardId,
        /// Blocks that the borrower has not.
        pieces: Vec<CopyPiece>,
    },
    /// The borrower takes note of them.
    Receive {
        /// Who borrows.
        borrower: ShardId,
        /// Shard that owns the blocks.
        owner: ShardId,
        /// Blocks.
        blocks: Vec<Blocks>,
        /// Their generation.
        generation: Generation,
    },
    /// The owner takes blocks back.
    TakeBack {
        /// Shard that owns the blocks.
        owner: ShardId,
        /// Who had borrowed them.
        borrower: ShardId,
        /// Blocks.
        blocks: Vec<Blocks>,
    },
    /// The borrower has given blocks back.
    EndReturns {
        /// Shard that had borrowed them.
        borrower: ShardId,
        /// Shard that owns them.
        owner: ShardId,
        /// Blocks.
        blocks: Vec<Blocks>,
    },
}

impl LendingChange {
    /// The shard that carries it out.
    pub(crate) fn shard(&self) -> ShardId {
        match self {
            Self::Lend { owner, .. } | Self::LendCopy { owner, .. } | Self::TakeBack { owner, .. } => *owner,
            Self::Borrow { target, .. } => target.shard(),
            Self::Receive { borrower, .. } | Self::EndReturns { borrower, .. } => *borrower,
        }
    }

    /// Who lends and who borrows. Of what a file gets, its shard's counterpart says.
    fn parties(&self) -> Option<(ShardId, ShardId)> {
        match self {
            Self::Lend { owner, borrower, .. }
            | Self::LendCopy { owner, borrower, .. }
            | Self::Receive { owner, borrower, .. }
            | Self::TakeBack { owner, borrower, .. }
            | Self::EndReturns { owner, borrower, .. } => Some((*owner, *borrower)),
            Self::Borrow { .. } => None,
        }
    }

    /// Items it changes at most.
    pub(crate) fn items(&self) -> u32 {
        match self {
            Self::Lend { ranges, .. } => LEND_ITEMS * ranges.len() as u32,
            Self::LendCopy { pieces, .. } => LEND_ITEMS * pieces.len() as u32,
            Self::Receive { blocks, .. } => blocks.len() as u32,
            Self::Borrow { .. } | Self::TakeBack { .. } | Self::EndReturns { .. } => PART_ITEMS,
        }
    }

    /// Carries it out.
    ///
    /// # Errors
    /// Something is not as the other side believes.
    pub(crate) fn plan(&self, batch: &mut Batch<'_>) -> Plan<()> {
        match self {
            Self::Lend { via, ranges, borrower, .. } => {
                for range in ranges {
                    lend(batch, *via, range, *borrower)?;
                }
            }
            Self::Borrow { target, pieces } => {
                let mut record = load_regular(batch, *target)?;
                for (offset, piece) in pieces {
                    borrow(batch, *target, *offset, piece)?;
                    record.blocks += piece.blocks();
                }
                store(batch, *target, &record);
            }
            Self::LendCopy { borrower, pieces, .. } => {
                for piece in pieces {
                    lend_copy(batch, *borrower, piece)?;
                }
            }
            Self::Receive { owner, blocks, generation, .. } => {
                for blocks in blocks {
                    receive(batch, *owner, *blocks, *generation);
                }
            }
            Self::TakeBack { borrower, blocks, .. } => {
                for blocks in blocks {
                    take_back(batch, *borrower, *blocks, &mut ItemBudget::new(u32::MAX))?;
                }
            }
            Self::EndReturns { owner, blocks, .. } => {
                for blocks in blocks {
                    end_return(batch, *owner, *blocks)?;
                }
            }
        }
        Ok(())
    }
}

/// What a clone asks of its source's shard, and a borrower of an owner.
#[derive(Debug)]
pub(crate) enum LendingCall {
    /// Takes the inode lock of a source, exclusive. → [`LendingReply::Done`]
    LockInode(TransactionId, InodeNr),
    /// Takes its mmap lock too, and applies what was accepted before. → [`LendingReply::Size`]
    LockMmap(TransactionId),
    /// Writes a range of it back. → [`LendingReply::Done`]
    Flush(TransactionId, Range<u64>),
    /// Whether the extents of a range say all that is there. → [`LendingReply::Settled`]
    IsSettled(TransactionId, Range<u64>),
    /// The next pieces of a range. → [`LendingReply::Pieces`]
    Pieces(TransactionId, Range<u64>),
    /// What the device has of a range. → [`LendingReply::Bytes`]
    Bytes(TransactionId, Range<u64>),
    /// Gives the locks back. → [`LendingReply::Done`]
    Unlock(TransactionId),
    /// A file's size as programs see it. → [`LendingReply::Size`]
    Size(InodeNr),
    /// How many of each of these blocks, lent to a shard, one transaction can take back. → [`LendingReply::Counts`]
    CanTakeBack(ShardId, Vec<Blocks>),
    /// A step of moving what the asked shard has borrowed. → [`LendingReply::Moved`]
    Move(TransactionId, MoveCall),
}

/// An answer.
#[derive(Debug)]
pub(crate) enum LendingReply {
    /// Done.
    Done,
    /// Bytes of a file.
    Size(u64),
    /// Yes or no.
    Settled(bool),
    /// Pieces, and the offset up to which there are no others.
    Pieces(Vec<Piece>, u64),
    /// Contents.
    Bytes(Vec<u8>),
    /// Blocks, for each piece asked about; 0 from the first on that does not fit.
    Counts(Vec<u64>),
    /// See [`MoveReply`].
    Moved(MoveReply),
}

impl Shard {
    /// Answers a call of a peer.
    ///
    /// # Errors
    /// The operation's.
    pub(crate) async fn answer_lending(self: &Rc<Self>, call: LendingCall) -> Result<LendingReply, FsError> {
        Ok(match call {
            LendingCall::LockInode(transaction, inode) => {
                self.lock_source(transaction, inode).await;
                LendingReply::Done
            }
            LendingCall::LockMmap(transaction) => LendingReply::Size(self.settle_source(transaction).await?),
            LendingCall::Flush(transaction, range) => {
                self.flush_range(&self.source_of(transaction)?, &range).await?;
                LendingReply::Done
            }
            LendingCall::IsSettled(transaction, range) => {
                LendingReply::Settled(self.source_of(transaction)?.is_settled(&range))
            }
            LendingCall::Pieces(transaction, range) => {
                let source = self.source_of(transaction)?.nr;
                let plan = |batch: &Batch<'_>| pieces(batch, self.id, source, &range, PIECES_AT_ONCE);
                let (pieces, up_to) = self.view(plan).await?;
                LendingReply::Pieces(pieces, up_to)
            }
            LendingCall::Bytes(transaction, range) => {
                let source = self.source_of(transaction)?.nr;
                LendingReply::Bytes(self.bytes_on_device(source, &range).await?)
            }
            LendingCall::Unlock(transaction) => {
                self.unlock_source(transaction);
                LendingReply::Done
            }
            LendingCall::Size(inode) => LendingReply::Size(self.visible_size(inode).await?),
            LendingCall::CanTakeBack(borrower, blocks) => {
                LendingReply::Counts(self.can_take_back(borrower, &blocks).await?)
            }
            LendingCall::Move(transaction, call) => {
                LendingReply::Moved(self.answer_moving(transaction, call).await?)
            }
        })
    }

    /// Puts a question to `shard`.
    ///
    /// # Errors
    /// The answer's; [`FsError::NotFound`] if there is no such shard.
    pub(crate) async fn ask_lending(
        &self,
        shard: ShardId,
        call: LendingCall,
    ) -> Result<LendingReply, FsError> {
        if shard.index() >= self.volume.shard_count() {
            return Err(FsError::NotFound);
        }
        match self.call(shard, PeerCall::Lending(call)).await? {
            PeerReply::Lending(reply) => Ok(reply),
            other => Err(misanswered(&other)),
        }
    }

    async fn lock_source(&self, transaction: TransactionId, nr: InodeNr) {
        let inode = self.inode(nr);
        let mut order = LockOrder::new();
        let inode_lock = inode.lock.exclusive(&mut order).await;
        let locked = LockedSource { mmap: None, inode_lock, inode, order };
        let previous = self.data.lending.locked.borrow_mut().insert(transaction, locked);
        assert!(previous.is_none(), "a clone has one source");
    }

    async fn settle_source(self: &Rc<Self>, transaction: TransactionId) -> Result<u64, FsError> {
        let inode = self.source_of(transaction)?;
        let mut order = {
            let locked = self.data.lending.locked.borrow();
            locked.get(&transaction).ok_or(FsError::ShuttingDown)?.order.clone()
        };
        let mmap = inode.mmap_lock.exclusive(&mut order).await;
        if let Some(locked) = self.data.lending.locked.borrow_mut().get_mut(&transaction) {
            (locked.mmap, locked.order) = (Some(mmap), order.clone());
        }
        self.drain();
        self.apply_pending(&inode, &order, MmapLock::Held).await?;
        self.visible_size(inode.nr).await
    }

    fn source_of(&self, transaction: TransactionId) -> Result<Rc<Inode>, FsError> {
        let locked = self.data.lending.locked.borrow();
        let source = locked.get(&transaction).map(|locked| Rc::clone(&locked.inode));
        source.ok_or_else(|| FsError::Io("a clone's source is not locked".to_owned()))
    }

    fn unlock_source(&self, transaction: TransactionId) {
        let locked = self.data.lending.locked.borrow_mut().remove(&transaction);
        if let Some(LockedSource { mmap, inode_lock, inode, .. }) = locked {
            let nr = inode.nr;
            drop((mmap, inode_lock, inode));
            self.release_inode(nr);
        }
    }

    async fn can_take_back(&self, borrower: ShardId, blocks: &[Blocks]) -> Result<Vec<u64>, FsError> {
        self.rehearse(|batch| {
            let mut counts = Vec::with_capacity(blocks.len());
            for piece in blocks {
                let left = ENOUGH_ITEMS.saturating_sub(batch.changed());
                if left < ItemBudget::ONE_STEP.get() {
                    break;
                }
                let mut budget = ItemBudget::new(left);
                let dropped = take_back(batch, borrower, *piece, &mut budget)?;
                let end = dropped.up_to / crate::types::BLOCK_SIZE;
                counts.push(end.saturating_sub(piece.0.get()).min(piece.1));
            }
            counts.resize(blocks.len(), 0);
            Ok(counts)
        })
        .await
    }

    /// The turn to borrow. The caller may hold any lock of an earlier class.
    pub(super) async fn lending_turn(&self, order: &LockOrder) -> Guard<LendingClass> {
        self.data.lending.turn.exclusive(&mut order.clone()).await
    }

    /// There are, or may be, blocks to give back. A mount says so when the log is replayed, not before: the log may have
    /// given them back itself.
    pub(crate) fn note_returns(&self) {
        self.data.lending.due.set(true);
        self.data.lending.wake.notify();
    }

    /// Gives back what was borrowed and is not used any more, until the shard stops.
    pub(crate) async fn give_back_in_background(self: Rc<Self>) {
        let lending = &self.data.lending;
        while !self.data.stopped.get() {
            if !lending.due.replace(false) {
                lending.wake.wait().await;
                continue;
            }
            lending.giving_back.set(true);
            if let Err(error) = self.give_blocks_back().await {
                // They stay returns: the next one, or the next mount, tries again.
                tracing::warn!(shard = %self.id, %error, "borrowed blocks could not be given back yet");
            }
            lending.giving_back.set(false);
            lending.rested.notify();
        }
    }

    /// Ends the task that gives back.
    pub(super) fn stop_lending(&self) {
        self.data.lending.wake.notify();
    }

    /// Waits until what is to be given back was, or could not be.
    pub(crate) async fn finish_returns(&self) {
        let lending = &self.data.lending;
        while (lending.due.get() || lending.giving_back.get()) && !self.data.stopped.get() {
            lending.rested.wait().await;
        }
    }

    async fn give_blocks_back(self: &Rc<Self>) -> Result<(), FsError> {
        loop {
            let _turn = match is_planted(Bug::ReturnsWithoutTurn) {
                true => None,
                false => Some(self.lending_turn(&LockOrder::new()).await),
            };
            let Some((owner, mut blocks)) = self.view(|batch| first_returns(batch, RETURNS_AT_ONCE)).await?
            else {
                return Ok(());
            };
            let counts =
                match self.ask_lending(owner, LendingCall::CanTakeBack(self.id, blocks.clone())).await? {
                    LendingReply::Counts(counts) => counts,
                    other => return Err(misanswered(&other)),
                };
            for (piece, count) in blocks.iter_mut().zip(&counts) {
                piece.1 = *count;
            }
            blocks.retain(|piece| piece.1 > 0);
            if blocks.is_empty() {
                return Err(FsError::Io(format!("shard {owner} takes nothing back")));
            }
            let changes = vec![
                LendingChange::TakeBack { owner, borrower: self.id, blocks: blocks.clone() },
                LendingChange::EndReturns { borrower: self.id, owner, blocks },
            ];
            self.commit_lending(changes, Priority::Reserve).await?;
        }
    }

    /// Commits the parts of a transaction that lends.
    ///
    /// # Errors
    /// [`FsError::NoSpace`], [`FsError::ReadOnly`], damage; then nothing has changed.
    pub(crate) async fn commit_lending(
        self: &Rc<Self>,
        changes: Vec<LendingChange>,
        priority: Priority,
    ) -> Result<(), FsError> {
        // Who lends was read from the volume.
        let shards = self.volume.shard_count();
        let possible = |(owner, borrower): (ShardId, ShardId)| owner != borrower && owner.index() < shards;
        if let Some((owner, borrower)) =
            changes.iter().filter_map(LendingChange::parties).find(|parties| !possible(*parties))
        {
            let what = format!("shard {borrower} has blocks from shard {owner}, which cannot have lent them");
            return Err(FsError::Damaged { what, block: None, inode: None });
        }
        let changes = changes.into_iter().map(crate::namespace::change::Change::Lending).collect();
        self.commit_changes(self.new_transaction(), changes, priority).await
    }
}

impl Inode {
    /// Whether the extents of `range` say all that was applied there.
    pub(super) fn is_settled(&self, range: &Range<u64>) -> bool {
        let (data, pages) = (self.data.borrow(), pages_of(range));
        let dirty = data.next_dirty(pages.start).is_some_and(|run| run.start < pages.end);
        !dirty && !data.has_ordered(&pages)
    }
}

/// The error of an answer that does not fit its question.
pub(super) fn misanswered(answer: &dyn std::fmt::Debug) -> FsError {
    FsError::Io(format!("a shard gave a wrong answer: {answer:?}"))
}
