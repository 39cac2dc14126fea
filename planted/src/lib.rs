//! Bugs that are planted on purpose, one at a time, to see whether the tests that should catch such bugs do.
//!
//! Owns: [`Bug`], one variant for each, with its name and the [`Net`] it has to end in; [`is_planted`], which the code with the
//! bug asks; [`Spot`] and [`Planted`], with which a test plants one on its own thread.
//!
//! | build | a bug is planted by |
//! |---|---|
//! | ordinary | nothing: [`is_planted`] is a constant, and nothing of it is left in the program |
//! | a crate's own unit tests and models | a [`Planted`], as long as it lives, on its thread |
//! | with the feature `on` | the environment variable [`VARIABLE`], for the whole process |
//!
//! Invariants: at most one bug is planted at a time; a name that nobody knows is an error, never "no bug"; a release build
//! refuses the feature.
//!
//! Excludes: where a bug sits (its crate asks), and who runs the nets (`cargo xtask planted`). To add one: a line in the table
//! below, and an `is_planted` where the bug would be made.

use std::cell::Cell;
use std::thread::LocalKey;

#[cfg(all(feature = "on", not(debug_assertions)))]
compile_error!("planted bugs are not for release builds: leave out the feature `planted`");

/// The environment variable that names the bug to plant, in a build with the feature `on`.
pub const VARIABLE: &str = "POLLUX_PLANTED";

/// Which tests have to catch a bug. None of them was written for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// The driver's tests on controllers that behave and that do not, and the suites that run on every device.
    Driver,
    /// The filesystem's simulation and crash campaigns.
    Filesystem,
    /// Reads of a file that is being cloned are counted.
    Readers,
    /// The models of protocols between threads, of `nvme`: barriers, which x86 does without.
    NvmeModels,
    /// The same of `reactor`.
    ReactorModels,
}

macro_rules! bugs {
    ($($(#[doc = $about:literal])+ $bug:ident = $name:literal in $net:ident;)+) => {
        /// A bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[doc = $about])+ $bug,)+
        }

        impl Bug {
            /// Every bug.
            pub const ALL: &'static [Self] = &[$(Self::$bug,)+];

            /// Its name, as the environment variable and `cargo xtask planted` know it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$bug => $name,)+ }
            }

            /// What is wrong.
            pub const fn about(self) -> &'static str {
                match self { $(Self::$bug => concat!($($about,)+),)+ }
            }

            /// What has to catch it.
            pub const fn net(self) -> Net {
                match self { $(Self::$bug => Net::$net,)+ }
            }
        }
    };
}

