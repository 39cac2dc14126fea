//! Conformance and end-to-end tests by device.
//!
//! | module | owns |
//! |---|---|
//! | `harness` | real daemons, real mounts, real programs (re-exported here) |
//! | [`suite`] | the cases that run unchanged on every device, and those that bring a machine of their own |
//! | [`guest`] | a QEMU guest with the real VFIO, and what must hold in it |
//! | [`kill`] | loads for a daemon that is killed, and what must be there of them afterwards |
//! | [`runner`] | a child process with a deadline for each case |
//! | [`stream`] | a program that prints a line for each case, read as it runs |
//! | [`tiers`] | which devices the suite runs on |
//! | [`qemu`] | QEMU's NVMe controller without a guest: the machine, its configurations, the cases that only it makes possible |
//! | [`report`] | what a case printed, and the table device × suite × result |
//!
//! Excludes: what only the embedded controller can do (`nvme/tests`, `nvme/emulator`).

pub mod guest;
mod harness;
pub mod kill;
pub mod qemu;
pub mod report;
pub mod runner;
pub mod stream;
pub mod suite;
pub mod tiers;

pub use harness::*;
