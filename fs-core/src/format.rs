//! What lies on the device, byte by byte: wire structures, their checks, their encoding.
//!
//! Owns: one module per structure, each with raw (as stored) and checked types. `docs/on-disk-format.md` is the same
//! in prose.
//!
//! Invariants: multi-byte fields are little-endian; reserved bytes are explicit and zero; sizes are asserted at compile
//! time; every field read is input: no panic, no unbounded loop, no allocation sized by it.

pub mod extent;
pub mod group;
pub mod items;
pub mod log;
pub mod node;
pub mod superblock;
