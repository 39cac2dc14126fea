//! What `pollux status` shows: figures of the process, its controller, its reactors, its queues and its volume.
//!
//! Owns: the shape of the JSON document, and how the figures are gathered. Counters count from the start of the daemon;
//! whoever wants rates looks twice.

use fs_core::volume::VolumeReport;
use fs_core::{FsError, Volume};
use nvme::{Controller, Life};
use reactor::{Context, ReactorHandle, oneshot};
use serde::Serialize;

/// The whole document.
#[derive(Clone, Debug, Serialize)]
pub struct DaemonReport {
    /// The process.
    pub daemon: ProcessReport,
    /// The controller.
    pub controller: ControllerReport,
    /// By reactor.
    pub reactors: Vec<ReactorReport>,
    /// By queue pair of the device.
    pub queues: Vec<QueueReport>,
    /// The volume and its shards.
    pub volume: VolumeReport,
}

/// Figures of the process.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessReport {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Time since the start in nanoseconds.
    pub uptime_ns: u64,
    /// Mount point.
    pub mount: String,
    /// Device.
    pub device: String,
}

/// The controller and how it fares.
#[derive(Clone, Debug, Serialize)]
pub struct ControllerReport {
    /// Model, as it says.
    pub model: String,
    /// Serial number, as it says.
    pub serial: String,
    /// Firmware revision, as it says.
    pub firmware: String,
    /// `running`, `stopping`, `resetting`, `quiet` (ended) or `abandoned` (ended, and its memory cannot be reused).
    pub state: &'static str,
    /// Times that it was reset and came back.
    pub resets: u32,
    /// The error that ended it.
    pub fault: Option<String>,
}

/// Counters of a reactor; see [`reactor::ReactorStats`].
#[derive(Clone, Debug, Serialize)]
pub struct ReactorReport {
    /// Its number.
    pub reactor: u16,
    /// Rounds of its loop.
    pub loops: u64,
    /// Rounds that found something to do.
    pub busy_loops: u64,
    /// Times a task was polled.
    pub polls: u64,
    /// Tasks alive.
    pub tasks: u64,
    /// Device operations completed.
    pub completions: u64,
    /// Timers fired.
    pub timers: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Times another thread woke it.
    pub wakeups: u64,
}

/// Counters of a queue pair; see [`nvme::stats::QueueCounts`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueueReport {
    /// Its identifier.
    pub queue: u16,
    /// The reactor that uses it.
    pub reactor: u16,
    /// Requests accepted.
    pub requests: u64,
    /// Requests completed with success.
    pub completed: u64,
    /// Requests completed with an error.
    pub errors: u64,
    /// Commands sent to the device.
    pub commands: u64,
    /// Bytes of completed reads.
    pub read_bytes: u64,
    /// Bytes of completed writes.
    pub written_bytes: u64,
    /// Doorbell writes.
    pub doorbells: u64,
    /// Times that a request was sent again, because of a status or a reset.
    pub retried: u64,
    /// Commands that were overdue.
    pub timeouts: u64,
    /// Reads, from submission to completion.
    pub read_lat_ns: LatencyReport,
    /// Writes.
    pub write_lat_ns: LatencyReport,
    /// Flushes and what else moves no data.
    pub other_lat_ns: LatencyReport,
}

/// A latency distribution in nanoseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LatencyReport {
    /// Samples.
    pub samples: u64,
    /// Smallest.
    pub min: u64,
    /// Mean.
    pub mean: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Largest.
    pub max: u64,
}

/// State of a controller.
pub fn of_controller(controller: &Controller) -> ControllerReport {
    let info = controller.info();
    ControllerReport {
        model: info.model.clone(),
        serial: info.serial.clone(),
        firmware: info.firmware.clone(),
        state: match controller.life() {
            Life::Running => "running",
            Life::Stopping => "stopping",
            Life::Resetting => "resetting",
            Life::Quiet => "quiet",
            Life::Abandoned => "abandoned",
        },
        resets: controller.resets(),
        fault: controller.fault().map(ToString::to_string),
    }
}

/// Figures of a reactor.
pub fn of_reactor(handle: &ReactorHandle) -> ReactorReport {
    let stats = handle.stats();
    ReactorReport {
        reactor: handle.id().get(),
        loops: stats.loops,
        busy_loops: stats.busy_loops,
        polls: stats.polls,
        tasks: stats.tasks_started.saturating_sub(stats.tasks_finished),
        completions: stats.completions,
        timers: stats.timers,
        sleeps: stats.sleeps,
        wakeups: stats.wakeups,
    }
}

/// Figures of a volume, asked for on `reactor`; not to be called on a reactor.
///
/// # Errors
/// The volume or the reactor is ending.
pub fn of_volume(volume: &Volume, reactor: &ReactorHandle) -> Result<VolumeReport, String> {
    let (sender, report) = oneshot();
    let volume = volume.clone();
    let started = reactor.spawn_with(move |ctx: Context| {
        let task = async move {
            // The asker may have given up.
            let _unheard = sender.send(volume.report().await);
        };
        // If the task cannot start, the asker sees its channel closed.
        let _refused = ctx.spawn(task);
    });
    started.map_err(|error| error.to_string())?;
    report.recv_blocking().unwrap_or(Err(FsError::ShuttingDown)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;

    #[test]
    fn controller_that_was_shut_down_says_why_it_does_not_run() {
        let controller = device::open(&device::parse("emu:mem,size=16MiB").unwrap()).unwrap();
        let report = of_controller(&controller);
        assert_eq!((report.state, report.resets, report.fault), ("running", 0, None));
        controller.shutdown().unwrap();
        let report = of_controller(&controller);
        assert_eq!(report.state, "quiet");
        assert!(report.fault.is_some());
    }
}
