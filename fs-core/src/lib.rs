//! Placeholder of the workspace skeleton; replaced by the crate's first slice.

pub mod alloc;
pub mod disk;
pub mod dump;
pub mod error;
pub mod format;
pub mod fsck;
pub mod mkfs;
pub mod request;
pub mod superblock;
pub mod tree;
pub mod types;

mod batch;
mod data;
mod locks;
mod namespace;
mod planted;
mod shard;
pub mod volume;

pub use error::FsError;

/// Largest size of a file, in bytes: what an `off_t` can count, in whole blocks.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64 / types::BLOCK_SIZE * types::BLOCK_SIZE;

pub use data::MAX_WRITE;
pub use namespace::MAX_LINKS;
pub use request::{Reply, Request};
pub use volume::{MountError, MountOptions, Volume, WriteOutcome};
