//! A safe poll-mode NVMe driver.
//!
//! [`Controller`] brings a controller up over a [`transport`] and hands out [`QueuePair`]s, one for each thread that does
//! I/O; a queue pair is a [`reactor::block::BlockDevice`]. The device is not trusted: whatever it does, the process goes
//! on, and every request is answered in bounded time.
//!
//! The modules from the wire up:
//! - `ring`, `slots`, `prp`: arithmetic without memory, tested alone;
//! - `queue`: a queue pair's memory, doorbells and completion checks;
//! - [`handshake`], [`identity`], `admin`: bring-up;
//! - [`fault`]: the first fatal error and what follows it;
//! - [`controller`], [`queue_pair`]: what users hold.
//!
//! Excludes: recovery from a failed controller (it stays failed), PCI and vfio-user transports, SGLs.

mod admin;
pub mod controller;
pub mod fault;
pub mod handshake;
pub mod identity;
pub mod open;
mod ops;
pub mod pci;
mod prp;
mod queue;
pub mod queue_pair;
mod ring;
mod slots;
pub mod spec_string;
pub mod stats;
pub mod transport;
mod wake;

pub use admin::{ADMIN_TIMEOUT, AdminError};
pub use controller::{BringUpError, Controller, ControllerOptions, QueueError};
pub use fault::{Fault, Life};
pub use identity::{ControllerInfo, Namespace};
pub use open::{OpenError, OpenOptions, open};
pub use pci::PciAddress;
pub use queue::ProtocolError;
pub use queue_pair::{Interrupts, LatencyRecording, QueueOptions, QueuePair};
pub use spec_string::{DeviceSpec, SpecError};
