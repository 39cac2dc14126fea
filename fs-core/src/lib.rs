//! Placeholder of the workspace skeleton; replaced by the crate's first slice.

pub mod alloc;
pub mod disk;
pub mod error;
pub mod format;
pub mod mkfs;
pub mod request;
pub mod superblock;
pub mod tree;
pub mod types;

#[allow(dead_code)] // until the shard uses it
mod batch;
#[allow(dead_code)] // until the shard uses it
mod locks;
#[allow(dead_code)] // until the shard uses it
mod namespace;

pub use error::FsError;

/// Largest size of a file, in bytes: what an `off_t` can count, in whole blocks.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64 / types::BLOCK_SIZE * types::BLOCK_SIZE;

pub use namespace::MAX_LINKS;
