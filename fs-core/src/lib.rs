//! Placeholder of the workspace skeleton; replaced by the crate's first slice.

pub mod alloc;
pub mod format;
pub mod tree;
pub mod types;

#[allow(dead_code)] // until the shard uses it
mod locks;
