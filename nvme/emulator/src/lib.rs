//! An NVMe controller in software, embeddable in any process.
//!
//! A real controller: register file with the reset handshake, admin and I/O queues with round-robin arbitration, the
//! commands and statuses of NVM Express 1.4, over sparse memory or a sparse file. A driver reaches it as it would reach
//! a PCI function: registers by [`EmulatedController::read32`] and friends, memory through a [`DmaSpace`], interrupts by
//! eventfd. It reads and writes only what was mapped; whatever else it is pointed at fails the command and is logged.
//!
//! ```text
//!  host ── read32/write32/doorbell ──► controller ──► handshake (CC.EN, CSTS.RDY, shutdown)
//!                                          │
//!                             queue: fetch │ post ──► interrupt
//!                                          ▼
//!                         admin (queue 0)     io (queues 1…)
//!                                                │ data_pointer: PRPs or SGLs → mapped memory
//!                                                ▼
//!                                            namespace ──► store: memory │ file │ write_cache over either
//! ```
//!
//! [`Mode`] says on whose thread commands run: the caller's (deterministic), or the controller's own.

mod admin;
mod config;
mod controller;
mod data_pointer;
mod dma;
mod error;
mod faults;
mod gate;
mod handshake;
mod interrupt;
mod io;
mod keep_alive;
mod latency;
mod locks;
mod manage;
mod namespace;
mod namespaces;
mod power_cut;
mod prp;
mod queue;
mod queue_watch;
mod registers;
pub mod serve;
mod sgl;
mod shadow;
mod store;
mod worker;

pub use config::{
    Backing, ControllerConfig, CreateMode, DEFAULT_LBA_SIZE, FusedOperations, MAX_DSTRD, MAX_IO_QUEUES,
    MAX_METADATA, MAX_NAMESPACE_BYTES, MAX_NAMESPACES, MAX_NSID, MAX_WORKERS, Mode, NamespaceConfig,
    SUPPORTED_ONCS, SglSupport, ShadowDoorbells, ThreadOptions, WriteCache,
};
pub use controller::{Counters, EmulatedController, QueueCounters};
pub use dma::{
    AttachedRegion, DmaAccess, DmaDirection, DmaError, DmaFault, DmaSpace, MAX_LOGGED_DMA_FAULTS,
    MAX_REGIONS, MappedRegion,
};
pub use error::EmulatorError;
pub use faults::{
    AllOnesRegister, CidFault, CommandMatch, Effect, FaultPlan, FaultRule, HeldAbort, MAX_STALE_BLOCKS,
    QueueMatch, ReadyDelay, RegisterFault, RuleId, Times, When,
};
pub use interrupt::VectorMask;
pub use latency::LatencyModel;
pub use manage::{ControllerError, Reliability};
pub use power_cut::{CutPolicy, CutReport, Tear};