bugs! {
    /// A completion queue entry is taken whatever its phase tag says.
    PhaseUnchecked = "phase-unchecked" in Driver;
    /// A completion is taken for the command in the slot that its identifier points to, whether or not it is that command's.
    CidUnchecked = "cid-unchecked" in Driver;
    /// A completion is taken whatever submission queue it names.
    QueueUnchecked = "queue-unchecked" in Driver;
    /// A completion is taken whatever submission queue head it reports.
    HeadUnchecked = "head-unchecked" in Driver;
    /// A command that failed counts as done.
    StatusIgnored = "status-ignored" in Driver;
    /// A flush succeeds without a command.
    FlushDropped = "flush-dropped" in Driver;
    /// A write that has to be durable goes out as one that may stay in the cache.
    DurableWriteCached = "durable-write-cached" in Driver;
    /// The controller is never told that completions were taken.
    CompletionDoorbellForgotten = "completion-doorbell-forgotten" in Driver;
    /// The controller's largest transfer is not asked for.
    TransferLimitIgnored = "transfer-limit-ignored" in Driver;
    /// Each command of a large request begins at the start of the buffer.
    SplitWithoutOffset = "split-without-offset" in Driver;
    /// The entries of a PRP list are a page too low.
    PrpListOffByOne = "prp-list-off-by-one" in Driver;
    /// The second of two pages is described as the first.
    SecondPageIsFirst = "second-page-is-first" in Driver;
    /// A deallocation begins a block too late.
    DeallocateOffByOne = "deallocate-off-by-one" in Driver;
    /// An overdue command is not aborted, nor anything else done about it.
    OverdueIgnored = "overdue-ignored" in Driver;

    /// A superblock is written before what it names was flushed.
    SuperblockBeforeFlush = "superblock-before-flush" in Filesystem;
    /// Bitmaps count blocks of writes that have not ended.
    UnfinishedWritesInBitmaps = "unfinished-writes-in-bitmaps" in Filesystem;
    /// Freed blocks are handed out before the state without them is durable.
    ReuseBeforeDurable = "reuse-before-durable" in Filesystem;
    /// Data is not compared with its checksum.
    ChecksumIgnored = "checksum-ignored" in Filesystem;
    /// A participant of a transaction applies its part in whatever epoch it is in by then.
    PartsInDifferentEpochs = "parts-in-different-epochs" in Filesystem;
    /// Requests do not see writes that were accepted before.
    DrainSkipped = "drain-skipped" in Filesystem;
    /// A file replaces another before its contents are written.
    RenameWithoutFlush = "rename-without-flush" in Filesystem;
    /// The intent log names data before it was flushed.
    LogBeforeFlush = "log-before-flush" in Filesystem;
    /// Entries of the intent log count whatever mount and superblock they follow.
    StaleLogAccepted = "stale-log-accepted" in Filesystem;
    /// `fsync` does not wait for the checkpoint.
    SyncWithoutCheckpoint = "sync-without-checkpoint" in Filesystem;
    /// An unlinked file is forgotten by a crash.
    OrphanWithoutIntent = "orphan-without-intent" in Filesystem;
    /// What a truncation cuts off the last block comes back when the file grows.
    TruncationKeepsTail = "truncation-keeps-tail" in Filesystem;

    /// Relocation turns references of a file that is being cloned: the clone is lent one place and refers to another.
    RelocationWithoutMmapLock = "relocation-without-mmap-lock" in Filesystem;
    /// A clone does not see writes to its source that were accepted before and are not applied yet.
    CloneWithoutFence = "clone-without-fence" in Filesystem;
    /// A clone shares what the device has, without what of its source is only in memory.
    CloneOfDirtyRange = "clone-of-dirty-range" in Filesystem;
    /// Stores through mappings get in between the comparison of a deduplication and its sharing.
    ComparisonUnlocked = "comparison-unlocked" in Filesystem;
    /// A page that is written to during its write-back counts as written back.
    RewriteDuringWriteBackLost = "rewrite-during-write-back-lost" in Filesystem;
    /// A truncation, or a deletion, does not wait for write-back.
    TruncationDuringWriteBack = "truncation-during-write-back" in Filesystem;
    /// A read does not keep its range locked.
    ReadUnlocked = "read-unlocked" in Filesystem;
    /// A shard answers one call of a peer after another, and takes none from its mailbox while it waits for an answer itself.
    PeersAnsweredInLine = "peers-answered-in-line" in Filesystem;
    /// Borrowed blocks are given back while they are being borrowed again.
    ReturnsWithoutTurn = "returns-without-turn" in Filesystem;

    /// A clone locks the range of its source, as btrfs's once did: reads of it wait for the whole clone.
    SourceRangeLocked = "source-range-locked" in Readers;

    /// Entries of the submission queue are not ordered before the doorbell.
    TailFenceMissing = "tail-fence-missing" in NvmeModels;
    /// A completion's phase tag is loaded without acquire.
    PhaseRelaxed = "phase-relaxed" in NvmeModels;
    /// Reading completions is not ordered before telling the controller that they were taken.
    HeadFenceMissing = "head-fence-missing" in NvmeModels;
    /// No full fence between publishing something and looking at what the other side published: shadow doorbells, sleep.
    LookFenceMissing = "look-fence-missing" in NvmeModels;
    /// The keeper's answer is stored without release.
    AnswerRelaxed = "answer-relaxed" in NvmeModels;
    /// The keeper's answer is loaded without acquire.
    AnswerReadRelaxed = "answer-read-relaxed" in NvmeModels;
    /// A change of the controller's life is stored without release.
    PulseRelaxed = "pulse-relaxed" in NvmeModels;
    /// The controller's life is loaded without acquire.
    PulseReadRelaxed = "pulse-read-relaxed" in NvmeModels;

    /// Who rings a reactor's bell looks at its state without a fence.
    RingFenceMissing = "ring-fence-missing" in ReactorModels;
    /// A reactor that announces its sleep looks for work without a fence.
    AnnounceFenceMissing = "announce-fence-missing" in ReactorModels;
    /// Who registers at a gate looks at the condition without a fence.
    RegisterFenceMissing = "register-fence-missing" in ReactorModels;
    /// Who changed a condition looks for somebody waiting without a fence.
    CallFenceMissing = "call-fence-missing" in ReactorModels;
    /// A wake-up does not publish what the waker wrote.
    WakeRelaxed = "wake-relaxed" in ReactorModels;
    /// A poll begins without seeing what wakers wrote.
    PollRelaxed = "poll-relaxed" in ReactorModels;
}

