//! Relocation of what is lent: the references of other shards are turned to the copy before those of this one.
//!
//! Owns: [`Shard::move_lent`]; [`MoveCall`], what it asks of borrowers, and the answers; the lender's side of `data/lending/moving.rs`, which says who holds what.
//!
//! A round deals with one borrower after the other: it locks references, takes its turn to borrow, is lent the blocks of
//! the copy that they need, as returns, and turns them. What it needs no more of the old place comes home as every return
//! does.
//!
//! Invariants:
//! - as long as any borrower is not done, only borrowers have the copy. So what keeps a block of it alive is a shard
//!   whose turn can be had: while that is held, the block can be lent to the next shard, and sharing stays;
//! - a block of the copy that all of them have given back meanwhile is not used again; the next pass makes another copy;
//! - nothing is held here while another shard is waited for.
//!
//! # Legal crash outcomes
//! Each transaction alone. A copy that was lent and not used is a return, which the next mount gives back.
//!
//! Excludes: references of this shard (`shard/relocate.rs`).

use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use crate::alloc::Priority;
use crate::data::extent_map::lend::{CopyPiece, CopySource, PARTS_AT_ONCE, copies_lacking};
use crate::data::extent_map::relocate::{Destination, Span, borrowers as borrowers_of};
use crate::data::{LendingCall, LendingChange, LendingReply};
use crate::error::FsError;
use crate::namespace::transaction::TransactionId;
use crate::request::Relocated;
use crate::shard::Shard;
use crate::types::{BlockNr, ShardId};

use super::{Journey, RETRY_PAUSE, ROUNDS, TRIES};

/// Whether somebody who has a lock is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// It is passed over.
    Try,
    /// If no lock is free, one is waited for.
    Wait,
}

/// A question.
#[derive(Clone, Debug)]
pub(crate) enum MoveCall {
    /// Locks references to some blocks. → [`MoveReply::Locked`]
    Lock(Range<u64>, Patience),
    /// Takes the turn to borrow. → [`MoveReply::Done`]
    TakeTurn,
    /// Takes it if nobody has it. → [`MoveReply::Taken`]
    TryTurn,
    /// Turns the references that are locked from a span to its copy, which is lent. → [`MoveReply::Turned`]
    Turn(Span, Destination),
    /// Gives up locks and turn. → [`MoveReply::Done`]
    End,
    /// Waits, but not for ever, until what nobody uses was given back. → [`MoveReply::Done`]
    FinishReturns,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) enum MoveReply {
    /// Done.
    Done,
    /// Blocks whose references are locked, and how many references are not because somebody has their locks.
    Locked(Vec<Range<u64>>, u64),
    /// Whether the turn was free.
    Taken(bool),
    /// Blocks and references turned.
    Turned(u64, u64),
}

/// What a round with a borrower has done.
#[derive(Default)]
struct Outcome {
    /// Blocks turned.
    moved: u64,
    /// References, or third shards, that were busy.
    busy: u64,
}

/// A round with one borrower.
struct Round {
    transaction: TransactionId,
    borrower: ShardId,
    patience: Patience,
    /// Third shards that cannot give back for now.
    held: BTreeSet<ShardId>,
}

impl Shard {
    /// Turns the references of other shards to a span, round after round, until there is none or no more can be done.
    /// Adds the shards to `borrowers`.
    pub(super) async fn move_lent(
        self: &Rc<Self>,
        journey: &mut Journey,
        borrowers: &mut BTreeSet<ShardId>,
        done: &mut Relocated,
    ) -> Result<(), FsError> {
        let blocks = journey.span.range();
        for round in 0..ROUNDS {
            let (mut moved, mut busy) = (0, Vec::new());
            let lent_to = self.view(|batch| borrowers_of(batch, &blocks)).await?;
            borrowers.extend(&lent_to);
            for borrower in lent_to {
                let patience = if round < TRIES { Patience::Try } else { Patience::Wait };
                let outcome = self.move_of(borrower, patience, journey, done).await?;
                moved += outcome.moved;
                if outcome.busy > 0 {
                    busy.push(borrower);
                }
            }
            if moved == 0 && busy.is_empty() {
                return Ok(());
            }
            if round + 1 == ROUNDS {
                let (start, count) = (blocks.start, blocks.end - blocks.start);
                done.left.extend(busy.iter().map(|shard| {
                    format!(
                        "blocks {start} + {count}: lent to shard {shard}, whose files are in use all the time"
                    )
                }));
            } else if !busy.is_empty() {
                self.ctx.sleep(RETRY_PAUSE).await;
            }
        }
        Ok(())
    }

    /// Waits until these shards have given back what they do not use any more.
    pub(super) async fn finish_returns_of(
        self: &Rc<Self>,
        borrowers: &BTreeSet<ShardId>,
    ) -> Result<(), FsError> {
        let transaction = self.new_transaction();
        for borrower in borrowers {
            self.ask_to_move(*borrower, transaction, MoveCall::FinishReturns).await?;
        }
        Ok(())
    }

    /// A round with one borrower.
    async fn move_of(
        self: &Rc<Self>,
        borrower: ShardId,
        patience: Patience,
        journey: &mut Journey,
        done: &mut Relocated,
    ) -> Result<Outcome, FsError> {
        let transaction = self.new_transaction();
        let mut round = Round { transaction, borrower, patience, held: BTreeSet::new() };
        let outcome = self.move_within(&mut round, journey, done).await;
        round.held.insert(borrower);
        for shard in round.held {
            if let Err(error) = self.ask_to_move(shard, transaction, MoveCall::End).await {
                // Only a shard that has ended does not answer, and its locks ended with it.
                tracing::debug!(%shard, %error, "the end of a move was not answered");
            }
        }
        outcome
    }

