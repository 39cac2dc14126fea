//! Which blocks are used, by the trees' account and by the bitmaps'.
//!
//! Owns: [`SpaceMap`]: every block that a tree reaches is marked once; at the end the marks are compared with each
//! group's bitmap, which is read again for that, so that one bitmap is in memory at a time. Groups that nothing
//! reaches take no memory. [`LogChange`]: what the intent log makes of the bitmaps, by the rules of a mount: all that it
//! uses was free, and it names none of it twice; what it gives back was in use.
//!
//! Excludes: who reaches what.

use std::collections::HashMap;
use std::ops::Range;

use crate::alloc::{GroupWarning, ReadGroupsError, read_group};
use crate::disk::VolumeDisk;
use crate::format::group::VolumeLayout;
use crate::format::superblock::Superblock;
use crate::log::state::Replayed;
use crate::types::{BlockCount, BlockNr, ShardId};

use super::finding::{Finding, Findings, User};

/// Marks of a volume's blocks.
pub(super) struct SpaceMap {
    layout: VolumeLayout,
    /// Owner of each group; `None` if its bitmap is damaged.
    owners: Vec<Option<ShardId>>,
    marks: HashMap<u64, Box<[u64]>>,
}

impl SpaceMap {
    /// Reads every group's bitmap for its owner and for the digest.
    pub(super) async fn read(
        disk: &VolumeDisk,
        superblock: &Superblock,
        findings: &mut Findings,
        progress: &mut dyn FnMut(u64, u64),
    ) -> (Self, Vec<GroupWarning>) {
        let layout = superblock.layout;
        let (mut owners, mut warnings, mut found, mut complete) = (Vec::new(), Vec::new(), 0_u64, true);
        for number in 0..layout.groups() {
            progress(number, layout.groups());
            let owner = match read_group(disk, superblock, number).await {
                Ok(mut group) => {
                    found = found.wrapping_add(group.contribution);
                    warnings.append(&mut group.warnings);
                    Some(group.owner)
                }
                Err(error) => {
                    findings.add(bitmap_finding(number, error));
                    complete = false;
                    None
                }
            };
            owners.push(owner);
        }
        let expected = superblock.group_digest;
        if complete && found != expected {
            findings.add(Finding::BitmapDigest { expected, found });
        }
        (Self { layout, owners, marks: HashMap::new() }, warnings)
    }

    /// The group that a block lies in, whether it exists or not.
    pub(super) fn group_of(&self, block: BlockNr) -> u64 {
        block.get() >> self.layout.group_shift()
    }

    /// The group of `shard` that all these blocks lie in, and their bits in its bitmap. A group whose owner is not known
    /// may be anybody's.
    fn in_one_group(&self, shard: ShardId, start: BlockNr, count: BlockCount) -> Option<(u64, Range<usize>)> {
        let number = self.layout.group_of(start)?;
        let bit = start.get() - self.layout.group_start(number).get();
        let end = bit.checked_add(count.get()).filter(|end| *end <= self.layout.group_blocks(number))?;
        let owner = self.owners.get(usize::try_from(number).ok()?)?;
        owner.is_none_or(|owner| owner == shard).then_some((number, bit as usize..end as usize))
    }

    /// Whether blocks lie in the volume.
    pub(super) fn holds(&self, start: BlockNr, count: BlockCount) -> bool {
        start.checked_add(count).is_some_and(|end| end.get() <= self.layout.blocks().get())
    }

    /// Marks blocks as used by `user`. `false` if they do not lie in the volume.
    pub(super) fn mark(
        &mut self,
        start: BlockNr,
        count: BlockCount,
        user: User,
        findings: &mut Findings,
    ) -> bool {
        let Some(end) = start.checked_add(count).filter(|end| end.get() <= self.layout.blocks().get()) else {
            findings.add(Finding::Misplaced { start, count, user });
            return false;
        };
        let mut block = start.get();
        while block < end.get() {
            let number = block >> self.layout.group_shift();
            let group_start = self.layout.group_start(number).get();
            let bits = (block - group_start) as usize;
            let piece = bits..((end.get() - group_start) as usize).min(self.layout.bitmap_bits());
            self.mark_in_group(number, piece.clone(), user, findings);
            block = group_start + piece.end as u64;
        }
        true
    }

    fn mark_in_group(&mut self, number: u64, piece: Range<usize>, user: User, findings: &mut Findings) {
        let group_start = self.layout.group_start(number).get();
        let (start, count) =
            (BlockNr::new(group_start + piece.start as u64), BlockCount::new(piece.len() as u64));
        if let Some(owner) = self.owners[number as usize].filter(|owner| *owner != user.shard()) {
            findings.add(Finding::ForeignGroup { start, owner, user });
        }
        let overhead = self.layout.overhead(number);
        if overhead.iter().any(|own| own.start < piece.end && piece.start < own.end) {
            findings.add(Finding::Misplaced { start, count, user });
        }
        let words = self.layout.bitmap_bits() / 64;
        let marks = self.marks.entry(number).or_insert_with(|| vec![0; words].into_boxed_slice());
        let mut twice = false;
        for bit in piece {
            twice |= marks[bit / 64] >> (bit % 64) & 1 == 1;
            marks[bit / 64] |= 1 << (bit % 64);
        }
        if twice {
            findings.add(Finding::UsedTwice { start, count, user });
        }
    }

