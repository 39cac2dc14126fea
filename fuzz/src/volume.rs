//! Volumes that were changed on purpose, with their checksums made right: what targets look at that take whole volumes.
//!
//! Owns: [`Base`], volumes made once for each process; [`crate::volume::damage`], which changes them as a script says.
//!
//! Invariants: a volume is made by `mkfs` and by requests alone, on the simulator, from a constant seed: each process has the same.
//!
//! Excludes: what the changed volumes are put through (`mount`, `fsck`).

pub mod damage;
pub mod images;
pub mod look;
pub mod map;
pub mod work;

pub use damage::damaged;
pub use images::{BASES, Base, bases};
