//! Do two large sets agree? Extents and back-references; entries by name and by sequence.
//!
//! Owns: [`SetDigest`], the sum of keyed 128-bit hashes of a set's members, which takes no memory however large the
//! set is; [`Pairs`], a pair of sets cut into [`BUCKETS`] parts, so that a second pass needs to hold only the parts
//! that differ.
//!
//! The key is random in every run: two sets that differ have equal sums with a probability of 2⁻¹²⁸, also if
//! somebody has chosen them.
//!
//! Excludes: where the members come from.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use crate::types::{BlockCount, BlockNr, InodeNr};

use super::finding::{Finding, Findings};

/// Parts that a pair of sets is cut into.
pub(super) const BUCKETS: usize = 256;

/// Key of the digests of one run.
pub(super) type DigestKey = [u8; 16];

/// A sum over the members of a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SetDigest(u128);

impl SetDigest {
    pub(super) fn add(&mut self, key: &DigestKey, numbers: &[u64], bytes: &[u8]) {
        let mut hasher = SipHasher13::new_with_key(key);
        numbers.iter().for_each(|number| hasher.write_u64(*number));
        hasher.write(bytes);
        self.0 = self.0.wrapping_add(hasher.finish128().as_u128());
    }
}

/// An extent, as its file has it or as its blocks have it. The order is by place first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reference {
    pub(super) inode: InodeNr,
    pub(super) offset: u64,
    pub(super) start: BlockNr,
    pub(super) blocks: BlockCount,
    /// Generation and kind: the extent's, or those of the run that it begins in.
    pub(super) generation: u64,
    pub(super) preallocated: u64,
}

impl Reference {
    pub(super) fn bucket(&self) -> usize {
        let mixed = (self.inode.get() ^ self.offset.rotate_left(20) ^ self.start.get().rotate_left(40))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 56) as usize
    }

    fn place(&self) -> (InodeNr, u64, BlockNr, BlockCount) {
        (self.inode, self.offset, self.start, self.blocks)
    }
}

/// Digests of extents and of back-references.
pub(super) struct Pairs {
    key: DigestKey,
    extents: Box<[SetDigest; BUCKETS]>,
    backrefs: Box<[SetDigest; BUCKETS]>,
}

impl Pairs {
    pub(super) fn new(key: DigestKey) -> Self {
        let empty = || Box::new([SetDigest::default(); BUCKETS]);
        Self { key, extents: empty(), backrefs: empty() }
    }

    pub(super) fn add_extent(&mut self, reference: &Reference) {
        self.extents[reference.bucket()].add(&self.key, &numbers(reference), &[]);
    }

    pub(super) fn add_backref(&mut self, reference: &Reference) {
        self.backrefs[reference.bucket()].add(&self.key, &numbers(reference), &[]);
    }

    /// Whether each part differs.
    pub(super) fn differing(&self) -> [bool; BUCKETS] {
        std::array::from_fn(|bucket| self.extents[bucket] != self.backrefs[bucket])
    }
}

fn numbers(reference: &Reference) -> [u64; 6] {
    [
        reference.inode.get(),
        reference.offset,
        reference.start.get(),
        reference.blocks.get(),
        reference.generation,
        reference.preallocated,
    ]
}

/// Names what differs between the extents and the back-references of the parts that do.
pub(super) fn report_differences(
    mut extents: Vec<Reference>,
    mut backrefs: Vec<Reference>,
    findings: &mut Findings,
) {
    extents.sort_unstable();
    backrefs.sort_unstable();
    let (mut extents, mut backrefs) = (extents.into_iter().peekable(), backrefs.into_iter().peekable());
    loop {
        let order = match (extents.peek(), backrefs.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(extent), Some(backref)) => extent.place().cmp(&backref.place()),
        };
        let extent = if order.is_le() { extents.next() } else { None };
        let backref = if order.is_ge() { backrefs.next() } else { None };
        match (extent, backref) {
            (Some(extent), None) => findings.add(Finding::NoBackref {
                inode: extent.inode,
                offset: extent.offset,
                start: extent.start,
                count: extent.blocks,
            }),
            (None, Some(backref)) => findings.add(Finding::NoExtent {
                inode: backref.inode,
                offset: backref.offset,
                start: backref.start,
                count: backref.blocks,
            }),
            (Some(extent), Some(backref)) if extent != backref => findings.add(Finding::ExtentMismatch {
                inode: extent.inode,
                offset: extent.offset,
                start: extent.start,
            }),
            _ => {}
        }
    }
}
