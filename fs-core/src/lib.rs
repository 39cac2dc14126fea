//! Pollux's filesystem core: a copy-on-write filesystem in shards, on any [`reactor::BlockDevice`].
//!
//! A [`Volume`] is a handle of a mounted volume, usable from any thread. A front end sends it [`Request`]s and takes
//! [`Reply`]s; what a request means is the same for a FUSE mount, a test and a program that embeds this crate.
//!
//! | module | holds |
//! |---|---|
//! | [`volume`] | mount, requests, checkpoints, unmount |
//! | `shard` | one shard: transactions, epochs, messages between shards |
//! | `namespace` | names, inodes, attributes; transactions across shards |
//! | `data`, `locks` | file contents: delalloc queues, page cache, ordered extents, reads; inode and range locks |
//! | `batch`, [`tree`] | plans of changes, and the copy-on-write B+tree they change |
//! | [`alloc`] | allocation groups, reservations |
//! | [`superblock`], [`disk`], [`mod@format`] | rings, blocks, and every structure on the device |
//! | [`mkfs`], [`fsck`], [`dump`] | making, checking and showing volumes that are not mounted |
//!
//! Begin with the volume's module for the way of a request, with `shard` for the way of a change, and with
//! `docs/crash-consistency.md` for what survives.
//!
//! Invariants of the whole: nothing that the newest superblock reaches is overwritten; everything read is verified;
//! clock, randomness and device come from the reactor, so the same code runs on the simulator.
//!
//! Excludes: NVMe, FUSE, threads.

pub mod alloc;
pub mod disk;
pub mod dump;
pub mod error;
pub mod format;
pub mod fsck;
pub mod mkfs;
pub mod relocate;
pub mod request;
pub mod superblock;
pub mod tree;
pub mod types;

mod batch;
mod data;
mod locks;
mod log;
mod namespace;
mod planted;
mod shard;
pub mod volume;

pub use error::FsError;

/// Largest size of a file, in bytes: what an `off_t` can count, in whole blocks.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64 / types::BLOCK_SIZE * types::BLOCK_SIZE;

pub use data::MAX_WRITE;
pub use data::listing::ROWS_PER_STEP as LISTED_EXTENTS;
pub use namespace::MAX_LINKS;
pub use request::{Reply, Request};
pub use volume::{MountError, MountOptions, Volume, WriteOutcome};
