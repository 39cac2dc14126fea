//! Placeholder of the workspace skeleton; replaced by the crate's first slice.

pub mod types;

#[allow(dead_code)] // until the shard uses it
mod locks;
