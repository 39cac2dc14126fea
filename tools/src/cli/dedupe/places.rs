//! Where files lie on the device, to tell what is shared already.
//!
//! Owns: [`Places`], a file's blocks on the device at one moment, and [`apart`], what two ranges do not share yet.
//!
//! What changes afterwards does no harm: the daemon looks at everything that it is asked to share, and what is left out by
//! mistake has only just been the same.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use fs_core::request::{ExtentRow, ExtentState};

use super::super::dump::extents_on_mount;
use crate::failure::Failure;

/// A stretch of a file that lies in one piece: offset, length, place on the device; bytes.
type Piece = (u64, u64, u64);

/// The pieces of a file that lie on the device, in their order.
#[derive(Debug, Default)]
pub(super) struct Places(Vec<Piece>);

impl Places {
    /// Of a file on a mount.
    ///
    /// # Errors
    /// It is no such file, or it has gone.
    pub(super) fn of(path: &Path) -> Result<Self, Failure> {
        let mut pieces = Vec::new();
        extents_on_mount(path, |rows| {
            pieces.extend(rows.iter().filter_map(piece));
            ControlFlow::Continue(())
        })?;
        Ok(Self(pieces))
    }

    /// Where the byte at `offset` lies, if it does, and how far what is said of it goes.
    fn at(&self, offset: u64) -> (Option<u64>, u64) {
        let next = self.0.partition_point(|(start, length, _)| start + length <= offset);
        match self.0.get(next) {
            Some(&(start, length, physical)) if start <= offset => {
                (Some(physical + (offset - start)), start + length - offset)
            }
            Some((start, ..)) => (None, start - offset),
            None => (None, u64::MAX),
        }
    }
}

fn piece(row: &ExtentRow) -> Option<Piece> {
    match row.state {
        ExtentState::Data { physical, .. } => Some((row.offset, row.length, physical)),
        _ => None,
    }
}

/// The parts of a range, counted from its beginning, that do not lie at the same place in both files.
pub(super) fn apart(source: (&Places, u64), target: (&Places, u64), length: u64) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut done = 0;
    while done < length {
        let (left, left_goes) = source.0.at(source.1 + done);
        let (right, right_goes) = target.0.at(target.1 + done);
        let end = length.min(done.saturating_add(left_goes.min(right_goes)));
        if left.is_none() || left != right {
            match parts.last_mut() {
                Some(part) if part.end == done => part.end = end,
                _ => parts.push(done..end),
            }
        }
        done = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    #[test]
    fn what_lies_at_the_same_place_is_not_apart() {
        let one = Places(vec![(0, 64 * KIB, 1 << 20), (64 * KIB, 64 * KIB, 4 << 20)]);
        // The first 16 KiB elsewhere, then the same blocks in other pieces, shifted by 8 KiB.
        let other = Places(vec![
            (8 * KIB, 16 * KIB, 9 << 20),
            (24 * KIB, 8 * KIB, (1 << 20) + 16 * KIB),
            (32 * KIB, 40 * KIB, (1 << 20) + 24 * KIB),
            (72 * KIB, 32 * KIB, 4 << 20),
        ]);
        let found = apart((&one, 0), (&other, 8 * KIB), 128 * KIB);
        assert_eq!(found, [0..16 * KIB, 96 * KIB..128 * KIB]);
        assert_eq!(apart((&one, 16 * KIB), (&other, 24 * KIB), 64 * KIB), []);
        assert_eq!(apart((&one, 4 * KIB), (&one, 4 * KIB), 100), []);
    }

    #[test]
    fn what_lies_nowhere_is_apart() {
        let (none, some) = (Places::default(), Places(vec![(8 * KIB, 8 * KIB, 1 << 20)]));
        assert_eq!(apart((&none, 0), (&none, 0), 12 * KIB).first(), Some(&(0..12 * KIB)));
        assert_eq!(apart((&some, 0), (&some, 0), 32 * KIB), [0..8 * KIB, 16 * KIB..32 * KIB]);
        assert_eq!(apart((&some, 0), (&none, 0), 0), []);
    }
}