impl Bug {
    /// The bug of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|bug| bug.name() == name)
    }
}

/// Whether `bug` is to be made in this process.
#[cfg(not(feature = "on"))]
#[inline(always)]
pub const fn is_planted(_bug: Bug) -> bool {
    false
}

/// Whether `bug` is to be made in this process.
///
/// # Panics
/// If the environment variable names a bug that does not exist: a net would seem to have holes.
#[cfg(feature = "on")]
pub fn is_planted(bug: Bug) -> bool {
    static PLANTED: std::sync::OnceLock<Option<Bug>> = std::sync::OnceLock::new();
    let named = |name: String| {
        Bug::named(&name).unwrap_or_else(|| panic!("{VARIABLE}={name}: there is no planted bug of that name"))
    };
    *PLANTED.get_or_init(|| std::env::var(VARIABLE).ok().map(named)) == Some(bug)
}

/// The bug of one thread, which a crate keeps in a thread-local for its own tests.
#[derive(Debug, Default)]
pub struct Spot(Cell<Option<Bug>>);

impl Spot {
    /// No bug.
    pub const fn new() -> Self {
        Self(Cell::new(None))
    }

    /// Whether `bug` is planted here.
    pub fn holds(&self, bug: Bug) -> bool {
        self.0.get() == Some(bug)
    }
}

/// Keeps a bug planted on this thread.
#[derive(Debug)]
#[must_use = "the bug is there as long as this lives"]
pub struct Planted(&'static LocalKey<Spot>);

impl Planted {
    /// Plants `bug`.
    ///
    /// # Panics
    /// If there is one already.
    pub fn new(spot: &'static LocalKey<Spot>, bug: Bug) -> Self {
        assert_eq!(spot.with(|spot| spot.0.replace(Some(bug))), None, "one bug at a time");
        Self(spot)
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        self.0.with(|spot| spot.0.set(None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    thread_local! {
        static SPOT: Spot = const { Spot::new() };
    }

    #[test]
    fn every_bug_has_a_name_of_its_own_that_finds_it() {
        let names: BTreeSet<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
        assert_eq!(names.len(), Bug::ALL.len());
        assert!(Bug::ALL.iter().all(|bug| Bug::named(bug.name()) == Some(*bug)));
        assert_eq!(Bug::named("no-such-bug"), None);
    }

    #[test]
    fn a_bug_is_planted_as_long_as_its_guard_lives() {
        let planted = Planted::new(&SPOT, Bug::FlushDropped);
        assert!(SPOT.with(|spot| spot.holds(Bug::FlushDropped) && !spot.holds(Bug::CidUnchecked)));
        drop(planted);
        assert!(!SPOT.with(|spot| spot.holds(Bug::FlushDropped)));
    }
}
