//! A safe poll-mode NVMe driver.
//!
//! [`Controller`] brings a controller up over a [`transport`] and hands out [`QueuePair`]s, one for each thread that does
//! I/O; a queue pair is a [`reactor::block::BlockDevice`]. The device is not trusted: whatever it does, the process goes
//! on, and every request is answered in bounded time.
//!
//! The modules from the wire up:
//! - `ring`, `slots`, `prp`, `sgl`, `copy`: arithmetic without memory, tested alone;
//! - `queue`: a queue pair's memory, doorbells and completion checks;
//! - [`handshake`], [`identity`], `admin`: bring-up;
//! - [`fault`]: what goes wrong with a controller, and the life it leads then;
//! - `keeper`, `recovery`, `lane`: events, aborts and resets, off the threads that do I/O;
//! - [`controller`], [`queue_pair`]: what users hold.

mod admin;
mod bring_up;
pub mod controller;
mod copy;
pub mod event;
pub mod fault;
pub mod handshake;
pub mod identity;
mod keeper;
mod lane;
#[cfg(all(test, loom))]
mod models;
pub mod open;
mod ops;
pub mod pci;
mod planted;
mod prp;
mod queue;
pub mod queue_pair;
mod recovery;
mod ring;
mod sgl;
mod shadow;
mod slots;
pub mod spec_string;
pub mod stats;
mod sync;
pub mod transport;
mod wake;

pub use admin::{ADMIN_TIMEOUT, AdminError};
pub use bring_up::BringUpError;
pub use controller::{
    CommandError, Controller, ControllerOptions, Feature, FormatError, FormatOptions, Keeper, MAX_SETTINGS,
    NamespaceUid, Persistence, QueueError, Recovery,
};
pub use copy::CopyLimits;
pub use event::ControllerEvent;
pub use fault::{Fault, Life};
pub use identity::{ControllerInfo, Namespace};
pub use keeper::{ESCALATION_TIMEOUT, MAX_CREATION_FAILURES};
pub use open::{OpenError, OpenOptions, open};
pub use pci::PciAddress;
pub use queue::ProtocolError;
pub use queue_pair::{
    Interrupts, LatencyRecording, NvmAbilities, NvmRequest, QueueOptions, QueuePair, RUN, RUN_LOOKS,
    RUNS_FROM, RejectedNvm, Taking,
};
pub use recovery::REVIVAL_ATTEMPTS;
pub use sgl::DataPointers;
pub use spec_string::{DeviceSpec, SpecError};
