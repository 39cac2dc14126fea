//! Placeholder of the workspace skeleton; replaced by the crate's first slice.

pub mod types;
