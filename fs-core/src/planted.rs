//! Bugs that tests plant, to see whether the campaigns catch them.
//!
//! Owns: [`Bug`], one variant for each, and [`is_planted`], which the code with the bug asks. Outside the crate's own
//! tests that is a constant, and nothing of it is left in the program.
//!
//! Invariant: at most one bug is planted on a thread, and only while a `Planted` of it lives.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A superblock is written before what it names was flushed.
    SuperblockBeforeFlush,
    /// Bitmaps count blocks of writes that have not ended.
    UnfinishedWritesInBitmaps,
    /// Freed blocks are handed out before the state without them is durable.
    ReuseBeforeDurable,
    /// Data is not compared with its checksum.
    ChecksumIgnored,
    /// A participant of a transaction applies its part in whatever epoch it is in by then.
    PartsInDifferentEpochs,
    /// Requests do not see writes that were accepted before.
    DrainSkipped,
    /// A file replaces another before its contents are written.
    RenameWithoutFlush,
    /// `fsync` does not wait for the checkpoint.
    SyncWithoutCheckpoint,
    /// An unlinked file is forgotten by a crash.
    OrphanWithoutIntent,
    /// What a truncation cuts off the last block comes back when the file grows.
    TruncationKeepsTail,
}

#[cfg(test)]
impl Bug {
    /// Every bug.
    pub(crate) const ALL: [Self; 10] = [
        Self::SuperblockBeforeFlush,
        Self::UnfinishedWritesInBitmaps,
        Self::ReuseBeforeDurable,
        Self::ChecksumIgnored,
        Self::PartsInDifferentEpochs,
        Self::DrainSkipped,
        Self::RenameWithoutFlush,
        Self::SyncWithoutCheckpoint,
        Self::OrphanWithoutIntent,
        Self::TruncationKeepsTail,
    ];
}

/// Whether `bug` is to be made.
#[cfg(not(test))]
pub(crate) const fn is_planted(_bug: Bug) -> bool {
    false
}

/// Whether `bug` is to be made.
#[cfg(test)]
pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Keeps a bug planted on this thread.
#[cfg(test)]
pub(crate) struct Planted(());

#[cfg(test)]
impl Planted {
    /// Plants `bug`.
    pub(crate) fn new(bug: Bug) -> Self {
        assert_eq!(PLANTED.replace(Some(bug)), None, "one bug at a time");
        Self(())
    }
}

#[cfg(test)]
impl Drop for Planted {
    fn drop(&mut self) {
        PLANTED.set(None);
    }
}
