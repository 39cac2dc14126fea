//! What a queue pair is to be like.
//!
//! Owns: [`QueueOptions`] and the choices in it.
//!
//! Excludes: what the device makes of them (`create`).

use std::time::Duration;

use nvme_spec::NamespaceId;

use crate::sgl::DataPointers;

/// Whether a queue's owner can sleep until the device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// Polled only.
    Disabled,
    /// An interrupt vector, if the transport has one left.
    Enabled,
}

/// Whether the time of each request is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyRecording {
    /// No clock read on the I/O path.
    Off,
    /// Two clock reads a request.
    On,
}

/// When a poll takes completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taking {
    /// As soon as there is one.
    AtOnce,
    /// In runs of up to [`RUN`], while at least [`RUNS_FROM`] commands are in flight: a poll waits until a run is complete, but not
    /// longer than it takes to look [`RUN_LOOKS`] times, about a microsecond. A run fills whole cache lines. A controller in software on
    /// another core writes its lines undisturbed if nobody reads what is half written: a few percent more requests, where
    /// that controller is the limit.
    InRuns,
}

/// Completions of a run: four cache lines of 64 bytes.
pub const RUN: u32 = 16;
/// Commands in flight from which on completions come in runs.
pub const RUNS_FROM: usize = 64;
/// How often a poll looks for a run before it takes what there is.
pub const RUN_LOOKS: u32 = 64;

/// What a queue pair is to be like.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// Namespace; the controller's default if `None`.
    pub namespace: Option<NamespaceId>,
    /// Requests at once; less if the controller allows less.
    pub depth: u16,
    /// Bytes of the buffer pool.
    pub pool_bytes: usize,
    /// Bytes of the largest command; less if the controller allows less.
    pub max_transfer: usize,
    /// Time that a command is given before it is aborted.
    pub command_timeout: Duration,
    /// Interrupts.
    pub interrupts: Interrupts,
    /// Latencies.
    pub latency: LatencyRecording,
    /// How commands point to their data.
    pub data_pointers: DataPointers,
    /// When completions are taken.
    pub taking: Taking,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self {
            namespace: None,
            depth: 256,
            pool_bytes: 64 << 20,
            max_transfer: 1 << 20,
            command_timeout: Duration::from_secs(30),
            interrupts: Interrupts::Enabled,
            latency: LatencyRecording::Off,
            data_pointers: DataPointers::Automatic,
            taking: Taking::AtOnce,
        }
    }
}