    /// Blocks marked so far.
    pub(super) fn marked(&self) -> u64 {
        self.marks.values().flat_map(|words| words.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Compares marks and bitmaps.
    pub(super) async fn compare(
        &self,
        disk: &VolumeDisk,
        superblock: &Superblock,
        mut change: LogChange,
        findings: &mut Findings,
        progress: &mut dyn FnMut(u64, u64),
    ) {
        for number in 0..self.layout.groups() {
            progress(number, self.layout.groups());
            if self.owners[number as usize].is_none() {
                continue;
            }
            match read_group(disk, superblock, number).await {
                Ok(group) => {
                    let mut used = group.used().to_vec();
                    let start = self.layout.group_start(number).get();
                    change.apply(number, start, &mut used, findings);
                    self.compare_group(number, &used, findings);
                }
                Err(error) => findings.add(bitmap_finding(number, error)),
            }
        }
    }

    fn compare_group(&self, number: u64, used: &[u64], findings: &mut Findings) {
        let mut reached = vec![0_u64; used.len()];
        for bit in self.layout.overhead(number).into_iter().flatten() {
            reached[bit / 64] |= 1 << (bit % 64);
        }
        for (word, marks) in
            reached.iter_mut().zip(self.marks.get(&number).into_iter().flat_map(|m| m.iter()))
        {
            *word |= marks;
        }
        let start = self.layout.group_start(number).get();
        let place =
            |run: &Range<usize>| (BlockNr::new(start + run.start as u64), BlockCount::new(run.len() as u64));
        for run in runs(used.iter().zip(&reached).map(|(used, reached)| used & !reached)) {
            let (start, count) = place(&run);
            findings.add(Finding::Leaked { start, count });
        }
        for run in runs(used.iter().zip(&reached).map(|(used, reached)| reached & !used)) {
            let (start, count) = place(&run);
            findings.add(Finding::NotMarked { start, count });
        }
    }
}

/// What the log uses and gives back, by groups; as ranges of a group's bits.
#[derive(Default)]
pub(super) struct LogChange {
    used: HashMap<u64, Vec<Range<usize>>>,
    freed: HashMap<u64, Vec<Range<usize>>>,
}

impl LogChange {
    /// Sorts out what `log` says. Blocks that do not lie in one group of their shard are findings.
    pub(super) fn new(map: &SpaceMap, log: &Replayed, findings: &mut Findings) -> Self {
        let mut change = Self::default();
        for (shard, start, count) in log.used() {
            match map.in_one_group(shard, start, count) {
                Some((group, bits)) => change.used.entry(group).or_default().push(bits),
                None => findings.add(impossible("uses", shard, start, count)),
            }
        }
        for (shard, start, count) in log.freed() {
            match map.in_one_group(shard, start, count) {
                Some((group, bits)) => change.freed.entry(group).or_default().push(bits),
                None => findings.add(impossible("frees", shard, start, count)),
            }
        }
        change
    }

    /// Makes of a group's bitmap what it is after the log; it begins at block `start`. What the log says of the group
    /// after its first lie is not listened to: so a log of lies takes no longer than an honest one, which names no bit twice.
    fn apply(&mut self, number: u64, start: u64, used: &mut [u64], findings: &mut Findings) {
        let mut set = |bits: Range<usize>, to: bool| {
            let mut as_said = true;
            for bit in bits {
                let (word, mask) = (&mut used[bit / 64], 1 << (bit % 64));
                as_said &= (*word & mask != 0) != to;
                *word = if to { *word | mask } else { *word & !mask };
            }
            as_said
        };
        let mut told = |bits: &Range<usize>, what: &str| {
            let (start, count) = (start + bits.start as u64, bits.len());
            let what = format!("the intent log {what}: block {start} + {count} of group {number}");
            findings.add(Finding::Log { what });
        };
        for bits in self.used.remove(&number).unwrap_or_default() {
            if !set(bits.clone(), true) {
                told(&bits, "uses blocks that are not free");
                break;
            }
        }
        for bits in self.freed.remove(&number).unwrap_or_default() {
            if !set(bits.clone(), false) {
                told(&bits, "frees blocks that are not in use");
                break;
            }
        }
    }
}

fn impossible(verb: &str, shard: ShardId, start: BlockNr, count: BlockCount) -> Finding {
    let what = format!(
        "the intent log {verb} block {start} + {count}, which does not lie in one group of shard {shard}"
    );
    Finding::Log { what }
}

fn bitmap_finding(group: u64, error: ReadGroupsError) -> Finding {
    match error {
        ReadGroupsError::Group(error) => Finding::Bitmap { error },
        ReadGroupsError::Io(error) => Finding::BitmapUnreadable { group, error },
        ReadGroupsError::Digest { expected, found } => Finding::BitmapDigest { expected, found },
    }
}

/// Runs of set bits.
fn runs(words: impl Iterator<Item = u64>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, word) in words.enumerate().filter(|(_, word)| *word != 0) {
        for bit in (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| index * 64 + bit) {
            match runs.last_mut() {
                Some(run) if run.end == bit => run.end += 1,
                _ => runs.push(bit..bit + 1),
            }
        }
    }
    runs
}
