//! What only QEMU makes possible: errors of its block layer, hot removal, its death, completions that somebody else wrote,
//! resets at any point, and every state that a power cut may leave.
//!
//! Excludes: what runs on every device (`suite::cases`).

mod device;
mod offers;
mod power_cut;
mod removal;
mod resets;
mod trouble;
mod volume;

use crate::suite::MachineCase;

/// Every case that brings a QEMU of its own.
pub fn cases() -> Vec<MachineCase> {
    [trouble::CASES, offers::CASES, removal::CASES, resets::CASES, volume::CASES, power_cut::CASES].concat()
}
