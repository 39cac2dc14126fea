//! Per-core reactors: everything that runs between a storage engine's tasks and one queue of a device.
//!
//! One OS thread per core runs a [`Runtime`] reactor: an executor of local tasks, bounded mailboxes between threads,
//! timers, and an asynchronous face ([`Disk`]) of a synchronous [`BlockDevice`](block::BlockDevice). The same tasks
//! run under the [`sim::Simulator`]: any number of reactors in one thread, seeded, in virtual time.
//!
//! Invariants:
//! - clock, randomness and device are always passed in; nothing here reads a global source of either;
//! - nothing is lost on a full queue: the sender waits (backpressure) or gets its value back;
//! - a buffer that a device may still touch is never released, whatever happens to the future that asked for it.
//!
//! Excludes: file systems, NVMe, policy of any kind. The crate contains no `unsafe`.

pub mod block;
pub mod clock;
pub mod dma;

pub use clock::{Clock, Instant, SystemClock, WallTime};
pub use dma::{DmaBuffer, DmaPool, DmaRegion, HeapRegion, PoolError};
