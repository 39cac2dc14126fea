//! Per-core reactors: everything that runs between a storage engine's tasks and one queue of a device.
//!
//! One OS thread per core runs a [`Runtime`] reactor: an executor of local tasks, bounded [mailboxes](mailbox())
//! between threads, timers, and an asynchronous face ([`Disk`]) of a synchronous
//! [`BlockDevice`]. The same tasks run under the [`sim::Simulator`]: any number of reactors in
//! one thread, seeded, in virtual time.
//!
//! Invariants:
//! - clock, randomness and device are always passed in; nothing here reads a global source of either;
//! - nothing is lost on a full queue: the sender waits (backpressure) or gets its value back;
//! - a buffer that a device may still touch is never released, whatever happens to the future that asked for it.
//!
//! Excludes: file systems, NVMe, policy of any kind. The crate contains no `unsafe`.

mod bell;
pub mod block;
pub mod clock;
mod context;
mod core;
pub mod disk;
pub mod dma;
mod handle;
pub mod mailbox;
pub mod oneshot;
mod park;
mod planted;
pub mod random;
mod runtime;
pub mod sim;
mod stats;
mod sync;
mod task;
mod timers;

pub use block::{BlockDevice, Durability, Geometry, IoError, Lba, LbaCount, LbaRange};
pub use clock::{Clock, Instant, SystemClock, WallTime};
pub use context::{Context, Sleep, YieldNow};
pub use core::{DEFAULT_MAX_TASKS, ReactorConfig};
pub use disk::{Command, Disk, Operation};
pub use dma::{DmaBuffer, DmaPool, DmaRegion, HeapRegion, PoolError};
pub use handle::{INBOX_CAPACITY, ReactorHandle, ReactorId, SpawnError};
pub use mailbox::{Closed, Receiver, SendError, Sender, mailbox};
pub use oneshot::{Canceled, OneshotReceiver, OneshotSender, oneshot};
pub use random::Random;
pub use runtime::{CoreId, DRAIN_LIMIT, Options, Runtime, StartError, StopError, block_on};
pub use stats::ReactorStats;
pub use timers::MAX_TIMERS;