    async fn move_within(
        self: &Rc<Self>,
        round: &mut Round,
        journey: &mut Journey,
        done: &mut Relocated,
    ) -> Result<Outcome, FsError> {
        let (borrower, transaction) = (round.borrower, round.transaction);
        let lock = MoveCall::Lock(journey.span.range(), round.patience);
        let (touched, mut busy) = match self.ask_to_move(borrower, transaction, lock).await? {
            MoveReply::Locked(touched, busy) => (touched, busy),
            other => return Err(misanswered(&other)),
        };
        if touched.is_empty() {
            return Ok(Outcome { moved: 0, busy });
        }
        self.ask_to_move(borrower, transaction, MoveCall::TakeTurn).await?;
        let pieces = self.pieces_to_lend(round, journey, &touched, &mut busy).await?;
        for pieces in pieces.chunks(PARTS_AT_ONCE) {
            self.lend_copies(borrower, journey, pieces, done).await?;
        }
        let to = Destination { fresh: Vec::new(), lender: Some(self.id), ..journey.to };
        let turn = MoveCall::Turn(journey.span.clone(), to);
        match self.ask_to_move(borrower, transaction, turn).await? {
            MoveReply::Turned(blocks, references) => {
                done.references += references;
                Ok(Outcome { moved: blocks, busy })
            }
            other => Err(misanswered(&other)),
        }
    }

    /// What the borrower has not of the copy of `touched` blocks, as far as it can be lent now.
    async fn pieces_to_lend(
        self: &Rc<Self>,
        round: &mut Round,
        journey: &Journey,
        touched: &[Range<u64>],
        busy: &mut u64,
    ) -> Result<Vec<CopyPiece>, FsError> {
        let (span, to) = (&journey.span, &journey.to);
        let mut needed = vec![false; to.fresh.len()];
        for range in touched {
            needed[(range.start - span.range().start) as usize..(range.end - span.range().start) as usize]
                .fill(true);
        }
        let copy = to.start.get()..to.start.get() + span.blocks();
        let is_fresh = |block: u64| to.fresh[(block - copy.start) as usize];
        let lacking =
            || self.view(|batch| copies_lacking(batch, round.borrower, (&copy, to.generation), is_fresh));
        let holders: BTreeSet<ShardId> = lacking()
            .await?
            .into_iter()
            .filter_map(|(_, source)| match source {
                CopySource::Fresh => None,
                CopySource::LentTo(holder) => Some(holder),
            })
            .collect();
        for holder in holders {
            match self.ask_to_move(holder, round.transaction, MoveCall::TryTurn).await? {
                MoveReply::Taken(true) => round.held.extend([holder]),
                MoveReply::Taken(false) => *busy += 1,
                other => return Err(misanswered(&other)),
            }
        }
        // What they have now, they keep.
        let mut pieces = Vec::new();
        for (range, source) in lacking().await? {
            if matches!(source, CopySource::LentTo(holder) if !round.held.contains(&holder)) {
                continue;
            }
            let within: Vec<u64> = range.filter(|block| needed[(block - copy.start) as usize]).collect();
            for stretch in within.chunk_by(|left, right| left + 1 == *right) {
                let at = stretch[0] - copy.start;
                pieces.push(CopyPiece {
                    start: BlockNr::new(stretch[0]),
                    generation: to.generation,
                    checksums: span.checksums(&(at..at + stretch.len() as u64)),
                    source,
                });
            }
        }
        Ok(pieces)
    }

    /// Lends some pieces of the copy.
    async fn lend_copies(
        self: &Rc<Self>,
        borrower: ShardId,
        journey: &mut Journey,
        pieces: &[CopyPiece],
        done: &mut Relocated,
    ) -> Result<(), FsError> {
        let (owner, generation, start) = (self.id, journey.to.generation, journey.to.start.get());
        let blocks = pieces.iter().map(CopyPiece::blocks).collect();
        let changes = vec![
            LendingChange::LendCopy { owner, borrower, pieces: pieces.to_vec() },
            LendingChange::Receive { borrower, owner, blocks, generation },
        ];
        let fresh = |piece: &&CopyPiece| piece.source == CopySource::Fresh;
        let mut mark = |is_fresh: bool| {
            for (first, count) in pieces.iter().filter(fresh).map(CopyPiece::blocks) {
                let at = (first.get() - start) as usize;
                journey.to.fresh[at..at + count as usize].fill(is_fresh);
            }
        };
        // If the volume fails in the middle, the blocks are not to be given back.
        mark(false);
        let lent = self.commit_lending(changes, Priority::Reserve).await;
        if lent.is_err() && self.volume.check_writable().is_ok() {
            mark(true);
        }
        lent?;
        done.blocks += pieces.iter().filter(fresh).map(|piece| piece.blocks().1).sum::<u64>();
        Ok(())
    }

    async fn ask_to_move(
        self: &Rc<Self>,
        shard: ShardId,
        transaction: TransactionId,
        call: MoveCall,
    ) -> Result<MoveReply, FsError> {
        match self.ask_lending(shard, LendingCall::Move(transaction, call)).await? {
            LendingReply::Moved(reply) => Ok(reply),
            other => Err(misanswered(&other)),
        }
    }
}

/// The error of an answer that does not fit its question.
fn misanswered(answer: &dyn std::fmt::Debug) -> FsError {
    FsError::Io(format!("a shard gave a wrong answer: {answer:?}"))
}
