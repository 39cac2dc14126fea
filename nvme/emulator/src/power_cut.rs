//! What a power cut does to writes that were not durable yet.
//!
//! Owns: [`CutPolicy`] (what the caller asks for), [`PowerCut`] (the policy being carried out, write by write),
//! [`CutReport`].
//!
//! Unflushed writes are numbered from 0 in the order they completed, namespace by namespace in ascending order of
//! their identifiers; [`unflushed_writes`](crate::EmulatedController::unflushed_writes) counts them.
//!
//! Excludes: the data (`store::write_cache`).

/// Which unflushed writes survive a power cut. Flushed ones, and those with FUA, always do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CutPolicy {
    /// None.
    DropAll,
    /// All.
    KeepAll,
    /// Those before `writes`, and of that one the first `torn_bytes` (rounded down to 512).
    Prefix {
        /// Number of writes that survive whole.
        writes: usize,
        /// Bytes of the next one that survive too.
        torn_bytes: u64,
    },
    /// Write `i` survives if entry `i` is there and true.
    Subset(Vec<bool>),
    /// Each is kept, dropped or torn by the toss of a seeded coin. The same seed gives the same outcome.
    Random {
        /// The seed.
        seed: u64,
        /// Whether and how writes tear.
        tear: Tear,
    },
}

/// Whether a write can survive in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// A write survives whole or not at all.
    Never,
    /// Each aligned unit of 512 bytes survives or not by itself: harsher than the specification allows a device with
    /// larger blocks to be.
    Sectors,
    /// Each aligned unit of 4,096 bytes survives or not by itself.
    Blocks4K,
}

/// What a power cut did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutReport {
    /// Writes that survived whole.
    pub kept: usize,
    /// Writes that left no trace.
    pub dropped: usize,
    /// Writes that survived in part.
    pub torn: usize,
}

impl CutReport {
    /// Unflushed writes there were.
    pub fn unflushed(&self) -> usize {
        self.kept + self.dropped + self.torn
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.kept += other.kept;
        self.dropped += other.dropped;
        self.torn += other.torn;
    }
}

/// A policy being carried out.
pub(crate) struct PowerCut {
    policy: CutPolicy,
    next: usize,
    random: SplitMix64,
}

/// What becomes of one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Kept,
    Dropped,
    /// The first so many bytes survive.
    Head(u64),
    /// Each aligned unit of so many bytes survives by the coin of this seed.
    Units {
        bytes: u64,
        seed: u64,
    },
}

impl PowerCut {
    pub(crate) fn new(policy: CutPolicy) -> Self {
        let seed = if let CutPolicy::Random { seed, .. } = policy { seed } else { 0 };
        Self { policy, next: 0, random: SplitMix64(seed) }
    }

    /// Decides about the next write.
    pub(crate) fn next_fate(&mut self) -> Fate {
        let index = self.next;
        self.next += 1;
        match &self.policy {
            CutPolicy::DropAll => Fate::Dropped,
            CutPolicy::KeepAll => Fate::Kept,
            CutPolicy::Prefix { writes, torn_bytes } => match index.cmp(writes) {
                std::cmp::Ordering::Less => Fate::Kept,
                std::cmp::Ordering::Equal => Fate::Head(torn_bytes & !511),
                std::cmp::Ordering::Greater => Fate::Dropped,
            },
            CutPolicy::Subset(kept) => {
                if kept.get(index).copied().unwrap_or(false) {
                    Fate::Kept
                } else {
                    Fate::Dropped
                }
            }
            CutPolicy::Random { tear, .. } => {
                let unit = match tear {
                    Tear::Never => None,
                    Tear::Sectors => Some(512),
                    Tear::Blocks4K => Some(4096),
                };
                let (toss, seed) = (self.random.next(), self.random.next());
                match unit {
                    Some(bytes) if toss.is_multiple_of(3) => Fate::Units { bytes, seed },
                    _ if toss & (1 << 40) == 0 => Fate::Kept,
                    _ => Fate::Dropped,
                }
            }
        }
    }
}

impl Fate {
    /// Whether the 512-byte sector at `offset` of a write that starts at `start` survives.
    pub(crate) fn keeps(self, start: u64, offset: u64) -> bool {
        match self {
            Self::Kept => true,
            Self::Dropped => false,
            Self::Head(bytes) => offset - start < bytes,
            Self::Units { bytes, seed } => SplitMix64(seed ^ (offset / bytes)).next() & 1 == 0,
        }
    }
}

/// Sebastiano Vigna's SplitMix64: enough for coins, and the same everywhere.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
