//! Moving what was borrowed: what a relocation asks of a shard that has borrowed blocks of its group.
//!
//! Owns: the answers to [`MoveCall`]; the locks and the turn that are held here for a relocation of another shard.
//!
//! | the lender asks | so that |
//! |---|---|
//! | [`MoveCall::Lock`] | references to the blocks stay what they are, and nobody clones their files |
//! | [`MoveCall::TakeTurn`] | nothing is borrowed here nor given back; then it lends the copy |
//! | [`MoveCall::Turn`] | the references lead to the copy; what is not needed of either becomes a return |
//! | [`MoveCall::End`] | all that is given back, the turn first |
//!
//! [`MoveCall::TryTurn`] is for a third shard, which has the copy already and must not give it back meanwhile.
//!
//! Invariants:
//! - locks of files before the turn, as a clone takes them; so whoever has a turn waits for no file. A second turn is
//!   only tried for;
//! - files are waited for one at a time, with nothing else in hand.
//!
//! Excludes: the lender's side (`shard/relocate/lent.rs`).

use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use crate::data::extent_map::relocate::{Reference, first_reference, references};
use crate::error::FsError;
use crate::format::extent::ExtentKind;
use crate::locks::{Guard, LockOrder};
use crate::namespace::transaction::TransactionId;
use crate::shard::Shard;
use crate::shard::relocate::ReferenceLocks;
use crate::shard::relocate::lent::{MoveCall, MoveReply, Patience};
use crate::types::InodeNr;

use super::LendingClass;

/// References that are locked at once.
const LOCKED_AT_ONCE: usize = 48;

/// How long a relocation waits for what is to be given back.
const RETURNS_LIMIT: Duration = Duration::from_secs(1);

/// What is held for a relocation of another shard. Fields are dropped in order.
#[derive(Default)]
pub(super) struct Moving {
    turn: Option<Guard<LendingClass>>,
    locked: Vec<(Reference, ReferenceLocks)>,
}

impl Shard {
    /// Answers the relocation of another shard.
    pub(super) async fn answer_moving(
        self: &Rc<Self>,
        transaction: TransactionId,
        call: MoveCall,
    ) -> Result<MoveReply, FsError> {
        let moving = &self.data.lending.moving;
        Ok(match call {
            MoveCall::Lock(blocks, patience) => {
                let (locked, busy) = self.lock_borrowed(&blocks, patience).await?;
                let touched = locked.iter().map(|(reference, _)| {
                    let range = reference.block_range();
                    range.start.max(blocks.start)..range.end.min(blocks.end)
                });
                let touched = touched.collect();
                moving.borrow_mut().entry(transaction).or_default().locked = locked;
                MoveReply::Locked(touched, busy)
            }
            MoveCall::TakeTurn => {
                let turn = self.lending_turn(&LockOrder::new()).await;
                moving.borrow_mut().entry(transaction).or_default().turn = Some(turn);
                MoveReply::Done
            }
            MoveCall::TryTurn => {
                let turn = self.data.lending.turn.try_lock(crate::locks::Mode::Exclusive);
                let taken = turn.is_some();
                if taken {
                    moving.borrow_mut().entry(transaction).or_default().turn = turn;
                }
                MoveReply::Taken(taken)
            }
            MoveCall::Turn(span, mut to) => {
                let references: Vec<Reference> = {
                    let moving = moving.borrow();
                    let held = moving.get(&transaction).map_or(&[][..], |moving| &moving.locked);
                    held.iter().map(|(reference, _)| *reference).collect()
                };
                let (blocks, references) = self.turn_references(&span, &mut to, &references).await?;
                MoveReply::Turned(blocks, references)
            }
            MoveCall::End => {
                let held = moving.borrow_mut().remove(&transaction).unwrap_or_default();
                drop(held.turn);
                self.unlock_borrowed(held.locked);
                MoveReply::Done
            }
            MoveCall::FinishReturns => {
                let limit = self.ctx.sleep(RETURNS_LIMIT);
                futures_util::future::select(pin!(self.finish_returns()), pin!(limit)).await;
                MoveReply::Done
            }
        })
    }

    /// Locks references to borrowed `blocks`. Returns them, and how many were busy.
    async fn lock_borrowed(
        self: &Rc<Self>,
        blocks: &Range<u64>,
        patience: Patience,
    ) -> Result<(Vec<(Reference, ReferenceLocks)>, u64), FsError> {
        let (mut all, mut first_busy, mut busy) = (Vec::new(), None, 0);
        let mut next = Some(first_reference(blocks));
        while let Some(from) = next {
            let found = self.view(|batch| references(batch, blocks, from)).await;
            let (found, rest) = match found {
                Ok(found) => found,
                Err(error) => {
                    self.unlock_borrowed(all);
                    return Err(error);
                }
            };
            next = rest;
            let (locked, passed_over) = self.lock_some(found, ExtentKind::Data);
            all.extend(locked);
            busy += passed_over.len() as u64;
            first_busy = first_busy.or(passed_over.first().copied());
            if all.len() >= LOCKED_AT_ONCE {
                break;
            }
        }
        if let (true, Patience::Wait, Some(reference)) = (all.is_empty(), patience, first_busy)
            && let Some(nr) = reference.owner()
        {
            let inode = self.inode(nr);
            let locks = Self::wait_for(&inode, &reference).await;
            all.push((reference, locks));
            busy -= 1;
        }
        Ok((all, busy))
    }

    fn unlock_borrowed(&self, locked: Vec<(Reference, ReferenceLocks)>) {
        let owners: Vec<InodeNr> = locked.iter().filter_map(|(reference, _)| reference.owner()).collect();
        drop(locked);
        owners.into_iter().for_each(|nr| self.release_inode(nr));
    }
}
