//! Do lenders and borrowers agree?
//!
//! Owns: [`Accounts`]: for each pair of shards and each group, the blocks that are lent by the lender's tree, and those
//! that are borrowed, or about to be returned, by the borrower's. Both as digests, so memory depends on groups only.
//!
//! Excludes: references within either shard (`physical.rs`, `pairs.rs`).

use std::collections::BTreeMap;

use crate::types::{BlockNr, Generation, ShardId};

use super::finding::{Finding, Findings};
use super::pairs::{DigestKey, SetDigest};

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Side {
    digest: SetDigest,
    blocks: u64,
}

impl Side {
    fn add(&mut self, key: &DigestKey, start: BlockNr, blocks: u64, generation: Generation) {
        // Block by block: runs and extents of the two sides are cut in different places.
        for block in start.get()..start.get() + blocks {
            self.digest.add(key, &[block, generation.get()], &[]);
        }
        self.blocks += blocks;
    }
}

/// See the module documentation.
#[derive(Default)]
pub(super) struct Accounts {
    /// By lender, borrower and group: lent, borrowed.
    sides: BTreeMap<(ShardId, ShardId, u64), (Side, Side)>,
}

/// Blocks that have changed hands.
#[derive(Clone, Copy)]
pub(super) struct Loan {
    pub(super) lender: ShardId,
    pub(super) borrower: ShardId,
    pub(super) group: u64,
    pub(super) start: BlockNr,
    pub(super) blocks: u64,
    pub(super) generation: Generation,
}

impl Accounts {
    /// The lender says so.
    pub(super) fn lent(&mut self, key: &DigestKey, loan: &Loan) {
        let (lent, _) = self.sides.entry((loan.lender, loan.borrower, loan.group)).or_default();
        lent.add(key, loan.start, loan.blocks, loan.generation);
    }

    /// The borrower says so.
    pub(super) fn borrowed(&mut self, key: &DigestKey, loan: &Loan) {
        let (_, borrowed) = self.sides.entry((loan.lender, loan.borrower, loan.group)).or_default();
        borrowed.add(key, loan.start, loan.blocks, loan.generation);
    }

    /// Names what differs.
    pub(super) fn compare(self, findings: &mut Findings) {
        for ((lender, borrower, group), (lent, borrowed)) in self.sides {
            if lent != borrowed {
                let (lent, borrowed) = (lent.blocks, borrowed.blocks);
                findings.add(Finding::Lending { lender, borrower, group, lent, borrowed });
            }
        }
    }
}
