//! Wire types of the NVM Express specification: registers, queue entries, data structures and their vocabulary.
//!
//! Owns: the layout of everything that crosses between a host and a controller, as plain data. Driver and embedded
//! controller share this crate and nothing else, so that each can be checked against the specification alone.
//!
//! Invariants:
//! - every structure has the size and the field offsets of the specification, asserted at compile time;
//! - enumerations are open: a value that a later specification may assign is representable, never undefined;
//! - fields that the specification counts from zero end in `_z`.
//!
//! Excludes: behaviour. Nothing here reads or writes memory of a device, and no value is checked for plausibility:
//! bytes of a controller are input, and checking them is the business of whoever acts on them.
//!
//! Section numbers cite *NVM Express Base Specification 1.4* unless they name 2.0.
#![no_std]
#![forbid(unsafe_code)]

mod open_enum;

pub mod command;
pub mod completion;
pub mod event;
pub mod feature;
pub mod format;
pub mod identify;
pub mod ids;
pub mod log;
pub mod nvm;
pub mod opcode;
pub mod registers;
pub mod sgl;
pub mod status;

pub use command::{DsmRange, SubmissionEntry};
pub use completion::CompletionEntry;
pub use event::{AsyncEvent, AsyncEventCode, AsyncEventType};
pub use ids::{CommandId, NamespaceId, QueueId};
pub use opcode::{AdminOpcode, NvmOpcode};
pub use sgl::SglDescriptor;
pub use status::{Status, StatusCode, StatusType};

/// Bytes of a submission queue entry (§4.2).
pub const SQE_BYTES: usize = 64;
/// Bytes of a completion queue entry (§4.6).
pub const CQE_BYTES: usize = 16;
/// Bytes of an Identify data structure (§5.15).
pub const IDENTIFY_BYTES: usize = 4096;
